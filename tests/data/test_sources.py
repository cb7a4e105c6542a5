import errno
import gzip
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard
from datasets import Dataset, DatasetDict

from infformer import hub
from infformer.data import sources
from infformer.data.options import DataConfig
from infformer.data.sources import check_sources, describe_source, read_documents
from infformer.errors import DataError
from infformer.hub import HubError, problem_with_the_hub

ROWS = [{"id": "one", "text": "The first.\nÄ line."}, {"id": "two", "text": "The second."}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PAIRS = [("one", "The first.\nÄ line."), ("two", "The second.")]


def read(place: object, **options: object) -> list[tuple[str, str]]:
    config = DataConfig(source="files", train=place, **options)
    return [(document.id, document.text) for document in read_documents(config, "train")]


def refused(place: object, **options: object) -> str:
    """What a reader is told about a bad input, on one line."""
    with pytest.raises(DataError) as error:
        read(place, **options)
    return str(error.value)


# --- files: every format ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_every_json_line_is_a_document(tmp_path, name, ending):
    path = tmp_path / (name + ending)
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    path.write_bytes(compress(LINES[:30]) + compress(LINES[30:]))  # compressed files may be put one after another
    assert read(str(path)) == PAIRS


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_text_is_a_document(tmp_path, ending):
    text = "Ein Übel,\r\n\r\nzwei Übel.\n no end"
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[ending]
    path = tmp_path / f"novel.txt{ending}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + text.encode()))
    assert read(str(path), text_field="body") == [("novel", text)]


def test_parquet_and_saved_datasets_are_read(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    assert read(str(tmp_path / "rows.parquet")) == PAIRS
    assert read(str(tmp_path / "saved")) == PAIRS
    assert read(str(tmp_path / "s*ved")) == PAIRS


def test_lists_globs_and_folders_are_read_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "a/2.md", "a/2.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    found = read([f"{tmp_path}/c.jsonl", f"{tmp_path}/**/*.txt", f"{tmp_path}/*/2.*"])
    of_one_name = [("a/2.md", "a/2.md"), ("a/2.raw", "a/2.raw")]
    assert found == [*of_one_name, ("b/1", "b/1.txt"), ("b/2", "b/2.txt"), ("c:1", "x"), ("c:3", "y")]


def test_paths_may_begin_here_and_at_home(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("a.txt") == read("~/a.txt") == read(["a.txt", "~/a.txt"]) == [("a", "x")]
    (tmp_path / "0").symlink_to(tmp_path)  # a folder within itself
    assert read("**/*.txt") == read(["0/a.txt", "a.txt"])[:1] == [("a", "x")]


def test_fields_are_found_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 7, "url": "u7", "body": "x"}\n{"id": 8, "url": "u8", "body": "y"}\n')
    path = str(tmp_path / "a.jsonl")
    assert read(path, text_field="body") == [("7", "x"), ("8", "y")]
    assert read(path, text_field="body", id_field="url") == [("u7", "x"), ("u8", "y")]


def test_limits_cut_documents_between_words(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("one two three", "uninterrupted", "ab"))
    )
    path = str(tmp_path / "a.jsonl")
    texts = [[text for _, text in read(path, max_document_characters=n)] for n in (2, 3, 4, 5, 7, 8, 100)]
    assert [text[0] for text in texts] == ["on", "one", "one ", "one ", "one two", "one two ", "one two three"]
    assert texts[4][1:] == ["uninter", "ab"]
    (tmp_path / "novel.txt").write_text("title " + 5000 * "字", encoding="utf-8")
    assert [len(text) for _, text in read(f"{tmp_path}/novel.txt", max_document_characters=4000)] == [4000]
    assert len(read(path, max_documents=2)) == 2


def test_held_out_documents_can_be_cut_shorter(tmp_path):
    (tmp_path / "a.txt").write_text("one two three four", encoding="utf-8")
    config = {"source": "files", "train": str(tmp_path / "a.txt"), "test": str(tmp_path / "a.txt")}
    cut = DataConfig(**config, max_document_characters=14, max_held_out_characters=8)
    assert [document.text.split() for document in read_documents(cut, "train")] == [["one", "two", "three"]]
    assert [document.text.split() for document in read_documents(cut, "test")] == [["one", "two"]]
    cut = DataConfig(**config, max_document_characters=8)
    assert [document.text.split() for document in read_documents(cut, "test")] == [["one", "two"]]


def test_documents_come_one_at_a_time(tmp_path):
    """The first document is there before the second, which is bad, is looked at."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": ')
    documents = read_documents(DataConfig(source="files", train=str(tmp_path / "a.jsonl")), "train")
    assert next(documents).text == "x"
    with pytest.raises(DataError):
        next(documents)


# --- files: every bad input ------------------------------------------------------------------------------------------


def test_missing_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert f"data.train={tmp_path}/b*.txt: no such file" in refused([f"{tmp_path}/a.txt", f"{tmp_path}/b*.txt"])
    assert f"data.train={tmp_path}/b.txt: no such file" in refused(f"{tmp_path}/b.txt")


def parquet_of(columns: dict[str, object]) -> bytes:
    content = io.BytesIO()
    parquet.write_table(pa.table(columns), content)
    return content.getvalue()


NOISE = os.urandom(30_000).hex().encode()
EMPTY, NOT_JSON = "the file is empty; remove it", "each line must be one whole JSON object"
CUT = "cannot be read to its end"
BAD_FILES: list[tuple[str, bytes, list[str]]] = [
    ("a.txt", b"", [f"a.txt: {EMPTY}"]),
    ("a.jsonl", b" \n\n", [f"a.jsonl: {EMPTY}"]),
    ("a.txt.gz", gzip.compress(b" \n\n"), [f"a.txt.gz: {EMPTY}"]),
    ("a.txt", "eins\nzwei Übel".encode("latin-1"), ["a.txt: not UTF-8 at byte 10"]),
    ("a.txt", "eins".encode("utf-16"), ["a.txt: not UTF-8 at byte 0"]),
    ("a.jsonl", b'{"text": "ab\\ud800"}\n', ["a.jsonl, line 1: the text holds half a character at 2"]),
    ("a.jsonl", b'{"text": "ab", "id": "\\ud800"}\n', ["a.jsonl, line 1: the name holds half a character at 0"]),
    (
        "a.parquet",
        parquet_of({"text": ["x"], "day": pa.array([10**9], pa.date32())}),
        ["not a whole Parquet file (days"],
    ),
    *((f"a.txt{ending}", b"not compressed at all", [f"a.txt{ending}: {CUT}"]) for ending in (".gz", ".zst")),
    *(
        (f"a.txt{ending}", whole[: len(whole) // 2], [f"a.txt{ending}: {CUT}"])
        for ending, whole in ((".gz", gzip.compress(NOISE)), (".zst", zstandard.ZstdCompressor().compress(NOISE)))
    ),
    *(
        ("a.jsonl", b'{"text": "x"}\n\n' + line, [f"a.jsonl, line 3: {words}", NOT_JSON])
        for line, words in (
            (b'{"text": "cut in ha', "not JSON (Unterminated string starting at at column 10)"),
            (b'["text"]', "JSON, but a list and not an object"),
            (b'"text"', "JSON, but a str and not an object"),
            (b'{"text": ' + b"[" * 100_000, "JSON that cannot be read (maximum recursion depth exceeded"),
            (b'{"text": "x", "n": ' + b"9" * 10_000 + b"}", "JSON that cannot be read (Exceeds the limit"),
        )
    ),
    ("a.jsonl", b'{"text": ["x"]}\n', ["line 1: 'text' is a list, not text"]),
    ("a.xz", b"x", ["a.xz is of no kind that can be read; known are .txt"]),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD_FILES, ids=[words[0][:60] for *_, words in BAD_FILES])
def test_a_bad_file_is_refused_with_its_place_and_what_to_do(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refused(f"{tmp_path}/{name}")
    assert f"{tmp_path}/{name}" in message
    assert all(part in message for part in words)


def test_empty_tables_are_refused(tmp_path):
    empty = Dataset.from_dict({"text": []})
    empty.to_parquet(tmp_path / "a.parquet")
    empty.save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "saved"):
        assert f"{name}: the file is empty" in refused(f"{tmp_path}/{name}")


def test_missing_fields_are_named_beside_those_that_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "url": "u"}\n{"body": "y", "url": null}\n')
    assert f"{path}, line 2: data.text_field=text, and there is no such field" in refused(str(path))
    assert "there are body, url; set data.text_field= to one of them" in refused(str(path))
    path.write_text('{"text": "x", "url": null}\n')
    assert f"{path}, line 1: data.id_field=url" in refused(str(path), id_field="url")
    Dataset.from_dict({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    assert "a.parquet, row 1: data.text_field=text" in refused(f"{tmp_path}/a.parquet")


def test_two_documents_of_one_name_are_refused(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"id": "x", "text": "y"}\n')
    message = refused(f"{tmp_path}/*.jsonl")
    assert f"two documents are called 'x': {tmp_path}/a.jsonl, line 1 and {tmp_path}/b.jsonl, line 1" in message


def test_files_of_unknown_kinds_are_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    assert "a.pdf is of no kind that can be read; known are .txt" in refused(f"{tmp_path}/*")
    assert "is a folder; name the files in it" in refused(str(tmp_path))
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(str(tmp_path / "all"))
    assert f"holds several splits; name one of them, such as data.train={tmp_path}/all/train" in refused(
        f"{tmp_path}/all"
    )
    assert read(f"{tmp_path}/all/train") == PAIRS


def change_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = b"\xff" * 64
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": Path.unlink,
    "bytes changed": change_bytes,
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.parquet", "cut"),
        ("a.parquet", "emptied"),
        *(("saved/data-00000-of-00001.arrow", damage) for damage in DAMAGE),
        *(("saved/state.json", damage) for damage in DAMAGE),
    ],
)
def test_damaged_tables_are_refused(tmp_path, name, damage):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    place = tmp_path / name.split("/")[0]
    DAMAGE[damage](tmp_path / name)
    assert str(place) in refused(str(place))


def test_deep_json_in_a_saved_dataset_is_refused(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("[" * 100_000)
    assert "saved: not a whole saved dataset (maximum recursion" in refused(f"{tmp_path}/saved")


def test_a_pipe_in_a_folder_is_refused_before_it_is_opened(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    os.mkfifo(tmp_path / "saved" / "train.jsonl")
    for options in (
        {"source": "files", "train": f"{tmp_path}/saved"},
        {"source": "hub", "repository": f"{tmp_path}/saved"},
    ):
        with pytest.raises(DataError, match=r"saved/train.jsonl is a pipe or a device and not a file; remove it"):
            describe_source(DataConfig(**options), "train")


@pytest.mark.parametrize("source", ["files", "hub", "sample"])
def test_a_split_that_is_not_given_is_refused(source):
    config = DataConfig(source=source, repository="some/where", validation=None)
    with pytest.raises(DataError, match=r"data.validation=null: this run needs validation documents .* set data.valid"):
        next(read_documents(config, "validation"))
    with pytest.raises(ValueError, match="'dev' is no split"):
        next(read_documents(config, "dev"))


@pytest.mark.parametrize("value", [3, [], ["a", 3], {"a": 1}])
def test_a_split_that_is_no_path_is_refused(value):
    with pytest.raises(DataError, match=r"data.train="):
        read(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "data.source=web: there is no such source; choose one of sample, hub, files"),
        ({"source": "hub"}, "data.repository=null: data.source=hub needs"),
        ({"max_documents": 0}, "data.max_documents=0: give a whole number from 1"),
        ({"max_document_characters": -1}, "data.max_document_characters=-1"),
        ({"segments_per_visit": 0}, "data.segments_per_visit=0"),
        ({"workers": 0}, "data.workers=0"),
        ({"max_documents": float("nan")}, "data.max_documents=nan: give a whole number from 1"),
        ({"max_document_characters": 10**30}, "data.max_document_characters=10+: give a whole number from 1 to 10"),
        ({"segments_per_visit": 0.5}, "data.segments_per_visit=0.5: give a whole number"),
        ({"workers": float("nan")}, "data.workers=nan"),
        ({"workers": 100_000}, "data.workers=100000: give a whole number of processes from 1 to 256"),
        ({"text_field": ""}, "data.text_field="),
        ({"text_field": " "}, "data.text_field="),
        ({"id_field": ""}, "data.id_field=: this is empty; give a name, or null for `id`"),
        ({"subset": ""}, "data.subset=: this is empty"),
        ({"cache_dir": ""}, "data.cache_dir=: this is empty"),
        ({"source": "hub", "repository": " "}, "data.repository= : data.source=hub needs"),
    ],
)
def test_options_that_no_run_can_use_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        DataConfig(**options)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere.txt"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "data.test={path}: no such file; give a path or a glob"),
        (a_link_to_nothing, "data.test: {path} is a link to {folder}/nowhere.txt, which does not exist"),
        (os.mkfifo, "data.test: {path} is a pipe or a device and not a file"),
        (Path.mkdir, "data.test: {path} is a folder; name the files in it"),
        (Path.touch, "{path}: the file is empty"),
    ],
)
def test_files_of_every_split_are_looked_at_before_any_is_read(tmp_path, make, message):
    make(tmp_path / "test.txt")
    (tmp_path / "train.txt").write_text("x")
    config = DataConfig(source="files", train=f"{tmp_path}/train.txt", test=f"{tmp_path}/test.txt")
    check_sources(config, ["train"])
    for splits in (["train", "test"], ["test"]):
        with pytest.raises(DataError) as error:
            check_sources(config, splits)
        assert message.format(path=tmp_path / "test.txt", folder=tmp_path) in str(error.value)
    with pytest.raises(DataError):  # and by itself it does not hang
        next(read_documents(config, "test"))


def test_a_file_that_may_not_be_read_is_found_before_any_is_read(tmp_path, monkeypatch):
    (tmp_path / "test.txt").write_text("x")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"data.test: .*test.txt cannot be read \(Permission denied\); get access"):
        check_sources(DataConfig(source="files", test=f"{tmp_path}/test.txt"), ["test"])


def test_splits_that_name_nothing_are_found_before_any_is_read(tmp_path):
    check_sources(DataConfig(), ["train", "validation", "test"])
    check_sources(DataConfig(source="hub", repository="owner/books"), ["train"])  # the hub is not asked
    for options, message in (
        ({"train": []}, r"data.train=\[\]: this names no documents"),
        ({"train": ""}, r"data.train=: this run needs train documents"),
        ({"train": " "}, r"data.train= : this names no documents"),
        ({"train": "dev"}, r"data.train=dev: the sample has the splits"),
        ({"source": "files", "train": "["}, r"data.train=\[: no such file"),
        ({"source": "files", "train": "~nobody/a.txt"}, r"data.train=~nobody/a.txt: no such file"),
        ({"source": "hub", "repository": f"{tmp_path}/books"}, r"data.repository=.*books: there is no such folder"),
        ({"source": "hub", "repository": "~nobody/books"}, r"data.repository=~nobody/books: there is no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            check_sources(DataConfig(**options), ["train"])


# --- the sample ------------------------------------------------------------------------------------------------------


def test_the_sample_is_small_and_no_book_of_it_is_in_two_splits():
    names = {split: {d.id for d in read_documents(DataConfig(), split)} for split in ("train", "validation", "test")}
    assert {split: len(ids) for split, ids in names.items()} == {"train": 17, "validation": 2, "test": 4}
    assert len(set.union(*names.values())) == 23  # no book is in two splits
    folder = Path(sources.__file__).parent / "sample"
    assert sum(path.stat().st_size for path in folder.glob("*.gz")) <= 2.95e6
    table = (folder / "SOURCES.md").read_text()
    for split, ids in names.items():
        assert all(any(f"| {split} |" in line and f"| {n} |" in line for line in table.splitlines()) for n in ids)


def test_the_sample_has_its_own_splits():
    with pytest.raises(DataError, match=r"data.train=dev: the sample has the splits train, validation, test"):
        next(read_documents(DataConfig(train="dev"), "train"))


# --- the hub ---------------------------------------------------------------------------------------------------------


def read_hub(repository: str, split: str = "train", **options: object) -> list[tuple[str, str]]:
    config = DataConfig(source="hub", repository=repository, **options)
    return [(document.id, document.text) for document in read_documents(config, split)]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A folder as the hub has them, with two subsets."""
    folder = tmp_path / "owner" / "books"
    card = "---\nconfigs:\n"
    for subset, splits in {"plain": {"train": ROWS, "test": ROWS[1:]}, "other": {"train": ROWS[:1]}}.items():
        (folder / subset).mkdir(parents=True)
        card += f"- config_name: {subset}\n  data_files:\n"
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(folder / subset / f"{split}-00000-of-00001.parquet")
            card += f"  - {{split: {split}, path: {subset}/{split}-*}}\n"
    (folder / "README.md").write_text(card + "---\n")
    return folder


def test_a_local_folder_laid_out_like_the_hub_is_read(hub_folder):
    assert read_hub(str(hub_folder), subset="plain") == PAIRS
    assert read_hub(str(hub_folder), subset="plain", split="test") == PAIRS[1:]
    assert read_hub(str(hub_folder), subset="other") == PAIRS[:1]
    assert read_hub(str(hub_folder), subset="plain", train="train[1:]", id_field="text") == [("The second.",) * 2]


def test_a_folder_without_a_card_is_read(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"body": "x", "url": "u"}\n{"body": "y", "url": "v"}\n')
    assert read_hub(str(tmp_path), text_field="body") == [("train:1", "x"), ("train:2", "y")]
    for missing in ({}, {"text_field": "body", "id_field": "name"}):
        with pytest.raises(DataError, match=r"split train: data\.\w+=\w+, .* there are body, url; set"):
            read_hub(str(tmp_path), **missing)


def test_subsets_and_splits_that_there_are_not_are_refused(hub_folder):
    with pytest.raises(DataError, match=r"data.repository=.*books data.subset=plane.*plain"):
        read_hub(str(hub_folder), subset="plane")
    with pytest.raises(DataError, match=r"data.repository=.*books data.subset=other, split validation"):
        read_hub(str(hub_folder), subset="other", split="validation")
    with pytest.raises(DataError, match="there is no such folder"):
        read_hub(str(hub_folder) + "s")
    with pytest.raises(DataError, match=r"only data\.source=files takes a list"):
        read_hub(str(hub_folder), train=["train", "test"])


def test_what_is_read_is_described_anew_when_it_changes(hub_folder):
    config = DataConfig(source="hub", repository=str(hub_folder), subset="other")
    before = describe_source(config, "train")
    (hub_folder / ".git").mkdir()
    (hub_folder / ".git" / "HEAD").write_text("of a clone; it is none of the data")
    assert describe_source(config, "train") == before
    Dataset.from_list(ROWS).to_parquet(hub_folder / "other" / "train-00000-of-00001.parquet")
    assert describe_source(config, "train") != before
    assert read_hub(str(hub_folder), subset="other") == PAIRS


@pytest.fixture
def no_answers_kept() -> Iterator[None]:
    problem_with_the_hub.cache_clear()
    yield
    problem_with_the_hub.cache_clear()


@pytest.fixture
def closed_port(monkeypatch: pytest.MonkeyPatch, no_answers_kept: None) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    return endpoint


def test_a_hub_that_cannot_be_reached_is_said_with_remedies(closed_port):
    begun = time.monotonic()
    with pytest.raises(DataError) as error:
        read_hub("owner/books")
    assert time.monotonic() - begun < 5
    assert f"data.repository=owner/books data.subset=null: {closed_port} cannot be reached" in str(error.value)
    for remedy in ("data.repository= to a local folder", "HF_HUB_OFFLINE=1", "HF_ENDPOINT"):
        assert remedy in str(error.value)


def test_what_was_downloaded_before_needs_no_network(hub_folder, closed_port):
    # What a download leaves behind, under the name that the hub's datasets have there.
    assert read_hub(str(hub_folder), subset="plain") == PAIRS
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    (made,) = (path for path in cache.glob("local_folders/*/books/plain*/*/*") if path.is_dir())
    kept = cache / "owner___books" / "plain" / made.parent.name / made.name
    shutil.copytree(made, kept)
    assert read_hub("owner/books", subset="plain") == PAIRS
    assert read_hub("owner/books", subset="plain", split="test") == PAIRS[1:]
    with pytest.raises(DataError, match="cannot be reached"):
        read_hub("owner/books", subset="other")


def test_a_hub_that_never_answers_is_given_up(monkeypatch, no_answers_kept):
    """It accepts, and says nothing."""
    assert hub.PATIENCE <= 15
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        with pytest.raises(DataError, match=rf"{endpoint} .* to a local folder"):
            read_hub("owner/books")


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch, no_answers_kept):
    """The timeout of a connection does not count before there is an address to connect to."""
    end = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: end.wait(20))
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    begun = time.monotonic()
    with pytest.raises(DataError, match="does not answer within"):
        read_hub("owner/books")
    assert time.monotonic() - begun < 5
    end.set()


class _Answers(BaseHTTPRequestHandler):
    """A hub that knows no dataset but one, which it gives to nobody."""

    def do_GET(self) -> None:
        code, error = (403, "GatedRepo") if "gated" in self.path else (404, "RepoNotFound")
        self.send_response(code)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def a_hub(monkeypatch: pytest.MonkeyPatch, no_answers_kept: None) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        yield endpoint
        server.shutdown()


@pytest.mark.parametrize("name", ["owner/boks", "my books"])
def test_a_dataset_that_the_hub_does_not_have_is_named(a_hub, name):
    with pytest.raises(HubError, match=rf"data.repository={name}: {a_hub} has no such dataset"):
        read_hub(name)


def test_a_dataset_that_must_be_asked_for_is_named(a_hub):
    with pytest.raises(HubError, match=r"data.repository=owner/gated: .* only to those who asked for it"):
        read_hub("owner/gated")


def test_what_was_never_downloaded_is_refused_offline(monkeypatch, no_answers_kept):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE forbids the network, and no earlier download"):
        read_hub("owner/books")
