"""Fuzz of everything small that a store is opened by: JSON records, the plan, Arrow messages.

Nothing but the project's own errors may escape, in bounded time and memory. Cases are seeded: what
failed once fails again.
"""

from __future__ import annotations

import time

import pytest

from tests.reliability.conftest import Tally
from tests.reliability.fuzz import run_cases
from tests.reliability.fuzz_arrow import CASES
from tests.reliability.fuzz_json import damage_and_parse
from tests.reliability.fuzz_runs import run_blocks, run_child, settle


@pytest.mark.parametrize(
    ("seed", "count"),
    [pytest.param(1, 5000, id="quick"), pytest.param(2, 100_000, id="long", marks=pytest.mark.slow)],
)
def test_damaged_json_records_are_refused_with_our_own_error(
    seed: int, count: int, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    outcome = run_cases(damage_and_parse, seed, count)
    settle("JSON records", [outcome], time.perf_counter() - start, tally, capsys)


@pytest.mark.parametrize(
    ("seed", "count"),
    [pytest.param(1, 600, id="quick"), pytest.param(1000, 20_000, id="long", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("area", CASES)
def test_damaged_arrow_bytes_are_refused_with_our_own_error(
    area: str, seed: int, count: int, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    outcomes = run_blocks(area, seed, count)
    settle(area, outcomes, time.perf_counter() - start, tally, capsys)


def test_a_case_that_escapes_is_named_and_not_counted_as_survived() -> None:
    def fail() -> None:
        raise KeyError("escaped")

    outcome = run_cases(lambda _: fail, 5, 3)
    assert (outcome.tried, outcome.survived) == (3, 0)
    assert outcome.escaped[0] == "case 5/0: KeyError: 'escaped'"


def test_a_child_that_ends_is_a_lost_block() -> None:
    outcome = run_child("no such area", 0, 10)
    assert (outcome.tried, outcome.survived) == (10, 0)
    assert "the child ended with 1" in outcome.escaped[0]
