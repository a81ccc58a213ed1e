"""The position in the data, and the ranks' shares of a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data_state import DataState, accumulation, slice_rank
from schemas.errors import RefusedError

STATE = DataState(
    seed=1,
    global_batch=4,
    window=2,
    corpus_key="k",
    algorithm_version=1,
    rows_hash="r",
    plan_hashes=("p",),
    generation_hashes=("g",),
)


@pytest.mark.parametrize(
    ("global_batch", "max_micro_batch", "world_size", "expected"),
    [(32, 32, 1, (32, 1)), (32, 10, 1, (8, 4)), (32, 32, 3, (11, 1)), (10, 4, 1, (4, 3)), (2, 8, 4, (1, 1))],
)
def test_micro_batch_and_accumulation_follow_from_the_world_size(
    global_batch: int, max_micro_batch: int, world_size: int, expected: tuple[int, int]
) -> None:
    assert accumulation(global_batch, max_micro_batch, world_size) == expected


@given(
    count=st.integers(1, 40), extra=st.integers(0, 40), micro=st.integers(1, 9), world_size=st.integers(1, 9)
)
def test_the_ranks_shares_are_the_step_and_equally_large(
    count: int, extra: int, micro: int, world_size: int
) -> None:
    micro_batch, steps = accumulation(count + extra, micro, world_size)
    assert micro_batch <= micro
    step_rows = np.arange(100, 100 + count)
    shares = [slice_rank(step_rows, rank, world_size, micro_batch, steps) for rank in range(world_size)]
    assert {len(share.rows) for share in shares} == {micro_batch * steps}
    real = [share.rows[share.weights == 1] for share in shares]
    assert np.concatenate(real).tolist() == step_rows.tolist()
    sizes = [len(rows) for rows in real]
    assert max(sizes) - min(sizes) <= 1
    assert all(np.isin(share.rows, step_rows).all() for share in shares)
    assert all(set(share.weights.tolist()) <= {0.0, 1.0} for share in shares)


def test_a_state_moves_on_and_over_the_end_of_an_epoch() -> None:
    state = STATE.advance(4, 10).advance(4, 10)
    assert (state.epoch, state.samples_consumed) == (0, 8)
    state = state.advance(2, 10)
    assert (state.epoch, state.samples_consumed) == (1, 0)


def test_a_state_survives_json() -> None:
    state = STATE.advance(4, 10)
    assert DataState.model_validate_json(state.model_dump_json()) == state


def test_a_position_in_other_data_is_refused_naming_the_fields() -> None:
    STATE.check_same_data(STATE.advance(4, 10))
    other = STATE.model_copy(update={"global_batch": 8, "generation_hashes": ("h",)})
    with pytest.raises(RefusedError) as error:
        STATE.check_same_data(other)
    assert error.value.differing == ("global_batch: 8 -> 4", "generation_hashes: ('h',) -> ('g',)")
