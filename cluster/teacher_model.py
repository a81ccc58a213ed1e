"""A teacher that can be run, whatever its task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherModel:
    """A teacher that can be run.

    Attributes:
        path: What ``from_pretrained`` takes.
        revision: Commit on the hub, or None.
    """

    path: str
    revision: str | None = None
