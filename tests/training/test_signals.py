"""Being asked to stop: noted, agreed on by all processes, and told where work can be cut short."""

import os
import signal
from contextlib import suppress

import pytest

from infformer.training.supervision import StopRequested, StopSignals

pytestmark = pytest.mark.usefixtures("signals_heard")
EACH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])


def alone() -> StopSignals:
    """Of one process, whose own number is the all_reduce_max."""
    return StopSignals(lambda number: number)


@EACH
def test_a_signal_is_noted_and_nothing_else(number: int) -> None:
    with alone() as signals:
        assert signals.agreed() is None
        signals.raise_if_agreed()
        os.kill(os.getpid(), number)
        assert signals.agreed() == signals.agreed() == number
        with pytest.raises(StopRequested) as stop:
            signals.raise_if_agreed()
    assert stop.value.number == number


@EACH
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


@EACH
def test_the_second_interrupt_changes_nothing_and_the_third_interrupts_at_once(number: int) -> None:
    """A launcher or a nervous finger sends two."""
    with alone() as signals:
        os.kill(os.getpid(), number)
        for _ in range(3 - (number == signal.SIGINT) - 1):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.agreed() == number
        with pytest.raises(KeyboardInterrupt, match="resume=auto"):
            os.kill(os.getpid(), signal.SIGINT)


def test_who_interrupts_is_told_what_comes_of_it_by_the_main_process_alone(capfd) -> None:
    for shows in (True, False):
        with StopSignals(lambda number: number, shows):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        said = capfd.readouterr().err.split("\n")
        assert said == (
            ["", "SIGINT: this step is finished and saved; 2 more interrupt it at once", ""] if shows else [""]
        )


def test_a_hangup_that_nohup_ignores_remains_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with alone() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.agreed() is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_first_signal_is_the_one_that_is_told() -> None:
    """An interrupt ends `accelerate launch`, whose end then terminates the process."""
    with alone() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGINT


def test_schedulers_may_ask_more_than_once() -> None:
    with alone() as signals:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed() == signal.SIGTERM


def test_afterwards_signals_do_what_they_did_before() -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with suppress(ZeroDivisionError), alone():
        assert all(signal.getsignal(number) not in before for number in numbers)
        _ = 1 / 0
    assert [signal.getsignal(number) for number in numbers] == before
