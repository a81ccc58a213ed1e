"""One shard file: writing record batches at known offsets, and reading it back before it counts.

Invariants:
    1. Head, batches and tail cover the file without a gap, and the bytes of a batch's region alone
       are a readable record batch (tests/precompute/test_store_writer.py).
    2. A file whose rows are not those of the plan, or whose logits are not finite, is refused
       (tests/precompute/test_shard_content.py).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import xxhash

from schemas.plan import Plan, ShardTask
from schemas.records import BatchRecord, ExcludedRow
from schemas.rows import fingerprint_columns
from schemas.shard_rows import ShardRowsError, check_rows, select_rows

# An Arrow IPC file starts with "ARROW1" padded to 8 bytes, then the schema message.
MAGIC_BYTES = 8


class ShardContentError(ValueError):
    """Rows that cannot be published: not those of the plan, null, or not finite."""


@dataclass(frozen=True, slots=True)
class ShardContent:
    """What a shard file holds, in the terms of ``schemas.records.CommitRecord``."""

    num_rows: int
    num_bytes: int
    sha256: str
    ids_hash: str
    head: BatchRecord
    batches: tuple[BatchRecord, ...]
    tail: BatchRecord


def write_batches(file: BinaryIO, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> list[int]:
    """Writes an Arrow IPC file (never the stream format), uncompressed.

    The writer is closed by hand: its context manager would write a footer under an exception too.

    Returns:
        B + 1 byte offsets: where each of the B batches starts, and where the last one ends.
    """
    writer = pa.ipc.new_file(file, schema)
    # The header is written together with the first batch, so `tell` cannot give its end.
    offsets = [MAGIC_BYTES + schema.serialize().size]
    for batch in batches:
        if not batch.schema.equals(schema, check_metadata=False):
            raise ShardContentError(f"a record batch has another schema: {batch.schema}")
        writer.write_batch(batch)
        offsets.append(file.tell())
    writer.close()
    return offsets


def read_back(
    path: Path, offsets: Sequence[int], plan: Plan, task: ShardTask, excluded: Sequence[ExcludedRow]
) -> ShardContent:
    """Reads a closed shard file, checks every row against the plan, and hashes every region.

    Args:
        path: The file.
        offsets: From ``write_batches``.
        plan: The store's plan.
        task: The shard's rows.
        excluded: Rows of the shard that the file does not hold.

    Raises:
        ShardContentError: The file does not hold exactly the finite rows that it should.
    """
    with pa.memory_map(str(path)) as source:
        data = source.read_buffer()
    try:
        reader = pa.ipc.open_file(data)
        num_batches = reader.num_record_batches
    except pa.ArrowInvalid as error:
        raise ShardContentError(f"the file cannot be read back ({error})") from error
    if num_batches != len(offsets) - 1:
        raise ShardContentError(f"{num_batches} record batches, {len(offsets) - 1} were written")
    batches, regions = [], []
    for position, (start, stop) in enumerate(itertools.pairwise(offsets)):
        batch = _read_region(data, start, stop, reader.schema)
        if not batch.equals(reader.get_batch(position)):
            raise ShardContentError(f"record batch {position} does not lie at bytes {start} to {stop}")
        batches.append(batch)
        regions.append(_describe_region(data, start, stop, batch.num_rows))
    table = pa.Table.from_batches(batches, schema=reader.schema)
    ids_hash = _check_rows(table, plan, task, excluded)
    return ShardContent(
        num_rows=table.num_rows,
        num_bytes=data.size,
        sha256=hashlib.sha256(data).hexdigest(),
        ids_hash=ids_hash,
        head=_describe_region(data, 0, offsets[0], 0),
        batches=tuple(regions),
        tail=_describe_region(data, offsets[-1], data.size, 0),
    )


def _read_region(data: pa.Buffer, start: int, stop: int, schema: pa.Schema) -> pa.RecordBatch:
    try:
        message = pa.ipc.read_message(data.slice(start, stop - start))
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
    except (pa.ArrowInvalid, EOFError) as error:
        raise ShardContentError(f"bytes {start} to {stop} are no record batch ({error})") from error
    return batch


def _describe_region(data: pa.Buffer, start: int, stop: int, num_rows: int) -> BatchRecord:
    region = data.slice(start, stop - start)
    return BatchRecord(offset=start, length=region.size, rows=num_rows, xxh3=xxhash.xxh3_64_hexdigest(region))


def _check_rows(table: pa.Table, plan: Plan, task: ShardTask, excluded: Sequence[ExcludedRow]) -> str:
    try:
        expected = select_rows(plan, task.start, task.stop, excluded)
        check_rows(table, expected)
    except ShardRowsError as error:
        raise ShardContentError(str(error)) from error
    return fingerprint_columns(expected.column("example_id"), expected.column("text_hash"))
