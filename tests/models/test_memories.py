"""Memories alone: a folder of them beside a stock backbone is the model that they were trained in."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.adapters import LoraConfig
from infformer.models.loading import load_trained
from infformer.models.memories import attach_memories, load_memories, save_memories
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT, VOCABULARY = 6, 50
SEGMENTS = torch.randint(VOCABULARY, (2, 4 * SEGMENT), generator=torch.Generator().manual_seed(0)).split(SEGMENT, dim=1)
LONG_TERM = LongTermMemoryConfig(SEGMENT, basis_functions=8, past_samples=16, sticky=True, sticky_bins=16)
WITHOUT_WEIGHTS = MemoryConfig(2 * SEGMENT)
LORA = LoraConfig(rank=2, targets=["q_proj"])


def stock(**sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    default = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=0, eos_token_id=0, **{**default, **sizes}
    )
    return AutoModelForCausalLM.from_config(config).eval()


def trained(memory: MemoryConfig | None = LONG_TERM, **options: Any) -> InfformerForCausalLM:
    """Memories, and adapters, of which every weight is random, beside a stock backbone."""
    model = InfformerForCausalLM.from_backbone(stock(), memory, segment_length=SEGMENT, **options).eval()
    for name, parameter in model.named_parameters():
        if "memories." in name or ".lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (LONG_TERM, {}),
        (LONG_TERM, {"memory_layers": [1]}),
        (WITHOUT_WEIGHTS, {}),
        pytest.param(LONG_TERM, {"lora": LORA}, marks=pytest.mark.needs("peft")),
        pytest.param(None, {"lora": LORA}, marks=pytest.mark.needs("peft")),
    ],
    ids=["long-term", "in one layer", "short-term", "with adapters", "adapters alone"],
)
def test_what_was_saved_beside_a_stock_backbone_is_the_model_that_was_trained(
    tmp_path, assert_same_model, memory, options, caplog
):
    model = trained(memory, **options)
    save_memories(model, tmp_path)
    assert_same_model(model, attach_memories(tmp_path, stock()), SEGMENTS)
    assert not any("backbone." in name and "lora" not in name for name in load_file(tmp_path / "memories.safetensors"))
    assert not caplog.records


@pytest.fixture
def folder(tmp_path) -> Path:
    save_memories(trained(), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "sizes", [{"num_hidden_layers": 3}, {"hidden_size": 16}, {"num_attention_heads": 6}, {"num_key_value_heads": 1}]
)
def test_a_backbone_of_another_shape_is_refused(folder, sizes):
    with pytest.raises(
        ModelError, match=rf"model\.memories={folder}: the backbone .* another shape .*; set model\.pre"
    ):
        attach_memories(folder, stock(**sizes))


def test_another_backbone_of_the_same_shape_is_warned_of(folder, caplog):
    other = stock()
    other.model.layers[1].mlp.up_proj.weight.data += 1e-3
    with caplog.at_level(logging.WARNING):
        attach_memories(folder, other)
    assert "they were trained beside other weights than those of this backbone" in caplog.text


@pytest.mark.parametrize(
    ("memory", "options", "typed"),
    [
        (replace(LONG_TERM, ridge=0.25, read="slots"), {}, ["model.memory.ridge=0.5", "model.memory.read=affine"]),
        (LONG_TERM, {"memory_layers": [1]}, ["model.memory_layers=null"]),
        (WITHOUT_WEIGHTS, {}, ["model/memory=long_term", "model.memory.widths=[0.425,0.85]", "model.memory.ridge=0.5"]),
        (None, {}, ["model/memory=long_term", f"model.memory.short_term_length={SEGMENT}"]),
        pytest.param(LONG_TERM, {"lora": LORA}, ["model.lora.rank=null"], marks=pytest.mark.needs("peft")),
    ],
)  # fmt: skip
def test_a_run_with_another_memory_is_told_what_to_type(folder, memory, options, typed):
    model = trained(memory, **options)
    with pytest.raises(ModelError, match="this run has other memories or adapters than that folder; for those") as told:
        load_memories(folder, model)
    said = str(told.value).split(" type ")[1].split()
    assert set(typed) <= set(said) if typed[0].startswith("model/memory") else typed == said


def test_a_folder_that_holds_no_memories_is_refused(folder, tmp_path):
    for place, damage, said in (
        (folder / "nowhere", lambda: None, "holds no memories"),
        (folder, lambda: (folder / "memories.json").write_text("{}"), "does not say backbone, lora, memory,"),
        (folder, lambda: (folder / "memories.json").write_text("["), "holds no memories"),
    ):
        damage()
        with pytest.raises(ModelError, match=f"model.memories={place}: .*{said}"):
            attach_memories(place, stock())


def test_a_folder_of_memories_is_no_model_to_be_measured(folder):
    with pytest.raises(ModelError, match=f"checkpoint={folder}: .* it holds memories alone: .* model.memories=, or"):
        load_trained(str(folder))


def test_weights_that_are_not_those_of_the_folder_are_refused(folder):
    file = folder / "memories.safetensors"
    whole = load_file(file)
    name = min(whole)
    for tensors, said in (
        ({other: tensor for other, tensor in whole.items() if other != name}, f"1 differ, such as {name}"),
        ({**whole, name: whole[name][:1].clone()}, f"1 differ, such as {name}"),
        ({**whole, name: whole[name] * float("nan")}, f"the weights {name} there are not finite"),
    ):
        save_file(tensors, file)
        with pytest.raises(ModelError, match=f"model.memories={folder}: .*{said}"):
            attach_memories(folder, stock())
    file.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="its weights cannot be read"):
        attach_memories(folder, stock())


def test_a_model_that_has_nothing_of_its_own_is_refused(tmp_path):
    with pytest.raises(ModelError, match="neither memories nor adapters"):
        save_memories(trained(None), tmp_path)
    assert not list(tmp_path.iterdir())
