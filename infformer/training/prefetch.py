"""What the lanes read next is made ready while the model computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from infformer.data.lanes import Segment
from infformer.tasks.task import Task

Prepared = tuple[list[Segment], dict[str, Any]]
"""The segments of a step, and where the task stands once they are read."""


class Prefetch:
    """The steps of a task, one ahead of who takes them, made in a thread of its own.

    So the task itself is ahead as well. Where it stands for who takes the steps comes with each of them.

    Args:
        task: nobody else asks it for steps any more.
        pin: keep the segments in memory from which a GPU can fetch them while it computes.
    """

    def __init__(self, task: Task, pin: bool) -> None:
        self._task = task
        self._pin = pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: Future[Prepared] | None = None

    def take(self) -> Prepared:
        """The next step; the one after it is begun."""
        prepared = (self._next or self._thread.submit(self._prepare)).result()
        self._next = self._thread.submit(self._prepare)
        return prepared

    def _prepare(self) -> Prepared:
        segments = self._task.next_step()
        if self._pin:
            segments = [segment.pin_memory() for segment in segments]
        return segments, self._task.state_dict()
