"""Stores whose small files, names and links were made to do harm. See ``tests.reliability.hostile_case``."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from schemas.digest import encode_document, hash_value
from tests.reliability.forgery import Body, ForgedStore
from tests.reliability.hostile_case import HostileCase

FILES = ("manifest.json", "STORE.json", "plan.arrow", "commit/s000001.r0.json", "data/s000001-test.arrow")
# More values than the parser takes, and just under it.
MANY, MOST = 350_000, 160_000


def _edit(**changes: Any) -> Callable[[Body], None]:
    return lambda body: body.update(changes)


def _manifest(**changes: Any) -> HostileCase:
    return HostileCase(lambda forged: forged.manifest.update(changes))


def _record(change: Callable[[Body], object], shard: int = 1) -> HostileCase:
    return HostileCase(lambda forged: change(forged.records[shard]))


def _identity(**changes: Any) -> HostileCase:
    return HostileCase(lambda forged: forged.identity.update(changes))


def _entry(**changes: Any) -> HostileCase:
    return HostileCase(lambda forged: forged.manifest["shards"][1].update(changes))


def _raw(name: str, make: Callable[[bytes], bytes]) -> HostileCase:
    """A small file of other bytes; whatever binds it is signed."""

    def write(forged: ForgedStore) -> None:
        forged.raw[name] = make((forged.root / name).read_bytes())

    return HostileCase(write)


def _after(change: Callable[[Path], object]) -> HostileCase:
    """A change of the directory itself."""
    return HostileCase(after=lambda forged: change(forged.root))


def _move_out(root: Path, name: str) -> None:
    """Moves a file or a directory out of the store and leaves a link to it."""
    outside = root.parent / f"outside-{root.name}"
    outside.mkdir()
    moved = Path(shutil.move(root / name, outside / "moved"))
    (root / name).symlink_to(moved)


def _replace(make: Callable[[Path], object]) -> Callable[[Path, str], None]:
    def replace(root: Path, name: str) -> None:
        (root / name).unlink()
        make(root / name)

    return replace


def _bind_socket(path: Path) -> None:
    # The name of a socket is at most 107 bytes long.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _grow(root: Path, name: str) -> None:
    os.truncate(root / name, 1 << 40)


_OTHERS: dict[str, Callable[[Path, str], None]] = {
    "a link out of the store": _move_out,
    "a pipe": _replace(os.mkfifo),
    "a directory": _replace(Path.mkdir),
    "a link to an endless device": _replace(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replace(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _replace(lambda path: path.symlink_to("nothing")),
    "a socket": _replace(_bind_socket),
    "a tebibyte of holes": _grow,
}

LINKS: dict[str, HostileCase] = {
    f"{name} is {kind}": _after(lambda root, name=name, change=change: change(root, name))
    for name in FILES
    for kind, change in _OTHERS.items()
} | {
    f"{name} is a link out of the store": _after(lambda root, name=name: _move_out(root, name))
    for name in ("data", "commit")
}

_NAMES = ("../s000001-test.arrow", "/etc/passwd", "s000001-test.arrow\n", "s000001-test.arrow\0", "..", "")
_RECORDS = ("../commit/s000001.r0.json", "/etc/passwd", "s000001.r0.json\n", "s000001.r00.json", ".", "")

NAMES: dict[str, HostileCase] = {
    **{f"a data file named {name!r}": _record(_edit(file=name)) for name in _NAMES},
    **{f"a record named {name!r}": _entry(record=name) for name in _RECORDS},
    "a record's name of a million characters": _entry(record="s" + "0" * 1_000_000),
    "all shards name one record": HostileCase(
        lambda forged: [entry.update(record="s000000.r0.json") for entry in forged.manifest["shards"]]
    ),
    "all shards name one data file": HostileCase(
        lambda forged: [record.update(file="s000000-test.arrow") for record in forged.records]
    ),
}

_VERSIONS = ("2.0", "1.0 ", "1.1", "", 2, 1, 1.0, None, True, ["1.0"], {"1.0": 1}, "\x1b[2J" * 1000)


def _drop_version(forged: ForgedStore) -> None:
    del forged.manifest["format"]


VERSIONS: dict[str, HostileCase] = {
    **{f"manifest of version {ascii(version)[:12]}": _manifest(format=version) for version in _VERSIONS},
    **{f"STORE.json of version {ascii(version)[:12]}": _identity(format=version) for version in _VERSIONS},
    **{f"record of version {ascii(version)[:12]}": _record(_edit(format=version)) for version in _VERSIONS},
    "manifest without a version": HostileCase(_drop_version),
    "a store of tokens": _identity(level="token"),
}


def _move_region(change: Callable[[list[Body]], object]) -> HostileCase:
    def move(forged: ForgedStore) -> None:
        record = forged.records[1]
        change([record["head"], *record["batches"], record["tail"]])

    return HostileCase(move)


def _add_empty_batches(forged: ForgedStore, count: int) -> None:
    record = forged.records[1]
    end = record["tail"]["offset"]
    empty = {"offset": end, "length": 0, "rows": 0, "xxh3": "0" * 16}
    record["batches"] += [dict(empty) for _ in range(count)]


def _claim_rows(num_rows: int) -> HostileCase:
    """Every place that states the rows of shard 1 agrees."""

    def claim(forged: ForgedStore) -> None:
        record = forged.records[1]
        more = num_rows - record["num_rows"]
        record["batches"][0]["rows"] += more
        record["num_rows"] = forged.manifest["shards"][1]["num_rows"] = num_rows
        record["stop"] += more
        forged.manifest["num_rows"] += more

    return HostileCase(claim)


def _exclude(rows: list[Body]) -> HostileCase:
    def exclude(forged: ForgedStore) -> None:
        forged.records[1]["excluded"] = rows
        forged.manifest["num_rows"] = max(0, forged.manifest["num_rows"] - len(rows))
        forged.manifest["excluded"] = rows + forged.records[2]["excluded"]

    return HostileCase(exclude)


def _leave_out(ordinal: Any, example_id: str = "train/6") -> Body:
    return {"ordinal": ordinal, "example_id": example_id, "reason": "not finite"}


def _add_shards(count: int) -> HostileCase:
    entry = {
        "shard": 3,
        "record": "s000003.r0.json",
        "record_sha256": "0" * 64,
        "num_rows": 1,
        "num_bytes": 1,
    }
    return HostileCase(lambda forged: forged.manifest["shards"].extend([entry] * count))


_NUMBERS = (-1, 2**61, 2**62, 2**63, 10**99, 10**4000, 1.5, "many", None, [], {}, float(2**60))

SIZES: dict[str, HostileCase] = {
    **{f"manifest of {ascii(number)[:20]} rows": _manifest(num_rows=number) for number in _NUMBERS},
    **{f"record of {ascii(number)[:20]} bytes": _record(_edit(num_bytes=number)) for number in _NUMBERS},
    **{f"record of shard {ascii(number)[:20]}": _record(_edit(shard=number)) for number in _NUMBERS},
    **{
        f"a batch at byte {ascii(number)[:20]}": _move_region(
            lambda regions, n=number: regions[1].update(offset=n)
        )
        for number in _NUMBERS
    },
    **{
        f"a batch of {ascii(number)[:20]} bytes": _move_region(
            lambda regions, n=number: regions[1].update(length=n)
        )
        for number in _NUMBERS
    },
    **{
        f"a batch of {ascii(number)[:20]} rows": _move_region(
            lambda regions, n=number: regions[1].update(rows=n)
        )
        for number in _NUMBERS
    },
    "2^61 rows, consistently": _claim_rows(2**61),
    "more rows than the plan, consistently": _claim_rows(6),
    "no batches": _record(lambda record: record["batches"].clear()),
    "overlapping batches": _move_region(lambda regions: regions[2].update(offset=regions[1]["offset"])),
    "one batch twice": _move_region(lambda regions: regions[2].update(regions[1])),
    "batches in another order": _record(lambda record: record["batches"].reverse()),
    "a gap between batches": _move_region(lambda regions: regions[1].update(length=regions[1]["length"] - 8)),
    "a tail beyond the file": _move_region(lambda regions: regions[-1].update(length=2**40)),
    "the head takes the first batch": _move_region(
        lambda regions: (
            regions[0].update(length=regions[0]["length"] + regions[1]["length"]),
            regions[1].update(offset=regions[2]["offset"], length=0),
        )
    ),
    "400,000 empty batches": HostileCase(lambda forged: _add_empty_batches(forged, 400_000)),
    "an empty batch": HostileCase(lambda forged: _add_empty_batches(forged, 1)),
    f"{MOST} more shards": _add_shards(MOST),
    f"{MANY} more shards": _add_shards(MANY),
    "no shards": _manifest(shards=[]),
    f"{MOST} excluded rows": _exclude([_leave_out(row) for row in range(MOST)]),
    f"{MANY} excluded rows": _exclude([_leave_out(row) for row in range(MANY)]),
    "one row excluded very often": _exclude([_leave_out(6)] * MOST),
    "another shard's row excluded": _exclude([_leave_out(1, "train/1")]),
    "a negative row excluded": _exclude([_leave_out(-1)]),
    "a row excluded that is there": _exclude([_leave_out(6)]),
    "an excluded row of another name": HostileCase(
        lambda forged: [body["excluded"][0].update(example_id="train/0") for body in _excluders(forged)]
    ),
    "excluded rows of the manifest alone": _manifest(excluded=[]),
}


def _excluders(forged: ForgedStore) -> list[Body]:
    return [forged.manifest, *(record for record in forged.records if record["excluded"])]


def _deepen(opening: bytes) -> Callable[[bytes], bytes]:
    return lambda data: b'{"digest": "' + b"0" * 64 + b'", "a": ' + opening * 1_000_000


_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "a million open brackets": lambda data: b"[" * 1_000_000,
    "a million open lists": _deepen(b"["),
    "a million open objects": _deepen(b'{"a":'),
    "ten million empty lists": lambda data: b"[" + b"[]," * 10_000_000 + b"0]",
    "60 MiB of one string": lambda data: b'{"a": "' + b"a" * (60 << 20) + b'"}',
    "a long string of escapes": lambda data: b'{"a": "' + b"\\u0000" * 5_000_000 + b'"}',
    "a number of a million digits": lambda data: b'{"a": ' + b"9" * 1_000_000 + b"}",
    "an infinity": lambda data: data.replace(b'"format": "1.0"', b'"format": 1e999'),
    "a NaN": lambda data: data.replace(b'"format": "1.0"', b'"format": NaN'),
    "a key twice": lambda data: data.replace(b'"format": "1.0"', b'"format": "1.0", "format": "1.0"'),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "a byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "bytes after its end": lambda data: data + b"{}",
    "no digest": lambda data: data[: data.index(b' "digest"')] + data[data.index(b' "format"') :],
    "a list": lambda data: b"[" + data + b"]",
    "a lone surrogate": lambda data: encode_document({"a": "b"}).replace(b'"b"', b'"\\ud800"'),
    "64 KiB of noise": lambda data: bytes(range(256)) * 256,
}

JSON: dict[str, HostileCase] = {
    f"{name} is {kind}": _raw(name, make)
    for name in ("manifest.json", "STORE.json", "commit/s000001.r0.json")
    for kind, make in _TEXTS.items()
}


def _rename_generation(forged: ForgedStore) -> None:
    """Another teacher under the old hash."""
    forged.identity["generation"] = {"teacher": "another"}


def _take_other_hash(forged: ForgedStore) -> None:
    forged.identity["generation"] = {"teacher": "another"}
    forged.identity["generation_hash"] = hash_value(forged.identity["generation"])


IDENTITIES: dict[str, HostileCase] = {
    "no labels": _identity(native_labels=[]),
    "a label twice": _identity(native_labels=["a", "b", "a"]),
    "fewer labels than logits": _identity(native_labels=["a", "b"]),
    "more labels than logits": _identity(native_labels=["a", "b", "c", "d"]),
    "half a million labels": _identity(native_labels=[str(label) for label in range(500_000)]),
    "labels that are numbers": _identity(native_labels=[1, 2, 3]),
    "another generation under the old hash": HostileCase(_rename_generation),
    "another generation in STORE.json alone": HostileCase(_take_other_hash),
    "a generation hash in capitals": _identity(generation_hash="A" * 64),
    "an unknown field": _identity(trust_remote_code=True),
    "a field name of a million characters": HostileCase(
        lambda forged: forged.identity.update({"x" * 10**6: 1})
    ),
    "a field name with an escape sequence": HostileCase(
        lambda forged: forged.identity.update({"\x1b[2J": 1})
    ),
}

CASES = {**LINKS, **NAMES, **VERSIONS, **SIZES, **JSON, **IDENTITIES}
