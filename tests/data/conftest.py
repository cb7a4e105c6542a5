import os

# Before the libraries are imported: nothing here may reach for the network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infformer.data.tokenization import TokenizedDocuments


@pytest.fixture(autouse=True)
def caches_of_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setenv("INFFORMER_CACHE", str(tmp_path_factory.mktemp("tokens")))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text that may lie beside the checkout."""
    folder = Path(__file__).parents[2] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real text in {folder}, which is not part of the project")
    return folder


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A tokenizer with a token for each byte, or for each of some words; `<unk>` is 0, the special tokens follow it."""

    def make(words: Sequence[str] = (), **special: str) -> PreTrainedTokenizerFast:
        first = ["<unk>", *special.values()]
        if words:
            tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*first, *words])}, "<unk>"))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        else:
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())
            tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*first, *letters])}, []))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


@pytest.fixture
def documents_of() -> Callable[..., TokenizedDocuments]:
    """Documents of given lengths, in two chunks; token `t` of document `d` is 1000 (d + 1) + t."""

    def make(*lengths: int, fingerprint: str = "print") -> TokenizedDocuments:
        texts = [1000 * (document + 1) + np.arange(length) for document, length in enumerate(lengths)]
        half = len(lengths) // 2
        parts = [part for part in (texts[:half], texts[half:]) if part]
        return TokenizedDocuments(
            ids=[f"document {number}" for number in range(len(lengths))],
            token_counts=np.array(lengths),
            word_counts=np.array(lengths),
            byte_counts=np.array(lengths),
            fingerprint=fingerprint,
            largest_token=int(max(text.max() for text in texts)),
            _chunks=[np.concatenate(part).astype(np.int32) for part in parts],
            _chunk_of=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
            _start_in_chunk=np.concatenate([np.cumsum([0, *map(len, part[:-1])]) for part in parts]),
        )

    return make
