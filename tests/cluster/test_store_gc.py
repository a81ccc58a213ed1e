"""Sweeping stores: what nobody needs goes, everything else stays."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from cluster.cli import run_command
from cluster.store_check import diagnose_store
from cluster.store_gc import parse_duration, raise_if_left_alone, sweep_stores
from precompute.store_writer import StoreWriter
from schemas.errors import DataError, RecipeError
from schemas.records import MANIFEST_FILE, STORE_FILE
from tests.cluster.project_stores import snapshot
from tests.cluster.store_damage import DAMAGE, flip_byte, read_commit
from tests.cluster.stores import make_batches, write_store
from tests.object_server import object_server

DAY_S = 86400.0


def age(path: Path, days: float = 2) -> None:
    then_s = time.time() - days * DAY_S
    os.utime(path, (then_s, then_s))


def age_all(root: Path, days: float = 2) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            age(path, days)


def write_again(store: StoreWriter, shard: int, revision: int) -> None:
    """Commits a shard once more, as a repair does."""
    task = store.plan.tasks()[shard]
    rows = list(range(task.start, task.stop))
    store.write_shard(task, make_batches(store, store.plan, rows), revision=revision)


def leave_garbage(root: Path) -> list[str]:
    """Leaves what crashes leave, and files that are none of tmkd's; returns the former's names."""
    garbage = [
        ".STORE.json.0123.tmp",
        "commit/.s000000.r0.json.0123.tmp",
        "data/.s000001-ab-0123.tmp",
        "data/s000001-0123456789abcdef.arrow",
        f"probe-{'0' * 32}-twice",
    ]
    for name in [*garbage, "notes.txt", "data/other.arrow", "commit/notes.tmp"]:
        (root / name).write_bytes(b"x" * 10)
    return garbage


@pytest.mark.parametrize("shards", [2, 3])
def test_lost_attempts_and_temporary_files_go_once_they_are_old(tmp_path: Path, shards: int) -> None:
    root = tmp_path / "s"
    write_store(root, shards=shards)
    age_all(root)
    sound = snapshot(root)
    garbage = leave_garbage(root)
    (swept,) = sweep_stores(root, DAY_S)
    assert swept.files == ()
    age_all(root)
    (swept,) = sweep_stores(root, DAY_S, dry_run=True)
    assert {file.name for file in swept.files} == set(garbage)
    assert all((root / name).exists() for name in garbage)
    (swept,) = sweep_stores(root, DAY_S)
    assert ({file.name for file in swept.files}, swept.num_bytes) == (set(garbage), 50)
    left = snapshot(root)
    assert set(left) == {*sound, "notes.txt", "data/other.arrow", "commit/notes.tmp"}
    assert all(left[name][0] == content for name, (content, _) in sound.items())


def test_an_attempt_at_a_shard_that_nobody_has_committed_stays(tmp_path: Path) -> None:
    root = tmp_path / "s"
    write_store(root, shards=2)
    attempt = root / "data" / "s000002-0123456789abcdef.arrow"
    attempt.write_bytes(b"x")
    age_all(root)
    assert sweep_stores(root, DAY_S)[0].files == ()
    assert attempt.exists()


def test_a_superseded_revision_goes_after_the_manifest_has_listed_a_newer_one_for_long(
    tmp_path: Path,
) -> None:
    root = tmp_path / "s"
    store = write_store(root)
    old_record, old_data = read_commit(root, 1)[0], store.commit_records()[1].record.file
    write_again(store, 1, revision=1)
    new_record = root / "commit" / "s000001.r1.json"
    age_all(root)
    # The manifest still lists the old revision: readers start with it.
    assert sweep_stores(root, DAY_S)[0].files == ()
    store.finish()
    # The manifest is young: readers that started before it read on.
    assert sweep_stores(root, DAY_S)[0].files == ()
    age(root / MANIFEST_FILE)
    os.utime(new_record)
    assert sweep_stores(root, DAY_S)[0].files == ()
    age(new_record)
    files = sweep_stores(root, DAY_S)[0].files
    assert [(file.name, file.reason) for file in files] == [
        ("commit/s000001.r0.json", "superseded record"),
        (f"data/{old_data}", "unreferenced data"),
    ]
    assert not old_record.exists()
    assert diagnose_store(root, deep=True).is_sound


def test_the_data_of_a_damaged_superseded_record_waits_and_goes_with_it(tmp_path: Path) -> None:
    root = tmp_path / "s"
    store = write_store(root)
    data = f"data/{store.commit_records()[1].record.file}"
    flip_byte(read_commit(root, 1)[0], 40)
    write_again(store, 1, revision=1)
    store.finish()
    age_all(root)
    age(root / MANIFEST_FILE, days=0)
    assert sweep_stores(root, DAY_S)[0].files == ()
    age(root / MANIFEST_FILE)
    assert {file.name for file in sweep_stores(root, DAY_S)[0].files} == {"commit/s000001.r0.json", data}
    assert diagnose_store(root, deep=True).is_sound


@pytest.mark.parametrize("damage", [d for d, (place, fault, _) in DAMAGE.items() if place != "plan"])
def test_a_damaged_store_is_left_alone_or_loses_nothing_that_counts(tmp_path: Path, damage: object) -> None:
    root = tmp_path / "s"
    write_store(root)
    garbage = leave_garbage(root)
    assert callable(damage)
    damage(root)
    age_all(root)
    before = snapshot(root)
    (swept,) = sweep_stores(root, DAY_S)
    left = snapshot(root)
    if swept.problem is not None:
        assert left == before
        with pytest.raises(DataError, match="nothing of it was deleted: run `tmkd store repair"):
            raise_if_left_alone([swept])
    else:
        assert {file.name for file in swept.files} <= set(garbage)


def test_what_is_committed_while_the_store_is_looked_at_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that took longer than the grace period to be committed, at the worst moment."""
    root = tmp_path / "s"
    store = write_store(root, shards=2)
    task = store.plan.tasks()[2]
    record = store.write_data(task, make_batches(store, store.plan, list(range(task.start, task.stop))))
    age_all(root)
    import cluster.store_gc as module

    find_superseded = module._find_superseded

    def commit_meanwhile(*arguments: object) -> object:
        found = find_superseded(*arguments)  # type: ignore[arg-type]
        store.commit(record)
        return found

    monkeypatch.setattr(module, "_find_superseded", commit_meanwhile)
    assert sweep_stores(root, DAY_S)[0].files == ()
    assert (root / "data" / record.file).exists()


def test_the_storages_clock_counts_where_it_is_behind(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    leave_garbage(tmp_path / "s")
    ahead = time.time() + 10 * DAY_S
    (swept,) = sweep_stores(tmp_path / "s", DAY_S, clock=lambda: ahead)
    assert swept.files == ()
    assert not list((tmp_path / "s").glob(".clock*"))


def test_a_root_of_stores_is_swept_and_a_damaged_one_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "c"):
        write_store(tmp_path / "stores" / name, teacher=name)
        leave_garbage(tmp_path / "stores" / name)
    flip_byte(tmp_path / "stores" / "b" / MANIFEST_FILE, 300)
    (tmp_path / "stores" / "c" / STORE_FILE).unlink()
    age_all(tmp_path)
    assert run_command(["store", "gc", str(tmp_path / "stores"), "--json"]) == 3
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert [len(store["files"]) for store in printed["stores"]] == [5, 0]
    assert printed["num_bytes"] == 50
    assert "stores/b" in captured.err
    assert run_command(["store", "gc", str(tmp_path / "stores" / "c")]) == 3
    assert run_command(["store", "gc", str(tmp_path / "stores" / "a"), "--dry-run"]) == 0
    assert "0 files" in capsys.readouterr().err


def test_a_grace_period_is_a_duration_of_an_hour_at_least(tmp_path: Path) -> None:
    assert [parse_duration(text) for text in ("24h", "1.5 d", "90m", "7200s")] == [86400, 129600, 5400, 7200]
    for text in ("24", "h", "-1h", "1w"):
        with pytest.raises(RecipeError, match="expected a number and a unit"):
            parse_duration(text)
    with pytest.raises(RecipeError, match="at least 1h"):
        sweep_stores(tmp_path, 3599)


def test_an_object_store_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    with object_server() as server:
        store = write_store(server.url("stores/s"))
        old = store.commit_records()[1].record.file
        write_again(store, 1, revision=1)
        store.finish()
        server.put("stores/s/data/s000001-0123.arrow", b"lost")
        later_s = time.time() + 2 * DAY_S
        # The service's clock counts; it cannot be put forward, so it is left out.
        monkeypatch.setattr("cluster.store_gc._storage_time", lambda storage: later_s)
        (swept,) = sweep_stores(server.url("stores"), DAY_S, clock=lambda: later_s)
        names = {"commit/s000001.r0.json", f"data/{old}", "data/s000001-0123.arrow"}
        assert {file.name for file in swept.files} == names
        assert not {f"stores/s/{name}" for name in names} & set(server.keys())
        assert diagnose_store(server.url("stores/s"), deep=True).is_sound
