"""Canonical JSON, digests, and the atomic writing of small files.

Invariants:
    1. A document that was changed in any byte of meaning fails ``read_document``
       (tests/schemas/test_digest.py).
    2. ``replace_file`` leaves either the old or the new content, never a torn one
       (tests/schemas/test_digest.py).
    3. Whatever bytes ``decode_document`` gets, it returns or raises ``DocumentError``, in bounded
       memory (tests/schemas/test_digest.py, tests/reliability/test_fuzz_records.py).
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
MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
# Python's objects take up to 50 times the bytes of a text such as `[[],[],...]`. Each of the values
# (counted before parsing by what starts them: a bracket or a comma) costs at most some 300 bytes.
MAX_DOCUMENT_VALUES = 1_000_000
MAX_DOCUMENT_DEPTH = 64
# Parsing an integer takes time quadratic in its digits; 128 bits are 39 of them.
_MAX_INTEGER_DIGITS = 100


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


def is_readable_size(data: bytes) -> bool:
    """Tells whether ``parse_json`` would take a document of this size and number of values."""
    num_values = sum(data.count(start) for start in (b",", b"[", b"{"))
    return len(data) <= MAX_DOCUMENT_BYTES and num_values <= MAX_DOCUMENT_VALUES


def parse_json(data: bytes, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> Any:
    """Parses strict JSON of anyone's making: UTF-8, no duplicate keys, no NaN, bounded size and depth.

    Numbers may overflow to an infinity (``1e999``) and strings may hold lone surrogates: neither can be
    encoded by ``canonical_json``.

    Raises:
        DocumentError: The bytes are no strict JSON, or too much of it.
    """
    if len(data) > max_bytes:
        raise DocumentError(f"is larger than {max_bytes} bytes")
    if sum(data.count(start) for start in (b",", b"[", b"{")) > MAX_DOCUMENT_VALUES:
        raise DocumentError(f"holds more than {MAX_DOCUMENT_VALUES} values")
    try:
        # Decoded here, because json.loads would take UTF-16 and UTF-32 too.
        value = json.loads(
            data.decode(),
            object_pairs_hook=_unique_keys,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DocumentError(f"is not strict JSON ({error})") from error
    _check_depth(value)
    return value


def decode_document(data: bytes, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """Parses what ``encode_document`` wrote, and checks the digest.

    Raises:
        DocumentError: The bytes are no strict JSON object, have a duplicate key, are more than
            ``max_bytes``, or do not match their digest.
    """
    document = parse_json(data, max_bytes=max_bytes)
    if not isinstance(document, dict):
        raise DocumentError("is not a JSON object")
    digest = document.pop(DIGEST_KEY, None)
    try:
        expected = hash_value(document)
    except ValueError as error:
        raise DocumentError("holds an infinity or a lone surrogate, which is not strict JSON") from error
    if digest != expected:
        raise DocumentError("does not match its own digest: the file was damaged or edited")
    return document


def read_document(path: Path, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """Reads a self-digested JSON document.

    Raises:
        FileNotFoundError: There is no such file.
        DocumentError: See ``decode_document``.
    """
    with path.open("rb") as file:
        return decode_document(file.read(max_bytes + 1), max_bytes=max_bytes)


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


def _parse_integer(text: str) -> int:
    if len(text) > _MAX_INTEGER_DIGITS:
        raise DocumentError(f"holds an integer of more than {_MAX_INTEGER_DIGITS} digits")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DOCUMENT_DEPTH + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
    raise DocumentError(f"is nested more than {MAX_DOCUMENT_DEPTH} deep")


def _refuse_constant(name: str) -> None:
    raise DocumentError(f"holds {name}, which is not strict JSON")
