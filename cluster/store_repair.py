"""``tmkd store repair``: diagnose, match with the recipe, compute again what is damaged.

Invariants (tests/cluster/test_store_repair.py):
    1. Where nothing is wrong, nothing is touched, and the recipe's models and corpora are not opened.
    2. What is found is told before anything is computed.
"""

from __future__ import annotations

from pathlib import Path

from cluster.console import say
from cluster.diagnosis import Diagnosis
from cluster.progress import show_progress
from cluster.ray_session import ray_session
from cluster.run_context import available_cpus
from cluster.store_check import Truth, diagnose_store
from cluster.store_match import match_store
from precompute.interrupt import StopFlag, stop_on_signals
from precompute.repair import RepairPlan, next_revisions, repair_store
from precompute.stores import StoreTarget
from schemas.any_recipe import AnyRecipe
from schemas.errors import DataError
from schemas.fields import Frozen
from schemas.records import PLAN_FILE, STORE_FILE, parse_record_name
from schemas.storage.location import open_storage
from schemas.storage.storage import StoreSource
from schemas.store_files import list_commits, load_manifest


class Repaired(Frozen):
    """What a repair did.

    Attributes:
        diagnosis: What was found.
        computed_shards: Shards that were computed again, or for the first time.
        rewritten: Of ``STORE.json`` and ``plan.arrow`` those that were written again.
    """

    store: str
    diagnosis: Diagnosis
    computed_shards: tuple[int, ...] = ()
    rewritten: tuple[str, ...] = ()


def repair_damage(
    root: str | Path, recipe: AnyRecipe, *, address: str | None = None, deep: bool = True
) -> Repaired:
    """Mends a store, or leaves it alone if nothing is wrong.

    Args:
        root: The store's location.
        recipe: That the store was made by.
        address: Of a Ray cluster; a local one by default.
        deep: Look for damage in every byte.

    Raises:
        RefusedError: The recipe does not describe this store.
        DataError: There is no store.
        TmkdError: A shard cannot be computed; what was mended until then is kept.
    """
    diagnosis = diagnose_store(root, deep=deep)
    source = open_storage(root)
    if diagnosis.is_sound:
        say(f"store {source.root}: nothing to repair")
        return Repaired(store=source.root, diagnosis=diagnosis)
    target = match_store(source, recipe, trust_identity=not diagnosis.is_blamed("identity"))
    if diagnosis.is_blamed("identity") or diagnosis.is_blamed("plan"):
        # Only now is it known what the shards should be.
        diagnosis = diagnose_store(root, deep=deep, truth=Truth(target.identity, target.plan))
    plan = plan_repair(source, diagnosis, target)
    _tell(diagnosis, plan, target)
    with stop_on_signals() as stop:
        _run(target, plan, recipe, address, stop)
    diagnose_store(root).raise_if_unsound()
    say(f"store {source.root}: repaired")
    return Repaired(
        store=source.root,
        diagnosis=diagnosis,
        computed_shards=tuple(sorted(plan.revisions)),
        rewritten=plan.rewrite,
    )


def plan_repair(source: StoreSource, diagnosis: Diagnosis, target: StoreTarget) -> RepairPlan:
    """Says what has to be done about a diagnosis."""
    revisions = _known_revisions(source)
    planned = range(target.plan.num_shards)
    shards = (*diagnosis.damaged_shards, *diagnosis.missing_shards)
    return RepairPlan(
        revisions=next_revisions(revisions, tuple(shard for shard in shards if shard in planned)),
        rewrite=(
            *((PLAN_FILE,) if diagnosis.is_blamed("plan") else ()),
            *((STORE_FILE,) if diagnosis.is_blamed("identity") else ()),
        ),
        foreign_shards=tuple(shard for shard in revisions if shard not in planned),
    )


def _known_revisions(source: StoreSource) -> dict[int, tuple[int, ...]]:
    """Lists revisions by the records that are there and those that the manifest names."""
    found = {shard: set(revisions) for shard, revisions in list_commits(source).items()}
    try:
        manifest = load_manifest(source)
    except DataError:
        manifest = None
    for entry in manifest.shards if manifest is not None else ():
        parsed = parse_record_name(entry.record)
        if parsed is not None and parsed[0] in found:
            found[parsed[0]].add(parsed[1])
        elif parsed is not None:
            found[parsed[0]] = {parsed[1]}
    return {shard: tuple(sorted(revisions)) for shard, revisions in sorted(found.items())}


def _tell(diagnosis: Diagnosis, plan: RepairPlan, target: StoreTarget) -> None:
    say(f"store {diagnosis.store}: {diagnosis.describe_damage() or 'not finished'}")
    for name in plan.rewrite:
        say(f"  {name} is written again")
    for shard in plan.foreign_shards:
        say(f"  the records of shard {shard}, which the plan does not have, are deleted")
    if plan.revisions:
        num_rows = sum(task.num_rows for task in target.plan.tasks() if task.shard in plan.revisions)
        shards = ", ".join(map(str, sorted(plan.revisions)[:20]))
        more = " ..." if len(plan.revisions) > 20 else ""
        name = target.request.teacher.name
        say(f"  teacher {name} computes {len(plan.revisions)} shards ({shards}{more}), {num_rows} rows")


def _run(
    target: StoreTarget, plan: RepairPlan, recipe: AnyRecipe, address: str | None, stop: StopFlag
) -> None:
    with show_progress() as on_progress:
        repair_store(
            target,
            plan,
            recipe.store,
            session=lambda: ray_session(address, num_cpus=available_cpus()),
            on_progress=on_progress,
            stop=stop,
        )
