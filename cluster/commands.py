"""What a command does with a recipe, whatever its task: the one place that tells tasks apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.run_context import RunOptions, RunResult, start_run
from schemas.any_recipe import AnyRecipe
from schemas.errors import RecipeError
from schemas.language import LanguageRecipe
from schemas.language_evaluation import AnyEvaluation
from schemas.records import StoresLock

if TYPE_CHECKING:
    from cluster.language.keep_plan import KeepPlanFiles


def run_recipe(recipe: AnyRecipe, options: RunOptions) -> RunResult:
    """Runs all steps.

    Raises:
        TmkdError: A step failed; what is finished is kept.
    """
    from cluster.report import write_report

    pipeline = _pipeline_of(recipe)
    with start_run(recipe, options) as run:
        made = pipeline.make_stores(run)
        with run.steps.step("students"):
            students = pipeline.train(run, made)
        student = pipeline.publish(run, students[0], made)
        evaluation = None
        if recipe.evaluation.corpora:
            with run.steps.step("evaluation"):
                evaluation = pipeline.evaluate(run, made, students)
        report = write_report(run.directory.run)
    return RunResult(run.directory.run, student, report, evaluation)


def precompute_recipe(recipe: AnyRecipe, options: RunOptions) -> StoresLock:
    """Makes the stores that a recipe's students need."""
    pipeline = _pipeline_of(recipe)
    used = pipeline.used_teachers(recipe)
    unused = [name for name in options.teachers if name not in used]
    if unused:
        raise RecipeError(
            f"--teacher: no student uses a teacher named {unused[0]}; there are {', '.join(used) or 'none'}"
        )
    with start_run(recipe, options) as run:
        lock: StoresLock = pipeline.make_stores(run).lock
    return lock


def distill_recipe(recipe: AnyRecipe, options: RunOptions) -> Path:
    """Trains the students from the run's locked stores and returns the final one's directory."""
    pipeline = _pipeline_of(recipe)
    with start_run(recipe, options) as run:
        made = pipeline.read_stores(run)
        with run.steps.step("students"):
            students = pipeline.train(run, made)
        student: Path = pipeline.publish(run, students[0], made)
    return student


def describe_plan(recipe: AnyRecipe) -> dict[str, Any]:
    """Says what a run would do, with no model loaded; corpora are materialised."""
    described: dict[str, Any] = _pipeline_of(recipe).describe_plan(recipe)
    return described


def plan_keeping(
    recipe: AnyRecipe, sample_tokens: int | None, codecs: tuple[str, ...]
) -> KeepPlanFiles | None:
    """Tries keep policies on a sample; None where there is no language model to try.

    Args:
        recipe: Of any task.
        sample_tokens: Tokens of the sample, about; by default what takes a minute or two.
        codecs: Names of codecs besides the teachers' own.
    """
    if not isinstance(recipe, LanguageRecipe) or all(one.model is None for one in recipe.teachers):
        return None
    from cluster.language.keep_plan import plan_keeping as plan

    return plan(recipe, sample_tokens=sample_tokens, codecs=codecs)


def evaluate_on_recipe(student: Path, recipe: AnyRecipe) -> AnyEvaluation:
    """Evaluates a student on a recipe's evaluation corpora."""
    if isinstance(recipe, LanguageRecipe):
        from cluster.language.student_commands import evaluate_on_recipe as evaluate_language_model

        return evaluate_language_model(student, recipe)
    from cluster.student_commands import evaluate_on_recipe as evaluate_classifier

    return evaluate_classifier(student, recipe)


def _pipeline_of(recipe: AnyRecipe) -> Any:
    """Returns the module of a task's steps: ``make_stores``, ``read_stores``, ``train``, ``publish``, ..."""
    from cluster import pipeline
    from cluster.language import pipeline as language_pipeline

    return language_pipeline if isinstance(recipe, LanguageRecipe) else pipeline
