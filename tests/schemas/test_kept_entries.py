from __future__ import annotations

import numpy as np

from schemas.kept_entries import Draws, KeptEntries, offsets_of


def test_weights_of_draws_are_count_over_n_q_times_p() -> None:
    # p = (.5, .25, .25), tau = .5: sqrt p sums to 1.7071; q = (.4142, .2929, .2929). Four draws: 3 of
    # id 0 and 1 of id 2: weights 3 / 4 / .4142 * .5 and 1 / 4 / .2929 * .25.
    log_norm = np.log([np.sqrt(0.5) + 2 * np.sqrt(0.25)]).astype(np.float32)
    draws = Draws(np.array([3, 1]), log_norm, num_samples=4, tau=0.5)
    entries = KeptEntries(
        np.array([0, 2]), np.array([0, 2]), np.log(np.array([0.5, 0.25], np.float32)), draws=draws
    )
    np.testing.assert_allclose(entries.weights, [0.905330, 0.213388], rtol=1e-5)


def test_draws_from_p_itself_weigh_their_share_of_the_draws() -> None:
    draws = Draws(np.array([3, 1]), np.zeros(1, np.float32), num_samples=4, tau=1.0)
    entries = KeptEntries(np.array([0, 2]), np.array([5, 9]), np.log([0.9, 1e-5]), draws=draws)
    assert entries.weights is not None
    assert entries.weights.tolist() == [0.75, 0.25]


def test_the_tail_of_a_hybrid_weighs_tau_and_its_head_p() -> None:
    log_probs = np.log(np.array([0.5, 0.2, 0.15, 0.15], np.float32))
    entries = KeptEntries(
        np.array([0, 4]),
        np.array([7, 9, 1, 3]),
        log_probs,
        num_head=np.array([2]),
        tau=np.array([0.15], np.float32),
    )
    np.testing.assert_allclose(entries.weights, [0.5, 0.2, 0.15, 0.15], rtol=1e-6)
    assert entries.head_mask().tolist() == [True, True, False, False]


def test_deterministic_entries_have_no_weights_and_are_all_exact() -> None:
    entries = KeptEntries(np.array([0, 1, 1]), np.array([3], np.uint16), np.array([-0.5], np.float16))
    assert entries.weights is None
    assert entries.head_mask().tolist() == [True]
    assert entries.counts.tolist() == [1, 0]
    assert entries.num_positions == 2


def test_widening_changes_dtypes_and_no_value() -> None:
    narrow = KeptEntries(np.array([0, 2]), np.array([3, 65535], np.uint16), np.array([-0.5, -2], np.float16))
    wide = narrow.widen()
    assert (wide.ids.dtype, wide.log_probs.dtype) == (np.int32, np.float32)
    assert wide.ids.tolist() == [3, 65535]
    assert wide.log_probs.tolist() == [-0.5, -2.0]
    assert wide.widen().ids is wide.ids


def test_offsets_count_up() -> None:
    assert offsets_of(np.array([2, 0, 3], np.uint16)).tolist() == [0, 2, 2, 5]
    assert offsets_of(np.array([], np.int64)).tolist() == [0]
