"""Measures of classification and ranking: pure functions of numpy arrays.

Legend of shapes: N rows, C classes, K models, B bootstrap resamples (R of them at once),
M bins, S seeds, G questions.
Predictions are the argmax of probabilities; of equal probabilities the first label wins.

Invariants:
    1. Everything is a pure function of its arguments, the bootstrap of its seed too
       (tests/distill/test_metrics.py).
    2. All models of one ``bootstrap_means`` call see the same resampled rows, so that differences of
       its columns are paired (tests/distill/test_metrics.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from sklearn.metrics import f1_score, roc_auc_score

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NUM_BINS = 15
NUM_RESAMPLES = 2000
_CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, eq=False)
class Reliability:
    """Predictions by confidence: M equal-width bins over (0, 1], bin m being (m / M, (m + 1) / M].

    Attributes:
        counts_M: Rows per bin.
        confidence_sum_M: Sum of the rows' top probabilities.
        correct_M: Rows that are right.
    """

    counts_M: Ints
    confidence_sum_M: Floats
    correct_M: Ints

    def ece(self) -> float:
        """Returns the expected calibration error: sum over bins of |confidence - accuracy| * share.

        Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
        """
        return float(np.abs(self.confidence_sum_M - self.correct_M).sum() / self.counts_M.sum())


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test.

    Attributes:
        only_first, only_second: Rows that only that model has right.
        p_value: Two-sided; 1.0 where the models never differ in correctness.
    """

    only_first: int
    only_second: int
    p_value: float


def predict(probabilities_NC: Floats) -> Ints:
    """Returns the most probable label of each row, int64 [N]; of equals the first."""
    return probabilities_NC.argmax(axis=1).astype(np.int64)


def accuracy(correct_N: Bools | Floats) -> tuple[float, float]:
    """Returns the mean correctness and its standard error from sampling the rows.

    Args:
        correct_N: Correctness of one model, or each row's mean correctness over several models.

    Returns:
        Mean and population standard deviation / sqrt(N): sqrt(p (1 - p) / N) for one model.
    """
    values_N = correct_N.astype(np.float64)
    return float(values_N.mean()), float(values_N.std() / np.sqrt(len(values_N)))


def macro_f1(golden_N: Ints, predicted_N: Ints, num_labels: int) -> float:
    """Returns the unweighted mean of the F1 of every label; 0 for a label never golden nor predicted."""
    labels = np.arange(num_labels)
    return float(f1_score(golden_N, predicted_N, labels=labels, average="macro", zero_division=0.0))


def reliability(probabilities_NC: Floats, golden_N: Ints, num_bins: int = NUM_BINS) -> Reliability:
    """Bins rows by their top probability."""
    return bin_confidences(probabilities_NC.max(axis=1), predict(probabilities_NC) == golden_N, num_bins)


def bin_confidences(confidence_N: Floats, correct_N: Bools, num_bins: int = NUM_BINS) -> Reliability:
    """Bins predictions by their confidence.

    Args:
        confidence_N: Probabilities of what is predicted; rounding may take them a little out of 0..1.
        correct_N: Whether it is right.
        num_bins: M.
    """
    confidence_N = np.clip(confidence_N, 0.0, 1.0)
    bin_N = np.clip(np.ceil(confidence_N * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    return Reliability(
        counts_M=np.bincount(bin_N, minlength=num_bins).astype(np.int64),
        confidence_sum_M=np.bincount(bin_N, weights=confidence_N, minlength=num_bins).astype(np.float64),
        correct_M=np.bincount(bin_N[correct_N], minlength=num_bins).astype(np.int64),
    )


def agreement(first_N: npt.NDArray[np.integer], second_N: npt.NDArray[np.integer]) -> float:
    """Returns the share of rows with the same prediction."""
    return float((first_N == second_N).mean())


def mean_reciprocal_rank(
    scores_N: Floats, relevant_N: Bools, question_N: npt.ArrayLike
) -> tuple[float | None, int]:
    """Mean over questions of 1 / rank of the best-scored relevant row.

    Ties count against the model: the rank is 1 + the irrelevant rows of the question that score at
    least as high, so that a constant score earns the worst rank. Questions without a relevant row, or
    without an irrelevant one, cannot tell models apart and are left out.

    Args:
        scores_N: Higher is more relevant.
        relevant_N: True for the rows to be found.
        question_N: One key per row (strings or integers); equal keys are one question.

    Returns:
        The mean (None where no question is left) and the number of questions in it.
    """
    _, group_N = np.unique(np.asarray(question_N), return_inverse=True)
    num_groups = int(group_N.max()) + 1 if len(group_N) else 0
    best_G = np.full(num_groups, -np.inf)
    np.maximum.at(best_G, group_N[relevant_N], scores_N[relevant_N])
    irrelevant_N = ~relevant_N
    num_irrelevant_G = np.bincount(group_N[irrelevant_N], minlength=num_groups)
    ahead_N = irrelevant_N & (scores_N >= best_G[group_N])
    rank_G = 1 + np.bincount(group_N[ahead_N], minlength=num_groups)
    usable_G = np.isfinite(best_G) & (num_irrelevant_G > 0)
    if not usable_G.any():
        return None, 0
    return float((1.0 / rank_G[usable_G]).mean()), int(usable_G.sum())


def area_under_curve(scores_N: Floats, relevant_N: Bools) -> float | None:
    """Returns the area under the ROC curve (ties count half), or None where only one class occurs."""
    if relevant_N.all() or not relevant_N.any():
        return None
    return float(roc_auc_score(relevant_N, scores_N))


def bootstrap_means(values_KN: Floats, seed: int, num_resamples: int = NUM_RESAMPLES) -> Floats:
    """Means over resampled rows, the same rows for every model.

    Args:
        values_KN: One row of values (correctness) per model.
        seed: Of the resampling.
        num_resamples: B.

    Returns:
        float64 [B, K]. Resamples are drawn a few at a time, so that memory does not grow with B * N.
    """
    num_models, num_rows = values_KN.shape
    rng = np.random.default_rng(seed)
    chunk = max(1, min(num_resamples, _CHUNK_BYTES // (8 * num_rows)))
    means_BK = np.empty((num_resamples, num_models))
    for start in range(0, num_resamples, chunk):
        size = min(chunk, num_resamples - start)
        drawn_RN = rng.integers(0, num_rows, size=(size, num_rows))
        drawn_RN += np.arange(size)[:, None] * num_rows
        counts_RN = np.bincount(drawn_RN.ravel(), minlength=size * num_rows).reshape(size, num_rows)
        means_BK[start : start + size] = counts_RN.astype(np.float64) @ values_KN.T / num_rows
    return means_BK


def resample_seeds(means_BS: Floats, seed: int) -> Floats:
    """Averages over seeds drawn with replacement, anew for each resample of the rows.

    With few seeds this understates the spread between seeds by the factor sqrt((S - 1) / S).

    Args:
        means_BS: Per resample of rows, one value for each seed.
        seed: Of the resampling; use another than for the rows.

    Returns:
        float64 [B].
    """
    num_resamples, num_seeds = means_BS.shape
    if num_seeds == 1:
        return means_BS[:, 0]
    drawn_BS = np.random.default_rng(seed).integers(0, num_seeds, size=(num_resamples, num_seeds))
    means_B: Floats = np.take_along_axis(means_BS, drawn_BS, axis=1).mean(axis=1)
    return means_B


def percentile_interval(means_B: Floats) -> tuple[float, float]:
    """Returns the 2.5th and 97.5th percentile.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    low, high = np.percentile(means_B, [2.5, 97.5])
    return float(low), float(high)


def compare_correctness(first_N: Bools, second_N: Bools) -> McNemar:
    """Tests whether two models' error rates on the same rows differ.

    Under the null hypothesis the rows that only one of both has right fall to either with
    probability 1/2.

    Source: McNemar 1947, Psychometrika 12(2), in the exact binomial form.
    """
    only_first = int((first_N & ~second_N).sum())
    only_second = int((~first_N & second_N).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(only_first, only_second, min(p_value, 1.0))
