"""Rows of a corpus that are not to be trained on: a file of row numbers.

Invariants (tests/distill/test_join.py, tests/distill/test_language_corpus.py):
    1. They are in no corpus's ``usable_rows``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from schemas.errors import DataError


def read_dropped_rows(path: str | Path | None) -> npt.NDArray[np.int64]:
    """Reads a ``.npy`` file of ascending row numbers, int64; None has none.

    Raises:
        DataError: It cannot be read, or is none.
    """
    if path is None:
        return np.empty(0, np.int64)
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as dropped rows ({error})") from error
    if rows.dtype != np.int64 or rows.ndim != 1 or (np.diff(rows) <= 0).any():
        raise DataError(f"{path}: dropped rows must be ascending int64 row numbers")
    return rows
