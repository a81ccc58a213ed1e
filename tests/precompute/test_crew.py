"""The supervision of one teacher's actors, with actors and a clock of the test's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from precompute.actors import Call, Failure, Loss, Outcome
from precompute.crew import Crew, Member
from precompute.events import ProgressEvent
from precompute.queue import TeacherQueue
from precompute.tasks import ShardJob, ShardReceipt
from schemas.errors import CorpusError, ResourceError, TeacherError
from schemas.recipe import StoreOptions
from tests.precompute.fake_workers import ROWS, make_jobs, make_spec

OPTIONS = StoreOptions(max_attempts=2, stall_timeout_s=100, start_timeout_s=50)


class StubActor:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: dict[Any, Call] = {}
        self.asked: list[Call] = []
        self.prefetched: list[ShardJob] = []
        self.killed = False

    def ask(self, call: Call, *, behind_another: bool = False) -> None:
        self.calls[object()] = call
        self.asked.append(call)
        if behind_another and isinstance(call, ShardJob):
            self.prefetched.append(call)

    def collect(self, reference: Any) -> tuple[Call, Outcome]:
        raise NotImplementedError

    def kill(self) -> None:
        self.killed = True


class Stage:
    """A crew, its actors, and answers on their behalf."""

    def __init__(self, num_jobs: int, num_actors: int, options: StoreOptions = OPTIONS) -> None:
        self.jobs = make_jobs(Path("/tmp"), num_jobs)
        self.actors: list[StubActor] = []
        self.events: list[ProgressEvent] = []
        queue = TeacherQueue(make_spec("t"), self.jobs, num_actors)
        self.crew = Crew(queue, options, self.hire, self.events.append)

    def hire(self) -> StubActor:
        self.actors.append(StubActor())
        return self.actors[-1]

    def member(self, actor: int) -> Member:
        return next(m for m in self.crew.members if m.actor is self.actors[actor])

    def answer(self, actor: int, call: Call, outcome: Outcome = None, at_s: float = 0.0) -> None:
        calls = self.actors[actor].calls
        del calls[next(key for key, value in calls.items() if value == call)]
        self.crew.receive(self.member(actor), call, outcome, at_s)

    def make_ready(self, *actors: int, at_s: float = 0.0) -> None:
        for actor in actors:
            self.answer(actor, "place", at_s=at_s)
            self.answer(actor, "load", at_s=at_s)
        self.crew.advance(at_s)

    def finish(self, actor: int, job: ShardJob, at_s: float = 0.0) -> None:
        receipt = ShardReceipt(job.store_root, job.task.shard, ROWS, 0, 1, 1, 1.0, 1.0, committed=True)
        self.answer(actor, job, receipt, at_s)

    def shards(self, actor: int) -> list[int]:
        return [job.task.shard for job in self.member(actor).jobs]


def test_two_shards_are_at_each_actor_and_the_second_is_prepared_ahead() -> None:
    stage = Stage(num_jobs=9, num_actors=2)
    stage.crew.advance(0.0)
    stage.make_ready(0, 1)
    assert (stage.shards(0), stage.shards(1)) == ([0, 2], [1, 3])
    assert stage.actors[0].prefetched == [stage.jobs[2]]


def test_no_shard_waits_behind_another_while_an_actor_starts_that_could_take_it() -> None:
    stage = Stage(num_jobs=3, num_actors=2)
    stage.crew.advance(0.0)
    stage.make_ready(0)
    assert stage.shards(0) == [0, 1]
    stage = Stage(num_jobs=2, num_actors=2)
    stage.crew.advance(0.0)
    stage.make_ready(0)
    assert stage.shards(0) == [0]


def test_no_more_actors_than_shards_are_started_and_idle_ones_go_at_once() -> None:
    stage = Stage(num_jobs=2, num_actors=5)
    stage.crew.advance(0.0)
    assert len(stage.actors) == 2
    stage.make_ready(0, 1)
    stage.finish(0, stage.jobs[0])
    stage.crew.advance(0.0)
    assert [actor.killed for actor in stage.actors] == [True, False]
    stage.finish(1, stage.jobs[1])
    stage.crew.advance(0.0)
    assert stage.crew.is_finished
    assert [actor.killed for actor in stage.actors] == [True, True]
    assert stage.events[-1].state == "done"


def test_an_actor_that_waits_for_resources_is_not_stalled() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    for now_s in (0.0, 1e4, 1e6):
        stage.crew.advance(now_s)
    assert len(stage.actors) == 1
    assert stage.events[-1].state == "waiting"


def test_a_silent_actor_is_replaced_and_only_the_shard_under_way_is_blamed() -> None:
    stage = Stage(num_jobs=2, num_actors=1)
    stage.crew.advance(0.0)
    stage.make_ready(0)
    assert stage.shards(0) == [0, 1]
    stage.crew.advance(99.0)
    assert not stage.actors[0].killed
    stage.crew.advance(101.0)
    assert stage.actors[0].killed
    assert "no answer for 100 s" in next(e.note for e in stage.events if e.note)
    stage.make_ready(1, at_s=101.0)
    # The first one waits for its backoff, the second one keeps its place.
    assert stage.shards(1) == [1]


def test_rows_that_go_on_are_a_sign_of_life_and_an_answer_without_progress_is_none() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    stage.crew.advance(0.0)
    stage.make_ready(0)
    stage.crew.advance(90.0)
    stage.answer(0, "beat", 2, at_s=90.0)
    stage.crew.advance(180.0)
    assert not stage.actors[0].killed
    assert stage.events[-1].num_rows_done == 2
    stage.answer(0, "beat", 2, at_s=180.0)
    stage.crew.advance(191.0)
    assert stage.actors[0].killed


def test_a_restarting_actor_is_asked_to_load_until_it_is_back_and_its_shards_go_back() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    stage.crew.advance(0.0)
    stage.make_ready(0)
    restarting = Loss("unavailable", restarting=True)
    stage.answer(0, stage.jobs[0], restarting, at_s=1.0)
    for now_s in (2.0, 3.0, 4.0, 5.0, 6.0):
        stage.crew.advance(now_s)
        stage.answer(0, "load", restarting, at_s=now_s)
    stage.crew.advance(7.0)
    stage.answer(0, "load", at_s=7.0)
    stage.crew.advance(9.0)
    assert stage.shards(0) == [0]
    assert len(stage.actors) == 1
    assert len([event for event in stage.events if "restarted" in event.note]) == 1


def test_an_actor_that_never_comes_back_from_its_restart_is_replaced() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    stage.crew.advance(0.0)
    stage.make_ready(0)
    restarting = Loss("unavailable", restarting=True)
    stage.answer(0, stage.jobs[0], restarting, at_s=1.0)
    for second in range(2, 53):
        stage.crew.advance(float(second))
        if "load" in stage.actors[0].calls.values():
            stage.answer(0, "load", restarting, at_s=float(second))
    assert stage.actors[0].killed


def test_preempted_machines_never_make_a_shard_poison() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    for time_s in range(20):
        stage.crew.advance(float(time_s))
        stage.make_ready(time_s, at_s=float(time_s))
        stage.answer(time_s, stage.jobs[0], Loss("node gone", preempted=True), at_s=float(time_s))
    assert not stage.crew.is_finished


def test_a_model_that_takes_too_long_to_load_is_given_up_after_three_actors() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    for actor in range(3):
        now_s = actor * 100.0
        stage.crew.advance(now_s)
        stage.answer(actor, "place", at_s=now_s)
        stage.crew.advance(now_s + 49.0)
        assert not stage.actors[actor].killed
        stage.crew.advance(now_s + 51.0)
        assert stage.actors[actor].killed
    error = stage.crew.error()
    assert isinstance(error, TeacherError)
    assert "not loaded within 50 s" in str(error)


def test_a_teacher_whose_actors_die_while_they_load_is_given_up_after_three() -> None:
    stage = Stage(num_jobs=1, num_actors=1)
    for actor in range(3):
        assert stage.crew.error() is None
        stage.crew.advance(actor * 10.0)
        stage.answer(actor, "place", at_s=actor * 10.0)
        stage.answer(actor, "load", Loss("out of memory"), at_s=actor * 10.0)
    assert "lost before the model is loaded, 3 times in a row: out of memory" in str(stage.crew.error())


def test_what_is_not_the_shards_fault_ends_the_teacher_without_another_try() -> None:
    for error in (ResourceError("full"), CorpusError("changed", corpus="c")):
        stage = Stage(num_jobs=3, num_actors=1)
        stage.crew.advance(0.0)
        stage.make_ready(0)
        stage.answer(0, stage.jobs[0], Failure(error, str(error), ""))
        stage.crew.advance(0.0)
        assert stage.crew.error() is error
        assert stage.actors[0].killed
        assert stage.events[-1].state == "failed"


def test_a_teacher_that_fails_on_everything_is_given_up_before_all_shards_are_tried() -> None:
    stage = Stage(num_jobs=1000, num_actors=1)
    error = TeacherError("bad", teacher="t", shard=0)
    now_s, num_tries = 0.0, 0
    stage.crew.advance(now_s)
    stage.make_ready(0)
    while not stage.crew.is_finished:
        stage.answer(0, stage.member(0).jobs[0], Failure(error, "bad", ""), at_s=now_s)
        num_tries += 1
        stage.crew.advance(now_s)
    assert num_tries == 8
    assert isinstance(stage.crew.error(), TeacherError)
