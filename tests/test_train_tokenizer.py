"""The script that trains a tokenizer: what it writes, and what it says when it cannot."""

import errno
import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from infformer.errors import UserError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return import_module("train_tokenizer")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "a.txt").write_text("the whale and the sea, the sea and the whale\n" * 9)
    return ["data=text", f"data.train={tmp_path}/a.txt"]


def test_what_is_written_is_a_tokenizer_that_loses_nothing(
    script: ModuleType, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")  # beside a model
    assert script.make(tmp_path / "out", 270, options) == 270
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 270
    assert tokenizer.decode(tokenizer("the whale, Übel")["input_ids"]) == "the whale, Übel"
    assert len(tokenizer("the whale")["input_ids"]) < 9
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_fewer_tokens_than_asked_for_are_said(
    script: ModuleType, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", str(tmp_path / "out"), *options])
    script.main()
    assert "tokens: the text gives no more, though --vocabulary=4096" in capsys.readouterr().out


BAD: dict[str, tuple[int, list[str], str]] = {
    "a vocabulary of 5": (5, [], "--vocabulary=5: give a number from 257"),
    "a vocabulary without end": (10**12, [], "--vocabulary=1000000000000: give a number from 257 .* to 1048576"),
    "a word": (300, ["train"], "train: this is no option of a data set; type data="),
    "an option of a run": (300, ["seed=1"], "seed=1: this is no option of a data set"),
    "a misspelt option": (300, ["data.trian=x"], r"data.trian=x: there is no option data.trian \(did you mean data.tr"),
    "a value of another kind": (300, ["data.workers=x"], "data.workers=x: must be a whole number"),
    "a value too small": (300, ["data.max_documents=0"], "data.max_documents=0: give a whole number from 1"),
    "a missing file": (300, ["data.train={folder}/b.txt"], "data.train={folder}/b.txt: no such file"),
    "no file": (300, ["data.train=null"], "data.train=null: this run needs train documents"),
    "a folder": (300, ["data.train={folder}"], "data.train: {folder} is a folder; name the files in it"),
    "an empty file": (300, ["data.train={folder}/empty.txt"], "empty.txt: the file is empty"),
    "no text": (300, ["data.train={folder}/blank.jsonl"], "data.train=.*blank.jsonl: there is no text in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_is_said_in_a_sentence_and_nothing_is_written(
    script: ModuleType, options: list[str], tmp_path: Path, case: str
) -> None:
    vocabulary, more, message = BAD[case]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text(json.dumps({"text": " \n"}))
    more = [option.format(folder=tmp_path) for option in more]
    given = [option for option in options if not (more and option.split("=")[0] == more[0].split("=")[0])]
    with pytest.raises(UserError, match=message.format(folder=tmp_path)):
        script.make(tmp_path / "out", vocabulary, [*given, *more])
    assert not (tmp_path / "out").exists()


def a_file(folder: Path) -> None:
    folder.write_text("x")


def a_tokenizer(folder: Path) -> None:
    folder.mkdir()
    (folder / "tokenizer.json").write_text("mine")


@pytest.mark.parametrize(
    ("make", "message"),
    [(a_file, "out: the tokenizer cannot be written there"), (a_tokenizer, "out: there is a tokenizer already")],
)
def test_a_folder_that_cannot_be_taken_is_found_before_the_work(
    script: ModuleType,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    message: str,
) -> None:
    make(tmp_path / "out")
    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(UserError, match=message):
        script.make(tmp_path / "out", 300, options)


@pytest.mark.parametrize("owner", ["pathlib.Path.mkdir", "pathlib.Path.write_bytes", "tempfile.mkdtemp"])
def test_a_full_disk_is_found_before_the_work(
    script: ModuleType, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "train", lambda *_: pytest.fail("the work has begun"))
    monkeypatch.setattr(owner, full)
    with pytest.raises(UserError, match=r"out: the tokenizer cannot be written there \(.*No space left"):
        script.make(tmp_path / "out", 300, options)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), Exception("No space left (os error 28)")])
def test_a_disk_that_gets_full_leaves_nothing(
    script: ModuleType, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def half(_: Any, place: Path) -> None:
        (place / "tokenizer_config.json").write_text("{")
        raise error

    monkeypatch.setattr(script.PreTrainedTokenizerFast, "save_pretrained", half)
    with pytest.raises(UserError, match=r"out: the tokenizer cannot be written there \(.*No space left"):
        script.make(tmp_path / "out", 300, options)
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(
    script: ModuleType, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "read_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.make(tmp_path / "out", 300, options)
    assert not (tmp_path / "out").exists()
