import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.models.chunked_loss import IGNORE_INDEX, chunked_token_losses, cross_entropy

BATCH, LENGTH, HIDDEN, VOCABULARY = 3, 7, 5, 11


class WatchedHead(nn.Linear):
    """A head that remembers how many rows of logits it was asked for at a time."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCABULARY, dtype=torch.float64)
        self.calls: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls.append(hidden.shape[0])
        return super().forward(hidden)


@pytest.fixture
def head() -> WatchedHead:
    torch.manual_seed(0)
    return WatchedHead()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    labels[0, -1] = labels[1] = IGNORE_INDEX
    return labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 20, 21, 1024])
def test_losses_equal_plain_cross_entropy(head, hidden, labels, chunk_tokens):
    losses = chunked_token_losses(hidden, cross_entropy(head), labels, chunk_tokens)
    plain = F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), plain, rtol=1e-6, atol=1e-6)

    inputs = [hidden, head.weight, head.bias]
    weights = torch.randn(labels.shape)
    for one, other in zip(
        torch.autograd.grad((losses * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the softmax is float32


@pytest.mark.parametrize("chunk_tokens", [1, 4, 20])
def test_logits_are_made_one_chunk_at_a_time(head, hidden, labels, chunk_tokens):
    """Also in backward, which makes them a second time, and without keeping them in between."""
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() // VOCABULARY if tensor.shape[-1:] == (VOCABULARY,) else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = chunked_token_losses(hidden, cross_entropy(head), labels, chunk_tokens)
    chunks = -(-BATCH * LENGTH // chunk_tokens)
    assert len(head.calls) == chunks
    assert max(kept, default=0) == 0
    losses.sum().backward()
    assert len(head.calls) == 2 * chunks
    assert max(head.calls) == chunk_tokens


def test_losses_in_evaluation_are_the_same_without_a_graph(head, hidden, labels):
    with torch.no_grad():
        losses = chunked_token_losses(hidden, cross_entropy(head), labels, 4)
    assert not losses.requires_grad
    assert torch.equal(losses, chunked_token_losses(hidden, cross_entropy(head), labels, 4))
