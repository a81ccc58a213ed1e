"""The heads of a student: their names, their stacked linear layer, and ``heads.json``.

Shapes: B rows, H heads, C labels, D width of the layer below the heads.

Invariants:
    1. The initial weights of a head depend on the seed and its own name, not on the other heads
       (tests/distill/test_student.py::test_a_head_starts_the_same_whatever_other_heads_there_are).
    2. Heads are bound by name and label names; a label order is never taken for another
       (tests/distill/test_student.py::test_a_carried_head_follows_its_labels_to_their_new_order).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from schemas.digest import DocumentError, read_document, write_document
from schemas.errors import DataError
from schemas.labels import normalise
from schemas.recipe import Frozen

HEADS_FILE = "heads.json"


class HeadLayout(Frozen):
    """Which heads there are, and what their outputs mean.

    Attributes:
        heads: H distinct names: ``golden``, teachers, or ``average``.
        labels: C distinct label names, in the order of each head's logits.
        prediction_heads: The heads whose probabilities are averaged to predict; at least one.
        max_length: Longest input in tokens that the student was trained on.
    """

    format: Literal["1.0"] = "1.0"
    heads: Annotated[tuple[str, ...], Field(min_length=1)]
    labels: Annotated[tuple[str, ...], Field(min_length=2)]
    prediction_heads: Annotated[tuple[str, ...], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field in ("heads", "labels", "prediction_heads"):
            names = getattr(self, field)
            if len(set(names)) != len(names):
                raise ValueError(f"{field} must be distinct, got {', '.join(names)}")
        self.head_indices(self.prediction_heads)
        return self

    @property
    def num_outputs(self) -> int:
        """H * C."""
        return len(self.heads) * len(self.labels)

    def head_indices(self, names: Sequence[str]) -> tuple[int, ...]:
        """Returns the positions of ``names`` in ``heads``.

        Raises:
            ValueError: There is no such head, or no name is given.
        """
        unknown = [name for name in names if name not in self.heads]
        if unknown or not names:
            wanted = ", ".join(unknown) or "(none given)"
            raise ValueError(f"no head is named {wanted}; there are {', '.join(self.heads)}")
        return tuple(self.heads.index(name) for name in names)

    def save(self, directory: Path) -> None:
        """Writes ``heads.json``."""
        write_document(directory / HEADS_FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, directory: Path) -> HeadLayout:
        """Reads ``heads.json``.

        Raises:
            DataError: The directory has none, or it is malformed or was edited.
        """
        path = directory / HEADS_FILE
        try:
            return cls.model_validate(read_document(path))
        except OSError as error:
            raise DataError(
                f"{directory}: is no student ({HEADS_FILE} cannot be read: {error.strerror})"
            ) from error
        except DocumentError as error:
            raise DataError(f"{path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise DataError(f"{path}: {field}: {first['msg']}") from error


class HeadBank(nn.Linear):
    """H linear heads over one input, stacked into a plain Linear of H * C outputs.

    Rows ``[h * C, (h + 1) * C)`` of ``weight`` and ``bias`` belong to head h. A plain Linear, so
    that DeepSpeed may partition it and transformers may save it as the classifier that it replaces.

    Attributes:
        num_labels: C.
    """

    def __init__(self, width: int, layout: HeadLayout, *, bias: bool = True) -> None:
        super().__init__(width, layout.num_outputs, bias=bias)
        self.num_labels = len(layout.labels)

    def reset_parameters(self) -> None:
        """Zeroes the bank; the global random state of torch is left alone, unlike a plain Linear's."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def rows(self, index: int) -> slice:
        """Returns the rows of head ``index`` in ``weight`` and ``bias``."""
        return slice(index * self.num_labels, (index + 1) * self.num_labels)

    @torch.no_grad()
    def initialise(self, layout: HeadLayout, *, seed: int, std: float) -> None:
        """Draws every head's weight from N(0, std^2) and zeroes its bias, seeded per head name."""
        for index, name in enumerate(layout.heads):
            generator = torch.Generator().manual_seed(_head_seed(seed, name))
            weight_CD = torch.randn(self.num_labels, self.in_features, generator=generator) * std
            self.weight[self.rows(index)].copy_(weight_CD)
        if self.bias is not None:
            self.bias.zero_()

    @torch.no_grad()
    def carry_over(self, source: HeadBank, theirs: HeadLayout, ours: HeadLayout) -> tuple[str, ...]:
        """Copies the heads that both banks have, if their labels have the same names.

        Args:
            source: The earlier bank, of the same input width.
            theirs: Its layout.
            ours: This bank's layout.

        Returns:
            The names of the heads that carried on.
        """
        columns = match_columns(theirs.labels, ours.labels)
        if columns is None:
            return ()
        carried = tuple(name for name in ours.heads if name in theirs.heads)
        for name in carried:
            mine, other = self.rows(ours.heads.index(name)), source.rows(theirs.heads.index(name))
            self.weight[mine].copy_(source.weight[other][list(columns)])
            if self.bias is not None and source.bias is not None:
                self.bias[mine].copy_(source.bias[other][list(columns)])
        return carried


def match_columns(native: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...] | None:
    """Returns, for each wanted label, its column in ``native``, or None if the names differ as sets.

    Names are compared as ``schemas.labels.normalise`` leaves them.
    """
    positions = {normalise(name): position for position, name in enumerate(native)}
    if len(native) != len(wanted) or {normalise(name) for name in wanted} != set(positions):
        return None
    return tuple(positions[normalise(name)] for name in wanted)


def mean_probabilities(logits_BHC: Tensor, head_indices: Sequence[int]) -> Tensor:
    """Returns the mean of the heads' probabilities, float32 at least.

    Source: Yang et al., WSDM 2020, arXiv:1910.08381, section 3.3: the student predicts by the
    average over its heads' outputs.

    Args:
        logits_BHC: Raw logits.
        head_indices: The heads to average, at least one.

    Returns:
        ``[B, C]``; each row sums to 1.
    """
    wide_BHC = logits_BHC.float() if logits_BHC.dtype.itemsize < 4 else logits_BHC
    return wide_BHC[:, list(head_indices)].softmax(dim=-1).mean(dim=1)


def _head_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
