"""A whole sweep: teachers and stores once, students side by side, one table.

Invariants (tests/end_to_end/test_sweep.py):
    1. The teachers run once, however many points and students there are.
    2. Interrupted and started again, a sweep trains only what is missing.
    3. A student that fails stops no other; the record names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.arms import MODEL_DIRECTORY, stage_jobs, student_runs
from cluster.console import say
from cluster.cost_log import CostLog
from cluster.evaluation_step import list_dropped, time_models
from cluster.pipeline import Made, make_inputs, make_stores
from cluster.recipe_file import write_recipe
from cluster.run_context import Run, RunOf, RunOptions
from cluster.scoring import EvaluationCorpus, FinishedStudent, read_predictions
from cluster.speed import ModelSpeed
from cluster.steps import StepLog
from cluster.student_step import check_stores, describe_student
from cluster.student_task import TASK_FILE, write_task
from cluster.sweep.costs import sum_costs
from cluster.sweep.jobs import SweepRun, make_graph, place_run
from cluster.sweep.points import Cell
from cluster.sweep.pool import PoolReport, Trainer, driver_trainer, train_jobs
from cluster.sweep.scoring import (
    CellOutputs,
    PointOutputs,
    collect_cell,
    compare_points,
    list_disagreements,
    pool_folds,
    score_point,
)
from precompute.interrupt import StopFlag, stop_on_signals
from schemas.evaluation import RunEvaluation
from schemas.recipe import Arm
from schemas.sweep import Sweep
from schemas.sweep_evaluation import (
    SWEEP_EVALUATION_FILE,
    PointEvaluation,
    SweepEvaluation,
    SweepStudent,
    write_sweep_evaluation,
)

PREDICTIONS_DIRECTORY = "predictions"


@dataclass(frozen=True)
class PreparedCell:
    """A cell whose stores are there."""

    cell: Cell
    run: Run
    made: Made
    runs: tuple[SweepRun, ...]


def run_sweep(sweep: Sweep, cells: Sequence[Cell], options: RunOptions) -> tuple[Path, SweepEvaluation]:
    """Runs all cells of a sweep.

    Args:
        sweep: The sweep.
        cells: As ``make_cells`` made them.
        options: Of the command line.

    Returns:
        The sweep's directory, and what ``sweep.json`` holds.

    Raises:
        TmkdError: Teachers or stores could not be made; or the sweep was asked to stop.
    """
    out = cells[0].directory.out
    directory = out / sweep.name
    directory.mkdir(parents=True, exist_ok=True)
    steps = StepLog.open(directory / "timings.json")
    say(f"sweep {directory}: {len(cells)} recipes")
    with stop_on_signals() as stop:
        with steps.step("teachers and stores"):
            prepared = [_prepare(sweep, cell, options, stop) for cell in cells[:1]]
            # The grid says what differs from here on; only the first recipe may miss a store by accident.
            known = replace(options, new_store=True)
            prepared += [_prepare(sweep, cell, known, stop) for cell in cells[1:]]
        runs = [run for one in prepared for run in one.runs]
        check_stores(job for run in runs for job in run.jobs)
        with steps.step("students"):
            report = _train(sweep, cells[0], runs, options, stop)
        costs = CostLog.open(cells[0].directory.costs)
        costs.add("students", report.seconds)
        for one in prepared:
            _describe_tasks(one, report)
        with steps.step("evaluation"):
            points, outputs = _evaluate(prepared, report, stop)
    main_arms = tuple(dict.fromkeys([sweep.baseline, *(point.main_arm for point in points)]))
    evaluation = SweepEvaluation(
        sweep=sweep.name,
        recipe=Path(sweep.recipe).name,
        size=sweep.size,
        seeds=tuple(dict.fromkeys(run.student.seed for run in runs)),
        folds=sweep.folds,
        baseline=sweep.baseline,
        points=tuple(points),
        across=compare_points(outputs, main_arms),
        students=tuple(_describe(run, report, costs, directory) for run in runs),
        cost=sum_costs(
            runs,
            [one.made.models for one in prepared],
            costs,
            trained=report.done,
            elapsed_s=sum(steps.seconds.values()),
        ),
        published=sweep.published,
    )
    write_sweep_evaluation(directory / SWEEP_EVALUATION_FILE, evaluation)
    return directory, evaluation


def _prepare(sweep: Sweep, cell: Cell, options: RunOptions, stop: StopFlag) -> PreparedCell:
    stop.raise_if_set()
    directory = cell.directory
    directory.run.mkdir(parents=True, exist_ok=True)
    write_recipe(cell.recipe, directory.recipe)
    say(f"{cell.name}")
    run: Run = RunOf(cell.recipe, options, directory, StepLog.open(directory.timings), stop)
    made = make_stores(run)
    inputs = replace(make_inputs(run, made), threads=_threads(sweep, run))
    students = [
        place_run(cell, student, stage_jobs(cell.recipe, student, inputs, directory.students))
        for student in student_runs(cell.recipe)
    ]
    return PreparedCell(cell, run, made, tuple(students))


def _describe_tasks(prepared: PreparedCell, report: PoolReport) -> None:
    """Writes ``task.json`` beside each finished student, for ``predict``, ``evaluate`` and ``export``."""
    for student in _finished(prepared, report):
        if not (student.directory / TASK_FILE).exists():
            write_task(describe_student(prepared.cell.recipe, student), student.directory)


def _finished(prepared: PreparedCell, report: PoolReport) -> list[FinishedStudent]:
    return [
        FinishedStudent(run.student, Path(run.jobs[-1].output) / MODEL_DIRECTORY, fingerprint)
        for run in prepared.runs
        if (fingerprint := run.jobs[-1].fingerprint()) in report.done
    ]


def _threads(sweep: Sweep, run: Run) -> int:
    if sweep.students.at_once == 1 and sweep.students.cpus is None:
        return run.num_threads
    from cluster.sweep.ray_trainer import student_cpus

    return max(1, student_cpus(sweep.students) // run.recipe.num_procs)


def _train(
    sweep: Sweep, cell: Cell, runs: Sequence[SweepRun], options: RunOptions, stop: StopFlag
) -> PoolReport:
    graph = make_graph(runs)
    num_procs = options.num_procs or cell.recipe.num_procs
    with _open_trainer(sweep, num_procs, options.address, stop) as trainer:
        return train_jobs(graph, trainer, stop)


def _open_trainer(
    sweep: Sweep, num_procs: int, address: str | None, stop: StopFlag
) -> AbstractContextManager[Trainer]:
    if sweep.students.at_once == 1 and address is None:
        return driver_trainer(num_procs, stop)
    # Importing Ray takes seconds.
    from cluster.sweep.ray_trainer import ray_trainer

    return ray_trainer(sweep.students, num_procs, address)


def _evaluate(
    prepared: Sequence[PreparedCell], report: PoolReport, stop: StopFlag
) -> tuple[list[PointEvaluation], dict[str, PointOutputs]]:
    """Scores all points; the outputs are those on the first evaluation corpus."""
    by_point: dict[str, list[PreparedCell]] = {}
    for one in prepared:
        by_point.setdefault(one.cell.point.name, []).append(one)
    points, outputs = [], {}
    for name, cells in by_point.items():
        found = _collect(cells, report, stop)
        pooled = [pool_folds(corpus) for corpus in found if corpus]
        points.append(_score(cells, pooled, report))
        if pooled:
            outputs[name] = pooled[0]
    return points, outputs


def _collect(cells: Sequence[PreparedCell], report: PoolReport, stop: StopFlag) -> list[list[CellOutputs]]:
    """Reads what the models of one point's cells say, for each evaluation corpus."""
    recipe = cells[0].cell.recipe
    found: list[list[CellOutputs]] = [[] for _ in recipe.evaluation.corpora]
    speeds: dict[str, ModelSpeed] = {}
    student_speeds: Mapping[Arm, ModelSpeed | None] = {}
    for place, one in enumerate(cells):
        corpora = [
            EvaluationCorpus(name, one.cell.recipe.corpora[name], one.made.lock.corpora[name])
            for name in recipe.evaluation.corpora
        ]
        students: Sequence[FinishedStudent] = _finished(one, report)
        if place == 0 and corpora:
            speeds, students = time_models(one.run, corpora[0], one.made.models, students)
            student_speeds = {student.run.arm: student.speed for student in students}
        students = [replace(student, speed=student_speeds.get(student.run.arm)) for student in students]
        predictions = one.cell.directory.cache / PREDICTIONS_DIRECTORY
        for position, corpus in enumerate(corpora):
            for student in students:
                stop.raise_if_set()
                read_predictions(student, corpus, predictions)
            collected = collect_cell(
                one.cell, corpus, students, teacher_speeds=speeds, predictions=predictions
            )
            found[position].append(collected)
    return found


def _score(
    cells: Sequence[PreparedCell], pooled: Sequence[PointOutputs], report: PoolReport
) -> PointEvaluation:
    first = cells[0].cell
    main_arm = first.recipe.student.arm
    scored = [score_point(one, main_arm) for one in pooled if one.outputs]
    missing: dict[str, tuple[int, ...]] = {}
    for one in cells:
        for run in one.runs:
            if run.jobs[-1].fingerprint() not in report.done:
                arm, seed = run.student.arm, run.student.seed
                missing[arm] = tuple(dict.fromkeys((*missing.get(arm, ()), seed)))
    evaluation = None
    if scored:
        dropped = list_dropped(cells[0].made.planned)
        evaluation = RunEvaluation(run=first.name, main_arm=main_arm, corpora=tuple(scored), dropped=dropped)
    return PointEvaluation(
        point=first.point,
        main_arm=main_arm,
        evaluation=evaluation,
        disagreements=list_disagreements(pooled[0], main_arm) if pooled else (),
        missing_seeds=missing,
    )


def _describe(run: SweepRun, report: PoolReport, costs: CostLog, directory: Path) -> SweepStudent:
    fingerprints = [job.fingerprint() for job in run.jobs]
    errors = [report.errors[one] for one in fingerprints if one in report.errors]
    # Its last stage's own error says why it has no result; it was not begun where an earlier one failed.
    is_last = fingerprints[-1] in report.errors and len(errors) == 1
    state = "trained" if fingerprints[-1] in report.done else "failed" if is_last else "not_run"
    return SweepStudent.model_validate(
        {
            "point": run.cell.point.name,
            "fold": run.cell.fold,
            "arm": run.student.arm,
            "teacher": run.student.teacher,
            "seed": run.student.seed,
            "state": state,
            "error": errors[-1] if errors else None,
            "stages": [_relative(Path(job.output), directory) for job in run.jobs],
            "seconds": sum(costs.seconds["students"].get(one, 0.0) for one in fingerprints),
            "fingerprint": fingerprints[-1],
        }
    )


def _relative(path: Path, directory: Path) -> str:
    return str(Path("..") / path.relative_to(directory.parent))
