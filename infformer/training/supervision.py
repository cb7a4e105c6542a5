"""Signals that stop a run, and a watchdog that notices when another process hangs."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

EXIT_CODE = 70
"""The exit code of a process that was given up: EX_SOFTWARE, an internal error."""
INSISTENCE = 3
"""How often SIGINT has to come to interrupt at once: the second may have been sent along with the first."""


class StopRequested(Exception):  # noqa: N818, it is no error
    """Some process was asked to stop, and all know."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopSignals:
    """Notes SIGTERM, SIGHUP and SIGINT instead of dying of them; the third SIGINT interrupts at once.

    SIGHUP that was ignored before, by `nohup`, remains ignored. Use as a context manager, in the main thread. Outside
    of it signals do what they always do.

    Args:
        all_reduce_max: see `runtime.all_reduce_max`.
        shows: whether to say what comes of a SIGINT, which may have been sent by a key.
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

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> int | None:
        """The number of a signal that any process was sent, None if none was. All processes together."""
        return self._all_reduce_max(self._requested) or None

    def raise_if_agreed(self) -> None:
        """Cut work short that changes nothing, such as an evaluation, if asked to stop. All processes together.

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


class Watchdog:
    """Watches over the progress of one process of several; use it as a context manager.

    Every process tells all others what it is about to do. When one has told nothing for too long, it prints what each
    did last and its own stack, and exits; the launcher then ends the others. One process alone is not watched: nobody
    waits for it but its user.

    Args:
        process: the number of this process,
        processes: of how many.
        patience: seconds without progress.
    """

    def __init__(self, process: int, processes: int, patience: float) -> None:
        self._process = process
        self._processes = processes
        self._patience = patience
        self._finished = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._processes > 1:
            self.tell("begins")
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._finished.set()

    def tell(self, what: str) -> None:
        """Report progress, and what comes next, such as `computes (step 7)`."""
        self._last = time.monotonic()
        if self._processes > 1:
            # The launcher kept the store and may be gone, and the checkpoint is yet to be written.
            with suppress(RuntimeError):
                _store().set(_key(self._process), what)

    def _watch(self) -> None:
        while not self._finished.wait(min(1.0, self._patience / 4)):
            silence = time.monotonic() - self._last
            if silence > self._patience:
                break
        else:
            return
        logger.error(
            "process %d has made no progress for %.0f s (engine.patience=%g), and ends the run. What each process told "
            "last: %s. Those that are behind hang; where this one stands follows. resume=auto goes on from the newest "
            "checkpoint",
            self._process, silence, self._patience, self._where_all_stand(),
        )  # fmt: skip
        faulthandler.dump_traceback()
        time.sleep(2)  # for the others to say the same of themselves, before the launcher ends them
        os._exit(EXIT_CODE)

    def _where_all_stand(self) -> str:
        try:
            told = [_store().get(_key(process)).decode() for process in range(self._processes)]
        except RuntimeError as error:  # the process that holds the store is gone
            return f"unknown ({error})"
        return "; ".join(f"process {process} {what}" for process, what in enumerate(told))


def _store() -> Store:
    """A store that all processes can read and write without collective calls, which a hanging one would block."""
    from torch.distributed import distributed_c10d  # who only listens to signals needs no torch

    return distributed_c10d._get_default_store()


def _key(process: int) -> str:
    return f"infformer/told by/{process}"
