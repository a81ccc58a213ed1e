"""Joining and starting Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import ray_session as module
from cluster.ray_session import ray_session
from schemas.errors import ResourceError

HEAD = """
import signal, sys
from cluster.ray_session import ray_session
with ray_session(num_cpus=2) as session:
    import ray
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A cluster of another process, with a token of its own; yields its address."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def run_session(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process with a home of its own: Ray caches much for a process's life."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    prologue = "from cluster.ray_session import ray_session\nfrom schemas.errors import ResourceError\n"
    return subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(code)],
        env=kept | {"HOME": str(tmp_path)} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides a Ray that another test of this process may have started: it would be used as it is."""
    monkeypatch.setattr(module.ray, "is_initialized", lambda: False)


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_in_a_moment(scheme: str) -> None:
    began = time.monotonic()
    address = f"{scheme}127.0.0.1:{free_port()}"
    with pytest.raises(ResourceError, match="cannot be reached") as caught, ray_session(address):
        pass
    assert time.monotonic() - began < 10
    assert caught.value.exit_code == 6
    assert address in str(caught.value)


@pytest.mark.usefixtures("outside")
def test_the_environment_names_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(ResourceError, match="RAY_ADDRESS"), ray_session():
        pass


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "host:port"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ResourceError, match="expected host:port"), ray_session(address):
        pass


@pytest.mark.usefixtures("outside")
def test_a_port_that_is_no_ray_is_given_up_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "JOIN_TIMEOUT_S", 1.0)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ResourceError, match="did not answer within 1 s"), ray_session(address):
            pass
    assert time.monotonic() - began < 15


def test_a_running_cluster_is_joined_and_survives(head: str, tmp_path: Path) -> None:
    code = f"""
    for _ in range(2):
        with ray_session({head!r}) as session:
            print(session.started_here, session.nodes[0]["CPU"])
    """
    result = run_session(code, tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 64)
    assert result.stdout.split() == ["False", "2.0"] * 2, result.stderr


@pytest.mark.parametrize("token", ["", "c" * 64])
def test_a_wrong_token_is_a_clear_line(head: str, tmp_path: Path, token: str) -> None:
    code = f"""
    try:
        with ray_session({head!r}):
            pass
    except ResourceError as error:
        print(error)
    """
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {}
    began = time.monotonic()
    result = run_session(code, tmp_path, **environment)
    assert "wants another token; set RAY_AUTH_MODE=token" in result.stdout, result.stderr
    assert time.monotonic() - began < 20


def test_a_local_cluster_is_private_silent_and_keeps_the_callers_signal_handler(
    head: str, tmp_path: Path
) -> None:
    code = """
    import signal, os, time
    from pathlib import Path
    mine = lambda number, frame: None
    signal.signal(signal.SIGTERM, mine)
    with ray_session(num_cpus=3) as session:
        import ray
        assert signal.getsignal(signal.SIGTERM) is mine
        assert session.started_here
        # Not the other cluster of this machine, which has two.
        assert session.nodes[0]["CPU"] == 3.0, session.nodes
        @ray.remote
        class Dies:
            def now(self): os.kill(os.getpid(), 9)
        try:
            ray.get(Dies.remote().now.remote())
        except ray.exceptions.ActorDiedError:
            print("died")
        time.sleep(2)  # Ray tells of it a little later.
        with ray_session() as inner:
            assert not inner.started_here
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert not (Path.home() / ".ray" / "auth_token").exists()
    """
    result = run_session(code, tmp_path)
    assert (result.returncode, result.stdout) == (0, "died\n"), result.stderr
    assert "Traceback" not in result.stderr


def test_a_token_file_that_others_could_read_is_closed_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("a" * 64)
    path.chmod(0o644)
    module._protect_token_file()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "failure",
    [
        Exception("The current node timed out during startup."),
        RuntimeError("no port is free"),
        OSError("full"),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_cluster_that_does_not_start_is_a_resource_error(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(**_: object) -> None:
        raise failure

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module.ray, "init", fail)
    with (
        pytest.raises(ResourceError, match=f"a local Ray cannot be used: {failure}"),
        ray_session(num_cpus=1),
    ):
        pass


def test_an_error_of_our_own_on_the_way_to_a_cluster_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module.ray, "init", fail)
    with pytest.raises(KeyError, match="a bug"), ray_session(num_cpus=1):
        pass
