"""A cache in some layers: what each of them sees, and how many floats that is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from infformer.errors import ModelError
from infformer.memory.cache import CacheConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.options import MemoryConfig, check_layers
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.streaming import TextSegment, stream

SEGMENT, DEPTH = 5, 3
TEXT = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))


def stock(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH}
    config = LlamaConfig(
        vocab_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attn_implementation=attention,
        **sizes,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def beside(
    memory: MemoryConfig, layers: list[int] | str | None = None, attention: str = "sdpa"
) -> InfformerForCausalLM:
    return InfformerForCausalLM.from_backbone(stock(attention), memory, layers, SEGMENT).eval()


@torch.no_grad()
def read(model: Any) -> Tensor:
    outputs = stream(model, map(TextSegment, TEXT.split(SEGMENT, dim=1)))
    return torch.cat([output.logits for _, output in outputs], dim=1)


def floats(model: Any) -> int:
    tensors = model.initial_state(1).named_tensors().values()
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("layers", "short_term", "attention"),
    [
        ([1], 0, "sdpa"),
        ([1], 3, "eager"),
        ([0, 2], 3, "sdpa"),
        ([0, 2], 0, "eager"),
        ([2], 0, "sdpa"),
        ([2], 3, "sdpa"),
    ],
)
def test_each_layer_sees_the_tokens_that_it_keeps(short_term, layers, attention):
    """As the stock model that reads all at once, each of whose layers is told by a mask what it sees."""
    memory = CacheConfig(short_term, length=7, sink_tokens=0)
    model, whole = beside(memory, layers, attention), stock(attention)
    places = torch.arange(TEXT.shape[1])
    begins = places // SEGMENT * SEGMENT
    for number, layer in enumerate(whole.model.layers):
        seen = short_term + (7 if number in layers else 0)
        allowed = (places <= places[:, None]) & (places >= (begins - seen)[:, None])
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]

        def see(module: nn.Module, args: Any, kwargs: dict[str, Any], mask: Tensor = mask) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        layer.self_attn.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        expected = whole(TEXT, use_cache=False).logits
    torch.testing.assert_close(read(model), expected, rtol=1e-4, atol=1e-5)


def test_a_cache_in_all_layers_is_a_short_term_memory():
    expected = read(beside(MemoryConfig(12)))
    assert torch.equal(read(beside(CacheConfig(length=12))), expected)
    assert torch.equal(read(beside(CacheConfig(4, length=8))), expected)


def test_a_segment_in_pieces_is_read_and_written_as_the_whole_one():
    model = beside(CacheConfig(3, length=7, sink_tokens=2), [1])
    with torch.no_grad():
        state, *segments = None, *TEXT.split(SEGMENT, dim=1)
        for segment in segments[:4]:
            state = model(segment, state=state).state
        whole, cache, logits = model(segments[4], state=state), None, []
        for piece in segments[4].split([1, 3, 1], dim=1):
            output = model(piece, state=state, segment_cache=cache, use_cache=True)
            cache = output.segment_cache
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, rtol=1e-4, atol=1e-5)
    for name, tensor in whole.state.named_tensors().items():
        torch.testing.assert_close(output.state.named_tensors()[name], tensor, rtol=1e-4, atol=1e-5)


def test_recomputed_layers_see_what_they_saw():
    model = beside(CacheConfig(length=7), [1]).train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        state = model(TEXT[:, :SEGMENT]).state.detach()
        model(TEXT[:, SEGMENT : 2 * SEGMENT], labels=TEXT[:, SEGMENT : 2 * SEGMENT], state=state).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.checkpoint_activations()
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.parametrize(("layers", "short_term"), [(None, 3), ([1], 0), ([0, 2], 3)])
def test_it_holds_as_many_floats_as_another_memory(layers, short_term):
    """Or fewer than one more token would take."""
    other = beside(FastWeightMemoryConfig(), layers)
    wanted = 7 * floats(other)
    cache = beside(CacheConfig(short_term, match_floats=wanted), layers)
    one_token = 2 * 2 * 4 * len(layers or range(DEPTH))
    assert wanted - one_token < floats(cache) <= wanted
    assert cache.config.memory["match_floats"] is None
    assert cache.config.memory_config.length == cache.config.memory["length"]


def test_a_decoder_has_it_in_all_layers_by_its_floats():
    sizes = {"vocab_size": 40, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 2}
    memory = CacheConfig(match_floats=1000)
    model = DecoderForCausalLM(DecoderConfig(**sizes, memory=memory, segment_length=SEGMENT))
    assert model.config.memory_config.length == 1000 // 24
    assert floats(model) == 1000 // 24 * 24


def test_layers_in_the_middle_are_chosen_by_their_number():
    assert beside(CacheConfig(length=7), "middle:1").config.memory_layers == [1]
    assert beside(CacheConfig(length=7), "middle:2").config.memory_layers == [0, 1]
    assert list(beside(CacheConfig(length=7), "middle:3").layer_memories()) == [0, 1, 2]
    with pytest.raises(ModelError, match=r"model\.memory_layers=middle:4: this backbone has 3 layers"):
        beside(CacheConfig(length=7), "middle:4")


@pytest.mark.parametrize("said", ["middle:0", "middle", "last:2", "middle:x", [1.5], 3])
def test_what_says_no_layers_is_refused(said):
    with pytest.raises(ValueError, match=r"^model\.memory_layers=.* such as middle:6"):
        check_layers(said)


def test_too_few_floats_are_refused():
    with pytest.raises(ModelError, match=r"model\.memory\.match_floats=10: one token .* give at least as many"):
        beside(CacheConfig(match_floats=10))


@pytest.mark.parametrize("name", ["length", "match_floats"])
def test_an_error_names_the_option(name):
    with pytest.raises(ValueError, match=rf"^model\.memory\.{name}=0: must be at least 1"):
        CacheConfig(**{name: 0})


def test_more_tokens_than_there_are_positions_are_refused():
    with pytest.raises(ModelError, match=r"model\.memory\.length=60: .*the 64 positions .*set it to 53 at most"):
        beside(CacheConfig(2, length=60), [1])


def test_layers_that_share_distances_see_equally_many_tokens():
    bloom = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=12, n_layer=2, n_head=3)).eval()
    with pytest.raises(ModelError, match=r"model\.memory_layers=\[1\]: .* set it to null"):
        InfformerForCausalLM.from_backbone(copy.deepcopy(bloom), CacheConfig(length=7), [1], SEGMENT)
    InfformerForCausalLM.from_backbone(bloom, CacheConfig(length=7), None, SEGMENT)
