"""Runs fuzz cases and counts how they end; also the child process for formats that C++ decodes.

``python -m tests.reliability.fuzz AREA SEED COUNT`` prints one JSON object: a case that ends the process
costs the child, and the same arguments try the same cases again.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from schemas.arrow_message import ArrowMessageError
from schemas.errors import TmkdError

# Makes what is to be read, and returns the reading of it, which alone is timed.
Case = Callable[[random.Random], Callable[[], None]]


@dataclass
class Outcome:
    """How the cases of one seed ended.

    Attributes:
        tried: Cases.
        accepted: Cases whose bytes were read as something valid.
        refused: Cases that ended with the project's own errors.
        escaped: Cases (at most 20 of them) that ended otherwise, with their number.
        slowest_s: Processor time of the slowest case.
        grown_mb: Growth of the process's peak memory.
    """

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    escaped: list[str] = field(default_factory=list)
    slowest_s: float = 0.0
    grown_mb: float = 0.0

    @property
    def survived(self) -> int:
        return self.accepted + self.refused


def run_cases(case: Case, seed: int, count: int) -> Outcome:
    """Runs ``count`` cases, each with a generator of its own made of ``seed`` and its number."""
    outcome = Outcome(tried=count)
    before_mb = measure_peak_mb()
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        read = case(rng)
        start = time.process_time()
        try:
            read()
        except (TmkdError, ArrowMessageError):
            outcome.refused += 1
        except Exception as error:  # noqa: BLE001 - what must not happen is counted
            if len(outcome.escaped) < 20:
                outcome.escaped.append(f"case {seed}/{number}: {type(error).__name__}: {str(error)[:200]}")
        else:
            outcome.accepted += 1
        outcome.slowest_s = max(outcome.slowest_s, time.process_time() - start)
    outcome.grown_mb = measure_peak_mb() - before_mb
    return outcome


def measure_peak_mb() -> float:
    """Returns the most memory that this program has had resident.

    Not ``ru_maxrss``: on Linux a child starts with what its parent had before it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status states no VmHWM")


def main() -> None:
    from tests.reliability import fuzz_arrow, fuzz_store

    faulthandler.enable()
    cases = {**fuzz_arrow.CASES, **fuzz_store.CASES}
    area, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(asdict(run_cases(cases[area], seed, count))))


if __name__ == "__main__":
    main()
