"""Chunks and the stores of the teachers that were run over them, by row of the corpus.

Shapes: R rows (chunks) of all parts, B rows asked for, T tokens of them, N positions to predict from.

Invariants (tests/distill/test_language_corpus.py):
    1. Chunks and stores share a plan, a tokenizer and a vocabulary; the tokens of a store are those of the
       chunks, row by row.
    2. A causal position t is to predict token t + 1; a masked one its own. The shift is done here and
       nowhere else.
    3. Rows that a teacher excluded, that were dropped, or that have no token to predict are in no
       ``usable_rows``.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from distill.chunk_part import ChunkPart, target_mask
from distill.dropped_rows import read_dropped_rows
from distill.stored_targets import StoredTargets, TargetOrigin, join_targets
from distill.token_store import TokenStore
from schemas.errors import DamagedStoreError, DataError, RefusedError
from schemas.job import LanguageJob, PartSource, TokenTeacher
from schemas.kept_entries import offsets_of
from schemas.rows import corpus_key
from schemas.token_rows import TokenChunks

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LanguagePart:
    """A part with its stores.

    Attributes:
        offset: The part's first row in the corpus.
        stores: One per teacher.
    """

    chunks: ChunkPart
    offset: int
    stores: tuple[TokenStore, ...]


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """B rows.

    Attributes:
        input_ids: int32[T], what the model reads: the mask's token in place of what a masked model has
            to predict.
        offsets: int64[B + 1] into it.
        sources: int64[N], of each position to predict from its place in ``input_ids``, ascending.
        targets: One per teacher, or one without a teacher; N positions each.
    """

    input_ids: npt.NDArray[np.int32]
    offsets: Rows
    sources: Rows
    targets: tuple[StoredTargets, ...]


class LanguageCorpus:
    """Use ``LanguageCorpus.open``.

    Attributes:
        parts: In order.
        lengths: int64[R], tokens of each row.
        num_targets: int64[R], tokens to predict of each row.
        shard_bounds: int64[S + 1], the plans' shard bounds as rows of the corpus.
    """

    def __init__(self, parts: tuple[LanguagePart, ...], job: LanguageJob) -> None:
        self.parts = parts
        self._dropped = read_dropped_rows(job.dropped_rows)
        self.lengths: Rows = np.concatenate([part.chunks.lengths for part in parts])
        self.num_targets: Rows = np.concatenate([part.chunks.num_targets for part in parts])
        self.shard_bounds: Rows = np.concatenate(
            [[0], *(part.chunks.bounds[1:] + part.offset for part in parts)]
        ).astype(np.int64)
        self._objective, self._vocab = job.objective, job.vocab
        self._lock = threading.Lock()
        self._part_starts = np.array([part.offset for part in parts], np.int64)

    @classmethod
    def open(cls, job: LanguageJob) -> LanguageCorpus:
        """Opens what a job names.

        Raises:
            RefusedError: A store belongs to another plan, tokenizer or vocabulary, or is a classifier's.
            DataError: A file is missing or damaged, or stores of one teacher differ in what they keep.
        """
        parts: list[LanguagePart] = []
        offset = 0
        for position, source in enumerate(job.parts):
            chunks = ChunkPart.open(source, job)
            stores = tuple(
                _open_store(teacher, teacher.stores[position], source, job) for teacher in job.teachers
            )
            parts.append(LanguagePart(chunks, offset, stores))
            offset += chunks.num_rows
        for number, teacher in enumerate(job.teachers):
            _check_alike(teacher, [part.stores[number] for part in parts])
        return cls(tuple(parts), job)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.lengths)

    @property
    def corpus_key(self) -> str:
        """Key of the ordered parts, which seeds the order."""
        return corpus_key([part.chunks.source.fingerprint for part in self.parts])

    @property
    def plan_hashes(self) -> tuple[str, ...]:
        """Of the parts, in order."""
        return tuple(part.chunks.source.plan_hash for part in self.parts)

    @property
    def generation_hashes(self) -> tuple[str, ...]:
        """Of the stores, part by part and within a part teacher by teacher."""
        return tuple(store.identity.generation_hash for part in self.parts for store in part.stores)

    def usable_rows(self) -> Rows:
        """Returns the rows that training may use, int64, ascending.

        Raises:
            DataError: A dropped row is none of the corpus.
        """
        if len(self._dropped) and not 0 <= self._dropped[0] <= self._dropped[-1] < self.num_rows:
            raise DataError(f"dropped row {self._dropped[-1]} is none of the {self.num_rows} of the corpus")
        use = self.num_targets > 0
        use[self._dropped] = False
        for part in self.parts:
            for store in part.stores:
                use[part.offset + store.excluded] = False
        return np.flatnonzero(use).astype(np.int64, copy=False)

    def gather(self, rows: Rows) -> GatheredRows:
        """Copies rows; several threads may do so at once.

        Args:
            rows: int64[B], rows of the corpus, in any order.

        Raises:
            DataError: A row is out of range or excluded.
            DamagedStoreError: A store does not match its hashes or the chunks.
        """
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise DataError(f"rows {rows.min()} to {rows.max()} asked for, the corpus has {self.num_rows}")
        owners = np.searchsorted(self._part_starts, rows, side="right") - 1
        pieces, places = [], []
        for owner in np.unique(owners).tolist():
            part = self.parts[owner]
            here = np.flatnonzero(owners == owner)
            # Stores map and check their shards when they are first touched.
            with self._lock:
                pieces.append(self._gather_part(part, rows[here] - part.offset))
            places.append(here)
        return pieces[0] if len(pieces) == 1 else _interleave(pieces, np.concatenate(places))

    def _gather_part(self, part: LanguagePart, rows: Rows) -> GatheredRows:
        chunks = part.chunks.gather(rows)
        goals = np.flatnonzero(target_mask(chunks.loss_mask, chunks.offsets, self._objective))
        target_ids_N = torch.from_numpy(chunks.input_ids[goals].astype(np.int64))
        if not part.stores:
            part.chunks.check(chunks, rows)
            targets: tuple[StoredTargets, ...] = (StoredTargets.of_tokens(target_ids_N, self._vocab),)
        else:
            hashes = part.chunks.text_hashes(rows)
            targets = tuple(_read(store, rows, chunks, hashes, target_ids_N) for store in part.stores)
        input_ids = chunks.input_ids
        sources = goals - 1
        if self._objective == "masked":
            sources = goals
            input_ids = input_ids.copy()
            input_ids[goals] = part.chunks.spec.mask.token if part.chunks.spec.mask is not None else 0
        return GatheredRows(input_ids, chunks.offsets, sources, targets)


def _open_store(teacher: TokenTeacher, root: str, source: PartSource, job: LanguageJob) -> TokenStore:
    store = TokenStore.open(root)
    if store.identity.plan_hash != source.plan_hash:
        raise RefusedError(
            f"store {store.root} of teacher {teacher.name} belongs to another plan than {source.rows}; run "
            "`tmkd precompute` with this recipe again",
            differing=(f"plan: {store.identity.plan_hash[:16]} -> {source.plan_hash[:16]}",),
        )
    made = store.generation
    if made.tokenizer != job.tokenizer:
        raise RefusedError(
            f"teacher {teacher.name} has another tokenizer than the student; both must share one "
            "(aligning tokenizers is not supported)",
            differing=(f"tokenizer: {made.tokenizer[:16]} -> {job.tokenizer[:16]}",),
        )
    if made.vocab != job.vocab or made.chunks.objective != job.objective:
        raise RefusedError(
            f"store {store.root} of teacher {teacher.name} is {made.chunks.objective} over {made.vocab} "
            f"tokens, the student is {job.objective} over {job.vocab}; they must share both",
            differing=(
                f"vocab: {made.vocab} -> {job.vocab}",
                f"objective: {made.chunks.objective} -> {job.objective}",
            ),
        )
    return store


def _check_alike(teacher: TokenTeacher, stores: list[TokenStore]) -> None:
    kinds = {(store.layout.entries.policy.kind, store.layout.grid) for store in stores}
    if len(kinds) > 1:
        raise DataError(
            f"the stores of teacher {teacher.name} differ in policy or temperatures from part to part; make "
            "them alike"
        )


def _read(
    store: TokenStore,
    rows: Rows,
    chunks: TokenChunks,
    hashes: npt.NDArray[np.uint8],
    target_ids_N: torch.Tensor,
) -> StoredTargets:
    stored = store.gather(rows)
    same_tokens = np.array_equal(stored.chunks.input_ids, chunks.input_ids) and np.array_equal(
        stored.chunks.offsets, chunks.offsets
    )
    if not same_tokens or not np.array_equal(store.text_hashes(rows), hashes):
        raise DamagedStoreError(
            f"tokens of teacher {store.identity.teacher} differ from the chunks; delete the store and run "
            "`tmkd precompute` again",
            store=store.root,
        )
    if stored.entries.num_positions != len(target_ids_N):
        raise DamagedStoreError(
            f"holds {stored.entries.num_positions} positions for {len(target_ids_N)} tokens to predict",
            store=store.root,
        )
    layout = store.layout
    origin = TargetOrigin(layout.entries.policy.kind, layout.entries.vocab, layout.grid)
    return StoredTargets.of_entries(stored.entries, stored.stats, origin, target_ids_N)


def _interleave(pieces: list[GatheredRows], places: Rows) -> GatheredRows:
    """Puts the rows of several parts into the order asked for; ``places``: where each piece's rows go."""
    order = np.argsort(places)
    lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
    starts = offsets_of(lengths)
    shifts = np.cumsum([0, *(piece.offsets[-1] for piece in pieces)])[:-1]
    sources = np.concatenate([piece.sources + shift for piece, shift in zip(pieces, shifts, strict=True)])
    offsets = offsets_of(lengths[order])
    tokens = np.repeat(starts[:-1][order] - offsets[:-1], lengths[order]) + np.arange(offsets[-1])
    moved = np.empty_like(tokens)
    moved[tokens] = np.arange(len(tokens))
    positions = np.argsort(moved[sources])
    index_N = torch.from_numpy(positions)
    targets = tuple(
        join_targets(list(columns)).select(index_N)
        for columns in zip(*(piece.targets for piece in pieces), strict=True)
    )
    input_ids = np.concatenate([piece.input_ids for piece in pieces])[tokens]
    return GatheredRows(input_ids, offsets, moved[sources][positions], targets)
