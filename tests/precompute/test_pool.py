"""The pool on a real local Ray with fake workers."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from precompute.actors import Worker
from precompute.demand import check_demand
from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.pool import PoolReport, run_pool
from precompute.queue import TeacherQueue
from precompute.tasks import WorkerSpec
from schemas.errors import ResourceError, TeacherError
from schemas.recipe import StoreOptions
from tests.precompute.fake_workers import ROWS, FakeWorker, make_jobs, make_spec

pytestmark = pytest.mark.usefixtures("local_ray")

OPTIONS = StoreOptions(max_attempts=2, stall_timeout_s=60, start_timeout_s=60)


def make_worker(spec: WorkerSpec) -> Worker:
    return FakeWorker(spec)


class Run:
    """A pool run and what it reported."""

    def __init__(self) -> None:
        self.events: list[ProgressEvent] = []
        self.stop = StopFlag()

    def __call__(self, *queues: TeacherQueue, options: StoreOptions = OPTIONS) -> PoolReport:
        return run_pool(
            queues, options, on_progress=self.events.append, stop=self.stop, worker_factory=make_worker
        )


@pytest.fixture
def run() -> Run:
    return Run()


def make_queue(directory: Path, num_jobs: int, behaviours: dict[int, str] | None = None, **kwargs: object):
    fields = {"spec": make_spec("t"), "num_actors": 1, "cpus_per_actor": 1.0} | kwargs
    return TeacherQueue(jobs=make_jobs(directory, num_jobs, behaviours), **fields)  # type: ignore[arg-type]


def done(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("done-*")}


def tries(directory: Path, shard: int) -> list[int]:
    """Process ids of the attempts at a shard."""
    return [int(path.name.rsplit("-", 1)[1]) for path in sorted(directory.glob(f"try-{shard}-*"))]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_teachers_share_the_cluster_and_do_every_shard_once(tmp_path: Path, run: Run) -> None:
    one = make_queue(tmp_path / "one", 7, spec=make_spec("one"), num_actors=2)
    # Needs both CPUs: it can only start once the first teacher's actors are gone.
    two = make_queue(tmp_path / "two", 3, spec=make_spec("two"), cpus_per_actor=2.0)
    report = run(one, two)
    assert len(done(tmp_path / "one")) == 7
    assert len(done(tmp_path / "two")) == 3
    assert sorted((r.store_root, r.shard) for r in report.receipts) == sorted(
        (job.store_root, job.task.shard) for job in one.jobs + two.jobs
    )
    assert all(len(tries(tmp_path / "one", shard)) == 1 for shard in range(7))
    assert not report.stopped
    assert report.num_replaced == 0
    last = {event.teacher: event for event in run.events}
    assert [(e.state, e.num_shards_done, e.num_rows_done) for e in last.values()] == [
        ("done", 7, 7 * ROWS),
        ("done", 3, 3 * ROWS),
    ]


def test_an_actor_that_is_killed_in_a_shard_costs_nothing_but_time(tmp_path: Path, run: Run) -> None:
    report = run(make_queue(tmp_path, 5, {1: "kill"}), options=OPTIONS.model_copy(update={"max_attempts": 1}))
    assert len(done(tmp_path)) == 5
    assert len(report.receipts) == 5
    first, second = tries(tmp_path, 1)
    assert first != second


def test_a_hung_actor_is_killed_and_replaced(tmp_path: Path, run: Run) -> None:
    options = OPTIONS.model_copy(update={"stall_timeout_s": 1.5})
    began = time.monotonic()
    report = run(make_queue(tmp_path, 3, {0: "hang"}), options=options)
    assert time.monotonic() - began < 30
    assert len(done(tmp_path)) == 3
    assert report.num_replaced == 1
    assert not is_alive(tries(tmp_path, 0)[0])
    assert any("no answer for 1.5 s" in event.note for event in run.events)


def test_a_shard_longer_than_the_stall_timeout_is_no_stall_while_rows_go_on(tmp_path: Path, run: Run) -> None:
    options = OPTIONS.model_copy(update={"stall_timeout_s": 1.2})
    report = run(make_queue(tmp_path, 1, {0: "advance"}), options=options)
    assert report.num_replaced == 0
    assert len(tries(tmp_path, 0)) == 1


def test_a_poison_shard_is_named_after_all_others_are_done(tmp_path: Path, run: Run) -> None:
    with pytest.raises(TeacherError, match="not finite") as caught:
        run(make_queue(tmp_path, 5, {1: "poison"}))
    assert len(done(tmp_path)) == 4
    assert len(tries(tmp_path, 1)) == 2
    assert (caught.value.teacher, caught.value.shard, caught.value.example_ids) == ("t", 1, ("toy/9",))
    assert caught.value.exit_code == 5
    assert "2 tries" in str(caught.value)


def test_an_unforeseen_error_is_tried_again_in_a_new_process(tmp_path: Path, run: Run) -> None:
    report = run(make_queue(tmp_path, 2, {0: "flaky"}))
    first, second = tries(tmp_path, 0)
    assert first != second
    assert report.num_replaced == 1
    assert any("RuntimeError: device-side assert" in event.note for event in run.events)


def test_a_full_disk_stops_the_run_at_once(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ResourceError, match="disk is full"):
        run(make_queue(tmp_path, 30, {0: "full"} | dict.fromkeys(range(1, 30), "slow")))
    assert len(done(tmp_path)) < 5


def test_a_teacher_that_cannot_be_loaded_fails_typed_and_the_other_one_is_finished(
    tmp_path: Path, run: Run
) -> None:
    bad = make_queue(tmp_path / "bad", 2, spec=make_spec("bad", "missing"))
    good = make_queue(tmp_path / "good", 4)
    with pytest.raises(TeacherError, match="teacher bad: cannot be loaded"):
        run(bad, good)
    assert len(done(tmp_path / "good")) == 4


def test_the_stop_flag_ends_the_run_and_keeps_what_is_done(tmp_path: Path, run: Run) -> None:
    queue = make_queue(tmp_path, 40, dict.fromkeys(range(40), "slow"))

    def stop_after_two() -> None:
        while len(done(tmp_path)) < 2:
            time.sleep(0.05)
        run.stop.set(15)

    thread = threading.Thread(target=stop_after_two)
    thread.start()
    report = run(queue)
    thread.join()
    assert report.stopped
    assert 2 <= len(done(tmp_path)) < 10
    pid = tries(tmp_path, 0)[0]
    for _ in range(50):
        if not is_alive(pid):
            break
        time.sleep(0.1)
    assert not is_alive(pid)


def test_demand_that_no_node_can_hold_is_refused_with_demand_and_supply(tmp_path: Path, run: Run) -> None:
    with pytest.raises(ResourceError, match=r"needs 1 CPU and 1 GPU.*1 node \(2 CPU\)"):
        run(make_queue(tmp_path, 1, gpus_per_actor=1.0))
    assert not list(tmp_path.glob("try-*"))


def test_demand_is_per_node_and_not_the_sum_of_nodes(tmp_path: Path) -> None:
    queue = make_queue(tmp_path, 1, cpus_per_actor=4.0)
    check_demand([queue], [{"CPU": 2.0}, {"CPU": 4.0}])
    with pytest.raises(ResourceError, match="2 nodes"):
        check_demand([queue], [{"CPU": 2.0}, {"CPU": 2.0, "GPU": 8.0}])


def test_an_actor_that_is_never_placed_ends_in_a_clear_error(tmp_path: Path, run: Run) -> None:
    import ray

    @ray.remote(num_cpus=2)
    class Hog:
        def ping(self) -> None: ...

    hog = Hog.remote()
    ray.get(hog.ping.remote())
    try:
        with pytest.raises(ResourceError, match="was started within 1 s"):
            run(make_queue(tmp_path, 1), options=OPTIONS.model_copy(update={"start_timeout_s": 1.0}))
    finally:
        ray.kill(hog)
