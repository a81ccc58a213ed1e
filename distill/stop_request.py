"""Requests to stop: signals to this process, or the stage directory's file.

A handler only sets a flag: the launcher signals the ranks one after another, so that a collective in
a handler would deadlock. The trainer shares the flag at each step's end, and all ranks leave together.
"""

from __future__ import annotations

import signal
from types import FrameType

from distill.stage_directory import StageDirectory


class StopRequest:
    """Whether this rank was asked to stop.

    Attributes:
        signal_number: The signal that asked, if one did.
    """

    def __init__(self, directory: StageDirectory) -> None:
        self._directory = directory
        self.signal_number: int | None = None

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT; only the main thread can."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def is_set(self) -> bool:
        """Tells whether a signal came or the stop file is there."""
        return self.signal_number is not None or self._directory.stop_requested()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
