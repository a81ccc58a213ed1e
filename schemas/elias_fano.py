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

import numpy as np
import numpy.typing as npt

from schemas.bit_planes import Bytes, pack, plane_bytes, unpack
from schemas.entry_layout import CodecError
from schemas.kept_entries import Offsets

# Twice the optimal bitmap, with one low bit less: smaller once the bitmap is compressed.
_SPARE_BITS = 1


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
    low: Bytes, high: Bytes, num_ids: int, num_positions: int, vocab: int
) -> tuple[npt.NDArray[np.int32], Offsets]:
    """Decodes the ids of a row.

    Args:
        low: From ``encode``.
        high: From ``encode``.
        num_ids: S.
        num_positions: P.
        vocab: V.

    Returns:
        int32[S] ids, and int64[P + 1] offsets.

    Raises:
        CodecError: The bytes are not what ``encode`` writes.
    """
    high_bytes = check_sizes(low, num_ids, num_positions, vocab)
    if len(high) != high_bytes:
        raise CodecError(f"the high parts of {num_ids} kept ids have {len(high)} bytes, not {high_bytes}")
    if not num_ids:
        return np.empty(0, np.int32), np.zeros(num_positions + 1, np.int64)
    width = num_low_bits(num_ids, num_positions, vocab)
    buckets = _num_buckets(vocab, width)
    bits = np.unpackbits(high, count=num_ids + num_positions * buckets, bitorder="little")
    parts = np.flatnonzero(bits.view(np.bool_))
    if len(parts) != num_ids:
        raise CodecError(f"the bitmap has {len(parts)} ones for {num_ids} kept ids")
    parts -= np.arange(num_ids)
    starts = np.arange(num_positions + 1) * buckets
    offsets = np.searchsorted(parts, starts)
    if offsets[-1] != num_ids:
        raise CodecError("a kept id belongs to no position")
    parts -= np.repeat(starts[:-1], np.diff(offsets))
    ids = parts.astype(np.int32)
    ids <<= np.int32(width)
    ids |= unpack(low, num_ids, width).astype(np.int32, copy=False)
    _check_ids(ids, offsets, vocab)
    return ids, offsets


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
