"""Documents to chunks: tokenised whole, cut into consecutive pieces, with a loss mask.

A piece of fewer than two tokens and one without a token to predict are dropped and counted. Hidden tokens
of the masked objective are drawn once, from seed, chunk and position alone; ids are kept as they were.

Invariants (tests/precompute/test_chunking.py):
    1. The pieces of a document, one after another, are its tokens, but for dropped ones.
    2. Of a conversation only what the assistant says counts, its end mark included.
    3. The same documents, tokenizer and options give the same file, which is made once.
    4. Which tokens are hidden is independent of what a keep policy draws, whatever their seeds.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.conversation import encode_conversation
from precompute.draws import draw_uniforms, position_keys
from precompute.materialised import MaterialisedPart
from schemas.chunks import CHUNKS_FILE, ChunkMask, ChunkSpec, chunk_schema, hash_chunk, open_chunks
from schemas.digest import DocumentError, hash_value, read_document, sync_directory, write_document
from schemas.errors import CorpusError, RecipeError
from schemas.kept_entries import offsets_of
from schemas.language import Objective
from schemas.list_column import make_list
from schemas.rows import TEXT_HASH_BYTES, fingerprint_columns, open_rows
from schemas.storage.os_errors import translated_os_errors
from schemas.text_corpus import TextCorpus
from schemas.tokenizer_hash import hash_tokenizer

_META_FILE = "meta.json"
_MIN_TOKENS = 2
_NO_CHUNK = "no document gives a chunk of two tokens with one to predict; give it longer texts"
# Documents that one call of the tokenizer gets.
_TOKENISE_ROWS = 512


@dataclass(frozen=True)
class ChunkedPart(MaterialisedPart):
    """The chunks of a corpus part, as ``StoreRequest`` and the lock take them.

    Attributes of ``MaterialisedPart``: ``rows_path`` is ``chunks.arrow``, ``num_rows`` the number of
    chunks, ``fingerprint`` theirs; ``excluded`` are the empty documents; there are no labels.

    Attributes:
        spec: What made the chunks.
        documents: The documents.
        num_tokens: Of all chunks.
        num_positions: Tokens to predict.
        num_dropped: Pieces that were dropped.
    """

    spec: ChunkSpec
    documents: MaterialisedPart
    num_tokens: int
    num_positions: int
    num_dropped: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A piece of a document: int32[T] ids and uint8[T] loss mask."""

    example_id: str
    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]


def describe_chunks(tokenizer: Any, corpus: TextCorpus, objective: Objective, *, field: str) -> ChunkSpec:
    """Says what makes the chunks of a corpus.

    Args:
        tokenizer: A fast tokenizer.
        corpus: Lengths, template and mask.
        objective: Of the teachers.
        field: The recipe's field of the tokenizer's model, for errors.

    Raises:
        RecipeError: The tokenizer is not a fast one, has no chat template where one is needed, or no mask
            token where the objective is masked.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError("its tokenizer is not a fast one (tokenizer.json)", field=field)
    template = None
    if corpus.messages is not None:
        if not tokenizer.chat_template:
            raise RecipeError(
                "its tokenizer has no chat template, which conversations are written in; give a model that "
                "has one, or read a text column",
                field=field,
            )
        template = hash_value(tokenizer.chat_template)
    mask = None
    if objective == "masked":
        if tokenizer.mask_token_id is None:
            message = "its tokenizer has no mask token, which objective: masked needs"
            raise RecipeError(message, field=field)
        mask = ChunkMask(**corpus.mask.model_dump(), token=int(tokenizer.mask_token_id))
    return ChunkSpec(
        objective=objective,
        tokenizer=hash_tokenizer(tokenizer.backend_tokenizer.to_str()),
        template=template,
        max_length=corpus.max_length,
        # A chat template writes its own.
        add_special_tokens=corpus.add_special_tokens and template is None,
        mask=mask,
        vocab=max(tokenizer.get_vocab().values()) + 1,
    )


def chunk_part(part: MaterialisedPart, tokenizer: Any, spec: ChunkSpec) -> ChunkedPart:
    """Cuts a part's documents into chunks, or finds them there.

    Args:
        part: From ``precompute.documents.materialise_documents``.
        tokenizer: The one of ``spec``.
        spec: From ``describe_chunks``.

    Raises:
        CorpusError: No chunk is left, or a conversation does not fit the template.
        ResourceError: The disk is full or may not be written.
    """
    key = hash_value([part.fingerprint, spec.model_dump(mode="json")])
    directory = part.rows_path.parent / f"chunks-{key[:16]}"
    with translated_os_errors(directory):
        known = _read_known(part, spec, directory)
        if known is not None:
            return known
        directory.mkdir(parents=True, exist_ok=True)
        chunks, num_dropped = _cut_documents(part, tokenizer, spec)
        table = _make_table(chunks, spec)
        _write_table(directory / CHUNKS_FILE, table)
        meta = {
            "fingerprint": fingerprint_columns(table.column("example_id"), table.column("text_hash")),
            "num_rows": len(chunks),
            "num_tokens": sum(len(chunk.input_ids) for chunk in chunks),
            "num_positions": sum(int(chunk.loss_mask.sum()) for chunk in chunks),
            "num_dropped": num_dropped,
        }
        write_document(directory / _META_FILE, meta)
        return _describe_part(part, spec, directory, meta)


def _read_known(part: MaterialisedPart, spec: ChunkSpec, directory: Path) -> ChunkedPart | None:
    """Returns what is there; the plan and the worker check rows and tokens against their hashes."""
    if not (directory / _META_FILE).is_file() or not (directory / CHUNKS_FILE).is_file():
        return None
    try:
        found = _describe_part(part, spec, directory, read_document(directory / _META_FILE))
    except (DocumentError, KeyError):
        return None  # Damaged: the chunks are made again.
    return found if open_chunks(directory / CHUNKS_FILE)[0] == spec else None


def _describe_part(
    part: MaterialisedPart, spec: ChunkSpec, directory: Path, meta: dict[str, Any]
) -> ChunkedPart:
    return ChunkedPart(
        corpus=part.corpus,
        part=part.part,
        rows_path=directory / CHUNKS_FILE,
        fingerprint=meta["fingerprint"],
        labels_hash=hashlib.sha256(b"").hexdigest(),
        num_rows=meta["num_rows"],
        excluded=part.excluded,
        num_labelled=0,
        spec=spec,
        documents=part,
        num_tokens=meta["num_tokens"],
        num_positions=meta["num_positions"],
        num_dropped=meta["num_dropped"],
    )


def _cut_documents(part: MaterialisedPart, tokenizer: Any, spec: ChunkSpec) -> tuple[list[_Chunk], int]:
    """Returns the chunks, and the number of pieces that were dropped."""
    special_ids = np.array(sorted(tokenizer.all_special_ids), np.int32)
    found: list[_Chunk] = []
    num_dropped = 0
    for document, input_ids, loss_mask in _tokenise(part, tokenizer, spec):
        for number, start in enumerate(range(0, len(input_ids), spec.max_length)):
            example_id = f"{document}#{number}"
            piece = input_ids[start : start + spec.max_length]
            mask = loss_mask[start : start + spec.max_length].copy()
            if spec.mask is not None:
                mask = _draw_mask(example_id, piece, spec.mask, special_ids)
            elif len(mask):
                mask[0] = 0
            if len(piece) < _MIN_TOKENS or not mask.any():
                num_dropped += 1
                continue
            found.append(_Chunk(example_id, piece, mask))
    if not found:
        raise CorpusError(_NO_CHUNK, corpus=part.corpus, part=part.part)
    return found, num_dropped


def _tokenise(
    part: MaterialisedPart, tokenizer: Any, spec: ChunkSpec
) -> Iterator[tuple[str, npt.NDArray[np.int32], npt.NDArray[np.uint8]]]:
    """Yields id, ids and loss mask of each document."""
    rows = open_rows(part.rows_path)
    for start in range(0, rows.num_rows, _TOKENISE_ROWS):
        piece = rows.slice(start, _TOKENISE_ROWS)
        documents, texts = piece.column("example_id").to_pylist(), piece.column("text_0").to_pylist()
        if spec.template is not None:
            for document, text in zip(documents, texts, strict=True):
                try:
                    yield (document, *encode_conversation(tokenizer, text))
                except ValueError as error:
                    message = f"conversation {document}: {error}"
                    raise CorpusError(message, corpus=part.corpus, part=part.part) from error
            continue
        encoded = tokenizer(
            texts,
            add_special_tokens=spec.add_special_tokens,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            # Documents may be longer than the model: they are cut here.
            verbose=False,
        )["input_ids"]
        for document, ids in zip(documents, encoded, strict=True):
            yield document, np.array(ids, np.int32), np.ones(len(ids), np.uint8)


def _draw_mask(
    example_id: str, input_ids: npt.NDArray[np.int32], mask: ChunkMask, special_ids: npt.NDArray[np.int32]
) -> npt.NDArray[np.uint8]:
    """Returns which tokens are hidden: each by itself, at least one, never a special one."""
    # No chunk is called so: a keep policy of the same seed draws other numbers, else those of hidden tokens
    # would all be below the share.
    keys = position_keys(mask.seed, f"{example_id}/mask", np.arange(len(input_ids)))
    uniforms = draw_uniforms(keys, 1)[:, 0]
    uniforms[np.isin(input_ids, special_ids)] = np.inf
    is_hidden = uniforms < mask.share
    if len(uniforms) and not is_hidden.any() and np.isfinite(uniforms.min()):
        is_hidden[np.argmin(uniforms)] = True
    return is_hidden.astype(np.uint8)


def _make_table(chunks: Sequence[_Chunk], spec: ChunkSpec) -> pa.Table:
    offsets = offsets_of(np.array([len(chunk.input_ids) for chunk in chunks], np.int64))
    hashes = [hash_chunk(chunk.input_ids, chunk.loss_mask) for chunk in chunks]
    return pa.table(
        [
            pa.array(np.arange(len(chunks))),
            pa.array([chunk.example_id for chunk in chunks], pa.string()),
            pa.array(hashes, pa.binary(TEXT_HASH_BYTES)),
            make_list(np.concatenate([chunk.input_ids for chunk in chunks]), offsets),
            make_list(np.concatenate([chunk.loss_mask for chunk in chunks]), offsets),
        ],
        schema=chunk_schema(spec),
    )


def _write_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            writer = pa.ipc.new_file(file, table.schema)
            writer.write_table(table)
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
