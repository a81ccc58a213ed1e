"""Training the jobs of a sweep: several side by side, each as soon as what it starts from is there.

Invariants (tests/cluster/sweep/test_pool.py):
    1. A job that fails stops only the jobs that start from it; the others go on.
    2. Asked to stop, the pool begins nothing more, and what runs saves and leaves.
    3. A job whose result is there is not begun.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cluster.console import say
from cluster.deepspeed_launch import StopSignal, launch_stage
from cluster.students import is_complete, run_job
from cluster.sweep.jobs import JobNode, blocked_by, ready_jobs
from distill.stage_directory import StageDirectory
from precompute.interrupt import StopFlag
from schemas.errors import TmkdError
from schemas.job import StageJob, StageStatus


class Trainer(Protocol):
    """What trains jobs; ``DriverTrainer`` here, ``RayTrainer`` in ``cluster.sweep.ray_trainer``."""

    slots: int

    def begin(self, job: StageJob) -> None:
        """Begins a job; at most ``slots`` are under way."""

    def wait(self, timeout_s: float) -> list[tuple[str, TmkdError | None]]:
        """Returns the fingerprints of the jobs that ended, with what went wrong, after a bounded wait."""


@dataclass
class PoolReport:
    """What became of the jobs.

    Attributes:
        done: Fingerprints of jobs whose result is there.
        errors: By fingerprint, of those that failed or were not begun because an earlier stage failed.
        seconds: Of each job that was trained now.
    """

    done: set[str] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def train_jobs(graph: Mapping[str, JobNode], trainer: Trainer, stop: StopFlag) -> PoolReport:
    """Trains all jobs of a graph.

    Raises:
        InterruptedRunError: It was asked to stop.
    """
    report = PoolReport()
    _find_done(graph, report)
    begun = set(report.done) | set(report.errors)
    total = len(graph) - len(begun)
    started: dict[str, float] = {}
    while True:
        if not stop.is_set():
            for node in ready_jobs(graph, report.done, begun)[: max(0, trainer.slots - len(started))]:
                begun.add(node.fingerprint)
                started[node.fingerprint] = time.monotonic()
                trainer.begin(node.job)
        elif started:
            _request_stop(graph, started)
        if not started:
            break
        for fingerprint, error in trainer.wait(0.5):
            seconds = time.monotonic() - started.pop(fingerprint)
            if error is None:
                report.done.add(fingerprint)
                report.seconds[fingerprint] = seconds
            elif not stop.is_set():
                report.errors[fingerprint] = error.message
            say(f"  {_describe(graph[fingerprint].job, error, seconds)} ({len(report.seconds)} of {total})")
    stop.raise_if_set()
    failed = set(report.errors)
    for fingerprint, cause in blocked_by(graph, failed).items():
        report.errors[fingerprint] = f"not begun: an earlier stage failed ({report.errors[cause]})"
    return report


def _find_done(graph: Mapping[str, JobNode], report: PoolReport) -> None:
    for node in graph.values():
        try:
            if is_complete(node.job):
                report.done.add(node.fingerprint)
        except TmkdError as error:
            report.errors[node.fingerprint] = error.message


def _request_stop(graph: Mapping[str, JobNode], started: Mapping[str, float]) -> None:
    for fingerprint in started:
        directory = StageDirectory(Path(graph[fingerprint].job.output))
        if directory.path.is_dir() and not directory.stop_requested():
            directory.request_stop()


def _describe(job: StageJob, error: TmkdError | None, seconds: float) -> str:
    if error is None:
        return f"{job.name}: {seconds:.1f} s"
    return error.message if job.name in error.message else f"{job.name}: {error.message}"


def train_stage(job: StageJob, *, num_procs: int, stop: StopSignal | None = None) -> TmkdError | None:
    """Trains one job to its end, unless its result is there, and returns what went wrong."""

    def launch(path: Path) -> StageStatus:
        return launch_stage(path, num_procs=num_procs, stop=stop, on_progress=_ignore)

    try:
        run_job(job, launch)
    except TmkdError as error:
        return error
    return None


def _ignore(_line: object) -> None:
    """Shows nothing: bars of several students would mix."""


class DriverTrainer:
    """Trains one job after another in this process's children.

    Attributes:
        slots: 1.
    """

    slots = 1

    def __init__(self, num_procs: int, stop: StopSignal) -> None:
        self._num_procs, self._stop = num_procs, stop
        self._ended: list[tuple[str, TmkdError | None]] = []

    def begin(self, job: StageJob) -> None:
        """Trains the job and comes back when it has ended."""
        self._ended.append((job.fingerprint(), train_stage(job, num_procs=self._num_procs, stop=self._stop)))

    def wait(self, timeout_s: float) -> list[tuple[str, TmkdError | None]]:  # noqa: ARG002
        """Returns what ended."""
        ended, self._ended = self._ended, []
        return ended


@contextmanager
def driver_trainer(num_procs: int, stop: StopSignal) -> Iterator[Trainer]:
    """Opens a ``DriverTrainer``."""
    yield DriverTrainer(num_procs, stop)
