"""Label names and how two orders of them map onto each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from schemas.errors import LabelError

_PLACEHOLDER = re.compile(r"LABEL_\d+", re.IGNORECASE)


def is_placeholder(name: str) -> bool:
    """Tells whether ``name`` is a name that transformers made up, such as ``LABEL_0``."""
    return _PLACEHOLDER.fullmatch(name) is not None


def normalise(name: str) -> str:
    """Folds case, and spaces and hyphens to underscores: ``Not Entailment`` -> ``not_entailment``."""
    return re.sub(r"[\s\-]+", "_", name.strip()).casefold()


def rename(names: Sequence[str], renames: Mapping[str, str], *, field: str | None = None) -> tuple[str, ...]:
    """Applies a recipe's ``label_map`` to a teacher's native names.

    Args:
        names: The teacher's names in its native order.
        renames: From native name to the recipe's name.
        field: The recipe's field, for the error.

    Raises:
        LabelError: ``renames`` names a label that the teacher does not have.
    """
    unknown = [name for name in renames if name not in names]
    if unknown:
        raise LabelError(
            f"label_map names {', '.join(unknown)}, but the teacher's labels are {', '.join(names)}",
            unmapped=unknown,
            field=field,
        )
    return tuple(renames.get(name, name) for name in names)


def match_order(native: Sequence[str], wanted: Sequence[str], *, field: str | None = None) -> tuple[int, ...]:
    """Finds, for each wanted label, its column in the native order.

    Args:
        native: C names in the order of the teacher's logits.
        wanted: C names in the order of the recipe.
        field: The recipe's field, for the error.

    Returns:
        C column indices such that ``logits[:, indices]`` is in the wanted order.

    Raises:
        LabelError: The names differ as sets, or the native ones are placeholders.
    """
    placeholders = [name for name in native if is_placeholder(name)]
    if placeholders:
        raise LabelError(
            f"the teacher names its labels {', '.join(native)}, which say nothing; "
            f"give label_map, for example {{{placeholders[0]}: {wanted[0]}}}",
            unmapped=placeholders,
            field=field,
        )
    columns = {normalise(name): index for index, name in enumerate(native)}
    missing = [name for name in wanted if normalise(name) not in columns]
    if missing or len(native) != len(wanted):
        raise LabelError(
            f"the teacher's labels are {', '.join(native)}, the task's {', '.join(wanted)}; "
            "give label_map from the teacher's names to the task's",
            unmapped=missing or [name for name in native if normalise(name) not in map(normalise, wanted)],
            field=field,
        )
    return tuple(columns[normalise(name)] for name in wanted)
