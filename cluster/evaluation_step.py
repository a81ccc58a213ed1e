"""The evaluation of a run: speeds, then scores over each evaluation corpus.

Invariant: a request to stop is heard between two models; what was measured and predicted is kept
(tests/cluster/test_evaluation_step.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.arms import used_teachers
from cluster.planning import PlannedCorpus
from cluster.run_context import Run, available_cpus, available_device
from cluster.scoring import EvaluationCorpus, FinishedStudent, read_predictions, score_corpus
from cluster.speed import ModelSpeed, SpeedLog, Texts, time_student, time_teacher
from cluster.teacher_model import TeacherModel
from precompute.tasks import WorkerSpec
from schemas.evaluation import DroppedRows, RunEvaluation, write_evaluation
from schemas.recipe import Arm
from schemas.records import StoresLock

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
    teacher_speeds, students = time_models(run, corpora[0], teachers, students)
    for corpus in corpora:
        for student in students:
            run.stop.raise_if_set()
            read_predictions(student, corpus, run.directory.predictions)
    scored = [
        score_corpus(
            recipe, corpus, students, teacher_speeds=teacher_speeds, predictions=run.directory.predictions
        )
        for corpus in corpora
    ]
    dropped = list_dropped(planned)
    evaluation = RunEvaluation(
        run=recipe.name, main_arm=recipe.student.arm, corpora=tuple(scored), dropped=dropped
    )
    write_evaluation(run.directory.evaluation, evaluation)
    return evaluation


def list_dropped(planned: Mapping[str, PlannedCorpus]) -> tuple[DroppedRows, ...]:
    """Lists the corpora some of whose rows are not trained on."""
    return tuple(
        DroppedRows(
            corpus=name, num_rows=sum(part.num_rows for part in corpus.parts), num_dropped=corpus.num_dropped
        )
        for name, corpus in planned.items()
        if corpus.num_dropped
    )


def time_models(
    run: Run,
    corpus: EvaluationCorpus,
    teachers: Mapping[str, TeacherModel],
    students: Sequence[FinishedStudent],
) -> tuple[dict[str, ModelSpeed], Sequence[FinishedStudent]]:
    """Times teachers and students on the first rows of a corpus, unless the recipe turns that off.

    Returns:
        The teachers' speeds by name, and the students with theirs.
    """
    if not run.recipe.evaluation.speed_rows:
        return {}, students
    timing = _Timing.of_run(run, corpus)
    return _time_teachers(run, teachers, timing), _time_students(run, students, timing)


@dataclass(frozen=True)
class _Timing:
    """What all models are timed on.

    Attributes:
        of: What decides the figures beside the weights.
    """

    log: SpeedLog
    corpus: EvaluationCorpus
    texts: Texts
    num_threads: int
    of: Mapping[str, Any]

    @classmethod
    def of_run(cls, run: Run, corpus: EvaluationCorpus) -> _Timing:
        texts, num_threads = corpus.first_texts(run.recipe.evaluation.speed_rows), available_cpus()
        of = {
            "parts": [part.fingerprint for part in corpus.parts],
            "rows": len(texts),
            "threads": num_threads,
        }
        return cls(SpeedLog.open(run.directory.run / SPEED_FILE), corpus, texts, num_threads, of)


def _time_teachers(run: Run, teachers: Mapping[str, TeacherModel], timing: _Timing) -> dict[str, ModelSpeed]:
    speeds = {}
    for name in used_teachers(run.recipe):
        if name not in teachers:
            continue
        run.stop.raise_if_set()
        model = teachers[name]
        spec = WorkerSpec(
            teacher=run.recipe.teacher(name),
            model_path=model.path,
            revision=model.revision,
            num_threads=timing.num_threads,
            device=available_device(),
        )
        # A store's directory is named by the hash of the weights.
        stores = [part.stores.get(name) for part in timing.corpus.parts]
        of = {**timing.of, "model": model.path, "revision": model.revision, "stores": stores}
        speeds[name] = timing.log.measure(name, of, partial(time_teacher, spec, timing.texts))
    return speeds


def _time_students(run: Run, students: Sequence[FinishedStudent], timing: _Timing) -> list[FinishedStudent]:
    """Times the first student of each arm: the others of an arm differ by their weights alone."""
    firsts: dict[Arm, FinishedStudent] = {}
    timed = []
    for student in students:
        run.stop.raise_if_set()
        first = firsts.setdefault(student.run.arm, student)
        of = {**timing.of, "student": first.fingerprint}
        time_one = partial(time_student, first.directory, timing.texts, num_threads=timing.num_threads)
        timed.append(replace(student, speed=timing.log.measure(f"student {student.run.arm}", of, time_one)))
    return timed
