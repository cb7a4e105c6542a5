"""What can go wrong around a run is said in a sentence, before any training; what is there stays as it was."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from infformer.data import DataError
from infformer.errors import UserError
from infformer.training import trainer

DISKS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "of somebody else": errno.EACCES}
SHORT = {"training.max_steps": 2, "evaluation.before": False, "data.test": None, "data.validation": None}


@pytest.fixture(autouse=True)
def no_step(monkeypatch) -> list[Any]:
    """The steps that were made: none may be."""
    made: list[Any] = []
    train_step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *arguments: made.append(arguments) or train_step(*arguments))
    return made


def refusing(number: int, folder: Path) -> AbstractContextManager:
    """A disk that lets nothing be written to this folder: no file, and no folder in it. Also for root."""

    def refuse(original: Callable, path: Path, *arguments: Any, **options: Any) -> Any:
        mode = (*arguments, *options.values(), "r")[0]
        harmless = {originals["open"]: not set(str(mode)) & set("wax+"), originals["mkdir"]: path.is_dir()}
        if not harmless.get(original) and (path == folder or folder in path.parents):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *arguments, **options)

    originals = {name: getattr(Path, name) for name in ("open", "mkdir", "write_text", "write_bytes", "touch")}
    replaced = {
        name: lambda path, *arguments, original=original, **options: refuse(original, path, *arguments, **options)
        for name, original in originals.items()
    }
    return patch.multiple(Path, **replaced)


@pytest.mark.parametrize("number", DISKS.values(), ids=DISKS)
def test_an_output_folder_that_cannot_be_written(configure, train, tmp_path, no_step, number):
    with refusing(number, tmp_path / "run"), pytest.raises(UserError) as refused:
        train(configure(tmp_path / "run", SHORT))
    assert f"output_dir={tmp_path / 'run'}" in str(refused.value)
    assert os.strerror(number) in str(refused.value)
    assert not no_step
    assert not (tmp_path / "run").exists()


def test_an_output_folder_below_a_file(configure, train, tmp_path, no_step):
    """Nothing pretended here."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_dir={tmp_path / 'file' / 'run'}"):
        train(configure(tmp_path / "file" / "run", SHORT))
    assert not no_step


@pytest.mark.parametrize("number", DISKS.values(), ids=DISKS)
def test_a_disk_that_cannot_be_written_any_more_when_a_run_goes_on(configure, train, tmp_path, no_step, number):
    """The checkpoint stays, and later the run goes on from it."""
    train(configure(tmp_path / "run", SHORT))
    made = len(no_step)
    longer = {**SHORT, "training.max_steps": 3, "resume": "auto"}
    with refusing(number, tmp_path / "run"), pytest.raises(UserError, match=f"output_dir={tmp_path / 'run'}"):
        train(configure(tmp_path / "run", longer))
    assert len(no_step) == made
    train(configure(tmp_path / "run", longer))
    assert len(no_step) == made + 1


class TestDocumentsBetweenStopAndResume:
    @pytest.fixture
    def mine(self, texts, tmp_path) -> Path:
        return Path(shutil.copy(texts / "train.jsonl", tmp_path / "mine.jsonl"))

    @pytest.fixture
    def go_on(self, configure, train, tmp_path, mine) -> Callable[[], None]:
        changes = {**SHORT, "data.train": str(mine)}
        train(configure(tmp_path / "run", changes))
        return partial(train, configure(tmp_path / "run", {**changes, "training.max_steps": 3, "resume": "auto"}))

    def test_vanished(self, go_on, mine):
        mine.unlink()
        with pytest.raises(DataError, match=rf"data\.train={mine}: no such file"):
            go_on()

    def test_in_another_order(self, go_on, mine):
        """The same documents, as many, as long: but lanes would read others."""
        mine.write_text("".join(reversed(mine.read_text().splitlines(keepends=True))))
        with pytest.raises(DataError, match=r"the documents .* the run to be resumed had"):
            go_on()

    def test_one_letter_changed(self, go_on, mine):
        text = mine.read_text()
        mine.write_text(text.replace("whale", "whole", 1))
        with pytest.raises(DataError, match=r"the documents .* the run to be resumed had"):
            go_on()

    def test_empty(self, go_on, mine):
        mine.write_text("")
        with pytest.raises(DataError, match=f"{mine}: the file is empty"):
            go_on()

    def test_touched_and_no_more(self, go_on, mine, no_step):
        """What counts is what is in it."""
        made = len(no_step)
        mine.write_text(mine.read_text())
        os.utime(mine, (1, 1))
        go_on()
        assert len(no_step) == made + 1


def test_without_room_for_the_tokens(configure, train, tmp_path, no_step):
    """The cache may lie on another disk than the run."""
    with refusing(errno.ENOSPC, tmp_path / "cache"), pytest.raises(UserError, match=r"data\.cache_dir"):
        train(configure(tmp_path / "run", {**SHORT, "data.cache_dir": str(tmp_path / "cache")}))
    assert not no_step
    assert not (tmp_path / "run").exists()
