from __future__ import annotations

import errno

import pytest
from aiohttp.client_exceptions import ClientPayloadError, ServerDisconnectedError
from aiohttp.http_exceptions import ContentLengthError
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from schemas.storage.service_errors import (
    InterruptedTransferError,
    explain_service_error,
    http_status,
    is_clean,
    is_existing,
    is_missing,
    is_transient,
    is_unsupported,
    scrub,
    service_errors,
)


def answer(status: int, code: str, message: str = "said") -> Exception:
    """What s3fs raises for an answer of the service."""
    details = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(ClientError(details, "PutObject"))  # type: ignore[no-any-return]


URL = "http://127.0.0.1:9"
PASSES = [
    answer(500, "InternalError"),
    answer(503, "SlowDown"),
    answer(503, "503"),
    answer(429, "TooManyRequests"),
    answer(409, "ConditionalRequestConflict"),
    answer(400, "RequestTimeout"),
    answer(400, "BadDigest"),
    ReadTimeoutError(endpoint_url=URL),
    ConnectTimeoutError(endpoint_url=URL),
    EndpointConnectionError(endpoint_url=URL),
    ServerDisconnectedError(),
    ClientPayloadError(),
    FSTimeoutError(),
    ConnectionResetError(),
    InterruptedTransferError("cut"),
    OSError(errno.EIO, "input/output"),
]
REFUSALS = [
    answer(403, "AccessDenied"),
    answer(403, "403"),
    answer(403, "SignatureDoesNotMatch"),
    answer(400, "ExpiredToken"),
    answer(400, "InvalidBucketName"),
    answer(404, "NoSuchBucket"),
    answer(404, "NoSuchKey"),
    answer(412, "PreconditionFailed"),
    answer(501, "NotImplemented"),
    NoCredentialsError(),
    ParamValidationError(report="bucket"),
    PermissionError(),
    OSError(errno.ENOSPC, "full"),
    NotImplementedError(),
]


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_may_pass_is_known(error: Exception) -> None:
    assert is_transient(error)
    assert isinstance(error, service_errors())


@pytest.mark.parametrize("error", REFUSALS, ids=repr)
def test_a_refusal_is_known(error: Exception) -> None:
    assert not is_transient(error)
    assert isinstance(error, service_errors())


def test_a_half_answer_does_not_pass_for_the_status_that_the_http_library_gives_it() -> None:
    error = ClientPayloadError()
    error.__cause__ = ContentLengthError("half")
    assert http_status(error) is None
    assert is_transient(error)


def test_a_refused_create_is_known_with_and_without_the_name_of_its_condition() -> None:
    assert is_existing(answer(412, "PreconditionFailed"))
    assert is_existing(FileExistsError())
    assert not is_existing(answer(409, "ConditionalRequestConflict"))


def test_a_missing_bucket_is_no_missing_file() -> None:
    assert is_missing(answer(404, "NoSuchKey"))
    assert is_missing(FileNotFoundError())
    assert not is_missing(answer(404, "NoSuchBucket"))


def test_a_condition_that_a_service_does_not_know_is_known() -> None:
    assert is_unsupported(answer(501, "NotImplemented"))
    assert not is_unsupported(answer(503, "SlowDown"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (answer(403, "AccessDenied", "not you"), "access denied (not you); check the credentials"),
        (answer(404, "NoSuchBucket"), "there is no such bucket"),
        (NoCredentialsError(), "no usable credentials"),
        (OSError(errno.ENOSPC, "full"), "the local disk is full"),
        (answer(503, "SlowDown", "slowly"), "does not answer as it should (slowly)"),
        (answer(400, "InvalidRequest", "odd"), "refused (OSError: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_is_explained_in_one_line(error: Exception, said: str) -> None:
    message = explain_service_error(error, "s3://b/x").message
    assert message.startswith("s3://b/x: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("at http://user:pass@host:1/b", "at http://***@host:1/b"),
        (
            "https://h/b?X-Amz-Credential=AKIA1/us&X-Amz-Signature=0af&X-Amz-Security-Token=Fwo%3D&a=1",
            "https://h/b?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Security-Token=***&a=1",
        ),
        ("key AKIAIOSFODNN7EXAMPLE is unknown", "key *** is unknown"),
        ("the secret is wJalrXUtnFEMI!", "the secret is ***!"),
        ("s3://bucket/key=value?", "s3://bucket/key=value?"),
    ],
)
def test_credentials_are_starred_out(monkeypatch: pytest.MonkeyPatch, text: str, scrubbed: str) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert scrub(text) == scrubbed
    assert is_clean(OSError(text)) is (text == scrubbed)
    outer = OSError("harmless")
    outer.__cause__ = OSError(text)
    assert is_clean(outer) is (text == scrubbed)
