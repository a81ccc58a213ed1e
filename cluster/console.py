"""What a person reads: on stderr, so that stdout carries data alone."""

from __future__ import annotations

from functools import cache

from rich.console import Console


@cache
def stderr_console() -> Console:
    """Returns the one console for people. It follows the terminal; elsewhere it writes plain lines."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str) -> None:
    """Writes one line for a person."""
    stderr_console().print(message, markup=False)
