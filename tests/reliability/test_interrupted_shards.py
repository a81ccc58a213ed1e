"""An exception in the middle of a shard publishes nothing, whatever it is and wherever it comes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from precompute.shard_file import ShardContentError
from precompute.store_writer import StoreWriter
from schemas.errors import IncompleteStoreError, TeacherError
from schemas.fault_points import FaultPoint
from tests.reliability.conftest import Tally
from tests.reliability.store_runs import (
    POINTS,
    SMALL,
    at_step,
    check_finished,
    is_garbage,
    leftovers,
    make_batches,
    make_identity,
    memory_directory,
    run_store,
    trace_run,
)
from tests.reliability.trials import counted

AREA = "exception in a shard"
EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit": lambda: SystemExit(1),
    "MemoryError": MemoryError,
    "RuntimeError": lambda: RuntimeError("CUDA error"),
    "TeacherError": lambda: TeacherError("logits are not finite", teacher="fake"),
    "GeneratorExit": GeneratorExit,
}
# From here on a shard's data file is there, which nothing refers to until its record is.
AFTER_PUBLISHING = (FaultPoint.SHARD_PUBLISHED, FaultPoint.SHARD_COMMITTED, FaultPoint.RECORD_CREATED)


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as found:
        yield found


def open_new(root: Path) -> StoreWriter:
    plan = SMALL.plan()
    return StoreWriter.open(root, make_identity(plan), plan)


@pytest.mark.parametrize("exception", EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_an_exception_of_the_batches_publishes_nothing(
    directory: Path, exception: Callable[[], BaseException], tally: Tally
) -> None:
    store = open_new(directory / "store")
    with counted(tally, AREA, "from the batches, after each of them") as trials:
        for task in store.plan.tasks():
            whole = list(make_batches(store, task, SMALL.batch_rows))
            for num_batches in range(len(whole) + 1):

                def batches() -> Iterator[pa.RecordBatch]:
                    yield from itertools.islice(whole, num_batches)  # noqa: B023  used at once
                    raise exception()

                with trials.attempt():
                    with pytest.raises(type(exception())):
                        store.write_shard(task, batches())
                    assert store.committed_shards() == frozenset()
                    assert not leftovers(directory / "store")
    with pytest.raises(IncompleteStoreError):
        store.finish()
    run_store(directory / "store")
    check_finished(directory / "store")


@pytest.mark.parametrize("exception", EXCEPTIONS.values(), ids=EXCEPTIONS)
def test_an_exception_at_any_step_publishes_all_of_a_shard_or_nothing(
    directory: Path, exception: Callable[[], BaseException], tally: Tally
) -> None:
    steps = trace_run(directory / "undisturbed")
    assert {point for point, _ in steps} == set(POINTS)

    def fail() -> None:
        raise exception()

    with counted(tally, AREA, "at each step of the protocol") as trials:
        for number, step in enumerate(steps):
            root = directory / f"store-{number}"
            with trials.attempt():
                with at_step(step, fail), pytest.raises(type(exception())):
                    run_store(root)
                left = leftovers(root)
                assert all(is_garbage(name) for name in left), step
                assert not left or step[0] in AFTER_PUBLISHING, (step, left)
                run_store(root)
                check_finished(root, where=step)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda batches: batches[:-1],
        lambda batches: [*batches, batches[-1]],
        lambda batches: batches[::-1],
        lambda batches: [batches[0].slice(1), *batches[1:]],
        lambda batches: [],
    ],
    ids=["one missing", "one twice", "another order", "a row missing", "none"],
)
def test_rows_that_are_not_those_of_the_plan_publish_nothing(
    directory: Path, spoil: Callable[[list[pa.RecordBatch]], list[pa.RecordBatch]], tally: Tally
) -> None:
    store = open_new(directory / "store")
    with counted(tally, AREA, "rows that are not those of the plan") as trials:
        for task in store.plan.tasks()[:2]:
            batches = list(make_batches(store, task, SMALL.batch_rows))
            with trials.attempt():
                with pytest.raises(ShardContentError):
                    store.write_shard(task, spoil(batches))
                assert not leftovers(directory / "store")
                assert store.committed_shards() == frozenset()
