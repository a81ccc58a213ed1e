"""Making all stores that a run needs: what is there is used, what is missing is computed.

Invariants (tests/precompute/test_stores.py):
    1. Everything that can be refused is refused before any work: labels, near misses, given stores.
    2. Where every store is complete, no teacher is loaded and no cluster is joined or started.
    3. Shards that are committed are never computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from precompute.events import ProgressEvent
from precompute.given_stores import PartKey, match_part, open_given_stores, shared_plans
from precompute.interrupt import StopFlag
from precompute.near_miss import near_misses
from precompute.queue import TeacherQueue
from precompute.store_writer import StoreWriter
from precompute.targets import (
    StoreKey,
    StoreRequest,
    StoreSettings,
    StoreTarget,
    check_given,
    describe_target,
    plan_part,
)
from precompute.tasks import AnyWorkerSpec, ShardJob
from schemas.errors import RefusedError
from schemas.plan import Plan, ShardTask
from schemas.recipe import StoreOptions
from schemas.records import MANIFEST_FILE
from schemas.storage.location import open_storage
from schemas.store_files import has_file

__all__ = [
    "StoreKey",
    "StoreRequest",
    "StoreSettings",
    "StoreTarget",
    "describe_targets",
    "make_job",
    "make_queue",
    "make_stores",
    "run_queues",
]


def make_stores(
    requests: Sequence[StoreRequest],
    settings: StoreSettings,
    *,
    session: Callable[[], AbstractContextManager[object]],
    on_progress: Callable[[ProgressEvent], None],
    stop: StopFlag,
) -> dict[StoreKey, str]:
    """Returns the complete store of each request, computing what is missing.

    Args:
        requests: In any order; repeats are harmless.
        settings: Where and how.
        session: Connects to a Ray cluster; called only if something has to be computed.
        on_progress: Hears of each teacher that has a model.
        stop: Ends the run between two shards.

    Raises:
        LabelError: A teacher's labels do not map onto the corpus's.
        RefusedError: A store of the same names but another hash exists, or given stores do not fit.
        DataError: A store or a corpus is damaged or missing.
        TeacherError: A teacher or a shard failed; the rest is committed.
        ResourceError: See ``precompute.pool.run_pool``.
        InterruptedRunError: The stop flag was set; what is committed is kept.
    """
    roots, plans = _use_given(requests)
    targets = _describe_targets(requests, plans, settings)
    for target in targets:
        _refuse_near_miss(target, settings)
    missing = [target for target in targets if not _is_complete(target)]
    stop.raise_if_set()
    if missing:
        stores = [_open_store(target, settings.options) for target in missing]
        queues = _fill_queues(missing, stores, settings.options)
        _tell_complete(targets, queues, on_progress)
        run_queues(queues, settings.options, session, on_progress, stop)
        for store in stores:
            store.finish()
    else:
        _tell_complete(targets, (), on_progress)
    return roots | {target.request.key: target.root for target in targets}


def describe_targets(requests: Sequence[StoreRequest], settings: StoreSettings) -> list[StoreTarget]:
    """Says which stores the models among the requests fill; opens neither a store nor a model.

    Raises:
        LabelError: A teacher's labels do not map onto the corpus's.
        TeacherError: A teacher's directory has no configuration or no safetensors.
        ResourceError: The hub cannot be reached.
    """
    return _describe_targets(requests, {}, settings)


def make_job(
    target: StoreTarget, store: StoreWriter, task: ShardTask, options: StoreOptions, revision: int = 0
) -> ShardJob:
    """Makes the job that computes one shard."""
    return ShardJob(
        store_root=store.root,
        rows_path=str(target.request.part.rows_path),
        part="/".join(target.request.part_key),
        task=task,
        on_bad_row=target.request.corpus.on_bad_row,
        batch_rows=options.batch_rows,
        revision=revision,
        driver_commits=options.single_committer,
    )


def make_queue(spec: AnyWorkerSpec, jobs: Sequence[ShardJob], num_shards: int, num_rows: int) -> TeacherQueue:
    """Makes a teacher's queue.

    Args:
        spec: The teacher.
        jobs: What it has to do.
        num_shards: Shards that are committed already.
        num_rows: Their rows.
    """
    return TeacherQueue(
        spec=spec,
        jobs=tuple(jobs),
        num_actors=spec.teacher.num_actors,
        cpus_per_actor=spec.teacher.cpus_per_actor,
        gpus_per_actor=spec.teacher.gpus_per_actor,
        num_shards_before=num_shards,
        num_rows_before=num_rows,
    )


def run_queues(
    queues: Sequence[TeacherQueue],
    options: StoreOptions,
    session: Callable[[], AbstractContextManager[object]],
    on_progress: Callable[[ProgressEvent], None],
    stop: StopFlag,
) -> None:
    """Runs queues in a session, which is begun only if there is something to do.

    Raises:
        TmkdError: See ``make_stores``.
    """
    if not queues:
        return
    # Importing Ray takes seconds, which a run over finished stores need not pay.
    from precompute.pool import run_pool

    with session():
        run_pool(queues, options, on_progress=on_progress, stop=stop)
    stop.raise_if_set()


def _use_given(requests: Sequence[StoreRequest]) -> tuple[dict[StoreKey, str], dict[PartKey, Plan]]:
    """Matches requests of teachers without a model, and takes over the plans of their stores."""
    opened: dict[str, dict[str, StoreWriter]] = {}
    roots: dict[StoreKey, str] = {}
    given: list[tuple[PartKey, StoreWriter]] = []
    for request in requests:
        teacher = request.teacher
        if teacher.stores is None:
            continue
        if teacher.name not in opened:
            opened[teacher.name] = open_given_stores(teacher)
        store = match_part(teacher, opened[teacher.name], request.part)
        check_given(request, store)
        roots[request.key] = store.root
        given.append((request.part_key, store))
    return roots, shared_plans(given)


def _describe_targets(
    requests: Sequence[StoreRequest], plans: dict[PartKey, Plan], settings: StoreSettings
) -> list[StoreTarget]:
    targets: dict[StoreKey, StoreTarget] = {}
    for request in requests:
        if request.teacher.stores is not None or request.key in targets:
            continue
        if request.part_key not in plans:
            plans[request.part_key] = plan_part(request.part, settings.options.shard_rows)
        targets[request.key] = describe_target(request, plans[request.part_key], settings)
    return list(targets.values())


def _refuse_near_miss(target: StoreTarget, settings: StoreSettings) -> None:
    if settings.new_store:
        return
    differing = near_misses(settings.root, target.identity, target.plan)
    if differing:
        teacher, corpus, part = target.request.key
        raise RefusedError(
            f"{settings.root} has a store of teacher {teacher} over {corpus}/{part} that was made "
            "otherwise; restore the recipe, or give --new-store to compute another one",
            differing=differing,
        )


def _is_complete(target: StoreTarget) -> bool:
    if not has_file(open_storage(target.root), MANIFEST_FILE):
        return False
    return StoreWriter.attach(target.root, expected=target.identity).is_complete()


def _open_store(target: StoreTarget, options: StoreOptions) -> StoreWriter:
    return StoreWriter.open(
        target.root, target.identity, target.plan, single_committer=options.single_committer
    )


def _fill_queues(
    targets: Sequence[StoreTarget], stores: Sequence[StoreWriter], options: StoreOptions
) -> list[TeacherQueue]:
    """Collects the pending shards of each teacher over all of its stores."""
    jobs: dict[str, list[ShardJob]] = {}
    num_shards: dict[str, int] = {}
    num_rows: dict[str, int] = {}
    specs: dict[str, AnyWorkerSpec] = {}
    seen: set[str] = set()
    for target, store in zip(targets, stores, strict=True):
        # Two names for the same model, or for the same rows, share one store.
        if target.root in seen:
            continue
        seen.add(target.root)
        name = target.request.teacher.name
        specs[name] = target.spec
        committed = store.commit_records()
        num_shards[name] = num_shards.get(name, 0) + len(committed)
        num_rows[name] = num_rows.get(name, 0) + sum(
            c.record.stop - c.record.start for c in committed.values()
        )
        jobs.setdefault(name, []).extend(
            make_job(target, store, task, options)
            for task in store.plan.tasks()
            if task.shard not in committed
        )
    return [
        make_queue(specs[name], found, num_shards[name], num_rows[name])
        for name, found in jobs.items()
        if found
    ]


def _tell_complete(
    targets: Sequence[StoreTarget],
    queues: Sequence[TeacherQueue],
    on_progress: Callable[[ProgressEvent], None],
) -> None:
    """Reports the teachers that have nothing to do."""
    busy = {queue.name for queue in queues}
    plans: dict[str, list[Plan]] = {}
    for target in targets:
        if target.request.teacher.name not in busy:
            plans.setdefault(target.request.teacher.name, []).append(target.plan)
    for name, found in plans.items():
        num_shards, num_rows = sum(p.num_shards for p in found), sum(p.num_rows for p in found)
        on_progress(ProgressEvent(name, "done", num_shards, num_shards, num_rows, num_rows, num_rows))
