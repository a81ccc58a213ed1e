"""Arrow layout of a token-level shard: one row per chunk of a document.

Shapes: B rows (chunks), T tokens of all of them, N stored positions of all of them, S kept entries, G
temperatures of the grid, V true vocabulary.

A causal chunk stores those positions t whose next token has loss mask 1, in order; a masked model's chunk
those t that have loss mask 1 themselves.

Invariants (tests/schemas/test_token_rows.py):
    1. No column is nullable, and each says what it means and in which units.
    2. The schema's metadata names codec, version, policy, vocabulary and grid, and reads back as the same
       layout; another version, an unknown codec or damaged metadata is a ``CodecError``.
    3. What ``encode_token_rows`` wrote, ``decode_token_rows`` brings back, in slices of a batch, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from schemas.codec import CODECS, Codec
from schemas.digest import DocumentError, parse_json
from schemas.entry_columns import Columns, check_bounds, entry_field
from schemas.entry_layout import CodecError, EntryLayout
from schemas.errors import RecipeError, first_line
from schemas.kept_entries import KeptEntries, Offsets, PositionStats
from schemas.list_column import list_type, make_list, view_list
from schemas.policy import POLICY_ADAPTER, AnyPolicy, check_policy
from schemas.rows import TEXT_HASH_BYTES

LAYOUT_KEY: Final = b"tmkd.tokens"
MAX_TEMPERATURES: Final = 64
STATS: Final = ("log_tail", "lse", "entropy", "target_logprob")
_MAX_LAYOUT_BYTES: Final = 65536
_STAT_MEANINGS: Final = {
    "log_tail": "log of the mass outside the exact entries: all that are kept (hybrid: the head)",
    "lse": "log-sum-exp of the logits at T = 1 over the true vocabulary; log_prob + lse is the logit",
    "entropy": "entropy of the distribution at T = 1",
    "target_logprob": "log-probability of the token that the position has to predict",
}


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """What the columns of a token-level shard are.

    Attributes:
        codec: Of the kept entries.
        entries: Policy and vocabulary.
        grid: Temperatures above 0 of ``lse_grid``, distinct.
    """

    codec: Codec
    entries: EntryLayout
    grid: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TokenChunks:
    """The tokens of B chunks.

    Attributes:
        input_ids: int32[T].
        loss_mask: uint8[T], 0 or 1.
        offsets: int64[B + 1] into both.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    offsets: Offsets


@dataclass(frozen=True, slots=True)
class TokenRows:
    """B chunks and what the teacher says of N positions of them.

    Attributes:
        chunks: The tokens.
        entries: Kept entries of the positions.
        stats: Further numbers of the positions.
        rows: int64[B + 1]: row b has the positions ``[rows[b], rows[b + 1])``.
    """

    chunks: TokenChunks
    entries: KeptEntries
    stats: PositionStats
    rows: Offsets


def make_layout(codec: str, policy: AnyPolicy, vocab: int, grid: Sequence[float]) -> TokenLayout:
    """Returns a layout after checking its parts.

    Raises:
        RecipeError: There is no such codec, the policy does not fit the vocabulary, or the grid has a
            temperature that is none or is there twice.
    """
    if codec not in CODECS:
        raise RecipeError(f"there is no codec {codec!r}; there are {', '.join(CODECS)}", field="codec")
    check_policy(policy, vocab)
    temperatures = tuple(float(temperature) for temperature in grid)
    if not all(math.isfinite(temperature) and temperature > 0 for temperature in temperatures):
        raise RecipeError("temperatures are finite and above 0", field="temperatures")
    if len(set(temperatures)) != len(temperatures) or len(temperatures) > MAX_TEMPERATURES:
        raise RecipeError(f"temperatures are at most {MAX_TEMPERATURES} distinct ones", field="temperatures")
    return TokenLayout(CODECS[codec], EntryLayout(policy, vocab), temperatures)


def token_schema(codec: str, policy: AnyPolicy, vocab: int, grid: Sequence[float]) -> pa.Schema:
    """Returns the layout of a token-level shard.

    Columns: the keys of ``classification_schema``, ``input_ids`` list<int32>, ``loss_mask`` list<uint8>,
    the codec's columns, then the float32 lists ``log_tail``, ``lse``, ``entropy``, ``target_logprob``
    (one value a position) and ``lse_grid`` (G values a position).

    Args:
        codec: Name of a codec.
        policy: What is kept.
        vocab: V, the true vocabulary.
        grid: Temperatures of ``lse_grid``.

    Raises:
        RecipeError: See ``make_layout``.
    """
    layout = make_layout(codec, policy, vocab, grid)
    floats = list_type(np.float32)
    temperatures = ", ".join(f"{temperature:g}" for temperature in layout.grid) or "none"
    fields = [
        entry_field("ordinal", pa.int64(), "0-based row of the corpus part's chunks", "row"),
        entry_field("example_id", pa.string(), "unique id of the chunk", "none"),
        entry_field(
            "text_hash", pa.binary(TEXT_HASH_BYTES), "first 128 bits of SHA-256 over the text", "none"
        ),
        entry_field("input_ids", list_type(np.int32), "tokens of the chunk", "token id"),
        entry_field("loss_mask", list_type(np.uint8), "1 for tokens that are to be predicted", "0 or 1"),
        *layout.codec.fields(layout.entries),
        *(entry_field(name, floats, _STAT_MEANINGS[name], "nats") for name in STATS),
        entry_field(
            "lse_grid",
            floats,
            f"position after position, log-sum-exp of logits / T for T = {temperatures}",
            "nats",
        ),
    ]
    return pa.schema(fields, metadata={LAYOUT_KEY: _layout_json(layout)})


def read_layout(metadata: Mapping[bytes, bytes] | None) -> TokenLayout:
    """Reads the layout from the metadata of a schema.

    Raises:
        CodecError: It is missing or malformed, or of a codec or version that is not known.
    """
    text = (metadata or {}).get(LAYOUT_KEY)
    if text is None:
        raise CodecError("the schema does not say that this is a token-level shard")
    try:
        found = parse_json(text, max_bytes=_MAX_LAYOUT_BYTES)
    except DocumentError as error:
        raise CodecError(f"the schema's layout {error}") from error
    if not isinstance(found, dict) or set(found) != {"codec", "version", "policy", "vocab", "grid"}:
        raise CodecError("the schema's layout has other fields")
    codec, vocab, grid = found["codec"], found["vocab"], found["grid"]
    if not isinstance(codec, str) or not isinstance(vocab, int) or isinstance(vocab, bool):
        raise CodecError("the schema's layout has no codec or vocabulary")
    if not isinstance(grid, list) or not all(isinstance(temperature, float) for temperature in grid):
        raise CodecError("the schema's layout has no grid of temperatures")
    try:
        layout = make_layout(codec, POLICY_ADAPTER.validate_python(found["policy"]), vocab, grid)
    except (RecipeError, ValidationError) as error:
        raise CodecError(f"the schema's layout is not valid ({first_line(error)})") from error
    if found["version"] != layout.codec.version:
        raise CodecError(f"codec {codec} version {found['version']} is not known; a newer tmkd may read it")
    return layout


def encode_token_rows(keys: pa.RecordBatch, rows: TokenRows, schema: pa.Schema) -> pa.RecordBatch:
    """Makes a record batch.

    Args:
        keys: ``ordinal``, ``example_id`` and ``text_hash`` of B rows.
        rows: The same B rows.
        schema: From ``token_schema``.

    Raises:
        CodecError: The parts are of different lengths, or not those of the layout.
    """
    layout = read_layout(schema.metadata)
    chunks, stats = rows.chunks, rows.stats
    if not len(chunks.offsets) == len(rows.rows) == keys.num_rows + 1:
        raise CodecError("keys, tokens and positions are of different rows")
    num_positions = int(rows.rows[-1])
    columns = {name: keys.column(name) for name in ("ordinal", "example_id", "text_hash")}
    columns["input_ids"] = make_list(chunks.input_ids.astype(np.int32, copy=False), chunks.offsets)
    columns["loss_mask"] = make_list(chunks.loss_mask.astype(np.uint8, copy=False), chunks.offsets)
    columns.update(layout.codec.encode(rows.entries, rows.rows, layout.entries))
    for name in STATS:
        columns[name] = _stat_column(getattr(stats, name), (num_positions,), name, rows.rows)
    shape = (num_positions, len(layout.grid))
    columns["lse_grid"] = _stat_column(stats.lse_grid, shape, "lse_grid", rows.rows)
    return pa.record_batch([columns[name] for name in schema.names], schema=schema)


def decode_token_rows(batch: pa.RecordBatch, layout: TokenLayout, *, narrow: bool = False) -> TokenRows:
    """Reads a record batch, or some rows of one, without copying what the codec does not.

    Args:
        batch: B rows.
        layout: From ``read_layout`` of the shard's schema.
        narrow: Leave ids and log-probabilities in the dtypes of the store (``Codec.view``).

    Raises:
        CodecError: The columns are not what ``encode_token_rows`` writes.
    """
    columns = {name: batch.column(name) for name in batch.schema.names}
    wanted = ["input_ids", "loss_mask", *STATS, "lse_grid"]
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise CodecError(f"column {missing[0]} is missing: is this a token-level shard?")
    input_ids, bounds = view_list(columns["input_ids"], np.int32)
    loss_mask, mask_bounds = view_list(columns["loss_mask"], np.uint8)
    check_bounds("loss_mask", mask_bounds, bounds)
    if len(input_ids) and not 0 <= input_ids.min() <= input_ids.max() < layout.entries.vocab:
        raise CodecError(f"a token id is out of range; the vocabulary has {layout.entries.vocab} tokens")
    stats, rows = _view_stats(columns, len(layout.grid))
    if (np.diff(rows) > np.diff(bounds)).any():
        raise CodecError("a chunk has more stored positions than tokens")
    read = layout.codec.view if narrow else layout.codec.decode
    entries = read(columns, rows, layout.entries, stats.log_tail)
    return TokenRows(TokenChunks(input_ids, loss_mask, bounds), entries, stats, rows)


def _view_stats(columns: Columns, num_temperatures: int) -> tuple[PositionStats, Offsets]:
    _, rows = view_list(columns["log_tail"], np.float32)
    found: dict[str, Any] = {}
    for name in (*STATS, "lse_grid"):
        found[name], bounds = view_list(columns[name], np.float32)
        check_bounds(name, bounds, rows * num_temperatures if name == "lse_grid" else rows)
        if np.isnan(found[name]).any():
            raise CodecError(f"column {name} has a value that is not a number")
    if len(found["log_tail"]) and found["log_tail"].max() > 0:
        raise CodecError("log_tail is above 0")
    found["lse_grid"] = found["lse_grid"].reshape(int(rows[-1]), num_temperatures)
    return PositionStats(**found), rows


def _stat_column(
    values: npt.NDArray[np.float32], shape: tuple[int, ...], name: str, rows: Offsets
) -> pa.ListArray:
    if values.shape != shape:
        raise CodecError(f"{name} has shape {values.shape}, expected {shape}")
    width = shape[1] if len(shape) > 1 else 1
    return make_list(values.astype(np.float32, copy=False).reshape(-1), rows * width)


def _layout_json(layout: TokenLayout) -> bytes:
    return json.dumps(
        {
            "codec": layout.codec.name,
            "version": layout.codec.version,
            "policy": layout.entries.policy.model_dump(mode="json"),
            "vocab": layout.entries.vocab,
            "grid": list(layout.grid),
        },
        sort_keys=True,
    ).encode()
