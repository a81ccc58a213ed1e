"""Planning a run's corpora: what may change between two starts and what may not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.arms import part_sources
from cluster.planning import PlannedCorpus, plan_corpora
from cluster.run_directory import RunDirectory
from cluster.stores_lock import check_locked, locked_parts
from schemas.errors import DataError, RefusedError
from schemas.plan import make_plan
from schemas.recipe import Recipe
from schemas.records import StoresLock
from schemas.rows import open_rows
from tests.store_factory import make_store


def write_texts(path: Path, texts: Sequence[str], label: int = 0) -> None:
    path.write_text("".join(json.dumps({"x": text, "label": label}) + "\n" for text in texts))


def make_recipe(directory: Path, **changes: Any) -> Recipe:
    """A recipe of one student without teachers over ``first.jsonl`` and ``second.jsonl``."""
    parts = [{"kind": "file", "name": name, "path": f"{name}.jsonl"} for name in ("first", "second")]
    corpus = {"labels": ["a", "b"], "text": ["x"]}
    fields: dict[str, Any] = {
        "name": "run",
        "out": str(directory / "runs"),
        "data_root": str(directory),
        "corpora": {
            "train": {**corpus, "parts": parts},
            "test": {**corpus, "parts": [{"kind": "file", "path": "test.jsonl"}]},
        },
        "student": {"init": {"kind": "layers", "model": "m"}, "arm": "golden"},
        "stages": [{"kind": "finetune", "corpus": "train"}],
        "compare": {"arms": []},
    }
    return Recipe.model_validate({**fields, **changes})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_texts(tmp_path / "first.jsonl", ["one", "two", "three"])
    write_texts(tmp_path / "second.jsonl", ["four", "five"])
    write_texts(tmp_path / "test.jsonl", ["six", "two"])
    return tmp_path


def plan_run(data: Path, **changes: Any) -> dict[str, PlannedCorpus]:
    recipe = make_recipe(data, **changes)
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True, exist_ok=True)
    return plan_corpora(recipe, directory)


def plan(data: Path, **changes: Any) -> dict[str, list[tuple[str, int]]]:
    """Plans the run and returns names and sizes of the parts of each corpus."""
    planned = plan_run(data, **changes)
    return {name: [(p.part, p.num_rows) for p in corpus.parts] for name, corpus in planned.items()}


def test_a_file_in_the_middle_of_a_corpus_may_grow(data: Path) -> None:
    assert plan(data) == {"train": [("first", 3), ("second", 2)]}
    write_texts(data / "first.jsonl", ["one", "two", "three", "more"])
    grown = {"train": [("first", 3), ("first+1", 1), ("second", 2)]}
    assert plan(data) == grown
    assert plan(data) == grown


@pytest.mark.parametrize(
    "texts", [["one", "two"], ["one", "two", "three"], ["one", "other", "three", "more"]]
)
def test_a_file_that_shrank_or_changed_is_refused(data: Path, texts: list[str]) -> None:
    plan(data)
    write_texts(data / "first.jsonl", ["one", "two", "three", "more"])
    plan(data)
    write_texts(data / "first.jsonl", texts)
    with pytest.raises(RefusedError, match=r"corpus train/first(\+1)? has changed .*fingerprint: ") as caught:
        plan(data)
    assert caught.value.exit_code == 4
    write_texts(data / "first.jsonl", ["one", "two", "three", "more"])
    assert plan(data)["train"][1] == ("first+1", 1)


def test_golden_labels_that_changed_are_refused(data: Path) -> None:
    plan(data)
    write_texts(data / "first.jsonl", ["one", "two", "three"], label=1)
    with pytest.raises(RefusedError, match=r"corpus train/first has changed .*labels: "):
        plan(data)
    # The stores stay valid, a training on these labels does not.
    after = plan_run(data, name="other")["train"].parts[0]
    write_texts(data / "first.jsonl", ["one", "two", "three"])
    before = plan_run(data)["train"].parts[0]
    (now,), (then,) = (part_sources(locked_parts((part,), 4096, {})) for part in (after, before))
    assert (now.fingerprint, now.plan_hash) == (then.fingerprint, then.plan_hash)
    assert now.labels_hash != then.labels_hash


def test_another_run_may_plan_what_it_likes(data: Path) -> None:
    plan(data)
    write_texts(data / "first.jsonl", ["one"])
    assert plan(data, name="other")["train"][0] == ("first", 1)


def test_corpora_that_no_stage_uses_are_not_read(data: Path) -> None:
    (data / "test.jsonl").unlink()
    assert list(plan(data)) == ["train"]


def test_a_damaged_lock_says_what_to_do(data: Path) -> None:
    plan(data)
    lock = RunDirectory.of(make_recipe(data)).corpora_lock
    lock.write_bytes(lock.read_bytes().replace(b"first", b"third"))
    with pytest.raises(DataError, match="delete it to plan the run anew"):
        plan(data)


def test_stores_that_were_made_before_a_corpus_grew_are_not_enough(data: Path) -> None:
    planned = plan_run(data)
    lock = StoresLock(corpora={"train": locked_parts(planned["train"].parts, 4096, {})})
    check_locked({"train": planned["train"].parts}, lock)
    write_texts(data / "first.jsonl", ["one", "two", "three", "more"])
    with pytest.raises(RefusedError, match=r"corpus train has changed .*run `tmkd precompute`"):
        check_locked({"train": plan_run(data)["train"].parts}, lock)


@pytest.mark.parametrize(("label", "dropped"), [(-1, [1]), (0, None)])
def test_unlabelled_rows_that_share_a_text_with_an_evaluation_corpus_are_dropped(
    data: Path, label: int, dropped: list[int] | None
) -> None:
    write_texts(data / "first.jsonl", ["one", "two", "three"], label)
    planned = plan_run(data, evaluation={"corpora": ["test"]})
    corpus = planned["train"]
    assert corpus.num_dropped == len(dropped or [])
    assert dropped is None or np.load(str(corpus.dropped_rows)).tolist() == dropped
    assert planned["test"].num_dropped == 0


def test_the_cut_of_a_part_is_that_of_its_stores(data: Path, tmp_path: Path) -> None:
    first, second = plan_run(data)["train"].parts
    cut = make_plan(open_rows(first.rows_path), 2)
    store = make_store(tmp_path / "store", cut, np.zeros((3, 2), np.float32), labels=("a", "b"))
    stores = {("t", "train", "first"): str(store), ("t", "other", "second"): str(store)}
    one, two = locked_parts((first, second), 4096, stores)
    assert (one.shard_rows, one.plan_hash, one.stores) == (2, cut.plan_hash, {"t": str(store)})
    assert (two.shard_rows, two.stores) == (4096, {})
