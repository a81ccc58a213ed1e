from __future__ import annotations

from pathlib import Path

import pytest

from cluster.recipe_file import dump_recipe, load_recipe, shipped_recipes, shipped_sweeps, write_recipe
from cluster.sweep.points import load_sweep, make_cells
from schemas.errors import RecipeError
from schemas.recipe import Recipe

EXPERIMENTS = ("mnli", "snli", "qnli", "rte", "many_to_one")
MINIMAL = """
name: run
corpora:
  train: {labels: [a, b], text: [x], parts: [{kind: file, path: t.jsonl}]}
teachers: [{name: t1, model: some/model}]
student: {init: {kind: layers, model: some/model, layers: 2}, arm: m-o-1}
stages: [{kind: finetune, corpus: train, teachers: [t1]}]
"""


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).name


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("size", ["table", "smoke"])
def test_every_published_experiment_has_its_smaller_sizes(name: str, size: str) -> None:
    whole, smaller = load_recipe(name), load_recipe(name, size=size)
    assert isinstance(whole, Recipe)
    assert isinstance(smaller, Recipe)
    assert all(teacher.model == "google-bert/bert-large-uncased" for teacher in whole.teachers)
    assert all(str(teacher.model).startswith("package://") for teacher in smaller.teachers)
    # Every part can be read below a data root.
    parts = [part for corpus in smaller.corpora.values() for part in corpus.parts]
    assert all(getattr(part, "mirror", "source") for part in parts)


@pytest.mark.parametrize("name", shipped_sweeps())
@pytest.mark.parametrize("size", [None, "smoke"])
def test_every_shipped_sweep_is_valid(name: str, size: str | None) -> None:
    cells = make_cells(load_sweep(name, size=size), source=name)
    assert cells
    assert len({cell.directory.run for cell in cells}) == len(cells)


def test_there_are_shipped_recipes() -> None:
    assert {"quickstart", *EXPERIMENTS} <= set(shipped_recipes())
    assert {f"sweeps/{name}" for name in (*EXPERIMENTS, "ablations")} <= set(shipped_sweeps())


def test_a_shipped_recipe_is_found_under_its_repository_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/rte.yaml").name == "rte"
    assert load_sweep("recipes/sweeps/qnli.yaml").name == "qnli-table"


def test_overrides_reach_mappings_lists_and_named_items(recipe_path: Path) -> None:
    recipe = load_recipe(
        str(recipe_path),
        [
            "stages.0.alpha=0.5",
            "teachers.t1.num_actors=2",
            "store.shard_rows=7",
            "deepspeed.bf16.enabled=true",
        ],
        out="elsewhere",
    )
    assert recipe.stages[0].kind == "finetune"
    assert recipe.stages[0].alpha == 0.5
    assert recipe.teachers[0].num_actors == 2
    assert recipe.store.shard_rows == 7
    assert recipe.deepspeed == {"bf16": {"enabled": True}}
    assert recipe.out == "elsewhere"


def test_a_written_recipe_reads_back_as_itself(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_path))
    write_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe
    assert "alpha: 0.9" in dump_recipe(recipe)


def test_numbers_with_an_exponent_are_numbers_also_where_the_recipe_takes_anything(
    recipe_path: Path, tmp_path: Path
) -> None:
    recipe_path.write_text(MINIMAL.replace("layers: 2}", "layers: 2, overrides: {layer_norm_eps: 1e-12}}"))
    overrides = ["deepspeed.a=1e-5", "deepspeed.b=-2E3", 'deepspeed.c="1e-5"', "deepspeed.d=e5"]
    recipe = load_recipe(str(recipe_path), overrides)
    assert recipe.deepspeed == {"a": 1e-5, "b": -2000.0, "c": "1e-5", "d": "e5"}
    assert recipe.student.init.model_dump()["overrides"] == {"layer_norm_eps": 1e-12}
    write_recipe(recipe, tmp_path / "resolved.yaml")
    assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


@pytest.mark.parametrize(
    ("override", "field", "expected"),
    [
        ("stages.0.alpah=1", "stages.0.alpah", "unknown key; expected one of alpha, checkpoint_every_steps"),
        (
            "corpora.train.parts.0.pth=1",
            "corpora.train.parts.0.pth",
            "expected one of fold, kind, limit, name, path",
        ),
        ("teachers.0.dtype=int8", "teachers.0.dtype", "got 'int8'"),
        ("stages.0.alpha=2", "stages.0.alpha", "less than or equal to 1"),
        ("corpora.train.parts.0.kind=fil", "corpora.train.parts.0", "'hub', 'file', 'pydocqa'"),
        ("teachers.t2.dtype=float32", "teachers.t2.dtype", "a name of t1"),
        ("name.x=1", "name.x", "has no fields"),
        ("no-equals-sign", None, "dotted.path=value"),
    ],
)
def test_an_error_names_the_field_and_what_was_expected(
    recipe_path: Path, override: str, field: str | None, expected: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe_path), [override])
    assert caught.value.exit_code == 2
    assert caught.value.field == field
    assert expected in caught.value.message


def test_an_error_names_the_file(recipe_path: Path) -> None:
    recipe_path.write_text(MINIMAL + "typo: 1\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: typo: unknown key"):
        load_recipe(str(recipe_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "expected a mapping"),
        (MINIMAL + "name: again\n", "given twice"),
        ("", "mapping"),
    ],
)
def test_what_is_no_recipe_says_so(recipe_path: Path, text: str, expected: str) -> None:
    recipe_path.write_text(text)
    with pytest.raises(RecipeError, match=expected):
        load_recipe(str(recipe_path))


def test_a_merge_key_may_be_overridden(recipe_path: Path) -> None:
    recipe_path.write_text(
        MINIMAL.replace("some/model}]", "some/model, <<: {max_length: 16, seed: 1}, max_length: 32}]")
    )
    with pytest.raises(RecipeError, match=r"teachers\.0\.seed"):
        load_recipe(str(recipe_path))


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="quickstart"):
        load_recipe("nowhere/quickstart.yaml")


def test_a_size_is_applied_before_overrides_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "sized.yaml"
    path.write_text(MINIMAL + "sizes: {small: {student.init.layers: 1, seed: 5}, huge: {}}\n")
    assert load_recipe(str(path)).student.init.layers == 2  # type: ignore[union-attr]
    small = load_recipe(str(path), ["seed=6"], size="small")
    assert (small.student.init.layers, small.seed) == (1, 6)  # type: ignore[union-attr]
    assert "sizes" not in dump_recipe(small)
    with pytest.raises(RecipeError, match=r"sizes: there is no size 'medium'; the file has small, huge"):
        load_recipe(str(path), size="medium")


@pytest.mark.parametrize("sizes", ["[1]", "{small: 3}", "text"])
def test_sizes_that_are_none_are_refused(tmp_path: Path, sizes: str) -> None:
    path = tmp_path / "sized.yaml"
    path.write_text(f"{MINIMAL}sizes: {sizes}\n")
    with pytest.raises(RecipeError, match=r"sizes: expected names with \{dotted.path: value\} each"):
        load_recipe(str(path))
