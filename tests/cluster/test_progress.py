"""Progress of the teachers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.progress import Pace, describe_progress, show_progress
from precompute.events import ProgressEvent


def event(state: str, rows: int, before: int = 0, note: str = "") -> ProgressEvent:
    return ProgressEvent("t", state, rows // 10, 10, rows, 100, before, note)  # type: ignore[arg-type]


def test_speed_and_time_left_count_this_run_from_its_first_row_on() -> None:
    pace = Pace()
    pace.update(event("loading", 20, before=20), 0.0)
    pace.update(event("running", 20, before=20), 50.0)
    pace.update(event("running", 60, before=20), 60.0)
    assert pace.rows_per_s == pytest.approx(4.0)
    assert pace.rest_s == pytest.approx(10.0)
    text = describe_progress(event("running", 60, before=20), pace)
    assert text == "running, 60/100 rows, 6/10 shards, 4 rows/s, 0:10 left"


def test_without_a_terminal_there_are_few_plain_lines_and_all_notes() -> None:
    out = io.StringIO()
    with show_progress(console=Console(file=out, force_terminal=False, width=200)) as show:
        show(event("running", 0))
        for rows in range(1, 100):
            show(event("running", rows, note="teacher t: actor replaced (why)" if rows == 50 else ""))
        show(event("done", 100))
        show(event("done", 100))
    lines = out.getvalue().splitlines()
    assert lines[0] == "  teacher t: actor replaced (why)"
    assert lines[1].startswith("  t: done, 100/100 rows, 10/10 shards")
    assert len(lines) == 2
    assert "\x1b" not in out.getvalue()


def test_on_a_terminal_each_teacher_has_a_bar() -> None:
    out = io.StringIO()
    with show_progress(console=Console(file=out, force_terminal=True, width=120)) as show:
        show(event("running", 40))
        show(ProgressEvent("other", "waiting", 0, 10, 0, 100))
    assert "running, 40/100 rows" in out.getvalue()
    assert "other" in out.getvalue()


def test_quiet_shows_notes_alone() -> None:
    out = io.StringIO()
    with show_progress(quiet=True, console=Console(file=out, width=200)) as show:
        show(event("running", 40))
        show(event("running", 41, note="teacher t: actor replaced (why)"))
        show(event("done", 100))
    assert out.getvalue() == "  teacher t: actor replaced (why)\n"


def test_a_store_that_is_there_already_is_called_so() -> None:
    assert describe_progress(event("done", 100, before=100), Pace()) == "there already, 100 rows"
