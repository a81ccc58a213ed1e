"""Workers without torch for the tests of the pool: what a shard does is in its part's name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from precompute.tasks import ShardJob, ShardReceipt, WorkerSpec
from schemas.errors import ResourceError, TeacherError
from schemas.plan import ShardTask
from schemas.recipe import Teacher

ROWS = 4


def make_spec(name: str, model: str = "fake") -> WorkerSpec:
    return WorkerSpec(Teacher(name=name, model=model), model, None, num_threads=1)


def make_jobs(
    directory: Path, num_jobs: int, behaviours: dict[int, str] | None = None
) -> tuple[ShardJob, ...]:
    """Jobs whose ``part`` is ``toy/<behaviour>``; the store root is where a fake leaves its marks."""
    directory.mkdir(parents=True, exist_ok=True)
    return tuple(
        ShardJob(
            store_root=str(directory),
            rows_path=str(directory / "rows.arrow"),
            part=f"toy/{(behaviours or {}).get(shard, 'plain')}",
            task=ShardTask(shard, shard * ROWS, (shard + 1) * ROWS),
        )
        for shard in range(num_jobs)
    )


class FakeWorker:
    """Leaves a file per shard and attempt, and behaves as the job's part says.

    ``kill``: SIGKILL of its own process at the first try; ``hang``: sleeps at the first try;
    ``poison``: a TeacherError each time; ``flaky``: an unforeseen error at the first try; ``full``: a
    full disk; ``slow``: half a second; ``advance``: two seconds with signs of life.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.num_rows_done = 0
        self.spec = spec
        self.prefetched: list[int] = []

    def load(self) -> None:
        if self.spec.model_path == "missing":
            raise TeacherError("cannot be loaded", teacher=self.spec.teacher.name)

    def prefetch(self, job: ShardJob) -> None:
        self.prefetched.append(job.task.shard)

    def process(self, job: ShardJob) -> ShardReceipt:
        root, shard = Path(job.store_root), job.task.shard
        attempt = len(list(root.glob(f"try-{shard}-*")))
        (root / f"try-{shard}-{attempt}-{os.getpid()}").touch()
        self._behave(job.part.removeprefix("toy/"), attempt, shard)
        self.num_rows_done += ROWS
        (root / f"done-{shard}-{self.spec.teacher.name}").touch()
        return ShardReceipt(job.store_root, shard, ROWS, 0, 10, 12, 0.1, 0.1, committed=True)

    def _behave(self, behaviour: str, attempt: int, shard: int) -> None:
        first = attempt == 0
        if behaviour == "kill" and first:
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "hang" and first:
            time.sleep(120)
        if behaviour == "poison":
            raise TeacherError(
                "logits are not finite", teacher=self.spec.teacher.name, shard=shard, example_ids=["toy/9"]
            )
        if behaviour == "flaky" and first:
            raise RuntimeError("device-side assert\nsecond line")
        if behaviour == "full":
            raise ResourceError("/s: the disk is full")
        if behaviour == "slow":
            time.sleep(0.5)
        if behaviour == "advance":
            for _ in range(20):
                time.sleep(0.1)
                self.num_rows_done += 1
            self.num_rows_done -= 20
