"""Predictions of a student over materialised corpus parts, and its speed.

Shapes: N rows of all parts, H heads, C labels.

Invariants:
    1. Columns are in the order of the label names asked for, whatever order the student has
       (tests/distill/test_evaluate.py).
    2. Texts of at most ``CHUNK_ROWS`` rows are held at once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from distill.heads import match_columns
from distill.predict import BATCH_ROWS, Inputs, predict_rows
from distill.student import MultiHeadStudent
from schemas.errors import DataError, LabelError
from schemas.rows import open_rows, text_columns

CHUNK_ROWS = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class StudentPredictions:
    """A student's answers, part after part.

    Attributes:
        example_ids: N ids.
        golden_N: int64 label indices into ``labels``, -1 where unlabelled.
        logits_NHC: Raw logits of all heads, float32.
        probabilities_NC: Mean of the prediction heads' probabilities, float32.
        heads: H names.
        labels: C names, in the order of the columns.
    """

    example_ids: tuple[str, ...]
    golden_N: npt.NDArray[np.int64]
    logits_NHC: npt.NDArray[np.float32]
    probabilities_NC: npt.NDArray[np.float32]
    heads: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a model is.

    Attributes:
        examples_per_s: ``num_examples`` over the median pass.
        num_examples: Rows of one pass.
        batch_rows: Rows of the largest batch.
        pass_seconds: Wall time of each pass after the warm-up, in seconds.
    """

    examples_per_s: float
    num_examples: int
    batch_rows: int
    pass_seconds: tuple[float, ...]


def evaluate_student(
    student: MultiHeadStudent | Path | str,
    parts: Sequence[Path | str],
    labels: Sequence[str],
    *,
    batch_rows: int = BATCH_ROWS,
    device: torch.device | str | None = None,
) -> StudentPredictions:
    """Predicts every row of corpus parts.

    Args:
        student: A student or its directory.
        parts: Paths of ``rows.arrow``, in order.
        labels: The corpus's label names, in the order of its golden labels.
        batch_rows: Rows of one forward pass.
        device: Moves the student there; by default it stays where it is (a directory: the CPU).

    Raises:
        DataError: A part or the student cannot be read, or there is no row.
        LabelError: The student's labels are not these.
    """
    model = student if isinstance(student, MultiHeadStudent) else MultiHeadStudent.from_pretrained(student)
    if device is not None:
        model.to(device)
    columns = match_columns(model.layout.labels, labels)
    if columns is None:
        raise LabelError(
            f"the student's labels are {', '.join(model.layout.labels)}, the corpus's {', '.join(labels)}",
            unmapped=[name for name in labels if name not in model.layout.labels],
        )
    ids: list[str] = []
    golden, logits, probabilities = [], [], []
    for chunk in _iterate_chunks(parts):
        predictions = predict_rows(model, read_texts(chunk), batch_rows=batch_rows)
        ids += chunk["example_id"].to_pylist()
        golden.append(chunk["label"].to_numpy().astype(np.int64))
        logits.append(predictions.logits_NHC[:, :, list(columns)])
        probabilities.append(predictions.probabilities_NC[:, list(columns)])
    if not ids:
        raise DataError("there are no rows to evaluate")
    return StudentPredictions(
        example_ids=tuple(ids),
        golden_N=np.concatenate(golden),
        logits_NHC=np.concatenate(logits),
        probabilities_NC=np.concatenate(probabilities),
        heads=model.layout.heads,
        labels=tuple(labels),
    )


def time_examples_per_s(
    forward: Callable[..., Any], batches: Sequence[Inputs], *, num_passes: int = 5, num_warm_up: int = 1
) -> Speed:
    """Times forward passes over tokenised batches: warm-up, then the median of several passes.

    Tokenising and copying to the device are not in it. Models that are compared must be timed in one
    process, on the same texts, with the same rows per batch.

    Args:
        forward: ``forward(**inputs)``; called in inference mode.
        batches: The inputs of each batch (``distill.predict.batch_texts``), on the model's device.
        num_passes: Timed passes over all batches, at least 1.
        num_warm_up: Passes before them.
    """
    rows = [batch["input_ids"].shape[0] for batch in batches]
    seconds = []
    for number in range(num_warm_up + num_passes):
        start = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                forward(**batch)
        _wait_for_device(batches[0]["input_ids"])
        if number >= num_warm_up:
            seconds.append(time.perf_counter() - start)
    return Speed(sum(rows) / statistics.median(seconds), sum(rows), max(rows), tuple(seconds))


def read_texts(table: pa.Table) -> list[tuple[str, ...]]:
    """Returns the text columns of corpus rows, one tuple a row."""
    return list(zip(*(table[name].to_pylist() for name in text_columns(table)), strict=True))


def _iterate_chunks(parts: Sequence[Path | str]) -> Iterator[pa.Table]:
    for part in parts:
        table = open_rows(Path(part))
        for start in range(0, table.num_rows, CHUNK_ROWS):
            yield table.slice(start, CHUNK_ROWS)


def _wait_for_device(values: Tensor) -> None:
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
