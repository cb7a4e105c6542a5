"""Stock models of many families get memories, of which no file of the package knows the names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPTNeoXConfig, PreTrainedModel

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.backbone import find_rotations
from infformer.models.generation import continue_text
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT, SHORT_TERM = 4, 8
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT_SIZES = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 2, "pad_token_id": 0}
WINDOWS = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
WIDE_HEADS = {**GROUPED, "head_dim": 8}

ROTARY: dict[str, dict[str, Any]] = {
    "gpt_neox": {**SIZES, "intermediate_size": 24},
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 3},
    "qwen2": GROUPED,
    "qwen3": WIDE_HEADS,
    "gemma": WIDE_HEADS,
    "gemma2": {**WIDE_HEADS, **WINDOWS},
    "gemma3_text": {**WIDE_HEADS, **WINDOWS},
    "phi": GROUPED,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "stablelm": {**GROUPED, "partial_rotary_factor": 0.5},
    "falcon": {key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    "granite": {**GROUPED, "logits_scaling": 3.0},
    "smollm3": {**GROUPED, "no_rope_layers": [1, 0]},
    "cohere": {**GROUPED, "logit_scale": 0.3},
    "cohere2": {**WIDE_HEADS, **WINDOWS},
    "glm4": WIDE_HEADS,
    "exaone4": {**GROUPED, **WINDOWS},
    "starcoder2": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 2},
}
DISTANCES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 16, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    "falcon": {**ROTARY["falcon"], "alibi": True},
}
ABSOLUTE: dict[str, dict[str, Any]] = {
    "gpt2": GPT_SIZES,
    "gptj": {**GPT_SIZES, "rotary_dim": 2},
    "opt": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "gpt_neo": {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
}
LIKE_OTHERS = {
    "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "stablelm", "granite", "cohere", "glm4", "exaone4",
    "starcoder2",
}  # fmt: skip
"""In all that a memory has to do with; slow tests."""
MOVABLE, ABSOLUTE_ONES = (
    [
        pytest.param(kind, sizes, id=kind, marks=[pytest.mark.slow] if kind in LIKE_OTHERS else [])
        for kind, sizes in families
    ]
    for families in ([*ROTARY.items(), *DISTANCES.items()], [*ABSOLUTE.items()])
)
TEXT = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))[:, :12]


def stock(kind: str, sizes: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=40, bos_token_id=1, eos_token_id=2, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def read(model: InfformerForCausalLM, text: torch.Tensor = TEXT) -> torch.Tensor:
    """Logits of a text, segment by segment."""
    state, logits = None, []
    for segment in text.split(SEGMENT, dim=1):
        output = model(segment, state=state)
        state = output.state
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("kind", "sizes"), [*MOVABLE, *ABSOLUTE_ONES])
def test_a_backbone_of_any_family_gets_a_memory_learns_is_saved_and_generates(kind, sizes, tmp_path, assert_same_model):
    backbone = stock(kind, sizes)
    with torch.no_grad():
        expected = torch.cat([backbone(segment).logits for segment in TEXT.split(SEGMENT, dim=1)], dim=1)
    memory = LongTermMemoryConfig(basis_functions=4, past_samples=8)
    model = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT).eval()
    with torch.no_grad():
        assert torch.equal(read(model), expected)
    assert model.config.head_is_known
    assert len(model.sharding_units()) == 4

    state = model(TEXT[:, :SEGMENT]).state
    model(TEXT[:, SEGMENT : 2 * SEGMENT], labels=TEXT[:, SEGMENT : 2 * SEGMENT], state=state).loss.backward()
    assert all(layer.output.weight.grad.abs().max() > 0 for layer in model.memories)
    for parameter in model.memory_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        assert (read(model)[:, SEGMENT:] - expected[:, SEGMENT:]).abs().max() > 1e-2
        model.save_pretrained(tmp_path)
        assert_same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path), TEXT.split(SEGMENT, dim=1)[:2])
        assert len(continue_text(model, TEXT[0][:6], 3, SEGMENT)) == 3


@torch.no_grad()
@pytest.mark.parametrize(("kind", "sizes"), MOVABLE)
def test_the_short_term_memory_of_any_family_reads_as_one_pass_over_all_it_holds(kind, sizes):
    """The text and no more: it holds all that was before the last segment."""
    backbone = stock(kind, sizes)
    memory = MemoryConfig(short_term_length=SHORT_TERM)
    model = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT).eval()
    for found, whole in zip(
        read(model).split(SEGMENT, dim=1), backbone(TEXT).logits.split(SEGMENT, dim=1), strict=True
    ):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize(("kind", "sizes"), ABSOLUTE_ONES)
def test_what_was_read_at_absolute_places_cannot_be_moved_back(kind, sizes):
    with pytest.raises(ModelError, match=r"model.memory: what a .* has read cannot be moved back: its layer 0"):
        InfformerForCausalLM.from_backbone(stock(kind, sizes), MemoryConfig(short_term_length=4), segment_length=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_channel_a_hundred_times_as_large_does_not_hide_the_rotation_of_the_others(dtype):
    """As the key biases of Qwen2 are, in the pair that turns the slowest."""
    backbone = stock("qwen2", {**GROUPED, "head_dim": 32})
    for layer in backbone.model.layers:
        layer.self_attn.k_proj.bias.data[[15, 31]] = 100
    assert find_rotations(backbone.to(dtype)) == [0, 1]


LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 2, "long_factor": [4.0] * 2}


@pytest.mark.parametrize(("short_term_length", "fits"), [(8, True), (9, False), (12, True)])
def test_a_segment_in_which_a_backbone_begins_to_rotate_otherwise_is_refused(short_term_length, fits):
    rotation = {**LONGROPE, "original_max_position_embeddings": 12}
    backbone = stock("phi3", {**GROUPED, "rope_parameters": rotation, "original_max_position_embeddings": 12})
    memory = MemoryConfig(short_term_length=short_term_length, sink_tokens=0)
    if fits:
        model = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT)
        with torch.no_grad():
            whole = model(TEXT[:, :4]).logits
            first = model(TEXT[:, :1], use_cache=True)
            rest = model(TEXT[:, 1:4], segment_cache=first.segment_cache).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ModelError, match=r"segment_length=4: .* segments of at most 3 tokens, or see at least 12"):
            InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT)


LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("jetmoe", {"num_key_value_heads": 2, "kv_channels": 4}, r"a JetMoeAttention asks with 4 heads, keys \[4, 4\]"),
        ("diffllama", {"num_key_value_heads": 2}, "a DiffLlamaAttention asks twice"),
        ("deepseek_v3", {**LATENT, "num_key_value_heads": 4}, r"the cache of a 'deepseek_v3' has keys \[., 8\]"),
        (
            "minimax",
            {"num_key_value_heads": 2},
            r"this memory cannot stand beside such attentions.*\(ValueError: MiniMax",
        ),
    ],
)
def test_an_unusual_attention_takes_a_memory_of_hidden_states_and_is_told_why_none_of_keys_and_values(
    kind, sizes, said
):
    experts = {"num_local_experts": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    backbone = stock(kind, {**SIZES, **experts, **sizes, "intermediate_size": 24, "pad_token_id": 0})
    memory = LongTermMemoryConfig(basis_functions=4, past_samples=8)
    InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT)
    with pytest.raises(ModelError, match=said):
        InfformerForCausalLM.from_backbone(backbone, replace(memory, stores="keys_values"), segment_length=SEGMENT)


@pytest.mark.parametrize("kind", ["llama4_text", "electra"])
def test_a_head_that_sees_more_than_the_last_hidden_states_is_asked_itself(kind):
    backbone = stock(kind, {**GROUPED, "head_dim": 4, "intermediate_size_mlp": 24, "is_decoder": True})
    memory = LongTermMemoryConfig(basis_functions=4, past_samples=8)
    model = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT).eval()
    assert not model.config.head_is_known
    with torch.no_grad():
        assert torch.equal(model(TEXT[:, :SEGMENT]).logits, backbone(TEXT[:, :SEGMENT]).logits)


def test_a_backbone_needs_nothing_but_its_own_configuration():
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
    stock = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=50, **sizes))
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16)
    model = InfformerForCausalLM.from_backbone(stock, memory, segment_length=6)
    assert list(model.layer_memories()) == [0, 1]


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        (
            "mamba",
            {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            "a list of 2 layers .* and 0 found",
        ),
        (
            "jamba",
            {**GROUPED, "num_hidden_layers": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
            "a list of 2 layers .* and 0 found",
        ),
        ("bert", {**SIZES, "intermediate_size": 24}, "give a causal language model"),
        (
            "bart",
            {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "is_decoder": False},
            "give a causal language",
        ),
    ],
)
def test_a_model_without_one_causal_self_attention_in_each_layer_is_refused(kind, sizes, said):
    config = AutoConfig.for_model(kind, vocab_size=40, **sizes)
    kind_of_model = AutoModelForSeq2SeqLM if kind == "bart" else AutoModelForCausalLM
    with pytest.raises(ModelError, match=said):
        InfformerForCausalLM.from_backbone(
            kind_of_model.from_config(config), LongTermMemoryConfig(basis_functions=4), segment_length=4
        )
