"""The built-in corpus `pydocqa`: question-passage relevance from the standard library's docstrings.

It stands in for the web question answering data of the TMKD paper (Yang et al., WSDM 2020) where
nothing can be downloaded. Every documented symbol of the Python that runs this gives one question,
made from its qualified name, and one relevant passage, the first sentence of its docstring.
An irrelevant passage is one of the ten closest: its own module first, then its package, then all
others, each by overlap with the words of the question's name.

Invariants (tests/precompute/test_pydocqa.py):
1. The pairs are a pure function of the library's files: sorted walk, SHA-256 order, no `hash()`
   (test_pairs_are_the_same_in_another_process).
2. No question and no passage of an evaluation split occurs in any other split
   (test_no_question_and_no_passage_is_in_two_splits).
3. Library files are parsed, never imported (test_library_files_are_parsed_and_never_imported).
"""

import ast
import hashlib
import math
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "unlabelled", "validation", "test")
LABELS = ("relevant", "irrelevant")

RELEVANT, IRRELEVANT, UNLABELLED = 0, 1, -1

NUM_FOLDS = 12
# Every fold holds 1/12 of the symbols. Negatives are drawn inside one fold only: the pool that a
# training question draws from is then as large as that of an evaluation question, and training
# negatives are as hard as those of the evaluation.
FOLDS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 9))}
EVALUATION_FOLDS = FOLDS["test"] + FOLDS["validation"]
# A negative is one of this many closest passages, drawn by digest: always taking the very closest
# would make a large overlap the mark of an irrelevant passage.
NUM_CLOSE = 10
NUM_NEGATIVES = {"train": 1, "validation": 1, "test": 1}

SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings"}
    | {"pydoc_data", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
MIN_WORDS, MAX_WORDS = 3, 50

TEMPLATES = {
    "module": ("What is the {place} module for?", "What does the {place} module provide?"),
    "class": ("What is {name} in {place}?", "What is the {place} class {name} for?"),
    "function": ("What does {name} in {place} do?", "What is the {place} function {name} for?"),
    "method": ("What does {name} of {place} do?", "What is the {place} method {name} for?"),
}

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"'`(<*])")
_CALL = re.compile(r"(?:\([^()]*\)\s*=\s*)?[A-Za-z_<][\w.<>]*\(")  # Also `(a, b) = <self>.f(`.
_RESULT = re.compile(r"\s*-+>\s*")
_SEPARATOR = re.compile(r"\s*(?:--+|[:=-](?=\s|$)|\.(?=\s|$)|$)\s*")


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with one passage.

    Attributes:
        example_id: Unique, `<split>/<qualified name>/<number>`.
        question: A question made from a symbol's qualified name.
        passage: The first sentence of a symbol's docstring.
        label: Index into `LABELS` (0 relevant, 1 irrelevant), or -1 in `unlabelled`.
    """

    example_id: str
    question: str
    passage: str
    label: int


@dataclass(frozen=True, slots=True)
class _Symbol:
    """A documented module, class or function, with its question and its passage."""

    module: str
    path: tuple[str, ...]
    kind: str
    passage: str

    @property
    def qualified_name(self) -> str:
        return ".".join((self.module, *self.path))

    @property
    def digest(self) -> bytes:
        return _digest(self.qualified_name)

    @property
    def fold(self) -> int:
        return int.from_bytes(self.digest[:8], "big") % NUM_FOLDS

    @property
    def question(self) -> str:
        templates = TEMPLATES[self.kind]
        names = (self.module.split(".")[-1], *self.path)
        place = names[-2] if self.path else self.module
        name = " ".join(_split_words(names[-1]))
        template = templates[self.digest[8] % len(templates)]
        return template.format(name=name, place=" ".join(_split_words(place)))


def build_pairs(split: str, *, passages_per_question: int = 20, stdlib_dir: Path | None = None) -> list[Pair]:
    """Builds one split of `pydocqa`.

    `train`, `validation` and `test` are balanced: each question comes with its passage and with
    one hard negative, so that the larger class has a share of 0.5. `unlabelled` pairs each question
    that is in no evaluation split with its closest passages by BM25. All splits are in a fixed
    pseudo-random order, so that the first n rows are a sample; in `train` a question's rows lie
    side by side.

    Args:
        split: One of `SPLITS`.
        passages_per_question: Passages for each question of `unlabelled`, at least 1; the other
            splits do not depend on it.
        stdlib_dir: The library to read; the running Python's by default.

    Returns:
        The pairs, with unique ids.

    Raises:
        ValueError: If the split is unknown, `passages_per_question` is not positive, or the
            directory has no documented Python files.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown pydocqa split {split!r}: expected one of {', '.join(SPLITS)}")
    if passages_per_question < 1:
        raise ValueError(f"passages_per_question is {passages_per_question}: expected at least 1")
    directory = stdlib_dir or Path(sysconfig.get_paths()["stdlib"])
    symbols = _load_symbols(directory)
    if not symbols:
        raise ValueError(f"no documented Python files in the library directory {directory}")
    if split == "unlabelled":
        return _pair_unlabelled(symbols, passages_per_question)
    return _pair_labelled(symbols, split)


def build_documents(split: str, *, stdlib_dir: Path | None = None) -> list[tuple[str, str]]:
    """Returns the library's documented symbols as plain text, each its qualified name and docstring.

    Modules lie in one split as a whole; equal texts are there once. The order is fixed and
    pseudo-random, as for the pairs.

    Args:
        split: ``train``, ``validation`` or ``test``.
        stdlib_dir: The library to read; the running Python's by default.

    Returns:
        Unique id and text of each.

    Raises:
        ValueError: If the split is unknown, or the directory has no documented Python files.
    """
    if split not in FOLDS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(FOLDS)}")
    directory = stdlib_dir or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, tuple[str, str]] = {}
    for module, tree in _parse_modules(directory):
        fold = int.from_bytes(_digest(module.split(".")[0])[:8], "big") % NUM_FOLDS
        # The folds that the pairs leave unlabelled are more text to train on.
        is_evaluation = fold in EVALUATION_FOLDS
        if is_evaluation != (split != "train") or (is_evaluation and fold not in FOLDS[split]):
            continue
        for path, _, docstring in _walk_docstrings(tree, ()):
            name = ".".join((module, *path))
            if docstring.strip() and docstring not in found:
                found[docstring] = (name, f"{name}\n\n{docstring.strip()}\n")
    if not found:
        raise ValueError(f"no documented Python files in the library directory {directory}")
    # Of two symbols with one name (in branches of an if) the first counts.
    documents = dict(reversed(found.values()))
    return sorted(documents.items(), key=lambda item: _digest(item[0]))


def _pair_labelled(symbols: Sequence[_Symbol], split: str) -> list[Pair]:
    """Pairs each question of a labelled split with its passage and with hard negatives."""
    pairs: list[tuple[bytes, Pair]] = []
    for fold in FOLDS[split]:
        pool = [symbol for symbol in symbols if symbol.fold == fold]
        index = _LexicalIndex([symbol.passage for symbol in pool])
        for position, symbol in enumerate(pool):
            scores = index.score(_split_words(symbol.qualified_name))
            scores += [_proximity(symbol, other) for other in pool]
            ranked = [i for i in np.argsort(-scores, kind="stable") if i != position]
            close = [pool[i] for i in ranked[:NUM_CLOSE]]
            close.sort(key=lambda other: _digest(symbol.qualified_name + other.qualified_name))
            for number, other in enumerate([symbol, *close[: NUM_NEGATIVES[split]]]):
                pair = Pair(
                    example_id=f"{split}/{symbol.qualified_name}/{number}",
                    question=symbol.question,
                    passage=other.passage,
                    label=RELEVANT if number == 0 else IRRELEVANT,
                )
                pairs.append((_digest(symbol.question), pair))
    return [pair for _, pair in sorted(pairs, key=lambda item: item[0])]


def _pair_unlabelled(symbols: Sequence[_Symbol], passages_per_question: int) -> list[Pair]:
    """Pairs each question outside the evaluation splits with its closest passages."""
    pool = [symbol for symbol in symbols if symbol.fold not in EVALUATION_FOLDS]
    index = _LexicalIndex([symbol.passage for symbol in pool])
    pairs = []
    for symbol in pool:
        scores = index.score(_split_words(symbol.qualified_name))
        ranked = np.argsort(-scores, kind="stable")[:passages_per_question]
        for number, i in enumerate(ranked):
            example_id = f"unlabelled/{symbol.qualified_name}/{number}"
            pairs.append(Pair(example_id, symbol.question, pool[i].passage, UNLABELLED))
    return sorted(pairs, key=lambda pair: _digest(pair.example_id))


def _proximity(symbol: _Symbol, other: _Symbol) -> float:
    """Puts passages of the symbol's module before those of its package, and these before others."""
    if other.module == symbol.module:
        return 2000.0
    return 1000.0 if other.module.split(".")[0] == symbol.module.split(".")[0] else 0.0


class _LexicalIndex:
    """BM25 over a list of passages.

    Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009,
    equation 3.15, with k1 = 1.2 and b = 0.75; inverse document frequency plus one, never negative.
    """

    K1 = 1.2
    B = 0.75

    def __init__(self, passages: Sequence[str]) -> None:
        tokens = [_split_words(passage) for passage in passages]
        self._num_passages = len(passages)
        mean_length = max(1.0, sum(map(len, tokens)) / max(1, len(tokens)))
        postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for position, words in enumerate(tokens):
            length = self.K1 * (1 - self.B + self.B * len(words) / mean_length)
            for word, count in Counter(words).items():
                postings[word].append((position, count * (self.K1 + 1) / (count + length)))
        self._postings: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
        for word, entries in postings.items():
            num = len(entries)
            idf = math.log(1 + (self._num_passages - num + 0.5) / (num + 0.5))
            positions = np.array([position for position, _ in entries], dtype=np.int64)
            weights = np.array([weight for _, weight in entries], dtype=np.float64) * idf
            self._postings[word] = (positions, weights)

    def score(self, words: Sequence[str]) -> NDArray[np.float64]:
        """Returns each passage's score for the distinct words of a query, float64, at least 0."""
        scores = np.zeros(self._num_passages, dtype=np.float64)
        for word in dict.fromkeys(words):
            if word in self._postings:
                positions, weights = self._postings[word]
                scores[positions] += weights
        # Rounded, so that passages of equal score tie on every machine.
        return scores.round(6)


@lru_cache(maxsize=2)
def _load_symbols(directory: Path) -> tuple[_Symbol, ...]:
    """Reads every usable symbol; of those that share a passage or a question, the first."""
    symbols = []
    seen: set[tuple[str, ...]] = set()
    for module, tree in _parse_modules(directory):
        for path, kind, docstring in _walk_docstrings(tree, ()):
            passage = _extract_first_sentence(docstring)
            if passage is None:
                continue
            symbol = _Symbol(module, path, kind, passage)
            keys = {("passage", *_split_words(passage)), ("question", symbol.question)}
            keys.add(("name", symbol.qualified_name))
            if keys.isdisjoint(seen):
                seen |= keys
                symbols.append(symbol)
    return tuple(symbols)


def _parse_modules(directory: Path) -> Iterator[tuple[str, ast.Module]]:
    """Parses the library's files in the order of their paths; unreadable syntax is left out."""
    files = [(file.relative_to(directory).parts, file) for file in directory.rglob("*.py")]
    for parts, file in sorted(files):
        if any(part in SKIPPED_DIRECTORIES or part.startswith("config-") for part in parts[:-1]):
            continue
        names = [*parts[:-1], file.stem]
        if names[-1] == "__init__" and len(names) > 1:
            names.pop()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Invalid escapes in other people's files.
            try:
                tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):
                continue
        yield ".".join(names), tree


def _walk_docstrings(
    node: ast.AST, path: tuple[str, ...], *, owner_is_class: bool = False
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yields path, kind and docstring of a module, its classes and functions; no local ones."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        is_class = isinstance(node, ast.ClassDef)
        kind = "class" if is_class else "method" if owner_is_class else "function"
        docstring = ast.get_docstring(node)
        if docstring:
            yield path, kind if path else "module", docstring
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        owner_is_class = is_class
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk_docstrings(child, (*path, child.name), owner_is_class=owner_is_class)
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from _walk_docstrings(child, path, owner_is_class=owner_is_class)


def _extract_first_sentence(docstring: str) -> str | None:
    """Returns a docstring's first sentence without signatures, or None if it has no usable one."""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = []
        for line in paragraph.splitlines():
            rest = _strip_signature(line.strip())
            if rest:
                lines.append(rest)
        text = " ".join(" ".join(lines).replace("`", "").split()).lstrip("+*- ")
        if text:
            break
    else:
        return None
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    num_words = len(_split_words(sentence))
    is_code = _CALL.match(sentence) or ">>>" in sentence or " " not in sentence
    if is_code or not MIN_WORDS <= num_words <= MAX_WORDS:
        return None
    return sentence


def _strip_signature(line: str) -> str:
    """Removes a leading `name(arguments) -> result` that stands for itself, with its separator."""
    if line.startswith("->"):
        return ""  # The second line of a long signature.
    call = _CALL.match(line)
    if call is None:
        return line
    end = _find_closing_bracket(line, call.end() - 1)
    if end is None:
        return line
    result = _RESULT.match(line, end)
    if result:
        _, dash, rest = line[result.end() :].partition(" -- ")
        return rest.strip() if dash else ""
    separator = _SEPARATOR.match(line, end)
    return line[separator.end() :].strip() if separator else line


def _find_closing_bracket(text: str, start: int) -> int | None:
    """Returns the position after the bracket that closes the one at `start`, or None."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    return None


def _split_words(text: str) -> list[str]:
    """Splits text and identifiers (`snake_case`, `camelCase`) into lower-case words."""
    return [word.lower() for word in _WORD.findall(text)]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
