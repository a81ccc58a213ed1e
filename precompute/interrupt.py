"""Ctrl-C and SIGTERM as a flag, so that a run ends between two steps and never inside one.

Invariants (tests/precompute/test_interrupt.py):
    1. The handlers that were there before are there again afterwards.
    2. A second Ctrl-C raises ``KeyboardInterrupt`` at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from schemas.errors import InterruptedRunError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopFlag:
    """Tells a run to end.

    Attributes:
        signal_number: The first signal that set it, or None while it is not set.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def set(self, signal_number: int = signal.SIGINT) -> None:
        """Asks the run to end; the first signal counts."""
        if self.signal_number is None:
            self.signal_number = int(signal_number)

    def is_set(self) -> bool:
        """Tells whether the run is asked to end."""
        return self.signal_number is not None

    def raise_if_set(self) -> None:
        """Ends the run if it is asked to.

        Raises:
            InterruptedRunError: The flag is set.
        """
        if self.signal_number is not None:
            raise InterruptedRunError(
                "interrupted; what is committed is kept, and the same command goes on from there",
                signal_number=self.signal_number,
            )


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Sets a flag on SIGINT and SIGTERM while the block runs.

    Python delivers signals to the main thread alone; in another one the flag is there, but no
    handler is installed.

    Yields:
        The flag.

    Raises:
        KeyboardInterrupt: At a second Ctrl-C.
    """
    flag = StopFlag()

    def handle(number: int, _frame: FrameType | None) -> None:
        if flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set(number)

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            # None: the handler was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
