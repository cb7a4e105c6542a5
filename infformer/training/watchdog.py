"""Several processes wait for each other, for ever if one hangs. The watchdog ends the run, and says who stood where."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch.distributed

logger = logging.getLogger(__name__)

EXIT_CODE = 70
"""Of a process that was given up: EX_SOFTWARE, an internal error."""


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()

    def tell(self, what: str) -> None:
        """There is progress: `step 7: computes` comes next."""
        self._last = time.monotonic()
        if self._processes > 1:
            with suppress(
                RuntimeError
            ):  # the launcher kept the store and is gone, and the checkpoint is yet to be written
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


def _store() -> torch.distributed.Store:
    """What all processes of the run can write to and read, beside the collective calls that a hanging one blocks."""
    return torch.distributed.distributed_c10d._get_default_store()


def _key(process: int) -> str:
    return f"infformer/told by/{process}"
