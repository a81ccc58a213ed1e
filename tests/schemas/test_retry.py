from __future__ import annotations

import logging
import os
import time

import pytest

from schemas.errors import RecipeError, ResourceError
from schemas.storage.retry import RetrySettings, persist

QUICK = RetrySettings(num_attempts=5, total_s=5, first_wait_s=0.001, longest_wait_s=0.004)


class Action:
    """Fails with the given errors, then answers."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.times_s: list[float] = []

    def __call__(self) -> str:
        self.times_s.append(time.monotonic())
        if self.failures:
            raise self.failures.pop(0)
        return "answer"


def test_what_may_pass_is_tried_again_until_it_does() -> None:
    action = Action(TimeoutError(), ConnectionResetError(), TimeoutError(), BrokenPipeError())
    assert persist(action, QUICK, location="s3://b/x") == "answer"
    assert len(action.times_s) == 5


def test_tries_end_after_their_number() -> None:
    action = Action(*[TimeoutError("late")] * 9)
    with pytest.raises(ResourceError, match=r"s3://b/x: .*tried 5 times in 0 s \(late\)"):
        persist(action, QUICK, location="s3://b/x")
    assert len(action.times_s) == 5


@pytest.mark.parametrize("is_transfer", [False, True])
def test_tries_end_after_their_time_unless_a_whole_shard_is_moved(is_transfer: bool) -> None:
    action = Action(*[TimeoutError()] * 99)
    hasty = RetrySettings(num_attempts=8, total_s=0.05, first_wait_s=0.03, longest_wait_s=0.03)
    with pytest.raises(ResourceError):
        persist(action, hasty, location="s3://b/x", is_transfer=is_transfer)
    assert (len(action.times_s) == 8) is is_transfer


def test_waits_double_up_to_a_bound_and_a_random_part_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RetrySettings(num_attempts=6, total_s=60, first_wait_s=0.02, longest_wait_s=0.05)
    waits_s: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits_s.append)
    persist(Action(*[TimeoutError()] * 5), settings, location="s3://b/x")
    added_s = [
        wait_s - sure_s for wait_s, sure_s in zip(waits_s, (0.02, 0.04, 0.05, 0.05, 0.05), strict=True)
    ]
    assert all(0 <= added < 0.02 + 1e-9 for added in added_s)
    # Processes that were turned away together do not come back together.
    assert len({round(added, 12) for added in added_s}) == 5


@pytest.mark.parametrize("refusal", [PermissionError("no"), OSError("odd"), NotImplementedError()], ids=repr)
def test_a_refusal_is_raised_at_once(refusal: Exception) -> None:
    action = Action(refusal)
    with pytest.raises(ResourceError, match="s3://b/x"):
        persist(action, QUICK, location="s3://b/x")
    assert len(action.times_s) == 1


@pytest.mark.parametrize("kind", [FileNotFoundError, FileExistsError])
def test_what_is_there_or_not_is_the_callers_business(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="s3://b/x"):
        persist(Action(kind("secret detail")), QUICK, location="s3://b/x")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        persist(Action(ZeroDivisionError()), QUICK, location="s3://b/x")


def test_a_further_try_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        persist(Action(TimeoutError("late")), QUICK, location="s3://b/x")
    assert caplog.messages == ["s3://b/x: late; trying again (1 tries so far)"]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TMKD_STORAGE_")]:
        monkeypatch.delenv(name)
    assert RetrySettings.from_environment() == RetrySettings()
    monkeypatch.setenv("TMKD_STORAGE_NUM_ATTEMPTS", "3")
    monkeypatch.setenv("TMKD_STORAGE_TOTAL_S", "7.5")
    assert RetrySettings.from_environment() == RetrySettings(num_attempts=3, total_s=7.5)


@pytest.mark.parametrize("text", ["", "0", "-1", "many", "nan", "inf"])
def test_a_setting_that_is_no_positive_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    for name in ("TMKD_STORAGE_TOTAL_S", "TMKD_STORAGE_NUM_ATTEMPTS"):
        monkeypatch.setenv(name, text)
        with pytest.raises(RecipeError, match=name):
            RetrySettings.from_environment()
        monkeypatch.delenv(name)


def test_a_larger_file_gets_more_time() -> None:
    settings = RetrySettings(connect_timeout_s=5, read_timeout_s=15, slowest_bytes_per_s=1000)
    assert settings.limit_s(0) == 20
    assert settings.limit_s(60_000) == 80
