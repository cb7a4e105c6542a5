"""A model grows in six sizes and says what it said: weights, memories in the middle of a text, Adam's moments."""

import itertools
import math
from random import Random

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from infformer.errors import ModelError
from infformer.memory.cache import CacheConfig
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.expansion import EXPANSIONS, expand, expand_model, expansions
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 4
SIZES = {
    "feed_forward_size": 19,
    "num_attention_heads": 3,
    "head_size": 7,
    "key_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 5,
}
LONG = {"basis_functions": 8, "past_samples": 16}
MEMORIES = {
    "none": None,
    "short-term": MemoryConfig(SEGMENT),
    "cache": CacheConfig(length=6),
    "long-term": LongTermMemoryConfig(0, **LONG),
    "behind": LongTermMemoryConfig(SEGMENT, read="gibbs", input_gate=True, **LONG),
    "sticky": LongTermMemoryConfig(0, sticky=True, sticky_by="both", **LONG),
    "dyadic": LongTermMemoryConfig(0, contraction="dyadic", levels=2, read="slots", basis_functions=8),
    "keys-values": LongTermMemoryConfig(0, stores="keys_values", read="moments", key_convolution=2, **LONG),
    "joint": LongTermMemoryConfig(
        SEGMENT, stores="keys_values", read="slots", combination="joint", key_convolution=3, **LONG
    ),
    "compressive": CompressiveMemoryConfig(SEGMENT, length=3, rate=2),
    "most-used": CompressiveMemoryConfig(SEGMENT, length=3, rate=2, function="most_used"),
    "fast-weights": FastWeightMemoryConfig(0, features="dpfp"),
    "fast-within": FastWeightMemoryConfig(within_segment=True, features="elu"),
    "fast-by-loss": FastWeightMemoryConfig(SEGMENT, strength="loss", rule="sum"),
}

NORMED_BOTH_WAYS = ("long-term", "joint", "compressive", "fast-within")


def randomize(model: MemoryModel) -> MemoryModel:
    """Every weight matters, in double precision."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    return model.eval().double()


def decoder(memory: MemoryConfig | None = None, **options: object) -> DecoderForCausalLM:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_size": 4,
        "feed_forward_size": 10,
        "activation": "gelu",
        "normalization": "rms",
        "normalization_placement": "pre",
        "dropout": 0.0,
    }
    return randomize(
        DecoderForCausalLM(DecoderConfig(**{**sizes, "memory": memory, "segment_length": SEGMENT, **options}))
    )


def wrapped(memory: MemoryConfig | None = None, tied: bool = False, kind: str = "llama", **options) -> MemoryModel:
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 10,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    if kind == "llama":
        backbone = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    else:
        backbone = Qwen2ForCausalLM(Qwen2Config(**sizes))
    return randomize(InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT, **options))


@torch.no_grad()
def read(model: MemoryModel, numbers: range, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
    """Logits of some segments of one text, and the state after them."""
    if state is None:
        state = model.initial_state(2)
        state = state.map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    logits = []
    for number in numbers:
        tokens = torch.randint(0, 20, (2, SEGMENT), generator=torch.Generator().manual_seed(number))
        output = model(tokens, state=state)
        logits.append(output.logits)
        state = output.state
    return torch.cat(logits, dim=1), state


def distance(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs().max() / one.abs().max()).detach())


def assert_grows(model: MemoryModel, sizes: dict[str, int], bound: float = 1e-12) -> MemoryModel:
    """From the beginning of a text and from its middle, the larger model says what the smaller says."""
    larger = expand_model(model, **sizes)
    expected, middle = read(model, range(3))
    assert distance(expected, read(larger, range(3))[0]) <= bound
    grown = middle
    for expansion in expansions(model.config, **sizes):
        grown = expansion.state(grown)
    empty = larger.initial_state(2).named_tensors()
    assert {name: tensor.shape for name, tensor in grown.named_tensors().items()} == {
        name: tensor.shape for name, tensor in empty.items()
    }
    assert distance(read(model, range(3, 6), middle)[0], read(larger, range(3, 6), grown)[0]) <= bound
    return larger


@pytest.mark.parametrize("size", EXPANSIONS)
@pytest.mark.parametrize(
    ("normalization", "positions"),
    [
        ("rms", "rotary"),
        ("layer", "relative"),
        pytest.param("rms", "relative", marks=pytest.mark.slow),
        pytest.param("layer", "rotary", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_grows_in_each_size(size, normalization, positions):
    model = decoder(MemoryConfig(SEGMENT), normalization=normalization, positions=positions)
    larger = assert_grows(model, {size: SIZES[size]})
    assert getattr(larger.config, size) == SIZES[size]


@pytest.mark.parametrize("normalization", ["rms", "layer"])
@pytest.mark.parametrize("placement", ["post", "dual"])
def test_all_but_layers_grow_with_norms_behind_the_sum(placement, normalization):
    model = decoder(MemoryConfig(SEGMENT), normalization=normalization, normalization_placement=placement)
    assert_grows(model, {name: size for name, size in SIZES.items() if name != "num_hidden_layers"})
    with pytest.raises(ModelError, match=rf"num_hidden_layers=5: with .*normalization_placement={placement}"):
        expand_model(model, num_hidden_layers=5)


@pytest.mark.parametrize(
    ("memory", "normalization"),
    [
        *((memory, "rms") for memory in MEMORIES),
        *((memory, "layer") for memory in NORMED_BOTH_WAYS),
        *(
            pytest.param(memory, "layer", marks=pytest.mark.slow)
            for memory in MEMORIES
            if memory not in NORMED_BOTH_WAYS
        ),
    ],
)
def test_every_memory_grows_in_the_middle_of_a_text(memory, normalization):
    sizes = dict(SIZES)
    if memory == "most-used":
        del sizes["num_attention_heads"]
    if memory in ("keys-values", "joint"):
        sizes["head_size"] = sizes["key_size"]
    assert_grows(decoder(MEMORIES[memory], normalization=normalization, positions="rotary"), sizes)


NAMES = list(SIZES)
ORDERS = [[NAMES[(first + step) % 6] for step in (0, 1, 5, 2, 4, 3)] for first in range(6)]
"""Each size stands once at each place, and once right behind each other one."""
OTHER_ORDERS = Random(0).sample(list(itertools.permutations(SIZES)), 40)


@pytest.mark.parametrize(
    "order", [*ORDERS, *(pytest.param(order, marks=pytest.mark.slow) for order in OTHER_ORDERS)], ids="-".join
)
def test_the_six_grow_in_any_order(order):
    model = decoder(MEMORIES["behind"], positions="rotary")
    assert_grows(model, {name: SIZES[name] for name in order})


def test_single_precision_is_kept_to_single_precision():
    double = decoder(MEMORIES["long-term"])
    single = decoder(MEMORIES["long-term"]).float()
    larger = expand_model(single, **SIZES)
    tokens = torch.randint(0, 20, (2, SEGMENT), generator=torch.Generator().manual_seed(0))
    assert distance(single(tokens).logits, larger(tokens).logits) <= 1e-5
    assert distance(double(tokens).logits, larger.double()(tokens).logits) <= 1e-5


@pytest.fixture
def norms_in_double_precision(monkeypatch):
    """Those of transformers compute in single precision, whatever they are given."""

    def forward(norm: nn.Module, hidden: Tensor) -> Tensor:
        return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    for kind in (LlamaRMSNorm, Qwen2RMSNorm):
        monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.usefixtures("norms_in_double_precision")
@pytest.mark.parametrize(
    ("memory", "tied", "kind"),
    [
        ("none", False, "llama"),
        ("none", True, "llama"),
        ("none", False, "qwen2"),
        ("long-term", True, "llama"),
        ("fast-weights", False, "llama"),
    ],
)
def test_a_model_that_is_shaped_as_llama_grows(memory, tied, kind):
    sizes = {"num_attention_heads": 6, "head_size": 6, "hidden_size": 14 if memory == "none" else 16}
    sizes |= {"num_hidden_layers": 3, "feed_forward_size": 17}
    larger = assert_grows(wrapped(MEMORIES[memory], tied, kind), sizes)
    assert larger.config.backbone.num_key_value_heads == 3


@pytest.mark.parametrize("memory", ["short-term", "behind", "keys-values", "joint"])
def test_a_model_whose_memory_turns_keys_back_in_single_precision_grows_to_that(memory):
    sizes = {"head_size": 6, "num_attention_heads": 6, "hidden_size": 16, "num_hidden_layers": 3}
    assert_grows(wrapped(MEMORIES[memory]), sizes, 1e-5)


@pytest.mark.usefixtures("norms_in_double_precision")
def test_new_layers_of_a_model_whose_memory_stands_in_some_have_what_the_layer_after_them_has():
    larger = assert_grows(wrapped(MEMORIES["long-term"], memory_layers=[1]), {"num_hidden_layers": 4})
    assert larger.config.memory_layers == [2, 3]


@pytest.mark.usefixtures("norms_in_double_precision")
@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 4}, {"hidden_size": 16}, {"num_attention_heads": 8}], ids=str)
@pytest.mark.parametrize("memory", ["behind", "short-term"])
def test_a_short_term_memory_stands_in_layers_too_that_have_no_other(memory, sizes):
    assert_grows(wrapped(MEMORIES[memory], memory_layers=[1]), sizes, 1e-5)


@pytest.mark.usefixtures("norms_in_double_precision")
def test_layers_may_be_named_in_any_order():
    for memory in (CacheConfig(length=SEGMENT), MEMORIES["long-term"]):
        assert_grows(wrapped(memory, memory_layers=[1, 0]), {"num_hidden_layers": 4}, 1e-5)


@pytest.mark.usefixtures("norms_in_double_precision")
def test_a_stock_model_grows_by_its_configuration_and_its_weights():
    stock = wrapped().backbone
    config, weights = expand(stock.config, stock.state_dict(), hidden_size=12, head_size=4)
    larger = LlamaForCausalLM(config).double().eval()
    larger.load_state_dict(weights)
    tokens = torch.arange(6)[None]
    assert distance(stock(tokens).logits, larger(tokens).logits) <= 1e-12


def test_an_adaptive_vocabulary_grows_with_its_bands():
    for normalization in ("rms", "layer"):
        assert_grows(decoder(normalization=normalization, adaptive_cutoffs=[6, 12], adaptive_divisor=2.0), SIZES)


def test_the_weights_that_were_given_stay_as_they_were():
    model = decoder(MEMORIES["behind"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    expand_model(model, **SIZES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_dict() == config


def test_the_same_seed_makes_the_same_model_and_another_another():
    model = decoder()
    first, same, other = (expand_model(model, seed, hidden_size=16).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("memory", "normalization"), [("none", "rms"), ("long-term", "layer"), ("fast-within", "rms")])
def test_all_that_is_new_learns_within_a_few_steps(memory, normalization):
    model = decoder(MEMORIES[memory], normalization=normalization)
    larger = expand_model(model, **SIZES).train()
    before = {name: tensor.clone() for name, tensor in larger.named_parameters()}
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.05)
    for _ in range(3):
        state = None
        loss = torch.zeros((), dtype=torch.float64)
        for number in range(3):
            tokens = torch.randint(0, 20, (2, SEGMENT), generator=torch.Generator().manual_seed(number))
            output = larger(tokens, state=state, targets=tokens.roll(-1, 1))
            loss, state = loss + output.loss, output.state
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in larger.named_parameters():
        if "distance" in name or "convolution" in name:
            continue  # in a short text some distances, and tokens before the first, are never seen
        assert bool((tensor != before[name]).any()), name
    hidden = (
        dict(larger.named_parameters())["layers.0.attention.query.weight"] != before["layers.0.attention.query.weight"]
    )
    assert bool(hidden.any(0).all())


def gradients(model: MemoryModel) -> dict[str, Tensor]:
    model.zero_grad()
    tokens = torch.randint(0, 20, (2, SEGMENT), generator=torch.Generator().manual_seed(0))
    model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("size", EXPANSIONS)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_moments_are_those_of_the_gradients_of_the_larger_model(size, placement):
    if (size, placement) == ("num_hidden_layers", "post"):
        return
    model = decoder(MemoryConfig(SEGMENT), normalization_placement=placement)
    old = gradients(model)
    moments = {}
    for name, gradient in old.items():
        parts = {"exp_avg": gradient, "exp_avg_sq": gradient.square(), "step": torch.tensor(3.0)}
        moments |= {f"{name}.{kind}": tensor for kind, tensor in parts.items()}
    (expansion,) = expansions(model.config, **{size: SIZES[size]})
    grown = expansion.moments(moments)
    new = gradients(expand_model(model, **{size: SIZES[size]}))
    assert {name.removesuffix(".step") for name in grown if name.endswith(".step")} == new.keys()
    for name, gradient in new.items():
        mean, square = grown[f"{name}.exp_avg"], grown[f"{name}.exp_avg_sq"]
        assert mean.shape == square.shape == gradient.shape
        carried = mean != 0
        assert distance(torch.where(carried, gradient, 0) + 1e-300, mean + 1e-300) <= 1e-9, name
        assert distance(mean.square() + 1e-300, square + 1e-300) <= 1e-9, name
        assert grown[f"{name}.step"] == 3
    carried = sum(int((tensor != 0).sum()) for name, tensor in grown.items() if name.endswith(".exp_avg"))
    assert carried == sum(int((gradient != 0).sum()) for gradient in old.values())


def test_training_goes_on_across_growths_without_a_jump_of_the_loss():
    """With moments and state: each step after a growth is as near to the one before it as its neighbours are."""
    model, moments, losses = decoder(MEMORIES["long-term"]).train(), {}, []
    state: ModelState | None = None
    growths = {8: {"hidden_size": 16}, 12: {"num_hidden_layers": 3}, 16: {"num_attention_heads": 3, "key_size": 6}}
    for step in range(24):
        if step in growths:
            weights = model.state_dict()
            for expansion in expansions(model.config, **growths[step]):
                weights, moments = expansion.weights(weights), expansion.moments(moments)
                state = expansion.state(state)
            model = DecoderForCausalLM(expansion.after).double().train()
            model.load_state_dict(weights)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for name, parameter in model.named_parameters():
            kinds = ("step", "exp_avg", "exp_avg_sq") if moments else ()
            optimizer.state[parameter] |= {kind: moments[f"{name}.{kind}"] for kind in kinds}
        tokens = torch.arange(2 * SEGMENT).view(2, SEGMENT) + step % 2
        output = model(tokens, state=state, targets=tokens + 1)
        output.loss.backward()
        optimizer.step()
        state = output.state.detach()
        losses.append(float(output.token_losses.detach().mean()))
        named = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
        moments = {f"{name}.{kind}": tensor for name, own in named.items() for kind, tensor in own.items()}
    changes = torch.tensor(losses[4:]).diff().abs()
    for step in growths:
        neighbours = [change for place, change in enumerate(changes.tolist(), start=5) if place not in growths]
        assert changes[step - 5] <= max(neighbours), losses
    assert losses[-1] < losses[0]


def test_moments_of_a_repeated_stream_are_shared_among_its_copies():
    model = decoder(normalization="layer")
    (expansion,) = expansions(model.config, hidden_size=16)
    weight = model.state_dict()["layers.0.attention.output.weight"]
    grown = expansion.moments({"layers.0.attention.output.weight.exp_avg": weight})
    half = grown["layers.0.attention.output.weight.exp_avg"]
    assert torch.equal(half, torch.cat([weight, weight]) / 2)


@pytest.mark.parametrize(
    ("options", "sizes", "message"),
    [
        ({}, {"hidden_size": 8}, "hidden_size=8: the model has 8, and it can only become larger"),
        ({}, {"num_hidden_layers": 1}, "num_hidden_layers=1: the model has 2"),
        ({}, {"width": 9}, "width=9: there is no such size; what grows is feed_forward_size"),
        ({"normalization": "layer"}, {"hidden_size": 12}, "hidden_size=12: LayerNorm takes the mean of the whole"),
        ({"positions": "relative"}, {"hidden_size": 12}, "hidden_size=12: the sinusoids of relative positions"),
        ({}, {"key_size": 6}, "key_size=6: the frequencies of rotary positions follow from the width"),
        ({"attention": "fast_weight"}, {"key_size": 8}, "model.architecture.attention=fast_weight: models grow whose"),
        ({"memory": MEMORIES["most-used"]}, {"num_attention_heads": 3}, "model.memory.function=most_used keeps what"),
        ({"memory": MEMORIES["long-term"]}, {"hidden_size": 11}, "the 2 heads of the long-term memory divide it"),
        ({"memory": MEMORIES["fast-weights"]}, {"hidden_size": 10}, "fast weights get more heads, each 4 wide"),
        ({"memory": MEMORIES["keys-values"]}, {"key_size": 8}, "key_size=8: model.memory.stores=keys_values"),
        (
            {"memory": LongTermMemoryConfig(0, stores="keys_values", sticky=True, **LONG)},
            {"num_attention_heads": 3},
            "num_attention_heads=3: a sticky memory of keys and values gives room by where all heads look",
        ),
    ],
)
def test_what_cannot_grow_says_why(options, sizes, message):
    model = decoder(**{"positions": "rotary", **options})
    with pytest.raises(ModelError) as error:
        expand_model(model, **sizes)
    assert message in str(error.value)


def test_a_stock_model_says_why_it_cannot_grow(backbone):
    for model, sizes, message in (
        (wrapped(), {"num_attention_heads": 5}, "each head of keys and values has 2 of queries"),
        (wrapped(), {"key_size": 4}, "key_size=4: a 'llama' has one width for queries, keys and values; set head_size"),
        (backbone, {"hidden_size": 32}, "a 'gpt2' does not grow: only our own decoder, and models that are shaped as"),
    ):
        with pytest.raises(ModelError) as error:
            expand_model(model, **sizes)
        assert message in str(error.value)


def test_scores_of_wider_keys_are_divided_by_the_width_of_keys():
    model = expand_model(decoder(positions="rotary"), key_size=8)
    old = decoder(positions="rotary").state_dict()["layers.0.attention.key.weight"].norm()
    assert math.isclose(float(model.state_dict()["layers.0.attention.key.weight"].norm() / old), math.sqrt(2))
