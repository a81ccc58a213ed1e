"""A tiny stage: a corpus, two teachers' stores and a job over them, all on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from schemas.job import AnyJob, StageJob, StudentInit
from schemas.recipe import ConfigInit, LayersInit, Training
from tests.distill.tiny_models import CONFIGS, OTHER_WORDS, save_tokenizer
from tests.store_factory import MadePart, make_part, make_store, target

NUM_ROWS = 48
LABELS = ("yes", "no")
TEACHERS = ("first", "second")


class TinyStage:
    """What a test's jobs have in common.

    Attributes:
        root: Everything lies below it.
        part: The corpus part; a row's label is in its words.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = np.random.default_rng(3)
        labels = rng.integers(0, 2, NUM_ROWS)
        words = np.array(OTHER_WORDS)
        texts = []
        for label in labels:
            cue = "quickly" if label == 0 else "slowly"
            texts.append((" ".join(rng.choice(words, rng.integers(1, 9))), f"parse files {cue}"))
        self.part: MadePart = make_part(root / "corpus" / "rows.arrow", texts, labels.tolist(), shard_rows=10)
        self.tokenizer = save_tokenizer(root / "tokenizer")
        self.stores = {}
        for name in TEACHERS:
            logits = rng.normal(size=(NUM_ROWS, 2)).astype(np.float32)
            logits[np.arange(NUM_ROWS), labels] += 2.0
            path = make_store(root / "stores" / name, self.part.plan, logits, labels=LABELS, teacher=name)
            self.stores[name] = path

    def job(self, output: str, *, teachers: tuple[str, ...] = TEACHERS, **changes: Any) -> StageJob:
        """Returns a job; fields of ``training`` may be given beside those of the job."""
        training = {
            "corpus": "corpus",
            "epochs": 2,
            "global_batch": 8,
            "max_micro_batch": 8,
            "learning_rate": 1e-3,
            "window_shards": 2,
            "selection_fraction": 0.2,
        }
        training |= {name: changes.pop(name) for name in tuple(changes) if name in Training.model_fields}
        config = {**CONFIGS["bert"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config |= changes.pop("config", {})
        init: ConfigInit | LayersInit | StudentInit = ConfigInit(
            kind="config", config=config, tokenizer=str(self.tokenizer)
        )
        fields: dict[str, Any] = {
            "name": output,
            "output": str(self.root / output),
            "init": init,
            "max_length": 24,
            "labels": LABELS,
            "parts": (self.part.source,),
            "soft_targets": tuple(target((name, [self.stores[name]])) for name in teachers),
            "alpha": 0.5,
            "training": Training(**training),
            "selection_seed": 1,
            "seed": 11,
            "threads": 1,
        }
        return StageJob(**{**fields, **changes})


def write_job(job: AnyJob) -> Path:
    """Writes a job's file into its output and returns the path."""
    path = Path(job.output) / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(job.model_dump_json())
    return path


def read_weights(output: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a stage's finished model."""
    return load_file(Path(output) / "model" / "model.safetensors")


def read_metrics(output: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a stage's ``metrics.jsonl``, without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("_per_s")} for line in lines]


@contextmanager
def no_launcher_environment() -> Iterator[None]:
    """Takes away what a launcher would have set, and what the trainer sets without one."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")
            patch.delenv(name)
        yield
