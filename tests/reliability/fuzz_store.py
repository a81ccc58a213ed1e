"""Fuzz cases of whole stores: a tiny store is damaged, opened, and read to its last row.

Run in a child process (``tests.reliability.fuzz``): what C++ does wrong may end the process.
"""

from __future__ import annotations

import atexit
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from distill.store_reader import LogitStore
from schemas.digest import canonical_json, decode_document, hash_value
from tests.reliability.fuzz import Case
from tests.reliability.mutations import damage_bytes, damage_integer, damage_value
from tests.store_factory import make_part, make_store

LOGITS = np.arange(18, dtype=np.float32).reshape(6, 3)
EXCLUDED = 4
VALUES = np.delete(LOGITS, EXCLUDED, axis=0)
SHARDS = ("s000000", "s000001")
MANIFEST, IDENTITY, PLAN = "manifest.json", "STORE.json", "plan.arrow"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Bench:
    """The store that is damaged, case after case.

    Attributes:
        root: Its directory, in memory where there is such a file system.
        files: What its files hold when nothing is damaged.
    """

    root: Path
    files: Files

    def put(self, files: Files) -> None:
        """Makes the store hold just these files."""
        for name in self.files:
            path = self.root / name
            data = files.get(name)
            if data is None:
                path.unlink(missing_ok=True)
            elif not path.exists() or path.read_bytes() != data:
                # A new file: the old one may still be mapped, and must not be cut short.
                path.unlink(missing_ok=True)
                path.write_bytes(data)


@cache
def _bench() -> Bench:
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="tmkd-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    part = make_part(folder / "rows.arrow", [(f"text {row}",) for row in range(6)], [0] * 6, shard_rows=4)
    root = make_store(folder / "store", part.plan, LOGITS, batch_rows=2, excluded=[EXCLUDED])
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    return Bench(root, {name: (root / name).read_bytes() for name in names})


def damage_store(rng: random.Random) -> Callable[[], None]:
    """Reads a store with damaged files, whose hashes nobody made to match."""
    bench = _bench()
    files = dict(bench.files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
        kind = rng.randrange(12)
        if kind == 0:
            del files[name]
        elif kind == 1:
            files[name], files[other] = files[other], files[name]
        elif kind == 2:
            files[name] = files[other]
        else:
            files[name] = damage_bytes(rng, files[name])
    bench.put(files)

    def read() -> None:
        if not np.array_equal(_read(bench.root), VALUES):
            raise ValueError("other values were read")

    return read


def forge_store(rng: random.Random) -> Callable[[], None]:
    """Reads a store that was damaged before all its hashes were made to match."""
    bench = _bench()
    files = dict(bench.files)
    shard = rng.choice(SHARDS)
    record, data = f"commit/{shard}.r0.json", f"data/{shard}-test.arrow"
    kind = rng.randrange(8)
    body = decode_document(files[record])
    if kind < 3:
        files[data] = _damage_region(rng, files[data], body)
    elif kind == 3:
        files[PLAN] = damage_integer(rng, files[PLAN], 8, len(files[PLAN]))
    elif kind == 4:
        files[PLAN] = damage_bytes(rng, files[PLAN])
    elif kind == 5:
        body = damage_value(rng, body)
    files[record] = _encode(body)
    identity = decode_document(files[IDENTITY])
    files[IDENTITY] = _encode(damage_value(rng, identity) if kind == 6 else identity)
    manifest = decode_document(files[MANIFEST])
    manifest["store_sha256"] = hashlib.sha256(files[IDENTITY]).hexdigest()
    manifest["plan_sha256"] = hashlib.sha256(files[PLAN]).hexdigest()
    entry = manifest["shards"][SHARDS.index(shard)]
    entry |= {"num_bytes": len(files[data]), "record_sha256": hashlib.sha256(files[record]).hexdigest()}
    files[MANIFEST] = _encode(damage_value(rng, manifest) if kind == 7 else manifest)
    bench.put(files)
    return lambda: _check(_read(bench.root))


CASES: Mapping[str, Case] = {
    "whole stores, damaged": damage_store,
    "whole stores, damaged and signed again": forge_store,
}


def _damage_region(rng: random.Random, data: bytes, record: dict[str, Any]) -> bytes:
    """Damages one region of a shard's file, and makes its record describe what came of it."""
    regions = [record["head"], *record["batches"], record["tail"]]
    pieces = [data[region["offset"] : region["offset"] + region["length"]] for region in regions]
    place = rng.randrange(len(pieces))
    if rng.random() < 0.7:
        pieces[place] = damage_integer(rng, pieces[place], 0, len(pieces[place]))
    else:
        pieces[place] = damage_bytes(rng, pieces[place])
    if rng.random() < 0.1:
        other = rng.randrange(len(pieces))
        pieces[place], pieces[other] = pieces[other], pieces[place]
    offset = 0
    for region, piece in zip(regions, pieces, strict=True):
        region |= {"offset": offset, "length": len(piece), "xxh3": xxhash.xxh3_64_hexdigest(piece)}
        offset += len(piece)
    whole = b"".join(pieces)
    record |= {"num_bytes": offset, "sha256": hashlib.sha256(whole).hexdigest()}
    return whole


def _read(root: Path) -> np.ndarray:
    store = LogitStore.open(root)
    rows = store.stored_rows()
    values = store.gather(rows)
    store.text_hashes(rows)
    ids: list[str] = []
    for shard in range(len(store.records)):
        for columns in store.read_shard(shard):
            ids += columns.example_ids.to_pylist()
    planned = store.plan.rows.column("example_id").take(pa.array(rows)).to_pylist()
    if ids != planned:
        raise ValueError("other examples were read than the plan's")
    return values


def _check(values: np.ndarray) -> None:
    """Values may be whatever the stranger wrote, but there is one for each row and label."""
    if values.dtype != np.float32 or values.shape != VALUES.shape or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape} were read")


def _encode(body: dict[str, Any]) -> bytes:
    try:
        return canonical_json({**body, "digest": hash_value(body)})
    except (ValueError, RecursionError):
        # What canonical JSON cannot hold, such as an infinity, is not to be signed.
        return b"{}"
