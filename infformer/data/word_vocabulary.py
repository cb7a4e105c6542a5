"""The words of the training documents as a vocabulary, the most frequent first."""

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from infformer.data.cache import find_or_make, key_of
from infformer.data.options import DataConfig
from infformer.data.sources import describe_source, read_documents
from infformer.errors import DataError
from infformer.progress import follow

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"

_WORDS = "words.txt"
_LINE_END = f" {END_OF_LINE} "  # what "\n" becomes before words are cut
_WHITE_SPACE = r"[\s\x1c-\x1f]+"  # what `str.split` takes for it
_LAYOUT = 2  # of a cached vocabulary; raised when an older one can no longer be read


def word_tokenizer(
    config: DataConfig, main_process_first: AbstractContextManager[None] | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of the training documents, numbered by descending frequency.

    Words are what white space separates. Each line end is the token `<eos>`, so that a blank line is one too; it also
    begins documents. A word that no training document has is `<unk>`, which WikiText has as a word already. This is
    Transformer-XL's vocabulary (Dai et al., arXiv 1901.02860): 267,735 words of WikiText-103. Words of equal frequency
    keep the order of their first appearance.

    The words are counted once and kept in the cache, with the same promises as those of `tokenize_documents`.

    Args:
        config: where the training documents are.
        main_process_first: held during the work, such as `accelerator.main_process_first()`, so that one process does
            it and the others find it done.

    Raises:
        DataError: the documents cannot be read, or there is no word in them.
    """
    with main_process_first or nullcontext():
        folder = config.cache_folder / f"words-{_key(config)}"
        find_or_make(folder, lambda place: _make(place, config))
        return _tokenizer((folder / _WORDS).read_text(encoding="utf-8").split("\n"))


def _key(config: DataConfig) -> str:
    parts = {
        "layout": _LAYOUT,
        "source": describe_source(config, "train"),
        "options": {option: getattr(config, option) for option in ("text_field", "articles", "max_documents")},
        "most_characters": config.most_characters("train"),
    }
    return key_of(parts)


def _make(place: Path, config: DataConfig) -> Path:
    """Count the words; returns the folder in `place` in which they are, one a line."""
    folder = place / "whole"
    folder.mkdir()
    (folder / _WORDS).write_text("\n".join(_words_by_frequency(config)), encoding="utf-8")
    return folder


def _words_by_frequency(config: DataConfig) -> list[str]:
    counts: Counter[str] = Counter()
    for document in follow(read_documents(config, "train"), "counting the words of train", "documents"):
        counts.update(document.text.replace("\n", _LINE_END).split())
    if counts.keys() <= {END_OF_LINE}:
        raise DataError(
            f"data.train={', '.join(config.places('train'))}: there is no word in it, of which a vocabulary could be "
            "made; name documents with text."
        )
    for token in (END_OF_LINE, UNKNOWN):
        counts.setdefault(token, 0)  # behind all others, where the text does not have it
    return [word for word, _ in counts.most_common()]


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, UNKNOWN))
    tokenizer.normalizer = Replace("\n", _LINE_END)
    tokenizer.pre_tokenizer = Split(Regex(_WHITE_SPACE), "removed")
    # It has no decoder: words are joined by blanks. Special tokens in the text are words like any other: `<unk>s` is
    # one word, not two tokens.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_LINE,
        eos_token=END_OF_LINE,
        unk_token=UNKNOWN,
        split_special_tokens=True,
    )
