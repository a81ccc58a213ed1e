"""The recipe's corpora: where rows come from and which columns are read."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.fields import Count, Frozen, Name
from schemas.labels import normalise


class Fold(Frozen):
    """A share of a part's rows for cross-validation: the rows of one fold, or those of all others.

    The rows are cut into ``of`` folds by a seeded permutation of their numbers; sizes differ by one at
    most.

    Attributes:
        of: How many folds there are.
        index: Which of them is held out, from 0; a sweep sets it with ``folds``.
        take: ``held_out``: the rows of that fold; ``rest``: all others.
        seed: Of the permutation.
    """

    of: Annotated[int, Field(ge=2)]
    index: Annotated[int, Field(ge=0)] = 0
    take: Literal["held_out", "rest"]
    seed: Annotated[int, Field(ge=0)] = 17

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index: there are folds 0 to {self.of - 1}, got {self.index}")
        return self


class PartBase(Frozen):
    """One ordered piece of a corpus.

    Attributes:
        name: Prefix of the example ids; by default ``part<position>``, or the split's name.
        skip: Leave out the first ``skip`` rows.
        limit: Use the first ``limit`` rows only (after ``skip``). It changes the plan: to use fewer rows
            of an existing store give ``rows`` in a stage instead.
        fold: A share of the rows (after ``skip`` and ``limit``), for cross-validation.
        text: The part's own names of the text columns, where they differ from the corpus's.
        unlabelled: Ignore the part's label column: its labels belong to another task.
    """

    name: Name | None = None
    skip: Annotated[int, Field(ge=0)] = 0
    limit: Count | None = None
    fold: Fold | None = None
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    unlabelled: bool = False


class HubPart(PartBase):
    """A split of a data set on the Hugging Face hub.

    Attributes:
        repo: Such as ``nyu-mll/glue``.
        config: Such as ``rte``.
        mirror: A file below the recipe's ``data_root`` that holds the same split; it is read
            instead of the hub when ``data_root`` is set.
    """

    kind: Literal["hub"]
    repo: str
    config: str | None = None
    split: str
    revision: str | None = None
    mirror: str | None = None


class FilePart(PartBase):
    """A local file: ``.jsonl``/``.json`` (also ``.gz``), ``.parquet``, ``.arrow``, ``.csv``, ``.tsv``.

    Attributes:
        path: Relative to ``data_root`` if that is set, else to the working directory.
    """

    kind: Literal["file"]
    path: str


class PydocqaPart(PartBase):
    """A split of the built-in corpus of question-passage pairs from Python's docstrings."""

    kind: Literal["pydocqa"]
    split: Literal["train", "unlabelled", "validation", "test"]
    passages_per_question: Count = 20


class RetrievedPart(PartBase):
    """New pairs of a source's own texts, found by lexical retrieval (BM25).

    Each distinct question (first text) of the source is paired with the passages (second texts) that rank
    highest for it, less the pairs that the source holds; a passage that shares no word with the question is
    none of them. All rows are unlabelled; ``skip``, ``limit`` and ``fold`` apply to the new pairs. Needs the
    extra ``retrieval``.

    Attributes:
        name: ``retrieved`` by default.
        source: Any other kind of part, with its own ``skip``, ``limit`` and ``text``. Not with a fold: rows
            that share a text with the held-out ones are dropped before training as it is.
        top: Passages of each question, at most.
    """

    kind: Literal["retrieved"]
    name: Name | None = "retrieved"
    source: Annotated[HubPart | FilePart | PydocqaPart, Field(discriminator="kind")]
    top: Count

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text is not None:
            raise ValueError("text: the columns are the source's; name them in source.text")
        if self.source.fold is not None:
            # A sweep sets the index of a part's own fold only: here it would stay at its first value.
            raise ValueError("source.fold: pairs are retrieved from a whole source; give the part a fold")
        return self


Part = Annotated[HubPart | FilePart | PydocqaPart | RetrievedPart, Field(discriminator="kind")]


class Corpus(Frozen):
    """Ordered rows of one task.

    Attributes:
        labels: Names in the order of the data's integer label ids.
        text: One or two text columns, in the order in which models read them.
        label: Column of the golden label (integer id, name, or -1 for unlabelled); None if all
            rows are unlabelled.
        id: Column of unique example ids; by default the row's number.
        question: The text column that groups rows for ranking (MRR); the positive class is then
            the first label.
        on_bad_row: What to do with a row whose text is null or whose logits are not finite.
    """

    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    text: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label: str | None = "label"
    id: str | None = None
    question: str | None = None
    on_bad_row: Literal["fail", "exclude"] = "fail"
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len({normalise(name) for name in self.labels}) != len(self.labels):
            raise ValueError("labels must be distinct, in more than case, spaces and hyphens")
        if self.question is not None and self.question not in self.text:
            raise ValueError("question must be one of the text columns")
        retrieved = [part for part in self.parts if isinstance(part, RetrievedPart)]
        if retrieved and len(self.text) != 2:
            raise ValueError("a part of kind retrieved pairs two texts; the corpus's text names one column")
        sources = [*self.parts, *(part.source for part in retrieved)]
        if any(part.text is not None and len(part.text) != len(self.text) for part in sources):
            raise ValueError("a part's text must name as many columns as the corpus's")
        names = self.part_names()
        if len(set(names)) != len(names):
            raise ValueError(f"part names must be distinct, got {', '.join(names)}")
        return self

    def part_names(self) -> tuple[str, ...]:
        """Returns the name of each part: the given one, else its split, else ``part<position>``."""
        return tuple(
            part.name or getattr(part, "split", None) or f"part{position}"
            for position, part in enumerate(self.parts)
        )
