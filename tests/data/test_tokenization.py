import errno
import itertools
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from infformer.data import cache, tokenization
from infformer.data.options import DataConfig
from infformer.data.segments import Lanes
from infformer.data.sources import Document
from infformer.data.tokenization import (
    TokenizedDocuments,
    beginning_of_documents,
    describe_tokenizer,
    tokenize_documents,
    warn_of_shared_documents,
)
from infformer.errors import DataError

Make = Callable[..., PreTrainedTokenizerFast]
TEXTS = {"a": "Zwei Übel\n in a row", "b": "x", "c": "and the third one"}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write(tmp_path / "a.jsonl", TEXTS)
    return DataConfig(source="files", train=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(make_tokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer(eos_token="</s>")


def write(path: Path, texts: dict[str, str]) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))


def whole(documents: TokenizedDocuments) -> dict[str, list[int]]:
    return {
        name: documents.tokens(number, 0, int(documents.token_counts[number])).tolist()
        for number, name in enumerate(documents.ids)
    }


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the cache that were made, not found."""
    folders: list[Path] = []
    make = tokenization._make

    def count(place: Path, name: str, *arguments: Any) -> Path:
        whole = make(place, name, *arguments)
        folders.append(place.parent / name)
        return whole

    monkeypatch.setattr(tokenization, "_make", count)
    return folders


def kept(config: DataConfig) -> list[str]:
    """What is in the cache, without its lock."""
    return sorted(set(os.listdir(config.cache_folder)) - {".lock"})


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_words_and_bytes_are_those_of_the_texts(config, make_tokenizer, workers):
    config.workers = workers
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    documents = tokenize_documents(config, "train", tokenizer)
    assert len(documents) == 3
    assert documents.ids == list(TEXTS)
    for (name, tokens), text in zip(whole(documents).items(), TEXTS.values(), strict=True):
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(tokens[1:]) == text == TEXTS[name]
    assert documents.token_counts.tolist() == [1 + len(text.encode()) for text in TEXTS.values()]
    assert documents.byte_counts.tolist() == [len(text.encode()) for text in TEXTS.values()]
    assert documents.word_counts.tolist() == [5, 1, 4]
    assert documents.token_counts.dtype == documents.word_counts.dtype == documents.byte_counts.dtype == np.int64
    assert documents.largest_token == max(max(tokens) for tokens in whole(documents).values())


def test_a_stretch_of_a_document_is_read_alone(config, tokenizer):
    documents = tokenize_documents(config, "train", tokenizer)
    tokens = whole(documents)["c"]
    assert documents.tokens(2, 4, 9).tolist() == tokens[4:9]
    assert documents.tokens(2, 4, 4).tolist() == []
    assert documents.tokens(2, 4, 9).dtype == np.int64
    for start, stop in ((0, len(tokens) + 1), (-1, 3), (5, 4)):
        with pytest.raises(IndexError, match="document 2 has 18 tokens"):
            documents.tokens(2, start, stop)


def test_documents_lie_on_disk_in_several_chunks(config, tokenizer):
    texts = {f"{n:03d}": f"document {n} " * (n + 1) for n in range(60)}
    write(Path(config.train), texts)
    documents = tokenize_documents(config, "train", tokenizer)
    assert {name: tokenizer.decode(tokens[1:]) for name, tokens in whole(documents).items()} == texts
    # Views of the mapped file, in few bytes a token; not copies of it.
    assert all(chunk.dtype == np.uint16 and not chunk.flags.owndata for chunk in documents._chunks)


def test_a_chunked_file_reads_like_a_whole_one(config, tokenizer, monkeypatch):
    texts = {f"{n:03d}": "word " * (n + 1) for n in range(20)}
    write(Path(config.train), texts)
    documents = tokenize_documents(config, "train", tokenizer)
    load = tokenization.datasets.load_from_disk

    class InParts:
        def __init__(self, folder: str) -> None:
            table = load(folder).data.table
            # A copy, nothing, and a view of the rest.
            self.data = tokenization.pa.concat_tables([table.take(list(range(7))), table.slice(7, 0), table.slice(7)])

    monkeypatch.setattr(tokenization.datasets, "load_from_disk", InParts)
    parts = tokenize_documents(config, "train", tokenizer)
    assert len(parts._chunks) == 2
    assert whole(parts) == whole(documents)
    assert parts.token_counts.tolist() == documents.token_counts.tolist()


def test_large_vocabularies_keep_their_numbers(config, make_tokenizer):
    words = [f"w{n}" for n in range(70_000)]
    write(Path(config.train), {"a": "w0 w69999 w3"})
    documents = tokenize_documents(config, "train", make_tokenizer(words, bos_token="<s>"))
    assert whole(documents) == {"a": [1, 2, 70_001, 5]}
    assert documents.largest_token == 70_001
    documents.check_vocabulary(70_002)
    with pytest.raises(DataError, match=r"hold token 70001, and the model knows tokens 0 to 70000 only"):
        documents.check_vocabulary(70_001)


def test_a_vocabulary_with_holes_keeps_its_numbers(config):
    """There are few tokens, and 16 bits do not hold their numbers."""
    write(Path(config.train), {"a": "sea the sea"})
    model = Tokenizer(models.WordLevel({"the": 3, "sea": 70_000}, "the"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config.beginning_of_document = False
    documents = tokenize_documents(config, "train", PreTrainedTokenizerFast(tokenizer_object=model))
    assert whole(documents) == {"a": [70_000, 3, 70_000]}
    with pytest.raises(DataError, match=r"hold token 70000, and the model knows tokens 0 to 1 only"):
        documents.check_vocabulary(2)


def test_a_document_begins_with_the_beginning_or_the_end_of_texts(config, make_tokenizer, tokenizer):
    for special in ({"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token": "</s>"}):
        documents = tokenize_documents(config, "train", make_tokenizer(**special))
        assert all(tokens[0] == 1 for tokens in whole(documents).values())
    config.beginning_of_document, config.skip_short_documents = False, True
    documents = tokenize_documents(config, "train", tokenizer)
    assert documents.token_counts.tolist() == [len(TEXTS["a"].encode()), len(TEXTS["c"])]
    tokenize_documents(config, "train", make_tokenizer())  # it needs no such token then
    config.beginning_of_document = True
    with pytest.raises(DataError, match=r"data.beginning_of_document=true: the tokenizer has neither"):
        tokenize_documents(config, "train", make_tokenizer())


def test_the_token_before_every_document_is_said(make_tokenizer):
    chat = make_tokenizer(bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert "begins with the token <|im_start|>" in beginning_of_documents(DataConfig(), chat)
    assert "begins with the token </s>" in beginning_of_documents(DataConfig(), make_tokenizer(eos_token="</s>"))
    assert "no token" in beginning_of_documents(DataConfig(beginning_of_document=False), make_tokenizer())


@pytest.mark.parametrize("workers", [1, 2])
def test_short_documents_are_refused_or_left_out(config, tokenizer, caplog, workers):
    config.workers = workers
    write(Path(config.train), TEXTS | {"nothing": ""})
    with pytest.raises(DataError, match=r"document 'nothing' has 1 token.*data.skip_short_documents=true"):
        tokenize_documents(config, "train", tokenizer)
    config.skip_short_documents = True
    with caplog.at_level(logging.WARNING):
        assert tokenize_documents(config, "train", tokenizer).ids == list(TEXTS)
    assert "1 of 4 documents of train have fewer than 2 tokens and are left out" in caplog.text
    config.skip_short_documents = False
    with pytest.raises(DataError, match="document 'nothing'"):
        tokenize_documents(config, "train", tokenizer)
    config.skip_short_documents = True
    write(Path(config.train), {"nothing": ""})
    with pytest.raises(DataError, match=r"data.train: every one of its 1 document\(s\) has fewer"):
        tokenize_documents(config, "train", tokenizer)


def test_a_long_document_is_no_cause_for_a_warning(config, tokenizer, caplog):
    tokenizer.model_max_length = 4
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        tokenize_documents(config, "train", tokenizer)
        assert "longer than" not in caplog.text
        tokenizer(TEXTS["a"])  # which would have warned
    assert "longer than" in caplog.text


def test_what_was_made_is_found(config, tokenizer, made):
    first = tokenize_documents(config, "train", tokenizer)
    tokenizer(["a", "b c"], padding=False, truncation=True, max_length=1)  # leaves its intermediates in the tokenizer
    config.workers, config.shuffle, config.segments_per_visit = 2, False, 3
    again = tokenize_documents(config, "train", tokenizer)
    assert len(made) == 1
    assert whole(first) == whole(again)
    assert first.fingerprint == again.fingerprint
    assert kept(config) == [made[0].name]  # and nothing is left of the work


def test_the_fingerprint_is_that_of_the_content(config, tokenizer, made):
    before = tokenize_documents(config, "train", tokenizer).fingerprint
    os.utime(config.train)
    assert tokenize_documents(config, "train", tokenizer).fingerprint == before
    for texts in (
        {"a": TEXTS["a"], "c": TEXTS["c"], "b": TEXTS["b"]},
        {"a": TEXTS["a"], "b": TEXTS["b"], "d": TEXTS["c"]},
        {"a": TEXTS["a"] + "x", "b": "", "c": TEXTS["c"]},
    ):
        write(Path(config.train), texts)
        config.skip_short_documents = True
        assert tokenize_documents(config, "train", tokenizer).fingerprint != before
    assert len(made) == 4


@pytest.mark.parametrize(
    "options",
    [
        {"max_documents": 2},
        {"max_document_characters": 4},
        {"beginning_of_document": False, "skip_short_documents": True},
        {"id_field": "text"},
    ],
)
def test_other_options_are_made_anew(config, tokenizer, made, options):
    before = tokenize_documents(config, "train", tokenizer).fingerprint
    for option, value in options.items():
        setattr(config, option, value)
    assert tokenize_documents(config, "train", tokenizer).fingerprint != before
    assert len(made) == 2


def test_another_tokenizer_makes_them_anew(config, make_tokenizer, made):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    others = [
        make_tokenizer(),
        make_tokenizer(**special),
        make_tokenizer(["the"], **special),
        make_tokenizer(**special),
    ]
    others[-1].split_special_tokens = True  # so that `<s>` in a text is three letters
    config.skip_short_documents = True
    config.beginning_of_document = False
    for tokenizer in others:
        tokenize_documents(config, "train", tokenizer)
    assert len({folder.name for folder in made}) == 4


def test_tokenizers_in_python_that_differ_in_an_option_alone_are_told_apart():
    one, same, other = ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer()
    other.do_lower_case = True
    same("a text that it has cut up before")
    assert describe_tokenizer(one) == describe_tokenizer(same) != describe_tokenizer(other)


def test_a_failure_leaves_nothing_behind(config, tokenizer, monkeypatch):
    def full(_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "_summarize", full)
        with pytest.raises(DataError, match=r"data\.cache_dir=.*no space left"):
            tokenize_documents(config, "train", tokenizer)
    assert kept(config) == []
    assert len(tokenize_documents(config, "train", tokenizer)) == 3


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_makes_is_not(config, tokenizer, monkeypatch):
    key = tokenization._key(config, "train", tokenizer)
    left, older, made_now = (config.cache_folder / f".{name}" for name in (f"train-{key}.x", f"words-{key}.txt.y", "z"))
    living = config.cache_folder / f".test-{key}.w"
    for folder in (left, older, made_now, living):
        (folder / "whole").mkdir(parents=True)
        (folder / "texts.arrow").write_bytes(b"half a text")
    (left / "lock").touch()
    with filelock.FileLock(living / "lock"):
        assert whole(tokenize_documents(config, "train", tokenizer)).keys() == TEXTS.keys()
    assert kept(config) == sorted([f"train-{key}", living.name, made_now.name])  # and what is not the cache's own stays


def test_what_a_process_was_making_when_it_was_killed_is_removed(tmp_path):
    """The lock in it ends with its process."""
    folder = tmp_path / f"train-{32 * '0'}"

    def killed(place: Path) -> Path:
        (place / "texts.arrow").write_bytes(b"half a text")
        os.kill(os.getpid(), signal.SIGKILL)
        return place

    def make(place: Path) -> Path:
        (place / "whole").mkdir()
        return place / "whole"

    child = os.fork()
    if child == 0:
        try:
            cache.find_or_make(folder, killed)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.glob(f".{folder.name}.*")
    assert (left / "texts.arrow").exists()
    cache.find_or_make(folder, make)
    assert sorted(os.listdir(tmp_path)) == [".lock", folder.name]


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "missing": Path.unlink,
    "a byte changed": change_a_byte,
    "another object": lambda path: path.write_bytes(b"{}"),
    "no object": lambda path: path.write_bytes(b"[" * 100_000),
    "a pipe": make_a_pipe,
}
FILES = ("data-00000-of-00001.arrow", "state.json", "dataset_info.json", "summary.json", "checksums.json")


def test_all_damage_to_tokens_is_found(config, tokenizer, tmp_path):
    tokenize_documents(config, "train", tokenizer)
    (folder,) = config.cache_folder.glob("train-*")
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert cache._damage(folder) is None
    for name, damage in itertools.product(FILES, DAMAGE):
        copy = shutil.copytree(folder, tmp_path / f"{name} {damage}")
        DAMAGE[damage](copy / name)
        assert cache._damage(copy) is not None, (name, damage)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("data-00000-of-00001.arrow", "cut"),
        ("data-00000-of-00001.arrow", "a byte changed"),
        ("state.json", "missing"),
        ("summary.json", "a pipe"),
        ("checksums.json", "emptied"),
    ],
)
def test_damaged_tokens_are_made_anew_with_a_warning(config, tokenizer, caplog, name, damage):
    before = tokenize_documents(config, "train", tokenizer)
    tokens = whole(before)
    (folder,) = config.cache_folder.glob("train-*")
    DAMAGE[damage](folder / name)
    after = tokenize_documents(config, "train", tokenizer)
    assert f"{folder} in the cache is damaged ({name} is" in caplog.text
    assert whole(after) == tokens
    assert after.fingerprint == before.fingerprint
    assert kept(config) == [folder.name]
    caplog.clear()
    assert whole(tokenize_documents(config, "train", tokenizer)) == tokens
    assert caplog.text == ""


@pytest.mark.parametrize("damage", ["a file", "an empty folder", "a file too many"])
def test_a_place_in_the_cache_that_holds_something_else_is_made_anew(config, tokenizer, caplog, damage):
    tokens = whole(tokenize_documents(config, "train", tokenizer))
    (folder,) = config.cache_folder.glob("train-*")
    if damage == "a file too many":
        (folder / "data-00001-of-00002.arrow").write_bytes(b"")
    else:
        shutil.rmtree(folder)
        folder.touch() if damage == "a file" else folder.mkdir()
    assert whole(tokenize_documents(config, "train", tokenizer)) == tokens
    assert "in the cache is damaged" in caplog.text
    assert kept(config) == [folder.name]


def test_a_text_changed_with_the_same_size_and_time_is_made_anew(config, tokenizer, made):
    tokenize_documents(config, "train", tokenizer)
    path = Path(config.train)
    stamp = path.stat()
    write(path, TEXTS | {"c": "and the other one"})  # of the same length
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_size == stamp.st_size
    assert path.stat().st_mtime_ns == stamp.st_mtime_ns
    assert tokenizer.decode(whole(tokenize_documents(config, "train", tokenizer))["c"][1:]) == "and the other one"
    assert len(made) == 2


def test_the_same_text_elsewhere_is_found(config, tokenizer, made, tmp_path):
    tokenize_documents(config, "train", tokenizer)
    (tmp_path / "elsewhere").mkdir()
    config.train = shutil.copy(config.train, tmp_path / "elsewhere")
    tokenize_documents(config, "train", tokenizer)
    assert len(made) == 1


def test_two_processes_that_race_make_one_folder(config, tokenizer, monkeypatch, made):
    """The other one is done at the worst moment: when everything is ready to be put in place."""
    summarize = tokenization._summarize
    others: list[TokenizedDocuments] = []

    def after_the_other(documents: Any) -> dict[str, Any]:
        monkeypatch.setattr(tokenization, "_summarize", summarize)
        others.append(tokenize_documents(config, "train", tokenizer))
        return summarize(documents)

    monkeypatch.setattr(tokenization, "_summarize", after_the_other)
    mine = tokenize_documents(config, "train", tokenizer)
    assert len(made) == 2
    assert made[0] == made[1]
    assert whole(mine) == whole(others[0])
    assert kept(config) == [made[0].name]


def test_two_processes_that_find_the_same_damage_keep_one_folder(config, tokenizer, monkeypatch):
    tokens = whole(tokenize_documents(config, "train", tokenizer))
    (folder,) = config.cache_folder.glob("train-*")
    (folder / "state.json").unlink()
    summarize = tokenization._summarize
    stamps: list[int] = []

    def after_the_other(documents: Any) -> dict[str, Any]:
        monkeypatch.setattr(tokenization, "_summarize", summarize)
        tokenize_documents(config, "train", tokenizer)
        stamps.append(folder.stat().st_ino)
        return summarize(documents)

    monkeypatch.setattr(tokenization, "_summarize", after_the_other)
    assert whole(tokenize_documents(config, "train", tokenizer)) == tokens
    assert stamps == [folder.stat().st_ino]  # the one that came second left what the first one may have opened
    assert kept(config) == [folder.name]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("owner", "attribute"), [(Path, "mkdir"), (os, "fsync"), (cache.tempfile, "mkdtemp")])
def test_a_full_or_read_only_cache_is_found_before_anything_is_read(config, tokenizer, monkeypatch, owner, attribute):
    monkeypatch.setattr(owner, attribute, full)
    monkeypatch.setattr(tokenization, "read_documents", lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(DataError, match=r"data\.cache_dir=.*No space left.*; make room or get access, or name another"):
        tokenize_documents(config, "train", tokenizer)


def test_a_place_that_cannot_be_taken_is_an_error(config, tokenizer, monkeypatch):
    def refuse(*_: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match=r"data\.cache_dir=.*not here"):
        tokenize_documents(config, "train", tokenizer)


def test_a_cache_that_is_a_file_is_an_error(config, tokenizer, tmp_path):
    config.cache_dir = config.train
    with pytest.raises(DataError, match=r"data\.cache_dir=.*a.jsonl: the tokens cannot be kept there"):
        tokenize_documents(config, "train", tokenizer)


def test_a_file_system_without_locks_does(config, tokenizer, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = config.cache_folder / f".train-{32 * '0'}.x"
    left.mkdir(parents=True)
    monkeypatch.setattr(cache.FileLock, "acquire", refuse)
    assert len(tokenize_documents(config, "train", tokenizer)) == 3
    assert left.exists()  # it cannot be known whether somebody is filling it


def test_the_main_process_goes_first(config, tokenizer, made):
    order: list[int] = []

    @contextmanager
    def turn() -> Iterator[None]:
        order.append(len(made))
        yield
        order.append(len(made))

    tokenize_documents(config, "train", tokenizer, turn())
    assert order == [0, 1]


def test_errors_of_reading_come_through(config, tokenizer):
    Path(config.train).write_text('{"text": "x"}\n{"text": "y')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not JSON"):
        tokenize_documents(config, "train", tokenizer)
    assert kept(config) == []


def test_the_cache_is_where_option_variable_or_home_say(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("INFFORMER_CACHE", str(tmp_path / "variable"))
    assert DataConfig(cache_dir="~/option").cache_folder == tmp_path / "option"
    assert DataConfig().cache_folder == tmp_path / "variable"
    monkeypatch.delenv("INFFORMER_CACHE")
    assert DataConfig().cache_folder == tmp_path / ".cache" / "infformer"


def test_the_sample_becomes_segments(tokenizer, tmp_path):
    config = DataConfig(max_document_characters=5000, cache_dir=str(tmp_path))
    documents = tokenize_documents(config, "test", tokenizer)
    segment = next(Lanes(documents, 4, 64, 1, shuffle=False))
    assert [tokenizer.decode(row) for row in segment.targets] == [
        tokenizer.decode(documents.tokens(document, 1, 65)) for document in range(4)
    ]
    assert segment.input_ids[:, 0].tolist() == [tokenizer.eos_token_id] * 4


def test_real_books_are_tokenized_as_gpt2_does(shared, tmp_path):
    tokenizer = GPT2TokenizerFast.from_pretrained(shared / "gpt2_tokenizer")
    config = DataConfig(max_documents=2, cache_dir=str(tmp_path))
    documents = tokenize_documents(config, "validation", tokenizer)
    assert documents.ids == ["356", "56719"]
    assert documents.word_counts.tolist() == [39449, 44854]
    assert documents.byte_counts.tolist() == [213117, 256684]
    assert documents.tokens(0, 0, 1).tolist() == [50256]
    text = tokenizer.decode(documents.tokens(0, 1, int(documents.token_counts[0])))
    assert len(text.encode()) == 213117


class TestFromTexts:
    DOCUMENTS = tuple(Document(name, text) for name, text in TEXTS.items())

    def test_documents_from_texts_are_what_the_cache_holds(self, config, make_tokenizer, made):
        tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
        here = TokenizedDocuments.from_texts(self.DOCUMENTS, tokenizer, tokenizer.bos_token_id)
        assert made == []
        cached = tokenize_documents(config, "train", tokenizer)
        assert whole(here) == whole(cached)
        for name in ("ids", "fingerprint", "largest_token"):
            assert getattr(here, name) == getattr(cached, name)
        for name in ("token_counts", "word_counts", "byte_counts"):
            assert getattr(here, name).tolist() == getattr(cached, name).tolist()
        assert here.tokens(2, 3, 5).tolist() == cached.tokens(2, 3, 5).tolist()

    def test_documents_from_texts_may_begin_with_no_token(self, tokenizer):
        documents = TokenizedDocuments.from_texts(self.DOCUMENTS[:1], tokenizer, None)
        assert tokenizer.decode(whole(documents)["a"]) == TEXTS["a"]

    def test_texts_that_are_too_short_are_refused_or_left_out(self, tokenizer):
        with pytest.raises(DataError, match="'b' has 1 token"):
            TokenizedDocuments.from_texts(self.DOCUMENTS, tokenizer, None)
        documents = TokenizedDocuments.from_texts(self.DOCUMENTS, tokenizer, None, skip_short=True)
        assert documents.ids == ["a", "c"]
        assert len(TokenizedDocuments.from_texts(self.DOCUMENTS[1:2], tokenizer, None, skip_short=True)) == 0


class TestSharedDocuments:
    """A document is the same by its text, whatever it is called and however it was cut."""

    def documents(self, folder: Path, tokenizer: PreTrainedTokenizerFast) -> dict[str, TokenizedDocuments]:
        write(folder / "train.jsonl", {"a": "one two three four", "b": "of its own", "c": "\n the same \n"})
        write(folder / "validation.jsonl", {"a": "another of this name", "e": "one two three four"})
        write(folder / "test.jsonl", {"c": "the same", "f": "of nobody else"})
        files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
        config = DataConfig(source="files", **files, max_held_out_characters=8, cache_dir=str(folder / "cache"))
        return {split: tokenize_documents(config, split, tokenizer) for split in files}

    def test_shared_documents_are_named_in_a_warning(self, tmp_path, tokenizer, caplog):
        documents = self.documents(tmp_path, tokenizer)
        warn_of_shared_documents(documents)
        of_validation, of_test = caplog.messages
        assert "1 of 2 documents of validation are in train too: e (in train: a); figures on them" in of_validation
        assert "1 of 2 documents of test are in train too: c; figures on them" in of_test
        assert "take them out of one of data.train= and data.test=" in of_test

    def test_documents_of_other_texts_are_not_shared(self, tmp_path, make_tokenizer, caplog, tokenizer):
        documents = self.documents(tmp_path, tokenizer)
        warn_of_shared_documents({split: documents[split] for split in ("validation", "test")})
        unknown = TokenizedDocuments.from_texts([Document("x", "y"), Document("z", "y")], make_tokenizer(), 0)
        warn_of_shared_documents({"train": unknown, "test": unknown})
        assert caplog.text == ""

    def test_of_many_shared_documents_a_few_are_named(self, make_tokenizer, caplog):
        texts = [Document(f"d{number}", "text", digest=str(number)) for number in range(9)]
        documents = TokenizedDocuments.from_texts(texts, make_tokenizer(), 0)
        warn_of_shared_documents({"train": documents, "test": documents})
        assert "9 of 9 documents of test are in train too: d0, d1, d2, d3, d4, ...; figures" in caplog.text
