"""The position in the data, saved with a checkpoint, and how a step is shared out among ranks.

Invariants (tests/distill/test_data_state.py):
    1. The state is the same on every rank and depends neither on the world size nor on prefetching.
    2. The ranks' slices of a step, put one after another, are the step's rows in order.
    3. Every rank has the same number of equally large micro-batches in every step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from schemas.errors import RefusedError
from schemas.recipe import Count, Frozen

Position = Annotated[int, Field(ge=0)]


class DataState(Frozen):
    """How far the optimizer has got in the data.

    Attributes:
        epoch: 0-based.
        samples_consumed: Rows of the epoch that the optimizer has stepped on.
        seed, global_batch, window, corpus_key, algorithm_version: What the order depends on.
        rows_hash: SHA-256 over the selected rows (64 hex digits).
        plan_hashes: Of the parts, in order.
        generation_hashes: Of the joined stores, teacher by teacher and part by part.
    """

    epoch: Position = 0
    samples_consumed: Position = 0
    seed: int
    global_batch: Count
    window: Count
    corpus_key: str
    algorithm_version: int
    rows_hash: str
    plan_hashes: tuple[str, ...]
    generation_hashes: tuple[str, ...] = ()

    def advance(self, count: int, num_rows: int) -> Self:
        """Returns the state after a step of ``count`` rows in an epoch of ``num_rows``."""
        consumed = self.samples_consumed + count
        if consumed < num_rows:
            return self.model_copy(update={"samples_consumed": consumed})
        return self.model_copy(update={"epoch": self.epoch + 1, "samples_consumed": 0})

    def check_same_data(self, other: DataState) -> None:
        """Checks that ``other``, from a checkpoint, is a position in the same data.

        Raises:
            RefusedError: Anything but the position differs; the error names the fields.
        """
        position = {"epoch", "samples_consumed"}
        ours, theirs = self.model_dump(exclude=position), other.model_dump(exclude=position)
        differing = [f"{name}: {theirs[name]} -> {ours[name]}" for name in ours if ours[name] != theirs[name]]
        if differing:
            raise RefusedError(
                "the checkpoint was made with other data; use another output directory",
                differing=differing,
            )


@dataclass(frozen=True, slots=True)
class RankSlice:
    """One rank's share of a step.

    Attributes:
        rows: int64[K * M], K micro-batches of M rows; padding repeats a row of the step.
        weights: float32[K * M], 1 for a row of the step, 0 for padding.
    """

    rows: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def accumulation(global_batch: int, max_micro_batch: int, world_size: int) -> tuple[int, int]:
    """Returns the micro-batch M and the number of micro-steps K of a rank.

    K is the smallest number of micro-batches that hold a rank's largest share of a step, and M the
    smallest size that does so in K: K * M >= ceil(global_batch / world_size), M <= max_micro_batch.
    """
    share = -(-global_batch // world_size)
    steps = -(-share // max_micro_batch)
    return -(-share // steps), steps


def slice_rank(
    step_rows: npt.NDArray[np.int64], rank: int, world_size: int, micro_batch: int, num_micro_steps: int
) -> RankSlice:
    """Returns one rank's contiguous share of a step, padded to K * M rows.

    Args:
        step_rows: int64[n], the step's rows in order; 1 <= n <= the global batch.
        rank: 0 <= rank < world_size.
        world_size: Number of ranks.
        micro_batch: M, from ``accumulation``.
        num_micro_steps: K, from ``accumulation``.
    """
    count = len(step_rows)
    share = step_rows[rank * count // world_size : (rank + 1) * count // world_size]
    slots = micro_batch * num_micro_steps
    if count == 0 or len(share) > slots:
        raise ValueError(f"{len(share)} of {count} rows in {slots} slots")
    rows = np.full(slots, step_rows[0], np.int64)
    weights = np.zeros(slots, np.float32)
    rows[: len(share)] = share
    weights[: len(share)] = 1.0
    return RankSlice(rows, weights)


def hash_rows(rows: npt.NDArray[np.int64]) -> str:
    """Returns the SHA-256 (64 hex digits) over row numbers as little-endian int64."""
    return hashlib.sha256(np.ascontiguousarray(rows, "<i8").data).hexdigest()
