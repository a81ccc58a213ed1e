"""Speed and memory of the reader: classification rows/s into collated tensors, two teachers joined.

``python -m benchmarks.reader --rows 1000000`` prints one JSON object. Stores are synthetic; hashes are
checked; one core. Goal: 1,000,000 rows/s without student tokens, and RssAnon flat within 10 % from 10^5
to 3*10^6 rows apart from the order array (8 bytes a row).

Each measurement runs in a fresh process, so that one's memory is not another's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from distill.data_state import slice_rank
from distill.join import JoinedCorpus
from distill.loader import LoaderOptions, StageLoader
from distill.order import EpochOrder, OrderKey
from distill.token_files import TokenFiles
from distill.tokens import CorpusTokens, Padding
from schemas.job import PartSource
from schemas.rows import corpus_schema
from tests.store_factory import make_store, target, write_part

LABELS = ("entailment", "neutral", "contradiction")
TEACHERS = ("teacher-1", "teacher-2")
BATCH = 256
WINDOW = 8
TOKENS = 64


class Clock:
    """Rows per second of wall time, and of processor time (which other processes do not disturb)."""

    def __init__(self) -> None:
        self._wall: list[float] = []
        self._cpu: list[float] = []

    def start(self) -> None:
        """Starts an epoch."""
        self._started = (time.perf_counter(), time.process_time())

    def stop(self, num_rows: int) -> None:
        """Ends an epoch of ``num_rows`` rows."""
        self._wall.append(num_rows / (time.perf_counter() - self._started[0]))
        self._cpu.append(num_rows / (time.process_time() - self._started[1]))

    def rates(self) -> dict[str, float]:
        """Returns medians over the epochs, and the first one, in which hashes are checked first."""
        return {
            "rows_per_s": statistics.median(self._wall),
            "rows_per_cpu_s": statistics.median(self._cpu),
            "first_epoch_rows_per_cpu_s": self._cpu[0],
        }


def make_inputs(root: Path, num_rows: int) -> None:
    """Writes a corpus of ``num_rows`` rows, two stores of it and student tokens of 64 a row."""
    generator = np.random.default_rng(0)
    hashes = generator.integers(0, 256, 16 * num_rows, np.uint8).tobytes()
    columns = [
        pa.array(np.arange(num_rows)),
        pa.array([f"train/{row}" for row in range(num_rows)], pa.string()),
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), num_rows, [None, pa.py_buffer(hashes)]),
        pa.array(["text"], pa.large_string()).take(np.zeros(num_rows, np.int64)),
        pa.array(generator.integers(0, 3, num_rows, np.int32)),
    ]
    part = write_part(
        root / "rows.arrow", pa.Table.from_arrays(columns, schema=corpus_schema(1)), shard_rows=4096
    )
    for teacher in TEACHERS:
        logits = generator.standard_normal((num_rows, 3), np.float32)
        make_store(root / teacher, part.plan, logits, labels=LABELS, teacher=teacher, batch_rows=1024)
    (root / "part.json").write_text(part.source.model_dump_json())
    shape = (num_rows * TOKENS,)
    ids = np.lib.format.open_memmap(root / "ids.npy", "w+", np.int32, shape)
    for start in range(0, shape[0], 1 << 22):
        stop = min(start + (1 << 22), shape[0])
        ids[start:stop] = generator.integers(5, 30000, stop - start, np.int32)
    ids.flush()
    np.save(root / "offsets.npy", np.arange(num_rows + 1) * TOKENS)
    np.save(root / "firsts.npy", np.full(num_rows, 20, np.int32))


def read_rss_anon() -> int:
    """Returns this process's anonymous resident memory in bytes (RssAnon of /proc/self/status)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def open_joined(root: Path) -> JoinedCorpus:
    source = PartSource.model_validate_json((root / "part.json").read_text())
    targets = [target((teacher, [root / teacher])) for teacher in TEACHERS]
    return JoinedCorpus.open([source], targets, LABELS[::-1])


def open_tokens(root: Path) -> CorpusTokens:
    """Maps the synthetic tokens, without tokenising anything."""
    arrays = (np.load(root / f"{name}.npy", mmap_mode="r") for name in ("ids", "offsets", "firsts"))
    files = TokenFiles(*(array.view(np.ndarray) for array in arrays))
    return CorpusTokens((files,), Padding(pad_id=0, pad_type_id=0, left=False, token_types=True))


def time_soft_labels(root: Path, epochs: int) -> dict[str, float]:
    """Order, slice, gather and hand over as tensors: an epoch of classification rows."""
    before = read_rss_anon()
    started = time.perf_counter()
    joined = open_joined(root)
    open_s = time.perf_counter() - started
    rows = joined.usable_rows()
    joined.reserve(2 * WINDOW)
    key = OrderKey(0, joined.corpus_key, WINDOW)
    clock = Clock()
    total = 0.0
    for epoch in range(epochs):
        clock.start()
        epoch_order = EpochOrder(key, epoch, rows, joined.shard_bounds)
        for first in range(0, len(rows), BATCH):
            step = epoch_order.slice(first, min(first + BATCH, len(rows)))
            share = slice_rank(step, 0, 1, BATCH, 1)
            found = joined.gather(share.rows)
            tensors = [torch.from_numpy(array) for array in (found.labels, found.logits_BNC, share.weights)]
            total += float(tensors[1][0, 0, 0])
        clock.stop(len(rows))
    return {
        **clock.rates(),
        "open_s": open_s,
        "rss_anon_bytes": read_rss_anon(),
        "rss_anon_before_bytes": before,
        "order_array_bytes": rows.nbytes,
        "num_rows": len(rows),
        "checksum": total,
    }


def time_loader(root: Path, epochs: int) -> dict[str, float]:
    """The whole loader, with 64 cached student tokens a row, prefetching off (one core)."""
    joined = open_joined(root)
    options = LoaderOptions(seed=0, global_batch=BATCH, max_micro_batch=BATCH, window=WINDOW, prefetch=0)
    loader = StageLoader(joined, open_tokens(root), joined.usable_rows(), options)
    num_steps = min(loader.num_steps_per_epoch, 2000)
    clock = Clock()
    for _ in range(epochs):
        clock.start()
        steps = loader.steps(loader.start(), num_steps)
        total = sum(int(step.batches[0].input["input_ids"][0, 0]) for step in steps)
        clock.stop(min(num_steps * BATCH, loader.num_rows))
    return {**clock.rates(), "rss_anon_bytes": read_rss_anon(), "checksum": total}


MEASURES = {"soft-labels": time_soft_labels, "loader": time_loader}


def run_apart(measure: str, root: Path, epochs: int) -> dict[str, float]:
    """Runs a measurement in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.reader", "--measure", measure, "--root", str(root)]
    result = subprocess.run(
        [*command, "--epochs", str(epochs)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--memory-rows", type=int, nargs="*", default=[100_000, 3_000_000])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--measure", choices=sorted(MEASURES))
    parser.add_argument("--root", type=Path, help="inputs, made if absent; by default a temporary directory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.measure:
        print(json.dumps(MEASURES[arguments.measure](arguments.root, arguments.epochs)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.root or Path(temporary)
        results = {}
        for num_rows in sorted({arguments.rows, *arguments.memory_rows}):
            inputs = root / str(num_rows)
            if not (inputs / "firsts.npy").exists():
                make_inputs(inputs, num_rows)
            results[num_rows] = {name: run_apart(name, inputs, arguments.epochs) for name in MEASURES}
    print(json.dumps(summarise(results, arguments.rows, arguments.memory_rows), indent=1))


def summarise(
    results: dict[int, dict[str, dict[str, float]]], rows: int, memory_rows: list[int]
) -> dict[str, object]:
    """Returns the figures that the goals speak of, and all measurements."""
    summary: dict[str, object] = {
        "batch": BATCH,
        "teachers": len(TEACHERS),
        "cpus_seen": os.cpu_count(),
    }
    for name, measure in (("", "soft-labels"), ("_with_tokens", "loader")):
        for unit in ("rows_per_s", "rows_per_cpu_s"):
            summary[unit + name] = results[rows][measure][unit]
    if memory_rows:
        apart = {
            count: results[count]["soft-labels"]["rss_anon_bytes"]
            - results[count]["soft-labels"]["order_array_bytes"]
            for count in (min(memory_rows), max(memory_rows))
        }
        summary["rss_anon_apart_from_order_bytes"] = apart
        summary["rss_anon_ratio"] = apart[max(memory_rows)] / apart[min(memory_rows)]
    return {**summary, "measurements": results}


if __name__ == "__main__":
    main()
