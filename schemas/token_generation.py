"""What the generation of a token-level store says beside the teacher's weights, and the schema it gives.

Invariants (tests/schemas/test_token_generation.py):
    1. A store of another level, or one whose generation lacks a field, is refused.
"""

from __future__ import annotations

import pyarrow as pa
from pydantic import ValidationError

from schemas.chunks import ChunkSpec
from schemas.errors import DamagedStoreError, RecipeError, RefusedError, first_line
from schemas.fields import Count, Frozen
from schemas.policy import KeepPolicy
from schemas.records import FORMAT_VERSION, StoreIdentity
from schemas.token_rows import token_schema

FORMAT_KEY = b"tmkd.format"


class TokenGeneration(Frozen):
    """Fields of ``StoreIdentity.generation`` of a token-level store; the others describe the model.

    Attributes:
        policy: What is kept.
        grid: Temperatures of ``lse_grid``.
        codec: Of the kept entries.
        vocab: V, the true vocabulary.
        tokenizer: ``schemas.tokenizer_hash.hash_tokenizer`` of teacher and chunks.
        chunks: What made the chunks.
    """

    policy: KeepPolicy
    grid: tuple[float, ...]
    codec: str
    vocab: Count
    tokenizer: str
    chunks: ChunkSpec

    def shard_schema(self) -> pa.Schema:
        """Returns the layout of the store's shards.

        Raises:
            RecipeError: The fields do not go together.
        """
        layout = token_schema(self.codec, self.policy, self.vocab, self.grid)
        return layout.with_metadata({**layout.metadata, FORMAT_KEY: FORMAT_VERSION.encode()})


def read_generation(identity: StoreIdentity, *, store: str) -> TokenGeneration:
    """Reads the generation of a token-level store.

    Args:
        identity: Its ``STORE.json``.
        store: What errors call it.

    Raises:
        RefusedError: It is a store of another level.
        DamagedStoreError: Its fields are not those of a token-level store.
    """
    if identity.level != "token":
        raise RefusedError(
            f"store {store}: holds {identity.level} rows of teacher {identity.teacher}, a language model's "
            "recipe needs token-level ones; name another store"
        )
    fields = {name: identity.generation.get(name) for name in TokenGeneration.model_fields}
    try:
        generation = TokenGeneration.model_validate(fields)
        generation.shard_schema()
    except (ValidationError, RecipeError) as error:
        message = f"its generation is not that of a token-level store ({first_line(error)})"
        raise DamagedStoreError(message, store=store) from error
    return generation
