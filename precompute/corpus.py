"""Reading a corpus: hub data sets, local files and the built-in pairs, written once as ``rows.arrow``.

Only this module imports ``datasets``.

Invariants (tests/precompute/test_corpus.py, test_corpus_append.py, test_retrieved_part.py):
    1. Every kind of file gives the same rows for the same content.
    2. Example ids are unique over all parts of a corpus.
    3. What cannot be read or used is an error that names corpus, part, and row or column.
    4. Retrieved pairs are unlabelled, and named by the row numbers of their texts in the whole source.
"""

from __future__ import annotations

import csv
import gzip
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetsError

from precompute.corpus_rows import PartRows, SourceTable, arrange_rows
from precompute.materialised import CORPORA_DIRECTORY, MaterialisedPart, PartOrigin, write_part
from precompute.pydocqa import build_pairs
from precompute.retrieval import retrieve_pairs
from precompute.row_choice import choose_rows, describe_cut
from schemas.corpus import RetrievedPart
from schemas.errors import CorpusError, ResourceError, first_line
from schemas.recipe import Corpus, FilePart, HubPart, Part, PydocqaPart
from schemas.storage.os_errors import translated_os_errors

__all__ = ["MaterialisedPart", "materialise_corpus"]

_BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
}
_COMPRESSIBLE = {".jsonl", ".json", ".csv", ".tsv"}
# Of retrieved pairs.
_PAIR_COLUMNS = ("question", "passage")


def materialise_corpus(
    name: str, corpus: Corpus, *, data_root: str | None, out: Path
) -> tuple[MaterialisedPart, ...]:
    """Reads a corpus and writes each part once below ``<out>/corpora``.

    Args:
        name: Name of the corpus in the recipe.
        corpus: Its description.
        data_root: Directory of local data; it turns a hub part's ``mirror`` on.
        out: The recipe's output root.

    Returns:
        The parts in order; a part whose source was appended to since gives more than one.

    Raises:
        CorpusError: A part is missing, cannot be read, or holds what cannot be used.
        ResourceError: The hub cannot be reached, or the disk is full or may not be written.
    """
    corpora = out / CORPORA_DIRECTORY
    arranged: list[tuple[PartOrigin, PartRows]] = []
    with translated_os_errors(corpora):
        corpora.mkdir(parents=True, exist_ok=True)
        # The cache of `datasets` lives only for this call: rows.arrow is what is kept.
        scratch = tempfile.TemporaryDirectory(dir=corpora, prefix=".reading-")
    with scratch as directory:
        for part, part_name in zip(corpus.parts, corpus.part_names(), strict=True):
            reader = PartSource(name, part_name, data_root, directory)
            origin = PartOrigin(name, part_name, describe_cut(part), corpus.labels, corpus.text)
            arranged.append((origin, reader.read_rows(part, corpus)))
        _refuse_duplicates(name, [rows for _, rows in arranged])
        return tuple(part for origin, rows in arranged for part in write_part(rows, origin, out))


def _columns_of(part: Part, corpus: Corpus) -> Corpus:
    """Returns the corpus as this part's source spells it."""
    if isinstance(part, RetrievedPart):
        return corpus.model_copy(update={"text": _PAIR_COLUMNS, "label": None})
    label = None if part.unlabelled else corpus.label
    return corpus.model_copy(update={"text": part.text or corpus.text, "label": label})


class PartSource:
    """Reads one part's source."""

    def __init__(self, corpus: str, part: str, data_root: str | None, scratch: str) -> None:
        self._corpus = corpus
        self._part = part
        self._data_root = data_root
        self._scratch = scratch

    def read_rows(self, part: Part, corpus: Corpus) -> PartRows:
        """Reads the rows that a part uses.

        Raises:
            CorpusError: Its source is missing or cannot be read, or holds what cannot be used.
            ResourceError: The hub cannot be reached, or bm25s is missing.
        """
        columns = _columns_of(part, corpus)
        source = self._retrieve(part, corpus) if isinstance(part, RetrievedPart) else self.read(part, columns)
        source = source.choose(choose_rows(source.table.num_rows, part))
        return arrange_rows(source, columns, self._corpus, self._part)

    def read(self, part: FilePart | HubPart | PydocqaPart, corpus: Corpus) -> SourceTable:
        """Reads the source as a table.

        Raises:
            CorpusError: It is missing or cannot be read.
            ResourceError: The hub cannot be reached.
        """
        if isinstance(part, PydocqaPart):
            return self._read_pydocqa(part)
        dataset = self.read_dataset(part)
        table = dataset.with_format("arrow")[:]
        feature = dataset.features.get(corpus.label) if corpus.label else None
        names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
        return SourceTable(table, corpus.id, names)

    def read_dataset(self, part: FilePart | HubPart) -> Any:
        """Reads a part's file, or its split of a data set on the hub.

        Raises:
            CorpusError: It is missing or cannot be read.
            ResourceError: The hub cannot be reached.
        """
        if isinstance(part, FilePart):
            return self._read_file(part.path)
        if self._data_root is not None and part.mirror is not None:
            return self._read_file(part.mirror)
        return self._read_hub(part)

    def find_file(self, name: str) -> Path:
        """Returns the path of a local file.

        Raises:
            CorpusError: There is none.
        """
        path = Path(name).expanduser()
        if self._data_root is not None:
            path = Path(self._data_root).expanduser() / path
        if not path.is_file():
            hint = "" if self._data_root is not None else "; paths are relative to data_root if that is set"
            raise self.fail(f"there is no file {path}{hint}")
        return path

    def _read_file(self, name: str) -> Any:
        path = self.find_file(name)
        suffixes = path.suffixes
        compressed = suffixes[-1:] == [".gz"]
        suffix = "".join(suffixes[-2:-1] if compressed else suffixes[-1:]).lower()
        if suffix not in _BUILDERS or (compressed and suffix not in _COMPRESSIBLE):
            kinds = ", ".join(f"{kind}(.gz)" if kind in _COMPRESSIBLE else kind for kind in _BUILDERS)
            raise self.fail(f"{path}: its kind is unknown; expected {kinds}")
        if path.stat().st_size == 0:
            raise self.fail(f"{path} is empty")
        try:
            options = _csv_options(path, suffix, compressed) if _BUILDERS[suffix] == "csv" else {}
            return self._load(_BUILDERS[suffix], data_files=str(path), split="train", **options)
        except (DatasetsError, OSError, ValueError, pa.ArrowException, StopIteration, EOFError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno is not None:
                with translated_os_errors(Path(self._scratch).parent):
                    raise cause from None
            if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
                raise self.fail(f"{path} holds no rows") from error
            raise self.fail(f"{path} cannot be read ({first_line(cause)})") from error

    def _read_hub(self, part: HubPart) -> Any:
        where = f"{part.repo}{f' ({part.config})' if part.config else ''}"
        try:
            return self._load(part.repo, part.config, split=part.split, revision=part.revision)
        except (DatasetsError, OSError, ValueError) as error:
            line = first_line(error)
            unreachable = isinstance(error, OSError) and not isinstance(error, DatasetsError)
            if unreachable or "find cache" in line:
                raise ResourceError(
                    f"corpus {self._corpus}/{self._part}: {where} cannot be fetched from the hub ({line}); "
                    "give data_root and the part's mirror to read a local copy"
                ) from error
            raise self.fail(f"{where}, split {part.split}, cannot be read ({line})") from error

    def _read_pydocqa(self, part: PydocqaPart) -> SourceTable:
        try:
            pairs = build_pairs(part.split, passages_per_question=part.passages_per_question)
        except ValueError as error:
            raise self.fail(f"{error}; pydocqa wants a Python whose library lies in files") from error
        columns = {
            # The part's name takes the split's place in the ids.
            "id": pa.array([pair.example_id.removeprefix(f"{part.split}/") for pair in pairs]),
            "question": pa.array([pair.question for pair in pairs]),
            "passage": pa.array([pair.passage for pair in pairs]),
            "label": pa.array([pair.label for pair in pairs], pa.int32()),
        }
        return SourceTable(pa.table(columns), "id", ())

    def _retrieve(self, part: RetrievedPart, corpus: Corpus) -> SourceTable:
        """Returns the new pairs, named by the row numbers of question and passage in the whole source."""
        rows = self.read_rows(part.source, corpus.model_copy(update={"label": None, "id": None}))
        questions, passages = rows.table.column("text_0"), rows.table.column("text_1")
        pairs = retrieve_pairs(questions.to_pylist(), passages.to_pylist(), part.top)
        if not len(pairs.scores):
            raise self.fail("no question shares a word with a passage that it is not paired with already")
        numbers = [rows.source_rows[found].tolist() for found in (pairs.question_rows, pairs.passage_rows)]
        ids = [f"{question}-{passage}" for question, passage in zip(*numbers, strict=True)]
        texts = (questions.take(pa.array(pairs.question_rows)), passages.take(pa.array(pairs.passage_rows)))
        table = pa.table([pa.array(ids), *texts], names=["id", *_PAIR_COLUMNS])
        return SourceTable(table, "id")

    def _load(self, *names: str | None, **options: Any) -> Any:
        # Bars of `datasets` would mix with those of the run.
        datasets.disable_progress_bars()
        if "data_files" in options:
            options["cache_dir"] = self._scratch
        return datasets.load_dataset(*names, **options)

    def fail(self, message: str) -> CorpusError:
        """Returns an error that names the part."""
        return CorpusError(message, corpus=self._corpus, part=self._part)


def _csv_options(path: Path, suffix: str, compressed: bool) -> dict[str, Any]:
    """Returns options that read every cell as the text that it is.

    Without them a sentence "None" becomes null and a column of numbers loses its zeros. Tabs
    separate without quoting: GLUE's and SNLI's files hold unbalanced quotes.
    """
    dialect: dict[str, Any] = {"delimiter": ","}
    if suffix == ".tsv":
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    opener = gzip.open if compressed else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file, **dialect), [])
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return {**dialect, "keep_default_na": False, "features": features}


def _refuse_duplicates(name: str, parts: list[PartRows]) -> None:
    ids = pa.chunked_array([chunk for part in parts for chunk in part.table.column("example_id").chunks])
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        first = repeated[0].as_py()
        message = f"example id {first['values']!r} occurs {first['counts']} times"
        more = f" ({len(repeated)} ids are repeated)" if len(repeated) > 1 else ""
        raise CorpusError(f"{message}{more}; ids must be unique over all parts", corpus=name)
