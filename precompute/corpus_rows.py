"""A part's source table in the layout of ``rows.arrow``: ids, texts, golden labels, all checked.

Invariants (tests/precompute/test_corpus.py):
    1. An example id is the id column or the source's row number, whatever rows were excluded.
    2. A label is -1 or an index into the corpus's label names; names match by ``normalise``.
    3. No null text gets through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import CorpusError
from schemas.labels import normalise
from schemas.recipe import Corpus
from schemas.rows import TEXT_HASH_BYTES, UNLABELLED, corpus_schema, hash_texts

_HASH_ROWS = 16384


@dataclass(frozen=True, slots=True)
class SourceTable:
    """What a part's source holds.

    Attributes:
        table: Its columns and rows, as they are.
        id_column: Column of unique ids, or None: row numbers.
        class_names: The source's own names of its integer labels, where it has any.
        row_numbers: Of the table's rows in the whole source, int64; None: it is the whole source.
    """

    table: pa.Table
    id_column: str | None
    class_names: tuple[str, ...] = ()
    row_numbers: npt.NDArray[np.int64] | None = None

    def choose(self, rows: npt.NDArray[np.int64]) -> SourceTable:
        """Returns some of the source's rows, which keep their numbers."""
        if len(rows) == self.table.num_rows:
            return self
        return replace(self, table=self.table.take(pa.array(rows)), row_numbers=rows)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """Number in the whole source of each of the table's rows, int64."""
        return np.arange(self.table.num_rows) if self.row_numbers is None else self.row_numbers


@dataclass(frozen=True, slots=True)
class PartRows:
    """Usable rows of a part.

    Attributes:
        table: N rows in the layout of ``corpus_schema``.
        source_rows: Row number of each in the source, ``[N]``, ascending.
        excluded: Source row, example id and reason of each row that was left out.
    """

    table: pa.Table
    source_rows: npt.NDArray[np.int64]
    excluded: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True, slots=True)
class _PartReader:
    """One part, as errors name it."""

    corpus: Corpus
    corpus_name: str
    part_name: str

    def fail(self, message: str) -> CorpusError:
        return CorpusError(message, corpus=self.corpus_name, part=self.part_name)


def arrange_rows(source: SourceTable, corpus: Corpus, corpus_name: str, part_name: str) -> PartRows:
    """Puts a source table into the layout of ``rows.arrow``.

    Args:
        source: The part's source.
        corpus: Columns, label names and what to do with null texts.
        corpus_name: Name of the corpus in the recipe.
        part_name: Prefix of the example ids.

    Raises:
        CorpusError: A column is missing or has another type, a text or id is null, a label is not
            in the map, or no row is left.
    """
    reader = _PartReader(corpus, corpus_name, part_name)
    table = source.table
    wanted = [*corpus.text, *([corpus.label] if corpus.label else []), *filter(None, [source.id_column])]
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        there = ", ".join(table.column_names) or "none"
        hint = "; set label: null if all rows are unlabelled" if missing == [corpus.label] else ""
        raise reader.fail(f"has no column {', '.join(missing)}; its columns are {there}{hint}")
    ids = _read_ids(reader, source)
    usable_R, excluded = _find_usable(reader, source, ids)
    usable = np.flatnonzero(usable_R)
    if not len(usable):
        raise reader.fail("has no usable rows")
    if excluded:
        table, ids = table.take(pa.array(usable)), ids.take(pa.array(usable))
    texts = [_read_text(reader, table, name) for name in corpus.text]
    labels = _read_labels(reader, table, ids, source.class_names)
    columns = [pa.array(np.arange(len(usable))), ids, _hash_columns(texts), *texts, labels]
    return PartRows(pa.table(columns, schema=corpus_schema(len(texts))), source.numbers[usable], excluded)


def _read_ids(reader: _PartReader, source: SourceTable) -> pa.ChunkedArray:
    table, column = source.table, source.id_column
    if column is None:
        values = pa.chunked_array([pa.array(source.numbers)])
    else:
        values = table.column(column)
        if values.null_count:
            row = pc.index(pc.is_null(values), True).as_py()
            raise reader.fail(f"column {column} is null in row {row}; ids must be given and unique")
        if not (_is_text(values.type) or pa.types.is_integer(values.type)):
            raise reader.fail(f"column {column} holds {values.type}, ids are text or integers")
    return pc.binary_join_element_wise(f"{reader.part_name}/", values.cast(pa.string()), "")


def _find_usable(
    reader: _PartReader, source: SourceTable, ids: pa.ChunkedArray
) -> tuple[npt.NDArray[np.bool_], tuple[tuple[int, str, str], ...]]:
    table, numbers = source.table, source.numbers
    usable_R = np.ones(table.num_rows, bool)
    excluded: dict[int, tuple[int, str, str]] = {}
    for name in reader.corpus.text:
        nulls_R = pc.is_null(table.column(name)).to_numpy()
        for row in np.flatnonzero(nulls_R).tolist():
            reason = f"text column {name} is null"
            if reader.corpus.on_bad_row == "fail":
                raise reader.fail(f"row {ids[row]}: {reason}; set on_bad_row: exclude to leave such rows out")
            excluded.setdefault(row, (int(numbers[row]), ids[row].as_py(), reason))
        usable_R &= ~nulls_R
    return usable_R, tuple(excluded[row] for row in sorted(excluded))


def _read_text(reader: _PartReader, table: pa.Table, name: str) -> pa.ChunkedArray:
    values = table.column(name)
    if not _is_text(values.type):
        raise reader.fail(f"column {name} holds {values.type}, expected text")
    return values.cast(pa.large_string())


def _read_labels(
    reader: _PartReader, table: pa.Table, ids: pa.ChunkedArray, class_names: Sequence[str]
) -> pa.Array:
    if reader.corpus.label is None:
        return pa.array(np.full(table.num_rows, UNLABELLED, np.int32))
    values = table.column(reader.corpus.label)
    if pa.types.is_nested(values.type):
        raise reader.fail(f"column {reader.corpus.label} holds {values.type}, expected one label a row")
    encoded = values.combine_chunks().dictionary_encode(null_encoding="encode")
    distinct = encoded.dictionary.to_pylist()
    found = [_find_label(value, reader.corpus.labels, class_names) for value in distinct]
    for position, label in enumerate(found):
        if label is None:
            row = pc.index(encoded.indices, position).as_py()
            known = ", ".join(f"{i} {name}" for i, name in enumerate(reader.corpus.labels))
            raise reader.fail(f"row {ids[row]}: label {distinct[position]!r} is not one of {known}, or -1")
    indices = encoded.indices.to_numpy(zero_copy_only=False)
    return pa.array(np.array(found, np.int32)[indices])


def _find_label(value: object, labels: Sequence[str], class_names: Sequence[str]) -> int | None:
    """Returns the index of a label, -1 if it says unlabelled, or None if it is none."""
    positions = {normalise(name): i for i, name in enumerate(labels)}
    if value is None or value == "":
        return UNLABELLED
    if isinstance(value, str):
        if normalise(value) in positions:
            return positions[normalise(value)]
        return _find_label(int(value), labels, ()) if value.removeprefix("-").isdecimal() else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        return None
    number = int(value)
    if {normalise(name) for name in class_names} == set(positions) and 0 <= number < len(class_names):
        # The source names its integers: matched by name, not by position.
        return positions[normalise(class_names[number])]
    return number if UNLABELLED <= number < len(labels) else None


def _hash_columns(texts: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    chunks = []
    for start in range(0, len(texts[0]), _HASH_ROWS):
        columns = [column.slice(start, _HASH_ROWS).to_pylist() for column in texts]
        hashes = [hash_texts(row) for row in zip(*columns, strict=True)]
        chunks.append(pa.array(hashes, pa.binary(TEXT_HASH_BYTES)))
    return pa.chunked_array(chunks)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return bool(
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
        or pa.types.is_null(type_)
    )
