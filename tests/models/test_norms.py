"""Where norms stand: after the sum, before the parts, or both (ResiDual, arXiv 2304.14802).

What is claimed of gradients at initialisation (Xiong et al., arXiv 2002.04745) is tried where it is robust: the mean of
eight seeds, small widths, one head, uniform attention.
"""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.options import MemoryConfig
from infformer.models.base import MemoryModel
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.encoder import ClassifierConfig, TextClassifier

WIDTH, LENGTH = 32, 12
TOKENS = torch.randint(1, 50, (4, LENGTH), generator=torch.Generator().manual_seed(0))
every_norm = pytest.mark.parametrize("normalization", ["layer", "rms"])
every_kind = pytest.mark.parametrize("kind", ["decoder", "classifier"])


def new_model(kind: str, placement: str, normalization: str = "layer", **options: object) -> MemoryModel:
    sizes = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}
    chosen = {"feed_forward_size": 20, "normalization": normalization, "normalization_placement": placement}
    torch.manual_seed(0)
    options = {"dropout": 0.0, "initializer_range": 0.3, **options}
    if kind == "decoder":
        return DecoderForCausalLM(DecoderConfig(**sizes, **chosen, **options)).double()
    return TextClassifier(ClassifierConfig(**sizes, **chosen, **options, classes=50, longest=LENGTH)).double()


def inputs_of(module: nn.Module) -> list[Tensor]:
    """What it is given from now on."""
    seen: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return seen


@every_norm
@every_kind
def test_without_the_norm_of_the_sum_dual_norms_are_those_that_stand_after(kind, normalization):
    dual, post = (new_model(kind, placement, normalization) for placement in ("dual", "post"))
    post.load_state_dict(dual.state_dict(), strict=False)
    assert {*dual.state_dict()} - {*post.state_dict()} == {
        name for name in dual.state_dict() if name.startswith("final_norm.")
    }
    assert not torch.allclose(dual(TOKENS).logits, post(TOKENS).logits)
    for parameter in dual.final_norm.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(dual(TOKENS).logits, post(TOKENS).logits)


@every_norm
@every_kind
def test_the_sum_of_dual_norms_is_what_entered_and_all_that_was_added(kind, normalization):
    model = new_model(kind, "dual", normalization)
    residuals = [(layer.attention_residual, layer.feed_forward_residual) for layer in model.layers]
    added = [inputs_of(residual.dropout) for pair in residuals for residual in pair]
    entered, total = inputs_of(model.layers[0].attention.query if kind == "decoder" else model.layers[0].query), []
    model.final_norm.register_forward_pre_hook(lambda module, args: total.append(args[0]))
    model(TOKENS)
    expected = entered[0] + sum(parts[0] for parts in added)
    torch.testing.assert_close(total[0], expected, atol=1e-12, rtol=1e-12)


@every_norm
@pytest.mark.parametrize("placement", ["post", "pre", "dual"])
def test_a_segment_that_comes_in_pieces_is_read_as_it_is_at_once(placement, normalization):
    memory = MemoryConfig(LENGTH)
    model = new_model("decoder", placement, normalization, memory=memory, segment_length=LENGTH).eval()
    state = model(TOKENS).state
    whole = model(TOKENS, state=state)
    first = model(TOKENS[:, :5], state=state, use_cache=True)
    rest = model(TOKENS[:, 5:], state=state, segment_cache=first.segment_cache, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rest.state.layers[1].short_term.entries, whole.state.layers[1].short_term.entries)


@every_norm
@every_kind
def test_every_weight_of_a_model_with_dual_norms_learns_with_layers_computed_twice(kind, normalization):
    model = new_model(kind, "dual", normalization).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(TOKENS, targets=TOKENS).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.checkpoint_activations()
    for name, gradient in gradients[0].items():
        assert bool(gradient.any()), name
        torch.testing.assert_close(gradient, gradients[1][name])


@cache
def at_initialisation(placement: str, depth: int) -> tuple[Tensor, Tensor]:
    """Of each layer the norm of the gradient of the last map, and ‖x‖²/d of what its last part adds up to."""
    gradients, squares = torch.zeros(depth), torch.zeros(depth)
    for seed in range(8):
        torch.manual_seed(seed)
        model = DecoderForCausalLM(
            DecoderConfig(
                vocab_size=200, hidden_size=WIDTH, num_hidden_layers=depth, num_attention_heads=1,
                feed_forward_size=WIDTH, positions="rotary", normalization_placement=placement, dropout=0.0,
                initializer_range=None,
            )
        )  # fmt: skip
        for layer in model.layers:
            nn.init.zeros_(layer.attention.query.weight)
            nn.init.zeros_(layer.attention.key.weight)
        residuals = [layer.feed_forward_residual for layer in model.layers]
        streams = [inputs_of(residual.norm) for residual in residuals]
        added = [inputs_of(residual.dropout) for residual in residuals]
        tokens = torch.randint(200, (4, 16), generator=torch.Generator().manual_seed(seed))
        model(tokens, targets=tokens.roll(-1, 1)).loss.backward()
        for number, layer in enumerate(model.layers):
            gradients[number] += layer.feed_forward.contract.weight.grad.norm() / 8
            stream = streams[number][0] + (added[number][0] if placement == "pre" else 0)
            squares[number] += stream.square().sum(-1).mean() / WIDTH / 8
    return gradients, squares.detach()


def test_the_last_gradient_stays_level_with_depth_where_norms_stand_after():
    shallow, deep = (at_initialisation("post", depth)[0][-1] for depth in (6, 24))
    assert 0.6 <= deep / shallow <= 1.6


def test_the_last_gradient_falls_with_depth_where_norms_stand_before():
    shallow, deep = (at_initialisation("pre", depth)[0][-1] for depth in (6, 24))
    assert 1.4 <= shallow / deep <= 3.2


def test_gradients_are_level_over_layers_with_dual_norms():
    gradients = at_initialisation("dual", 24)[0]
    assert 0.5 <= gradients[-1] / gradients[0] <= 2


def test_before_a_norm_behind_the_feed_forward_part_squares_add_up_to_three_halves():
    squares = at_initialisation("post", 24)[1]
    assert abs(squares.mean() - 1.5) < 0.05
    assert bool(((squares - 1.5).abs() < 0.3).all()), squares


def test_without_norms_between_squares_grow_with_each_layer():
    squares, layers = at_initialisation("pre", 24)[1], torch.arange(1, 25)
    assert bool((squares >= 0.9 * (1 + layers / 2)).all()), squares
    assert bool((squares <= 1 + 3 * layers / 2).all()), squares
