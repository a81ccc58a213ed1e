"""Reading pretrained models: what transformers raises as errors of ours, and what it only warns of.

Invariants (tests/precompute/test_teacher.py, tests/precompute/test_language_teacher.py):
    1. A checkpoint that lacks any of the model's weights is refused: its logits would be random.
    2. Inputs longer than a model's table of positions are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from schemas.errors import ResourceError, TeacherError, first_line

# These count positions from the padding index up, so they have fewer than their table.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "longformer"}


@contextmanager
def reading_pretrained(teacher: str, model_path: str) -> Iterator[None]:
    """Translates errors of ``from_pretrained``, and keeps its loading bar and report off stderr.

    Args:
        teacher: Name of the teacher.
        model_path: A local directory or a hub id.

    Raises:
        TeacherError: The directory has no such model.
        ResourceError: The hub cannot be reached.
    """
    try:
        with _quiet_transformers():
            yield
    except OSError as error:
        line = first_line(error)
        if Path(model_path).exists():
            raise TeacherError(f"cannot be loaded: {line}", teacher=teacher) from error
        message = f"teacher {teacher}: {model_path} cannot be fetched ({line}); give a local directory"
        raise ResourceError(message) from error
    except (SafetensorError, ValueError, ImportError, KeyError) as error:
        raise TeacherError(f"cannot be loaded: {first_line(error)}", teacher=teacher) from error


def check_weights(report: dict[str, Any], teacher: str, consequence: str) -> None:
    """Checks that a checkpoint had every weight of the model.

    Args:
        report: ``output_loading_info`` of ``from_pretrained``.
        teacher: Name of the teacher.
        consequence: What it means if not, for the error.

    Raises:
        TeacherError: It had not.
    """
    # Elements of `mismatched_keys` are tuples of a name and two shapes.
    absent = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if absent:
        raise TeacherError(
            f"its checkpoint lacks {', '.join(absent[:3])}{' ...' if len(absent) > 3 else ''}: {consequence}",
            teacher=teacher,
        )


def check_length(config: Any, max_length: int, teacher: str) -> None:
    """Checks that a model has positions for inputs of ``max_length`` tokens.

    Raises:
        TeacherError: It has not.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if config.model_type in _OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    if max_length > positions:
        message = f"max_length is {max_length}, the model has {positions} positions"
        raise TeacherError(message, teacher=teacher)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """What the report says of missing weights is an error here."""
    verbosity = transformers_logging.get_verbosity()
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()
