"""Loading a teacher, its tokens and its batches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from precompute.tasks import WorkerSpec
from precompute.teacher import LoadedTeacher
from schemas.errors import ResourceError, TeacherError
from schemas.recipe import Teacher
from tests.precompute.tiny import make_texts, save_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("teacher"))


def load(model: Path | str, **changes: Any) -> LoadedTeacher:
    fields = {"name": "tiny", "model": str(model), "max_length": 24, "tokens_per_batch": 96}
    return LoadedTeacher.load(WorkerSpec(Teacher.model_validate(fields | changes), str(model), None, 1))


def columns(num_rows: int) -> list[list[str]]:
    return [list(column) for column in zip(*make_texts(num_rows), strict=True)]


@pytest.mark.parametrize("truncation", ["longest_first", "only_first"])
@pytest.mark.parametrize("num_columns", [1, 2])
def test_tokens_are_those_of_the_tokenizer(model: Path, num_columns: int, truncation: str) -> None:
    texts = columns(600)[:num_columns]
    tokens = load(model, truncation=truncation, max_length=16).tokenise(texts)
    plain = AutoTokenizer.from_pretrained(model)
    expected = plain(*texts, truncation=truncation, max_length=16)
    assert tokens.lengths.tolist() == [len(row) for row in expected["input_ids"]]
    assert tokens.lengths.max() == 16
    assert set(tokens.inputs) == {"input_ids", "token_type_ids"}
    for name, values in tokens.inputs.items():
        assert values.tolist() == [token for row in expected[name] for token in row]


@pytest.mark.parametrize("truncation", ["only_first", "only_second"])
def test_a_row_that_the_truncation_cannot_shorten_is_a_teacher_error(model: Path, truncation: str) -> None:
    teacher = load(model, truncation=truncation, max_length=8)
    long = "the cat sat on the mat and ran"
    with pytest.raises(TeacherError, match=f"truncation {truncation} cannot shorten some row to 8 tokens"):
        teacher.tokenise([[long], [long]])
    assert teacher.tokenise([[long]]).lengths.tolist() == [8]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_padded_to_its_own_longest_row_as_the_tokenizer_pads(model: Path, side: str) -> None:
    teacher, texts = load(model), columns(30)
    teacher.tokenizer.padding_side = side
    tokens = teacher.tokenise(texts)
    indices = np.array([7, 2, 19, 4])
    batch = teacher.collate(tokens, indices)
    chosen = [[column[i] for i in indices] for column in texts]
    expected = teacher.tokenizer(
        *chosen, truncation=True, max_length=24, padding="longest", return_tensors="pt"
    )
    assert len(set(tokens.lengths[indices])) > 1
    assert set(batch) == set(expected)
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name]), name


def test_special_paddings_are_used(model: Path) -> None:
    teacher = load(model)
    teacher.tokenizer.pad_token = "[MASK]"
    batch = teacher.collate(teacher.tokenise([["the cat", "a"]]), np.array([0, 1]))
    assert batch["input_ids"][1, 3:].tolist() == [teacher.tokenizer.mask_token_id]


def test_loading_says_nothing_on_stderr(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(model)
    assert capfd.readouterr() == ("", "")


def test_no_rows_give_no_tokens(model: Path) -> None:
    tokens = load(model).tokenise([[], []])
    assert tokens.offsets.tolist() == [0]
    assert tokens.inputs["input_ids"].tolist() == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_float32_without_gradient_and_close_in_every_dtype(model: Path, dtype: str) -> None:
    teacher, reference = load(model, dtype=dtype), load(model)
    batch = teacher.collate(teacher.tokenise(columns(8)), np.arange(8))
    logits_BC = teacher.forward(batch)
    assert next(teacher.model.parameters()).dtype == getattr(torch, dtype)
    assert (logits_BC.dtype, logits_BC.shape) == (torch.float32, (8, 2))
    assert not logits_BC.requires_grad
    tolerance = 1e-6 if dtype == "float32" else 0.3
    torch.testing.assert_close(logits_BC, reference.forward(batch), atol=tolerance, rtol=0)


def test_the_recipes_attention_is_used(model: Path) -> None:
    assert load(model, attention="eager").model.config._attn_implementation == "eager"
    assert load(model).model.config._attn_implementation == "sdpa"


def drop_classifier(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def rename_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def truncate_weights(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])


def rename_type(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_classifier, r"its checkpoint lacks classifier.weight: it is no trained classifier; fine-tune"),
        (rename_weights, "cannot be loaded: .*safetensors"),
        (truncate_weights, "cannot be loaded: "),
        (rename_type, "cannot be loaded: .*unheard-of"),
    ],
)
def test_a_model_that_is_no_trained_classifier_is_refused(
    model: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    shutil.copytree(model, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(TeacherError, match=f"teacher tiny: {message}") as caught:
        load(tmp_path / "copy")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_more_tokens_than_positions_are_refused(model: Path) -> None:
    with pytest.raises(TeacherError, match="max_length is 65, the model has 64 positions"):
        load(model, max_length=65)
    load(model, max_length=64)


def test_a_model_that_cannot_be_fetched_is_a_resource_error() -> None:
    with pytest.raises(ResourceError, match="teacher tiny: no/such cannot be fetched"):
        load("no/such")
