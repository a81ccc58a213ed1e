"""Progress on standard error: a bar on a terminal, else a line now and then.

Rank 0 shows it, and so does its supervisor, behind which rank 0 has no terminal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 10.0
_LOGGER = logging.getLogger(__name__)


class StageProgress:
    """Shows the lines of ``distill.metrics_log``."""

    def __init__(self, name: str) -> None:
        """Shows ``name`` and, until the first line comes, that it is starting."""
        self._name = name
        self._last_line_s = time.monotonic()
        self._evaluation = ""
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task(name, total=None, note="starting")
            self._bar.start()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows one line of the record."""
        evaluation = line["kind"] == "evaluation"
        if evaluation:
            names = ("accuracy", "macro_f1", "perplexity", "loss", "soft_loss")
            self._evaluation = ", ".join(f"{name} {line[name]:.4f}" for name in names if name in line)
        if self._bar is not None:
            note = self._evaluation if evaluation else _describe(line)
            if not evaluation:
                self._bar.update(self._task, total=line["total_steps"], completed=line["step"])
            self._bar.update(self._task, note=note)
        elif evaluation:
            _LOGGER.info("%s: step %d, held-out rows: %s", self._name, line["step"], self._evaluation)
        elif time.monotonic() - self._last_line_s > _LINE_EVERY_S or line["step"] == line["total_steps"]:
            self._last_line_s = time.monotonic()
            steps = f"{line['step']}/{line['total_steps']}"
            _LOGGER.info("%s: step %s, %s", self._name, steps, _describe(line))

    def close(self) -> None:
        """Takes the bar off."""
        if self._bar is not None:
            self._bar.stop()


def _describe(line: Mapping[str, Any]) -> str:
    unit = "tokens" if "tokens_per_s" in line else "rows"
    return f"loss {line['loss']:.4f}, {line[f'{unit}_per_s']:.0f} {unit}/s"
