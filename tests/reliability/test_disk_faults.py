"""Disks that are full, failing, read-only or gone: a typed error, nothing half published, and it goes on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from precompute.store_writer import StoreWriter
from schemas.errors import DamagedStoreError, ResourceError, TmkdError
from tests.reliability.conftest import Tally
from tests.reliability.disk_faults import CALLS, BrokenCalls, SmallDisk, small_disk
from tests.reliability.store_runs import (
    SMALL,
    Errand,
    Step,
    at_step,
    check_finished,
    is_garbage,
    leftovers,
    memory_directory,
    run_process,
    run_store,
    trace_run,
)
from tests.reliability.trials import Trials, counted

AREA = "disk fault"
NOBODY = 65534


@pytest.fixture
def directory() -> Iterator[Path]:
    with memory_directory() as found:
        yield found


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as found:
        yield found


def check_halfway(root: Path, *, is_clean: bool) -> None:
    """Checks that what is committed is whole, and nothing else counts.

    Args:
        root: The store.
        is_clean: The disk still let files be deleted, so that none is left.
    """
    if (root / "STORE.json").exists():
        StoreWriter.attach(root).commit_records()
    left = leftovers(root)
    assert all(is_garbage(name) for name in left), left
    assert not (is_clean and left), left


def survive(root: Path, trials: Trials, where: object, *, is_clean: bool, mend: Callable[[], None]) -> bool:
    """Runs on a disk that refuses, mends it, and runs again; tells whether the first run failed."""
    with trials.attempt():
        error = run_against_odds(root, ResourceError)
        mend()
        advice = ("run the same command again", "check its owner")
        assert error is None or any(words in str(error) for words in advice), where
        check_halfway(root, is_clean=is_clean)
        run_store(root)
        check_finished(root, where=where)
    return error is not None


def uncount_last(trials: Trials) -> None:
    """Takes back the try that ends a sweep: nothing went wrong in it."""
    trials.tried -= 1
    trials.survived -= 1


def run_against_odds(root: Path, *accepted: type[TmkdError]) -> TmkdError | None:
    """Runs and returns the error that ended it, if it is one of these."""
    try:
        run_store(root)
    except accepted as error:
        return error
    return None


def test_a_disk_that_fills_up_at_any_page_is_survived(disk: SmallDisk, tally: Tally) -> None:
    with counted(tally, AREA, "disk full at each page (ENOSPC)") as trials:
        for free_pages in range(100):
            disk.fill(free_pages=free_pages)
            root = disk.path / f"store-{free_pages}"
            if not survive(root, trials, free_pages, is_clean=True, mend=disk.empty):
                uncount_last(trials)
                break
    assert free_pages > 5, "the store needs more pages than that"


def test_a_disk_that_takes_no_more_files_is_survived(disk: SmallDisk, tally: Tally) -> None:
    with counted(tally, AREA, "no inode left at each file (ENOSPC)") as trials:
        for num_files in range(1, 100):
            root = disk.path / f"store-{num_files}"
            disk.limit_inodes(num_files)

            def mend() -> None:
                disk.limit_inodes(1000)

            if not survive(root, trials, num_files, is_clean=True, mend=mend):
                uncount_last(trials)
                break
    assert num_files > 5


def test_a_disk_that_is_full_from_any_step_on_is_survived(disk: SmallDisk, tally: Tally) -> None:
    steps = trace_run(disk.path / "undisturbed")
    failed = []
    with counted(tally, AREA, "disk full from each step on (ENOSPC)") as trials:
        for number, step in enumerate(steps):
            with at_step(step, disk.fill):
                root = disk.path / f"store-{number}"
                failed.append(survive(root, trials, step, is_clean=True, mend=disk.empty))
    # Only after the last new file nothing more is needed.
    assert [step for step, has_failed in zip(steps, failed, strict=True) if not has_failed] == steps[-2:]


def test_a_disk_that_becomes_read_only_at_any_step_is_survived(disk: SmallDisk, tally: Tally) -> None:
    steps = trace_run(disk.path / "undisturbed")
    num_failed = 0

    def close() -> None:
        # While a file is open for writing the system refuses: that step goes on undisturbed.
        disk.remount("ro")

    def mend() -> None:
        disk.remount("rw")

    with counted(tally, AREA, "read-only from each step on (EROFS)") as trials:
        for number, step in enumerate(steps):
            with at_step(step, close):
                root = disk.path / f"store-{number}"
                num_failed += survive(root, trials, step, is_clean=False, mend=mend)
    assert num_failed >= len(steps) - 4


def test_a_root_that_is_read_only_is_a_resource_error(disk: SmallDisk, tally: Tally) -> None:
    def mend() -> None:
        disk.remount("rw")

    disk.remount("ro")
    with counted(tally, AREA, "read-only root (EROFS)") as trials:
        assert survive(disk.path / "store", trials, "", is_clean=True, mend=mend)


def break_calls(root: Path, calls: BrokenCalls, trials: Trials, where: object, *, reads: bool) -> bool:
    """Runs with calls that fail, then without; tells whether one failed."""
    with trials.attempt():
        with calls.broken():
            run_against_odds(root, ResourceError, *([DamagedStoreError] if reads else ()))
        check_halfway(root, is_clean=False)
        run_store(root)
        check_finished(root, where=where)
    return calls.num_failed > 0


ONE_CALL = [(call, errno.EIO) for call in ("fsync", "link", "replace", "rename", "open")]
ONE_CALL_SLOW = [(call, number) for call, _ in ONE_CALL for number in (errno.ESTALE, errno.ENOSPC)]


@pytest.mark.parametrize(
    ("call", "number"), ONE_CALL + [pytest.param(*case, marks=pytest.mark.slow) for case in ONE_CALL_SLOW]
)
def test_a_system_call_that_fails_once_anywhere_is_a_resource_error(
    directory: Path, call: str, number: int, tally: Tally
) -> None:
    with counted(tally, AREA, f"{call} fails once, each call ({errno.errorcode[number]})") as trials:
        for first in range(200):
            root = directory / f"store-{first}"
            calls = BrokenCalls(root, number, first=first, forever=False, only=call)
            # A file that cannot be read may be taken for damage of that file.
            if not break_calls(root, calls, trials, first, reads=call == "open"):
                uncount_last(trials)
                break
    assert first > (10 if call in ("fsync", "open") else 0)


@pytest.mark.parametrize(
    "number",
    [errno.ESTALE, *(pytest.param(number, marks=pytest.mark.slow) for number in (errno.EIO, errno.EACCES))],
)
def test_a_file_system_that_goes_away_at_any_call_is_a_resource_error(
    directory: Path, number: int, tally: Tally
) -> None:
    with counted(tally, AREA, f"all calls fail from each call on ({errno.errorcode[number]})") as trials:
        for first in range(1000):
            root = directory / f"store-{first}"
            calls = BrokenCalls(root, number, first=first, forever=True)
            if not break_calls(root, calls, trials, first, reads=number == errno.EIO):
                uncount_last(trials)
                break
    assert first > 10 * len(CALLS)


def run_as_nobody(errand: Errand) -> None:
    """Runs as a user whom permissions bind; ends with the error's exit code."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        errand.do()
    except TmkdError as error:
        sys.exit(error.exit_code)


def close_directories() -> None:
    """Takes the permission to write away from the store."""
    root = Path(os.environ["CLOSED_STORE"])
    for path in (root / "data", root / "commit", root):
        path.chmod(0o555)


def test_a_store_that_loses_its_write_permission_at_any_step_is_survived(
    directory: Path, tally: Tally
) -> None:
    directory.chmod(0o755)
    steps = trace_run(directory / "undisturbed")
    codes = []
    with counted(tally, AREA, "permission lost at each step (EACCES)") as trials:
        for number, step in enumerate(steps):
            with trials.attempt():
                codes.append(lose_permission(directory / f"place-{number}", step))
    assert set(codes) == {0, 6}
    assert codes.count(0) <= 4


def lose_permission(place: Path, step: Step) -> int:
    """Runs without permission from ``step`` on, then with it; returns the first exit code."""
    place.mkdir()
    if os.geteuid() == 0:
        os.chown(place, NOBODY, NOBODY)
    root = place / "store"
    environ = {"CLOSED_STORE": str(root)}
    code = run_process(run_as_nobody, Errand(str(root), SMALL, step, close_directories, environ))
    for path in (root, root / "data", root / "commit"):
        path.chmod(0o755)
    check_halfway(root, is_clean=False)
    assert run_process(run_as_nobody, Errand(str(root))) == 0, step
    check_finished(root, where=step)
    return code
