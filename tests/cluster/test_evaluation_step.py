from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from cluster import evaluation_step
from cluster.evaluation_step import evaluate_students
from cluster.planning import PlannedCorpus
from cluster.run_context import Run, RunOptions
from cluster.run_directory import RunDirectory
from cluster.speed import ModelSpeed, Texts
from cluster.steps import StepLog
from precompute.interrupt import StopFlag
from schemas.errors import InterruptedRunError
from schemas.evaluation import read_evaluation
from schemas.records import StoresLock
from tests.cluster.tiny_students import finished, make_corpus, make_recipe, save_student

LOGITS = np.zeros((5, 2), np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = make_recipe(tmp_path / "runs")
    directory = RunDirectory.of(recipe)
    directory.run.mkdir(parents=True)
    return Run(recipe, RunOptions(), directory, StepLog.open(directory.timings), StopFlag())


@pytest.fixture
def lock(tmp_path: Path) -> StoresLock:
    return StoresLock(corpora={"dev": make_corpus(tmp_path, logits=LOGITS).parts})


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def time_student(directory: Path, texts: Texts, *, num_threads: int) -> ModelSpeed:
        names.append(directory.name)
        return ModelSpeed(
            examples_per_s=10.0 * len(names),
            num_parameters=7,
            num_examples=len(texts),
            batch_rows=64,
            num_threads=num_threads,
        )

    monkeypatch.setattr(evaluation_step, "time_student", time_student)
    return names


def test_one_student_of_each_arm_is_timed_and_the_evaluation_is_written(
    tmp_path: Path, run: Run, lock: StoresLock, timed: list[str]
) -> None:
    students = [
        finished(save_student(tmp_path / f"{arm}-{seed}"), arm, seed=seed, fingerprint=f"{arm}-{seed}")
        for arm in ("m-o-1", "golden")
        for seed in (1, 2)
    ]
    planned = {"dev": PlannedCorpus((), "/dropped.npy", 3)}
    evaluation = evaluate_students(run, planned, lock, students, teachers={})
    assert timed == ["m-o-1-1", "golden-1"]
    assert read_evaluation(run.directory.evaluation) == evaluation
    rates = {row.name: row.examples_per_s for row in evaluation.corpora[0].models}
    assert rates["m-o-1"] == pytest.approx(10.0)
    assert rates["golden"] == pytest.approx(20.0)
    assert evaluation.dropped[0].num_dropped == 3
    evaluate_students(run, planned, lock, students, teachers={})
    assert len(timed) == 2


def test_a_request_to_stop_ends_the_evaluation_with_its_signal(
    tmp_path: Path, run: Run, lock: StoresLock, timed: list[str]
) -> None:
    run.stop.set(signal.SIGTERM)
    with pytest.raises(InterruptedRunError) as caught:
        evaluate_students(run, {}, lock, [finished(save_student(tmp_path / "s"))], teachers={})
    assert caught.value.exit_code == 143
    assert timed == []
    assert not run.directory.evaluation.exists()
