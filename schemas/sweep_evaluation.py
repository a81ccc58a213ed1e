"""``sweep.json``: what the students of a sweep score, which of them failed, and what it cost.

Invariant: the document carries its own digest and survives a round trip
(tests/schemas/test_sweep_evaluation.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from schemas.digest import write_document
from schemas.evaluation import Comparison, RunEvaluation, Share, load_evaluation, parse_evaluation
from schemas.fields import Arm, Frozen
from schemas.sweep import GridPoint, Published

SWEEP_EVALUATION_FILE = "sweep.json"

Seconds = Annotated[float, Field(ge=0)]


class SweepStudent(Frozen):
    """One student of a sweep.

    Attributes:
        point: Name of its grid point.
        fold: Of cross-validation, or None.
        state: ``not_run``: an earlier stage that it starts from failed, or its stores could not be made.
        error: One line, where it has none.
        stages: Directories of its stages, relative to the sweep's; two students may share the first.
        seconds: Of training all its stages, shared ones included.
        fingerprint: Of its last stage's job; two points' students with one fingerprint are one student.
    """

    point: str
    fold: int | None = None
    arm: Arm
    teacher: str | None = None
    seed: int
    state: Literal["trained", "failed", "not_run"]
    error: str | None = None
    stages: tuple[str, ...] = ()
    seconds: Seconds = 0.0
    fingerprint: str = ""


class DisagreedRow(Frozen):
    """A row that the student and its teachers label differently.

    Attributes:
        example_id: Of the row.
        texts: Its texts.
        golden: Its golden label's name.
        teachers: The most probable label of the teachers' ensemble, and its probability.
        student: Likewise of the student of the first seed.
    """

    example_id: str
    texts: tuple[str, ...]
    golden: str
    teachers: tuple[str, Share]
    student: tuple[str, Share]


class PointEvaluation(Frozen):
    """One grid point.

    Attributes:
        point: Which.
        main_arm: The arm that its recipe names as the student.
        evaluation: Over the rows of all folds together; None where no student was trained.
        disagreements: Rows of the main corpus that the main arm's student of the first seed and the
            teachers' ensemble label differently, the most certain first, at most twenty for each of:
            student right, teachers right, both wrong.
        missing_seeds: From arm to the seeds that its lines lack since a student failed.
    """

    point: GridPoint
    main_arm: Arm
    evaluation: RunEvaluation | None = None
    disagreements: tuple[DisagreedRow, ...] = ()
    missing_seeds: dict[str, tuple[int, ...]] = Field(default_factory=dict)


class PointComparison(Frozen):
    """One arm at one point against the same arm at the first point, on the same rows, by seed."""

    arm: Arm
    point: str
    reference: str
    comparison: Comparison


class SweepCost(Frozen):
    """What the sweep cost, all of it measured.

    Attributes:
        num_teachers: Distinct teachers (model and store identity) that ran.
        teacher_training_s: Fine-tuning of teachers, once each.
        teacher_forward_s: Making all stores, once each.
        num_stores: Distinct stores that were read.
        store_bytes: Their data files.
        student_s: Training all students, each once.
        num_students: Distinct students that were trained.
        num_taught: Of them those that learn from teachers.
        resident_s: What the teachers' passes would have cost with the teachers in each student's loop:
            each student's row visits times the measured seconds a row of each of its teachers.
        elapsed_s: Of the sweep by the clock, over restarts.
    """

    num_teachers: int
    teacher_training_s: Seconds
    teacher_forward_s: Seconds
    num_stores: int
    store_bytes: int
    student_s: Seconds
    num_students: int
    num_taught: int
    resident_s: Seconds | None = None
    elapsed_s: Seconds


class SweepEvaluation(Frozen):
    """The whole document.

    Attributes:
        sweep: Its name.
        recipe: As the sweep names it.
        baseline: The arm that others are compared with.
        points: In the grid's order.
        across: Points against each other.
        students: All of them, also those that failed.
    """

    format: Literal["1.0"] = "1.0"
    sweep: str
    recipe: str
    size: str | None = None
    seeds: tuple[int, ...]
    folds: tuple[int, ...] = ()
    baseline: Arm
    points: tuple[PointEvaluation, ...]
    across: tuple[PointComparison, ...] = ()
    students: tuple[SweepStudent, ...]
    cost: SweepCost
    published: Published | None = None

    @property
    def failures(self) -> tuple[SweepStudent, ...]:
        """Students without a result."""
        return tuple(student for student in self.students if student.state != "trained")


def write_sweep_evaluation(path: Path, evaluation: SweepEvaluation) -> None:
    """Writes ``sweep.json`` atomically, with its digest."""
    write_document(path, evaluation.model_dump(mode="json"))


def read_sweep_evaluation(path: Path) -> SweepEvaluation:
    """Reads ``sweep.json``.

    Raises:
        DataError: The file is missing, malformed, or does not match its digest.
    """
    document: dict[str, Any] = load_evaluation(path)
    return parse_evaluation(document, SweepEvaluation, path)
