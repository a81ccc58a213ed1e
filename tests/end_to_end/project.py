"""A user's project in small: two teachers, three data files and a recipe, all below one directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file, save_file

from tests.distill.tiny_models import OTHER_WORDS, QUESTION_WORDS, save_classifier

LABELS = ("relevant", "irrelevant")
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}

Rows = list[dict[str, Any]]


class Project:
    """Files of a project.

    Attributes:
        root: Its directory; runs go to ``root/runs``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        save_classifier(root / "models" / "first", **NAMED)
        # The other order of labels: matching by position would turn its logits round.
        turned = {"id2label": {0: LABELS[1], 1: LABELS[0]}, "label2id": {LABELS[1]: 0, LABELS[0]: 1}}
        save_classifier(root / "models" / "second", num_hidden_layers=1, **turned)
        self.write_rows("train", make_rows(40, seed=1))
        self.write_rows("unlabelled", [{**row, "label": -1} for row in make_rows(30, seed=2)])
        self.write_rows("test", make_rows(24, seed=3))

    def write_rows(self, name: str, rows: Rows) -> Path:
        """Writes ``data/<name>.jsonl``."""
        path = self.root / "data" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def recipe(self, **changes: Any) -> str:
        """Writes the recipe with top-level fields changed and returns its path."""
        document: dict[str, Any] = {
            "name": "run",
            "out": str(self.root / "runs"),
            "data_root": str(self.root / "data"),
            "corpora": {name: corpus(name) for name in ("train", "unlabelled", "test")},
            "teachers": [
                {
                    "name": name,
                    "model": str(self.root / "models" / name),
                    "max_length": 32,
                    "tokens_per_batch": 256,
                }
                for name in ("first", "second")
            ],
            "store": {"shard_rows": 16, "batch_rows": 5},
            "student": {
                "init": {"kind": "layers", "model": str(self.root / "models" / "first"), "layers": 1},
                "max_length": 32,
            },
            "stages": [
                {"kind": "pretrain", "corpus": "unlabelled", "teachers": ["first", "second"], "max_steps": 3},
                {"kind": "finetune", "corpus": "train", "teachers": ["first", "second"], "max_steps": 3},
            ],
            "evaluation": {"corpora": ["test"], "speed_rows": 8},
            "threads_per_proc": 1,
        }
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump({**document, **changes}))
        return str(path)

    def golden_recipe(self, **changes: Any) -> str:
        """Writes a recipe of the student without distillation alone: no teacher, no Ray."""
        fields: dict[str, Any] = {
            "teachers": [],
            "stages": [{"kind": "finetune", "corpus": "train", "max_steps": 2}],
            "compare": {"arms": []},
        }
        student = yaml.safe_load(Path(self.recipe()).read_text())["student"]
        return self.recipe(**{**fields, "student": {**student, "arm": "golden"}, **changes})

    def spoil_weights(self, name: str) -> None:
        """Makes a teacher's logits not a number."""
        path = self.root / "models" / name / "model.safetensors"
        weights = load_file(path)
        weights["classifier.bias"][:] = float("nan")
        save_file(weights, path, metadata={"format": "pt"})


def corpus(name: str, **changes: Any) -> dict[str, Any]:
    """Describes ``data/<name>.jsonl``."""
    part = {"kind": "file", "path": f"{name}.jsonl", "name": name}
    return {
        "labels": list(LABELS),
        "text": ["question", "passage"],
        "question": "question",
        "parts": [part],
        **changes,
    }


def make_rows(num_rows: int, seed: int) -> Rows:
    """Makes a relevant and an irrelevant passage per question; the first word gives the label away."""
    rng = np.random.default_rng(seed)
    rows: Rows = []
    question = ""
    for number in range(num_rows):
        label = number % 2
        if label == 0:
            words: Sequence[str] = rng.choice([*QUESTION_WORDS, *OTHER_WORDS], 4).tolist()
            question = f"what {' '.join(words)} {chr(97 + seed)} {number}"
        passage = ["quickly" if label == 0 else "slowly", *rng.choice(OTHER_WORDS, 3).tolist()]
        rows.append({"question": question, "passage": f"{' '.join(passage)} {seed} {number}", "label": label})
    return rows
