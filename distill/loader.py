"""Batches of a stage: the order's steps, cut into one rank's micro-batches, with tokens and soft labels.

Shapes: B rows of a micro-batch, L tokens, N soft targets, C classes, G the global batch.

Invariants (tests/distill/test_loader.py):
    1. The global sequence of rows depends neither on world size, nor on micro-batch, nor on where
       reading started; nothing is repeated or left out in silence.
    2. The state that comes with a step counts the rows up to and with that step, whatever was prefetched.
    3. Every rank gets the same number of steps and of micro-batches in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from distill.data_state import DataState, accumulation, hash_rows, slice_rank
from distill.join import JoinedCorpus
from distill.order import ALGORITHM_VERSION, EpochOrder, OrderKey
from distill.prefetch import read_ahead
from distill.tokens import CorpusTokens
from schemas.errors import DataError

Rows = npt.NDArray[np.int64]


class Counted(Protocol):
    """A micro-batch of a step whose losses are divided by a number known beforehand."""

    @property
    def real_count_in_step(self) -> int:
        """What the sum of losses is divided by, over all ranks and micro-batches."""


AnyBatch = TypeVar("AnyBatch", bound=Counted)


class ReadCorpus(Protocol):
    """What a position in the data is bound to."""

    @property
    def corpus_key(self) -> str:
        """Key of the ordered parts."""

    @property
    def plan_hashes(self) -> tuple[str, ...]:
        """Of the parts."""

    @property
    def generation_hashes(self) -> tuple[str, ...]:
        """Of the stores."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank; tensors own their memory.

    Attributes:
        input: What the encoder takes, int64[B, L] each.
        labels: int64[B], -1 where unlabelled.
        logits_BNC: float32, teachers' logits in the job's label order.
        weights: float32[B], 1 for a row of the step, 0 for padding.
        rows: int64[B], rows of the corpus.
        real_count_in_step: Rows of the whole step, over all ranks and micro-batches: what the sum of
            losses is divided by.
    """

    input: dict[str, torch.Tensor]
    labels: torch.Tensor
    logits_BNC: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor
    real_count_in_step: int


@dataclass(frozen=True, slots=True)
class Step(Generic[AnyBatch]):
    """One optimizer step of one rank.

    Attributes:
        batches: Its micro-batches.
        state: To be saved once the optimizer has stepped.
        ends_epoch: Whether it is the last of its epoch.
        num_rows: Rows of the step, over all ranks.
    """

    batches: tuple[AnyBatch, ...]
    state: DataState
    ends_epoch: bool
    num_rows: int


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """How a stage is read.

    Attributes:
        seed: Of the order.
        global_batch: G, rows of a step over all ranks.
        max_micro_batch: The most rows of a micro-batch.
        window: Shards that are shuffled together.
        rank: This process.
        world_size: Number of ranks.
        prefetch: Steps made ahead by a background thread; 0: none, no thread.
    """

    seed: int
    global_batch: int
    max_micro_batch: int
    window: int
    rank: int = 0
    world_size: int = 1
    prefetch: int = 2


class StepSource(Protocol[AnyBatch]):
    """What a trainer reads."""

    def start(self) -> DataState:
        """Returns the position before the first step."""

    def steps(self, state: DataState, num_steps: int | None = None) -> Iterator[Step[AnyBatch]]:
        """Yields steps from ``state`` on; closing the iterator ends what runs behind it."""


def start_state(options: LoaderOptions, corpus: ReadCorpus, rows: Rows) -> DataState:
    """Returns the position before the first step over the selected ``rows`` of a corpus."""
    return DataState(
        seed=options.seed,
        global_batch=options.global_batch,
        window=options.window,
        corpus_key=corpus.corpus_key,
        algorithm_version=ALGORITHM_VERSION,
        rows_hash=hash_rows(rows),
        plan_hashes=corpus.plan_hashes,
        generation_hashes=corpus.generation_hashes,
    )


class StageLoader:
    """Reads a stage.

    Args:
        joined: Corpus and stores.
        tokens: The student's tokens of the same parts.
        rows: int64[R], the rows to train on, ascending; R >= 1.
        options: How to read.

    Attributes:
        micro_batch: Rows of a micro-batch.
        num_micro_steps: Micro-batches of a step (gradient accumulation).

    Raises:
        DataError: There are no rows, or the tokens are of another corpus.
    """

    def __init__(
        self, joined: JoinedCorpus, tokens: CorpusTokens, rows: Rows, options: LoaderOptions
    ) -> None:
        if not len(rows):
            raise DataError("there are no rows to read: every row is excluded, dropped or unlabelled")
        if tokens.num_rows != joined.num_rows:
            raise DataError(f"tokens of {tokens.num_rows} rows, the corpus has {joined.num_rows}")
        self._joined = joined
        self._tokens = tokens
        self._rows = rows
        self._options = options
        self._start = start_state(options, joined, rows)
        self.micro_batch, self.num_micro_steps = accumulation(
            options.global_batch, options.max_micro_batch, options.world_size
        )
        joined.reserve(2 * options.window)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last may be short."""
        return -(-len(self._rows) // self._options.global_batch)

    def start(self) -> DataState:
        """Returns the position before the first step."""
        return self._start

    def steps(self, state: DataState, num_steps: int | None = None) -> Iterator[Step[Batch]]:
        """Yields steps from ``state`` on, over the ends of epochs.

        Closing the iterator (``contextlib.closing``) ends the prefetching thread; running it to its end
        does so too.

        Args:
            state: From ``start`` or from a checkpoint.
            num_steps: How many; None: to the end of the state's epoch.

        Raises:
            RefusedError: The state is a position in other data.
            DataError: The state is not where a step begins; see ``JoinedCorpus.gather``.
        """
        self._start.check_same_data(state)
        steps_done, rest = divmod(state.samples_consumed, self._options.global_batch)
        if rest or state.samples_consumed >= len(self._rows):
            raise DataError(
                f"no step begins at row {state.samples_consumed} of an epoch of {len(self._rows)}"
            )
        if num_steps is None:
            num_steps = self.num_steps_per_epoch - steps_done
        return read_ahead(self._make_steps(state, num_steps), self._options.prefetch)

    def evaluate(self, rows: Rows, batch_rows: int) -> Iterator[Batch]:
        """Yields this rank's batches of ``rows`` (held-out ones, say), in order.

        Every rank gets the same number of equally large batches; padding has weight 0.
        ``real_count_in_step`` is the number of rows over all ranks.

        Args:
            rows: int64[R], rows of the corpus.
            batch_rows: Rows of a batch.
        """
        if not len(rows):
            return
        share = -(-len(rows) // self._options.world_size)
        batch = min(batch_rows, share)
        sliced = slice_rank(rows, self._options.rank, self._options.world_size, batch, -(-share // batch))
        for first in range(0, len(sliced.rows), batch):
            part = slice(first, first + batch)
            yield self._make_batch(sliced.rows[part], sliced.weights[part], len(rows))

    def _make_steps(self, state: DataState, num_steps: int) -> Iterator[Step[Batch]]:
        options = self._options
        key = OrderKey(options.seed, state.corpus_key, options.window, state.algorithm_version)
        epoch_order: EpochOrder | None = None
        epoch = -1
        for _ in range(num_steps):
            if epoch_order is None or epoch != state.epoch:
                epoch = state.epoch
                epoch_order = EpochOrder(key, epoch, self._rows, self._joined.shard_bounds)
            first = state.samples_consumed
            rows = epoch_order.slice(first, min(first + options.global_batch, len(self._rows)))
            state = state.advance(len(rows), len(self._rows))
            batches = self._make_batches(rows)
            yield Step(batches, state, ends_epoch=state.samples_consumed == 0, num_rows=len(rows))

    def _make_batches(self, step_rows: Rows) -> tuple[Batch, ...]:
        options = self._options
        share = slice_rank(
            step_rows, options.rank, options.world_size, self.micro_batch, self.num_micro_steps
        )
        starts = range(0, len(share.rows), self.micro_batch)
        cuts = [slice(start, start + self.micro_batch) for start in starts]
        return tuple(self._make_batch(share.rows[cut], share.weights[cut], len(step_rows)) for cut in cuts)

    def _make_batch(self, rows: Rows, weights: npt.NDArray[np.float32], real_count: int) -> Batch:
        joined = self._joined.gather(rows)
        return Batch(
            input=self._tokens.collate(rows),
            labels=torch.from_numpy(joined.labels),
            logits_BNC=torch.from_numpy(joined.logits_BNC),
            weights=torch.from_numpy(weights),
            rows=torch.from_numpy(rows),
            real_count_in_step=real_count,
        )
