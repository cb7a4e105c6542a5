"""Against the formulas written token by token, and against torch's own adaptive softmax."""

import math

import pytest
import torch
from torch import Tensor, nn

from infformer.errors import ModelError
from infformer.models.chunked_loss import IGNORE_INDEX, chunked_token_losses
from infformer.models.vocabulary import AdaptiveVocabulary, TiedVocabulary

SIZE, HIDDEN, CUTOFFS, DIVISOR = 13, 8, [3, 5, 9], 2.0
Vocabulary = TiedVocabulary | AdaptiveVocabulary


def tied() -> TiedVocabulary:
    return in_double(TiedVocabulary(SIZE, HIDDEN))


def adaptive(divisor: float = DIVISOR) -> AdaptiveVocabulary:
    return in_double(AdaptiveVocabulary(SIZE, HIDDEN, CUTOFFS, divisor))


def in_double(vocabulary):
    """In float64, with weights and biases that are far from nothing."""
    for parameter in vocabulary.double().parameters():
        nn.init.normal_(parameter)
    return vocabulary


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(20, HIDDEN, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    """Each token once, in no order; and some positions that are not scored."""
    return torch.cat([torch.randperm(SIZE), torch.full((7,), IGNORE_INDEX)])[torch.randperm(20)]


both = pytest.mark.parametrize("make", [tied, adaptive])


def band_of(token: int) -> int:
    """0 for a frequent token."""
    return sum(token >= cutoff for cutoff in CUTOFFS)


def cluster_formula(vocabulary: Vocabulary, hidden: Tensor) -> Tensor:
    """Probabilities of all tokens after one hidden state, each written out."""
    if isinstance(vocabulary, TiedVocabulary):
        exponentials = [
            (vector @ hidden + bias).exp()
            for vector, bias in zip(vocabulary.embedding.weight, vocabulary.bias, strict=True)
        ]
        return torch.stack(exponentials) / sum(exponentials)
    softmax = vocabulary.softmax
    head = (softmax.head.weight @ hidden + softmax.head.bias).exp()
    head = head / head.sum()
    probabilities = []
    for token in range(SIZE):
        band = band_of(token)
        if band == 0:
            probabilities.append(head[token])
            continue
        projection, table = softmax.tail[band - 1][0].weight, softmax.tail[band - 1][1].weight
        inside = (table @ (projection @ hidden)).exp()
        probabilities.append(head[CUTOFFS[0] + band - 1] * inside[token - CUTOFFS[band - 1]] / inside.sum())
    return torch.stack(probabilities)


def embedding_of(vocabulary: Vocabulary, token: int) -> Tensor:
    if isinstance(vocabulary, TiedVocabulary):
        return vocabulary.embedding.weight[token]
    softmax, band = vocabulary.softmax, band_of(token)
    if band == 0:
        return softmax.head.weight[token]
    projection, table = softmax.tail[band - 1][0].weight, softmax.tail[band - 1][1].weight
    return projection.T @ table[token - CUTOFFS[band - 1]]


@both
def test_embeddings_are_those_of_each_token(make):
    vocabulary = make()
    tokens = torch.randint(0, SIZE, (4, 3, 5))
    expected = torch.stack([embedding_of(vocabulary, int(token)) for token in tokens.flatten()]).view(4, 3, 5, HIDDEN)
    torch.testing.assert_close(vocabulary.embed(tokens), expected)
    torch.testing.assert_close(vocabulary.embed(tokens[0, 0, 0]), expected[0, 0, 0])
    assert vocabulary.embed(tokens[:, :0]).shape == (4, 0, 5, HIDDEN)


@both
def test_probabilities_are_those_of_the_formula(make, hidden):
    vocabulary = make()
    logits = vocabulary.logits(hidden.view(4, 5, HIDDEN))
    expected = torch.stack([cluster_formula(vocabulary, state) for state in hidden]).view(4, 5, SIZE)
    torch.testing.assert_close(logits.softmax(-1), expected)
    if isinstance(vocabulary, AdaptiveVocabulary):
        torch.testing.assert_close(logits.exp(), expected)
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(4, 5, dtype=torch.float64))


@both
@pytest.mark.parametrize("chunk_tokens", [1, 3, 20, 1024])
def test_token_losses_and_their_gradients_are_those_of_the_formula(make, chunk_tokens, hidden, labels):
    vocabulary = make()
    losses = chunked_token_losses(hidden.view(4, 5, HIDDEN), vocabulary.token_losses, labels.view(4, 5), chunk_tokens)
    expected = torch.stack(
        [
            hidden.new_zeros(()) if label == IGNORE_INDEX else -cluster_formula(vocabulary, state)[label].log()
            for state, label in zip(hidden, labels, strict=True)
        ]
    )
    assert losses.dtype == torch.float32
    assert (losses.flatten()[labels == IGNORE_INDEX] == 0).all()
    torch.testing.assert_close(losses.flatten().double(), expected, rtol=1e-6, atol=1e-6)

    inputs = [hidden, *vocabulary.parameters()]
    weights = torch.randn(20)
    for one, other in zip(
        torch.autograd.grad((losses.flatten() * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # the softmax is float32


@both
@pytest.mark.parametrize("labels", [[IGNORE_INDEX] * 20, [0] * 20, [], [4, 4]])
def test_every_parameter_takes_part_whatever_the_labels(make, hidden, labels):
    vocabulary = make()
    losses = vocabulary.token_losses(hidden[: len(labels)], torch.tensor(labels, dtype=torch.int64))
    assert losses.shape == (len(labels),)
    gradients = torch.autograd.grad(losses.sum(), list(vocabulary.parameters()))  # an unused one would be an error
    nothing_scored = all(label == IGNORE_INDEX for label in labels)
    assert nothing_scored == all((gradient == 0).all() for gradient in gradients)


def test_embeddings_and_softmax_are_the_same_parameters():
    vocabulary = adaptive()
    reference = nn.AdaptiveLogSoftmaxWithLoss(HIDDEN, SIZE, CUTOFFS, DIVISOR, head_bias=True)
    assert [parameter.shape for parameter in vocabulary.parameters()] == [p.shape for p in reference.parameters()]
    vocabulary.embed(torch.tensor([1, 3, 12])).sum().backward()
    head, first, second, third = vocabulary.softmax.head, *vocabulary.softmax.tail
    assert head.weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [1]
    assert first[1].weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [0]
    assert (second[1].weight.grad == 0).all()
    assert third[1].weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [3]
    assert [bool((band[0].weight.grad != 0).all()) for band in (first, second, third)] == [True, False, True]


def test_the_tied_table_is_one_table():
    vocabulary = tied()
    assert sum(parameter.numel() for parameter in vocabulary.parameters()) == SIZE * HIDDEN + SIZE
    vocabulary.embed(torch.tensor([1, 3])).sum().backward()
    assert vocabulary.embedding.weight.grad.abs().sum(-1).nonzero().flatten().tolist() == [1, 3]


@both
def test_autocast_is_near_float32(make, hidden, labels):
    vocabulary, states = make().float(), hidden.detach().float()
    tokens = torch.arange(SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        embedded, losses, logits = (
            vocabulary.embed(tokens),
            vocabulary.token_losses(states, labels),
            vocabulary.logits(states),
        )
    assert losses.dtype == embedded.dtype == torch.float32
    rough = {"rtol": 0.02, "atol": 0.15}  # 8 bits of each factor, of sums that reach 10
    torch.testing.assert_close(embedded, vocabulary.embed(tokens), **rough)
    torch.testing.assert_close(losses, vocabulary.token_losses(states, labels), **rough)
    if isinstance(vocabulary, AdaptiveVocabulary):
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(20))
    losses.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in vocabulary.parameters())


@both
@pytest.mark.parametrize("token", [-1, SIZE])
def test_a_token_that_does_not_exist_is_refused(make, hidden, token):
    vocabulary = make()
    with pytest.raises(IndexError):
        vocabulary.embed(torch.tensor([0, token]))
    with pytest.raises(IndexError):
        vocabulary.token_losses(hidden[:2], torch.tensor([0, token]))


@pytest.mark.parametrize(
    "vocabulary", [TiedVocabulary(500, 100), AdaptiveVocabulary(500, 100, [200, 300], 1.0)], ids=["tied", "adaptive"]
)
def test_initial_weights_are_small_and_biases_zero(vocabulary):
    for name, parameter in vocabulary.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            # The deviation of n draws is off by 1 part in sqrt(2 n).
            assert parameter.std().item() == pytest.approx(0.02, rel=4 / math.sqrt(2 * parameter.numel()))
            assert abs(parameter.mean().item()) < 4 * 0.02 / math.sqrt(parameter.numel())


@pytest.mark.parametrize("cutoffs", [[], [5, 3], [3, 3], [0, 3], [-1], [3, SIZE], [SIZE + 1]])
def test_cutoffs_that_cannot_be_are_refused(cutoffs):
    message = (
        r"model.architecture.adaptive_cutoffs=\[.*\] cannot cut a vocabulary of 13 tokens: .* from 1 to 12, or none"
    )
    with pytest.raises(ModelError, match=message):
        AdaptiveVocabulary(SIZE, HIDDEN, cutoffs, DIVISOR)


@pytest.mark.parametrize("divisor", [0.0, 0.5, 2.1])
def test_divisors_that_cannot_be_are_refused(divisor):
    with pytest.raises(ModelError, match=rf"adaptive_divisor={divisor}: band 3, the last, .* set it from 1 to 2, or"):
        AdaptiveVocabulary(SIZE, HIDDEN, CUTOFFS, divisor)
