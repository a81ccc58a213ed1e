"""The schema of a file from a stranger: its metadata and what Arrow alone would make of them."""

from __future__ import annotations

import struct
import tracemalloc

import pyarrow as pa
import pytest

from schemas.arrow_message import ArrowMessageError, read_head
from schemas.flatbuffer import read_root
from schemas.rows import classification_schema

SCHEMA = classification_schema(3)
MAGIC = b"ARROW1\0\0"


def share_value(keys: list[bytes], value_bytes: int) -> pa.Buffer:
    """Returns a head whose schema has an entry of metadata per key, all with one and the same value."""
    metadata = bytearray(SCHEMA.with_metadata({"k": "v"}).serialize())[8:]
    header = read_root(memoryview(bytes(metadata))).table(2)
    assert header is not None
    place = header._find(2)
    assert place is not None
    # The vector of entries moves to the end: its count, an offset per entry, one vtable, an entry
    # (vtable, key, value) per key, the keys, the value.
    vector = len(metadata)
    vtable = vector + 4 + 4 * len(keys)
    entries = vtable + 8
    strings = b""
    places = []
    for key in keys:
        places.append(entries + 12 * len(keys) + len(strings))
        strings += struct.pack("<I", len(key)) + key + bytes(4 - len(key) % 4)
    value = entries + 12 * len(keys) + len(strings)
    metadata += struct.pack("<I", len(keys))
    for index in range(len(keys)):
        metadata += struct.pack("<I", entries + 12 * index - (vector + 4 + 4 * index))
    metadata += struct.pack("<HHHH", 8, 12, 4, 8)
    for index, key_place in enumerate(places):
        entry = entries + 12 * index
        metadata += struct.pack("<iII", entry - vtable, key_place - entry - 4, value - entry - 8)
    metadata += strings + struct.pack("<I", value_bytes) + b"v" * value_bytes + b"\0"
    struct.pack_into("<I", metadata, place, vector - place)
    metadata += bytes(-len(metadata) % 8)
    return pa.py_buffer(MAGIC + struct.pack("<Ii", 0xFFFFFFFF, len(metadata)) + bytes(metadata))


def test_metadata_that_share_a_value_are_refused_before_it_is_copied() -> None:
    assert read_head(share_value([b"a"], 1000), SCHEMA) == {b"a": b"v" * 1000}
    keys = [f"{index:04d}".encode() for index in range(900)]
    bomb = share_value(keys, 100_000)
    # Arrow alone unfolds it to hundreds of times the message.
    assert pa.ipc.read_schema(bomb.slice(8)).serialize().size > 500 * bomb.size
    tracemalloc.start()
    try:
        with pytest.raises(ArrowMessageError, match="repeats itself"):
            read_head(bomb, SCHEMA)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * bomb.size


def test_a_key_that_is_there_twice_and_too_many_keys_are_refused() -> None:
    with pytest.raises(ArrowMessageError, match="repeats itself"):
        read_head(share_value([b"a", b"a"], 4), SCHEMA)
    with pytest.raises(ArrowMessageError, match="more than 1000 entries"):
        read_head(share_value([f"{index}".encode() for index in range(1001)], 0), SCHEMA)


def test_a_big_endian_schema_is_refused() -> None:
    head = MAGIC + bytes(SCHEMA.serialize())
    big = SCHEMA.serialize()
    root = read_root(memoryview(big)[8:])
    header = root.table(2)
    assert header is not None
    assert read_head(pa.py_buffer(head), SCHEMA) == {}
    # The field is absent as it has its default: its entry in the vtable is pointed at a 1.
    ones = [place for place in range(header.position, len(root.data) - 1) if root.data[place] == 1]
    one = next(place for place in ones if root.data[place + 1] == 0)
    changed = bytearray(head)
    struct.pack_into("<H", changed, 16 + header.vtable + 4, one - header.position)
    with pytest.raises(ArrowMessageError, match="big-endian"):
        read_head(pa.py_buffer(bytes(changed)), SCHEMA)
