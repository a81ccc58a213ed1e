"""How far the teachers are: a bar for each on a terminal, plain lines elsewhere; always on stderr.

Invariant: without a terminal no control characters are written (tests/cluster/test_progress.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cluster.console import stderr_console
from precompute.events import ProgressEvent, TeacherState

_LINE_INTERVAL_S = 15.0
_ENDED: tuple[TeacherState, ...] = ("done", "failed")


@dataclass
class Pace:
    """Speed of one teacher, from its first row on: waiting and loading are not counted.

    Attributes:
        rows_per_s: Rows a second since then; 0 until it is known.
        rest_s: Seconds left, or None while that is not known.
    """

    rows_per_s: float = 0.0
    rest_s: float | None = None
    _began: tuple[float, int] | None = None

    def update(self, event: ProgressEvent, now_s: float) -> None:
        """Takes in how far the teacher is."""
        if event.state == "running" and self._began is None:
            self._began = (now_s, event.num_rows_done)
        if self._began is None or event.num_rows_done < self._began[1]:
            return
        elapsed_s = now_s - self._began[0]
        num_rows = event.num_rows_done - self._began[1]
        if num_rows and elapsed_s > 0:
            self.rows_per_s = num_rows / elapsed_s
            self.rest_s = (event.num_rows - event.num_rows_done) / self.rows_per_s


@contextmanager
def show_progress(
    *, quiet: bool = False, console: Console | None = None
) -> Iterator[Callable[[ProgressEvent], None]]:
    """Shows progress while the block runs.

    Args:
        quiet: Show notes alone, such as a replaced actor.
        console: By default stderr's.

    Yields:
        What ``precompute.stores.make_stores`` takes as ``on_progress``.
    """
    console = console or stderr_console()
    if quiet:
        yield lambda event: _print_note(console, event)
    elif not console.is_terminal:
        yield _LineView(console).show
    else:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console) as progress:
            yield _BarView(progress).show


class _BarView:
    """One bar per teacher."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}
        self._paces: dict[str, Pace] = {}

    def show(self, event: ProgressEvent) -> None:
        """Moves the teacher's bar."""
        _print_note(self._progress.console, event)
        pace = self._paces.setdefault(event.teacher, Pace())
        pace.update(event, time.monotonic())
        if event.teacher not in self._bars:
            self._bars[event.teacher] = self._progress.add_task(event.teacher, total=event.num_rows, text="")
        self._progress.update(
            self._bars[event.teacher],
            total=event.num_rows,
            completed=event.num_rows_done,
            text=describe_progress(event, pace),
        )


class _LineView:
    """A line now and then: at the end of a teacher, and else at most one in fifteen seconds each."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._paces: dict[str, Pace] = {}
        self._printed: dict[str, tuple[float, TeacherState]] = {}

    def show(self, event: ProgressEvent) -> None:
        """Prints a line if one is due."""
        _print_note(self._console, event)
        now_s = time.monotonic()
        pace = self._paces.setdefault(event.teacher, Pace())
        pace.update(event, now_s)
        last_s, last_state = self._printed.get(event.teacher, (now_s, "waiting"))
        ended = event.state in _ENDED and last_state not in _ENDED
        if not ended and now_s - last_s < _LINE_INTERVAL_S:
            self._printed.setdefault(event.teacher, (now_s, "waiting"))
            return
        self._printed[event.teacher] = (now_s, event.state)
        self._console.print(f"  {event.teacher}: {describe_progress(event, pace)}", markup=False)


def describe_progress(event: ProgressEvent, pace: Pace) -> str:
    """Returns such as ``running, 2,048/2,490 rows, 2/3 shards, 112 rows/s, 0:04 left``."""
    if event.state == "done" and event.num_rows_before == event.num_rows:
        return f"there already, {event.num_rows:,} rows"
    text = (
        f"{event.state}, {event.num_rows_done:,}/{event.num_rows:,} rows, "
        f"{event.num_shards_done}/{event.num_shards} shards"
    )
    if pace.rows_per_s:
        text += f", {pace.rows_per_s:,.0f} rows/s"
    if pace.rest_s is not None and event.state not in _ENDED:
        minutes, seconds = divmod(round(pace.rest_s), 60)
        hours, minutes = divmod(minutes, 60)
        text += f", {f'{hours}:{minutes:02}' if hours else minutes}:{seconds:02} left"
    return text


def _print_note(console: Console, event: ProgressEvent) -> None:
    if event.note:
        console.print(f"  {event.note}", markup=False)
