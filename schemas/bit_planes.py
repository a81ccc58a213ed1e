"""Unsigned integers of any width, packed as byte planes and bit planes.

Layout of S integers of ``width`` bits: ``width // 8`` byte planes of S bytes, lowest byte first, then
``width % 8`` bit planes of ``ceil(S / 8)`` bytes, lowest bit first, each with its first integer in the
lowest bit of its first byte. Planes decode by whole-array operations, which fields that straddle bytes
do not.

Invariants (tests/schemas/test_bit_planes.py):
    1. ``unpack`` inverts ``pack`` for every width from 0 to 32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from schemas.entry_layout import CodecError

Bytes = npt.NDArray[np.uint8]
MAX_WIDTH = 32


def plane_bytes(count: int, width: int) -> int:
    """Returns the bytes of ``count`` integers of ``width`` bits."""
    return width // 8 * count + width % 8 * -(-count // 8)


def pack(values: npt.NDArray[np.integer], width: int) -> Bytes:
    """Packs integers in ``[0, 2^width)``.

    Args:
        values: ``[S]``.
        width: 0 to 32.

    Returns:
        ``uint8[plane_bytes(S, width)]``.
    """
    wide = values.astype(np.uint32)
    planes = [(wide >> np.uint32(8 * index)).astype(np.uint8) for index in range(width // 8)]
    for bit in range(width // 8 * 8, width):
        planes.append(np.packbits((wide >> np.uint32(bit)).astype(np.uint8) & np.uint8(1), bitorder="little"))
    return np.concatenate(planes) if planes else np.empty(0, np.uint8)


def unpack(planes: Bytes, count: int, width: int) -> npt.NDArray[np.unsignedinteger]:
    """Unpacks what ``pack`` wrote.

    Args:
        planes: ``uint8[plane_bytes(count, width)]``.
        count: S.
        width: 0 to 32.

    Returns:
        ``[S]``, in the narrowest of uint8, uint16 and uint32 that holds ``width`` bits.

    Raises:
        CodecError: The planes have another size.
    """
    if not 0 <= width <= MAX_WIDTH or len(planes) != plane_bytes(count, width):
        raise CodecError(f"{count} integers of {width} bits do not take {len(planes)} bytes")
    num_bytes, num_bits = divmod(width, 8)
    if num_bytes == 1 and not num_bits:
        return planes
    dtype = np.uint8 if width <= 8 else np.uint16 if width <= 16 else np.uint32
    values: npt.NDArray[np.unsignedinteger] = np.zeros(count, dtype)
    # Bytes of the values in memory, lowest first: planes are written to where they belong.
    lanes = values.view(np.uint8).reshape(count, values.itemsize)
    for index in range(num_bytes):
        lanes[:, index] = planes[index * count : (index + 1) * count]
    if num_bits:
        lanes[:, num_bytes] = _unpack_bits(planes[num_bytes * count :], count, num_bits)
    return values


def _unpack_bits(planes: Bytes, count: int, num_bits: int) -> Bytes:
    """Returns the integers, ``uint8[count]``, of bit planes alone."""
    stride = -(-count // 8)
    result = np.unpackbits(planes[:stride], count=count, bitorder="little")
    for bit in range(1, num_bits):
        plane = np.unpackbits(planes[bit * stride : (bit + 1) * stride], count=count, bitorder="little")
        result |= np.left_shift(plane, np.uint8(bit), out=plane)
    return result
