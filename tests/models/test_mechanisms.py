"""Every mechanism of attention, held to what all of them promise."""

import inspect

import pytest
import torch
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from infformer.errors import ModelError
from infformer.models.architecture import try_architecture
from infformer.models.mechanisms import AttentionShape, Longformer, build_mechanism, mechanism_kinds

KINDS = sorted(mechanism_kinds())
CAUSAL = sorted(name for name, kind in mechanism_kinds().items() if kind.has_causal_form)
SMALL = {
    "local": {"block": 8}, "sparse": {"block": 8, "summaries": 2}, "strided": {"stride": 8}, "bigbird": {"block": 8},
    "longformer": {"window": 8, "seen_by_all": 2}, "reformer": {"buckets": 4, "chunk": 8}, "linformer": {"rank": 4},
    "performer": {"features": 16}, "sinkhorn": {"block": 8}, "continuous": {"functions": 16},
}  # fmt: skip


def new_mechanism(kind, causal=False, **options):
    torch.manual_seed(0)
    shape = AttentionShape(hidden_size=16, heads=2, head_size=8, longest=64, causal=causal, layer=1)
    return build_mechanism({"kind": kind, **SMALL.get(kind, {}), **options}, shape).eval()


def new_inputs(length=45, batch=3):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(batch, length, 16, generator=generator)
    return hidden, *(torch.randn(batch, 2, length, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_influence(kind):
    inputs = new_inputs()
    real = torch.arange(45) < torch.tensor([[45], [30], [1]])
    mechanism = new_mechanism(kind)
    before = mechanism(*inputs, real)
    hidden, *heads = inputs
    moved = [tensor + 5 * ~real[:, None, :, None] for tensor in heads]
    after = mechanism(hidden + 5 * ~real.unsqueeze(-1), *moved, real)
    assert before.shape == inputs[1].shape
    torch.testing.assert_close(before * real[:, None, :, None], after * real[:, None, :, None], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [1, 19])
def test_it_does_not_matter_how_much_padding_a_batch_needs(kind, more):
    inputs = new_inputs()
    real = torch.arange(45) < torch.tensor([[45], [30], [1]])
    mechanism = new_mechanism(kind)
    expected = mechanism(*inputs, real)
    padded = [torch.nn.functional.pad(tensor, (0, 0, 0, more)) for tensor in inputs]
    found = mechanism(*padded, torch.nn.functional.pad(real, (0, more)))[:, :, :45]
    shown = real[:, None, :, None]
    torch.testing.assert_close(found * shown, expected * shown, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_mix_and_gradients_are_finite(kind):
    inputs = [tensor.requires_grad_() for tensor in new_inputs()]
    mechanism = new_mechanism(kind)
    together = mechanism(*inputs, None)
    alone = torch.cat([mechanism(*(tensor[row : row + 1] for tensor in inputs), None) for row in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    used = [
        tensor
        for tensor in torch.autograd.grad(together.square().sum(), inputs, allow_unused=True)
        if tensor is not None
    ]
    assert used
    assert all(gradient.isfinite().all() for gradient in used)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_under_autocast_a_mechanism_says_the_same_up_to_rounding(kind, precision):
    inputs = new_inputs()
    real = torch.arange(45) < torch.tensor([[45], [30], [1]])
    shown = real[:, None, :, None]
    for causal in {False, kind in CAUSAL}:
        mechanism = new_mechanism(kind, causal)
        expected = mechanism(*inputs, real) * shown
        with torch.autocast("cpu", precision):
            found = mechanism(*(tensor.to(precision) for tensor in inputs), real).float() * shown
        assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_of_each_mechanism_is_built_before_any_data_is_read(kind):
    try_architecture({"model_type": "classifier", "longest": 45, "attention": kind})


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_causal_mechanism_sees_nothing_that_comes_later(kind):
    inputs = new_inputs()
    mechanism = new_mechanism(kind, causal=True)
    later = torch.arange(45) > 20
    before = mechanism(*inputs, None)
    hidden, *heads = inputs
    moved = [tensor + 5 * later[:, None] for tensor in heads]
    after = mechanism(hidden + 5 * later[:, None], *moved, None)
    torch.testing.assert_close(before[:, :, :21], after[:, :, :21], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[:, :, 21:], after[:, :, 21:], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_measured_mechanism_answers_the_same_twice_and_built_anew(kind):
    inputs = new_inputs()
    first = new_mechanism(kind)
    again = new_mechanism(kind)
    again.load_state_dict(first.state_dict())
    assert torch.equal(first(*inputs, None), first(*inputs, None))
    assert torch.equal(first(*inputs, None), again(*inputs, None))


@pytest.mark.parametrize("made", ["dense", "factorized_dense", "random", "factorized_random"])
def test_the_synthesizer_reads_no_keys_and_random_scores_no_queries(made):
    hidden, query, key, value = new_inputs()
    mechanism = new_mechanism("synthesizer", scores=made)
    before = mechanism(hidden, query, key, value, None)
    assert torch.equal(before, mechanism(hidden, query, key + 1, value, None))
    assert torch.equal(before, mechanism(hidden, query + 1, key, value, None)) == ("random" in made)


def test_performer_draws_new_features_in_training_only_where_it_is_asked_to():
    inputs = new_inputs()
    for redraw in (False, True):
        mechanism = new_mechanism("performer", redraw=redraw).train()
        assert torch.equal(mechanism(*inputs, None), mechanism(*inputs, None)) is not redraw


def test_longformer_equals_the_module_of_transformers():
    config = LongformerConfig(
        hidden_size=16, num_attention_heads=2, attention_window=[8, 8], attention_probs_dropout_prob=0.0
    )
    module = LongformerSelfAttention(config, layer_id=0).eval()
    hidden = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0))
    ours = Longformer(AttentionShape(16, 2, 8, longest=40), window=8, seen_by_all=3)
    with torch.no_grad():
        for name in ("query", "key", "value"):  # theirs have biases
            getattr(ours, name).weight.copy_(getattr(module, f"{name}_global").weight)
            for projection in (getattr(module, name), getattr(module, f"{name}_global")):
                projection.bias.zero_()
        query, key, value = (
            projection(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
            for projection in (module.query, module.key, module.value)
        )
        is_global = (torch.arange(40) < 3).expand(2, -1)
        expected = module(
            hidden, attention_mask=torch.where(is_global, 10000.0, 0.0), is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global, is_global_attn=True,
        )[0]  # fmt: skip
        found = ours(hidden, query, key, value, None)
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_options_of_a_mechanism_are_checked_when_it_is_built(kind):
    options = inspect.signature(mechanism_kinds()[kind]).parameters.keys() - {"shape"}
    for option in options - {"redraw"}:
        with pytest.raises(ModelError, match=rf"attention\.{option}=-1"):
            new_mechanism(kind, **{option: -1})
    with pytest.raises(ModelError, match=rf"attention.blok=3: {kind} has no such option"):
        new_mechanism(kind, blok=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": []}, r"attention\.widths=\[\]: give a list of one width at least"),
        ({"widths": [0.1, 0.0]}, r"attention\.widths=0\.0: give a number that is more than 0"),
        ({"ridge": 0}, r"attention\.ridge=0: give a number that is more than 0"),
        (
            {"functions": 2},
            r"attention\.functions=2: make it a multiple of the 2 widths \[0\.01, 0\.05\], and 4 at least",
        ),
    ],
)
def test_a_signal_that_cannot_be_fitted_is_refused(options, message):
    with pytest.raises(ModelError, match=message):
        new_mechanism("continuous", **options)


def test_a_mechanism_that_is_not_known_or_not_causal_is_refused_with_those_that_are():
    with pytest.raises(ModelError, match=r"attention=perfomer: choose one of .*performer"):
        new_mechanism("perfomer")
    for kind in set(KINDS) - set(CAUSAL):
        with pytest.raises(ModelError, match=f"attention={kind}: it has no form that hides what comes after"):
            new_mechanism(kind, causal=True)
