from __future__ import annotations

from pathlib import Path

import pytest

from cluster.commands import precompute_recipe
from cluster.run_context import RunOptions
from cluster.run_directory import RunDirectory
from schemas.errors import RecipeError
from schemas.recipe import Recipe


def test_a_choice_of_a_teacher_that_no_student_uses_is_refused(tmp_path: Path) -> None:
    corpus = {"labels": ["a", "b"], "text": ["x"], "parts": [{"kind": "file", "path": "x.jsonl"}]}
    recipe = Recipe.model_validate(
        {
            "name": "run",
            "out": str(tmp_path),
            "corpora": {"train": corpus},
            "teachers": [{"name": "used", "model": "m"}, {"name": "unused", "model": "m"}],
            "student": {"init": {"kind": "layers", "model": "m"}, "arm": "m-o-1"},
            "stages": [{"kind": "finetune", "corpus": "train", "teachers": ["used"]}],
        }
    )
    for name in ("unused", "nobody"):
        with pytest.raises(RecipeError, match=f"no student uses a teacher named {name}; there are used"):
            precompute_recipe(recipe, RunOptions(teachers=(name,)))


def test_a_tilde_in_the_output_root_is_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    corpus = {"labels": ["a", "b"], "text": ["x"], "parts": [{"kind": "file", "path": "x.jsonl"}]}
    fields = {"name": "run", "corpora": {"train": corpus}, "compare": {"arms": []}}
    student = {"init": {"kind": "layers", "model": "m"}, "arm": "golden"}
    stages = [{"kind": "finetune", "corpus": "train"}]
    places = {"out": "~/runs", "store": {"root": "~/stores"}}
    recipe = Recipe.model_validate({**fields, "student": student, "stages": stages, **places})
    directory = RunDirectory.of(recipe)
    assert (str(directory.run), str(directory.stores)) == ("/home/somebody/runs/run", "/home/somebody/stores")
