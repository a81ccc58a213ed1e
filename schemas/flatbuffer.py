"""The few parts of the FlatBuffers encoding that Arrow's messages need, with every offset checked.

A buffer starts with the offset of its root table. A table starts with an int32: how far before it its
vtable lies. A vtable is uint16 size of itself, uint16 size of the table, then per field a uint16 offset
into the table, 0 where the field is absent. Tables, vectors and strings lie at a uint32 offset after the
place that names them; a vector is a uint32 count and its items.

Source: https://flatbuffers.dev/internals/

Invariants:
    1. Whatever bytes come in, nothing but ``FlatBufferError`` is raised, and nothing is read outside
       them (tests/schemas/test_flatbuffer.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_UINT16: Final = struct.Struct("<H")
_UINT32: Final = struct.Struct("<I")
_INT32: Final = struct.Struct("<i")
_VTABLE_HEADER_BYTES: Final = 4


class FlatBufferError(ValueError):
    """An offset that leads out of its buffer."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table within a buffer.

    Attributes:
        data: The whole buffer.
        position: Where the table starts.
        vtable: Where its vtable starts.
        vtable_bytes: Size of the vtable, as it says itself.
    """

    data: memoryview
    position: int
    vtable: int
    vtable_bytes: int

    def integer(self, field: int, layout: struct.Struct) -> int:
        """Returns a number of field ``field``, 0 where it is absent."""
        place = self._find(field)
        return 0 if place is None else _unpack(self.data, layout, place)

    def table(self, field: int) -> Table | None:
        """Returns the table of field ``field``, None where it is absent."""
        place = self._find(field)
        return None if place is None else read_table(self.data, _follow(self.data, place))

    def string(self, field: int) -> memoryview:
        """Returns the bytes of a string, empty where it is absent."""
        start, count = self._vector(field, 1)
        return self.data[start : start + count]

    def structs(self, field: int, layout: struct.Struct) -> list[tuple[int, ...]]:
        """Returns a vector of structs, empty where it is absent."""
        start, count = self._vector(field, layout.size)
        return list(layout.iter_unpack(self.data[start : start + count * layout.size]))

    def num_tables(self, field: int) -> int:
        """Returns how many tables a vector holds."""
        return self._vector(field, _UINT32.size)[1]

    def tables(self, field: int) -> Iterator[Table]:
        """Yields the tables of a vector. Several items may be one and the same table."""
        start, count = self._vector(field, _UINT32.size)
        for place in range(start, start + count * _UINT32.size, _UINT32.size):
            yield read_table(self.data, _follow(self.data, place))

    def _find(self, field: int) -> int | None:
        entry = _VTABLE_HEADER_BYTES + field * _UINT16.size
        if entry + _UINT16.size > self.vtable_bytes:
            return None
        offset = _unpack(self.data, _UINT16, self.vtable + entry)
        return self.position + offset if offset else None

    def _vector(self, field: int, item_bytes: int) -> tuple[int, int]:
        place = self._find(field)
        if place is None:
            return 0, 0
        start = _follow(self.data, place)
        count = _unpack(self.data, _UINT32, start)
        start += _UINT32.size
        if count * item_bytes > len(self.data) - start:
            raise FlatBufferError(f"a vector of {count} items does not fit its buffer")
        return start, count


def read_root(data: memoryview) -> Table:
    """Returns the root table of a buffer.

    Raises:
        FlatBufferError: It lies outside. So do the methods of ``Table``.
    """
    return read_table(data, _follow(data, 0))


def read_table(data: memoryview, position: int) -> Table:
    """Returns the table at ``position``.

    Raises:
        FlatBufferError: The start of the table or of its vtable lies outside.
    """
    vtable = position - _unpack(data, _INT32, position)
    return Table(data, position, vtable, vtable_bytes=_unpack(data, _UINT16, vtable))


def _follow(data: memoryview, place: int) -> int:
    return place + _unpack(data, _UINT32, place)


def _unpack(data: memoryview, layout: struct.Struct, place: int) -> int:
    # A negative place would count from the end.
    if place < 0 or place + layout.size > len(data):
        raise FlatBufferError(f"an offset leads to byte {place} of {len(data)}")
    value: int = layout.unpack_from(data, place)[0]
    return value
