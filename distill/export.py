"""Plain checkpoints: a student's heads folded into one, or a single head written as it is.

Each head is a Linear over the same input, so the mean of their weights and biases is a Linear whose
logits are the mean of the heads' logits. A student predicts by the mean of *probabilities*, which is
another function; ``folding_cost`` measures the difference. One head folds exactly.

Shapes: N rows, H heads, C labels, D width of the layer below the heads.

Invariants:
    1. Exported logits are the mean of the heads' logits, in plain transformers
       (tests/distill/test_export.py).
    2. The output directory appears whole or not at all, and is never overwritten
       (tests/distill/test_export.py).
"""

from __future__ import annotations

import copy
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from distill.evaluate import evaluate_student
from distill.heads import HeadBank, HeadLayout
from distill.metrics import accuracy, agreement, predict
from distill.predict import BATCH_ROWS
from distill.skeleton import find_classifier, load_skeleton, load_tokenizer, quiet_transformers
from distill.student import MultiHeadStudent
from schemas.digest import sync_directory
from schemas.errors import DataError, RecipeError, RefusedError, ResourceError
from schemas.job import GOLDEN_HEAD
from schemas.rows import UNLABELLED


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What was folded.

    Attributes:
        directory: The plain checkpoint.
        heads: The heads whose mean it holds; one: the same function as before.
        labels: Label names in the order of its logits.
        num_parameters: Of the plain model.
        num_student_parameters: Of the student, all heads included.
    """

    directory: Path
    heads: tuple[str, ...]
    labels: tuple[str, ...]
    num_parameters: int
    num_student_parameters: int


@dataclass(frozen=True, slots=True)
class FoldingCost:
    """What folding changes on a corpus.

    Attributes:
        num_rows: N.
        num_labelled: Rows with a golden label.
        accuracy_heads: Of the mean of the heads' probabilities; None without golden labels.
        accuracy_folded: Of the folded model, on the same rows.
        agreement: Share of the N rows where both predict the same label.
        largest_shift: Largest change of any probability.
    """

    num_rows: int
    num_labelled: int
    accuracy_heads: float | None
    accuracy_folded: float | None
    agreement: float
    largest_shift: float


def fold_student(
    student: MultiHeadStudent | Path | str, directory: Path | str, *, heads: Sequence[str] | None = None
) -> FoldReport:
    """Writes the mean of heads as a checkpoint that plain transformers opens.

    Args:
        student: A student or its directory; it is left as it is.
        directory: Must be absent or empty.
        heads: The heads to fold; by default the prediction heads.

    Raises:
        RefusedError: The directory has content.
        ResourceError: It cannot be written.
        DataError: The student cannot be read.
        ValueError: There is no such head.
    """
    model = student if isinstance(student, MultiHeadStudent) else MultiHeadStudent.from_pretrained(student)
    names = tuple(model.layout.prediction_heads if heads is None else heads)
    plain = _fold_skeleton(model, model.layout.head_indices(names))
    _publish(plain, model.tokenizer, Path(directory))
    return FoldReport(
        directory=Path(directory),
        heads=names,
        labels=model.layout.labels,
        num_parameters=sum(parameter.numel() for parameter in plain.parameters()),
        num_student_parameters=model.num_parameters,
    )


def export_single_head(
    student: MultiHeadStudent | Path | str, directory: Path | str, *, head: str = GOLDEN_HEAD
) -> FoldReport:
    """Writes one head as a plain checkpoint, exactly: a trained teacher's directory.

    Raises:
        RefusedError: The directory has content.
        ResourceError: It cannot be written.
        DataError: The student cannot be read.
        ValueError: There is no such head.
    """
    return fold_student(student, directory, heads=(head,))


def open_classifier(directory: Path | str, *, max_length: int, head: str = GOLDEN_HEAD) -> MultiHeadStudent:
    """Opens a plain classifier (an export, a teacher) as a student with one head, in eval mode.

    Args:
        directory: With safetensors weights, ``id2label`` and a tokenizer.
        max_length: Longest input in tokens.
        head: Name for its head.

    Raises:
        DataError: It cannot be read.
    """
    path = Path(directory)
    skeleton = load_skeleton(path)
    names = [skeleton.config.id2label[index] for index in range(skeleton.config.num_labels)]
    layout = HeadLayout(heads=(head,), labels=tuple(names), prediction_heads=(head,), max_length=max_length)
    try:
        name = find_classifier(skeleton, len(names))
        tokenizer = load_tokenizer(str(path))
    except RecipeError as error:
        raise DataError(f"{path}: {error.message}") from error
    linear = skeleton.get_submodule(name)
    bank = HeadBank(linear.in_features, layout, bias=linear.bias is not None)
    bank.load_state_dict(linear.state_dict())
    skeleton.set_submodule(name, bank)
    return MultiHeadStudent(skeleton, tokenizer, layout).eval()


def folding_cost(
    student: MultiHeadStudent | Path | str,
    folded: Path | str,
    parts: Sequence[Path | str],
    labels: Sequence[str],
    *,
    batch_rows: int = BATCH_ROWS,
) -> FoldingCost:
    """Compares a student with its folded checkpoint on corpus parts.

    Args:
        student: The student or its directory.
        folded: What ``fold_student`` wrote.
        parts: Paths of ``rows.arrow``.
        labels: The corpus's label names, in the order of its golden labels.
        batch_rows: Rows of one forward pass.

    Raises:
        DataError: Something cannot be read.
        LabelError: The labels are not the student's.
    """
    model = student if isinstance(student, MultiHeadStudent) else MultiHeadStudent.from_pretrained(student)
    plain = open_classifier(folded, max_length=model.layout.max_length)
    before = evaluate_student(model, parts, labels, batch_rows=batch_rows)
    after = evaluate_student(plain, parts, labels, batch_rows=batch_rows)
    labelled_N = before.golden_N != UNLABELLED
    predicted = [predict(run.probabilities_NC.astype(np.float64)) for run in (before, after)]
    accuracies = [
        accuracy((predicted_N == before.golden_N)[labelled_N])[0] if labelled_N.any() else None
        for predicted_N in predicted
    ]
    return FoldingCost(
        num_rows=len(labelled_N),
        num_labelled=int(labelled_N.sum()),
        accuracy_heads=accuracies[0],
        accuracy_folded=accuracies[1],
        agreement=agreement(*predicted),
        largest_shift=float(np.abs(before.probabilities_NC - after.probabilities_NC).max()),
    )


def _fold_skeleton(student: MultiHeadStudent, indices: tuple[int, ...]) -> Any:
    """Returns a plain transformers model, on the CPU, whose Linear is the mean of the heads."""
    layout = student.layout
    config = copy.deepcopy(student.skeleton.config)
    config.id2label = dict(enumerate(layout.labels))
    config.label2id = {name: index for index, name in enumerate(layout.labels)}
    config.problem_type = "single_label_classification"
    name = find_classifier(student.skeleton, layout.num_outputs)
    state = {key: value.detach().to("cpu", copy=True) for key, value in student.skeleton.state_dict().items()}
    for part in ("weight", "bias"):
        key = f"{name}.{part}"
        if key in state:
            heads_HC = state[key].unflatten(0, (len(layout.heads), len(layout.labels)))
            state[key] = heads_HC[list(indices)].double().mean(dim=0).to(heads_HC.dtype)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        plain = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    plain.load_state_dict(state)
    return plain.eval()


def _publish(model: Any, tokenizer: Any, directory: Path) -> None:
    """Writes a checkpoint beside its place, syncs it, and renames it there."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RefusedError(f"{directory} is there already; remove it or choose another directory")
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.mkdir(parents=True)
        with quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        sync_directory(temporary)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"{directory}: the checkpoint cannot be written ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
