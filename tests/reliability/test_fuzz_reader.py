"""Fuzz of the reader over whole stores, damaged as bytes are and forged as a stranger could.

Each case opens a tiny store and reads its every row. Nothing but the project's own errors may escape, no
process may end, in bounded time and memory; and no value may be read that is not the store's.
"""

from __future__ import annotations

import time

import pytest

from tests.reliability.conftest import Tally
from tests.reliability.fuzz_runs import run_blocks, settle
from tests.reliability.fuzz_store import CASES


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        pytest.param(1, 1000, id="quick"),
        pytest.param(1000, 50_000, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.parametrize("area", CASES)
def test_a_store_of_fuzzed_files_is_read_right_or_refused(
    area: str, seed: int, count: int, tally: Tally, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    outcomes = run_blocks(area, seed, count)
    settle(area, outcomes, time.perf_counter() - start, tally, capsys)
