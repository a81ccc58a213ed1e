"""The order of reading: whole, pure, and the same wherever reading starts."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.order import EpochOrder, OrderKey, hold_out, order, select_rows
from schemas.errors import DataError
from schemas.recipe import FirstRows, SampledRows

KEY = OrderKey(seed=17, corpus_key="c" * 64, window=2)
ROWS = np.arange(12)
BOUNDS = np.array([0, 4, 8, 12])
FROZEN = [2, 7, 5, 4, 3, 0, 6, 1, 10, 8, 9, 11]


@st.composite
def corpora(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Selected rows, shard bounds (one-row shards included) and a window."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    bounds = np.cumsum([0, *sizes])
    chosen = draw(st.sets(st.integers(0, int(bounds[-1]) - 1), min_size=1))
    return np.array(sorted(chosen)), bounds, draw(st.integers(1, 6))


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), epoch=st.integers(0, 3), data=st.data())
def test_an_epoch_visits_every_selected_row_once_and_any_slice_is_a_slice_of_it(
    corpus: tuple[np.ndarray, np.ndarray, int], epoch: int, data: st.DataObject
) -> None:
    rows, bounds, window = corpus
    key = OrderKey(3, "k", window)
    whole = order(key, epoch, rows, bounds, 0, len(rows))
    assert sorted(whole) == rows.tolist()
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    assert np.array_equal(order(key, epoch, rows, bounds, start, stop), whole[start:stop])


@settings(max_examples=40, deadline=None)
@given(corpus=corpora())
def test_the_rows_of_a_window_are_those_of_its_shards(corpus: tuple[np.ndarray, np.ndarray, int]) -> None:
    rows, bounds, window = corpus
    whole = order(OrderKey(3, "k", window), 0, rows, bounds, 0, len(rows))
    shards = np.searchsorted(bounds, whole, side="right") - 1
    # Each shard's rows lie within `window` neighbouring shards of the shuffled list.
    first_seen = list(dict.fromkeys(shards.tolist()))
    for place in range(0, len(first_seen), window):
        together = set(first_seen[place : place + window])
        count = sum(int((shards == shard).sum()) for shard in together)
        before = sum(int((shards == shard).sum()) for shard in first_seen[:place])
        assert set(shards[before : before + count].tolist()) == together


def test_the_order_is_this_one_on_every_machine() -> None:
    # Worked out once by the definition in the next test; a change means a new algorithm version.
    assert order(KEY, 0, ROWS, BOUNDS, 0, 12).tolist() == FROZEN


def test_shards_of_which_no_row_is_selected_count_for_no_window() -> None:
    # As if they were not there: what an exclusion empties does not thin a window out.
    rows = np.array([0, 1, 2, 3, 8, 9, 10, 11])
    with_empty = order(KEY, 0, rows, BOUNDS, 0, 8)
    without = order(KEY, 0, np.arange(8), np.array([0, 4, 8]), 0, 8)
    assert with_empty.tolist() == rows[without].tolist()


def test_the_order_follows_its_definition() -> None:
    def permute(count: int, *stream: object) -> np.ndarray:
        text = json.dumps(stream, separators=(",", ":")).encode()
        key = int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
        low = (1 << (count - 1).bit_length()) - 1
        raw = np.random.Philox(key=key).random_raw(count).tolist()
        return np.array(sorted(range(count), key=lambda place: (raw[place] & ~low, place)))

    shards = permute(3, 1, "c" * 64, 17, 0, "shards")
    shard_rows = [ROWS[:4], ROWS[4:8], ROWS[8:]]
    windows = [np.concatenate([shard_rows[i] for i in shards[:2]]), shard_rows[shards[2]]]
    expected = [
        rows[permute(len(rows), 1, "c" * 64, 17, 0, "rows", number)] for number, rows in enumerate(windows)
    ]
    assert order(KEY, 0, ROWS, BOUNDS, 0, 12).tolist() == np.concatenate(expected).tolist()


@pytest.mark.parametrize(
    "changed",
    [
        (OrderKey(18, "c" * 64, 2), 0),
        (OrderKey(17, "d" * 64, 2), 0),
        (OrderKey(17, "c" * 64, 3), 0),
        (KEY, 1),
    ],
    ids=["seed", "corpus key", "window", "epoch"],
)
def test_another_seed_corpus_window_or_epoch_is_another_order(changed: tuple[OrderKey, int]) -> None:
    key, epoch = changed
    rows, bounds = np.arange(100), np.arange(0, 101, 10)
    assert not np.array_equal(order(key, epoch, rows, bounds, 0, 100), order(KEY, 0, rows, bounds, 0, 100))


def test_an_unknown_algorithm_version_is_refused() -> None:
    with pytest.raises(DataError, match="order algorithm 2"):
        order(OrderKey(0, "k", 1, algorithm_version=2), 0, ROWS, BOUNDS, 0, 1)


def test_what_a_slice_returns_can_be_written_without_changing_the_order() -> None:
    epoch = EpochOrder(KEY, 0, ROWS, BOUNDS)
    first = epoch.slice(0, 3)
    expected = first.copy()
    first[:] = -1
    assert np.array_equal(epoch.slice(0, 3), expected)


def test_first_and_sampled_rows_are_chosen_from_the_usable_ones() -> None:
    usable = np.array([1, 4, 5, 8, 9])
    assert select_rows(usable, None).tolist() == usable.tolist()
    assert select_rows(usable, FirstRows(first=2)).tolist() == [1, 4]
    sampled = select_rows(usable, SampledRows(sample=3, seed=1))
    assert sorted(set(sampled.tolist()) & set(usable.tolist())) == sampled.tolist()
    assert len(sampled) == 3
    assert np.array_equal(sampled, select_rows(usable, SampledRows(sample=3, seed=1)))
    many = np.arange(1000)
    samples = [select_rows(many, SampledRows(sample=10, seed=seed)).tolist() for seed in (1, 2)]
    assert samples[0] != samples[1]
    with pytest.raises(DataError, match="asks for 6 rows, the corpus has 5"):
        select_rows(usable, FirstRows(first=6))


def test_a_held_out_share_is_seeded_disjoint_and_whole() -> None:
    rows = np.arange(0, 300, 3)
    train, held = hold_out(rows, 0.1, 5, "k")
    assert len(held) == 10
    assert sorted([*train, *held]) == rows.tolist()
    assert np.array_equal(held, np.sort(held))
    assert np.array_equal(held, hold_out(rows, 0.1, 5, "k")[1])
    assert not np.array_equal(held, hold_out(rows, 0.1, 6, "k")[1])
    assert not np.array_equal(held, hold_out(rows, 0.1, 5, "other")[1])


def test_a_held_out_share_has_at_least_one_row_and_leaves_one() -> None:
    assert [len(part) for part in hold_out(np.arange(2), 0.01, 0, "k")] == [1, 1]
    assert [len(part) for part in hold_out(np.arange(2), 0.99, 0, "k")] == [1, 1]
    assert [len(part) for part in hold_out(np.arange(2), 0.0, 0, "k")] == [2, 0]
    with pytest.raises(DataError, match="selection_fraction: 0"):
        hold_out(np.arange(1), 0.1, 0, "k")
