"""The step log of a run: what was done, what was skipped, and how long it took (``timings.json``)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cluster.console import say
from schemas.digest import DocumentError, read_document, write_document


@dataclass
class Step:
    """One step under way.

    Attributes:
        skipped: Set by the step when what it makes was there already.
    """

    name: str
    skipped: bool = False


@dataclass
class StepLog:
    """Seconds of each step of a run, kept over restarts: a skipped step keeps its first time.

    Attributes:
        path: ``timings.json``.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> StepLog:
        """Goes on with the log of an earlier start, if there is one that can be read."""
        try:
            steps = read_document(path)["steps"]
            return cls(path, {str(step["step"]): float(step["seconds"]) for step in steps})
        except (OSError, DocumentError, KeyError, TypeError, ValueError):
            return cls(path)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Times a step and writes it down when it succeeds."""
        step = Step(name)
        start = time.monotonic()
        yield step
        elapsed = time.monotonic() - start
        if step.skipped:
            say(f"  {name}: there already")
            self.seconds.setdefault(name, 0.0)
        else:
            say(f"  {name}: {elapsed:.1f} s")
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
        self._write()

    def _write(self) -> None:
        steps = [{"step": name, "seconds": round(value, 3)} for name, value in self.seconds.items()]
        write_document(self.path, {"steps": steps})
