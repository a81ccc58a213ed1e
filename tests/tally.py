"""Counts what the reliability tests tried, for the table in ``docs/reliability.md``: two fixtures."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import pytest

TALLY_VARIABLE = "TMKD_TALLY"


class Tally(Protocol):
    """Counts one case."""

    def __call__(self, area: str, case: str, tried: int, survived: int, *, seconds: float = 0.0) -> None:
        """See ``Count``."""


@dataclass(frozen=True)
class Count:
    """What one case tried and what survived it.

    Attributes:
        area: A section of the table, such as ``order``.
        case: A row of it.
        tried: Faults, interruptions or examples.
        survived: How many of them ended as they should.
        seconds: How long that took, where it says something.
    """

    area: str
    case: str
    tried: int
    survived: int
    seconds: float = 0.0


@pytest.fixture(scope="session")
def counts() -> list[Count]:
    """Returns what the session's tests counted so far."""
    return []


@pytest.fixture(scope="session")
def tally(counts: list[Count]) -> Tally:
    """Returns ``tally(area, case, tried, survived, seconds=0.0)``.

    Where the environment variable TMKD_TALLY names a file, each call appends a line of JSON to it. One
    case may be counted by several calls: a reader adds them up.
    """

    def count(area: str, case: str, tried: int, survived: int, *, seconds: float = 0.0) -> None:
        if not 0 <= survived <= tried:
            raise ValueError(f"{survived} survived of {tried} tried")
        entry = Count(area, case, tried, survived, seconds)
        counts.append(entry)
        path = os.environ.get(TALLY_VARIABLE)
        if path:
            # One write of less than a page to a file opened for appending: processes do not mix lines.
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(entry)) + "\n")

    return count
