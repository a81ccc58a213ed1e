"""Tries that are counted one by one, also when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.tally import Tally


class Trials:
    """What a case has tried so far, and what survived."""

    def __init__(self) -> None:
        self.tried = 0
        self.survived = 0

    @contextmanager
    def attempt(self, count: int = 1) -> Iterator[None]:
        """Counts ``count`` tries; they survive if the block ends without an exception."""
        self.tried += count
        yield
        self.survived += count


@contextmanager
def counted(tally: Tally, area: str, case: str) -> Iterator[Trials]:
    """Gives the block's tries to ``tally``, whatever becomes of it."""
    trials = Trials()
    try:
        yield trials
    finally:
        tally(area, case, trials.tried, trials.survived)
