"""Mending a store: its damaged files written again, its damaged shards computed again.

Nothing that counts is overwritten in place: a shard gets a record of the next revision, and the manifest
is replaced at the end, so that a reader that is open goes on.

Invariants (tests/cluster/test_store_repair.py):
    1. Only the named shards are computed.
    2. A repair that was interrupted is finished by the next one; what it committed is kept.
    3. The mended store holds the rows, in their order, that it was made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.store_writer import StoreWriter
from precompute.stores import StoreTarget, make_job, make_queue, run_queues
from schemas.plan import encode_plan
from schemas.recipe import StoreOptions
from schemas.records import COMMIT_DIRECTORY, PLAN_FILE, STORE_FILE, Manifest, encode_record, record_name
from schemas.storage.location import create_storage
from schemas.store_files import list_commits


@dataclass(frozen=True)
class RepairPlan:
    """What is to be mended.

    Attributes:
        revisions: From each shard to compute to the revision of its new record.
        rewrite: Of ``STORE.json`` and ``plan.arrow`` those that are damaged.
        foreign_shards: Shards with a record that the plan does not have; those records are deleted.
    """

    revisions: Mapping[int, int] = field(default_factory=dict)
    rewrite: tuple[str, ...] = ()
    foreign_shards: tuple[int, ...] = ()


def repair_store(
    target: StoreTarget,
    plan: RepairPlan,
    options: StoreOptions,
    *,
    session: Callable[[], AbstractContextManager[object]],
    on_progress: Callable[[ProgressEvent], None],
    stop: StopFlag,
) -> Manifest:
    """Mends a store.

    Args:
        target: What the store is, by the recipe; its root is where the store lies.
        plan: What is to be done.
        options: How shards are made.
        session: Connects to a Ray cluster; called only if a shard has to be computed.
        on_progress: Hears of the teacher.
        stop: Ends the repair between two shards.

    Returns:
        The manifest, which is in place.

    Raises:
        TmkdError: See ``precompute.stores.make_stores``.
    """
    store = _restore_files(target, plan, options)
    jobs = [
        make_job(target, store, store.plan.tasks()[shard], options, revision)
        for shard, revision in sorted(plan.revisions.items())
    ]
    rest = [task for task in store.plan.tasks() if task.shard not in plan.revisions]
    queue = make_queue(target.spec, jobs, len(rest), sum(task.num_rows for task in rest))
    run_queues([queue] if jobs else [], options, session, on_progress, stop)
    return store.finish()


def next_revisions(revisions: Mapping[int, tuple[int, ...]], shards: tuple[int, ...]) -> dict[int, int]:
    """Returns, for each of ``shards``, the revision after the highest one that has a record."""
    return {shard: max(revisions.get(shard, ()), default=-1) + 1 for shard in shards}


def _restore_files(target: StoreTarget, plan: RepairPlan, options: StoreOptions) -> StoreWriter:
    storage = create_storage(target.root, single_committer=options.single_committer)
    if PLAN_FILE in plan.rewrite:
        storage.replace(PLAN_FILE, encode_plan(target.plan))
    if STORE_FILE in plan.rewrite:
        storage.replace(STORE_FILE, encode_record(target.identity))
    revisions = list_commits(storage) if plan.foreign_shards else {}
    for shard in plan.foreign_shards:
        for revision in revisions.get(shard, ()):
            storage.delete(f"{COMMIT_DIRECTORY}/{record_name(shard, revision)}")
    return StoreWriter.open(
        target.root, target.identity, target.plan, single_committer=options.single_committer
    )
