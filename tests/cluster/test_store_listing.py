"""Tests of listing and describing stores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.cli import run_command
from cluster.store_listing import inspect_store, list_stores, print_stores
from schemas.errors import DataError
from schemas.records import (
    DATA_DIRECTORY,
    LOCK_FILE,
    STORE_FILE,
    LockedPart,
    StoresLock,
    encode_record,
)
from tests.cluster.store_damage import claim_format
from tests.cluster.stores import NUM_ROWS, write_store


def data_files(root: Path) -> list[Path]:
    return sorted((root / DATA_DIRECTORY).glob("*.arrow"))


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


def test_a_listing_shows_stores_that_lost_their_identity_or_have_another_format(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_store(tmp_path / name, teacher=name, shards=2 if name == "b" else 3)
    (tmp_path / "a" / STORE_FILE).unlink()
    (tmp_path / "b" / STORE_FILE).unlink()
    claim_format(tmp_path / "c", "2.0")
    problems = [store.problem or "" for store in list_stores(tmp_path)]
    assert problems[:2] == ["damaged: STORE.json is missing"] * 2
    assert "has format '2.0'" in problems[2]
    assert "damaged" not in problems[2]


def test_a_listing_of_what_cannot_be_read_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "a")
    assert run_command(["store", "ls", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "a" / STORE_FILE).write_text("{")
    assert run_command(["store", "ls", str(tmp_path)]) == 0
    assert "1 of 1 stores cannot be read: see `tmkd store verify" in capsys.readouterr().err


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
    with pytest.raises(DataError, match=r"is no store, it has no STORE\.json"):
        inspect_store(tmp_path)
