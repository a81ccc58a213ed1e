"""A small writer of chunks and token-level stores for tests, with the project's own policies and codecs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from precompute.draws import position_keys
from precompute.truncate import Truncation, keep_entries
from schemas.chunks import ChunkSpec, chunk_schema, hash_chunk
from schemas.digest import hash_value
from schemas.kept_entries import offsets_of
from schemas.list_column import make_list
from schemas.policy import AnyPolicy, TopKPolicy
from schemas.records import StoreIdentity
from schemas.token_generation import TokenGeneration
from schemas.token_rows import TokenChunks, TokenRows, encode_token_rows
from tests.store_factory import MadePart, take_keys, write_part, write_store

Tokens = Sequence[npt.NDArray[np.int32]]
Masks = Sequence[npt.NDArray[np.uint8]]
Teach = Callable[[int], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class MadeChunks:
    """A part of chunks on disk."""

    part: MadePart
    spec: ChunkSpec
    tokens: Tokens
    masks: Masks


def make_chunks(
    path: Path, tokens: Tokens, masks: Masks, spec: ChunkSpec, *, shard_rows: int, name: str = "train"
) -> MadeChunks:
    """Writes ``chunks.arrow``."""
    offsets = offsets_of(np.array([len(row) for row in tokens]))
    hashes = [hash_chunk(row, mask) for row, mask in zip(tokens, masks, strict=True)]
    columns = [
        pa.array(range(len(tokens)), pa.int64()),
        pa.array([f"{name}/{row}#0" for row in range(len(tokens))], pa.string()),
        pa.array(hashes, pa.binary(16)),
        make_list(np.concatenate(tokens), offsets),
        make_list(np.concatenate(masks), offsets),
    ]
    table = pa.Table.from_arrays(columns, schema=chunk_schema(spec))
    return MadeChunks(write_part(path, table, shard_rows=shard_rows), spec, tokens, masks)


def make_token_store(
    root: Path,
    chunks: MadeChunks,
    teach: Teach,
    *,
    policy: AnyPolicy | None = None,
    codec: str = "packed",
    grid: tuple[float, ...] = (),
    teacher: str = "teacher",
    excluded: Sequence[int] = (),
    batch_rows: int = 4,
    shift: int = 0,
) -> Path:
    """Writes a finished store.

    Args:
        teach: Logits of a row: float32[T, V], at each token what comes next (masked: what is there).
        shift: 1 makes the mistake of storing the distribution of the position after.
    """
    keep = policy or TopKPolicy(kind="top_k", k=5)
    spec = chunks.spec
    made = TokenGeneration(
        policy=keep, grid=grid, codec=codec, vocab=spec.vocab, tokenizer=spec.tokenizer, chunks=spec
    )
    generation = {"teacher": teacher, **made.model_dump(mode="json")}
    identity = StoreIdentity(
        level="token",
        plan_hash=chunks.part.plan.plan_hash,
        generation_hash=hash_value(generation),
        generation=generation,
        native_labels=(),
        teacher=teacher,
        corpus="corpus",
        part="train",
    )

    def make_rows(rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        keys = take_keys(chunks.part.plan, rows)
        return encode_token_rows(
            keys, token_rows_of(chunks, rows.tolist(), teach, made, shift), made.shard_schema()
        )

    return write_store(root, chunks.part.plan, identity, make_rows, batch_rows=batch_rows, excluded=excluded)


def sources_and_goals(mask: npt.NDArray[np.uint8], objective: str) -> tuple[list[int], list[int]]:
    """Returns the positions that predict and the tokens that they predict, written out plainly."""
    if objective == "masked":
        places = [t for t in range(len(mask)) if mask[t]]
        return places, places
    sources = [t for t in range(len(mask) - 1) if mask[t + 1]]
    return sources, [t + 1 for t in sources]


def token_rows_of(
    chunks: MadeChunks, rows: list[int], teach: Teach, made: TokenGeneration, shift: int
) -> TokenRows:
    """Returns what a store holds of some rows."""
    tokens = [chunks.tokens[row] for row in rows]
    masks = [chunks.masks[row] for row in rows]
    logits, targets, keys, counts = [], [], [], []
    seed = getattr(made.policy, "seed", 0)
    for row, ids, mask in zip(rows, tokens, masks, strict=True):
        sources, goals = sources_and_goals(mask, chunks.spec.objective)
        places = np.minimum(np.array(sources, np.int64) + shift, len(ids) - 1)
        logits.append(teach(row)[places])
        targets.append(ids[goals])
        keys.append(position_keys(seed, f"train/{row}#0", np.array(sources, np.int64)))
        counts.append(len(sources))
    kept = keep_entries(
        torch.from_numpy(np.concatenate(logits)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        np.concatenate(keys),
        Truncation(made.policy, made.vocab, made.grid),
    )
    lengths = np.array([len(ids) for ids in tokens])
    flat = TokenChunks(np.concatenate(tokens), np.concatenate(masks), offsets_of(lengths))
    return TokenRows(flat, kept.entries, kept.stats, offsets_of(np.array(counts)))
