"""A store on S3 whose service is well: what is special to it beside test_storage_contract.py."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import DamagedStoreError, RecipeError, ResourceError
from schemas.storage.location import create_storage, list_locations, open_storage
from schemas.storage.object_store import ObjectStorage, _modified_s
from tests.object_server import Kind, ObjectServer, object_server

SHARD = bytes(range(256)) * 4096
SHARD_HASH = hashlib.sha256(SHARD).hexdigest()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    with object_server() as running:
        yield running


@pytest.fixture
def storage(server: ObjectServer) -> ObjectStorage:
    return ObjectStorage(server.url())


def map_shard(storage: ObjectStorage) -> bytes:
    return storage.map_file("data/a.arrow", num_bytes=len(SHARD), sha256=SHARD_HASH).to_pybytes()


def test_opening_a_store_asks_the_service_nothing(server: ObjectServer) -> None:
    open_storage(server.url())
    assert server.faults.requests == []


def test_a_shard_that_was_mapped_once_is_not_fetched_again(
    server: ObjectServer, storage: ObjectStorage
) -> None:
    server.put("store/data/a.arrow", SHARD)
    assert map_shard(storage) == SHARD
    server.faults.requests.clear()
    assert map_shard(storage) == SHARD
    assert map_shard(ObjectStorage(server.url())) == SHARD
    assert server.faults.requests == []


def test_a_damaged_local_copy_is_fetched_again(
    server: ObjectServer, storage: ObjectStorage, tmp_path: Path
) -> None:
    server.put("store/data/a.arrow", SHARD)
    map_shard(storage)
    copy = tmp_path / "cache" / SHARD_HASH
    copy.write_bytes(b"!" + SHARD[1:])
    assert map_shard(storage) == SHARD
    assert copy.read_bytes() == SHARD


def test_a_discarded_copy_is_fetched_again(server: ObjectServer, storage: ObjectStorage) -> None:
    server.put("store/data/a.arrow", SHARD)
    map_shard(storage)
    assert storage.discard_copy(SHARD_HASH)
    assert not storage.discard_copy(SHARD_HASH)
    server.faults.requests.clear()
    assert map_shard(storage) == SHARD
    assert server.faults.num_requests("GET") == 1


def test_a_remote_shard_with_other_bytes_of_the_same_size_is_damage(
    server: ObjectServer, storage: ObjectStorage, tmp_path: Path
) -> None:
    server.put("store/data/a.arrow", b"!" + SHARD[1:])
    with pytest.raises(DamagedStoreError, match=r"data/a\.arrow: its bytes do not match the recorded hash"):
        map_shard(storage)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_file()] == []


@pytest.mark.parametrize("is_hashed", [True, False], ids=["hash known", "hash unknown"])
def test_a_remote_shard_of_another_size_is_damage_and_is_not_fetched(
    server: ObjectServer, storage: ObjectStorage, is_hashed: bool
) -> None:
    server.put("store/data/a.arrow", SHARD + b"!")
    with pytest.raises(DamagedStoreError, match=f"has {len(SHARD) + 1} bytes, not {len(SHARD)}"):
        storage.map_file("data/a.arrow", num_bytes=len(SHARD), sha256=SHARD_HASH if is_hashed else None)
    assert server.faults.num_requests("GET") == 0


def test_a_hash_that_is_none_becomes_no_file_name(
    server: ObjectServer, storage: ObjectStorage, tmp_path: Path
) -> None:
    server.put("store/data/a.arrow", SHARD)
    for key in ("../../secret", SHARD_HASH.upper(), SHARD_HASH + "\n", ""):
        with pytest.raises(DamagedStoreError, match="is no SHA-256"):
            storage.map_file("data/a.arrow", sha256=key)
        assert not storage.discard_copy(key)
    assert not (tmp_path / "cache").exists()


def test_a_giant_is_not_read_to_find_out_that_it_is_too_large(
    server: ObjectServer, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put("store/STORE.json", SHARD)
    asked: list[tuple[int, int]] = []
    filesystem, cat_file = storage.filesystem, storage.filesystem.cat_file

    def watch(url: str, *, start: int, end: int, timeout: float) -> bytes:
        asked.append((start, end))
        return bytes(cat_file(url, start=start, end=end))

    monkeypatch.setattr(filesystem, "cat_file", watch)
    with pytest.raises(DamagedStoreError, match="larger than 100 bytes"):
        storage.read("STORE.json", max_bytes=100)
    assert asked == [(0, 101)]


def test_a_single_committer_may_use_a_service_that_ignores_the_condition(server: ObjectServer) -> None:
    server.faults.ignores_if_none_match = True
    storage = create_storage(server.url(), single_committer=True)
    assert storage.create("commit/a.json", b"first")
    assert not storage.create("commit/a.json", b"second")
    assert server.get("store/commit/a.json") == b"first"


def test_threads_of_a_single_committer_take_turns(server: ObjectServer) -> None:
    server.faults.ignores_if_none_match = True
    storages = [create_storage(server.url(), single_committer=True) for _ in range(2)]
    for _ in range(8):
        # Everyone would look before the first has written.
        server.faults.add(Kind.SLOW_AFTER, methods=("GET",), delay_s=0.1)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storages[i % 2].create("commit/a.json", b"%d" % i), range(8)))
    assert sum(won) == 1
    assert server.get("store/commit/a.json") == b"%d" % won.index(True)


def test_a_refusal_that_does_not_name_its_condition_is_understood(
    server: ObjectServer, storage: ObjectStorage
) -> None:
    server.faults.unnamed_condition = True
    assert storage.create("commit/a.json", b"first")
    assert not storage.create("commit/a.json", b"second")


def test_a_bucket_that_is_not_there_is_named(server: ObjectServer) -> None:
    storage = ObjectStorage(f"s3://absent-{server.bucket}/store")
    calls: list[Callable[[], object]] = [
        lambda: storage.read("STORE.json", max_bytes=9),
        lambda: storage.list_files("commit"),
        lambda: storage.map_file("data/a.arrow", sha256=SHARD_HASH),
        lambda: storage.create("STORE.json", b"identity"),
        lambda: list_locations(f"s3://absent-{server.bucket}"),
        lambda: create_storage(storage.root),
    ]
    for call in calls:
        with pytest.raises(ResourceError, match="there is no such bucket"):
            call()


def test_a_public_bucket_is_read_without_an_account(
    server: ObjectServer, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ResourceError, match="no usable credentials"):
        storage.read("STORE.json", max_bytes=9)


def test_objects_that_stand_for_directories_are_no_files(
    server: ObjectServer, storage: ObjectStorage
) -> None:
    server.put("store/commit/", b"")
    server.put("store/commit/a.json", b"record")
    assert [file.name for file in storage.list_files("commit")] == ["commit/a.json"]


def test_sixteen_threads_read_at_once(server: ObjectServer, storage: ObjectStorage) -> None:
    for i in range(16):
        server.put(f"store/commit/{i}.json", b"%d" % i)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda i: storage.read(f"commit/{i}.json", max_bytes=9), [*range(16)] * 4))
    assert found == [b"%d" % i for i in [*range(16)] * 4]


def _read_in_child(storage: ObjectStorage, answers: Any) -> None:
    answers.put((os.getpid(), storage.read("STORE.json", max_bytes=99)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_reads_while_its_parent_goes_on(
    server: ObjectServer, storage: ObjectStorage, method: str
) -> None:
    server.put("store/STORE.json", b"identity")
    assert storage.read("STORE.json", max_bytes=99) == b"identity"
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(storage, answers))
    child.start()
    pid, data = answers.get(timeout=60)
    child.join(30)
    assert (child.exitcode, data) == (0, b"identity")
    assert pid != os.getpid()
    assert storage.read("STORE.json", max_bytes=99) == b"identity"


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RecipeError, match=r"pip install tmkd\[gcs\]"):
        open_storage("gs://bucket/store")
    with pytest.raises(RecipeError, match="knows no storage named nowhere"):
        open_storage("nowhere://bucket/store")


def test_importing_the_locations_loads_no_fsspec() -> None:
    import subprocess

    code = (
        "import sys, schemas.storage.location as l; l.open_storage('/tmp'); "
        "sys.exit('fsspec' in sys.modules or 's3fs' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_takes_a_file_of_unknown_age_for_old() -> None:
    at_noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    assert _modified_s({"LastModified": at_noon}) == at_noon.timestamp()
    assert _modified_s({"updated": "2026-01-02T12:00:00+00:00"}) == at_noon.timestamp()
    assert _modified_s({"created": 5.0}) == 5.0
    assert datetime.now(UTC).timestamp() - _modified_s({"name": "a"}) < 60
