"""Tiny random encoders and a tiny WordPiece tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

from distill.skeleton import quiet_transformers
from schemas.recipe import ConfigInit

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
QUESTION_WORDS = ("what", "does", "the", "module", "do", "is", "of", "and")
OTHER_WORDS = ("parse", "files", "quickly", "slowly", *"abcdefgh")
PIECES = [*SPECIAL, *QUESTION_WORDS, *OTHER_WORDS, "##s", "##ing"]

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    # With the usual 0.02 all rows of so small an encoder have nearly the same logits.
    "initializer_range": 0.3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "roberta": {**BERT, "model_type": "roberta", "type_vocab_size": 1},
    "distilbert": {
        "model_type": "distilbert",
        "dim": 32,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    },
    "electra": {**BERT, "model_type": "electra", "embedding_size": 16},
    "deberta-v2": {**BERT, "model_type": "deberta-v2"},
    "modernbert": {**BERT, "model_type": "modernbert"},
}
TEXTS = [
    ("what does the module do", "parse files quickly"),
    ("a", "b c"),
    ("what is the module", "slowly parsing files of a b c d e f g h and the module"),
    ("d", "e"),
    ("parse files", "the files"),
]


def save_tokenizer(directory: Path) -> Path:
    """Writes the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = BertTokenizer(vocab={piece: position for position, piece in enumerate(PIECES)})
    tokenizer.save_pretrained(directory)
    return directory


def config_init(tokenizer: Path, kind: str = "bert") -> ConfigInit:
    """Returns the init of a tiny random encoder of an architecture."""
    return ConfigInit(kind="config", config=CONFIGS[kind], tokenizer=str(tokenizer))


def save_classifier(directory: Path, kind: str = "bert", **fields: Any) -> Path:
    """Writes a plain random classifier with its tokenizer."""
    save_tokenizer(directory)
    config = {**CONFIGS[kind], "vocab_size": len(PIECES), "pad_token_id": 0, **fields}
    with quiet_transformers(), torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
        model.save_pretrained(directory)
    return directory
