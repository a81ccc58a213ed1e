"""Whether a storage service keeps its word on creating a file only if it is absent.

Two attempts of one shard decide by it who won, so a service that ignores it loses work silently. It is
tried out whenever a store is made: S3 keeps it, some services that speak S3 ignore the header, and many
fsspec file systems look first and write afterwards.

Invariants (tests/schemas/test_probe.py):
    1. A service that overwrites, or lets two of several concurrent creators win, is refused.
    2. The probe leaves no file on a service that answers.
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
    for kind, fault_of in (("twice", _create_twice), ("race", _create_at_once)):
        name = f"{PROBE_PREFIX}{token}-{kind}"
        fault = fault_of(storage, create, name)
        storage.delete(name)
        if fault is not None:
            raise refuse(storage.root, fault)


def refuse(root: str, reason: str) -> ResourceError:
    """Returns the error of a service on which attempts cannot be told apart."""
    return ResourceError(
        f"{root}: {reason}, so two workers could both believe that they committed a shard; use another "
        "service, or set `store.single_committer: true` in the recipe if one process alone writes this store"
    )


def _create_twice(storage: Storage, create: Create, name: str) -> str | None:
    """Returns what is wrong with creating a file again, or None."""
    first, second = b"first", b"second"
    if not create(name, first):
        return "it refuses to create a file that was never there"
    if create(name, second) or storage.read(name, max_bytes=64) != first:
        return "it ignores the condition to create a file only if it is absent"
    return None


def _create_at_once(storage: Storage, create: Create, name: str) -> str | None:
    """Returns what is wrong with creating a file at once, or None."""
    start = threading.Barrier(_NUM_RACERS)

    def race(racer: int) -> bool:
        start.wait()
        return create(name, _racer_bytes(racer))

    with ThreadPoolExecutor(_NUM_RACERS) as pool:
        winners = [racer for racer, has_won in enumerate(pool.map(race, range(_NUM_RACERS))) if has_won]
    if len(winners) != 1:
        return f"{len(winners)} of {_NUM_RACERS} that created one file at once were told that they had"
    if storage.read(name, max_bytes=64) != _racer_bytes(winners[0]):
        return "it overwrites what another created at the same time"
    return None


def _racer_bytes(racer: int) -> bytes:
    return f"racer {racer}".encode()
