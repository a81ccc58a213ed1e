"""Tests of the assembly of `evaluation.json`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cluster.evaluation import evaluate_models, note_partial_split
from cluster.model_outputs import EvaluatedRows, ModelOutput, student_name
from schemas.errors import DataError
from schemas.evaluation import (
    CorpusEvaluation,
    DroppedRows,
    ModelRow,
    RunEvaluation,
    read_evaluation,
    write_evaluation,
)
from schemas.recipe import Arm, Corpus

LABELS = ("yes", "no")
GOLDEN = np.array([0, 0, 1, 1])


def distributions(*first: float) -> np.ndarray:
    """Returns rows (p, 1 - p)."""
    return np.array([[p, 1 - p] for p in first])


def teacher(name: str, *first: float, rate: float | None = None, parameters: int = 100) -> ModelOutput:
    return ModelOutput(
        name=name,
        kind="teacher",
        teacher=name,
        probabilities_NC=distributions(*first),
        num_parameters=parameters,
        examples_per_s=rate,
    )


def student(arm: Arm, seed: int, *first: float, of: str | None = None) -> ModelOutput:
    return ModelOutput(
        name=student_name(arm, of),
        kind="student",
        arm=arm,
        teacher=of,
        seed=seed,
        probabilities_NC=distributions(*first),
        num_parameters=10,
        examples_per_s=60.0,
    )


def evaluate(*outputs: ModelOutput, main_arm: Arm | None = None) -> CorpusEvaluation:
    return evaluate_models(EvaluatedRows("dev", LABELS, GOLDEN), outputs, main_arm=main_arm)


def row(evaluation: CorpusEvaluation, name: str) -> ModelRow:
    (found,) = [model for model in evaluation.models if model.name == name]
    return found


def test_ensemble_averages_probabilities_and_sums_parameters_and_time() -> None:
    # Row 0: one sure teacher outvotes two weak ones. Row 2: by mean logits it would do so again,
    # wrongly (13.8 - 1.4 - 1.4 > 0), by mean probabilities it does not (0.47).
    outputs = [
        teacher("a", 0.99, 0.9, 0.999999, 0.1, rate=30.0),
        teacher("b", 0.40, 0.9, 0.2, 0.1, rate=60.0),
        teacher("c", 0.40, 0.9, 0.2, 0.6, rate=20.0),
    ]
    ensemble = row(evaluate(*outputs), "ensemble")
    assert ensemble.accuracy == 1.0
    assert ensemble.num_parameters == 300
    # 1/30 + 1/60 + 1/20 = 1/10
    assert ensemble.examples_per_s == pytest.approx(10.0)
    # Mean teacher: (1/10) / 3 seconds per example.
    assert ensemble.speed_ratio == pytest.approx(1 / 3)
    assert ensemble.agreement == {"a": 0.75, "b": 0.75, "c": 0.5}


def test_a_single_teacher_has_no_ensemble_and_agrees_with_nobody() -> None:
    evaluation = evaluate(teacher("a", 0.9, 0.9, 0.1, 0.9))
    assert [model.name for model in evaluation.models] == ["a"]
    only = evaluation.models[0]
    assert only.agreement == {}
    assert only.accuracy == 0.75
    assert only.accuracy_stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert only.speed_ratio is None


def test_speed_ratio_is_to_the_mean_teacher_in_seconds() -> None:
    outputs = [
        teacher("a", 0.9, 0.9, 0.1, 0.1, rate=20.0),
        teacher("b", 0.9, 0.9, 0.1, 0.1, rate=60.0),
        student("tmkd", 1, 0.9, 0.9, 0.1, 0.1),
    ]
    # Mean seconds (1/20 + 1/60) / 2 = 1/30, the student's 1/60.
    assert row(evaluate(*outputs), "tmkd").speed_ratio == pytest.approx(2.0)


def test_late_calibration_averages_the_students_of_each_seed() -> None:
    outputs = [
        student("1-o-1", 1, 0.9, 0.4, 0.1, 0.6, of="a"),
        student("1-o-1", 1, 0.4, 0.9, 0.1, 0.1, of="b"),
        student("1-o-1", 2, 0.9, 0.9, 0.9, 0.6, of="a"),
        student("1-o-1", 2, 0.9, 0.9, 0.9, 0.6, of="b"),
    ]
    evaluation = evaluate(*outputs)
    mean = row(evaluation, "m-o-m")
    assert row(evaluation, "m-o-m/seed-1").accuracy == 1.0
    assert row(evaluation, "m-o-m/seed-2").accuracy == 0.5
    assert (mean.accuracy, mean.seeds) == (0.75, (1, 2))
    assert mean.num_parameters == 20
    assert mean.examples_per_s == pytest.approx(30.0)
    # The 1-o-1 row averages accuracies, and so is no ensemble: (.5 + .75 + .5 + .5) / 4.
    arm = row(evaluation, "1-o-1")
    assert arm.accuracy == pytest.approx(0.5625)
    assert arm.over == ("teachers", "seeds")
    assert arm.num_parameters == 10


def test_an_arm_lists_its_teachers_and_they_list_their_seeds() -> None:
    outputs = [student("1-o-1", seed, 0.9, 0.4, 0.1, 0.6, of=name) for name in ("a", "b") for seed in (1, 2)]
    evaluation = evaluate(*outputs)
    assert [(model.name, model.level) for model in evaluation.models if model.arm == "1-o-1"] == [
        ("1-o-1", 0),
        ("1-o-1/a", 1),
        ("1-o-1/a/seed-1", 2),
        ("1-o-1/a/seed-2", 2),
        ("1-o-1/b", 1),
        ("1-o-1/b/seed-1", 2),
        ("1-o-1/b/seed-2", 2),
    ]


def test_one_student_of_one_teacher_is_the_arm_itself() -> None:
    evaluation = evaluate(student("1-o-1", 1, 0.9, 0.9, 0.1, 0.1, of="a"))
    assert [(model.name, model.level) for model in evaluation.models] == [("1-o-1/a", 0)]


def test_mean_over_seeds_has_the_sample_deviation_between_them() -> None:
    outputs = [
        student("tmkd", 1, 0.9, 0.9, 0.1, 0.1),
        student("tmkd", 2, 0.9, 0.9, 0.1, 0.9),
        student("tmkd", 3, 0.9, 0.9, 0.9, 0.9),
    ]
    mean = row(evaluate(*outputs), "tmkd")
    assert mean.accuracy == pytest.approx(0.75)
    # Accuracies 1, .75, .5.
    assert mean.accuracy_std == pytest.approx(0.25)
    # Mean correctness of the rows: 1, 1, 2/3, 1/3, whose variance is
    # ((1/4)^2 + (1/4)^2 + (1/12)^2 + (5/12)^2) / 4 = 0.0763889.
    assert mean.accuracy_stderr == pytest.approx(math.sqrt(0.0763888889) / 2)
    assert mean.accuracy_interval.low < 0.75 < mean.accuracy_interval.high
    # Per seed 4 rows in 15 bins: pooled 12.
    assert sum(one.num_rows for one in mean.reliability) == 12


def test_student_is_compared_with_the_golden_one_of_the_same_seed() -> None:
    outputs = [
        student("golden", 1, 0.9, 0.4, 0.9, 0.1),
        student("tmkd", 1, 0.9, 0.9, 0.1, 0.6),
        student("golden", 2, 0.9, 0.9, 0.1, 0.9),
        student("tmkd", 2, 0.9, 0.9, 0.1, 0.1),
        student("m-o-1", 2, 0.9, 0.9, 0.1, 0.9),
    ]
    other, main = evaluate(*outputs, main_arm="m-o-1").comparisons[::-1]
    assert (main.student, main.baseline, main.is_main) == ("m-o-1", "golden", True)
    assert (main.mean_difference, main.interval.low, main.interval.high) == (0.0, 0.0, 0.0)
    first, second = other.seeds
    # Seed 1: rows 1 and 2 are won, row 3 is lost; two-sided binomial of 2 in 3 is 1.
    assert (first.seed, first.only_student, first.only_baseline) == (1, 2, 1)
    assert (first.p_value, first.difference) == (1.0, 0.25)
    assert (second.only_student, second.only_baseline, second.difference) == (1, 0, 0.25)
    assert other.mean_difference == 0.25
    assert not other.is_main


def test_paired_interval_is_narrower_than_two_independent_ones() -> None:
    rng = np.random.default_rng(0)
    golden = rng.integers(0, 2, 2000)
    right = rng.random(2000) < 0.8
    better = right | (np.arange(2000) < 60)
    outputs = [
        student("golden", 1, *np.where(right == (golden == 0), 0.9, 0.1)),
        student("tmkd", 1, *np.where(better == (golden == 0), 0.9, 0.1)),
    ]
    evaluation = evaluate_models(EvaluatedRows("dev", LABELS, golden), outputs, main_arm="tmkd")
    (comparison,) = evaluation.comparisons
    width = comparison.interval.high - comparison.interval.low
    alone = row(evaluation, "tmkd").accuracy_interval
    assert comparison.interval.low > 0
    assert width < (alone.high - alone.low) / 3


def test_agreement_matrix_is_symmetric_and_shows_the_first_seed_of_each_model() -> None:
    outputs = [
        student("tmkd", 5, 0.9, 0.9, 0.1, 0.1),
        student("tmkd", 6, 0.1, 0.1, 0.9, 0.9),
        teacher("a", 0.9, 0.9, 0.1, 0.9),
        teacher("b", 0.9, 0.9, 0.9, 0.9),
    ]
    matrix = evaluate(*outputs).agreement
    assert matrix.names == ("a", "b", "ensemble", "tmkd")
    values = np.array(matrix.values)
    np.testing.assert_array_equal(values, values.T)
    np.testing.assert_array_equal(np.diag(values), 1.0)
    assert values[0, 1] == 0.75
    assert values[0, 3] == 0.75


def test_unlabelled_rows_count_for_no_model() -> None:
    rows = EvaluatedRows("dev", LABELS, np.array([0, -1, 1, -1]), num_excluded=3)
    evaluation = evaluate_models(rows, [teacher("a", 0.9, 0.1, 0.1, 0.1)])
    assert (evaluation.num_rows, evaluation.num_unlabelled, evaluation.num_excluded) == (2, 2, 3)
    assert evaluation.models[0].accuracy == 1.0
    assert evaluation.majority_share == 0.5


def test_ranking_takes_the_first_label_as_relevant() -> None:
    rows = EvaluatedRows("dev", LABELS, np.array([0, 1, 1, 0, 1]), np.array(["q", "q", "q", "r", "r"]))
    ranked = evaluate_models(rows, [teacher("a", 0.6, 0.7, 0.1, 0.4, 0.2)]).models[0].ranking
    assert ranked is not None
    # q: rank 2, r: rank 1; pairs in order: .6 > .1, .6 > .2, .4 > .1, .4 > .2 of 6.
    assert (ranked.mrr, ranked.num_questions) == (0.75, 2)
    assert ranked.auc == pytest.approx(4 / 6)


def test_a_small_set_is_said_to_be_small() -> None:
    (note,) = evaluate(teacher("a", 0.9, 0.9, 0.1, 0.9)).notes
    assert note.startswith("only 4 rows: the standard error of one accuracy is up to 21.7 points")


def test_a_partial_public_split_is_said_to_be_partial() -> None:
    part = {"kind": "hub", "repo": "nyu-mll/glue", "config": "rte", "split": "validation"}
    corpus = Corpus.model_validate({"labels": LABELS, "text": ("a", "b"), "parts": [part]})
    note = note_partial_split(corpus, 143)
    assert note is not None
    assert note.startswith("143 of the 277 labelled rows of nyu-mll/glue rte validation")
    assert note_partial_split(corpus, 277) is None
    train = corpus.model_copy(update={"parts": (corpus.parts[0].model_copy(update={"split": "train"}),)})
    assert note_partial_split(train, 143) is None


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([teacher("a", 0.9, 0.9)], "shape"),
        ([teacher("a", 0.9, 0.9, math.nan, 0.1)], "not finite"),
        ([teacher("a", 0.9, 0.9, 1.1, 0.1)], "negative"),
        ([student("tmkd", 1, *GOLDEN), student("tmkd", 1, *GOLDEN)], "given twice for seed 1"),
        ([], "no labelled row or no model"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs: list[ModelOutput], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(*outputs)


def test_logits_in_place_of_probabilities_are_refused() -> None:
    logits = ModelOutput("a", "teacher", np.array([[2.0, 1.0]] * 4))
    with pytest.raises(DataError, match="do not add up to 1"):
        evaluate(logits)


def test_a_golden_label_outside_the_names_is_refused() -> None:
    rows = EvaluatedRows("dev", LABELS, np.array([0, 2, 1, 1]))
    with pytest.raises(DataError, match="none of yes, no"):
        evaluate_models(rows, [teacher("a", 0.9, 0.9, 0.1, 0.1)])


def test_the_document_survives_a_round_trip_and_notices_an_edit(tmp_path: Path) -> None:
    corpus = evaluate(teacher("a", 0.9, 0.9, 0.1, 0.9), student("tmkd", 1, 0.9, 0.9, 0.1, 0.1))
    written = RunEvaluation(
        run="r",
        main_arm="tmkd",
        corpora=(corpus,),
        dropped=(DroppedRows(corpus="train", num_rows=10, num_dropped=2),),
    )
    path = tmp_path / "evaluation.json"
    write_evaluation(path, written)
    assert read_evaluation(path) == written
    body = json.loads(path.read_text())
    body["dropped"][0]["num_dropped"] = 3
    path.write_text(json.dumps(body))
    with pytest.raises(DataError, match="does not match its own digest"):
        read_evaluation(path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_evaluation(path)


def test_equal_predictions_give_equal_documents() -> None:
    outputs = [student("tmkd", seed, 0.9, 0.9, 0.1, 0.6) for seed in (1, 2)]
    assert evaluate(*outputs) == evaluate(*outputs)


def test_the_run_s_own_student_is_also_compared_with_the_longer_baseline() -> None:
    outputs = [
        student("tmkd", 1, 0.9, 0.9, 0.1, 0.1),
        student("m-o-1", 1, 0.9, 0.9, 0.1, 0.9),
        student("golden", 1, 0.9, 0.1, 0.1, 0.9),
        student("golden-long", 1, 0.9, 0.9, 0.9, 0.9),
    ]
    found = {
        (one.student, one.baseline): (one.mean_difference, one.is_main)
        for one in evaluate(*outputs, main_arm="tmkd").comparisons
    }
    assert found == {
        ("tmkd", "golden"): (0.5, True),
        ("m-o-1", "golden"): (0.25, False),
        ("golden-long", "golden"): (0.0, False),
        ("tmkd", "golden-long"): (0.5, False),
    }


def test_an_arm_with_several_teachers_is_compared_over_all_of_its_students() -> None:
    outputs = [
        student("1-o-1", 1, 0.9, 0.9, 0.1, 0.1, of="a"),
        student("1-o-1", 1, 0.9, 0.9, 0.1, 0.9, of="b"),
        student("tkd", 1, 0.9, 0.9, 0.1, 0.1, of="a"),
        student("golden", 1, 0.9, 0.1, 0.1, 0.9),
    ]
    found = {one.student: one for one in evaluate(*outputs, main_arm="tkd").comparisons}
    assert list(found) == ["tkd/a", "1-o-1", "1-o-1/a", "1-o-1/b", "m-o-m"]
    arm = found["1-o-1"]
    assert arm.mean_difference == pytest.approx((0.5 + 0.25) / 2)
    assert [(one.teacher, one.difference) for one in arm.seeds] == [("a", 0.5), ("b", 0.25)]
    assert arm.interval.low <= arm.mean_difference <= arm.interval.high
    assert found["1-o-1/a"].seeds[0].teacher is None
