"""A sweep's directory as the engine leaves it, for the tests of its page."""

from __future__ import annotations

from pathlib import Path

from cluster.sweep.report import write_sweep_report
from schemas.sweep_evaluation import SWEEP_EVALUATION_FILE, SweepEvaluation, write_sweep_evaluation
from tests.cluster.finished_run import write_log
from tests.cluster.page_reader import Page, read_page


def make_directory(root: Path, sweep: SweepEvaluation, *, has_logs: bool = False) -> Path:
    """Writes ``sweep.json``, and the logs of its students' stages."""
    root.mkdir(parents=True, exist_ok=True)
    write_sweep_evaluation(root / SWEEP_EVALUATION_FILE, sweep)
    for student in sweep.students if has_logs else ():
        for position, stage in enumerate(student.stages):
            is_last = position == len(student.stages) - 1
            if not (root / stage).exists():
                write_log(root / stage, "train" if is_last else "unlabelled", student.seed, soft=not is_last)
    return root


def page_of(root: Path, sweep: SweepEvaluation) -> Page:
    """Returns the page of a sweep without logs."""
    return read_page(write_sweep_report(make_directory(root, sweep)))
