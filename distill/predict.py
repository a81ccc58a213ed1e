"""Predicting rows of text: batches of similar length, padded no further than their own longest row.

Shapes: N rows of the call, B rows of a batch, L tokens, H heads, C labels.

Invariants:
    1. Predictions come back in the order of the rows, and do not depend on how rows are batched, apart
       from rounding (tests/distill/test_predict.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distill.student import MultiHeadStudent

Floats = npt.NDArray[np.float32]
Inputs = dict[str, Tensor]
Texts = Sequence[Sequence[str]]

BATCH_ROWS = 64


@dataclass(frozen=True, slots=True)
class InputBatch:
    """One padded batch.

    Attributes:
        rows_B: int64 positions of its rows in the call's texts.
        inputs: What the encoder takes, int64 ``[B, L]`` each.
    """

    rows_B: npt.NDArray[np.int64]
    inputs: Inputs


@dataclass(frozen=True, slots=True, eq=False)
class RowPredictions:
    """What a student says of N rows.

    Attributes:
        logits_NHC: Raw logits of all heads, float32.
        probabilities_NC: Mean of the prediction heads' probabilities, float32; rows sum to 1.
    """

    logits_NHC: Floats
    probabilities_NC: Floats


def batch_texts(
    tokenizer: Any,
    texts: Texts,
    *,
    max_length: int,
    batch_rows: int = BATCH_ROWS,
    device: torch.device | str = "cpu",
) -> Iterator[InputBatch]:
    """Tokenises rows and yields them in padded batches, the longest rows first.

    Args:
        tokenizer: A Hugging Face tokenizer with a padding token.
        texts: N rows of one or two texts each; a pair that is too long loses tokens of its longer text.
        max_length: Longest input in tokens.
        batch_rows: Rows of a batch; the last one may have fewer.
        device: Where the inputs go.
    """
    if not texts:
        return
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoding = tokenizer(*columns, truncation=True, max_length=max_length, padding=False)
    lengths_N = np.fromiter(map(len, encoding["input_ids"]), dtype=np.int64, count=len(texts))
    # Longest first: a batch that does not fit the device's memory fails at once.
    order_N = np.argsort(-lengths_N, kind="stable")
    for start in range(0, len(texts), batch_rows):
        rows_B = order_N[start : start + batch_rows]
        inputs = {
            name: _pad([encoding[name][row] for row in rows_B], _padding_value(tokenizer, name), tokenizer)
            for name in tokenizer.model_input_names
        }
        yield InputBatch(rows_B, {name: value.to(device) for name, value in inputs.items()})


@torch.inference_mode()
def forward_rows(forward: Callable[..., Tensor], batches: Iterator[InputBatch], num_rows: int) -> Floats:
    """Runs batches and puts the outputs in the order of the rows.

    Args:
        forward: ``forward(**inputs)`` returns a tensor whose first dimension is B.
        batches: From ``batch_texts``; together they cover rows ``[0, num_rows)``, at least one.
        num_rows: N.

    Returns:
        float32 ``[N, ...]``.
    """
    result: Floats | None = None
    for batch in batches:
        output = forward(**batch.inputs).float().cpu().numpy()
        if result is None:
            result = np.empty((num_rows, *output.shape[1:]), dtype=np.float32)
        result[batch.rows_B] = output
    if result is None:
        raise ValueError("there are no rows to predict")
    return result


def predict_rows(
    student: MultiHeadStudent, texts: Texts, *, batch_rows: int = BATCH_ROWS, max_length: int | None = None
) -> RowPredictions:
    """Predicts N rows on the student's device, without dropout.

    Args:
        student: Left in the mode (train or eval) that it was in.
        texts: N rows of one or two texts each; N may be 0.
        batch_rows: Rows of one forward pass.
        max_length: Longest input in tokens; by default the student's own.
    """
    layout = student.layout
    if not texts:
        empty = np.empty((0, len(layout.heads), len(layout.labels)), dtype=np.float32)
        return RowPredictions(empty, empty[:, 0])
    device = next(student.parameters()).device
    batches = batch_texts(
        student.tokenizer,
        texts,
        max_length=max_length or layout.max_length,
        batch_rows=batch_rows,
        device=device,
    )
    was_training = student.training
    student.eval()
    try:
        logits_NHC = forward_rows(student, batches, len(texts))
    finally:
        student.train(was_training)
    probabilities_NC = student.predict_proba(torch.from_numpy(logits_NHC)).numpy()
    return RowPredictions(logits_NHC, probabilities_NC)


def _padding_value(tokenizer: Any, name: str) -> int:
    values: Mapping[str, int] = {
        "input_ids": tokenizer.pad_token_id,
        "token_type_ids": tokenizer.pad_token_type_id,
    }
    return values.get(name, 0)


def _pad(rows: Sequence[Sequence[int]], value: int, tokenizer: Any) -> Tensor:
    length = max(map(len, rows))
    padded_BL = np.full((len(rows), length), value, dtype=np.int64)
    for position, row in enumerate(rows):
        where = slice(length - len(row), None) if tokenizer.padding_side == "left" else slice(len(row))
        padded_BL[position, where] = row
    return torch.from_numpy(padded_BL)
