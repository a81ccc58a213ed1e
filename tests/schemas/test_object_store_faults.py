"""A store on S3 whose service is not well: no answers, half ones, wrong ones, late ones."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from schemas.errors import DamagedStoreError, ResourceError
from schemas.fault_points import FaultPoint, listen
from schemas.storage.location import create_storage
from schemas.storage.object_store import ObjectStorage
from tests.object_server import Kind, ObjectServer, object_server

SHARD = bytes(range(256)) * 4096
SHARD_HASH = hashlib.sha256(SHARD).hexdigest()
NUM_ATTEMPTS = 4


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setenv("TMKD_CACHE_DIR", str(tmp_path / "cache"))
    with object_server() as running:
        yield running


@pytest.fixture
def storage(server: ObjectServer) -> ObjectStorage:
    return ObjectStorage(server.url())


def map_shard(storage: ObjectStorage) -> bytes:
    return storage.map_file("data/a.arrow", num_bytes=len(SHARD), sha256=SHARD_HASH).to_pybytes()


def publish_shard(storage: ObjectStorage) -> None:
    storage.publish("data/a.arrow", lambda path: path.write_bytes(SHARD))


OPERATIONS: dict[str, Callable[[ObjectStorage], object]] = {
    "create": lambda storage: storage.create("commit/new.json", b"record"),
    "delete": lambda storage: storage.delete("data/a.arrow"),
    "list": lambda storage: storage.list_files("commit"),
    "map": map_shard,
    "publish": publish_shard,
    "read": lambda storage: storage.read("STORE.json", max_bytes=99),
    "replace": lambda storage: storage.replace("manifest.json", b"manifest"),
}
FAULTS = {
    "500": {"kind": Kind.STATUS, "status": 500, "code": "InternalError"},
    "503": {"kind": Kind.STATUS, "status": 503, "code": "SlowDown"},
    "conflict": {"kind": Kind.STATUS, "status": 409, "code": "ConditionalRequestConflict"},
    "no answer": {"kind": Kind.DROP_BEFORE},
    "answer lost": {"kind": Kind.DROP_AFTER},
}


@pytest.fixture
def filled(server: ObjectServer) -> None:
    server.put("store/STORE.json", b"identity")
    server.put("store/commit/a.json", b"record")
    server.put("store/data/a.arrow", SHARD)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_passes_is_waited_for(
    server: ObjectServer, storage: ObjectStorage, operation: str, fault: str
) -> None:
    expected = OPERATIONS[operation](storage)
    server.put("store/data/a.arrow", SHARD)
    storage.delete("commit/new.json")
    storage.discard_copy(SHARD_HASH)
    server.faults.add(times=2, **FAULTS[fault])
    assert OPERATIONS[operation](storage) == expected
    assert server.faults.rules[0].times == 0


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_does_not_pass_is_given_up_after_a_number_of_tries(
    server: ObjectServer, storage: ObjectStorage, operation: str
) -> None:
    server.faults.clear()
    server.faults.add(Kind.STATUS, times=10**6, status=503, code="SlowDown")
    with pytest.raises(ResourceError, match="does not answer as it should, tried 4 times") as caught:
        OPERATIONS[operation](storage)
    assert "\n" not in caught.value.message
    # A create reads back after each try.
    assert len(server.faults.requests) == NUM_ATTEMPTS * (2 if operation == "create" else 1)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_refusal_is_not_tried_again(server: ObjectServer, storage: ObjectStorage, operation: str) -> None:
    server.faults.clear()
    server.faults.add(Kind.STATUS, times=10**6, status=403, code="AccessDenied")
    with pytest.raises(ResourceError, match="access denied"):
        OPERATIONS[operation](storage)
    assert len(server.faults.requests) == 1


@pytest.mark.parametrize("kind", [Kind.DROP_AFTER, Kind.SLOW_AFTER])
def test_a_create_whose_answer_is_lost_is_known_to_have_won(
    server: ObjectServer, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMKD_STORAGE_READ_TIMEOUT_S", "0.5")
    storage = ObjectStorage(server.url())
    server.faults.add(kind, methods=("PUT",), delay_s=1.5)
    assert storage.create("commit/a.json", b"ours")
    assert server.get("store/commit/a.json") == b"ours"
    assert not storage.create("commit/a.json", b"theirs")


@pytest.mark.parametrize("kind", [Kind.DROP_AFTER, Kind.DROP_BEFORE])
def test_a_create_whose_refusal_is_lost_is_known_to_have_lost(
    server: ObjectServer, storage: ObjectStorage, kind: Kind
) -> None:
    server.put("store/commit/a.json", b"theirs")
    server.faults.add(kind, methods=("PUT",))
    assert not storage.create("commit/a.json", b"ours")
    assert server.get("store/commit/a.json") == b"theirs"


def test_a_create_that_never_arrived_is_sent_again(server: ObjectServer, storage: ObjectStorage) -> None:
    server.faults.add(Kind.DROP_BEFORE, methods=("PUT",), times=2)
    assert storage.create("commit/a.json", b"ours")
    assert server.get("store/commit/a.json") == b"ours"


def test_a_lost_answer_and_a_failed_reading_back_are_settled_too(
    server: ObjectServer, storage: ObjectStorage
) -> None:
    server.faults.add(Kind.DROP_AFTER, methods=("PUT",))
    server.faults.add(Kind.STATUS, methods=("GET",), status=500, code="InternalError")
    assert storage.create("commit/a.json", b"ours")


def test_a_refusal_by_our_own_bytes_is_a_win(server: ObjectServer, storage: ObjectStorage) -> None:
    # What a library below does when it repeats a PUT whose answer was lost.
    server.put("store/commit/a.json", b"ours")
    assert storage.create("commit/a.json", b"ours")


def test_a_single_committer_whose_answer_is_lost_has_won(server: ObjectServer) -> None:
    storage = create_storage(server.url(), single_committer=True)
    server.faults.add(Kind.DROP_AFTER, methods=("PUT",))
    assert storage.create("commit/a.json", b"ours")
    assert not storage.create("commit/a.json", b"theirs")


def test_a_shard_that_was_uploaded_short_is_sent_again(
    server: ObjectServer, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem, put_file = storage.filesystem, storage.filesystem.put_file
    sent: list[str] = []

    def put_short_once(path: str, url: str, timeout: float) -> None:
        sent.append(url)
        if len(sent) == 1:
            filesystem.pipe_file(url, SHARD[:-1])
        else:
            put_file(path, url)

    monkeypatch.setattr(filesystem, "put_file", put_short_once)
    publish_shard(storage)
    # More than two only where the machine is so slow that an answer comes too late.
    assert len(sent) >= 2
    assert server.get("store/data/a.arrow") == SHARD


def test_a_shard_that_always_arrives_short_is_not_published(
    server: ObjectServer, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: list[FaultPoint] = []
    filesystem = storage.filesystem
    monkeypatch.setattr(
        filesystem, "put_file", lambda path, url, timeout: filesystem.pipe_file(url, SHARD[:-1])
    )
    listen(reached.append)
    try:
        with pytest.raises(ResourceError, match=f"{len(SHARD) - 1} of {len(SHARD)} bytes arrived"):
            publish_shard(storage)
    finally:
        listen(None)
    assert reached == [FaultPoint.SHARD_SYNCED]


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("kind", [Kind.CUT, Kind.FLIP])
def test_a_shard_that_is_spoiled_on_its_way_is_fetched_again(
    server: ObjectServer, storage: ObjectStorage, kind: Kind
) -> None:
    # By the service's own checksum; then one without, by the recorded hash.
    publish_shard(storage)
    for _ in range(2):
        server.faults.add(kind, methods=("GET",))
        assert map_shard(storage) == SHARD
        assert server.faults.rules[-1].times == 0
        storage.discard_copy(SHARD_HASH)
        server.put("store/data/a.arrow", SHARD)


@pytest.mark.usefixtures("filled")
def test_a_shard_that_is_always_spoiled_is_damage_or_a_service_that_fails(
    server: ObjectServer, storage: ObjectStorage
) -> None:
    server.faults.add(Kind.FLIP, methods=("GET",), times=99)
    with pytest.raises(DamagedStoreError):
        map_shard(storage)
    server.faults.clear()
    server.faults.add(Kind.CUT, methods=("GET",), times=99)
    with pytest.raises(ResourceError):
        map_shard(storage)


@pytest.mark.usefixtures("filled")
def test_a_small_file_that_is_cut_is_read_again(server: ObjectServer, storage: ObjectStorage) -> None:
    server.faults.add(Kind.CUT, methods=("GET",), times=2)
    assert storage.read("STORE.json", max_bytes=99) == b"identity"
    server.faults.add(Kind.CUT, methods=("GET",), times=2)
    assert storage.map_file("STORE.json").to_pybytes() == b"identity"


@pytest.mark.usefixtures("filled")
def test_a_slow_answer_is_waited_for(server: ObjectServer, storage: ObjectStorage) -> None:
    server.faults.add(Kind.SLOW, methods=("GET",), delay_s=0.5)
    assert storage.read("STORE.json", max_bytes=99) == b"identity"
    assert server.faults.num_requests("GET") == 1


def test_an_endpoint_that_refuses_connections_is_given_up_soon(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:topsecret@127.0.0.1:{port}")
    begin_s = time.monotonic()
    with pytest.raises(ResourceError, match="check the endpoint") as caught:
        create_storage(server.url())
    assert time.monotonic() - begin_s < 5
    assert "topsecret" not in caught.value.message


def test_an_endpoint_that_never_answers_is_given_up_in_bounded_time(
    server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMKD_STORAGE_READ_TIMEOUT_S", "0.3")
    monkeypatch.setenv("TMKD_STORAGE_TOTAL_S", "1")
    monkeypatch.setenv("TMKD_STORAGE_NUM_ATTEMPTS", "1000")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin_s = time.monotonic()
        with pytest.raises(ResourceError, match="does not answer as it should"):
            create_storage(server.url())
        assert time.monotonic() - begin_s < 4


def test_no_credential_is_shown(
    server: ObjectServer,
    storage: ObjectStorage,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wholly-secret-key")
    caplog.set_level(logging.DEBUG, logger="schemas")
    said = "wholly-secret-key test-access-key X-Amz-Signature=0123abcd&amp;X=1"
    for status in (403, 503, 400):
        server.faults.clear()
        monkeypatch.setattr("tests.object_server._STATUS_TEXT", {})
        server.faults.add(Kind.STATUS, methods=("GET",), status=status, code=f"Odd {said}", times=99)
        with pytest.raises(ResourceError) as caught:
            storage.read("STORE.json", max_bytes=99)
        texts = [caught.value.message, str(caught.value.__cause__), repr(storage), caplog.text]
        for secret in ("wholly-secret-key", "test-access-key", "0123abcd"):
            assert not any(secret in text for text in texts), status


@pytest.mark.parametrize("operation", ["create", "replace", "publish"])
def test_something_that_is_no_object_store_cannot_be_written_to(
    server: ObjectServer, storage: ObjectStorage, operation: str
) -> None:
    server.faults.add(Kind.STATUS, times=10**6, status=404, code="404")
    with pytest.raises(ResourceError, match="check the bucket and the endpoint"):
        OPERATIONS[operation](storage)


def test_concurrent_creators_on_a_service_that_loses_answers_have_one_winner(
    server: ObjectServer, storage: ObjectStorage
) -> None:
    won: list[int] = []

    def create(i: int) -> None:
        if storage.create("commit/a.json", b"%d" % i):
            won.append(i)

    server.faults.add(Kind.DROP_AFTER, methods=("PUT",), times=4)
    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [b"%d" % i for i in won] == [server.get("store/commit/a.json")]
