"""The actors of one teacher: started, given shards, watched, replaced and dismissed.

Nothing here calls Ray: an actor is whatever has ``ActorEnd``'s methods, and time is an argument.

Invariants (tests/precompute/test_crew.py; with real actors tests/precompute/test_pool.py):
    1. At most two shards are at one actor, and a second one only while no other actor is idle.
    2. A lost actor is blamed on the shard that it was computing; the one behind goes back unblamed.
    3. Actors beyond the open shards are dismissed at once, so that the next teacher gets their CPUs.
    4. An actor without a sign of life for the stall timeout is replaced; one that waits for
       resources is not stalled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from precompute.actors import Call, Failure, Loss, Outcome
from precompute.driver_commit import commit_receipt
from precompute.events import ProgressEvent, TeacherState
from precompute.poison import describe_poison
from precompute.queue import PoisonShard, ShardQueue, TeacherQueue
from precompute.tasks import ShardJob, ShardReceipt
from schemas.errors import TeacherError, TmkdError
from schemas.recipe import StoreOptions

_MAX_IN_FLIGHT = 2
_BEAT_S = 2.0
# Actors lost in a row before the model was loaded, after which the teacher is given up.
_MAX_START_LOSSES = 3
_REPLACE_WAIT_S = 1.0
_RELOAD_WAIT_S = 1.0


class ActorEnd(Protocol):
    """The driver's end of an actor; ``precompute.actors.RemoteActor`` is the real one."""

    calls: dict[Any, Call]

    def ask(self, call: Call, *, behind_another: bool = False) -> None:
        """Sends a call."""

    def collect(self, reference: Any) -> tuple[Call, Outcome]:
        """Fetches the answer to a call."""

    def kill(self) -> None:
        """Ends the actor at once."""


@dataclass
class Member:
    """One actor of a crew.

    Attributes:
        state: ``placing`` until it has its resources, ``loading`` the teacher, then ``ready``.
        alive_s: When it last gave a sign of life; while it loads, when that began.
        next_load_s: While Ray restarts it: when to ask it again to load.
        jobs: Shards at it, the one under way first.
        num_rows_seen: Rows that it says it has done.
        num_rows_settled: Those of them that belong to shards that have ended.
    """

    actor: ActorEnd
    alive_s: float
    state: Literal["placing", "loading", "ready"] = "placing"
    beat_s: float = 0.0
    next_load_s: float | None = None
    jobs: list[ShardJob] = field(default_factory=list)
    num_rows_seen: int = 0
    num_rows_settled: int = 0


class Crew:
    """The supervised actors of one teacher.

    Attributes:
        members: Its actors.
        jobs: Its shards.
        receipts: Of the shards done.
        failure: What ended the whole teacher early, if something did.
    """

    def __init__(
        self,
        queue: TeacherQueue,
        options: StoreOptions,
        hire: Callable[[], ActorEnd],
        report: Callable[[ProgressEvent], None],
    ) -> None:
        self.queue = queue
        self.members: list[Member] = []
        self.jobs = ShardQueue(queue.jobs, options.max_attempts)
        self.receipts: list[ShardReceipt] = []
        self.num_replaced = 0
        self.failure: TmkdError | None = None
        self._options = options
        self._hire = hire
        self._report = report
        self._num_start_losses = 0
        self._num_setbacks = 0
        self._hire_after_s = 0.0
        self._last_event: ProgressEvent | None = None

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to try."""
        return self.failure is not None or self.jobs.num_open == 0

    @property
    def num_placed(self) -> int:
        """Actors that have their resources."""
        return sum(member.state != "placing" for member in self.members)

    def error(self) -> TmkdError | None:
        """Returns why the teacher is not complete, once the crew is finished."""
        if self.failure is not None:
            return self.failure
        return describe_poison(self.queue.name, self.jobs.poison) if self.jobs.poison else None

    def advance(self, now_s: float) -> None:
        """Does what is due: dismissals, replacements, new actors, shards, and the watchdog's round."""
        for member in list(self.members):
            self._watch(member, now_s)
        self._staff(now_s)
        self._dispatch(now_s)
        if self.is_finished:
            self.dismiss()
        self.tell()

    def dismiss(self) -> None:
        """Ends all actors."""
        while self.members:
            self.members.pop().actor.kill()

    def tell(self, note: str = "") -> None:
        """Reports how far the teacher is, if anything has changed."""
        queue, before = self.queue, self.queue.num_rows_before
        done = sum(receipt.num_rows + receipt.num_excluded for receipt in self.receipts)
        under_way = sum(_rows_under_way(member) for member in self.members)
        num_jobs = len(queue.jobs)
        event = ProgressEvent(
            teacher=queue.name,
            state=self._state(),
            num_shards_done=queue.num_shards_before + len(self.receipts),
            num_shards=queue.num_shards_before + num_jobs,
            num_rows_done=before + done + under_way,
            num_rows=before + sum(job.task.num_rows for job in queue.jobs),
            num_rows_before=before,
            note=note,
        )
        if event != self._last_event:
            self._last_event = event
            self._report(event)

    def receive(self, member: Member, call: Call, outcome: Outcome, now_s: float) -> None:
        """Takes an actor's answer to a call."""
        if isinstance(outcome, Loss):
            self._lose(member, outcome, now_s)
            return
        if call == "beat":
            if isinstance(outcome, int) and outcome != member.num_rows_seen:
                member.num_rows_seen = outcome
                member.alive_s = now_s
            return
        member.alive_s = now_s
        if isinstance(call, ShardJob):
            self._settle(member, call, outcome, now_s)
        elif isinstance(outcome, Failure):
            self._fail_start(member, outcome, now_s)
        elif call == "place":
            self._load(member, now_s)
        else:
            member.state = "ready"
            self._num_start_losses = 0

    def _state(self) -> TeacherState:
        if self.is_finished:
            return "failed" if self.failure or self.jobs.poison else "done"
        states = {member.state for member in self.members}
        if "ready" in states:
            return "running"
        return "loading" if "loading" in states else "waiting"

    def _load(self, member: Member, now_s: float) -> None:
        member.state = "loading"
        member.alive_s = now_s
        member.actor.ask("load")

    def _staff(self, now_s: float) -> None:
        idle = [member for member in self.members if not member.jobs]
        num_busy = len(self.members) - len(idle)
        num_wanted = 0 if self.failure else min(self.queue.num_actors, num_busy + self.jobs.num_pending)
        # Those that are furthest from work go first.
        idle.sort(key=lambda member: ("placing", "loading", "ready").index(member.state))
        for member in idle[: max(0, len(self.members) - num_wanted)]:
            self.members.remove(member)
            member.actor.kill()
        while len(self.members) < num_wanted and now_s >= self._hire_after_s:
            member = Member(self._hire(), now_s)
            member.actor.ask("place")
            self.members.append(member)

    def _dispatch(self, now_s: float) -> None:
        for num_at_once in range(1, _MAX_IN_FLIGHT + 1):
            for member in self.members:
                num_idle = sum(not other.jobs for other in self.members)
                spare = num_at_once == 1 or self.jobs.num_pending > num_idle
                if member.state != "ready" or len(member.jobs) >= num_at_once or not spare:
                    continue
                job = self.jobs.take(now_s)
                if job is None:
                    return
                if not member.jobs:
                    member.alive_s = now_s
                member.actor.ask(job, behind_another=bool(member.jobs))
                member.jobs.append(job)

    def _watch(self, member: Member, now_s: float) -> None:
        silent_s = now_s - member.alive_s
        if member.state == "loading" and silent_s > self._options.start_timeout_s:
            reason = f"its model was not loaded within {self._options.start_timeout_s:g} s"
            self._lose(member, Loss(f"{reason} (store.start_timeout_s)"), now_s)
        elif member.next_load_s is not None and now_s >= member.next_load_s:
            member.next_load_s = None
            member.actor.ask("load")
        elif member.jobs and silent_s > self._options.stall_timeout_s:
            reason = f"gave no answer for {self._options.stall_timeout_s:g} s (store.stall_timeout_s)"
            self._lose(member, Loss(reason), now_s)
        elif member.jobs and "beat" not in member.actor.calls.values():
            if now_s - member.beat_s < min(_BEAT_S, self._options.stall_timeout_s / 4):
                return
            member.beat_s = now_s
            member.actor.ask("beat")

    def _settle(self, member: Member, job: ShardJob, outcome: Outcome, now_s: float) -> None:
        member.jobs.remove(job)
        if isinstance(outcome, ShardReceipt):
            outcome = commit_receipt(outcome)
            member.num_rows_settled += outcome.num_rows + outcome.num_excluded
            self.jobs.complete(job)
            self.receipts.append(outcome)
            self._num_setbacks = 0
        elif isinstance(outcome, Failure):
            member.num_rows_settled = member.num_rows_seen
            self._fail(member, job, outcome, now_s)

    def _fail(self, member: Member, job: ShardJob, failure: Failure, now_s: float) -> None:
        error = failure.error
        if error is not None and not isinstance(error, TeacherError):
            # The disk, the corpus or the store: another try at this shard changes nothing.
            self.failure = error
            return
        if error is None:
            error = TeacherError(failure.summary, teacher=self.queue.name, shard=job.task.shard)
            # An unforeseen error may leave a process behind that can do nothing any more (CUDA).
            self._remove(member)
            self.tell(f"teacher {self.queue.name}: actor replaced ({failure.summary})")
        self.jobs.fail(job, error, now_s)
        self._count_setback(job, error)

    def _fail_start(self, member: Member, failure: Failure, now_s: float) -> None:
        if failure.error is not None:
            self._remove(member)
            self.failure = failure.error
        else:
            self._lose(member, Loss(failure.summary), now_s)

    def _lose(self, member: Member, loss: Loss, now_s: float) -> None:
        """Takes the jobs of an actor that is gone away from it, and replaces it."""
        jobs, member.jobs = member.jobs, []
        member.num_rows_seen = member.num_rows_settled = 0
        member.actor.calls.clear()
        if jobs:
            error = TeacherError(
                f"the actor was lost ({loss.reason})", teacher=self.queue.name, shard=jobs[0].task.shard
            )
            if loss.preempted:
                self.jobs.put_back(jobs[0])
            else:
                self.jobs.lose(jobs[0], error, now_s)
                self._count_setback(jobs[0], error)
            for job in jobs[1:]:
                self.jobs.put_back(job)
        elif member.state != "ready" and not loss.restarting:
            self._count_start_loss(loss)
        if loss.restarting:
            # It refuses calls until it is back; the time that it may take is that of a start.
            member.next_load_s = now_s + _RELOAD_WAIT_S
            if member.state == "loading":
                return
            member.state = "loading"
            member.alive_s = now_s
        else:
            self._remove(member)
            self._hire_after_s = now_s + (0.0 if jobs else _REPLACE_WAIT_S)
        done = "restarted" if loss.restarting else "replaced"
        self.tell(f"teacher {self.queue.name}: actor {done} ({loss.reason})")

    def _remove(self, member: Member) -> None:
        for job in member.jobs:
            self.jobs.put_back(job)
        member.jobs = []
        self.members.remove(member)
        member.actor.kill()
        self.num_replaced += 1

    def _count_start_loss(self, loss: Loss) -> None:
        self._num_start_losses += not loss.preempted
        if self._num_start_losses >= max(_MAX_START_LOSSES, self._options.max_attempts):
            self.failure = TeacherError(
                f"its actors are lost before the model is loaded, {self._num_start_losses} times in a row: "
                f"{loss.reason}; see whether the memory of a node holds the model",
                teacher=self.queue.name,
            )

    def _count_setback(self, job: ShardJob, error: TeacherError) -> None:
        """Gives the teacher up if it fails on shard after shard and none ever succeeded."""
        self._num_setbacks += 1
        if not self.jobs.num_done and self._num_setbacks >= 4 * self._options.max_attempts:
            poison = [*self.jobs.poison, PoisonShard(job, self._num_setbacks, error)]
            self.failure = describe_poison(self.queue.name, poison)


def _rows_under_way(member: Member) -> int:
    limit = member.jobs[0].task.num_rows if member.jobs else 0
    return max(0, min(limit, member.num_rows_seen - member.num_rows_settled))
