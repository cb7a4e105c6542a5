"""A run's folder: one writes into it at a time, nothing that lies there is lost, and what cannot be said is refused."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from infformer.config import EvaluationRunConfig, ModelConfig, RunConfig
from infformer.data.options import DataConfig
from infformer.tasks.haystack import PasskeyConfig
from infformer.tasks.sorting import SortingConfig
from infformer.training import trainer
from infformer.training.folder import (
    LOCK,
    RunError,
    check_that_it_may_be_written,
    differences,
    evaluation_folder,
    held,
    open_record,
    write_record,
)
from infformer.training.resuming import find_checkpoint

ALONE: Any = SimpleNamespace(is_main_process=True, num_processes=1)
"""As an accelerator: one process."""
HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(f"process {os.getpid()} on somewhere\\n")
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path) -> Any:
    """Another process that holds `run`."""
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def hold(folder: Path) -> None:
    with held(ALONE, folder, lambda: None):
        pass


class TestOneAtATime:
    def test_a_folder_in_use_is_refused_until_its_process_has_died(self, configure, train, tmp_path, holder):
        """However it died. Nothing has been read or tokenised until then."""
        with pytest.raises(RunError) as refused:
            train(configure(tmp_path / "run", {"resume": "auto"}))
        assert f"output_dir={tmp_path / 'run'} is in use" in str(refused.value)
        assert f"process {holder.pid} on somewhere" in str(refused.value)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
        holder.kill()
        holder.wait()
        hold(tmp_path / "run")

    def test_who_holds_it_says_so(self, tmp_path):
        with held(ALONE, tmp_path, lambda: None):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
            assert (tmp_path / LOCK).stat().st_size < 300

    def test_a_folder_that_was_not_used_is_as_it_was(self, tmp_path):
        hold(tmp_path / "not there" / "run")
        assert list(tmp_path.iterdir()) == []

    def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(self, tmp_path, monkeypatch):
        """Else two would hold one each: the old file and the new."""
        lockf, times = fcntl.lockf, []

        def remove_first(*arguments: Any) -> None:
            lockf(*arguments)
            if not times:
                (tmp_path / LOCK).unlink()
            times.append(arguments)

        monkeypatch.setattr(fcntl, "lockf", remove_first)
        with held(ALONE, tmp_path, lambda: None):
            assert (tmp_path / LOCK).exists()
        assert len(times) == 2

    def test_a_file_system_without_locks_is_a_warning(self, tmp_path, monkeypatch, caplog):
        def no_locks(*arguments: Any) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "lockf", no_locks)
        hold(tmp_path)
        assert f"output_dir={tmp_path}: this file system has no locks" in caplog.text

    def test_what_the_main_process_refuses_all_refuse(self, tmp_path, monkeypatch):
        """None waits for it: the others are told, by what it sends."""
        sent: list[list[Any]] = []
        monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda told: sent.append(list(told)))
        two = SimpleNamespace(is_main_process=True, num_processes=2)

        def refuse() -> None:
            raise RunError("no")

        with pytest.raises(RunError, match="no"), held(two, tmp_path, refuse):
            pass

        def receive(told: list[Any]) -> None:
            told[:] = sent[0]

        monkeypatch.setattr("torch.distributed.broadcast_object_list", receive)
        two.is_main_process = False
        with pytest.raises(RunError, match="no"), held(two, tmp_path / "other", refuse):
            pass
        assert not (tmp_path / "other").exists()  # only the main process touches it


def test_a_full_place_is_found_before_the_work(configure, train, tmp_path, monkeypatch):
    """Also if there is room for a few bytes."""
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 2**15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(trainer, "build_tokenizer", lambda *arguments: pytest.fail("it came to the documents"))
    with pytest.raises(RunError, match=f"output_dir={tmp_path / 'run'}: nothing can be written there.*make room"):
        train(configure(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_without_room_for_a_checkpoint_no_step_is_made(configure, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(RunError, match="a checkpoint takes 2 MB, and there is room for 1 MB"):
        open_record(configure(tmp_path / "run"), tmp_path / "run", 0, None, 2 * 10**6)


def test_a_configuration_that_could_not_be_written_is_the_old_one(configure, tmp_path, monkeypatch):
    """It is what a run goes on by: cut, the run could never go on."""
    open_record(configure(tmp_path), tmp_path, 0, None, 0)
    before = (tmp_path / "config.yaml").read_text()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="nothing can be written there"):
        open_record(configure(tmp_path, {"training.max_steps": 99}), tmp_path, 0, None, 0)
    assert (tmp_path / "config.yaml").read_text() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("task", "lengths"), [(SortingConfig, []), (PasskeyConfig, [1024])])
def test_an_option_that_was_not_there_yet_was_what_it_is_by_default(task, lengths):
    """Also a list, which is made anew for each, and one that tasks share, of which each has its own default."""
    default = {"task.training_lengths": lengths, "optimizer.betas": [0.9, 0.999], "optimizer.epsilon": 1e-8}
    config = RunConfig(model=ModelConfig(pretrained="gpt2"), task=task())
    assert differences({}, default, config) == []
    says = "optimizer.betas was [0.9, 0.999], is [0.5, 0.5]"
    assert differences({}, {**default, "optimizer.betas": [0.5, 0.5]}, config) == [says]


class TestWhatAFolderHolds:
    """Where a run begins, and where it must not, is decided by what lies there."""

    @staticmethod
    def killed_before_its_first_checkpoint(config: RunConfig, folder: Path) -> None:
        OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
        (folder / "versions.json").write_text("{}")
        (folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 64, "train/loss": 5.0}\n{"step": 2, "tok')
        (folder / "checkpoints" / "step-00000002.partial").mkdir(parents=True)

    @pytest.mark.parametrize("resume", [None, "auto"])
    @pytest.mark.parametrize("there", ["not there", "empty", "a lock alone"])
    def test_nothing_is_where_a_run_begins(self, configure, tmp_path, resume, there):
        folder = tmp_path / "run"
        if there != "not there":
            folder.mkdir()
        if there == "a lock alone":
            (folder / LOCK).touch()
        assert find_checkpoint(configure(folder, {"resume": resume}), folder) is None

    def test_what_a_run_wrote_before_its_first_checkpoint_is_begun_again(self, configure, tmp_path, caplog):
        """Batch systems put it in the queue again, by the same command."""
        config = configure(tmp_path, {"resume": "auto"})
        self.killed_before_its_first_checkpoint(config, tmp_path)
        assert find_checkpoint(config, tmp_path) is None
        assert "was stopped before its first checkpoint; it begins again" in caplog.text

    REFUSED: ClassVar[dict[str, tuple[Callable[[Path], Any], str]]] = {
        "something else": (lambda folder: (folder / "notes.txt").touch(), "holds notes.txt"),
        "metrics without a configuration": (
            lambda folder: (folder / "metrics.jsonl").write_text('{"step": 900, "tokens": 1}\n'),
            "holds metrics.jsonl, and no run",
        ),
        "an empty configuration": (lambda folder: (folder / "config.yaml").touch(), "config.yaml holds no options"),
        "a list": (lambda folder: (folder / "config.yaml").write_text("[1]"), "config.yaml holds no options"),
        "no YAML": (lambda folder: (folder / "config.yaml").write_text("a: [1"), "config.yaml cannot be read"),
        "bytes": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml cannot be read"),
        "a folder": (lambda folder: (folder / "config.yaml").mkdir(), "config.yaml cannot be read"),
    }

    @pytest.mark.parametrize("case", REFUSED)
    def test_anything_else_is_refused_when_a_run_goes_on(self, configure, tmp_path, case):
        make, says = self.REFUSED[case]
        make(tmp_path)
        with pytest.raises(RunError) as refused:
            find_checkpoint(configure(tmp_path, {"resume": "auto"}), tmp_path)
        assert "resume=auto: " in str(refused.value)
        assert says in str(refused.value)
        assert "choose another name= or output_dir=, or remove the folder" in str(refused.value)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda folder: (folder / "results.json").touch(), "holds the results of a whole run and none of its"),
            (
                lambda folder: (folder / "metrics.jsonl").write_text('{"step": 5, "tokens": 1}\n'),
                "holds metrics up to step 5 and no checkpoint",
            ),
            (lambda folder: (folder / "metrics.jsonl").write_text("[1]\n"), "line 1, is no record of a step"),
            (lambda folder: (folder / "metrics.jsonl").write_text("{]\n"), "line 1, is not JSON"),
            (
                lambda folder: (folder / "checkpoints" / "step-00000002").mkdir(),
                "holds checkpoints, and none can be gone on from (step-00000002: it is not whole",
            ),
        ],
    )
    def test_a_run_whose_checkpoints_are_gone_is_refused(self, configure, tmp_path, change, says):
        """It had come farther than to its first: what is left of it is worth something."""
        config = configure(tmp_path, {"resume": "auto"})
        self.killed_before_its_first_checkpoint(config, tmp_path)
        change(tmp_path)
        with pytest.raises(RunError) as refused:
            find_checkpoint(config, tmp_path)
        assert says in str(refused.value)

    def test_another_run_before_its_first_checkpoint_is_refused(self, configure, tmp_path):
        self.killed_before_its_first_checkpoint(configure(tmp_path), tmp_path)
        with pytest.raises(RunError, match="which has no checkpoint, was configured otherwise: seed was 0, is 7"):
            find_checkpoint(configure(tmp_path, {"seed": 7, "resume": "auto"}), tmp_path)

    def test_a_new_run_is_refused_beside_what_no_run_has_written(self, configure, tmp_path):
        for number in range(7):
            (tmp_path / f"{number}.txt").touch()
        with pytest.raises(RunError, match=r"holds 0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt and 2 more, which no run"):
            find_checkpoint(configure(tmp_path), tmp_path)


def evaluation(folder: Path, **options: Any) -> EvaluationRunConfig:
    return EvaluationRunConfig(**{"checkpoint": "gpt2", "output_dir": str(folder), **options})


class TestAnEvaluation:
    @pytest.fixture
    def measured(self, tmp_path) -> Path:
        (tmp_path / "results.json").write_text("{}")
        write_record(evaluation(tmp_path), tmp_path)
        return tmp_path

    @pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"stride": 8, "overwrite": True}])
    def test_an_evaluation_writes_over_itself(self, measured, options):
        check_that_it_may_be_written(evaluation(measured, **options), measured)

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"stride": 8}, "stride was None, is 8"),
            ({"checkpoint": "gpt2-medium"}, "checkpoint was gpt2, is gpt2-medium"),
            ({"data": DataConfig(max_documents=3)}, "data.max_documents was None, is 3"),
        ],
    )
    def test_an_evaluation_writes_over_no_other(self, measured, options, says):
        with pytest.raises(RunError) as refused:
            check_that_it_may_be_written(evaluation(measured, **options), measured)
        assert f"output_dir={measured} holds the results of another evaluation ({says})" in str(refused.value)
        assert "overwrite=true" in str(refused.value)

    @pytest.mark.parametrize("record", [None, "", "[1]"])
    def test_an_evaluation_writes_over_no_results_of_nobody_knows_what(self, measured, record):
        (measured / "evaluation.json").unlink()
        if record is not None:
            (measured / "evaluation.json").write_text(record)
        with pytest.raises(RunError, match="holds results, and nothing says of what"):
            check_that_it_may_be_written(evaluation(measured), measured)

    @pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints"])
    def test_an_evaluation_writes_over_no_training_run(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(RunError, match=r"holds a training run.*overwrite=true"):
            check_that_it_may_be_written(evaluation(tmp_path), tmp_path)

    def test_an_evaluation_knows_the_checkpoint_that_best_was(self, tmp_path):
        for step in (1, 2):
            (tmp_path / f"step-{step}").mkdir()
        (tmp_path / "best").symlink_to("step-1")
        config = evaluation(tmp_path, checkpoint=str(tmp_path / "best"))
        (tmp_path / "results.json").write_text("{}")
        write_record(config, tmp_path)
        (tmp_path / "best").unlink()
        (tmp_path / "best").symlink_to("step-2")
        with pytest.raises(RunError, match=r"checkpoint was .*step-1, is .*step-2"):
            check_that_it_may_be_written(config, tmp_path)

    def test_an_evaluation_has_a_place_of_its_own_by_default(self, tmp_path, monkeypatch):
        """So that the README's commands can be typed one after the other."""
        monkeypatch.chdir(tmp_path)
        checkpoints = tmp_path / "outputs" / "tiny" / "checkpoints"
        (checkpoints / "step-00000200").mkdir(parents=True)
        (checkpoints / "best").symlink_to("step-00000200")
        best = {"checkpoint": "outputs/tiny/checkpoints/best", "output_dir": None}
        hub = DataConfig(source="hub", repository="Salesforce/wikitext", subset="wikitext-2-raw-v1")
        for options, name in {
            "sample": (best, "tiny_step-00000200_sample"),
            "validation": ({**best, "split": "validation"}, "tiny_step-00000200_sample_validation"),
            "passkey": ({**best, "task": PasskeyConfig()}, "tiny_step-00000200_passkey"),
            "hub": ({"checkpoint": "openai/gpt2", "data": hub, "output_dir": None}, "openai_gpt2_wikitext-2-raw-v1"),
        }.values():
            assert evaluation_folder(evaluation(tmp_path, **options)) == Path("outputs/evaluation", name)
        assert evaluation_folder(evaluation(Path("mine"))) == Path("mine")
