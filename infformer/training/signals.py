"""Stopping when asked: SIGTERM, SIGHUP and SIGINT end a run with a checkpoint, on all processes after the same step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

INSISTENCE = 3
"""So many times SIGINT has to come to interrupt at once: the second may have been sent along with the first."""


class StopRequested(Exception):  # noqa: N818, it is no error
    """Some process was asked to stop, and all know.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopSignals:
    """Notes SIGTERM, SIGHUP and SIGINT instead of dying of them; the third SIGINT interrupts at once.

    SIGHUP that was ignored before, by `nohup`, remains ignored. Use as a context manager, in the main thread. Outside
    of it signals do what they always do.

    Args:
        all_reduce_max: the highest of the numbers that the processes call it with, all together.
        shows: tells whoever sends SIGINT, perhaps with a key, what comes of it.
    """

    def __init__(self, all_reduce_max: Callable[[int], int], shows: bool = False) -> None:
        self._all_reduce_max = all_reduce_max
        self._shows = shows
        self._requested = 0
        self._interrupts = 0
        self._previous: dict[int, signal.Handlers | int | object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> int | None:
        """The number of a signal that any process was sent, None if none was. All processes together."""
        return self._all_reduce_max(self._requested) or None

    def raise_if_agreed(self) -> None:
        """For work that changes nothing and may be cut short, such as an evaluation. All processes together.

        Raises:
            StopRequested: any process was sent a signal.
        """
        number = self.agreed()
        if number is not None:
            raise StopRequested(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = self._requested or number
        if number != signal.SIGINT:
            return
        self._interrupts += 1
        if self._interrupts >= INSISTENCE:
            raise KeyboardInterrupt(
                f"interrupted by the {INSISTENCE}rd SIGINT, without a checkpoint; resume=auto goes on from the newest"
            )
        if self._shows:
            left = INSISTENCE - self._interrupts
            text = f"\nSIGINT: this step is finished and saved; {left} more interrupt{'s' * (left == 1)} it at once\n"
            with suppress(OSError):  # print() may be what was interrupted
                os.write(2, text.encode())
