"""``stores.lock.json``: which corpora and stores a run's students read.

Invariants (tests/cluster/test_stores_lock.py):
    1. Stores of teachers that were not asked for this time stay locked while their plan is the same.
    2. A student is not trained from a store that was made otherwise than the recipe says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.run_context import AnyRun
from cluster.run_directory import read_lock
from precompute.generation import asked_of_classifier, asked_of_language_model
from precompute.materialised import MaterialisedPart
from precompute.near_miss import differing_values
from schemas.any_recipe import AnyRecipe
from schemas.digest import write_document
from schemas.errors import RefusedError
from schemas.language import LanguageRecipe
from schemas.plan import make_plan
from schemas.records import LockedPart, StoresLock
from schemas.rows import open_rows
from schemas.storage.location import open_storage
from schemas.store_files import load_identity, load_plan

StoreRoots = Mapping[tuple[str, str, str], str]
"""From (teacher, corpus, part) to a store's root."""


def write_lock(
    run: AnyRun, corpora: Mapping[str, Sequence[MaterialisedPart]], stores: StoreRoots
) -> StoresLock:
    """Writes the lock of a run, whose stores are finished."""
    shard_rows = run.recipe.store.shard_rows
    lock = StoresLock(
        corpora={name: locked_parts(parts, shard_rows, stores) for name, parts in corpora.items()}
    )
    if run.options.teachers and run.directory.lock.exists():
        lock = keep_stores(lock, read_lock(run.directory))
    write_document(run.directory.lock, lock.model_dump(mode="json"))
    return lock


def locked_parts(
    parts: Sequence[MaterialisedPart], shard_rows: int, stores: StoreRoots
) -> tuple[LockedPart, ...]:
    """Describes parts as ``distill`` reads them.

    Args:
        parts: Of one corpus.
        shard_rows: The recipe's cut; a part with stores has the cut of their plan.
        stores: From (teacher, corpus, part) to the store's root.
    """
    return tuple(_lock_part(part, shard_rows, stores) for part in parts)


def check_locked(corpora: Mapping[str, Sequence[MaterialisedPart]], lock: StoresLock) -> None:
    """Compares planned corpora with those that the stores were made for: dropped rows go by number.

    Raises:
        RefusedError: A corpus has other parts now.
    """
    for name, parts in corpora.items():
        now = [part.fingerprint for part in parts]
        if name in lock.corpora and now != [part.fingerprint for part in lock.corpora[name]]:
            raise RefusedError(
                f"corpus {name} has changed since its stores were made; run `tmkd precompute` with this "
                "recipe again"
            )


def check_made(recipe: AnyRecipe, lock: StoresLock) -> None:
    """Compares locked stores with what the recipe asks of their teachers now.

    Weights and texts are not looked at: no teacher is opened here.

    Raises:
        RefusedError: A store was made otherwise.
        DataError: A store is gone or damaged.
    """
    named = {teacher.name for teacher in recipe.teachers if teacher.model is not None}
    for name, parts in lock.corpora.items():
        for part in parts:
            for teacher in named & part.stores.keys() if name in recipe.corpora else ():
                made = load_identity(open_storage(part.stores[teacher])).generation
                asked = _asked(recipe, teacher, name)
                differing = differing_values({key: made.get(key) for key in asked}, asked)
                if differing:
                    raise RefusedError(
                        f"the store of teacher {teacher} over {name}/{part.part} is not what the recipe asks "
                        "for now; run `tmkd precompute` with it, or restore it",
                        differing=differing,
                    )


def _asked(recipe: AnyRecipe, teacher: str, corpus: str) -> dict[str, Any]:
    if isinstance(recipe, LanguageRecipe):
        return asked_of_language_model(recipe.teacher(teacher))
    return asked_of_classifier(recipe.teacher(teacher), recipe.corpora[corpus])


def keep_stores(lock: StoresLock, before: StoresLock) -> StoresLock:
    """Adds the stores of the teachers that were not asked for this time, where the plan is the same."""
    corpora = {}
    for name, parts in lock.corpora.items():
        known = {(part.part, part.plan_hash): part.stores for part in before.corpora.get(name, ())}
        corpora[name] = tuple(
            part.model_copy(update={"stores": {**known.get((part.part, part.plan_hash), {}), **part.stores}})
            for part in parts
        )
    return StoresLock(corpora=corpora)


def _lock_part(part: MaterialisedPart, shard_rows: int, stores: StoreRoots) -> LockedPart:
    roots = {
        teacher: root
        for (teacher, corpus, name), root in stores.items()
        if (corpus, name) == (part.corpus, part.part)
    }
    if roots:
        source = open_storage(next(iter(roots.values())))
        plan = load_plan(source, load_identity(source).plan_hash)
        shard_rows = plan.bounds[1] if plan.num_shards else shard_rows
    else:
        plan = make_plan(open_rows(part.rows_path), shard_rows)
    return LockedPart(
        part=part.part,
        fingerprint=part.fingerprint,
        plan_hash=plan.plan_hash,
        num_rows=part.num_rows,
        shard_rows=shard_rows,
        rows=str(part.rows_path),
        labels_hash=part.labels_hash,
        stores=roots,
    )
