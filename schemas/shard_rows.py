"""What a shard file must hold: the rows of the plan without the excluded ones, with finite numbers.

The same check is made when a shard is written and when a store is verified deeply.

Invariants (tests/schemas/test_shard_rows.py):
    1. Rows that pass are those of the plan in their order, ids and text hashes included; none is there
       twice, because no id is in a plan (``schemas.plan``).
    2. Rows may be checked in pieces, so that a file of any size is checked batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.entry_layout import CodecError
from schemas.plan import Plan
from schemas.records import ExcludedRow
from schemas.token_check import check_token_batch

RowFault = Literal["excluded rows", "rows", "not finite"]


class ShardRowsError(ValueError):
    """Rows that are not those of the plan, or not finite.

    Attributes:
        fault: What kind of wrong.
    """

    def __init__(self, message: str, fault: RowFault) -> None:
        super().__init__(message)
        self.fault = fault


def select_rows(plan: Plan, start: int, stop: int, excluded: Sequence[ExcludedRow]) -> pa.Table:
    """Returns the rows that the file of the shard ``[start, stop)`` must hold, in order.

    Args:
        plan: The store's plan.
        start: First row of the shard in its part.
        stop: The row after its last.
        excluded: Rows of the shard that the file does not hold.

    Returns:
        ``ordinal``, ``example_id`` and ``text_hash`` of each row.

    Raises:
        ShardRowsError: The excluded rows are not rows of the shard.
    """
    rows = plan.rows.slice(start, stop - start)
    return _leave_out(rows, start, excluded) if excluded else rows


def check_rows(found: pa.Table, expected: pa.Table) -> None:
    """Checks rows of a shard file, all of them or a piece.

    Args:
        found: R rows as the file holds them: ``ordinal``, ``example_id``, ``text_hash``, and ``logits`` or
            the columns of a token-level shard, with its schema's metadata.
        expected: The same R rows of ``select_rows``.

    Raises:
        ShardRowsError: They are others, or a value is null or not finite.
    """
    for name in found.column_names:
        if found.column(name).null_count:
            raise ShardRowsError(f"column {name} has null values", "rows")
    if found.num_rows != expected.num_rows or not found.column("ordinal").equals(expected.column("ordinal")):
        raise ShardRowsError(
            f"rows are not those of the plan ({found.num_rows}, expected {expected.num_rows})", "rows"
        )
    for name in ("example_id", "text_hash"):
        if not found.column(name).equals(expected.column(name)):
            row = _first(pc.not_equal(found.column(name), expected.column(name)))
            example_id = expected.column("example_id")[row].as_py()
            raise ShardRowsError(f"column {name} differs from the plan, first at {example_id}", "rows")
    if "logits" in found.column_names:
        _check_logits(found, expected)
        return
    try:
        for batch in found.to_batches():
            check_token_batch(batch)
    except CodecError as error:
        raise ShardRowsError(str(error), "rows") from error


def _check_logits(found: pa.Table, expected: pa.Table) -> None:
    logits = found.column("logits").combine_chunks()
    values = logits.flatten() if found.num_rows else pa.array([], pa.float32())
    finite = np.isfinite(values.to_numpy(zero_copy_only=False))
    if values.null_count or not finite.all():
        row = int(np.argmin(finite)) // logits.type.list_size
        example_id = expected.column("example_id")[row].as_py()
        raise ShardRowsError(f"logits are not all finite, first at {example_id}", "not finite")


def _leave_out(rows: pa.Table, start: int, excluded: Sequence[ExcludedRow]) -> pa.Table:
    positions = [row.ordinal - start for row in excluded]
    inside = all(0 <= position < rows.num_rows for position in positions)
    if len(set(positions)) != len(positions) or not inside:
        raise ShardRowsError("excluded rows are listed twice or lie outside the shard", "excluded rows")
    ids = rows.column("example_id").take(pa.array(positions, pa.int64())).to_pylist()
    for row, example_id in zip(excluded, ids, strict=True):
        if row.example_id != example_id:
            message = f"excluded row {row.ordinal} is {example_id} in the plan, not {row.example_id}"
            raise ShardRowsError(message, "excluded rows")
    kept = np.delete(np.arange(rows.num_rows), positions)
    return rows.take(pa.array(kept, pa.int64()))


def _first(mask: pa.ChunkedArray) -> int:
    return int(pc.index(mask, pa.scalar(True)).as_py())
