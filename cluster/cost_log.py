"""Seconds that teachers, stores and students took, by what they are and not by who made them.

It is told to people alone: what is lost or cannot be read costs a figure, never a run.

Invariants (tests/cluster/test_cost_log.py):
    1. A thing that is found costs nothing anew: its first figure stays.
    2. What a teacher's forward passes took is charged to the stores that had no figure, by rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from precompute.events import ProgressEvent
from precompute.stores import StoreKey
from schemas.digest import DocumentError, read_document, write_document
from schemas.errors import TmkdError
from schemas.storage.location import open_storage
from schemas.store_files import load_manifest

Kind = Literal["teachers", "stores", "students"]


@dataclass
class CostLog:
    """The figures of one output root (``cache/costs.json``).

    Attributes:
        seconds: By kind, then by name: a teacher's or student's fingerprint, a store's directory.
    """

    path: Path
    seconds: dict[Kind, dict[str, float]]

    @classmethod
    def open(cls, path: Path) -> CostLog:
        """Goes on with the figures that are there."""
        log = cls(path, {"teachers": {}, "stores": {}, "students": {}})
        try:
            document = read_document(path)
            for kind, known in log.seconds.items():
                known.update({str(name): float(value) for name, value in document[kind].items()})
        except (OSError, DocumentError, KeyError, TypeError, ValueError, AttributeError):
            pass
        return log

    def add(self, kind: Kind, seconds: Mapping[str, float]) -> None:
        """Notes what things of a kind took, by name; a figure that is there stays."""
        if not seconds:
            return
        # Another run below this root may have written meanwhile.
        self.seconds = CostLog.open(self.path).seconds
        for name, value in seconds.items():
            self.seconds[kind].setdefault(name, round(value, 3))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_document(self.path, {str(kind): known for kind, known in self.seconds.items()})


@dataclass
class StoreClock:
    """Seconds of each teacher from its first row to its last."""

    log: CostLog
    began: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def tick(self, event: ProgressEvent) -> None:
        """Takes note of what a teacher does."""
        now = time.monotonic()
        if event.state in ("loading", "running"):
            self.began.setdefault(event.teacher, now)
        if event.teacher in self.began:
            self.ended[event.teacher] = now

    def charge(self, roots: Mapping[StoreKey, str]) -> None:
        """Divides each teacher's seconds by rows over its stores that have no figure yet."""
        for teacher, began in self.began.items():
            rows: dict[str, int] = {}
            for (name, _, _), root in roots.items():
                key = store_name(root)
                if name == teacher and key not in self.log.seconds["stores"]:
                    rows[key] = count_stored_rows(root)
            total = sum(rows.values())
            elapsed = self.ended[teacher] - began
            if total:
                self.log.add("stores", {key: elapsed * num / total for key, num in rows.items()})


def store_name(root: str) -> str:
    """Returns the name of a store's directory, which says what it holds."""
    return root.rstrip("/").rsplit("/", 1)[-1]


def count_stored_rows(root: str) -> int:
    """Counts a store's rows; 0 where its manifest cannot be read."""
    try:
        manifest = load_manifest(open_storage(root))
    except TmkdError:
        return 0
    return manifest.num_rows if manifest is not None else 0
