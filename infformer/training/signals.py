"""Stopping when asked: SIGTERM and Ctrl-C end a run with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self


class StopRequested(Exception):  # noqa: N818, it is no error
    """Raised within `StopSignals.interruptible()`."""


class StopSignals:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once.

    `requested` is the number of the signal that came, or None. Use as a context manager, in the main thread.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._interruptible = False
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

    @contextmanager
    def interruptible(self, allowed: bool) -> Iterator[None]:
        """Work that changes nothing and may be cut short, such as an evaluation.

        Raises:
            StopRequested: as soon as a signal comes, if `allowed`.
        """
        if allowed and self.requested is not None:
            raise StopRequested
        self._interruptible = allowed
        try:
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
        if self._interruptible:
            raise StopRequested
