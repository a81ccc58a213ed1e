"""``--push-to-hub`` against a stub of the hub's client: nothing is sent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from cluster import hub
from cluster.hub import HubTarget, check_target, push_export
from schemas.errors import RecipeError, RefusedError, ResourceError

REPO = "owner/name"


class StubApi:
    """The calls that the export may make, written down.

    Attributes:
        repositories: From id to whether it is private.
        broken: What ``upload_folder`` raises.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, bool] = {}
        self.calls: list[str] = []
        self.uploaded: list[Path] = []
        self.broken: Exception | None = None

    def repo_info(self, repo: str) -> Any:
        self.calls.append("repo_info")
        if repo not in self.repositories:
            raise RepositoryNotFoundError("no such repository", response=response(404))
        return SimpleNamespace(private=self.repositories[repo])

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.calls.append(f"create_repo private={private}")
        self.repositories.setdefault(repo, private)
        return f"https://hub.example/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append("upload_folder")
        if self.broken is not None:
            raise self.broken
        assert commit_message
        self.uploaded.append(folder_path)


def response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub.example"))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StubApi:
    """A hub that can be reached with a token."""
    stub = StubApi()
    monkeypatch.setattr(hub, "HfApi", lambda: stub)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: "hf_made_up")
    return stub


@pytest.mark.parametrize("repo", ["name", "a/b/c", "owner/na me", "owner/..", "", "owner/name.git"])
def test_what_is_no_repository_is_a_usage_error(api: StubApi, repo: str) -> None:
    with pytest.raises(RecipeError, match="--push-to-hub"):
        check_target(HubTarget(repo))
    assert api.calls == []


def test_offline_and_without_a_token_are_told_before_the_export(
    api: StubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ResourceError, match="hf auth login"):
        check_target(HubTarget(REPO))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        check_target(HubTarget(REPO))
    assert api.calls == []


def test_a_new_repository_is_private_unless_public_is_said(api: StubApi, tmp_path: Path) -> None:
    check_target(HubTarget(REPO))
    assert push_export(tmp_path, HubTarget(REPO)) == f"https://hub.example/{REPO}"
    assert api.repositories == {REPO: True}
    push_export(tmp_path, HubTarget("owner/open", public=True))
    assert api.repositories == {REPO: True, "owner/open": False}
    assert api.uploaded == [tmp_path, tmp_path]


def test_a_public_repository_takes_nothing_without_public(api: StubApi, tmp_path: Path) -> None:
    api.repositories[REPO] = False
    for attempt in (check_target, lambda target: push_export(tmp_path, target)):
        with pytest.raises(RefusedError, match="--public"):
            attempt(HubTarget(REPO))
    assert api.uploaded == []
    check_target(HubTarget(REPO, public=True))
    push_export(tmp_path, HubTarget(REPO, public=True))
    assert api.uploaded == [tmp_path]


@pytest.mark.parametrize(
    "error",
    [
        HfHubHTTPError("403 Forbidden: no right to write", response=response(403)),
        httpx2.ConnectError("403 Forbidden: the line is dead"),
        OSError("403 Forbidden: a file is gone"),
    ],
)
def test_a_failed_upload_says_how_to_repeat_it_alone(api: StubApi, tmp_path: Path, error: Exception) -> None:
    api.broken = error
    (tmp_path / "README.md").write_text("kept")
    with pytest.raises(ResourceError, match=f"hf upload {REPO} {tmp_path} --private`") as caught:
        push_export(tmp_path, HubTarget(REPO))
    assert "403 Forbidden" in caught.value.message
    assert (tmp_path / "README.md").read_text() == "kept"


def test_a_hub_that_cannot_be_asked_is_told_before_the_export(
    api: StubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(repo: str) -> None:
        raise httpx2.ConnectError("no route")

    monkeypatch.setattr(api, "repo_info", fail)
    with pytest.raises(ResourceError, match="no route"):
        check_target(HubTarget(REPO))
