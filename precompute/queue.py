"""The driver's queue of shard jobs: which to give out, which failed, which are poison.

A pure state machine: no clock, no Ray. Times are seconds of any monotonic clock.

Invariants (tests/precompute/test_queue.py):
    1. A job is pending, given out, done or quarantined: never two of them, never none.
    2. An error of the job counts against its attempts; a lost actor counts apart, and a job that
       was only waiting behind another one is not blamed.
    3. A job that failed ``max_attempts`` times, or took its actor with it as often (at least
       twice), is quarantined; the others go on.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from precompute.tasks import AnyWorkerSpec, ShardJob
from schemas.errors import TeacherError

_MAX_BACKOFF_S = 30.0
# One lost actor may be a preempted machine, whatever the limit for errors is.
_MIN_LOSSES = 2


@dataclass(frozen=True, slots=True)
class TeacherQueue:
    """What one teacher has to do.

    Attributes:
        spec: The teacher.
        jobs: Its pending shards, over all of its stores.
        num_actors: The most actors at once; never more than jobs are started.
        cpus_per_actor, gpus_per_actor: What one actor reserves in the cluster.
        num_shards_before, num_rows_before: Committed earlier, for the progress alone.
    """

    spec: AnyWorkerSpec
    jobs: tuple[ShardJob, ...]
    num_actors: int
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0
    num_shards_before: int = 0
    num_rows_before: int = 0

    @property
    def name(self) -> str:
        """The teacher's name."""
        return self.spec.teacher.name


@dataclass(frozen=True, slots=True)
class PoisonShard:
    """A job that was given up.

    Attributes:
        num_tries: How often it failed.
        error: Its last error.
    """

    job: ShardJob
    num_tries: int
    error: TeacherError


class ShardQueue:
    """Jobs of one teacher."""

    def __init__(self, jobs: Sequence[ShardJob], max_attempts: int, *, backoff_s: float = 0.5) -> None:
        """Fills the queue.

        Args:
            jobs: To do, in order.
            max_attempts: Errors of one job after which it is quarantined.
            backoff_s: Wait before the first retry; doubled for each further one.
        """
        self.poison: list[PoisonShard] = []
        self.num_done = 0
        self._max_attempts = max_attempts
        self._max_losses = max(max_attempts, _MIN_LOSSES)
        self._backoff_s = backoff_s
        # (earliest time, place, job); the place is unique, so that jobs are never compared.
        self._pending: list[tuple[float, int, ShardJob]] = [(0.0, i, job) for i, job in enumerate(jobs)]
        self._given_out: dict[ShardJob, int] = {}
        self._errors: Counter[ShardJob] = Counter()
        self._losses: Counter[ShardJob] = Counter()

    @property
    def num_pending(self) -> int:
        """Jobs that nobody works on, those that wait for a retry included."""
        return len(self._pending)

    @property
    def num_open(self) -> int:
        """Jobs that are neither done nor quarantined."""
        return len(self._pending) + len(self._given_out)

    def take(self, now_s: float) -> ShardJob | None:
        """Gives out the next job that is due, if there is one."""
        if not self._pending or self._pending[0][0] > now_s:
            return None
        _, place, job = heapq.heappop(self._pending)
        self._given_out[job] = place
        return job

    def complete(self, job: ShardJob) -> None:
        """Takes a job off the list: it is committed."""
        del self._given_out[job]
        self.num_done += 1

    def put_back(self, job: ShardJob) -> None:
        """Takes back a job that was not begun, to its old place."""
        heapq.heappush(self._pending, (0.0, self._given_out.pop(job), job))

    def fail(self, job: ShardJob, error: TeacherError, now_s: float) -> None:
        """Counts an error of the job itself: a later try, or the quarantine."""
        self._errors[job] += 1
        self._retry(job, error, now_s, exhausted=self._errors[job] >= self._max_attempts)

    def lose(self, job: ShardJob, error: TeacherError, now_s: float) -> None:
        """Counts that the job's actor died or hung under it: a later try, or the quarantine."""
        self._losses[job] += 1
        self._retry(job, error, now_s, exhausted=self._losses[job] >= self._max_losses)

    def _retry(self, job: ShardJob, error: TeacherError, now_s: float, *, exhausted: bool) -> None:
        place = self._given_out.pop(job)
        num_tries = self._errors[job] + self._losses[job]
        if exhausted:
            self.poison.append(PoisonShard(job, num_tries, error))
            return
        wait_s = min(self._backoff_s * 2.0 ** (num_tries - 1), _MAX_BACKOFF_S)
        heapq.heappush(self._pending, (now_s + wait_s, place, job))
