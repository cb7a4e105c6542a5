import json
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from infformer.data import word_vocabulary
from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.data.word_vocabulary import word_tokenizer
from infformer.errors import DataError

TEXTS = {"a": "the whale , the sea\n\n the\tship of the sea\n", "b": " of whales \xa0the <unk> ,\n"}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write(tmp_path / "a.jsonl", TEXTS)
    return DataConfig(source="files", train=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))


def write(path: Path, texts: dict[str, str]) -> None:
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items()))


def words_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """In the order of their numbers."""
    return tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def read(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    """The tokens of a text, with a blank between two."""
    return " ".join(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def all_tokens(documents: TokenizedDocuments) -> list[list[int]]:
    return [documents.tokens(number, 0, int(count)).tolist() for number, count in enumerate(documents.token_counts)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The vocabularies that were made, not found."""
    paths: list[Path] = []
    find_or_make = word_vocabulary.find_or_make

    def count(folder: Path, make: Callable[[Path], Path]) -> None:
        def counted(place: Path) -> Path:
            paths.append(folder)
            return make(place)

        find_or_make(folder, counted)

    monkeypatch.setattr(word_vocabulary, "find_or_make", count)
    return paths


def kept(config: DataConfig) -> list[str]:
    """What is in the cache, without its lock."""
    return sorted(set(os.listdir(config.cache_folder)) - {".lock"})


def test_frequent_words_come_first_and_ties_by_first_appearance(config):
    tokenizer = word_tokenizer(config)
    #                               5      3        2    2      2      1        1       1         1
    assert words_of(tokenizer) == ["the", "<eos>", ",", "sea", "of", "whale", "ship", "whales", "<unk>"]
    assert len(tokenizer) == tokenizer.vocab_size == 9
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<eos>", "<eos>", "<unk>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 1, 8)


def test_many_words_are_ranked_as_by_a_literal_count(config):
    seeded = random.Random(0)
    texts = {
        str(number): " ".join(f"w{int(seeded.expovariate(0.02))}" + "\n" * (seeded.random() < 0.1) for _ in range(300))
        for number in range(5)
    }
    write(Path(config.train), texts)
    sequence = " ".join(texts.values()).replace("\n", " <eos> ").split()
    ranked = sorted(set(sequence), key=lambda word: (-sequence.count(word), sequence.index(word)))
    tokenizer = word_tokenizer(config)
    assert words_of(tokenizer) == [*ranked, "<unk>"]
    tokens = tokenizer(list(texts.values()))["input_ids"]
    assert [ranked[token] for document in tokens for token in document] == sequence


def test_a_text_becomes_its_words_and_line_ends(config):
    tokenizer = word_tokenizer(config)
    assert read(tokenizer, "\n the whale\n\n ship \r\nof the") == "<eos> the whale <eos> <eos> ship <eos> of the"
    assert read(tokenizer, "The <unk> of a whale's sea") == "<unk> <unk> of <unk> <unk> sea"
    assert read(tokenizer, "the <eos> of") == "the <eos> of"
    assert read(tokenizer, " \t ") == read(tokenizer, "") == ""
    assert tokenizer.decode(tokenizer("\n the \n\n ship sank")["input_ids"]) == "<eos> the <eos> <eos> ship <unk>"


def test_words_that_hold_a_special_token_are_words(config):
    write(Path(config.train), {"a": "<unk>s <unk> the-<unk> <eos>x <unk>s\n"})
    tokenizer = word_tokenizer(config)
    assert words_of(tokenizer) == ["<unk>s", "<unk>", "the-<unk>", "<eos>x", "<eos>"]
    for same in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):  # as other processes get it
        assert same("<unk>s <unk> the-<unk> <eos>x <unk>x\n")["input_ids"] == [0, 1, 2, 3, 1, 4]


def test_white_space_is_that_of_python(config):
    characters = [chr(code) for code in range(0x3100) if chr(code) != "\n"]
    text = "x".join(characters)
    write(Path(config.train), {"a": text})
    tokenizer = word_tokenizer(config)
    assert set(words_of(tokenizer)) == {*text.split(), "<eos>", "<unk>"}
    assert read(tokenizer, text) == " ".join(text.split())


def test_tokens_that_the_text_lacks_come_last(config):
    write(Path(config.train), {"a": "b a a"})
    assert words_of(word_tokenizer(config)) == ["a", "b", "<eos>", "<unk>"]


def test_a_loaded_tokenizer_is_the_saved_one(config, tmp_path):
    write(Path(config.train), TEXTS | {"c": "<unk>s the"})
    tokenizer = word_tokenizer(config)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "the <unk>s <unk>\n\n of the moon <eos>x , sea\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len(loaded) == len(tokenizer)
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    )
    # What was tokenised with the one is found with the other.
    tokenize_documents(config, "train", tokenizer)
    before = kept(config)
    tokenize_documents(config, "train", loaded)
    assert kept(config) == before


def test_documents_become_words_and_line_ends(config):
    tokenizer = word_tokenizer(config)
    documents = tokenize_documents(config, "train", tokenizer)
    assert [tokenizer.decode(tokens) for tokens in all_tokens(documents)] == [
        "<eos> the whale , the sea <eos> <eos> the ship of the sea <eos>",
        "<eos> of whales the <unk> , <eos>",
    ]
    assert documents.word_counts.tolist() == [10, 5]
    assert documents._chunks[0].dtype == np.uint16
    config.beginning_of_document = False
    assert tokenize_documents(config, "train", tokenizer).token_counts.tolist() == [13, 6]


def test_what_was_made_is_found(config, made):
    first = word_tokenizer(config)
    config.workers, config.shuffle, config.segments_per_visit, config.test = 2, False, 3, "elsewhere"
    config.max_held_out_characters, config.skip_short_documents, config.beginning_of_document = 5, True, False
    assert words_of(word_tokenizer(config)) == words_of(first)
    assert len(made) == 1
    assert kept(config) == [made[0].name]  # and nothing is left of the work


@pytest.mark.parametrize(
    "options", [{"max_documents": 1}, {"max_document_characters": 9}, {"text_field": "id"}, {"articles": True}]
)
def test_other_options_are_made_anew(config, made, options):
    write(Path(config.train), {"a": " \n = Title = \n \n the whale \n", "b": " the sea \n"})
    before = word_tokenizer(config)
    for option, value in options.items():
        setattr(config, option, value)
    after = word_tokenizer(config)
    assert len(set(made)) == 2
    if "articles" not in options:  # which cuts the same words
        assert words_of(after) != words_of(before)


def test_another_text_is_made_anew(config, made):
    word_tokenizer(config)
    path = Path(config.train)
    stamp = path.stat()
    write(path, TEXTS | {"b": TEXTS["b"].replace("whales", "whelks")})  # of the same length
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert "whelks" in words_of(word_tokenizer(config))
    assert len(set(made)) == 2


def test_a_damaged_vocabulary_is_made_anew_with_a_warning(config, made, caplog):
    words = words_of(word_tokenizer(config))
    path = made[0] / "words.txt"
    path.write_bytes(path.read_bytes()[:-9])
    assert words_of(word_tokenizer(config)) == words
    assert f"{made[0]} in the cache is damaged (words.txt is" in caplog.text
    assert len(made) == 2


def test_a_cache_that_cannot_be_used_is_said_in_a_sentence(config):
    config.cache_dir = config.train
    with pytest.raises(DataError, match=r"data\.cache_dir=.*a.jsonl: the tokens cannot be kept there"):
        word_tokenizer(config)


def test_the_main_process_goes_first(config, made):
    order: list[int] = []

    @contextmanager
    def turn() -> Iterator[None]:
        order.append(len(made))
        yield
        order.append(len(made))

    word_tokenizer(config, turn())
    assert order == [0, 1]


@pytest.mark.parametrize("texts", [{"a": ""}, {"a": "\n \n", "b": " "}])
def test_a_text_without_words_is_refused(config, texts):
    write(Path(config.train), texts)
    with pytest.raises(DataError, match=r"data\.train=.*a\.jsonl: there is no word in it"):
        word_tokenizer(config)
    assert kept(config) == []


def test_a_vocabulary_needs_training_documents(config):
    config.train = None
    with pytest.raises(DataError, match=r"data\.train=null: this run needs train documents"):
        word_tokenizer(config)


def wikitext(shared: Path, *train: str, **held_out: str) -> DataConfig:
    folder = shared / "wikitext"
    places = {split: str(folder / name) for split, name in held_out.items()}
    return DataConfig(source="files", train=[str(folder / name) for name in train], articles=True, **places)


def test_the_official_vocabulary_of_wikitext_2(shared):
    """The copy has its articles in another order, so only the numbers of equally frequent words differ."""
    config = wikitext(
        shared,
        "wikitext-2/wiki.train.tokens.gz",
        "wikitext-2/wiki.train.fragments.tokens",
        test="wikitext-2/wiki.test.tokens",
    )
    tokenizer = word_tokenizer(config)
    assert len(tokenizer) == 33_278
    assert words_of(tokenizer)[:9] == ["the", ",", ".", "of", "<unk>", "and", "in", "to", "<eos>"]
    # Its held-out files have no other words: each <unk> is one of the text.
    documents = tokenize_documents(config, "test", tokenizer)
    unknown = sum(tokens.count(tokenizer.unk_token_id) for tokens in all_tokens(documents))
    assert unknown == Path(config.test).read_text().split().count("<unk>") == 15_218


def test_the_official_token_count_of_wikitext_103(shared):
    config = wikitext(shared, "wikitext-103/wiki.test.tokens", test="wikitext-103/wiki.test.tokens")
    documents = tokenize_documents(config, "test", word_tokenizer(config))
    assert len(documents) == 60
    assert documents.word_counts.sum() == 241_211
    assert documents.token_counts.sum() == 245_569 + 60
