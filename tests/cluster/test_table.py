"""Tests of the evaluation's table in a terminal."""

import io

import pytest
from rich.console import Console

from cluster.figures import (
    format_bytes,
    format_count,
    format_difference,
    format_percent,
    format_rate,
    format_ratio,
    format_seconds,
)
from cluster.table import format_evaluation, print_evaluation
from tests.cluster.evaluations import make_evaluation


def test_plain_text_fits_into_its_width_and_holds_no_escapes() -> None:
    for width in (80, 100):
        text = format_evaluation(make_evaluation(), width)
        assert "\x1b" not in text
        assert max(len(line) for line in text.splitlines()) <= width
        for name in ("teacher-a", "ensemble", "tmkd", "golden", "1-o-1", "m-o-m"):
            assert name in text, (width, name)


def test_single_seeds_are_left_to_the_report() -> None:
    assert "seed-1" not in format_evaluation(make_evaluation())


def test_the_teachers_of_an_arm_stand_indented_below_it() -> None:
    lines = format_evaluation(make_evaluation()).splitlines()
    arm = next(position for position, line in enumerate(lines) if line.split()[:1] == ["1-o-1"])
    assert [line.split("  ")[:2] for line in lines[arm + 1 : arm + 4]] == [
        ["", "teacher-a"],
        ["", "teacher-b"],
        ["", "teacher-c"],
    ]


def test_the_comparison_and_the_notes_are_said() -> None:
    text = " ".join(format_evaluation(make_evaluation()).split())
    assert "tmkd against golden: +" in text
    assert "3 seeds, 3 of them better; 95 % interval" in text
    assert "note: a note <b>of</b> the test" in text
    assert "train: 12 of 9,000 rows left out of training" in text
    assert "2 excluded" in text


def test_one_seed_is_compared_by_mcnemar() -> None:
    assert "McNemar p = " in format_evaluation(make_evaluation(seeds=(1,)))


def test_teachers_whose_columns_do_not_fit_share_one() -> None:
    evaluation = make_evaluation(teachers=tuple("abcdefgh"))
    assert "=mean" not in format_evaluation(evaluation, 140)
    text = format_evaluation(evaluation, 80)
    assert "=mean" in text
    assert "=a" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_names_are_taken_literally() -> None:
    text = format_evaluation(make_evaluation(teachers=("[red]x[/red]", "[/]", "z" * 64)))
    assert "[red]x[/red]" in text
    assert "\n  [/]" in text


def test_standard_output_gets_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(make_evaluation())
    assert "ensemble" in capsys.readouterr().out


def test_a_terminal_gets_the_students_line_in_bold() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, highlight=False, color_system="standard")
    print_evaluation(make_evaluation(), console)
    bold = [line for line in stream.getvalue().splitlines() if "\x1b[1mtmkd" in line]
    assert len(bold) == 1


def test_figures_are_written_with_few_digits() -> None:
    assert [format_percent(value) for value in (0.8437, 1.0, None)] == ["84.4", "100.0", "\N{EN DASH}"]
    assert [format_difference(value) for value in (0.012, -0.012, -0.0001)] == [
        "+1.2",
        "\N{MINUS SIGN}1.2",
        "+0.0",
    ]
    assert [format_count(value) for value in (999, 4_386, 22_713_216, 110_000_000)] == [
        "999",
        "4.39k",
        "22.7M",
        "110M",
    ]
    assert [format_rate(value) for value in (1234.5, 9.87)] == ["1,234", "9.9"]
    assert format_ratio(11.96) == "12.0\N{MULTIPLICATION SIGN}"
    assert [format_bytes(value) for value in (10, 1_234_567)] == ["10 B", "1.23 MB"]
    assert [format_seconds(value) for value in (0.44, 75, 3720)] == ["0.4 s", "1 min 15 s", "1 h 2 min"]
