"""Corpora with stores, read step by step as all ranks together see them, and what they should see.

What is expected comes from ``distill.order.order`` and the numbers that were written, never from the
loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from distill.data_state import DataState
from distill.join import JoinedCorpus
from distill.loader import Batch, LoaderOptions, StageLoader
from distill.order import OrderKey, order
from distill.token_files import TokenFiles
from distill.tokens import CorpusTokens, Padding
from schemas.job import PartSource, SoftTarget
from schemas.plan import Plan
from schemas.rows import corpus_key
from tests.store_factory import make_part, make_store, target

LABELS = ("a", "b", "c")
NATIVE = {"first": ("a", "b", "c"), "second": ("c", "a", "b")}
SEED = 5


@dataclass(frozen=True)
class PartShape:
    """A corpus part.

    Attributes:
        shards: Rows of each shard.
        excluded: By teacher, rows of the part without logits.
    """

    shards: tuple[int, ...]
    excluded: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True)
class Reading:
    """How a run reads: nothing of it may change the global sequence."""

    world_size: int = 1
    prefetch: int = 0
    max_micro_batch: int = 3


@dataclass(frozen=True)
class GlobalStep:
    """A step over all ranks, padding left out: rows in order, and what comes with each."""

    rows: tuple[int, ...]
    labels: tuple[int, ...]
    logits: tuple[tuple[tuple[float, ...], ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    real_count: int
    epoch: int
    samples_consumed: int


class MadeCorpus:
    """Parts, two stores of each, and the student's tokens.

    Args:
        root: Where its files go.
        parts: Their shapes.
        global_batch: Rows of a step.
        window: Shards that are shuffled together.
        dropped: Rows of the corpus that are not used.
    """

    def __init__(
        self,
        root: Path,
        parts: Sequence[PartShape],
        *,
        global_batch: int = 8,
        window: int = 2,
        dropped: Sequence[int] = (),
    ) -> None:
        self.global_batch, self.window = global_batch, window
        sizes = [sum(part.shards) for part in parts]
        self.num_rows = sum(sizes)
        generator = np.random.default_rng(0)
        # In the order of LABELS; the second teacher's are stored in its own.
        self.logits = generator.normal(size=(self.num_rows, 2, len(LABELS))).astype(np.float32)
        self.labels = np.arange(self.num_rows) % (len(LABELS) + 1) - 1
        offsets = np.cumsum([0, *sizes])
        self.bounds = np.concatenate(
            [
                [0],
                *(offset + np.cumsum(part.shards) for offset, part in zip(offsets[:-1], parts, strict=True)),
            ]
        )
        excluded = {
            int(offset) + row
            for offset, part in zip(offsets[:-1], parts, strict=True)
            for rows in part.excluded
            for row in rows
        }
        self.usable = np.setdiff1d(np.arange(self.num_rows), [*excluded, *dropped])
        self._tokens = make_tokens(self.num_rows)
        self._dropped = root / "dropped.npy"
        root.mkdir(parents=True, exist_ok=True)
        np.save(self._dropped, np.array(sorted(dropped), np.int64))
        self._sources: list[PartSource] = []
        stores: dict[str, list[Path]] = {name: [] for name in NATIVE}
        for number, (start, stop) in enumerate(pairwise(offsets)):
            made = self._make_part(
                root / f"part-{number}", f"part-{number}", int(start), int(stop), parts[number]
            )
            self._sources.append(made[0])
            for name, path in zip(NATIVE, made[1], strict=True):
                stores[name].append(path)
        self._targets: list[SoftTarget] = [target((name, paths)) for name, paths in stores.items()]
        self._key = OrderKey(SEED, corpus_key([source.fingerprint for source in self._sources]), window)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.usable) // self.global_batch)

    def loaders(self, reading: Reading) -> list[StageLoader]:
        """Opens everything anew, as a run that was started again does; one loader for each rank.

        The ranks share the open files: they are threads of one process here.
        """
        joined = JoinedCorpus.open(self._sources, self._targets, LABELS, dropped_rows=self._dropped)
        return [self._loader(joined, reading, rank) for rank in range(reading.world_size)]

    def _loader(self, joined: JoinedCorpus, reading: Reading, rank: int) -> StageLoader:
        options = LoaderOptions(
            seed=SEED,
            global_batch=self.global_batch,
            max_micro_batch=reading.max_micro_batch,
            window=self.window,
            rank=rank,
            world_size=reading.world_size,
            prefetch=reading.prefetch,
        )
        return StageLoader(joined, self._tokens, joined.usable_rows(), options)

    def read(
        self, reading: Reading, state: DataState | None, asked: int | None, taken: int | None = None
    ) -> tuple[list[GlobalStep], DataState | None]:
        """Starts a run at ``state``, as it is saved, and leaves it after ``taken`` of ``asked`` steps.

        Returns:
            The steps over all ranks, and the state after the last of them.
        """
        found = []
        with ExitStack() as stack:
            ranks = []
            for loader in self.loaders(reading):
                saved = (state or loader.start()).model_dump_json()
                steps = loader.steps(DataState.model_validate_json(saved), asked)
                ranks.append(stack.enter_context(closing(steps)))  # type: ignore[type-var]
            # ``zip`` would take one more step of rank 0 than is asked for, and it must be strict.
            for parts in islice(zip(*ranks, strict=True), taken):
                (state,) = {step.state for step in parts}
                shapes = {tuple(len(batch.rows) for batch in step.batches) for step in parts}
                assert len(shapes) == 1
                assert {step.ends_epoch for step in parts} == {state.samples_consumed == 0}
                found.append(join_ranks([list(step.batches) for step in parts], state))
        return found, state

    def expected(self, num_steps: int) -> list[GlobalStep]:
        """Returns what a run's first steps must be."""
        steps: list[GlobalStep] = []
        epoch = 0
        while len(steps) < num_steps:
            rows = order(self._key, epoch, self.usable, self.bounds, 0, len(self.usable))
            assert sorted(rows.tolist()) == self.usable.tolist()
            for first in range(0, len(rows), self.global_batch):
                stop = first + self.global_batch
                ends = stop >= len(rows)
                position = (epoch + 1, 0) if ends else (epoch, stop)
                steps.append(self._expected_step(rows[first:stop], *position))
            epoch += 1
        return steps[:num_steps]

    def _expected_step(self, rows: np.ndarray, epoch: int, samples_consumed: int) -> GlobalStep:
        return GlobalStep(
            rows=tuple(rows.tolist()),
            labels=tuple(self.labels[rows].tolist()),
            logits=_nested(self.logits[rows]),
            tokens=tuple(token_ids(row) for row in rows.tolist()),
            real_count=len(rows),
            epoch=epoch,
            samples_consumed=samples_consumed,
        )

    def _make_part(
        self, root: Path, name: str, start: int, stop: int, shape: PartShape
    ) -> tuple[PartSource, list[Path]]:
        texts = [(f"text {row}",) for row in range(start, stop)]
        labels = self.labels[start:stop].tolist()
        made = make_part(root / "rows.arrow", texts, labels, shard_rows=stop - start, name=name)
        bounds = tuple(int(bound) for bound in np.cumsum([0, *shape.shards]))
        plan = Plan(made.plan.rows, bounds, made.plan.fingerprint)
        roots = []
        for number, (teacher, native) in enumerate(NATIVE.items()):
            columns = [LABELS.index(label) for label in native]
            logits = self.logits[start:stop, number][:, columns]
            roots.append(
                make_store(
                    root / teacher,
                    plan,
                    logits,
                    labels=native,
                    teacher=teacher,
                    excluded=shape.excluded[number],
                )
            )
        return made.source.model_copy(update={"plan_hash": plan.plan_hash}), roots


def token_ids(row: int) -> tuple[int, ...]:
    """Tokens of a row: 1 to 4 of them."""
    return tuple(row + place for place in range(1 + row % 4))


def make_tokens(num_rows: int) -> CorpusTokens:
    """Makes the student's tokens."""
    ids = [token_ids(row) for row in range(num_rows)]
    lengths = np.array([len(row) for row in ids], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    files = TokenFiles(np.concatenate(ids).astype(np.int32), offsets, lengths)
    return CorpusTokens((files,), Padding(pad_id=0, pad_type_id=0, left=False, token_types=False))


def join_ranks(ranks: Sequence[Sequence[Batch]], state: DataState) -> GlobalStep:
    """Puts the ranks' batches one after another and leaves out the padding."""
    batches = [batch for rank in ranks for batch in rank]
    (real_count,) = {batch.real_count_in_step for batch in batches}
    weights = np.concatenate([batch.weights.numpy() for batch in batches])
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert weights.sum() == real_count
    real = weights == 1.0
    rows = np.concatenate([batch.rows.numpy() for batch in batches])
    assert np.isin(rows, rows[real]).all()
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    logits = np.concatenate([batch.logits_BNC.numpy() for batch in batches])
    tokens = [
        tuple(ids[mask == 1].tolist())
        for batch in batches
        for ids, mask in zip(batch.input["input_ids"], batch.input["attention_mask"], strict=True)
    ]
    return GlobalStep(
        rows=tuple(rows[real].tolist()),
        labels=tuple(labels[real].tolist()),
        logits=_nested(logits[real]),
        tokens=tuple(row for row, kept in zip(tokens, real.tolist(), strict=True) if kept),
        real_count=real_count,
        epoch=state.epoch,
        samples_consumed=state.samples_consumed,
    )


def _nested(logits_BNC: np.ndarray) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(tuple(head) for head in row) for row in logits_BNC.tolist())
