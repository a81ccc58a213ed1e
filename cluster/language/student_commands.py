"""``tmkd evaluate`` on a language model: a student, or any other directory that transformers opens."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from cluster.language.arms import used_teachers
from cluster.language.evaluation import (
    EvaluatedModel,
    ScoreDirectory,
    evaluate_models,
    list_teachers,
    open_texts,
    taught_by,
)
from cluster.language.models import find_teachers
from cluster.language.planning import cut_corpus
from cluster.language.scoring import ModelSource
from cluster.language.student_task import LanguageStudentTask, read_language_task
from cluster.run_directory import RunDirectory
from distill.heads import HEADS_FILE
from precompute.tokenizer import load_tokenizer, read_tokenizer_hash
from schemas.errors import DataError, RecipeError, RefusedError, TeacherError
from schemas.language import MAIN_ARM, LanguageRecipe
from schemas.language_evaluation import LanguageRunEvaluation


def evaluate_on_recipe(student: Path, recipe: LanguageRecipe) -> LanguageRunEvaluation:
    """Measures a model on a recipe's evaluation corpora, beside the recipe's teachers if it wants them.

    What the recipe's run has measured already is not measured again.

    Raises:
        RecipeError: The recipe names no evaluation corpus, or the student is a classifier.
        RefusedError: The student has another tokenizer than the corpora are cut with.
        DataError: The directory holds no model.
    """
    if not recipe.evaluation.corpora:
        raise RecipeError("the recipe names no evaluation corpus", field="evaluation.corpora")
    if (student / HEADS_FILE).exists():
        raise RecipeError(f"{student} is a classifier, and recipe {recipe.name} is one of language models")
    if not (student / "config.json").is_file():
        raise DataError(f"{student}: is no language model (it has no config.json)")
    task = read_language_task(student)
    directory = RunDirectory.of(recipe)
    planned = {name: cut_corpus(recipe, directory, name) for name in recipe.evaluation.corpora}
    for corpus in planned.values():
        _check_tokenizer(student, corpus.spec.tokenizer)
    teachers = (
        find_teachers(recipe, directory, used_teachers(recipe)) if recipe.evaluation.with_teachers else {}
    )
    model = _describe(student, task, recipe)
    with ExitStack() as stack:
        predictions = directory.predictions
        if not directory.run.exists():
            predictions = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return evaluate_models(
            recipe,
            open_texts(recipe, planned),
            [*list_teachers(recipe, teachers), model],
            ScoreDirectory(predictions, directory.hash_cache),
            main_arm=model.name,
        )


def _describe(student: Path, task: LanguageStudentTask | None, recipe: LanguageRecipe) -> EvaluatedModel:
    """Returns a model under its own name, or under that of the recipe's student where it has none."""
    arm, seed = (MAIN_ARM, recipe.seed) if task is None else (task.arm, task.seed)
    taught = taught_by(recipe, MAIN_ARM) if task is None else task.teachers
    return EvaluatedModel(ModelSource.of_directory(f"{arm}/seed-{seed}", student), arm, seed, taught)


def _check_tokenizer(student: Path, expected: str) -> None:
    try:
        found = read_tokenizer_hash(load_tokenizer(str(student)), teacher=student.name)
    except TeacherError as error:
        raise DataError(f"{student}: it has no tokenizer of use ({error.message})") from error
    if found != expected:
        raise RefusedError(
            f"{student} has another tokenizer than the recipe's student, whose corpora are cut with it: "
            "perplexities could not be compared",
            differing=(f"tokenizer: {expected[:16]} -> {found[:16]}",),
        )
