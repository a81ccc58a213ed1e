"""``tmkd evaluate`` on language models, and what the other commands say of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import run_command
from cluster.language.student_task import LanguageStudentTask, write_language_task
from precompute.language_teacher import LoadedLanguageModel
from tests.cluster.tiny_students import save_student
from tests.precompute.tiny_language import (
    VOCAB,
    WORDS,
    make_documents,
    make_tokenizer,
    save_tiny_llama,
    save_tiny_masked,
    write_corpus,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commands")
    for seed, name in enumerate(("teacher", "student", "bare")):
        save_tiny_llama(root / name, seed=seed)
    write_language_task(
        LanguageStudentTask(
            objective="causal",
            tokenizer="0" * 64,
            vocab=VOCAB,
            max_length=16,
            arm="top-k",
            seed=5,
            teachers=("t",),
            fingerprint="f",
        ),
        root / "student",
    )
    save_tiny_llama(root / "foreign", tokenizer=make_tokenizer(words=WORDS[::-1]))
    save_tiny_masked(root / "masked")
    save_student(root / "classifier")
    (root / "empty").mkdir()
    write_corpus(root / "dev.jsonl", [{"text": text} for text in make_documents(12)])
    write_corpus(root / "labelled.jsonl", [{"text": "w1", "label": 0}])
    write_recipe(root / "recipe.yaml", root)
    write_recipe(root / "alone.yaml", root, evaluation={"corpora": ["dev"], "with_teachers": False})
    write_recipe(root / "nothing.yaml", root, evaluation={})
    labels = {
        "labels": ["yes", "no"],
        "text": ["text"],
        "parts": [{"kind": "file", "path": "labelled.jsonl"}],
    }
    classification = {
        "name": "classes",
        "data_root": str(root),
        "corpora": {"dev": labels},
        "student": {"init": {"kind": "layers", "model": "m"}, "arm": "golden"},
        "stages": [{"kind": "finetune", "corpus": "dev"}],
        "evaluation": {"corpora": ["dev"]},
    }
    (root / "classes.yaml").write_text(yaml.safe_dump(classification))
    return root


def write_recipe(path: Path, root: Path, **changes: Any) -> None:
    document = {
        "task": "language",
        "name": path.stem,
        "out": str(root / "runs"),
        "data_root": str(root),
        "corpora": {"dev": {"max_length": 16, "parts": [{"kind": "file", "path": "dev.jsonl"}]}},
        "teachers": [{"name": "t", "model": str(root / "teacher"), "keep": {"kind": "top_k", "k": 5}}],
        "student": {"init": {"kind": "layers", "model": str(root / "teacher"), "layers": 1}},
        "stages": [{"corpus": "dev", "teachers": ["t"], "losses": [{"name": "ghost_kl"}]}],
        "evaluation": {"corpora": ["dev"]},
    }
    path.write_text(yaml.safe_dump(document | changes))


def evaluate(root: Path, student: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert run_command(["evaluate", str(root / student), "--recipe", str(root / recipe), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_student_is_measured_beside_its_teachers(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate(root, "student", "recipe.yaml", capsys)
    assert (found["task"], found["main_arm"]) == ("language", "top-k")
    teacher, student = found["corpora"][0]["models"]
    assert (teacher["name"], student["name"], student["seeds"]) == ("t", "top-k", [5])
    assert student["teachers"] == ["t"]
    assert student["perplexity"] > 1
    assert set(student["agreement"]) == {"t"}
    # It only looked: no run was there, and none is.
    assert not (root / "runs" / "recipe").exists()


def test_a_model_that_says_nothing_of_itself_is_called_like_the_recipes_student(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = evaluate(root, "bare", "alone.yaml", capsys)["corpora"][0]["models"]
    assert (row["name"], row["seeds"]) == ("student", [17])


def test_the_table_is_printed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", str(root / "student"), "--recipe", str(root / "alone.yaml")]) == 0
    captured = capsys.readouterr()
    assert "perplexity" in captured.out
    assert "top-k" in captured.out


def test_what_the_recipes_run_has_measured_is_not_measured_again(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(root / "again.yaml", root)
    (root / "runs" / "again").mkdir(parents=True)
    loads: list[str] = []
    original = LoadedLanguageModel.load

    def load(spec: Any) -> LoadedLanguageModel:
        loads.append(Path(spec.model_path).name)
        return original(spec)

    monkeypatch.setattr(LoadedLanguageModel, "load", load)
    first = evaluate(root, "student", "again.yaml", capsys)
    copy = shutil.copytree(root / "student", root / "copied")
    assert evaluate(root, copy.name, "again.yaml", capsys) == first
    evaluate(root, "bare", "again.yaml", capsys)
    assert loads == ["teacher", "student", "bare"]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (
            ["predict", "student", "--data", "labelled.jsonl"],
            2,
            "student is a language model; predict labels rows: let transformers generate text",
        ),
        (
            ["predict", "masked", "--data", "labelled.jsonl"],
            2,
            "masked is a language model; predict labels rows",
        ),
        (
            ["evaluate", "student", "--data", "labelled.jsonl"],
            2,
            "student is a language model; --data is for labelled rows: give --recipe",
        ),
        (
            ["evaluate", "student", "--recipe", "classes.yaml"],
            2,
            "student is a language model; evaluate it on a recipe of its own (task: language)",
        ),
        (
            ["export", "student", "plain"],
            2,
            "student is a language model; there are no heads to fold: plain transformers opens it as it is",
        ),
        (
            ["evaluate", "classifier", "--recipe", "recipe.yaml"],
            2,
            "classifier is a classifier, and recipe recipe is one of language models",
        ),
        (["evaluate", "empty", "--recipe", "recipe.yaml"], 3, "empty: is no language model"),
        (
            ["evaluate", "foreign", "--recipe", "recipe.yaml"],
            4,
            "foreign has another tokenizer than the recipe's student",
        ),
        (
            ["evaluate", "student", "--recipe", "nothing.yaml"],
            2,
            "evaluation.corpora: the recipe names no evaluation corpus",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    expected: str,
) -> None:
    known = {path.name for path in root.iterdir()} | {"plain"}
    words = [str(root / word) if word in known else word for word in arguments]
    assert run_command(words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_a_damaged_task_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = shutil.copytree(root / "student", tmp_path / "student")
    path = student / "task.json"
    path.write_text(path.read_text().replace("top-k", "other"))
    assert run_command(["evaluate", str(student), "--recipe", str(root / "alone.yaml")]) == 3
    assert "task.json: does not match its own digest" in capsys.readouterr().err
