"""The stage jobs of a sweep's students as a graph: each job once, after the one it starts from.

Invariants (tests/cluster/sweep/test_jobs.py):
    1. Two students that have a stage in common train it once: jobs are told apart by fingerprint.
    2. A job's place follows from its fingerprint alone, so that every sweep below one output root finds
       what another has trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.arms import MODEL_DIRECTORY, StudentRun
from cluster.sweep.points import Cell
from schemas.job import StageJob, StudentInit

STUDENTS_DIRECTORY = "students"
_NAME_DIGITS = 16


@dataclass(frozen=True)
class SweepRun:
    """One student of one cell: its stages, first to last."""

    cell: Cell
    student: StudentRun
    jobs: tuple[StageJob, ...]

    @property
    def name(self) -> str:
        """Such as ``layers=3/tmkd/seed-1``."""
        return f"{self.cell.name}/{self.student.name}"


@dataclass(frozen=True)
class JobNode:
    """One stage to train.

    Attributes:
        after: Fingerprint of the job that it starts from, or None.
    """

    fingerprint: str
    job: StageJob
    after: str | None


def place_run(cell: Cell, student: StudentRun, jobs: Sequence[StageJob]) -> SweepRun:
    """Moves a student's stages to the places that their fingerprints name."""
    out = cell.directory.out
    root = out / STUDENTS_DIRECTORY
    sweep = cell.directory.run.relative_to(out).parts[0]
    placed: list[StageJob] = []
    for job in jobs:
        # A fingerprint covers neither the job's place nor that of the stage before it.
        output = root / job.fingerprint()[:_NAME_DIGITS]
        changes: dict[str, object] = {"output": str(output), "name": f"{sweep}/{cell.name}/{job.name}"}
        if placed and isinstance(job.init, StudentInit):
            model = Path(placed[-1].output) / MODEL_DIRECTORY
            changes["init"] = job.init.model_copy(update={"path": str(model)})
        placed.append(job.model_copy(update=changes))
    return SweepRun(cell, student, tuple(placed))


def make_graph(runs: Iterable[SweepRun]) -> dict[str, JobNode]:
    """Returns the jobs of all students, each once, each behind the one it starts from."""
    graph: dict[str, JobNode] = {}
    for run in runs:
        before: str | None = None
        for job in run.jobs:
            fingerprint = job.fingerprint()
            graph.setdefault(fingerprint, JobNode(fingerprint, job, before))
            before = fingerprint
    return graph


def ready_jobs(graph: Mapping[str, JobNode], done: Iterable[str], begun: Iterable[str]) -> list[JobNode]:
    """Lists the jobs that may begin: not begun, and nothing to wait for, in the graph's order."""
    finished, taken = set(done), set(begun)
    return [
        node
        for node in graph.values()
        if node.fingerprint not in taken and (node.after is None or node.after in finished)
    ]


def blocked_by(graph: Mapping[str, JobNode], failed: Iterable[str]) -> dict[str, str]:
    """Returns, for each job behind a failed one, the failed one's fingerprint."""
    found = {fingerprint: fingerprint for fingerprint in failed}
    for node in graph.values():
        if node.after in found:
            found.setdefault(node.fingerprint, found[node.after])
    return {job: cause for job, cause in found.items() if job != cause}
