"""The loss of a GPU against cross-entropy, on the processor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from infformer.models import pretrained
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.linear_loss import linear_token_losses
from infformer.models.pretrained import InfformerForCausalLM

SIZES = [(2, 5, 8, 50), (1, 7, 16, 64), (3, 4, 12, 129), (1, 1, 8, 3)]


def material(batch: int, length: int, hidden: int, vocabulary: int, scale: float = 1.0) -> tuple[Tensor, ...]:
    """Hidden states, weights, targets of which some are not scored, and a gradient of each loss."""
    torch.manual_seed(0)
    targets = torch.randint(vocabulary, (batch, length))
    targets[0, length // 2] = IGNORE_INDEX
    states, weight = torch.randn(batch, length, hidden), scale * torch.randn(vocabulary, hidden)
    return states.requires_grad_(), weight.requires_grad_(), targets, torch.rand(batch, length)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 4096])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_and_gradients_are_those_of_cross_entropy(sizes, chunk_tokens):
    hidden, weight, targets, upstream = material(*sizes)
    losses = linear_token_losses(hidden, weight, targets, chunk_tokens)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = (wide[0] @ wide[1].mT).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(sizes[:2])
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)
    assert (losses[targets == IGNORE_INDEX] == 0).all()
    found = torch.autograd.grad(losses, [hidden, weight], upstream)
    for one, other in zip(found, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-4, atol=1e-5)


def test_losses_under_autocast_have_operands_of_its_type_and_float32_sums():
    hidden, weight, targets, upstream = material(2, 40, 32, 200, scale=0.3)
    exact = linear_token_losses(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        losses = linear_token_losses(hidden, weight, targets, 16)
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=2e-2)
    for one, other in zip(
        *(torch.autograd.grad(each, [hidden, weight], upstream) for each in (losses, exact)), strict=True
    ):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 2e-2 * other.norm()


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, targets, upstream = material(2, 5, 8, 50)
    losses = linear_token_losses(hidden, weight.detach(), targets)
    expected = torch.autograd.grad(linear_token_losses(hidden, weight, targets), hidden, upstream)
    assert torch.equal(*torch.autograd.grad(losses, hidden, upstream), *expected)


def test_a_model_on_a_gpu_learns_the_same(monkeypatch):
    """Where its head is one product; the weight is the embedding's too."""
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = InfformerForCausalLM.from_backbone(GPT2LMHeadModel(config), None, segment_length=8).eval()
    tokens, called = torch.randint(50, (2, 8)), []
    monkeypatch.setattr(pretrained, "linear_token_losses", lambda *args: called.append(1) or linear_token_losses(*args))

    def learnt(on_gpu: bool) -> list[Tensor]:
        monkeypatch.setattr(pretrained, "can_fuse", lambda hidden: on_gpu)
        loss = model(tokens, labels=tokens).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for one, other in zip(learnt(True), learnt(False), strict=True):
        torch.testing.assert_close(one, other)
    assert called == [1]
    model.get_output_embeddings().register_forward_hook(lambda *arguments: None)
    learnt(True)
    model.get_output_embeddings()._forward_hooks.clear()
    model.backbone.config.final_logit_softcapping = 3.0
    learnt(True)
    assert called == [1]
