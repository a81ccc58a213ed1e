from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from schemas.errors import RecipeError
from schemas.storage.location import is_local, join_location, list_locations, normal_location, open_storage


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/runs/stores", "/runs/stores"),
        ("/runs/stores/", "/runs/stores"),
        ("stores", str(Path.cwd() / "stores")),
        ("~/stores", str(Path.home() / "stores")),
        ("file:///runs/stores", "/runs/stores"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("memory://a", "memory://a"),
    ],
)
def test_a_location_is_an_absolute_path_or_a_url(text: str, expected: str) -> None:
    assert normal_location(text) == expected
    assert is_local(expected) == expected.startswith("/")


@pytest.mark.parametrize(
    "text",
    [
        "s3://AKIA:secret@bucket/a",
        "s3://AKIA@bucket/a",
        "s3://bucket/a?aws_secret_key=secret",
        "gs://b/a#secret",
    ],
)
def test_a_location_with_credentials_is_refused_and_they_are_not_repeated(text: str) -> None:
    with pytest.raises(RecipeError, match="holds no credentials") as caught:
        open_storage(text)
    assert "secret" not in str(caught.value)
    assert "AKIA" not in str(caught.value)


def test_a_url_without_a_bucket_is_refused() -> None:
    with pytest.raises(RecipeError, match="names no bucket"):
        open_storage("s3://")


def test_locations_are_joined_with_one_slash(tmp_path: Path) -> None:
    assert join_location("s3://bucket/", "a") == "s3://bucket/a"
    (tmp_path / "store").mkdir()
    assert list_locations(tmp_path) == [join_location(str(tmp_path), "store")]


def test_a_local_store_needs_no_fsspec() -> None:
    code = (
        "import sys; from schemas.storage.location import create_storage; import tempfile; "
        "create_storage(tempfile.mkdtemp()).create('a', b'b'); "
        "sys.exit(any(name in sys.modules for name in ('fsspec', 's3fs', 'botocore')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", ["s3:/bucket/a", "gs:bucket/a", "s3:/AKIA:secret@bucket/a"])
def test_a_url_that_lacks_a_slash_is_no_local_directory(text: str) -> None:
    with pytest.raises(
        RecipeError, match=r"^(s3|gs)://bucket/a: two slashes come after the scheme"
    ) as caught:
        normal_location(text)
    assert "secret" not in str(caught.value)
    assert normal_location(f"./{text}") == str(Path.cwd() / text)
