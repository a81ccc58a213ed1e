"""What a shard file holds: rows that are not those of the plan are never published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from precompute.encode import encode_rows
from precompute.shard_file import ShardContentError
from precompute.store_writer import StoreWriter
from schemas.records import ExcludedRow
from tests.precompute.tiny import list_files, make_batches, make_rows, open_store, write_all

NUM_ROWS = 20


@pytest.fixture
def store(tmp_path: Path) -> StoreWriter:
    return open_store(tmp_path / "store", make_rows(NUM_ROWS))


def bad_batches(store: StoreWriter, change: str) -> list[pa.RecordBatch]:
    task = store.plan.tasks()[0]
    rows = store.plan.rows.slice(0, task.num_rows)
    logits_RC = np.zeros((task.num_rows, 2), np.float32)
    if change == "not finite":
        logits_RC[3, 1] = np.inf
    if change == "order":
        rows = rows.take(pa.array([1, 0, *range(2, task.num_rows)]))
    if change == "fewer":
        rows, logits_RC = rows.slice(0, 5), logits_RC[:5]
    if change == "other shard":
        rows = store.plan.rows.slice(8, 8)
    if change == "other id":
        ids = ["x", *rows["example_id"].to_pylist()[1:]]
        rows = rows.set_column(1, rows.schema.field("example_id"), pa.array(ids))
    if change == "other text":
        hashes = [bytes(16), *rows["text_hash"].to_pylist()[1:]]
        rows = rows.set_column(2, rows.schema.field("text_hash"), pa.array(hashes, pa.binary(16)))
    return list(encode_rows(rows, logits_RC, store.schema, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("not finite", "logits are not all finite"),
        ("order", "rows are not those of the plan"),
        ("fewer", "rows are not those of the plan"),
        ("other shard", "rows are not those of the plan"),
        ("other id", "column example_id differs from the plan"),
        ("other text", "column text_hash differs from the plan"),
    ],
)
def test_rows_that_are_not_those_of_the_plan_are_not_published(
    store: StoreWriter, change: str, message: str
) -> None:
    with pytest.raises(ShardContentError, match=message):
        store.write_shard(store.plan.tasks()[0], bad_batches(store, change))
    assert list_files(Path(store.root)) == ["STORE.json", "plan.arrow"]


def test_null_logits_are_not_published(store: StoreWriter) -> None:
    task = store.plan.tasks()[0]
    batch = make_batches(store, task, batch_rows=8)[0]
    values = pa.array([None, *[0.0] * 15], pa.float32())
    logits = pa.FixedSizeListArray.from_arrays(values, type=batch.schema.field("logits").type)
    nulls = pa.record_batch([*batch.columns[:3], logits], schema=batch.schema)
    with pytest.raises(ShardContentError):
        store.write_shard(task, [nulls])
    assert list_files(Path(store.root)) == ["STORE.json", "plan.arrow"]


def test_bytes_that_changed_between_writing_and_reading_back_are_not_published(
    store: StoreWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pa.ipc.read_message

    def read_flipped(buffer: pa.Buffer) -> Any:
        data = bytearray(buffer)
        data[-9] ^= 1
        return real(pa.py_buffer(bytes(data)))

    monkeypatch.setattr(pa.ipc, "read_message", read_flipped)
    task = store.plan.tasks()[0]
    with pytest.raises(ShardContentError):
        store.write_shard(task, make_batches(store, task))
    assert list_files(Path(store.root)) == ["STORE.json", "plan.arrow"]


def test_excluded_rows_are_listed_and_absent(store: StoreWriter) -> None:
    task = store.plan.tasks()[0]
    kept = [0, 1, 3, 4, 6, 7]
    rows = store.plan.rows.take(pa.array(kept))
    excluded = [
        ExcludedRow(ordinal=5, example_id="train/5", reason="nan"),
        ExcludedRow(ordinal=2, example_id="train/2", reason="nan"),
    ]
    batches = encode_rows(rows, np.zeros((6, 2), np.float32), store.schema, 4)
    record, _ = store.write_shard(task, batches, excluded)
    assert [row.ordinal for row in record.excluded] == [2, 5]
    assert record.num_rows == 6
    write_all(store)
    manifest = store.finish()
    assert manifest.excluded == record.excluded
    assert manifest.num_rows == NUM_ROWS - 2


def test_a_shard_whose_rows_are_all_excluded_is_a_file_without_batches(store: StoreWriter) -> None:
    task = store.plan.tasks()[2]
    excluded = [ExcludedRow(ordinal=i, example_id=f"train/{i}", reason="nan") for i in range(16, 20)]
    record, _ = store.write_shard(task, [], excluded)
    assert (record.num_rows, record.batches) == (0, ())
    assert record.head.length + record.tail.length == record.num_bytes
    assert pa.ipc.open_file(str(Path(store.root) / "data" / record.file)).read_all().num_rows == 0


def test_an_excluded_row_of_another_shard_is_refused(store: StoreWriter) -> None:
    task = store.plan.tasks()[0]
    foreign = [ExcludedRow(ordinal=9, example_id="train/9", reason="nan")]
    with pytest.raises(ShardContentError, match="lie outside the shard"):
        store.write_shard(task, make_batches(store, task), foreign)
