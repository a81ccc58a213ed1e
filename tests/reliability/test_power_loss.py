"""Loss of power at every system call of the write protocol: what was said to be committed is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from precompute.store_writer import StoreWriter
from schemas.fault_points import FaultPoint, listen
from tests.reliability.conftest import Tally
from tests.reliability.power_loss import Disk, restore
from tests.reliability.store_runs import (
    SMALL,
    check_finished,
    make_identity,
    memory_directory,
    run_shards,
    run_store,
)
from tests.reliability.trials import counted

AREA = "power loss"


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as found:
        yield found


def record_run(root: Path, disk: Disk, hear: Callable[[FaultPoint], None]) -> None:
    """Runs with everything recorded that a loss of power could leave."""
    plan = SMALL.plan()
    with disk.recorded():
        listen(hear)
        try:
            store = StoreWriter.open(root, make_identity(plan), plan)
            disk.promise("STORE.json")
            for one in run_shards(store, SMALL.batch_rows):
                disk.promise(f"commit/s{one.shard:06d}.r0.json")
                disk.promise(f"data/{one.file}")
            store.finish()
            disk.promise("manifest.json")
        finally:
            listen(None)


def check_images(disk: Disk, directory: Path, tally: Tally, case: str) -> None:
    with counted(tally, AREA, case) as trials:
        for number, (image, promised) in enumerate(disk.images.items()):
            root = directory / f"image-{number}"
            with trials.attempt():
                missing = promised - {name for name, _ in image}
                assert not missing, sorted(name for name, _ in image)
                restore(image, root)
                run_store(root)
                check_finished(root, where=sorted(name for name, _ in image))


def test_whatever_a_loss_of_power_leaves_is_resumed_and_nothing_committed_is_lost(
    directory: Path, tally: Tally
) -> None:
    disk = Disk(directory / "store")
    record_run(directory / "store", disk, disk.hear)
    # Fewer than there are system calls: most of them leave what an earlier one could leave.
    assert len(disk.images) > 30
    check_images(disk, directory, tally, "one run")


@pytest.mark.parametrize(
    "number",
    [
        *(
            pytest.param(number, id=name, marks=pytest.mark.slow)
            for number, name in enumerate(("plan", "STORE", "first", "second"))
        ),
        pytest.param(4, id="last"),
    ],
)
def test_a_run_that_builds_upon_anothers_unsynced_record_makes_it_durable(
    directory: Path, number: int, tally: Tally
) -> None:
    """The other run has linked a record, and has not come to sync its directory."""
    root = directory / "store"
    disk = Disk(root)
    num_left = number

    def hear(point: FaultPoint) -> None:
        nonlocal num_left
        disk.hear(point)
        if point is not FaultPoint.RECORD_CREATED:
            return
        num_left -= 1
        if num_left == -1:
            run_store(root)
            disk.promise("manifest.json")

    record_run(root, disk, hear)
    check_images(disk, directory, tally, "two runs")
