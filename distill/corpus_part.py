"""One materialised corpus part, mapped: golden labels, text hashes and texts by row.

Invariants (tests/distill/test_join.py):
    1. ``rows.arrow`` holds the rows that its fingerprint says.
    2. The cut that seeds the order is the plan's, also where no store is joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.column_view import view_bytes, view_numbers
from schemas.errors import DataError, RefusedError
from schemas.job import PartSource
from schemas.plan import Plan, cut_rows
from schemas.rows import UNLABELLED, corpus_schema, fingerprint_columns, open_rows, text_columns


@dataclass(frozen=True)
class CorpusPart:
    """A mapped corpus part.

    Attributes:
        source: What the job says of it.
        table: Its rows, mapped.
        bounds: int64[S + 1], the plan's shard bounds.
    """

    source: PartSource
    table: pa.Table
    bounds: npt.NDArray[np.int64]

    @classmethod
    def open(cls, source: PartSource, *, bounds: tuple[int, ...] | None = None) -> CorpusPart:
        """Maps a part and checks that it is the one that the job names.

        Args:
            source: The part.
            bounds: Shard bounds of the plan of a store that belongs to it; None: ``source.shard_rows``
                gives them.

        Raises:
            DataError: ``rows.arrow`` is missing or has another layout.
            RefusedError: The corpus has changed, or the cut is not the plan's.
        """
        table = open_rows(Path(source.rows))
        if not table.schema.equals(corpus_schema(len(text_columns(table))), check_metadata=False):
            raise DataError(
                f"{source.rows}: has columns {', '.join(table.column_names)}, not a corpus part's"
            )
        found = fingerprint_columns(table.column("example_id"), table.column("text_hash"))
        if table.num_rows != source.num_rows or found != source.fingerprint:
            raise RefusedError(
                f"{source.rows}: the corpus changed since it was planned; run `tmkd precompute` again",
                differing=(
                    f"fingerprint: {source.fingerprint[:16]} -> {found[:16]}",
                    f"rows: {source.num_rows} -> {table.num_rows}",
                ),
            )
        cut = bounds if bounds is not None else cut_rows(table.num_rows, source.shard_rows)
        plan_hash = Plan(table, cut, found).plan_hash
        if plan_hash != source.plan_hash:
            raise RefusedError(
                f"{source.rows}: its cut into shards is not the plan's",
                differing=(f"plan: {source.plan_hash[:16]} -> {plan_hash[:16]}",),
            )
        return cls(source, table, np.asarray(cut, np.int64))

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return self.source.num_rows

    def labels(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Copies the golden labels of rows [start, stop): int64, -1 where unlabelled."""
        labels = self.table.column("label").slice(start, stop - start).combine_chunks()
        return view_numbers(labels, np.int32).astype(np.int64)

    def text_hashes(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Returns the text hashes of rows [start, stop): uint8[stop - start, 16], maybe a view of the map."""
        return view_bytes(self.table.column("text_hash").slice(start, stop - start).combine_chunks())

    def take_labels(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Copies the golden labels of scattered rows: int64[B]."""
        labels = self.table.column("label").take(pa.array(rows)).combine_chunks()
        return view_numbers(labels, np.int32).astype(np.int64)

    def take_text_hashes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Copies the text hashes of scattered rows: uint8[B, 16]."""
        return view_bytes(self.table.column("text_hash").take(pa.array(rows)).combine_chunks())

    def check_labels(self, num_labels: int) -> None:
        """Checks that golden labels are -1 or below ``num_labels``.

        Raises:
            DataError: One is not.
        """
        bounds = pc.min_max(self.table.column("label"))
        low, high = bounds["min"].as_py(), bounds["max"].as_py()
        if low is not None and (low < UNLABELLED or high >= num_labels):
            raise DataError(
                f"{self.source.rows}: golden labels reach from {low} to {high}, "
                f"the job has {num_labels} labels"
            )
