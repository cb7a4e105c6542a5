"""Keys and values in a long-term memory: what is told to it, what is kept, and how it is read."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from infformer.config import OptimizerConfig
from infformer.continuous import naive
from infformer.errors import UserError
from infformer.memory.key_value_signal import KeyValueSignal
from infformer.memory.long_term import LongTermState
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.memory import KeyValues, LayerHeads, SegmentContext
from infformer.memory.signal import ContinuousSignal
from infformer.models.decoder import DecoderConfig
from infformer.models.listening import Ear
from infformer.models.pretrained import InfformerForCausalLM
from infformer.training.optimization import make_optimizer

HEADS, SHARED, HEAD, LENGTH = 6, 2, 4, 12
READS = {
    "affine": {"read": "affine"},
    "moments": {"read": "moments", "density": "truncated_parabola"},
    "slots": {"read": "slots"},
    "gibbs": {"read": "gibbs", "sharpness": 2.0, "points": 19},
    "joint slots": {"read": "slots", "combination": "joint"},
    "joint gibbs": {"read": "gibbs", "combination": "joint"},
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(**options) -> KeyValueSignal:
    config = LongTermMemoryConfig(
        basis_functions=16, past_samples=20, widths=[0.03, 0.08], stores="keys_values", **options
    )
    signal = ContinuousSignal(config, LENGTH).double()
    signal.reset_parameters()
    memory = KeyValueSignal(config, HEADS, (SHARED, HEAD), signal).double()
    for seed, parameter in enumerate(memory.parameters()):
        parameter.data = random(*parameter.shape, seed=seed)
    return memory


def literal_read(
    memory: KeyValueSignal, queries: Tensor, coefficients: Tensor, attended: Tensor, sums: Tensor
) -> Tensor:
    """Head by head, [batch, heads, queries, head]; the literal equations with keys for the coefficients."""
    config = memory.config
    grid = torch.linspace(0, 1, 8, dtype=torch.float64)
    basis = torch.tensor([(c, w) for c in grid for w in config.widths], dtype=torch.float64).unbind(dim=1)
    points = torch.linspace(0, 1, config.points or 16, dtype=torch.float64)
    identity = naive.Weights(*[torch.eye(HEAD, dtype=torch.float64)] * 4)
    heights = naive.normal_density(basis[0], basis[0], basis[1] ** 2).unsqueeze(-1)
    found = []
    for head in range(HEADS):
        first = head // (HEADS // SHARED) * HEAD
        keys = coefficients[..., first : first + HEAD]
        values = coefficients[..., SHARED * HEAD + first : SHARED * HEAD + first + HEAD]
        key_points, value_points = (naive.evaluate(points, basis) @ part for part in (keys, values))
        if config.read == "affine":
            score = naive.scores(queries[:, head], keys, identity.query, identity.key, 1)[:, 0]
            mean, variance = (score @ weight for weight in memory.placement.weight)
            variance = nn.functional.softplus(variance).clamp(min=1e-4)
            read = naive.gaussian_expectation(torch.sigmoid(mean), variance, basis) @ values
        elif config.read == "moments":
            _, mean, variance = naive.moments_read(queries[:, head], heights * keys, identity, 1, basis)
            read = (naive.truncated_parabola_expectation(mean, variance, basis) @ values.unsqueeze(1))[:, 0]
        elif config.read == "slots":
            score = naive.scores(queries[:, head], heights * keys, identity.query, identity.key, 1)[:, 0]
            read, total = score.softmax(-1) @ (heights * values), score.exp().sum(-1)
        else:
            score = naive.scores(queries[:, head], key_points, identity.query, identity.key, 1)[:, 0] * config.sharpness
            density = score.exp() / torch.trapezoid(score.exp(), points)[..., None]
            read = torch.trapezoid(density[..., None] * value_points[:, None], points, dim=-2)
            total = score.exp().sum(-1)
        gate = memory.gate[head]
        if config.combination == "gates":
            found.append(torch.tanh(gate) * read)
        else:
            mass = total.log().exp() * gate.exp()
            share = mass / (mass + sums[:, head].exp())
            found.append(share[..., None] * (read - attended[:, head]))
    return torch.stack(found, dim=1)


class TestRead:
    @pytest.mark.parametrize("options", READS.values(), ids=READS)
    def test_outputs_and_gradients_are_those_of_the_literal_equations(self, options):
        memory = build(**options)
        coefficients = (random(2, 16, 2 * SHARED * HEAD) * 0.3).requires_grad_()
        queries = random(2, HEADS, 5, HEAD, seed=1).requires_grad_()
        attended, sums = random(2, HEADS, 5, HEAD, seed=2), random(2, HEADS, 5, seed=3)
        heads = LayerHeads(queries, lambda joined: joined, lambda: (attended, sums))
        state = LongTermState(coefficients, torch.tensor([1, 4]))
        context = SegmentContext(None, heads=heads)
        output = memory(random(2, 5, 3), state, context, None)
        expected = literal_read(memory, queries, coefficients, attended, sums)
        torch.testing.assert_close(output.context, expected, rtol=1e-10, atol=1e-10)
        inputs = [queries, coefficients, *memory.parameters()]
        weights = random(*expected.shape, seed=4)
        for one, other in zip(
            torch.autograd.grad((output.context * weights).sum(), inputs),
            torch.autograd.grad((expected * weights).sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("options", READS.values(), ids=READS)
    def test_an_empty_row_adds_exactly_nothing(self, options):
        memory = build(**options)
        heads = LayerHeads(
            random(2, HEADS, 5, HEAD),
            lambda joined: joined,
            lambda: (random(2, HEADS, 5, HEAD), random(2, HEADS, 5)),
        )
        state = memory.initial_state(2)
        assert (memory(random(2, 5, 3), state, SegmentContext(None, heads=heads), None).context == 0).all()

    def test_a_joint_softmax_is_attention_on_slots_and_segment_together(self):
        """What a function adds to the signal at its own centre is one more key and value."""
        memory = build(read="slots", combination="joint")
        memory.gate.data.fill_(0)
        height = (1 / (math.sqrt(2 * math.pi) * memory.signal.widths)).unsqueeze(-1)
        pair = KeyValues(random(1, HEADS, 16, HEAD, seed=1), random(1, HEADS, 16, HEAD, seed=2))
        memory.shape = (HEADS, HEAD)
        keys, values = (part.transpose(1, 2).flatten(2) for part in pair)
        state = LongTermState(torch.cat([keys, values], dim=-1) / height, torch.tensor([1]))
        queries, own = random(1, HEADS, 5, HEAD, seed=3), KeyValues(*random(2, 1, HEADS, 7, HEAD, seed=4))
        scores = queries @ own.keys.mT / 2
        attended = scores.softmax(-1) @ own.values
        heads = LayerHeads(queries, lambda joined: joined, lambda: (attended, scores.logsumexp(-1)))
        added = memory(random(1, 5, 3), state, SegmentContext(None, heads=heads), None).context
        together = [torch.cat(parts, dim=2) for parts in zip(pair, own, strict=True)]
        expected = nn.functional.scaled_dot_product_attention(queries, *together)
        torch.testing.assert_close(attended + added, expected, rtol=1e-12, atol=1e-12)


BACKBONES = {
    "llama": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 6},
    "gpt2": {},
    "gpt_neox": {"rotary_pct": 0.5},
    "phi3": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 5},
    "doge": {"num_key_value_heads": 2},
}


NOT_THERE = ("gemma2", "sdpa")  # whose scores are capped


def backbone(kind: str, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=40, hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0, **BACKBONES[kind],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def wrapped(stock: nn.Module, **options) -> InfformerForCausalLM:
    memory = LongTermMemoryConfig(basis_functions=8, past_samples=16, stores="keys_values", **options)
    return InfformerForCausalLM.from_backbone(copy.deepcopy(stock), memory, segment_length=LENGTH).eval()


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.usefixtures("no_gradients")
@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, attention) for kind in BACKBONES for attention in ("sdpa", "eager") if (kind, attention) != NOT_THERE],
)
class TestBesideAPretrainedModel:
    def test_what_a_memory_is_told_makes_the_stock_attention_whole(self, kind, attention, monkeypatch):
        """Its heads through its output are what attention returned but for a bias, and their sums those of scores."""
        model, told = wrapped(backbone(kind, attention)), []

        def keep(self, hidden, state, context, shared):
            told.append(context)
            return forward(self, hidden, state, context, shared)

        forward = KeyValueSignal.forward
        monkeypatch.setattr(KeyValueSignal, "forward", keep)
        text = torch.randint(40, (2, LENGTH), generator=torch.Generator().manual_seed(0))
        layers = model(text, return_intermediates=True).intermediates
        for context, layer in zip(told, layers, strict=True):
            heads, pair = context.heads, context.key_values
            attended, sums = heads.attended()
            joined = heads.output(attended)
            rest = layer.attended - joined
            torch.testing.assert_close(rest, rest[:1, :1].expand_as(rest), rtol=1e-4, atol=1e-5)
            # The first token sees itself alone, and at equal places no rotation changes a score.
            shared = heads.queries.shape[1] // pair.keys.shape[1]
            own = (heads.queries[:, :, 0] * pair.keys[:, :, 0].repeat_interleave(shared, dim=1)).sum(-1)
            own = own / heads.queries.shape[-1] ** 0.5
            if kind == "gemma2":
                own = 50 * torch.tanh(own / 50)
            if kind == "doge":
                own = own + 1  # which its mask adds for every key, until it has learned
            torch.testing.assert_close(sums[:, :, 0], own, rtol=1e-4, atol=1e-4)
            values = pair.values.repeat_interleave(shared, dim=1)
            torch.testing.assert_close(attended[:, :, 0], values[:, :, 0], rtol=1e-4, atol=1e-5)

    def test_a_new_memory_changes_no_bit_and_a_trained_one_something(self, kind, attention):
        stock = backbone(kind, attention)
        model, text = wrapped(stock, read="gibbs"), torch.randint(40, (2, LENGTH))
        state = model(text).state
        assert torch.equal(model(text, state=state).logits, stock(text).logits)
        for memory in model.memories:
            memory.gate.data.fill_(1)
        assert not torch.equal(model(text, state=state).logits, stock(text).logits)
        assert model.backbone.config._attn_implementation == attention
        assert torch.equal(model.backbone(text).logits, stock(text).logits)


@pytest.mark.usefixtures("no_gradients")
def test_keys_and_queries_of_a_llama_are_those_before_its_rotation():
    stock = backbone("llama")
    model = wrapped(stock, read="slots", combination="joint")
    seen: dict[str, Tensor] = {}
    attention = model.backbone.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    text = torch.randint(40, (2, LENGTH))
    reading = model(text, return_intermediates=True).intermediates[0].memory.reading
    expected = torch.cat([seen["k_proj"], seen["v_proj"]], dim=-1)
    torch.testing.assert_close(reading.written, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_kernel_that_is_told_of_padding_alone_is_causal_and_keeps_its_window(window):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=generator, dtype=torch.float64)
    real = torch.arange(6) >= torch.tensor([[0], [2]])
    places = torch.arange(6)
    seen = (places <= places[:, None]) & (places > places[:, None] - (window or 6)) & real[:, None, None]
    ear = Ear(backbone("llama").model.layers[0].self_attn)
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
    ear.heard = query, key, value, real.long(), {"sliding_window": window}, attended.transpose(1, 2)
    heads, _ = ear.heads(None, None, 0)
    _, sums = heads.attended()
    expected = (query @ key.mT / 8**0.5).masked_fill(~seen, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(sums[real[:, None].expand_as(sums)], expected[real[:, None].expand_as(sums)].float())


def test_the_learned_scores_of_nothing_count_in_the_sum_of_scores_as_in_what_was_read():
    """As GPT-OSS has them, whose attention may look at nothing."""
    query, key, value = torch.randn(3, 2, 4, 6, 8)
    sinks = torch.randn(4)
    ear = Ear(backbone("llama").model.layers[0].self_attn)
    scores = torch.cat([query @ key.mT / 8**0.5, sinks.view(-1, 1, 1).expand(2, -1, 6, 1)], dim=-1)
    attended = scores.softmax(-1)[..., :-1] @ value
    everything = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    ear.heard = query, key, value, everything, {"s_aux": sinks}, attended.transpose(1, 2)
    heads, _ = ear.heads(None, None, 0)
    torch.testing.assert_close(heads.attended()[1], scores.logsumexp(-1))


def test_a_backbone_that_computes_its_scores_by_itself_is_refused():
    config = AutoConfig.for_model("bloom", vocab_size=40, hidden_size=8, n_layer=1, n_head=2)
    stock = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=r"model.memory.stores=keys_values: a BloomAttention computes its scores by it"):
        wrapped(stock)


def test_a_segment_longer_than_a_sliding_window_is_refused():
    config = AutoConfig.for_model(
        "mistral", vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=LENGTH - 1,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"segment_length=12: .* take at most 11"):
        wrapped(AutoModelForCausalLM.from_config(config))


def test_a_decoder_of_another_attention_is_refused():
    memory = LongTermMemoryConfig(0, basis_functions=8, stores="keys_values")
    with pytest.raises(UserError, match=r"attention=linear: .* set model.memory.stores=hidden"):
        DecoderConfig(attention="linear", positions="rotary", memory=memory, segment_length=LENGTH)


def test_keys_are_summed_with_those_before_them_and_values_are_kept():
    memory = build(read="gibbs", key_convolution=3)
    width = SHARED * HEAD
    keys, values = random(2, 2, LENGTH, width).unbind()
    pair = KeyValues(*(part.unflatten(-1, (SHARED, HEAD)).transpose(1, 2) for part in (keys, values)))
    weight = memory.convolution.weight[:, 0]
    expected = torch.stack(
        [
            sum(keys[:, token - back] * weight[:, 2 - back] for back in range(min(3, token + 1)))
            for token in range(LENGTH)
        ],
        dim=1,
    )
    whole = memory.new_samples(random(2, LENGTH, 3), SegmentContext(None, key_values=pair, heads=told()))
    torch.testing.assert_close(whole, torch.cat([expected, values], dim=-1), rtol=1e-12, atol=1e-12)
    side_by_side = SegmentContext(None, leaving=torch.cat([keys, values], dim=-1), heads=told())
    assert torch.equal(memory.new_samples(random(2, LENGTH, 3), side_by_side), whole)


def told() -> LayerHeads:
    """Heads of a layer that projects nothing anew."""
    nothing = random(2, HEADS, LENGTH, HEAD)
    return LayerHeads(nothing, lambda joined: joined, lambda: (nothing, nothing[..., 0]))


def test_a_new_convolution_keeps_keys_as_they_are():
    memory = build(read="gibbs", key_convolution=3)
    memory.reset_parameters()
    keys = random(2, LENGTH, SHARED * HEAD)
    assert torch.equal(memory.convolved(keys), keys)


class TestOptions:
    @pytest.mark.parametrize("options", [{"key_convolution": 2}, {"key_convolution": -1, "stores": "keys_values"}])
    def test_a_convolution_without_keys_is_refused(self, options):
        with pytest.raises(ValueError, match=r"^model.memory.key_convolution=.* take model.memory.stores=keys_values"):
            LongTermMemoryConfig(**options)

    def test_a_convolution_that_learns_nothing_is_refused(self):
        memory = LongTermMemoryConfig(stores="keys_values", key_convolution=2)
        memory.check_training(2)
        with pytest.raises(ValueError, match=r"^model.memory.key_convolution=2 with training.bptt_segments=1: "):
            memory.check_training(1)

    @pytest.mark.parametrize(
        "options",
        [
            {"combination": "joint", "read": "slots"},
            {"combination": "joint", "stores": "keys_values"},
            {"combination": "joint", "stores": "keys_values", "read": "moments"},
        ],
    )
    def test_a_joint_softmax_without_scores_of_keys_is_refused(self, options):
        with pytest.raises(ValueError, match=r"^model.memory.combination=joint: .* take model.memory.stores=keys_valu"):
            LongTermMemoryConfig(**options)

    def test_an_input_gate_is_refused(self):
        with pytest.raises(ValueError, match=r"^model.memory.input_gate=true: keys and values"):
            LongTermMemoryConfig(stores="keys_values", input_gate=True)


def test_gates_have_a_learning_rate_of_their_own_and_no_decay():
    model = wrapped(backbone("llama"), read="gibbs")
    config = OptimizerConfig(learning_rate=1.0, memory_learning_rate=2.0, gate_learning_rate=3.0, weight_decay=0.5)
    groups = {group["name"]: group for group in make_optimizer(model, config).param_groups}
    gates = {id(memory.gate) for memory in model.memories}
    assert {id(parameter) for parameter in groups["gates"]["params"]} == gates
    assert (groups["gates"]["lr"], groups["gates"]["weight_decay"]) == (3.0, 0.0)
    assert not gates & {id(p) for name in groups for p in groups[name]["params"] if name != "gates"}
