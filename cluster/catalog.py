"""Looking at stores: listing those below a root, describing one, verifying one.

Invariants:
    1. Listing never fails because of one store: a damaged one is a row that says so
       (tests/cluster/test_catalog.py).
    2. Deep verification notices a change of any byte of a data file (tests/cluster/test_catalog.py).
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.shard_file import ShardFile
from distill.store_reader import LogitStore
from schemas.errors import DamagedStoreError, DataError, TmkdError
from schemas.plan import Plan
from schemas.recipe import Frozen
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    LOCK_FILE,
    MAX_COMMIT_BYTES,
    STORE_FILE,
    CommitRecord,
    StoreIdentity,
    StoresLock,
    parse_record,
    read_record,
)
from schemas.rows import classification_schema, fingerprint_rows
from schemas.storage.location import is_local, list_locations, normal_location, open_storage
from schemas.storage.storage import StoreSource
from schemas.store_files import has_file, list_data, load_commits, load_identity, load_manifest, load_plan

_PIPE_WIDTH = 120
_SHOWN_PROBLEMS = 5


class ListedStore(Frozen):
    """One store of a listing.

    Attributes:
        path: The store's root.
        runs: Runs beside the store root whose lock names it.
        num_rows: Rows with logits, of those committed.
        num_shards: Shards of the plan; None where the plan cannot be read.
        num_committed: Shards with a commit record.
        num_bytes: Of the data files on disk.
        produced_by: Engine and library versions.
        problem: Why the store cannot be read, or None.
    """

    path: str
    teacher: str = ""
    corpus: str = ""
    part: str = ""
    policy: str = ""
    runs: tuple[str, ...] = ()
    num_rows: int = 0
    num_shards: int | None = None
    num_committed: int = 0
    num_excluded: int = 0
    num_bytes: int = 0
    is_complete: bool = False
    plan_hash: str = ""
    generation_hash: str = ""
    produced_by: dict[str, str] = Field(default_factory=dict)
    problem: str | None = None


def list_stores(root: str | Path) -> list[ListedStore]:
    """Lists the stores directly below ``root`` (or ``root`` itself, if it is one), ordered by name.

    Raises:
        DataError: There is no such directory.
    """
    location = normal_location(root)
    if is_local(location) and not Path(location).is_dir():
        raise DataError(f"{root}: there is no such directory of stores; name one, such as runs/stores")
    candidates = [open_storage(location)]
    if not has_file(candidates[0], STORE_FILE):
        candidates = [open_storage(below) for below in list_locations(location)]
    runs = _find_runs(Path(location).parent) if is_local(location) else {}
    listed = [_list_store(source, runs) for source in candidates if has_file(source, STORE_FILE)]
    return sorted(listed, key=lambda store: (store.corpus, store.part, store.teacher, store.path))


def print_stores(stores: Sequence[ListedStore], console: Console | None = None) -> None:
    """Writes a listing to standard output: a table, 120 columns wide where there is no terminal."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = console or Console(width=width, highlight=False)
    if not stores:
        console.print("no stores")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("teacher", "corpus/part", "keep"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "shards", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "store", "runs"):
        table.add_column(name, overflow="fold")
    for store in stores:
        shards = "?" if store.num_shards is None else f"{store.num_committed}/{store.num_shards}"
        state = store.problem or ("complete" if store.is_complete else "unfinished")
        cells = (
            store.teacher,
            f"{store.corpus}/{store.part}" if store.corpus else "",
            store.policy,
            f"{store.num_rows:,}",
            shards,
            f"{store.num_bytes / 1e6:,.1f}",
            state,
            Path(store.path).name,
            ", ".join(store.runs),
        )
        # Text, not markup: names come from users.
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


def inspect_store(root: str | Path, num_ids: int = 0) -> dict[str, Any]:
    """Describes one store from its records alone; no data file is read.

    Args:
        root: The store's root.
        num_ids: How many of the first example ids to give.

    Raises:
        DataError: There is no store.
        DamagedStoreError: A record or the plan does not match its digest.
    """
    source = open_storage(root)
    identity = load_identity(source)
    plan = load_plan(source, identity.plan_hash)
    records = [commit.record for commit in load_commits(source).values()]
    manifest = load_manifest(source)
    excluded = [row for record in records for row in record.excluded]
    schema = classification_schema(len(identity.native_labels))
    described: dict[str, Any] = {
        "path": source.root,
        "is_complete": manifest is not None,
        **identity.model_dump(mode="json"),
        "num_rows_planned": plan.num_rows,
        "num_rows": sum(record.num_rows for record in records),
        "num_shards": plan.num_shards,
        "num_committed": len(records),
        "num_excluded": len(excluded),
        "excluded": [row.model_dump(mode="json") for row in excluded[:20]],
        "num_bytes": sum(record.num_bytes for record in records),
        "part_fingerprint": plan.fingerprint,
        "columns": {field.name: str(field.type) for field in schema},
    }
    if num_ids:
        described["first_ids"] = plan.rows.column("example_id").slice(0, num_ids).to_pylist()
    return described


def verify_store(root: str | Path, *, deep: bool = False) -> dict[str, Any]:
    """Verifies a finished store: every record's digest, and every data file's size, head and tail.

    Args:
        root: The store's root.
        deep: Also every data file's SHA-256 and every batch's hash, and that its rows are those of
            the plan, in order, with finite logits.

    Returns:
        What was checked: ``store``, ``deep``, ``num_shards``, ``num_rows``, ``num_bytes``.

    Raises:
        DataError: There is no store.
        IncompleteStoreError: It is not finished.
        DamagedStoreError: Something does not match; all damaged shards are named.
    """
    source = open_storage(root)
    identity = load_identity(source)
    plan, records = _read_bound_records(source, identity)
    problems = []
    for record in records:
        try:
            _verify_shard(source, identity, plan, record, deep=deep)
        except DamagedStoreError as error:
            problems.append(error)
    if problems:
        _raise_all(source.root, problems, len(records))
    return {
        "store": source.root,
        "deep": deep,
        "num_shards": len(records),
        "num_rows": sum(record.num_rows for record in records),
        "num_bytes": sum(record.num_bytes for record in records),
    }


def _read_bound_records(
    source: StoreSource, identity: StoreIdentity
) -> tuple[Plan, tuple[CommitRecord, ...]]:
    """Reads the records that the manifest binds, past damage that is confined to data files."""
    try:
        store = LogitStore.open(source.root)
    except DamagedStoreError as error:
        if error.shard is None:
            raise
    else:
        return store.plan, store.records
    manifest = load_manifest(source)
    records = [
        parse_record(
            source.read(f"{COMMIT_DIRECTORY}/{shard.record}", max_bytes=MAX_COMMIT_BYTES),
            CommitRecord,
            store=source.root,
            name=shard.record,
        )
        for shard in (manifest.shards if manifest else ())
    ]
    return load_plan(source, identity.plan_hash), tuple(records)


def _verify_shard(
    source: StoreSource, identity: StoreIdentity, plan: Plan, record: CommitRecord, *, deep: bool
) -> None:
    file = ShardFile(source, record, len(identity.native_labels), verify=True)
    if not deep:
        return
    digest = hashlib.sha256(
        source.map_file(f"{DATA_DIRECTORY}/{record.file}", sha256=record.sha256)
    ).hexdigest()
    ids: list[str] = []
    hashes: list[bytes] = []
    for position in range(len(record.batches)):
        columns = file.batch(position)
        if not np.isfinite(columns.logits_RC).all():
            raise file.damage("has a logit that is not finite", batch=position)
        ids += columns.example_ids.to_pylist()
        hashes += [row.tobytes() for row in columns.text_hashes]
    # After the batches: a batch's own hash says better where the damage is.
    if digest != record.sha256:
        raise file.damage("does not match its SHA-256")
    if fingerprint_rows(ids, hashes) != record.ids_hash:
        raise file.damage("holds other ids than its commit record")
    left_out = {row.ordinal - record.start for row in record.excluded}
    rows = plan.rows.slice(record.start, record.stop - record.start)
    kept = rows.filter(pa.array([position not in left_out for position in range(rows.num_rows)]))
    if kept.column("example_id").to_pylist() != ids or kept.column("text_hash").to_pylist() != hashes:
        raise file.damage("holds other rows than the plan")


def _raise_all(root: str, problems: Sequence[DamagedStoreError], num_shards: int) -> None:
    prefix = f"store {root}, "
    shown = "; ".join(problem.message.removeprefix(prefix) for problem in problems[:_SHOWN_PROBLEMS])
    more = f"; and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
    first = problems[0]
    raise DamagedStoreError(
        f"{len(problems)} of {num_shards} shards are damaged: {shown}{more}",
        store=root,
        shard=first.shard,
        batch=first.batch,
        offset=first.offset,
    ) from first


def _list_store(source: StoreSource, runs: dict[str, list[str]]) -> ListedStore:
    found: dict[str, Any] = {"path": source.root, "runs": tuple(runs.get(_resolve_one(source.root), ()))}
    try:
        identity = load_identity(source)
        found |= {
            "teacher": identity.teacher,
            "corpus": identity.corpus,
            "part": identity.part,
            "policy": _policy_of(identity),
            "plan_hash": identity.plan_hash,
            "generation_hash": identity.generation_hash,
            "produced_by": identity.produced_by,
            "num_bytes": sum(
                file.num_bytes for name, file in list_data(source).items() if name.endswith(".arrow")
            ),
        }
        manifest = load_manifest(source)
        if manifest is not None:
            found |= {
                "num_rows": manifest.num_rows,
                "num_shards": len(manifest.shards),
                "num_committed": len(manifest.shards),
                "num_excluded": len(manifest.excluded),
                "is_complete": True,
            }
        else:
            records = [commit.record for commit in load_commits(source).values()]
            found |= {
                "num_rows": sum(record.num_rows for record in records),
                "num_committed": len(records),
                "num_excluded": sum(len(record.excluded) for record in records),
                "num_shards": load_plan(source, identity.plan_hash).num_shards,
            }
    except TmkdError as error:
        found["problem"] = f"damaged: {error}"
    return ListedStore.model_validate(found)


def _policy_of(identity: StoreIdentity) -> str:
    keep = identity.generation.get("keep", "dense")
    return str(keep.get("kind", "?")) if isinstance(keep, dict) else str(keep)


def _find_runs(out: Path) -> dict[str, list[str]]:
    """Returns, for each store's resolved root, the names of the runs below ``out`` that lock it."""
    found: dict[str, list[str]] = defaultdict(list)
    for lock_path in sorted(out.glob(f"*/{LOCK_FILE}")):
        try:
            lock = read_record(lock_path, StoresLock, store=lock_path.parent)
        except DamagedStoreError:
            # A listing of stores is no place to complain about a run.
            continue
        roots = {root for parts in lock.corpora.values() for part in parts for root in part.stores.values()}
        for root in sorted(_resolve(roots)):
            found[root].append(lock_path.parent.name)
    return found


def _resolve(roots: Iterable[str]) -> set[str]:
    return {_resolve_one(root) for root in roots}


def _resolve_one(root: str) -> str:
    return str(Path(root).resolve()) if is_local(root) else root
