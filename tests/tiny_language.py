"""A tiny stage of a language model: chunks, two teachers' stores and a job over them, all on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from schemas.chunks import ChunkMask, ChunkSpec
from schemas.job import LanguageJob, TokenTeacher
from schemas.language import LanguageConfigInit, LanguageStage, LossTerm, Objective
from schemas.tokenizer_hash import hash_tokenizer
from tests.distill.tiny_models import BERT, PIECES, save_tokenizer
from tests.token_store_factory import MadeChunks, make_chunks, make_token_store

VOCAB = len(PIECES)
NUM_ROWS = 40
GRID = (2.0,)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS: dict[Objective, dict[str, Any]] = {
    "causal": LLAMA,
    "masked": {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


class TinyLanguage:
    """What a test's jobs have in common; everything lies below ``root``."""

    def __init__(self, root: Path, objective: Objective = "causal") -> None:
        self.root = root
        self.objective = objective
        self.tokenizer = save_tokenizer(root / "tokenizer")
        loaded: Any = AutoTokenizer.from_pretrained(self.tokenizer)
        mask = ChunkMask(seed=0, share=0.3, token=loaded.mask_token_id) if objective == "masked" else None
        self.spec = ChunkSpec(
            objective=objective,
            tokenizer=hash_tokenizer(loaded.backend_tokenizer.to_str()),
            max_length=12,
            add_special_tokens=False,
            mask=mask,
            vocab=VOCAB,
        )
        self.chunks: MadeChunks = self.make_part("train", NUM_ROWS, seed=5)
        self.stores = {
            name: make_token_store(
                root / "stores" / name, self.chunks, self.teach(number), grid=GRID, teacher=name
            )
            for number, name in enumerate(("first", "second"))
        }

    def make_part(self, name: str, num_rows: int, seed: int) -> MadeChunks:
        """Writes chunks of 2 to 12 tokens, in which most tokens follow from the one before."""
        rng = np.random.default_rng(seed)
        tokens, masks = [], []
        for _ in range(num_rows):
            length = int(rng.integers(2, 13))
            row = np.empty(length, np.int32)
            row[0] = rng.integers(5, VOCAB)
            for place in range(1, length):
                row[place] = 5 + (row[place - 1] * 3) % (VOCAB - 5)
            mask = np.ones(length, np.uint8) if self.objective == "causal" else np.zeros(length, np.uint8)
            if self.objective == "masked":
                mask[rng.permutation(length)[: max(1, length // 3)]] = 1
            else:
                mask[0] = 0
            tokens.append(row)
            masks.append(mask)
        path = self.root / "corpora" / name / "chunks.arrow"
        return make_chunks(path, tokens, masks, self.spec, shard_rows=10, name=name)

    def teach(self, seed: int, chunks: MadeChunks | None = None) -> Any:
        """Returns a teacher: it likes the token that comes, and has noise besides."""
        made = chunks

        def logits(row: int) -> npt.NDArray[np.float32]:
            ids = (made or self.chunks).tokens[row]
            rng = np.random.default_rng([seed, row])
            found = rng.normal(size=(len(ids), VOCAB)).astype(np.float32)
            wanted = np.roll(ids, -1) if self.objective == "causal" else ids
            found[np.arange(len(ids)), wanted] += 4.0
            return found

        return logits

    def job(self, output: str, *, teachers: tuple[str, ...] = ("first",), **changes: Any) -> LanguageJob:
        """Returns a job; fields of ``training`` may be given beside those of the job."""
        training: dict[str, Any] = {
            "corpus": "corpus",
            "epochs": 2,
            "global_batch": 4,
            "max_micro_batch": 4,
            "learning_rate": 3e-3,
            "window_shards": 2,
            "selection_fraction": 0.2,
            "teachers": teachers,
            "losses": (LossTerm(name="ghost_kl"),) if teachers else (LossTerm(name="cross_entropy"),),
        }
        training |= {name: changes.pop(name) for name in tuple(changes) if name in LanguageStage.model_fields}
        config = {**MODELS[self.objective], **changes.pop("config", {})}
        fields: dict[str, Any] = {
            "name": output,
            "output": str(self.root / output),
            "init": LanguageConfigInit(kind="config", config=config, tokenizer=str(self.tokenizer)),
            "objective": self.objective,
            "tokenizer": self.spec.tokenizer,
            "vocab": VOCAB,
            "max_length": 24,
            "parts": (self.chunks.part.source,),
            "teachers": tuple(TokenTeacher(name=name, stores=(str(self.stores[name]),)) for name in teachers),
            "training": LanguageStage(**training),
            "selection_seed": 1,
            "seed": 11,
        }
        return LanguageJob(**{**fields, **changes})
