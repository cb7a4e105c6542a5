"""What scripts/expand.py writes: a larger model that says the same, is measured, writes and is trained on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.loading import load_trained, new_decoder

Expand = Callable[..., str]


@pytest.fixture
def expand(run_script) -> Expand:
    """What the script prints, or the sentence in which it ends."""
    return partial(run_script, "expand")


@pytest.fixture(scope="module")
def small(tokenizer, tmp_path_factory) -> Path:
    """A decoder with a long-term memory, and its tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8}
    kinds = {"positions": "rotary", "normalization": "rms", "normalization_placement": "pre"}
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    memory = LongTermMemoryConfig(0, basis_functions=8, past_samples=16)
    new_decoder({**sizes, **kinds, **tokens, "initializer_range": 0.3}, memory, segment_length=16).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Of three segments, one after the other."""
    model, state, seen = load_trained(str(folder)).eval(), None, []
    for segment in torch.arange(96).view(3, 2, 16):
        output = model(segment, state=state)
        state, seen = output.state, [*seen, output.logits]
    return torch.cat(seen)


def test_a_folder_says_what_the_smaller_one_says_and_writes_on(expand, small, tmp_path):
    sizes = ["--hidden", 12, "--layers", 2, "--heads", 3, "--head-size", 5, "--key-size", 8, "--feed-forward", 9]
    assert expand(small, tmp_path / "large", *sizes).startswith(f"written to {tmp_path / 'large'}: ")
    assert torch.allclose(logits(small), logits(tmp_path / "large"), atol=1e-5)
    model = load_trained(str(tmp_path / "large"))
    assert model.config.num_hidden_layers == 2
    tokens = torch.arange(20)[None]
    written = [load_trained(str(folder)).generate(tokens, max_new_tokens=8) for folder in (small, tmp_path / "large")]
    assert torch.equal(*written)


def test_a_run_trains_a_larger_decoder_on(expand, small, tmp_path, configure, train):
    expand(small, tmp_path / "large", "--layers", 2)
    changes = {"model.pretrained": str(tmp_path / "large"), "model.memory": None, "training.max_steps": 2}
    results = train(configure(tmp_path / "run", changes))
    assert load_trained(str(tmp_path / "run")).config.num_hidden_layers == 2
    assert results


def test_a_memory_beside_a_decoder_is_refused(expand, small, tmp_path, configure, train):
    with pytest.raises(Exception, match=r"is a decoder from scratch, which brings its own memories and takes nothing"):
        train(configure(tmp_path / "run", {"model.pretrained": str(small)}))


def test_what_cannot_be_written_says_why(expand, small, model_folder, tmp_path):
    assert "nothing is to grow: give one of --feed-forward, --heads" in expand(small, tmp_path / "large")
    assert "hidden_size=4: the model has 8" in expand(small, tmp_path / "large", "--hidden", 4)
    assert "a 'gpt2' does not grow" in expand(model_folder, tmp_path / "large", "--hidden", 64)
    assert not (tmp_path / "large").exists()
    assert f"FOLDER={small} is not empty" in expand(small, small, "--hidden", 64)
