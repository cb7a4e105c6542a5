"""The short-term memory of a pretrained model: keys and values of the last tokens, at places that never grow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT, SHORT_TERM = 6, 12
TEXT = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(0))
SEGMENTS = TEXT.split(SEGMENT, dim=1)
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def stock(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **{"num_hidden_layers": 2, **options},
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def new_model(memory: MemoryConfig, layers: list[int] | None = None, **options: Any) -> InfformerForCausalLM:
    model = InfformerForCausalLM.from_backbone(stock(**options), memory, layers, SEGMENT).eval()
    for parameter in model.memory_parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def long_term(short_term_length: int) -> LongTermMemoryConfig:
    return LongTermMemoryConfig(short_term_length, basis_functions=8, past_samples=16, read="moments")


def read(model: InfformerForCausalLM, segments: tuple[Tensor, ...] = SEGMENTS) -> tuple[list[Tensor], list[ModelState]]:
    """Logits of each segment and the state after it."""
    state, logits, states = None, [], []
    for segment in segments:
        output = model(segment, state=state)
        state = output.state
        logits.append(output.logits)
        states.append(state)
    return logits, states


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rotary_positions_are_moved_back_as_they_were_scaled(kind):
    model = new_model(MemoryConfig(18), rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **SCALED[kind]})
    logits, _ = read(model, SEGMENTS[:4])
    whole = model.backbone(TEXT[:, :24]).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_a_layer_sees_the_first_tokens_and_the_last_ones_however_long_ago_the_document_began(sinks):
    """With one layer, what is seen are keys and values of the tokens themselves: those of a stock model's text."""
    model = new_model(MemoryConfig(SHORT_TERM, sink_tokens=sinks), num_hidden_layers=1)
    logits, states = read(model)
    seen = torch.cat([TEXT[:, :sinks], TEXT[:, -SHORT_TERM - SEGMENT :]], dim=1)
    torch.testing.assert_close(logits[-1], model.backbone(seen).logits[:, -SEGMENT:], rtol=1e-4, atol=1e-5)
    assert [state.layers[0].short_term.filled.tolist() for state in states] == [[6, 6], *[[12, 12]] * 4]
    elsewhere = torch.cat([TEXT[:, :sinks], TEXT[:, -SEGMENT:], TEXT[:, SEGMENT + sinks :]], dim=1)  # what has left
    assert torch.equal(read(model, elsewhere.split(SEGMENT, dim=1))[0][-1], logits[-1])


@torch.no_grad()
def test_a_new_document_in_a_row_has_first_tokens_of_its_own():
    model = new_model(MemoryConfig(SHORT_TERM))
    state = read(model)[1][-1]
    begun = model(SEGMENTS[2], state=state, reset=torch.tensor([True, False])).state.layers[0]
    new = model(SEGMENTS[2]).state.layers[0]
    assert torch.equal(begun.sinks[0], new.sinks[0])
    assert torch.equal(begun.sinks[1], state.layers[0].sinks[1])
    assert begun.written.tolist() == [6, 36]


def test_more_first_tokens_than_a_segment_has_are_refused():
    with pytest.raises(ModelError, match=r"sink_tokens=7: they are of a document's first segment, .*=6 tokens; take 4"):
        new_model(MemoryConfig(SHORT_TERM, sink_tokens=7))


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, [1]])
def test_the_long_term_memory_is_written_with_what_leaves_the_short_term_memory(layers):
    model = new_model(long_term(SHORT_TERM), layers)
    hidden: list[Tensor] = []
    states, state = [], None
    for segment in SEGMENTS:
        output = model(segment, state=state, return_intermediates=True)
        state = output.state
        states.append(state)
        hidden.append(output.intermediates[1].hidden)
    memory, expected = model.layer_memories()[1].behind, None
    own = memory.initial_state(2)
    for written in range(3):
        context = SegmentContext(torch.ones(2, dtype=torch.bool))
        own = memory(hidden[written], own, context, memory.prepare(own, context)).state
        expected = states[written + 2].layers[1].behind
        for name, tensor in own.named_tensors().items():
            torch.testing.assert_close(tensor, expected.named_tensors()[name], rtol=1e-4, atol=1e-5)
    assert (model.layer_memories()[0].behind is None) == (layers is not None)


@pytest.mark.parametrize("memory", [MemoryConfig(SHORT_TERM), long_term(SHORT_TERM)], ids=["alone", "before another"])
def test_recomputed_layers_see_the_short_term_memory_as_they_did_the_first_time(memory):
    def learn(model: InfformerForCausalLM) -> dict[str, Tensor]:
        state, loss = None, torch.zeros(())
        for segment in SEGMENTS:
            output = model(segment, state=state, labels=segment)
            state, loss = output.state, loss + output.loss
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    kept, recomputed = new_model(memory).train(), new_model(memory).train()
    recomputed.checkpoint_activations()
    expected, found = learn(kept), learn(recomputed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@torch.no_grad()
@pytest.mark.parametrize("memory", [MemoryConfig(SHORT_TERM), long_term(SHORT_TERM)], ids=["alone", "before another"])
def test_a_segment_read_token_by_token_sees_the_same_memory(memory):
    model = new_model(memory)
    state = read(model, SEGMENTS[:3])[1][-1]
    whole = model(SEGMENTS[3], state=state).logits
    cache, logits = None, []
    for token in SEGMENTS[3].split(1, dim=1):
        output = model(token, state=state, segment_cache=cache, use_cache=True)
        cache = output.segment_cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_order_of_what_is_remembered_matters_to_attention():
    model = new_model(MemoryConfig(SHORT_TERM))
    state = read(model)[1][-1]
    shuffled = model.shuffle_time(state)
    assert (model(SEGMENTS[0], state=shuffled).logits - model(SEGMENTS[0], state=state).logits).abs().max() > 1e-2


@torch.no_grad()
def test_keys_of_half_precision_are_kept_and_seen():
    model = new_model(MemoryConfig(SHORT_TERM))
    exact = read(model)[0][-1]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(model)[0][-1]
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    half = copy.deepcopy(model)
    half.backbone.to(torch.bfloat16)
    assert (read(half)[0][-1] - exact).abs().max() < 0.1 * exact.abs().max()


def test_more_tokens_than_the_backbone_has_positions_are_refused():
    with pytest.raises(
        ModelError, match=r"short_term_length=30: with a segment of 6 .* 32 positions.* set it to 22 at"
    ):
        new_model(MemoryConfig(30))


def test_a_compressed_memory_beside_a_pretrained_model_is_refused():
    from infformer.memory.compressive import CompressiveMemoryConfig

    with pytest.raises(ModelError, match="model/memory=compressive: only model=decoder has a compressed memory"):
        new_model(CompressiveMemoryConfig(SEGMENT, length=4, rate=2))
