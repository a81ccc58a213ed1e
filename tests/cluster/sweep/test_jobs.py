"""The graph of a sweep's jobs: shared stages once, each behind the one it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.arms import stage_jobs, student_runs
from cluster.run_directory import RunDirectory
from cluster.sweep.jobs import SweepRun, blocked_by, make_graph, place_run, ready_jobs
from cluster.sweep.points import Cell
from schemas.sweep import GridPoint
from tests.cluster.test_arms import inputs, recipe


def runs(alpha: float, sweep: str = "s") -> list[SweepRun]:
    changed = recipe(compare={"arms": ["golden"], "seeds": [1]})
    stages = list(changed.stages)
    stages[1] = stages[1].model_copy(update={"alpha": alpha})
    changed = changed.model_copy(update={"stages": tuple(stages)})
    point = GridPoint(coordinates={"alpha": str(alpha)})
    out = Path("/out")
    directory = RunDirectory(out, out / sweep / "cells" / point.name, "/out/stores")
    cell = Cell(point, None, changed, directory)
    return [
        place_run(cell, student, stage_jobs(changed, student, inputs(), directory.students))
        for student in student_runs(changed)
    ]


def test_stages_that_two_points_share_are_trained_once() -> None:
    graph = make_graph([*runs(0.9), *runs(0.5)])
    # Stage 1 of tmkd, its two stages 2, and the golden student, which knows no alpha.
    assert len(graph) == 4
    assert sorted(Path(node.job.output).name for node in graph.values()) == sorted(
        fingerprint[:16] for fingerprint in graph
    )


def test_another_sweep_below_the_same_root_has_the_same_places() -> None:
    here, there = runs(0.9), runs(0.9, sweep="other")
    assert [[job.output for job in run.jobs] for run in here] == [
        [job.output for job in run.jobs] for run in there
    ]


def test_a_stage_reads_the_model_where_the_stage_before_it_was_put() -> None:
    tmkd = runs(0.9)[0]
    first, second = tmkd.jobs
    init: Any = second.init
    assert init.path == f"{first.output}/model"
    assert init.fingerprint == first.fingerprint()


def test_moving_a_job_does_not_change_what_it_is() -> None:
    placed = runs(0.9)[0].jobs
    moved = tuple(job.model_copy(update={"output": "/elsewhere", "name": "x"}) for job in placed)
    assert [job.fingerprint() for job in moved] == [job.fingerprint() for job in placed]


def test_a_job_is_ready_once_what_it_starts_from_is_done() -> None:
    graph = make_graph(runs(0.9))
    stage_1, stage_2, golden = graph
    assert [node.fingerprint for node in ready_jobs(graph, [], [])] == [stage_1, golden]
    assert [node.fingerprint for node in ready_jobs(graph, [stage_1], [stage_1, golden])] == [stage_2]


def test_what_starts_from_a_failed_job_is_blocked_and_nothing_else() -> None:
    graph = make_graph(runs(0.9))
    stage_1, stage_2, golden = graph
    assert blocked_by(graph, [stage_1]) == {stage_2: stage_1}
    assert blocked_by(graph, [golden]) == {}
    chained = {**graph, "third": replace(graph[stage_2], fingerprint="third", after=stage_2)}
    assert blocked_by(chained, [stage_1]) == {stage_2: stage_1, "third": stage_1}
