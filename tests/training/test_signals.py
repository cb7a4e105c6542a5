"""Being asked to stop: noted, agreed on by all processes, and told where work can be cut short."""

import os
import signal
from contextlib import suppress

import pytest

from infformer.training.signals import StopRequested, StopSignals

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def alone() -> StopSignals:
    """Of one process, whose own number is the highest."""
    return StopSignals(lambda number: number)


@BOTH
def test_a_signal_is_noted_and_nothing_else(number: int) -> None:
    with alone() as signals:
        assert signals.agreed() is None
        signals.raise_if_agreed()
        os.kill(os.getpid(), number)
        assert signals.agreed() == signals.agreed() == number
        with pytest.raises(StopRequested) as stop:
            signals.raise_if_agreed()
    assert stop.value.number == number


@BOTH
def test_what_another_process_was_sent_counts_as_much(number: int) -> None:
    told: list[int] = []
    signals = StopSignals(lambda own: told.append(own) or max(own, int(number)))
    with signals, pytest.raises(StopRequested, match=f"signal {int(number)}"):
        signals.raise_if_agreed()
    assert told == [0]


def test_processes_that_were_sent_different_signals_agree_on_one() -> None:
    found = []
    for own in (signal.SIGTERM, signal.SIGINT):
        with StopSignals(lambda number: max(number, signal.SIGTERM, signal.SIGINT)) as signals:
            os.kill(os.getpid(), own)
            found.append(signals.agreed())
    assert found == [signal.SIGTERM, signal.SIGTERM]


@BOTH
def test_who_insists_interrupts_at_once(number: int) -> None:
    with alone():
        os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_schedulers_may_ask_more_than_once() -> None:
    with alone() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM


def test_afterwards_signals_do_what_they_did_before() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with suppress(ZeroDivisionError), alone():
        assert all(signal.getsignal(number) not in before for number in numbers)
        _ = 1 / 0
    assert [signal.getsignal(number) for number in numbers] == before
