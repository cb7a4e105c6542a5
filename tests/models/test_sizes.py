"""Sizes are those of the tensors that are there."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.loading import new_decoder, new_model
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.sizes import describe_sizes, flops_of_a_token, in_bytes, model_sizes

SIGNAL = LongTermMemoryConfig(basis_functions=8, past_samples=16)
DECODER = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip


def test_a_gpt2_with_memory_has_the_sizes_of_its_tensors(backbone):
    model = InfformerForCausalLM.from_backbone(copy.deepcopy(backbone), SIGNAL, segment_length=16)
    sizes = model_sizes(model)
    assert sizes["backbone_parameters"] == sum(parameter.numel() for parameter in backbone.parameters())
    assert sizes["memory_parameters"] == sum(parameter.numel() for parameter in model.memories.parameters())
    assert sizes["trained_parameters"] == sizes["backbone_parameters"] + sizes["memory_parameters"]
    assert sizes["weight_bytes"] == 4 * sizes["trained_parameters"] == sizes["optimizer_bytes"] / 2
    model.requires_grad_(False)
    for parameter in model.memory_parameters():
        parameter.requires_grad_(True)
    assert model_sizes(model)["trained_parameters"] == sizes["memory_parameters"]
    assert model_sizes(model)["optimizer_bytes"] == 8 * sizes["memory_parameters"]


@pytest.mark.parametrize(
    ("memory", "floats"),
    [
        (None, []),
        (LongTermMemoryConfig(basis_functions=8, past_samples=16, short_term_length=0), [8 * 16] * 2),
        (LongTermMemoryConfig(basis_functions=8, past_samples=16, short_term_length=16), [8 * 16 + 16 * 16] * 2),
        (MemoryConfig(16), [16 * 16] * 2),
        (CompressiveMemoryConfig(short_term_length=16, length=16, rate=4), [16 * 16 + 16 * 16] * 2),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_the_floats_of_a_memory_are_those_that_it_holds_of_one_row(memory, floats):
    model = new_decoder(DECODER, memory, segment_length=16)
    sizes = model_sizes(model)
    assert sizes["state_floats"] == floats
    assert sizes["state_bytes"] == model.initial_state(3).nbytes / 3
    lines = describe_sizes(sizes, lanes=5)
    assert len(lines) == (2 if floats else 1)
    if floats:
        assert f"holds {floats[0]:,} floats a row, all 2 together {sum(floats):,}" in lines[1]


def test_layers_with_other_memories_are_told_apart():
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16, short_term_length=16)
    sizes = model_sizes(new_model(LLAMA, memory, memory_layers=[1], segment_length=16))
    only_short_term, both = sizes["state_floats"]
    assert both > only_short_term
    assert f"holds {only_short_term:,} to {both:,} floats a row" in describe_sizes(sizes, lanes=1)[1]


def test_operations_are_those_of_the_parameters_that_a_token_is_multiplied_with():
    """Of a Llama without a tied head: all but its embeddings. Attention sees half a segment on average."""
    model = new_model(LLAMA, segment_length=15)
    multiplied = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    attention = 12 * 2 * 16 * 8
    assert flops_of_a_token(model, 15) == 6 * multiplied + attention
    model.requires_grad_(False)
    assert flops_of_a_token(model, 15) == 4 * multiplied + attention


@pytest.mark.parametrize("of", ["llama", "decoder"])
@torch.no_grad()
def test_operations_are_about_those_that_torch_counts(of):
    """Which counts the whole square of attention, and no norms. The decoder's head is its embeddings."""
    rotary = {**DECODER, "positions": "rotary"}
    model = new_model(LLAMA, segment_length=15) if of == "llama" else new_decoder(rotary, None, segment_length=15)
    with FlopCounterMode(display=False) as counted:
        model(torch.zeros(4, 15, dtype=torch.int64))
    assert flops_of_a_token(model, 15) / 3 == pytest.approx(counted.get_total_flops() / 60, rel=0.15)


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (1500, "1.5 kB"), (12.7e6, "12.7 MB"), (2e12, "2,000.0 GB")]
)
def test_bytes_are_said_in_a_short_number(count, said):
    assert in_bytes(count) == said
