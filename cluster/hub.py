"""An export onto the Hugging Face hub, only ever when asked for, and private unless said otherwise.

Invariants:
    1. What forbids an upload and can be known before is said before the export (tests/cluster/test_hub.py).
    2. Nothing goes into a public repository without ``public`` (tests/cluster/test_hub.py).
    3. The export survives a failed upload (tests/cluster/test_hub.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # of the library's lazy names

from schemas.errors import RecipeError, RefusedError, ResourceError, first_line

# The HTTP library's own base is not exported; a lost connection is one of it and no OSError.
_FAILURES: tuple[Any, ...] = (OSError, HfHubHTTPError.__bases__[0])


@dataclass(frozen=True, slots=True)
class HubTarget:
    """Where an export goes.

    Attributes:
        repo: ``owner/name``.
        public: Whether anyone may read it.
    """

    repo: str
    public: bool = False


def check_target(target: HubTarget) -> None:
    """Checks what can be known before an export: the id, the network, the token, the repository.

    Raises:
        RecipeError: The id is none.
        ResourceError: Offline, without a token, or the hub cannot be asked.
        RefusedError: The repository is public and that was not said.
    """
    try:
        validate_repo_id(target.repo)
    except HFValidationError as error:
        raise RecipeError(f"--push-to-hub: {first_line(error)}") from error
    if target.repo.count("/") != 1:
        raise RecipeError(f"--push-to-hub wants owner/name, got {target.repo!r}")
    if constants.HF_HUB_OFFLINE:
        raise ResourceError("--push-to-hub: HF_HUB_OFFLINE is set; unset it, or export without --push-to-hub")
    if huggingface_hub.get_token() is None:
        raise ResourceError("--push-to-hub: there is no token; run `hf auth login`, or set HF_TOKEN")
    try:
        _check_visibility(HfApi(), target)
    except RepositoryNotFoundError:
        return
    except _FAILURES as error:
        raise ResourceError(f"--push-to-hub: the hub cannot be asked ({first_line(error)})") from error


def push_export(directory: Path, target: HubTarget) -> str:
    """Uploads an export.

    Returns:
        The repository's address.

    Raises:
        ResourceError: It failed; the export is as it was.
        RefusedError: The repository is public and that was not said.
    """
    api = HfApi()
    try:
        url = str(api.create_repo(target.repo, private=not target.public, exist_ok=True))
        # One that was there keeps its visibility.
        _check_visibility(api, target)
        api.upload_folder(
            repo_id=target.repo, folder_path=directory, commit_message="A student distilled with tmkd"
        )
    except _FAILURES as error:
        private = "" if target.public else " --private"
        raise ResourceError(
            f"the upload to {target.repo} failed ({first_line(error)}); the export is kept: "
            f"`hf upload {target.repo} {directory}{private}`"
        ) from error
    return url


def _check_visibility(api: HfApi, target: HubTarget) -> None:
    if not target.public and api.repo_info(target.repo).private is False:
        raise RefusedError(
            f"{target.repo} is a public repository; say --public if that is meant, or name another"
        )
