"""What stands last when a command ends, by a signal or by a mistake, alone and under launchers."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMAND = """
from infformer import command

command.begin()

import os, sys, time
from pathlib import Path

def main():
    match sys.argv[1]:
        case "wait":
            print("begun", flush=True)
            time.sleep(60)
        case "write":
            print(sys.argv[2])
        case "refuse":
            sys.exit(f"error: {sys.argv[2]}")
        case "train":
            from infformer.training.supervision import StopSignals
            with StopSignals(lambda number: number) as signals:
                print("begun", flush=True)
                while not signals.agreed():
                    time.sleep(0.01)
                for stream in (sys.stdout, sys.stderr) * 3:  # after a while nobody reads it any more
                    print("saves", file=stream, flush=True)
                    time.sleep(0.1)
                Path(sys.argv[2]).write_text("saved")
            raise command.Ended(f"stopped by signal {signals.agreed()}", 99)

command.run(main)
"""
"""In place of train.py: begins and ends as it does, and has next to nothing to import."""


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """The command with some arguments, in a session of its own, by a launcher perhaps."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)

    def call(launcher: list[str], *arguments: str, **streams: int | Callable[[], object]) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        return subprocess.Popen(
            [sys.executable, *launcher, str(script), *arguments],
            env=environment, text=True, start_new_session=True, **streams,
        )  # fmt: skip

    return call


def test_what_a_terminal_has_no_letter_for_is_spelled(start, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    out, err = start([], "write", "0.1 – 0.2").communicate(timeout=60)
    assert (out, err) == ("0.1 \\u2013 0.2\n", "")


def test_a_command_whose_output_is_closed_works(start):
    process = start([], "write", "to nobody", preexec_fn=lambda: os.close(1))
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


ACCELERATE = ["-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
ACCELERATE_TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]


@pytest.mark.usefixtures("signals_heard")
def test_an_interrupt_ends_a_command_in_a_word_and_no_traceback(start):
    process = start([], "wait")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")  # nor what it was showing, again
    assert process.returncode == 130


SCRIPTS = sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))
COMMANDS = ["train.py", "eval.py", "generate.py", *SCRIPTS]


@pytest.mark.parametrize("command", [path for path in COMMANDS if path != "scripts/grid.py"])
def test_every_command_can_be_interrupted_while_it_is_imported(tmp_path, command):
    for module in ("argparse", "hydra", "lm_eval", "matplotlib"):  # at least one of them is imported at once
        (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, ROOT / command], env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([], id="python"),
        pytest.param(torchrun(2), id="torchrun", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
        pytest.param(ACCELERATE_TWO, id="accelerate-two", marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_stands_last_and_once_below_what_the_launcher_says(start, launcher):
    process = start(launcher, "refuse", "seed=-1: take another")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert said.endswith("\nerror: seed=-1: take another\n" if launcher else "error: seed=-1: take another\n")
    assert said.count("error: seed=-1") == 1


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        pytest.param(ACCELERATE, signal.SIGTERM, id="accelerate-SIGTERM", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, signal.SIGKILL, id="accelerate-SIGKILL", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGHUP, id="torchrun-SIGHUP", marks=pytest.mark.slow),
        pytest.param(torchrun(2), signal.SIGKILL, id="torchrun-SIGKILL", marks=pytest.mark.slow),
    ],
)
def test_who_ends_the_launcher_alone_ends_what_it_started_with_a_checkpoint(start, tmp_path, launcher, number):
    process = start(launcher, "train", str(tmp_path / "checkpoint"))
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]  # to the end of what it started, which writes to the same
    assert (tmp_path / "checkpoint").read_text() == "saved"
    told = f"stopped by signal {int(signal.SIGTERM if number == signal.SIGKILL else number)}"
    assert said.splitlines()[-1] == told
    assert said.count("stopped by") == 1


@pytest.mark.usefixtures("signals_heard")
def test_a_terminal_that_is_closed_does_not_keep_a_run_from_saving(start, tmp_path):
    master, terminal = pty.openpty()
    process = start(
        [], "train", str(tmp_path / "checkpoint"), stdout=terminal, stderr=terminal,
        preexec_fn=lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    with open(master, "rb", buffering=0) as window:
        assert window.readline() == b"begun\r\n"
    assert process.wait(60) == 99
    assert (tmp_path / "checkpoint").read_text() == "saved"


def test_a_pipe_that_nobody_reads_any_more_does_not_keep_a_run_from_saving(start, tmp_path):
    process = start([], "train", str(tmp_path / "checkpoint"))
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 99
    assert (tmp_path / "checkpoint").read_text() == "saved"
