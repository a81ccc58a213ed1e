"""Signals as a flag."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from precompute.interrupt import StopFlag, stop_on_signals
from schemas.errors import InterruptedRunError


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_sets_the_flag_and_the_error_has_its_exit_code(number: int, exit_code: int) -> None:
    with stop_on_signals() as stop:
        assert not stop.is_set()
        stop.raise_if_set()
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
        with pytest.raises(InterruptedRunError) as caught:
            stop.raise_if_set()
    assert caught.value.exit_code == exit_code


def test_a_second_ctrl_c_raises_keyboard_interrupt() -> None:
    with stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_that_were_there_are_there_again() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with contextlib.suppress(ValueError), stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        raise ValueError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_first_signal_counts() -> None:
    stop = StopFlag()
    stop.set(signal.SIGTERM)
    stop.set(signal.SIGINT)
    assert stop.signal_number == signal.SIGTERM
