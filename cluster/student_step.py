"""The students of a run, one after another, and the final one's place."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from cluster.arms import (
    MODEL_DIRECTORY,
    Inputs,
    StudentRun,
    stage_jobs,
    student_runs,
    taught_by,
)
from cluster.console import say
from cluster.deepspeed_launch import launch_stage
from cluster.run_context import AnyRun, Run
from cluster.scoring import FinishedStudent
from cluster.student_task import StudentTask, write_task
from cluster.students import Launch, is_complete, run_job
from distill.stage_directory import StageDirectory, publish_directory
from distill.store_reader import LogitStore
from distill.token_store import TokenStore
from schemas.job import AnyJob, LanguageJob, StageJob, StageStatus
from schemas.recipe import Recipe


def train_students(run: Run, inputs: Inputs) -> tuple[FinishedStudent, ...]:
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
    check_stores(job for jobs in jobs_of.values() for job in jobs)
    run_jobs(run, [job for jobs in jobs_of.values() for job in jobs])
    return tuple(_finish(student, jobs[-1]) for student, jobs in jobs_of.items())


def run_jobs(run: AnyRun, jobs: Iterable[AnyJob]) -> None:
    """Runs jobs, one after another, unless their results are there.

    Raises:
        RefusedError: A job's directory holds another job's result.
        TrainingError: The trainer failed.
        InterruptedRunError: The run was asked to stop.
    """
    for job in jobs:
        run.stop.raise_if_set()
        if run_job(job, make_launch(run)):
            say(f"  {job.name}: done{_describe_memory(job)}")


def check_stores(jobs: Iterable[AnyJob]) -> None:
    """Opens every store that a job still to be run reads: what stage 2 lacks shows before stage 1.

    Raises:
        DataError: A store is damaged, unfinished or gone.
        RefusedError: It is a store of another level.
    """
    classifiers: dict[str, None] = {}
    language_models: dict[str, None] = {}
    for job in jobs:
        if is_complete(job):
            continue
        if isinstance(job, LanguageJob):
            language_models |= dict.fromkeys(root for teacher in job.teachers for root in teacher.stores)
        else:
            classifiers |= dict.fromkeys(
                root for target in job.soft_targets for row in target.stores for root in row
            )
    for root in classifiers:
        LogitStore.open(root)
    for root in language_models:
        TokenStore.open(root)


def make_launch(run: AnyRun) -> Launch:
    """Returns what starts the trainer on a job file and waits for it; it ends the run if asked to."""

    def launch(job_path: Path) -> StageStatus:
        status = launch_stage(
            job_path,
            num_procs=run.options.num_procs or run.recipe.num_procs,
            hostfile=run.options.hostfile,
            stop=run.stop,
        )
        if status.state == "preempted":
            say(f"  stopped at step {status.step}")
            # Here the signal is known; 143 is not 130.
            run.stop.raise_if_set()
        return status

    return launch


def describe_student(recipe: Recipe, student: FinishedStudent) -> StudentTask:
    """Says what a recipe's student does and what it was trained from."""
    corpus = recipe.corpora[recipe.stages[-1].corpus]
    return StudentTask(
        text=corpus.text,
        labels=corpus.labels,
        question=corpus.question,
        arm=student.run.arm,
        seed=student.run.seed,
        teachers=taught_by(recipe),
        fingerprint=student.fingerprint,
    )


def publish_student(run: Run, student: FinishedStudent) -> Path:
    """Copies the final student to ``<run>/student``, whole or not at all, with what its task is."""
    target = run.directory.student
    task = describe_student(run.recipe, student)

    def write(directory: Path) -> None:
        shutil.copytree(student.directory, directory)
        write_task(task, directory)

    publish_directory(target, write)
    return target


def _describe_memory(job: AnyJob) -> str:
    """Says how much memory rank 0 had at its peak: that of a student, for no teacher is loaded there."""
    status = StageDirectory(Path(job.output)).read_status()
    if status is None or status.peak_rss_bytes is None:
        return ""
    return f", peak memory {status.peak_rss_bytes / 2**20:.0f} MiB"


def _finish(student: StudentRun, job: StageJob) -> FinishedStudent:
    return FinishedStudent(student, Path(job.output) / MODEL_DIRECTORY, job.fingerprint())
