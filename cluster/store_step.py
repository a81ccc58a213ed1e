"""The logit stores of a run: which teacher over which corpus part, and the Ray session that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from cluster.arms import used_teachers
from cluster.cost_log import CostLog, StoreClock
from cluster.planning import PlannedCorpus
from cluster.progress import show_progress
from cluster.ray_session import RaySession, ray_session
from cluster.run_context import AnyRun, Run, available_cpus
from cluster.teacher_model import TeacherModel
from precompute.events import ProgressEvent
from precompute.stores import StoreKey, StoreRequest, StoreSettings, make_stores


def make_run_stores(run: AnyRun, requests: Sequence[StoreRequest]) -> dict[StoreKey, str]:
    """Makes the stores that the recipe's students and its evaluation need.

    Returns:
        From (teacher, corpus, part) to the store's root.
    """
    settings = StoreSettings(
        root=run.directory.stores,
        hash_cache=run.directory.hash_cache,
        options=run.recipe.store,
        new_store=run.options.new_store,
    )
    started = False

    def session() -> AbstractContextManager[RaySession]:
        nonlocal started
        started = True
        return ray_session(run.options.address, num_cpus=available_cpus())

    with run.steps.step("logit stores") as step:
        clock = StoreClock(CostLog.open(run.directory.costs))
        with show_progress() as show:

            def on_progress(event: ProgressEvent) -> None:
                clock.tick(event)
                show(event)

            roots = make_stores(requests, settings, session=session, on_progress=on_progress, stop=run.stop)
            clock.charge(roots)
        step.skipped = not started
    return roots


def store_requests(
    run: Run, planned: Mapping[str, PlannedCorpus], models: Mapping[str, TeacherModel]
) -> list[StoreRequest]:
    """Lists what each teacher has to run over, leaving out teachers that were not asked for.

    Given stores cost nothing and their cut counts for all teachers, so that they are never left out.
    """
    requests = []
    for name, corpora in used_teachers(run.recipe).items():
        teacher = run.recipe.teacher(name)
        if teacher.model is not None and run.options.teachers and name not in run.options.teachers:
            continue
        model = models.get(name)
        for corpus in corpora:
            make = partial(
                StoreRequest,
                teacher,
                model.path if model else None,
                model.revision if model else None,
                run.recipe.corpora[corpus],
            )
            requests += [make(part) for part in planned[corpus].parts]
    return requests
