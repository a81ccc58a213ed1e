"""The JSON records of a store, format 1.0: STORE.json, commit records, manifest, and the run's lock.

Invariants:
    1. Every record carries its own digest (``schemas.digest``).
    2. A file name in a record lies inside the store: no separators, no parent references
       (tests/schemas/test_records.py).
    3. The manifest has no timestamps: equal content gives equal bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import FailFast, Field, ValidationError

from schemas.digest import (
    MAX_DOCUMENT_BYTES,
    DocumentError,
    decode_document,
    encode_document,
    is_readable_size,
)
from schemas.errors import DamagedStoreError, DataError, RefusedError
from schemas.recipe import Count, Frozen

FORMAT_VERSION = "1.0"
# What a record may weigh at most; one that is larger is not read.
MAX_IDENTITY_BYTES = 4 * 1024 * 1024
MAX_COMMIT_BYTES = MAX_DOCUMENT_BYTES
MAX_MANIFEST_BYTES = MAX_DOCUMENT_BYTES
STORE_FILE = "STORE.json"
PLAN_FILE = "plan.arrow"
MANIFEST_FILE = "manifest.json"
DATA_DIRECTORY = "data"
COMMIT_DIRECTORY = "commit"
LOCK_FILE = "stores.lock.json"
# Wrong values of a record of which the first is told.
_MAX_ERRORS = 1000
# Characters of a name that is shown in an error.
_MAX_SHOWN = 200
_MAX_VERSION_CHARACTERS = 20

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Xxh3 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
ShardFile = Annotated[str, Field(pattern=r"^s[0-9]{6,12}-[0-9a-z]{1,64}\.arrow$")]
Level = Literal["classification", "token"]
Size = Annotated[int, Field(ge=0, lt=2**62)]
# Of a list that a stranger made, the first wrong item is enough.
Item = TypeVar("Item")
Listed = Annotated[tuple[Item, ...], FailFast()]


class StoreIdentity(Frozen):
    """``STORE.json``: what a store is.

    Attributes:
        level: What a row is: an example with one distribution over labels, or a chunk of a document with
            one over the vocabulary for each token to predict.
        plan_hash: Of the plan (64 hex digits).
        generation_hash: Of ``generation``.
        generation: The fields whose change makes other logits: teacher weights, tokenizer, maximum
            length, truncation, column order, dtype, attention, keep policy. Token level: also ``policy``,
            ``grid``, ``codec``, ``vocab``, ``tokenizer`` and ``chunks``.
        native_labels: The teacher's label names in the order of its logits; none at token level. Names
            only: not hashed.
        teacher, corpus, part: Names for people and for the near-miss check. Not hashed.
        produced_by: Engine and library versions. Not hashed.
    """

    format: Literal["1.0"] = "1.0"
    level: Level = "classification"
    plan_hash: Hash
    generation_hash: Hash
    generation: dict[str, Any]
    native_labels: Listed[str]
    teacher: str
    corpus: str
    part: str
    produced_by: dict[str, str] = Field(default_factory=dict)


class BatchRecord(Frozen):
    """One record batch (or the schema or footer region) of a shard file.

    Attributes:
        offset, length: Byte range in the file.
        rows: Rows of the batch; 0 for the schema and footer regions.
        xxh3: xxh3-64 of the bytes (16 hex digits).
    """

    offset: Size
    length: Size
    rows: Size
    xxh3: Xxh3


class ExcludedRow(Frozen):
    """A row without logits, under ``on_bad_row: exclude``."""

    ordinal: Size
    example_id: str
    reason: str


class CommitRecord(Frozen):
    """``commit/s000123.r0.json``: the commit point of a shard.

    Attributes:
        file: Name of the data file below ``data/``.
        start, stop: Rows of the part that the shard covers, excluded ones included.
        num_rows: Rows in the file.
        ids_hash: SHA-256 over the ordered example ids and text hashes in the file
            (``schemas.rows.fingerprint_rows``).
        head, tail: The file's bytes before the first and after the last record batch.
        batches: The record batches; head, batches and tail cover the file without a gap.
    """

    format: Literal["1.0"] = "1.0"
    plan_hash: Hash
    generation_hash: Hash
    shard: Size
    revision: Size
    file: ShardFile
    start: Size
    stop: Size
    num_rows: Size
    num_bytes: Size
    sha256: Hash
    ids_hash: Hash
    head: BatchRecord
    batches: Listed[BatchRecord]
    tail: BatchRecord
    excluded: Listed[ExcludedRow] = ()

    def regions(self) -> tuple[BatchRecord, ...]:
        """Returns head, batches and tail in file order."""
        return (self.head, *self.batches, self.tail)


class ManifestShard(Frozen):
    """A shard as the manifest lists it: which record counts, and that record's digest."""

    shard: Size
    record: Annotated[str, Field(pattern=r"^s[0-9]{6,12}\.r[0-9]{1,6}\.json$")]
    record_sha256: Hash
    num_rows: Size
    num_bytes: Size


class Manifest(Frozen):
    """``manifest.json``: written once all shards are committed; readers start here.

    Attributes:
        store_sha256, plan_sha256: Of the bytes of ``STORE.json`` and ``plan.arrow``.
        num_rows: Rows with logits.
        excluded: Rows without, over all shards.
    """

    format: Literal["1.0"] = "1.0"
    plan_hash: Hash
    generation_hash: Hash
    store_sha256: Hash
    plan_sha256: Hash
    num_rows: Size
    shards: Listed[ManifestShard]
    excluded: Listed[ExcludedRow] = ()


class LockedPart(Frozen):
    """A corpus part as a run uses it.

    Attributes:
        rows: Path of ``rows.arrow``.
        labels_hash: SHA-256 over its golden labels (int32, little-endian): stores do not depend on
            them, trainings do.
        shard_rows: The plan's cut; the order of reading follows it.
        stores: From teacher name to the store's root.
    """

    part: str
    fingerprint: Hash
    plan_hash: Hash
    num_rows: Size
    shard_rows: Count = 4096
    rows: str
    labels_hash: Hash | None = None
    stores: dict[str, str] = Field(default_factory=dict)


class StoresLock(Frozen):
    """``stores.lock.json`` of a run: all that ``distill`` may read, by corpus name."""

    format: Literal["1.0"] = "1.0"
    corpora: dict[str, tuple[LockedPart, ...]]


Record = TypeVar("Record", bound=Frozen)

_RECORD_NAME = re.compile(r"s([0-9]{6,12})\.r([0-9]{1,6})\.json")


def shard_stem(shard: int) -> str:
    """Returns ``s000123`` for shard 123."""
    return f"s{shard:06d}"


def record_name(shard: int, revision: int) -> str:
    """Returns ``s000123.r0.json`` for shard 123 and revision 0."""
    return f"{shard_stem(shard)}.r{revision}.json"


def parse_record_name(name: str) -> tuple[int, int] | None:
    """Returns shard and revision of a commit record's file name, or None if it is none."""
    match = _RECORD_NAME.fullmatch(name)
    if match is None:
        return None
    shard, revision = int(match[1]), int(match[2])
    return (shard, revision) if name == record_name(shard, revision) else None


def store_directory_name(plan_hash: str, generation_hash: str) -> str:
    """Returns ``<plan hash>-<generation hash>``, 16 hex digits each."""
    return f"{plan_hash[:16]}-{generation_hash[:16]}"


def encode_record(record: Frozen) -> bytes:
    """Returns the record's self-digested JSON bytes.

    Raises:
        DataError: It lists more than a reader would take.
    """
    data = encode_document(record.model_dump(mode="json"))
    if not is_readable_size(data):
        raise DataError(
            f"a {type(record).__name__} of {len(data)} bytes would be too large to be read; raise "
            "store.shard_rows, so that there are fewer shards, or see why so many rows are excluded"
        )
    return data


def parse_record(data: bytes, kind: type[Record], *, store: Path | str, name: str) -> Record:
    """Parses a record of a store.

    Raises:
        DamagedStoreError: The bytes are no such record, or do not match their digest.
    """
    return validate_record(decode_record(data, store=store, name=name), kind, store=store, name=name)


def decode_record(data: bytes, *, store: Path | str, name: str) -> dict[str, Any]:
    """Parses a record's JSON and checks its digest, whatever kind and version it is.

    Raises:
        DamagedStoreError: The bytes are no JSON document, or do not match their digest.
    """
    try:
        return decode_document(data)
    except DocumentError as error:
        raise DamagedStoreError(f"{name} {error}", store=store) from error


def check_format(document: dict[str, Any], *, store: Path | str) -> None:
    """Lets a record of this format version through: to this tmkd a store of another would look damaged.

    Raises:
        RefusedError: The record says another version, or none.
    """
    version = document.get("format")
    if version != FORMAT_VERSION:
        shown = ascii(version)[:_MAX_VERSION_CHARACTERS]
        raise RefusedError(
            f"store {store}: has format {shown}, this tmkd reads {FORMAT_VERSION!r}; open it with the tmkd "
            "that wrote it, or make it anew"
        )


def validate_record(document: dict[str, Any], kind: type[Record], *, store: Path | str, name: str) -> Record:
    """Returns a decoded record as ``kind``.

    Raises:
        DamagedStoreError: It is no such record.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        if error.error_count() > _MAX_ERRORS:
            # A stranger's record may have a million; each costs as much as a kilobyte to tell.
            message = f"{name} is no {kind.__name__}: {error.error_count()} of its values are wrong"
            raise DamagedStoreError(message, store=store) from None
        first = error.errors(include_input=False, include_url=False)[0]
        # A stranger may have chosen the field's name.
        field = ascii(".".join(str(step) for step in first["loc"])[:_MAX_SHOWN]).strip("'")
        raise DamagedStoreError(f"{name}: {field}: {first['msg'][:_MAX_SHOWN]}", store=store) from error


def read_record(path: Path, kind: type[Record], *, store: Path | str) -> Record:
    """Reads a record of a store.

    Raises:
        DamagedStoreError: The file is missing, malformed, or does not match its digest.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamagedStoreError(f"{path.name} cannot be read ({error.strerror})", store=store) from error
    return parse_record(data, kind, store=store, name=path.name)
