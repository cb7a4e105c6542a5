"""What is written is there whole or not at all, and on the disk before it has its name."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from infformer.durable import rename, replacing, synchronise, write_text


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, str]]:
    """What was synchronised and renamed, in order, by the names at that time."""
    made: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        made.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        made.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return made


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    write_text(tmp_path / "new" / "file.txt", "naïve\r\n")
    assert (tmp_path / "new" / "file.txt").read_bytes() == "naïve\r\n".encode()
    assert calls == [("fsync", "file.txt.partial"), ("replace", "file.txt"), ("fsync", "new")]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    (tmp_path / "partial" / "inner").mkdir(parents=True)
    for name in ("inner/one", "two"):
        (tmp_path / "partial" / name).touch()
    synchronise(tmp_path / "partial")
    rename(tmp_path / "partial", tmp_path / "whole")
    before, after = calls[: calls.index(("replace", "whole"))], calls[calls.index(("replace", "whole")) :]
    assert sorted(before) == [("fsync", name) for name in ("inner", "one", "partial", "two")]
    assert after == [("replace", "whole"), ("fsync", tmp_path.name)]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            write_text(path, "new")
    with suppress(KeyboardInterrupt), replacing(path) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_whose_names_cannot_be_synchronised_is_no_failure(tmp_path, monkeypatch):
    """Some network file systems refuse it."""
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    write_text(tmp_path / "file.txt", "new")
    assert (tmp_path / "file.txt").read_text() == "new"
