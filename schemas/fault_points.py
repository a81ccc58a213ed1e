"""The steps at which a process may die while it writes, by name, so that a test can die at each of them.

In production nothing listens: ``reach`` costs one comparison. A test sets a listener that kills, raises
or waits; the enumeration makes sure that no step is left untried (tests/reliability).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class FaultPoint(StrEnum):
    """A moment between two steps of the write protocol, or of a checkpoint's."""

    PLAN_CREATED = "plan-created"
    STORE_CREATED = "store-created"
    SHARD_BEGUN = "shard-begun"
    SHARD_WRITTEN = "shard-written"
    SHARD_CHECKED = "shard-checked"
    SHARD_SYNCED = "shard-synced"
    SHARD_RENAMED = "shard-renamed"
    SHARD_PUBLISHED = "shard-published"
    RECORD_WRITTEN = "record-written"
    RECORD_CREATED = "record-created"
    SHARD_COMMITTED = "shard-committed"
    MANIFEST_WRITTEN = "manifest-written"
    MANIFEST_REPLACED = "manifest-replaced"
    CHECKPOINT_WRITTEN = "checkpoint-written"
    CHECKPOINT_SYNCED = "checkpoint-synced"
    CHECKPOINT_RENAMED = "checkpoint-renamed"
    CHECKPOINT_LISTED = "checkpoint-listed"


Listener = Callable[[FaultPoint], None]

_listener: Listener | None = None


def reach(point: FaultPoint) -> None:
    """Tells the listener, if a test has set one, that ``point`` is reached."""
    if _listener is not None:
        _listener(point)


def listen(listener: Listener | None) -> None:
    """Sets this process's listener, or takes it away."""
    global _listener
    _listener = listener
