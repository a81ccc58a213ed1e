from __future__ import annotations

import json
from pathlib import Path

import pytest

from schemas.digest import encode_document
from schemas.errors import DamagedStoreError, DataError
from schemas.records import (
    CommitRecord,
    StoreIdentity,
    encode_record,
    parse_record,
    read_record,
    record_name,
    store_directory_name,
)

IDENTITY = StoreIdentity(
    plan_hash="a" * 64,
    generation_hash="b" * 64,
    generation={"dtype": "float32"},
    native_labels=("x", "y"),
    teacher="t1",
    corpus="train",
    part="train",
)
REGION = {"offset": 0, "length": 8, "rows": 0, "xxh3": "0" * 16}
COMMIT = {
    "plan_hash": "a" * 64,
    "generation_hash": "b" * 64,
    "shard": 3,
    "revision": 0,
    "file": "s000003-abc.arrow",
    "start": 0,
    "stop": 4,
    "num_rows": 4,
    "num_bytes": 8,
    "sha256": "c" * 64,
    "ids_hash": "d" * 64,
    "head": REGION,
    "batches": [],
    "tail": REGION,
}


def test_a_record_survives_the_round_trip() -> None:
    data = encode_record(IDENTITY)
    assert parse_record(data, StoreIdentity, store="s", name="STORE.json") == IDENTITY


@pytest.mark.parametrize(
    "file",
    ["../s000003-abc.arrow", "/etc/passwd", "s000003-a/../b.arrow", "s000003-.arrow", "s000003-abc.parquet"],
)
def test_a_file_name_outside_the_store_is_refused(file: str) -> None:
    data = encode_document({**COMMIT, "file": file})
    with pytest.raises(DamagedStoreError, match="file"):
        parse_record(data, CommitRecord, store="s", name="s000003.r0.json")


@pytest.mark.parametrize("change", [{"shard": -1}, {"num_bytes": 2**63}, {"surplus": 1}, {"format": "2.0"}])
def test_absurd_or_unknown_fields_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(DamagedStoreError):
        parse_record(encode_document({**COMMIT, **change}), CommitRecord, store="s", name="r")


def test_an_edited_record_is_refused_and_named() -> None:
    document = json.loads(encode_record(IDENTITY))
    document["teacher"] = "t2"
    with pytest.raises(DamagedStoreError, match=r"STORE\.json") as caught:
        parse_record(json.dumps(document).encode(), StoreIdentity, store="/s", name="STORE.json")
    assert caught.value.exit_code == 3


def test_a_missing_record_is_a_damaged_store(tmp_path: Path) -> None:
    with pytest.raises(DamagedStoreError, match="cannot be read"):
        read_record(tmp_path / "STORE.json", StoreIdentity, store=tmp_path)


def test_names_have_fixed_widths_that_sort() -> None:
    assert record_name(123, 0) == "s000123.r0.json"
    assert store_directory_name("a" * 64, "b" * 64) == "a" * 16 + "-" + "b" * 16


def test_a_record_that_no_reader_would_take_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    record = CommitRecord.model_validate(COMMIT)
    monkeypatch.setattr("schemas.digest.MAX_DOCUMENT_VALUES", 10)
    with pytest.raises(DataError, match=r"raise store\.shard_rows"):
        encode_record(record)
