"""Documents of a text corpus: hub data sets, files with columns, plain text and docstrings, written once.

A document is a row of ``rows.arrow`` as for classification, without a label: its text, or the JSON of a
conversation.

Invariants (tests/precompute/test_documents.py):
    1. Empty documents are left out, and each is named with its reason.
    2. What cannot be read or used is an error that names corpus, part, and row or column.
"""

from __future__ import annotations

import gzip
import itertools
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from precompute.corpus import PartSource
from precompute.corpus_rows import PartRows
from precompute.materialised import CORPORA_DIRECTORY, MaterialisedPart, PartOrigin, write_part
from precompute.pydocqa import build_documents
from precompute.row_choice import choose_rows, describe_cut
from schemas.digest import canonical_json
from schemas.rows import TEXT_HASH_BYTES, UNLABELLED, corpus_schema, hash_texts
from schemas.storage.os_errors import translated_os_errors
from schemas.text_corpus import DocstringsPart, TextCorpus, TextFilePart, TextPart

# One equals sign a side: sections have two or more.
_HEADING = re.compile(r"^ = [^=].*? = *$", re.MULTILINE)
_BLANK = re.compile(r"\n[ \t]*\n")
_EMPTY = "the document is empty"


def materialise_documents(
    name: str, corpus: TextCorpus, *, data_root: str | None, out: Path
) -> tuple[MaterialisedPart, ...]:
    """Reads a text corpus and writes each part once below ``<out>/corpora``.

    Arguments and results are those of ``precompute.corpus.materialise_corpus``; ``excluded`` names the
    empty documents.

    Raises:
        CorpusError: A part is missing, cannot be read, or has no document that can be used.
        ResourceError: The hub cannot be reached, or the disk is full or may not be written.
    """
    corpora = out / CORPORA_DIRECTORY
    with translated_os_errors(corpora):
        corpora.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=corpora, prefix=".reading-")
    found: list[MaterialisedPart] = []
    with scratch as directory:
        for part, part_name in zip(corpus.parts, corpus.part_names(), strict=True):
            reader = _DocumentReader(PartSource(name, part_name, data_root, directory), corpus)
            documents = reader.read(part)
            rows = _arrange(reader, part_name, documents, choose_rows(len(documents), part))
            origin = PartOrigin(name, part_name, describe_cut(part), (), (corpus.text_column,))
            found += write_part(rows, origin, out)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _DocumentReader:
    """One part of a corpus."""

    source: PartSource
    corpus: TextCorpus

    def read(self, part: TextPart) -> list[tuple[str, str]]:
        """Returns id, without the part's name, and text of each document, empty ones included."""
        if isinstance(part, DocstringsPart):
            try:
                return build_documents(part.split)
            except ValueError as error:
                raise self.source.fail(str(error)) from error
        if isinstance(part, TextFilePart):
            texts = _split(self._read_text(part.path), part.split)
            return [(str(row), text) for row, text in enumerate(texts)]
        dataset = self.source.read_dataset(part)
        column = part.text[0] if part.text is not None else self.corpus.text_column
        wanted = [column, *([self.corpus.id] if self.corpus.id else [])]
        missing = [name for name in wanted if name not in dataset.column_names]
        if missing:
            there = ", ".join(dataset.column_names) or "none"
            raise self.source.fail(f"has no column {', '.join(missing)}; its columns are {there}")
        # What lies behind the limit need not be well-formed.
        stop = None if part.limit is None else part.skip + part.limit
        values = dataset[column][:stop]
        ids = dataset[self.corpus.id][:stop] if self.corpus.id else range(len(values))
        convert = self._conversation if self.corpus.messages is not None else self._text
        return [
            (str(key), convert(value, row)) for row, (key, value) in enumerate(zip(ids, values, strict=True))
        ]

    def _read_text(self, name: str) -> str:
        path = self.source.find_file(name)
        try:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                return file.read()
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise self.source.fail(f"{path} cannot be read as UTF-8 text ({error})") from error

    def _text(self, value: Any, row: int) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.source.fail(f"row {row}: expected text, got {type(value).__name__}")
        return value

    def _conversation(self, value: Any, row: int) -> str:
        if not value:
            return ""
        if not isinstance(value, list) or not all(_is_message(message) for message in value):
            raise self.source.fail(
                f"row {row}: expected a list of messages, each with the texts role and content"
            )
        messages = [{"role": message["role"], "content": message["content"]} for message in value]
        return canonical_json(messages).decode()


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def _split(text: str, how: str) -> list[str]:
    if how == "whole":
        return [text]
    if how == "line":
        return [line for line in text.splitlines() if line.strip()]
    if how == "paragraph":
        return [piece for piece in _BLANK.split(text) if piece.strip()]
    starts = [match.start() for match in _HEADING.finditer(text)]
    bounds = [0, *(start for start in starts if start), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [piece for piece in pieces if piece.strip()]


def _arrange(
    reader: _DocumentReader,
    part: str,
    documents: Sequence[tuple[str, str]],
    numbers: npt.NDArray[np.int64],
) -> PartRows:
    """Puts the documents of those numbers into the layout of ``rows.arrow``."""
    chosen = [documents[number] for number in numbers.tolist()]
    ids = [f"{part}/{key}" for key, _ in chosen]
    repeated = _find_repeated(ids)
    if repeated is not None:
        raise reader.source.fail(f"document id {repeated!r} is there twice; ids must be unique")
    texts = [text for _, text in chosen]
    usable = [row for row, text in enumerate(texts) if text.strip()]
    if not usable:
        raise reader.source.fail("has no document that is not empty; give it texts, or leave it out")
    kept = [texts[row] for row in usable]
    table = pa.table(
        [
            pa.array(np.arange(len(usable))),
            pa.array([ids[row] for row in usable], pa.string()),
            pa.array([hash_texts([text]) for text in kept], pa.binary(TEXT_HASH_BYTES)),
            pa.array(kept, pa.large_string()),
            pa.array(np.full(len(usable), UNLABELLED, np.int32)),
        ],
        schema=corpus_schema(1),
    )
    excluded = tuple(
        (int(numbers[row]), ids[row], _EMPTY) for row in range(len(texts)) if not texts[row].strip()
    )
    return PartRows(table, numbers[usable], excluded)


def _find_repeated(ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for example_id in ids:
        if example_id in seen:
            return example_id
        seen.add(example_id)
    return None
