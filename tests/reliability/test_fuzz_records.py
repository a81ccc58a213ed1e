"""Fuzz of everything small that a store is opened by: JSON records, the plan, Arrow messages.

Nothing but the project's own errors may escape, in bounded time and memory. Cases are seeded: what
failed once fails again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.conftest import Tally
from tests.reliability.fuzz import Outcome, run_cases
from tests.reliability.fuzz_arrow import CASES
from tests.reliability.fuzz_json import damage_and_parse

ROOT = Path(__file__).parents[2]
# Processor time of a case, and growth of a process's peak memory over all of its cases.
MAX_CASE_S = 1.0
MAX_GROWN_MB = 200.0
BLOCK_CASES = 10_000


def run_child(area: str, seed: int, count: int) -> Outcome:
    """Runs cases in a child process; one that ends the child counts all of its block as lost."""
    command = [sys.executable, "-m", "tests.reliability.fuzz", area, str(seed), str(count)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    if child.returncode:
        lost = f"the child ended with {child.returncode}: {child.stderr[-2000:]}"
        return Outcome(tried=count, escaped=[f"block {seed} of {area}: {lost}"])
    return Outcome(**json.loads(child.stdout))


def settle(
    name: str, outcomes: list[Outcome], wall_s: float, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = sum(outcome.tried for outcome in outcomes)
    survived = sum(outcome.survived for outcome in outcomes)
    slowest_s = max(outcome.slowest_s for outcome in outcomes)
    grown_mb = max(outcome.grown_mb for outcome in outcomes)
    accepted = sum(outcome.accepted for outcome in outcomes)
    tally("fuzz", name, tried, survived, seconds=wall_s)
    with capsys.disabled():
        print(
            f"\nfuzz {name}: {tried} cases in {wall_s:.1f} s, {accepted} accepted, "
            f"{survived - accepted} refused, {tried - survived} escaped; slowest {slowest_s * 1000:.0f} ms, "
            f"memory grew by {grown_mb:.0f} MB"
        )
    assert [case for outcome in outcomes for case in outcome.escaped] == []
    assert survived == tried
    assert slowest_s < MAX_CASE_S
    assert grown_mb < MAX_GROWN_MB
    # Damage that is always refused at the door, or never, tests nothing.
    assert 0 < accepted < survived


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
    blocks = range(0, count, BLOCK_CASES)
    outcomes = [run_child(area, seed + block, min(BLOCK_CASES, count - block)) for block in blocks]
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
