"""Canonical JSON, digests, and the atomic writing of small files.

Invariants:
    1. A document that was changed in any byte of meaning fails ``read_document``
       (tests/schemas/test_digest.py).
    2. ``replace_file`` leaves either the old or the new content, never a torn one
       (tests/schemas/test_digest.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIGEST_KEY = "digest"
MAX_DOCUMENT_BYTES = 256 * 1024 * 1024


class DocumentError(ValueError):
    """A JSON document that is malformed or does not match its own digest."""


def canonical_json(value: Any) -> bytes:
    """Encodes ``value`` as UTF-8 JSON with sorted keys, no spaces, and neither NaN nor infinities."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def hash_value(value: Any) -> str:
    """Returns the SHA-256 (64 hex digits) of ``canonical_json(value)``."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 (64 hex digits) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode_document(body: Mapping[str, Any]) -> bytes:
    """Returns human-readable JSON bytes of ``body`` with its own digest added."""
    document = dict(body)
    document[DIGEST_KEY] = hash_value(dict(body))
    return (
        json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()


def decode_document(data: bytes) -> dict[str, Any]:
    """Parses what ``encode_document`` wrote, and checks the digest.

    Raises:
        DocumentError: The bytes are no strict JSON object, have a duplicate key, or do not match
            their digest.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise DocumentError(f"is larger than {MAX_DOCUMENT_BYTES} bytes")
    try:
        document = json.loads(data, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DocumentError(f"is not strict JSON ({error})") from error
    if not isinstance(document, dict):
        raise DocumentError("is not a JSON object")
    digest = document.pop(DIGEST_KEY, None)
    if digest != hash_value(document):
        raise DocumentError("does not match its own digest: the file was damaged or edited")
    return document


def read_document(path: Path) -> dict[str, Any]:
    """Reads a self-digested JSON document.

    Raises:
        FileNotFoundError: There is no such file.
        DocumentError: See ``decode_document``.
    """
    return decode_document(path.read_bytes())


def write_document(path: Path, body: Mapping[str, Any]) -> None:
    """Writes a self-digested JSON document, atomically replacing what is there."""
    replace_file(path, encode_document(body))


def replace_file(path: Path, data: bytes) -> None:
    """Writes ``data`` to a temporary file beside ``path``, syncs it, and renames it over ``path``."""
    temporary = write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def create_file(path: Path, data: bytes) -> bool:
    """Creates ``path`` with ``data`` only if it is absent, atomically (a hard link on a local file system).

    Returns:
        True if this call created the file, False if it was there already.
    """
    temporary = write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def write_temporary(path: Path, data: bytes) -> Path:
    """Writes ``data`` to a new synced file in the directory of ``path`` and returns its path."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync_directory(directory: Path) -> None:
    """Makes renames and links in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise DocumentError("has a duplicate key")
    return result


def _refuse_constant(name: str) -> None:
    raise DocumentError(f"holds {name}, which is not strict JSON")
