"""What is special to a local file system; what every backend does is in test_storage_contract.py."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from schemas.errors import DamagedStoreError, DataError, ResourceError
from schemas.fault_points import FaultPoint, listen
from schemas.storage.local import LocalStorage, create_local, list_local_stores


class DiedError(Exception):
    """Stands for the process's death."""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return create_local(tmp_path / "store")


@pytest.fixture
def root(storage: LocalStorage) -> Path:
    return Path(storage.root)


@pytest.fixture
def reached() -> Iterator[list[FaultPoint]]:
    found: list[FaultPoint] = []
    listen(found.append)
    yield found
    listen(None)


def fill(path: Path) -> int:
    return path.write_bytes(b"shard")


def test_the_steps_of_a_shard_come_in_the_order_of_the_protocol(
    storage: LocalStorage, reached: list[FaultPoint]
) -> None:
    assert storage.publish("data/a.arrow", fill) == 5
    assert storage.create("commit/a.json", b"record")
    storage.replace("manifest.json", b"manifest")
    assert reached == [
        FaultPoint.SHARD_SYNCED,
        FaultPoint.SHARD_RENAMED,
        FaultPoint.RECORD_WRITTEN,
        FaultPoint.RECORD_CREATED,
        FaultPoint.MANIFEST_WRITTEN,
        FaultPoint.MANIFEST_REPLACED,
    ]


def test_what_fails_before_the_rename_leaves_nothing(storage: LocalStorage, root: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half a sha")
        raise DiedError

    with pytest.raises(DiedError):
        storage.publish("data/a.arrow", fail)
    assert list((root / "data").iterdir()) == []


def test_of_many_creators_one_succeeds_and_its_bytes_are_there(storage: LocalStorage) -> None:
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda i: storage.create("commit/a.json", b"%d" % i), range(64)))
    assert sum(created) == 1
    assert storage.read("commit/a.json", max_bytes=9) == b"%d" % created.index(True)


def test_a_create_whose_answer_got_lost_is_known_to_have_won(
    storage: LocalStorage, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # NFS asks again, and is told that the file is there.

    monkeypatch.setattr(os, "link", link_twice)
    assert storage.create("commit/a.json", b"record")
    assert not storage.create("commit/a.json", b"record")
    assert [path.name for path in (root / "commit").iterdir()] == ["a.json"]


@pytest.mark.parametrize("link", ["file", "directory"])
def test_a_link_that_leads_out_of_the_store_is_damage(
    storage: LocalStorage, root: Path, tmp_path: Path, link: str
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.arrow").write_text("not yours")
    if link == "file":
        (root / "data" / "a.arrow").symlink_to(secret / "a.arrow")
    else:
        (root / "data").rmdir()
        (root / "data").symlink_to(secret)
    for read in (
        lambda: storage.read("data/a.arrow", max_bytes=99),
        lambda: storage.map_file("data/a.arrow"),
    ):
        with pytest.raises(DamagedStoreError, match="leads out of the store"):
            read()
    if link == "file":
        assert storage.list_files("data") == []


def test_a_store_behind_a_link_is_the_users_choice(storage: LocalStorage, root: Path, tmp_path: Path) -> None:
    storage.create("STORE.json", b"identity")
    (tmp_path / "link").symlink_to(root)
    assert LocalStorage(tmp_path / "link").read("STORE.json", max_bytes=99) == b"identity"


def test_a_pipe_is_damage_and_does_not_wait_for_a_writer(storage: LocalStorage, root: Path) -> None:
    os.mkfifo(root / "STORE.json")
    with pytest.raises(DamagedStoreError, match="no regular file"):
        storage.read("STORE.json", max_bytes=99)
    assert storage.list_files("") == []


def test_a_directory_in_a_files_place_is_damage(storage: LocalStorage, root: Path) -> None:
    (root / "STORE.json").mkdir()
    with pytest.raises(DamagedStoreError, match="no regular file"):
        storage.read("STORE.json", max_bytes=99)


def test_a_file_larger_than_it_may_be_is_not_read_whole(storage: LocalStorage, root: Path) -> None:
    with (root / "STORE.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DamagedStoreError, match="larger than 10 bytes"):
        storage.read("STORE.json", max_bytes=10)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, ResourceError), (errno.EIO, DamagedStoreError)], ids=str
)
def test_a_file_that_cannot_be_read_is_named(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    storage.create("STORE.json", b"identity")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(kind, match=r"STORE\.json"):
        storage.read("STORE.json", max_bytes=99)


def test_stores_are_listed_by_name_and_none_where_there_is_no_root(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert list_local_stores(tmp_path) == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert list_local_stores(tmp_path / "absent") == []


def test_a_file_in_the_place_of_a_root_of_stores_holds_none(tmp_path: Path) -> None:
    (tmp_path / "stores").write_bytes(b"")
    with pytest.raises(ResourceError, match="is no directory"):
        list_local_stores(tmp_path / "stores")


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for action in (lambda s: s.list_files("commit"), lambda s: s.read("STORE.json", max_bytes=9)):
        with pytest.raises(DataError, match=r"file: is no directory, so no store") as caught:
            action(LocalStorage(tmp_path / "file"))
        assert not isinstance(caught.value, DamagedStoreError)


def test_a_file_in_the_place_of_a_directory_is_damage_of_the_store(storage: LocalStorage, root: Path) -> None:
    (root / "commit").rmdir()
    (root / "commit").write_bytes(b"x")
    with pytest.raises(DamagedStoreError, match="commit cannot be read"):
        storage.list_files("commit")


@pytest.mark.parametrize("name", ["data", "commit"])
def test_nothing_is_written_through_a_link_that_leads_out_of_the_store(
    storage: LocalStorage, root: Path, tmp_path: Path, name: str
) -> None:
    (root / name).rename(tmp_path / "elsewhere")
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{name} leads out of the store, to .*elsewhere"):
        create_local(root)


def test_what_is_in_the_way_of_a_write_is_named(storage: LocalStorage, root: Path) -> None:
    (root / "manifest.json").mkdir()
    with pytest.raises(ResourceError, match=r"in the way at \S*/manifest\.json \(Is a directory\); move it"):
        storage.replace("manifest.json", b"manifest")
    assert [path.name for path in root.iterdir() if path.suffix == ".tmp"] == []
    (root / "data").rmdir()
    (root / "data").write_bytes(b"x")
    with pytest.raises(ResourceError, match=r"in the way at \S*/data \(File exists\)"):
        create_local(root)
