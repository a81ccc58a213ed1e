"""The one server from which tests fork children; a process has only one, so that its modules add up."""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")

_preloaded: list[str] = []


def preload(*modules: str) -> None:
    """Has the server import modules before it forks; to be called when a test module is imported."""
    _preloaded.extend(name for name in modules if name not in _preloaded)
    SERVER.set_forkserver_preload(_preloaded)
