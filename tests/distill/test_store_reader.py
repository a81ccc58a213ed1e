"""The reader gives back what was written, and sees every flipped bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distill.store_reader import LogitStore
from precompute.store_writer import StoreWriter
from schemas.digest import decode_document, encode_document, hash_file
from schemas.errors import DamagedStoreError, DataError, IncompleteStoreError, RefusedError, ResourceError
from schemas.records import CommitRecord, ExcludedRow, read_record
from tests.store_factory import MadePart, make_part, make_store

NUM_ROWS = 25
LOGITS = np.arange(NUM_ROWS * 3, dtype=np.float32).reshape(NUM_ROWS, 3)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> MadePart:
    texts = [(f"text {row}",) for row in range(NUM_ROWS)]
    return make_part(tmp_path_factory.mktemp("corpus") / "rows.arrow", texts, [0] * NUM_ROWS, shard_rows=10)


@pytest.fixture(scope="module")
def pristine(part: MadePart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "store", part.plan, LOGITS)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "store"))


def _flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << (offset % 8)
    path.write_bytes(data)


def _read_all(root: Path) -> np.ndarray:
    store = LogitStore.open(root)
    return store.gather(store.stored_rows())


def test_rows_come_in_the_order_asked_for(root: Path) -> None:
    rows = np.array([24, 0, 13, 13, 9, 10])
    assert np.array_equal(LogitStore.open(root).gather(rows), LOGITS[rows])


def test_identity_labels_and_plan_are_those_of_the_store(root: Path, part: MadePart) -> None:
    store = LogitStore.open(root)
    assert store.native_labels == ("a", "b", "c")
    assert store.plan.plan_hash == part.plan.plan_hash == store.identity.plan_hash
    assert store.num_rows == NUM_ROWS
    assert store.excluded.tolist() == []


def test_text_hashes_are_the_plans(root: Path, part: MadePart) -> None:
    rows = np.array([11, 3])
    found = [row.tobytes() for row in LogitStore.open(root).text_hashes(rows)]
    hashes = part.plan.rows.column("text_hash").to_pylist()
    assert found == [hashes[11], hashes[3]]


def test_excluded_rows_have_no_logits_and_shift_no_other_row(part: MadePart, tmp_path: Path) -> None:
    store = LogitStore.open(make_store(tmp_path / "s", part.plan, LOGITS, excluded=[0, 7, 10, 24]))
    rows = np.setdiff1d(np.arange(NUM_ROWS), [0, 7, 10, 24])
    assert store.num_rows == 21
    assert store.excluded.tolist() == [0, 7, 10, 24]
    assert store.stored_rows().tolist() == rows.tolist()
    assert np.array_equal(store.gather(rows[::-1]), LOGITS[rows[::-1]])
    with pytest.raises(DataError, match="row 10 is excluded"):
        store.gather(np.array([9, 10]))


def test_a_shard_whose_rows_are_all_excluded_is_read_over(part: MadePart, tmp_path: Path) -> None:
    store = LogitStore.open(make_store(tmp_path / "s", part.plan, LOGITS, excluded=range(10, 20)))
    assert np.array_equal(store.gather(np.array([20, 9])), LOGITS[[20, 9]])


def test_rows_outside_the_part_are_refused(root: Path) -> None:
    for row in (-1, NUM_ROWS):
        with pytest.raises(DataError, match="the part has 25"):
            LogitStore.open(root).gather(np.array([row]))


def test_what_gather_returns_is_a_writable_copy(root: Path) -> None:
    store = LogitStore.open(root)
    logits = store.gather(np.array([1]))
    logits[:] = -1
    assert np.array_equal(store.gather(np.array([1])), LOGITS[[1]])


def test_views_of_the_map_are_read_only(root: Path) -> None:
    batch = next(LogitStore.open(root).read_shard(0))
    assert not batch.logits_RC.flags.writeable
    assert not batch.text_hashes.flags.writeable


def test_a_flipped_bit_anywhere_in_a_shard_is_seen_before_a_value(root: Path) -> None:
    path = next((root / "data").glob("s000001-*.arrow"))
    original = path.read_bytes()
    record = read_record(root / "commit/s000001.r0.json", CommitRecord, store=root)
    for region in record.regions():
        places = sorted({*range(region.offset, region.offset + region.length, 13), region.offset})
        for place in places:
            _flip(path, place)
            with pytest.raises(DamagedStoreError) as error:
                _read_all(root)
            assert (error.value.store, error.value.shard) == (str(root), 1)
            assert error.value.offset == region.offset
            path.write_bytes(original)
    assert np.array_equal(_read_all(root), LOGITS)


def test_a_damaged_batch_is_named_when_it_is_first_touched(root: Path) -> None:
    record = read_record(root / "commit/s000001.r0.json", CommitRecord, store=root)
    _flip(root / "data" / record.file, record.batches[1].offset + 40)
    store = LogitStore.open(root)
    assert np.array_equal(store.gather(np.array([10, 18])), LOGITS[[10, 18]])
    with pytest.raises(DamagedStoreError, match="batch 1") as error:
        store.gather(np.array([14]))
    assert (error.value.shard, error.value.batch) == (1, 1)


@pytest.mark.parametrize("name", ["manifest.json", "STORE.json", "plan.arrow", "commit/s000000.r0.json"])
def test_a_flipped_bit_anywhere_in_a_record_or_the_plan_is_seen_at_open(root: Path, name: str) -> None:
    path = root / name
    original = path.read_bytes()
    for place in range(0, len(original), 11):
        _flip(path, place)
        with pytest.raises((DamagedStoreError, RefusedError)):
            LogitStore.open(root)
        path.write_bytes(original)
    LogitStore.open(root)


def test_a_record_that_was_exchanged_for_another_valid_one_is_seen(root: Path) -> None:
    path = root / "STORE.json"
    body = decode_document(path.read_bytes())
    path.write_bytes(encode_document({**body, "native_labels": ["b", "a", "c"]}))
    with pytest.raises(DamagedStoreError, match=r"STORE\.json does not match its hash"):
        LogitStore.open(root)


def test_a_store_without_a_manifest_is_incomplete(root: Path) -> None:
    (root / "manifest.json").unlink()
    with pytest.raises(IncompleteStoreError, match="tmkd precompute"):
        LogitStore.open(root)


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        LogitStore.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name", ["STORE.json", "plan.arrow", "commit/s000002.r0.json", "data/s000002-test.arrow"]
)
def test_a_missing_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(DamagedStoreError, match=f"{Path(name).name}.* missing"):
        LogitStore.open(root)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, -1])
def test_a_truncated_shard_is_seen_at_open(root: Path, num_bytes: int) -> None:
    path = root / "data/s000000-test.arrow"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DamagedStoreError) as error:
        LogitStore.open(root)
    assert error.value.shard == 0


@pytest.mark.parametrize("name", ["manifest.json", "STORE.json", "plan.arrow", "data/s000001-test.arrow"])
def test_a_file_that_may_not_be_read_is_a_resource_error(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by chmod: whoever runs the tests may be root, who reads everything.
    def guard(function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(path: Any, *args: Any, **options: Any) -> Any:
            if str(path) == str(root / name):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **options)

        return guarded

    monkeypatch.setattr(Path, "read_bytes", guard(Path.read_bytes))
    monkeypatch.setattr(Path, "open", guard(Path.open))
    monkeypatch.setattr(pa, "memory_map", guard(pa.memory_map))
    with pytest.raises(ResourceError, match="no permission"):
        LogitStore.open(root)


def test_another_format_version_is_refused_with_both_versions(root: Path) -> None:
    path = root / "manifest.json"
    body = decode_document(path.read_bytes())
    path.write_bytes(encode_document({**body, "format": "2.0"}))
    with pytest.raises(RefusedError, match=r"format '2\.0', this tmkd reads '1\.0'"):
        LogitStore.open(root)


def test_records_of_two_teachers_are_no_store(root: Path, part: MadePart, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", part.plan, LOGITS + 1, teacher="other")
    for name in ("data/s000001-test.arrow", "commit/s000001.r0.json"):
        shutil.copy(other / name, root / name)
    body = decode_document((root / "manifest.json").read_bytes())
    body["shards"][1]["record_sha256"] = hash_file(root / "commit/s000001.r0.json")
    (root / "manifest.json").write_bytes(encode_document(body))
    with pytest.raises(DamagedStoreError, match="another plan or teacher"):
        LogitStore.open(root)


def test_hashes_are_checked_again_after_a_shard_was_evicted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.row_store.MAX_MAPPED_SHARDS", 1)
    store = LogitStore.open(root)
    store.gather(np.array([0]))
    store.gather(np.array([20]))
    _flip(root / "data/s000000-test.arrow", store.records[0].batches[0].offset + 60)
    with pytest.raises(DamagedStoreError):
        store.gather(np.array([0]))


def test_a_store_of_the_real_writer_is_read(part: MadePart, root: Path, tmp_path: Path) -> None:
    identity = LogitStore.open(root).identity
    writer = StoreWriter.open(tmp_path / "written", identity, part.plan)
    absent = ExcludedRow(ordinal=12, example_id="train/12", reason="not finite")
    for task in part.plan.tasks():
        excluded = [absent] if task.start <= 12 < task.stop else []
        rows = [row for row in range(task.start, task.stop) if row != 12 or not excluded]
        chosen = part.plan.rows.take(rows)
        columns = [chosen.column(name).combine_chunks() for name in chosen.column_names]
        logits = pa.FixedSizeListArray.from_arrays(
            pa.array(LOGITS[rows].ravel()), type=writer.schema.field("logits").type
        )
        batch = pa.RecordBatch.from_arrays([*columns, logits], schema=writer.schema)
        writer.write_shard(task, [batch.slice(0, 6), batch.slice(6)], excluded)
    writer.finish()
    store = LogitStore.open(tmp_path / "written")
    rows = store.stored_rows()
    assert store.excluded.tolist() == [12]
    assert np.array_equal(store.gather(rows), LOGITS[rows])
