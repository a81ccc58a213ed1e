"""Batches of similar length under a token budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precompute.batching import cut_batches


@given(st.lists(st.integers(0, 200), max_size=60), st.integers(1, 1000))
def test_batches_hold_every_row_once_under_the_budget(lengths: list[int], budget: int) -> None:
    batches = cut_batches(np.array(lengths, np.int64), budget)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
    longest_first = [max(lengths[index] for index in batch) for batch in batches]
    assert longest_first == sorted(longest_first, reverse=True)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=40))
def test_a_batch_is_as_full_as_it_can_be(lengths: list[int]) -> None:
    batches = cut_batches(np.array(lengths), 100)
    for batch in batches[:-1]:
        assert (len(batch) + 1) * lengths[batch[0]] > 100


def test_rows_are_sorted_by_length_and_ties_keep_their_order() -> None:
    batches = cut_batches(np.array([2, 5, 3, 5, 2]), 10)
    assert [batch.tolist() for batch in batches] == [[1, 3], [2, 0, 4]]


def test_a_row_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert [batch.tolist() for batch in cut_batches(np.array([3, 20]), 10)] == [[1], [0]]


def test_no_rows_make_no_batches() -> None:
    assert cut_batches(np.array([], np.int64), 10) == []


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        cut_batches(np.array([1]), 0)
