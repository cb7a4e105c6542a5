"""Needles are hidden where they are to be, in text that is that of the documents, token for token."""

import re
import string
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infformer.data.options import DataConfig
from infformer.data.tokenization import TokenizedDocuments, tokenize_documents
from infformer.errors import DataError
from infformer.evaluation.streaming import ReadingProtocol
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.tasks.haystack import NeedleConfig, PasskeyConfig, ends_of_sentences
from infformer.tasks.retrieval import RetrievalConfig, RetrievalSource
from infformer.tasks.ruler import MultikeyConfig
from infformer.tasks.task import Material

SENTENCES = ("The whale rose.", "Who saw it?", "We did!", 'He said "No."', "The sea was white and deep all day.")


@pytest.fixture(scope="module")
def texts_of(tmp_path_factory, tokenizer) -> Callable[..., Mapping[str, TokenizedDocuments]]:
    """Documents of so many sentences, as tokens, as train and test documents."""

    def make(*counts: int) -> Mapping[str, TokenizedDocuments]:
        folder = tmp_path_factory.mktemp("texts")
        random = np.random.default_rng(0)
        for number, count in enumerate(counts):
            (folder / f"{number}.txt").write_text(" ".join(random.choice(SENTENCES, size=count)))
        data = DataConfig(source="files", train=str(folder / "*.txt"), cache_dir=str(folder / "cache"))
        documents = tokenize_documents(data, "train", tokenizer)
        return {"train": documents, "test": documents}

    return make


@pytest.fixture(scope="module")
def documents(texts_of) -> Mapping[str, TokenizedDocuments]:
    return texts_of(30, 25, 40)


def source_of(
    config: RetrievalConfig,
    documents: Mapping[str, TokenizedDocuments],
    tokenizer: PreTrainedTokenizerFast,
    beginning: bool = True,
) -> RetrievalSource:
    return config.build_source(Material(None, tokenizer, documents, DataConfig(beginning_of_document=beginning)))


@pytest.fixture(scope="module")
def passkey(documents, tokenizer) -> RetrievalSource:
    return source_of(PasskeyConfig(), documents, tokenizer)


@pytest.fixture(scope="module")
def book(documents, tokenizer) -> RetrievalSource:
    return source_of(NeedleConfig(), documents, tokenizer)


def written(
    source: RetrievalSource, tokenizer: PreTrainedTokenizerFast, length: int, *depths: list[float]
) -> list[str]:
    questions = source.draw("test", range(len(depths)), 5, length, np.array(depths))
    assert questions.tokens.shape == (len(depths), length)
    assert (questions.tokens[:, 0] == tokenizer.bos_token_id).all()
    return [tokenizer.decode(row[1:]) for row in questions.tokens]


HIDDEN_KEY = re.compile(
    r"(?s)^(.*)\nThe pass key is (\d{5})\. Remember it\. \2 is the pass key\.\n(.*)"
    r"\nWhat is the pass key\? The pass key is \2$"
)


@pytest.mark.parametrize("length", [150, 500, 3001])
@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
def test_a_passkey_is_at_its_depth(passkey, documents, tokenizer, length, depth):
    everything = " ".join([tokenizer.decode(documents["test"].tokens(n, 1, int(c))) for n, c in counts(documents)] * 5)
    for text in written(passkey, tokenizer, length, [depth], [depth], [depth]):
        before, _, after = HIDDEN_KEY.match(text).groups()
        assert abs(len(before) - depth * len(before + after)) <= 0.05 * len(before + after)
        whole = before + after
        assert all(part in everything for part in re.split(r"(?<=[.?!\"])(?=[A-Z])", whole))  # one book after another
        if length > 1000 and 0 < depth < 1:  # sentences are short enough
            assert before.rstrip()[-1] in '.?!"'


def counts(documents: Mapping[str, TokenizedDocuments]) -> list[tuple[int, int]]:
    return list(enumerate(documents["test"].token_counts))


def test_a_needle_is_in_one_book_and_its_end_is_asked_for(book, documents, tokenizer):
    books = [tokenizer.decode(documents["test"].tokens(n, 1, int(c))) for n, c in counts(documents)]
    for text in written(book, tokenizer, 500, [0.0], [0.25], [1.0]):
        needle = re.search(r"\n(The best thing to do in .* is to .*\.)\n", text).group(1)
        hidden, asked = f"\n{needle}\n", f"\n{needle}"
        assert text.endswith(asked)
        assert any(text.removesuffix(asked).replace(hidden, "", 1) in each for each in books)
    questions = book.draw("test", [0, 1], 5, 500, np.array([[0.5], [0.5]]))
    first = questions.tokens[0, -questions.asked[0].sum() :]
    assert tokenizer.decode(first).startswith(" to ")
    assert tokenizer.decode(questions.true_answers).count(" to ") == 2


def test_several_needles_are_asked_for_one_after_the_other(documents, tokenizer):
    source = source_of(NeedleConfig(needles=3), documents, tokenizer)
    questions = source.draw("test", range(4), 5, 900, np.tile([0.9, 0.0, 0.5], (4, 1)))
    for row, answers in zip(questions.tokens, questions.answers, strict=True):
        text = tokenizer.decode(row[1:])
        asked = re.findall(r"The best thing [^.]*\.", text)[-3:]
        assert len({needle.split(" is to ")[0] for needle in asked}) == 3
        places = [text.index(needle) for needle in asked]
        assert 1 == places[1] < places[2] < places[0]
        for which, needle in enumerate(asked):
            answer = row[len(row) - len(answers) :][answers == which]
            assert needle.endswith(tokenizer.decode(answer))
            assert tokenizer.decode(answer).startswith(" to ")


def test_other_depths_are_the_same_text_with_the_same_answer(passkey, tokenizer):
    parts = [HIDDEN_KEY.match(written(passkey, tokenizer, 600, [depth])[0]).groups() for depth in (0.0, 0.4, 1.0)]
    assert len({key for _, key, _ in parts}) == 1
    assert len({before + after for before, _, after in parts}) == 1


@pytest.mark.parametrize("kind", ["passkey", "book"])
def test_a_text_depends_on_its_number_alone(kind, request):
    source = request.getfixturevalue(kind)
    depths = np.linspace(0, 1, 6).reshape(6, 1)
    whole = source.draw("test", range(6), 5, 400, depths).tokens
    assert (source.draw("test", [4, 1], 5, 400, depths[[4, 1]]).tokens == whole[[4, 1]]).all()
    assert (source.draw("test", range(6), 6, 400, depths).tokens != whole).any(axis=1).all()
    assert (source.draw("train", range(6), 5, 400, depths).tokens != whole).any(axis=1).all()


def test_training_is_resumed_with_the_same_documents_only(texts_of, tokenizer):
    one, other = (source_of(PasskeyConfig(), texts_of(count), tokenizer).identity for count in (40, 50))
    assert one["task.digits"] == other["task.digits"] == 5
    assert one != other
    assert not source_of(PasskeyConfig(), {}, tokenizer).splits


def test_a_length_that_holds_less_than_the_needle_is_refused(passkey):
    with pytest.raises(
        DataError, match=r"a length of 60 .*: what is hidden and what is asked take (.*) tokens"
    ) as error:
        passkey.draw("test", [0], 5, 60, np.zeros((1, 1)))
    least = int(re.search(r"take (\d+) tokens", str(error.value)).group(1))
    assert passkey.draw("test", [0], 5, least, np.zeros((1, 1))).tokens.shape == (1, least)


def test_a_length_that_holds_the_first_needle_and_not_the_next_is_refused_before_any_work(documents, tokenizer):
    """Names differ in length."""
    source = source_of(MultikeyConfig(), documents, tokenizer)
    with pytest.raises(DataError) as error:
        source.draw("train", [0], 0, 60, np.zeros((1, 1)))
    least = int(re.search(r"take (\d+) tokens", str(error.value)).group(1))
    evaluator = SimpleNamespace(model=DecoderForCausalLM(DecoderConfig(vocab_size=5)), protocol=ReadingProtocol(8))
    material = Material(evaluator, tokenizer, documents)
    with pytest.raises(DataError, match=f"a length of {least}"):
        MultikeyConfig(training_lengths=[least]).build_stream(material)
    with pytest.raises(DataError, match=f"a length of {least}"):
        MultikeyConfig(lengths=[least]).build_evaluation(material)


def test_a_book_that_is_too_short_is_refused(book, passkey, documents):
    longest = int(documents["test"].token_counts.max()) - 1
    with pytest.raises(
        DataError, match=rf"a length of 5,000 .* the longest test document has {longest:,}; choose shorter lengths"
    ):
        book.draw("test", [0], 5, 5000, np.zeros((1, 1)))
    assert passkey.draw("test", [0], 5, 5000, np.zeros((1, 1))).tokens.shape == (1, 5000)


def test_a_tokenizer_that_knows_no_such_words_is_refused(documents):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "whale": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate(string.ascii_letters)}, []))
    for poor, said in (
        (PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>"), "cannot write .* unknown to it"),
        (PreTrainedTokenizerFast(tokenizer_object=letters), "has no token for"),
    ):
        with pytest.raises(DataError, match=f"the tokenizer {said}"):
            source_of(PasskeyConfig(), documents, poor, beginning=False).draw("test", [0], 5, 600, np.zeros((1, 1)))


def test_sentences_end_by_tokens_whose_numbers_have_holes_before_them():
    stops = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, ".": 5}, "a")))
    assert ends_of_sentences(stops).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        (PasskeyConfig, {"digits": 0}, "task.digits=0: must be from 1 to 18"),
        (NeedleConfig, {"needles": 0}, "task.needles=0: must be from 1 to 128"),
        (NeedleConfig, {"depths": [-0.1]}, r"task.depths=\[-0.1\]"),
    ],
)
def test_options_that_cannot_be_are_refused(config, options, says):
    with pytest.raises(ValueError, match=says):
        config(**options)
