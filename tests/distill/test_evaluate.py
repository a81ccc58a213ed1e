"""Predictions over corpus parts, and the measurement of speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from distill import evaluate
from distill.evaluate import evaluate_student, read_texts, time_examples_per_s
from distill.predict import predict_rows
from distill.student import MultiHeadStudent
from schemas.errors import DataError, LabelError
from schemas.rows import corpus_schema, hash_texts
from tests.distill.tiny_models import TEXTS, config_init, save_tokenizer

LABELS = ("relevant", "irrelevant")


def write_part(path: Path, texts: Sequence[tuple[str, ...]], labels: Sequence[int], name: str) -> Path:
    columns = {
        "ordinal": range(len(texts)),
        "example_id": [f"{name}/{row}" for row in range(len(texts))],
        "text_hash": [hash_texts(row) for row in texts],
        "label": labels,
    }
    columns |= {f"text_{i}": [row[i] for row in texts] for i in range(len(texts[0]) if texts else 2)}
    schema = corpus_schema(len(texts[0]) if texts else 2)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table({key: list(columns[key]) for key in schema.names}, schema=schema))
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> MultiHeadStudent:
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return MultiHeadStudent.from_init(
        config_init(tokenizer), ("golden", "alice"), LABELS, 3, max_length=32
    ).eval()


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [
        write_part(tmp_path / "one.arrow", TEXTS[:3], [0, 1, -1], "one"),
        write_part(tmp_path / "two.arrow", TEXTS[3:], [1, 0], "two"),
    ]


def test_parts_are_predicted_one_after_another(
    student: MultiHeadStudent, parts: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate, "CHUNK_ROWS", 2)
    actual = evaluate_student(student, parts, LABELS)
    expected = predict_rows(student, TEXTS)
    assert actual.example_ids == ("one/0", "one/1", "one/2", "two/0", "two/1")
    assert actual.golden_N.tolist() == [0, 1, -1, 1, 0]
    np.testing.assert_allclose(actual.logits_NHC, expected.logits_NHC, atol=2e-5)
    np.testing.assert_allclose(actual.probabilities_NC, expected.probabilities_NC, atol=2e-5)
    assert actual.heads == ("golden", "alice")


def test_columns_are_in_the_order_of_the_corpus_labels(
    student: MultiHeadStudent, parts: list[Path], tmp_path: Path
):
    student.save_pretrained(tmp_path / "student")
    turned = evaluate_student(tmp_path / "student", parts, ("Irrelevant", "Relevant"))
    straight = evaluate_student(student, parts, LABELS)
    np.testing.assert_allclose(turned.logits_NHC, straight.logits_NHC[:, :, ::-1], atol=2e-5)
    np.testing.assert_allclose(turned.probabilities_NC, straight.probabilities_NC[:, ::-1], atol=2e-5)


def test_a_corpus_with_other_labels_is_refused(student: MultiHeadStudent, parts: list[Path]):
    with pytest.raises(LabelError, match="relevant, irrelevant, the corpus's yes, no") as caught:
        evaluate_student(student, parts, ("yes", "no"))
    assert caught.value.unmapped == ("yes", "no")


def test_a_corpus_without_rows_or_file_is_a_data_error(student: MultiHeadStudent, tmp_path: Path):
    with pytest.raises(DataError, match="no rows"):
        evaluate_student(student, [write_part(tmp_path / "empty.arrow", [], [], "empty")], LABELS)
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_student(student, [tmp_path / "none.arrow"], LABELS)


def test_texts_are_read_in_the_order_of_their_columns(tmp_path: Path):
    part = write_part(tmp_path / "one.arrow", [("b", "a"), ("d", "c")], [0, 0], "one")
    assert read_texts(evaluate.open_rows(part)) == [("b", "a"), ("d", "c")]


def test_speed_is_rows_over_the_median_pass_without_the_warm_up(monkeypatch: pytest.MonkeyPatch):
    clock = 0.0
    # The warm-up takes 100 s; then passes of 2, 9 and 4 s, of which 4 is the median.
    durations = iter([50.0, 50.0, 1.0, 1.0, 8.0, 1.0, 2.0, 2.0])
    calls: list[int] = []

    def forward(**inputs: torch.Tensor) -> None:
        nonlocal clock
        assert torch.is_inference_mode_enabled()
        clock += next(durations)
        calls.append(inputs["input_ids"].shape[0])

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    batches = [{"input_ids": torch.zeros(rows, 4, dtype=torch.int64)} for rows in (8, 4)]
    speed = time_examples_per_s(forward, batches, num_passes=3)
    assert speed.examples_per_s == 12 / 4
    assert (speed.num_examples, speed.batch_rows, speed.pass_seconds) == (12, 8, (2.0, 9.0, 4.0))
    assert calls == [8, 4] * 4
