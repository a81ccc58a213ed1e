"""A user's project of language models in small: one teacher, two text files and a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from schemas.language import Objective
from tests.precompute.tiny_language import make_documents, save_tiny_llama, save_tiny_masked

KEPT: dict[str, dict[str, Any]] = {
    "head": {"keep": {"kind": "top_k", "k": 5}, "temperatures": [2.0]},
    "drawn": {"keep": {"kind": "sampled", "num_samples": 8}, "codec": "compact"},
}


class LanguageProject:
    """Files of a project.

    Attributes:
        root: Its directory; runs go to ``root/runs``.
        objective: Of its models.
    """

    def __init__(self, root: Path, objective: Objective = "causal") -> None:
        self.root = root
        self.objective = objective
        save = save_tiny_llama if objective == "causal" else save_tiny_masked
        self.model = save(root / "model")
        self.write_documents("train", make_documents(30, seed=1))
        self.write_documents("test", make_documents(8, seed=2))

    @property
    def run(self) -> Path:
        """Directory of the run."""
        return self.root / "runs" / "run"

    def write_documents(self, name: str, documents: list[str]) -> Path:
        """Writes ``<name>.jsonl``."""
        path = self.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return path

    def recipe(self, **changes: Any) -> str:
        """Writes the recipe with top-level fields changed and returns its path."""
        document: dict[str, Any] = {
            "task": "language",
            "name": "run",
            "objective": self.objective,
            "out": str(self.root / "runs"),
            "data_root": str(self.root),
            "corpora": {name: self.corpus(name) for name in ("train", "test")},
            "teachers": [
                {"name": name, "model": str(self.model), "tokens_per_batch": 64, **fields}
                for name, fields in KEPT.items()
            ],
            "store": {"shard_rows": 16, "batch_rows": 5},
            "student": {
                "init": {"kind": "layers", "model": str(self.model), "layers": 1},
                "max_length": 32,
            },
            "stages": [
                {
                    "corpus": "train",
                    "teachers": ["head"],
                    "losses": [
                        {"name": "ghost_kl", "temperature": 2.0},
                        {"name": "cross_entropy", "weight": 0.5},
                    ],
                    "global_batch": 4,
                    "max_steps": 3,
                }
            ],
            "compare": {
                "arms": [
                    {"name": "golden", "losses": [{"name": "cross_entropy"}]},
                    {"name": "sampled", "teachers": ["drawn"], "losses": [{"name": "unbiased_kl"}]},
                ]
            },
            "evaluation": {"corpora": ["test"]},
            "threads_per_proc": 1,
        }
        path = self.root / "recipe.yaml"
        path.write_text(yaml.safe_dump({**document, **changes}))
        return str(path)

    @staticmethod
    def corpus(name: str) -> dict[str, Any]:
        """Describes ``<name>.jsonl``."""
        return {"max_length": 16, "parts": [{"kind": "file", "path": f"{name}.jsonl", "name": name}]}
