"""Runs that fill one store, in this process or in children, that can be ended or paused at any step.

A run does what ``precompute.stores.make_stores`` and a worker do with one store, with a teacher whose
logits are a function of the row. A child starts in no time: it is forked from a server process that has
imported this module.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from cluster.store_check import diagnose_store
from precompute.encode import encode_rows
from precompute.store_writer import StoreWriter
from schemas.digest import hash_value
from schemas.fault_points import FaultPoint, listen
from schemas.plan import Plan, ShardTask, make_plan
from schemas.records import MANIFEST_FILE, PLAN_FILE, STORE_FILE, StoreIdentity
from schemas.storage.location import open_storage
from schemas.store_files import has_file, load_commits, load_manifest
from tests.forkserver import SERVER, preload
from tests.store_factory import make_table

LABELS = ("yes", "no")
POINTS = tuple(point for point in FaultPoint if not point.startswith("checkpoint-"))
ACTOR_POINTS = tuple(point for point in POINTS if point.startswith(("shard-", "record-")))
_GRACE_S = 30.0
# Pandas: pyarrow imports it, where it is there, at the first conversion.
preload("pytest", "pandas", "pyarrow.pandas_compat", "s3fs", __name__)

Step = tuple[FaultPoint, int]
"""A fault point and how often it was reached before."""


@dataclass(frozen=True)
class Shape:
    """How large a run's store is."""

    num_rows: int = 10
    shard_rows: int = 4
    batch_rows: int = 2

    def plan(self) -> Plan:
        """Returns the plan over a made-up part."""
        texts = [(f"text {row}",) for row in range(self.num_rows)]
        return make_plan(make_table(texts, [0] * self.num_rows), self.shard_rows)


SMALL = Shape()


@dataclass(frozen=True)
class Try:
    """One shard that a run wrote.

    Attributes:
        file: The data file that counts in the end.
        committed: Whether this run's record is the one that counts.
    """

    shard: int
    file: str
    committed: bool


@contextmanager
def memory_directory() -> Iterator[Path]:
    """Yields a directory where syncing costs nothing, if the system has one: the runs sync a lot."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as directory:
        yield Path(directory)


def make_identity(plan: Plan) -> StoreIdentity:
    """Returns the identity that all runs share."""
    generation = {"weights": "b" * 64}
    return StoreIdentity(
        plan_hash=plan.plan_hash,
        generation_hash=hash_value(generation),
        generation=generation,
        native_labels=LABELS,
        teacher="fake",
        corpus="toy",
        part="train",
    )


def make_batches(store: StoreWriter, task: ShardTask, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Yields a shard's record batches; row i has logits (i / 2, -i * i)."""
    ordinals = np.arange(task.start, task.stop, dtype=np.float32)
    logits_RC = np.stack([ordinals / 2, -ordinals * ordinals], axis=1)
    rows = store.plan.rows.slice(task.start, task.num_rows)
    yield from encode_rows(rows, logits_RC, store.schema, batch_rows)


def run_store(root: Path | str, shape: Shape = SMALL, *, looks: bool = True) -> list[Try]:
    """Fills the store at ``root`` from wherever it is until it is complete; ``looks``: see ``run_shards``."""
    plan = shape.plan()
    identity = make_identity(plan)
    has_manifest = has_file(open_storage(root), MANIFEST_FILE)
    if has_manifest and StoreWriter.attach(root, expected=identity).is_complete():
        return []
    store = StoreWriter.open(root, identity, plan)
    tries = list(run_shards(store, shape.batch_rows, looks=looks))
    store.finish()
    return tries


def run_shards(store: StoreWriter, batch_rows: int, *, looks: bool = True) -> Iterator[Try]:
    """Writes the shards that are pending.

    Args:
        store: Where.
        batch_rows: Rows of a record batch.
        looks: Leave out what somebody has committed when its turn comes, as a worker does. Otherwise
            every shard that was pending at the start is a race with whoever else is at work.
    """
    committed = store.committed_shards()
    for task in store.plan.tasks():
        if task.shard in committed or (looks and store.find_commit(task.shard, 0) is not None):
            continue
        record, mine = store.write_shard(task, make_batches(store, task, batch_rows))
        yield Try(task.shard, record.file, mine)


@contextmanager
def at_step(step: Step | None, action: Callable[[], None]) -> Iterator[None]:
    """Does ``action`` when this process reaches ``step``."""
    num_left = step[1] if step else 0

    def hear(point: FaultPoint) -> None:
        nonlocal num_left
        if step is None or point is not step[0]:
            return
        num_left -= 1
        if num_left == -1:
            action()

    listen(hear)
    try:
        yield
    finally:
        listen(None)


def trace_run(root: Path | str, shape: Shape = SMALL) -> list[Step]:
    """Runs without a fault and returns every step that it reached, in order."""
    points: list[FaultPoint] = []
    listen(points.append)
    try:
        run_store(root, shape)
    finally:
        listen(None)
    return [(point, points[:place].count(point)) for place, point in enumerate(points)]


def kill_self() -> None:
    """Ends this process as the kernel would: nothing of Python runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)


def pause_self() -> None:
    """Stops this process until somebody continues it."""
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass(frozen=True)
class Errand:
    """What a child does.

    Attributes:
        root: The store.
        step: Where ``action`` happens.
        action: ``kill_self``, ``pause_self``, or None.
        environ: Variables to set first.
        report: Where the shards that it wrote are listed, if it comes to its end.
        start: The child waits until this file is there.
        looks: See ``run_shards``.
    """

    root: str
    shape: Shape = SMALL
    step: Step | None = None
    action: Callable[[], None] | None = None
    environ: Mapping[str, str] | None = None
    report: Path | None = None
    start: Path | None = None
    looks: bool = True

    def do(self) -> None:
        """Runs, inside the child."""
        os.environ.update(self.environ or {})
        while self.start is not None and not self.start.exists():
            time.sleep(0.001)
        with at_step(self.step, self.action or _nothing):
            tries = run_store(self.root, self.shape, looks=self.looks)
        if self.report is not None:
            lines = [f"{one.shard} {one.file} {int(one.committed)}\n" for one in tries]
            self.report.write_text("".join(lines))


@contextmanager
def children(*errands: Errand) -> Iterator[Sequence[BaseProcess]]:
    """Starts a child for each errand; none of them outlives the block."""
    processes = [SERVER.Process(target=errand.do, daemon=True) for errand in errands]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_child(errand: Errand) -> int:
    """Runs a child to its end and returns its exit code; minus the signal if one ended it."""
    return run_process(Errand.do, errand)


def run_process(target: Callable[[Errand], None], errand: Errand) -> int:
    """Runs a function in a child, as ``run_child`` does."""
    process = SERVER.Process(target=target, args=(errand,), daemon=True)
    process.start()
    try:
        return wait_for_end(process)
    finally:
        process.kill()
        process.join()


def wait_for_end(process: BaseProcess) -> int:
    """Waits for a child and returns its exit code."""
    process.join(_GRACE_S)
    assert process.exitcode is not None, "a child does not end"
    return process.exitcode


def wait_for_pause(process: BaseProcess) -> bool:
    """Waits until a child has stopped itself; False if it ended well before it came to that."""
    deadline_s = time.monotonic() + _GRACE_S
    while process.is_alive():
        with suppress(psutil.NoSuchProcess):  # It has just ended.
            if psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                return True
        assert time.monotonic() < deadline_s, "it neither pauses nor ends"
        time.sleep(0.002)
    assert process.exitcode == 0, f"it ended with {process.exitcode} before it paused"
    return False


def wake(process: BaseProcess) -> int:
    """Lets a paused child go on to its end, and returns its exit code."""
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGCONT)
    return wait_for_end(process)


def read_report(path: Path) -> list[Try]:
    """Reads what a child reported."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return [Try(int(shard), file, bool(int(mine))) for shard, file, mine in lines]


def read_store(root: Path | str) -> pa.Table:
    """Reads a finished store's rows, shard by shard, without the code that reads stores."""
    storage = open_storage(root)
    records = [commit.record for commit in load_commits(storage).values()]
    files = (storage.map_file(f"data/{record.file}", sha256=record.sha256) for record in records)
    return pa.concat_tables(pa.ipc.open_file(file).read_all() for file in files)


def expected_table(shape: Shape = SMALL) -> pa.Table:
    """Returns the rows of a finished store, made without any of the code that writes one."""
    plan = shape.plan()
    values = [[row / 2, -float(row * row)] for row in range(shape.num_rows)]
    logits = pa.array(values, pa.list_(pa.float32(), len(LABELS)))
    names = ("ordinal", "example_id", "text_hash")
    return pa.table([*(plan.rows.column(name) for name in names), logits], names=[*names, "logits"])


def leftovers(root: Path | str) -> list[str]:
    """Lists the files of a store that nothing refers to."""
    storage = open_storage(root)
    found = {file.name for directory in ("", "data", "commit") for file in storage.list_files(directory)}
    referenced = {STORE_FILE, PLAN_FILE, MANIFEST_FILE}
    referenced |= {f"data/{commit.record.file}" for commit in load_commits(storage).values()}
    # A repair's record stands beside the one that it replaces.
    referenced |= {name for name in found if fnmatch(name, "commit/s*.r*.json")}
    return sorted(found - referenced)


def is_garbage(name: str) -> bool:
    """Tells whether a left file is one that ``tmkd store gc`` knows: temporary, or an attempt's data."""
    base = name.rpartition("/")[2]
    return (base.startswith(".") and base.endswith(".tmp")) or (
        name.startswith("data/s") and name.endswith(".arrow")
    )


def check_finished(root: Path | str, shape: Shape = SMALL, *, where: object = "") -> None:
    """Checks that a store is complete, sound, and has the content of an undisturbed run."""
    for deep in (False, True):
        diagnosis = diagnose_store(root, deep=deep)
        assert diagnosis.is_sound, (where, diagnosis.problems)
    manifest = load_manifest(open_storage(root))
    assert manifest is not None, where
    num_shards = shape.plan().num_shards
    assert [shard.shard for shard in manifest.shards] == list(range(num_shards)), where
    assert read_store(root).cast(expected_table(shape).schema).equals(expected_table(shape)), where
    assert all(is_garbage(name) for name in leftovers(root)), (where, leftovers(root))


def _nothing() -> None:
    """The action of a run that nothing happens to."""
