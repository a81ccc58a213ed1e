"""Bytes of a sample's rows in a codec, really written, and what a whole store of such rows takes.

Shapes: R sample rows (chunks), T tokens and P positions of all of them, G temperatures.

Invariants (tests/precompute/test_keep_trial.py):
    1. A store of exactly the sample's rows takes the projected bytes, but for some of framing.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from precompute.encode_tokens import encode_chunks
from precompute.kept_positions import concatenate_kept, slice_positions
from precompute.language_forward import LanguageResult
from precompute.shard_file import write_batches
from precompute.truncate import KeptPositions
from schemas.codec import CODECS
from schemas.kept_entries import Offsets
from schemas.token_generation import TokenGeneration
from schemas.token_rows import STATS, TokenChunks, decode_token_rows, read_layout

# input_ids and loss_mask; the numbers of a position besides its entries.
_TOKEN_BYTES = 4 + 1
_STAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class CorpusSize:
    """What is stored of a teacher's corpora, cut as the recipe says."""

    num_chunks: int
    num_tokens: int
    num_positions: int
    num_shards: int
    num_batches: int


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of the sample's rows.

    Attributes:
        entries: Columns of the kept entries.
        row: Of a row besides entries, tokens and numbers of its positions: keys, list bounds, padding.
        batch: Of a record batch besides its columns.
        shard: Of a file besides its record batches.
        temperatures: G.
        num_positions: P.
    """

    entries: int
    row: float
    batch: int
    shard: int
    temperatures: int
    num_positions: int

    def with_entries(self, entries: int, generation: TokenGeneration) -> RowBytes:
        """Returns the same rows with the kept entries of another store."""
        batch, shard = _measure_frame(generation.shard_schema())
        return replace(self, entries=entries, batch=batch, shard=shard)

    def project(self, size: CorpusSize) -> int:
        """Returns the bytes of the data files of a whole store."""
        position = self.entries / self.num_positions + _STAT_BYTES * (len(STATS) + self.temperatures)
        return round(
            size.num_positions * position
            + size.num_tokens * _TOKEN_BYTES
            + size.num_chunks * self.row
            + size.num_batches * self.batch
            + size.num_shards * self.shard
        )


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """The sample in a codec.

    Attributes:
        decoded: What a reader gets of it, position by position.
        seconds: What encoding took.
    """

    sizes: RowBytes
    decoded: KeptPositions
    seconds: float


def encode_sample(
    table: pa.Table,
    chunks: TokenChunks,
    result: LanguageResult,
    generation: TokenGeneration,
    batch_rows: int,
) -> EncodedSample:
    """Encodes the sample as the record batches of a shard and reads them back.

    Args:
        table: Keys of the R rows.
        chunks: Their tokens.
        result: What is kept of them.
        generation: Of the store.
        batch_rows: Rows of a record batch.
    """
    schema = generation.shard_schema()
    layout = read_layout(schema.metadata)
    began = time.perf_counter()
    batches = list(encode_chunks(table, chunks, result, schema, batch_rows))
    seconds = time.perf_counter() - began
    names = [field.name for field in layout.codec.fields(layout.entries)]
    bodies = [pa.ipc.read_message(batch.serialize()).body.size for batch in batches]
    entries = sum(batch.column(name).nbytes for batch in batches for name in names)
    num_positions, num_grid = result.kept.entries.num_positions, len(layout.grid)
    stats = num_positions * _STAT_BYTES * (len(STATS) + num_grid)
    rest = sum(bodies) - entries - len(chunks.input_ids) * _TOKEN_BYTES - stats
    batch_bytes, shard_bytes = _measure_frame(schema)
    sizes = RowBytes(
        entries=entries,
        row=rest / table.num_rows,
        batch=batch_bytes,
        shard=shard_bytes,
        temperatures=num_grid,
        num_positions=num_positions,
    )
    return EncodedSample(sizes, _decode(batches, layout, result.kept), seconds)


def encode_positions(kept: KeptPositions, generation: TokenGeneration) -> tuple[int, Any]:
    """Encodes the entries of some positions as those of one row.

    For dense positions, of which a whole sample is more than one keeps.

    Returns:
        Their bytes, and what a reader gets of them (``KeptEntries``).
    """
    layout = read_layout(generation.shard_schema().metadata)
    codec = CODECS[layout.codec.name]
    rows: Offsets = np.array([0, kept.entries.num_positions], np.int64)
    columns = codec.encode(kept.entries, rows, layout.entries)
    decoded = codec.decode(columns, rows, layout.entries, kept.stats.log_tail)
    return sum(column.nbytes for column in columns.values()), decoded


def _measure_frame(schema: pa.Schema) -> tuple[int, int]:
    """Returns the bytes of a record batch besides its columns, and of a file besides its record batches."""
    empty = pa.record_batch([pa.array([], field.type) for field in schema], schema=schema)
    file = io.BytesIO()
    first, last = write_batches(file, schema, [empty])
    body = pa.ipc.read_message(empty.serialize()).body.size
    return last - first - body, file.tell() - (last - first)


def _decode(batches: Sequence[pa.RecordBatch], layout: Any, kept: KeptPositions) -> KeptPositions:
    pieces, start = [], 0
    for batch in batches:
        rows = decode_token_rows(batch, layout)
        stop = start + rows.entries.num_positions
        finite = slice_positions(kept, start, stop).is_finite_N
        pieces.append(KeptPositions(rows.entries, rows.stats, finite))
        start = stop
    return concatenate_kept(pieces)
