"""Joining a Ray cluster, or starting one on this machine for the time of a run.

Invariants (tests/cluster/test_ray_session.py):
    1. Only what was started here is shut down here.
    2. An address that cannot be reached, or refuses the token, is an error in bounded time; Ray
       itself would try for minutes.
    3. Without an address nobody else's cluster on this machine is joined.
    4. No token of ours lies in a file that others can read.
    5. Nothing of Ray's appears on standard output.
    6. The caller's handler of SIGTERM survives: ``ray.init`` puts its own in its place.
"""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.exceptions import AuthenticationError, RayError

from schemas.errors import ResourceError

ADDRESS_VARIABLE = "RAY_ADDRESS"
CONNECT_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 20.0
# The proxy behind ray:// first starts a server of its own for each client.
CLIENT_JOIN_TIMEOUT_S = 40.0
# Receipts alone go through the object store.
_OBJECT_STORE_BYTES = 128 * 1024 * 1024
_CLIENT_SCHEME = "ray://"
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_AUTH_SIGNS = ("Unauthenticated", "InvalidAuthToken", "AuthenticationError", "missing authentication token")
_AUTH_ADVICE = (
    "it wants another token; set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or in the "
    "file RAY_AUTH_TOKEN_PATH"
)
_RAY_FAILURES = (ConnectionError, OSError, RuntimeError, ValueError, RayError)
_ERROR_THREAD = "ray_listen_error_messages"
_PROBE = """
import json, logging, sys, ray
try:
    # The client names a wrong token at this level alone.
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.DEBUG)
    print(json.dumps({"ok": True}))
except Exception as error:
    print(json.dumps({"ok": False, "kind": type(error).__name__, "message": str(error)}))
"""


@dataclass(frozen=True, slots=True)
class RaySession:
    """A connected cluster.

    Attributes:
        address: As it was joined, or ``local``.
        started_here: Whether it ends with the session.
        nodes: Total resources of each living node.
    """

    address: str
    started_here: bool
    nodes: tuple[Mapping[str, float], ...]


@contextmanager
def ray_session(
    address: str | None = None, *, num_cpus: int | None = None, log_to_driver: bool = False
) -> Iterator[RaySession]:
    """Connects this process to a Ray cluster while the block runs.

    Args:
        address: ``host:port``, ``ray://host:port`` or ``auto``; by default ``RAY_ADDRESS``, or else a
            cluster of this machine's own that ends with the block.
        num_cpus: CPUs of a cluster that is started here; by default the machine's.
        log_to_driver: Whether output of the actors appears here (on stderr).

    Raises:
        ResourceError: The cluster cannot be reached, refuses the token, or cannot be started.
    """
    if ray.is_initialized():
        yield _describe("current", started_here=False)
        return
    wanted = address or os.environ.get(ADDRESS_VARIABLE) or None
    options: dict[str, Any] = {"log_to_driver": log_to_driver, "logging_level": logging.ERROR}
    if wanted is None or wanted == "local":
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }
        _use_private_token()
    else:
        options |= {"address": wanted}
        _check_reachable(wanted)
        _probe(wanted)
    try:
        # Inside: an interrupted start may have left processes.
        _connect(options, wanted)
        with _quiet_stdout():
            yield _describe(wanted or "local", started_here=wanted in (None, "local"))
    finally:
        ray.shutdown()


class _Stdout(io.TextIOBase):
    """Standard output without what Ray's own thread prints there of every actor that dies."""

    def __init__(self, inner: TextIO) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        """Writes text, unless it is Ray's."""
        if threading.current_thread().name == _ERROR_THREAD:
            return len(text)
        return self._inner.write(text)

    def flush(self) -> None:
        """Flushes the output behind."""
        self._inner.flush()

    def isatty(self) -> bool:
        """Tells whether the output behind is a terminal."""
        return self._inner.isatty()

    def fileno(self) -> int:
        """Returns the descriptor of the output behind."""
        return self._inner.fileno()


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keeps standard output for data: ``log_to_driver=False`` does not cover Ray's own messages."""
    with redirect_stdout(_Stdout(sys.stdout)):
        yield


def _describe(address: str, *, started_here: bool) -> RaySession:
    nodes = tuple(dict(node["Resources"]) for node in ray.nodes() if node["Alive"])
    return RaySession(address, started_here, nodes)


def _connect(options: dict[str, Any], wanted: str | None) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if in_main else None
    where = f"Ray at {wanted}" if wanted else "a local Ray"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except AuthenticationError as error:
        raise ResourceError(f"{where}: {_AUTH_ADVICE}") from error
    except Exception as error:
        # Of a node that does not start in time Ray raises an Exception of no class of its own.
        if type(error) is not Exception and not isinstance(error, _RAY_FAILURES):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ResourceError(f"{where} cannot be used: {line}") from error
    finally:
        if in_main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        _protect_token_file()


def _use_private_token() -> None:
    """Gives a local cluster a token that lives in this process's environment alone.

    By default ``ray.init`` would write one to ``~/.ray/auth_token``, readable for everyone, and
    every later Ray of this user would take it up. Ray turns the mode on by itself (it caches the mode
    when it is imported, so that setting it here would come too late) and caches the token, so that
    it stays for the process's lifetime. Whatever the user has set is left as it is.
    """
    if any(name in os.environ for name in _AUTH_VARIABLES) or _token_file().exists():
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _token_file() -> Path:
    return Path.home() / ".ray" / "auth_token"


def _protect_token_file() -> None:
    """Takes the token file that Ray writes away from other users."""
    path = _token_file()
    if path.exists() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


def _check_reachable(address: str) -> None:
    """Connects to the address's port once.

    Raises:
        ResourceError: Nobody answers there, or it is no address.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix(_CLIENT_SCHEME).rpartition(":")
    if "://" in host or not host or not port.isdigit():
        raise ResourceError(f"Ray address {address!r}: expected host:port or ray://host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ResourceError(
            f"Ray at {address} cannot be reached ({error.strerror or error}); check --address and "
            f"{ADDRESS_VARIABLE}, or leave both out to run on this machine"
        ) from error


def _probe(address: str) -> None:
    """Connects from a process that can be ended: inside ``ray.init`` nothing else can run.

    Raises:
        ResourceError: The cluster refuses, or does not answer in time.
    """
    timeout_s = CLIENT_JOIN_TIMEOUT_S if address.startswith(_CLIENT_SCHEME) else JOIN_TIMEOUT_S
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-c", _PROBE, address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            deadline_s = time.monotonic() + timeout_s
            while process.poll() is None and time.monotonic() < deadline_s:
                if _shows_refusal(log):
                    raise ResourceError(f"Ray at {address}: {_AUTH_ADVICE}")
                time.sleep(0.05)
            if process.poll() is None:
                raise ResourceError(
                    f"Ray at {address} did not answer within {timeout_s:g} s; is it a Ray head's "
                    "port (6379, or ray:// with 10001)?"
                )
            output = process.stdout.read() if process.stdout else ""
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()
    _judge_probe(address, output)


def _judge_probe(address: str, output: str) -> None:
    lines = output.strip().splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"ok": False}
    if answer["ok"]:
        return
    text = f"{answer.get('kind', 'no answer')}: {answer.get('message', '')}".strip()
    if any(sign in text for sign in _AUTH_SIGNS):
        raise ResourceError(f"Ray at {address}: {_AUTH_ADVICE}")
    raise ResourceError(f"Ray at {address} cannot be used: {text.splitlines()[0]}")


def _shows_refusal(log: Any) -> bool:
    # The child shares the file's position: reading must not move it.
    text = os.pread(log.fileno(), 65536, 0).decode(errors="replace")
    return any(sign in text for sign in _AUTH_SIGNS)
