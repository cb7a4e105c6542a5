"""How far long work is, as it is said in a log file."""

import logging
import time

import pytest

from infformer import progress
from infformer.progress import Pace, follow, in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273_600, "3 d 4 h"),
    ],
)
def test_a_time_is_said_in_its_two_largest_units(seconds, words):
    assert in_words(seconds) == words


def at(monkeypatch: pytest.MonkeyPatch, pace: Pace, seconds: float) -> str:
    """What is said so many seconds after the beginning."""
    monkeypatch.setattr(time, "monotonic", lambda: pace.start + seconds)
    return pace.describe()


def test_work_says_how_much_is_done_how_fast_it_goes_and_how_long_it_takes(monkeypatch):
    with Pace("test", 8000, "tokens", shown=False) as pace:
        assert at(monkeypatch, pace, 7) == "test: 0 of 8,000 tokens after 7 s"
        pace.advance(1500)
        pace.advance(500)
        assert at(monkeypatch, pace, 40) == "test: 25% of 8,000 tokens, 50 a second, 2 min 0 s left"
        assert at(monkeypatch, pace, 4000) == "test: 25% of 8,000 tokens, 0.5 a second, 3 h 20 min left"


def test_what_was_done_before_says_nothing_of_the_pace(monkeypatch):
    with Pace("training", 100, "steps", shown=False, done=50) as pace:
        assert at(monkeypatch, pace, 5) == "training: 50 of 100 steps after 5 s"
        pace.advance(10)
        assert at(monkeypatch, pace, 20) == "training: 60% of 100 steps, 0.5 a second, 1 min 20 s left"


def test_work_without_a_known_end_says_how_much_was_done(monkeypatch):
    with Pace("reading train", None, "documents", shown=False) as pace:
        pace.advance(300)
        assert at(monkeypatch, pace, 20) == "reading train: 300 documents, 15 a second"


@pytest.fixture
def quick(monkeypatch) -> None:
    """As if hundredths of seconds were seconds."""
    monkeypatch.setattr(progress, "FIRST", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(Pace, "_said", time.monotonic())


@pytest.mark.usefixtures("quick")
def test_a_step_that_takes_long_leaves_no_time_without_a_line(caplog):
    caplog.set_level(logging.INFO)
    for _ in follow(range(1), "thinking", "steps", 1):
        while len(caplog.records) < 3:
            time.sleep(0.005)
    assert {record.getMessage() for record in caplog.records} == {"thinking: 0 of 1 steps after 0 s"}


@pytest.mark.usefixtures("quick")
def test_many_short_pieces_of_work_are_long_together(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "FIRST", 1e6)
    while len(caplog.records) < 2:
        with Pace("a piece", 1, "steps"):
            time.sleep(0.005)
    assert "a piece" in caplog.text


def test_short_work_and_work_of_another_process_say_nothing(caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Pace, "_said", time.monotonic())  # other work may have been silent for long
    assert list(follow("abc", "reading", "letters", 3)) == ["a", "b", "c"]
    with Pace("reading", 3, "letters", shown=False) as pace:
        pace.advance()
    assert caplog.records == []
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quick")
def test_a_script_without_a_log_says_it_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with Pace("drawing", 4, "figures") as pace:
        pace.advance()
        while "25% of 4 figures" not in capsys.readouterr().err:
            time.sleep(0.005)
