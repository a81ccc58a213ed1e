"""Tests of the measures, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from distill.metrics import (
    accuracy,
    agreement,
    area_under_curve,
    bootstrap_means,
    compare_correctness,
    macro_f1,
    mean_reciprocal_rank,
    percentile_interval,
    predict,
    reliability,
    resample_seeds,
)


def test_accuracy_of_three_in_four_has_the_binomial_standard_error() -> None:
    value, stderr = accuracy(np.array([True, True, True, False]))
    assert value == 0.75
    assert stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_standard_error_of_a_mean_over_models_shrinks_only_by_disagreement() -> None:
    # Two models that are right on the same rows carry no more information than one.
    one = np.array([1.0, 1.0, 0.0, 0.0])
    assert accuracy((one + one) / 2) == accuracy(one)
    # Two that complement each other: every row's mean is 1/2.
    assert accuracy((one + (1 - one)) / 2) == (0.5, 0.0)


def test_equal_probabilities_predict_the_first_label() -> None:
    assert predict(np.array([[0.5, 0.5], [0.2, 0.8]])).tolist() == [0, 1]


def test_macro_f1_is_the_plain_mean_over_labels() -> None:
    golden = np.array([0, 0, 1, 1])
    predicted = np.array([0, 1, 1, 1])
    # label 0: precision 1, recall 1/2 -> 2/3; label 1: precision 2/3, recall 1 -> 4/5.
    assert macro_f1(golden, predicted, 2) == pytest.approx((2 / 3 + 4 / 5) / 2)
    # A third label that never occurs counts as 0.
    assert macro_f1(golden, predicted, 3) == pytest.approx((2 / 3 + 4 / 5) / 3)


def test_ece_of_two_bins_is_the_weighted_gap() -> None:
    # Confidences .9 (right), .9 (wrong), .6 (right), .6 (right); two bins do not separate them,
    # ten do: |1.8 - 1| / 4 + |1.2 - 2| / 4 = 0.2 + 0.2.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    golden = np.array([0, 1, 0, 0])
    assert reliability(probabilities, golden, 10).ece() == pytest.approx(0.4)
    # In one bin the gaps cancel: |3.0 - 3| / 4.
    assert reliability(probabilities, golden, 2).ece() == pytest.approx(0.0)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it() -> None:
    bins = reliability(np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([0, 1]), 4)
    assert bins.counts_M.tolist() == [0, 1, 0, 1]
    assert bins.correct_M.tolist() == [0, 0, 0, 1]
    assert bins.confidence_sum_M.tolist() == [0.0, 0.5, 0.0, 1.0]


def test_fifteen_bins_hold_every_row() -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=500)
    bins = reliability(probabilities, rng.integers(0, 3, 500))
    assert len(bins.counts_M) == 15
    assert bins.counts_M.sum() == 500


def test_agreement_is_the_share_of_equal_predictions() -> None:
    assert agreement(np.array([0, 1, 2, 0]), np.array([0, 1, 1, 1])) == 0.5


def test_reciprocal_ranks_are_averaged_over_questions() -> None:
    scores = np.array([0.9, 0.5, 0.1, 0.2, 0.7, 0.6])
    relevant = np.array([True, False, False, True, False, False])
    question = np.array(["a", "a", "a", "b", "b", "b"])
    # a: rank 1; b: rank 3.
    assert mean_reciprocal_rank(scores, relevant, question) == (pytest.approx((1 + 1 / 3) / 2), 2)


def test_ties_earn_the_worst_rank_whatever_the_order_of_rows() -> None:
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        relevant = np.array([True, False, False, False])[order]
        assert mean_reciprocal_rank(np.full(4, 0.5), relevant, np.zeros(4)) == (0.25, 1)


def test_the_best_of_several_relevant_rows_counts() -> None:
    scores = np.array([0.1, 0.8, 0.9])
    relevant = np.array([True, True, False])
    assert mean_reciprocal_rank(scores, relevant, np.zeros(3)) == (0.5, 1)


def test_questions_with_one_kind_of_row_only_are_left_out() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    relevant = np.array([True, False, False, True, False])
    question = np.array([1, 2, 2, 3, 3])
    assert mean_reciprocal_rank(scores, relevant, question) == (1.0, 1)
    assert mean_reciprocal_rank(scores[:1], relevant[:1], question[:1]) == (None, 0)


def test_questions_may_be_interleaved() -> None:
    scores = np.array([0.2, 0.9, 0.7, 0.1])
    relevant = np.array([True, True, False, False])
    assert mean_reciprocal_rank(scores, relevant, np.array([5, 6, 5, 6])) == (0.75, 2)


def test_area_under_the_curve_is_the_share_of_ordered_pairs() -> None:
    scores = np.array([0.9, 0.4, 0.6, 0.1])
    relevant = np.array([True, True, False, False])
    # Pairs (relevant, irrelevant) in order: .9 > .6, .9 > .1, .4 > .1; not .4 > .6.
    assert area_under_curve(scores, relevant) == 0.75
    assert area_under_curve(np.zeros(4), relevant) == 0.5
    assert area_under_curve(scores, np.ones(4, dtype=bool)) is None


def test_bootstrap_has_the_mean_and_spread_of_the_binomial() -> None:
    correct = np.array([1.0] * 300 + [0.0] * 100)
    means = bootstrap_means(correct[None, :], seed=1, num_resamples=4000)[:, 0]
    stderr = math.sqrt(0.75 * 0.25 / 400)
    assert means.mean() == pytest.approx(0.75, abs=4 * stderr / math.sqrt(4000))
    assert means.std() == pytest.approx(stderr, rel=0.05)
    low, high = percentile_interval(means)
    assert low == pytest.approx(0.75 - 1.96 * stderr, abs=0.004)
    assert high == pytest.approx(0.75 + 1.96 * stderr, abs=0.004)


def test_all_models_share_the_resampled_rows() -> None:
    correct = (np.random.default_rng(2).random(200) < 0.6).astype(float)
    means = bootstrap_means(np.stack([correct, correct, 1 - correct]), seed=3, num_resamples=100)
    np.testing.assert_array_equal(means[:, 0], means[:, 1])
    np.testing.assert_allclose(means[:, 0] + means[:, 2], 1.0)


def test_bootstrap_depends_on_its_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = (np.random.default_rng(4).random((2, 50)) < 0.5).astype(float)
    first = bootstrap_means(correct, seed=5, num_resamples=64)
    np.testing.assert_array_equal(first, bootstrap_means(correct, seed=5, num_resamples=64))
    assert (first != bootstrap_means(correct, seed=6, num_resamples=64)).any()
    monkeypatch.setattr("distill.metrics._CHUNK_BYTES", 8 * 50 * 7)
    np.testing.assert_allclose(first, bootstrap_means(correct, seed=5, num_resamples=64))


def test_resampled_seeds_spread_by_the_population_deviation() -> None:
    means = np.tile([0.7, 0.8], (20_000, 1))
    drawn = resample_seeds(means, seed=7)
    # Means of two draws from {.7, .8}: .7, .75, .75, .8, so the variance is .05^2 / 2.
    assert set(np.round(drawn, 6)) == {0.7, 0.75, 0.8}
    assert drawn.std() == pytest.approx(0.05 / math.sqrt(2), rel=0.03)
    np.testing.assert_array_equal(resample_seeds(means[:, :1], seed=7), means[:, 0])


def test_mcnemar_of_one_against_five_is_the_binomial_tail() -> None:
    first = np.array([True] * 5 + [False] + [True] * 3 + [False] * 2)
    second = np.array([False] * 5 + [True] + [True] * 3 + [False] * 2)
    found = compare_correctness(first, second)
    assert (found.only_first, found.only_second) == (5, 1)
    # 2 * (C(6, 0) + C(6, 1)) / 2^6
    assert found.p_value == pytest.approx(14 / 64)


def test_mcnemar_of_equal_models_is_one() -> None:
    correct = np.array([True, False])
    assert compare_correctness(correct, correct).p_value == 1.0
