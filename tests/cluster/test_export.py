"""``tmkd export`` in one process: what is written, what is not, and that transformers opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import pipeline

from cluster import export as export_module
from cluster import hub
from cluster.cli import run_command
from cluster.recipe_file import write_recipe
from cluster.run_directory import RunDirectory
from distill import onnx_export
from distill.export import open_classifier
from distill.onnx_export import OnnxExportError
from distill.predict import predict_rows
from schemas.errors import ResourceError
from schemas.records import StoresLock, encode_record
from tests.cluster.test_hub import REPO, StubApi
from tests.cluster.tiny_students import LABELS, TEXTS, make_corpus, make_recipe, save_student

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student of a run with a lock and no evaluation."""
    root = tmp_path_factory.mktemp("export")
    recipe = make_recipe(root)
    directory = RunDirectory.of(recipe)
    directory.run.mkdir()
    write_recipe(recipe, directory.recipe)
    logits = np.array([[0, 2], [3, 0], [1, 0], [5, 0], [0, 0]], np.float32)
    lock = StoresLock(corpora={"dev": make_corpus(root / "data", logits=logits).parts})
    directory.lock.write_bytes(encode_record(lock))
    shutil.move(save_student(root / "student"), directory.student)
    return directory.student


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StubApi:
    stub = StubApi()
    monkeypatch.setattr(hub, "HfApi", lambda: stub)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "hf_made_up")
    return stub


def run(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert run_command(["export", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def left(directory: Path) -> list[str]:
    """Names below a directory, staging directories included."""
    return sorted(path.name for path in directory.iterdir())


def test_an_export_is_one_directory_with_card_weights_and_tokenizer(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--license", "mit", "--source-license", "t=apache-2.0"]
    result = run([student, tmp_path / "plain", *arguments], capsys)
    assert left(tmp_path) == ["plain"]
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(
        left(tmp_path / "plain")
    )
    assert "onnx" not in result
    assert (result["directory"], result["card"]) == (
        str(tmp_path / "plain"),
        str(tmp_path / "plain" / "README.md"),
    )
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data["license"] == "mit"
    assert card.data.eval_results is not None
    (measured,) = card.data.eval_results
    assert measured.metric_value == pytest.approx(result["accuracy_folded"], abs=1e-6)
    assert "apache-2.0" in card.text
    assert str(student.parent.parent) not in str(card)


def test_plain_transformers_labels_pairs_of_texts_with_the_folded_probabilities(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run([student, tmp_path / "plain"], capsys)
    classify = pipeline("text-classification", model=str(tmp_path / "plain"), device="cpu")
    pairs = [{"text": question, "text_pair": passage} for question, passage in TEXTS]
    found = [classify(pair, top_k=None, truncation=True, max_length=24) for pair in pairs]
    folded = open_classifier(tmp_path / "plain", max_length=24)
    logits_NC = predict_rows(folded, TEXTS).logits_NHC[:, 0]
    expected_NC = torch.softmax(torch.as_tensor(logits_NC), dim=-1).numpy()
    for scores, expected_C in zip(found, expected_NC, strict=True):
        by_label = {entry["label"]: entry["score"] for entry in scores}
        assert [by_label[name] for name in LABELS] == pytest.approx(expected_C.tolist(), abs=1e-6)
    # Otherwise any label would do.
    assert np.ptp(expected_NC[:, 0]) > 0.01


@pytest.mark.slow
def test_an_onnx_file_is_compared_on_the_runs_own_rows(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    result = run([student, tmp_path / "plain", "--onnx"], capsys)
    assert result["onnx"]["max_difference"] <= result["onnx"]["tolerance"]
    assert result["onnx"]["path"] == str(tmp_path / "plain" / "model.onnx")
    assert result["onnx"]["num_rows"] == len(TEXTS) + len(onnx_export.PROBES)
    assert (tmp_path / "plain" / "model.onnx").exists()
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert "onnx" in card.data["tags"]
    assert "`model.onnx` gives the same logits" in card.text


@pytest.mark.parametrize("where", ["onnx", "card"])
def test_a_failure_leaves_nothing(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OnnxExportError("another function", max_difference=0.5)

    monkeypatch.setattr(export_module, "check_onnx_packages", lambda: None)
    monkeypatch.setattr(export_module, "export_onnx" if where == "onnx" else "write_card", fail)
    arguments = ["export", str(student), str(tmp_path / "plain"), *(["--onnx"] if where == "onnx" else [])]
    assert run_command(arguments) == 1
    captured = capsys.readouterr()
    assert "tmkd: another function" in captured.err
    assert captured.out == ""
    assert left(tmp_path) == []


def test_what_appears_at_the_output_in_the_meantime_is_not_overwritten(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_card(path: Path, *_: object) -> None:
        (tmp_path / "plain").mkdir()
        (tmp_path / "plain" / "theirs").touch()

    monkeypatch.setattr(export_module, "write_card", write_card)
    assert run_command(["export", str(student), str(tmp_path / "plain")]) == 4
    assert left(tmp_path / "plain") == ["theirs"]
    assert left(tmp_path) == ["plain"]


def test_a_missing_extra_costs_no_export(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    assert run_command(["export", str(student), str(tmp_path / "plain"), "--onnx"]) == ResourceError.exit_code
    assert "pip install '.[onnx]'" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_a_licence_that_the_hub_does_not_know_is_warned_of(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["export", str(student), str(tmp_path / "plain"), "--license", "House"]) == 0
    assert "the hub has no licence 'House'" in capsys.readouterr().err
    data = ModelCard.load(tmp_path / "plain" / "README.md").data
    assert (data["license"], data["license_name"]) == ("other", "House")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--public"], 2, "--push-to-hub"),
        (["--license", " "], 2, "--license is empty"),
        (["--source-license", "nonsense"], 2, "NAME=ID"),
        (["--source-license", "typo=mit"], 2, "no teacher or corpus 'typo'"),
        (["--push-to-hub", "name"], 2, "owner/name"),
        (["--push-to-hub", REPO], 6, "HF_HUB_OFFLINE"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(
    student: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    expected: str,
) -> None:
    assert run_command(["export", str(student), str(tmp_path / "plain"), *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tmkd: ")]
    assert len(lines) == 1
    assert expected in lines[0]
    assert left(tmp_path) == []


def test_nothing_goes_to_the_hub_unless_asked_and_then_privately(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], api: StubApi
) -> None:
    run([student, tmp_path / "kept"], capsys)
    assert api.calls == []
    result = run([student, tmp_path / "plain", "--push-to-hub", REPO], capsys)
    assert result["repository"] == f"https://hub.example/{REPO}"
    assert (api.repositories, api.uploaded) == ({REPO: True}, [tmp_path / "plain"])
    assert f"\n# {REPO}\n" in (tmp_path / "plain" / "README.md").read_text()


def test_a_public_repository_is_refused_before_the_export_and_a_failed_upload_after_it(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], api: StubApi
) -> None:
    api.repositories[REPO] = False
    arguments = ["export", str(student), str(tmp_path / "plain"), "--push-to-hub", REPO]
    assert run_command(arguments) == 4
    assert left(tmp_path) == []
    api.broken = OSError("the line is dead")
    assert run_command([*arguments, "--public"]) == 6
    assert f"`hf upload {REPO} {tmp_path / 'plain'}`" in capsys.readouterr().err
    assert (tmp_path / "plain" / "model.safetensors").exists()
