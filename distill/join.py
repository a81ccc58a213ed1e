"""A corpus joined with the logit stores of N soft targets, row by row.

Parts lie one after another: the corpus's row is the part's offset plus the part's row. Stores of a
part share its plan, so that row i is the same example in each.

Shapes: B rows, P rows of a shard, N soft targets, K teachers of one target, C classes.

Invariants (tests/distill/test_join.py):
    1. Stores of another plan, of another corpus or with other ids are refused at open.
    2. A text hash that differs between store and corpus raises before a row of its shard is returned.
    3. Logits come in the job's label order, whatever the teacher's native order is.
    4. A row that any joined teacher excluded is in no ``usable_rows`` and is never returned.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distill.averaging import Averaging
from distill.corpus_part import CorpusPart
from distill.dropped_rows import read_dropped_rows
from distill.shard_cache import JoinedRows, ShardCache
from distill.store_reader import LogitStore
from schemas.errors import DamagedStoreError, DataError, RefusedError
from schemas.job import PartSource, SoftTarget, StageJob
from schemas.labels import match_order, rename
from schemas.rows import UNLABELLED, corpus_key, fingerprint_columns

DEFAULT_CACHED_SHARDS = 16

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One teacher's store of one part.

    Attributes:
        columns: int64[C], for each of the job's labels its column in the native order.
    """

    teacher: str
    store: LogitStore
    columns: Rows


@dataclass(frozen=True, slots=True)
class JoinedPart:
    """A corpus part with its stores.

    Attributes:
        offset: The part's first row in the corpus.
        targets: Per soft target, its teachers' stores.
    """

    corpus: CorpusPart
    offset: int
    targets: tuple[tuple[TeacherPart, ...], ...]

    def stores(self) -> tuple[LogitStore, ...]:
        """Returns the part's stores, teacher by teacher."""
        return tuple(teacher.store for target in self.targets for teacher in target)


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Where the rows of a corpus went.

    Attributes:
        total: Rows of all parts.
        excluded: Without logits of some joined teacher.
        dropped: Left out because they share a text with an evaluation split.
        unlabelled: Left out for want of a golden label.
        usable: The rest. A row with two reasons counts for the first.
    """

    total: int
    excluded: int
    dropped: int
    unlabelled: int
    usable: int


class JoinedCorpus:
    """Corpus parts and stores, joined by plan. Use ``JoinedCorpus.open`` or ``open_job``.

    Attributes:
        parts: In order.
        num_labels: C.
        num_targets: N.
        averaging: How several teachers of one target become one.
        shard_bounds: int64[S + 1], the plans' shard bounds as rows of the corpus.
    """

    def __init__(
        self, parts: tuple[JoinedPart, ...], num_labels: int, averaging: Averaging, dropped: Rows
    ) -> None:
        self.parts = parts
        self.num_labels = num_labels
        self.num_targets = len(parts[0].targets)
        self.averaging = averaging
        self.shard_bounds: Rows = np.concatenate(
            [[0], *(part.corpus.bounds[1:] + part.offset for part in parts)]
        ).astype(np.int64)
        self._dropped = dropped
        self._excluded = _union([part.offset + store.excluded for part in parts for store in part.stores()])
        self._first_shards = np.cumsum([0, *(len(part.corpus.bounds) - 1 for part in parts)])
        self._lock = threading.Lock()
        self._cache = self._make_cache(DEFAULT_CACHED_SHARDS)
        if len(dropped) and (dropped[0] < 0 or dropped[-1] >= self.num_rows):
            raise DataError(f"dropped rows reach to {dropped[-1]}, the corpus has {self.num_rows} rows")

    @classmethod
    def open(
        cls,
        parts: Sequence[PartSource],
        targets: Sequence[SoftTarget],
        labels: Sequence[str],
        *,
        dropped_rows: str | Path | None = None,
        label_maps: Mapping[str, Mapping[str, str]] | None = None,
        reduce: Averaging | None = None,
    ) -> JoinedCorpus:
        """Opens a corpus and the stores of its soft targets.

        Args:
            parts: The corpus.
            targets: One per soft head; none: golden labels only.
            labels: C names, in the order of the job's logits.
            dropped_rows: A ``.npy`` file of sorted int64 rows that are not to be used.
            label_maps: By teacher: from native label names to the job's.
            reduce: How several teachers of one target become one; by default their mean logits.

        Raises:
            RefusedError: A store belongs to another plan or corpus, or the corpus has changed.
            DataError: A file is missing or damaged.
            LabelError: A teacher's labels cannot be matched with the job's.
        """
        if not parts:
            raise DataError("the corpus has no parts")
        maps = label_maps or {}
        joined: list[JoinedPart] = []
        offset = 0
        for position, source in enumerate(parts):
            opened = tuple(
                tuple(
                    _open_teacher(teacher, roots[position], source, labels, maps.get(teacher, {}))
                    for teacher, roots in zip(target.teachers, target.stores, strict=True)
                )
                for target in targets
            )
            stores = [teacher.store for target in opened for teacher in target]
            corpus = CorpusPart.open(source, bounds=stores[0].plan.bounds if stores else None)
            corpus.check_labels(len(labels))
            for store in _distinct(stores):
                _check_ids(store, corpus)
            joined.append(JoinedPart(corpus, offset, opened))
            offset += source.num_rows
        dropped = read_dropped_rows(dropped_rows)
        return cls(tuple(joined), len(labels), reduce or Averaging(), dropped)

    @classmethod
    def open_job(cls, job: StageJob) -> JoinedCorpus:
        """Opens what a stage job names. Raises like ``open``."""
        return cls.open(
            job.parts,
            job.soft_targets,
            job.labels,
            dropped_rows=job.dropped_rows,
            label_maps=job.label_maps,
            reduce=Averaging(job.soft_loss, job.temperature),
        )

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return int(self.shard_bounds[-1])

    @property
    def corpus_key(self) -> str:
        """Key of the ordered parts, which seeds the order."""
        return corpus_key([part.corpus.source.fingerprint for part in self.parts])

    @property
    def plan_hashes(self) -> tuple[str, ...]:
        """Of the parts, in order."""
        return tuple(part.corpus.source.plan_hash for part in self.parts)

    @property
    def generation_hashes(self) -> tuple[str, ...]:
        """Of the stores, part by part and within a part teacher by teacher."""
        return tuple(store.identity.generation_hash for part in self.parts for store in part.stores())

    def usable_rows(self, *, labelled: bool = False) -> Rows:
        """Returns the rows that training may use, int64, ascending.

        Args:
            labelled: Leave out rows without a golden label too.
        """
        return np.flatnonzero(self._use(labelled)[0]).astype(np.int64, copy=False)

    def count_rows(self, *, labelled: bool = False) -> RowCounts:
        """Counts the rows that ``usable_rows`` leaves out, by reason."""
        return self._use(labelled)[1]

    def reserve(self, num_shards: int) -> None:
        """Makes room for ``num_shards`` shards in memory: two windows, so that batches may straddle them."""
        with self._lock:
            if num_shards > self._cache.num_slots:
                self._cache = self._make_cache(num_shards)

    def gather(self, rows: Rows) -> JoinedRows:
        """Copies rows; several threads may do so at once.

        Args:
            rows: int64[B], rows of the corpus, in any order.

        Returns:
            Labels int64[B] and logits float32[B, N, C].

        Raises:
            DataError: A row is out of range or excluded.
            DamagedStoreError: A touched shard does not match its hashes or the corpus.
        """
        self._check_rows(rows)
        with self._lock:
            found = self._cache.gather(rows)
            return found if found is not None else self._gather_scattered(rows)

    def _check_rows(self, rows: Rows) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_rows):
            raise DataError(f"rows {rows.min()} to {rows.max()} asked for, the corpus has {self.num_rows}")
        if len(self._excluded):
            places = np.searchsorted(self._excluded, rows)
            hit = self._excluded[np.minimum(places, len(self._excluded) - 1)] == rows
            if hit.any():
                raise DataError(f"row {rows[hit][0]} of the corpus is excluded, it has no logits")

    def _use(self, labelled: bool) -> tuple[npt.NDArray[np.bool_], RowCounts]:
        use = np.ones(self.num_rows, bool)
        left = [self.num_rows]
        for unusable in (self._excluded, self._dropped):
            use[unusable] = False
            left.append(int(use.sum()))
        if labelled:
            for part in self.parts:
                stop = part.offset + part.corpus.num_rows
                use[part.offset : stop] &= part.corpus.labels(0, part.corpus.num_rows) != UNLABELLED
        left.append(int(use.sum()))
        excluded, dropped, unlabelled = (before - after for before, after in itertools.pairwise(left))
        return use, RowCounts(self.num_rows, excluded, dropped, unlabelled, left[-1])

    def _make_cache(self, num_slots: int) -> ShardCache:
        return ShardCache(self.shard_bounds, (self.num_targets, self.num_labels), num_slots, self._load_shard)

    def _load_shard(
        self, shard: int, labels: npt.NDArray[np.int64], logits_PNC: npt.NDArray[np.float32]
    ) -> None:
        index = int(np.searchsorted(self._first_shards, shard, side="right")) - 1
        part = self.parts[index]
        part_shard = shard - int(self._first_shards[index])
        start, stop = (int(row) for row in part.corpus.bounds[part_shard : part_shard + 2])
        labels[:] = part.corpus.labels(start, stop)
        hashes = part.corpus.text_hashes(start, stop)
        for position, target in enumerate(part.targets):
            stack = np.empty((stop - start, len(target), self.num_labels), np.float32)
            if len(self._excluded):
                stack[:] = np.nan
            for place, teacher in enumerate(target):
                _copy_shard(teacher, part_shard, start, hashes, stack[:, place])
            logits_PNC[:, position] = self.averaging.apply(stack)

    def _gather_scattered(self, rows: Rows) -> JoinedRows:
        """Gathers rows of more shards than the cache holds, straight from the maps."""
        labels = np.empty(len(rows), np.int64)
        logits_BNC = np.empty((len(rows), self.num_targets, self.num_labels), np.float32)
        for part in self.parts:
            here = np.flatnonzero((rows >= part.offset) & (rows < part.offset + part.corpus.num_rows))
            local = rows[here] - part.offset
            if not len(local):
                continue
            labels[here] = part.corpus.take_labels(local)
            hashes = part.corpus.take_text_hashes(local)
            for position, target in enumerate(part.targets):
                stack = [_copy_rows(teacher, local, hashes) for teacher in target]
                logits_BNC[here, position] = self.averaging.apply(np.stack(stack, axis=1))
        return JoinedRows(labels, logits_BNC)


def _open_teacher(
    teacher: str, root: str, source: PartSource, labels: Sequence[str], renames: Mapping[str, str]
) -> TeacherPart:
    store = LogitStore.open(root)
    if store.identity.plan_hash != source.plan_hash:
        raise RefusedError(
            f"store {store.root} of teacher {teacher} belongs to another plan than {source.rows}",
            differing=(f"plan: {store.identity.plan_hash[:16]} -> {source.plan_hash[:16]}",),
        )
    field = f"label_maps.{teacher}"
    columns = match_order(rename(store.native_labels, renames, field=field), labels, field=field)
    return TeacherPart(teacher, store, np.asarray(columns, np.int64))


def _check_ids(store: LogitStore, corpus: CorpusPart) -> None:
    """Checks each commit record's digest of ids and text hashes against the corpus."""
    for record in store.records:
        rows = corpus.table.slice(record.start, record.stop - record.start)
        if record.excluded:
            absent = [row.ordinal - record.start for row in record.excluded]
            rows = rows.take(np.delete(np.arange(rows.num_rows), absent))
        if fingerprint_columns(rows.column("example_id"), rows.column("text_hash")) != record.ids_hash:
            raise RefusedError(
                f"store {store.root}, shard {record.shard}: its examples are not those of "
                f"{corpus.source.rows}; run `tmkd precompute` again"
            )


def _copy_shard(
    teacher: TeacherPart,
    shard: int,
    start: int,
    hashes: npt.NDArray[np.uint8],
    out_PC: npt.NDArray[np.float32],
) -> None:
    for index, batch in enumerate(teacher.store.read_shard(shard)):
        places: slice | Rows = batch.rows - start
        if len(batch.rows) and batch.rows[-1] - batch.rows[0] + 1 == len(batch.rows):
            places = slice(int(batch.rows[0]) - start, int(batch.rows[-1]) - start + 1)
        _check_hashes(teacher, batch.text_hashes, hashes[places], shard=shard, batch=index)
        out_PC[places] = batch.logits_RC.take(teacher.columns, axis=1)


def _copy_rows(teacher: TeacherPart, rows: Rows, hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    _check_hashes(teacher, teacher.store.text_hashes(rows), hashes)
    return teacher.store.gather(rows)[:, teacher.columns]


def _check_hashes(
    teacher: TeacherPart,
    stored: npt.NDArray[np.uint8],
    corpus: npt.NDArray[np.uint8],
    *,
    shard: int | None = None,
    batch: int | None = None,
) -> None:
    if not np.array_equal(stored, corpus):
        raise DamagedStoreError(
            f"text hashes of teacher {teacher.teacher} differ from the corpus's",
            store=teacher.store.root,
            shard=shard,
            batch=batch,
        )


def _union(groups: list[Rows]) -> Rows:
    return np.unique(np.concatenate(groups)).astype(np.int64) if groups else np.empty(0, np.int64)


def _distinct(stores: list[LogitStore]) -> list[LogitStore]:
    return list({store.root: store for store in stores}.values())
