"""What every memory promises in every kind of model, also one of thirty lines of which no file of the package knows."""

import copy
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from infformer.config import CONF, RunConfig
from infformer.errors import UserError
from infformer.memory.cache import CacheConfig
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import Memory, MemoryOutput, SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.state import MemoryState, ModelState
from infformer.models.base import MemoryModel
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.generation import continue_text
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.segment_read import MemoryModelOutput
from infformer.training.command_line import compose

ROOT = Path(__file__).parents[2]


@dataclass
class RunningMeanConfig(MemoryConfig):
    """The mean of all hidden states of a layer, through one linear map."""

    kind: ClassVar[str] = "running_mean"

    def build_behind(self, hidden_size: int, heads: int, layers: int, segment_length: int) -> list[Memory]:
        return [RunningMean(hidden_size) for _ in range(layers)]


@dataclass(frozen=True)
class MeanState(MemoryState):
    mean: Tensor
    segments: Tensor


class RunningMean(Memory):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.output.weight)

    def initial_state(self, batch: int) -> MeanState:
        return MeanState(torch.zeros(batch, self.output.in_features), torch.zeros(batch, dtype=torch.int64))

    def forward(self, hidden: Tensor, state: MeanState, context: SegmentContext, shared: Any) -> MemoryOutput:
        read = F.linear(state.mean, self.output.weight.to(state.mean)).unsqueeze(1).expand_as(hidden)
        if context.complete is not None:
            new = context.written(hidden).mean(1).to(state.mean)
            segments = state.segments + 1
            written = MeanState(state.mean + (new - state.mean) / segments.unsqueeze(-1), segments)
            state = state.replace_rows(context.complete, written)
        return MemoryOutput(state, read)

    def shuffle_time(self, state: MeanState, shuffle: Any) -> MeanState:
        return state  # a mean knows no order


@dataclass
class LossMeanConfig(MemoryConfig):
    """The same mean, in which a token counts as much as it was not expected."""

    kind: ClassVar[str] = "loss_mean"

    def build_behind(self, hidden_size: int, heads: int, layers: int, segment_length: int) -> list[Memory]:
        return [LossMean(hidden_size) for _ in range(layers)]


class LossMean(RunningMean):
    needs_losses = True

    def forward(self, hidden: Tensor, state: MeanState, context: SegmentContext, shared: Any) -> MemoryOutput:
        read = super().forward(hidden, state, context._replace(complete=None), shared)
        if context.complete is None:
            return read
        return read._replace(pending=(context.complete, context.written(hidden).to(state.mean)))

    def write_by_losses(self, state: MeanState, pending: tuple[Tensor, Tensor], losses: Tensor) -> MeanState:
        complete, hidden = pending
        new = (hidden * losses.unsqueeze(-1)).mean(1).to(state.mean)
        segments = state.segments + 1
        return state.replace_rows(
            complete, MeanState(state.mean + (new - state.mean) / segments.unsqueeze(-1), segments)
        )


SEGMENT, VOCABULARY, SAMPLES = 6, 50, 16
TOKENS = {"bos_token_id": 0, "eos_token_id": 0}
BACKBONES = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=3, **TOKENS),
    "llama": LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=3,
        **TOKENS,
        intermediate_size=20,
        num_key_value_heads=1,
        max_position_embeddings=18,
        attention_dropout=0.1,
    ),
}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 12, "num_attention_heads": 3, "feed_forward_size": 20}
DECODERS = {
    "relative": {"num_hidden_layers": 2, "head_size": 6, "dropout": 0.2, "attention_dropout": 0.1},
    "rotary": {
        "num_hidden_layers": 1,
        "positions": "rotary",
        "normalization": "rms",
        "normalization_placement": "pre",
        "dropout": 0.2,
    },
}


def long_term(short_term_length: int = 0, **options: Any) -> LongTermMemoryConfig:
    return LongTermMemoryConfig(short_term_length, basis_functions=8, past_samples=SAMPLES, **options)


MEMORIES: dict[str, MemoryConfig | None] = {
    "none": None,
    "short-term": MemoryConfig(8),
    "compressive": CompressiveMemoryConfig(SEGMENT, length=5, rate=2),
    "most used": CompressiveMemoryConfig(SEGMENT, length=5, rate=2, function="most_used"),
    "long-term": long_term(input_gate=True),
    "uniform sticky": long_term(contraction="uniform", sticky=True),
    "sticky moments": long_term(read="moments", sticky=True, training_rates=[0.25, 0.5, 0.75]),
    "uniform slots": long_term(read="slots", contraction="uniform"),
    "sticky gibbs": long_term(read="gibbs", sticky=True),
    "sticky by loss": long_term(sticky=True, sticky_by="both", read="gibbs"),
    "short-term and sticky by loss": long_term(SEGMENT, sticky=True, sticky_by="loss", contraction="uniform"),
    "dyadic moments": long_term(contraction="dyadic", read="moments", levels=2),
    "dyadic keys and values": long_term(
        stores="keys_values", combination="joint", read="gibbs", contraction="dyadic", levels=2
    ),
    "keys and values": long_term(stores="keys_values"),
    "joint sticky keys and values": long_term(
        stores="keys_values", combination="joint", read="gibbs", sticky=True, contraction="uniform", key_convolution=3
    ),
    "short-term and joint keys and values": long_term(
        SEGMENT, stores="keys_values", combination="joint", read="slots", key_convolution=2
    ),
    "short-term and sticky moments": long_term(SEGMENT, read="moments", sticky=True),
    "short-term and uniform slots": long_term(SEGMENT, read="slots", contraction="uniform"),
    "running mean": RunningMeanConfig(0),
    "short-term and running mean": RunningMeanConfig(SEGMENT),
    "loss mean": LossMeanConfig(0),
    "short-term and loss mean": LossMeanConfig(SEGMENT),
    "fast weights": FastWeightMemoryConfig(0),
    "fast weights by loss": FastWeightMemoryConfig(0, strength="loss", rule="sum", key_convolution=0),
    "fast weights within a segment": FastWeightMemoryConfig(0, within_segment=True, features="elu"),
    "cache": CacheConfig(length=8),
    "short-term and cache": CacheConfig(4, length=6, sink_tokens=2),
    "short-term and fast weights": FastWeightMemoryConfig(SEGMENT, strength="loss", features="dpfp"),
}
"""Every kind; of the long-term memory's options each, but not each with each."""
IN = {
    "relative": (
        "short-term",
        "compressive",
        "long-term",
        "short-term and sticky moments",
        "loss mean",
        "keys and values",
        "fast weights",
        "short-term and fast weights",
    ),
    "rotary": (
        "none",
        "joint sticky keys and values",
        "short-term and joint keys and values",
        "most used",
        "uniform sticky",
        "short-term and sticky by loss",
        "dyadic moments",
        "short-term and uniform slots",
        "short-term and running mean",
        "fast weights within a segment",
        "cache",
    ),
    "gpt2": (
        "none",
        "long-term",
        "running mean",
        "keys and values",
        "fast weights",
        "fast weights within a segment",
    ),
    "llama": (
        "sticky moments",
        "sticky gibbs",
        "sticky by loss",
        "dyadic keys and values",
        "joint sticky keys and values",
        "short-term and joint keys and values",
        "uniform slots",
        "short-term",
        "short-term and sticky moments",
        "loss mean",
        "short-term and loss mean",
        "fast weights by loss",
        "short-term and fast weights",
        "short-term and cache",
    ),
}
MODELS = {f"{kind}, {name}": (kind, MEMORIES[name]) for kind, names in IN.items() for name in names}
MORE = {
    "relative": ("short-term", "long-term", "keys and values", "fast weights"),
    "rotary": (
        "none",
        "short-term and joint keys and values",
        "short-term and sticky by loss",
        "short-term and running mean",
        "dyadic moments",
    ),
    "gpt2": ("fast weights within a segment",),
    "llama": (
        "sticky gibbs",
        "uniform slots",
        "joint sticky keys and values",
        "short-term and sticky moments",
        "loss mean",
        "short-term and fast weights",
    ),
}
"""Slow tests: the others have each kind, each option of a kind, and a memory like it in the same kind of model."""
TYPICAL = {
    "relative": ("compressive", "short-term and sticky moments", "loss mean"),
    "rotary": ("joint sticky keys and values", "fast weights within a segment", "cache"),
    "gpt2": ("none", "long-term", "running mean"),
    "llama": ("short-term", "sticky by loss", "short-term and loss mean"),
}
"""Of what a model does whatever its memory is; with all others such tests are slow."""
REMEMBERING = {name: model for name, model in MODELS.items() if model[1] is not None}
WRAPPED = {name: model for name, model in MODELS.items() if model[0] in BACKBONES}
NEW = {
    "none": None,
    "running mean": RunningMeanConfig(0),
    "affine": long_term(),
    "affine uniform sticky": long_term(contraction="uniform", sticky=True),
    "moments uniform": long_term(read="moments", contraction="uniform"),
    "slots sticky": long_term(read="slots", sticky=True),
    "gibbs": long_term(read="gibbs", points=5, sharpness=2.0),
    "keys and values": long_term(stores="keys_values"),
    "dyadic": long_term(contraction="dyadic", read="slots", levels=4),
    "keys and values gibbs": long_term(stores="keys_values", read="gibbs"),
    "fast weights": FastWeightMemoryConfig(0),
    "fast weights by loss": FastWeightMemoryConfig(0, strength="loss", features="dpfp"),
    "fast weights within a segment": FastWeightMemoryConfig(0, within_segment=True),
}
"""What can stand beside a pretrained model."""


def adds_nothing_at_zero(memory: MemoryConfig) -> bool:
    """With all of its weights zero."""
    return not memory.short_term_length and getattr(memory, "combination", "") != "joint"


def of(models: dict[str, Any], quick: dict[str, tuple[str, ...]] | None = None) -> pytest.MarkDecorator:
    """A test for each of these models."""
    return pytest.mark.parametrize("model", cases(models, quick), indirect=True)


def cases(models: dict[str, Any], quick: dict[str, tuple[str, ...]] | None = None) -> list[Any]:
    """Their names; some of them are slow: those that are not among the quick ones, or all of `MORE`."""
    names = {f"{kind}, {name}" for kind, chosen in (MORE if quick is None else quick).items() for name in chosen}
    return [pytest.param(name, marks=[pytest.mark.slow] * ((name in names) == (quick is None))) for name in models]


def new_model(kind: str, memory: MemoryConfig | None) -> MemoryModel:
    torch.manual_seed(0)
    if kind in BACKBONES:
        stock = AutoModelForCausalLM.from_config(copy.deepcopy(BACKBONES[kind]))
        return InfformerForCausalLM.from_backbone(stock, memory, segment_length=SEGMENT).eval()
    config = DecoderConfig(**SIZES, **DECODERS[kind], **TOKENS, memory=memory, segment_length=SEGMENT)
    return DecoderForCausalLM(config).eval()


@cache
def trained(name: str) -> MemoryModel:
    """A model in which everything matters; made once, and not to be changed."""
    model = new_model(*MODELS[name])
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            nn.init.normal_(parameter, std=0.3)
            if type(module).__name__.endswith("Norm") and name == "weight":
                parameter.data += 1
    return model


@pytest.fixture(params=cases(MODELS))
def model(request: pytest.FixtureRequest) -> MemoryModel:
    """Each kind of model with each memory, in evaluation; not to be changed."""
    return trained(request.param)


def copied(model: MemoryModel) -> MemoryModel:
    """With weights and hooks of its own, and the same configuration: to copy that takes longer than all the rest."""
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    return copy.deepcopy(model, {id(config): config for config in configs})


@pytest.fixture
def own(model: MemoryModel) -> MemoryModel:
    """A copy that may be."""
    return copied(model)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def without_memory(model: MemoryModel) -> MemoryModel:
    """A model of the same weights that remembers nothing."""
    if isinstance(model, InfformerForCausalLM):
        return InfformerForCausalLM.from_backbone(copy.deepcopy(model.backbone)).eval()
    config = copy.deepcopy(model.config)
    config.memory = None
    without = DecoderForCausalLM(config).to(model.dtype).eval()
    without.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".memory." not in name})
    return without


def tokens(rows: int = 2, length: int = SEGMENT, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def document(segments: int, rows: int = 2) -> list[Tensor]:
    return [tokens(rows, seed=seed) for seed in range(segments)]


def read(model: MemoryModel, segments: list[Tensor], state: ModelState | None = None) -> list[MemoryModelOutput]:
    """One segment after another, each with the state of the last."""
    outputs: list[MemoryModelOutput] = []
    for segment in segments:
        outputs.append(model(segment, labels=segment, state=state, return_logits=True))
        state = outputs[-1].state
    return outputs


@cache
@torch.no_grad()
def outputs_of(model: MemoryModel) -> tuple[MemoryModelOutput, ...]:
    """What a model that nobody changes makes of three segments of two rows; read once for all tests."""
    return tuple(read(model, document(3)))


def state_of(model: MemoryModel) -> ModelState:
    """Its state after them."""
    return outputs_of(model)[2].state


@cache
@torch.no_grad()
def state_of_four(model: MemoryModel) -> ModelState:
    """Its state after three segments of four rows."""
    return read(model, document(3, rows=4))[-1].state


@cache
@torch.no_grad()
def fresh_and_going_on(model: MemoryModel) -> tuple[MemoryModelOutput, MemoryModelOutput]:
    """What it makes of another segment, as a new document and after those three."""
    return model(tokens(seed=5)), model(tokens(seed=5), state=state_of(model))


@cache
@torch.no_grad()
def exact(model: MemoryModel) -> tuple[MemoryModel, tuple[MemoryModelOutput, ...]]:
    """A decoder in float64, or a wrapped model, whose memory computes in float32, as it is; and its three segments."""
    if isinstance(model, InfformerForCausalLM):
        return model, outputs_of(model)
    double = copied(model).double()
    empty = double.initial_state(2).map_tensors(lambda t: t.double() if t.is_floating_point() else t)
    return double, tuple(read(double, document(3), empty))


def agreement(model: MemoryModel) -> dict[str, float]:
    """How near figures are that were computed in another order; angles of places are float32."""
    if isinstance(model, InfformerForCausalLM):
        return {"rtol": 1e-4, "atol": 1e-5}
    return dict.fromkeys(("rtol", "atol"), 1e-10 if model.config.positions == "relative" else 1e-5)


def remembers(model: MemoryModel) -> bool:
    return bool(model.layer_memories())


def assert_same_state(one: MemoryState, other: MemoryState) -> None:
    assert one.named_tensors().keys() == other.named_tensors().keys()
    for name, tensor in one.named_tensors().items():
        assert torch.equal(tensor, other.named_tensors()[name]), name


def assert_same_row(one: MemoryState, other: MemoryState, row: int) -> None:
    index = torch.tensor([row])
    assert_same_state(one.select_rows(index), other.select_rows(index))


@pytest.mark.usefixtures("no_gradients")
class TestWhatIsAdded:
    @pytest.mark.parametrize("memory", NEW.values(), ids=NEW)
    @pytest.mark.parametrize("kind", BACKBONES)
    def test_a_new_memory_changes_no_bit_of_a_stock_models_logits(self, kind, memory):
        wrapped = new_model(kind, memory)
        stock = copy.deepcopy(wrapped.backbone)
        outputs = read(wrapped, document(5))
        for output, segment in zip(outputs, document(5), strict=True):
            expected = stock(segment, labels=segment)
            assert torch.equal(output.logits, expected.logits)
            torch.testing.assert_close(output.loss - sum(output.auxiliary_losses.values()), expected.loss)
        for before, after in zip(wrapped.initial_state(2).layers, outputs[-1].state.layers, strict=True):
            assert all(
                not torch.equal(tensor, after.named_tensors()[name]) for name, tensor in before.named_tensors().items()
            )

    def test_an_empty_memory_adds_nothing_and_a_full_one_something(self, model):
        if model.config.memory_config and getattr(model.config.memory_config, "within_segment", False):
            pytest.skip("it reads the segment as well")
        model, outputs = exact(model)
        without = without_memory(model)
        first, last = (without(segment).logits for segment in document(3)[::2])
        if isinstance(model, InfformerForCausalLM) and not model.short_term_length:  # which moves the segment's places
            assert torch.equal(outputs[0].logits, first)
        torch.testing.assert_close(outputs[0].logits, first, **agreement(model))
        if remembers(model):
            assert (outputs[2].logits - last).abs().max() > 1e-3
        else:
            assert torch.equal(outputs[2].logits, last)

    @of({name: model for name, model in WRAPPED.items() if not model[1] or adds_nothing_at_zero(model[1])})
    def test_two_models_around_one_backbone_do_not_touch_each_other(self, own):
        expected = [copy.deepcopy(own.backbone)(segment).logits for segment in document(2)]
        second = InfformerForCausalLM.from_backbone(own.backbone, own.config.memory_config, None, SEGMENT).eval()
        for parameter in second.memory_parameters():
            nn.init.zeros_(parameter)
        assert torch.equal(read(own, document(2))[1].logits, expected[1]) == (not remembers(own))
        for output, segment, logits in zip(read(second, document(2)), document(2), expected, strict=True):
            assert torch.equal(output.logits, logits)
            assert torch.equal(own.backbone(segment).logits, logits)  # the stock model on its own

    @of(MODELS, TYPICAL)
    def test_a_copy_is_a_model_of_its_own(self, model):
        duplicate, (_, before, after), segment = copy.deepcopy(model), outputs_of(model), document(3)[2]
        assert torch.equal(duplicate(segment, state=before.state).logits, after.logits)
        for parameter in duplicate.parameters():
            nn.init.zeros_(parameter)
        assert not torch.equal(duplicate(segment, state=before.state).logits, after.logits)
        assert torch.equal(model(segment, state=before.state).logits, after.logits)

    def test_a_model_says_what_it_has(self, model):
        memory = model.config.memory_config
        assert model.has_memory == remembers(model) == (memory is not None)
        assert model.segment_length == (None if memory is None else SEGMENT)
        assert model.short_term_length == (0 if memory is None else memory.short_term_length)
        assert model.positions == getattr(getattr(model.config, "backbone", None), "max_position_embeddings", None)
        assert model.vocabulary_size == VOCABULARY
        drawn = SAMPLES * getattr(memory, "sticky", False) + bool(getattr(memory, "training_rates", []))
        assert model.noise_size == drawn
        memories = {id(parameter) for parameter in model.memory_parameters()}
        named = {name for name, parameter in model.named_parameters() if id(parameter) in memories}
        assert named == {name for name, _ in model.named_parameters() if "memory." in name or "memories." in name}


@pytest.mark.usefixtures("no_gradients")
class TestRows:
    def test_rows_never_mix(self, model):
        changed = [segment.clone() for segment in document(3, rows=3)]
        for segment in changed:
            segment[1] = (segment[1] + 1) % VOCABULARY
        together = read(model, document(3, rows=3))
        for one, other in zip(together, read(model, changed), strict=True):
            assert torch.equal(one.logits[[0, 2]], other.logits[[0, 2]])
            assert not torch.equal(one.logits[1], other.logits[1])
        alone = read(model, [segment[2:] for segment in document(3, rows=3)])
        tolerance = 1e-5 if isinstance(model, InfformerForCausalLM) else 1e-4
        torch.testing.assert_close(alone[2].logits, together[2].logits[2:], rtol=1e-4, atol=tolerance)

    def test_a_reset_row_is_a_new_row_and_the_state_that_was_given_stays(self, model):
        """Row 0 begins another document; row 1 goes on."""
        before, (fresh, went_on) = state_of(model), fresh_and_going_on(model)
        given = before.map_tensors(Tensor.clone)
        reset = model(tokens(seed=5), state=before, reset=torch.tensor([True, False]))
        for row, expected in enumerate((fresh, went_on)):
            assert torch.equal(reset.logits[row], expected.logits[row])
            assert_same_row(reset.state, expected.state, row)
        assert torch.equal(fresh.logits[0], went_on.logits[0]) == (not remembers(model))
        assert_same_state(before, given)

    def test_a_row_without_its_memory_reads_as_a_new_row_and_is_written_as_always(self, model):
        """Row 0 does; row 1 reads as always. What the first layer writes depends on no reading, but through losses."""
        state, segment, (fresh, went_on) = state_of(model), tokens(seed=5), fresh_and_going_on(model)
        read_without = model(segment, state=state, without_memory=torch.tensor([True, False]))
        assert torch.equal(read_without.logits[0], fresh.logits[0])
        assert torch.equal(read_without.logits[1], went_on.logits[1])
        first = list(zip(model.layer_memories().values(), read_without.state.layers, went_on.state.layers, strict=True))
        for memory, layer, expected in first[:1]:
            assert_same_row(layer, expected, 1)
            if not memory.needs_losses:
                assert_same_state(layer, expected)
        rows = torch.tensor([True, True])
        both = model(segment, targets=segment, state=state, without_memory=rows).auxiliary_losses
        fresh = model(segment, targets=segment)
        assert both.get("divergence") == fresh.auxiliary_losses.get("divergence")
        none = model(segment, state=state, without_memory=torch.tensor([False, False]))
        assert torch.equal(none.logits, went_on.logits)
        assert_same_state(none.state, went_on.state)

    def test_no_token_sees_a_later_one(self, model):
        """What stands from one place of the second segment on is changed: another place in each row."""
        places, text, changed = (1, SEGMENT // 2, SEGMENT - 1), document(2, rows=3), document(2, rows=3)
        for row, place in enumerate(places):
            changed[1][row, place:] = (changed[1][row, place:] + 1) % VOCABULARY
        ours, theirs = read(model, text), read(model, changed)
        assert torch.equal(ours[0].logits, theirs[0].logits)
        for row, place in enumerate(places):
            assert torch.equal(ours[1].logits[row, :place], theirs[1].logits[row, :place])
            assert (ours[1].logits[row, place:] != theirs[1].logits[row, place:]).any(-1).all()

    def test_what_was_read_is_known_later_through_the_memory_alone(self, model):
        changed = [tokens(seed=7), *document(3)[1:]]
        ours, theirs = outputs_of(model), read(model, changed)
        assert torch.equal(ours[2].logits[:, 0], theirs[2].logits[:, 0]) == (not remembers(model))

    def test_padding_changes_nothing_and_a_short_segment_is_not_written(self, model):
        """A row of 4 real tokens: whatever stands behind them, and beside a whole row as on its own."""
        state, lengths = state_of(model), torch.tensor([4, SEGMENT])
        last, other_padding = tokens(seed=9), tokens(seed=9)
        other_padding[0, 4:] = (other_padding[0, 4:] + 1) % VOCABULARY
        padded, other = (
            model(segment, state=state, targets=segment, lengths=lengths, return_logits=True)
            for segment in (last, other_padding)
        )
        assert torch.equal(padded.logits[0, :4], other.logits[0, :4])
        assert torch.equal(padded.logits[1], other.logits[1])
        assert torch.equal(padded.token_losses, other.token_losses)
        assert ((padded.token_losses > 0).sum(1) == lengths).all()
        assert torch.equal(padded.loss, other.loss)
        assert_same_state(padded.state, other.state)
        masked = model(last, state=state, targets=last, attention_mask=torch.arange(SEGMENT) < lengths.unsqueeze(-1))
        assert torch.equal(masked.loss, padded.loss)

        short = model(last[:1, :4], state=state.select_rows(torch.tensor([0])), targets=last[:1, :4])
        torch.testing.assert_close(padded.token_losses[:1, :4], short.token_losses, rtol=1e-4, atol=1e-5)
        assert_same_row(padded.state, state, 0)
        ours, theirs = padded.state.named_tensors(), state.named_tensors()
        assert any(not torch.equal(tensor[1], theirs[name][1]) for name, tensor in ours.items()) == remembers(model)

    def test_an_incomplete_segment_leaves_the_state(self, model):
        state = state_of(model)
        assert_same_state(model(tokens(length=4), state=state).state, state)

    def test_a_state_goes_to_a_file_and_back_and_into_parts(self, model):
        state, empty = state_of_four(model), model.initial_state(4)
        assert list(empty.named_tensors()) == list(state.named_tensors())
        assert_same_state(empty.with_tensors(state.named_tensors()), state)
        assert_same_state(type(state).concatenate(state.split(2)), state)
        halves = [model(half, state=part) for half, part in zip(tokens(4).split(2), state.split(2), strict=True)]
        whole = model(tokens(4), state=state)
        torch.testing.assert_close(torch.cat([half.logits for half in halves]), whole.logits, rtol=1e-4, atol=1e-4)

    def test_time_is_shuffled_in_each_row_apart_and_empty_rows_stay_empty(self, model):
        before = state_of_four(model).reset_rows(torch.tensor([False, True, False, False]))
        shuffled = model.shuffle_time(before)
        assert_same_state(model.shuffle_time(before, model.time_shuffle()), shuffled)
        assert_same_row(shuffled, before, 1)
        for row in range(4):
            alone = model.shuffle_time(before.select_rows(torch.tensor([row]))).named_tensors()
            for name, tensor in shuffled.named_tensors().items():
                torch.testing.assert_close(tensor[row], alone[name][0], msg=name)
        for name, tensor in shuffled.named_tensors().items():
            knows_order = tensor.is_floating_point() and not name.endswith(("mean", "sinks", "weights"))
            assert torch.equal(tensor[0], before.named_tensors()[name][0]) != knows_order, name

    @of(REMEMBERING)
    def test_noise_matters_to_those_that_ask_for_it(self, model):
        """Half of it is none."""
        size = max(SAMPLES, model.noise_size)
        state, noise = state_of(model), torch.rand(2, size, generator=torch.Generator().manual_seed(0))
        plain, again, noisy = (
            model(tokens(seed=3), state=state, noise=chosen).state
            for chosen in (None, torch.full((2, size), 0.5), noise)
        )
        assert_same_state(plain, again)
        ours, theirs = plain.named_tensors(), noisy.named_tensors()
        same = all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert same == (model.noise_size == 0)


@pytest.mark.usefixtures("no_gradients")
class TestLosses:
    @of(MODELS, TYPICAL)
    def test_a_document_in_segments_is_scored_token_by_token(self, model):
        """Every token of a document but its first once, at its place, from the logits of the chain of segments."""
        text = torch.cat(document(3), dim=1)
        following = F.pad(text[:, 1:], (0, 1), value=IGNORE_INDEX)
        chained = torch.cat([output.logits for output in outputs_of(model)], dim=1)
        expected = F.cross_entropy(chained.flatten(0, 1), following.flatten(), reduction="none").view_as(text)
        state, found = None, []
        for segment, targets in zip(text.split(SEGMENT, dim=1), following.split(SEGMENT, dim=1), strict=True):
            output = model(segment, targets=targets, state=state)
            state = output.state
            found.append(output.token_losses)
        assert (following != IGNORE_INDEX).sum() == (expected > 0).sum() == 2 * (3 * SEGMENT - 1)
        torch.testing.assert_close(torch.cat(found, dim=1), expected)

    @of(MODELS, TYPICAL)
    def test_targets_are_labels_shifted(self, model):
        """`labels` are shifted inside and lose one at the end; `targets` are not and lose none."""
        state, segment = state_of(model), tokens(seed=9)
        by_labels = model(segment, labels=segment, state=state)
        shifted = F.pad(segment[:, 1:], (0, 1), value=IGNORE_INDEX)
        by_targets = model(segment, targets=shifted, state=state, return_logits=True)
        assert torch.equal(by_labels.token_losses, by_targets.token_losses)
        assert torch.equal(by_labels.loss, by_targets.loss)
        assert (by_labels.token_losses > 0).sum(1).tolist() == [SEGMENT - 1] * 2
        auxiliary = sum(by_labels.auxiliary_losses.values())
        torch.testing.assert_close(by_labels.loss, by_labels.token_losses[:, :-1].mean() + auxiliary)

    @of(MODELS, TYPICAL)
    def test_logits_and_losses_are_made_where_they_are_asked_for(self, model):
        plain = model(tokens())
        assert plain.loss is None
        assert model(tokens(), labels=tokens()).logits is None
        assert model(tokens(), return_logits=False).logits is None
        assert torch.equal(model(tokens(), labels=tokens(), return_logits=True).logits, plain.logits)

    @of(MODELS, TYPICAL)
    def test_what_is_padding_or_has_no_label_is_not_scored(self, model):
        segment, lengths = tokens(3), torch.tensor([SEGMENT, 4, 1])
        assert (model(segment, labels=segment, lengths=lengths).token_losses > 0).sum(1).tolist() == [5, 3, 0]
        targets = segment.masked_fill(torch.arange(SEGMENT) % 2 == 0, IGNORE_INDEX)
        output = model(segment, targets=targets)
        assert ((output.token_losses > 0) == (targets != IGNORE_INDEX)).all()
        torch.testing.assert_close(output.loss - sum(output.auxiliary_losses.values()), output.token_losses.sum() / 9)

    @of(MODELS, TYPICAL)
    def test_auxiliary_losses_have_the_same_names_in_every_segment(self, model):
        names = {tuple(output.auxiliary_losses) for output in outputs_of(model)}
        assert names == {tuple(model(tokens(length=2)).auxiliary_losses)}

    def test_auxiliary_losses_of_a_batch_are_the_mean_of_its_halves(self, model):
        """Weighted by their real tokens; some rows are new, padded or idle."""
        state = state_of_four(model).reset_rows(torch.tensor([False, True, False, False]))
        segment, lengths = tokens(4, seed=9), torch.tensor([SEGMENT, SEGMENT, SEGMENT, 0])
        whole = model(segment, targets=segment, state=state, lengths=lengths).auxiliary_losses
        halves = [
            model(half, targets=half, state=part, lengths=real).auxiliary_losses
            for half, part, real in zip(segment.split(2), state.split(2), lengths.split(2), strict=True)
        ]
        memory = model.config.memory_config
        known = {"long_term": {"divergence"}, "compressive": {"reconstruction"}}
        assert whole.keys() == halves[0].keys() == known.get(getattr(memory, "kind", ""), set())
        for name, value in whole.items():
            assert (value > 0) == (getattr(memory, "read", "") not in ("slots", "gibbs"))
            torch.testing.assert_close(value, (2 * halves[0][name] + halves[1][name]) / 3, rtol=1e-4, atol=1e-12)

    def test_intermediates_change_nothing_and_say_what_happened(self, model, own):
        state, seen = state_of(model), []

        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"], output[0] if type(output) is tuple else output))

        for module in own.modules():
            if type(module).__name__.endswith("Attention"):
                module.register_forward_hook(watch, with_kwargs=True)
        plain = own(tokens(seed=9), state=state)
        seen.clear()
        output = own(tokens(seed=9), state=state, return_intermediates=True)
        assert plain.intermediates is None
        assert torch.equal(output.logits, plain.logits)
        assert_same_state(output.state, plain.state)
        assert len(output.intermediates) == len(own.layer_memories())
        for layer, (hidden, returned) in zip(output.intermediates, seen, strict=remembers(own)):
            assert torch.equal(layer.hidden, hidden)
            context = layer.memory.context
            assert (context is not None) == own.config.memory_config.adds_to_attention
            beside = context is not None and isinstance(own, InfformerForCausalLM)
            assert torch.equal(layer.attended + context if beside else layer.attended, returned)
            assert context is None or context.abs().max() > 1e-3


class TestGradients:
    @staticmethod
    def learn(model: MemoryModel) -> tuple[Tensor, dict[str, Tensor], int]:
        """One backward pass through three segments, in which dropout draws the same numbers every time: losses,
        gradients, and how often an attention was computed."""
        torch.manual_seed(0)
        calls: list[bool] = []
        for module in model.train().modules():
            if type(module).__name__.endswith("Attention"):
                module.register_forward_hook(lambda *_: calls.append(True))
        losses = torch.stack([output.loss for output in read(model, document(3))])
        losses.sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return losses.detach(), gradients, len(calls)

    @staticmethod
    @cache
    def learned(model: MemoryModel) -> tuple[Tensor, dict[str, Tensor], int]:
        """The same of a model that stays as it is."""
        return TestGradients.learn(copied(model))

    def test_gradient_checkpointing_changes_nothing(self, model, own):
        losses, gradients, calls = self.learned(model)
        assert calls % 3 == 0 < calls
        own.checkpoint_activations()
        again, gradients_again, recomputed = self.learn(own)
        assert recomputed == 2 * calls
        assert torch.equal(losses, again)
        assert gradients.keys() == gradients_again.keys() == dict(own.named_parameters()).keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, gradients_again[name], rtol=1e-5, atol=1e-7, msg=name)
        torch.manual_seed(1)
        assert not torch.equal(own(tokens(), labels=tokens()).loss, losses[0])  # there is dropout

    def test_every_parameter_matters_a_few_segments_on(self, model):
        _, gradients, _ = self.learned(model)
        assert [name for name, gradient in gradients.items() if gradient.abs().max() < 1e-9] == []

    @of(MODELS)
    def test_every_parameter_of_a_new_model_is_used_in_its_very_first_step(self, request, model):
        """With empty memories, as data parallel training needs it."""
        shapes_what_later_segments_read = r"\.(gate|writing)\.|(memory|memories\.\d+|behind)\.convolution\."
        untrained = new_model(*MODELS[request.node.callspec.params["model"]])
        untrained(tokens(), labels=tokens()).loss.backward()
        assert [
            name
            for name, parameter in untrained.named_parameters()
            if parameter.grad is None and not re.search(shapes_what_later_segments_read, name)
        ] == []

    def test_gradients_reach_the_first_segment_through_what_no_short_term_memory_passed_on(self, own):
        """What a short-term memory keeps has no graph; what passes through one has lost it."""
        embedded: list[Tensor] = []
        first = own.vocabulary.embedding if isinstance(own, DecoderForCausalLM) else own.get_input_embeddings()
        first.register_forward_hook(lambda module, args, output: embedded.append(output))
        output = read(own, document(2))[1]
        (gradient,) = torch.autograd.grad(output.loss, embedded[0], materialize_grads=True)
        reached = remembers(own) and own.config.memory_config.entries == 0
        assert (gradient.abs().sum(-1) > 0).all() == (gradient != 0).any() == reached
        assert not any(tensor.requires_grad for tensor in output.state.detach().named_tensors().values())

    @of({name: model for name, model in REMEMBERING.items() if not model[1].entries}, TYPICAL)
    @pytest.mark.parametrize("own_loss", [False, True])
    def test_a_state_that_is_passed_on_after_its_backward_pass_is_refused(self, own, own_loss):
        def loss_of(output: MemoryModelOutput) -> Tensor:
            return output.logits.logsumexp(-1).mean() if own_loss else output.loss

        first = read(own.train(), document(1, rows=4))[0]
        loss_of(first).backward()
        changed = first.state.select_rows(torch.tensor([3, 2, 1, 0]))  # also where it was changed in between
        second = own(tokens(4), labels=tokens(4), state=changed, return_logits=True)
        with pytest.raises(UserError, match=r"output\.state\.detach\(\)"):
            loss_of(second).backward()

    @of(MODELS, TYPICAL)
    def test_a_state_is_learned_through_where_its_graph_is_there_or_detached(self, own):
        kept = read(own.train(), document(1))[0]
        kept.loss.backward(retain_graph=True)
        own(tokens(), labels=tokens(), state=kept.state).loss.backward()
        state = None
        for segment in document(2):
            output = own(segment, labels=segment, state=state)
            output.loss.backward()
            state = output.state.detach()

    def test_an_idle_row_is_left_alone(self, model, own):
        """Its state stays, nothing of it is scored, and it makes nothing that is not a number, also if it is new."""
        own.train()
        for state, lengths in itertools.product((state_of(model), own.initial_state(2)), ([0, SEGMENT], [0, 0])):
            own.zero_grad()
            segment = tokens(seed=9)
            output = own(segment, state=state, targets=segment, lengths=torch.tensor(lengths))
            output.loss.backward()
            assert (output.token_losses[0] == 0).all()
            assert output.loss.isfinite()
            assert (output.loss > 0) == (lengths[1] > 0)
            assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)
            assert_same_row(output.state, state, 0)

    def test_bfloat16_is_near_float32_and_what_is_remembered_stays_float32(self, model, own):
        """By autocast, whose gradients are numbers, and as a whole."""
        exact = outputs_of(model)[-1].logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = read(own, document(3))
        sum(output.loss for output in outputs).backward()
        assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)
        with torch.no_grad():
            rounded = read(own.to(torch.bfloat16), document(3))
        for output in (outputs[-1], rounded[-1]):
            assert output.logits.dtype == torch.bfloat16
            bound = 0.05 if isinstance(own, InfformerForCausalLM) else 0.1
            assert (output.logits - exact).norm() < bound * exact.norm()
            floating = [tensor for tensor in output.state.named_tensors().values() if tensor.is_floating_point()]
            assert all(tensor.dtype == torch.float32 for tensor in floating)


@pytest.mark.usefixtures("no_gradients")
class TestGeneration:
    def test_a_segment_in_pieces_is_read_and_written_as_the_whole_one(self, model):
        model, (*_, last) = exact(model)
        state, segment = last.state, tokens(seed=7)
        logits, cache = [], None
        for piece in segment.split([2, 1, 1, 2], dim=1):
            output = model(piece, state=state, segment_cache=cache, use_cache=True)
            logits.append(output.logits)
            cache, after = output.segment_cache, output.state
            if len(logits) < 4:
                assert_same_state(after, state)
        whole = model(segment, state=state)
        torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits, **agreement(model))
        for name, tensor in whole.state.named_tensors().items():
            torch.testing.assert_close(after.named_tensors()[name], tensor, **agreement(model))
        assert (cache is None) == remembers(model)

    @of(MODELS, TYPICAL)
    def test_what_is_kept_of_a_segment_is_a_value(self, model):
        """Two texts go on from it, of chosen rows, and neither sees the other."""
        model, (*_, last) = exact(model)
        state, segment = last.state, tokens(seed=7)
        cache = model(segment[:, :3], state=state, use_cache=True).segment_cache
        first, again = (model(segment[:, 3:], state=state, segment_cache=cache).logits for _ in range(2))
        assert torch.equal(first, again)
        rows = torch.tensor([1, 0, 1])
        other, kept = state.select_rows(rows), cache.select_rows(rows)
        chosen = model(segment[rows, 3:], state=other, segment_cache=kept).logits
        torch.testing.assert_close(chosen, first[rows], **agreement(model))

    @of(REMEMBERING, TYPICAL)
    def test_more_tokens_than_are_left_of_a_segment_are_refused(self, model):
        cache = model(tokens(length=2), use_cache=True).segment_cache
        with pytest.raises(UserError, match="7 tokens are more than the memory's segment of 6"):
            model(tokens(length=5), segment_cache=cache)

    @of(MODELS, TYPICAL)
    def test_text_is_continued_as_a_literal_loop_would(self, model):
        """Every token is the one that is drawn from the logits before it, where the whole text is read anew."""
        length, temperature = 2 * SEGMENT - 1, 0.7
        start, generator = tokens(1, length, seed=length)[0], torch.Generator().manual_seed(0)
        continued = continue_text(model, start, SEGMENT + 2, SEGMENT, temperature, generator)
        text = torch.cat([start, continued]).unsqueeze(0)
        logits = torch.cat([output.logits for output in read(model, list(text.split(SEGMENT, dim=1)))], dim=1)[0]
        generator.manual_seed(0)
        drawn = [
            torch.multinomial((before / temperature).softmax(-1), 1, generator=generator).item()
            for before in logits[length - 1 : -1]
        ]
        assert continued.tolist() == drawn

    @of(REMEMBERING, TYPICAL)
    def test_more_tokens_than_a_segment_are_refused(self, model):
        with pytest.raises(UserError, match="7 tokens are more than the memory's segment of 6: cut the text up"):
            model(tokens(length=SEGMENT + 1))


@pytest.mark.usefixtures("no_gradients")
class TestSaving:
    @of(MODELS, TYPICAL)
    def test_what_is_loaded_is_what_was_saved(self, model, tmp_path, assert_same_model):
        model.save_pretrained(tmp_path)
        assert_same_model(model, AutoModelForCausalLM.from_pretrained(tmp_path), document(3))

    @of(REMEMBERING, TYPICAL)
    def test_a_stored_memory_is_all_of_it_and_has_no_unknown_option(self, model, tmp_path):
        """Defaults are written too: another version's defaults do not change a model."""
        memory = model.config.memory_config
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["memory"] == {"kind": memory.kind, **vars(memory)}
        config["memory"]["stickiness"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"config\.json.*stickiness"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    @of(REMEMBERING, TYPICAL)
    @pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
    def test_reentrant_checkpointing_is_refused(self, own):
        """It runs the first forward pass without a graph: the memory would lose its gradient and nobody would know."""
        with pytest.raises(UserError, match="use_reentrant"):
            own.gradient_checkpointing_enable({"use_reentrant": True})


@of({name: model for name, model in MODELS.items() if isinstance(model[1], LossMeanConfig)})
def test_a_memory_is_told_what_its_tokens_were_worth_when_they_are_written(own, monkeypatch):
    """Losses within the segment; those of what leaves a short-term memory are of the segment in which it was read."""
    told: list[Tensor] = []
    literal = LossMean.write_by_losses

    def write(memory: LossMean, state: MeanState, pending: Any, losses: Tensor) -> MeanState:
        told.append(losses)
        return literal(memory, state, pending, losses)

    monkeypatch.setattr(LossMean, "write_by_losses", write)
    expected = [torch.zeros(2, SEGMENT)] * (own.short_term_length // SEGMENT)
    for output, segment in zip(read(own, document(3)), document(3), strict=True):
        losses = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), segment[:, 1:].flatten(), reduction="none")
        losses = losses.view(2, -1)
        expected.append(torch.cat([losses.mean(1, keepdim=True), losses], dim=1))
    found = told[:: len(own.layer_memories())]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected[:3]))


def test_a_memory_is_the_same_beside_a_pretrained_model_and_in_the_decoder(monkeypatch):
    monkeypatch.chdir(ROOT)
    memory, segment_length = RunningMeanConfig(short_term_length=0), 64
    wrapped = InfformerForCausalLM.from_backbone("infformer/checkpoints/tiny", memory, segment_length=segment_length)
    sizes = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = DecoderForCausalLM(DecoderConfig(**sizes, memory=memory, segment_length=segment_length))

    for model in (wrapped, decoder):
        state = None
        for segment in torch.randint(4096, (1, 256)).split(segment_length, dim=1):
            output = model(segment, labels=segment, state=state)
            state = output.state
        assert output.loss.isfinite()
        assert all(isinstance(layer, MeanState) and layer.segments == 4 for layer in state.layers)


@pytest.mark.parametrize("model", ["tiny", "decoder"])
def test_a_memory_of_ones_own_is_chosen_by_one_word(add_choice, model):
    add_choice("model/memory", "running_mean", OmegaConf.structured(RunningMeanConfig))
    config = compose("train", RunConfig, CONF, [f"model={model}", "model/memory=running_mean"])
    assert config.model.memory == RunningMeanConfig()


@pytest.mark.parametrize("kind", ["wrapped", "decoder"])
def test_a_memory_of_thirty_lines_is_trained_resumed_measured_inspected_saved_and_generates(
    configure, train, model_folder, tmp_path, kind
):
    """By its options in `model.memory`; its run that was stopped goes on as if it had not been."""
    changes = {"schedule.name": "constant", "training.checkpoint_every": 2, "training.evaluate_every": 4}
    if kind == "decoder":
        architecture = {"model_type": "decoder", "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
        changes |= {"model.pretrained": None, "model.architecture": architecture, "model.tokenizer": str(model_folder)}
    changes |= {"model.memory": RunningMeanConfig(0 if kind == "wrapped" else 16)}
    measured = {"training.max_steps": 4, "evaluation.controls": True, "evaluation.inspected_segments": 4}
    results = train(configure(tmp_path / "whole", {**changes, **measured}))
    assert results["nll"] < results["before"]["nll"]
    assert results["protocol"]["memory"]["kind"] == "running_mean"
    controls = results["controls"]
    assert controls.keys() == {"memory_off", "memory_of_another_document", "memory_shuffled_in_time"}
    assert controls["memory_off"]["nll"] != results["nll"] != controls["memory_of_another_document"]["nll"]
    assert (controls["memory_shuffled_in_time"]["nll"] == results["nll"]) == (kind == "wrapped")  # no short-term memory

    train(configure(tmp_path / "stopped", {**changes, "training.max_steps": 2}))
    again = train(configure(tmp_path / "stopped", {**changes, "training.max_steps": 4, "resume": "auto"}))
    assert again["nll"] == results["nll"]
    folders = [tmp_path / run / "checkpoints" / "step-00000004" for run in ("whole", "stopped")]
    whole, stopped = (
        {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
        for folder in folders
    )
    assert any("mean" in name for file in whole.values() for name in file)
    for name, tensors in whole.items():
        assert all(torch.equal(tensor, stopped[name][key]) for key, tensor in tensors.items()), name

    model = AutoModelForCausalLM.from_pretrained(folders[0] / "model")
    assert isinstance(model.config.memory_config, RunningMeanConfig)
    written = next(model.memory_parameters())
    assert written.abs().max() > 0
    assert len(continue_text(model, torch.arange(1, 20), 20, 16)) == 20

    inspection = json.loads((tmp_path / "whole" / "inspection" / "inspection.json").read_text())
    reading = inspection["reading"]
    assert inspection["memory"]["kind"] == "running_mean"
    assert reading["nats"] != reading["nats_without_memory"]
    assert min(min(row) for row in reading["contribution"]) > 0
    assert [len(stretch["pieces"]) > 0 for stretch in inspection["stretches"]] == [True, True]
    pictures = {path.stem for path in (tmp_path / "whole" / "inspection").glob("*.png")}
    assert pictures == {"losses", "contribution"}
    assert "the kind running_mean" in (tmp_path / "whole" / "inspection" / "index.html").read_text()
