"""What a sweep cost: everything once, whoever shares it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cost_log import CostLog, store_name
from cluster.sweep.costs import sum_costs
from cluster.sweep.jobs import SweepRun
from cluster.teacher_model import TeacherModel
from tests.cluster.sweep.test_jobs import runs
from tests.tiny_stage import TinyStage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> TinyStage:
    return TinyStage(tmp_path_factory.mktemp("stage"))


def make_runs(stage: TinyStage) -> list[SweepRun]:
    """Two points that share stage 1, which two teachers teach; the second point's stage 2 has none."""
    described = runs(0.9)[0]
    training = {"epochs": 2, "global_batch": 4, "max_steps": None, "selection_fraction": 0.0}
    first = stage.job("one")
    first = first.model_copy(update={"training": first.training.model_copy(update=training)})
    golden = stage.job("two", soft_targets=(), alpha=0.0)
    golden = golden.model_copy(update={"training": golden.training.model_copy(update={"max_steps": 5})})
    return [
        SweepRun(described.cell, described.student, (first,)),
        SweepRun(described.cell, described.student, (first, golden)),
    ]


def test_shared_stages_teachers_and_stores_count_once(stage: TinyStage, tmp_path: Path) -> None:
    made = make_runs(stage)
    first, golden = made[1].jobs
    names = [store_name(root) for target in first.soft_targets for row in target.stores for root in row]
    log = CostLog.open(tmp_path / "costs.json")
    log.add("teachers", {"abc": 40.0, "unused": 99.0})
    log.add("stores", dict.fromkeys(names, 10.0) | {"unused": 99.0})
    log.add("students", {first.fingerprint(): 3.0, golden.fingerprint(): 4.0, "unused": 99.0})
    models = [{"t": TeacherModel("/out/teachers/abc/model")}] * 2
    there = [first.fingerprint(), golden.fingerprint()]
    cost = sum_costs(made, models, log, trained=there, elapsed_s=1.0)
    assert (cost.num_teachers, cost.teacher_training_s) == (1, 40.0)
    assert (cost.num_stores, cost.teacher_forward_s) == (len(set(names)), 10.0 * len(set(names)))
    assert cost.student_s == 7.0
    assert (cost.num_students, cost.num_taught) == (2, 2)
    assert cost.store_bytes > 0


def test_teachers_in_the_loop_would_run_for_every_visit_of_every_student(
    stage: TinyStage, tmp_path: Path
) -> None:
    made = make_runs(stage)
    first = made[0].jobs[0]
    num_rows = sum(part.num_rows for part in first.parts)
    roots = [[root for row in target.stores for root in row] for target in first.soft_targets]
    log = CostLog.open(tmp_path / "costs.json")
    # One second a row, for each teacher.
    log.add(
        "stores",
        {
            store_name(root): float(part.num_rows)
            for row in roots
            for root, part in zip(row, first.parts, strict=True)
        },
    )
    there = [job.fingerprint() for job in made[1].jobs]
    cost = sum_costs(made, [], log, trained=there, elapsed_s=1.0)
    steps = 2 * -(-num_rows // 4)
    # Both students went through stage 1, whatever it was trained once.
    assert cost.resident_s == pytest.approx(2 * steps * 4 * len(roots))
    assert (
        sum_costs(made, [], CostLog.open(tmp_path / "none"), trained=there, elapsed_s=1.0).resident_s is None
    )


def test_what_failed_is_not_counted(stage: TinyStage, tmp_path: Path) -> None:
    made = make_runs(stage)
    first, golden = made[1].jobs
    log = CostLog.open(tmp_path / "costs.json")
    log.add("students", {first.fingerprint(): 3.0, golden.fingerprint(): 4.0})
    cost = sum_costs(made, [], log, trained=[first.fingerprint()], elapsed_s=1.0)
    assert (cost.num_students, cost.student_s) == (1, 3.0)
