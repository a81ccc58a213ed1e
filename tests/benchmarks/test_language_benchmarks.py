"""The benchmarks of language models run, on a tiny random model, and give the figures that they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import codecs, language_precompute, token_decode
from benchmarks.language_inputs import QUICK_POLICIES, Laps, compare, interleave

ROOT = Path(__file__).resolve().parents[2]


def read(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    text = capsys.readouterr().out
    found: dict[str, Any] = json.loads(text[text.index("{") :])
    return found


def test_precompute_is_compared_with_a_bare_model(capsys: pytest.CaptureFixture[str]) -> None:
    language_precompute.main(["--quick", "--threads", "1", "--rounds", "2", "--only", "speed"])
    speed = read(capsys)["speed"]
    assert set(speed) == {"bare", *QUICK_POLICIES}
    assert speed["bare"]["tokens_per_s_over_bare"] == 1
    assert all(found["tokens_per_s"] > 0 for found in speed.values())


def test_decoding_is_timed_for_every_codec(capsys: pytest.CaptureFixture[str]) -> None:
    token_decode.main(["--quick", "--threads", "1"])
    found = read(capsys)
    assert set(found["goals"]) == {"fixed", "compact"}
    assert len(found["measurements"]) == 2 * 2 * 3
    assert all(each["tokens_per_s"] > 0 for each in found["measurements"].values())


def test_sizes_are_compared_with_the_bound_and_with_other_layouts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    codecs.main(["--quick"])
    found = read(capsys)["k=50"]
    fixed = found["fixed, rows of 64"]
    bound = found["id_bound_bytes"] + found["value_bytes"]
    assert fixed["over_bound"] == pytest.approx(fixed["entry_bytes"] / bound, abs=1e-3)
    assert fixed["over_five_bytes_a_slot"] == pytest.approx(fixed["entry_bytes"] / 250, abs=1e-3)


@pytest.mark.slow
def test_steps_are_compared_in_time_and_memory() -> None:
    command = [sys.executable, "-m", "benchmarks.language_step", "--quick", "--threads", "1"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["time"]["over_cross_entropy"]["cross_entropy"]["ratio"] == 1
    assert found["time"]["over_in_loop"]["top_k, ghost_kl"]["ratio"] > 0
    assert found["memory"]["in_loop"]["peak_mb"] > 0


def test_ways_take_turns_and_ratios_are_of_medians() -> None:
    heard: list[tuple[str, int]] = []
    ways = {name: lambda number, name=name: heard.append((name, number)) for name in ("a", "b")}
    laps = interleave(ways, rounds=2, warm_up=1)
    assert heard == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [len(lap.wall) for lap in laps.values()] == [2, 2]
    found = compare({"a": Laps([1.0, 2.0, 3.0], [1.0] * 3), "b": Laps([2.0, 8.0, 3.0], [4.0] * 3)}, "a")["b"]
    assert (found["ratio"], found["median_of_round_ratios"]) == (1.5, 2.0)
    assert (found["least_round_ratio"], found["largest_round_ratio"]) == (1.0, 4.0)
    assert found["processor_ratio"] == 4.0
