"""Two whole precomputes, each with its own Ray and a real teacher, on one store at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.store_check import diagnose_store
from schemas.plan import make_plan
from tests.precompute.tiny import make_rows, save_tiny_bert, write_rows
from tests.reliability.conftest import Tally
from tests.reliability.store_runs import leftovers
from tests.reliability.trials import counted
from tests.reliability.whole_run import SHARD_ROWS

ROOT = Path(__file__).parents[2]
NUM_ROWS = 240


@pytest.mark.slow
def test_two_whole_precomputes_at_once_end_both_and_compute_each_shard_for_one(
    tmp_path: Path, tally: Tally
) -> None:
    save_tiny_bert(tmp_path / "model")
    rows = make_rows(NUM_ROWS)
    write_rows(rows, tmp_path / "rows.arrow")
    command = [sys.executable, "-m", "tests.reliability.whole_run", str(tmp_path)]
    num_shards = make_plan(rows, SHARD_ROWS).num_shards
    case = "2 whole precomputes at once, shards"
    with counted(tally, "concurrent writers", case) as trials, trials.attempt(num_shards):
        runs = [
            subprocess.Popen(
                [*command, str(tmp_path / f"hashes-{number}.json")],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
            )
            for number in range(2)
        ]
        try:
            outputs = [run.communicate(timeout=200)[0] for run in runs]
        finally:
            for run in runs:
                run.kill()
                run.wait()
        assert [run.returncode for run in runs] == [0, 0]
        won = [[int(line) for line in output.split()] for output in outputs]
        print("committed by each:", [len(shards) for shards in won])
        assert sorted(won[0] + won[1]) == list(range(num_shards))
        (root,) = (tmp_path / "stores").iterdir()
        assert diagnose_store(root, deep=True).is_sound
        assert not leftovers(root)
