from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from schemas.arrow_message import ArrowMessageError, read_batch, read_file, read_head
from schemas.rows import classification_schema

NUM_LABELS = 3
MAGIC = b"ARROW1\0\0"
SCHEMA = classification_schema(NUM_LABELS)


def batch(num_rows: int = 5) -> pa.RecordBatch:
    logits = np.arange(num_rows * NUM_LABELS, dtype=np.float32)
    columns = [
        pa.array(range(num_rows), pa.int64()),
        pa.array([f"träin/{row}" for row in range(num_rows)], pa.string()),
        pa.array([bytes([row % 256]) * 16 for row in range(num_rows)], pa.binary(16)),
        pa.FixedSizeListArray.from_arrays(pa.array(logits), type=SCHEMA.field("logits").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def serialize(
    whole: pa.RecordBatch, *, codec: str | None = None, version: pa.ipc.MetadataVersion | None = None
) -> bytes:
    """Returns the message of a batch (``RecordBatch.serialize`` takes no options)."""
    options = pa.ipc.IpcWriteOptions(compression=codec, metadata_version=version or pa.ipc.MetadataVersion.V5)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, whole.schema, options=options) as writer:
        writer.write_batch(whole)
    schema_message, batch_message = pa.ipc.MessageReader.open_stream(sink.getvalue())
    assert schema_message.type == "schema"
    return bytes(batch_message.serialize())


def message(num_rows: int = 5, *, codec: str | None = None) -> bytes:
    return serialize(batch(num_rows), codec=codec)


def write_file(
    *batches: pa.RecordBatch, schema: pa.Schema = SCHEMA, options: pa.ipc.IpcWriteOptions | None = None
) -> bytes:
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_file(sink, schema, options=options)
    for each in batches:
        writer.write_batch(each)
    writer.close()
    return bytes(sink.getvalue())


def read(data: bytes) -> pa.RecordBatch:
    return read_batch(pa.py_buffer(data), SCHEMA)


def refuse(data: bytes, match: str) -> None:
    with pytest.raises(ArrowMessageError, match=match):
        read(data)


def patch(data: bytes, position: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, position, value)
    return bytes(changed)


def find(data: bytes, layout: str, *values: int) -> int:
    """Returns where ``values`` lie in the metadata; they must lie there once."""
    needle = struct.pack(layout, *values)
    metadata = data[: 8 + struct.unpack_from("<i", data, 4)[0]]
    assert metadata.count(needle) == 1
    return metadata.index(needle)


def test_a_batch_is_read_without_copying_it() -> None:
    data = message(1000)
    buffer = pa.py_buffer(data)
    before = pa.total_allocated_bytes()
    found = read_batch(buffer, SCHEMA)
    assert pa.total_allocated_bytes() == before
    assert found.equals(batch(1000))
    assert all(not column.null_count for column in found.columns)


def test_an_empty_batch_is_a_batch() -> None:
    assert read(message(0)).num_rows == 0


def test_a_file_is_read_message_by_message() -> None:
    schema = SCHEMA.with_metadata({"a": "b"})
    whole = batch(10)
    metadata, batches = read_file(
        pa.py_buffer(write_file(whole.slice(0, 6), whole.slice(6), schema=schema)), SCHEMA
    )
    assert metadata == {b"a": b"b"}
    assert [each.num_rows for each in batches] == [6, 4]
    assert pa.Table.from_batches(batches).equals(pa.Table.from_batches([whole]))


def test_a_file_without_batches_is_read() -> None:
    assert read_file(pa.py_buffer(write_file()), SCHEMA) == ({}, [])


def test_the_head_is_what_lies_before_the_first_batch() -> None:
    data = write_file(batch(), schema=SCHEMA.with_metadata({"k": "v"}))
    size = 8 + SCHEMA.with_metadata({"k": "v"}).serialize().size
    assert read_head(pa.py_buffer(data[:size]), SCHEMA) == {b"k": b"v"}
    with pytest.raises(ArrowMessageError, match="the schema ends at byte"):
        read_head(pa.py_buffer(data[: size + 8]), SCHEMA)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_body_is_refused_before_anything_is_decompressed(codec: str) -> None:
    bomb = pa.RecordBatch.from_arrays(
        [
            pa.array(np.zeros(2_000_000, np.int64)),
            pa.array([""] * 2_000_000, pa.string()),
            pa.array([bytes(16)] * 2_000_000, pa.binary(16)),
            pa.FixedSizeListArray.from_arrays(
                pa.array(np.zeros(2_000_000 * NUM_LABELS, np.float32)), type=SCHEMA.field("logits").type
            ),
        ],
        schema=SCHEMA,
    )
    options = pa.ipc.IpcWriteOptions(compression=codec)
    data = pa.py_buffer(serialize(bomb, codec=codec))
    assert data.size < 1_000_000
    # The batch is a bomb where Arrow alone reads it.
    before = pa.total_allocated_bytes()
    unfolded = pa.ipc.read_record_batch(pa.ipc.read_message(data), SCHEMA)
    assert pa.total_allocated_bytes() - before > 50_000_000
    del unfolded
    before = pa.total_allocated_bytes()
    with pytest.raises(ArrowMessageError, match="compressed"):
        read_batch(data, SCHEMA)
    assert pa.total_allocated_bytes() == before
    with pytest.raises(ArrowMessageError, match="compressed"):
        read_file(pa.py_buffer(write_file(bomb, options=options)), SCHEMA)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compression_is_recognised_in_a_small_batch_too(codec: str) -> None:
    refuse(message(5, codec=codec), "compressed")


def test_the_older_metadata_that_hides_compression_elsewhere_is_refused() -> None:
    refuse(serialize(batch(), version=pa.ipc.MetadataVersion.V4), "version 4, not 5")


def test_dictionary_batches_and_schemas_are_no_record_batch() -> None:
    refuse(bytes(SCHEMA.serialize()), "type 1")
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    stream = pa.BufferOutputStream()
    encoded = pa.RecordBatch.from_arrays([words], ["a"])
    with pa.ipc.new_stream(stream, encoded.schema) as writer:
        writer.write_batch(encoded)
    data = stream.getvalue()
    first = encoded.schema.serialize().size
    second = pa.ipc.read_message(data.slice(first))
    assert second.type == "dictionary"
    refuse(bytes(second.serialize()), "type 2")


def test_a_column_with_nulls_is_refused() -> None:
    schema = pa.schema([field.with_nullable(True) for field in SCHEMA])
    columns = batch(3).columns
    columns[0] = pa.array([0, None, 2], pa.int64())
    refuse(bytes(pa.RecordBatch.from_arrays(columns, schema=schema).serialize()), "nulls")


def test_every_truncation_and_every_addition_is_refused() -> None:
    data = message()
    for size in range(len(data)):
        refuse(data[:size], ".")
    for surplus in (1, 8, 64):
        refuse(data + bytes(surplus), "ends at byte")


@pytest.mark.parametrize("length", [0, -1, -8, 1, 12, 2**31 - 1, 2**31 - 8, -(2**31), 65536 + 8])
def test_an_absurd_length_of_metadata_is_refused(length: int) -> None:
    refuse(patch(message(), 4, "<i", length), "metadata")


def test_a_region_that_is_no_message_is_refused() -> None:
    refuse(b"", "end within")
    refuse(bytes(512), "no message starts")
    refuse(struct.pack("<Ii", 0xFFFFFFFF, 0), "metadata")


@pytest.mark.parametrize("value", [-1, -8, 1, 2**62, 2**63 - 1, 2**63 - 8, -(2**63)])
def test_an_absurd_length_of_the_body_is_refused(value: int) -> None:
    data = message()
    body = len(data) - 8 - struct.unpack_from("<i", data, 4)[0]
    refuse(patch(data, find(data, "<q", body), "<q", value), "body|end")


@pytest.mark.parametrize("value", [-1, 4, 6, 2**31, 2**62, 2**63 - 1])
def test_absurd_numbers_of_rows_are_refused(value: int) -> None:
    data = message(5)
    metadata = 8 + struct.unpack_from("<i", data, 4)[0]
    needle = struct.pack("<q", 5)
    places = [place for place in range(8, metadata - 8) if data[place : place + 8] == needle]
    assert len(places) == 5  # the batch's own length, and a node per column but the items'
    for place in places:
        refuse(patch(data, place, "<q", value), ".")
    everywhere = data
    for place in places:
        everywhere = patch(everywhere, place, "<q", value)
    refuse(everywhere, ".") if value != 4 else read(everywhere)


@pytest.mark.parametrize("null_count", [1, 5, -1, 2**62])
def test_a_claim_of_nulls_is_refused(null_count: int) -> None:
    data = message(7)
    node = find(data, "<qq", 7 * NUM_LABELS, 0)
    refuse(patch(data, node + 8, "<q", null_count), "nulls")


@pytest.mark.parametrize("value", [-8, 1, 4, 2**20, 2**62, 2**63 - 8])
def test_buffers_that_overlap_or_leave_the_body_are_refused(value: int) -> None:
    data = message(64)
    # text_hash: 1024 bytes after the ordinals, the offsets of the ids and the ids.
    ids = sum(len(f"träin/{row}".encode()) for row in range(64))
    start = 512 + -(-(65 * 4) // 8) * 8 + -(-ids // 8) * 8
    place = find(data, "<qq", start, 1024)
    refuse(patch(data, place, "<q", value), "overlap or leave")
    if value not in (1, 4):
        refuse(patch(data, place + 8, "<q", value), "overlap or leave")


def test_buffers_and_bodies_that_are_not_aligned_are_refused() -> None:
    data = message(64)
    place = find(data, "<qqqq", 0, 512, 512, 0)
    refuse(patch(patch(data, place, "<q", 4), place + 8, "<q", 508), "overlap or leave")
    data = message(5)
    body = len(data) - 8 - struct.unpack_from("<i", data, 4)[0]
    # The last column's padding alone is gone.
    refuse(patch(data, find(data, "<q", body), "<q", body - 4)[:-4], "body")


def test_rows_that_take_no_bytes_are_refused() -> None:
    for column in (pa.array([{}] * 100, pa.struct([])), pa.nulls(100)):
        whole = pa.RecordBatch.from_arrays([column], ["a"])
        with pytest.raises(ArrowMessageError, match="more rows than it has bytes"):
            read_batch(whole.serialize(), whole.schema)


def test_a_buffer_too_short_for_its_column_is_refused() -> None:
    data = message(64)
    place = find(data, "<qqqq", 0, 512, 512, 0)
    refuse(patch(data, place + 8, "<q", 504), "cannot be decoded")


def test_string_offsets_out_of_range_and_invalid_utf8_are_refused() -> None:
    data = message(8)
    body = 8 + struct.unpack_from("<i", data, 4)[0]
    offsets = body + 64
    assert struct.unpack_from("<2i", data, offsets) == (0, 8)
    for value in (-1, 7_000, 2**31 - 1, -(2**31)):
        refuse(patch(data, offsets + 4, "<i", value), "cannot be decoded")
    refuse(patch(data, offsets, "<i", 9), "cannot be decoded")
    text = data.index("träin/3".encode())
    refuse(patch(data, text + 2, "<B", 0xFF), "cannot be decoded")


def test_each_flipped_bit_of_the_metadata_gives_a_batch_or_the_error() -> None:
    data = message()
    survived = 0
    for position in range(8 * (8 + struct.unpack_from("<i", data, 4)[0])):
        changed = bytearray(data)
        changed[position // 8] ^= 1 << position % 8
        try:
            read(bytes(changed)).to_pylist()
        except ArrowMessageError:
            continue
        survived += 1
    assert survived < 8 * len(data)


@pytest.mark.parametrize(
    "other",
    [
        classification_schema(NUM_LABELS + 1),
        pa.schema([]),
        pa.schema(list(SCHEMA)[:3]),
        pa.schema([*SCHEMA, pa.field("more", pa.int8())]),
        pa.schema([SCHEMA.field(0).with_type(pa.int32()), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_nullable(True), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_name("other"), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_type(pa.null()), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_type(pa.run_end_encoded(pa.int32(), pa.int64())), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_type(pa.dictionary(pa.int8(), pa.string())), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_type(pa.large_string()), *list(SCHEMA)[1:]]),
        pa.schema([SCHEMA.field(0).with_type(pa.struct([])), *list(SCHEMA)[1:]]),
        pa.schema([*list(SCHEMA)[:3], SCHEMA.field(3).with_type(pa.list_(pa.float32()))]),
    ],
)
def test_another_schema_is_refused_before_any_batch_is_read(other: pa.Schema) -> None:
    head = pa.py_buffer(MAGIC + bytes(other.serialize()))
    with pytest.raises(ArrowMessageError):
        read_head(head, SCHEMA)
    data = write_file(schema=other)
    with pytest.raises(ArrowMessageError):
        read_file(pa.py_buffer(data), SCHEMA)


def test_a_deeply_nested_schema_is_refused() -> None:
    type_ = pa.int8()
    for _ in range(60):
        type_ = pa.struct([pa.field("a", type_)])
    with pytest.raises(ArrowMessageError, match="columns"):
        read_head(pa.py_buffer(MAGIC + bytes(pa.schema([pa.field("a", type_)]).serialize())), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:-10] + struct.pack("<i", -1) + b"ARROW1",
        lambda data: data[:-10] + struct.pack("<i", 2**31 - 1) + b"ARROW1",
        lambda data: data[:-6] + b"ARROW2",
        lambda data: b"ARROW2" + data[6:],
        lambda data: data.replace(b"\xff\xff\xff\xff\0\0\0\0", b"\xff\xff\xff\xff\x08\0\0\0"),
        lambda data: data.replace(b"\xff\xff\xff\xff\0\0\0\0", b"\xff\xff\xff\xff\0\0\0\0" + bytes(8)),
        lambda data: data[: data.index(b"\xff\xff\xff\xff\0\0\0\0")],
        lambda data: data[: data.index(b"\xff\xff\xff\xff\0\0\0\0") + 8],
        lambda data: data[: data.index(b"\xff\xff\xff\xff\0\0\0\0") + 8] + b"ARROW1",
        lambda data: b"",
        lambda data: b"ARROW1\0\0",
        lambda data: b"ARROW1\0\0ARROW1",
    ],
)
def test_a_file_that_ends_or_continues_otherwise_is_refused(change: Callable[[bytes], bytes]) -> None:
    data = write_file(batch())
    assert data.count(b"\xff\xff\xff\xff\0\0\0\0") == 1
    with pytest.raises(ArrowMessageError):
        read_file(pa.py_buffer(change(data)), SCHEMA)
