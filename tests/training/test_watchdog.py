"""Who waits too long says where everybody stood, and ends; who gets on, or is alone, is left in peace."""

import threading
import time
from collections.abc import Callable

import pytest
import torch.distributed

from infformer.training import supervision
from infformer.training.supervision import EXIT_CODE, Watchdog


@pytest.fixture
def ended(monkeypatch) -> threading.Event:
    """Set when this process would have ended, as it should, with that exit code; two processes share a store."""
    event, store = threading.Event(), torch.distributed.HashStore()
    monkeypatch.setattr(supervision, "_store", lambda: store)
    monkeypatch.setattr(supervision.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(supervision.os, "_exit", lambda code: event.set() if code == EXIT_CODE else None)
    return event


@pytest.fixture
def tell_for_the_other() -> Callable[[str], None]:
    return lambda what: Watchdog(1, 2, 60).tell(what)


def test_a_hanging_run_ends_and_says_where_everybody_stood(ended, tell_for_the_other, caplog, capfd):
    tell_for_the_other("reads its next segments (step 6)")
    with Watchdog(0, 2, patience=0.2) as watching:
        watching.tell("computes (step 7)")
        assert ended.wait(30)
    message = caplog.text
    assert "process 0 has made no progress for" in message
    assert "engine.patience=0.2" in message
    assert "process 0 computes (step 7); process 1 reads its next segments (step 6)" in message
    assert "resume=auto" in message
    assert "test_watchdog.py" in capfd.readouterr().err  # the stack: this test waits above


def test_if_the_store_is_gone_the_run_ends_too(ended, monkeypatch, caplog):
    class Gone:
        def set(self, key: str, value: str) -> None: ...

        def get(self, key: str) -> bytes:
            raise RuntimeError("connection reset by peer")

    monkeypatch.setattr(supervision, "_store", Gone)
    with Watchdog(0, 2, patience=0.1):
        assert ended.wait(30)
    assert "unknown (connection reset by peer)" in caplog.text


def test_a_store_that_is_gone_with_the_launcher_does_not_keep_a_checkpoint_from_being_written(monkeypatch):
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise torch.distributed.DistNetworkError("broken pipe")

    monkeypatch.setattr(supervision, "_store", Gone)
    with Watchdog(0, 2, patience=60) as watching:
        watching.tell("saves")


def test_progress_is_left_in_peace(ended, tell_for_the_other):
    tell_for_the_other("begins")
    pause = threading.Event()
    with Watchdog(0, 2, patience=10) as watching:
        watching._last = time.monotonic() - 9.9  # it was about to lose patience
        watching.tell("computes (step 1)")
        pause.wait(1.2)  # it looks once a second
        assert not ended.is_set()


def test_after_the_run_nobody_watches(ended):
    with Watchdog(0, 2, patience=0.1):
        pass
    assert not ended.wait(0.5)


def test_one_process_is_not_watched(ended, monkeypatch):
    monkeypatch.setattr(supervision, "_store", None)  # there is none to be asked
    with Watchdog(0, 1, patience=0.05) as watching:
        watching.tell("computes (step 1)")
        assert not ended.wait(0.5)
