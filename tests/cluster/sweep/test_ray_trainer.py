"""Students as Ray tasks: errors come back as values, lost tasks are tried again, demand is checked."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_session import ray_session
from cluster.sweep.ray_trainer import RayTrainer, ray_trainer
from schemas.errors import DataError, ResourceError, TmkdError, TrainingError
from schemas.job import StageJob
from schemas.sweep import StudentResources
from tests.cluster.sweep.test_jobs import runs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def _local_ray() -> Iterator[None]:
    with ray_session(None, num_cpus=2):
        yield


def behave(job: StageJob, num_procs: int) -> TmkdError | None:
    """Does what the job's output says."""
    place = Path(job.output)
    with (place / "calls").open("a") as file:
        file.write(f"{num_procs}\n")
    if place.name == "fails":
        return DataError("the corpus is damaged")
    if place.name == "dies" or (place.name == "dies-once" and len((place / "calls").read_text()) < 3):
        os._exit(9)
    time.sleep(2.0 if place.name.startswith("slow") else 0.0)
    return None


def train(root: Path, *names: str, at_once: int = 2) -> dict[str, TmkdError | None]:
    trainer = RayTrainer(StudentResources(at_once=at_once, cpus=1), num_procs=3, train=behave)
    jobs = {}
    for name in names:
        (root / name).mkdir()
        job = runs(0.9)[0].jobs[0].model_copy(update={"output": str(root / name), "seed": len(jobs)})
        jobs[job.fingerprint()] = name
        trainer.begin(job)
    ended: dict[str, TmkdError | None] = {}
    while len(ended) < len(names):
        ended |= {jobs[fingerprint]: error for fingerprint, error in trainer.wait(1.0)}
    return ended


@pytest.mark.usefixtures("_local_ray")
def test_an_error_comes_back_as_a_value_with_its_class(tmp_path: Path) -> None:
    ended = train(tmp_path, "works", "fails")
    assert ended["works"] is None
    assert isinstance(ended["fails"], DataError)
    assert ended["fails"].message == "the corpus is damaged"
    assert (tmp_path / "fails" / "calls").read_text() == "3\n"


@pytest.mark.usefixtures("_local_ray")
def test_a_task_that_dies_is_tried_again_and_in_the_end_is_a_failure_of_its_own(tmp_path: Path) -> None:
    ended = train(tmp_path, "dies-once", "dies")
    assert ended["dies-once"] is None
    assert isinstance(ended["dies"], TrainingError)
    assert "its Ray task was lost" in ended["dies"].message
    assert (tmp_path / "dies" / "calls").read_text() == "3\n" * 3


@pytest.mark.usefixtures("_local_ray")
def test_students_train_side_by_side(tmp_path: Path) -> None:
    train(tmp_path, "warm-1", "warm-2")
    began = time.monotonic()
    train(tmp_path, "slow-1", "slow-2")
    assert time.monotonic() - began < 3.8


def test_a_student_that_no_node_can_hold_is_refused_at_once() -> None:
    asked = StudentResources(at_once=1, cpus=1, gpus=3)
    with (
        pytest.raises(ResourceError, match=r"a student wants 1 CPU and 3 GPU .* no node has them"),
        ray_trainer(asked, 1, None),
    ):
        pass
