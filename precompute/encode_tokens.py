"""Chunks of one shard, with what a language model says of them, as Arrow record batches.

Invariants (tests/precompute/test_language_worker.py):
    1. Every batch has exactly the store's schema, and rows come in ordinal order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.kept_positions import slice_positions
from precompute.language_forward import LanguageResult
from schemas.token_rows import TokenChunks, TokenRows, encode_token_rows


def encode_chunks(
    rows: pa.Table, chunks: TokenChunks, result: LanguageResult, schema: pa.Schema, batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Cuts chunks and kept entries into record batches.

    Args:
        rows: R rows with ``ordinal``, ``example_id`` and ``text_hash``.
        chunks: The same R chunks.
        result: What is kept of them.
        schema: Of the store.
        batch_rows: Rows of one record batch.

    Raises:
        CodecError: The entries are not those of the schema's policy.
    """
    keys = rows.select(["ordinal", "example_id", "text_hash"]).combine_chunks()
    for start in range(0, rows.num_rows, batch_rows):
        stop = min(start + batch_rows, rows.num_rows)
        tokens = slice(int(chunks.offsets[start]), int(chunks.offsets[stop]))
        first, last = int(result.rows[start]), int(result.rows[stop])
        kept = slice_positions(result.kept, first, last)
        part = TokenRows(
            TokenChunks(
                chunks.input_ids[tokens], chunks.loss_mask[tokens], _rebase(chunks.offsets, start, stop)
            ),
            kept.entries,
            kept.stats,
            _rebase(result.rows, start, stop),
        )
        piece = keys.slice(start, stop - start)
        # Slices are copied to arrays of their own: a writer may put whole parents into the file.
        columns = [pa.concat_arrays(piece.column(i).chunks) for i in range(piece.num_columns)]
        yield encode_token_rows(pa.record_batch(columns, names=piece.column_names), part, schema)


def _rebase(offsets: npt.NDArray[np.int64], start: int, stop: int) -> npt.NDArray[np.int64]:
    return offsets[start : stop + 1] - offsets[start]
