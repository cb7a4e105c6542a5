"""Text is continued as a loop without any cache would do it, also across segments."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.generation import continue_text, sample_tokens
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 8
MEMORIES = {
    "affine": {},
    "sticky": {"sticky": True, "sticky_bins": 16},
    "slots, uniform": {"read": "slots", "contraction": "uniform"},
}


@pytest.fixture
def model(backbone) -> Callable[..., InfformerForCausalLM]:
    """A model whose every choice depends on all that it sees: one with weights this large is sure of itself."""

    def build(memory: dict | None = None) -> InfformerForCausalLM:
        torch.manual_seed(3)
        stock = copy.deepcopy(backbone)
        for parameter in stock.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.6)
        sizes = {"basis_functions": 8, "widths": [0.05, 0.1], "past_samples": 16}
        config = None if memory is None else LongTermMemoryConfig(**sizes, **memory)
        model = InfformerForCausalLM.from_backbone(stock, config, segment_length=SEGMENT).eval()
        for parameter in model.memories.parameters():
            nn.init.normal_(parameter)
        return model

    return build


def prompt(length: int) -> Tensor:
    return torch.randint(1, 257, (length,), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def literally(model: InfformerForCausalLM, tokens: Tensor, count: int, forget: bool = False) -> Tensor:
    """Everything is read anew for every token."""
    for _ in range(count):
        memory = None
        *whole, last = tokens.split(SEGMENT)
        for segment in whole:
            memory = model(segment.unsqueeze(0), state=memory).state
        logits = model(last.unsqueeze(0), state=None if forget else memory).logits
        tokens = torch.cat([tokens, logits[0, -1].argmax(keepdim=True)])
    return tokens[-count:]


@pytest.mark.parametrize("memory", [*MEMORIES.values(), None], ids=[*MEMORIES, "none"])
@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT])
def test_equals_a_literal_loop(model, memory, length):
    some, start = model(memory), prompt(length)
    made = continue_text(some, start, 2 * SEGMENT + 3, SEGMENT, temperature=0)
    assert made.tolist() == literally(some, start, 2 * SEGMENT + 3).tolist()


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_what_was_read_before_matters(model, memory):
    """So that the test above means something."""
    some = model(memory)
    assert literally(some, prompt(20), 20).tolist() != literally(some, prompt(20), 20, forget=True).tolist()


def test_choices_belong_to_the_generator(model):
    some = model({})

    def sample(seed: int, temperature: float = 1.0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return continue_text(some, prompt(10), 12, SEGMENT, temperature, generator).tolist()

    random = torch.get_rng_state()
    assert sample(0) == sample(0) != sample(1)
    assert torch.equal(torch.get_rng_state(), random)
    assert sample(0, temperature=1e-4) == sample(1, temperature=0)


def test_nothing_is_asked_for(model):
    assert continue_text(model({}), prompt(20), 1, SEGMENT).shape == (1,)


def test_nothing_is_computed_ahead_of_what_is_asked_for(model):
    """Not even the writing of a segment that has just become whole."""
    some, lengths = model({}), []
    some.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    sampled = sample_tokens(some, prompt(2 * SEGMENT), SEGMENT)
    assert lengths == []
    next(sampled)
    assert lengths == [SEGMENT, SEGMENT]
    next(sampled)
    assert lengths == [SEGMENT, SEGMENT, SEGMENT, 1]
