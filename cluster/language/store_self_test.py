"""The self-test of token-level stores: a sample of chunks, computed again by the language model.

Shapes: P positions of a row (chunk), S kept entries of these, C numbers of a position.

Invariants (tests/cluster/language/test_store_self_test.py):
    1. Every number that a row holds is compared, for entries beyond what the codec rounds.
    2. A store whose positions are off by one is told apart from one whose numbers are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cluster.run_context import available_cpus, available_device
from cluster.self_test import TOLERANCES, Rows, SelfTest, sample_positions
from cluster.store_match import match_store
from distill.token_store import TokenStore
from precompute.language_forward import ChunkRows, LanguageResult, compute_kept
from precompute.language_teacher import LoadedLanguageModel
from precompute.pretrained import check_length
from precompute.stores import StoreTarget
from precompute.tasks import LanguageWorkerSpec
from precompute.truncate import Truncation
from schemas.chunks import hash_chunk, open_chunks, view_chunks
from schemas.errors import DataError, RefusedError
from schemas.fields import Dtype
from schemas.kept_entries import KeptEntries, PositionStats
from schemas.language import LanguageRecipe
from schemas.policy import most_kept
from schemas.storage.location import open_storage
from schemas.token_rows import TokenRows

Floats = npt.NDArray[np.float64]

# Of a row's kept ids, those that the teacher now keeps others for. Rounding swaps a few near a threshold;
# neighbouring positions share some frequent tokens.
OTHER_IDS: dict[Dtype, float] = {"float32": 0.05, "float16": 0.25, "bfloat16": 0.25}
_GROUP_ENTRIES = 2**24


class TokenSelfTest(SelfTest):
    """What a self-test of a token-level store found.

    Attributes:
        num_positions, num_ids: Of the sampled rows.
        num_other_ids: Kept ids in whose place the teacher now keeps others.
        num_shifted_forward: Rows whose numbers are stored with the position after.
        num_shifted_back: Rows whose numbers are stored with the position before.
    """

    num_positions: int
    num_ids: int
    num_other_ids: int
    _unit: ClassVar[str] = "position"


@dataclass(frozen=True, slots=True)
class RowComparison:
    """One row as it is stored beside the same computed again.

    Attributes:
        own: Largest difference of a number, in nats; of entries, what is beyond the codec's rounding.
        before, after: Of what is stored one position before and after; infinite for one position.
        num_positions, num_ids, num_other_ids: See ``TokenSelfTest``.
        scale: The largest number.
    """

    own: float
    before: float
    after: float
    num_positions: int
    num_ids: int
    num_other_ids: int
    scale: float


def compare_with_model(
    root: str | Path,
    recipe: LanguageRecipe,
    *,
    num_rows: int = 64,
    seed: int = 0,
    tolerance: float | None = None,
) -> TokenSelfTest:
    """Computes a sample of a store's chunks again; see ``cluster.store_self_test.compare_with_teacher``."""
    store = TokenStore.open(root)
    target = match_store(open_storage(root), recipe)
    stored = store.stored_rows()
    if not len(stored):
        raise DataError(f"store {store.root}: has no row with kept entries")
    rows = stored[sample_positions(len(stored), num_rows, seed)]
    spec = _spec_of(target)
    found = list(_compare(store, target, replace(spec, num_threads=available_cpus()), rows))
    dtype = spec.teacher.dtype
    allowed = max(row.scale for row in found) * (TOLERANCES[dtype] if tolerance is None else tolerance)
    own = np.array([row.own for row in found])
    differs = (own > allowed) | np.array(
        [row.num_other_ids > OTHER_IDS[dtype] * row.num_ids for row in found], np.bool_
    )
    worst = int(np.argmax(np.where(differs, own, -1.0) if differs.any() else own))
    return TokenSelfTest(
        store=store.root,
        teacher=target.request.teacher.name,
        device=spec.device,
        dtype=dtype,
        num_rows=len(rows),
        largest_difference=float(own.max()),
        worst_row=store.plan.rows.column("example_id")[int(rows[worst])].as_py(),
        tolerance=allowed,
        num_differing=int(differs.sum()),
        num_shifted_forward=int((differs & np.array([row.after <= allowed for row in found])).sum()),
        num_shifted_back=int((differs & np.array([row.before <= allowed for row in found])).sum()),
        num_positions=sum(row.num_positions for row in found),
        num_ids=sum(row.num_ids for row in found),
        num_other_ids=sum(row.num_other_ids for row in found),
    )


def _spec_of(target: StoreTarget) -> LanguageWorkerSpec:
    spec = target.spec
    if not isinstance(spec, LanguageWorkerSpec):
        raise RefusedError(f"store {target.root}: is not one of a language model")
    return replace(spec, device=available_device() if spec.device == "cuda" else "cpu")


def _compare(
    store: TokenStore, target: StoreTarget, spec: LanguageWorkerSpec, rows: Rows
) -> Iterator[RowComparison]:
    """Runs the model over rows of the part, ascending, some at a time."""
    generation = store.generation
    model = LoadedLanguageModel.load(spec)
    check_length(model.model.config, generation.chunks.max_length, spec.teacher.name)
    truncation = Truncation(generation.policy, generation.vocab, generation.grid)
    entries_of_row = generation.chunks.max_length * most_kept(generation.policy, generation.vocab)
    step = max(1, _GROUP_ENTRIES // entries_of_row)
    for start in range(0, len(rows), step):
        group = rows[start : start + step]
        chunks = _read_chunks(store, target, group)
        computed = compute_kept(model, chunks, truncation)
        stored = store.gather(group)
        for row in range(len(group)):
            yield compare_row(stored, computed, row, chunks, store.layout.codec.name)


def _read_chunks(store: TokenStore, target: StoreTarget, rows: Rows) -> ChunkRows:
    """Reads chunks of the part and checks them against the plan."""
    path = target.request.part.rows_path
    spec, table = open_chunks(path)
    chosen = table.take(pa.array(rows))
    chunks = view_chunks(chosen)
    planned = store.plan.rows.take(pa.array(rows))
    ids = planned.column("example_id").to_pylist()
    for row, (example_id, expected) in enumerate(
        zip(ids, planned.column("text_hash").to_pylist(), strict=True)
    ):
        tokens = slice(int(chunks.offsets[row]), int(chunks.offsets[row + 1]))
        if hash_chunk(chunks.input_ids[tokens], chunks.loss_mask[tokens]) != expected:
            raise DataError(
                f"{path}: the tokens of {example_id} have changed since the plan; delete its directory"
            )
    shift = 1 if spec.objective == "causal" else 0
    return ChunkRows(chunks, tuple(ids), shift, spec.mask.token if spec.mask is not None else None)


def compare_row(
    stored: TokenRows, computed: LanguageResult, row: int, chunks: ChunkRows, codec: str
) -> RowComparison:
    """Compares one of the rows that were read and computed alike.

    Args:
        stored: From the store.
        computed: From the teacher.
        row: Which one.
        chunks: The tokens that the teacher got.
        codec: Of the store, which says how entries are rounded.
    """
    theirs = slice(int(stored.rows[row]), int(stored.rows[row + 1]))
    ours = slice(int(computed.rows[row]), int(computed.rows[row + 1]))
    num_ids = int(stored.entries.offsets[theirs.stop] - stored.entries.offsets[theirs.start])
    num_positions = ours.stop - ours.start
    bounds = (slice(*stored.chunks.offsets[row : row + 2]), slice(*chunks.chunks.offsets[row : row + 2]))
    same_tokens = np.array_equal(stored.chunks.input_ids[bounds[0]], chunks.chunks.input_ids[bounds[1]])
    kept = computed.kept
    if not same_tokens or theirs.stop - theirs.start != num_positions or not computed.finite_R[row]:
        # A teacher that gives no number agrees with nothing.
        return RowComparison(np.inf, np.inf, np.inf, num_positions, num_ids, num_ids, 1.0)
    stored_PC, computed_PC = _numbers(stored.stats, theirs), _numbers(kept.stats, ours)
    largest, num_other = _compare_entries(
        _Entries.cut(stored.entries, stored.stats, theirs),
        _Entries.cut(kept.entries, kept.stats, ours),
        codec,
    )
    # Log-sum-exp and entropy are the position's own; what it has to predict is not.
    own_P2, other_P2 = stored_PC[:, :2], computed_PC[:, :2]
    return RowComparison(
        own=max(_distance(stored_PC, computed_PC), largest),
        before=_distance(own_P2[:-1], other_P2[1:]),
        after=_distance(own_P2[1:], other_P2[:-1]),
        num_positions=num_positions,
        num_ids=num_ids,
        num_other_ids=num_other,
        scale=max(1.0, float(np.abs(computed_PC[np.isfinite(computed_PC)]).max(initial=0.0))),
    )


@dataclass(frozen=True, slots=True)
class _Entries:
    """Kept entries of the P positions of a row.

    Attributes:
        keys_S: int64: position and id in one number, distinct.
        log_probs_S: Of the exact ones; NaN for others.
        counts_P: Entries of each position.
        tail_P: Mass outside the exact entries.
    """

    keys_S: Rows
    log_probs_S: Floats
    counts_P: Rows
    tail_P: Floats

    @classmethod
    def cut(cls, entries: KeptEntries, stats: PositionStats, positions: slice) -> _Entries:
        span = slice(int(entries.offsets[positions.start]), int(entries.offsets[positions.stop]))
        counts_P = entries.counts[positions]
        owners_S = np.repeat(np.arange(len(counts_P), dtype=np.int64), counts_P)
        log_probs_S = entries.log_probs[span].astype(np.float64)
        log_probs_S[~entries.head_mask()[span]] = np.nan
        tail_P = np.exp(stats.log_tail[positions], dtype=np.float64)
        return cls(owners_S << 32 | entries.ids[span].astype(np.int64), log_probs_S, counts_P, tail_P)


def _compare_entries(stored: _Entries, computed: _Entries, codec: str) -> tuple[float, int]:
    """Returns the largest difference beyond the codec's rounding, and how many stored ids are other ones."""
    common, theirs, ours = np.intersect1d(
        stored.keys_S, computed.keys_S, assume_unique=True, return_indices=True
    )
    before_S, now_S = stored.log_probs_S[theirs], computed.log_probs_S[ours]
    exact_S = ~(np.isnan(before_S) | np.isnan(now_S))
    beyond_S = _round_trip_excess(before_S[exact_S], now_S[exact_S], codec)
    largest = float(beyond_S.max(initial=0.0))
    # Where other ids are kept the tail is another one, too.
    num_common_P = np.bincount(common >> 32, minlength=len(stored.counts_P))
    same_P = (num_common_P == stored.counts_P) & (num_common_P == computed.counts_P)
    tails_P = np.abs(stored.tail_P - computed.tail_P)[same_P]
    return max(largest, float(tails_P.max(initial=0.0))), len(stored.keys_S) - len(common)


def _round_trip_excess(stored_S: Floats, computed_S: Floats, codec: str) -> Floats:
    """Returns by how much stored log-probabilities differ beyond what their codec rounds.

    Source: bounds of ``schemas.entry_columns`` (float16) and ``schemas.value_code`` (compact).
    """
    if codec == "compact":
        step = 1 / 510
        root_S = np.exp(computed_S / 6)
        rounding_S = 6 * step / np.maximum(root_S - step, step)
        floor = 6 * np.log(1 / 255)
    else:
        rounding_S = np.minimum(-computed_S, 65504.0) * 2.0**-10 + 1e-6
        floor = -65504.0
    gap_S = np.abs(np.maximum(stored_S, floor) - np.maximum(computed_S, floor))
    return np.maximum(gap_S - rounding_S, 0.0)


def _numbers(stats: PositionStats, positions: slice) -> Floats:
    """Returns the numbers of a row's positions, ``[P, C]``: log-sum-exp and entropy first."""
    columns = [stats.lse, stats.entropy, stats.target_logprob]
    fixed_P3 = np.stack([column[positions] for column in columns], axis=1)
    return np.concatenate([fixed_P3, stats.lse_grid[positions]], axis=1).astype(np.float64)


def _distance(left_PC: Floats, right_PC: Floats) -> float:
    if not left_PC.size:
        return np.inf
    same = left_PC == right_PC  # Minus infinity, too.
    gaps = np.abs(np.where(same, 0.0, left_PC) - np.where(same, 0.0, right_PC))
    return float(np.where(np.isnan(gaps), np.inf, gaps).max())
