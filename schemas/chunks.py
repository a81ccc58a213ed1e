"""Chunks: documents as pieces of token ids, which token-level plans and stores are made of.

``<out>/corpora/<documents>/chunks-<16 hex digits>/chunks.arrow`` holds one row per chunk; all teachers of a
corpus, and the student, read the same.

Invariants (tests/schemas/test_chunks.py):
    1. The hash of a chunk covers ids and loss mask, each with its length.
    2. A file reads back as it was described, and one without a valid description is a ``DataError``.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field, ValidationError

from schemas.digest import canonical_json
from schemas.entry_layout import CodecError
from schemas.errors import DataError, first_line
from schemas.fields import Count, Frozen
from schemas.list_column import list_type, view_list
from schemas.rows import TEXT_HASH_BYTES, open_rows
from schemas.token_rows import TokenChunks

CHUNKS_FILE: Final = "chunks.arrow"
CHUNKS_KEY: Final = b"tmkd.chunks"
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ChunkMask(Frozen):
    """How tokens of a masked model's chunks were hidden.

    Attributes:
        seed, share: Of the choice; see ``schemas.text_corpus.TokenMask``.
        token: Id that a model reads in place of each token with loss mask 1.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    share: Annotated[float, Field(gt=0, lt=1)]
    token: Annotated[int, Field(ge=0)]


class ChunkSpec(Frozen):
    """What made chunks of documents.

    Attributes:
        objective: ``causal``: loss mask 1 marks tokens that the one before has to predict, never a
            chunk's first; ``masked``: tokens that the model does not see.
        tokenizer: ``schemas.tokenizer_hash.hash_tokenizer``.
        template: SHA-256 of the chat template, for conversations.
        max_length: Most tokens of a chunk.
        add_special_tokens: Whether the tokenizer put its special tokens round a document.
        mask: For ``masked``.
        vocab: V, the true vocabulary: all ids are below. A model's own may be padded beyond it.
    """

    objective: Literal["causal", "masked"]
    tokenizer: _Hash
    template: _Hash | None = None
    max_length: Count
    add_special_tokens: bool
    mask: ChunkMask | None = None
    vocab: Count


def chunk_schema(spec: ChunkSpec) -> pa.Schema:
    """Returns the layout of ``chunks.arrow``.

    Columns, none of them nullable: ``ordinal`` int64, ``example_id`` string (``<document>#<n>``),
    ``text_hash`` fixed_size_binary[16] (``hash_chunk``), ``input_ids`` list<int32>, ``loss_mask``
    list<uint8>.
    """
    fields = [
        _field("ordinal", pa.int64(), "0-based row of the corpus part's chunks"),
        _field("example_id", pa.string(), "unique id of the chunk: document, # and number of the piece"),
        _field("text_hash", pa.binary(TEXT_HASH_BYTES), "first 128 bits of SHA-256 over ids and loss mask"),
        _field("input_ids", list_type(np.int32), "token ids as the tokenizer gives them, none masked"),
        _field("loss_mask", list_type(np.uint8), "1 for tokens that are to be predicted"),
    ]
    return pa.schema(fields, metadata={CHUNKS_KEY: canonical_json(spec.model_dump(mode="json"))})


def hash_chunk(input_ids_T: npt.NDArray[np.integer], loss_mask_T: npt.NDArray[np.integer]) -> bytes:
    """Returns the first 128 bits of SHA-256 over the ids as little-endian int32 and the mask as bytes.

    Each is preceded by its number of bytes as 8 little-endian bytes.
    """
    digest = hashlib.sha256()
    for data in (input_ids_T.astype("<i4").tobytes(), loss_mask_T.astype(np.uint8).tobytes()):
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()[:TEXT_HASH_BYTES]


def open_chunks(path: Path | str) -> tuple[ChunkSpec, pa.Table]:
    """Maps ``chunks.arrow``.

    Returns:
        How the chunks were made, and their rows in the layout of ``chunk_schema``.

    Raises:
        DataError: The file is missing, malformed, or holds no chunks.
    """
    table = open_rows(Path(path))
    try:
        spec = ChunkSpec.model_validate_json((table.schema.metadata or {})[CHUNKS_KEY])
    except KeyError:
        raise DataError(f"{path}: does not say that it holds chunks of tokens") from None
    except ValidationError as error:
        raise DataError(f"{path}: its description of chunks is not valid ({first_line(error)})") from error
    if not table.schema.equals(chunk_schema(spec), check_metadata=False):
        raise DataError(f"{path}: its columns are not those of chunks")
    return spec, table


def view_chunks(rows: pa.Table) -> TokenChunks:
    """Returns the tokens of R rows of ``chunk_schema``, in memory of their own.

    Raises:
        DataError: The lists of ids and of the loss mask have other lengths.
    """
    table = rows.select(["input_ids", "loss_mask"]).combine_chunks()
    if not rows.num_rows:
        return TokenChunks(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(1, np.int64))
    try:
        input_ids, offsets = view_list(table.column("input_ids").chunk(0), np.int32)
        loss_mask, mask_offsets = view_list(table.column("loss_mask").chunk(0), np.uint8)
    except CodecError as error:
        raise DataError(f"chunks are malformed: {error}") from error
    if not np.array_equal(offsets, mask_offsets):
        raise DataError("chunks are malformed: their loss masks have other lengths than their tokens")
    return TokenChunks(input_ids, loss_mask, offsets)


def _field(name: str, type_: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, type_, nullable=False, metadata={"meaning": meaning})
