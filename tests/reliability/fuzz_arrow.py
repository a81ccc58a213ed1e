"""Fuzz cases of Arrow bytes: plan.arrow, and the messages and files of a shard.

Run in a child process (``tests.reliability.fuzz``): what C++ does wrong may end the process.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.arrow_message import read_batch, read_file, read_head
from schemas.plan import make_plan, parse_plan
from schemas.rows import classification_schema, corpus_schema, fingerprint_columns, hash_texts
from tests.reliability.fuzz import Case
from tests.reliability.mutations import damage_bytes, damage_integer, damage_value

NUM_ROWS = 40
NUM_LABELS = 3
PLAN_KEY = b"tmkd.plan"


def damage_plan(rng: random.Random) -> Callable[[], None]:
    """Parses a plan with damaged bytes."""
    data = _damage_file(rng, _plan_bytes())
    return lambda: _check_plan(data)


def forge_plan(rng: random.Random) -> Callable[[], None]:
    """Parses a well-formed file with other rows, types or header, and mostly the right fingerprint."""
    rows, header = _forge(rng)
    metadata = {PLAN_KEY: json.dumps(header).encode()}
    if rng.random() < 0.1:
        metadata = {PLAN_KEY: damage_bytes(rng, metadata[PLAN_KEY])}
    data = _write(rows.replace_schema_metadata(metadata), rng)
    return lambda: _check_plan(data)


def damage_batch(rng: random.Random) -> Callable[[], None]:
    """Reads a record batch with damaged bytes."""
    data = bytes(_batch().serialize())
    region = _place(rng, _damage_regions(rng, data, [(0, _metadata_end(data, 0)), (0, len(data))]))
    return lambda: _touch(read_batch(region, classification_schema(NUM_LABELS)))


def damage_head(rng: random.Random) -> Callable[[], None]:
    """Reads the head of a file with damaged bytes."""
    data = b"ARROW1\0\0" + bytes(classification_schema(NUM_LABELS).with_metadata({"a": "b"}).serialize())
    region = _place(rng, _damage_regions(rng, data, [(8, len(data))]))

    def read() -> None:
        read_head(region, classification_schema(NUM_LABELS))

    return read


def damage_file(rng: random.Random) -> Callable[[], None]:
    """Reads a shard file with damaged bytes, or one of another schema."""
    if rng.random() < 0.1:
        data = _write(pa.table({"a": _other_column(rng)}), rng)
    else:
        data = _damage_file(rng, _write(pa.Table.from_batches([_batch()] * 2), None))
    buffer = _place(rng, data)

    def read() -> None:
        _, batches = read_file(buffer, classification_schema(NUM_LABELS))
        for batch in batches:
            _touch(batch)

    return read


CASES: Mapping[str, Case] = {
    "plan.arrow, damaged bytes": damage_plan,
    "plan.arrow, forged": forge_plan,
    "record batch": damage_batch,
    "schema": damage_head,
    "shard file": damage_file,
}


def _check_plan(data: bytes) -> None:
    plan = parse_plan(pa.py_buffer(data), source="here")
    ids = plan.rows.column("example_id").to_pylist()
    assert len(set(ids)) == len(ids), "ids are repeated"
    assert None not in ids, "ids are null"
    assert plan.rows.column("ordinal").to_pylist() == list(range(len(ids))), "ordinals do not count"
    assert plan.bounds == tuple(sorted(set(plan.bounds))), "bounds do not ascend"
    assert (plan.bounds[0], plan.bounds[-1]) == (0, len(ids)), "bounds do not cover the rows"
    assert all(len(text_hash) == 16 for text_hash in plan.rows.column("text_hash").to_pylist()), "hashes"
    assert sum(task.num_rows for task in plan.tasks()) == plan.num_rows, "shards do not add up"
    assert len(plan.plan_hash) == 64, "no hash"


def _touch(batch: pa.RecordBatch) -> None:
    """Reads every value."""
    rows = batch.to_pylist()
    assert len(rows) == batch.num_rows <= batch.nbytes, "rows without bytes"
    for row in rows:
        assert None not in row.values(), "null"
        assert len(row["logits"]) == NUM_LABELS, "short"


def _damage_file(rng: random.Random, data: bytes) -> bytes:
    head = _metadata_end(data, 8)
    return _damage_regions(rng, data, [(8, head), (head, _metadata_end(data, head)), (head, len(data))])


def _damage_regions(rng: random.Random, data: bytes, regions: list[tuple[int, int]]) -> bytes:
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    start, stop = rng.choice(regions)
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = damage_integer(rng, data, start, stop)
    return data


def _metadata_end(data: bytes, start: int) -> int:
    return start + 8 + struct.unpack_from("<i", data, start + 4)[0]


def _place(rng: random.Random, data: bytes) -> pa.Buffer:
    """Returns a buffer of ``data``, some of them at an address that is no multiple of 8."""
    shift = rng.choice((0, 0, 0, 1, 4))
    return pa.py_buffer(bytes(shift) + data).slice(shift)


def _write(table: pa.Table, rng: random.Random | None) -> bytes:
    codec = rng.choice((None, None, None, "lz4", "zstd")) if rng else None
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec))
    writer.write_table(table, max_chunksize=rng.choice((1, 7, 1000)) if rng else None)
    writer.close()
    return bytes(sink.getvalue())


@cache
def _rows() -> pa.Table:
    columns = [
        pa.array(range(NUM_ROWS), pa.int64()),
        pa.array([f"träin/{row}" for row in range(NUM_ROWS)], pa.string()),
        pa.array([hash_texts([str(row)]) for row in range(NUM_ROWS)], pa.binary(16)),
        pa.array([str(row) for row in range(NUM_ROWS)], pa.large_string()),
        pa.array([0] * NUM_ROWS, pa.int32()),
    ]
    return make_plan(pa.Table.from_arrays(columns, schema=corpus_schema(1)), 16).rows


@cache
def _plan_bytes() -> bytes:
    header = _header(_rows())
    return _write(_rows().replace_schema_metadata({PLAN_KEY: json.dumps(header).encode()}), None)


@cache
def _batch() -> pa.RecordBatch:
    schema = classification_schema(NUM_LABELS)
    values = pa.array(np.arange(NUM_ROWS * NUM_LABELS, dtype=np.float32))
    logits = pa.FixedSizeListArray.from_arrays(values, type=schema.field("logits").type)
    columns = [column.combine_chunks() for column in _rows().columns]
    return pa.RecordBatch.from_arrays([*columns, logits], schema=schema)


def _header(rows: pa.Table) -> dict[str, Any]:
    fingerprint = fingerprint_columns(rows.column("example_id"), rows.column("text_hash"))
    return {"plan": 1, "bounds": [0, 16, 32, rows.num_rows], "fingerprint": fingerprint}


def _forge(rng: random.Random) -> tuple[pa.Table, dict[str, Any]]:
    rows = _rows()
    ids, ordinals = rows.column("example_id").to_pylist(), list(range(NUM_ROWS))
    kind = rng.randrange(6)
    if kind == 0:
        ids[rng.randrange(NUM_ROWS)] = rng.choice((*ids, "", "x" * 100_000, "\0", "é"))
    if kind == 1:
        ordinals[rng.randrange(NUM_ROWS)] = rng.choice((-1, 0, 5, 2**62, -(2**63)))
    if kind == 2:
        rng.shuffle(ids)
    rows = rows.set_column(0, rows.field(0), [pa.array(ordinals, pa.int64())])
    rows = rows.set_column(1, rows.field(1), [pa.array(ids, pa.string())])
    header = _header(rows)
    if kind == 3:
        place = rng.randrange(3)
        column = _other_column(rng)
        rows = rows.slice(0, len(column)).set_column(place, rows.field(place).name, column)
    if kind == 4:
        header = damage_value(rng, header)
    if kind == 5:
        rows = rows.slice(0, rng.randrange(NUM_ROWS))
        header = _header(rows)
        header["bounds"] = rng.choice(([0, rows.num_rows], [0], [0, 16, 32, 40], header["bounds"]))
    return rows, header


def _other_column(rng: random.Random) -> pa.Array:
    size = NUM_ROWS
    return rng.choice(
        (
            pa.nulls(size),
            pa.nulls(size, pa.int64()),
            pa.array([0] * size, pa.int32()),
            pa.array(["a"] * size).dictionary_encode(),
            pa.RunEndEncodedArray.from_arrays(pa.array([size], pa.int32()), pa.array([7], pa.int64())),
            pa.array([{}] * size, pa.struct([])),
            pa.array(["a"] * size, pa.string_view()),
            pa.array([[1]] * size),
            pa.array([b""] * size, pa.binary(0)),
            pa.array([f"a{row}" for row in range(size)], pa.large_string()),
        )
    )
