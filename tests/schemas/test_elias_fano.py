from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.elias_fano import decode as decode_rows
from schemas.elias_fano import encode, num_high_bits, num_low_bits
from schemas.entry_layout import CodecError
from schemas.kept_entries import offsets_of

VOCABS = (1, 2, 7, 300, 49152, 152064, 2**31)


def random_row(vocab: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    sets = [np.unique(rng.integers(0, vocab, rng.integers(0, 20))) for _ in range(rng.integers(0, 9))]
    sets = [ids[ids < vocab] for ids in sets]
    flat = np.concatenate(sets) if sets else np.empty(0, np.int64)
    return flat, offsets_of(np.array([len(ids) for ids in sets], np.int64))


def decode(
    low: np.ndarray, high: np.ndarray, num_ids: int, num_positions: int, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a single row."""
    return decode_rows([low], [high], np.array([num_ids]), np.array([num_positions]), vocab)


@given(st.sampled_from(VOCABS), st.integers(0, 2**32))
@settings(deadline=None)
def test_ids_and_positions_come_back(vocab: int, seed: int) -> None:
    ids, offsets = random_row(vocab, seed)
    low, high = encode(ids, offsets, vocab)
    found, places = decode(low, high, len(ids), len(offsets) - 1, vocab)
    np.testing.assert_array_equal(found, ids)
    np.testing.assert_array_equal(places, offsets)
    assert found.dtype == np.int32


@pytest.mark.parametrize("vocab", [1, 300, 2**31])
def test_the_first_and_the_last_id_come_back(vocab: int) -> None:
    ids = np.unique([0, vocab - 1])
    low, high = encode(ids, np.array([0, len(ids)]), vocab)
    assert decode(low, high, len(ids), 1, vocab)[0].tolist() == ids.tolist()


def test_a_row_by_hand() -> None:
    # V = 8, ids {1, 6} and {3}: S = 3, P = 2, floor(log2(16 / 3)) = 2, so l = 1 and U = 4 buckets a
    # position. x >> l = 0, 3 and 4 + 1 = 5: bits 0 + 0, 3 + 1, 5 + 2 of 3 + 8. Low bits 1, 0, 1.
    low, high = encode(np.array([1, 6, 3]), np.array([0, 2, 3]), 8)
    assert low.tolist() == [0b101]
    assert high.tolist() == [0b1001_0001, 0]


@pytest.mark.parametrize(("k", "l"), [(12, 11), (50, 8), (64, 8), (128, 8), (200, 6)])
def test_low_bits_are_a_byte_where_that_is_near_the_optimum(k: int, l: int) -> None:  # noqa: E741
    assert num_low_bits(10 * k, 10, 49152) == l


@given(st.sampled_from(VOCABS), st.integers(1, 10**6), st.integers(1, 10**4))
@settings(deadline=None)
def test_the_bitmap_is_bounded_by_ids_and_positions(vocab: int, num_ids: int, num_positions: int) -> None:
    if num_ids <= vocab * num_positions:
        assert num_high_bits(num_ids, num_positions, vocab) <= 5 * num_ids + 2 * num_positions + 2


@given(st.integers(0, 2**32), st.data())
@settings(deadline=None)
def test_damaged_bytes_give_sound_ids_or_a_codec_error(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    vocab = data.draw(st.sampled_from((300, 49152, 2**31)))
    ids, offsets = random_row(vocab, seed)
    low, high = (part.copy() for part in encode(ids, offsets, vocab))
    num_ids, num_positions = len(ids), len(offsets) - 1
    for part in (low, high):
        if len(part) and rng.random() < 0.7:
            part[rng.integers(0, len(part), 3)] = rng.integers(0, 256, 3)
    if rng.random() < 0.2:
        num_ids += data.draw(st.integers(-3, 3) | st.integers(-(2**31), 2**31))
    try:
        found, places = decode(low, high, num_ids, num_positions, vocab)
    except CodecError:
        return
    assert len(found) == num_ids
    assert places[0] == 0
    assert places[-1] == num_ids
    for start, stop in pairwise(places):
        own = found[start:stop].tolist()
        assert own == sorted(set(own))
        assert all(0 <= one < vocab for one in own)


def test_an_id_beyond_the_last_position_is_an_error() -> None:
    # V = 8, one position, S = 1: l = 2, U = 2. The bit after both buckets would be position 1.
    low, high = encode(np.array([7]), np.array([0, 1]), 8)
    assert (low.tolist(), high.tolist()) == ([1, 1], [0b10])
    with pytest.raises(CodecError, match="belongs to no position"):
        decode(low, np.array([0b100], np.uint8), 1, 1, 8)


def test_the_coded_ids_stay_near_their_bound() -> None:
    # ceil(log2 C(V, k)) bits is what uniform ids need; the bitmap is compressed afterwards.
    rng = np.random.default_rng(0)
    for k in (12, 50, 64, 128):
        ids = np.concatenate([np.sort(rng.choice(49152, k, replace=False)) for _ in range(40)])
        low, high = encode(ids, np.arange(41) * k, 49152)
        bound = (math.lgamma(49153) - math.lgamma(k + 1) - math.lgamma(49153 - k)) / math.log(2) / 8
        assert (len(low) + len(high)) / 40 < 1.15 * bound


@pytest.mark.parametrize("k", [1, 12, 50])
def test_rows_of_one_width_are_decoded_at_once(k: int) -> None:
    rng = np.random.default_rng(k)
    vocab, places = 49152, np.array([3, 0, 1, 7])
    rows = [
        np.concatenate(
            [np.empty(0, int), *(np.sort(rng.choice(vocab, k, replace=False)) for _ in range(num))]
        )
        for num in places
    ]
    pairs = [encode(ids, np.arange(num + 1) * k, vocab) for ids, num in zip(rows, places, strict=True)]
    lows, highs = ([pair[index] for pair in pairs] for index in (0, 1))
    found, offsets = decode_rows(lows, highs, places * k, places, vocab)
    np.testing.assert_array_equal(found, np.concatenate(rows))
    np.testing.assert_array_equal(offsets, np.arange(12) * k)
    highs[0] = np.roll(highs[0], 1)
    with pytest.raises(CodecError):
        decode_rows([lows[3], lows[0]], [highs[3], highs[0]], places[[3, 0]] * k, places[[3, 0]], vocab)
    with pytest.raises(ValueError, match="same width"):
        decode_rows(
            [lows[3], encode(np.arange(300), np.array([0, 300]), vocab)[0]],
            [highs[3], encode(np.arange(300), np.array([0, 300]), vocab)[1]],
            np.array([7 * k, 300]),
            np.array([7, 1]),
            vocab,
        )
