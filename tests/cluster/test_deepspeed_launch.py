"""The supervisor: real launches, and launches of small stand-ins that fail as the launcher does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import deepspeed_launch
from cluster.deepspeed_launch import launch_stage
from cluster.process_session import list_session
from distill.stage_directory import StageDirectory
from schemas.errors import DataError, RecipeError, RefusedError, ResourceError, TmkdError, TrainingError
from schemas.job import StageJob
from tests.tiny_stage import TinyStage, read_weights, write_job


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyStage:
    return TinyStage(tmp_path_factory.mktemp("stage"))


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Lets a small program stand in for the launcher; it sees the job as ``job`` and the port as ``port``."""
    preamble = (
        "import os, signal, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from distill.stage_directory import StageDirectory, read_job\n"
        "from schemas.job import StageStatus\n"
        "job, port = read_job(Path(sys.argv[1])), int(sys.argv[2])\n"
        "directory = StageDirectory(Path(job.output))\n"
        "def leave(state, rank=0, **fields):\n"
        "    status = StageStatus(state=state, fingerprint=job.fingerprint(), **fields)\n"
        "    directory.write_status(status, rank=rank)\n"
    )

    def build(job_path: Path, *, num_procs: int, master_port: int, hostfile: Path | None = None) -> list[str]:
        return [sys.executable, "-c", preamble + program, str(job_path), str(master_port)]

    monkeypatch.setattr(deepspeed_launch, "build_command", build)


def read_log(job: StageJob) -> str:
    return (Path(job.output) / "trainer.log").read_text()


def test_a_launch_trains_and_tells_its_progress(stage: TinyStage) -> None:
    job = stage.job("launched")
    lines: list[dict[str, Any]] = []
    status = launch_stage(write_job(job), num_procs=1, on_progress=lines.append)
    assert (status.state, status.step) == ("complete", 10)
    assert status.fingerprint == job.fingerprint()
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 11))
    assert "step 10/10" in read_log(job)
    assert read_weights(job.output)
    # Finished: the second launch starts nothing.
    start = time.monotonic()
    assert launch_stage(write_job(job)) == status
    assert time.monotonic() - start < 1


@pytest.mark.slow
def test_two_launches_at_once_of_two_ranks_do_not_collide(stage: TinyStage) -> None:
    jobs = [stage.job(name) for name in ("left", "right")]
    failures: list[BaseException] = []

    def launch(job: StageJob) -> None:
        try:
            launch_stage(write_job(job), num_procs=2)
        except TmkdError as error:
            failures.append(error)

    threads = [threading.Thread(target=launch, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    left, right = (read_weights(job.output) for job in jobs)
    assert all(left[name].equal(right[name]) for name in left)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_launch_and_leaves_no_process(stage: TinyStage) -> None:
    job = stage.job("killed", epochs=5000, selection_fraction=0.0, checkpoint_every_steps=100_000)
    sessions: list[int] = []

    def kill_second_rank(line: dict[str, Any]) -> None:
        if not sessions:
            ranks = [p for p in psutil.process_iter() if is_rank(p, job)]
            sessions.append(os.getsid(ranks[0].pid))
            ranks[-1].send_signal(signal.SIGKILL)

    start = time.monotonic()
    with pytest.raises(TrainingError, match="the ranks ended without a result"):
        launch_stage(write_job(job), num_procs=2, on_progress=kill_second_rank)
    assert time.monotonic() - start < 90
    assert list_session(sessions[0]) == []


def is_rank(process: psutil.Process, job: StageJob) -> bool:
    try:
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
    return any(word.startswith("--local_rank") for word in words) and any(
        job.output in word for word in words
    )


@pytest.mark.slow
def test_a_stopped_launch_saves_and_the_next_one_goes_on(stage: TinyStage) -> None:
    fields: dict[str, Any] = {"epochs": 40, "selection_fraction": 0.0}
    job = stage.job("interrupted", **fields)
    stop = threading.Event()
    status = launch_stage(write_job(job), stop=stop, on_progress=lambda line: stop.set())
    assert status.state == "preempted"
    assert 0 < status.step < 240
    assert launch_stage(write_job(job)).state == "complete"
    whole = stage.job("not-interrupted", **fields)
    launch_stage(write_job(whole))
    ours, theirs = read_weights(job.output), read_weights(whole.output)
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_crash_with_exit_code_0_is_an_error_that_shows_the_last_one(
    stage: TinyStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(
        monkeypatch,
        "leave('running')\nprint('[rank1]: torch.Fault: no\\n[rank1]: RuntimeError: out of luck\\nbye')",
    )
    job = stage.job("silent")
    with pytest.raises(
        TrainingError, match=r"code 0\): RuntimeError: out of luck; see .*trainer.log"
    ) as error:
        launch_stage(write_job(job))
    assert error.value.exit_code == 1


def test_exit_code_6_is_believed_where_no_status_could_be_written(
    stage: TinyStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "2026-01-02 03:04:05,678 ResourceError: /x: No space left on device"
    stand_in(monkeypatch, f"leave('running')\nprint({line!r})\nsys.exit(6)")
    with pytest.raises(ResourceError, match=r"^full: /x: No space left on device; see"):
        launch_stage(write_job(stage.job("full")))


@pytest.mark.parametrize(
    ("exit_code", "kind"), [(2, RecipeError), (3, DataError), (4, RefusedError), (6, ResourceError)]
)
def test_the_error_that_a_rank_reports_keeps_its_kind(
    stage: TinyStage, monkeypatch: pytest.MonkeyPatch, exit_code: int, kind: type[TmkdError]
) -> None:
    # Rank 0 has only lost its peer; rank 1 knows why.
    program = (
        f"leave('failed', error='lost', exit_code=1)\nleave('failed', 1, error='why', exit_code={exit_code})"
    )
    stand_in(monkeypatch, program)
    with pytest.raises(kind, match="why") as error:
        launch_stage(write_job(stage.job("typed")))
    assert error.value.exit_code == exit_code


def test_an_earlier_launchs_status_is_not_believed(stage: TinyStage, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "leave('failed', error='old', exit_code=3)")
    path = write_job(stage.job("stale"))
    with pytest.raises(DataError, match="old"):
        launch_stage(path)
    stand_in(monkeypatch, "print('new')")
    with pytest.raises(TrainingError, match="new"):
        launch_stage(path)


def test_a_taken_port_is_tried_again_once_with_another(
    stage: TinyStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "log = Path(job.output) / 'ports'\n"
        "ports = log.read_text().split() if log.exists() else []\n"
        "log.write_text(' '.join([*ports, str(port)]))\n"
        "leave('complete') if ports else print('DistNetworkError: name: EADDRINUSE')\n"
    )
    stand_in(monkeypatch, program)
    job = stage.job("ports")
    assert launch_stage(write_job(job)).state == "complete"
    first, second = (Path(job.output) / "ports").read_text().split()
    assert first != second


def test_what_a_dead_launcher_leaves_behind_is_killed(
    stage: TinyStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An orphan that ignores SIGTERM, as a rank that hangs in a collective would.
    orphan = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
    program = (
        f"child = subprocess.Popen([sys.executable, '-c', {orphan!r}])\n"
        "(Path(job.output) / 'session').write_text(f'{os.getsid(0)} {child.pid}')\n"
    )
    stand_in(monkeypatch, program)
    monkeypatch.setattr(deepspeed_launch, "_AFTERMATH_S", 0.2)
    job = stage.job("orphan")
    with pytest.raises(TrainingError):
        launch_stage(write_job(job))
    session, child = (int(word) for word in (Path(job.output) / "session").read_text().split())
    assert list_session(session) == []
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_ranks_that_do_not_stop_in_time_are_killed(stage: TinyStage, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "leave('running', step=7)\ntime.sleep(600)")
    monkeypatch.setattr(deepspeed_launch, "STOP_GRACE_S", 0.5)
    job = stage.job("deaf")
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    status = launch_stage(write_job(job), stop=stop)
    assert (status.state, status.step) == ("preempted", 7)
    assert StageDirectory(Path(job.output)).stop_requested()


def test_an_exception_in_the_caller_ends_the_ranks(stage: TinyStage, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        "(Path(job.output) / 'session').write_text(str(os.getsid(0)))\n"
        '(Path(job.output) / \'metrics.jsonl\').write_text(\'{"kind": "step", "step": 1}\\n\')\n'
        "time.sleep(600)",
    )
    job = stage.job("aborted")

    def fail(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch_stage(write_job(job), on_progress=fail)
    deadline = time.monotonic() + 5
    session = Path(job.output) / "session"
    while not session.exists():
        assert time.monotonic() < deadline
    assert list_session(int(session.read_text())) == []


def test_a_directory_in_which_another_process_trains_is_refused(stage: TinyStage) -> None:
    job = stage.job("busy")
    directory = StageDirectory(Path(job.output))
    path = write_job(job)
    directory.lock()
    try:
        with pytest.raises(RefusedError, match="another process trains here"):
            launch_stage(path)
    finally:
        directory.unlock()


def test_a_job_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"job\.json"):
        launch_stage(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(RecipeError, match="Field required"):
        launch_stage(tmp_path / "job.json")
