"""Looking at stores: listing those below a root, describing one, verifying one.

Invariants:
    1. Listing never fails because of one store: a damaged one is a row that says so
       (tests/cluster/test_catalog.py).
    2. Deep verification notices a change of any byte of a data file (tests/cluster/test_catalog.py).
"""

from __future__ import annotations

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
from schemas.digest import hash_file
from schemas.errors import DamagedStoreError, DataError, TmkdError
from schemas.plan import Plan, read_plan
from schemas.recipe import Frozen
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    LOCK_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    STORE_FILE,
    CommitRecord,
    Manifest,
    StoreIdentity,
    StoresLock,
    read_record,
)
from schemas.rows import classification_schema, fingerprint_rows

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


def list_stores(root: Path) -> list[ListedStore]:
    """Lists the stores directly below ``root`` (or ``root`` itself, if it is one), ordered by name.

    Raises:
        DataError: There is no such directory.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such directory of stores; name one, such as runs/stores")
    candidates = [root] if (root / STORE_FILE).exists() else sorted(root.iterdir())
    runs = _find_runs(root.absolute().parent)
    listed = [_list_store(path, runs) for path in candidates if (path / STORE_FILE).exists()]
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


def inspect_store(root: Path, num_ids: int = 0) -> dict[str, Any]:
    """Describes one store from its records alone; no data file is read.

    Args:
        root: The store's root.
        num_ids: How many of the first example ids to give.

    Raises:
        DataError: There is no store.
        DamagedStoreError: A record or the plan does not match its digest.
    """
    identity = _read_identity(root)
    plan = _read_plan(root, identity)
    records = _committed(root)
    manifest = _read_manifest(root)
    excluded = [row for record in records for row in record.excluded]
    schema = classification_schema(len(identity.native_labels))
    described: dict[str, Any] = {
        "path": str(root.absolute()),
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


def verify_store(root: Path, *, deep: bool = False) -> dict[str, Any]:
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
    identity = _read_identity(root)
    plan, records = _read_bound_records(root, identity)
    problems = []
    for record in records:
        try:
            _verify_shard(root, identity, plan, record, deep=deep)
        except DamagedStoreError as error:
            problems.append(error)
    if problems:
        _raise_all(root, problems, len(records))
    return {
        "store": str(root.absolute()),
        "deep": deep,
        "num_shards": len(records),
        "num_rows": sum(record.num_rows for record in records),
        "num_bytes": sum(record.num_bytes for record in records),
    }


def _read_bound_records(root: Path, identity: StoreIdentity) -> tuple[Plan, tuple[CommitRecord, ...]]:
    """Reads the records that the manifest binds, past damage that is confined to data files."""
    try:
        store = LogitStore.open(root)
    except DamagedStoreError as error:
        if error.shard is None:
            raise
    else:
        return store.plan, store.records
    manifest = read_record(root / MANIFEST_FILE, Manifest, store=root)
    records = [
        read_record(root / COMMIT_DIRECTORY / s.record, CommitRecord, store=root) for s in manifest.shards
    ]
    return _read_plan(root, identity), tuple(records)


def _verify_shard(
    root: Path, identity: StoreIdentity, plan: Plan, record: CommitRecord, *, deep: bool
) -> None:
    file = ShardFile(root, record, len(identity.native_labels), verify=True)
    if not deep:
        return
    try:
        digest = hash_file(root / DATA_DIRECTORY / record.file)
    except OSError as error:
        raise file.damage(f"cannot be read ({error.strerror})") from error
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


def _raise_all(root: Path, problems: Sequence[DamagedStoreError], num_shards: int) -> None:
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


def _list_store(path: Path, runs: dict[str, list[str]]) -> ListedStore:
    found: dict[str, Any] = {"path": str(path), "runs": tuple(runs.get(str(path.resolve()), ()))}
    try:
        identity = _read_identity(path)
        found |= {
            "teacher": identity.teacher,
            "corpus": identity.corpus,
            "part": identity.part,
            "policy": _policy_of(identity),
            "plan_hash": identity.plan_hash,
            "generation_hash": identity.generation_hash,
            "produced_by": identity.produced_by,
            "num_bytes": sum(file.stat().st_size for file in (path / DATA_DIRECTORY).glob("s*.arrow")),
        }
        manifest = _read_manifest(path)
        if manifest is not None:
            found |= {
                "num_rows": manifest.num_rows,
                "num_shards": len(manifest.shards),
                "num_committed": len(manifest.shards),
                "num_excluded": len(manifest.excluded),
                "is_complete": True,
            }
        else:
            records = _committed(path)
            found |= {
                "num_rows": sum(record.num_rows for record in records),
                "num_committed": len(records),
                "num_excluded": sum(len(record.excluded) for record in records),
                "num_shards": _read_plan(path, identity).num_shards,
            }
    except (TmkdError, OSError) as error:
        found["problem"] = f"damaged: {error}"
    return ListedStore.model_validate(found)


def _policy_of(identity: StoreIdentity) -> str:
    keep = identity.generation.get("keep", "dense")
    return str(keep.get("kind", "?")) if isinstance(keep, dict) else str(keep)


def _read_identity(root: Path) -> StoreIdentity:
    if not (root / STORE_FILE).exists():
        raise DataError(f"{root}: is no store, it has no {STORE_FILE}; see `tmkd store ls`")
    return read_record(root / STORE_FILE, StoreIdentity, store=root)


def _read_plan(root: Path, identity: StoreIdentity) -> Plan:
    try:
        return read_plan(root / PLAN_FILE, expected_hash=identity.plan_hash)
    except DataError as error:
        raise DamagedStoreError(error.message, store=root) from error


def _read_manifest(root: Path) -> Manifest | None:
    if not (root / MANIFEST_FILE).exists():
        return None
    return read_record(root / MANIFEST_FILE, Manifest, store=root)


def _committed(root: Path) -> list[CommitRecord]:
    """Reads the commit records that count: of each shard the highest revision."""
    latest: dict[int, CommitRecord] = {}
    for path in sorted((root / COMMIT_DIRECTORY).glob("s*.r*.json")):
        record = read_record(path, CommitRecord, store=root)
        if record.shard not in latest or latest[record.shard].revision < record.revision:
            latest[record.shard] = record
    return [latest[shard] for shard in sorted(latest)]


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
    return {str(Path(root).resolve()) for root in roots}
