"""A sweep's file becomes recipes: one per grid point and fold, all valid before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.sweep.points import load_sweep, make_cells
from schemas.errors import RecipeError

CORPUS = {"labels": ["a", "b"], "text": ["x"], "parts": [{"kind": "file", "path": "t.jsonl"}]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recipe: dict[str, Any] = {
        "name": "r",
        "corpora": {"train": CORPUS, "raw": {**CORPUS, "label": None}},
        "teachers": [{"name": "t", "model": "m"}],
        "student": {"init": {"kind": "layers", "model": "m", "layers": 2}},
        "stages": [
            {"kind": "pretrain", "corpus": "raw", "teachers": ["t"]},
            {"kind": "finetune", "corpus": "train", "teachers": ["t"]},
        ],
        "sizes": {"small": {"student.init.layers": 1, "stages.1.epochs": 7}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def write(folder: Path, **fields: Any) -> str:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "recipe": "recipe.yaml", **fields}, sort_keys=False))
    return str(path)


def cells(folder: Path, *overrides: str, **fields: Any) -> Any:
    source = write(folder, **fields)
    return make_cells(load_sweep(source), source=source, overrides=overrides, out=str(folder / "runs"))


def test_each_point_has_its_recipe_and_all_share_the_output_root(folder: Path) -> None:
    found = cells(folder, seeds=[3, 4], grid={"stages.1.alpha": [0.9, 0.5]}, overrides={"seed": 5})
    assert [cell.name for cell in found] == ["alpha=0.9", "alpha=0.5"]
    assert [cell.recipe.stages[1].alpha for cell in found] == [0.9, 0.5]
    assert {cell.recipe.compare.seeds for cell in found} == {(3, 4)}
    assert {cell.recipe.seed for cell in found} == {5}
    assert {cell.directory.out for cell in found} == {folder / "runs"}
    assert {cell.directory.stores for cell in found} == {str(folder / "runs" / "stores")}
    assert found[1].directory.run == folder / "runs" / "s" / "cells" / "alpha=0.5"


def test_the_recipes_size_comes_first_then_the_sweep_then_the_command_line_then_the_grid(
    folder: Path,
) -> None:
    (cell,) = cells(folder, size="small")
    assert (cell.recipe.student.init.layers, cell.recipe.stages[1].epochs) == (1, 7)
    (cell,) = cells(folder, size="small", overrides={"stages.1.epochs": 8})
    assert cell.recipe.stages[1].epochs == 8
    (cell,) = cells(folder, "stages.1.epochs=9", size="small", overrides={"stages.1.epochs": 8})
    assert cell.recipe.stages[1].epochs == 9
    (cell,) = cells(folder, "stages.1.epochs=9", grid={"stages.1.epochs": [2]})
    assert cell.recipe.stages[1].epochs == 2


def test_a_fold_sets_every_part_that_is_cut_into_folds(folder: Path) -> None:
    part = {"kind": "file", "path": "t.jsonl"}
    changes = {
        "corpora.train.parts": [{**part, "fold": {"of": 3, "take": "rest"}}],
        "corpora.held": {**CORPUS, "parts": [{**part, "fold": {"of": 3, "take": "held_out"}}]},
        "evaluation.corpora": ["held"],
    }
    found = cells(folder, overrides=changes, folds=[0, 2])
    assert [cell.name for cell in found] == ["base/fold-0", "base/fold-2"]
    for cell, index in zip(found, (0, 2), strict=True):
        indices = [cell.recipe.corpora[name].parts[0].fold.index for name in ("train", "held")]
        assert indices == [index, index]


def test_fields_that_share_an_alias_in_the_file_are_set_one_by_one(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    shared = text.replace(
        "corpora:\n", "corpora:\n  shared: &shared " + yaml.safe_dump(CORPUS, default_flow_style=True)
    )
    (folder / "recipe.yaml").write_text(shared.replace("name: r\n", "name: r\n") + "\n")
    document = yaml.safe_load(shared)
    assert document["corpora"]["shared"]
    (folder / "recipe.yaml").write_text(shared.replace("  train:\n", "  other: *shared\n  train:\n", 1))
    (cell,) = cells(folder, overrides={"corpora.other.parts.0.limit": 3})
    assert cell.recipe.corpora["other"].parts[0].limit == 3
    assert cell.recipe.corpora["shared"].parts[0].limit is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": {"student.layers": [1]}}, r"grid \(layers 1\): student.layers: unknown key"),
        ({"grid": {"stages.9.alpha": [1]}}, r"grid.stages.9.alpha: no item '9'; expected 0 to 1"),
        ({"grid": {"stages.1.alpha": [2]}}, r"grid \(alpha 2\): stages.1.alpha: .*less than or equal to 1"),
        ({"overrides": {"student.arms": "x"}}, "student.arms: unknown key"),
        ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
        ({"folds": [0]}, "folds: no part of the recipe's corpora has a fold"),
        ({"size": "big"}, "there is no size 'big'; the file has small"),
        ({"recipe": "nowhere"}, "there is no such file"),
        ({"baseline": "m-o-1"}, "baseline: the recipe has no arm m-o-1; it has tmkd, golden"),
        ({"grid": {"out": ["a", "b"]}}, "all points share one"),
        ({"rceipe": "x"}, "rceipe: unknown key; expected one of .*recipe"),
    ],
)
def test_what_is_wrong_is_named_before_anything_runs(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    source = write(folder, **fields)
    with pytest.raises(RecipeError, match=message):
        make_cells(load_sweep(source), source=source)
    assert not (folder / "runs").exists()
