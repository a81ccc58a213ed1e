"""Stores whose Arrow files were made to do harm, all hashes right. See ``tests.reliability.hostile_case``."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from schemas.column_view import view_numbers
from tests.reliability.forgery import (
    ForgedStore,
    make_logits,
    read_columns,
    replace_rows,
    shard_columns,
)
from tests.reliability.hostile_case import HostileCase

Columns = dict[str, pa.Array]


def _columns(change: Callable[[Columns], dict[str, pa.Array | None]]) -> HostileCase:
    """Shard 1 with other columns, in one batch."""

    def edit(forged: ForgedStore) -> None:
        replace_rows(forged, 1, [shard_columns(forged, 1, **change(read_columns(forged, 1)))])

    return HostileCase(edit)


def _cast(name: str, type_: pa.DataType) -> HostileCase:
    return _columns(lambda columns: {name: columns[name].cast(type_)})


def _end_encoded(columns: Columns) -> dict[str, pa.Array | None]:
    ends = pa.array(range(1, len(columns["ordinal"]) + 1), pa.int32())
    return {"ordinal": pa.RunEndEncodedArray.from_arrays(ends, columns["ordinal"])}


def _nest(depth: int) -> Callable[[Columns], dict[str, pa.Array | None]]:
    def nest(columns: Columns) -> dict[str, pa.Array | None]:
        type_: pa.DataType = pa.float32()
        for _ in range(depth):
            type_ = pa.list_(type_)
        return {"logits": pa.nulls(len(columns["ordinal"]), type_)}

    return nest


def _reorder(forged: ForgedStore) -> None:
    batch = shard_columns(forged, 1)
    replace_rows(forged, 1, [batch.select(batch.schema.names[::-1])])


def _rename(forged: ForgedStore) -> None:
    batch = shard_columns(forged, 1)
    replace_rows(forged, 1, [batch.rename_columns(["row", *batch.schema.names[1:]])])


def _nullable(forged: ForgedStore) -> None:
    batch = shard_columns(forged, 1)
    fields = [field.with_nullable(True) for field in batch.schema]
    replace_rows(forged, 1, [batch.cast(pa.schema(fields))])


def _some_nulls(columns: Columns) -> dict[str, pa.Array | None]:
    values = columns["example_id"].to_pylist()
    return {"example_id": pa.array([None, *values[1:]], pa.string())}


def _hidden_nulls(forged: ForgedStore) -> None:
    """A validity bitmap under a schema without nulls."""
    batch = shard_columns(forged, 1)
    ordinals = batch.column("ordinal")
    bitmap = pa.py_buffer(b"\xf0" * 8)
    column = pa.Array.from_buffers(pa.int64(), len(ordinals), [bitmap, ordinals.buffers()[1]], null_count=4)
    arrays = [column, *batch.columns[1:]]
    replace_rows(forged, 1, [pa.RecordBatch.from_arrays(arrays, schema=batch.schema)])


def _bundle(count: int) -> Callable[[ForgedStore], None]:
    """Metadata of many entries."""

    def edit(forged: ForgedStore) -> None:
        metadata = {str(number).encode(): b"x" * 100 for number in range(count)}
        replace_rows(forged, 1, [shard_columns(forged, 1)], metadata=metadata)

    return edit


TYPES: dict[str, HostileCase] = {
    "ids of a dictionary": _columns(
        lambda columns: {"example_id": columns["example_id"].dictionary_encode()}
    ),
    "ids as large strings": _cast("example_id", pa.large_string()),
    "ids as string views": _cast("example_id", pa.string_view()),
    "ids as binary": _cast("example_id", pa.binary()),
    "ordinals in 32 bits": _cast("ordinal", pa.int32()),
    "ordinals without a sign": _cast("ordinal", pa.uint64()),
    "ordinals as times": _cast("ordinal", pa.timestamp("s")),
    "ordinals in runs": _columns(_end_encoded),
    "ordinals without values": _columns(lambda columns: {"ordinal": pa.nulls(len(columns["ordinal"]))}),
    "hashes without width": _columns(lambda columns: {"text_hash": pa.array([b""] * 5, pa.binary(0))}),
    "hashes of 15 bytes": _columns(lambda columns: {"text_hash": pa.array([b"x" * 15] * 5, pa.binary(15))}),
    "logits without width": _columns(
        lambda columns: {"logits": pa.array([[]] * 5, pa.list_(pa.float32(), 0))}
    ),
    "logits of two labels": _columns(lambda columns: {"logits": make_logits(np.ones((5, 2), np.float32))}),
    "logits in 64 bits": _cast("logits", pa.list_(pa.float64(), 3)),
    "logits in 16 bits": _cast("logits", pa.list_(pa.float16(), 3)),
    "logits as lists": _cast("logits", pa.list_(pa.float32())),
    "logits as large lists": _cast("logits", pa.large_list(pa.float32())),
    "logits nested 60 deep": _columns(_nest(60)),
    "no logits": _columns(lambda columns: {"logits": None}),
    "one column more": _columns(lambda columns: {"more": columns["ordinal"]}),
    "columns in another order": HostileCase(_reorder),
    "a column of another name": HostileCase(_rename),
    "columns that may be null": HostileCase(_nullable),
    "null ids": _columns(_some_nulls),
    "nulls that the schema hides": HostileCase(_hidden_nulls),
    "100,000 entries of metadata": HostileCase(_bundle(100_000)),
    "2,000 entries of metadata": HostileCase(_bundle(2000)),
}


def _put_ids(offsets: list[int], data: bytes) -> HostileCase:
    """Ids by hand: 5 rows of ``offsets`` into ``data``; pyarrow itself would not write all of them."""
    sound = struct.pack("<6i", 0, 7, 14, 21, 28, 35)

    def edit(forged: ForgedStore) -> None:
        ids = pa.Array.from_buffers(pa.string(), 5, [None, pa.py_buffer(sound), pa.py_buffer(data)])
        batch = shard_columns(forged, 1)
        arrays = [batch.column(0), ids, *batch.columns[2:]]
        replace_rows(forged, 1, [pa.RecordBatch.from_arrays(arrays, schema=batch.schema)])
        if forged.data[1].count(sound) != 1:
            raise ValueError("the offsets are not to be found")
        forged.data[1] = forged.data[1].replace(sound, struct.pack("<6i", *offsets))

    return HostileCase(edit)


def _set_logit(value: float) -> HostileCase:
    def change(columns: Columns) -> dict[str, pa.Array | None]:
        values = view_numbers(columns["logits"].flatten(), np.float32).reshape(-1, 3).copy()
        values[3, 1] = value
        return {"logits": make_logits(values)}

    return _columns(change)


def _ordinals(change: Callable[[list[int]], list[int]]) -> HostileCase:
    return _columns(lambda columns: {"ordinal": pa.array(change(columns["ordinal"].to_pylist()), pa.int64())})


def _turn(column: str) -> HostileCase:
    """A column's values, each one row further."""
    return _columns(
        lambda columns: {column: pa.concat_arrays([columns[column].slice(1), columns[column].slice(0, 1)])}
    )


def _turn_examples(columns: Columns) -> dict[str, pa.Array | None]:
    """Whole rows, one row further, under the right ordinals."""
    names = ("example_id", "text_hash", "logits")
    return {name: pa.concat_arrays([columns[name].slice(1), columns[name].slice(0, 1)]) for name in names}


def _compress(codec: str) -> HostileCase:
    return HostileCase(lambda forged: replace_rows(forged, 1, [shard_columns(forged, 1)], compression=codec))


def _bomb(codec: str) -> HostileCase:
    """Five ids of 20 MB each in a file of some hundred kilobytes."""

    def edit(forged: ForgedStore) -> None:
        ids = pa.array(["a" * 20_000_000] * 5, pa.string())
        replace_rows(forged, 1, [shard_columns(forged, 1, example_id=ids)], compression=codec)

    return HostileCase(edit)


def _cut_rows(sizes: list[int], claimed: list[int]) -> HostileCase:
    """The rows in batches of ``sizes``, the record claims others."""

    def edit(forged: ForgedStore) -> None:
        batch = shard_columns(forged, 1)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        pieces = [
            pa.concat_batches([batch.slice(start, size)]) for start, size in zip(starts, sizes, strict=True)
        ]
        replace_rows(forged, 1, pieces)
        for region, rows in zip(forged.records[1]["batches"], claimed, strict=True):
            region["rows"] = rows

    return HostileCase(edit)


def _patch(change: Callable[[bytes, list[tuple[int, int]]], bytes], *, harmless: bool = False) -> HostileCase:
    """The bytes of shard 1 changed in place; ``change`` gets the regions' starts and ends too."""

    def edit(forged: ForgedStore) -> None:
        record = forged.records[1]
        regions = [record["head"], *record["batches"], record["tail"]]
        bounds = [(region["offset"], region["offset"] + region["length"]) for region in regions]
        changed = change(forged.data[1], bounds)
        if len(changed) != len(forged.data[1]):
            raise ValueError("a patch keeps the size")
        forged.data[1] = changed

    return HostileCase(edit, harmless=harmless)


def _overwrite(place: int, piece: bytes) -> Callable[[bytes, list[tuple[int, int]]], bytes]:
    """Writes over the start of the first batch."""

    def change(data: bytes, bounds: list[tuple[int, int]]) -> bytes:
        start = bounds[1][0] + place
        return data[:start] + piece + data[start + len(piece) :]

    return change


def _noise_in(region: int) -> Callable[[bytes, list[tuple[int, int]]], bytes]:
    def change(data: bytes, bounds: list[tuple[int, int]]) -> bytes:
        start, stop = bounds[region]
        return data[:start] + np.random.default_rng(0).bytes(stop - start) + data[stop:]

    return change


def _swap_batches(data: bytes, bounds: list[tuple[int, int]]) -> bytes:
    (start, middle), (_, stop) = bounds[1:3]
    return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]


def _merge_regions(forged: ForgedStore) -> None:
    """One region holds two messages."""
    record = forged.records[1]
    first, second = record["batches"]
    first["length"] += second["length"]
    first["rows"] += second["rows"]
    del record["batches"][1]


def _footer_only(forged: ForgedStore) -> None:
    """A data file of which nothing but a huge tail is there."""
    record = forged.records[1]
    data = forged.data[1][: record["tail"]["offset"]] + bytes(32 << 20)
    sizes = [batch["rows"] for batch in record["batches"]]
    cuts = [record["head"]["length"], *(batch["offset"] + batch["length"] for batch in record["batches"])]
    forged.set_data(1, data, cuts, sizes)


CONTENT: dict[str, HostileCase] = {
    "id offsets beyond the data": _put_ids([0, 7, 14, 21, 28, 2**31 - 1], b"x" * 64),
    "id offsets that are negative": _put_ids([-8, 7, 14, 21, 28, 35], b"x" * 64),
    "id offsets that go back": _put_ids([0, 35, 14, 21, 28, 35], b"x" * 64),
    "ids that are not UTF-8": _put_ids([0, 1, 2, 3, 4, 5], b"\xff" * 64),
    "ids of nothing": _put_ids([0] * 6, b"x" * 64),
    "a logit that is not a number": _set_logit(float("nan")),
    "a logit that is infinite": _set_logit(float("-inf")),
    "ordinals from 0": _ordinals(lambda rows: [row - rows[0] for row in rows]),
    "ordinals downwards": _ordinals(lambda rows: rows[::-1]),
    "an ordinal twice": _ordinals(lambda rows: [rows[0], *rows[:-1]]),
    "ordinals one further": _ordinals(lambda rows: [row + 1 for row in rows]),
    "negative ordinals": _ordinals(lambda rows: [-row for row in rows]),
    "ids of other rows": _turn("example_id"),
    "text hashes of other rows": _turn("text_hash"),
    "examples of other rows": _columns(_turn_examples),
    "LZ4": _compress("lz4"),
    "Zstandard": _compress("zstd"),
    "an LZ4 bomb": _bomb("lz4"),
    "a Zstandard bomb": _bomb("zstd"),
    "fewer rows than claimed": _cut_rows([2, 3], [3, 2]),
    "rows in a batch that claims none": _cut_rows([2, 3], [0, 5]),
    "two batches swapped": _patch(_swap_batches),
    "two batches in one region": HostileCase(_merge_regions),
    "noise for a head": _patch(_noise_in(0)),
    "noise for a batch": _patch(_noise_in(1)),
    "noise for a footer": _patch(_noise_in(-1), harmless=True),
    "a footer of 32 MiB": HostileCase(_footer_only, harmless=True),
    "metadata of 2 GiB": _patch(_overwrite(4, struct.pack("<i", 2**31 - 8))),
    "metadata of negative length": _patch(_overwrite(4, struct.pack("<i", -8))),
    "metadata of length 0": _patch(_overwrite(4, struct.pack("<i", 0))),
    "a root table outside": _patch(_overwrite(8, struct.pack("<I", 2**31))),
    "no continuation mark": _patch(_overwrite(0, b"\0\0\0\0")),
}


def _plan_rows(forged: ForgedStore) -> pa.Table:
    return pa.ipc.open_file(forged.plan).read_all()


def _recut(bounds: object) -> HostileCase:
    return HostileCase(lambda forged: forged.set_plan(_plan_rows(forged), bounds))


def _replan(change: Callable[[pa.Table], pa.Table]) -> HostileCase:
    """Other rows in the plan, cut as before."""
    return HostileCase(lambda forged: forged.set_plan(change(_plan_rows(forged)), [0, 5, 10, 12]))


def _compress_plan(forged: ForgedStore) -> None:
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    forged.set_plan(_plan_rows(forged), [0, 5, 10, 12], options=options)


def _set_column(name: str, values: list[object]) -> HostileCase:
    def change(rows: pa.Table) -> pa.Table:
        field = rows.schema.field(name)
        place = rows.schema.get_field_index(name)
        return rows.set_column(place, field, [pa.array(values, field.type)])

    return _replan(change)


PLANS: dict[str, HostileCase] = {
    "one shard a row": _recut(list(range(13))),
    "one shard": _recut([0, 12]),
    "other shards": _recut([0, 4, 10, 12]),
    "bounds downwards": _recut([0, 10, 5, 12]),
    "bounds beyond the rows": _recut([0, 5, 10, 2**61]),
    "bounds that are negative": _recut([0, -5, 10, 12]),
    "bounds that are no numbers": _recut(["0", 5, 10, 12]),
    "bounds that are fractions": _recut([0.0, 5.0, 10.0, 12.0]),
    "no bounds": _recut([]),
    "1,000,000 empty shards": _recut([0] * 1_000_000 + [5, 10, 12]),
    "an id twice": _set_column("example_id", ["train/0", *(f"train/{row}" for row in range(11))]),
    "other ids": _set_column("example_id", [f"other/{row}" for row in range(12)]),
    "other ordinals": _set_column("ordinal", list(range(1, 13))),
    "other hashes": _set_column("text_hash", [b"x" * 16] * 12),
    "fewer rows": _replan(lambda rows: rows.slice(0, 11)),
    "more rows": _replan(lambda rows: pa.concat_tables([rows, rows])),
    "a compressed plan": HostileCase(_compress_plan),
    "no plan": HostileCase(lambda forged: setattr(forged, "plan", b"")),
    "a shard for a plan": HostileCase(lambda forged: setattr(forged, "plan", forged.data[0])),
    "a plan for a shard": HostileCase(lambda forged: forged.set_data(1, forged.plan, [8, 16], [5])),
}

CASES = {**TYPES, **CONTENT, **{f"plan: {name}": case for name, case in PLANS.items()}}
