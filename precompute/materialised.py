"""Materialised corpus parts on disk, and how an appended source keeps the part that was paid for.

``<out>/corpora/<fingerprint>-<labels and name>/`` holds ``rows.arrow`` and ``meta.json``, written last.

Invariants (tests/precompute/test_corpus_append.py):
    1. The same rows get the same directory, and what is there is compared, not trusted.
    2. A known part whose rows are a prefix of the new ones stays as it is; the rest is a part of
       its own, ``<part>+1``, ``<part>+2`` and so on. Example ids do not depend on the cut.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from precompute.corpus_rows import PartRows
from precompute.row_choice import Cut
from schemas.digest import DocumentError, hash_value, read_document, sync_directory, write_document
from schemas.errors import DataError
from schemas.rows import UNLABELLED, fingerprint_columns, open_rows
from schemas.storage.os_errors import translated_os_errors

CORPORA_DIRECTORY = "corpora"
ROWS_FILE = "rows.arrow"
META_FILE = "meta.json"
_CHUNK_ROWS = 65536


@dataclass(frozen=True)
class MaterialisedPart:
    """A corpus part on disk.

    Attributes:
        corpus: Name of the corpus in the recipe.
        part: Name of the part; a suffix of an appended source has ``+<number>``.
        rows_path: Its ``rows.arrow``.
        fingerprint: Over ordered example ids and text hashes (64 hex digits).
        labels_hash: SHA-256 over the golden labels, int32, little-endian (64 hex digits).
        num_rows: Usable rows.
        excluded: Example id and reason of each row that was left out.
        num_labelled: Rows with a golden label.
    """

    corpus: str
    part: str
    rows_path: Path
    fingerprint: str
    labels_hash: str
    num_rows: int
    excluded: tuple[tuple[str, str], ...]
    num_labelled: int


@dataclass(frozen=True, slots=True)
class PartOrigin:
    """Where rows come from.

    Attributes:
        corpus, part: Names in the recipe.
        cut: What of its source the part uses: parts that are cut otherwise are no prefix.
        labels: Label names of the corpus.
        text: Names of its text columns.
    """

    corpus: str
    part: str
    cut: Cut
    labels: tuple[str, ...]
    text: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``[start, stop)`` of the usable rows."""

    part: str
    start: int
    stop: int


def write_part(rows: PartRows, origin: PartOrigin, out: Path) -> tuple[MaterialisedPart, ...]:
    """Writes a part's rows, or finds them there; more than one part where its source was appended to.

    Args:
        rows: The usable rows.
        origin: Names, for the directory and its description.
        out: The recipe's output root.

    Raises:
        ResourceError: The disk is full or may not be written.
    """
    corpora = out / CORPORA_DIRECTORY
    pieces = _cut_pieces(rows.table, origin, corpora)
    with translated_os_errors(corpora):
        return tuple(_write_piece(rows, piece, origin, corpora) for piece in pieces)


def _cut_pieces(table: pa.Table, origin: PartOrigin, corpora: Path) -> list[_Piece]:
    known = list(_read_known(origin, corpora))
    pieces: list[_Piece] = []
    start = 0
    while start < table.num_rows:
        part = f"{origin.part}+{len(pieces)}" if pieces else origin.part
        rest = table.num_rows - start
        lengths = {
            meta["num_rows"]: meta["fingerprint"]
            for meta in known
            if meta["part"] == part and meta["start"] == start and meta["num_rows"] <= rest
        }
        for length in sorted(lengths, reverse=True):
            if _fingerprint(table.slice(start, length)) == lengths[length]:
                break
        else:
            length = rest
        pieces.append(_Piece(part, start, start + length))
        start += length
    return pieces


def _read_known(origin: PartOrigin, corpora: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(corpora.glob(f"*/{META_FILE}")):
        try:
            meta = read_document(path)
        except DocumentError:
            continue  # Damaged: the part is materialised again.
        # What the recipe calls the corpus changes no row: a renamed one that grew pays for no row twice.
        if (meta["source_part"], meta["limit"]) == (origin.part, origin.cut):
            yield meta


def _write_piece(rows: PartRows, piece: _Piece, origin: PartOrigin, corpora: Path) -> MaterialisedPart:
    num_rows = piece.stop - piece.start
    table = rows.table.slice(piece.start, num_rows)
    table = table.set_column(0, table.schema.field("ordinal"), pa.array(np.arange(num_rows)))
    fingerprint, labels_hash = _fingerprint(table), _hash_labels(table)
    directory = corpora / f"{fingerprint[:16]}-{_hash_origin(labels_hash, piece, origin)[:16]}"
    directory.mkdir(parents=True, exist_ok=True)
    part = MaterialisedPart(
        corpus=origin.corpus,
        part=piece.part,
        rows_path=directory / ROWS_FILE,
        fingerprint=fingerprint,
        labels_hash=labels_hash,
        num_rows=num_rows,
        excluded=_select_excluded(rows, piece),
        num_labelled=pc.sum(pc.not_equal(table.column("label"), UNLABELLED)).as_py(),
    )
    if not _holds(part.rows_path, table):
        _write_rows(part.rows_path, table)
    meta = {
        "corpus": origin.corpus,
        "source_part": origin.part,
        "part": piece.part,
        "limit": origin.cut,
        "start": piece.start,
        "num_rows": num_rows,
        "num_labelled": part.num_labelled,
        "fingerprint": fingerprint,
        "excluded": [list(row) for row in part.excluded],
        "labels": list(origin.labels),
        "text": list(origin.text),
    }
    write_document(directory / META_FILE, meta)
    return part


def _hash_origin(labels_hash: str, piece: _Piece, origin: PartOrigin) -> str:
    """Hashes what the fingerprint leaves out: labels and names."""
    names = [origin.corpus, origin.part, piece.part, origin.cut, list(origin.labels), list(origin.text)]
    return hash_value([*names, labels_hash])


def _hash_labels(table: pa.Table) -> str:
    labels_R = np.ascontiguousarray(table.column("label").to_numpy(), np.dtype("<i4"))
    return hashlib.sha256(labels_R.tobytes()).hexdigest()


def _select_excluded(rows: PartRows, piece: _Piece) -> tuple[tuple[str, str], ...]:
    """Returns the excluded rows that lie from the piece's first row to the next piece's."""
    last = piece.stop == rows.table.num_rows
    low = int(rows.source_rows[piece.start]) if piece.start else 0
    high = None if last else int(rows.source_rows[piece.stop])
    return tuple(
        (example_id, reason)
        for row, example_id, reason in rows.excluded
        if row >= low and (high is None or row < high)
    )


def _holds(path: Path, table: pa.Table) -> bool:
    if not path.exists():
        return False
    try:
        return bool(open_rows(path).equals(table))
    except DataError:
        return False


def _write_rows(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            writer = pa.ipc.new_file(file, table.schema)
            writer.write_table(table.combine_chunks(), max_chunksize=_CHUNK_ROWS)
            writer.close()
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _fingerprint(table: pa.Table) -> str:
    return fingerprint_columns(table.column("example_id"), table.column("text_hash"))
