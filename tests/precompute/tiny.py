"""Tiny teachers, corpora and stores for the tests of precompute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from precompute.encode import encode_rows
from precompute.store_writer import StoreWriter
from schemas.plan import Plan, ShardTask, make_plan
from schemas.records import StoreIdentity
from tests.store_factory import make_table

WORDS = ("the", "cat", "dog", "sat", "ran", "on", "mat", "##s", "big", "red", "a", "b", "c", "?", ".")
LABELS = ("entailment", "not_entailment")


def save_tiny_bert(directory: Path, labels: Sequence[str] = LABELS, seed: int = 0) -> Path:
    """Saves a random BERT (32 wide, 2 layers) with a WordPiece vocabulary of a few words."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizer(vocab=str(directory / "vocab.txt"))
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(directory)
    return directory


def make_texts(num_rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """Returns pairs of random sentences of 1 to 20 words."""
    rng = np.random.default_rng(seed)
    words = np.array([word for word in WORDS if not word.startswith("##")])
    return [
        (" ".join(rng.choice(words, rng.integers(1, 20))), " ".join(rng.choice(words, rng.integers(1, 10))))
        for _ in range(num_rows)
    ]


def make_rows(num_rows: int, part: str = "train", seed: int = 0) -> pa.Table:
    """Returns a materialised corpus part of text pairs."""
    return make_table(make_texts(num_rows, seed), [i % 2 for i in range(num_rows)], part)


def write_rows(rows: pa.Table, path: Path) -> Path:
    """Writes a materialised corpus part."""
    with pa.OSFile(str(path), "wb") as sink:
        writer = pa.ipc.new_file(sink, rows.schema)
        writer.write_table(rows)
        writer.close()
    return path


def make_identity(plan: Plan, *, generation: str = "b" * 64, **changes: object) -> StoreIdentity:
    """Returns an identity with a made-up generation."""
    fields: dict[str, object] = {
        "plan_hash": plan.plan_hash,
        "generation_hash": generation,
        "generation": {"max_length": 64, "weights": generation},
        "native_labels": LABELS,
        "teacher": "tiny",
        "corpus": "toy",
        "part": "train",
    }
    return StoreIdentity.model_validate(fields | changes)


def open_store(root: Path, rows: pa.Table, shard_rows: int = 8) -> StoreWriter:
    """Opens a store over rows, with made-up generation."""
    plan = make_plan(rows, shard_rows)
    return StoreWriter.open(root, make_identity(plan), plan)


def make_batches(store: StoreWriter, task: ShardTask, batch_rows: int = 3) -> list[pa.RecordBatch]:
    """Returns a shard's record batches; row i has logits (i, -i)."""
    ordinals = np.arange(task.start, task.stop)
    rows = store.plan.rows.slice(task.start, task.num_rows)
    logits_RC = np.stack([ordinals, -ordinals], axis=1).astype(np.float32)
    return list(encode_rows(rows, logits_RC, store.schema, batch_rows))


def write_all(store: StoreWriter) -> None:
    for task in store.plan.tasks():
        store.write_shard(task, make_batches(store, task))


def list_files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
