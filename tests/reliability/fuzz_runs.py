"""Runs of fuzz cases in child processes, and what all of them must keep to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.conftest import Tally
from tests.reliability.fuzz import Outcome

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


def run_blocks(area: str, seed: int, count: int) -> list[Outcome]:
    """Runs ``count`` cases, a child process for each block of them."""
    blocks = range(0, count, BLOCK_CASES)
    return [run_child(area, seed + block, min(BLOCK_CASES, count - block)) for block in blocks]
