"""What a sweep cost: measured seconds of teachers, stores and students, each counted once.

Invariant: a teacher, a store or a student that several points share is counted once
(tests/cluster/sweep/test_costs.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cluster.cost_log import CostLog, count_stored_rows, store_name
from cluster.step_count import count_steps
from cluster.sweep.jobs import SweepRun
from cluster.teacher_model import TeacherModel
from schemas.errors import TmkdError
from schemas.job import StageJob
from schemas.storage.location import open_storage
from schemas.store_files import list_data
from schemas.sweep_evaluation import SweepCost


def sum_costs(
    runs: Sequence[SweepRun],
    models: Iterable[Mapping[str, TeacherModel]],
    log: CostLog,
    *,
    trained: Iterable[str],
    elapsed_s: float,
) -> SweepCost:
    """Adds up what a sweep cost.

    Args:
        runs: All students.
        models: The teachers of each cell.
        log: Measured seconds.
        trained: Fingerprints of the stages whose result is there.
        elapsed_s: By the clock.
    """
    there = set(trained)
    paths = {model.path for cell in models for model in cell.values()}
    jobs = {job.fingerprint(): job for run in runs for job in run.jobs}
    stores = {store_name(root): root for job in jobs.values() for root in _roots(job)}
    last = {run.jobs[-1].fingerprint(): run for run in runs if run.jobs[-1].fingerprint() in there}
    return SweepCost(
        num_teachers=len(paths),
        teacher_training_s=sum(log.seconds["teachers"].get(_fingerprint(path), 0.0) for path in paths),
        teacher_forward_s=sum(log.seconds["stores"].get(name, 0.0) for name in stores),
        num_stores=len(stores),
        store_bytes=sum(map(_count_bytes, stores.values())),
        student_s=sum(log.seconds["students"].get(name, 0.0) for name in jobs.keys() & there),
        num_students=len(last),
        num_taught=sum(any(job.soft_targets for job in run.jobs) for run in last.values()),
        resident_s=_sum_resident(last.values(), stores, log),
        elapsed_s=elapsed_s,
    )


def _sum_resident(runs: Iterable[SweepRun], stores: Mapping[str, str], log: CostLog) -> float | None:
    """Returns the seconds of the teachers in the loop of every student; None if a store has no figure."""
    rates: dict[str, float] = {}
    for name, root in stores.items():
        rows = count_stored_rows(root)
        if name not in log.seconds["stores"] or not rows:
            return None
        rates[name] = log.seconds["stores"][name] / rows
    return sum(_resident(job, rates) for run in runs for job in run.jobs)


def _resident(job: StageJob, rates: Mapping[str, float]) -> float:
    """Returns what its teachers would take for the rows that a stage visits."""
    if not job.soft_targets:
        return 0.0
    visits = count_steps(job) * job.training.global_batch
    sizes = [part.num_rows for part in job.parts]
    per_row = sum(
        size * rates[store_name(root)]
        for target in job.soft_targets
        for row in target.stores
        for size, root in zip(sizes, row, strict=True)
    )
    return visits * per_row / sum(sizes)


def _roots(job: StageJob) -> list[str]:
    return [root for target in job.soft_targets for row in target.stores for root in row]


def _fingerprint(model: str) -> str:
    """Returns the name of a trained teacher's directory, above its ``model``."""
    return model.rstrip("/").rsplit("/", 2)[-2] if model.count("/") > 1 else model


def _count_bytes(root: str) -> int:
    try:
        files = list_data(open_storage(root))
    except TmkdError:
        return 0
    return sum(file.num_bytes for name, file in files.items() if name.endswith(".arrow"))
