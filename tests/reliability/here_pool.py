"""The pool without Ray: real workers of this process, as many as there would be actors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.language_worker import LanguageWorker
from precompute.queue import TeacherQueue
from precompute.tasks import AnyWorkerSpec, LanguageWorkerSpec
from precompute.worker import ShardWorker
from schemas.recipe import StoreOptions


class HerePool:
    """Stands in for ``precompute.pool.run_pool``.

    Attributes:
        stop_after: Shards after which the run is interrupted; None: it goes to its end.
        done: Shard ids that were computed, in order.
    """

    def __init__(self) -> None:
        self.stop_after: int | None = None
        self.done: list[int] = []

    def run_pool(
        self,
        queues: Sequence[TeacherQueue],
        _options: StoreOptions,
        *,
        on_progress: Callable[[ProgressEvent], None],
        stop: StopFlag,
    ) -> None:
        """Gives the jobs out in turn; each worker runs its own, the last worker first."""
        del on_progress
        num_left = self.stop_after
        for queue in queues:
            jobs = deque(queue.jobs)
            workers = [_make_worker(queue.spec) for _ in range(queue.num_actors)]
            try:
                while jobs and not stop.is_set():
                    taken = [jobs.popleft() for _ in workers[: len(jobs)]]
                    for worker, job in reversed(list(zip(workers, taken, strict=False))):
                        if num_left == 0:
                            stop.set()
                            break
                        worker.process(job)
                        self.done.append(job.task.shard)
                        num_left = None if num_left is None else num_left - 1
            finally:
                for worker in workers:
                    worker.close()


def _make_worker(spec: AnyWorkerSpec) -> ShardWorker | LanguageWorker:
    return LanguageWorker(spec) if isinstance(spec, LanguageWorkerSpec) else ShardWorker(spec)
