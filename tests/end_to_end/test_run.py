"""The main job, whole: teachers, stores, two stages, evaluation, report, and what a user does next."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from cluster.cli import run_command
from distill.store_reader import LogitStore
from distill.student import MultiHeadStudent
from schemas.evaluation import read_evaluation
from tests.end_to_end.project import LABELS, Project

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    assert run_command(["run", project.recipe()]) == 0
    return project


def run_directory(project: Project) -> Path:
    return project.root / "runs" / "run"


def test_a_run_leaves_what_the_design_says(project: Project) -> None:
    found = {path.name for path in run_directory(project).iterdir()}
    assert found >= {
        "recipe.yaml",
        "stores.lock.json",
        "student",
        "students",
        "evaluation.json",
        "report.html",
    }
    names = [
        row.name for row in read_evaluation(run_directory(project) / "evaluation.json").corpora[0].models
    ]
    assert names == ["first", "second", "ensemble", "tmkd", "golden"]


def test_stores_agree_with_plain_transformers_in_the_tasks_label_order(project: Project) -> None:
    lock = json.loads((run_directory(project) / "stores.lock.json").read_text())
    (part,) = lock["corpora"]["test"]
    second = LogitStore.open(part["stores"]["second"])
    assert second.native_labels == LABELS[::-1]
    evaluation = read_evaluation(run_directory(project) / "evaluation.json").corpora[0]
    logits = second.gather(np.arange(24))[:, ::-1]
    golden = np.arange(24) % 2
    row = next(row for row in evaluation.models if row.name == "second")
    assert row.accuracy == pytest.approx((logits.argmax(axis=1) == golden).mean())


def test_a_second_run_does_no_work(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_directory(project).glob("students/**/model/*")}
    # Nothing is loaded either: the weights are not there any more.
    hidden = project.root / "hidden.safetensors"
    weights = project.root / "models" / "second" / "model.safetensors"
    stamps = weights.stat()
    weights.rename(hidden)
    try:
        weights.write_bytes(b"\0" * stamps.st_size)
        # The hash is remembered by path, size and time.
        os.utime(weights, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
        assert run_command(["precompute", project.recipe()]) == 0
    finally:
        hidden.replace(weights)
    assert "logit stores: there already" in capsys.readouterr().err
    capsys.readouterr()
    assert run_command(["run", project.recipe(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert Path(result["student"]).is_dir()
    assert result["evaluation"]["corpora"][0]["corpus"] == "test"
    assert before == {
        path: path.stat().st_mtime_ns for path in run_directory(project).glob("students/**/model/*")
    }


def test_distill_needs_no_teacher(project: Project) -> None:
    recipe = project.recipe(
        name="again",
        compare={"arms": []},
        student={"init": {"kind": "config", "config": TINY, "tokenizer": str(project.root / "models/first")}},
    )
    again = project.root / "runs" / "again"
    again.mkdir()
    shutil.copy(run_directory(project) / "stores.lock.json", again)
    second = project.root / "models" / "second"
    second.rename(project.root / "gone")
    try:
        assert run_command(["distill", recipe, "--set", "student.arm=m-o-1"]) == 0
    finally:
        (project.root / "gone").rename(second)
    assert MultiHeadStudent.from_pretrained(again / "student").layout.heads == ("golden", "first", "second")


TINY = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_another_recipe_under_the_same_name_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["run", project.recipe(), "--set", "stages.1.alpha=0.25"]) == 4
    assert "alpha: 0.9 -> 0.25" in capsys.readouterr().err


def test_distill_refuses_stores_that_were_made_otherwise_than_the_recipe_says(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["distill", project.recipe(), "--set", "teachers.first.max_length=16"]) == 4
    said = capsys.readouterr().err
    assert "the store of teacher first over test/test is not what the recipe asks for now" in said
    assert "max_length: 32 -> 16" in said


def test_a_store_made_otherwise_is_refused_unless_a_new_one_is_asked_for(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["precompute", project.recipe(name="other"), "--set", "teachers.first.max_length=16"]
    assert run_command(arguments) == 4
    assert "max_length: 32 -> 16" in capsys.readouterr().err


def test_a_damaged_batch_is_found_and_named(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    copy = project.root / "damaged"
    lock = json.loads((run_directory(project) / "stores.lock.json").read_text())
    shutil.copytree(lock["corpora"]["train"][0]["stores"]["first"], copy)
    file = sorted((copy / "data").iterdir())[0]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run_command(["store", "verify", str(copy), "--deep"]) == 3
    line = capsys.readouterr().err
    assert "shard 0" in line
    assert "batch" in line


def test_the_student_predicts_ranks_and_exports(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    student = run_directory(project) / "student"
    data = project.root / "data" / "test.jsonl"
    capsys.readouterr()
    assert run_command(["predict", str(student), "--data", str(data)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 24
    assert {line["label"] for line in lines} <= set(LABELS)
    assert sorted(line["rank"] for line in lines) == [1] * 12 + [2] * 12
    exported = project.root / "exported"
    arguments = ["export", str(student), str(exported), "--recipe", project.recipe(), "--json"]
    assert run_command(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["heads"] == ["golden", "first", "second"]
    assert 0.0 <= result["accuracy_folded"] <= 1.0
    plain = AutoModelForSequenceClassification.from_pretrained(exported)
    assert plain.config.id2label == dict(enumerate(LABELS))
    with torch.inference_mode():
        assert plain(torch.tensor([[2, 5, 3]])).logits.shape == (1, 2)


def test_a_student_is_evaluated_on_a_recipe_and_on_a_file(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    student = str(run_directory(project) / "student")
    capsys.readouterr()
    assert run_command(["evaluate", student, "--recipe", project.recipe(), "--json"]) == 0
    recipe = json.loads(capsys.readouterr().out)["corpora"][0]
    arguments = ["evaluate", student, "--data", str(project.root / "data" / "test.jsonl"), "--json"]
    assert run_command(arguments) == 0
    file = json.loads(capsys.readouterr().out)["corpora"][0]
    ours = {row["name"]: row["accuracy"] for row in recipe["models"]}
    assert set(ours) == {"first", "second", "ensemble", "tmkd"}
    assert file["models"][0]["accuracy"] == ours["tmkd"]
    run = read_evaluation(run_directory(project) / "evaluation.json").corpora[0]
    assert ours["tmkd"] == next(row.accuracy for row in run.models if row.name == "tmkd")


def test_stores_are_listed_and_inspected(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run_command(["store", "ls", str(project.root / "runs" / "stores"), "--json"]) == 0
    stores = json.loads(capsys.readouterr().out)["stores"]
    assert len(stores) == 6
    lock = json.loads((run_directory(project) / "stores.lock.json").read_text())
    for parts in lock["corpora"].values():
        for root in parts[0]["stores"].values():
            for command in (["inspect", root, "--json"], ["verify", root, "--deep", "--json"]):
                assert run_command(["store", *command]) == 0
                assert json.loads(capsys.readouterr().out)
