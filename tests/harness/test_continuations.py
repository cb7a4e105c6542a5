"""A continuation's score is that of a literal loop over one text at a time, whatever is read side by side with it."""

import copy
from functools import cache
from itertools import product

import pytest
import torch

from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.harness.continuations import Continuation, Score, score_continuations
from infformer.models.base import MemoryModel
from infformer.models.generation import continue_text

SEGMENT = 8
KINDS = ("memory", "decoder", "none")


def tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(1, 257, (length,), generator=generator).tolist())


@cache
@torch.no_grad()
def literally(model: MemoryModel, request: Continuation, forget: bool = False) -> Score:
    text = torch.tensor([[*request.context, *request.tokens]])
    memory, logits = None, []
    for segment in text[:, :-1].split(SEGMENT, dim=1):
        output = model(segment, state=None if forget else memory)
        memory = output.state
        logits.append(output.logits[0])
    scored = torch.cat(logits)[len(request.context) - 1 :].double().log_softmax(-1)
    targets = torch.tensor(request.tokens)
    likelihood = scored.gather(1, targets.unsqueeze(1)).sum()
    return Score(float(likelihood), bool((scored.argmax(-1) == targets).all()))


@pytest.fixture
def requests() -> list[Continuation]:
    """Contexts and continuations that end before, at and after a segment's end; some contexts begin alike."""
    lengths = product((1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 3 * SEGMENT + 2), (1, 3, SEGMENT, 19))
    found = [Continuation(tokens(context), tokens(length, seed=1)) for context, length in lengths]
    shared = tokens(2 * SEGMENT + 5, seed=2)
    found += [Continuation(shared, tokens(length, seed=3)) for length in (1, 2, 9)]
    return [*found, Continuation((*shared[:-1], 7), tokens(4))]


@pytest.fixture(scope="module")
def exact(models) -> dict[str, MemoryModel]:
    """In float64: what is read in another batch is summed in another order, which such a model makes much of."""
    return {kind: copy.deepcopy(model).double() for kind, model in models.items()}


@pytest.mark.parametrize(("kind", "batch_size"), [("memory", 1), ("memory", 64), ("decoder", 3), ("none", 3)])
def test_a_score_equals_that_of_a_literal_loop(exact, requests, kind, batch_size):
    one = Evaluator(model=exact[kind], protocol=ReadingProtocol(SEGMENT), batch_size=batch_size)
    expected = [literally(one.model, request) for request in requests]
    found = score_continuations(one, requests, "")
    assert [score.log_likelihood for score in found] == pytest.approx(
        [score.log_likelihood for score in expected], rel=1e-6
    )
    assert [score.greedy for score in found] == [score.greedy for score in expected]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_model_would_write_is_greedy(evaluator, kind):
    one, context = evaluator(kind), tokens(2 * SEGMENT + 3)
    written = continue_text(one.model, torch.tensor(context), 2 * SEGMENT, SEGMENT, temperature=0).tolist()
    first, middle, last = (
        [*written[:place], written[place] % 256 + 1, *written[place + 1 :]] for place in (0, SEGMENT, -1)
    )
    texts = [written, first, middle, last, written[:1]]
    found = score_continuations(one, [Continuation(context, text) for text in texts], "")
    assert [score.greedy for score in found] == [True, False, False, False, True]


@pytest.mark.parametrize("kind", ["memory", "decoder"])
def test_what_was_read_before_matters(evaluator, kind):
    """So that the tests above mean something."""
    one, request = evaluator(kind), Continuation(tokens(2 * SEGMENT + 1), tokens(5))
    own, forgotten = literally(one.model, request), literally(one.model, request, forget=True)
    assert abs(own.log_likelihood - forgotten.log_likelihood) > 0.01


def test_a_context_is_read_once_for_all_its_continuations(evaluator):
    one, context = evaluator(batch_size=4), tokens(3 * SEGMENT + 3)
    shapes = []
    hook = one.model.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    score_continuations(one, [Continuation(context, tokens(length)) for length in (1, 2, 3, 4)], "")
    hook.remove()
    assert shapes == [(1, SEGMENT)] * 3 + [(4, 3 + 4 - 1)]


def test_no_continuation_is_certain(evaluator):
    empty = [Continuation(tokens(length), ()) for length in (1, SEGMENT, SEGMENT + 1, SEGMENT + 2)]
    assert score_continuations(evaluator(), empty, "") == [(0.0, True)] * 4
    assert score_continuations(evaluator(), [], "") == []
