"""The write protocol of a store: faults, races, refusals, and bytes that do not depend on luck."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import xxhash

from precompute.encode import LABELS_KEY
from precompute.near_miss import near_misses
from precompute.store_writer import StoreWriter
from schemas.digest import hash_file
from schemas.errors import DamagedStoreError, IncompleteStoreError, RefusedError, ResourceError
from schemas.plan import make_plan
from schemas.rows import fingerprint_columns
from tests.precompute.tiny import list_files, make_batches, make_identity, make_rows, open_store, write_all

NUM_ROWS = 20


@pytest.fixture
def store(tmp_path: Path) -> StoreWriter:
    return open_store(tmp_path / "store", make_rows(NUM_ROWS))


def test_regions_cover_the_file_and_each_batch_reads_from_its_own_bytes(store: StoreWriter) -> None:
    task = store.plan.tasks()[1]
    record, committed = store.write_shard(task, make_batches(store, task))
    path = Path(store.root) / "data" / record.file
    data = path.read_bytes()
    assert committed
    assert [batch.rows for batch in record.batches] == [3, 3, 2]
    position = 0
    for region in record.regions():
        assert region.offset == position
        position += region.length
        assert region.xxh3 == xxhash.xxh3_64_hexdigest(data[region.offset : position])
    assert position == record.num_bytes == len(data)
    assert record.sha256 == hash_file(path)
    schema = pa.ipc.open_file(str(path)).schema
    assert schema.metadata[LABELS_KEY] == b'["entailment", "not_entailment"]'
    ordinals = []
    for batch in record.batches:
        message = pa.ipc.read_message(pa.py_buffer(data[batch.offset : batch.offset + batch.length]))
        ordinals += pa.ipc.read_record_batch(message, schema).column("ordinal").to_pylist()
    assert ordinals == list(range(8, 16))
    table = pa.ipc.open_file(str(path)).read_all()
    assert record.ids_hash == fingerprint_columns(table["example_id"], table["text_hash"])
    assert table["logits"].to_pylist() == [[i, -i] for i in range(8, 16)]


def test_the_shard_opens_with_plain_pyarrow_and_has_no_null(store: StoreWriter) -> None:
    write_all(store)
    for path in (Path(store.root) / "data").glob("*.arrow"):
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)
        assert not any(field.nullable for field in table.schema)


def test_finish_needs_every_shard_and_is_complete_afterwards(store: StoreWriter) -> None:
    tasks = store.plan.tasks()
    store.write_shard(tasks[0], make_batches(store, tasks[0]))
    assert not store.is_complete()
    with pytest.raises(IncompleteStoreError):
        store.finish()
    write_all(store)
    assert store.committed_shards() == {0, 1, 2}
    manifest = store.finish()
    assert store.is_complete()
    assert manifest.num_rows == NUM_ROWS
    before = (Path(store.root) / "manifest.json").stat()
    assert store.finish() == manifest
    assert (Path(store.root) / "manifest.json").stat().st_ino == before.st_ino


def test_a_manifest_has_the_same_bytes_after_another_order_and_a_resume(
    store: StoreWriter, tmp_path: Path
) -> None:
    write_all(store)
    store.finish()
    # The same commit records under the same names: written in another order, in two processes.
    other = open_store(tmp_path / "other", make_rows(NUM_ROWS))
    for name in list_files(Path(store.root))[::-1]:
        if name.startswith(("data", "commit")):
            (Path(other.root) / name).write_bytes((Path(store.root) / name).read_bytes())
    assert (Path(other.root) / "STORE.json").read_bytes() == (Path(store.root) / "STORE.json").read_bytes()
    assert (Path(other.root) / "plan.arrow").read_bytes() == (Path(store.root) / "plan.arrow").read_bytes()
    open_store(tmp_path / "other", make_rows(NUM_ROWS)).finish()
    assert (Path(other.root) / "manifest.json").read_bytes() == (
        Path(store.root) / "manifest.json"
    ).read_bytes()


class FaultError(Exception):
    """Stands for whatever kills an attempt."""


def fail_call(number: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Returns `real`, whose call with that number raises `error`."""
    calls = iter(range(1000))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(*arguments, **options)

    return call


# Every system call of the protocol, in order: sync of the data file, rename, sync of data/, sync of
# the record's temporary file, link; then the sync of commit/, when the record is there already.
STEPS = [
    ("os.fsync", 0, False),
    ("pathlib.Path.rename", 0, False),
    ("os.fsync", 1, False),
    ("os.fsync", 2, False),
    ("os.link", 0, False),
    ("os.fsync", 3, True),
]


@pytest.mark.parametrize(
    "error", [FaultError("power"), KeyboardInterrupt(), OSError(errno.EIO, "disk")], ids=repr
)
@pytest.mark.parametrize(("name", "number", "published"), STEPS)
def test_a_fault_at_any_step_publishes_all_or_nothing_and_the_next_attempt_works(
    store: StoreWriter, name: str, number: int, published: bool, error: BaseException
) -> None:
    real = {"os.fsync": os.fsync, "pathlib.Path.rename": Path.rename, "os.link": os.link}[name]
    task = store.plan.tasks()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, fail_call(number, real, error))
        with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)):
            store.write_shard(task, make_batches(store, task))
    assert store.committed_shards() == ({0} if published else frozenset())
    assert not [file for file in list_files(Path(store.root)) if file.endswith(".tmp")]
    assert len(list((Path(store.root) / "data").iterdir())) == published
    record, committed = store.write_shard(task, make_batches(store, task))
    assert committed is not published
    assert store.commit_records()[0].record == record
    assert [path.name for path in (Path(store.root) / "data").iterdir()] == [record.file]
    write_all(store)
    assert store.finish().num_rows == NUM_ROWS


def test_an_exception_while_batches_are_made_publishes_nothing(store: StoreWriter) -> None:
    task = store.plan.tasks()[0]

    def batches() -> Iterator[pa.RecordBatch]:
        yield make_batches(store, task)[0]
        raise FaultError("the teacher failed")

    with pytest.raises(FaultError):
        store.write_shard(task, batches())
    assert list_files(Path(store.root)) == ["STORE.json", "plan.arrow"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full; committed shards are kept; free space and run the same command again"),
        (errno.EDQUOT, "disk is full"),
        (errno.EACCES, "may not be read or written"),
        (errno.EROFS, "may not be read or written"),
        (errno.EOPNOTSUPP, "has no hard links"),
    ],
)
@pytest.mark.parametrize("name", ["os.fsync", "os.link", "pathlib.Path.open"])
def test_a_file_system_that_refuses_is_a_resource_error(
    store: StoreWriter, name: str, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = store.plan.tasks()[:2]
    store.write_shard(first, make_batches(store, first))
    with monkeypatch.context() as patch:
        patch.setattr(name, fail_call(0, os.fsync, OSError(number, "no")))
        with pytest.raises(ResourceError, match=message) as caught:
            store.write_shard(second, make_batches(store, second))
    assert caught.value.exit_code == 6
    assert store.committed_shards() == {0}
    assert len(list((Path(store.root) / "data").iterdir())) == 1


def test_a_full_disk_in_the_middle_of_a_batch_is_a_resource_error(
    store: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the system has no /dev/full")
    real = Path.open

    def open_full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        return real(Path("/dev/full"), "wb", buffering=0) if mode == "xb" else real(path, mode)

    task = store.plan.tasks()[0]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_full)
        with pytest.raises(ResourceError, match="disk is full"):
            store.write_shard(task, make_batches(store, task))
    assert store.committed_shards() == frozenset()


def test_a_store_below_a_directory_that_may_not_be_written_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "mkdir", fail_call(0, Path.mkdir, PermissionError(errno.EACCES, "denied")))
    with pytest.raises(ResourceError, match=r"may not be read or written \(denied\)"):
        open_store(tmp_path / "store", make_rows(4))


def test_two_attempts_at_one_shard_commit_once_and_the_loser_deletes_its_file(store: StoreWriter) -> None:
    task = store.plan.tasks()[0]
    barrier = threading.Barrier(4)
    results = []

    def attempt() -> None:
        batches = make_batches(store, task)
        barrier.wait()
        results.append(store.write_shard(task, batches))

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [record for record, committed in results if committed]
    assert len(results) == 4
    assert len(winners) == 1
    assert all(record == winners[0] for record, _ in results)
    assert list_files(Path(store.root) / "data") == [winners[0].file]


def test_many_creators_of_one_store_agree(tmp_path: Path) -> None:
    rows = make_rows(NUM_ROWS)
    plan = make_plan(rows, 8)
    barrier = threading.Barrier(6)
    stores: list[StoreWriter] = []

    def create(number: int) -> None:
        identity = make_identity(plan, produced_by={"creator": str(number)})
        barrier.wait()
        stores.append(StoreWriter.open(tmp_path / "store", identity, plan))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 6
    assert len({store.identity.produced_by["creator"] for store in stores}) == 1
    assert list_files(tmp_path / "store") == ["STORE.json", "plan.arrow"]


def test_a_repair_commits_a_higher_revision_that_counts(store: StoreWriter) -> None:
    write_all(store)
    task = store.plan.tasks()[1]
    record, committed = store.write_shard(task, make_batches(store, task, batch_rows=8), revision=1)
    assert committed
    counted = store.commit_records()[1]
    assert (counted.name, counted.record) == ("s000001.r1.json", record)
    assert store.finish().shards[1].record == "s000001.r1.json"


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"generation": "c" * 64}, ("weights: bbbbb.* -> ccccc.*",)),
        ({"native_labels": ("no", "yes")}, ("native_labels: entailment, not_entailment -> no, yes",)),
    ],
)
def test_another_teachers_store_is_refused_with_what_differs(
    store: StoreWriter, changes: dict[str, Any], differing: tuple[str, ...]
) -> None:
    with pytest.raises(RefusedError, match="; ".join(differing)) as caught:
        StoreWriter.open(store.root, make_identity(store.plan, **changes), store.plan)
    assert caught.value.exit_code == 4


def test_a_store_of_another_plan_is_refused(store: StoreWriter) -> None:
    plan = make_plan(make_rows(NUM_ROWS), 4)
    with pytest.raises(
        RefusedError, match=f"plan_hash: {store.identity.plan_hash[:16]} -> {plan.plan_hash[:16]}"
    ):
        StoreWriter.open(store.root, make_identity(plan), plan)


def test_opening_again_under_other_names_gives_the_same_store(store: StoreWriter) -> None:
    identity = make_identity(store.plan, teacher="renamed", produced_by={"torch": "9"})
    assert StoreWriter.open(store.root, identity, store.plan).identity == store.identity
    assert StoreWriter.attach(store.root).identity == store.identity


def damage(store: StoreWriter, what: str) -> None:
    record_path = Path(store.root) / "commit" / "s000000.r0.json"
    if what == "record edited":
        record_path.write_text(record_path.read_text().replace('"num_rows": 8', '"num_rows": 7'))
    if what == "record misnamed":
        record_path.rename(record_path.with_name("s000002.r0.json"))
    if what == "data missing":
        (Path(store.root) / "data" / store.commit_records()[0].record.file).unlink()
    if what == "data cut":
        os.truncate(Path(store.root) / "data" / store.commit_records()[0].record.file, 100)
    if what == "plan replaced":
        other = open_store(Path(store.root).with_name("other"), make_rows(NUM_ROWS, seed=1))
        (Path(store.root) / "plan.arrow").write_bytes((Path(other.root) / "plan.arrow").read_bytes())
    if what == "identity edited":
        path = Path(store.root) / "STORE.json"
        path.write_text(path.read_text().replace("tiny", "tinY"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("record edited", "does not match its own digest"),
        ("record misnamed", "holds the record of shard 0"),
        ("data missing", "is missing; run `tmkd store repair"),
        ("data cut", "has 100 bytes, its record says"),
        ("plan replaced", "plan hash is"),
        ("identity edited", "does not match its own digest"),
    ],
)
def test_damage_is_found_when_a_store_is_resumed(store: StoreWriter, what: str, message: str) -> None:
    write_all(store)
    damage(store, what)
    with pytest.raises(DamagedStoreError, match=message) as caught:
        StoreWriter.attach(store.root).finish()
    assert caught.value.exit_code == 3


def test_a_manifest_of_another_store_is_damage(store: StoreWriter, tmp_path: Path) -> None:
    write_all(store)
    store.finish()
    other = open_store(tmp_path / "other", make_rows(NUM_ROWS, seed=1))
    (Path(other.root) / "manifest.json").write_bytes((Path(store.root) / "manifest.json").read_bytes())
    with pytest.raises(DamagedStoreError, match="belongs to another store"):
        other.is_complete()


def test_a_near_miss_names_the_fields_that_differ(tmp_path: Path) -> None:
    plan = make_plan(make_rows(NUM_ROWS), 8)
    theirs = make_identity(plan, generation_hash="c" * 64)
    theirs = theirs.model_copy(update={"generation": {"max_length": 128, "keep": {"kind": "dense"}}})
    StoreWriter.open(tmp_path / "stores" / "a", theirs, plan)
    ours = theirs.model_copy(
        update={"generation_hash": "d" * 64, "generation": {"max_length": 64, "keep": {"kind": "dense"}}}
    )
    assert near_misses(str(tmp_path / "stores"), ours) == ["max_length: 128 -> 64"]
    assert near_misses(str(tmp_path / "absent"), ours) == []
    assert near_misses(str(tmp_path / "stores"), ours.model_copy(update={"teacher": "other"})) == []
    assert near_misses(str(tmp_path / "stores"), ours.model_copy(update={"part": "train+1"})) == []
    (tmp_path / "stores" / "damaged").mkdir()
    (tmp_path / "stores" / "damaged" / "STORE.json").write_text("{")
    assert near_misses(str(tmp_path / "stores"), ours) == ["max_length: 128 -> 64"]
    # The store itself may have been made under other names, whatever else was made under these.
    StoreWriter.open(tmp_path / "stores" / "b", ours.model_copy(update={"teacher": "other"}), plan)
    assert near_misses(str(tmp_path / "stores"), ours) == []


def test_a_changed_corpus_is_a_near_miss(store: StoreWriter) -> None:
    plan = make_plan(make_rows(NUM_ROWS, seed=1), 8)
    [field] = near_misses(str(Path(store.root).parent), make_identity(plan))
    assert field == f"plan_hash: {store.identity.plan_hash[:16]} -> {plan.plan_hash[:16]}"
