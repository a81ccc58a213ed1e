"""The main job with its stores on S3: made, read, reused, looked after; nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from cluster.cli import run_command
from distill.store_reader import LogitStore
from tests.end_to_end.project import Project
from tests.object_server import ObjectServer, object_server

pytestmark = pytest.mark.filterwarnings("ignore:`torch.*:FutureWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    with pytest.MonkeyPatch.context() as patch, object_server() as server:
        patch.setenv("TMKD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield server


@pytest.fixture(scope="module")
def project(server: ObjectServer, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("project"))
    assert run_command(["run", small_recipe(project, server)]) == 0
    return project


def small_recipe(project: Project, server: ObjectServer) -> str:
    return project.recipe(
        store={"shard_rows": 16, "batch_rows": 5, "root": server.url("stores")},
        stages=[{"kind": "finetune", "corpus": "train", "teachers": ["first", "second"], "max_steps": 2}],
        student={
            "init": {"kind": "layers", "model": str(project.root / "models" / "first"), "layers": 1},
            "max_length": 32,
            "arm": "m-o-1",
        },
        compare={"arms": []},
        evaluation={"corpora": ["test"], "speed_rows": 0},
    )


def lock_of(project: Project) -> dict[str, list[dict[str, dict[str, str]]]]:
    corpora: dict[str, list[dict[str, dict[str, str]]]] = json.loads(
        (project.root / "runs" / "run" / "stores.lock.json").read_text()
    )["corpora"]
    return corpora


def test_a_run_leaves_its_stores_on_the_object_store_alone(project: Project, server: ObjectServer) -> None:
    roots = {
        root for parts in lock_of(project).values() for part in parts for root in part["stores"].values()
    }
    assert len(roots) == 4
    assert all(root.startswith(server.url("stores/")) for root in roots)
    assert not (project.root / "runs" / "stores").exists()
    assert (project.root / "runs" / "run" / "report.html").exists()
    secret = "test-secret-key"
    texts = [path.read_bytes() for path in (project.root / "runs").rglob("*") if path.is_file()]
    assert not any(secret.encode() in text for text in texts)


def test_a_second_run_does_no_work_and_another_student_reuses_the_stores(
    project: Project, server: ObjectServer
) -> None:
    server.faults.requests.clear()
    recipe = small_recipe(project, server)
    assert run_command(["run", recipe]) == 0
    arguments = ["--set", "name=again", "--set", "seed=5"]
    assert run_command(["run", recipe, *arguments]) == 0
    assert [request for request in server.faults.requests if request[0] in ("PUT", "POST", "DELETE")] == []


def test_the_rows_are_those_of_a_local_run(project: Project, server: ObjectServer) -> None:
    remote = lock_of(project)["test"][0]["stores"]["second"]
    local_recipe = project.recipe(name="local", compare={"arms": []})
    assert run_command(["precompute", local_recipe, "--teacher", "second"]) == 0
    local = json.loads((project.root / "runs" / "local" / "stores.lock.json").read_text())
    rows = np.arange(24)
    expected = LogitStore.open(local["corpora"]["test"][0]["stores"]["second"]).gather(rows)
    np.testing.assert_array_equal(LogitStore.open(remote).gather(rows), expected)


def test_stores_are_listed_and_verified_where_they_lie(
    project: Project, server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["store", "ls", server.url("stores"), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["stores"]
    assert len(listed) == 4
    assert all(store["is_complete"] for store in listed)
    assert run_command(["store", "verify", listed[0]["path"], "--deep", "--json"]) == 0


def test_damage_on_the_object_store_is_found_and_named(
    project: Project, server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    root = lock_of(project)["train"][0]["stores"]["first"]
    prefix = root.removeprefix(server.url("")) + "/data/"
    key = next(key for key in sorted(server.keys()) if key.startswith(prefix))
    whole = server.get(key)
    server.put(key, whole[:600] + bytes([whole[600] ^ 1]) + whole[601:])
    # A copy that was hashed before is still good: the damage is not in it.
    LogitStore.open(root).gather(np.arange(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMKD_CACHE_DIR", str(project.root / "other-cache"))
        assert run_command(["store", "verify", root, "--deep"]) == 3
    assert "repair" in capsys.readouterr().err
    server.put(key, whole)


def test_a_service_without_conditional_writes_wants_a_single_committer(
    project: Project, server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    store = {"shard_rows": 16, "root": server.url("alone")}
    recipe = project.recipe(name="alone", store=store, compare={"arms": []})
    server.faults.ignores_if_none_match = True
    arguments = ["precompute", recipe, "--teacher", "second"]
    assert run_command(arguments) == 6
    assert "store.single_committer: true" in capsys.readouterr().err
    assert [key for key in server.keys() if key.startswith("alone/")] == []  # noqa: SIM118
    assert run_command([*arguments, "--set", "store.single_committer=true"]) == 0
    server.faults.ignores_if_none_match = False
    capsys.readouterr()
    assert run_command(["store", "ls", server.url("alone"), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["stores"]
    assert len(listed) == 3
    for store in listed:
        assert run_command(["store", "verify", store["path"], "--deep"]) == 0


def test_an_unreachable_store_is_a_resource_error(
    project: Project, server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert run_command(["store", "verify", server.url("stores/absent")]) == 6
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "does not answer" in line
