"""Disks that refuse: small real ones, and system calls that fail from a chosen call on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_NUM_PAGES = 1024
# What a run calls, directly or through pathlib; ``open`` stands for opening and for each write.
CALLS = ("fsync", "link", "replace", "rename", "open", "scandir", "unlink", "mkdir", "lstat")


class SmallDisk:
    """A mounted file system of a few megabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, *, free_pages: int = 0) -> None:
        """Leaves that many pages free."""
        status = os.statvfs(self.path)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, (status.f_bavail - free_pages) * PAGE_BYTES)

    def empty(self) -> None:
        """Frees what ``fill`` took."""
        self._filler.unlink(missing_ok=True)

    def limit_inodes(self, num_free: int) -> None:
        """Lets that many more files be made."""
        status = os.statvfs(self.path)
        self.remount(f"nr_inodes={status.f_files - status.f_ffree + num_free}")

    def remount(self, options: str) -> bool:
        """Mounts it again with other options; False if it is busy."""
        command = ["mount", "-o", f"remount,{options}", str(self.path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """Mounts a file system at a new directory, where that is allowed."""
    path.mkdir()
    size = f"size={_NUM_PAGES * PAGE_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield SmallDisk(path)
    finally:
        # Lazily: this process may still map a plan that lies there.
        subprocess.run(["umount", "-l", str(path)], check=True)


class BrokenCalls:
    """System calls below a directory that fail.

    Attributes:
        num_failed: Calls that were refused so far.
    """

    def __init__(
        self, root: Path, number: int, *, first: int, forever: bool, only: str | None = None
    ) -> None:
        """Chooses what fails.

        Args:
            root: Calls with other paths go through.
            number: The error's number.
            first: Calls that go through before the first one fails.
            forever: Whether all later ones fail too.
            only: The one system call that is counted and fails; all of ``CALLS`` if None.
        """
        self.num_failed = 0
        self._root = str(root)
        self._number = number
        self._num_left = first
        self._forever = forever
        self._names = CALLS if only is None else (only,)

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Breaks them in the block."""
        with ExitStack() as stack:
            for name in self._names:
                stack.enter_context(mock.patch.object(os, name, self._wrap(getattr(os, name))))
            if "open" in self._names:
                stack.enter_context(mock.patch.object(Path, "open", self._wrap(Path.open)))
            yield

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            if self._is_inside(target) and self._fails():
                raise OSError(self._number, os.strerror(self._number), str(target))
            return real(target, *arguments, **options)

        return call

    def _is_inside(self, target: Any) -> bool:
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        return str(path).startswith(self._root)

    def _fails(self) -> bool:
        self._num_left -= 1
        fails = self._num_left == -1 or (self._forever and self._num_left < 0)
        self.num_failed += fails
        return fails
