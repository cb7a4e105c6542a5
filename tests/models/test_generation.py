"""Text is continued as a loop without any cache would do it, also across segments."""

import copy

import pytest
import torch
from torch import Tensor, nn

from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.generation import continue_text, read_text, sample_tokens
from infformer.models.pretrained import InfformerForCausalLM

SEGMENT = 8


@pytest.fixture(scope="module")
def model(backbone) -> InfformerForCausalLM:
    """A model whose every choice depends on all that it sees: one with weights this large is sure of itself."""
    torch.manual_seed(3)
    stock = copy.deepcopy(backbone)
    for parameter in stock.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.6)
    memory = LongTermMemoryConfig(basis_functions=8, widths=[0.05, 0.1], past_samples=16, sticky=True)
    model = InfformerForCausalLM.from_backbone(stock, memory, segment_length=SEGMENT).eval()
    for parameter in model.memories.parameters():
        nn.init.normal_(parameter)
    return model


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


@pytest.mark.parametrize("length", [1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT])
def test_a_continued_text_is_that_of_a_literal_loop(model, length):
    start, count = prompt(length), SEGMENT + 3
    made = continue_text(model, start, count, SEGMENT, temperature=0)
    assert made.tolist() == literally(model, start, count).tolist()


def test_what_was_read_before_matters(model):
    """So that the test above means something."""
    assert literally(model, prompt(20), 12).tolist() != literally(model, prompt(20), 12, forget=True).tolist()


def test_choices_belong_to_the_generator(model):
    def sample(seed: int, temperature: float = 1.0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return continue_text(model, prompt(10), 12, SEGMENT, temperature, generator).tolist()

    random = torch.get_rng_state()
    assert sample(0) == sample(0) != sample(1)
    assert torch.equal(torch.get_rng_state(), random)
    assert sample(0, temperature=1e-4) == sample(1, temperature=0)


def test_one_token_may_be_asked_for(model):
    assert continue_text(model, prompt(20), 1, SEGMENT).shape == (1,)


def test_nothing_is_computed_ahead_of_what_is_asked_for_and_nothing_twice(model):
    """A segment that becomes whole is written without being read once more."""
    lengths: list[int] = []
    with model.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1])):
        read = read_text(model, prompt(2 * SEGMENT), SEGMENT)
        assert lengths == [SEGMENT]
        sampled = sample_tokens(model, read, SEGMENT)
        next(sampled)
        assert lengths == [SEGMENT, SEGMENT]
        next(sampled)
        assert lengths == [SEGMENT, SEGMENT, 1]
