from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import RecipeError, ResourceError
from schemas.storage.copy_cache import DEFAULT_MAX_BYTES, CopyCache, CopyError


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Source:
    """What the copies are fetched from; counts."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.num_fetches = 0

    def __call__(self, path: Path) -> None:
        self.num_fetches += 1
        path.write_bytes(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])


@pytest.fixture
def cache(tmp_path: Path) -> CopyCache:
    return CopyCache(tmp_path / "cache", 1000)


def copies(cache: CopyCache) -> set[str]:
    return {path.name for path in cache.directory.iterdir() if path.is_file()}


def test_a_file_is_fetched_once(cache: CopyCache) -> None:
    source = Source(b"shard")
    for _ in range(3):
        assert cache.map(hash_of(b"shard"), source).to_pybytes() == b"shard"
    assert source.num_fetches == 1
    assert copies(cache) == {hash_of(b"shard")}


def test_an_empty_file_is_a_copy_too(cache: CopyCache) -> None:
    assert cache.map(hash_of(b""), Source(b"")).size == 0
    assert cache.map(hash_of(b""), Source(b"not asked")).size == 0


@pytest.mark.parametrize("damage", [b"sharx", b"shar", b"shard!", b""], ids=repr)
def test_a_damaged_copy_is_deleted_and_fetched_again(cache: CopyCache, damage: bytes) -> None:
    source = Source(b"shard")
    cache.map(hash_of(b"shard"), source)
    (cache.directory / hash_of(b"shard")).write_bytes(damage)
    assert cache.map(hash_of(b"shard"), source).to_pybytes() == b"shard"
    assert source.num_fetches == 2


def test_a_damaged_copy_does_not_come_back_when_its_source_is_gone(cache: CopyCache) -> None:
    def absent(path: Path) -> None:
        raise FileNotFoundError(path)

    cache.map(hash_of(b"shard"), Source(b"shard"))
    (cache.directory / hash_of(b"shard")).write_bytes(b"sharx")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            cache.map(hash_of(b"shard"), absent)
        assert copies(cache) == set()


def test_what_is_spoiled_on_its_way_is_fetched_once_more_and_never_kept(cache: CopyCache) -> None:
    source = Source(b"sharx", b"shard")
    assert cache.map(hash_of(b"shard"), source).to_pybytes() == b"shard"
    assert source.num_fetches == 2
    always = Source(b"other")
    # A failed file must not be accepted on the next run.
    for num_fetches in (2, 4):
        with pytest.raises(CopyError, match="do not match"):
            cache.map(hash_of(b"absent"), always)
        assert always.num_fetches == num_fetches
    assert copies(cache) == {hash_of(b"shard")}


def test_a_fetch_that_fails_leaves_nothing(cache: CopyCache) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"sha")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cache.map(hash_of(b"shard"), fail)
    assert copies(cache) == set()


def test_the_least_recently_mapped_goes_first(cache: CopyCache) -> None:
    files = [bytes([i]) * 400 for i in range(3)]
    for age_s, data in ((300, files[0]), (200, files[1])):
        cache.map(hash_of(data), Source(data))
        then = time.time() - age_s
        os.utime(cache.directory / hash_of(data), (then, then))
    cache.map(hash_of(files[0]), Source(b"not asked"))
    cache.map(hash_of(files[2]), Source(files[2]))
    assert copies(cache) == {hash_of(files[0]), hash_of(files[2])}


def test_a_file_larger_than_the_limit_is_kept_alone(cache: CopyCache) -> None:
    cache.map(hash_of(b"small"), Source(b"small"))
    cache.map(hash_of(b"x" * 2000), Source(b"x" * 2000))
    assert copies(cache) == {hash_of(b"x" * 2000)}


def test_what_is_mapped_stays_readable_when_its_copy_is_evicted_discarded_or_replaced(
    cache: CopyCache,
) -> None:
    data = os.urandom(900)
    buffer = cache.map(hash_of(data), Source(data))
    cache.map(hash_of(b"y" * 500), Source(b"y" * 500))
    assert hash_of(data) not in copies(cache)
    assert buffer.to_pybytes() == data
    again = cache.map(hash_of(data), Source(data))
    assert cache.discard(hash_of(data))
    assert again.to_pybytes() == data
    cache.map(hash_of(data), Source(data))
    assert again.to_pybytes() == buffer.to_pybytes() == data


def test_files_of_others_and_of_running_processes_are_left_alone(cache: CopyCache) -> None:
    cache.directory.mkdir()
    key = hash_of(b"other")
    names = {f".{key}.running.tmp": 10.0, f".{key}.dead.tmp": 4000.0, "README": 9000.0}
    for name, age_s in names.items():
        (cache.directory / name).write_bytes(b"x" * 2000)
        os.utime(cache.directory / name, (time.time() - age_s,) * 2)
    cache.map(hash_of(b"shard"), Source(b"shard"))
    assert copies(cache) == {hash_of(b"shard"), f".{key}.running.tmp", "README"}


def test_a_directory_that_is_made_is_its_users_alone(cache: CopyCache) -> None:
    cache.map(hash_of(b"shard"), Source(b"shard"))
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700


def test_two_that_want_one_file_at_once_fetch_it_once(cache: CopyCache) -> None:
    source, found = Source(b"shard"), []

    def slowly(path: Path) -> None:
        source(path)
        time.sleep(0.2)

    threads = [
        threading.Thread(target=lambda: found.append(cache.map(hash_of(b"shard"), slowly))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [buffer.to_pybytes() for buffer in found] == [b"shard"] * 8
    assert source.num_fetches == 1


def test_without_file_locks_several_fetch_the_same_and_no_harm_is_done(
    cache: CopyCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert cache.map(hash_of(b"shard"), Source(b"shard")).to_pybytes() == b"shard"


def _map_at_random(directory: Path, sources: Path, seed: int, failures: Any) -> None:
    """Maps files in random order under a limit that holds two of them, spoiling a copy now and then."""
    cache, choice = CopyCache(directory, 9000), random.Random(seed)
    names = sorted(path.name for path in sources.iterdir())
    for _ in range(60):
        name = choice.choice(names)
        buffer = cache.map(name, lambda path, name=name: shutil.copyfile(sources / name, path))
        if choice.random() < 0.1:
            cache.discard(choice.choice(names))
        if choice.random() < 0.1:
            # As another program would: a new file in the copy's place.
            spoiled = directory / f"spoiled-{os.getpid()}"
            spoiled.write_bytes(b"spoiled")
            spoiled.replace(directory / choice.choice(names))
        if hash_of(buffer.to_pybytes()) != name:
            failures.put(name)
    failures.put(None)


def test_processes_that_fill_evict_and_spoil_at_once_read_the_right_bytes(
    cache: CopyCache, tmp_path: Path
) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    for i in range(6):
        data = bytes([i]) * 4000
        (sources / hash_of(data)).write_bytes(data)
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    children = [
        context.Process(target=_map_at_random, args=(cache.directory, sources, seed, failures))
        for seed in range(4)
    ]
    for child in children:
        child.start()
    assert [failures.get(timeout=60) for _ in children] == [None] * 4
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4


def test_a_full_disk_is_named_and_leaves_nothing(cache: CopyCache) -> None:
    def fill_disk(path: Path) -> None:
        path.write_bytes(b"sha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"cache: the disk is full"):
        cache.map(hash_of(b"shard"), fill_disk)
    assert copies(cache) == set()


def test_a_place_where_no_directory_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="TMKD_CACHE_DIR"):
        CopyCache(tmp_path / "file" / "cache").map(hash_of(b"shard"), Source(b"shard"))


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TMKD_CACHE_DIR", "TMKD_CACHE_BYTES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    default = CopyCache.from_environment()
    assert (default.directory, default.max_bytes) == (tmp_path / ".cache/tmkd/shards", DEFAULT_MAX_BYTES)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CopyCache.from_environment().directory == tmp_path / "xdg/tmkd/shards"
    monkeypatch.setenv("TMKD_CACHE_DIR", "~/elsewhere")
    monkeypatch.setenv("TMKD_CACHE_BYTES", "123")
    given = CopyCache.from_environment()
    assert (given.directory, given.max_bytes) == (tmp_path / "elsewhere", 123)


def test_a_cache_that_is_deleted_while_it_is_filled_does_not_look_like_a_missing_source(
    cache: CopyCache,
) -> None:
    source = Source(b"shard")

    def lose_directory(path: Path) -> None:
        source(path)
        if source.num_fetches == 1:
            shutil.rmtree(cache.directory)

    assert cache.map(hash_of(b"shard"), lose_directory).to_pybytes() == b"shard"
    assert source.num_fetches == 2


@pytest.mark.parametrize("text", ["", "64GiB", "-1", "1.5"])
def test_a_limit_that_is_no_number_of_bytes_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TMKD_CACHE_BYTES", text)
    with pytest.raises(RecipeError, match="TMKD_CACHE_BYTES"):
        CopyCache.from_environment()
