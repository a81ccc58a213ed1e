"""The hash of a tokenizer: teacher and student of a language model must share it.

Invariants (tests/schemas/test_tokenizer.py):
    1. It covers what turns text into ids and ids into text, and not what callers set for their own use:
       padding, truncation, the inputs that a model takes, special tokens that are put around a text.
"""

from __future__ import annotations

import json
from typing import Any

from schemas.digest import hash_value

_CALLER_FIELDS = ("truncation", "padding", "post_processor", "version")


def hash_tokenizer(tokenizer: Any) -> str:
    """Returns the SHA-256 (64 hex digits) of a transformers tokenizer's mapping between text and ids.

    Args:
        tokenizer: Fast (with a ``backend_tokenizer``) or slow (its vocabulary alone is hashed).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hash_value({"vocabulary": tokenizer.get_vocab()})
    body = json.loads(backend.to_str())
    for name in _CALLER_FIELDS:
        body.pop(name, None)
    return hash_value({"tokenizer": body})
