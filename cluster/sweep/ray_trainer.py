"""Students side by side, as Ray tasks with resources of their own.

Invariants (tests/cluster/sweep/test_ray_trainer.py):
    1. An error of a stage comes back as a value; one that Ray raises means that the task's machine or
       process is gone, and the stage goes on from its last checkpoint in another task.
    2. What no node can hold is refused before anything waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.ray_session import ray_session
from cluster.run_context import available_cpus
from cluster.sweep.pool import Trainer, train_stage
from schemas.errors import ResourceError, TmkdError, TrainingError, first_line
from schemas.job import StageJob
from schemas.sweep import StudentResources

_MAX_RETRIES = 2


Train = Callable[[StageJob, int], TmkdError | None]


def _train(job: StageJob, num_procs: int) -> TmkdError | None:
    return train_stage(job, num_procs=num_procs)


class RayTrainer:
    """Begins jobs as Ray tasks.

    Attributes:
        slots: Tasks under way at once.
    """

    def __init__(self, resources: StudentResources, num_procs: int, train: Train = _train) -> None:
        self.slots = resources.at_once
        self._num_procs = num_procs
        self._task: Any = ray.remote(train).options(
            num_cpus=student_cpus(resources), num_gpus=resources.gpus, max_retries=_MAX_RETRIES
        )
        self._running: dict[Any, str] = {}

    def begin(self, job: StageJob) -> None:
        """Sends a job to Ray."""
        reference = self._task.remote(job, self._num_procs)
        self._running[reference] = job.fingerprint()

    def wait(self, timeout_s: float) -> list[tuple[str, TmkdError | None]]:
        """Returns the jobs that ended."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_s)
        return [(self._running.pop(reference), _collect(reference)) for reference in ready]


@contextmanager
def ray_trainer(resources: StudentResources, num_procs: int, address: str | None) -> Iterator[Trainer]:
    """Joins a cluster, or starts one on this machine, and opens a ``RayTrainer`` on it.

    Raises:
        ResourceError: No node can hold one student, or the cluster cannot be reached.
    """
    with ray_session(address, num_cpus=available_cpus()):
        _check_demand(resources)
        yield RayTrainer(resources, num_procs)


def student_cpus(resources: StudentResources) -> int:
    """Returns the CPUs of one student, by default its share of this machine's."""
    return resources.cpus or max(1, available_cpus() // resources.at_once)


def _collect(reference: Any) -> TmkdError | None:
    try:
        error: TmkdError | None = ray.get(reference)
    except RayError as lost:
        return TrainingError(f"its Ray task was lost ({first_line(lost)})", log=None)
    return error


def _check_demand(resources: StudentResources) -> None:
    cpus, gpus = student_cpus(resources), resources.gpus
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        have = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ResourceError(
            f"a student wants {cpus} CPU and {gpus:g} GPU (students.cpus, students.gpus), and no node has "
            f"them; there are {have or 'no nodes'}"
        )
