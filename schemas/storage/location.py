"""Where stores lie, as a recipe or a command line names it: a path or a URL, and the storage behind it.

A backend is one entry of ``_BACKENDS``.

Invariants (tests/schemas/test_location.py):
    1. Credentials never stand in a location: one with a user, a password or a query is refused.
    2. A local path is opened without importing fsspec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from schemas.errors import RecipeError
from schemas.storage.local import LocalStorage, create_local, list_local_stores
from schemas.storage.storage import Storage

LOCAL_SCHEMES = ("", "file", "local")
# Without its two slashes such a URL would be a path, and stores would go to a local directory.
_REMOTE_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https"})


@dataclass(frozen=True, slots=True)
class _Backend:
    """How a kind of location is opened; each function takes a normal location.

    Attributes:
        open: For what is there already.
        create: For a new store: makes directories, probes that create-if-absent works. The flag: one
            committer only, so that the probe may fail.
        list: The locations directly below one.
    """

    open: Callable[[str], Storage]
    create: Callable[[str, bool], Storage]
    list: Callable[[str], list[str]]


def normal_location(text: str | Path) -> str:
    """Returns a location without ambiguity: an absolute path, or a URL without a slash at its end.

    Raises:
        RecipeError: The URL has no bucket or lacks a slash, or holds credentials or a query.
    """
    text = str(text)
    if "://" not in text:
        _refuse_missing_slash(text)
        return str(Path(text).expanduser().absolute())
    parts = urlsplit(text)
    if parts.scheme in LOCAL_SCHEMES:
        return str(Path(parts.netloc + parts.path).absolute())
    if parts.username or parts.password or "@" in parts.netloc or parts.query or parts.fragment:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise RecipeError(
            f"{shown}: a location holds no credentials and no query; they come from the environment, such "
            "as AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS"
        )
    if not parts.netloc and not parts.path.strip("/"):
        raise RecipeError(f"{text}: names no bucket; a location is such as {parts.scheme}://bucket/prefix")
    return text.rstrip("/")


def join_location(root: str, name: str) -> str:
    """Returns the location of ``name`` below ``root``."""
    return f"{root.rstrip('/')}/{name}"


def is_local(location: str) -> bool:
    """Tells whether a normal location lies on a mounted file system."""
    return "://" not in location


def open_storage(location: str | Path) -> Storage:
    """Opens the storage of a store; whether there is a store shows when it is read.

    Raises:
        RecipeError: The location is none, or its kind needs a package that is not installed.
        ResourceError: The service cannot be reached.
    """
    root = normal_location(location)
    return _backend(root).open(root)


def create_storage(location: str | Path, *, single_committer: bool = False) -> Storage:
    """Opens the storage of a store that is to be written.

    Args:
        location: The store's root.
        single_committer: The caller vouches that one process alone commits, so that a backend which
            cannot create a file only if it is absent is good enough.

    Raises:
        RecipeError: See ``open_storage``.
        ResourceError: It may not be written, or ignores create-if-absent.
    """
    root = normal_location(location)
    return _backend(root).create(root, single_committer)


def list_locations(location: str | Path) -> list[str]:
    """Lists the locations directly below one, by name; none if it is not there.

    Raises:
        ResourceError: It may not be read, or cannot be reached.
    """
    root = normal_location(location)
    return _backend(root).list(root)


def _refuse_missing_slash(text: str) -> None:
    scheme, colon, rest = text.partition(":")
    if colon and scheme in _REMOTE_SCHEMES:
        right = f"{scheme}://{rest.rpartition('@')[2].lstrip('/')}"
        raise RecipeError(f"{right}: two slashes come after the scheme; a directory may be ./{scheme}:")


def _backend(root: str) -> _Backend:
    if is_local(root):
        return _LOCAL
    # fsspec and its event loop are for those who need them.
    from schemas.storage import object_store

    return _Backend(
        object_store.open_object_store, object_store.create_object_store, object_store.list_objects
    )


_LOCAL = _Backend(
    open=lambda root: LocalStorage(Path(root)),
    create=lambda root, _: create_local(Path(root)),
    list=lambda root: list_local_stores(Path(root)),
)
