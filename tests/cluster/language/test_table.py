"""The table of a language run in a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.language.figures import (
    format_factor,
    format_interval,
    format_nats,
    format_perplexity,
    format_spread,
)
from cluster.table import format_evaluation, print_evaluation
from schemas.evaluation import Interval
from tests.cluster.language.measured_texts import make_evaluation


def test_plain_text_fits_into_its_width_and_holds_no_escapes() -> None:
    for width in (80, 100):
        text = format_evaluation(make_evaluation(), width)
        assert "\x1b" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= width
        for name in ("large", "student", "plain", "top-k", "=large"):
            assert name in text, (width, name)
    assert "seed-1" not in format_evaluation(make_evaluation())


def test_the_comparison_the_spread_and_the_notes_are_said() -> None:
    text = " ".join(format_evaluation(make_evaluation()).split())
    assert "16,943 tokens, 150 chunks of up to 512 tokens" in text
    assert "student against plain: \N{MINUS SIGN}0.241 nats a token (3 seeds, 3 of them better;" in text
    assert "sd: over seeds" in text
    assert "note: a note <b>of</b> the test" in text


def test_one_seed_has_no_spread() -> None:
    text = format_evaluation(make_evaluation(seeds=(1,)))
    assert " sd " not in text
    assert "seeds" not in text


def test_teachers_whose_columns_do_not_fit_share_one() -> None:
    evaluation = make_evaluation(teachers=tuple("abcdefgh"))
    assert "=mean" not in format_evaluation(evaluation, 140)
    assert "=mean" in format_evaluation(evaluation, 80)


def test_names_are_taken_literally() -> None:
    assert "[red]x[/red]" in format_evaluation(make_evaluation(teachers=("[red]x[/red]", "[/]")))


def test_a_terminal_gets_the_students_line_in_bold() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, highlight=False, color_system="standard")
    print_evaluation(make_evaluation(), console)
    bold = [line for line in stream.getvalue().splitlines() if "\x1b[1mstudent" in line]
    assert len(bold) == 1


def test_figures_are_written_with_few_digits() -> None:
    values = (9.876, 123.45, 1234.5, 2.5e9, None)
    assert [format_perplexity(value) for value in values] == [
        "9.88",
        "123.5",
        "1,234",
        "2.5e+09",
        "\N{INFINITY}",
    ]
    assert format_spread(None) == ""
    assert format_interval(Interval(low=11.8, high=12.94)) == "11.80 to 12.94"
    assert format_interval(None) == "\N{EN DASH}"
    assert [format_nats(value) for value in (0.0123, -0.0123, -0.0001)] == [
        "+0.012",
        "\N{MINUS SIGN}0.012",
        "+0.000",
    ]
    assert format_factor(-0.105360516) == "0.900\N{MULTIPLICATION SIGN}"
