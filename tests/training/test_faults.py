"""What can go wrong around a run is said in a sentence, before any training; what is there stays as it was."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest

from infformer.errors import DataError, UserError
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
def test_an_output_folder_that_cannot_be_written_is_refused_at_once(configure, train, tmp_path, no_step, number):
    with refusing(number, tmp_path / "run"), pytest.raises(UserError) as refused:
        train(configure(tmp_path / "run", SHORT))
    assert f"output_dir={tmp_path / 'run'}" in str(refused.value)
    assert os.strerror(number) in str(refused.value)
    assert not no_step
    assert not (tmp_path / "run").exists()


def test_an_output_folder_below_a_file_is_refused_at_once(configure, train, tmp_path, no_step):
    """Nothing pretended here."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output_dir={tmp_path / 'file' / 'run'}"):
        train(configure(tmp_path / "file" / "run", SHORT))
    assert not no_step


def test_a_disk_that_became_read_only_costs_no_checkpoint(configure, train, tmp_path, no_step):
    """It stays, and later the run goes on from it."""
    train(configure(tmp_path / "run", SHORT))
    made = len(no_step)
    longer = {**SHORT, "training.max_steps": 3, "resume": "auto"}
    with refusing(errno.EROFS, tmp_path / "run"), pytest.raises(UserError, match=f"output_dir={tmp_path / 'run'}"):
        train(configure(tmp_path / "run", longer))
    assert len(no_step) == made
    train(configure(tmp_path / "run", longer))
    assert len(no_step) == made + 1


class TestDocumentsBetweenStopAndResume:
    SPLITS = ("train", "validation", "test")

    @pytest.fixture(scope="class")
    @classmethod
    def stopped(cls, configure, train, texts, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
        """A folder of documents with a run that has read them, and what that run was told."""
        folder = tmp_path_factory.mktemp("stopped")
        changes = {**SHORT, **{f"data.{split}": str(folder / f"{split}.jsonl") for split in cls.SPLITS}}
        for split in cls.SPLITS:
            shutil.copy(texts / f"{split}.jsonl", folder)
        train(configure(folder / "run", changes))
        return folder, changes

    @pytest.fixture
    def mine(self, stopped, texts) -> Iterator[Path]:
        """The documents to train on, and beside them the others; put back afterwards."""
        yield stopped[0] / "train.jsonl"
        for split in self.SPLITS:
            shutil.copy(texts / f"{split}.jsonl", stopped[0])

    @pytest.fixture
    def go_on(self, configure, train, stopped, tmp_path) -> Callable[[], None]:
        folder, changes = stopped
        run = shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
        return partial(train, configure(run, {**changes, "training.max_steps": 3, "resume": "auto"}))

    @pytest.mark.parametrize("split", SPLITS)
    def test_documents_that_have_vanished_are_missed(self, go_on, mine, no_step, split):
        """Also if they are still in the cache: nobody knows whether they were the same."""
        gone = mine.with_name(f"{split}.jsonl")
        gone.unlink()
        with pytest.raises(DataError, match=rf"data\.{split}={gone}: no such file"):
            go_on()
        assert not no_step

    CHANGED: ClassVar[dict[str, Callable[[str], str]]] = {
        "in another order": lambda text: "".join(reversed(text.splitlines(keepends=True))),
        "one letter": lambda text: text.replace("whale", "whole", 1),
        "one more": lambda text: text + '{"id": "one more", "text": "the sea the sea the sea"}\n',
    }

    @pytest.mark.parametrize("changed", CHANGED)
    def test_documents_that_have_changed_are_refused(self, go_on, mine, tmp_path, no_step, changed):
        """However many, however long: lanes would read others."""
        mine.write_text(self.CHANGED[changed](mine.read_text()))
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(DataError, match=r"the documents .* the run to be resumed had"):
            go_on()
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
        assert not no_step

    def test_a_file_that_is_empty_is_named(self, go_on, mine):
        mine.write_text("")
        with pytest.raises(DataError, match=f"{mine}: the file is empty"):
            go_on()

    def test_documents_that_were_touched_and_no_more_are_the_same(self, go_on, mine, no_step):
        """What counts is what is in it."""
        mine.write_text(mine.read_text())
        os.utime(mine, (1, 1))
        go_on()
        assert len(no_step) == 1


def test_without_room_for_the_tokens_no_step_is_made(configure, train, tmp_path, no_step):
    """The cache may lie on another disk than the run."""
    with refusing(errno.ENOSPC, tmp_path / "cache"), pytest.raises(UserError, match=r"data\.cache_dir"):
        train(configure(tmp_path / "run", {**SHORT, "data.cache_dir": str(tmp_path / "cache")}))
    assert not no_step
    assert not (tmp_path / "run").exists()
