"""What a finished student is used for: evaluation, prediction, export."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from cluster.arms import StudentRun
from cluster.planning import locked_parts, plan_corpora
from cluster.run_directory import RunDirectory
from cluster.scoring import EvaluationCorpus, FinishedStudent, score_corpus
from cluster.student_task import StudentTask, read_task
from distill.evaluate import evaluate_student
from distill.export import fold_student, folding_cost
from distill.heads import HeadLayout
from precompute.corpus import MaterialisedPart, materialise_corpus
from schemas.errors import RecipeError
from schemas.evaluation import RunEvaluation
from schemas.recipe import Corpus, FilePart, Recipe
from schemas.records import LockedPart, StoresLock, read_record
from schemas.rows import open_rows

DATA_NAME = "data"


def evaluate_on_recipe(student: Path, recipe: Recipe) -> RunEvaluation:
    """Evaluates a student on a recipe's evaluation corpora, beside the teachers whose stores the run has.

    Raises:
        RecipeError: The recipe names no evaluation corpus.
    """
    if not recipe.evaluation.corpora:
        raise RecipeError("the recipe names no evaluation corpus", field="evaluation.corpora")
    directory = RunDirectory.of(recipe)
    lock = _find_lock(directory)
    if lock is None:
        directory.run.mkdir(parents=True, exist_ok=True)
        planned = plan_corpora(recipe, directory)
        parts = {name: locked_parts(planned[name].parts, recipe.store.shard_rows, {}) for name in planned}
    else:
        parts = dict(lock.corpora)
    corpora = [
        EvaluationCorpus(name, recipe.corpora[name], parts[name]) for name in recipe.evaluation.corpora
    ]
    return _score(student, recipe, corpora)


def evaluate_on_file(student: Path, data: Path, columns: Sequence[str] | None, label: str) -> RunEvaluation:
    """Evaluates a student on a labelled file."""
    task = _task(student, columns)
    with tempfile.TemporaryDirectory() as scratch:
        corpus, parts = _read_file(task, data, label, Path(scratch))
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
    """
    task = _task(student, columns)
    question = question or task.question
    if question is not None and question not in task.text:
        raise RecipeError(f"--question names {question!r}; the text columns are {', '.join(task.text)}")
    with tempfile.TemporaryDirectory() as scratch:
        _, parts = _read_file(task, data, None, Path(scratch))
        paths = [part.rows for part in parts]
        predictions = evaluate_student(student, paths, task.labels)
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


def export_student(student: Path, output: Path, recipe: Recipe | None, data: Path | None) -> dict[str, Any]:
    """Folds a student's heads into a plain checkpoint and says what that costs, where there are rows."""
    report = fold_student(student, output)
    result: dict[str, Any] = {
        "directory": str(report.directory),
        "heads": list(report.heads),
        "num_parameters": report.num_parameters,
        "num_student_parameters": report.num_student_parameters,
    }
    with tempfile.TemporaryDirectory() as scratch:
        if recipe is not None and recipe.evaluation.corpora:
            name = recipe.evaluation.corpora[0]
            corpus = recipe.corpora[name]
            parts = materialise_corpus(name, corpus, data_root=recipe.data_root, out=Path(scratch))
            paths = [str(part.rows_path) for part in parts]
        elif data is not None:
            corpus, locked = _read_file(_task(student, None), data, "label", Path(scratch))
            paths = [part.rows for part in locked]
        else:
            return result
        result |= asdict(folding_cost(student, output, paths, corpus.labels))
    return result


def rank_within(scores_N: npt.NDArray[np.floating[Any]], keys: Sequence[str]) -> npt.NDArray[np.int64]:
    """Ranks scores within groups of equal keys, best first from 1; ties by order of appearance."""
    _, group_N = np.unique(np.array(keys), return_inverse=True)
    ranks_N: npt.NDArray[np.int64] = np.zeros(len(scores_N), dtype=np.int64)
    for group in range(int(group_N.max(initial=-1)) + 1):
        members = np.flatnonzero(group_N == group)
        ranks_N[members] = rankdata(-scores_N[members], method="ordinal")
    return ranks_N


def _task(student: Path, columns: Sequence[str] | None) -> StudentTask:
    task = read_task(student)
    labels = HeadLayout.load(student).labels
    if task is None and columns is None:
        raise RecipeError(f"{student} does not say what its text columns are called; give --columns")
    text = tuple(columns) if columns is not None else task.text if task is not None else ()
    question = task.question if task is not None and task.question in text else None
    return StudentTask(text=text, labels=labels, question=question)


def _read_file(
    task: StudentTask, data: Path, label: str | None, scratch: Path
) -> tuple[Corpus, tuple[LockedPart, ...]]:
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
    finished = FinishedStudent(StudentRun(arm, seed), student, task.fingerprint or "" if task else "")
    with tempfile.TemporaryDirectory() as scratch:
        scored = [
            score_corpus(recipe, corpus, [finished], teacher_speeds={}, predictions=Path(scratch))
            for corpus in corpora
        ]
    return RunEvaluation(run=recipe.name, main_arm=arm, corpora=tuple(scored))


def _find_lock(directory: RunDirectory) -> StoresLock | None:
    if not directory.lock.exists():
        return None
    return read_record(directory.lock, StoresLock, store=directory.run)


def _texts(paths: Sequence[str], column: int) -> list[str]:
    return [text for path in paths for text in open_rows(Path(path)).column(f"text_{column}").to_pylist()]
