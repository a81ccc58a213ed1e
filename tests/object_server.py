"""A real S3 API on loopback for tests, and the things that go wrong with one.

``object_server()`` yields a server with a new bucket, and points this process (and its children) at it.
The server is moto's, behind a layer that injects faults by rule. moto itself looks and then writes, so
that conditional creates take turns here: that is how a service that keeps its word behaves.
"""

from __future__ import annotations

import atexit
import fnmatch
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Environ = dict[str, Any]
Respond = Callable[..., Any]

# As little patience as the tests of a lost answer can do with.
QUICK_RETRIES = {
    "TMKD_STORAGE_NUM_ATTEMPTS": "4",
    "TMKD_STORAGE_TOTAL_S": "8",
    "TMKD_STORAGE_FIRST_WAIT_S": "0.02",
    "TMKD_STORAGE_LONGEST_WAIT_S": "0.1",
    "TMKD_STORAGE_CONNECT_TIMEOUT_S": "2",
    "TMKD_STORAGE_READ_TIMEOUT_S": "5",
}
_ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "test-access-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_REMOVED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")
_STATUS_TEXT = {403: "Forbidden", 412: "Precondition Failed", 500: "Internal Server Error", 503: "Slow Down"}


class Kind(StrEnum):
    """What goes wrong."""

    STATUS = "status"  # The request is not applied; ``status`` and ``code`` are answered.
    SLOW = "slow"  # The request is applied after ``delay_s``.
    DROP_BEFORE = "drop-before"  # The connection ends; the request is not applied.
    DROP_AFTER = "drop-after"  # The request is applied; the connection ends without an answer.
    SLOW_AFTER = "slow-after"  # The request is applied; the answer takes ``delay_s``.
    CUT = "cut"  # Half of the body comes, then the connection ends.
    FLIP = "flip"  # A bit of the body is another.


@dataclass
class Fault:
    """A rule: which requests suffer what.

    Attributes:
        kind: What happens.
        methods: HTTP methods, such as ``PUT``; all if empty.
        path: A pattern of ``/bucket/key``.
        times: Number of requests; each one uses the rule up by one.
        status: Of the answer (``STATUS``).
        code: S3's name of the error (``STATUS``).
        delay_s: See ``SLOW``.
        skip: This many matching requests pass first.
    """

    kind: Kind
    methods: tuple[str, ...] = ()
    path: str = "*"
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    delay_s: float = 0.0
    skip: int = 0


@dataclass
class Faults:
    """The rules in force, and what came in.

    Attributes:
        rules: The first that matches and is not used up counts.
        ignores_if_none_match: The service overwrites, whatever the condition says.
        race_s: Not 0: the service looks, waits that long, and then writes.
        unnamed_condition: Refusals do not say which condition failed.
        requests: ``(method, path)`` of all requests since the last ``clear``.
    """

    rules: list[Fault] = field(default_factory=list)
    ignores_if_none_match: bool = False
    race_s: float = 0.0
    unnamed_condition: bool = False
    requests: list[tuple[str, str]] = field(default_factory=list)

    def add(self, kind: Kind, **rule: Any) -> Fault:
        """Adds a rule."""
        self.rules.append(Fault(kind, **rule))
        return self.rules[-1]

    def clear(self) -> None:
        """The service is well again."""
        self.rules.clear()
        self.requests.clear()
        self.ignores_if_none_match, self.race_s, self.unnamed_condition = False, 0.0, False

    def num_requests(self, method: str, pattern: str = "*") -> int:
        """Counts requests since the last ``clear``."""
        return sum(verb == method and fnmatch.fnmatch(path, pattern) for verb, path in self.requests)

    def take(self, method: str, path: str) -> Fault | None:
        """Uses up and returns the rule for a request."""
        self.requests.append((method, path))
        for rule in self.rules:
            matches = (not rule.methods or method in rule.methods) and fnmatch.fnmatch(path, rule.path)
            if not matches or rule.times == 0:
                continue
            if rule.skip > 0:
                rule.skip -= 1
                continue
            rule.times -= 1
            return rule
        return None


@dataclass(frozen=True)
class ObjectServer:
    """A running server with a bucket of its own.

    Attributes:
        endpoint: Its address.
        bucket: An empty bucket.
        faults: What to break.
    """

    endpoint: str
    bucket: str
    faults: Faults

    def url(self, name: str = "store") -> str:
        """Returns the URL of a prefix in the bucket."""
        return f"s3://{self.bucket}/{name}"

    def put(self, key: str, data: bytes) -> None:
        """Writes an object past the code under test."""
        _client(self.endpoint).put_object(Bucket=self.bucket, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        """Reads an object past the code under test."""
        return bytes(_client(self.endpoint).get_object(Bucket=self.bucket, Key=key)["Body"].read())

    def keys(self) -> list[str]:
        """Lists the bucket's keys past the code under test."""
        pages = _client(self.endpoint).get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


@contextmanager
def object_server(*, quick: bool = True) -> Iterator[ObjectServer]:
    """Yields the server, well and with a new bucket; its address and account are in the environment.

    Args:
        quick: Whether ``QUICK_RETRIES`` are set too.
    """
    endpoint, faults = _Running.start()
    faults.clear()
    account = {**_ACCOUNT, **(QUICK_RETRIES if quick else {}), "AWS_ENDPOINT_URL": endpoint}
    before = {name: os.environ.get(name) for name in (*account, *_REMOVED)}
    for name in _REMOVED:
        os.environ.pop(name, None)
    os.environ.update(account)
    try:
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        _client(endpoint).create_bucket(Bucket=bucket)
        faults.clear()
        yield ObjectServer(endpoint, bucket, faults)
    finally:
        faults.clear()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _Running:
    """The one server of this process; starting it takes a second, and it ends with the process."""

    _started: tuple[int, str, Faults] | None = None

    @classmethod
    def start(cls) -> tuple[str, Faults]:
        if cls._started is None or cls._started[0] != os.getpid():
            cls._started = (os.getpid(), *_start_server())
        return cls._started[1], cls._started[2]


def _start_server() -> tuple[str, Faults]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *args: Any, **kwargs: Any) -> None:
            """Says nothing."""

    faults = Faults()
    application = _FaultyService(DomainDispatcherApplication(create_backend_app), faults)
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    atexit.register(stop)
    return f"http://127.0.0.1:{server.server_port}", faults


class _FaultyService:
    """A WSGI layer before the service."""

    def __init__(self, application: Callable[..., Iterable[bytes]], faults: Faults) -> None:
        self._application = application
        self._faults = faults
        self._turn = threading.Lock()

    def __call__(self, environ: Environ, respond: Respond) -> Iterable[bytes]:
        fault = self._faults.take(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        if fault is None:
            return self._serve(environ, respond)
        if fault.kind is Kind.STATUS:
            _drain(environ)
            body = _refuse(respond, fault.status, fault.code, "injected")
            return [] if environ["REQUEST_METHOD"] == "HEAD" else body
        if fault.kind is Kind.DROP_BEFORE:
            _drain(environ)
            return _hang_up(environ, respond)
        if fault.kind is Kind.SLOW:
            time.sleep(fault.delay_s)
            return self._serve(environ, respond)
        return self._serve_badly(environ, respond, fault)

    def _serve_badly(self, environ: Environ, respond: Respond, fault: Fault) -> Iterable[bytes]:
        """Applies the request, and spoils the answer."""
        answer: list[Any] = []
        body = b"".join(self._serve(environ, lambda *args: answer.append(args)))
        if fault.kind is Kind.DROP_AFTER:
            return _hang_up(environ, respond)
        if fault.kind is Kind.SLOW_AFTER:
            time.sleep(fault.delay_s)
        respond(*answer[-1])
        if fault.kind is Kind.FLIP:
            return [bytes([body[0] ^ 1]) + body[1:]]
        # With the full length in the header, the client waits for the rest until the connection ends.
        return [body[: len(body) // 2]] if fault.kind is Kind.CUT else [body]

    def _serve(self, environ: Environ, respond: Respond) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PUT" or "HTTP_IF_NONE_MATCH" not in environ:
            return self._application(environ, respond)
        if self._faults.ignores_if_none_match:
            del environ["HTTP_IF_NONE_MATCH"]
            return self._application(environ, respond)
        if self._faults.race_s:
            return self._look_then_write(environ, respond)
        with self._turn:
            if self._faults.unnamed_condition and self._exists(environ):
                _drain(environ)
                return _refuse(respond, 412, "PreconditionFailed", "a condition did not hold")
            # The application has written before it returns.
            return self._application(environ, respond)

    def _look_then_write(self, environ: Environ, respond: Respond) -> Iterable[bytes]:
        exists = self._exists(environ)
        time.sleep(self._faults.race_s)
        if exists:
            _drain(environ)
            named = "At least one of the pre-conditions you specified did not hold"
            return _refuse(respond, 412, "PreconditionFailed", named, condition="If-None-Match")
        del environ["HTTP_IF_NONE_MATCH"]
        return self._application(environ, respond)

    def _exists(self, environ: Environ) -> bool:
        head = {
            key: value
            for key, value in environ.items()
            if key not in ("HTTP_IF_NONE_MATCH", "CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING")
        }
        statuses: list[str] = []
        list(
            self._application(
                {**head, "REQUEST_METHOD": "HEAD", "wsgi.input": _Empty()},
                lambda status, *rest: statuses.append(status),
            )
        )
        return statuses[0].startswith("200")


class _Empty:
    def read(self, *_: Any) -> bytes:
        return b""

    readline = read


def _drain(environ: Environ) -> None:
    # A client that is still sending would see a reset in place of the answer.
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def _refuse(
    respond: Respond, status: int, code: str, message: str, *, condition: str | None = None
) -> list[bytes]:
    named = f"<Condition>{condition}</Condition>" if condition else ""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{message}</Message>'
        f"{named}<RequestId>0</RequestId></Error>"
    ).encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    respond(f"{status} {_STATUS_TEXT.get(status, 'Error')}", headers)
    return [body]


def _hang_up(environ: Environ, respond: Respond) -> list[bytes]:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    respond("500 Never sent", [("Content-Length", "0")])
    return [b""]


def _client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        # Objects without a checksum, as many services keep them: the store's own hashes are what counts.
        config=Config(request_checksum_calculation="when_required"),
        endpoint_url=endpoint,
        region_name=_ACCOUNT["AWS_DEFAULT_REGION"],
        aws_access_key_id=_ACCOUNT["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=_ACCOUNT["AWS_SECRET_ACCESS_KEY"],
    )
