"""Tests of listing, inspecting and verifying stores."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from xxhash import xxh3_64_hexdigest

from cluster.catalog import inspect_store, list_stores, print_stores, verify_store
from schemas.errors import DamagedStoreError, DataError, IncompleteStoreError
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    LOCK_FILE,
    MANIFEST_FILE,
    CommitRecord,
    LockedPart,
    Manifest,
    StoresLock,
    encode_record,
    read_record,
)
from schemas.rows import fingerprint_rows, hash_texts
from tests.cluster.stores import NUM_ROWS, write_store


def data_files(root: Path) -> list[Path]:
    return sorted((root / DATA_DIRECTORY).glob("*.arrow"))


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_listing_tells_finished_unfinished_and_damaged_stores_apart(tmp_path: Path) -> None:
    root = tmp_path / "stores"
    write_store(root / "a", teacher="a")
    write_store(root / "b", teacher="b", shards=2)
    write_store(root / "c", teacher="c")
    (root / "c" / "manifest.json").write_text("{}")
    (root / "no-store").mkdir()
    finished, unfinished, damaged = list_stores(root)
    assert (finished.teacher, finished.is_complete, finished.num_rows) == ("a", True, 50)
    assert (finished.corpus, finished.part, finished.policy) == ("pairs", "train", "dense")
    assert (finished.num_committed, finished.num_shards) == (3, 3)
    assert finished.num_bytes == sum(file.stat().st_size for file in data_files(root / "a"))
    assert (unfinished.is_complete, unfinished.num_rows, unfinished.num_committed) == (False, 40, 2)
    assert unfinished.num_shards == 3
    assert damaged.problem is not None
    assert "does not match its own digest" in damaged.problem


def test_a_listing_names_the_runs_that_use_a_store(tmp_path: Path) -> None:
    writer = write_store(tmp_path / "stores" / "a")
    (tmp_path / "first").mkdir()
    part = LockedPart(
        part="train",
        fingerprint=writer.plan.fingerprint,
        plan_hash=writer.plan.plan_hash,
        num_rows=NUM_ROWS,
        rows="rows.arrow",
        stores={"t1": str(tmp_path / "stores" / "a")},
    )
    (tmp_path / "first" / LOCK_FILE).write_bytes(encode_record(StoresLock(corpora={"pairs": (part,)})))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / LOCK_FILE).write_text("{")
    (store,) = list_stores(tmp_path / "stores")
    assert store.runs == ("first",)


def test_a_store_is_listed_by_its_own_root(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    assert [store.path for store in list_stores(tmp_path / "s")] == [str(tmp_path / "s")]


def test_a_missing_directory_is_an_error_and_an_empty_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        list_stores(tmp_path / "absent")
    assert list_stores(tmp_path) == []


def test_a_printed_listing_takes_names_literally(tmp_path: Path) -> None:
    write_store(tmp_path / "s", teacher="[bold]t[/bold]")
    stream = io.StringIO()
    print_stores(list_stores(tmp_path / "s"), Console(file=stream, width=200))
    assert "[bold]t[/bold]" in stream.getvalue()
    assert "complete" in stream.getvalue()


def test_a_description_is_json_and_counts_excluded_rows(tmp_path: Path) -> None:
    write_store(tmp_path / "s", excluded=21)
    described = inspect_store(tmp_path / "s", num_ids=2)
    assert json.loads(json.dumps(described)) == described
    assert (described["num_rows_planned"], described["num_rows"], described["num_excluded"]) == (50, 49, 1)
    assert described["excluded"] == [{"ordinal": 21, "example_id": "train/21", "reason": "NaN"}]
    assert described["first_ids"] == ["train/0", "train/1"]
    assert described["native_labels"] == ["yes", "no"]
    assert described["columns"]["logits"] == "fixed_size_list<item: float not null>[2]"
    assert described["is_complete"]


def test_a_directory_without_a_store_is_named(tmp_path: Path) -> None:
    for look in (inspect_store, verify_store):
        with pytest.raises(DataError, match=r"is no store, it has no STORE\.json"):
            look(tmp_path)


def test_a_sound_store_passes_both_verifications(tmp_path: Path) -> None:
    write_store(tmp_path / "s", excluded=0)
    for deep in (False, True):
        result = verify_store(tmp_path / "s", deep=deep)
        assert (result["num_shards"], result["num_rows"], result["deep"]) == (3, 49, deep)


def test_deep_verification_notices_a_flip_anywhere_in_a_data_file(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    path = data_files(tmp_path / "s")[1]
    whole = path.read_bytes()
    for offset in range(0, len(whole), 97):
        flip_byte(path, offset)
        with pytest.raises(DamagedStoreError, match=r"1 of 3 shards are damaged: shard 1") as caught:
            verify_store(tmp_path / "s", deep=True)
        assert caught.value.shard == 1
        path.write_bytes(whole)


def test_all_damaged_shards_are_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    first, _, last = data_files(tmp_path / "s")
    first.unlink()
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(
        DamagedStoreError, match=r"2 of 3 shards are damaged: shard 0.*missing.*shard 2.*bytes"
    ):
        verify_store(tmp_path / "s")


def test_a_damaged_record_is_damage_without_a_deep_look(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    record = next((tmp_path / "s" / "commit").iterdir())
    flip_byte(record, 40)
    with pytest.raises(DamagedStoreError, match="commit/"):
        verify_store(tmp_path / "s")


def test_an_unfinished_store_is_not_verified(tmp_path: Path) -> None:
    write_store(tmp_path / "s", shards=2)
    with pytest.raises(IncompleteStoreError):
        verify_store(tmp_path / "s")


def forge_shard(
    root: Path, old: bytes, new: bytes, *, ids: list[str] | None = None, whole: bool = True
) -> None:
    """Replaces bytes of the second shard and makes the store's hashes agree with them.

    The hash of the whole file only if ``whole``, that of the ids only if they are given.
    """
    manifest = read_record(root / MANIFEST_FILE, Manifest, store=root)
    listed = manifest.shards[1]
    record = read_record(root / COMMIT_DIRECTORY / listed.record, CommitRecord, store=root)
    path = root / DATA_DIRECTORY / record.file
    data = path.read_bytes()
    assert old in data
    data = data.replace(old, new, 1)
    path.write_bytes(data)
    batches = [
        batch.model_copy(update={"xxh3": xxh3_64_hexdigest(data[batch.offset : batch.offset + batch.length])})
        for batch in record.batches
    ]
    changed: dict[str, object] = {"batches": tuple(batches)}
    if whole:
        changed["sha256"] = hashlib.sha256(data).hexdigest()
    if ids is not None:
        hashes = [hash_texts([f"train/{row}"]) for row in range(record.start, record.stop)]
        changed["ids_hash"] = fingerprint_rows(ids, hashes)
    encoded = encode_record(record.model_copy(update=changed))
    (root / COMMIT_DIRECTORY / listed.record).write_bytes(encoded)
    bound = listed.model_copy(update={"record_sha256": hashlib.sha256(encoded).hexdigest()})
    shards = (manifest.shards[0], bound, manifest.shards[2])
    (root / MANIFEST_FILE).write_bytes(encode_record(manifest.model_copy(update={"shards": shards})))


def test_deep_verification_looks_at_rows_that_every_hash_agrees_with(tmp_path: Path) -> None:
    swapped = [f"train/{row}" for row in range(20, 40)]
    swapped[3] = "train/99"
    logits = np.float32(23).tobytes() * 2
    for name, old, new, ids, message in (
        ("a", logits, np.float32("nan").tobytes() * 2, None, "has a logit that is not finite"),
        ("b", b"train/23", b"train/99", None, "holds other ids than its commit record"),
        ("c", b"train/23", b"train/99", swapped, "holds other rows than the plan"),
    ):
        write_store(tmp_path / name)
        forge_shard(tmp_path / name, old, new, ids=ids)
        verify_store(tmp_path / name)
        with pytest.raises(DamagedStoreError, match=message):
            verify_store(tmp_path / name, deep=True)
    write_store(tmp_path / "d")
    forge_shard(tmp_path / "d", logits, np.float32(5).tobytes() * 2, whole=False)
    with pytest.raises(DamagedStoreError, match="does not match its SHA-256"):
        verify_store(tmp_path / "d", deep=True)
