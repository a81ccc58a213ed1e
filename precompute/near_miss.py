"""Near misses: stores of the same corpus part and teacher name that are not the same store.

Nobody pays twice by accident: the differing fields are shown before a new store is begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schemas.errors import DataError, RefusedError
from schemas.plan import Plan, cut_rows
from schemas.records import StoreIdentity
from schemas.storage.location import list_locations, open_storage
from schemas.storage.storage import StoreSource
from schemas.store_files import load_identity, load_plan

_PLAN_FIELD = "plan_hash"


def differing_fields(theirs: StoreIdentity, ours: StoreIdentity) -> list[str]:
    """Returns the hashed fields in which two stores differ, as ``field: theirs -> ours``."""
    differing = []
    if theirs.plan_hash != ours.plan_hash:
        differing.append(f"{_PLAN_FIELD}: {theirs.plan_hash[:16]} -> {ours.plan_hash[:16]}")
    if theirs.generation_hash != ours.generation_hash:
        fields = differing_values(theirs.generation, ours.generation)
        hashes = f"generation_hash: {theirs.generation_hash[:16]} -> {ours.generation_hash[:16]}"
        differing += fields or [hashes]
    return differing


def differing_values(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Returns in what two JSON objects differ, as ``path: theirs -> ours``."""
    left, right = _flatten(theirs), _flatten(ours)
    return [
        f"{name}: {left.get(name, 'absent')} -> {right.get(name, 'absent')}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    ]


def differing_plans(theirs: Plan, ours: Plan) -> list[str]:
    """Returns in what two plans differ, rows or cut, as ``field: theirs -> ours``."""
    differing = []
    if theirs.fingerprint != ours.fingerprint:
        rows = [f"{plan.num_rows} rows, fingerprint {plan.fingerprint[:16]}" for plan in (theirs, ours)]
        differing.append(f"corpus: {rows[0]} -> {rows[1]}")
    sizes = [plan.bounds[1] for plan in (theirs, ours) if plan.num_shards]
    # A plan of one shard may be cut by its own size or by any larger one.
    if any(cut_rows(plan.num_rows, max(sizes)) != plan.bounds for plan in (theirs, ours) if sizes):
        differing.append(f"shard_rows: {_largest_shard(theirs)} -> {_largest_shard(ours)}")
    return differing


def near_misses(stores_root: str, identity: StoreIdentity, plan: Plan | None = None) -> list[str]:
    """Finds stores of the same corpus part and teacher name with other hashes.

    Args:
        stores_root: Location of all stores.
        identity: Of the store that is wanted.
        plan: Its plan; with it, another plan hash is told as what differs: corpus or shard size.

    Returns:
        For each of them its differing fields as ``field: theirs -> ours``, without repeats; empty
        if there is none, or if the store itself is there already, under whatever names.
    """
    differing: dict[str, None] = {}
    for location in list_locations(stores_root):
        source = open_storage(location)
        try:
            theirs = load_identity(source)
        except (DataError, RefusedError):
            continue  # Another store's damage or format is no reason to stop; opening that one reports it.
        fields = differing_fields(theirs, identity)
        if not fields:
            return []
        names = (theirs.corpus, theirs.part, theirs.teacher)
        if names == (identity.corpus, identity.part, identity.teacher):
            if plan is not None and theirs.plan_hash != identity.plan_hash:
                fields = _tell_plan(source, theirs, plan, fields)
            differing.update(dict.fromkeys(fields))
    return list(differing)


def _tell_plan(source: StoreSource, theirs: StoreIdentity, ours: Plan, fields: list[str]) -> list[str]:
    """Puts what the plans differ in into the place of their hashes."""
    try:
        told = differing_plans(load_plan(source, theirs.plan_hash), ours)
    except DataError:
        return fields
    if not told:
        return fields
    return told + [field for field in fields if not field.startswith(f"{_PLAN_FIELD}:")]


def _largest_shard(plan: Plan) -> int:
    return max((task.num_rows for task in plan.tasks()), default=0)


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
