"""How a command begins and ends: in one sentence, the last that is shown, whoever started it and whatever ends it.

A launcher (`accelerate launch`, `torchrun`) says forty lines of its own when a process of it fails. So the sentence
waits, in a process of its own, until the launcher is gone. And a launcher that is killed tells nobody: Linux then sends
SIGTERM to what it had started.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

INTERRUPTED = 130
"""Exit code of a command that was interrupted: what shells say of SIGINT."""
_PR_SET_PDEATHSIG = 1
_launcher: int | None = None
"""The process that started this one, if that is a launcher."""


class Ended(SystemExit):
    """A command has come to an end, and says how."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(code)
        self.sentence = sentence


def begin() -> None:
    """Make the process one that ends as a command does; call it first, before what takes seconds to import.

    SIGINT ends it in a sentence. A terminal that is closed does not end it where its output is written. If a launcher
    started it, it gets SIGTERM when the launcher ends.
    """
    gc.disable()  # until `run`: a sixth of the time of all imports went into looking for garbage among them
    sys.excepthook = _show
    sys.stdout, sys.stderr = _outlasting(sys.stdout), _outlasting(sys.stderr)
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        _follow(os.getppid())


def run(main: Callable[[], object]) -> None:
    """Run a command, and show its last sentence: of `Ended`, of a `UserError`, or of `sys.exit("error: …")`."""
    from infformer.errors import UserError  # who only says a sentence, in a process of its own, has no package

    gc.enable()
    try:
        try:
            main()
        except UserError as error:
            sys.exit(f"error: {error}")
    except SystemExit as ended:
        _ignore_signals()
        if isinstance(ended, Ended):
            _say(ended.sentence)
        elif isinstance(ended.code, str):
            _say(ended.code)
            sys.exit(1)
        raise


def _follow(launcher: int) -> None:
    global _launcher
    _launcher = launcher
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # It may have ended before. Launchers are Python programs; in a container one may be the first process itself.
    orphan = launcher == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes()
    if orphan or os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGTERM)


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What the interpreter calls for an error that nobody caught."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    _ignore_signals()
    _say(str(error) or "interrupted")
    sys.exit(INTERRUPTED)


def _ignore_signals() -> None:
    """It is over; launchers and people who ask again change nothing."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _say(sentence: str) -> None:
    """Show a sentence below all else, once on each machine though several processes come with it."""
    if _another_says(sentence):
        return
    last_try = os.environ.get("TORCHELASTIC_RESTART_COUNT") == os.environ.get("TORCHELASTIC_MAX_RESTARTS")
    # Nobody outlives the first process of a container, so that nobody would be left to say it.
    if os.getppid() != _launcher or _launcher == 1 or not last_try:
        print(sentence, file=sys.stderr)
        return
    sys.stderr.flush()
    waiting = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(_launcher), sentence],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert waiting.stdout is not None
    waiting.stdout.read()  # it closes it when it knows how the launcher looks as long as this process is there


def _another_says(sentence: str) -> bool:
    """Whether a process that the same launcher started has come with the same sentence before."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder for each process, in one for all that began together
    if not own:
        return False
    try:
        (Path(own).parents[1] / f"said-{zlib.crc32(sentence.encode()):08x}").touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    return False


def _outlasting(stream: Any) -> io.TextIOWrapper:
    if stream is None:  # whoever started the command has closed it
        return open(os.devnull, "w")
    # What its encoding does not have is spelled: a table at the end of an hour may hold a dash.
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    return _Outlasting(
        stream.buffer, encoding=stream.encoding, errors=errors, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip


class _Outlasting(io.TextIOWrapper):
    """A standard stream that leads nowhere as soon as whoever read it has gone."""

    def write(self, text: str) -> int:
        with self._to_nobody():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._to_nobody():
            super().flush()

    @contextmanager
    def _to_nobody(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # also for what was not written, and for whoever writes past Python
            os.close(nowhere)


def _say_after(process: int, sentence: str) -> None:
    """Show a sentence when a process has shown its last, or after a minute.

    After its last words Python gives its signal handlers back; it is gone only tenths of a second later, and whoever
    waited for it may show something then.
    """
    before, deadline = _signals_of(process), time.monotonic() + 60
    os.close(1)
    while before and _signals_of(process) == before and time.monotonic() < deadline:
        time.sleep(0.005)
    os.write(2, f"{sentence}\n".encode())


def _signals_of(process: int) -> str | None:
    """Which signals a process handles; None if it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except OSError:
        return None
    return None if status["State"].split()[0] in "ZX" else status["SigCgt"]


if __name__ == "__main__":
    _say_after(int(sys.argv[1]), sys.argv[2])
