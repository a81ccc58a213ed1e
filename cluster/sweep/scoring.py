"""What the students of a sweep score: per grid point, over the rows of all folds together.

Shapes: N rows, C labels.

Invariants (tests/cluster/sweep/test_scoring.py):
    1. A model counts at a point only if every fold has it: all models of a table have the same rows.
    2. Points are compared on the same rows and seeds, or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cluster.evaluation import compare_outputs, evaluate_models, keep_labelled, note_partial_split
from cluster.model_outputs import ENSEMBLE, EvaluatedRows, ModelOutput, average_models
from cluster.scoring import EvaluationCorpus, FinishedStudent, collect_outputs
from cluster.speed import ModelSpeed
from cluster.sweep.points import Cell
from schemas.evaluation import CorpusEvaluation
from schemas.recipe import Arm
from schemas.rows import open_rows, text_columns
from schemas.sweep_evaluation import DisagreedRow, PointComparison

_ROWS_OF_A_KIND = 20


@dataclass(frozen=True)
class CellOutputs:
    """All models of one cell on one evaluation corpus."""

    cell: Cell
    corpus: EvaluationCorpus
    rows: EvaluatedRows
    outputs: tuple[ModelOutput, ...]


@dataclass(frozen=True)
class PointOutputs:
    """All models of one point on one evaluation corpus, folds together.

    Attributes:
        missing_seeds: From arm to the seeds of its models that some fold lacks.
    """

    cells: tuple[CellOutputs, ...]
    rows: EvaluatedRows
    outputs: tuple[ModelOutput, ...]
    missing_seeds: Mapping[str, tuple[int, ...]]


def collect_cell(
    cell: Cell,
    corpus: EvaluationCorpus,
    students: Sequence[FinishedStudent],
    *,
    teacher_speeds: Mapping[str, ModelSpeed],
    predictions: Path,
) -> CellOutputs:
    """Reads the probabilities of a cell's models; rows without a golden label are left out."""
    found = collect_outputs(
        cell.recipe, corpus, students, teacher_speeds=teacher_speeds, predictions=predictions
    )
    rows, outputs = keep_labelled(*found)
    return CellOutputs(cell, corpus, rows, tuple(outputs))


def pool_folds(cells: Sequence[CellOutputs]) -> PointOutputs:
    """Puts the rows of a point's folds one after another."""
    known: dict[tuple[str, int | None], list[ModelOutput]] = defaultdict(list)
    for cell in cells:
        for output in cell.outputs:
            known[output.name, output.seed].append(output)
    outputs = [
        replace(
            models[0], probabilities_NC=np.concatenate([model.probabilities_NC for model in models], axis=0)
        )
        for models in known.values()
        if len(models) == len(cells)
    ]
    first = cells[0].rows
    questions = [cell.rows.question_N for cell in cells if cell.rows.question_N is not None]
    rows = replace(
        first,
        golden_N=np.concatenate([cell.rows.golden_N for cell in cells]),
        question_N=np.concatenate(questions) if len(questions) == len(cells) else None,
        num_excluded=sum(cell.rows.num_excluded for cell in cells),
        row_N=None,
    )
    missing: dict[str, list[int]] = defaultdict(list)
    for models in known.values():
        arm, seed = models[0].arm, models[0].seed
        if len(models) < len(cells) and arm is not None and seed is not None and seed not in missing[arm]:
            missing[arm].append(seed)
    lacking = {arm: tuple(found) for arm, found in missing.items()}
    return PointOutputs(tuple(cells), rows, tuple(outputs), lacking)


def score_point(point: PointOutputs, main_arm: Arm) -> CorpusEvaluation:
    """Scores a point's models on one corpus."""
    notes = []
    cells = point.cells
    if len(cells) > 1 or cells[0].cell.fold is not None:
        notes.append(
            f"cross-validation: the {len(point.rows.golden_N):,} held-out rows of {len(cells)} folds "
            "together, each labelled by models that were not trained on its fold"
        )
    else:
        note = note_partial_split(cells[0].corpus.corpus, len(point.rows.golden_N))
        notes += [note] if note else []
    return evaluate_models(point.rows, point.outputs, main_arm=main_arm, notes=notes)


def compare_points(points: Mapping[str, PointOutputs], arms: Sequence[Arm]) -> tuple[PointComparison, ...]:
    """Compares arms at each later point with themselves at the first one, seed by seed."""
    names = list(points)
    if len(names) < 2:
        return ()
    reference = points[names[0]]
    found = []
    for name in names[1:]:
        other = points[name]
        if not np.array_equal(other.rows.golden_N, reference.rows.golden_N):
            continue
        for arm in arms:
            pairs = _pair_seeds(other.outputs, reference.outputs, arm)
            if pairs:
                comparison = compare_outputs(reference.rows, pairs, student=arm, baseline=arm)
                found.append(PointComparison(arm=arm, point=name, reference=names[0], comparison=comparison))
    return tuple(found)


def list_disagreements(point: PointOutputs, main_arm: Arm) -> tuple[DisagreedRow, ...]:
    """Lists rows that the student of the first seed and the teachers' ensemble label differently."""
    teachers = [model for model in point.outputs if model.kind == "teacher"]
    student = next((model for model in point.outputs if model.arm == main_arm), None)
    if not teachers or student is None:
        return ()
    ensemble_NC = average_models(teachers, name=ENSEMBLE, kind="ensemble").probabilities_NC
    student_NC = student.probabilities_NC
    taught_N, told_N, golden_N = ensemble_NC.argmax(1), student_NC.argmax(1), point.rows.golden_N
    # The most certain first: how much more probable both find their own label than the other's.
    numbers = np.arange(len(golden_N))
    margin_N = ensemble_NC[numbers, taught_N] + student_NC[numbers, told_N]
    differ_N = taught_N != told_N
    kinds = (told_N == golden_N, taught_N == golden_N, (told_N != golden_N) & (taught_N != golden_N))
    chosen: list[int] = []
    for kind_N in kinds:
        rows = np.flatnonzero(differ_N & kind_N)
        chosen += rows[np.argsort(-margin_N[rows], kind="stable")][:_ROWS_OF_A_KIND].tolist()
    texts = _read_rows(point.cells, chosen)
    labels = point.rows.labels
    return tuple(
        DisagreedRow(
            example_id=texts[row][0],
            texts=texts[row][1],
            golden=labels[int(golden_N[row])],
            teachers=(labels[int(taught_N[row])], float(ensemble_NC[row, taught_N[row]])),
            student=(labels[int(told_N[row])], float(student_NC[row, told_N[row]])),
        )
        for row in chosen
    )


def _pair_seeds(
    outputs: Sequence[ModelOutput], reference: Sequence[ModelOutput], arm: Arm
) -> list[tuple[ModelOutput, ModelOutput]]:
    """Pairs an arm's single students by seed; an arm with one student per teacher has no such pairs."""
    known = {model.seed: model for model in reference if model.arm == arm and model.teacher is None}
    return [
        (model, known[model.seed])
        for model in outputs
        if model.arm == arm and model.teacher is None and model.seed in known
    ]


def _read_rows(cells: Sequence[CellOutputs], chosen: Sequence[int]) -> dict[int, tuple[str, tuple[str, ...]]]:
    """Reads id and texts of some of a point's rows."""
    found = {}
    start = 0
    for cell in cells:
        stop = start + len(cell.rows.golden_N)
        here = [row for row in chosen if start <= row < stop]
        numbers = cell.rows.row_N
        if here and numbers is not None:
            tables = [open_rows(Path(part.rows)) for part in cell.corpus.parts]
            offsets = np.cumsum([0, *(table.num_rows for table in tables)])
            columns = text_columns(tables[0])
            for row in here:
                number = int(numbers[row - start])
                part = int(np.searchsorted(offsets, number, side="right")) - 1
                line = tables[part].slice(number - int(offsets[part]), 1).to_pylist()[0]
                texts = tuple(line[name] for name in columns)
                found[row] = (line["example_id"], texts)
        start = stop
    return found
