"""Engines that cut weights up put a unit together for the time of its call: no weight may be needed outside of it."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig

from infformer.evaluation.memory_instruments import inspect_document
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import continue_text
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT, VOCABULARY = 12, 50
LLAMA_SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BACKBONES = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=24, n_layer=2, n_head=4),
    "llama": LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, num_key_value_heads=2, **LLAMA_SIZES),
}


def long_term(read: str, short_term_length: int = 0) -> LongTermMemoryConfig:
    return LongTermMemoryConfig(short_term_length, basis_functions=8, past_samples=16, sticky=True, read=read)


def wrapped(name: str, memory: MemoryConfig | None, memory_layers: list[int] | None = None) -> MemoryModel:
    backbone = AutoModelForCausalLM.from_config(copy.deepcopy(BACKBONES[name]))
    return InfformerForCausalLM.from_backbone(backbone, memory, memory_layers, SEGMENT)


def decoder(memory: MemoryConfig | None, **architecture: object) -> MemoryModel:
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "feed_forward_size": 20}
    return DecoderForCausalLM(DecoderConfig(VOCABULARY, **sizes, memory=memory, segment_length=SEGMENT, **architecture))


MODELS: dict[str, Callable[[], MemoryModel]] = {
    "gpt2-affine": lambda: wrapped("gpt2", long_term("affine")),
    "gpt2-one-layer": lambda: wrapped("gpt2", long_term("slots"), [1]),
    "llama-moments": lambda: wrapped("llama", long_term("moments")),
    "llama-none": lambda: wrapped("llama", None),
    "decoder-none": lambda: decoder(None),
    "decoder-compressive": lambda: decoder(CompressiveMemoryConfig(SEGMENT, 5, 2)),
    "decoder-slots": lambda: decoder(long_term("slots", SEGMENT)),
    "adaptive": lambda: decoder(long_term("affine", SEGMENT), adaptive_cutoffs=[10, 30], adaptive_divisor=2),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> MemoryModel:
    """Of random weights, in evaluation."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@contextmanager
def cut_up(model: MemoryModel) -> Iterator[None]:
    """Outside of the call of its unit no weight is a number; those in no unit belong to the call of the model."""
    owners: dict[nn.Parameter, nn.Module] = {}
    for unit in model.sharding_units():
        for parameter in unit.parameters():
            assert parameter not in owners
            owners[parameter] = unit
    for parameter in model.parameters():
        owners.setdefault(parameter, model)
    whole = {parameter: parameter.detach().clone() for parameter in owners}

    def put_together(unit: nn.Module, *_: object) -> None:
        for parameter, owner in owners.items():
            if owner is unit:
                parameter.data.copy_(whole[parameter])

    def cut(unit: nn.Module, *_: object) -> None:
        for parameter, owner in owners.items():
            if owner is unit:
                parameter.data.fill_(torch.nan)

    hooks = [
        hook
        for unit in set(owners.values())
        for hook in (unit.register_forward_pre_hook(put_together), unit.register_forward_hook(cut))
    ]
    for unit in set(owners.values()):
        cut(unit)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for unit in set(owners.values()):
            put_together(unit)


def tokens(length: int, rows: int = 2) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read(model: MemoryModel) -> list[Tensor]:
    """All that comes out of three segments, each with the memory of the last."""
    memory, found = model.initial_state(2), []
    for segment in tokens(3 * SEGMENT).split(SEGMENT, dim=1):
        output = model(segment, labels=segment, state=memory, return_logits=True)
        memory = output.state
        found += [output.logits, output.loss, *output.auxiliary_losses.values(), *memory.named_tensors().values()]
    return found


def test_reading_asks_for_no_weight_outside_of_its_unit(model):
    expected = read(model)
    with cut_up(model):
        found = read(model)
    assert all(tensor.isfinite().all() for tensor in expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_writing_text_asks_for_no_weight_outside_of_its_unit(model):
    prompt = tokens(2 * SEGMENT - 1, rows=1)[0]  # a segment ends in what is written

    def write() -> list[int]:
        return continue_text(model, prompt, 4, SEGMENT, generator=torch.Generator().manual_seed(0)).tolist()

    expected = write()
    with cut_up(model):
        assert write() == expected


@pytest.mark.parametrize(
    "model", [name for name in MODELS if "none" not in name and "compr" not in name], indirect=True
)
def test_looking_into_a_memory_asks_for_no_weight_outside_of_its_unit(model):
    text = tokens(4 * SEGMENT + 1, rows=1)[0]
    expected = inspect_document(model, text, 4, progress=False)
    with cut_up(model):
        assert inspect_document(model, text, 4, progress=False) == expected


def test_every_layer_and_every_memory_is_in_a_unit(model):
    """What stays with the model is what its beginning and its end need: embeddings, a last norm, the vocabulary."""
    in_units = {id(parameter) for unit in model.sharding_units() for parameter in unit.parameters()}
    units = {id(module) for unit in model.sharding_units() for module in unit.modules()}
    assert units <= {id(module) for module in model.modules()}
    assert {id(parameter) for parameter in model.memory_parameters()} <= in_units
    left = [name for name, parameter in model.named_parameters() if id(parameter) not in in_units]
    assert left
    assert not [name for name in left if ".h." in name or "layers." in name or name.startswith("memories.")]


def test_a_backbone_of_another_kind_is_one_unit_with_its_model():
    """No memory can be beside it, and nobody knows where it keeps its layers."""
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    stock = InfformerForCausalLM.from_backbone(AutoModelForCausalLM.from_config(config)).eval()
    assert stock.sharding_units() == []
