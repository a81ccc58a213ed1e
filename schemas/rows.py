"""Arrow layouts of a materialised corpus part and of a classification shard.

Invariants:
    1. ``hash_texts`` separates columns by their length, so that moving text between columns
       changes the hash (tests/schemas/test_rows.py).
    2. No column is nullable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from schemas.digest import hash_value
from schemas.errors import DataError

TEXT_HASH_BYTES = 16
UNLABELLED = -1
_FINGERPRINT_ROWS = 65536


def hash_texts(texts: Sequence[str]) -> bytes:
    """Returns the first 128 bits of SHA-256 over the length-prefixed UTF-8 text columns (16 bytes)."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()[:TEXT_HASH_BYTES]


def fingerprint_rows(example_ids: Iterable[str], text_hashes: Iterable[bytes]) -> str:
    """Returns the SHA-256 (64 hex digits) over ordered example ids and text hashes."""
    digest = hashlib.sha256()
    for example_id, text_hash in zip(example_ids, text_hashes, strict=True):
        data = example_id.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        digest.update(text_hash)
    return digest.hexdigest()


def fingerprint_columns(example_ids: pa.ChunkedArray, text_hashes: pa.ChunkedArray) -> str:
    """Returns ``fingerprint_rows`` of two equally long columns, in bounded memory and without a row's object.

    Args:
        example_ids: string[R], no nulls.
        text_hashes: fixed_size_binary[16][R], no nulls.
    """
    digest = hashlib.sha256()
    for start in range(0, len(example_ids), _FINGERPRINT_ROWS):
        ids = example_ids.slice(start, _FINGERPRINT_ROWS).combine_chunks()
        hashes = text_hashes.slice(start, _FINGERPRINT_ROWS).combine_chunks()
        digest.update(_interleave(ids, hashes))
    return digest.hexdigest()


def _interleave(example_ids: pa.StringArray, text_hashes: pa.FixedSizeBinaryArray) -> memoryview:
    """Lays rows out as ``fingerprint_rows`` hashes them: length, id, text hash."""
    num_rows = len(example_ids)
    _, offsets_buffer, data = example_ids.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32, num_rows + 1, 4 * example_ids.offset).astype(np.int64)
    lengths = np.diff(offsets)
    fixed = 8 + TEXT_HASH_BYTES
    starts = offsets[:-1] - offsets[0] + fixed * np.arange(num_rows)
    result = np.empty(int(lengths.sum()) + fixed * num_rows, np.uint8)
    result[starts[:, None] + np.arange(8)] = lengths.astype("<i8").view(np.uint8).reshape(num_rows, 8)
    if data is not None:
        ids = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]]
        result[np.arange(len(ids)) + np.repeat(8 + fixed * np.arange(num_rows), lengths)] = ids
    hashes = np.frombuffer(text_hashes.buffers()[1], np.uint8).reshape(-1, TEXT_HASH_BYTES)
    hashes = hashes[text_hashes.offset : text_hashes.offset + num_rows]
    result[(starts + 8 + lengths)[:, None] + np.arange(TEXT_HASH_BYTES)] = hashes
    return result.data


def corpus_key(part_fingerprints: Sequence[str]) -> str:
    """Returns the key of an ordered list of parts, which seeds the order of reading (64 hex digits)."""
    return hash_value(list(part_fingerprints))


def corpus_schema(num_texts: int) -> pa.Schema:
    """Returns the layout of ``rows.arrow``: one row per example of a corpus part.

    Columns: ``ordinal`` int64 (0-based row of the part), ``example_id`` string, ``text_hash``
    fixed_size_binary[16], ``text_0`` (and ``text_1``) large_string, ``label`` int32 (index into the
    corpus's label names, -1 unlabelled).
    """
    fields = [
        _field("ordinal", pa.int64(), "0-based row of the corpus part"),
        _field("example_id", pa.string(), "unique id of the example"),
        _field("text_hash", pa.binary(TEXT_HASH_BYTES), "first 128 bits of SHA-256 over the text columns"),
        *(_field(f"text_{i}", pa.large_string(), f"text column {i}") for i in range(num_texts)),
        _field("label", pa.int32(), "golden label as an index into the label names, -1 if unlabelled"),
    ]
    return pa.schema(fields)


def classification_schema(num_labels: int) -> pa.Schema:
    """Returns the layout of a classification shard (store format 1.0).

    Columns: ``ordinal`` int64, ``example_id`` string, ``text_hash`` fixed_size_binary[16], ``logits``
    fixed_size_list<float32>[num_labels], raw, in the teacher's native label order.
    """
    logits = pa.list_(pa.field("item", pa.float32(), nullable=False), num_labels)
    return pa.schema(
        [
            _field("ordinal", pa.int64(), "0-based row of the corpus part"),
            _field("example_id", pa.string(), "unique id of the example"),
            _field(
                "text_hash", pa.binary(TEXT_HASH_BYTES), "first 128 bits of SHA-256 over the text columns"
            ),
            _field("logits", logits, "raw logits, dimensionless, in the teacher's native label order"),
        ]
    )


def text_columns(rows: pa.Table) -> list[str]:
    """Returns the names of the text columns of ``corpus_schema``, in order."""
    return [name for name in rows.column_names if name.startswith("text_") and name != "text_hash"]


def open_rows(path: Path) -> pa.Table:
    """Maps a materialised corpus part without copying it.

    Raises:
        DataError: The file is missing or is not an Arrow IPC file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as a materialised corpus part ({error})") from error


def _field(name: str, type_: pa.DataType, meaning: str) -> pa.Field:
    return pa.field(name, type_, nullable=False, metadata={"meaning": meaning})
