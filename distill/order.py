"""The order of reading: pure functions of seed, epoch and corpus (DESIGN section 5).

The rows of an epoch lie in windows: shards are shuffled, W neighbours make a window, and the rows of
a window are shuffled together. A position of the epoch needs its own window only.

Shapes: R selected rows, S + 1 shard bounds, B positions.

Invariants (tests/distill/test_order.py):
    1. An epoch visits every selected row once.
    2. The order depends on seed, epoch, corpus key, window, algorithm version, selected rows and shard
       bounds; never on ranks, workers or where reading starts.
    3. It is the same on every platform and numpy version: it sorts raw Philox output, whose stream
       numpy guarantees (that of ``Generator.permutation`` it does not).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from schemas.digest import canonical_json
from schemas.errors import DataError
from schemas.recipe import FirstRows, SampledRows

ALGORITHM_VERSION = 1
_CACHED_WINDOWS = 2

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class OrderKey:
    """What seeds the order.

    Attributes:
        seed: The stage's seed.
        corpus_key: ``schemas.rows.corpus_key`` of the parts: the same for every arm.
        window: W, shards that are shuffled together.
        algorithm_version: Of this module.
    """

    seed: int
    corpus_key: str
    window: int
    algorithm_version: int = ALGORITHM_VERSION


class EpochOrder:
    """The order of one epoch, computed window by window.

    Args:
        key: What seeds it.
        epoch: 0-based.
        rows: int64[R], selected rows, ascending.
        shard_bounds: int64[S + 1], ascending row numbers of the corpus.
    """

    def __init__(self, key: OrderKey, epoch: int, rows: Rows, shard_bounds: Rows) -> None:
        if key.algorithm_version != ALGORITHM_VERSION:
            raise DataError(
                f"order algorithm {key.algorithm_version} is not known here, only {ALGORITHM_VERSION}"
            )
        self._key = key
        self._epoch = epoch
        self._rows = rows
        cuts = np.searchsorted(rows, shard_bounds)
        filled = np.flatnonzero(np.diff(cuts))
        shards = filled[_permute(len(filled), *self._stream("shards"))]
        self._starts, self._stops = cuts[shards], cuts[shards + 1]
        sizes = np.add.reduceat(self._stops - self._starts, np.arange(0, len(shards), key.window))
        self._window_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._windows: OrderedDict[int, Rows] = OrderedDict()

    def slice(self, start: int, stop: int) -> Rows:
        """Returns the rows at positions [start, stop) of the epoch: int64[stop - start]."""
        if not 0 <= start <= stop <= len(self._rows):
            raise ValueError(f"positions {start} to {stop} of {len(self._rows)}")
        if start == stop:
            return np.empty(0, np.int64)
        first = int(np.searchsorted(self._window_starts, start, side="right")) - 1
        last = int(np.searchsorted(self._window_starts, stop, side="left")) - 1
        pieces = []
        for window in range(first, last + 1):
            begin = int(self._window_starts[window])
            pieces.append(self._window(window)[max(start - begin, 0) : stop - begin])
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0].copy()

    def _window(self, window: int) -> Rows:
        rows = self._windows.get(window)
        if rows is None:
            shards = slice(window * self._key.window, (window + 1) * self._key.window)
            bounds = zip(self._starts[shards], self._stops[shards], strict=True)
            ordered = np.concatenate([self._rows[start:stop] for start, stop in bounds])
            rows = ordered[_permute(len(ordered), *self._stream("rows", window))]
            self._windows[window] = rows
            if len(self._windows) > _CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return rows

    def _stream(self, *purpose: str | int) -> tuple[str | int, ...]:
        key = self._key
        return (key.algorithm_version, key.corpus_key, key.seed, self._epoch, *purpose)


def order(key: OrderKey, epoch: int, rows: Rows, shard_bounds: Rows, start: int, stop: int) -> Rows:
    """Returns the rows at positions [start, stop) of an epoch.

    Args:
        key: Seed, corpus key, window and algorithm version.
        epoch: 0-based.
        rows: int64[R], selected rows of the corpus, ascending.
        shard_bounds: int64[S + 1], from 0 to the number of rows of the corpus.
        start: First position.
        stop: Position after the last; 0 <= start <= stop <= R.

    Returns:
        int64[stop - start].
    """
    return EpochOrder(key, epoch, rows, shard_bounds).slice(start, stop)


def select_rows(usable: Rows, rows: FirstRows | SampledRows | None) -> Rows:
    """Applies a stage's ``rows`` field.

    Args:
        usable: int64[U], ascending.
        rows: Which of them; None: all.

    Returns:
        int64, ascending.

    Raises:
        DataError: More rows are asked for than there are.
    """
    if rows is None:
        return usable
    wanted = rows.first if isinstance(rows, FirstRows) else rows.sample
    if wanted > len(usable):
        raise DataError(f"the stage asks for {wanted} rows, the corpus has {len(usable)} usable ones")
    if isinstance(rows, FirstRows):
        return usable[:wanted]
    chosen = _permute(len(usable), ALGORITHM_VERSION, "sample", rows.seed)[:wanted]
    return usable[np.sort(chosen)]


def hold_out(rows: Rows, fraction: float, seed: int, key: str) -> tuple[Rows, Rows]:
    """Holds a seeded share of the rows out of training, for selection.

    Args:
        rows: int64[R], ascending.
        fraction: Share of the rows, in [0, 1).
        seed: The job's selection seed.
        key: The corpus key.

    Returns:
        Rows to train on and rows to select on, both ascending. A positive fraction holds out at least
        one row and leaves at least one.

    Raises:
        DataError: There are too few rows to hold any out.
    """
    if fraction == 0.0:
        return rows, rows[:0]
    if len(rows) < 2:
        raise DataError(
            f"cannot hold out a selection set of {len(rows)} usable rows; set selection_fraction: 0"
        )
    count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
    held = np.zeros(len(rows), bool)
    held[_permute(len(rows), ALGORITHM_VERSION, "selection", key, seed)[:count]] = True
    return rows[~held], rows[held]


def _permute(count: int, *stream: str | int) -> Rows:
    """Returns a permutation of range(count), int64, seeded by ``stream``."""
    digest = hashlib.sha256(canonical_json(list(stream))).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    # With the place in the low bits no two keys tie, and sorting keys is much faster than an argsort.
    low_bits = np.uint64((1 << max(count - 1, 0).bit_length()) - 1)
    keys = (generator.random_raw(count) & ~low_bits) | np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & low_bits).astype(np.int64)
