from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schemas.errors import DamagedStoreError, DataError
from schemas.records import COMMIT_DIRECTORY, CommitRecord, encode_record, parse_record_name
from schemas.storage.local import LocalStorage
from schemas.store_files import (
    check_commit,
    check_data_file,
    has_file,
    list_commits,
    list_data,
    load_commit,
    load_commits,
    load_identity,
    load_manifest,
    load_plan,
)
from tests.store_factory import make_part, make_store


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    part = make_part(tmp_path / "rows.arrow", [(str(row),) for row in range(6)], [0] * 6, shard_rows=2)
    return LocalStorage(make_store(tmp_path / "store", part.plan, np.zeros((6, 3), np.float32)))


def add_revision(storage: LocalStorage, shard: int, revision: int, **changes: object) -> CommitRecord:
    record = load_commits(storage)[shard].record.model_copy(update={"revision": revision, **changes})
    storage.create(f"{COMMIT_DIRECTORY}/s{shard:06d}.r{revision}.json", encode_record(record))
    return record


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s000012.r3.json", (12, 3)),
        ("s1234567.r0.json", (1234567, 0)),
        ("s000012.r03.json", None),
        ("s0000012.r3.json", None),
        (".s000012.r3.json.tmp", None),
        ("s000012.json", None),
    ],
)
def test_a_record_has_one_name(name: str, expected: tuple[int, int] | None) -> None:
    assert parse_record_name(name) == expected


def test_the_highest_revision_counts_and_damage_below_it_is_not_even_read(storage: LocalStorage) -> None:
    record = add_revision(storage, 1, 10)
    add_revision(storage, 1, 9)
    (Path(storage.root) / COMMIT_DIRECTORY / "s000001.r0.json").write_text("{")
    assert list_commits(storage) == {0: (0,), 1: (0, 9, 10), 2: (0,)}
    found = load_commits(storage)
    assert list(found) == [0, 1, 2]
    assert found[1].record == record
    assert found[1].entry().record == "s000001.r10.json"
    with pytest.raises(DamagedStoreError):
        load_commit(storage, 1, 0)
    assert load_commit(storage, 1, 11) is None


def test_a_record_under_another_shards_name_is_damage(storage: LocalStorage) -> None:
    directory = Path(storage.root) / COMMIT_DIRECTORY
    (directory / "s000001.r0.json").write_bytes((directory / "s000002.r0.json").read_bytes())
    with pytest.raises(DamagedStoreError, match=r"s000001\.r0\.json holds the record of shard 2"):
        load_commits(storage)


@pytest.mark.parametrize(
    "changes", [{"start": 1}, {"plan_hash": "0" * 64}, {"generation_hash": "0" * 64}], ids=str
)
def test_a_record_of_another_store_or_cut_is_damage(
    storage: LocalStorage, changes: dict[str, object]
) -> None:
    identity = load_identity(storage)
    plan = load_plan(storage, identity.plan_hash)
    for commit in load_commits(storage).values():
        check_commit(storage, commit, identity, plan)
    add_revision(storage, 1, 1, **changes)
    with pytest.raises(DamagedStoreError):
        check_commit(storage, load_commits(storage)[1], identity, plan)


def test_a_data_file_must_be_there_with_its_size(storage: LocalStorage) -> None:
    record = load_commits(storage)[0].record
    files = list_data(storage)
    check_data_file(storage, record, files)
    with pytest.raises(DamagedStoreError, match="its record says"):
        check_data_file(storage, record.model_copy(update={"num_bytes": record.num_bytes + 1}), files)
    with pytest.raises(DamagedStoreError, match="is missing; run `tmkd store repair"):
        check_data_file(storage, record.model_copy(update={"file": "s000000-gone.arrow"}), files)


def test_what_is_absent_is_said(storage: LocalStorage, tmp_path: Path) -> None:
    assert has_file(storage, "STORE.json")
    assert not has_file(storage, "STORE")
    (Path(storage.root) / "manifest.json").unlink()
    assert load_manifest(storage) is None
    with pytest.raises(DataError, match="is no store"):
        load_identity(LocalStorage(tmp_path))
    (Path(storage.root) / "STORE.json").rename(tmp_path / "kept")
    with pytest.raises(DamagedStoreError, match=r"STORE\.json is missing; run `tmkd store repair"):
        load_identity(storage)
    (tmp_path / "kept").rename(Path(storage.root) / "STORE.json")
    (Path(storage.root) / "plan.arrow").unlink()
    with pytest.raises(DamagedStoreError, match=r"plan\.arrow is missing"):
        load_plan(storage, "0" * 64)
