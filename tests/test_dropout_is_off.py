"""Whatever measures a model, or lets it write, reads without dropout, also in the middle of training."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from infformer.data.sources import Document
from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.memory_instruments import inspect_document
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.harness.continuations import Continuation, score_continuations
from infformer.harness.generation import GenerationOptions, write_text
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.answering import answer, answer_forced
from infformer.tasks.language_modelling import LanguageModelling
from infformer.tasks.questions import Questions
from infformer.tasks.task import Material

SEGMENT = 16
TOKENS = torch.randint(257, (100,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(backbone) -> InfformerForCausalLM:
    """Whose memory does something, and which drops nearly a third of all it computes while it learns."""
    stock = copy.deepcopy(backbone.config)
    stock.resid_pdrop = stock.embd_pdrop = stock.attn_pdrop = 0.3
    torch.manual_seed(1)
    memory = LongTermMemoryConfig(None, 8, [0.05, 0.1], 16, sticky=True, sticky_bins=16)
    model = InfformerForCausalLM.from_backbone(type(backbone)(stock), memory, segment_length=16)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def task(model, tokenizer) -> LanguageModelling:
    texts = [Document(name, f"{name} of the deep sea " * 2) for name in ("whale", "wind", "ship")]
    documents = TokenizedDocuments.from_texts(texts, tokenizer, 0)
    splits = dict.fromkeys(("train", "validation", "test"), documents)
    evaluator = Evaluator(model=model, protocol=ReadingProtocol(SEGMENT))
    return LanguageModelling(Material(evaluator, tokenizer, splits, inspected_segments=4))


def questions() -> Questions:
    tokens = TOKENS.reshape(2, 50).numpy()
    return Questions(tokens, np.zeros((2, 5), dtype=np.int64))


MEASURES: dict[str, Callable[[LanguageModelling, Evaluator, Any], Any]] = {
    "validation": lambda task, evaluator, tokenizer: task.validate(),
    "before training": lambda task, evaluator, tokenizer: task.measure_before(),
    "the final figures": lambda task, evaluator, tokenizer: task.measure("here") | {"cost": None},
    "a sample": lambda task, evaluator, tokenizer: task.sample(1, 12),
    "inspection": lambda task, evaluator, tokenizer: task.inspect(),
    "instruments": lambda task, evaluator, tokenizer: inspect_document(evaluator.model, TOKENS, 4, progress=False),
    "answers": lambda task, evaluator, tokenizer: repr(answer(evaluator, questions(), "")),
    "answers teacher forced": lambda task, evaluator, tokenizer: repr(answer_forced(evaluator, questions(), "")),
    "continuations": lambda task, evaluator, tokenizer: score_continuations(
        evaluator, [Continuation(TOKENS[:40].tolist(), TOKENS[40:50].tolist())], ""
    ),
    "text": lambda task, evaluator, tokenizer: write_text(
        evaluator, tokenizer, TOKENS[:40].tolist(), GenerationOptions(max_tokens=12)
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_found_is_what_the_model_gives_without_dropout(task, model, tokenizer, name):
    evaluator, found = Evaluator(model=model, protocol=ReadingProtocol(SEGMENT)), []
    for training in (False, True):
        model.train(training)
        torch.manual_seed(0)
        found.append(MEASURES[name](task, evaluator, tokenizer))
        assert not model.training
    assert found[0] == found[1]


def test_dropout_would_be_seen(model):
    """So that the other tests mean something."""
    with torch.no_grad():
        losses = [
            model.train(mode)(TOKENS[None, :SEGMENT], labels=TOKENS[None, :SEGMENT]).loss for mode in (True, False)
        ]
    assert abs(losses[0] - losses[1]) > 1e-3
