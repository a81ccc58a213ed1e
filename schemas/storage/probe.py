"""Whether a storage service keeps its word on creating a file only if it is absent.

Two attempts of one shard decide by it who won, so a service that ignores it loses work silently. It is
tried out whenever a store is made: S3 keeps it, some services that speak S3 ignore the header, and many
fsspec file systems look first and write afterwards.

Invariants (tests/schemas/test_probe.py):
    1. A service that overwrites, or lets two of several concurrent creators win, is refused.
    2. The probe leaves no file.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from schemas.errors import ResourceError
from schemas.storage.storage import Storage

PROBE_PREFIX = "probe-"
_NUM_RACERS = 6

Create = Callable[[str, bytes], bool]


def probe_create(storage: Storage, create: Create) -> None:
    """Creates files twice, one after the other and at once.

    Args:
        storage: Where the store is to lie.
        create: ``storage.create`` without its fault points.

    Raises:
        ResourceError: The second create of a file succeeds, or the service cannot be used at all.
    """
    token = uuid.uuid4().hex
    names = [f"{PROBE_PREFIX}{token}-{kind}" for kind in ("twice", "race")]
    try:
        _create_twice(storage, create, names[0])
        _create_at_once(storage, create, names[1])
    finally:
        for name in names:
            storage.delete(name)


def refuse(root: str, reason: str) -> ResourceError:
    """Returns the error of a service on which attempts cannot be told apart."""
    return ResourceError(
        f"{root}: {reason}, so two workers could both believe that they committed a shard; use another "
        "service, or set `store.single_committer: true` in the recipe if one process alone writes this store"
    )


def _create_twice(storage: Storage, create: Create, name: str) -> None:
    first, second = b"first", b"second"
    if not create(name, first):
        raise refuse(storage.root, "it refuses to create a file that was never there")
    created_again = create(name, second)
    if created_again or storage.read(name, max_bytes=64) != first:
        raise refuse(storage.root, "it ignores the condition to create a file only if it is absent")


def _create_at_once(storage: Storage, create: Create, name: str) -> None:
    start = threading.Barrier(_NUM_RACERS)

    def race(racer: int) -> bool:
        start.wait()
        return create(name, f"racer {racer}".encode())

    with ThreadPoolExecutor(_NUM_RACERS) as pool:
        won = list(pool.map(race, range(_NUM_RACERS)))
    winners = [f"racer {racer}".encode() for racer, has_won in enumerate(won) if has_won]
    if len(winners) != 1 or storage.read(name, max_bytes=64) != winners[0]:
        raise refuse(
            storage.root, f"{len(winners)} of {_NUM_RACERS} that created one file at once were told they had"
        )
