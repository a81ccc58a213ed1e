"""The stores of a run as its report lists them.

Invariants (tests/cluster/test_report.py):
    1. A store that is gone, or out of reach, is a row that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.run_directory import read_lock_file
from cluster.store_listing import ListedStore, list_stores
from schemas.chunks import open_chunks
from schemas.errors import DataError, ResourceError, TmkdError
from schemas.records import LOCK_FILE, LockedPart
from schemas.storage.location import open_storage
from schemas.store_files import load_manifest


@dataclass(frozen=True)
class ReportedStore:
    """A store of the run.

    Attributes:
        store: As it is listed.
        num_positions: Stored positions of a complete token-level store, as far as its chunks can be read.
    """

    store: ListedStore
    num_positions: int | None = None

    @property
    def bytes_per_position(self) -> float | None:
        """Bytes of the data files over the stored positions."""
        return self.store.num_bytes / self.num_positions if self.num_positions else None


def list_run_stores(run_dir: Path) -> list[ReportedStore]:
    """Lists the stores that the run's lock names; none where it has no lock.

    Raises:
        DataError: The lock is damaged.
    """
    if not (run_dir / LOCK_FILE).exists():
        return []
    lock = read_lock_file(run_dir / LOCK_FILE)
    listed = []
    for corpus, parts in lock.corpora.items():
        for part in parts:
            for teacher, root in part.stores.items():
                gone = ListedStore(
                    path=root,
                    teacher=teacher,
                    corpus=corpus,
                    part=part.part,
                    plan_hash=part.plan_hash,
                    problem="not there any more",
                )
                for store in _list_one(root) or [gone]:
                    listed.append(ReportedStore(store, _count_positions(store, part)))
    return listed


def _list_one(root: str) -> list[ListedStore]:
    try:
        return list_stores(root)
    except (DataError, ResourceError):
        # Gone, or out of reach from here.
        return []


def _count_positions(store: ListedStore, part: LockedPart) -> int | None:
    """Counts the tokens to predict of the chunks that a store holds."""
    if store.level != "token" or not store.is_complete:
        return None
    try:
        manifest = load_manifest(open_storage(store.path))
        masks = open_chunks(part.rows)[1].column("loss_mask").combine_chunks()
    except TmkdError:
        return None
    if manifest is None or len(masks) != store.num_rows + store.num_excluded:
        return None
    lists = masks.chunk(0) if isinstance(masks, pa.ChunkedArray) else masks
    counted = pc.sum(pc.list_flatten(lists)).as_py() or 0
    left_out = lists.take(pa.array(np.array([row.ordinal for row in manifest.excluded], np.int64)))
    return int(counted - (pc.sum(pc.list_flatten(left_out)).as_py() or 0))
