"""``evaluation.json``: what a run's models score on the evaluation corpora.

All shares (accuracy, F1, ECE, agreement) lie in 0..1; points are the business of tables.

Invariants:
    1. The document carries its own digest and survives a round trip
       (tests/cluster/test_evaluation.py).
    2. NaN and infinities are not representable: a measure that is undefined is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from schemas.digest import DocumentError, read_document, write_document
from schemas.errors import DataError
from schemas.recipe import Arm, Frozen

EVALUATION_FILE = "evaluation.json"
NUM_RELIABILITY_BINS = 15

Share = Annotated[float, Field(ge=0.0, le=1.0)]
NumRows = Annotated[int, Field(ge=0)]
ModelKind = Literal["teacher", "ensemble", "student"]
Over = Literal["seeds", "teachers"]
Evaluation = TypeVar("Evaluation", bound=Frozen)


class Interval(Frozen):
    """A 95 % percentile interval of a bootstrap.

    Attributes:
        low, high: 2.5th and 97.5th percentile.
    """

    low: float
    high: float


class ReliabilityBin(Frozen):
    """Predictions with a confidence in (low, high].

    Attributes:
        num_rows: How many; those of a language model are positions.
        mean_confidence, accuracy: None where the bin is empty.
    """

    low: float
    high: float
    num_rows: NumRows
    mean_confidence: Share | None
    accuracy: Share | None


class Ranking(Frozen):
    """How well the rows of a question are ranked by the probability of the first label.

    Attributes:
        mrr: Mean reciprocal rank of the best-ranked relevant row; ties count against the model.
        auc: Area under the ROC curve over all rows; None where only one class occurs.
        num_questions: Questions with a relevant and an irrelevant row, the only ones that count
            for ``mrr``.
    """

    mrr: Share | None
    auc: Share | None
    num_questions: NumRows


class ModelRow(Frozen):
    """One row of the table: a model, or the mean of an arm's models.

    Attributes:
        name: Unique within the corpus: a teacher's name, ``ensemble``, ``tmkd``, ``1-o-1/a``, or one
            of these with ``/seed-17``.
        arm: None for teachers and their ensemble.
        teacher: The one teacher of a student with one teacher.
        seeds: Empty for teachers; one for a single model; all of them for a mean row.
        over: What the row is a mean over; empty for a single model.
        level: 0 for a line of its own (a teacher, the ensemble, an arm as a whole), 1 for one of the
            teachers of an arm with one teacher, 2 for one of the seeds.
        accuracy: Share of rows whose most probable label is the golden one.
        accuracy_stderr: Of sampling the rows: the standard deviation of the rows' (mean) correctness
            over sqrt(rows); for a single model that is the binomial sqrt(p (1 - p) / n).
        accuracy_interval: Bootstrap over rows; over rows and seeds where there are several seeds.
        accuracy_std: Sample standard deviation over seeds; None for fewer than two.
        ece: Expected calibration error, 15 equal-width bins of the top probability.
        agreement: From teacher to the share of rows with the same most probable label.
        num_parameters: Summed for ensembles.
        examples_per_s: One process; an ensemble's models run one after another.
        speed_ratio: To the mean teacher: mean seconds per example of the teachers over this one's.
        reliability: 15 bins; pooled over the models of a mean row.
    """

    name: str
    kind: ModelKind
    arm: Arm | None = None
    teacher: str | None = None
    seeds: tuple[int, ...] = ()
    over: tuple[Over, ...] = ()
    level: Literal[0, 1, 2] = 0
    accuracy: Share
    accuracy_stderr: Annotated[float, Field(ge=0)]
    accuracy_interval: Interval
    accuracy_std: Annotated[float, Field(ge=0)] | None = None
    macro_f1: Share
    ece: Share
    agreement: dict[str, Share] = Field(default_factory=dict)
    num_parameters: NumRows | None = None
    examples_per_s: Annotated[float, Field(gt=0)] | None = None
    speed_ratio: Annotated[float, Field(gt=0)] | None = None
    ranking: Ranking | None = None
    reliability: tuple[ReliabilityBin, ...]


class SeedComparison(Frozen):
    """McNemar's exact test between two students of one seed.

    Attributes:
        only_student, only_baseline: Rows that only this one has right.
        p_value: Two-sided exact binomial.
        difference: Accuracy of the student minus that of the baseline.
        teacher: The student's, in the comparison of an arm with one student per teacher.
    """

    seed: int
    teacher: str | None = None
    only_student: NumRows
    only_baseline: NumRows
    p_value: Share
    difference: float


class Comparison(Frozen):
    """A student against the student without distillation, over the seeds that both have.

    Attributes:
        student, baseline: Names of rows.
        is_main: Whether ``student`` is the run's own.
        seeds: A test for each seed; of an arm with one student per teacher, for each of its students.
        mean_difference: Of accuracy, over seeds.
        interval: Bootstrap over rows and seeds, both models on the same resampled rows.
    """

    student: str
    baseline: str
    is_main: bool
    seeds: Annotated[tuple[SeedComparison, ...], Field(min_length=1)]
    mean_difference: float
    interval: Interval


class AgreementMatrix(Frozen):
    """Share of rows with the same most probable label, for each pair of models.

    Attributes:
        names: Teachers, their ensemble, and each student of the first seed.
        values: Symmetric, M rows of M shares.
    """

    names: tuple[str, ...]
    values: tuple[tuple[Share, ...], ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        size = len(self.names)
        if len(self.values) != size or any(len(row) != size for row in self.values):
            raise ValueError(f"values must be {size} rows of {size}")
        return self


class CorpusEvaluation(Frozen):
    """All models on one labelled corpus.

    Attributes:
        labels: Label names in the order of the probabilities.
        num_rows: Rows that count.
        num_excluded: Rows without logits of some teacher: left out for every model.
        num_unlabelled: Rows without a golden label: left out.
        majority_share: Share of the most frequent golden label.
        notes: What a reader of the numbers must know.
    """

    corpus: str
    labels: tuple[str, ...]
    num_rows: Annotated[int, Field(ge=1)]
    num_excluded: NumRows = 0
    num_unlabelled: NumRows = 0
    majority_share: Share
    models: tuple[ModelRow, ...]
    agreement: AgreementMatrix
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


class DroppedRows(Frozen):
    """Training rows that were not used because they share a text with an evaluation split."""

    corpus: str
    num_rows: NumRows
    num_dropped: NumRows


class RunEvaluation(Frozen):
    """The whole document.

    Attributes:
        run: Name of the run.
        main_arm: The arm that the recipe names as its student.
        corpora: The first is the main one.
    """

    format: Literal["1.0"] = "1.0"
    run: str
    main_arm: Arm | None = None
    corpora: tuple[CorpusEvaluation, ...]
    dropped: tuple[DroppedRows, ...] = ()


def write_evaluation(path: Path, evaluation: Frozen) -> None:
    """Writes ``evaluation.json`` of a run of any task atomically, with its digest."""
    write_document(path, evaluation.model_dump(mode="json"))


def read_evaluation(path: Path) -> RunEvaluation:
    """Reads ``evaluation.json`` of a classification run.

    Raises:
        DataError: The file is missing, malformed, or does not match its digest.
    """
    return parse_evaluation(load_evaluation(path), RunEvaluation, path)


def load_evaluation(path: Path) -> dict[str, Any]:
    """Reads ``evaluation.json`` and checks its digest, whatever task it is of.

    Raises:
        DataError: The file is missing, malformed, or does not match its digest.
    """
    try:
        return read_document(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except DocumentError as error:
        raise DataError(f"{path}: {error}") from error


def parse_evaluation(document: dict[str, Any], kind: type[Evaluation], path: Path) -> Evaluation:
    """Returns what ``load_evaluation`` read as ``kind``.

    Raises:
        DataError: It is no such document.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(step) for step in first["loc"])
        raise DataError(f"{path}: {field}: {first['msg']}") from error
