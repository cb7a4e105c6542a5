"""Frozen backbones of few bits a weight: what learns beside them, and that what is saved is what is opened."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from infformer.errors import ModelError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.adapters import LoraConfig
from infformer.models.base import MemoryModel
from infformer.models.loading import load_pretrained, load_trained
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.quantization import check_installed, quantization_config
from infformer.models.streaming import TextSegment, stream

SEGMENT, VOCABULARY = 8, 50
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BACKBONES = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=64, n_layer=1, n_head=2, **TOKENS, **DROPOUT),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        **TOKENS,
    ),
}
MEMORY = LongTermMemoryConfig(basis_functions=8, past_samples=16)
SEGMENTS = torch.randint(VOCABULARY, (2, 3 * SEGMENT), generator=torch.Generator().manual_seed(0)).split(SEGMENT, dim=1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
needs = pytest.mark.needs


@pytest.fixture(params=BACKBONES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """The folders of stock models in float32, without dropout, by their kinds."""
    place = tmp_path_factory.mktemp("stock")
    for kind, config in BACKBONES.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(copy.deepcopy(config)).save_pretrained(place / kind)
    return place


@pytest.fixture
def folder(kind, stock) -> Path:
    """Of one of them; not to be changed."""
    return stock / kind


def loaded(folder: Path, weights: str, memory: MemoryConfig | None = MEMORY, **options: Any) -> InfformerForCausalLM:
    """With a backbone in a type, or of so many bits with a type for the rest: `4bit bfloat16`."""
    *quantized, dtype = weights.split()
    kwargs: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if quantized:
        kwargs["quantization_config"] = quantization_config(quantized[0], kwargs["dtype"])
    model = load_pretrained(str(folder), memory, segment_length=SEGMENT, **options, **kwargs)
    if "lora" not in options:
        model.backbone.requires_grad_(False)
    return model.eval()


def learned(model: InfformerForCausalLM) -> InfformerForCausalLM:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def read(model: MemoryModel) -> list[Tensor]:
    return [output.logits for _, output in stream(model, map(TextSegment, SEGMENTS))]


QUANTIZED = [
    pytest.param(weights, marks=needs("bitsandbytes"))
    for weights in ("4bit float32", "4bit bfloat16", "8bit float32", "8bit float16")
]
WEIGHTS = ["bfloat16", "float16", *QUANTIZED]
RANKS = [(weights, None) for weights in ("bfloat16", "float16")]
RANKS += [pytest.param(*weights.values, None, marks=weights.marks) for weights in QUANTIZED]
RANKS += [
    pytest.param(weights, 2, marks=[needs("peft"), *marks])
    for weights, *marks in (
        ("bfloat16",),
        ("float16", pytest.mark.slow),
        ("4bit float32", needs("bitsandbytes"), pytest.mark.slow),
        ("4bit bfloat16", needs("bitsandbytes")),
        ("8bit float32", needs("bitsandbytes"), pytest.mark.slow),
        ("8bit float16", needs("bitsandbytes")),
    )
]
"""Of adapters, beside weights: each of few bits once, also with adapters."""


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["llama"])
def test_channels_that_stand_out_do_not_look_like_later_tokens(folder, kind, tmp_path):
    """Eight bits leave out channels that are large in any token of a call, so that the first token rounds otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.1)
        if "norm" in name:
            parameter.data[:3] = 8
    model.save_pretrained(tmp_path)
    assert len(loaded(tmp_path, "8bit float32").memories) == 1


@pytest.mark.parametrize(("weights", "rank"), RANKS)
def test_what_is_saved_is_opened_with_equal_logits_and_types(folder, weights, rank, tmp_path):
    options = {} if rank is None else {"lora": LoraConfig(rank=rank)}
    model = learned(loaded(folder, weights, **options))
    model.save_pretrained(tmp_path / "saved")
    expected = read(model)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for opened in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        InfformerForCausalLM.from_pretrained(tmp_path / "saved"),
        load_trained(str(tmp_path / "saved")),
    ):
        assert {name: parameter.dtype for name, parameter in opened.named_parameters()} == kinds
        assert all(torch.equal(one, other) for one, other in zip(read(opened.eval()), expected, strict=True))


@pytest.mark.parametrize(("weights", "rank"), RANKS)
def test_what_learns_is_float32_and_learns_while_the_backbone_stays(folder, weights, rank):
    options = {} if rank is None else {"lora": LoraConfig(rank=rank)}
    model = loaded(folder, weights, **options).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"memories"} if rank is None else {"memories", "backbone"}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert (
        torch.float32 not in {p.dtype for n, p in model.named_parameters() if n not in trained} or "float32" in weights
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    losses = []
    for _ in range(4):
        state, loss = None, torch.zeros(())
        for segment in SEGMENTS:
            output = model(segment, labels=segment, state=state)
            state, loss = output.state, loss + output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == trained.keys()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_such_a_backbone_is_near_to_that_in_float32(folder, weights):
    exact = torch.stack(read(loaded(folder, "float32")))
    error = (torch.stack(read(loaded(folder, weights))).float() - exact).abs().max() / exact.abs().max()
    assert 0 < error < (0.3 if "4bit" in weights else 0.05)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_short_term_memory_stands_before_such_a_backbone(folder, kind, weights):
    if kind == "gpt2":
        pytest.skip("its places cannot be moved back")
    short_term = MemoryConfig(short_term_length=SEGMENT)
    exact = torch.stack(read(loaded(folder, "float32", short_term)))
    error = (torch.stack(read(loaded(folder, weights, short_term))).float() - exact).abs().max() / exact.abs().max()
    assert error < (0.3 if "4bit" in weights else 0.05)


@pytest.mark.parametrize("weights", QUANTIZED[:1])
@pytest.mark.needs("peft")
def test_adapters_are_not_added_to_quantised_weights(folder, weights):
    model = loaded(folder, weights, lora=LoraConfig(rank=2))
    with pytest.raises(ModelError, match=r"cannot be added to weights of four or eight bits.*--what memories"):
        model.stock_backbone()


@pytest.mark.parametrize("weights", QUANTIZED[:1])
def test_a_run_without_memory_is_not_quantised_as_it_lies_there(folder, weights, tmp_path):
    loaded(folder, "float32", memory=None).save_pretrained(tmp_path / "run")
    with pytest.raises(ModelError, match=r"model\.pretrained=.*--what backbone"):
        loaded(tmp_path / "run", weights)


def test_without_bitsandbytes_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"model\.quantization=4bit needs bitsandbytes: pip install 'infformer\["):
        check_installed("4bit")
