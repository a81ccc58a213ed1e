"""The supervisor of DeepSpeed's launcher: one training stage from job file to status.

The launcher's word is not taken: it exits 0 after some crashes, and a SIGTERM to it may orphan the
ranks. Its processes get a session of their own; the supervisor waits for the whole session and
believes the status that rank 0 wrote.

Invariants:
    1. Nothing of a launch outlives it, nor the supervisor itself
       (tests/cluster/test_deepspeed_launch.py).
    2. A launch that ends without a status is an error, whatever its exit code
       (tests/cluster/test_deepspeed_launch.py).
    3. Two launches at once do not collide (tests/cluster/test_deepspeed_launch.py).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster.deepspeed_command import build_command, build_environment, die_with_parent
from cluster.metrics_follower import MetricsFollower
from cluster.process_session import end_session
from distill.progress import StageProgress
from distill.stage_directory import StageDirectory, read_job
from schemas.errors import DataError, RecipeError, RefusedError, ResourceError, TmkdError, TrainingError
from schemas.job import AnyJob, StageStatus

STOP_GRACE_S = 120.0
_AFTERMATH_S = 5.0
_POLL_S = 0.2
_LOG_FILE = "trainer.log"
_LOG_TAIL_BYTES = 1 << 20
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_ERROR_LINE = re.compile(
    r"^(?:\[rank\d+\]:\s*|[\d-]{10} [\d:,]+ )?([\w.]*(?:Error|Exception|Interrupt)\b.*)$"
)
_ERRORS: Mapping[int, type[TmkdError]] = {2: RecipeError, 3: DataError, 4: RefusedError, 6: ResourceError}
_LOGGER = logging.getLogger(__name__)

OnProgress = Callable[[dict[str, Any]], None]


class StopSignal(Protocol):
    """What tells a launch to end."""

    def is_set(self) -> bool:
        """Tells whether it is asked to end."""


def launch_stage(
    job_path: Path,
    *,
    num_procs: int = 1,
    hostfile: Path | None = None,
    log_path: Path | None = None,
    stop: StopSignal | None = None,
    on_progress: OnProgress | None = None,
) -> StageStatus:
    """Trains one stage to its end, or returns at once if it is finished already.

    Args:
        job_path: A ``StageJob`` as JSON.
        num_procs: Ranks on each host.
        hostfile: DeepSpeed's hostfile, for several hosts.
        log_path: Where the ranks' output goes; by default ``trainer.log`` in the job's output.
        stop: When it is set, the ranks save and leave.
        on_progress: Called with each new line of ``metrics.jsonl`` (``distill.metrics_log``); by
            default a bar is shown where standard error is a terminal.

    Returns:
        The status: ``complete``, or ``preempted`` if ``stop`` was set or the ranks were told to stop.

    Raises:
        TmkdError: The error that a rank reported, by its exit code.
        TrainingError: The ranks died without reporting one.
    """
    job = read_job(job_path)
    directory = StageDirectory(Path(job.output))
    directory.create()
    if directory.is_complete(job):
        return _require_status(directory)
    log = log_path or directory.path / _LOG_FILE
    launch = _Launch(job_path.resolve(), job, num_procs, hostfile, log)
    for last_try in (False, True):
        _reset(directory)
        start = log.stat().st_size if log.exists() else 0
        with _shown(job, on_progress) as show:
            outcome = _supervise(launch, directory, stop, show)
        text = _read_log(log, start)
        if last_try or outcome.stopped or not _PORT_TAKEN.search(text) or _is_finished(directory):
            break
        _LOGGER.warning("the port of the ranks was taken; trying another one")
    return _conclude(directory, job, outcome, text, log)


@contextmanager
def _shown(job: AnyJob, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    if on_progress is not None:
        yield on_progress
        return
    with closing(StageProgress(job.name)) as progress:
        yield progress.show


@dataclass(frozen=True, slots=True)
class _Launch:
    job_path: Path
    job: AnyJob
    num_procs: int
    hostfile: Path | None
    log: Path


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a launch ended: the launcher's exit code, and whether it was told to stop."""

    exit_code: int | None
    stopped: bool


def _reset(directory: StageDirectory) -> None:
    """Clears an earlier launch's status, unless that launch is still going on."""
    directory.lock()
    try:
        directory.clear_requests()
    finally:
        directory.unlock()


def _supervise(
    launch: _Launch,
    directory: StageDirectory,
    stop: StopSignal | None,
    on_progress: OnProgress,
) -> _Outcome:
    follower = MetricsFollower(directory.metrics, on_progress)
    launch.log.parent.mkdir(parents=True, exist_ok=True)
    with launch.log.open("ab") as log:
        process = _start(launch, log.fileno())
    stop_time: float | None = None
    try:
        while process.poll() is None:
            time.sleep(_POLL_S)
            follower.poll()
            if stop is not None and stop.is_set() and stop_time is None:
                directory.request_stop()
                stop_time = time.monotonic()
            if stop_time is not None and _is_overdue(directory, stop_time):
                end_session(process.pid, wait_s=0)
    finally:
        # Also when an exception is under way: nothing outlives a launch.
        end_session(process.pid, wait_s=_AFTERMATH_S if process.poll() is not None else 0)
        process.wait()
        follower.poll()
    return _Outcome(process.returncode, stop_time is not None)


def _start(launch: _Launch, log: int) -> subprocess.Popen[bytes]:
    command = build_command(
        launch.job_path,
        num_procs=launch.num_procs,
        master_port=find_free_port(),
        hostfile=launch.hostfile,
    )
    return subprocess.Popen(
        die_with_parent(command, os.getpid()),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=build_environment(os.environ, threads=launch.job.threads),
        start_new_session=True,
    )


def find_free_port() -> int:
    """Returns a TCP port that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _is_overdue(directory: StageDirectory, stop_time: float) -> bool:
    # Before rank 0 has written a status there is nothing to save.
    return directory.read_status() is None or time.monotonic() - stop_time > STOP_GRACE_S


def _is_finished(directory: StageDirectory) -> bool:
    status = directory.read_status()
    return status is not None and status.state in ("complete", "preempted")


def _conclude(directory: StageDirectory, job: AnyJob, outcome: _Outcome, text: str, log: Path) -> StageStatus:
    status = directory.read_status()
    fingerprint = job.fingerprint()
    if status is not None and status.fingerprint == fingerprint and _is_finished(directory):
        return status
    failures = directory.read_failures()
    if failures:
        # A rank that lost its peers reports only that; the peer's own error says more.
        raise _make_error(max(failures, key=lambda failure: failure.exit_code in _ERRORS), log)
    if outcome.stopped:
        step = status.step if status is not None else 0
        return StageStatus(state="preempted", fingerprint=fingerprint, step=step)
    if outcome.exit_code == ResourceError.exit_code:
        # A full disk does not take the status either.
        raise ResourceError(f"{job.name}: {_find_error(text).removeprefix('ResourceError: ')}; see {log}")
    raise TrainingError(
        f"{job.name}: the ranks ended without a result (launcher's exit code {outcome.exit_code}): "
        f"{_find_error(text)}",
        log=log,
    )


def _make_error(failure: StageStatus, log: Path) -> TmkdError:
    message = failure.error or "the training failed"
    kind = _ERRORS.get(failure.exit_code)
    return TrainingError(message, log=log) if kind is None else kind(message)


def _require_status(directory: StageDirectory) -> StageStatus:
    status = directory.read_status()
    if status is None:
        raise TrainingError(f"{directory.path}: the status of a finished stage vanished")
    return status


def _read_log(log: Path, start: int) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _find_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := _ERROR_LINE.match(line))]
    if errors:
        return errors[-1]
    return lines[-1] if lines else "it printed nothing"
