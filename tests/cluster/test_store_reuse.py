"""A new experiment pays for no row twice: stores are found by their hashes, whatever they are called.

What a run pays for is counted in shards that it computes and in rows that go through a teacher.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.commands import precompute_recipe
from cluster.recipe_file import load_recipe
from cluster.run_context import RunOptions
from cluster.store_listing import list_stores
from precompute.teacher import LoadedTeacher
from schemas.records import StoresLock
from tests.cluster.project_stores import ProjectStores, make_project_stores, use_here_pool
from tests.end_to_end.project import corpus, make_rows

ARMS = {"arms": ["golden", "1-o-1", "1avg-o-1", "m-o-1", "tkd", "tmkd"], "seeds": [1, 2]}


@dataclass(frozen=True)
class Paid:
    """What one precompute cost."""

    num_shards: int
    num_rows: int
    lock: StoresLock

    def roots(self) -> set[str]:
        """Returns all stores of the run."""
        return {
            root for parts in self.lock.corpora.values() for part in parts for root in part.stores.values()
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> ProjectStores:
    return make_project_stores(tmp_path_factory.mktemp("project"))


def pay(made: ProjectStores, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Paid:
    """Runs precompute with the project's recipe changed."""
    pool = use_here_pool(monkeypatch)
    rows: list[int] = []
    forward = LoadedTeacher.forward

    def count(self: LoadedTeacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows.append(len(batch["input_ids"]))
        return forward(self, batch)

    with monkeypatch.context() as counting:
        counting.setattr(LoadedTeacher, "forward", count)
        lock = precompute_recipe(load_recipe(made.project.recipe(**changes)), RunOptions())
    return Paid(len(pool.done), sum(rows), lock)


def teacher(name: str, model: Path, **changes: Any) -> dict[str, Any]:
    return {"name": name, "model": str(model), "max_length": 32, "tokens_per_batch": 256, **changes}


def stages(corpora: tuple[str, str], *names: str, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "corpus": corpus, "teachers": list(names), "max_steps": 3, **changes}
        for kind, corpus in zip(("pretrain", "finetune"), corpora, strict=True)
    ]


def renamed_teachers(models: Path) -> dict[str, Any]:
    teachers = [teacher("left", models / "second"), teacher("right", models / "first")]
    return {"teachers": teachers, "stages": stages(("unlabelled", "train"), "left", "right")}


def renamed_corpora(models: Path) -> dict[str, Any]:
    del models
    return {
        "corpora": {f"my-{name}": corpus(name) for name in ("train", "unlabelled", "test")},
        "stages": stages(("my-unlabelled", "my-train"), "first", "second"),
        "evaluation": {"corpora": ["my-test"]},
    }


def other_training(models: Path) -> dict[str, Any]:
    del models
    changed = stages(("unlabelled", "train"), "first", "second", learning_rate=1e-3, rows={"first": 20})
    return {"stages": changed, "seed": 99}


def other_machinery(models: Path) -> dict[str, Any]:
    teachers = [
        teacher(name, models / name, num_actors=3, tokens_per_batch=64) for name in ("first", "second")
    ]
    return {"teachers": teachers, "store": {"shard_rows": 16, "batch_rows": 3}}


CHANGES = {
    "only another name": lambda _: {},
    "other arms and seeds": lambda _: {"compare": ARMS},
    "teachers renamed and in another order": renamed_teachers,
    "corpora renamed": renamed_corpora,
    "another training": other_training,
    "other actors and batches": other_machinery,
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_experiment_finds_every_store_and_pays_nothing(
    made: ProjectStores, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    changes = CHANGES[change](made.project.root / "models")
    paid = pay(made, monkeypatch, name=change.replace(" ", "-"), **changes)
    assert (paid.num_shards, paid.num_rows) == (0, 0)
    assert paid.roots() == set(made.roots.values())


def test_the_catalogue_knows_a_store_by_each_of_its_names(
    made: ProjectStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    pay(made, monkeypatch, name="renaming", **renamed_teachers(made.project.root / "models"))
    root = made.roots["first", "train"]
    (store,) = [store for store in list_stores(Path(root).parent) if store.path == root]
    assert store.name == Path(root).name
    assert store.teacher == "first"
    assert {"first/train/train", "right/train/train"} <= set(store.names)
    assert {"run", "renaming"} <= set(store.runs)
    assert store.is_of("right", "train")
    assert not store.is_of("left")


def test_a_corpus_that_has_grown_by_a_part_pays_for_that_part_only(
    made: ProjectStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.project.write_rows("more", make_rows(20, seed=7))
    corpora = {name: corpus(name) for name in ("train", "unlabelled", "test")}
    corpora["train"]["parts"] += corpus("more")["parts"]
    paid = pay(made, monkeypatch, name="grown", corpora=corpora)
    # 20 rows in shards of 16, for two teachers.
    assert (paid.num_shards, paid.num_rows) == (4, 40)
    old, new = paid.lock.corpora["train"]
    assert old.stores == {name: made.roots[name, "train"] for name in ("first", "second")}
    assert (new.part, new.num_rows) == ("more", 20)
    assert paid.roots() == set(made.roots.values()) | set(new.stores.values())
    assert pay(made, monkeypatch, name="grown-again", corpora=corpora).num_rows == 0


def test_a_file_that_rows_were_appended_to_pays_for_those_rows_only(
    made: ProjectStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        json.loads(line) for line in (made.project.root / "data" / "train.jsonl").read_text().splitlines()
    ]
    path = made.project.write_rows("growing", rows)
    corpora = {name: corpus(name) for name in ("train", "unlabelled", "test")}
    corpora["train"]["parts"] = [{"kind": "file", "path": "growing.jsonl", "name": "train"}]
    # The same rows in another file are the same part.
    assert pay(made, monkeypatch, name="growing", corpora=corpora).num_rows == 0
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in make_rows(10, seed=8))
    paid = pay(made, monkeypatch, name="growing", corpora=corpora)
    assert (paid.num_shards, paid.num_rows) == (2, 20)
    assert [(part.part, part.num_rows) for part in paid.lock.corpora["train"]] == [
        ("train", 40),
        ("train+1", 10),
    ]
    assert set(made.roots.values()) < paid.roots()


def test_a_corpus_that_grew_and_was_renamed_pays_for_its_new_rows_only(
    made: ProjectStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        json.loads(line) for line in (made.project.root / "data" / "train.jsonl").read_text().splitlines()
    ]
    made.project.write_rows("renamed", rows + make_rows(6, seed=9))
    part = {"kind": "file", "path": "renamed.jsonl", "name": "train"}
    for name in ("pairs", "couples"):
        corpora = {key: corpus(key) for key in ("unlabelled", "test")} | {name: corpus("x", parts=[part])}
        paid = pay(
            made,
            monkeypatch,
            name=name,
            corpora=corpora,
            stages=stages(("unlabelled", name), "first", "second"),
        )
        # 6 new rows for two teachers, the first time.
        assert paid.num_rows == (12 if name == "pairs" else 0)
        assert [part.num_rows for part in paid.lock.corpora[name]] == [40, 6]
