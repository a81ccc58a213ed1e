"""What every backend does, whatever lies behind it: a local directory, an S3 API, fsspec's memory."""

from __future__ import annotations

import hashlib
import pickle
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from schemas.errors import DamagedStoreError
from schemas.fault_points import FaultPoint, listen
from schemas.storage.location import create_storage, join_location, list_locations, open_storage
from schemas.storage.storage import Storage
from tests.object_server import object_server


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if request.param == "local":
        yield str(tmp_path / "stores" / "one")
    elif request.param == "memory":
        yield f"memory://{uuid.uuid4().hex}/one"
    else:
        with object_server() as server:
            yield server.url("stores/one")


@pytest.fixture
def storage(root: str) -> Storage:
    # fsspec's memory looks first and writes afterwards.
    return create_storage(root, single_committer=root.startswith("memory"))


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def publish(storage: Storage, name: str, data: bytes) -> int:
    return storage.publish(name, lambda path: path.write_bytes(data))


def test_a_new_store_is_empty(storage: Storage) -> None:
    assert [storage.list_files(directory) for directory in ("", "data", "commit", "absent")] == [[]] * 4


def test_a_file_is_created_once_and_the_first_bytes_stay(storage: Storage) -> None:
    assert storage.create("commit/s000000.r0.json", b"first")
    assert not storage.create("commit/s000000.r0.json", b"second")
    assert storage.read("commit/s000000.r0.json", max_bytes=99) == b"first"


def test_of_sixteen_creators_at_once_one_wins(storage: Storage) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda i: storage.create("commit/a.json", b"%d" % i), range(16)))
    assert sum(won) == 1
    assert storage.read("commit/a.json", max_bytes=9) == b"%d" % won.index(True)


def test_a_replaced_file_has_the_last_bytes(storage: Storage) -> None:
    for data in (b"first, which is longer", b"second"):
        storage.replace("manifest.json", data)
        assert storage.read("manifest.json", max_bytes=99) == data


def test_what_fill_returns_comes_back_and_its_file_is_published_whole(storage: Storage) -> None:
    data = bytes(range(256)) * 1000
    assert publish(storage, "data/s000000-a.arrow", data) == len(data)
    assert [(file.name, file.num_bytes) for file in storage.list_files("data")] == [
        ("data/s000000-a.arrow", len(data))
    ]


def test_a_fill_that_fails_publishes_nothing(storage: Storage, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half a sha")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        storage.publish("data/s000000-a.arrow", fail)
    assert storage.list_files("data") == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_staged_is_left_after_publishing(storage: Storage, tmp_path: Path) -> None:
    publish(storage, "data/a.arrow", b"shard")
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == (["a.arrow"] if storage.is_local else [])


def test_files_are_listed_by_name_with_size_and_time(storage: Storage) -> None:
    begin_s = time.time()
    for name, size in (("data/b.arrow", 2), ("data/a.arrow", 1)):
        publish(storage, name, b"x" * size)
    storage.create("STORE.json", b"identity")
    files = storage.list_files("data")
    assert [(file.name, file.num_bytes) for file in files] == [("data/a.arrow", 1), ("data/b.arrow", 2)]
    # S3 knows whole seconds.
    assert all(begin_s - 2 < file.modified_s < time.time() + 2 for file in files)
    assert [file.name for file in storage.list_files("")] == ["STORE.json"]


def test_a_listing_shows_what_another_wrote_and_deleted_since_the_last_one(
    storage: Storage, root: str
) -> None:
    assert storage.list_files("commit") == []
    other = open_storage(root)
    other.create("commit/a.json", b"record")
    assert [file.name for file in storage.list_files("commit")] == ["commit/a.json"]
    other.delete("commit/a.json")
    assert storage.list_files("commit") == []


def test_an_absent_file_is_not_found(storage: Storage) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read("manifest.json", max_bytes=99)
    with pytest.raises(FileNotFoundError):
        storage.map_file("data/a.arrow", num_bytes=5, sha256=hash_of(b"shard"))
    with pytest.raises(FileNotFoundError):
        storage.map_file("data/a.arrow")


def test_a_store_that_was_never_made_can_be_asked(root: str) -> None:
    storage = open_storage(root)
    assert storage.list_files("commit") == []
    with pytest.raises(FileNotFoundError):
        storage.read("STORE.json", max_bytes=99)


def test_a_file_may_be_as_large_as_the_limit_and_no_larger(storage: Storage) -> None:
    storage.replace("STORE.json", b"0123456789")
    assert storage.read("STORE.json", max_bytes=10) == b"0123456789"
    with pytest.raises(DamagedStoreError, match="larger than 9 bytes"):
        storage.read("STORE.json", max_bytes=9)


def test_an_empty_file_is_empty(storage: Storage) -> None:
    storage.replace("STORE.json", b"")
    assert storage.read("STORE.json", max_bytes=9) == b""


@pytest.mark.parametrize("is_hashed", [True, False], ids=["hash known", "hash unknown"])
def test_a_mapped_file_has_its_bytes_for_as_long_as_it_is_held(storage: Storage, is_hashed: bool) -> None:
    data = b"shard" * 1000
    publish(storage, "data/a.arrow", data)
    buffer = storage.map_file(
        "data/a.arrow", num_bytes=len(data), sha256=hash_of(data) if is_hashed else None
    )
    part = buffer[5:10]
    storage.delete("data/a.arrow")
    storage.discard_copy(hash_of(data))
    assert buffer.to_pybytes() == data
    del buffer
    assert part.to_pybytes() == b"shard"


def test_what_was_deleted_is_gone_and_deleting_it_again_is_no_error(storage: Storage) -> None:
    publish(storage, "data/a.arrow", b"shard")
    storage.delete("data/a.arrow")
    storage.delete("data/a.arrow")
    assert storage.list_files("data") == []


@pytest.mark.parametrize("name", ["../other/STORE.json", "data/../../other/a.arrow"])
def test_a_name_that_leads_out_of_the_store_is_damage(storage: Storage, root: str, name: str) -> None:
    other = create_storage(
        join_location(root.rpartition("/")[0], "other"), single_committer=root.startswith("memory")
    )
    other.create("STORE.json", b"not yours")
    other.create("a.arrow", b"not yours")
    storage.create("data/a.arrow", b"ours")
    with pytest.raises(DamagedStoreError, match="leads out of the store"):
        storage.read(name, max_bytes=99)
    with pytest.raises(DamagedStoreError, match="leads out of the store"):
        storage.map_file(name)


def test_the_steps_come_in_the_order_of_the_protocol(storage: Storage) -> None:
    reached: list[FaultPoint] = []
    listen(reached.append)
    try:
        publish(storage, "data/a.arrow", b"shard")
        storage.create("commit/a.json", b"record")
        storage.create("commit/a.json", b"loser's")
        storage.replace("manifest.json", b"manifest")
    finally:
        listen(None)
    assert reached == [
        FaultPoint.SHARD_SYNCED,
        FaultPoint.SHARD_RENAMED,
        FaultPoint.RECORD_WRITTEN,
        FaultPoint.RECORD_CREATED,
        FaultPoint.RECORD_WRITTEN,
        FaultPoint.MANIFEST_WRITTEN,
        FaultPoint.MANIFEST_REPLACED,
    ]


def test_making_a_store_that_is_there_changes_nothing(storage: Storage, root: str) -> None:
    publish(storage, "data/a.arrow", b"shard")
    again = create_storage(root, single_committer=root.startswith("memory"))
    assert [file.name for file in again.list_files("data")] == ["data/a.arrow"]
    assert again.list_files("") == []


def test_stores_are_listed_by_name_and_none_where_there_is_none(root: str) -> None:
    parent = root.rpartition("/")[0]
    assert list_locations(parent) == []
    for name in ("two", "one"):
        location = join_location(parent, name)
        create_storage(location, single_committer=root.startswith("memory")).create("STORE.json", b"{}")
    assert list_locations(parent) == [join_location(parent, "one"), join_location(parent, "two")]


def test_a_storage_can_be_pickled(storage: Storage) -> None:
    storage.create("STORE.json", b"identity")
    again = pickle.loads(pickle.dumps(storage))
    assert again.root == storage.root
    assert again.read("STORE.json", max_bytes=99) == b"identity"
