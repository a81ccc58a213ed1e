"""Record batches and schemas of an Arrow IPC file that may come from a stranger.

Arrow's own reader trusts a message in ways that cost memory: it decompresses bodies, follows offsets
that share one string a million times, and takes a footer's word. So the few fields of a message that
matter are read here first, with every offset checked, and Arrow decodes only what they allow.

Layout of a message: continuation ``FFFFFFFF``, int32 length M of the metadata, M bytes of metadata (a
FlatBuffer ``Message``), then its body. A file is ``ARROW1`` and two zero bytes, a schema message, record
batches, the end mark ``FFFFFFFF 00000000``, a footer that nothing here reads, its int32 length, ``ARROW1``.

Source: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format, and
Message.fbs and Schema.fbs of the format.

Invariants:
    1. Whatever bytes come in, a function here returns what was asked for or raises
       ``ArrowMessageError`` (tests/schemas/test_arrow_message.py, tests/reliability/test_fuzz_records.py).
    2. Nothing is decompressed, and what is allocated is bounded by the bytes that came in
       (tests/schemas/test_arrow_message.py, tests/schemas/test_arrow_head.py).
    3. Data types are those that the caller names; the file's schema is only compared with them
       (tests/schemas/test_arrow_message.py).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from schemas.errors import first_line
from schemas.flatbuffer import FlatBufferError, Table, read_root

# An Arrow IPC file starts with "ARROW1" padded to 8 bytes.
MAGIC: Final = b"ARROW1"
MAGIC_BYTES: Final = 8
MAX_BATCH_METADATA_BYTES: Final = 64 * 1024
MAX_SCHEMA_METADATA_BYTES: Final = 32 * 1024 * 1024
MAX_METADATA_ENTRIES: Final = 1000

_PREFIX: Final = struct.Struct("<Ii")
_CONTINUATION: Final = 0xFFFFFFFF
_END_MARK: Final = _PREFIX.pack(_CONTINUATION, 0)
_TRAILER: Final = struct.Struct("<i6s")
_ALIGNMENT: Final = 8
_BYTE: Final = struct.Struct("<B")
_SHORT: Final = struct.Struct("<h")
_LONG: Final = struct.Struct("<q")
# FieldNode is (length, null count), Buffer is (offset, length).
_PAIR: Final = struct.Struct("<qq")

# Fields of the tables Message, RecordBatch, Schema, Field and KeyValue, and values of their enums.
_MESSAGE_VERSION, _MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = range(4)
_BATCH_LENGTH, _BATCH_NODES, _BATCH_BUFFERS, _BATCH_COMPRESSION = range(4)
_SCHEMA_ENDIANNESS, _SCHEMA_FIELDS, _SCHEMA_METADATA = range(3)
_FIELD_CHILDREN, _FIELD_METADATA = 5, 6
_KEY, _VALUE = range(2)
_VERSION_5: Final = 4
_SCHEMA_HEADER: Final = 1
_BATCH_HEADER: Final = 3


class ArrowMessageError(ValueError):
    """Bytes that are not the uncompressed Arrow message that they should be."""


@dataclass(frozen=True, slots=True)
class _Envelope:
    """A message whose lengths were checked; ``stop`` is the offset of the byte after it."""

    metadata: memoryview
    header_type: int
    header: Table
    body_bytes: int
    stop: int


def read_batch(region: pa.Buffer, schema: pa.Schema) -> pa.RecordBatch:
    """Reads one record batch, without copying, from bytes that hold it and nothing else.

    Args:
        region: The whole message.
        schema: What the batch must hold: columns without nulls, each of a type with a fixed number of
            bytes or of strings.

    Returns:
        A batch that passed ``validate(full=True)`` (offsets in range, strings valid UTF-8) and has no
        nulls. Its number of rows is the caller's to compare.

    Raises:
        ArrowMessageError: The bytes are no such message.
    """
    envelope = _open_envelope(region, 0, MAX_BATCH_METADATA_BYTES)
    if envelope.stop != region.size:
        raise ArrowMessageError(f"the message ends at byte {envelope.stop}, not {region.size}")
    try:
        _check_batch(envelope)
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(region), schema)
        batch.validate(full=True)
    except (FlatBufferError, pa.ArrowException, OSError, EOFError) as error:
        raise ArrowMessageError(f"the record batch cannot be decoded ({first_line(error)})") from error
    return batch


def read_head(head: pa.Buffer, schema: pa.Schema) -> dict[bytes, bytes]:
    """Reads a file's bytes before its first record batch: the magic and the schema message.

    Args:
        head: Those bytes and nothing else.
        schema: Names, types and nullability that the file must have; metadata is not compared.

    Returns:
        The metadata of the file's schema.

    Raises:
        ArrowMessageError: The bytes are no such head, or the schema is another.
    """
    stop, metadata = _decode_head(head, schema)
    if stop != head.size:
        raise ArrowMessageError(f"the schema ends at byte {stop}, not {head.size}")
    return metadata


def read_file(data: pa.Buffer, schema: pa.Schema) -> tuple[dict[bytes, bytes], list[pa.RecordBatch]]:
    """Reads a whole Arrow IPC file, message after message; the footer is not asked where they lie.

    Args:
        data: The file.
        schema: As for ``read_head`` and ``read_batch``.

    Returns:
        The metadata of the file's schema, and its record batches.

    Raises:
        ArrowMessageError: The bytes are no such file, or leave a gap between or after its messages.
    """
    offset, metadata = _decode_head(data, schema)
    batches = []
    while not _is_end_mark(data, offset):
        envelope = _open_envelope(data, offset, MAX_BATCH_METADATA_BYTES)
        message = data.slice(offset, envelope.stop - offset)
        batches.append(read_batch(message, schema))
        offset = envelope.stop
    _check_trailer(data, offset + _PREFIX.size)
    return metadata, batches


def _open_envelope(data: pa.Buffer, offset: int, max_metadata_bytes: int) -> _Envelope:
    start = offset + _PREFIX.size
    if start > data.size:
        raise ArrowMessageError(f"the bytes end within a message that starts at byte {offset}")
    continuation, metadata_bytes = _PREFIX.unpack_from(data, offset)
    if continuation != _CONTINUATION:
        raise ArrowMessageError(f"no message starts at byte {offset}")
    if not 0 < metadata_bytes <= max_metadata_bytes or metadata_bytes % _ALIGNMENT:
        raise ArrowMessageError(f"the message at byte {offset} claims {metadata_bytes} bytes of metadata")
    if metadata_bytes > data.size - start:
        raise ArrowMessageError(f"the bytes end within the metadata of the message at byte {offset}")
    metadata = memoryview(data)[start : start + metadata_bytes]
    try:
        message = read_root(metadata)
        version = message.integer(_MESSAGE_VERSION, _SHORT)
        header_type = message.integer(_MESSAGE_HEADER_TYPE, _BYTE)
        header = message.table(_MESSAGE_HEADER)
        body_bytes = message.integer(_MESSAGE_BODY_LENGTH, _LONG)
    except FlatBufferError as error:
        raise ArrowMessageError(f"the message at byte {offset} is malformed ({error})") from error
    if version != _VERSION_5 or header is None:
        # Version 4 has another way to say that a body is compressed.
        raise ArrowMessageError(f"the message at byte {offset} has version {version + 1}, not 5")
    if not 0 <= body_bytes <= data.size - start - metadata_bytes or body_bytes % _ALIGNMENT:
        raise ArrowMessageError(f"the body of the message at byte {offset} claims {body_bytes} bytes")
    return _Envelope(metadata, header_type, header, body_bytes, start + metadata_bytes + body_bytes)


def _check_batch(envelope: _Envelope) -> None:
    """Refuses what Arrow would decompress, and lengths, nulls and buffers that cannot be."""
    if envelope.header_type != _BATCH_HEADER:
        raise ArrowMessageError(f"the message has type {envelope.header_type}, not that of a record batch")
    header = envelope.header
    if header.table(_BATCH_COMPRESSION) is not None:
        raise ArrowMessageError("the record batch is compressed")
    # Each row takes a byte at least: there are no columns of a type without width.
    if not 0 <= header.integer(_BATCH_LENGTH, _LONG) <= envelope.body_bytes:
        raise ArrowMessageError("the record batch claims more rows than it has bytes")
    if any(null_count for _, null_count in header.structs(_BATCH_NODES, _PAIR)):
        raise ArrowMessageError("the record batch has nulls")
    end = 0
    for offset, length in header.structs(_BATCH_BUFFERS, _PAIR):
        if offset % _ALIGNMENT or offset < end or not 0 <= length <= envelope.body_bytes - offset:
            raise ArrowMessageError("the buffers of the record batch overlap or leave its body")
        end = offset + length


def _decode_head(data: pa.Buffer, schema: pa.Schema) -> tuple[int, dict[bytes, bytes]]:
    """Returns where the schema message ends, and the schema's metadata."""
    if data.slice(0, min(MAGIC_BYTES, data.size)).to_pybytes() != MAGIC.ljust(MAGIC_BYTES, b"\0"):
        raise ArrowMessageError("the bytes do not start as an Arrow IPC file")
    envelope = _open_envelope(data, MAGIC_BYTES, MAX_SCHEMA_METADATA_BYTES)
    if envelope.header_type != _SCHEMA_HEADER or envelope.body_bytes:
        raise ArrowMessageError("the first message is no schema")
    try:
        metadata = _check_schema(envelope, schema)
        found = pa.ipc.read_schema(data.slice(MAGIC_BYTES, envelope.stop - MAGIC_BYTES))
    except (FlatBufferError, pa.ArrowException, OSError, EOFError) as error:
        raise ArrowMessageError(f"the schema cannot be decoded ({first_line(error)})") from error
    if not found.equals(schema, check_metadata=False):
        raise ArrowMessageError(f"the columns are not {_describe(schema)}")
    return envelope.stop, metadata


def _check_schema(envelope: _Envelope, schema: pa.Schema) -> dict[bytes, bytes]:
    """Refuses what Arrow would unfold: more fields than expected, or one string in many places."""
    header = envelope.header
    if header.integer(_SCHEMA_ENDIANNESS, _SHORT):
        raise ArrowMessageError("the numbers are big-endian")
    metadata = _read_metadata(header, _SCHEMA_METADATA)
    _check_fields(header, _SCHEMA_FIELDS, list(schema))
    return metadata


def _check_fields(parent: Table, index: int, expected: list[pa.Field]) -> None:
    if parent.num_tables(index) != len(expected):
        raise ArrowMessageError(f"the schema has {parent.num_tables(index)} columns, not {len(expected)}")
    for table, field in zip(parent.tables(index), expected, strict=True):
        _read_metadata(table, _FIELD_METADATA)
        children = [field.type.field(child) for child in range(field.type.num_fields)]
        _check_fields(table, _FIELD_CHILDREN, children)


def _read_metadata(table: Table, index: int) -> dict[bytes, bytes]:
    if table.num_tables(index) > MAX_METADATA_ENTRIES:
        raise ArrowMessageError(f"the schema has more than {MAX_METADATA_ENTRIES} entries of metadata")
    metadata: dict[bytes, bytes] = {}
    # Entries may share their bytes: what Arrow copies of them could be many times the message.
    free_bytes = len(table.data)
    for pair in table.tables(index):
        key, value = pair.string(_KEY), pair.string(_VALUE)
        free_bytes -= len(key) + len(value)
        if free_bytes < 0 or bytes(key) in metadata:
            raise ArrowMessageError("the metadata of the schema repeats itself")
        metadata[bytes(key)] = bytes(value)
    return metadata


def _check_trailer(data: pa.Buffer, footer: int) -> None:
    start = data.size - _TRAILER.size
    if start < footer or _TRAILER.unpack_from(data, start) != (start - footer, MAGIC):
        raise ArrowMessageError("the file does not end with a footer of the length that it states")


def _is_end_mark(data: pa.Buffer, offset: int) -> bool:
    mark: bytes = data.slice(offset, min(_PREFIX.size, data.size - offset)).to_pybytes()
    return mark == _END_MARK


def _describe(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
