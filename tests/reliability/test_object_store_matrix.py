"""Kills, zombies and two runs on one store, on a real S3 API."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from schemas.fault_points import FaultPoint
from schemas.storage.location import open_storage
from schemas.store_files import load_commits
from tests.object_server import ObjectServer, object_server
from tests.reliability.conftest import Tally
from tests.reliability.store_runs import (
    POINTS,
    SMALL,
    Errand,
    Shape,
    Step,
    check_finished,
    children,
    kill_self,
    leftovers,
    pause_self,
    read_report,
    run_child,
    run_store,
    trace_run,
    wait_for_end,
    wait_for_pause,
    wake,
)
from tests.reliability.trials import counted

KILLED = "killed process"
CONCURRENT = "concurrent writers"
# Where an object store goes another way than a local one: before and after the two requests.
UPLOAD = (FaultPoint.SHARD_SYNCED, FaultPoint.SHARD_RENAMED)
COMMIT = (FaultPoint.RECORD_WRITTEN, FaultPoint.RECORD_CREATED)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    with object_server() as found:
        yield found


def environ() -> Mapping[str, str]:
    """Returns what a child needs to find the server."""
    return {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "TMKD_"))}


def choose(steps: list[Step]) -> list[Step]:
    """Returns one step of each point: of a later shard, where there is one."""
    return [(point, min(1, sum(found is point for found, _ in steps) - 1)) for point in POINTS]


def kill_at_steps(server: ObjectServer, steps: list[Step], tally: Tally) -> None:
    with counted(tally, KILLED, "writer on S3 killed at each step") as trials:
        for number, step in enumerate(steps):
            root = server.url(f"store-{number}")
            with trials.attempt():
                code = run_child(Errand(root, SMALL, step, kill_self, environ()))
                assert code == -signal.SIGKILL, step
                before = load_commits(open_storage(root))
                run_store(root)
                assert before.items() <= load_commits(open_storage(root)).items(), step
                assert len(leftovers(root)) <= 1, step
                check_finished(root, where=step)


def test_a_run_reaches_every_fault_point(server: ObjectServer) -> None:
    assert {point for point, _ in trace_run(server.url())} == set(POINTS)


def test_a_writer_killed_around_upload_and_commit_is_resumed(server: ObjectServer, tally: Tally) -> None:
    kill_at_steps(server, [(point, 1) for point in UPLOAD] + [(point, 3) for point in COMMIT], tally)


@pytest.mark.slow
def test_a_writer_killed_at_any_step_is_resumed(server: ObjectServer, tally: Tally) -> None:
    kill_at_steps(server, trace_run(server.url("undisturbed")), tally)


def test_two_runs_at_once_have_one_winner_per_shard(
    server: ObjectServer, tmp_path: Path, tally: Tally
) -> None:
    root, shape = server.url(), Shape(num_rows=24, shard_rows=2)
    num_shards = shape.plan().num_shards
    start, reports = tmp_path / "start", [tmp_path / f"report-{number}" for number in range(2)]
    errands = [Errand(root, shape, None, None, environ(), report, start, False) for report in reports]
    with counted(tally, CONCURRENT, "2 runs at once on S3, shards") as trials, trials.attempt(num_shards):
        with children(*errands) as runs:
            start.touch()
            assert [wait_for_end(run) for run in runs] == [0, 0]
        tries = [one for report in reports for one in read_report(report)]
        assert Counter(one.shard for one in tries if one.committed) == Counter(range(num_shards))
        winners = {shard: commit.record.file for shard, commit in load_commits(open_storage(root)).items()}
        assert all(winners[one.shard] == one.file for one in tries)
        assert not leftovers(root)
        check_finished(root, shape)


@pytest.mark.slow
def test_a_zombie_that_wakes_after_its_replacement_has_finished_does_no_harm(
    server: ObjectServer, tally: Tally
) -> None:
    steps = choose(trace_run(server.url("undisturbed")))
    with counted(tally, CONCURRENT, "zombie on S3 paused at each point") as trials:
        for number, step in enumerate(steps):
            root = server.url(f"store-{number}")
            with trials.attempt(), children(Errand(root, SMALL, step, pause_self, environ())) as (zombie,):
                assert wait_for_pause(zombie), step
                run_store(root)
                assert wake(zombie) == 0, step
                assert not leftovers(root), step
                check_finished(root, where=step)
