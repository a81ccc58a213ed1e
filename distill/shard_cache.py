"""The shards of the current window, copied into contiguous memory, so that a batch is one fancy index.

Shapes: B rows asked for, P rows of a shard, N soft targets, C classes.

Invariants:
    1. Memory does not grow with the corpus: a fixed number of slots, first in, first out
       (tests/distill/test_join.py).
    2. A shard is loaded, and so checked, before a row of it is returned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_CACHE_BYTES = 256 * 1024 * 1024

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Copies of joined rows.

    Attributes:
        labels: int64[B], golden labels, -1 where unlabelled.
        logits_BNC: float32[B, N, C], in the job's label order.
    """

    labels: npt.NDArray[np.int64]
    logits_BNC: npt.NDArray[np.float32]


Load = Callable[[int, npt.NDArray[np.int64], npt.NDArray[np.float32]], None]
"""Fills ``labels[P]`` and ``logits[P, N, C]`` with a shard's rows."""


class ShardCache:
    """Slots that hold one shard each.

    Args:
        bounds: int64[S + 1], shard bounds of the corpus.
        targets: N and C.
        num_slots: The most shards held; fewer if they would take more than ``MAX_CACHE_BYTES``.
        load: Loads one shard.
    """

    def __init__(self, bounds: Rows, targets: tuple[int, int], num_slots: int, load: Load) -> None:
        self._bounds = bounds
        self._load = load
        self._slot_rows = int(np.diff(bounds).max(initial=1))
        slot_bytes = self._slot_rows * (8 + 4 * targets[0] * targets[1])
        self.num_slots = max(1, min(num_slots, len(bounds) - 1, MAX_CACHE_BYTES // slot_bytes))
        self._labels = np.empty(self.num_slots * self._slot_rows, np.int64)
        self._logits = np.empty((self.num_slots * self._slot_rows, *targets), np.float32)
        self._shape = targets
        self._flat_logits = self._logits.reshape(len(self._logits), targets[0] * targets[1])
        self._slot_of_shard = np.full(len(bounds) - 1, -1, np.int64)
        self._free = list(range(self.num_slots))
        self._loaded: deque[int] = deque()

    def gather(self, rows: Rows) -> JoinedRows | None:
        """Copies rows out of the cache, loading their shards first.

        Args:
            rows: int64[B], each in [0, bounds[-1]).

        Returns:
            The rows, or None where they lie in more shards than there are slots.
        """
        shards = np.searchsorted(self._bounds, rows, side="right") - 1
        slots = self._slot_of_shard[shards]
        if slots.size and slots.min() < 0:
            needed = np.unique(shards).tolist()
            if len(needed) > self.num_slots:
                return None
            self._ensure(needed)
            slots = self._slot_of_shard[shards]
        index = slots * self._slot_rows + rows - self._bounds[shards]
        # The index is in range by construction; "clip" spares numpy a buffer.
        logits = self._flat_logits.take(index, axis=0, mode="clip").reshape(len(rows), *self._shape)
        return JoinedRows(self._labels.take(index, mode="clip"), logits)

    def _ensure(self, needed: list[int]) -> None:
        keep = set(needed)
        for shard in needed:
            if self._slot_of_shard[shard] >= 0:
                continue
            slot = self._take_slot(keep)
            try:
                first = slot * self._slot_rows
                count = int(self._bounds[shard + 1] - self._bounds[shard])
                place = slice(first, first + count)
                self._load(shard, self._labels[place], self._logits[place])
            except BaseException:
                self._free.append(slot)
                raise
            self._slot_of_shard[shard] = slot
            self._loaded.append(shard)

    def _take_slot(self, keep: set[int]) -> int:
        if self._free:
            return self._free.pop()
        victim = next(shard for shard in self._loaded if shard not in keep)
        self._loaded.remove(victim)
        slot = int(self._slot_of_shard[victim])
        self._slot_of_shard[victim] = -1
        return slot
