"""The students of a language run, one after another, and the final one's place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from cluster.language.arms import (
    FinishedLanguageStudent,
    LanguageInputs,
    finish,
    stage_jobs,
    stages_of,
    student_runs,
)
from cluster.language.student_task import LanguageStudentTask, write_language_task
from cluster.run_context import RunOf
from cluster.student_step import check_stores, run_jobs
from distill.stage_directory import publish_directory
from schemas.chunks import ChunkSpec
from schemas.language import LanguageRecipe


def train_students(run: RunOf[LanguageRecipe], inputs: LanguageInputs) -> tuple[FinishedLanguageStudent, ...]:
    """Trains every student of the recipe; the first one returned is the run's final student.

    Raises:
        RefusedError: A student's directory holds another job's result.
        DataError: A store that some stage reads is damaged; nothing was trained yet.
        TrainingError: The trainer failed.
        InterruptedRunError: The run was asked to stop.
    """
    jobs_of = {
        student: stage_jobs(run.recipe, student, inputs, run.directory.students)
        for student in student_runs(run.recipe)
    }
    jobs = [job for found in jobs_of.values() for job in found]
    check_stores(jobs)
    run_jobs(run, jobs)
    return tuple(finish(student, found[-1]) for student, found in jobs_of.items())


def publish_student(
    run: RunOf[LanguageRecipe], student: FinishedLanguageStudent, chunks: Mapping[str, ChunkSpec]
) -> Path:
    """Copies the final student to ``<run>/student``, whole or not at all, with what its task is.

    Args:
        run: The run.
        student: Its final student.
        chunks: What made the chunks of each corpus.
    """
    target = run.directory.student
    last = stages_of(run.recipe, student.run.arm)[-1]
    spec = chunks[last.corpus]
    task = LanguageStudentTask(
        objective=run.recipe.objective,
        tokenizer=spec.tokenizer,
        vocab=spec.vocab,
        max_length=run.recipe.student.max_length,
        arm=student.run.arm,
        seed=student.run.seed,
        teachers=last.teachers,
        fingerprint=student.fingerprint,
    )

    def write(directory: Path) -> None:
        shutil.copytree(student.directory, directory)
        write_language_task(task, directory)

    publish_directory(target, write)
    return target
