"""A worker without torch that fills a real store inside a Ray actor, and is ended or held at a step.

What happens, and at which step of which shards, stands in the teacher's model path, since that is all
that an actor gets: ``action@point@shard,shard``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from precompute.queue import TeacherQueue
from precompute.store_writer import StoreWriter
from precompute.tasks import ShardJob, ShardReceipt, WorkerSpec
from schemas.fault_points import FaultPoint
from schemas.recipe import Teacher
from tests.reliability.store_runs import SMALL, Shape, at_step, kill_self, make_batches, make_identity

_HOLD_S = 60.0
GO_FILE = "go"


def marks_of(store_root: str) -> Path:
    """Returns the directory where the workers of a store leave what happened."""
    return Path(f"{store_root}-marks")


@dataclass(frozen=True)
class ActorFault:
    """What happens in the actors of a queue, once for each of the shards.

    Attributes:
        action: ``kill``: SIGKILL; ``hang``: no sign of life; ``wait``: until ``GO_FILE`` is beside the
            store; ``none``.
        point: When.
        shards: At these.
    """

    action: str
    point: FaultPoint
    shards: tuple[int, ...]

    def encode(self) -> str:
        """Returns the model path that says so."""
        return f"{self.action}@{self.point}@{','.join(map(str, self.shards))}"

    @classmethod
    def parse(cls, text: str) -> ActorFault:
        """Reads what ``encode`` wrote."""
        action, point, shards = text.split("@")
        return cls(action, FaultPoint(point), tuple(int(shard) for shard in shards.split(",")))


class StoreWorker:
    """Does with a store what ``precompute.worker.ShardWorker`` does."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.num_rows_done = 0
        self._fault = ActorFault.parse(spec.model_path)

    def load(self) -> None:
        """Loads nothing."""

    def prefetch(self, job: ShardJob) -> None:
        """Prepares nothing."""

    def process(self, job: ShardJob) -> ShardReceipt:
        """Writes a shard, unless it is there."""
        store = StoreWriter.attach(job.store_root)
        shard = job.task.shard
        record, committed = store.find_commit(shard, job.revision), False
        if record is None:
            step = (self._fault.point, 0) if shard in self._fault.shards else None
            with at_step(step, self._strike(job)):
                batches = make_batches(store, job.task, job.batch_rows)
                record, committed = store.write_shard(job.task, batches, revision=job.revision)
            if step is not None:
                (marks_of(job.store_root) / f"outlived-{shard}").touch()
        self.num_rows_done += job.task.num_rows
        return ShardReceipt(job.store_root, shard, record.num_rows, 0, 1, 1, 0.1, 0.1, committed)

    def _strike(self, job: ShardJob) -> Callable[[], None]:
        mark = marks_of(job.store_root) / f"{self._fault.action}-{job.task.shard}"

        def strike() -> None:
            if mark.exists() or self._fault.action == "none":
                return
            mark.write_text(str(os.getpid()))
            if self._fault.action == "kill":
                kill_self()
            deadline_s = time.monotonic() + _HOLD_S
            go = Path(job.store_root).parent / GO_FILE
            while time.monotonic() < deadline_s and not (self._fault.action == "wait" and go.exists()):
                time.sleep(0.005)

        return strike


def make_store_worker(spec: WorkerSpec) -> StoreWorker:
    """Makes the worker inside an actor."""
    return StoreWorker(spec)


def make_queues(
    directory: Path, action: str, points: Sequence[FaultPoint], shards: tuple[int, ...], shape: Shape = SMALL
) -> list[TeacherQueue]:
    """Opens a store for each point and returns what is pending there."""
    queues = []
    plan = shape.plan()
    for point in points:
        root = directory / point
        marks_of(str(root)).mkdir(exist_ok=True)
        store = StoreWriter.open(root, make_identity(plan), plan)
        committed = store.committed_shards()
        teacher = Teacher(name=f"{action}-{point}", model="fake")
        fault = ActorFault(action, point, shards)
        jobs = tuple(
            ShardJob(str(root), "rows.arrow", "toy/train", task, batch_rows=shape.batch_rows)
            for task in plan.tasks()
            if task.shard not in committed
        )
        spec = WorkerSpec(teacher, fault.encode(), None, num_threads=1)
        # All actors at once on one CPU: they mostly wait.
        queues.append(TeacherQueue(spec, jobs, num_actors=1, cpus_per_actor=1 / 16))
    return queues
