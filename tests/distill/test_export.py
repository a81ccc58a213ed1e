"""Plain checkpoints made of heads, opened by plain transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from distill import export
from distill.export import export_single_head, fold_student, folding_cost, open_classifier
from distill.predict import predict_rows
from distill.skeleton import quiet_transformers
from distill.student import MultiHeadStudent
from schemas.errors import RefusedError, ResourceError
from tests.distill.test_evaluate import write_part
from tests.distill.tiny_models import TEXTS, config_init, save_tokenizer

LABELS = ("relevant", "irrelevant", "unclear")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def build(tokenizer: Path, kind: str = "bert", heads=("golden", "alice", "bob")) -> MultiHeadStudent:
    student = MultiHeadStudent.from_init(config_init(tokenizer, kind), heads, LABELS, 3, max_length=32)
    with torch.no_grad():
        student.bank.bias.copy_(torch.linspace(-1, 1, student.bank.bias.numel()))
    return student.eval()


def plain_logits(directory: Path) -> np.ndarray:
    with quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(*map(list, zip(*TEXTS, strict=True)), padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "deberta-v2"])
def test_exported_logits_are_the_mean_of_the_heads_in_plain_transformers(
    tokenizer: Path, tmp_path: Path, kind: str
):
    student = build(tokenizer, kind)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    report = fold_student(student, tmp_path / "plain")
    logits_NHC = predict_rows(student, TEXTS).logits_NHC
    np.testing.assert_allclose(plain_logits(tmp_path / "plain"), logits_NHC.mean(axis=1), atol=1e-5)
    assert np.abs(logits_NHC[:, 0] - logits_NHC[:, 1]).max() > 0.1
    assert report.num_student_parameters - report.num_parameters == 2 * 3 * (32 + 1)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_exported_config_names_the_labels(tokenizer: Path, tmp_path: Path):
    fold_student(build(tokenizer), tmp_path / "plain")
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").config
    assert config.id2label == {0: "relevant", 1: "irrelevant", 2: "unclear"}
    assert config.label2id == {"relevant": 0, "irrelevant": 1, "unclear": 2}
    assert config.num_labels == 3
    names = {file.name for file in (tmp_path / "plain").iterdir()}
    assert "model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt")) for name in names)


def test_only_the_prediction_heads_are_folded(tokenizer: Path, tmp_path: Path):
    student = build(tokenizer)
    student = student.with_layout(
        student.layout.model_copy(update={"prediction_heads": ("alice", "bob")}), seed=3
    ).eval()
    student.save_pretrained(tmp_path / "student")
    report = fold_student(tmp_path / "student", tmp_path / "plain")
    assert report.heads == ("alice", "bob")
    expected_NC = predict_rows(student, TEXTS).logits_NHC[:, 1:].mean(axis=1)
    np.testing.assert_allclose(plain_logits(tmp_path / "plain"), expected_NC, atol=1e-5)


def test_a_single_head_is_exported_exactly(tokenizer: Path, tmp_path: Path):
    student = build(tokenizer, heads=("golden",))
    export_single_head(student, tmp_path / "teacher")
    opened = open_classifier(tmp_path / "teacher", max_length=32)
    expected, actual = predict_rows(student, TEXTS), predict_rows(opened, TEXTS)
    np.testing.assert_array_equal(actual.logits_NHC, expected.logits_NHC)
    assert opened.layout.labels == LABELS
    part = write_part(tmp_path / "rows.arrow", TEXTS, [0, 1, 2, 0, 1], "one")
    cost = folding_cost(student, tmp_path / "teacher", [part], LABELS)
    assert (cost.agreement, cost.largest_shift) == (1.0, 0.0)
    assert cost.accuracy_heads == cost.accuracy_folded


def test_a_named_head_of_several_is_exported(tokenizer: Path, tmp_path: Path):
    student = build(tokenizer)
    export_single_head(student, tmp_path / "bob", head="bob")
    expected_NC = predict_rows(student, TEXTS).logits_NHC[:, 2]
    np.testing.assert_allclose(plain_logits(tmp_path / "bob"), expected_NC, atol=1e-5)
    with pytest.raises(ValueError, match="no head is named carol"):
        export_single_head(student, tmp_path / "carol", head="carol")


def test_the_cost_of_folding_is_measured_on_labelled_rows(tokenizer: Path, tmp_path: Path):
    # All rows alike: golden is sure of label 0, alice and bob lean to label 1. Two heads outvote one by
    # probabilities, which are bounded; by logits the sure one wins.
    student = build(tokenizer)
    with torch.no_grad():
        student.bank.weight.zero_()
        student.bank.bias.copy_(torch.tensor([30.0, 0, 0, 0, 3.0, 0, 0, 3.0, 0]))
    fold_student(student, tmp_path / "plain")
    part = write_part(tmp_path / "rows.arrow", TEXTS, [1, 1, 0, 1, -1], "one")
    cost = folding_cost(student, tmp_path / "plain", [part], LABELS)
    # Probabilities: label 0 has (1 + 0.045 + 0.045) / 3, label 1 has 2 * 0.91 / 3. Logits: 10 against 2.
    assert (cost.num_rows, cost.num_labelled) == (5, 4)
    assert (cost.accuracy_heads, cost.accuracy_folded, cost.agreement) == (0.75, 0.25, 0.0)
    unlabelled = write_part(tmp_path / "unlabelled.arrow", TEXTS, [-1] * 5, "two")
    assert folding_cost(student, tmp_path / "plain", [unlabelled], LABELS).accuracy_heads is None


def test_what_is_there_is_never_overwritten(tokenizer: Path, tmp_path: Path):
    (tmp_path / "plain").mkdir()
    student = build(tokenizer)
    fold_student(student, tmp_path / "plain")
    before = (tmp_path / "plain" / "model.safetensors").read_bytes()
    with pytest.raises(RefusedError, match="is there already"):
        fold_student(build(tokenizer, heads=("golden",)), tmp_path / "plain")
    assert (tmp_path / "plain" / "model.safetensors").read_bytes() == before


def test_a_failed_export_leaves_nothing(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync_directory", fail)
    with pytest.raises(ResourceError, match="No space left"):
        fold_student(build(tokenizer), tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []
