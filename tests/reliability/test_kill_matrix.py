"""SIGKILL at every step of the write protocol, then the same command again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.store_runs import (
    POINTS,
    SMALL,
    Errand,
    Shape,
    Step,
    check_finished,
    kill_self,
    leftovers,
    memory_directory,
    run_child,
    run_store,
    trace_run,
)
from tests.reliability.trials import counted
from tests.tally import Tally

AREA = "killed process"
# The smallest store with a first, a later and a last shard, in the slow cross product.
TWO_SHARDS = Shape(num_rows=3, shard_rows=2)


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as found:
        yield found


def snapshot(root: Path) -> dict[str, bytes]:
    """Returns what is committed: it must never change."""
    return {path.name: path.read_bytes() for path in (root / "commit").glob("s*.json")}


def kill_run(root: Path, step: Step, shape: Shape = SMALL) -> None:
    """Lets a child fill the store until it kills itself at ``step``."""
    code = run_child(Errand(str(root), shape, step, kill_self))
    assert code == -signal.SIGKILL, (step, code)


def test_a_run_reaches_every_fault_point_of_the_store_protocol(directory: Path) -> None:
    steps = trace_run(directory / "store")
    assert {point for point, _ in steps} == set(POINTS)
    # Each shard of the three goes through its points, so that the matrix has a first and later ones.
    per_shard = [point for point in POINTS if point.startswith("shard-")]
    assert all([number for found, number in steps if found is point] == [0, 1, 2] for point in per_shard)


def test_a_writer_killed_at_any_step_is_resumed_by_another_process(directory: Path, tally: Tally) -> None:
    steps = trace_run(directory / "undisturbed")
    with counted(tally, AREA, "writer killed at each step") as trials:
        for number, step in enumerate(steps):
            root = directory / f"store-{number}"
            with trials.attempt():
                kill_run(root, step)
                before = snapshot(root) if root.exists() else {}
                assert len(leftovers(root)) <= 2, step
                assert run_child(Errand(str(root))) == 0, step
                after = snapshot(root)
                assert before.items() <= after.items(), step
                check_finished(root, where=step)


def test_a_writer_that_is_killed_at_one_step_after_another_comes_to_its_end(
    directory: Path, tally: Tally
) -> None:
    root = directory / "store"
    shape = Shape(num_rows=48)
    with counted(tally, AREA, "writer killed again and again") as trials:
        for point in POINTS:
            with trials.attempt():
                kill_run(root, (point, 0), shape)
    run_store(root, shape)
    check_finished(root, shape)


@pytest.mark.slow
def test_a_writer_killed_at_any_step_and_again_at_any_step_of_its_resumption(
    directory: Path, tally: Tally
) -> None:
    steps = trace_run(directory / "undisturbed", TWO_SHARDS)
    with counted(tally, AREA, "writer killed twice, all pairs of steps") as trials:
        for first in steps:
            for second in steps:
                root = directory / f"{first[0]}-{first[1]}-{second[0]}-{second[1]}"
                with trials.attempt():
                    kill_run(root, first, TWO_SHARDS)
                    # A resumption does not reach the steps of what is done already.
                    code = run_child(Errand(str(root), TWO_SHARDS, second, kill_self))
                    assert code in (0, -signal.SIGKILL), (first, second)
                    run_store(root, TWO_SHARDS)
                    check_finished(root, TWO_SHARDS, where=(first, second))
