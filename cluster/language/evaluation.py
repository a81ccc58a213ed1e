"""The evaluation of a language run: teachers and students over the same chunks, one model after another.

Invariants (tests/cluster/language/test_evaluation.py):
    1. A request to stop is heard between two batches; a model that was measured is not measured again.
    2. Equal models and chunks give equal bytes of ``evaluation.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cluster.console import say
from cluster.language.arms import FinishedLanguageStudent, stages_of
from cluster.language.evaluated_text import EvaluatedText
from cluster.language.measures import LanguageOutput, measure_models
from cluster.language.planning import PlannedText
from cluster.language.scoring import ModelSource, PositionScores, read_scores
from cluster.progress import show_progress
from cluster.run_context import RunOf
from cluster.teacher_model import TeacherModel
from precompute.events import ProgressEvent, TeacherState
from precompute.interrupt import StopFlag
from schemas.evaluation import write_evaluation
from schemas.language import LanguageRecipe
from schemas.language_evaluation import LanguageRunEvaluation


@dataclass(frozen=True)
class EvaluatedModel:
    """A model of the table.

    Attributes:
        source: Where it is.
        name: A teacher's name, or a student's arm.
        seed: None for teachers.
        taught_by: Of a student: the teachers that it learnt from.
        others: Of a teacher: further names that the recipe gives it.
    """

    source: ModelSource
    name: str
    seed: int | None = None
    taught_by: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreDirectory:
    """Where scores are kept.

    Attributes:
        predictions: Directory of the scores.
        hash_cache: Hashes of weight files.
        stop: Ends the measuring.
    """

    predictions: Path
    hash_cache: Path
    stop: StopFlag = field(default_factory=StopFlag)


def evaluate_students(
    run: RunOf[LanguageRecipe],
    planned: Mapping[str, PlannedText],
    students: Sequence[FinishedLanguageStudent],
    teachers: Mapping[str, TeacherModel],
) -> LanguageRunEvaluation:
    """Measures teachers and students over the recipe's evaluation corpora and writes ``evaluation.json``.

    Args:
        run: The run.
        planned: Corpora, those of the evaluation among them.
        students: Finished ones; the first is of the run's own arm.
        teachers: Models of the recipe's teachers, as far as they have one.

    Raises:
        TeacherError: A model cannot be loaded.
        DataError: Chunks are damaged, or logits are not numbers.
        InterruptedRunError: The run was asked to stop.
    """
    recipe, directory = run.recipe, run.directory
    models = [*list_teachers(recipe, teachers), *(_student(recipe, student) for student in students)]
    scores = ScoreDirectory(directory.predictions, directory.hash_cache, run.stop)
    main_arm = students[0].run.arm if students else None
    evaluation = evaluate_models(recipe, open_texts(recipe, planned), models, scores, main_arm=main_arm)
    write_evaluation(directory.evaluation, evaluation)
    return evaluation


def open_texts(recipe: LanguageRecipe, planned: Mapping[str, PlannedText]) -> list[EvaluatedText]:
    """Reads the chunks of the recipe's evaluation corpora.

    Raises:
        DataError: They are damaged.
    """
    return [
        EvaluatedText.open(name, planned[name].parts, recipe.corpora[name].on_bad_row)
        for name in recipe.evaluation.corpora
    ]


def list_teachers(recipe: LanguageRecipe, teachers: Mapping[str, TeacherModel]) -> list[EvaluatedModel]:
    """Lists the teachers to measure, in the recipe's order: none where it wants none.

    Teachers that differ by what is kept of them alone are one model, which goes by the name of the first.
    """
    if not recipe.evaluation.with_teachers:
        return []
    found: dict[Hashable, EvaluatedModel] = {}
    for teacher in recipe.teachers:
        if teacher.name not in teachers:
            continue
        at = teachers[teacher.name]
        same = (at.path, at.revision, teacher.dtype, teacher.attention, teacher.trust_remote_code)
        if same in found:
            found[same] = replace(found[same], others=(*found[same].others, teacher.name))
        else:
            source = ModelSource.of_teacher(teacher, at.path, at.revision)
            found[same] = EvaluatedModel(source, teacher.name)
    return list(found.values())


def taught_by(recipe: LanguageRecipe, arm: str) -> tuple[str, ...]:
    """Returns the teachers that the students of an arm have in some stage."""
    return tuple(dict.fromkeys(name for stage in stages_of(recipe, arm) for name in stage.teachers))


def evaluate_models(
    recipe: LanguageRecipe,
    texts: Sequence[EvaluatedText],
    models: Sequence[EvaluatedModel],
    scores: ScoreDirectory,
    *,
    main_arm: str | None,
) -> LanguageRunEvaluation:
    """Measures models over texts.

    Raises:
        TeacherError: A model cannot be loaded.
        DataError: Logits are not numbers, or kept scores cannot be read.
        InterruptedRunError: It was asked to stop.
    """
    found = [_score(model, texts, scores) for model in models]
    notes = [_note_names(model) for model in models if model.others]
    corpora = []
    for place, text in enumerate(texts):
        outputs = [
            LanguageOutput(
                name=model.name,
                kind="teacher" if model.seed is None else "student",
                scores=each[place],
                seed=model.seed,
                teachers=model.taught_by,
            )
            for model, each in zip(models, found, strict=True)
        ]
        corpora.append(measure_models(text, outputs, main_arm=main_arm, notes=notes))
    return LanguageRunEvaluation(
        run=recipe.name, objective=recipe.objective, main_arm=main_arm, corpora=tuple(corpora)
    )


def _note_names(model: EvaluatedModel) -> str:
    return f"{model.name} stands for {', '.join(model.others)} too: what is kept differs, the model does not"


def _student(recipe: LanguageRecipe, student: FinishedLanguageStudent) -> EvaluatedModel:
    run = student.run
    source = ModelSource.of_directory(run.name, student.directory)
    return EvaluatedModel(source, run.arm, run.seed, taught_by(recipe, run.arm))


def _score(
    model: EvaluatedModel, texts: Sequence[EvaluatedText], scores: ScoreDirectory
) -> list[PositionScores]:
    scores.stop.raise_if_set()
    name = model.source.name
    began = time.monotonic()
    num_run = 0
    with _progress_of(name, sum(len(text.rows.example_ids) for text in texts)) as show:

        def count(num_rows: int) -> None:
            nonlocal num_run
            scores.stop.raise_if_set()
            num_run += num_rows
            show(num_run)

        found = read_scores(model.source, texts, scores.predictions, scores.hash_cache, count)
    nll = -float(found[0].target_logprob_P.mean(dtype=np.float64))
    how = f"{time.monotonic() - began:.1f} s" if num_run else "measured already"
    say(f"  {name}: {nll:.3f} nats a position on {texts[0].corpus} ({how})")
    return found


@contextmanager
def _progress_of(name: str, num_rows: int) -> Iterator[Callable[[int], None]]:
    """Shows how many chunks a model has read; yields what hears their number."""
    with show_progress() as show:

        def tell(num_done: int, state: TeacherState = "running") -> None:
            show(ProgressEvent(name, state, 0, 1, num_done, num_rows))

        yield tell
