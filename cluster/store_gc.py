"""``tmkd store gc``: deletes what lost attempts and finished repairs have left in stores.

Invariants (tests/cluster/test_store_gc.py):
    1. Nothing is deleted that a counting record or the manifest refers to, nor anything younger than the
       grace period: it may be in flight.
    2. A superseded revision goes only after the manifest has referred to a newer one for that long.
    3. Files are listed before the records are read, so that what is committed meanwhile is seen.
    4. An attempt at a shard that nobody has committed stays, however old: its process may be paused
       between publishing and committing, and would go on to refer to it.
    5. A store whose counting records or manifest are damaged is left alone.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from cluster.store_listing import find_stores
from schemas.errors import DamagedStoreError, DataError, RecipeError, repair_advice
from schemas.fields import Frozen
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    Manifest,
    parse_record_name,
    record_name,
)
from schemas.storage.location import open_storage
from schemas.storage.probe import PROBE_PREFIX
from schemas.storage.storage import Storage, StoredFile, StoreSource
from schemas.store_files import (
    check_data_file,
    check_owner,
    list_commits,
    list_data,
    load_commit,
    load_commits,
    load_identity,
    load_manifest,
)

Reason = Literal["superseded record", "unreferenced data", "temporary file"]

# Between the publishing of a shard and its commit a driver may be slow, and a service be away for a while.
MIN_GRACE_S = 3600.0
_ATTEMPT = re.compile(r"data/s([0-9]{6,12})-[0-9a-z]{1,64}\.arrow")
_TEMPORARY = re.compile(rf"(?:data/|commit/)?\.[^/]+\.tmp|{PROBE_PREFIX}[0-9a-f]{{32}}-[a-z]+")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd])")
_UNIT_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Garbage(Frozen):
    """A file that nobody needs.

    Attributes:
        name: Relative to the store's root.
    """

    name: str
    reason: Reason
    num_bytes: int
    age_s: float


class Swept(Frozen):
    """What was found in one store.

    Attributes:
        files: Deleted, or to be deleted in a dry run.
        problem: Why the store was left alone, or None.
    """

    store: str
    files: tuple[Garbage, ...] = ()
    problem: str | None = None

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self.files)


def parse_duration(text: str) -> float:
    """Returns the seconds of such as ``24h``, ``90m`` or ``7d``.

    Raises:
        RecipeError: It is no duration.
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"--grace {text}: expected a number and a unit, such as 24h, 90m or 7d")
    return float(match[1]) * _UNIT_S[match[2]]


def sweep_stores(
    root: str | Path,
    grace_s: float,
    *,
    dry_run: bool = False,
    clock: Callable[[], float] = time.time,
) -> list[Swept]:
    """Deletes garbage of a store, or of all stores directly below ``root``.

    Args:
        root: A store or a root of stores.
        grace_s: Files that are younger stay, at least ``MIN_GRACE_S``.
        dry_run: Delete nothing.
        clock: This machine's time. Where the storage's own clock is behind it, that one counts.

    Raises:
        DataError: There is no such directory.
        RecipeError: The grace period is too short.
    """
    if grace_s < MIN_GRACE_S:
        raise RecipeError(
            f"--grace: a shard may be in flight for a while; at least {MIN_GRACE_S / 3600:g}h is wanted"
        )
    swept = []
    storage = open_storage(root)
    # A store that has lost its STORE.json is one, too.
    stores = [storage] if list_commits(storage) else find_stores(root)
    for store in stores:
        try:
            files = find_garbage(store, clock(), grace_s)
            if files and not dry_run:
                files = find_garbage(store, min(clock(), _storage_time(store)), grace_s)
                for file in files:
                    store.delete(file.name)
        except DataError as error:
            problem = error.damage if isinstance(error, DamagedStoreError) else error.message
            swept.append(Swept(store=store.root, problem=problem))
        else:
            swept.append(Swept(store=store.root, files=tuple(files)))
    return swept


def raise_if_left_alone(swept: list[Swept]) -> None:
    """Raises what kept stores from being swept.

    Raises:
        DataError: A store is damaged; it has to be repaired first.
    """
    left = [store for store in swept if store.problem is not None]
    if left:
        more = f" (and {len(left) - 1} more stores)" if len(left) > 1 else ""
        raise DataError(
            f"store {left[0].store}: {left[0].problem}{more}; nothing of it was deleted: "
            + repair_advice(left[0].store)
        )


def find_garbage(source: StoreSource, now_s: float, grace_s: float) -> list[Garbage]:
    """Lists what may be deleted, in the order in which it is to be deleted: records before their data.

    Args:
        source: The store.
        now_s: The time, seconds since the epoch.
        grace_s: What is not older stays.

    Raises:
        DamagedStoreError: A counting record, its data file or the manifest is damaged.
    """
    listed = [file for name in ("", COMMIT_DIRECTORY, DATA_DIRECTORY) for file in source.list_files(name)]
    # Not strictly older: clocks may be coarse.
    old = {file.name: file for file in listed if now_s - file.modified_s > grace_s}
    superseded, waiting = _find_superseded(source, old)
    referenced = _find_referenced(source)
    committed = list_commits(source).keys()

    def make(file: StoredFile, reason: Reason) -> Garbage:
        age_s = round(now_s - file.modified_s, 1)
        return Garbage(name=file.name, reason=reason, num_bytes=file.num_bytes, age_s=age_s)

    garbage = [make(old[name], "superseded record") for name in superseded]
    for name, file in old.items():
        attempt = _ATTEMPT.fullmatch(name)
        if attempt is not None and name not in referenced:
            shard = int(attempt[1])
            if shard in committed and shard not in waiting:
                garbage.append(make(file, "unreferenced data"))
        elif _TEMPORARY.fullmatch(name):
            garbage.append(make(file, "temporary file"))
    return garbage


def _find_superseded(source: StoreSource, old: Mapping[str, StoredFile]) -> tuple[list[str], set[int]]:
    """Returns superseded records that may go, and the shards of those that have to wait.

    A waiting record may be damaged, so that nobody knows its data file: all of its shard's stay.
    """
    manifest = load_manifest(source)
    listed = _listed_revisions(manifest)
    superseded, waiting = [], set()
    for shard, revisions in list_commits(source).items():
        current = listed.get(shard, -1)
        newer = f"{COMMIT_DIRECTORY}/{record_name(shard, max(current, 0))}"
        for revision in revisions[:-1]:
            name = f"{COMMIT_DIRECTORY}/{record_name(shard, revision)}"
            if revision < current and {name, newer, MANIFEST_FILE} <= old.keys():
                superseded.append(name)
            else:
                waiting.add(shard)
    return superseded, waiting


def _listed_revisions(manifest: Manifest | None) -> dict[int, int]:
    entries = manifest.shards if manifest is not None else ()
    parsed = (parse_record_name(entry.record) for entry in entries)
    return dict(found for found in parsed if found is not None)


def _find_referenced(source: StoreSource) -> set[str]:
    """Returns the data files of the records that count and of those that the manifest lists.

    Raises:
        DamagedStoreError: One of them cannot be read, is another store's, or lacks its data file.
    """
    return {f"{DATA_DIRECTORY}/{file}" for file in _referenced_files(source)}


def _referenced_files(source: StoreSource) -> Iterator[str]:
    identity = load_identity(source)
    commits = load_commits(source)
    files = list_data(source) if commits else {}
    for commit in commits.values():
        check_owner(source, commit.name, commit.record, identity)
        check_data_file(source, commit.record, files)
        yield commit.record.file
    manifest = load_manifest(source)
    if manifest is not None:
        check_owner(source, MANIFEST_FILE, manifest, identity)
    for shard, revision in _listed_revisions(manifest).items():
        if shard in commits and commits[shard].record.revision == revision:
            continue
        record = load_commit(source, shard, revision)
        if record is None:
            message = f"{record_name(shard, revision)}, which {MANIFEST_FILE} lists, is missing"
            raise DamagedStoreError(message, store=source.root, shard=shard)
        yield record.file


def _storage_time(storage: Storage) -> float:
    """Returns the time by the clock that files get their times from, seconds since the epoch."""
    name = f".clock-{uuid.uuid4().hex}.tmp"
    storage.replace(name, b"")
    try:
        return max(file.modified_s for file in storage.list_files("") if file.name == name)
    finally:
        storage.delete(name)
