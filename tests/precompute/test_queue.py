"""The queue of shard jobs, without Ray and without a clock."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from precompute.queue import ShardQueue
from schemas.errors import TeacherError
from tests.precompute.fake_workers import make_jobs

JOBS = make_jobs(Path("/tmp"), 4)
ERROR = TeacherError("bad", teacher="t", shard=0)


def test_jobs_are_given_out_once_and_in_order() -> None:
    queue = ShardQueue(JOBS, 3)
    assert [queue.take(0.0) for _ in range(5)] == [*JOBS, None]
    assert queue.num_open == 4
    for job in JOBS:
        queue.complete(job)
    assert (queue.num_open, queue.num_done) == (0, 4)


def test_a_failed_job_comes_back_after_its_backoff_behind_the_fresh_ones() -> None:
    queue = ShardQueue(JOBS[:2], 3, backoff_s=1.0)
    first = queue.take(10.0)
    assert first is not None
    queue.fail(first, ERROR, 10.0)
    assert queue.take(10.0) == JOBS[1]
    assert queue.take(10.9) is None
    assert queue.take(11.0) == JOBS[0]
    queue.fail(first, ERROR, 11.0)
    assert queue.take(12.9) is None
    assert queue.take(13.0) == JOBS[0]


def test_a_job_is_quarantined_at_its_attempt_limit_and_the_others_go_on() -> None:
    queue = ShardQueue(JOBS[:2], 2, backoff_s=1.0)
    assert (queue.take(0.0), queue.take(0.0)) == JOBS[:2]
    queue.fail(JOBS[0], ERROR, 0.0)
    assert not queue.poison
    assert queue.take(1.0) == JOBS[0]
    queue.fail(JOBS[0], ERROR, 1.0)
    assert [(item.job, item.num_tries) for item in queue.poison] == [(JOBS[0], 2)]
    queue.complete(JOBS[1])
    assert (queue.num_done, queue.num_open) == (1, 0)


def test_lost_actors_do_not_count_as_errors_of_the_job() -> None:
    queue = ShardQueue(JOBS[:1], 2, backoff_s=0.0)
    for step in (queue.fail, queue.lose):
        job = queue.take(0.0)
        assert job is not None
        step(job, ERROR, 0.0)
    assert not queue.poison
    assert queue.take(0.0) == JOBS[0]


def test_a_job_that_takes_its_actor_with_it_each_time_is_poison_too() -> None:
    queue = ShardQueue(JOBS[:1], 1, backoff_s=0.0)
    for num_before in (0, 1):
        assert len(queue.poison) == 0, num_before
        job = queue.take(0.0)
        assert job is not None
        queue.lose(job, ERROR, 0.0)
    assert len(queue.poison) == 1


def test_a_job_that_was_put_back_takes_its_old_place() -> None:
    queue = ShardQueue(JOBS, 3)
    first, second = queue.take(0.0), queue.take(0.0)
    assert first is not None
    assert second is not None
    queue.put_back(first)
    assert queue.take(0.0) == first


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["take", "complete", "fail", "lose", "put_back"]), max_size=60))
def test_no_job_is_ever_lost_or_doubled(steps: list[str]) -> None:
    queue = ShardQueue(JOBS, 2, backoff_s=0.0)
    held = []
    for step in steps:
        if step == "take":
            job = queue.take(0.0)
            if job is not None:
                held.append(job)
        elif held:
            job = held.pop(0)
            if step in {"fail", "lose"}:
                getattr(queue, step)(job, ERROR, 0.0)
            else:
                getattr(queue, step)(job)
    assert len(set(held)) == len(held)
    assert queue.num_done + queue.num_open + len(queue.poison) == len(JOBS)
    assert queue.num_open == queue.num_pending + len(held)
