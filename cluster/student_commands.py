"""What a finished student is used for: evaluation and prediction."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from cluster.arms import StudentRun
from cluster.language.student_task import refuse_language_model
from cluster.run_context import available_cpus, available_device
from cluster.run_directory import RunDirectory, read_lock
from cluster.scoring import EvaluationCorpus, FinishedStudent, score_corpus
from cluster.speed import time_student
from cluster.stores_lock import locked_parts
from cluster.student_task import StudentTask, read_task
from distill.evaluate import evaluate_student
from distill.heads import HeadLayout
from precompute.corpus import MaterialisedPart, materialise_corpus
from schemas.errors import RecipeError
from schemas.evaluation import RunEvaluation
from schemas.recipe import Corpus, FilePart, Recipe
from schemas.records import LockedPart
from schemas.rows import open_rows

DATA_NAME = "data"
MAX_TEXTS = 2


def evaluate_on_recipe(student: Path, recipe: Recipe) -> RunEvaluation:
    """Evaluates a student on a recipe's evaluation corpora, beside the teachers whose stores the run has.

    Raises:
        DataError: The directory holds no student.
        RecipeError: The recipe names no evaluation corpus, or the student is a language model.
    """
    refuse_language_model(student, "evaluate it on a recipe of its own (task: language)")
    HeadLayout.load(student)
    return _score(student, recipe, evaluation_corpora(recipe, RunDirectory.of(recipe)))


def evaluate_on_file(student: Path, data: Path, columns: Sequence[str] | None, label: str) -> RunEvaluation:
    """Evaluates a student on a labelled file.

    Raises:
        RecipeError: The student is a language model, or the columns are not its own.
    """
    refuse_language_model(student, "--data is for labelled rows: give --recipe, with the text in a corpus")
    task = text_columns(student, columns)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, parts = read_labelled_file(task, data, label, Path(scratch))
        recipe = Recipe.model_validate(
            {
                "name": DATA_NAME,
                "corpora": {DATA_NAME: corpus},
                "student": {"init": {"kind": "layers", "model": str(student)}, "arm": "golden"},
                "stages": [{"kind": "finetune", "corpus": DATA_NAME}],
            }
        )
        return _score(student, recipe, [EvaluationCorpus(DATA_NAME, corpus, parts)])


def predict_file(
    student: Path, data: Path, columns: Sequence[str] | None, question: str | None
) -> list[dict[str, Any]]:
    """Labels the rows of a file.

    Returns:
        For each row its number, label and probabilities and, where there is a question column, the
        rank of its passage within the question (1 is best; the score is the first label's probability).

    Raises:
        RecipeError: The student is a language model, or the columns are not its own.
    """
    refuse_language_model(student, "predict labels rows: let transformers generate text with the directory")
    task = text_columns(student, columns)
    question = question or task.question
    if question is not None and question not in task.text:
        raise RecipeError(f"--question names {question!r}; the text columns are {', '.join(task.text)}")
    with tempfile.TemporaryDirectory() as scratch:
        _, parts = read_labelled_file(task, data, None, Path(scratch))
        paths = [part.rows for part in parts]
        predictions = evaluate_student(student, paths, task.labels, device=available_device())
        keys = None if question is None else _texts(paths, task.text.index(question))
    probabilities_NC = predictions.probabilities_NC
    ranks_N = None if keys is None else rank_within(probabilities_NC[:, 0], keys)
    lines = []
    for row, probabilities_C in enumerate(probabilities_NC):
        line: dict[str, Any] = {
            "row": row,
            "label": task.labels[int(probabilities_C.argmax())],
            "probabilities": {
                name: round(float(p), 6) for name, p in zip(task.labels, probabilities_C, strict=True)
            },
        }
        if ranks_N is not None and keys is not None:
            line |= {"question": keys[row], "rank": int(ranks_N[row])}
        lines.append(line)
    return lines


def rank_within(scores_N: npt.NDArray[np.floating[Any]], keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """Ranks scores within groups of equal keys, best first from 1; ties by order of appearance."""
    _, group_N = np.unique(np.array(keys), return_inverse=True)
    ranks_N: npt.NDArray[np.int64] = np.zeros(len(scores_N), dtype=np.int64)
    for group in range(int(group_N.max(initial=-1)) + 1):
        members = np.flatnonzero(group_N == group)
        ranks_N[members] = rankdata(-scores_N[members], method="ordinal")
    return ranks_N


def evaluation_corpora(recipe: Recipe, directory: RunDirectory) -> list[EvaluationCorpus]:
    """Returns a recipe's evaluation corpora as its run locked them; one that it did not is read anew."""
    if not recipe.evaluation.corpora:
        raise RecipeError("the recipe names no evaluation corpus", field="evaluation.corpora")
    locked = read_lock(directory).corpora if directory.lock.exists() else {}
    found = []
    for name in recipe.evaluation.corpora:
        corpus = recipe.corpora[name]
        parts = locked.get(name)
        if parts is None:
            made = materialise_corpus(name, corpus, data_root=recipe.data_root, out=directory.out)
            parts = locked_parts(made, recipe.store.shard_rows, {})
        found.append(EvaluationCorpus(name, corpus, parts))
    return found


def text_columns(student: Path, columns: Sequence[str] | None) -> StudentTask:
    """Returns what a student does, with these text columns or else its own.

    Raises:
        DataError: The directory holds no student.
        RecipeError: The columns are not its own, or nobody says what they are called.
    """
    labels = HeadLayout.load(student).labels
    task = read_task(student)
    if task is None and columns is None:
        raise RecipeError(f"{student} does not say what its text columns are called; give --columns")
    text = tuple(columns) if columns is not None else task.text if task is not None else ()
    if not 1 <= len(text) <= MAX_TEXTS or (task is not None and len(text) != len(task.text)):
        wanted = f"{len(task.text)}, like {', '.join(task.text)}" if task is not None else "one or two"
        raise RecipeError(f"--columns names {len(text)} columns; the student reads {wanted}")
    question = task.question if task is not None and task.question in text else None
    return StudentTask(text=text, labels=labels, question=question)


def read_labelled_file(
    task: StudentTask, data: Path, label: str | None, scratch: Path
) -> tuple[Corpus, tuple[LockedPart, ...]]:
    """Reads a file as a corpus of one part.

    Raises:
        DataError: It cannot be read, or lacks a column.
    """
    corpus = Corpus(
        labels=task.labels,
        text=task.text,
        label=label,
        question=task.question,
        parts=(FilePart(kind="file", path=str(data.absolute()), name=DATA_NAME),),
    )
    parts: tuple[MaterialisedPart, ...] = materialise_corpus(DATA_NAME, corpus, data_root=None, out=scratch)
    return corpus, locked_parts(parts, 4096, {})


def _score(student: Path, recipe: Recipe, corpora: Sequence[EvaluationCorpus]) -> RunEvaluation:
    task = read_task(student)
    arm = task.arm if task is not None and task.arm is not None else recipe.student.arm
    seed = task.seed if task is not None and task.seed is not None else recipe.seed
    speed = None
    if recipe.evaluation.speed_rows:
        texts = corpora[0].first_texts(recipe.evaluation.speed_rows)
        speed = time_student(student, texts, num_threads=available_cpus())
    finished = FinishedStudent(StudentRun(arm, seed), student, task.fingerprint or "" if task else "", speed)
    with tempfile.TemporaryDirectory() as scratch:
        scored = [
            score_corpus(recipe, corpus, [finished], teacher_speeds={}, predictions=Path(scratch))
            for corpus in corpora
        ]
    return RunEvaluation(run=recipe.name, main_arm=arm, corpora=tuple(scored))


def _texts(paths: Sequence[str], column: int) -> list[str]:
    return [text for path in paths for text in open_rows(Path(path)).column(f"text_{column}").to_pylist()]
