"""What the benchmarks of language models share: a model, text in chunks, stores of them, and clocks.

The model is a directory that transformers reads (safetensors and a fast tokenizer), such as
SmolLM2-135M-Instruct. ``--quick`` takes a random Llama of two layers and random text in its place, and few
rounds: that shows that a benchmark runs, and no more.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precompute.chunking import ChunkedPart, chunk_part, describe_chunks
from precompute.documents import materialise_documents
from precompute.language_worker import LanguageWorker
from precompute.store_writer import StoreWriter
from precompute.stores import StoreRequest, StoreSettings, StoreTarget, describe_targets, make_job
from precompute.tasks import LanguageWorkerSpec
from precompute.tokenizer import load_tokenizer
from schemas.language import LanguageTeacher, TokenStoreOptions
from schemas.text_corpus import TextCorpus
from tests.precompute.tiny_language import make_documents, save_tiny_llama

WIKITEXT = (
    Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext" / "wikitext2_validation.txt.gz"
)
QUICK_LENGTH = 16
_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
POLICIES: Mapping[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "k": 64},
    "top_p": {"kind": "top_p", "p": 0.95, "k_min": 8, "k_max": 128},
    "sampled": {"kind": "sampled", "num_samples": 64},
    "hybrid": {"kind": "hybrid", "k": 32, "m": 32},
}
QUICK_POLICIES: Mapping[str, dict[str, Any]] = {
    "top_k": {"kind": "top_k", "k": 8},
    "top_p": {"kind": "top_p", "p": 0.95, "k_min": 2, "k_max": 16},
    "sampled": {"kind": "sampled", "num_samples": 8},
    "hybrid": {"kind": "hybrid", "k": 4, "m": 4},
}


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose model and text."""
    parser.add_argument("--model", type=Path, help="a causal language model's directory")
    parser.add_argument("--text", type=Path, default=WIKITEXT, help="a text file, .txt or .txt.gz")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and few rounds")


@dataclass(frozen=True)
class Inputs:
    """Model and chunks.

    Attributes:
        model: Directory.
        root: For stores.
        corpus: Of ``part``.
        part: Chunks, all but the last of ``length`` tokens.
        policies: By name.
    """

    model: Path
    root: Path
    corpus: TextCorpus
    part: ChunkedPart
    policies: Mapping[str, dict[str, Any]]

    @classmethod
    def make(
        cls, options: argparse.Namespace, root: Path, length: int, characters: int | None = None
    ) -> Inputs:
        """Cuts the text, or its first characters, into chunks, once below ``root``."""
        model, text = options.model, options.text
        if options.quick:
            root.mkdir(parents=True, exist_ok=True)
            model, text, length = root / "model", root / "text.txt", QUICK_LENGTH
            if not text.exists():
                save_tiny_llama(model)
                text.write_text(" ".join(make_documents(80)))
        if model is None:
            raise SystemExit("give --model DIR, or --quick")
        if characters is not None:
            text = _cut_text(text, root / "start.txt", characters)
        tokenizer = load_tokenizer(str(model))
        corpus = TextCorpus.model_validate(
            {
                "max_length": length,
                "parts": [{"kind": "text", "path": str(text), "split": "whole", "name": "text"}],
            }
        )
        spec = describe_chunks(tokenizer, corpus, "causal", field="model")
        (documents,) = materialise_documents("text", corpus, data_root=None, out=root)
        part = chunk_part(documents, tokenizer, spec)
        return cls(model, root, corpus, part, QUICK_POLICIES if options.quick else POLICIES)

    def target(self, name: str, options: TokenStoreOptions, **teacher: Any) -> StoreTarget:
        """Describes a store of a policy; ``teacher`` are fields of ``LanguageTeacher``."""
        fields = {"name": name, "model": str(self.model), "keep": self.policies[name]} | teacher
        request = StoreRequest(
            LanguageTeacher.model_validate(fields), str(self.model), None, self.corpus, self.part
        )
        settings = StoreSettings(str(self.root / "stores"), self.root / "hashes.json", options)
        (target,) = describe_targets([request], settings)
        return target


def _cut_text(text: Path, start: Path, characters: int) -> Path:
    opener = gzip.open if text.suffix == ".gz" else open
    with opener(text, "rt", encoding="utf-8") as file:
        start.write_text(file.read(characters), encoding="utf-8")
    return start


def open_worker(target: StoreTarget) -> LanguageWorker:
    """Returns the worker of a store; it works on other stores of the same model, too."""
    if not isinstance(target.spec, LanguageWorkerSpec):
        raise TypeError("not a store of a language model")
    return LanguageWorker(target.spec)


class OpenStore:
    """A store that takes shards."""

    def __init__(self, target: StoreTarget, options: TokenStoreOptions) -> None:
        self.target = target
        self.writer = StoreWriter.open(target.root, target.identity, target.plan)
        self._options = options
        self._tasks = self.writer.plan.tasks()

    def process(self, worker: LanguageWorker, shard: int) -> None:
        """Computes and commits one shard, as an actor does."""
        worker.process(make_job(self.target, self.writer, self._tasks[shard], self._options))

    def fill(self, worker: LanguageWorker) -> None:
        """Computes all shards and finishes the store."""
        for shard in range(len(self._tasks)):
            self.process(worker, shard)
        self.writer.finish()


@dataclass(frozen=True)
class Laps:
    """Seconds of one way, by round: on the wall, and of processors, which other programs disturb less."""

    wall: list[float]
    processor: list[float]


def interleave(ways: Mapping[str, Callable[[int], None]], rounds: int, warm_up: int = 1) -> dict[str, Laps]:
    """Times each way in each round, warm-up left out.

    The ways take turns in an order that moves on with each round. A way hears the number of the round.
    """
    names = list(ways)
    laps = {name: Laps([], []) for name in names}
    for number in range(rounds + warm_up):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            started = time.perf_counter(), time.process_time()
            ways[name](number)
            ended = time.perf_counter(), time.process_time()
            if number >= warm_up:
                laps[name].wall.append(ended[0] - started[0])
                laps[name].processor.append(ended[1] - started[1])
    return laps


def compare(laps: Mapping[str, Laps], base: str) -> dict[str, dict[str, float]]:
    """Returns, for each way, the ratio of its median time to that of ``base``, and of the rounds."""
    found = {}
    for name, own in laps.items():
        other = laps[base]
        each = [one / two for one, two in zip(own.wall, other.wall, strict=True)]
        found[name] = {
            "median_s": round(statistics.median(own.wall), 4),
            "ratio": round(statistics.median(own.wall) / statistics.median(other.wall), 4),
            "median_of_round_ratios": round(statistics.median(each), 4),
            "least_round_ratio": round(min(each), 4),
            "largest_round_ratio": round(max(each), 4),
            "processor_ratio": round(
                statistics.median(own.processor) / statistics.median(other.processor), 4
            ),
        }
    return found


class PeakMemory:
    """The largest resident memory of this process from now on (Linux)."""

    def __init__(self) -> None:
        # 5: the peak becomes what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _read_status("VmRSS")

    def peak(self) -> int:
        """Returns the peak in bytes."""
        return _read_status("VmHWM")


def _read_status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run_apart(module: str, arguments: list[str]) -> dict[str, Any]:
    """Runs ``python -m module`` in a fresh process and returns the JSON of the last line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    # What a process group of one leaves there would make the new process wait for this one.
    environment = {name: value for name, value in os.environ.items() if name not in _GROUP}
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found
