"""The plan: the fixed cut of one corpus part into shard tasks.

Invariants:
    1. The plan hash covers ordered ids, text hashes and shard bounds, and nothing of the teacher
       (tests/schemas/test_plan.py). A classification plan has no ``n_tokens`` column: teachers
       with different tokenizers share it.
    2. Shard ids come from the plan alone.
    3. Whatever bytes ``parse_plan`` gets, it returns a plan whose ordinals are 0 to R - 1, whose ids are
       unique and whose bounds cover its rows, or raises ``DataError``
       (tests/schemas/test_plan.py, tests/reliability/test_fuzz_records.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.arrow_message import ArrowMessageError, read_file
from schemas.column_view import view_numbers
from schemas.digest import DocumentError, hash_value, parse_json
from schemas.errors import DataError
from schemas.rows import TEXT_HASH_BYTES, fingerprint_columns

PLAN_VERSION = 1
_METADATA_KEY = b"tmkd.plan"
_ID_ROWS = 65536
_SCHEMA = pa.schema(
    [
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("text_hash", pa.binary(TEXT_HASH_BYTES), nullable=False),
    ]
)


class PlanContentError(ValueError):
    """Rows, bounds or metadata that no plan has."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Rows ``[start, stop)`` of a part."""

    shard: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """The rows of one corpus part and their cut.

    Attributes:
        rows: Table with ``ordinal``, ``example_id``, ``text_hash``, in order.
        bounds: S + 1 ascending row numbers, from 0 to the number of rows.
        fingerprint: Of the part: ordered example ids and text hashes.
    """

    rows: pa.Table
    bounds: tuple[int, ...]
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Rows of the part."""
        return self.bounds[-1]

    @property
    def num_shards(self) -> int:
        """Shards of the part."""
        return len(self.bounds) - 1

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256 (64 hex digits) over the part's fingerprint and the shard bounds."""
        return hash_value({"plan": PLAN_VERSION, "part": self.fingerprint, "bounds": list(self.bounds)})

    def tasks(self) -> tuple[ShardTask, ...]:
        """Returns the shard tasks in order."""
        pairs = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return tuple(ShardTask(shard, start, stop) for shard, (start, stop) in enumerate(pairs))

    def example_ids(self, task: ShardTask) -> list[str]:
        """Returns the example ids of one shard."""
        return self.rows.column("example_id").slice(task.start, task.num_rows).to_pylist()

    def text_hashes(self, task: ShardTask) -> list[bytes]:
        """Returns the text hashes of one shard."""
        return self.rows.column("text_hash").slice(task.start, task.num_rows).to_pylist()


def cut_rows(num_rows: int, shard_rows: int) -> tuple[int, ...]:
    """Returns shard bounds: shards of ``shard_rows`` rows, the last one shorter."""
    bounds: npt.NDArray[np.int64] = np.append(np.arange(0, num_rows, shard_rows), num_rows)
    return tuple(int(bound) for bound in bounds)


def make_plan(corpus_rows: pa.Table, shard_rows: int) -> Plan:
    """Plans a materialised corpus part.

    Args:
        corpus_rows: Table with the layout of ``schemas.rows.corpus_schema``.
        shard_rows: Rows of one shard.
    """
    rows = corpus_rows.select(_SCHEMA.names).cast(_SCHEMA)
    fingerprint = fingerprint_columns(rows.column("example_id"), rows.column("text_hash"))
    return Plan(rows, cut_rows(rows.num_rows, shard_rows), fingerprint)


def encode_plan(plan: Plan) -> bytes:
    """Returns the bytes of ``plan.arrow`` (Arrow IPC file, cut and fingerprint in its metadata)."""
    header = {"plan": PLAN_VERSION, "bounds": list(plan.bounds), "fingerprint": plan.fingerprint}
    table = plan.rows.replace_schema_metadata({_METADATA_KEY: json.dumps(header).encode()})
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_file(sink, table.schema)
    writer.write_table(table)
    writer.close()
    return sink.getvalue().to_pybytes()


def parse_plan(data: pa.Buffer | bytes, *, source: str, expected_hash: str | None = None) -> Plan:
    """Parses what ``encode_plan`` wrote and checks that rows and cut match their fingerprint.

    Args:
        data: The file's bytes; a buffer is not copied, and the plan keeps it alive.
        source: What errors call it, such as its path.
        expected_hash: Plan hash that it must have.

    Raises:
        DataError: The bytes are malformed, or not the plan with ``expected_hash``.
    """
    try:
        metadata, batches = read_file(pa.py_buffer(data), _SCHEMA)
        bounds, stated = _parse_header(metadata)
        rows = pa.Table.from_batches(batches, schema=_SCHEMA)
        _check_rows(rows, bounds)
        fingerprint = fingerprint_columns(rows.column("example_id"), rows.column("text_hash"))
        if fingerprint != stated:
            raise PlanContentError("its rows do not match its fingerprint")
    except (ArrowMessageError, PlanContentError) as error:
        raise DataError(f"{source}: cannot be read as a plan ({error})") from error
    plan = Plan(rows, bounds, fingerprint)
    if expected_hash is not None and plan.plan_hash != expected_hash:
        raise DataError(f"{source}: plan hash is {plan.plan_hash[:16]}, expected {expected_hash[:16]}")
    return plan


def _parse_header(metadata: Mapping[bytes, bytes]) -> tuple[tuple[int, ...], str]:
    """Returns bounds and fingerprint."""
    if set(metadata) != {_METADATA_KEY}:
        raise PlanContentError(f"its metadata are not {_METADATA_KEY.decode()} alone")
    try:
        header = parse_json(metadata[_METADATA_KEY])
    except DocumentError as error:
        raise PlanContentError(f"its metadata {error}") from error
    if not isinstance(header, dict) or set(header) != {"plan", "bounds", "fingerprint"}:
        raise PlanContentError("its metadata have other fields than plan, bounds and fingerprint")
    if header["plan"] != PLAN_VERSION:
        raise PlanContentError(f"it is not of plan version {PLAN_VERSION}, which this tmkd reads")
    bounds, fingerprint = header["bounds"], header["fingerprint"]
    # A bool is an int to Python.
    if not isinstance(bounds, list) or any(type(bound) is not int for bound in bounds):
        raise PlanContentError("its shard bounds are no list of integers")
    if not isinstance(fingerprint, str):
        raise PlanContentError("its fingerprint is no string")
    return tuple(bounds), fingerprint


def _check_rows(rows: pa.Table, bounds: tuple[int, ...]) -> None:
    ascending = all(low < high for low, high in itertools.pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != rows.num_rows or not ascending:
        raise PlanContentError(f"its shard bounds do not cover its {rows.num_rows} rows")
    start = 0
    for chunk in rows.column("ordinal").chunks:
        if not np.array_equal(view_numbers(chunk, np.int64), np.arange(start, start + len(chunk))):
            raise PlanContentError("its ordinals do not count its rows from 0")
        start += len(chunk)
    repeated = _find_repeated(rows.column("example_id"))
    if repeated is not None:
        raise PlanContentError(f"example id {repeated[:100]!r} is there twice")


def _find_repeated(example_ids: pa.ChunkedArray) -> str | None:
    """Returns an id that is there twice, if any, in 8 bytes per row.

    Python's hash of a string is keyed: nobody can make ids that collide, as for Arrow's own hash tables.
    """
    hashes = np.empty(len(example_ids), np.int64)
    for start in range(0, len(hashes), _ID_ROWS):
        ids = example_ids.slice(start, _ID_ROWS).to_pylist()
        hashes[start : start + len(ids)] = np.fromiter(map(hash, ids), np.int64, len(ids))
    hashes.sort()
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: set[str] = set()
    for start in range(0, len(hashes) if suspects else 0, _ID_ROWS):
        for example_id in example_ids.slice(start, _ID_ROWS).to_pylist():
            if hash(example_id) in suspects:
                if example_id in seen:
                    return example_id
                seen.add(example_id)
    return None
