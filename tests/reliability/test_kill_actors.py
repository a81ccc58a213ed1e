"""Actors and drivers that are killed at every step of the write protocol, on a real Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from cluster.ray_session import ray_session
from precompute.interrupt import StopFlag
from precompute.pool import PoolReport, run_pool
from precompute.queue import TeacherQueue
from precompute.store_writer import StoreWriter
from schemas.recipe import StoreOptions
from tests.reliability.conftest import Tally
from tests.reliability.store_runs import ACTOR_POINTS, check_finished, leftovers, memory_directory
from tests.reliability.store_worker import GO_FILE, make_queues, make_store_worker, marks_of
from tests.reliability.trials import counted

ROOT = Path(__file__).parents[2]
OPTIONS = StoreOptions(max_attempts=3, stall_timeout_s=60, start_timeout_s=90)
AREA = "killed process"
_PATIENCE_S = 90.0

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the whole module."""
    with ray_session(num_cpus=2):
        yield


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as found:
        yield found


def fill(queues: Sequence[TeacherQueue], options: StoreOptions = OPTIONS) -> PoolReport:
    return run_pool(
        queues, options, on_progress=lambda _: None, stop=StopFlag(), worker_factory=make_store_worker
    )


def finish_all(directory: Path, *, num_deaths: int) -> None:
    for point in ACTOR_POINTS:
        StoreWriter.attach(directory / point).finish()
        check_finished(directory / point, where=point)
        # At most a data file, and the temporary file of its record.
        assert len(leftovers(directory / point)) <= 2 * num_deaths, point


def marked(directory: Path, name: str) -> list[Path]:
    """Returns what the workers of all stores left under a name."""
    return [path for point in ACTOR_POINTS for path in marks_of(str(directory / point)).glob(name)]


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.02)


@pytest.mark.parametrize("shards", [(1,), pytest.param((0, 2), marks=pytest.mark.slow)])
def test_an_actor_killed_at_any_step_is_replaced_and_the_run_comes_to_its_end(
    directory: Path, shards: tuple[int, ...], tally: Tally
) -> None:
    num_kills = len(shards) * len(ACTOR_POINTS)
    with counted(tally, AREA, "actor's process killed at each step") as trials, trials.attempt(num_kills):
        report = fill(make_queues(directory, "kill", ACTOR_POINTS, shards))
        assert len(marked(directory, "kill-*")) == num_kills
        # Each shard ends with one receipt, whoever committed it.
        assert len(report.receipts) == 3 * len(ACTOR_POINTS)
        finish_all(directory, num_deaths=len(shards))


@pytest.mark.slow
def test_an_actor_that_hangs_at_any_step_is_killed_by_the_driver_and_replaced(
    directory: Path, tally: Tally
) -> None:
    num_kills = len(ACTOR_POINTS)
    with (
        counted(tally, AREA, "hung actor ended by ray.kill at each step") as trials,
        trials.attempt(num_kills),
    ):
        options = OPTIONS.model_copy(update={"stall_timeout_s": 4.0})
        report = fill(make_queues(directory, "hang", ACTOR_POINTS, (1,)), options)
        hung = marked(directory, "hang-1")
        assert len(hung) == num_kills
        assert report.num_replaced >= num_kills
        wait_until(lambda: not any(psutil.pid_exists(int(path.read_text())) for path in hung), "hung")
        finish_all(directory, num_deaths=1)


def start_driver(directory: Path, shard: int) -> subprocess.Popen[bytes]:
    import ray

    environ = dict(os.environ)
    if "RAY_AUTH_TOKEN" in environ:
        environ["RAY_AUTH_MODE"] = "token"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "tests.reliability.pool_driver", address, str(directory), str(shard)]
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("shard", "head_start_s"),
    # Actors outlive their driver for a moment: with a head start they commit what they have.
    [(1, 0.0), pytest.param(0, 0.0, marks=pytest.mark.slow), pytest.param(2, 0.05, marks=pytest.mark.slow)],
)
def test_a_driver_killed_while_its_actors_are_at_any_step_is_resumed_by_another(
    directory: Path, shard: int, head_start_s: float, tally: Tally
) -> None:
    num_kills = len(ACTOR_POINTS)
    with counted(tally, AREA, "driver killed, an actor at each step") as trials, trials.attempt(num_kills):
        kill_driver(directory, shard, head_start_s)
        zombies = [int(path.read_text()) for path in marked(directory, "wait-*")]
        fill(make_queues(directory, "none", ACTOR_POINTS, (shard,)))
        wait_until(lambda: not any(map(psutil.pid_exists, zombies)), f"zombies {zombies}")
        finish_all(directory, num_deaths=1)


def kill_driver(directory: Path, shard: int, head_start_s: float) -> None:
    """Kills a driver once an actor is at each step, and lets the actors go on, if they still are."""
    driver = start_driver(directory, shard)
    try:
        wait_until(lambda: len(marked(directory, "wait-*")) == len(ACTOR_POINTS), "actors at their steps")
        if head_start_s:
            (directory / GO_FILE).touch()
            time.sleep(head_start_s)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait(_PATIENCE_S) == -signal.SIGKILL
    finally:
        driver.kill()
        driver.wait()
    # The zombies and their replacements are at work at once, until Ray has ended the former.
    (directory / GO_FILE).touch()
