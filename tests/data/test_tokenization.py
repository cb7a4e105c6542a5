import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from infformer.data import DataConfig, DataError, Document, Lanes, TokenizedDocuments, tokenization, tokenize_documents

Make = Callable[..., PreTrainedTokenizerFast]
TEXTS = {"a": "Zwei Übel\n in a row", "b": "x", "c": "and the third one"}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write(tmp_path / "a.jsonl", TEXTS)
    return DataConfig(source="files", train=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))


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

    def count(folder: Path, *arguments: Any) -> None:
        make(folder, *arguments)
        folders.append(folder)

    monkeypatch.setattr(tokenization, "_make", count)
    return folders


@pytest.mark.parametrize("workers", [1, 2])
def test_tokens_and_counts(config: DataConfig, make_tokenizer: Make, workers: int) -> None:
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


def test_a_stretch_of_a_document(config: DataConfig, make_tokenizer: Make) -> None:
    documents = tokenize_documents(config, "train", make_tokenizer(eos_token="</s>"))
    tokens = whole(documents)["c"]
    assert documents.tokens(2, 4, 9).tolist() == tokens[4:9]
    assert documents.tokens(2, 4, 4).tolist() == []
    assert documents.tokens(2, 4, 9).dtype == np.int64
    for start, stop in ((0, len(tokens) + 1), (-1, 3), (5, 4)):
        with pytest.raises(IndexError, match="document 2 has 18 tokens"):
            documents.tokens(2, start, stop)


def test_documents_lie_on_disk_in_several_chunks(config: DataConfig, make_tokenizer: Make) -> None:
    texts = {f"{n:03d}": f"document {n} " * (n + 1) for n in range(60)}
    write(Path(config.train), texts)
    tokenizer = make_tokenizer(eos_token="</s>")
    documents = tokenize_documents(config, "train", tokenizer)
    assert {name: tokenizer.decode(tokens[1:]) for name, tokens in whole(documents).items()} == texts
    # Views of the mapped file, in few bytes a token; not copies of it.
    assert all(chunk.dtype == np.uint16 and not chunk.flags.owndata for chunk in documents._chunks)


def test_a_chunked_file_reads_like_a_whole_one(
    config: DataConfig, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {f"{n:03d}": "word " * (n + 1) for n in range(20)}
    write(Path(config.train), texts)
    tokenizer = make_tokenizer(eos_token="</s>")
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


def test_large_vocabularies(config: DataConfig, make_tokenizer: Make) -> None:
    words = [f"w{n}" for n in range(70_000)]
    write(Path(config.train), {"a": "w0 w69999 w3"})
    documents = tokenize_documents(config, "train", make_tokenizer(words, bos_token="<s>"))
    assert whole(documents) == {"a": [1, 2, 70_001, 5]}
    assert documents.largest_token == 70_001
    documents.check_vocabulary(70_002)
    with pytest.raises(DataError, match=r"hold token 70001, and the model knows tokens 0 to 70000 only"):
        documents.check_vocabulary(70_001)


def test_what_a_document_begins_with(config: DataConfig, make_tokenizer: Make) -> None:
    for special in ({"bos_token": "<s>", "eos_token": "</s>"}, {"eos_token": "</s>"}):
        documents = tokenize_documents(config, "train", make_tokenizer(**special))
        assert all(tokens[0] == 1 for tokens in whole(documents).values())
    config.beginning_of_document, config.skip_short_documents = False, True
    documents = tokenize_documents(config, "train", make_tokenizer(eos_token="</s>"))
    assert documents.token_counts.tolist() == [len(TEXTS["a"].encode()), len(TEXTS["c"])]
    tokenize_documents(config, "train", make_tokenizer())  # it needs no such token then
    config.beginning_of_document = True
    with pytest.raises(DataError, match=r"data.beginning_of_document=true: the tokenizer has neither"):
        tokenize_documents(config, "train", make_tokenizer())


@pytest.mark.parametrize("workers", [1, 2])
def test_short_documents(
    config: DataConfig, make_tokenizer: Make, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    config.workers = workers
    write(Path(config.train), TEXTS | {"nothing": ""})
    tokenizer = make_tokenizer(eos_token="</s>")
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


def test_a_long_document_is_no_cause_for_a_warning(
    config: DataConfig, make_tokenizer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer.model_max_length = 4
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        tokenize_documents(config, "train", tokenizer)
        assert "longer than" not in caplog.text
        tokenizer(TEXTS["a"])  # which would have warned
    assert "longer than" in caplog.text


def test_what_was_made_is_found(config: DataConfig, make_tokenizer: Make, made: list[Path]) -> None:
    first = tokenize_documents(config, "train", make_tokenizer(eos_token="</s>"))
    tokenizer = make_tokenizer(eos_token="</s>")
    tokenizer(["a", "b c"], padding=False, truncation=True, max_length=1)  # leaves its traces in the tokenizer
    config.workers, config.shuffle, config.segments_per_visit = 2, False, 3
    again = tokenize_documents(config, "train", tokenizer)
    assert len(made) == 1
    assert whole(first) == whole(again)
    assert first.fingerprint == again.fingerprint
    assert os.listdir(config.cache_folder) == [made[0].name]  # and nothing is left of the work


def test_another_text_is_made_anew(config: DataConfig, make_tokenizer: Make, made: list[Path]) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    before = tokenize_documents(config, "train", tokenizer)
    path = Path(config.train)
    stamp = path.stat()
    write(path, TEXTS | {"c": "and the other one"})  # of the same length
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    after = tokenize_documents(config, "train", tokenizer)
    assert len(made) == 2
    assert tokenizer.decode(whole(after)["c"][1:]) == "and the other one"
    assert before.fingerprint != after.fingerprint


def test_the_fingerprint_is_that_of_the_content(config: DataConfig, make_tokenizer: Make, made: list[Path]) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
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
    assert len(made) == 5


@pytest.mark.parametrize(
    "options",
    [
        {"max_documents": 2},
        {"max_document_characters": 4},
        {"beginning_of_document": False, "skip_short_documents": True},
        {"id_field": "text"},
    ],
)
def test_other_options_are_made_anew(
    config: DataConfig, make_tokenizer: Make, made: list[Path], options: dict[str, Any]
) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")
    before = tokenize_documents(config, "train", tokenizer).fingerprint
    for option, value in options.items():
        setattr(config, option, value)
    assert tokenize_documents(config, "train", tokenizer).fingerprint != before
    assert len(made) == 2


def test_another_tokenizer_makes_them_anew(config: DataConfig, make_tokenizer: Make, made: list[Path]) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    others = (make_tokenizer(), make_tokenizer(**special), make_tokenizer(["the"], **special))
    config.skip_short_documents = True
    config.beginning_of_document = False
    for tokenizer in others:
        tokenize_documents(config, "train", tokenizer)
    assert len({folder.name for folder in made}) == 3


def test_a_failure_leaves_nothing_behind(
    config: DataConfig, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")

    def full(_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "_summarize", full)
        with pytest.raises(DataError, match=r"data\.cache_dir=.*no space left"):
            tokenize_documents(config, "train", tokenizer)
    assert os.listdir(config.cache_folder) == []
    assert len(tokenize_documents(config, "train", tokenizer)) == 3


def test_half_made_documents_of_a_killed_process_are_not_used(
    config: DataConfig, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(eos_token="</s>")

    class Kept(tokenization.tempfile.TemporaryDirectory):
        """What is left when there is no time to clean up."""

        def __exit__(self, *_: Any) -> None:
            self._finalizer.detach()

    def killed(_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenization.tempfile, "TemporaryDirectory", Kept)
        patch.setattr(tokenization, "_summarize", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize_documents(config, "train", tokenizer)
    (left,) = config.cache_folder.iterdir()
    assert (left / "whole" / "state.json").exists()
    assert whole(tokenize_documents(config, "train", tokenizer)).keys() == TEXTS.keys()
    assert len(os.listdir(config.cache_folder)) == 2


def test_two_processes_that_race(
    config: DataConfig, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch, made: list[Path]
) -> None:
    """The other one is done at the worst moment: when everything is ready to be put in place."""
    tokenizer = make_tokenizer(eos_token="</s>")
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
    assert os.listdir(config.cache_folder) == [made[0].name]


def test_a_place_that_cannot_be_taken_is_an_error(
    config: DataConfig, make_tokenizer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match=r"data\.cache_dir=.*not here"):
        tokenize_documents(config, "train", make_tokenizer(eos_token="</s>"))


def test_the_main_process_goes_first(config: DataConfig, make_tokenizer: Make, made: list[Path]) -> None:
    order: list[int] = []

    @contextmanager
    def turn() -> Iterator[None]:
        order.append(len(made))
        yield
        order.append(len(made))

    tokenize_documents(config, "train", make_tokenizer(eos_token="</s>"), turn())
    assert order == [0, 1]


def test_errors_of_reading_come_through(config: DataConfig, make_tokenizer: Make) -> None:
    Path(config.train).write_text('{"text": "x"}\n{"text": "y')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: not JSON"):
        tokenize_documents(config, "train", make_tokenizer(eos_token="</s>"))
    assert os.listdir(config.cache_folder) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("INFFORMER_CACHE", str(tmp_path / "variable"))
    assert DataConfig(cache_dir="~/option").cache_folder == tmp_path / "option"
    assert DataConfig().cache_folder == tmp_path / "variable"
    monkeypatch.delenv("INFFORMER_CACHE")
    assert DataConfig().cache_folder == tmp_path / ".cache" / "infformer"


def test_from_the_sample_to_segments(make_tokenizer: Make, tmp_path: Path) -> None:
    config = DataConfig(max_document_characters=5000, cache_dir=str(tmp_path))
    tokenizer = make_tokenizer(eos_token="</s>")
    documents = tokenize_documents(config, "test", tokenizer)
    segment = next(Lanes(documents, 4, 64, 1, shuffle=False))
    assert [tokenizer.decode(row) for row in segment.shift_labels] == [
        tokenizer.decode(documents.tokens(document, 1, 65)) for document in range(4)
    ]
    assert segment.input_ids[:, 0].tolist() == [tokenizer.eos_token_id] * 4


def test_real_books_with_the_tokenizer_of_gpt2(shared: Path, tmp_path: Path) -> None:
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

    def test_is_what_the_cache_holds(self, config: DataConfig, make_tokenizer: Make, made: list[Path]) -> None:
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

    def test_no_token_before_the_first(self, make_tokenizer: Make) -> None:
        tokenizer = make_tokenizer(eos_token="</s>")
        documents = TokenizedDocuments.from_texts(self.DOCUMENTS[:1], tokenizer, None)
        assert tokenizer.decode(whole(documents)["a"]) == TEXTS["a"]

    def test_too_short(self, make_tokenizer: Make) -> None:
        tokenizer = make_tokenizer(eos_token="</s>")
        with pytest.raises(DataError, match="'b' has 1 token"):
            TokenizedDocuments.from_texts(self.DOCUMENTS, tokenizer, None)
        documents = TokenizedDocuments.from_texts(self.DOCUMENTS, tokenizer, None, skip_short=True)
        assert documents.ids == ["a", "c"]
        assert len(TokenizedDocuments.from_texts(self.DOCUMENTS[1:2], tokenizer, None, skip_short=True)) == 0
