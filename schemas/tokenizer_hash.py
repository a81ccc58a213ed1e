"""Which tokenizer a chunk or a model has: a hash of all that decides the ids of a text.

Invariants (tests/schemas/test_chunks.py):
    1. Truncation and padding, which calls set as they need them, change nothing.
"""

from __future__ import annotations

import json

from schemas.digest import hash_value

_CALL_STATE = ("truncation", "padding")


def hash_tokenizer(backend: str) -> str:
    """Returns the SHA-256 (64 hex digits) of a fast tokenizer.

    Args:
        backend: ``tokenizer.backend_tokenizer.to_str()``: normaliser, vocabulary, merges, added tokens and
            special tokens around a text.
    """
    fields = json.loads(backend)
    return hash_value({name: value for name, value in fields.items() if name not in _CALL_STATE})
