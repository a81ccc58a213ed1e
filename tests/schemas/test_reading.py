"""Many small files, read ahead of who takes them, but not far."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from schemas.storage.reading import read_files


class Source:
    """Counts what was read."""

    def __init__(self, *, is_local: bool, missing: str = "") -> None:
        self.is_local = is_local
        self.missing = missing
        self.num_read = 0
        self._lock = threading.Lock()

    def read(self, name: str, *, max_bytes: int) -> bytes:
        with self._lock:
            self.num_read += 1
        if name == self.missing:
            raise FileNotFoundError(2, "No such file", f"/somewhere/{name}")
        return name.encode()


def make_names(count: int) -> list[str]:
    return [f"commit/{number}" for number in range(count)]


@pytest.mark.parametrize("is_local", [True, False])
@pytest.mark.parametrize("count", [0, 1, 16, 100])
def test_files_come_in_the_order_of_their_names(count: int, is_local: bool) -> None:
    source: Any = Source(is_local=is_local)
    found = list(read_files(source, make_names(count), max_bytes=9))
    assert found == [name.encode() for name in make_names(count)]


@pytest.mark.parametrize(("is_local", "most"), [(True, 1), (False, 16)])
def test_no_more_is_held_than_a_few_files_whatever_their_number(is_local: bool, most: int) -> None:
    source: Any = Source(is_local=is_local)
    for taken, _ in enumerate(read_files(source, make_names(200), max_bytes=9)):
        assert source.num_read <= taken + most


@pytest.mark.parametrize("is_local", [True, False])
def test_a_missing_file_is_named_as_it_was_asked_for(is_local: bool) -> None:
    source: Any = Source(is_local=is_local, missing="commit/3")
    with pytest.raises(FileNotFoundError, match=r"^commit/3$"):
        list(read_files(source, make_names(9), max_bytes=9))
