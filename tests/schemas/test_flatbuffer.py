from __future__ import annotations

import struct

import pytest

from schemas.flatbuffer import FlatBufferError, read_root


def test_a_flatbuffer_never_reads_outside_its_bytes() -> None:
    for data in (b"", b"\0", b"\xff" * 64, struct.pack("<Ii", 4, 2**31 - 1)):
        with pytest.raises(FlatBufferError):
            read_root(memoryview(data))
    # A vtable that starts before the buffer.
    with pytest.raises(FlatBufferError, match="byte -4"):
        read_root(memoryview(struct.pack("<IiII", 4, 8, 0, 0)))
