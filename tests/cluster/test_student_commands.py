"""``tmkd evaluate``, ``predict`` and ``export`` on a student without a run, right and wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli import run_command
from cluster.recipe_file import write_recipe
from cluster.run_directory import RunDirectory
from cluster.student_commands import rank_within
from distill.student import MultiHeadStudent
from schemas.records import StoresLock, encode_record
from tests.cluster.tiny_students import GOLDEN, LABELS, TEXTS, make_corpus, make_recipe, save_student

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("student")
    save_student(root / "student")
    save_student(root / "bare", task=False)
    lines = [
        {"question": question, "passage": passage, "label": label}
        for (question, passage), label in zip(TEXTS, GOLDEN, strict=True)
    ]
    write_lines(root / "rows.jsonl", lines)
    write_lines(root / "other_labels.jsonl", [{**line, "label": "maybe"} for line in lines])
    write_lines(root / "unlabelled.jsonl", [{**line, "label": -1} for line in lines])
    write_lines(root / "no_column.jsonl", [{"question": "a", "label": 0}])
    (root / "broken.jsonl").write_text("{\n")
    (root / "broken.parquet").write_bytes(b"PAR1")
    spoiled = shutil.copytree(root / "student", root / "spoiled")
    (spoiled / "model.safetensors").write_bytes(b"\0" * 100)
    return root


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command with ``--json``: stdout must be one JSON object and nothing else."""
    capsys.readouterr()
    assert run_command([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ranks_are_within_groups_and_ties_go_by_appearance() -> None:
    scores = np.array([0.1, 0.5, 0.9, 0.5, 0.2])
    assert rank_within(scores, ["a", "b", "a", "b", "b"]).tolist() == [2, 1, 1, 2, 3]
    assert rank_within(np.array([]), []).tolist() == []


def test_predict_gives_labels_probabilities_and_ranks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(["predict", str(root / "student"), "--data", str(root / "rows.jsonl")], capsys)["rows"]
    assert [row["row"] for row in rows] == list(range(5))
    for row in rows:
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
    assert [row["question"] for row in rows] == [question for question, _ in TEXTS]
    first, second = rows[0], rows[1]
    better = first if first["probabilities"]["yes"] > second["probabilities"]["yes"] else second
    assert (better["rank"], first["rank"] + second["rank"], rows[4]["rank"]) == (1, 3, 1)


def test_predict_writes_a_file_where_one_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = root / "predicted.jsonl"
    arguments = ["predict", str(root / "student"), "--data", str(root / "rows.jsonl"), "-o", str(output)]
    assert run(arguments, capsys) == {"num_rows": 5, "output": str(output)}
    assert [json.loads(line)["row"] for line in output.read_text().splitlines()] == list(range(5))


def test_evaluate_gives_parameters_and_speed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = run(["evaluate", str(root / "student"), "--data", str(root / "rows.jsonl")], capsys)["corpora"][
        0
    ]
    (row,) = corpus["models"]
    assert row["num_parameters"] == MultiHeadStudent.from_pretrained(root / "student").num_parameters
    assert row["examples_per_s"] > 0
    assert (row["name"], row["seeds"], corpus["num_rows"]) == ("m-o-1", [5], 4)
    assert row["ranking"]["num_questions"] == 2


def make_run(root: Path, name: str) -> Path:
    """Leaves a run's recipe, lock and student, with the store of a teacher that is gone."""
    recipe = make_recipe(root).model_copy(update={"name": name})
    directory = RunDirectory.of(recipe)
    directory.run.mkdir()
    write_recipe(recipe, directory.recipe)
    logits = np.array([[0, 2], [3, 0], [1, 0], [5, 0], [0, 0]], np.float32)
    lock = StoresLock(corpora={"dev": make_corpus(root / f"{name}-data", logits=logits).parts})
    directory.lock.write_bytes(encode_record(lock))
    shutil.copytree(root / "student", directory.student)
    return directory.run


def test_evaluate_reads_the_stores_that_the_recipes_run_has(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(root, "evaluated")
    corpus = run(["evaluate", str(made / "student"), "--recipe", str(made / "recipe.yaml")], capsys)[
        "corpora"
    ][0]
    teacher, student = corpus["models"]
    assert (teacher["name"], teacher["accuracy"], teacher["num_parameters"]) == ("t", 0.75, None)
    assert 0.0 <= student["agreement"]["t"] <= 1.0
    # It only looked.
    assert {path.name for path in made.iterdir()} == {"recipe.yaml", "stores.lock.json", "student"}


def test_export_measures_the_cost_on_the_students_own_run(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_run(root, "exported")
    result = run(["export", str(made / "student"), str(root / "plain")], capsys)
    assert (result["num_labelled"], result["heads"]) == (4, ["golden", "t"])
    assert 0.0 <= result["accuracy_folded"] <= 1.0
    assert result["num_parameters"] < result["num_student_parameters"]
    assert run_command(["export", str(made / "student"), str(root / "plain")]) == 4


def test_export_without_rows_says_how_to_measure_the_cost(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["export", str(root / "student"), str(root / "no_rows")]) == 0
    captured = capsys.readouterr()
    assert "accuracy" not in captured.out
    assert "--recipe or --data" in captured.err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["evaluate", "{root}/absent", "--data", "{root}/rows.jsonl"], 3, "is no student"),
        (["evaluate", "{root}/absent", "--recipe", "quickstart"], 3, "is no student"),
        (["predict", "{root}/absent", "--data", "{root}/rows.jsonl"], 3, "is no student"),
        (["export", "{root}/absent", "{root}/never"], 3, "is no student"),
        (["predict", "{root}/spoiled", "--data", "{root}/rows.jsonl"], 3, "cannot be"),
        (["predict", "{root}/bare", "--data", "{root}/rows.jsonl"], 2, "--columns"),
        (
            ["predict", "{root}/student", "--data", "{root}/rows.jsonl", "--columns", "question"],
            2,
            "1 columns",
        ),
        (["predict", "{root}/student", "--data", "{root}/rows.jsonl", "--columns", "a,b,c"], 2, "3 columns"),
        (["predict", "{root}/student", "--data", "{root}/rows.jsonl", "--question", "topic"], 2, "topic"),
        (["predict", "{root}/student", "--data", "{root}/absent.jsonl"], 3, "absent.jsonl"),
        (["predict", "{root}/student", "--data", "{root}/no_column.jsonl"], 3, "passage"),
        (["predict", "{root}/student", "--data", "{root}/broken.jsonl"], 3, "broken.jsonl"),
        (["predict", "{root}/student", "--data", "{root}/broken.parquet"], 3, "broken.parquet"),
        (["predict", "{root}/student", "--data", "{root}/rows.jsonl", "-o", "{root}/no/x"], 6, "no/x"),
        (["evaluate", "{root}/student", "--data", "{root}/other_labels.jsonl"], 3, "maybe"),
        (["evaluate", "{root}/student", "--data", "{root}/unlabelled.jsonl"], 3, "no labelled row"),
        (["evaluate", "{root}/student", "--data", "{root}/rows.jsonl", "--label", "gold"], 3, "gold"),
        (["export", "{root}/student", "{root}/never", "--data", "{root}/no_column.jsonl"], 3, "passage"),
        (
            ["export", "{root}/student", "{root}/never", "--data", "x", "--recipe", "quickstart"],
            2,
            "at most one of",
        ),
    ],
)
def test_wrong_input_is_one_line_with_its_exit_code(
    root: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    expected: str,
) -> None:
    monkeypatch.chdir(root)
    found = run_command([word.format(root=root) for word in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("tmkd: ")]
    assert len(lines) == 1, captured.err
    assert (found, expected in lines[0]) == (code, True), lines[0]
    assert captured.out == ""
    # Nothing is left behind: no checkpoint, no corpus of a recipe.
    assert not (root / "never").exists()
    assert not (root / "runs").exists()


def test_labels_of_another_task_are_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(root, "other")
    recipe = ["--recipe", str(made / "recipe.yaml"), "--set", "corpora.dev.labels=[good, bad]"]
    assert run_command(["evaluate", str(made / "student"), *recipe]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert all(name in line for name in (*LABELS, "good", "bad"))
