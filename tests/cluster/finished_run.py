"""A run's directory as the pipeline leaves it, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from schemas.digest import write_document
from schemas.evaluation import RunEvaluation, write_evaluation
from schemas.records import LOCK_FILE, LockedPart, StoresLock, encode_record
from tests.cluster.evaluations import make_evaluation
from tests.cluster.stores import NUM_ROWS, write_store

RECIPE = """name: example
teachers:
- name: teacher-a
  model: some/model
  train: {corpus: train, epochs: 2, learning_rate: 2.0e-05}
- name: teacher-b
  model: some/model
stages:
- {kind: pretrain, corpus: unlabelled, teachers: [teacher-a, teacher-b]}
- {kind: finetune, corpus: train, teachers: [teacher-a, teacher-b]}
"""


def make_run(out: Path, *, name: str = "example", evaluation: RunEvaluation | None = None) -> Path:
    """Writes a whole run below ``out`` and returns its directory."""
    run = out / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_evaluation(run / "evaluation.json", evaluation or make_evaluation())
    steps = [("plan", 3.2), ("teachers", 183.0), ("stores", 260.4), ("students", 402.7), ("evaluation", 31.0)]
    write_document(
        run / "timings.json", {"steps": [{"step": step, "seconds": seconds} for step, seconds in steps]}
    )
    _write_lock(out, run)
    for arm in ("tmkd", "golden", "1-o-1/teacher-a", "1-o-1/teacher-b"):
        for seed in (1, 2, 3):
            student = run / "students" / arm / f"seed-{seed}"
            if arm == "tmkd":
                write_log(student / "stage-1-pretrain", "unlabelled", seed, soft=True)
                write_log(student / "stage-2-finetune", "train", seed, best=0.80)
            else:
                write_log(student / "stage-1-finetune", "train", seed, best=0.77)
    write_log(out / "teachers" / "0123" / "train", "train", 0, best=0.85, name="teachers/teacher-a")
    return run


def write_log(
    stage: Path, corpus: str, seed: int, *, soft: bool = False, best: float = 0.8, name: str = "student"
) -> None:
    """Writes a stage's job and its metrics, as the trainer does."""
    rng = random.Random(f"{stage}{seed}")
    stage.mkdir(parents=True)
    job = {"name": name, "training": {"corpus": corpus, "epochs": 2, "learning_rate": 2e-5}}
    (stage / "job.json").write_text(json.dumps(job), encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for step in range(1, 401):
        loss = 0.35 + 0.4 * math.exp(-step / 90) + rng.gauss(0, 0.05)
        lines.append({"kind": "step", "step": step, "total_steps": 400, "epoch": 0, "loss": loss, "lr": 1e-5})
        if step % 50 == 0:
            value = best - 0.15 * math.exp(-step / 120) + rng.gauss(0, 0.008)
            measures = {"loss": loss, "soft_loss": loss} if soft else {"loss": loss, "accuracy": value}
            lines.append({"kind": "evaluation", "step": step, "best_step": 350, **measures})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (stage / "metrics.jsonl").write_text(text, encoding="utf-8")


def _write_lock(out: Path, run: Path) -> None:
    stores = {}
    for teacher, excluded in (("teacher-a", None), ("teacher-b", 7)):
        root = out / "stores" / teacher
        writer = write_store(root, teacher=teacher, excluded=excluded)
        stores[teacher] = str(root)
    stores["teacher-c"] = str(out / "stores" / "gone")
    part = LockedPart(
        part="train",
        fingerprint=writer.plan.fingerprint,
        plan_hash=writer.plan.plan_hash,
        num_rows=NUM_ROWS,
        rows="rows.arrow",
        stores=stores,
    )
    (run / LOCK_FILE).write_bytes(encode_record(StoresLock(corpora={"pairs": (part,)})))
