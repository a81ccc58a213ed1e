"""A model of what a disk holds after the power is lost, however badly it behaves within its word.

What was synced is there. Of what was not, each directory may be as it was at its last sync or as it is
now, independently of the others, and a file that was not synced since it was written may hold half of it.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from schemas.fault_points import FaultPoint

Image = frozenset[tuple[str, bytes | None]]
"""Paths below the root with their content; None for a directory."""

_CHANGES = ("link", "replace", "rename", "unlink", "mkdir")


class Disk:
    """Follows one directory tree while a run writes it, and collects what each loss of power leaves.

    Attributes:
        images: Each state that a loss of power may leave, with what had been promised by then.
    """

    def __init__(self, root: Path) -> None:
        self.images: dict[Image, set[str]] = {}
        self._root = root
        self._promised: set[str] = set()
        self._synced: dict[int, bytes] = {}
        self._durable: dict[str, dict[str, int]] = {}
        # Held open, so that the system gives no inode's number to another file.
        self._held: list[int] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records all that happens in the block."""
        patches = [mock.patch.object(os, name, self._follow(getattr(os, name))) for name in _CHANGES]
        patches.append(mock.patch.object(os, "fsync", self._sync(os.fsync)))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()
            for descriptor in self._held:
                os.close(descriptor)

    def promise(self, what: str) -> None:
        """Notes that a run believes ``what`` (a file's name) to be durable from now on."""
        self._promised.add(what)
        self.lose_power()

    def hear(self, _point: FaultPoint) -> None:
        """Takes a fault point for a moment at which the power may be lost."""
        self.lose_power()

    def lose_power(self) -> None:
        """Collects what a loss of power at this moment may leave."""
        if not self._root.exists():
            return
        now = {name: self._entries(self._root / name) for name in ("", "data", "commit")}
        for choice in itertools.product((True, False), repeat=len(now)):
            chosen = {
                name: self._durable.get(name, {}) if durable else entries
                for (name, entries), durable in zip(now.items(), choice, strict=True)
            }
            # What must be there is what the first who came by here was promised, at least.
            self.images.setdefault(frozenset(self._files(chosen)), set()).update(self._promised)

    def _files(self, chosen: dict[str, dict[str, int]]) -> Iterator[tuple[str, bytes | None]]:
        for directory, entries in chosen.items():
            if directory and directory not in chosen[""]:
                continue
            for name, inode in entries.items():
                path = f"{directory}/{name}".lstrip("/")
                yield path, None if path in chosen else self._synced.get(inode, b"torn")

    def _entries(self, directory: Path) -> dict[str, int]:
        try:
            return {entry.name: entry.inode() for entry in os.scandir(directory)}
        except FileNotFoundError:
            return {}

    def _sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            self.lose_power()
            real(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            status = os.fstat(descriptor)
            if not path.is_relative_to(self._root):
                return
            if stat.S_ISDIR(status.st_mode):
                name = str(path.relative_to(self._root))
                self._durable["" if name == "." else name] = self._entries(path)
            else:
                self._synced[status.st_ino] = path.read_bytes()
                self._held.append(os.dup(descriptor))
            self.lose_power()

        return fsync

    def _follow(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            self.lose_power()
            try:
                return real(*arguments, **options)
            finally:
                self.lose_power()

        return change


def restore(image: Image, root: Path) -> None:
    """Makes the tree that a loss of power left."""
    root.mkdir()
    for name, content in sorted(image, key=lambda item: item[0]):
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
