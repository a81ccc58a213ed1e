from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec.config
import pytest

from schemas.errors import RecipeError
from schemas.storage.filesystem import needs_directories, open_filesystem
from schemas.storage.retry import RetrySettings

SETTINGS = RetrySettings(connect_timeout_s=3, read_timeout_s=7)


def test_a_file_system_is_made_once_for_all_threads() -> None:
    start = threading.Barrier(8)

    def make(_: int) -> Any:
        start.wait()
        return open_filesystem("s3://bucket/store", SETTINGS)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, range(8)))
    assert len({id(filesystem) for filesystem in made}) == 1
    assert open_filesystem("s3://other/store", SETTINGS) is made[0]


@pytest.mark.parametrize("variable", ["AWS_PROFILE", "AWS_ENDPOINT_URL", "FSSPEC_S3_ANON"])
def test_another_account_or_endpoint_makes_another_file_system(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    before = open_filesystem("s3://bucket/store", SETTINGS)
    monkeypatch.setenv(variable, "other")
    assert open_filesystem("s3://bucket/store", SETTINGS) is not before
    monkeypatch.delenv(variable)
    assert open_filesystem("s3://bucket/store", SETTINGS) is before


def test_time_limits_are_passed_on_and_no_other_layer_tries_again() -> None:
    filesystem = open_filesystem("s3://bucket/store", SETTINGS)
    assert filesystem.config_kwargs["connect_timeout"] == 3
    assert filesystem.config_kwargs["read_timeout"] == 7
    assert filesystem.config_kwargs["retries"] == {"total_max_attempts": 1}
    assert filesystem.retries == 1
    assert not filesystem.dircache.use_listings_cache


def test_what_the_user_set_for_fsspec_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"config_kwargs": {"read_timeout": 99}, "max_concurrency": 2, "endpoint_url": "http://h"}
    monkeypatch.setitem(fsspec.config.conf, "s3", theirs)
    filesystem = open_filesystem("s3://bucket/store", RetrySettings(connect_timeout_s=4))
    assert filesystem.config_kwargs["read_timeout"] == 99
    assert filesystem.config_kwargs["connect_timeout"] == 4
    assert (filesystem.max_concurrency, filesystem.endpoint_url) == (2, "http://h")


def test_no_credential_is_passed_on() -> None:
    filesystem = open_filesystem("s3://bucket/store", SETTINGS)
    assert (filesystem.key, filesystem.secret, filesystem.token, filesystem.anon) == (None, None, None, False)


def test_a_scheme_that_fsspec_does_not_know_is_refused() -> None:
    with pytest.raises(RecipeError, match="knows no storage named nowhere"):
        open_filesystem("nowhere://bucket/store", SETTINGS)


def test_no_directory_is_made_on_an_object_store() -> None:
    # s3fs would make a bucket that is missing.
    assert not needs_directories("s3://bucket/store")
    assert needs_directories("sftp://host/store")
