"""The language recipe's corpora: documents of plain text, or conversations.

Invariants (tests/schemas/test_language.py):
    1. A corpus reads either texts or messages, and what masks is known to be masked.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from schemas.corpus import FilePart, HubPart, PartBase
from schemas.fields import Frozen


class TextFilePart(PartBase):
    """A plain text file, UTF-8, ``.txt`` or ``.txt.gz``.

    Attributes:
        path: Relative to ``data_root`` if that is set, else to the working directory.
        split: What is one document: ``whole`` the file, ``line`` each line that is not blank,
            ``paragraph`` lines up to a blank one, ``heading`` an article of WikiText: from one line
            `` = Title = `` to the next.
    """

    kind: Literal["text"]
    path: str
    split: Literal["whole", "line", "paragraph", "heading"] = "paragraph"


class DocstringsPart(PartBase):
    """The docstrings of Python's standard library, one document each: text that needs no download."""

    kind: Literal["docstrings"]
    split: Literal["train", "validation", "test"] = "train"


TextPart = Annotated[HubPart | FilePart | TextFilePart | DocstringsPart, Field(discriminator="kind")]


class TokenMask(Frozen):
    """Which tokens of a masked model's chunks are hidden: chosen once, and kept with the chunks.

    Attributes:
        share: Of the tokens that are no special ones; each is masked by itself.
        seed: Of the choice.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.15
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class TextCorpus(Frozen):
    """Ordered documents, which are cut into chunks of tokens.

    Attributes:
        text: Column of the text, for parts that have columns; ``text`` by default.
        messages: Column of the conversations instead: lists of ``{role, content}``. They are written in
            the tokenizer's chat template, and only what the assistant says counts in the loss.
        id: Column of unique document ids; by default the row's number.
        max_length: Most tokens of a chunk; documents are cut into consecutive pieces without overlap.
        add_special_tokens: Whether the tokenizer adds its special tokens to a document.
        mask: For the masked objective.
        on_bad_row: What to do with a chunk for which a teacher gives logits that are not numbers. Empty
            documents are left out and counted in any case.
    """

    text: str | None = None
    messages: str | None = None
    id: str | None = None
    max_length: Annotated[int, Field(ge=8)] = 512
    add_special_tokens: bool = True
    mask: TokenMask = Field(default_factory=TokenMask)
    on_bad_row: Literal["fail", "exclude"] = "fail"
    parts: Annotated[tuple[TextPart, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.text is not None and self.messages is not None:
            raise ValueError("give either text or messages")
        if self.messages is not None and any(part.kind in ("text", "docstrings") for part in self.parts):
            raise ValueError("messages: plain text has no column of conversations; use kind: file or hub")
        if any(part.text is not None and len(part.text) != 1 for part in self.parts):
            raise ValueError("a part of a text corpus has one text column")
        names = self.part_names()
        if len(set(names)) != len(names):
            raise ValueError(f"part names must be distinct, got {', '.join(names)}")
        return self

    @property
    def text_column(self) -> str:
        """Column of the text or of the conversations."""
        return self.messages or self.text or "text"

    def part_names(self) -> tuple[str, ...]:
        """Returns the name of each part: the given one, else its split of a data set, else by position."""
        return tuple(part.name or _split_name(part) or f"part{i}" for i, part in enumerate(self.parts))


def _split_name(part: PartBase) -> str | None:
    return part.split if isinstance(part, HubPart | DocstringsPart) else None
