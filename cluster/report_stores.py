"""The stores of a run as its report lists them.

Invariants (tests/cluster/test_report.py, tests/cluster/language/test_report.py):
    1. A store that is gone, or out of reach, is a row that says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.run_directory import read_lock_file
from cluster.store_listing import ListedStore, list_stores
from cluster.token_figures import describe_tokens
from schemas.errors import DataError, ResourceError, TmkdError
from schemas.records import LOCK_FILE
from schemas.storage.location import open_storage
from schemas.store_files import load_identity


@dataclass(frozen=True)
class ReportedStore:
    """A store of the run.

    Attributes:
        store: As it is listed.
        num_positions: Stored positions at token level; this and the others are None where they are not
            known without reading whole shards.
        bytes_per_position: Of the data files.
        entry_bytes_per_position: Of the kept entries alone.
    """

    store: ListedStore
    num_positions: int | None = None
    bytes_per_position: float | None = None
    entry_bytes_per_position: float | None = None


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
                listed += [_describe(store) for store in _list_one(root) or [gone]]
    return listed


def _list_one(root: str) -> list[ListedStore]:
    try:
        return list_stores(root, outs=())
    except (DataError, ResourceError):
        # Gone, or out of reach from here.
        return []


def _describe(store: ListedStore) -> ReportedStore:
    if store.level != "token" or store.problem:
        return ReportedStore(store)
    try:
        source = open_storage(store.path)
        figures = describe_tokens(source, load_identity(source))
    except TmkdError:
        return ReportedStore(store)
    return ReportedStore(
        store,
        figures["num_positions"],
        figures["bytes_per_position"],
        figures["entry_bytes_per_position"],
    )
