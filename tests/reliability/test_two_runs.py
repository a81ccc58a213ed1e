"""Two runs on one store at once, and zombies: one winner per shard, nothing lost, nothing mixed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from precompute.store_writer import StoreWriter
from schemas.fault_points import FaultPoint, listen
from schemas.plan import ShardTask
from schemas.records import MANIFEST_FILE
from schemas.storage.location import open_storage
from schemas.store_files import load_commits
from tests.reliability.conftest import Tally
from tests.reliability.store_runs import (
    POINTS,
    SMALL,
    Errand,
    Shape,
    Step,
    check_finished,
    children,
    leftovers,
    make_batches,
    make_identity,
    memory_directory,
    pause_self,
    read_report,
    run_store,
    trace_run,
    wait_for_end,
    wait_for_pause,
    wake,
)
from tests.reliability.trials import counted

AREA = "concurrent writers"
MANY = Shape(num_rows=120, shard_rows=2)


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as found:
        yield found


def race(root: Path, num_runs: int, shape: Shape, *, looks: bool = False) -> list[list[int]]:
    """Lets runs fill one store at once; returns the shards that each committed."""
    start = root.with_name(f"{root.name}-start")
    reports = [root.with_name(f"{root.name}-report-{number}") for number in range(num_runs)]
    errands = [Errand(str(root), shape, report=report, start=start, looks=looks) for report in reports]
    with children(*errands) as runs:
        start.touch()
        assert [wait_for_end(run) for run in runs] == [0] * num_runs
    tries = [read_report(report) for report in reports]
    winners = {shard: commit.record.file for shard, commit in load_commits(open_storage(root)).items()}
    # A loser is told whose file counts.
    assert all(winners[one.shard] == one.file for found in tries for one in found)
    return [[one.shard for one in found if one.committed] for found in tries]


@pytest.mark.parametrize("looks", [False, True], ids=["each shard a race", "committed ones left out"])
@pytest.mark.parametrize("num_runs", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_runs_that_fill_one_store_at_once_both_end_and_each_shard_has_one_winner(
    directory: Path, num_runs: int, looks: bool, tally: Tally
) -> None:
    root = directory / "store"
    with counted(tally, AREA, f"{num_runs} runs at once, shards") as trials:
        num_shards = MANY.plan().num_shards
        with trials.attempt(num_shards):
            won = race(root, num_runs, MANY, looks=looks)
            assert Counter(shard for shards in won for shard in shards) == Counter(range(num_shards))
            assert not leftovers(root)
            check_finished(root, MANY)


def test_each_of_the_runs_at_once_makes_the_same_manifest(directory: Path) -> None:
    root = directory / "store"
    race(root, 2, MANY)
    written = (root / MANIFEST_FILE).read_bytes()
    (root / MANIFEST_FILE).unlink()
    run_store(root, MANY)
    assert (root / MANIFEST_FILE).read_bytes() == written


def test_runs_that_create_a_store_at_once_agree_on_it(directory: Path, tally: Tally) -> None:
    one_shard = Shape(num_rows=2, shard_rows=2)
    with counted(tally, AREA, "6 runs that create and fill a store at once") as trials:
        for number in range(5):
            root = directory / f"store-{number}"
            with trials.attempt():
                won = race(root, 6, one_shard)
                assert sorted(map(len, won)) == [0, 0, 0, 0, 0, 1]
                assert not leftovers(root)
                check_finished(root, one_shard)


def wake_after(root: Path, step: Step) -> None:
    """Pauses a run at ``step``, does its work without it, and lets it go on."""
    with children(Errand(str(root), SMALL, step, pause_self)) as (zombie,):
        assert wait_for_pause(zombie), step
        run_store(root)
        before = {path: path.read_bytes() for path in root.rglob("*") if counts(path)}
        assert wake(zombie) == 0, step
    assert before == {path: path.read_bytes() for path in before}, step


def counts(path: Path) -> bool:
    """Tells whether a file belongs to the finished store."""
    return path.is_file() and not path.name.startswith(".") and path.parent.name != "data"


def test_a_zombie_that_wakes_after_its_replacement_has_finished_does_no_harm(
    directory: Path, tally: Tally
) -> None:
    steps = trace_run(directory / "undisturbed")
    assert {point for point, _ in steps} == set(POINTS)
    with counted(tally, AREA, "zombie paused at each step, its replacement finishes") as trials:
        for number, step in enumerate(steps):
            root = directory / f"store-{number}"
            with trials.attempt():
                wake_after(root, step)
                check_finished(root, where=step)
                # It took its own file away, and its temporary files.
                assert not leftovers(root), step


@pytest.mark.slow
def test_two_zombies_that_wake_one_after_the_other_do_no_harm(directory: Path, tally: Tally) -> None:
    shape = Shape(num_rows=2, shard_rows=2)
    steps = trace_run(directory / "undisturbed", shape)
    with counted(tally, AREA, "two zombies, all pairs of steps") as trials:
        for first in steps:
            for second in steps:
                root = directory / f"{first[0]}-{first[1]}-{second[0]}-{second[1]}"
                with (
                    trials.attempt(),
                    children(
                        Errand(str(root), shape, first, pause_self),
                        Errand(str(root), shape, second, pause_self),
                    ) as zombies,
                ):
                    for zombie in zombies:
                        wait_for_pause(zombie)
                    run_store(root, shape)
                    assert [wake(zombie) for zombie in zombies] == [0, 0], (first, second)
                    check_finished(root, shape, where=(first, second))
                    assert not leftovers(root), (first, second)


def test_a_zombie_that_is_killed_in_its_sleep_leaves_what_nothing_refers_to(
    directory: Path, tally: Tally
) -> None:
    steps = [step for step in trace_run(directory / "undisturbed") if step[1] == 0]
    with counted(tally, AREA, "zombie killed after its replacement finished") as trials:
        for number, step in enumerate(steps):
            root = directory / f"store-{number}"
            with trials.attempt():
                with children(Errand(str(root), SMALL, step, pause_self)) as (zombie,):
                    wait_for_pause(zombie)
                    run_store(root)
                assert len(leftovers(root)) <= 2, step
                check_finished(root, where=step)


def test_a_process_that_was_slow_to_write_the_manifest_does_not_undo_a_repair(directory: Path) -> None:
    root = directory / "store"
    run_store(root)
    (root / MANIFEST_FILE).unlink()
    plan = SMALL.plan()
    store = StoreWriter.attach(root, expected=make_identity(plan))

    def repair(point: FaultPoint) -> None:
        if point is FaultPoint.MANIFEST_WRITTEN:
            listen(None)
            rewrite(store, plan.tasks()[1])
            store.finish()

    listen(repair)
    try:
        StoreWriter.attach(root).finish()
    finally:
        listen(None)
    check_finished(root)


def rewrite(store: StoreWriter, task: ShardTask) -> None:
    """Commits a shard's next revision, as a repair does, and removes the old data."""
    old = store.commit_records()[task.shard].record
    store.write_shard(task, make_batches(store, task, 3), revision=1)
    store.storage.delete(f"data/{old.file}")
