"""Tests of a sweep's tables in a terminal."""

from __future__ import annotations

import math

import pytest

from cluster.figures import ABSENT
from cluster.sweep.figures import cost_sentence, published_stderr
from cluster.sweep.result_lines import list_lines
from cluster.sweep.table import format_sweep, print_sweep
from schemas.evaluation import RunEvaluation
from schemas.sweep import Published
from schemas.sweep_evaluation import PointEvaluation, SweepEvaluation
from tests.cluster.sweep.sweeps import COST, PUBLISHED, make_sweep

NOTE = "published figures are on 277 rows: one accuracy has a standard error of about 2.9 points"


def words(evaluation: SweepEvaluation, width: int = 100) -> str:
    return " ".join(format_sweep(evaluation, width).split())


def line_of(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def test_no_line_is_wider_than_the_console_and_none_holds_escapes() -> None:
    for width in (72, 80, 100, 140):
        text = format_sweep(make_sweep(alphas=(0.1, 0.5)), width)
        assert "\x1b" not in text
        assert max(len(line) for line in text.splitlines()) <= width
        for name in ("teacher-a", "ensemble", "tmkd", "golden-long", "1-o-1", "m-o-m"):
            assert f"\n{name} " in text or f"\n  {name} " in text, (width, name)


def test_what_a_narrow_console_has_no_room_for_is_left_out_and_never_cut() -> None:
    text = format_sweep(make_sweep(), 80)
    assert "params" not in text
    assert line_of(text, "golden") == [
        "golden",
        "76.1",
        "±1.1",
        "72.9",
        "to",
        "79.3",
        ABSENT,
        ABSENT,
        ABSENT,
        "57.4",
        ABSENT,
    ]
    assert "…" not in text


def test_a_line_holds_accuracy_spread_interval_gain_and_seeds_won() -> None:
    evaluation = make_sweep()
    assert evaluation.points[0].evaluation is not None
    corpus = evaluation.points[0].evaluation.corpora[0]
    row = next(row for row in corpus.models if row.name == "tmkd")
    comparison = next(one for one in corpus.comparisons if (one.student, one.baseline) == ("tmkd", "golden"))
    cells = line_of(format_sweep(evaluation), "tmkd")
    assert cells[:3] == ["tmkd", f"{100 * row.accuracy:.1f}", f"±{100 * (row.accuracy_std or 0):.1f}"]
    assert cells[3:6] == [
        f"{100 * row.accuracy_interval.low:.1f}",
        "to",
        f"{100 * row.accuracy_interval.high:.1f}",
    ]
    assert cells[6] == f"{100 * comparison.mean_difference:+.1f}"
    assert cells[10] == "3/3"
    # 66.64 of the publication, and 66.64 - 57.42 over its own baseline.
    assert cells[11:] == ["66.6", "+9.2", "12.1M", "780"]


def test_one_seed_has_no_spread_and_is_tested_by_mcnemar() -> None:
    evaluation = make_sweep(seeds=(1,))
    text = format_sweep(evaluation)
    assert "McNemar" in text
    assert "±" not in text
    assert evaluation.points[0].evaluation is not None
    (seed,) = evaluation.points[0].evaluation.corpora[0].comparisons[0].seeds
    assert f"p {seed.p_value:.2g}" in text


def test_an_arm_with_one_student_per_teacher_has_the_gain_of_all_its_students() -> None:
    point = make_sweep().points[0]
    assert point.evaluation is not None
    lines = {line.name: line for line in list_lines(make_sweep(), point, point.evaluation.corpora[0])}
    baseline = lines["golden"].row
    arm = lines["1-o-1"]
    assert baseline is not None
    assert arm.row is not None
    assert arm.comparison is not None
    assert len(arm.comparison.seeds) == 3 * len(baseline.seeds)
    assert arm.gain == pytest.approx(arm.row.accuracy - baseline.accuracy)
    assert lines["1-o-1/teacher-a"].comparison is not None


def test_a_gain_is_over_the_seeds_that_both_have() -> None:
    evaluation = make_sweep(lost=(("golden", 2),))
    point = evaluation.points[0]
    assert point.evaluation is not None
    lines = {line.name: line for line in list_lines(evaluation, point, point.evaluation.corpora[0])}
    assert lines["1-o-1"].comparison is not None
    assert {one.seed for one in lines["1-o-1"].comparison.seeds} == {1, 3}
    assert lines["tmkd"].comparison is not None
    assert len(lines["tmkd"].comparison.seeds) == 2


def test_every_published_figure_is_shown_once_and_teachers_stand_with_teachers() -> None:
    evaluation = make_sweep()
    point = evaluation.points[0]
    assert point.evaluation is not None
    lines = list_lines(evaluation, point, point.evaluation.corpora[0])
    shown = [line.name for line in lines if line.published_accuracy is not None]
    assert sorted(shown) == sorted(PUBLISHED.accuracy)
    names = [line.name for line in lines]
    assert names[:5] == ["teacher-a", "teacher-b", "teacher-c", "teacher", "ensemble"]
    assert names[-1] == "TMKD large"
    theirs = {line.name: line.published_gain for line in lines}
    assert theirs["TMKD large"] == pytest.approx(0.1008)
    assert theirs["1-o-1"] == pytest.approx(-0.0219)
    assert (theirs["golden"], theirs["teacher"]) == (None, None)


def test_a_publication_without_the_baseline_has_no_gain() -> None:
    published = Published(source="s", accuracy={"tmkd": 70.0})
    text = format_sweep(make_sweep(published=published))
    assert line_of(text, "tmkd")[11:13] == ["70.0", ABSENT]
    assert "standard error of about" not in text


def test_the_publications_standard_error_stands_under_every_table() -> None:
    text = words(make_sweep(alphas=(0.1, 0.5, 0.9)), 120)
    # One table per point, and the one of all points.
    assert text.count(NOTE) == 4
    assert text.count("published: Yang et al., WSDM 2020, table 4") == 4
    assert text.count("their student has three layers of BERT") == 4


def test_the_standard_error_is_that_of_a_binomial_share() -> None:
    half = Published(source="s", num_rows=277, accuracy={"a": 40.0, "b": 60.0})
    assert published_stderr(half) == pytest.approx(0.5 / math.sqrt(277))
    # At a mean of 80 %: sqrt(0.8 * 0.2) = 0.4.
    high = Published(source="s", num_rows=100, accuracy={"a": 70.0, "b": 90.0})
    assert published_stderr(high) == pytest.approx(0.04)
    assert published_stderr(Published(source="s", accuracy={"a": 50.0})) is None


def test_a_sweep_without_a_publication_has_no_column_of_it() -> None:
    text = format_sweep(make_sweep(published=None))
    assert "publ" not in text
    assert "\nteacher " not in text


def test_another_corpus_has_no_published_figures_beside_it() -> None:
    evaluation = make_sweep()
    point = evaluation.points[0]
    assert point.evaluation is not None
    other = point.evaluation.corpora[0].model_copy(update={"corpus": "other"})
    run = RunEvaluation(run="r", main_arm="tmkd", corpora=(point.evaluation.corpora[0], other))
    both = evaluation.model_copy(update={"points": (point.model_copy(update={"evaluation": run}),)})
    first, second = format_sweep(both).split("\nother  600 rows")
    assert "publ. %" in first
    assert "publ" not in second


def test_a_failed_student_is_named_with_its_error_and_its_arms_line_is_marked() -> None:
    evaluation = make_sweep(alphas=(0.1, 0.9), lost=(("tmkd", 2), ("m-o-1", 1), ("m-o-1", 2), ("m-o-1", 3)))
    text = format_sweep(evaluation)
    assert "tmkd, seed 2, alpha 0.9 failed: out of memory [red]here[/red] <b>" in text
    assert "* tmkd lacks seed 2: a student failed" in text
    before, after = text.split("alpha 0.9: dev")
    assert "tmkd *" not in before
    assert line_of(after, "tmkd")[:2] == ["tmkd", "*"]
    # All of its seeds failed: it has a line nevertheless.
    assert line_of(after, "m-o-1")[:3] == ["m-o-1", "*", ABSENT]


def test_a_student_that_was_not_run_is_told_from_one_that_failed() -> None:
    evaluation = make_sweep(lost=(("tmkd", 2),))
    students = [
        one.model_copy(update={"state": "not_run", "error": None, "fold": 4})
        if one.state == "failed"
        else one
        for one in evaluation.students
    ]
    text = format_sweep(evaluation.model_copy(update={"students": tuple(students)}))
    assert "tmkd, seed 2, fold 4 was not run: no reason was recorded" in text


def test_a_point_without_a_result_is_said() -> None:
    evaluation = make_sweep(alphas=(0.1, 0.5))
    lost = PointEvaluation(point=evaluation.points[1].point, main_arm="tmkd")
    text = format_sweep(evaluation.model_copy(update={"points": (evaluation.points[0], lost)}))
    assert "alpha 0.5: no student was trained" in text
    assert any(line.split()[:4] == ["alpha", "0.5", "no", "student"] for line in text.splitlines())


def test_several_points_have_a_line_each_for_the_main_arm_and_the_baseline() -> None:
    text = format_sweep(make_sweep(alphas=(0.1, 0.5, 0.9)))
    table = text.split("all points")[1]
    rows = [line for line in table.splitlines() if line.startswith(("alpha", "   "))]
    assert [row.split()[:3] for row in rows[:6:2]] == [
        ["alpha", value, "tmkd"] for value in ("0.1", "0.5", "0.9")
    ]
    assert rows[2].split()[-4:] == ["+1.2", "\N{MINUS SIGN}0.1", "to", "+2.3"]
    assert "change: of the arm's accuracy against alpha 0.1" in table
    assert "all points" not in format_sweep(make_sweep())


def test_the_longer_baseline_is_compared_in_words() -> None:
    assert "tmkd against golden-long: +" in format_sweep(make_sweep())


def test_the_cost_line_says_only_what_is_there() -> None:
    assert cost_sentence(COST) == (
        "24 students from 6 stores: teachers ran once for 11 min 9 s "
        "(training 9 min 1 s, forward 2 min 8 s), "
        "students 1 h 5 min; with teachers in the loop of each student their forward passes alone would "
        "have cost 2 h 43 min"
    )
    ready = COST.model_copy(update={"teacher_training_s": 0.0, "resident_s": None, "num_stores": 1})
    assert cost_sentence(ready) == (
        "24 students from 1 store: teachers ran once for 2 min 8 s (forward 2 min 8 s), students 1 h 5 min"
    )
    alone = ready.model_copy(update={"num_stores": 0, "num_students": 1})
    assert cost_sentence(alone) == "1 student: students 1 h 5 min"


def test_names_are_taken_literally() -> None:
    text = format_sweep(make_sweep(teachers=("[red]x[/red]", "[/]", "<script>")))
    assert "\n[red]x[/red]" in text
    assert "\n  [/]" in text


def test_standard_output_gets_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_sweep(make_sweep())
    assert "24 students from 6 stores" in capsys.readouterr().out
