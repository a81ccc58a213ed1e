"""Damage to a local store, by name; each function harms the last of its three shards or one small file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from schemas.digest import decode_document, encode_document
from schemas.records import (
    COMMIT_DIRECTORY,
    DATA_DIRECTORY,
    MANIFEST_FILE,
    PLAN_FILE,
    STORE_FILE,
    CommitRecord,
    Manifest,
    encode_record,
    read_record,
)

SHARD = 2


def flip_byte(path: Path, offset: int) -> None:
    """Flips the lowest bit of a byte."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def read_commit(root: Path, shard: int) -> tuple[Path, CommitRecord]:
    """Reads the first revision of a shard's record."""
    path = root / COMMIT_DIRECTORY / f"s{shard:06}.r0.json"
    return path, read_record(path, CommitRecord, store=root)


def data_file(root: Path, shard: int = SHARD) -> Path:
    """Returns the data file of a shard's first revision."""
    return root / DATA_DIRECTORY / read_commit(root, shard)[1].file


def claim_format(root: Path, version: str, name: str = STORE_FILE) -> None:
    """Lets ``STORE.json`` or the manifest say, under a digest that is right, that it has another format."""
    document = decode_document((root / name).read_bytes())
    (root / name).write_bytes(encode_document({**document, "format": version}))


def lose_data(root: Path) -> None:
    data_file(root).unlink()


def cut_data(root: Path) -> None:
    path = data_file(root)
    path.write_bytes(path.read_bytes()[:-1])


def flip_head(root: Path) -> None:
    flip_byte(data_file(root), 40)


def flip_batch(root: Path) -> None:
    flip_byte(data_file(root), read_commit(root, SHARD)[1].batches[0].offset + 300)


def lose_record(root: Path) -> None:
    read_commit(root, SHARD)[0].unlink()


def flip_record(root: Path) -> None:
    flip_byte(read_commit(root, SHARD)[0], 40)


def take_record_of_another_shard(root: Path) -> None:
    (first, _), (last, _) = read_commit(root, 1), read_commit(root, SHARD)
    last.write_bytes(first.read_bytes())


def exchange_record(root: Path) -> None:
    path, record = read_commit(root, SHARD)
    path.write_bytes(encode_record(record.model_copy(update={"ids_hash": "0" * 64})))


def take_record_of_another_store(root: Path) -> None:
    path, record = read_commit(root, SHARD)
    path.write_bytes(encode_record(record.model_copy(update={"generation_hash": "0" * 64})))


def leave_gap(root: Path) -> None:
    path, record = read_commit(root, SHARD)
    tail = record.tail.model_copy(update={"offset": record.tail.offset + 8})
    path.write_bytes(encode_record(record.model_copy(update={"tail": tail})))


def add_record(root: Path) -> None:
    (root / COMMIT_DIRECTORY / "s000007.r0.json").write_bytes(read_commit(root, 1)[0].read_bytes())


def lose_identity(root: Path) -> None:
    (root / STORE_FILE).unlink()


def flip_identity(root: Path) -> None:
    flip_byte(root / STORE_FILE, 300)


def turn_labels(root: Path) -> None:
    fields = decode_document((root / STORE_FILE).read_bytes())
    turned = {**fields, "native_labels": fields["native_labels"][::-1]}
    (root / STORE_FILE).write_bytes(encode_document(turned))


def change_generation(root: Path) -> None:
    fields = decode_document((root / STORE_FILE).read_bytes())
    (root / STORE_FILE).write_bytes(encode_document({**fields, "generation": {"weights": "t9"}}))


def lose_plan(root: Path) -> None:
    (root / PLAN_FILE).unlink()


def flip_plan(root: Path) -> None:
    flip_byte(root / PLAN_FILE, 700)


def lose_manifest(root: Path) -> None:
    (root / MANIFEST_FILE).unlink()


def flip_manifest(root: Path) -> None:
    flip_byte(root / MANIFEST_FILE, 300)


def forge_manifest(root: Path) -> None:
    manifest = read_record(root / MANIFEST_FILE, Manifest, store=root)
    forged = manifest.model_copy(update={"num_rows": manifest.num_rows - 1})
    (root / MANIFEST_FILE).write_bytes(encode_record(forged))


def commit_again(root: Path) -> None:
    """What a repair leaves that did not come to its end."""
    path, record = read_commit(root, SHARD)
    again = encode_record(record.model_copy(update={"revision": 1}))
    path.with_name(f"s{SHARD:06}.r1.json").write_bytes(again)


def spoil_all(root: Path) -> None:
    """Several faults at once."""
    for damage in (flip_batch, flip_identity, flip_plan, flip_manifest):
        damage(root)
    read_commit(root, 0)[0].unlink()


# Damage -> what a diagnosis says: place, fault, shard.
DAMAGE: dict[Callable[[Path], None], tuple[str, str, int | None]] = {
    lose_data: ("data", "missing", SHARD),
    cut_data: ("data", "size", SHARD),
    flip_head: ("data", "hash", SHARD),
    lose_record: ("record", "missing", SHARD),
    flip_record: ("record", "damaged", SHARD),
    take_record_of_another_shard: ("record", "foreign", SHARD),
    exchange_record: ("record", "foreign", SHARD),
    take_record_of_another_store: ("record", "foreign", SHARD),
    leave_gap: ("record", "foreign", SHARD),
    add_record: ("record", "foreign", 7),
    lose_identity: ("identity", "missing", None),
    flip_identity: ("identity", "damaged", None),
    turn_labels: ("identity", "foreign", None),
    change_generation: ("identity", "damaged", None),
    lose_plan: ("plan", "missing", None),
    flip_plan: ("plan", "damaged", None),
    flip_manifest: ("manifest", "damaged", None),
    forge_manifest: ("manifest", "damaged", None),
    commit_again: ("manifest", "foreign", None),
}
