"""Tokenizers are loaded from folders as people have them."""

import json
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Tokenizer

from infformer.errors import ModelError
from infformer.models.loading import load_tokenizer


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of the two files in which GPT-2's tokens are handed round, and of nothing else."""
    tokens = [*sorted(ByteLevel.alphabet()), "wh", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nw h\n")
    return tmp_path


def test_a_folder_of_vocab_and_merges_is_a_tokenizer_of_gpt2(bare):
    tokenizer = load_tokenizer(str(bare))
    assert isinstance(tokenizer, GPT2Tokenizer)
    assert len(tokenizer) == 258
    assert tokenizer.convert_ids_to_tokens(tokenizer("a whale").input_ids) == ["a", "Ġ", "wh", "a", "l", "e"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 257


def test_a_folder_that_says_what_its_tokenizer_is_is_believed(bare, tokenizer):
    tokenizer.save_pretrained(bare)
    assert load_tokenizer(str(bare)).bos_token == "<s>"


def test_half_of_a_tokenizer_is_refused(bare):
    (bare / "merges.txt").unlink()
    with pytest.raises(ModelError, match=r"model\.tokenizer="):
        load_tokenizer(str(bare))
