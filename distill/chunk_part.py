"""One corpus part of chunks, mapped: tokens and loss masks by row.

Shapes: R rows (chunks) of the part, B rows asked for, T tokens of them.

Invariants (tests/distill/test_language_corpus.py):
    1. ``chunks.arrow`` holds the rows that the job's fingerprint says, of its tokenizer and vocabulary.
    2. Tokens that are not those of their text hash are refused when they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.chunks import ChunkSpec, hash_chunk, open_chunks
from schemas.column_view import view_bytes, wrap_integers
from schemas.entry_layout import CodecError
from schemas.errors import DataError, RefusedError
from schemas.job import LanguageJob, PartSource
from schemas.list_column import view_list
from schemas.plan import Plan, cut_rows
from schemas.rows import fingerprint_columns
from schemas.token_rows import TokenChunks

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ChunkPart:
    """A mapped part.

    Attributes:
        source: What the job says of it.
        spec: How the chunks were made.
        table: Its rows, mapped.
        bounds: int64[S + 1], the plan's shard bounds.
        lengths: int64[R], tokens of each row.
        num_targets: int64[R], tokens of each row that are to be predicted.
    """

    source: PartSource
    spec: ChunkSpec
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
        spec, table = open_chunks(source.rows)
        _check_spec(spec, source.rows, job)
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
        return cls(source, spec, table, np.asarray(cut, np.int64), lengths, num_targets)

    @property
    def num_rows(self) -> int:
        """R."""
        return self.table.num_rows

    def gather(self, rows: Rows) -> TokenChunks:
        """Copies the tokens of ``rows``, in any order."""
        table = (
            self.table.select(["input_ids", "loss_mask"])
            .take(wrap_integers(np.ascontiguousarray(rows)))
            .combine_chunks()
        )
        input_ids, offsets = view_list(_column(table, "input_ids"), np.int32)
        loss_mask, _ = view_list(_column(table, "loss_mask"), np.uint8)
        return TokenChunks(input_ids, loss_mask, offsets)

    def check(self, chunks: TokenChunks, rows: Rows) -> None:
        """Checks that ``rows`` have the tokens of their text hashes.

        Raises:
            RefusedError: They have not.
        """
        for row, expected in enumerate(self.text_hashes(rows)):
            cut = slice(int(chunks.offsets[row]), int(chunks.offsets[row + 1]))
            if hash_chunk(chunks.input_ids[cut], chunks.loss_mask[cut]) != expected.tobytes():
                raise RefusedError(
                    f"{self.source.rows}: the tokens of row {rows[row]} are not those of their text hash: "
                    "the chunks were changed; run `tmkd precompute` again"
                )

    def text_hashes(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Copies the text hashes of ``rows``: uint8[B, 16]."""
        return view_bytes(
            self.table.column("text_hash").take(wrap_integers(np.ascontiguousarray(rows))).combine_chunks()
        )


def _column(table: pa.Table, name: str) -> pa.ListArray:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _check_spec(spec: ChunkSpec, path: str, job: LanguageJob) -> None:
    wanted = {"tokenizer": job.tokenizer, "vocab": job.vocab, "objective": job.objective}
    found = {name: getattr(spec, name) for name in wanted}
    differing = [
        f"{name}: {str(found[name])[:16]} -> {str(wanted[name])[:16]}"
        for name in wanted
        if found[name] != wanted[name]
    ]
    if differing:
        raise RefusedError(
            f"{path}: its chunks are of another {differing[0].partition(':')[0]} than the student's; "
            "teacher, chunks and student must share one tokenizer and objective",
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
