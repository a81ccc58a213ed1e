"""The training's record: ``metrics.jsonl``, and the same for TensorBoard.

A line of a step has ``kind: step`` with ``step`` (1-based, as done), ``total_steps``, ``epoch``,
``loss``, its parts, ``lr``, ``grad_norm`` and ``rows_per_s``. A classifier's parts are ``golden_loss`` and
``soft_loss`` (null where it is not trained); a language model's are its terms by name, as ``ghost_kl`` or
``ghost_kl_t2`` at temperature 2, its rows are chunks, and ``tokens_per_s`` counts tokens to predict. A line
of an evaluation has ``kind: evaluation``, ``step``, ``epoch``, ``best_step`` and the measures on the
held-out rows.

Invariants:
    1. After a resume at step s the file holds each step once, as an uninterrupted run would
       (tests/distill/test_metrics_log.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.digest import replace_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_EVERY_STEPS = 10


class MetricsLog:
    """Appends lines; used by rank 0 only."""

    def __init__(self, path: Path, tensorboard: Path, resume_step: int) -> None:
        """Cuts both records back to ``resume_step`` and opens them."""
        # It takes a noticeable moment to load, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        cut_lines(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard: SummaryWriter = SummaryWriter(str(tensorboard), purge_step=resume_step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends one line and flushes it: the supervisor follows the file."""
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        kind, step = line["kind"], int(line["step"])
        if kind == "step" and step % TENSORBOARD_EVERY_STEPS and step != line["total_steps"]:
            return
        for name, value in line.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes both records."""
        self._file.close()
        self._tensorboard.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the complete lines of a ``metrics.jsonl``; a line torn by a crash is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if text.endswith("\n") and isinstance(line, dict) and "step" in line:
                yield line


def cut_lines(path: Path, last_step: int) -> None:
    """Removes the lines of steps after ``last_step``."""
    if not path.is_file():
        return
    kept = [line for line in read_lines(path) if line["step"] <= last_step]
    replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
