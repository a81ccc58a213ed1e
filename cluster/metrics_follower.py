"""New lines of a ``metrics.jsonl`` while a trainer writes it.

Invariants:
    1. Each step's line is handed on once, also when a resumed trainer rewrites the file
       (tests/cluster/test_metrics_follower.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class MetricsFollower:
    """Hands complete new lines to a callback."""

    def __init__(self, path: Path, on_line: Callable[[dict[str, Any]], None] | None) -> None:
        self._path = path
        self._on_line = on_line
        self._inode = 0
        self._offset = 0
        self._seen: set[tuple[str, int]] = set()

    def poll(self) -> None:
        """Reads what was added since the last call."""
        if self._on_line is None:
            return
        try:
            inode = self._path.stat().st_ino
            if inode != self._inode:
                # A resume replaces the file.
                self._inode, self._offset = inode, 0
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        complete, _, _ = data.rpartition(b"\n")
        if not complete:
            return
        self._offset += len(complete) + 1
        for text in complete.splitlines():
            self._hand_on(json.loads(text))

    def _hand_on(self, line: dict[str, Any]) -> None:
        key = (str(line["kind"]), int(line["step"]))
        if key not in self._seen and self._on_line is not None:
            self._seen.add(key)
            self._on_line(line)
