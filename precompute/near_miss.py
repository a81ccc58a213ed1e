"""Near misses: stores of the same corpus part and teacher name that are not the same store.

Nobody pays twice by accident: the differing fields are shown before a new store is begun.
"""

from __future__ import annotations

from schemas.errors import DataError
from schemas.records import StoreIdentity
from schemas.storage.location import list_locations, open_storage
from schemas.store_files import load_identity


def differing_fields(theirs: StoreIdentity, ours: StoreIdentity) -> list[str]:
    """Returns the hashed fields in which two stores differ, as ``field: theirs -> ours``."""
    differing = []
    if theirs.plan_hash != ours.plan_hash:
        differing.append(f"plan_hash: {theirs.plan_hash[:16]} -> {ours.plan_hash[:16]}")
    if theirs.generation_hash != ours.generation_hash:
        left, right = _flatten(theirs.generation), _flatten(ours.generation)
        names = sorted(left.keys() | right.keys())
        fields = [
            f"{name}: {left.get(name, 'absent')} -> {right.get(name, 'absent')}"
            for name in names
            if left.get(name) != right.get(name)
        ]
        hashes = f"generation_hash: {theirs.generation_hash[:16]} -> {ours.generation_hash[:16]}"
        differing += fields or [hashes]
    return differing


def near_misses(stores_root: str, identity: StoreIdentity) -> list[str]:
    """Finds stores of the same corpus part and teacher name with other hashes.

    Returns:
        For each of them its differing fields as ``field: theirs -> ours``, without repeats; empty
        if there is none, or if the store itself is there already, under whatever names.
    """
    differing: dict[str, None] = {}
    for location in list_locations(stores_root):
        try:
            theirs = load_identity(open_storage(location))
        except DataError:
            continue  # Another store's damage is no reason to stop; opening that one reports it.
        fields = differing_fields(theirs, identity)
        if not fields:
            return []
        names = (theirs.corpus, theirs.part, theirs.teacher)
        if names == (identity.corpus, identity.part, identity.teacher):
            differing.update(dict.fromkeys(fields))
    return list(differing)


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
