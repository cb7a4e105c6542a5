"""Stopping when asked: SIGTERM and SIGINT end a run with a checkpoint, on all processes after the same step."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class StopRequested(Exception):  # noqa: N818, it is no error
    """Some process was asked to stop, and all know.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopSignals:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once.

    Use as a context manager, in the main thread. Outside of it signals do what they always do.

    Args:
        highest: the highest of the numbers that the processes call it with, all together.
    """

    def __init__(self, highest: Callable[[int], int]) -> None:
        self._highest = highest
        self._requested = 0
        self._previous: dict[int, signal.Handlers | int | object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> int | None:
        """The number of a signal that any process was sent, None if none was. All processes together."""
        return self._highest(self._requested) or None

    def raise_if_agreed(self) -> None:
        """For work that changes nothing and may be cut short, such as an evaluation. All processes together.

        Raises:
            StopRequested: any process was sent a signal.
        """
        number = self.agreed()
        if number is not None:
            raise StopRequested(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = number
