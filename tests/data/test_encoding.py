import pickle

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infformer.data.sources import Document
from infformer.data.tokenization import Encoder, TokenizedDocuments, vocabulary_size
from infformer.errors import DataError


def wrap(model: object, pre_tokenizer: object = None, normalizer: object = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(alphabet: str) -> PreTrainedTokenizerFast:
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    return wrap(models.BPE(vocabulary, []), pre_tokenizers.ByteLevel(add_prefix_space=False))


WORDS = {"the": 0, "sea": 1}

REFUSED = {
    "a word": (
        wrap(models.WordLevel(WORDS), pre_tokenizers.WhitespaceSplit()),
        "the blue sea",
        r"document 'b': the tokenizer cannot encode 'blue' \(character 4\) \(WordLevel error: Missing",
    ),
    "an unknown token that is none": (
        wrap(models.WordLevel(WORDS, "<unk>"), pre_tokenizers.WhitespaceSplit()),
        "the blue sea",
        r"document 'b': the tokenizer cannot encode 'blue' \(character 4\)",
    ),
    "a piece of a word": (
        wrap(models.WordPiece(WORDS), pre_tokenizers.WhitespaceSplit()),
        "the seas",
        r"document 'b': the tokenizer cannot encode 'seas' \(character 4\)",
    ),
    "a character of a unigram model": (
        wrap(models.Unigram([("a", 0.0), ("b", -1.0)])),
        "abc",
        r"document 'b': the tokenizer cannot encode 'abc' \(character 0\)",
    ),
    "a character": (
        wrap(models.BPE({"a": 0, "b": 1}, [])),
        "abéb",
        r"document 'b': the tokenizer has no token for 'é' \(character 2\), and no unknown token; choose",
    ),
    "one of a character's two bytes": (
        byte_level("abÃ"),
        "abéb",
        r"document 'b': the tokenizer has no token for 'é' \(character 2\)",
    ),
    "bytes to fall back to": (
        wrap(models.BPE({"a": 0, "b": 1, "<0xC3>": 2}, [], byte_fallback=True)),
        "abéb",
        r"document 'b': the tokenizer has no token for 'é' \(character 2\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_tokenizer_has_no_token_for_is_named(case):
    tokenizer, text, message = REFUSED[case]
    good = "the sea" if "the" in text else "ab"
    with pytest.raises(DataError, match=message):
        Encoder(tokenizer)(["a", "b"], [good, text])
    with pytest.raises(DataError, match=message):
        TokenizedDocuments.from_texts([Document("a", good), Document("b", text)], tokenizer, 0)
    assert Encoder(tokenizer)(["a"], [good]) == [[0, 1]]


TAKEN = {
    "all its bytes": (byte_level("abÃ©"), "aéb", [0, 2, 3, 1]),
    "bytes to fall back to": (
        wrap(models.BPE({"a": 0, "b": 1, "<0xC3>": 2, "<0xA9>": 3}, [], byte_fallback=True)),
        "aéb",
        [0, 2, 3, 1],
    ),
    "an unknown token": (wrap(models.BPE({"a": 0, "b": 1, "?": 2}, [], unk_token="?")), "aéb", [0, 2, 1]),
    "a normaliser that takes it out": (
        wrap(models.BPE({"a": 0, "b": 1}, []), normalizer=normalizers.Replace("é", "")),
        "aéb",
        [0, 1],
    ),
    "a pre-tokeniser that takes it out": (
        wrap(models.BPE({"a": 0, "b": 1}, []), pre_tokenizers.WhitespaceSplit()),
        "a \t\n b",
        [0, 1],
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_a_tokenizer_has_tokens_for_or_leaves_out_on_purpose_is_taken(case):
    tokenizer, text, tokens = TAKEN[case]
    encoder = Encoder(tokenizer)
    assert encoder(["x"], [text]) == [tokens]
    assert pickle.loads(pickle.dumps(encoder))(["x"], [text]) == [tokens]  # as other processes get it


def test_an_added_token_is_a_token_for_its_characters():
    tokenizer = wrap(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.add_tokens(["<é>"])
    assert Encoder(tokenizer)(["x"], ["a<é>b"]) == [[0, 2, 1]]
    with pytest.raises(DataError, match=r"document 'x': the tokenizer has no token for 'é' \(character 4\)"):
        Encoder(tokenizer)(["x"], ["a<é>é"])  # and outside of it they have none


def test_the_size_of_a_vocabulary_with_holes_is_that_of_its_largest_number(monkeypatch):
    tokenizer = wrap(models.WordLevel({"a": 0, "b": 70_000}, "a"), pre_tokenizers.WhitespaceSplit())
    assert len(tokenizer) == 2
    assert vocabulary_size(tokenizer) == 70_001
    documents = TokenizedDocuments.from_texts([Document("x", "a b")], tokenizer, None)
    assert documents.largest_token == 70_000
    # Only said to be so large: to count the tokens of one that is takes half a minute.
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: {"a": 0, "b": 2**31})
    with pytest.raises(DataError, match="has 2 tokens, and numbers up to 2147483648: give its tokens"):
        vocabulary_size(tokenizer)
