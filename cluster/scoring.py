"""From stores and finished students to ``evaluation.json``.

Teachers are scored from their stores over the evaluation corpora; a student reads an evaluation
corpus once, and its probabilities are kept.

Shapes: N rows of all parts, C labels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from cluster.arms import StudentRun
from cluster.evaluation import evaluate_models, note_partial_split
from cluster.model_outputs import EvaluatedRows, ModelOutput, student_name
from cluster.run_context import available_device
from cluster.speed import ModelSpeed
from distill.evaluate import evaluate_student, read_texts
from distill.store_reader import LogitStore
from schemas.digest import hash_value, replace_file
from schemas.errors import DataError
from schemas.evaluation import CorpusEvaluation
from schemas.labels import match_order, rename
from schemas.recipe import Corpus, Recipe
from schemas.records import LockedPart
from schemas.rows import open_rows

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FinishedStudent:
    """A student whose last stage is complete.

    Attributes:
        directory: Of its model.
        fingerprint: Of its last stage's job.
        speed: None where it was not measured.
    """

    run: StudentRun
    directory: Path
    fingerprint: str
    speed: ModelSpeed | None = None


@dataclass(frozen=True)
class EvaluationCorpus:
    """A labelled corpus as evaluation reads it."""

    name: str
    corpus: Corpus
    parts: tuple[LockedPart, ...]

    def golden_N(self) -> npt.NDArray[np.int64]:
        """Golden labels of all rows."""
        columns = [open_rows(Path(part.rows)).column("label").to_numpy() for part in self.parts]
        return np.concatenate(columns).astype(np.int64)

    def question_N(self) -> npt.NDArray[np.str_] | None:
        """The question of each row, where the corpus names its column."""
        if self.corpus.question is None:
            return None
        column = f"text_{self.corpus.text.index(self.corpus.question)}"
        texts = [open_rows(Path(part.rows)).column(column).to_pylist() for part in self.parts]
        return np.array([text for part in texts for text in part])

    def first_texts(self, num_rows: int) -> list[tuple[str, ...]]:
        """The texts of the first ``num_rows`` rows."""
        tables = (open_rows(Path(part.rows)) for part in self.parts)
        texts = (text for table in tables for text in read_texts(table.slice(0, num_rows)))
        return list(islice(texts, num_rows))


def score_corpus(
    recipe: Recipe,
    corpus: EvaluationCorpus,
    students: Sequence[FinishedStudent],
    *,
    teacher_speeds: Mapping[str, ModelSpeed],
    predictions: Path,
) -> CorpusEvaluation:
    """Scores the teachers that have stores over a corpus, and all students.

    Args:
        recipe: The recipe.
        corpus: The corpus.
        students: Finished students.
        teacher_speeds: By teacher name, as far as they were measured.
        predictions: Directory that keeps the students' probabilities.
    """
    rows, outputs = collect_outputs(
        recipe, corpus, students, teacher_speeds=teacher_speeds, predictions=predictions
    )
    note = note_partial_split(corpus.corpus, int((rows.golden_N >= 0).sum()))
    return evaluate_models(rows, outputs, main_arm=recipe.student.arm, notes=[note] if note else [])


def collect_outputs(
    recipe: Recipe,
    corpus: EvaluationCorpus,
    students: Sequence[FinishedStudent],
    *,
    teacher_speeds: Mapping[str, ModelSpeed],
    predictions: Path,
) -> tuple[EvaluatedRows, list[ModelOutput]]:
    """Reads all models' probabilities over a corpus, on the rows for which all teachers have logits.

    Args: as for ``score_corpus``.
    """
    teachers = [
        teacher.name
        for teacher in recipe.teachers
        if all(teacher.name in part.stores for part in corpus.parts)
    ]
    golden_N = corpus.golden_N()
    kept_N = np.ones(len(golden_N), dtype=np.bool_)
    outputs = []
    for name in teachers:
        logits_NC, present_N = read_teacher(recipe, name, corpus)
        kept_N &= present_N
        outputs.append(_teacher_output(name, logits_NC, teacher_speeds.get(name)))
    outputs += [_student_output(student, corpus, predictions) for student in students]
    question_N = corpus.question_N()
    rows = EvaluatedRows(
        corpus=corpus.name,
        labels=corpus.corpus.labels,
        golden_N=golden_N[kept_N],
        question_N=None if question_N is None else question_N[kept_N],
        num_excluded=int((~kept_N).sum()),
        row_N=np.flatnonzero(kept_N),
    )
    return rows, [_keep(output, kept_N) for output in outputs]


def read_teacher(recipe: Recipe, name: str, corpus: EvaluationCorpus) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Reads a teacher's logits over a corpus from its stores.

    Returns:
        Raw logits ``[N, C]`` in the corpus's label order (0 where a row has none), and which rows have any.
    """
    logits, present = [], []
    for part in corpus.parts:
        store = LogitStore.open(part.stores[name])
        names = rename(store.native_labels, recipe.teacher(name).label_map)
        columns = list(match_order(names, corpus.corpus.labels))
        part_NC: Floats = np.zeros((part.num_rows, len(columns)), dtype=np.float32)
        rows = store.stored_rows()
        part_NC[rows] = store.gather(rows)[:, columns]
        part_N = np.zeros(part.num_rows, dtype=np.bool_)
        part_N[rows] = True
        logits.append(part_NC)
        present.append(part_N)
    return np.concatenate(logits), np.concatenate(present)


def read_predictions(student: FinishedStudent, corpus: EvaluationCorpus, directory: Path) -> Floats:
    """Returns a student's probabilities ``[N, C]`` over a corpus, running it only the first time."""
    labels = corpus.corpus.labels
    # The fingerprints of parts cover ids and texts; the columns' order is the labels'.
    key = hash_value([[part.fingerprint for part in corpus.parts], labels, student.fingerprint])
    path = directory / student.run.name / f"{corpus.name}-{key[:32]}.npy"
    if path.exists():
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path}: cannot be read ({error}); delete it to predict anew") from error
    parts = [part.rows for part in corpus.parts]
    predictions = evaluate_student(student.directory, parts, labels, device=available_device())
    probabilities_NC = predictions.probabilities_NC
    buffer = io.BytesIO()
    np.save(buffer, probabilities_NC, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, buffer.getvalue())
    return probabilities_NC


def _teacher_output(name: str, logits_NC: Floats, speed: ModelSpeed | None) -> ModelOutput:
    return ModelOutput(
        name=name,
        kind="teacher",
        probabilities_NC=softmax(logits_NC.astype(np.float64), axis=1),
        teacher=name,
        num_parameters=speed.num_parameters if speed else None,
        examples_per_s=speed.examples_per_s if speed else None,
    )


def _student_output(student: FinishedStudent, corpus: EvaluationCorpus, predictions: Path) -> ModelOutput:
    run, speed = student.run, student.speed
    return ModelOutput(
        name=student_name(run.arm, run.teacher),
        kind="student",
        probabilities_NC=read_predictions(student, corpus, predictions).astype(np.float64),
        arm=run.arm,
        teacher=run.teacher,
        seed=run.seed,
        num_parameters=speed.num_parameters if speed else None,
        examples_per_s=speed.examples_per_s if speed else None,
    )


def _keep(output: ModelOutput, kept_N: npt.NDArray[np.bool_]) -> ModelOutput:
    return replace(output, probabilities_NC=output.probabilities_NC[kept_N])
