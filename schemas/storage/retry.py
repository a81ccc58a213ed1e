"""Bounded tries of a request to a storage service, with backoff and jitter.

This is the only layer that tries again: those of the libraries below are turned off where they let
themselves be, since layers multiply their waits (``schemas.storage.filesystem``).

Invariants (tests/schemas/test_retry.py):
    1. Only what may pass is tried again; a refusal is raised at once.
    2. The number of tries and their time are bounded.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
    wait_random,
)

from schemas.errors import RecipeError
from schemas.storage.service_errors import (
    explain_service_error,
    is_clean,
    is_existing,
    is_missing,
    is_transient,
    say,
    service_errors,
)

_LOGGER = logging.getLogger(__name__)
_VARIABLE_PREFIX = "TMKD_STORAGE_"

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """How patient to be; each from ``TMKD_STORAGE_<NAME>`` in the environment, if it is set.

    Attributes:
        num_attempts: Tries of one request.
        total_s: No further try begins later than this after the first. The transfer of a whole shard is
            bounded by its tries alone.
        first_wait_s: Wait before the second try; it doubles, and up to as much is added at random.
        longest_wait_s: Bound of what doubles.
        connect_timeout_s: For a connection.
        read_timeout_s: For the next byte of an answer.
        slowest_bytes_per_s: A file gets this much more time; one that takes longer is stuck.
    """

    num_attempts: int = 8
    total_s: float = 45.0
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    slowest_bytes_per_s: float = 256 * 1024

    def limit_s(self, num_bytes: int) -> float:
        """Returns how long a request that moves a file of this size may take.

        The time-outs of the libraries do not bound it: while a PUT waits for ``100 Continue`` or sends
        its body, no clock runs.
        """
        return self.connect_timeout_s + self.read_timeout_s + num_bytes / self.slowest_bytes_per_s

    @classmethod
    def from_environment(cls) -> RetrySettings:
        """Reads the settings.

        Raises:
            RecipeError: One is no positive number.
        """
        given: dict[str, int | float] = {}
        for field in fields(cls):
            variable = _VARIABLE_PREFIX + field.name.upper()
            if variable in os.environ:
                given[field.name] = _positive(variable, int if field.name == "num_attempts" else float)
        return cls(**given)  # type: ignore[arg-type]


def persist(
    action: Callable[[], Answer], settings: RetrySettings, *, location: str, is_transfer: bool = False
) -> Answer:
    """Calls ``action`` until it succeeds or is refused.

    Args:
        action: One request; what it raises decides.
        settings: How patient to be.
        location: Of the store or file, for the message.
        is_transfer: Whether it moves a whole shard, which may take longer than ``total_s``.

    Raises:
        FileNotFoundError: The file is not there; the bucket is.
        FileExistsError: ``action`` was to create it, and it is there.
        ResourceError: The service refuses, or still fails after the last try.
    """
    begin_s = time.monotonic()
    stop = stop_after_attempt(settings.num_attempts)
    retrying = Retrying(
        stop=stop if is_transfer else stop | stop_after_delay(settings.total_s),
        wait=wait_exponential(multiplier=settings.first_wait_s, max=settings.longest_wait_s)
        + wait_random(0, settings.first_wait_s),
        retry=retry_if_exception(is_transient),
        before_sleep=lambda state: _log_try(state, location),
        reraise=True,
    )
    try:
        return retrying(action)
    except service_errors() as error:
        if is_missing(error):
            raise FileNotFoundError(location) from None
        if is_existing(error):
            raise FileExistsError(location) from None
        num_tries, took_s = retrying.statistics.get("attempt_number", 1), time.monotonic() - begin_s
        refusal = explain_service_error(error, location, tries=f", tried {num_tries} times in {took_s:.0f} s")
        raise refusal from (error if is_clean(error) else None)


def _log_try(state: RetryCallState, location: str) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    said = say(error) if error is not None else ""
    _LOGGER.warning("%s: %s; trying again (%d tries so far)", location, said, state.attempt_number)


def _positive(variable: str, kind: type[int] | type[float]) -> int | float:
    text = os.environ[variable]
    try:
        value = kind(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise RecipeError(f"{variable}={text}: must be a positive number")
    return value
