"""What a run of teachers tells whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TeacherState = Literal["waiting", "loading", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """How far one teacher is.

    Attributes:
        state: ``waiting`` for resources, ``loading`` the model, ``running``, ``done`` or ``failed``.
        num_shards_done, num_shards: Over all of the teacher's stores, committed earlier included.
        num_rows_done, num_rows: Likewise; rows of shards under way are counted as they come.
        num_rows_before: Rows that were committed before this run: they say nothing of its speed.
        note: Something that a person should see, such as a replaced actor; empty as a rule.
    """

    teacher: str
    state: TeacherState
    num_shards_done: int
    num_shards: int
    num_rows_done: int
    num_rows: int
    num_rows_before: int = 0
    note: str = ""
