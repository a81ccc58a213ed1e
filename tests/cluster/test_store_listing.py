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
from tests.cluster.store_users import write_lock, write_stage
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


def test_a_listing_counts_the_students_of_a_store_and_names_them_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "stores" / "a"
    write_store(root)
    for seed in (1, 2):
        stage = tmp_path / "run" / "students" / "m-o-1" / f"seed-{seed}" / "stage-1-finetune"
        write_stage(stage, f"m-o-1/seed-{seed}/stage-1", str(root))
    assert run_command(["store", "ls", str(tmp_path / "stores")]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert row.split()[0] == "a"
    assert row.split()[-1] == "2"
    assert run_command(["store", "ls", str(tmp_path / "stores"), "--students"]) == 0
    out = capsys.readouterr().out
    assert "run/m-o-1/seed-1" in out
    assert "run/m-o-1/seed-2" in out
    assert run_command(["store", "ls", str(tmp_path / "stores"), "--json"]) == 0
    (store,) = json.loads(capsys.readouterr().out)["stores"]
    assert store["students"] == ["run/m-o-1/seed-1", "run/m-o-1/seed-2"]
    assert (store["name"], store["teacher"], store["corpus"]) == ("a", "t1", "pairs")


def test_runs_of_another_output_root_are_found_where_it_is_named(tmp_path: Path) -> None:
    root = tmp_path / "far" / "stores" / "a"
    write_store(root)
    write_stage(tmp_path / "runs" / "r" / "students" / "golden" / "stage-1", "golden/stage-1", str(root))
    (store,) = list_stores(tmp_path / "far" / "stores")
    assert store.students == ()
    (store,) = list_stores(tmp_path / "far" / "stores", [tmp_path / "runs"])
    assert store.students == ("r/golden",)


def test_a_listing_is_cut_down_to_a_teacher_and_a_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write_store(tmp_path / "stores" / name, teacher=name)
    write_lock(tmp_path / "run", renamed=str(tmp_path / "stores" / "b"))

    def listed(*options: str) -> list[str]:
        assert run_command(["store", "ls", str(tmp_path / "stores"), "--json", *options]) == 0
        return [store["name"] for store in json.loads(capsys.readouterr().out)["stores"]]

    assert listed() == ["a", "b"]
    assert listed("--teacher", "a") == ["a"]
    assert listed("--teacher", "renamed") == listed("--teacher", "b", "--corpus", "pairs") == ["b"]
    assert listed("--corpus", "absent") == []
