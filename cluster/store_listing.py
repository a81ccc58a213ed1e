"""Looking at stores: listing those below a root, describing one. What their data files hold is not read.

Invariants:
    1. Listing never fails because of one store: a damaged one is a row that says so
       (tests/cluster/test_store_listing.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from cluster.store_uses import StoreUses
from cluster.token_figures import describe_tokens
from precompute.encode import store_schema
from schemas.errors import DamagedStoreError, DataError, TmkdError
from schemas.recipe import Frozen
from schemas.records import StoreIdentity
from schemas.storage.location import is_local, list_locations, normal_location, open_storage
from schemas.storage.storage import Storage, StoreSource
from schemas.store_files import is_store, list_data, load_commits, load_identity, load_manifest, load_plan

_PIPE_WIDTH = 120


class ListedStore(Frozen):
    """One store of a listing.

    Attributes:
        path: The store's root.
        name: Of its directory, made of its hashes.
        level: What its rows are; empty where ``STORE.json`` cannot be read.
        teacher, corpus, part: What the recipe that made it called them.
        names: What runs call it now, as ``teacher/corpus/part``.
        policy: What is kept, such as ``dense`` or ``top_k k=64``.
        codec: Of the kept entries, at token level.
        runs: Runs whose lock names it.
        students: Students that were trained from it, as ``<run>/<student>``.
        num_rows: Rows with logits, of those committed.
        num_shards: Shards of the plan; None where the plan cannot be read.
        num_committed: Shards with a commit record.
        num_bytes: Of the data files on disk.
        produced_by: Engine and library versions.
        problem: Why the store cannot be read, or None.
    """

    path: str
    name: str = ""
    level: str = ""
    teacher: str = ""
    corpus: str = ""
    part: str = ""
    policy: str = ""
    codec: str = ""
    names: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    students: tuple[str, ...] = ()
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

    def is_of(self, teacher: str | None = None, corpus: str | None = None) -> bool:
        """Tells whether any of its names is of that teacher and that corpus; None: of any."""
        called = [(self.teacher, self.corpus), *(tuple(name.split("/")[:2]) for name in self.names)]
        wanted = (teacher, corpus)
        return any(
            all(want in (None, name) for want, name in zip(wanted, names, strict=True)) for names in called
        )


def list_stores(root: str | Path, outs: Sequence[str | Path] | None = None) -> list[ListedStore]:
    """Lists the stores directly below ``root`` (or ``root`` itself, if it is one), ordered by name.

    Args:
        root: A directory or a URL.
        outs: Output roots whose runs may use the stores. None: the one that ``root``, a directory of
            stores, lies in.

    Raises:
        DataError: There is no such directory.
    """
    location = normal_location(root)
    sources = find_stores(location)
    if outs is None:
        outs = (Path(location).parent,) if is_local(location) else ()
    uses = StoreUses.find([Path(out) for out in outs])
    listed = [_list_store(source, uses) for source in sources]
    return sorted(listed, key=lambda store: (store.corpus, store.part, store.teacher, store.path))


def find_stores(root: str | Path) -> list[Storage]:
    """Opens the store at ``root``, or else those directly below it, by name.

    Raises:
        DataError: There is no such directory.
    """
    location = normal_location(root)
    if is_local(location) and not Path(location).is_dir():
        raise DataError(f"{root}: there is no such directory of stores; name one, such as runs/stores")
    storage = open_storage(location)
    if is_store(storage):
        return [storage]
    return [below for below in map(open_storage, list_locations(location)) if is_store(below)]


def print_stores(
    stores: Sequence[ListedStore], console: Console | None = None, *, with_students: bool = False
) -> None:
    """Writes a listing to standard output: a table, 120 columns wide where there is no terminal.

    Args:
        stores: What to list.
        console: Where to.
        with_students: Name the students of each store below the table, which counts them.
    """
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    console = console or Console(width=width, highlight=False)
    if not stores:
        console.print("no stores")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "teacher", "corpus/part", "policy"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "runs"):
        table.add_column(name, overflow="fold")
    table.add_column("students", justify="right")
    for store in stores:
        # Text, not markup: names come from users.
        table.add_row(*(Text(cell) for cell in _cells(store)))
    console.print(table)
    for store in stores if with_students else ():
        lines = [f"  {student}" for student in store.students] or ["  none"]
        console.print(Text("\n".join(["", f"students of {store.name}:", *lines])), soft_wrap=True)


def _cells(store: ListedStore) -> tuple[str, ...]:
    shards = "?" if store.num_shards is None else f"{store.num_committed}/{store.num_shards}"
    state = store.problem or ("complete" if store.is_complete else f"{shards} shards")
    made_as = f"{store.teacher}/{store.corpus}/{store.part}"
    others = [f"(also {name})" for name in store.names if name != made_as]
    return (
        store.name,
        " ".join([store.teacher, *others]),
        f"{store.corpus}/{store.part}" if store.corpus else "",
        store.policy,
        f"{store.num_rows:,}",
        decimal(store.num_bytes),
        state,
        ", ".join(store.runs),
        str(len(store.students)),
    )


def inspect_store(root: str | Path, num_ids: int = 0) -> dict[str, Any]:
    """Describes one store from its records; of data files at most the lengths of columns are read.

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
    schema = store_schema(identity, store=source.root)
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
    if identity.level == "token":
        described |= {"policy": _policy_of(identity), **describe_tokens(source, identity)}
    if num_ids:
        described["first_ids"] = plan.rows.column("example_id").slice(0, num_ids).to_pylist()
    return described


def _list_store(source: StoreSource, uses: StoreUses) -> ListedStore:
    use = uses.of(source.root)
    found: dict[str, Any] = {
        "path": source.root,
        "name": source.root.rstrip("/").rsplit("/", 1)[-1],
        "names": use.names,
        "runs": use.runs,
        "students": use.students,
    }
    try:
        identity = load_identity(source)
        found |= {
            "level": identity.level,
            "teacher": identity.teacher,
            "corpus": identity.corpus,
            "part": identity.part,
            "policy": _policy_of(identity),
            "codec": str(identity.generation.get("codec", "")),
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
    except DamagedStoreError as error:
        found["problem"] = f"damaged: {error.damage}"
    except TmkdError as error:
        found["problem"] = error.message
    return ListedStore.model_validate(found)


def _policy_of(identity: StoreIdentity) -> str:
    """Returns the kind of a keep policy and what it is given, such as ``hybrid k=12 m=8``."""
    name = "policy" if identity.level == "token" else "keep"
    keep = identity.generation.get(name, "dense")
    if not isinstance(keep, dict):
        return str(keep)
    # The seed of a policy that draws changes no property of what is kept.
    options = [f"{key}={value}" for key, value in keep.items() if key not in ("kind", "seed")]
    return " ".join([str(keep.get("kind", "?")), *options])
