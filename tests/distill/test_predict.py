"""Prediction of rows in batches of similar length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.predict import batch_texts, predict_rows
from distill.student import MultiHeadStudent
from tests.distill.tiny_models import TEXTS, config_init, save_tokenizer

HEADS = ("golden", "alice")


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> MultiHeadStudent:
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return MultiHeadStudent.from_init(config_init(tokenizer), HEADS, ("x", "y"), 3, max_length=16)


def test_rows_come_back_in_order_whatever_the_batches(student: MultiHeadStudent):
    one_by_one = [predict_rows(student, [texts]).logits_NHC[0] for texts in TEXTS]
    for batch_rows in (1, 2, 3, 64):
        actual = predict_rows(student, TEXTS, batch_rows=batch_rows)
        np.testing.assert_allclose(actual.logits_NHC, np.stack(one_by_one), atol=2e-5)
    assert not np.allclose(one_by_one[0], one_by_one[2], atol=1e-4)


def test_probabilities_are_the_mean_over_the_prediction_heads(student: MultiHeadStudent):
    actual = predict_rows(student, TEXTS)
    powers = np.exp(actual.logits_NHC.astype(np.float64))
    expected = (powers / powers.sum(axis=-1, keepdims=True)).mean(axis=1)
    np.testing.assert_allclose(actual.probabilities_NC, expected, atol=2e-5)
    assert actual.logits_NHC.dtype == actual.probabilities_NC.dtype == np.float32


def test_prediction_has_no_dropout_and_gives_the_mode_back(student: MultiHeadStudent):
    student.train()
    first, second = predict_rows(student, TEXTS), predict_rows(student, TEXTS)
    np.testing.assert_array_equal(first.logits_NHC, second.logits_NHC)
    assert student.training
    student.eval()
    predict_rows(student, TEXTS)
    assert not student.training


def test_batches_are_padded_to_their_own_longest_row_and_cut_to_the_maximum(student: MultiHeadStudent):
    batches = list(batch_texts(student.tokenizer, TEXTS, max_length=12, batch_rows=2))
    widths = [batch.inputs["input_ids"].shape for batch in batches]
    # [CLS] 5 words [SEP] 3 words [SEP] = 11; the long row is cut to 12.
    assert [tuple(width) for width in widths] == [(2, 12), (2, 7), (1, 5)]
    assert sorted(np.concatenate([batch.rows_B for batch in batches])) == [0, 1, 2, 3, 4]
    ids_BL, mask_BL = batches[0].inputs["input_ids"], batches[0].inputs["attention_mask"]
    assert torch.equal(ids_BL != student.tokenizer.pad_token_id, mask_BL.bool())


def test_inputs_are_those_of_the_tokenizers_own_padding(student: MultiHeadStudent):
    (batch,) = batch_texts(student.tokenizer, TEXTS, max_length=12)
    texts = [TEXTS[row] for row in batch.rows_B]
    expected = student.tokenizer(
        *map(list, zip(*texts, strict=True)),
        truncation=True,
        max_length=12,
        padding=True,
        return_tensors="pt",
    )
    assert set(batch.inputs) == set(expected)
    for name, value in batch.inputs.items():
        assert torch.equal(value, expected[name]), name


def test_single_texts_and_no_rows_work(student: MultiHeadStudent):
    assert predict_rows(student, [("a b",), ("c",)]).probabilities_NC.shape == (2, 2)
    empty = predict_rows(student, [])
    assert empty.logits_NHC.shape == (0, 2, 2)
    assert empty.probabilities_NC.shape == (0, 2)
