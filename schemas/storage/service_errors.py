"""What a storage service answers when it does not do what it was asked: try again, settle, or give up.

The libraries behind fsspec raise what they like; their classes are looked up among the modules that
are loaded, so that none is imported here.

Invariants (tests/schemas/test_service_errors.py):
    1. No credential that stands in the environment, in a URL or in a signature gets into a message.
    2. A refusal (403, no bucket, no credentials) is never taken for something that passes.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from schemas.errors import ResourceError, first_line

_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
# S3 says these with status 400: a body that was cut or damaged on its way, a connection too slow.
_TRANSIENT_CODES = frozenset(
    {"BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch"}
)
_TRANSIENT_ERRNO = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EHOSTUNREACH, errno.EIO, errno.ENETUNREACH, errno.EREMOTEIO}
)
_FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT})

# Module -> classes that it raises for a request that failed.
_SERVICE_CLASSES = {
    "aiohttp.client_exceptions": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "botocore.parsers": ("ResponseParserError",),
    "gcsfs.retry": ("HttpError", "ChecksumError"),
    "google.auth.exceptions": ("GoogleAuthError",),
    "requests.exceptions": ("RequestException",),
    "urllib3.exceptions": ("HTTPError",),
}
# Those of them that say: no answer, or half of one.
_TRANSIENT_CLASSES = {
    "aiohttp.client_exceptions": ("ClientConnectionError", "ClientPayloadError"),
    "azure.core.exceptions": ("ServiceRequestError", "ServiceResponseError"),
    "botocore.exceptions": (
        "ConnectionError",
        "FlexibleChecksumError",
        "HTTPClientError",
        "IncompleteReadError",
    ),
    "botocore.parsers": ("ResponseParserError",),
    "gcsfs.retry": ("ChecksumError",),
    "google.auth.exceptions": ("TransportError",),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3.exceptions": ("HTTPError",),
}
# Attribute that holds the status -> the classes that have it because the service said it.
_STATUS_CLASSES = {
    "code": {"gcsfs.retry": ("HttpError",)},
    "status_code": {"azure.core.exceptions": ("HttpResponseError",)},
}
_CREDENTIAL_CLASSES = {
    "botocore.exceptions": (
        "CredentialRetrievalError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOError",
        "TokenRetrievalError",
    ),
    "google.auth.exceptions": ("DefaultCredentialsError", "RefreshError"),
}

_SECRET_VARIABLE = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL")
_SECRET_PATTERNS = (
    (re.compile(r"://[^/@\s]+@"), "://***@"),
    (re.compile(r"(?i)((?:x-(?:amz|goog)-)?(?:signature|credential|security-token)=)[^&\s\"']+"), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), "***"),
)
_SHORTEST_SECRET = 8


class InterruptedTransferError(ConnectionError):
    """An answer that cannot be believed yet: a file cut short, a record neither there nor refused."""


def service_errors() -> tuple[type[BaseException], ...]:
    """Returns the classes to catch round a call of a storage library, for an ``except`` clause."""
    return (OSError, NotImplementedError, *_loaded(_SERVICE_CLASSES))


def is_transient(error: BaseException) -> bool:
    """Tells whether the same request may succeed in a moment."""
    status = http_status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or service_code(error) in _TRANSIENT_CODES
    if isinstance(error, _loaded(_CREDENTIAL_CLASSES)):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, *_loaded(_TRANSIENT_CLASSES))):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def is_existing(error: BaseException) -> bool:
    """Tells whether a create-if-absent was refused because the file is there."""
    # Some S3-like services leave out which condition failed; s3fs then does not say FileExistsError.
    return isinstance(error, FileExistsError) or http_status(error) == 412


def is_missing(error: BaseException) -> bool:
    """Tells whether a file is not there, though its bucket is."""
    return isinstance(error, FileNotFoundError) and service_code(error) != "NoSuchBucket"


def is_empty_range(error: BaseException) -> bool:
    """Tells whether a range was refused because the file is empty."""
    return http_status(error) == 416


def is_unsupported(error: BaseException) -> bool:
    """Tells whether the service does not know a condition that it was asked to keep."""
    unknown = isinstance(error, OSError) and error.errno == errno.ENOSYS
    return isinstance(error, NotImplementedError) or unknown or http_status(error) == 501


def http_status(error: BaseException) -> int | None:
    """Returns the status of the answer behind an error, or None if there was no answer."""
    for link in _chain(error):
        metadata = _response(link).get("ResponseMetadata")
        status = metadata.get("HTTPStatusCode") if isinstance(metadata, dict) else None
        for attribute, table in _STATUS_CLASSES.items():
            # Not any class with such an attribute: aiohttp says 400 of answers that it cannot parse.
            if isinstance(link, _loaded(table)):
                status = getattr(link, attribute)
        if str(status).isdecimal():
            return int(str(status))
    return None


def service_code(error: BaseException) -> str | None:
    """Returns S3's name of an error, such as ``NoSuchBucket``, if it said one."""
    for link in _chain(error):
        details = _response(link).get("Error")
        if isinstance(details, dict) and details.get("Code"):
            return str(details["Code"])
    return None


def explain_service_error(error: BaseException, location: str, *, tries: str = "") -> ResourceError:
    """Returns the refusal of a service as one line that says what to do, without credentials."""
    said = say(error)
    status = http_status(error)
    if isinstance(error, _loaded(_CREDENTIAL_CLASSES)):
        advice = (
            f"no usable credentials ({said}); they come from the environment (AWS_PROFILE, "
            "GOOGLE_APPLICATION_CREDENTIALS), the user's configuration or the instance's role"
        )
    elif service_code(error) == "NoSuchBucket":
        advice = "there is no such bucket; create it, or correct the location"
    elif status in (401, 403) or isinstance(error, PermissionError):
        advice = f"access denied ({said}); check the credentials and the bucket's policy"
    elif status is None and isinstance(error, OSError) and error.errno in _FULL_ERRNO:
        advice = (
            "the local disk is full; free space, lower TMKD_CACHE_BYTES, or move TMKD_CACHE_DIR or TMPDIR"
        )
    elif is_transient(error):
        advice = (
            f"the storage service does not answer as it should{tries} ({said}); committed shards are kept: "
            "check the endpoint and run the same command again"
        )
    else:
        advice = f"the storage service refused ({type(error).__name__}: {said})"
    return ResourceError(f"{location}: {advice}")


def say(error: BaseException) -> str:
    """Returns the first line of what a service or a library said, without credentials."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return scrub(said.strip().partition("\n")[0])


def is_clean(error: BaseException) -> bool:
    """Tells whether a traceback that shows ``error`` and its causes shows no credential."""
    return all(scrub(str(link)) == str(link) for link in _chain(error))


def scrub(text: str) -> str:
    """Returns ``text`` with everything starred out that is or looks like a credential."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name) and not value.startswith("/"):
            text = text.replace(value, "***")
    for pattern, replacement in _SECRET_PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and what it was raised from; a few links, in case they form a ring."""
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return
        yield link
        link = link.__cause__


def _response(error: BaseException) -> dict[str, Any]:
    response = getattr(error, "response", None)
    return response if isinstance(response, dict) else {}


def _loaded(table: Mapping[str, tuple[str, ...]]) -> tuple[type[BaseException], ...]:
    found = []
    for module_name, class_names in table.items():
        module = sys.modules.get(module_name)
        found += [vars(module)[name] for name in class_names if module is not None and name in vars(module)]
    return tuple(found)
