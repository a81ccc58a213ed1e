"""The evaluation of a run: speeds, then scores over each evaluation corpus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from cluster.arms import used_teachers
from cluster.planning import PlannedCorpus
from cluster.run_context import Run, available_cpus
from cluster.scoring import EvaluationCorpus, FinishedStudent, score_corpus
from cluster.speed import ModelSpeed, SpeedLog, time_student, time_teacher
from cluster.teacher_step import TeacherModel
from distill.evaluate import read_texts
from precompute.tasks import WorkerSpec
from schemas.evaluation import DroppedRows, RunEvaluation, write_evaluation
from schemas.records import StoresLock
from schemas.rows import open_rows

SPEED_FILE = "speed.json"


def evaluate_students(
    run: Run,
    planned: Mapping[str, PlannedCorpus],
    lock: StoresLock,
    students: Sequence[FinishedStudent],
    *,
    teachers: Mapping[str, TeacherModel],
) -> RunEvaluation:
    """Scores teachers and students over the recipe's evaluation corpora and writes ``evaluation.json``."""
    recipe = run.recipe
    corpora = [
        EvaluationCorpus(name, recipe.corpora[name], lock.corpora[name]) for name in recipe.evaluation.corpora
    ]
    teacher_speeds: dict[str, ModelSpeed] = {}
    if recipe.evaluation.speed_rows:
        texts = _read_speed_texts(corpora[0], recipe.evaluation.speed_rows)
        log = SpeedLog.open(run.directory.run / SPEED_FILE)
        teacher_speeds = _time_teachers(run, teachers, log, texts)
        students = _time_students(students, log, texts)
    scored = [
        score_corpus(
            recipe, corpus, students, teacher_speeds=teacher_speeds, predictions=run.directory.predictions
        )
        for corpus in corpora
    ]
    dropped = [
        DroppedRows(
            corpus=name, num_rows=sum(part.num_rows for part in corpus.parts), num_dropped=corpus.num_dropped
        )
        for name, corpus in planned.items()
        if corpus.num_dropped
    ]
    evaluation = RunEvaluation(
        run=recipe.name, main_arm=recipe.student.arm, corpora=tuple(scored), dropped=tuple(dropped)
    )
    write_evaluation(run.directory.evaluation, evaluation)
    return evaluation


def _read_speed_texts(corpus: EvaluationCorpus, num_rows: int) -> list[tuple[str, ...]]:
    tables = (open_rows(Path(part.rows)) for part in corpus.parts)
    texts = (text for table in tables for text in read_texts(table.slice(0, num_rows)))
    return list(islice(texts, num_rows))


def _time_teachers(
    run: Run, teachers: Mapping[str, TeacherModel], log: SpeedLog, texts: Sequence[tuple[str, ...]]
) -> dict[str, ModelSpeed]:
    speeds = {}
    for name in used_teachers(run.recipe):
        if name in teachers:
            spec = WorkerSpec(
                teacher=run.recipe.teacher(name),
                model_path=teachers[name].path,
                revision=teachers[name].revision,
                num_threads=available_cpus(),
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
            speeds[name] = log.measure(name, partial(time_teacher, spec, texts))
    return speeds


def _time_students(
    students: Sequence[FinishedStudent], log: SpeedLog, texts: Sequence[tuple[str, ...]]
) -> list[FinishedStudent]:
    """Times one student of each number of heads: those differ by their weights alone."""
    timed = []
    for student in students:
        key = f"student {student.run.arm}"
        time_one = partial(time_student, student.directory, texts, num_threads=available_cpus())
        speed = log.measure(key, time_one)
        timed.append(replace(student, speed=speed))
    return timed
