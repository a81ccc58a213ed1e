"""The fsspec file system behind a URL, one per process and settings.

The only module of ``schemas`` that imports fsspec, and only in functions.

Invariants (tests/schemas/test_filesystem.py):
    1. After a fork, or with other credentials or another endpoint in the environment, a new file system
       is made; the old one's connections and event loop belong to another process or account.
    2. Credentials come from the libraries' own chains; none is passed here.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import Any

from schemas.errors import RecipeError, first_line
from schemas.storage.retry import RetrySettings
from schemas.storage.service_errors import explain_service_error, service_errors

# Variables that the credential chains and fsspec read.
_VARIABLE_PREFIXES = ("AWS_", "AZURE_", "FSSPEC_", "GCE_", "GOOGLE_", "STORAGE_EMULATOR_HOST")
# Not the extra's name: what a package index has under ``tmkd`` need not be this project.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
# Directories need not be made there; s3fs would make a missing bucket.
_FLAT_PROTOCOLS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"})
_NUM_CONNECTIONS = 32
# Parts of a shard in flight at once; s3fs holds each (50 MiB) in memory.
_NUM_PARTS_AT_ONCE = 4

_filesystems: dict[tuple[int, str, RetrySettings, str], Any] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# A thread that is not there in the child may have held it. The parent's file systems stay listed under
# the parent's id: to let go of one would make it close its connections on the parent's event loop.
os.register_at_fork(after_in_child=_renew_lock)


def protocol_of(url: str) -> str:
    """Returns the scheme of a URL."""
    return url.partition("://")[0]


def open_filesystem(url: str, settings: RetrySettings) -> Any:
    """Returns this process's fsspec file system for ``url``, made on the first call.

    Raises:
        RecipeError: The scheme is unknown, or its package is not installed.
        ResourceError: The package lacks something, such as a library or a host.
    """
    key = (os.getpid(), protocol_of(url), settings, _hash_environment())
    with _lock:
        if key not in _filesystems:
            _filesystems[key] = _make_filesystem(url, settings)
        return _filesystems[key]


def needs_directories(url: str) -> bool:
    """Tells whether a file may be written only into a directory that exists."""
    return protocol_of(url) not in _FLAT_PROTOCOLS


def _make_filesystem(url: str, settings: RetrySettings) -> Any:
    import fsspec

    protocol = protocol_of(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        advice = f"pip install {package}" if package else first_line(error)
        raise RecipeError(f"{url}: needs a package that is not installed: {advice}") from error
    except ValueError as error:
        raise RecipeError(f"{url}: fsspec knows no storage named {protocol}") from error
    try:
        filesystem = fsspec.filesystem(protocol, skip_instance_cache=True, **_options(protocol, settings))
    except service_errors() as error:
        raise explain_service_error(error, url) from error
    if protocol in ("s3", "s3a"):
        filesystem.retries = 1
    return filesystem


def _options(protocol: str, settings: RetrySettings) -> dict[str, Any]:
    """Returns what is passed to the file system; what the user configured for fsspec goes first."""
    from fsspec.config import conf

    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        options = {
            "use_listings_cache": False,
            "max_concurrency": _NUM_PARTS_AT_ONCE,
            "config_kwargs": {
                "connect_timeout": settings.connect_timeout_s,
                "read_timeout": settings.read_timeout_s,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": _NUM_CONNECTIONS,
            },
        }
    elif protocol in ("gs", "gcs"):
        from aiohttp import ClientTimeout

        options = {
            "use_listings_cache": False,
            "session_kwargs": {
                "timeout": ClientTimeout(
                    total=None, sock_connect=settings.connect_timeout_s, sock_read=settings.read_timeout_s
                )
            },
        }
    for configured in (conf.get(name, {}) for name in _aliases(protocol)):
        for name in configured.keys() & options.keys():
            is_table = isinstance(options[name], dict)
            options[name] = {**options[name], **configured[name]} if is_table else configured[name]
    return options


def _aliases(protocol: str) -> tuple[str, ...]:
    for names in (("s3", "s3a"), ("gs", "gcs")):
        if protocol in names:
            return names
    return (protocol,)


def _hash_environment() -> str:
    relevant = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLE_PREFIXES))
    return hashlib.sha256(repr(relevant).encode()).hexdigest()
