"""Unlabelled rows that share a text with an evaluation split are not trained on.

A QNLI question's other pair gives the answer away, and half of the validation questions recur in
the unlabelled part.

Invariant: no row with label -1 whose text column equals any text of an evaluation corpus is left
(tests/cluster/test_leakage.py).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.digest import replace_file
from schemas.rows import UNLABELLED, text_columns


def find_shared_rows(corpus: Sequence[pa.Table], evaluation: Sequence[pa.Table]) -> npt.NDArray[np.int64]:
    """Finds the unlabelled rows of a corpus that share a text with an evaluation corpus.

    Args:
        corpus: The corpus's parts, in order, in the layout of ``schemas.rows.corpus_schema``.
        evaluation: The parts of all evaluation corpora.

    Returns:
        Sorted row numbers of the whole corpus (part offset + row of the part), int64.
    """
    texts = [column for table in evaluation for column in _text_columns(table)]
    if not texts:
        return np.zeros(0, dtype=np.int64)
    known = pa.chunked_array([chunk for column in texts for chunk in column.chunks], type=pa.large_string())
    known = known.unique()
    found = [_shared_mask(table, known) for table in corpus]
    return np.flatnonzero(np.concatenate(found)).astype(np.int64)


def write_rows(rows: npt.NDArray[np.int64], directory: Path) -> Path:
    """Writes row numbers as ``<hash of the content>.npy`` and returns the path."""
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    data = buffer.getvalue()
    path = directory / f"{hashlib.sha256(data).hexdigest()[:32]}.npy"
    directory.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        replace_file(path, data)
    return path


def _shared_mask(table: pa.Table, known: pa.Array) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = np.zeros(table.num_rows, dtype=np.bool_)
    for column in _text_columns(table):
        mask |= pc.is_in(column, value_set=known).to_numpy().astype(np.bool_)
    unlabelled = table.column("label").to_numpy() == UNLABELLED
    return mask & unlabelled


def _text_columns(table: pa.Table) -> list[pa.ChunkedArray]:
    return [table.column(name) for name in text_columns(table)]
