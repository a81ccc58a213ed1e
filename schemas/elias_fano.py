"""Elias-Fano coding of the kept ids of a row: low bits packed, high parts in unary.

A row of P positions with S ids is one increasing sequence ``x = n U 2^l + id`` for position n, with
U = ceil(V / 2^l). ``low`` holds the l low bits of each x as ``schemas.bit_planes``. ``high`` is a bitmap
of S + P U bits, lowest bit of a byte first: the j-th x sets bit ``(x >> l) + j``. So the ones say which
ids a position has and, between them, where positions end: counts are not stored. l follows from S, P
and V. Ids of real models crowd at low values (frequent tokens come first), so that a compressor takes
the bitmap to well below its size.

Source: Elias, J. ACM 1974; Fano 1971; Vigna, WSDM 2013, "Quasi-succinct indices".

Invariants (tests/schemas/test_elias_fano.py):
    1. ``decode`` inverts ``encode``, positions without ids included.
    2. Whatever bytes come in, ``decode`` returns strictly increasing ids below V or raises
       ``CodecError``; what it allocates is bounded by the bytes of ``low`` and the positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from schemas.bit_planes import Bytes, pack, plane_bytes, unpack
from schemas.entry_layout import CodecError
from schemas.kept_entries import Offsets, offsets_of

# Twice the optimal bitmap, with one low bit less: smaller once the bitmap is compressed.
_SPARE_BITS = 1
_INT32_VALUES = 2**31


def num_low_bits(num_ids: int, num_positions: int, vocab: int) -> int:
    """Returns l, at least 1: one less than ``floor(log2(V P / S))``, or a whole byte if that is as near.

    Args:
        num_ids: S, at least 1.
        num_positions: P, at least 1.
        vocab: V.
    """
    optimal = (vocab * num_positions // num_ids).bit_length() - 1
    return optimal if optimal in (8, 16) else max(1, optimal - _SPARE_BITS)


def num_high_bits(num_ids: int, num_positions: int, vocab: int) -> int:
    """Returns the bits of the bitmap, ``S + P U``; 0 without ids."""
    if not num_ids:
        return 0
    return num_ids + num_positions * _num_buckets(vocab, num_low_bits(num_ids, num_positions, vocab))


def encode(ids: npt.NDArray[np.integer], offsets: Offsets, vocab: int) -> tuple[Bytes, Bytes]:
    """Encodes the ids of a row.

    Args:
        ids: ``[S]``, strictly increasing within a position.
        offsets: int64[P + 1] into ``ids``.
        vocab: V.

    Returns:
        ``low`` and ``high``.
    """
    num_ids, num_positions = len(ids), len(offsets) - 1
    if not num_ids:
        return np.empty(0, np.uint8), np.empty(0, np.uint8)
    width = num_low_bits(num_ids, num_positions, vocab)
    wide = ids.astype(np.int64)
    buckets = np.arange(num_positions) * _num_buckets(vocab, width)
    ones = (wide >> width) + np.repeat(buckets, np.diff(offsets)) + np.arange(num_ids)
    bits = np.zeros(num_high_bits(num_ids, num_positions, vocab), np.uint8)
    bits[ones] = 1
    return pack(wide & ((1 << width) - 1), width), np.packbits(bits, bitorder="little")


def check_sizes(low: Bytes, num_ids: int, num_positions: int, vocab: int) -> int:
    """Checks that a row may have so many ids, before anything is allocated for them.

    Returns:
        The bytes that ``high`` must have.

    Raises:
        CodecError: ``low`` is of another size.
    """
    if num_ids < 0 or num_ids > num_positions * vocab:
        raise CodecError(f"{num_positions} positions cannot keep {num_ids} ids")
    width = num_low_bits(num_ids, num_positions, vocab) if num_ids else 0
    if len(low) != plane_bytes(num_ids, width):
        raise CodecError(f"{num_ids} kept ids do not have {len(low)} bytes of low bits")
    return -(-num_high_bits(num_ids, num_positions, vocab) // 8)


def decode(
    lows: Sequence[Bytes], highs: Sequence[Bytes], num_ids: Offsets, num_positions: Offsets, vocab: int
) -> tuple[npt.NDArray[np.int32], Offsets]:
    """Decodes the ids of B rows of the same l at once.

    Args:
        lows: From ``encode``, one a row.
        highs: From ``encode``, one a row.
        num_ids: S of each row, int64[B].
        num_positions: P of each row, int64[B].
        vocab: V.

    Returns:
        Ids of all rows, int32, and offsets of all positions, int64, from 0.

    Raises:
        CodecError: The bytes are not what ``encode`` writes.
    """
    sizes = [
        check_sizes(low, int(num), int(places), vocab)
        for low, num, places in zip(lows, num_ids, num_positions, strict=True)
    ]
    if [len(high) for high in highs] != sizes:
        raise CodecError("the high parts of kept ids have another number of bytes")
    starts, rows = offsets_of(num_ids), offsets_of(num_positions)
    if not starts[-1]:
        return np.empty(0, np.int32), np.zeros(rows[-1] + 1, np.int64)
    widths = {
        num_low_bits(int(num), int(places), vocab)
        for num, places in zip(num_ids, num_positions, strict=True)
        if num
    }
    width = widths.pop()
    if widths:
        raise ValueError("rows that are decoded together must have low bits of the same width")
    buckets = _num_buckets(vocab, width)
    parts = _read_unary(highs, starts, rows * buckets)
    places = np.arange(rows[-1] + 1, dtype=parts.dtype) * parts.dtype.type(buckets)
    offsets = np.searchsorted(parts, places)
    parts -= np.repeat(places[:-1], np.diff(offsets))
    ids = parts.astype(np.int32, copy=False)
    ids <<= np.int32(width)
    for row, low in enumerate(lows):
        ids[starts[row] : starts[row + 1]] |= unpack(low, int(num_ids[row]), width).astype(
            np.int32, copy=False
        )
    _check_ids(ids, offsets, vocab)
    return ids, offsets


def _read_unary(highs: Sequence[Bytes], starts: Offsets, bounds: Offsets) -> npt.NDArray[Any]:
    """Returns the high part of each id, rows one after another, non-decreasing, int32 or int64.

    Args:
        highs: Bitmaps of B rows.
        starts: int64[B + 1]: the ids of each row.
        bounds: int64[B + 1]: the high parts that each row may have, position after position.

    Raises:
        CodecError: A bitmap has another number of ones, or one beyond its last position.
    """
    first_bits = 8 * offsets_of(np.array([len(high) for high in highs], np.int64))
    # Fresh memory costs more than what is computed in it: int32 wherever that is wide enough.
    dtype = np.int32 if max(first_bits[-1], bounds[-1]) < _INT32_VALUES else np.int64
    bits = np.unpackbits(np.concatenate(highs), bitorder="little").view(np.bool_)
    parts: npt.NDArray[Any] = np.flatnonzero(bits).astype(dtype)
    if not np.array_equal(np.searchsorted(parts, first_bits.astype(dtype)), starts):
        raise CodecError("a bitmap has another number of ones than there are kept ids")
    parts -= np.arange(len(parts), dtype=dtype)
    shifts = (bounds[:-1] - first_bits[:-1] + starts[:-1]).tolist()
    for shift, start, stop, bound in zip(
        shifts, starts[:-1].tolist(), starts[1:].tolist(), bounds[1:].tolist(), strict=True
    ):
        if start < stop:
            parts[start:stop] += dtype(shift)
            if parts[stop - 1] >= bound:
                raise CodecError("a kept id belongs to no position")
    return parts


def _check_ids(ids: npt.NDArray[np.int32], offsets: Offsets, vocab: int) -> None:
    if int(ids.max()) >= vocab or int(ids.min()) < 0:
        raise CodecError(f"a kept id is out of range; the vocabulary has {vocab} tokens")
    falls = ids[1:] <= ids[:-1]
    # Between positions ids start anew.
    starts = offsets[1:-1]
    falls[starts[(starts > 0) & (starts < len(ids))] - 1] = False
    if falls.any():
        raise CodecError("kept ids of a position do not increase")


def _num_buckets(vocab: int, width: int) -> int:
    return -(-vocab // (1 << width))
