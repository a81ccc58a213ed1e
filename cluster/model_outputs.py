"""What evaluation needs of one model on one corpus, and the models that are means of others.

Legend of shapes: N rows, C labels.

Definitions:
    * The ensemble of teachers predicts the mean of their probabilities, not of their logits.
    * m-o-m ("late calibration") is, for each seed, the mean of the 1-o-1 students' probabilities.
    * Both sum parameters and time: their examples/s is 1 / sum(1 / examples/s).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distill.metrics import Floats, Ints
from schemas.errors import DataError
from schemas.evaluation import ModelKind
from schemas.recipe import Arm

ENSEMBLE = "ensemble"
_SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class EvaluatedRows:
    """The rows of one evaluation corpus, those excluded by a teacher already left out.

    Attributes:
        corpus: Name of the corpus.
        labels: C label names in the order of the probabilities.
        golden_N: Golden labels; -1 is unlabelled and left out by ``evaluate_models``.
        question_N: One key per row where rows are ranked within questions, else None.
        num_excluded: Rows that are not here because some teacher has no logits for them.
        row_N: Number of each row in its corpus; None where nobody asks for the texts.
    """

    corpus: str
    labels: tuple[str, ...]
    golden_N: Ints
    question_N: npt.NDArray[np.generic] | None = None
    num_excluded: int = 0
    row_N: Ints | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ModelOutput:
    """One model's predictions.

    Attributes:
        name: Of the group of models that differ by their seed only: a teacher's name,
            ``student_name(arm, teacher)``, or any.
        probabilities_NC: Rows of probabilities.
        teacher: The one teacher of a student with one teacher; of a teacher its own name.
        seed: None for teachers.
        examples_per_s: Of one process, or None where it was not measured.
    """

    name: str
    kind: ModelKind
    probabilities_NC: Floats
    arm: Arm | None = None
    teacher: str | None = None
    seed: int | None = None
    num_parameters: int | None = None
    examples_per_s: float | None = None


def student_name(arm: Arm, teacher: str | None = None) -> str:
    """Returns the name of a student's row: ``tmkd``, or ``1-o-1/<teacher>``."""
    return f"{arm}/{teacher}" if teacher else arm


def average_models(
    models: Sequence[ModelOutput], *, name: str, kind: ModelKind, arm: Arm | None = None
) -> ModelOutput:
    """Returns the model that runs all of ``models`` and averages their probabilities."""
    parameters = [model.num_parameters for model in models if model.num_parameters is not None]
    seconds = [1.0 / model.examples_per_s for model in models if model.examples_per_s is not None]
    complete = len(models)
    return ModelOutput(
        name=name,
        kind=kind,
        probabilities_NC=np.mean([model.probabilities_NC for model in models], axis=0, dtype=np.float64),
        arm=arm,
        seed=models[0].seed,
        num_parameters=sum(parameters) if len(parameters) == complete else None,
        examples_per_s=1.0 / sum(seconds) if len(seconds) == complete else None,
    )


def add_averages(outputs: Sequence[ModelOutput]) -> list[ModelOutput]:
    """Adds the teachers' ensemble (of two or more) and m-o-m (of two or more 1-o-1 students of a seed)."""
    teachers = [model for model in outputs if model.kind == "teacher"]
    added = list(outputs)
    if len(teachers) > 1:
        added.append(average_models(teachers, name=ENSEMBLE, kind="ensemble"))
    by_seed: dict[int | None, list[ModelOutput]] = defaultdict(list)
    for model in outputs:
        if model.arm == "1-o-1":
            by_seed[model.seed].append(model)
    for students in by_seed.values():
        if len(students) > 1:
            added.append(average_models(students, name="m-o-m", kind="student", arm="m-o-m"))
    return added


def check_outputs(rows: EvaluatedRows, outputs: Sequence[ModelOutput]) -> None:
    """Checks that every model has one distribution per row.

    Raises:
        DataError: A shape differs, a value is no probability, or two models have one name and seed.
    """
    shape = (len(rows.golden_N), len(rows.labels))
    seen = set()
    for model in outputs:
        where = f"evaluation corpus {rows.corpus}, model {model.name}"
        if model.probabilities_NC.shape != shape:
            raise DataError(
                f"{where}: has probabilities of shape {model.probabilities_NC.shape}, not {shape}"
            )
        if not np.isfinite(model.probabilities_NC).all() or (model.probabilities_NC < 0).any():
            raise DataError(f"{where}: has a probability that is negative or not finite")
        if np.abs(model.probabilities_NC.sum(axis=1) - 1).max(initial=0.0) > _SUM_TOLERANCE:
            raise DataError(f"{where}: has a row whose probabilities do not add up to 1")
        if (model.name, model.seed) in seen:
            raise DataError(f"{where}: is given twice for seed {model.seed}")
        seen.add((model.name, model.seed))
    golden_N = rows.golden_N
    if golden_N.max(initial=-1) >= shape[1] or golden_N.min(initial=-1) < -1:
        raise DataError(
            f"evaluation corpus {rows.corpus}: a golden label is none of {', '.join(rows.labels)}"
        )
