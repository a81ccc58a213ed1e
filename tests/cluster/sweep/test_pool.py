"""Training a graph of jobs: side by side, failures alone, requests to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.sweep import pool
from cluster.sweep.jobs import JobNode
from cluster.sweep.pool import PoolReport, train_jobs
from precompute.interrupt import StopFlag
from schemas.errors import InterruptedRunError, TmkdError, TrainingError
from schemas.job import StageJob
from tests.cluster.sweep.test_jobs import runs

STAGES = {"first": None, "second": "first", "third": "second", "other": None}


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> dict[str, JobNode]:
    job = runs(0.9)[0].jobs[0]
    named = {name: job.model_copy(update={"name": name, "output": f"/nowhere/{name}"}) for name in STAGES}
    monkeypatch.setattr(StageJob, "fingerprint", lambda self: self.name)
    return {name: JobNode(name, named[name], after) for name, after in STAGES.items()}


class FakeTrainer:
    """Ends one job a call, the latest first, and fails those that it is told to."""

    def __init__(self, slots: int, *failing: str) -> None:
        self.slots = slots
        self.failing = failing
        self.begun: list[str] = []
        self.running: list[str] = []
        self.most = 0

    def begin(self, job: StageJob) -> None:
        self.begun.append(job.name)
        self.running.append(job.name)
        self.most = max(self.most, len(self.running))

    def wait(self, timeout_s: float) -> list[tuple[str, TmkdError | None]]:
        name = self.running.pop()
        return [(name, TrainingError(f"{name} broke") if name in self.failing else None)]


def train(graph: dict[str, JobNode], trainer: FakeTrainer) -> PoolReport:
    return train_jobs(graph, trainer, StopFlag())


def test_every_job_begins_after_the_one_it_starts_from(graph: dict[str, JobNode]) -> None:
    trainer = FakeTrainer(2)
    report = train(graph, trainer)
    assert report.done == set(STAGES)
    assert trainer.begun.index("first") < trainer.begun.index("second") < trainer.begun.index("third")
    assert trainer.most == 2


def test_no_more_run_at_once_than_there_are_slots(graph: dict[str, JobNode]) -> None:
    trainer = FakeTrainer(1)
    train(graph, trainer)
    assert trainer.most == 1


def test_a_failure_stops_only_what_starts_from_it(graph: dict[str, JobNode]) -> None:
    trainer = FakeTrainer(2, "second")
    report = train(graph, trainer)
    assert report.done == {"first", "other"}
    assert report.errors["second"] == "second broke"
    assert report.errors["third"] == "not begun: an earlier stage failed (second broke)"
    assert "third" not in trainer.begun


def test_a_finished_job_is_not_begun_again(
    graph: dict[str, JobNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "is_complete", lambda job: job.name in ("first", "other"))
    trainer = FakeTrainer(2)
    report = train(graph, trainer)
    assert trainer.begun == ["second", "third"]
    assert set(report.seconds) == {"second", "third"}
    assert report.done == set(STAGES)


def test_asked_to_stop_it_begins_nothing_more_and_tells_what_runs(
    graph: dict[str, JobNode], tmp_path: Path
) -> None:
    output = tmp_path / "other"
    output.mkdir()
    graph["other"] = JobNode("other", graph["other"].job.model_copy(update={"output": str(output)}), None)
    stop = StopFlag()

    class Stopping(FakeTrainer):
        def wait(self, timeout_s: float) -> list[tuple[str, TmkdError | None]]:
            stop.signal_number = 15
            if not any(output.iterdir()):
                return []
            name = self.running.pop()
            return [(name, InterruptedRunError(f"{name} stopped", signal_number=2))]

    trainer = Stopping(2)
    with pytest.raises(InterruptedRunError) as caught:
        train_jobs(graph, trainer, stop)
    assert caught.value.exit_code == 143
    assert sorted(trainer.begun) == ["first", "other"]
    assert [path.name for path in output.iterdir()]
