"""How far long work is: a bar on a terminal, and elsewhere, as in a log file, a line within every minute."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from threading import Event, Thread
from typing import ClassVar, Self, TypeVar

from tqdm import tqdm

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

FIRST, EVERY = 10.0, 50.0
"""Seconds until work says how long it will take, and from one line to the next."""


class Pace:
    """Says, while its block runs, what is done, how much of it, how fast, and how long it will take.

    Work that ends within seconds says nothing in a log file.

    Args:
        title: what is done.
        total: how much there is to do, in `unit`; None if nobody knows.
        unit: in the plural.
        shown: whether anything is said at all.
        done: how much of it was done before.
    """

    _said: ClassVar[float] = time.monotonic()
    """When any work last said a line: many short pieces together are long too."""

    def __init__(self, title: str, total: int | None, unit: str, shown: bool = True, done: int = 0) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.on_terminal = sys.stderr.isatty()
        self._before = done
        self._bar = tqdm(
            total=total, initial=done, desc=title, unit=f" {unit}", unit_scale=True, dynamic_ncols=True,
            disable=not (shown and self.on_terminal),
        )  # fmt: skip
        self._ended = Event()
        self._speaker = Thread(target=self._speak, daemon=True) if shown and not self.on_terminal else None

    def __enter__(self) -> Self:
        self.start = time.monotonic()
        if self._speaker is not None:
            self._speaker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._bar.close()

    def advance(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self._bar.update(count)

    def remark(self, line: str) -> None:
        """What else stands beside the bar."""
        self._bar.set_postfix_str(line)

    def describe(self) -> str:
        """Where the work is: `test: 25 % of 75,050 tokens, 1,203 a second, 47 s left`."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self._before) / seconds
        speed = f"{rate:,.0f} a second" if rate >= 10 else f"{rate:.2g} a second"
        if self.total is None:
            return f"{self.title}: {self.done:,} {self.unit}, {speed}"
        if not rate:
            return f"{self.title}: {self.done:,} of {self.total:,} {self.unit} after {in_words(seconds)}"
        left = (self.total - self.done) / rate
        return (
            f"{self.title}: {self.done / self.total:.0%} of {self.total:,} {self.unit}, {speed}, {in_words(left)} left"
        )

    def _speak(self) -> None:
        """On a thread of its own, so that also a step of minutes leaves no minute without a line."""
        due = min(self.start + FIRST, max(self.start, Pace._said + EVERY))
        while not self._ended.wait(max(due - time.monotonic(), 0)):
            _say(self.describe())
            Pace._said = time.monotonic()
            due = Pace._said + EVERY


def follow(
    items: Iterable[Item], title: str, unit: str, total: int | None = None, shown: bool = True
) -> Iterator[Item]:
    """The items one after the other, while it is said how many of them are done."""
    with Pace(title, total, unit, shown) as pace:
        for item in items:
            yield item
            pace.advance()


def in_words(seconds: float) -> str:
    """How long something takes, in its two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    left = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if left >= size:
            return f"{left // size} {unit} {left % size // part} {smaller}"
    return f"{left} s"


def _say(line: str) -> None:
    """To the log, or to stderr in a script that has none."""
    if logging.getLogger().handlers:
        logger.info(line)
    else:
        print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr, flush=True)
