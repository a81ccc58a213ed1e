"""Perplexity, calibration, agreement and differences against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.language.measures import LanguageOutput, measure_models
from schemas.errors import DataError
from tests.cluster.language.measured_texts import make_evaluation, make_scores, make_text

# Two chunks of one and three positions; the probabilities of the tokens to predict.
TEXT = make_text([1, 3])
PROBS = (0.25, 0.5, 0.9, 0.9)
INVERSE = 1 / (0.25 * 0.5 * 0.9 * 0.9)


def output(probs: tuple[float, ...] = PROBS, **fields: Any) -> LanguageOutput:
    options: dict[str, Any] = {"name": "t", "kind": "teacher", "scores": make_scores(TEXT, probs)} | fields
    return LanguageOutput(**options)


def student(arm: str, seed: int, probs: tuple[float, ...], *teachers: str) -> LanguageOutput:
    return output(probs, name=arm, kind="student", seed=seed, teachers=teachers)


def test_perplexity_accuracy_and_ece_of_four_positions() -> None:
    evaluation = measure_models(TEXT, [output()])
    (row,) = evaluation.models
    # Over positions, not over chunks.
    assert row.perplexity == pytest.approx(INVERSE**0.25, rel=1e-6)
    assert row.nll == pytest.approx(math.log(INVERSE) / 4, rel=1e-6)
    assert row.accuracy == 0.5
    # Wrong with 0.5, wrong with 0.75, twice right with 0.9: three bins.
    assert [one.num_rows for one in row.reliability if one.num_rows] == [1, 1, 2]
    assert row.ece == pytest.approx((0.5 + 0.75 + 2 * 0.1) / 4, rel=1e-6)
    assert (evaluation.num_chunks, evaluation.num_positions, evaluation.num_excluded) == (2, 4, 0)


def test_the_bootstrap_draws_chunks_and_weighs_them_by_their_positions() -> None:
    (row,) = measure_models(TEXT, [output()]).models
    # Four resamples of two chunks: both the first, both the second, or one of each.
    first, second = 4.0, (1 / (0.5 * 0.9 * 0.9)) ** (1 / 3)
    assert row.perplexity_interval is not None
    assert row.perplexity_interval.high == pytest.approx(first, rel=1e-6)
    assert row.perplexity_interval.low == pytest.approx(second, rel=1e-6)


def test_equal_scores_give_equal_documents() -> None:
    assert measure_models(TEXT, [output()]) == measure_models(TEXT, [output()])
    fresh = make_evaluation.__wrapped__()
    assert fresh == make_evaluation()


def test_a_difference_is_paired_chunk_by_chunk() -> None:
    # The student is better by the same factor everywhere: no resample says otherwise.
    worse = tuple(p / 2 for p in PROBS)
    models = [student("student", 7, PROBS, "t"), student("plain", 7, worse)]
    (comparison,) = measure_models(TEXT, models, main_arm="student").comparisons
    assert (comparison.student, comparison.baseline, comparison.is_main) == ("student", "plain", True)
    assert comparison.mean_difference == pytest.approx(-math.log(2), rel=1e-6)
    assert comparison.interval.low == pytest.approx(-math.log(2), rel=1e-6)
    assert comparison.interval.high == pytest.approx(-math.log(2), rel=1e-6)
    assert [one.seed for one in comparison.seeds] == [7]


def test_arms_are_compared_with_the_one_without_teachers_or_else_with_the_runs_own() -> None:
    taught = [student("student", 7, PROBS, "t"), student("top-k", 7, PROBS, "t")]
    plain = student("plain", 7, PROBS)
    other = student("also-plain", 7, PROBS)

    def pairs(*models: LanguageOutput) -> list[tuple[str, str]]:
        found = measure_models(TEXT, models, main_arm="student").comparisons
        return [(one.student, one.baseline) for one in found]

    assert pairs(*taught, plain) == [("student", "plain"), ("top-k", "plain")]
    assert pairs(*taught) == [("top-k", "student")]
    assert pairs(*taught, plain, other)[-1] == ("also-plain", "plain")
    assert pairs(taught[0]) == []
    # A run of cross-entropy alone is itself what the arms are compared with.
    assert pairs(student("student", 7, PROBS), taught[1]) == [("top-k", "student")]
    # Without a common seed nothing is paired.
    assert pairs(taught[0], replace(plain, seed=8)) == []


def test_a_mean_row_averages_the_seeds_and_gives_their_spread() -> None:
    second = (0.25, 0.25, 0.25, 0.25)
    evaluation = measure_models(TEXT, [output(), student("a", 1, PROBS, "t"), student("a", 2, second, "t")])
    teacher, mean, *seeds = evaluation.models
    assert [row.name for row in evaluation.models] == ["t", "a", "a/seed-1", "a/seed-2"]
    assert [row.level for row in evaluation.models] == [0, 0, 1, 1]
    values = (INVERSE**0.25, 4.0)
    assert [row.perplexity for row in seeds] == pytest.approx(values, rel=1e-6)
    assert mean.perplexity == pytest.approx(sum(values) / 2, rel=1e-6)
    assert mean.perplexity_std == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2), rel=1e-6)
    assert mean.accuracy == 0.25
    assert mean.accuracy_std == pytest.approx(0.5 / math.sqrt(2))
    assert (mean.seeds, mean.teachers, teacher.perplexity_std) == ((1, 2), ("t",), None)
    assert sum(one.num_rows for one in mean.reliability) == 8
    # The interval covers chunks and seeds: it is no narrower than that of either seed.
    assert mean.perplexity_interval is not None
    assert mean.perplexity_interval.high == pytest.approx(4.0, rel=1e-6)


def test_agreement_is_with_every_other_teacher() -> None:
    one = output()
    other = output(tuple(1 - p for p in PROBS), name="u")
    evaluation = measure_models(TEXT, [one, other, student("a", 1, PROBS, "t")])
    rows = {row.name: row.agreement for row in evaluation.models}
    # At 0.5 neither has the target on top: both name the same other token.
    assert rows["t"] == {"u": 0.25}
    assert rows["u"] == {"t": 0.25}
    assert rows["a"] == {"t": 1.0, "u": 0.25}


def test_an_arm_with_a_teachers_name_is_told_apart() -> None:
    teacher, arm = measure_models(TEXT, [output(), student("t", 1, PROBS, "t")]).models
    assert (teacher.name, arm.name) == ("t", "student t")
    assert (teacher.agreement, arm.agreement) == ({}, {"t": 1.0})


def test_a_token_without_probability_leaves_perplexity_undefined_and_the_other_models_alone() -> None:
    impossible = make_scores(TEXT, PROBS)
    impossible.target_logprob_P[1] = -np.inf
    models = [
        output(),
        student("student", 1, PROBS, "t"),
        replace(student("plain", 1, PROBS), scores=impossible),
    ]
    evaluation = measure_models(TEXT, models, main_arm="student")
    teacher, _, plain = evaluation.models
    assert (plain.nll, plain.perplexity, plain.perplexity_interval) == (None, None, None)
    assert plain.accuracy == 0.5
    assert teacher.perplexity == pytest.approx(INVERSE**0.25, rel=1e-6)
    assert evaluation.comparisons == ()


def test_a_perplexity_beyond_a_float_is_undefined() -> None:
    hopeless = make_scores(TEXT, PROBS, target_logprob_P=np.full(4, -1000.0, np.float32))
    (row,) = measure_models(TEXT, [replace(output(), scores=hopeless)]).models
    assert (row.nll, row.perplexity, row.perplexity_interval) == (1000.0, None, None)


def test_a_certain_token_that_rounding_lifts_above_one_costs_nothing() -> None:
    certain = make_scores(
        TEXT,
        PROBS,
        target_logprob_P=np.full(4, 1e-7, np.float32),
        top_logprob_P=np.full(4, 1e-7, np.float32),
        top_id_P=TEXT.targets_P,
    )
    (row,) = measure_models(TEXT, [replace(output(), scores=certain)]).models
    assert (row.nll, row.perplexity, row.accuracy) == (0.0, 1.0, 1.0)
    assert row.ece == pytest.approx(0.0, abs=1e-6)


def test_logits_that_are_no_numbers_are_an_error_or_leave_the_chunk_out_for_all() -> None:
    bad = make_scores(TEXT, PROBS)
    bad.is_finite_P[0] = False
    models = [output(), replace(student("a", 3, PROBS), scores=bad)]
    with pytest.raises(DataError, match=r"dev: student a of seed 3 gives logits .* for chunk dev/0#0; "):
        measure_models(TEXT, models)
    lenient = make_text([1, 3], on_bad_row="exclude")
    # Whichever model comes first.
    assert measure_models(lenient, models[::-1]).num_excluded == 1
    evaluation = measure_models(lenient, models)
    assert (evaluation.num_chunks, evaluation.num_positions, evaluation.num_excluded) == (1, 3, 1)
    expected = (1 / (0.5 * 0.9 * 0.9)) ** (1 / 3)
    assert [row.perplexity for row in evaluation.models] == pytest.approx([expected] * 2, rel=1e-6)
    bad.is_finite_P[1] = False
    with pytest.raises(DataError, match="no chunk has logits that are numbers"):
        measure_models(lenient, models)


def test_few_chunks_are_noted() -> None:
    assert "only 2 chunks" in measure_models(TEXT, [output()]).notes[0]
    many = make_text([1] * 100)
    scores = make_scores(many, [0.5] * 100)
    assert measure_models(many, [replace(output(), scores=scores)]).notes == ()
