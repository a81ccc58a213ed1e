"""The processes of one session: what a command started, however its parents ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import psutil

_POLL_S = 0.05


def list_session(session: int) -> list[int]:
    """Returns the ids of a session's living processes; zombies do not count."""
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except (ProcessLookupError, PermissionError, psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_session(session: int, *, wait_s: float) -> bool:
    """Waits for a session to end by itself, then kills what is left of it.

    Args:
        session: Its id: that of the process which was started with ``start_new_session``.
        wait_s: Seconds to wait before SIGKILL.

    Returns:
        Whether it ended by itself.
    """
    deadline = time.monotonic() + wait_s
    while (living := list_session(session)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    by_itself = not living
    while living := list_session(session):
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return by_itself
