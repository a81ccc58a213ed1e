"""The directory of a language run as the pipeline leaves it, for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from schemas.chunks import ChunkSpec
from schemas.digest import write_document
from schemas.evaluation import write_evaluation
from schemas.language_evaluation import LanguageRunEvaluation
from schemas.policy import HybridPolicy, TopKPolicy
from schemas.records import LOCK_FILE, LockedPart, StoresLock, encode_record
from tests.cluster.language.measured_texts import make_evaluation
from tests.token_store_factory import make_chunks, make_token_store

LENGTHS = (5, 9, 2, 16, 7, 16)
# Of the chunks without the third, which the second store excludes.
NUM_POSITIONS, NUM_OTHERS = sum(LENGTHS) - len(LENGTHS), sum(LENGTHS) - len(LENGTHS) - 1
RECIPE = """task: language
name: example
teachers:
- {name: large, model: some/model, keep: {kind: top_k, k: 5}}
stages:
- {corpus: docs, teachers: [large], losses: [{name: ghost_kl}]}
"""


def make_language_run(
    out: Path, *, name: str = "example", evaluation: LanguageRunEvaluation | None = None
) -> Path:
    """Writes a whole run below ``out`` and returns its directory."""
    run = out / name
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    write_evaluation(run / "evaluation.json", evaluation or make_evaluation())
    steps = [("plan", 3.2), ("stores", 260.4), ("students", 402.7), ("evaluation", 31.0)]
    write_document(
        run / "timings.json", {"steps": [{"step": step, "seconds": seconds} for step, seconds in steps]}
    )
    _write_lock(out, run)
    for arm, start in (("student", 5.0), ("plain", 6.0), ("top-k", 5.5)):
        for seed in (1, 2, 3):
            write_log(run / "students" / arm / f"seed-{seed}" / "stage-1", "docs", start)
    return run


def write_log(stage: Path, corpus: str, start: float) -> None:
    """Writes a stage's job and its metrics, as the trainer does."""
    rng = random.Random(str(stage))
    stage.mkdir(parents=True)
    job = {"task": "language", "name": "student", "training": {"corpus": corpus}}
    (stage / "job.json").write_text(json.dumps(job), encoding="utf-8")
    lines: list[dict[str, Any]] = []
    for step in range(1, 301):
        loss = 2.5 + start * math.exp(-step / 60) + rng.gauss(0, 0.2)
        lines.append({"kind": "step", "step": step, "total_steps": 300, "loss": loss, "lr": 1e-4})
        if step % 25 == 0:
            nats = 3.1 + start * math.exp(-step / 60) + rng.gauss(0, 0.02)
            measures = {"loss": loss, "perplexity": math.exp(nats), "accuracy": 0.3, "ece": 0.05}
            lines.append({"kind": "evaluation", "step": step, "best_step": 300, **measures})
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_lock(out: Path, run: Path) -> None:
    rng = np.random.default_rng(0)
    spec = ChunkSpec(
        objective="causal", tokenizer="0" * 64, max_length=16, add_special_tokens=False, vocab=50
    )
    tokens = [rng.integers(0, spec.vocab, length).astype(np.int32) for length in LENGTHS]
    masks = [np.array([0] + [1] * (length - 1), np.uint8) for length in LENGTHS]
    chunks = make_chunks(out / "corpora" / "chunks.arrow", tokens, masks, spec, shard_rows=4)

    def teach(row: int) -> Any:
        return np.random.default_rng(row).normal(0, 3, (LENGTHS[row], spec.vocab)).astype(np.float32)

    hybrid = HybridPolicy(kind="hybrid", k=4, m=3, seed=7)
    stores = {
        "large": make_token_store(
            out / "stores" / "large", chunks, teach, policy=TopKPolicy(kind="top_k", k=5), teacher="large"
        ),
        "drawn": make_token_store(
            out / "stores" / "drawn",
            chunks,
            teach,
            policy=hybrid,
            codec="compact",
            teacher="drawn",
            excluded=(2,),
        ),
        "gone": out / "stores" / "gone",
    }
    part = LockedPart(
        part="train",
        fingerprint=chunks.part.plan.fingerprint,
        plan_hash=chunks.part.plan.plan_hash,
        num_rows=len(LENGTHS),
        rows=chunks.part.source.rows,
        stores={name: str(path) for name, path in stores.items()},
    )
    (run / LOCK_FILE).write_bytes(encode_record(StoresLock(corpora={"docs": (part,)})))
