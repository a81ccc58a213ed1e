"""One corpus part of chunks, mapped: tokens and loss masks by row.

Shapes: R rows (chunks) of the part, B rows asked for, T tokens of them.

Invariants (tests/distill/test_language_corpus.py):
    1. ``chunks.arrow`` holds the rows that the job's fingerprint says, of its tokenizer and vocabulary.
    2. Tokens that are not those of their text hash are refused when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.column_view import view_bytes, wrap_integers
from schemas.entry_layout import CodecError
from schemas.errors import DataError, RefusedError
from schemas.job import LanguageJob, PartSource
from schemas.list_column import list_type, view_list
from schemas.plan import Plan, cut_rows
from schemas.rows import fingerprint_columns, open_rows
from schemas.token_rows import TokenChunks

CHUNKS_KEY = b"tmkd.chunks"

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChunkPart:
    """A mapped part.

    Attributes:
        source: What the job says of it.
        table: Its rows, mapped.
        bounds: int64[S + 1], the plan's shard bounds.
        lengths: int64[R], tokens of each row.
        num_targets: int64[R], tokens of each row that are to be predicted.
    """

    source: PartSource
    table: pa.Table
    bounds: Rows
    lengths: Rows
    num_targets: Rows

    @classmethod
    def open(cls, source: PartSource, job: LanguageJob) -> ChunkPart:
        """Maps a part and checks that it is the one that the job names.

        Raises:
            DataError: ``chunks.arrow`` is missing, has another layout, or ids outside the vocabulary.
            RefusedError: It changed since it was planned, or is of another tokenizer or objective.
        """
        table = open_rows(Path(source.rows))
        _check_columns(table, source.rows)
        _check_spec(table.schema.metadata or {}, source.rows, job)
        found = fingerprint_columns(table.column("example_id"), table.column("text_hash"))
        cut = cut_rows(table.num_rows, source.shard_rows)
        plan_hash = Plan(table, cut, found).plan_hash
        if table.num_rows != source.num_rows or found != source.fingerprint or plan_hash != source.plan_hash:
            raise RefusedError(
                f"{source.rows}: the chunks changed since they were planned; run `tmkd precompute` again",
                differing=(
                    f"fingerprint: {source.fingerprint[:16]} -> {found[:16]}",
                    f"plan: {source.plan_hash[:16]} -> {plan_hash[:16]}",
                    f"rows: {source.num_rows} -> {table.num_rows}",
                ),
            )
        lengths, num_targets = _count(table, source.rows, job)
        return cls(source, table, np.asarray(cut, np.int64), lengths, num_targets)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.table.num_rows

    def gather(self, rows: Rows) -> TokenChunks:
        """Copies the tokens of ``rows``, in any order."""
        table = self.table.select(["input_ids", "loss_mask"]).take(wrap_integers(rows)).combine_chunks()
        input_ids, offsets = view_list(_column(table, "input_ids"), np.int32)
        loss_mask, _ = view_list(_column(table, "loss_mask"), np.uint8)
        return TokenChunks(input_ids, loss_mask, offsets)

    def text_hashes(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Copies the text hashes of ``rows``: uint8[B, 16]."""
        return view_bytes(self.table.column("text_hash").take(wrap_integers(rows)).combine_chunks())


def _column(table: pa.Table, name: str) -> pa.ListArray:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _check_columns(table: pa.Table, path: str) -> None:
    wanted = {
        "ordinal": pa.int64(),
        "example_id": pa.string(),
        "text_hash": pa.binary(16),
        "input_ids": list_type(np.int32),
        "loss_mask": list_type(np.uint8),
    }
    for name, type_ in wanted.items():
        if name not in table.column_names or table.schema.field(name).type != type_:
            raise DataError(f"{path}: has columns {', '.join(table.column_names)}, not those of chunks")


def _check_spec(metadata: Mapping[bytes, bytes], path: str, job: LanguageJob) -> None:
    try:
        spec: dict[str, Any] = json.loads(metadata[CHUNKS_KEY])
        found = {name: spec[name] for name in ("tokenizer", "vocab", "objective")}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: does not say how its chunks were made") from error
    wanted = {"tokenizer": job.tokenizer, "vocab": job.vocab, "objective": job.objective}
    differing = [
        f"{name}: {str(found[name])[:16]} -> {str(wanted[name])[:16]}"
        for name in wanted
        if found[name] != wanted[name]
    ]
    if differing:
        raise RefusedError(
            f"{path}: its chunks are of another tokenizer, vocabulary or objective than the job's "
            f"({'; '.join(differing)}); run `tmkd precompute` again",
            differing=differing,
        )


def _count(table: pa.Table, path: str, job: LanguageJob) -> tuple[Rows, Rows]:
    lengths, num_targets = [], []
    for batch in table.select(["input_ids", "loss_mask"]).to_batches():
        try:
            input_ids, offsets = view_list(batch.column("input_ids"), np.int32)
            loss_mask, mask_offsets = view_list(batch.column("loss_mask"), np.uint8)
        except CodecError as error:
            raise DataError(f"{path}: cannot be read as chunks ({error})") from error
        if not np.array_equal(offsets, mask_offsets) or (np.diff(offsets) == 0).any():
            raise DataError(f"{path}: has a chunk without tokens, or whose loss mask has another length")
        if len(input_ids) and not 0 <= input_ids.min() <= input_ids.max() < job.vocab:
            raise DataError(
                f"{path}: token id {max(int(input_ids.max()), -int(input_ids.min()))} is out of range; "
                f"the vocabulary has {job.vocab} tokens"
            )
        lengths.append(np.diff(offsets))
        num_targets.append(np.add.reduceat(target_mask(loss_mask, offsets, job.objective), offsets[:-1]))
    if not lengths:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(lengths), np.concatenate(num_targets).astype(np.int64)


def target_mask(loss_mask: npt.NDArray[np.uint8], offsets: Rows, objective: str) -> npt.NDArray[np.int64]:
    """Returns which tokens are to be predicted, 0 or 1, int64[T].

    A causal model cannot predict the first token of a chunk: there is nothing before it.
    """
    mask = (loss_mask != 0).astype(np.int64)
    if objective == "causal":
        mask[offsets[:-1]] = 0
    return mask
