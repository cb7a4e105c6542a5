"""A kind of backbone that no file of the package knows of gets memories by one line."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.generation import continue_text
from infformer.models.pretrained import ATTENTION_PATHS, InfformerForCausalLM

SEGMENTS = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0)).split(6, dim=1)


@pytest.fixture
def model() -> Iterator[InfformerForCausalLM]:
    torch.manual_seed(0)
    with patch.dict(ATTENTION_PATHS):
        ATTENTION_PATHS["gpt_neox"] = ("gpt_neox.layers", "attention")

        sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
        stock = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=50, **sizes))
        memory = LongTermMemoryConfig(basis_functions=8, past_samples=16)
        model = InfformerForCausalLM.from_backbone(stock, memory, segment_length=6)
        yield model.eval()


def last_logits(model: InfformerForCausalLM) -> torch.Tensor:
    """Of a document's last segment, read after all others."""
    state = None
    for segment in SEGMENTS:
        output = model(segment, state=state)
        state = output.state
    return output.logits


@torch.no_grad()
def test_a_new_memory_beside_another_backbone_changes_no_bit_and_a_trained_one_is_read(model):
    stock = model.backbone(SEGMENTS[-1]).logits
    assert torch.equal(last_logits(model), stock)
    for parameter in model.memory_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert (last_logits(model) - stock).abs().max() > 1e-2


def test_the_memory_beside_another_backbone_learns_in_every_layer(model):
    first = model(SEGMENTS[0])
    model(SEGMENTS[1], labels=SEGMENTS[1], state=first.state).loss.backward()
    assert all(layer.output.weight.grad.abs().max() > 0 for layer in model.memories)


@torch.no_grad()
def test_another_backbone_is_saved_with_its_memory_and_generates(model, tmp_path, assert_same_model):
    model.save_pretrained(tmp_path)
    assert_same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path), SEGMENTS)
    assert len(continue_text(model, SEGMENTS[0][0], 9, 6)) == 9
