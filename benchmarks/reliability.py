"""Runs every reliability test and writes what was tried and survived to ``docs/reliability.md``.

``make reliability`` calls this. The counts are those that the tests themselves made in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
TESTS = ("tests/reliability", "tests/distill/test_resume.py")
PACKAGES = ("pyarrow", "torch", "ray", "deepspeed", "s3fs", "moto")

INTRODUCTION = """# Reliability

What the tests in `tests/reliability` and `tests/distill/test_resume.py` tried, and what survived: every
fault ended in an error of the project's own that says what to do, or in the very content of an undisturbed
run. `make reliability` runs them all, the slow ones too, and writes this page; `make test` runs the quick
share of each.
"""


@dataclass
class Row:
    """Sums over the calls that one case made."""

    tried: int = 0
    survived: int = 0
    seconds: float = 0.0


def read_tally(lines: Iterable[str]) -> dict[str, dict[str, Row]]:
    """Adds up what the tests counted: area, then case, both in the order of their first count."""
    areas: dict[str, dict[str, Row]] = defaultdict(dict)
    for line in lines:
        count = json.loads(line)
        row = areas[count["area"]].setdefault(count["case"], Row())
        row.tried += count["tried"]
        row.survived += count["survived"]
        row.seconds += count["seconds"]
    return dict(areas)


def render_page(areas: dict[str, dict[str, Row]], cost: dict[str, Any], made: str) -> str:
    """Returns the page in Markdown."""
    lines = [INTRODUCTION, made, ""]
    tried = sum(row.tried for cases in areas.values() for row in cases.values())
    survived = sum(row.survived for cases in areas.values() for row in cases.values())
    lines += [f"**{tried:,} tried, {survived:,} survived.**", ""]
    for area in sorted(areas):
        cases = areas[area]
        timed = any(row.seconds for row in cases.values())
        lines += [f"## {area[:1].upper()}{area[1:]}", ""]
        lines += ["| case | tried | survived |" + (" seconds |" if timed else "")]
        lines += ["|---|---:|---:|" + ("---:|" if timed else "")]
        for case in sorted(cases):
            row = cases[case]
            end = f" {row.seconds:,.0f} |" if timed else ""
            lines.append(f"| {case.replace('|', '/')} | {row.tried:,} | {row.survived:,} |{end}")
        lines.append("")
    lines += ["## Cost of integrity", "", *render_cost(cost)]
    return "\n".join(lines) + "\n"


def render_cost(cost: dict[str, Any]) -> list[str]:
    """Returns the lines on what checking costs, from what ``benchmarks.integrity`` printed."""
    if not cost:
        return ["Not measured."]
    epochs, scan, writer = cost["reader"], cost["reader_scan"], cost["writer"]
    return [
        "Throughput with all checks over throughput without, medians of processor time: hashes, Arrow",
        "validation, finite logits, and rows compared with the plan.",
        "",
        "| measure | ratio |",
        "|---|---:|",
        f"| reader, {cost['teachers']} teachers joined, first epoch: every batch is checked |"
        f" {epochs['first_epoch']['cpu_ratio']:.2f} |",
        f"| reader, later epochs | {epochs['later_epochs']['cpu_ratio']:.2f} |",
        f"| reader, opening and first epoch | {epochs['whole']['cpu_ratio']:.2f} |",
        f"| bare scan of one store, nothing joined | {scan['cpu_ratio']:.2f} |",
        f"| writer: one less the share of a shard's time that reading back and hashing take"
        f" (MiniLM-L6 on CPU) | {1 - writer['checks_share_cpu']:.4f} |",
    ]


def run_tests(selection: str, tally: Path) -> tuple[int, float]:
    """Runs the reliability tests; returns pytest's exit code and the seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", selection, "--timeout", "3600"]
    code = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "TMKD_TALLY": str(tally)}, check=False
    ).returncode
    return code, time.monotonic() - began


def measure_cost() -> dict[str, Any]:
    """Runs the benchmark of what integrity costs, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.integrity", "--writer-rounds", "1"]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return dict(json.loads(found.stdout))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests and writes the page, unless a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="leave the slow tests out, and the page as it is"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        tally = Path(scratch) / "tally.jsonl"
        code, seconds = run_tests("not gpu and not slow" if options.quick else "not gpu", tally)
        areas = read_tally(tally.read_text().splitlines() if tally.exists() else ())
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    made = (
        f"Made on {time.strftime('%Y-%m-%d')} in {seconds / 60:.0f} minutes on {os.cpu_count()} CPUs "
        f"(Python {platform.python_version()}, {versions})."
    )
    if code:
        sys.stderr.write("a reliability test failed: the page is left as it is\n")
        return code
    page = render_page(areas, {} if options.quick else measure_cost(), made)
    if options.quick:
        sys.stdout.write(page)
    else:
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
