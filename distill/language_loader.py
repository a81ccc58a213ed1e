"""Batches of a language model's stage: packs of the order, cut into one rank's micro-batches.

Shapes: B sequences of a micro-batch, L tokens, N positions to predict from, R rows of it, P packs.

Packs are formed from the global order before ranks slice it. The state counts rows; the global batch
counts packs, so that a step takes as many rows as its packs hold.

Invariants (tests/distill/test_language_loader.py): those of ``distill.loader``, and
    1. ``real_count_in_step`` is the number of tokens that the whole step predicts, known to every rank.
    2. A resumed epoch has the packs that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distill.data_state import DataState, accumulation, slice_rank
from distill.language_corpus import LanguageCorpus
from distill.loader import LoaderOptions, Step, start_state
from distill.order import EpochOrder, OrderKey
from distill.packing import PackedTokens, cut_packs
from distill.prefetch import read_ahead
from distill.stored_targets import StoredTargets
from schemas.errors import DataError, RecipeError

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank; tensors own their memory.

    Attributes:
        input_ids_BL: int64; padding has the padding token.
        positions_BL, segments_BL: See ``PackedTokens``.
        places_N: int64, of each position to predict from its place in the flattened sequences.
        targets: One per teacher, or one without a teacher; padding packs have position weight 0.
        rows: int64[R], rows of the corpus.
        weights: float32[R], 1 for a row of the step, 0 for padding.
        real_count_in_step: Tokens to predict of the whole step: what the sum of losses is divided by.
    """

    input_ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    segments_BL: torch.Tensor
    places_N: torch.Tensor
    targets: tuple[StoredTargets, ...]
    rows: torch.Tensor
    weights: torch.Tensor
    real_count_in_step: int


@dataclass(frozen=True, slots=True)
class PackOptions:
    """How rows become sequences.

    Attributes:
        max_length: Most tokens of a sequence.
        pad_id: Token of padding.
        pack: False: one row to a sequence.
    """

    max_length: int
    pad_id: int = 0
    pack: bool = True


class LanguageLoader:
    """Reads a stage.

    Args:
        corpus: Chunks and stores.
        rows: int64[R], the rows to train on, ascending; R >= 1.
        options: How to read; batches count packs.
        packs: How to pack.

    Attributes:
        micro_batch: Packs of a micro-batch.
        num_micro_steps: Micro-batches of a step (gradient accumulation).

    Raises:
        DataError: There are no rows.
        RecipeError: A row is longer than a sequence.
    """

    def __init__(
        self, corpus: LanguageCorpus, rows: Rows, options: LoaderOptions, packs: PackOptions
    ) -> None:
        if not len(rows):
            raise DataError("there are no rows to read: every chunk is excluded or has nothing to predict")
        longest = int(corpus.lengths[rows].max())
        if longest > packs.max_length:
            raise RecipeError(
                f"max_length is {packs.max_length}, but chunks have up to {longest} tokens",
                field="student.max_length",
            )
        self._corpus = corpus
        self._rows = rows
        self._options = options
        self._packs = packs
        self._start = start_state(options, corpus, rows)
        self.micro_batch, self.num_micro_steps = accumulation(
            options.global_batch, options.max_micro_batch, options.world_size
        )

    def start(self) -> DataState:
        """Returns the position before the first step."""
        return self._start

    def count_steps(self, epochs: int) -> int:
        """Returns the optimizer steps of the first epochs: their packs differ, so do their steps."""
        return sum(len(self._cut_epoch(epoch).step_starts) for epoch in range(epochs))

    def steps(self, state: DataState, num_steps: int | None = None) -> Iterator[Step[PackedBatch]]:
        """Yields steps from ``state`` on, over the ends of epochs; see ``StageLoader.steps``.

        Raises:
            RefusedError: The state is a position in other data.
            DataError: The state is not where a step begins; see ``LanguageCorpus.gather``.
        """
        self._start.check_same_data(state)
        cut = self._cut_epoch(state.epoch)
        first = cut.find_step(state.samples_consumed)
        if num_steps is None:
            num_steps = len(cut.step_starts) - first
        return read_ahead(self._make_steps(state, cut, num_steps), self._options.prefetch)

    def evaluate(self, rows: Rows, batch_packs: int) -> Iterator[PackedBatch]:
        """Yields this rank's batches of ``rows`` (held-out ones, say), packed in the order given.

        Every rank gets the same number of batches of as many packs.

        Args:
            rows: int64, rows of the corpus.
            batch_packs: Packs of a batch.
        """
        if not len(rows):
            return
        bounds = self._cut(rows)
        options, num_packs = self._options, len(bounds) - 1
        share = -(-num_packs // options.world_size)
        batch = min(batch_packs, share)
        sliced = slice_rank(np.arange(num_packs), options.rank, options.world_size, batch, -(-share // batch))
        count = int(self._corpus.num_targets[rows].sum())
        for first in range(0, len(sliced.rows), batch):
            part = slice(first, first + batch)
            yield self._make_batch(rows, bounds, sliced.rows[part], sliced.weights[part], count)

    def _cut(self, ordered: Rows) -> Rows:
        return cut_packs(self._corpus.lengths[ordered], self._packs.max_length, pack=self._packs.pack)

    def _cut_epoch(self, epoch: int) -> _EpochPacks:
        options, start = self._options, self._start
        key = OrderKey(options.seed, start.corpus_key, options.window, start.algorithm_version)
        ordered = EpochOrder(key, epoch, self._rows, self._corpus.shard_bounds).slice(0, len(self._rows))
        return _EpochPacks(ordered, self._cut(ordered), options.global_batch)

    def _make_steps(self, state: DataState, cut: _EpochPacks, num_steps: int) -> Iterator[Step[PackedBatch]]:
        epoch = state.epoch
        for _ in range(num_steps):
            if epoch != state.epoch:
                epoch = state.epoch
                cut = self._cut_epoch(epoch)
            step = cut.find_step(state.samples_consumed)
            packs = cut.packs_of(step)
            num_rows = int(cut.bounds[packs[-1] + 1] - cut.bounds[packs[0]])
            state = state.advance(num_rows, len(self._rows))
            batches = self._make_batches(cut, packs)
            yield Step(batches, state, ends_epoch=state.samples_consumed == 0, num_rows=num_rows)

    def _make_batches(self, cut: _EpochPacks, packs: Rows) -> tuple[PackedBatch, ...]:
        options = self._options
        step_rows = cut.ordered[cut.bounds[packs[0]] : cut.bounds[packs[-1] + 1]]
        count = int(self._corpus.num_targets[step_rows].sum())
        share = slice_rank(packs, options.rank, options.world_size, self.micro_batch, self.num_micro_steps)
        cuts = [
            slice(start, start + self.micro_batch) for start in range(0, len(share.rows), self.micro_batch)
        ]
        return tuple(
            self._make_batch(cut.ordered, cut.bounds, share.rows[part], share.weights[part], count)
            for part in cuts
        )

    def _make_batch(
        self,
        ordered: Rows,
        bounds: Rows,
        packs: Rows,
        weights: npt.NDArray[np.float32],
        real_count: int,
    ) -> PackedBatch:
        """Makes a batch of ``packs``, numbers of runs of ``ordered`` that ``bounds`` cuts."""
        rows = np.concatenate([ordered[bounds[pack] : bounds[pack + 1]] for pack in packs])
        sizes = bounds[packs + 1] - bounds[packs]
        laid = PackedTokens.lay_out(self._corpus.lengths[rows], np.concatenate([[0], np.cumsum(sizes)]))
        found = self._corpus.gather(rows)
        input_ids_BL = np.full(laid.shape, self._packs.pad_id, np.int64)
        input_ids_BL.reshape(-1)[laid.places] = found.input_ids
        row_weights = np.repeat(weights, sizes)
        token_weights = np.repeat(row_weights, np.diff(found.offsets))
        weights_N = torch.from_numpy(token_weights[found.sources])
        return PackedBatch(
            input_ids_BL=torch.from_numpy(input_ids_BL),
            positions_BL=torch.from_numpy(laid.positions_BL),
            segments_BL=torch.from_numpy(laid.segments_BL),
            places_N=torch.from_numpy(laid.places[found.sources]),
            targets=tuple(each.weighted(weights_N) for each in found.targets),
            rows=torch.from_numpy(rows),
            weights=torch.from_numpy(row_weights),
            real_count_in_step=real_count,
        )


@dataclass(frozen=True, slots=True)
class _EpochPacks:
    """One epoch.

    Attributes:
        ordered: int64[R], rows in the order of reading.
        bounds: int64[P + 1], where packs start in it.
        global_batch: Packs of a step.
    """

    ordered: Rows
    bounds: Rows
    global_batch: int

    @property
    def step_starts(self) -> Rows:
        """Rows of the epoch before each step, int64."""
        return self.bounds[:-1][:: self.global_batch]

    def find_step(self, samples_consumed: int) -> int:
        """Returns the step that begins there.

        Raises:
            DataError: None does.
        """
        starts = self.step_starts
        step = int(np.searchsorted(starts, samples_consumed))
        if step == len(starts) or starts[step] != samples_consumed:
            raise DataError(f"no step begins at row {samples_consumed} of an epoch of {len(self.ordered)}")
        return step

    def packs_of(self, step: int) -> Rows:
        """Returns the numbers of a step's packs."""
        return np.arange(
            step * self.global_batch,
            min((step + 1) * self.global_batch, len(self.bounds) - 1),
            dtype=np.int64,
        )
