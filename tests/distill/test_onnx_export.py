"""ONNX files of plain checkpoints, run by onnxruntime."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import onnx_export
from distill.export import fold_student
from distill.onnx_export import ONNX_FILE, OnnxExportError, export_onnx
from distill.predict import batch_texts, predict_rows
from distill.skeleton import load_tokenizer
from distill.student import MultiHeadStudent
from schemas.errors import ResourceError
from tests.distill.tiny_models import TEXTS, config_init, save_tokenizer

LABELS = ("relevant", "irrelevant", "unclear")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def fold(tokenizer: Path, directory: Path, kind: str = "bert", seed: int = 3) -> MultiHeadStudent:
    init = config_init(tokenizer, kind)
    student = MultiHeadStudent.from_init(init, ("golden", "t"), LABELS, seed, max_length=32).eval()
    fold_student(student, directory)
    return student


@pytest.mark.parametrize("kind", ["bert", pytest.param("distilbert", marks=pytest.mark.slow)])
def test_the_onnx_file_gives_the_folded_logits_at_other_batch_sizes_and_lengths(
    tokenizer: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    import onnxruntime

    student = fold(tokenizer, tmp_path / "plain", kind)
    report = export_onnx(tmp_path / "plain", TEXTS, max_length=32)
    assert report.max_difference <= 1e-5
    assert report.lengths == (5, 32)
    assert report.num_rows == len(TEXTS) + len(onnx_export.PROBES)
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert [(entry.name, list(entry.shape)) for entry in session.get_outputs()] == [("logits", ["batch", 3])]
    expected_NC = predict_rows(student, TEXTS).logits_NHC.mean(axis=1)
    for batch_rows in (1, 2, 5):
        batches = batch_texts(
            load_tokenizer(str(tmp_path / "plain")), TEXTS, max_length=32, batch_rows=batch_rows
        )
        for batch in batches:
            inputs = {name: value.numpy() for name, value in batch.inputs.items()}
            np.testing.assert_allclose(session.run(None, inputs)[0], expected_NC[batch.rows_B], atol=1e-5)
    check_that_another_function_leaves_no_file(report.path, tokenizer, tmp_path / "other", kind, monkeypatch)


def check_that_another_function_leaves_no_file(
    file: Path, tokenizer: Path, directory: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of one model beside the weights of another; an export takes seconds, so it is used again."""
    fold(tokenizer, directory, kind, seed=4)
    monkeypatch.setattr(onnx_export, "_write", lambda module, example, path: shutil.copyfile(file, path))
    with pytest.raises(
        OnnxExportError, match="is not the same function: its logits differ by up to"
    ) as caught:
        export_onnx(directory, max_length=32)
    assert caught.value.max_difference is not None
    assert caught.value.max_difference > 0.01
    assert not (directory / ONNX_FILE).exists()
    assert (directory / "model.safetensors").exists()


def test_a_missing_extra_is_one_line_that_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ResourceError, match=r"needs onnxscript: pip install '\.\[onnx\]'"):
        export_onnx(tmp_path, max_length=32)


def test_an_exporter_that_fails_names_the_architecture(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    fold(tokenizer, tmp_path / "plain")

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(OnnxExportError, match=r"bert models cannot .*\(no such operator\)"):
        export_onnx(tmp_path / "plain", max_length=32)
