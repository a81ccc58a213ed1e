"""What the stores of a language model cost beside its bare forward pass, in time and in memory.

    python -m benchmarks.language_precompute --model DIR

Prints one JSON object. Time: for each keep policy, tokens/s of a worker (``LanguageWorker.process``: hashes
checked, model, policy, codec, file written, synced and committed; all but Ray) over those of the bare
model with its whole head on the same batches, collated before, with the same threads. The ways take turns.
Goal: at least 0.95.

Memory: the peak of resident memory in a process of its own for each way, above that of the model without
its head over the same batch. Goal: at most 200 MB at 8 x 512 tokens, whose logits alone take 805 MB at
V = 49152.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.language_inputs import (
    Inputs,
    OpenStore,
    PeakMemory,
    add_inputs,
    compare,
    interleave,
    open_worker,
    run_apart,
)
from precompute.language_forward import ChunkRows, collate_chunks
from precompute.language_worker import LanguageWorker
from schemas.chunks import open_chunks, view_chunks
from schemas.language import TokenStoreOptions

MODULE = "benchmarks.language_precompute"
BASE, BARE = "base model", "bare"
LENGTH = 512
GOALS = {"tokens_per_s_over_bare": 0.95, "peak_mb_above_base": 200}


class Bench:
    """One model, its batches and a store for each policy."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        torch.set_num_threads(options.threads)
        self.inputs = Inputs.make(options, root, LENGTH)
        self.store_options = TokenStoreOptions(shard_rows=options.chunks)
        fields = {
            "codec": options.codec,
            "temperatures": tuple(options.temperatures),
            "tokens_per_batch": max(8, options.chunks * self.inputs.corpus.max_length),
            "cpus_per_actor": options.threads,
        }
        targets = {
            name: self.inputs.target(name, self.store_options, **fields) for name in self.inputs.policies
        }
        self.worker: LanguageWorker = open_worker(next(iter(targets.values())))
        self.stores = {name: OpenStore(target, self.store_options) for name, target in targets.items()}
        self.shard_tokens = options.chunks * self.inputs.corpus.max_length

    def batch(self, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids and attention mask of a shard, one batch."""
        num = self.store_options.shard_rows
        _, table = open_chunks(self.inputs.part.rows_path)
        chunks = view_chunks(table.slice(shard * num, num))
        ids = tuple(str(row) for row in range(num))
        rows = ChunkRows(chunks, ids, 1, None)
        return collate_chunks(self.worker.load(), rows, torch.arange(num).numpy())

    @torch.inference_mode()
    def run_base(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Runs the model without its head."""
        model = self.worker.load().model
        model.base_model(input_ids=batch[0], attention_mask=batch[1])

    @torch.inference_mode()
    def run_bare(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Runs the whole model."""
        model = self.worker.load().model
        model(input_ids=batch[0], attention_mask=batch[1])

    def ways(self, rounds: int) -> dict[str, Callable[[int], None]]:
        """Returns what is timed: a function of the round's number each."""
        batches = [self.batch(number) for number in range(rounds)]
        found: dict[str, Callable[[int], None]] = {BARE: lambda number: self.run_bare(batches[number])}
        for name, store in self.stores.items():
            found[name] = lambda number, store=store: store.process(self.worker, number)  # type: ignore[misc]
        return found

    def close(self) -> None:
        """Ends the worker's thread."""
        self.worker.close()


def measure_speed(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Returns tokens/s of each policy over those of the bare model."""
    bench = Bench(options, root)
    seconds = interleave(bench.ways(options.rounds + 1), options.rounds)
    found = compare(seconds, BARE)
    bench.close()
    return {
        name: {
            "tokens_per_s": round(bench.shard_tokens / times["median_s"], 1),
            "tokens_per_s_over_bare": round(1 / times["ratio"], 3),
            "median_of_rounds": round(1 / times["median_of_round_ratios"], 3),
            "by_processor_time": round(1 / times["processor_ratio"], 3),
            "rounds": [round(1 / times[f"{which}_round_ratio"], 3) for which in ("largest", "least")],
        }
        for name, times in found.items()
    }


def measure_peak(way: str, options: argparse.Namespace, root: Path) -> dict[str, float]:
    """Returns the peak of this process over one batch, in bytes."""
    bench = Bench(options, root)
    warm_up, batch = bench.batch(1), bench.batch(0)
    # The first pass of a process makes what stays.
    bench.run_base((warm_up[0][:1, :8], warm_up[1][:1, :8]))
    gc.collect()
    memory = PeakMemory()
    if way == BASE:
        bench.run_base(batch)
    elif way == BARE:
        bench.run_bare(batch)
    else:
        bench.stores[way].process(bench.worker, 0)
    peak = memory.peak()
    bench.close()
    return {"before": memory.before, "peak": peak}


def measure_memory(arguments: list[str], names: list[str]) -> dict[str, Any]:
    """Returns the peak of each way above that of the model without its head, in MB (10^6 bytes)."""
    peaks = {}
    for way in (BASE, BARE, *names):
        with tempfile.TemporaryDirectory() as root:
            peaks[way] = run_apart(MODULE, [*arguments, "--peak-of", way, "--root", root])
    base = peaks[BASE]["peak"]
    return {
        way: {
            "peak_mb_above_base": round((found["peak"] - base) / 1e6, 1),
            "peak_mb": round(found["peak"] / 1e6, 1),
            "before_mb": round(found["before"] / 1e6, 1),
        }
        for way, found in peaks.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs both measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_inputs(parser)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunks", type=int, default=8, help="chunks of a batch, each of 512 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codec", default="packed")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[])
    parser.add_argument("--only", choices=("speed", "memory"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 2)
    if options.peak_of:
        print(json.dumps(measure_peak(options.peak_of, options, options.root)))
        return
    result: dict[str, Any] = {
        "threads": options.threads,
        "batch": [options.chunks, LENGTH],
        "codec": options.codec,
        "temperatures": options.temperatures,
        "goals": GOALS,
    }
    with tempfile.TemporaryDirectory() as directory:
        inputs = Inputs.make(options, Path(directory), LENGTH)
        result["policies"] = dict(inputs.policies)
        if options.only != "memory":
            result["speed"] = measure_speed(options, Path(directory))
        if options.only != "speed":
            result["memory"] = measure_memory(_pass_on(options), list(inputs.policies))
    print(json.dumps(result, indent=1))


def _pass_on(options: argparse.Namespace) -> list[str]:
    """Returns the arguments that a process of its own needs."""
    found = ["--text", str(options.text), "--threads", str(options.threads), "--chunks", str(options.chunks)]
    found += ["--codec", options.codec, "--temperatures", *map(str, options.temperatures)]
    found += ["--model", str(options.model)] if options.model else []
    return found + (["--quick"] if options.quick else [])


if __name__ == "__main__":
    main()
