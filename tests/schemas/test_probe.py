from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from schemas.errors import ResourceError
from schemas.fault_points import FaultPoint, listen
from schemas.storage.location import create_storage
from schemas.storage.probe import probe_create
from tests.object_server import Kind, ObjectServer, object_server


@pytest.fixture
def server() -> Iterator[ObjectServer]:
    with object_server() as running:
        yield running


def test_making_a_store_leaves_no_object_and_reaches_no_fault_point(server: ObjectServer) -> None:
    reached: list[FaultPoint] = []
    listen(reached.append)
    try:
        create_storage(server.url())
    finally:
        listen(None)
    assert server.keys() == []
    assert reached == []


def test_a_service_that_ignores_the_condition_is_refused(server: ObjectServer) -> None:
    server.faults.ignores_if_none_match = True
    with pytest.raises(ResourceError, match=r"ignores the condition.*store\.single_committer: true"):
        create_storage(server.url())
    assert server.keys() == []


def test_a_service_that_looks_before_it_writes_is_found_out(server: ObjectServer) -> None:
    server.faults.race_s = 0.05
    with pytest.raises(ResourceError, match=r"that created one file at once.*single_committer"):
        create_storage(server.url())
    assert server.keys() == []


def test_a_service_that_knows_no_conditions_is_refused(server: ObjectServer) -> None:
    server.faults.add(Kind.STATUS, methods=("PUT",), status=501, code="NotImplemented", times=99)
    with pytest.raises(ResourceError, match=r"cannot create a file only if it is absent.*single_committer"):
        create_storage(server.url())


def test_a_probe_survives_a_service_that_stumbles(server: ObjectServer) -> None:
    for skip in range(0, 12, 3):
        server.faults.clear()
        server.faults.add(Kind.DROP_AFTER, skip=skip, times=2)
        create_storage(server.url(f"store-{skip}"))
        assert server.keys() == []


def test_a_service_that_stops_answering_in_the_middle_is_named_after_one_round_of_tries(
    server: ObjectServer,
) -> None:
    server.faults.add(Kind.STATUS, skip=2, times=10**6, status=503, code="SlowDown")
    with pytest.raises(ResourceError, match="does not answer as it should"):
        create_storage(server.url())
    # No cleaning up, which would take as long once more.
    assert server.faults.num_requests("DELETE") == 0


class Shelf:
    """A storage in memory, with a ``create`` to choose."""

    root = "shelf://"

    def __init__(self, create: Callable[[Shelf, str, bytes], bool]) -> None:
        self.files: dict[str, bytes] = {}
        self.turn = threading.Lock()
        self._create = create

    def create(self, name: str, data: bytes) -> bool:
        return self._create(self, name, data)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return self.files[name]

    def delete(self, name: str) -> None:
        self.files.pop(name, None)


def create_faithfully(shelf: Shelf, name: str, data: bytes) -> bool:
    with shelf.turn:
        return shelf.files.setdefault(name, data) is data


def create_never(shelf: Shelf, name: str, data: bytes) -> bool:
    return False


def overwrite_and_say_no(shelf: Shelf, name: str, data: bytes) -> bool:
    with shelf.turn:
        is_new = name not in shelf.files
        shelf.files[name] = data
        return is_new


def forget_the_winner_in_a_race(shelf: Shelf, name: str, data: bytes) -> bool:
    with shelf.turn:
        is_new = name not in shelf.files
        if is_new or name.endswith("race"):
            shelf.files[name] = data
        return is_new


def test_a_faithful_service_passes_and_keeps_nothing() -> None:
    shelf = Shelf(create_faithfully)
    probe_create(shelf, shelf.create)  # type: ignore[arg-type]
    assert shelf.files == {}


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (create_never, "refuses to create a file that was never there"),
        (overwrite_and_say_no, "ignores the condition"),
        (forget_the_winner_in_a_race, "overwrites what another created"),
    ],
)
def test_an_unfaithful_service_is_refused_and_keeps_nothing(
    create: Callable[[Shelf, str, bytes], bool], reason: str
) -> None:
    shelf = Shelf(create)
    with pytest.raises(ResourceError, match=reason):
        probe_create(shelf, shelf.create)  # type: ignore[arg-type]
    assert shelf.files == {}
