"""Accuracy is that of models whose answers are known, and of a literal loop over one sequence at a time."""

import copy
from collections.abc import Callable
from functools import partial
from math import ceil

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.answering import answer, answer_forced
from infformer.tasks.ideal_counters import ideal_counters
from infformer.tasks.sorting_accuracy import evaluate_teacher_forced, format_accuracy, measure_accuracy
from infformer.tasks.sorting_sequences import SortingConfig, as_questions, draw_sequences

LENGTH, SYMBOLS, SEGMENT = 18, 5, 8
"""The answer of five places is predicted from the inputs 18 to 22."""


def draw(count: int, length: int = LENGTH) -> NDArray[np.int64]:
    return draw_sequences(SortingConfig(length=length, symbols=SYMBOLS), "test", range(count), 0)


@pytest.fixture(scope="module")
def model() -> InfformerForCausalLM:
    """A small model of random weights, whose memory decides on what it answers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=SYMBOLS + 1, n_positions=SEGMENT, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0
    )
    backbone = GPT2LMHeadModel(config)
    memory = LongTermMemoryConfig(basis_functions=8, widths=[0.05, 0.1], past_samples=16)
    model = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=SEGMENT)
    for parameter in model.memories.parameters():
        nn.init.normal_(parameter)
    return model


def evaluator(model: nn.Module, batch_size: int = 4, precision: torch.dtype = torch.float32, **processes) -> Evaluator:
    return Evaluator(
        model=model,
        protocol=ReadingProtocol(SEGMENT, precision=precision),
        batch_size=batch_size,
        processes=Processes(**processes),
    )


def read_literally(model: nn.Module, tokens: list[int]) -> Tensor:
    """The scores of what follows after these tokens, read from the first on; [vocabulary]."""
    memory = None
    for segment in torch.tensor([tokens]).split(SEGMENT, dim=1):
        output = model(segment, state=memory)
        memory = output.state
    return output.logits[0, -1]


@torch.no_grad()
def literally(model: nn.Module, sequences: NDArray[np.int64], length: int) -> tuple[float, list[list], list[list]]:
    """Nats per symbol of the answer, and the answers place by place: after the true places before, and freely."""
    nats, forced, free = 0.0, [], []
    for row in sequences.tolist():
        question, answer = row[: length + 1], row[length + 1 :]
        scores = [read_literally(model, question + answer[:place]) for place in range(SYMBOLS)]
        nats -= sum(float(score.log_softmax(dim=0)[true]) for score, true in zip(scores, answer, strict=True))
        forced.append([int(score.argmax()) for score in scores])
        own: list[int] = []
        while len(own) < SYMBOLS:
            own.append(int(read_literally(model, question + own).argmax()))
        free.append(own)
    return nats / sequences.shape[0] / SYMBOLS, forced, free


@pytest.mark.parametrize("segment_length", [1, 3, 6, 8, 9, 20, 23, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_who_counts_is_right_everywhere(counter: Callable, segment_length: int, batch_size: int) -> None:
    """Where the answer begins with a segment (6, 9), straddles two (8, 20) or more, or everything is in one (64)."""
    read = Evaluator(
        model=counter(SYMBOLS, segment_length), protocol=ReadingProtocol(segment_length), batch_size=batch_size
    )
    figures = measure_accuracy(read, draw(7), SYMBOLS, 10, 0)
    assert figures["length"] == LENGTH
    assert figures["sequences"] == 7
    assert figures["accuracy"] == figures["accuracy_free_running"] == 1
    assert figures["accuracy_by_position"] == figures["accuracy_free_running_by_position"] == [1] * SYMBOLS
    assert figures["nll"] == pytest.approx(np.log(1 + SYMBOLS * np.exp(-5)))
    assert figures["ideal_counters"] == ideal_counters(draw(7), SYMBOLS, 10, 0)


def test_who_always_says_the_same_is_right_once(stubborn: Callable) -> None:
    sequences = draw(20)
    figures = measure_accuracy(evaluator(stubborn(SYMBOLS, SEGMENT)), sequences, SYMBOLS, 10, 0)
    by_position = (sequences[:, -SYMBOLS:] == 3).mean(axis=0)
    assert figures["accuracy"] == figures["accuracy_free_running"] == pytest.approx(1 / SYMBOLS)
    assert figures["accuracy_by_position"] == pytest.approx(by_position)
    assert figures["accuracy_free_running_by_position"] == pytest.approx(by_position)


@pytest.mark.parametrize("length", [3, 16, 18, 23])
def test_accuracy_is_that_of_a_literal_loop(model: InfformerForCausalLM, length: int) -> None:
    sequences = draw(12, length)
    answers = sequences[:, -SYMBOLS:]
    nll, forced, free = literally(model.eval(), sequences, length)
    assert forced != free
    given = answer(evaluator(model), as_questions(sequences, SYMBOLS), "answers").free
    assert given.reshape(-1, SYMBOLS).tolist() == free
    figures = measure_accuracy(evaluator(model, 5), sequences, SYMBOLS, 10, 0)
    assert figures["nll"] == pytest.approx(nll, rel=1e-5)
    for name, given in (("accuracy", forced), ("accuracy_free_running", free)):
        right = given == answers
        assert figures[name] == pytest.approx(right.mean())
        assert figures[f"{name}_by_position"] == pytest.approx(right.mean(axis=0))


def test_the_true_answer_is_not_looked_at(model: InfformerForCausalLM) -> None:
    sequences = draw(10)
    others = sequences.copy()
    others[:, -SYMBOLS:] = sequences[:, : -SYMBOLS - 1 : -1]
    one, other = (answer(evaluator(model), as_questions(each, SYMBOLS), "answers").free for each in (sequences, others))
    assert (one == other).all()


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("evaluate", [evaluate_teacher_forced, partial(measure_accuracy, window=10, seed=0)])
def test_shares_add_up(model: InfformerForCausalLM, evaluate: Callable, processes: int) -> None:
    """Also where there are more processes than sequences, and the last has nothing to read."""
    sequences = draw(4)
    sums: list[Tensor] = []
    for process in range(processes):
        read = evaluator(model, rank=process, world_size=processes, reduce=lambda own: sums.append(own) or sum(sums))
        figures = evaluate(read, sequences, SYMBOLS)
    assert len(sums) == processes
    for name, value in evaluate(evaluator(model), sequences, SYMBOLS).items():
        expected = value if isinstance(value, dict) else pytest.approx(value, rel=1e-6)  # the counters need no model
        assert figures[name] == expected, name


@pytest.mark.parametrize(
    ("questions", "processes", "batch_size"), [(5, 2, 2), (4, 3, 3), (2, 5, 5), (7, 3, 9), (1, 2, 1)]
)
@pytest.mark.parametrize("ask", [answer, answer_forced])
def test_all_processes_read_as_often(
    model: InfformerForCausalLM, ask: Callable, questions: int, processes: int, batch_size: int
) -> None:
    """Also who has fewer questions, or none: engines that cut weights up need all of them, and so do agreements."""
    asked = as_questions(draw(questions), SYMBOLS)
    events: list[str] = []
    share = {"world_size": processes, "after_segment": lambda: events.append("called")}
    told = []
    hook = model.register_forward_hook(lambda *_: events.append("read"))
    try:
        for process in range(processes):
            events.clear()
            ask(evaluator(model, batch_size, rank=process, **share), asked, "some")
            told.append(list(events))
    finally:
        hook.remove()
    assert told == told[:1] * processes
    side_by_side = ceil(batch_size / processes)
    batches = ceil(ceil(questions / processes) / side_by_side)
    assert told[0].count("called") == batches
    assert told[0].count("read") > batches


def test_in_bfloat16(model: InfformerForCausalLM) -> None:
    exact = evaluate_teacher_forced(evaluator(model), draw(10), SYMBOLS)["nll"]
    rounded = evaluate_teacher_forced(evaluator(model, precision=torch.bfloat16), draw(10), SYMBOLS)["nll"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_the_model_is_as_before(model: InfformerForCausalLM) -> None:
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    measure_accuracy(evaluator(model.train()), draw(5), SYMBOLS, 10, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training


def test_the_table_has_a_line_for_each_length(counter: Callable) -> None:
    read = evaluator(counter(SYMBOLS, SEGMENT))
    lengths = [measure_accuracy(read, draw(3, length), SYMBOLS, 10, 0) for length in (LENGTH, 1100)]
    protocol = {"segment": SEGMENT, "reset": "each sequence begins with an empty memory", "dtype": "float32"}
    header, *rows, last = format_accuracy({"lengths": lengths, "protocol": protocol}).splitlines()
    assert " ".join(header.split()) == "length this model last 10 last half noise 3 percent noise 1 percent chance"
    assert [row.split()[0] for row in rows] == ["18", "1,100"]
    for row, figures in zip(rows, lengths, strict=True):
        cells = row[8:].replace("/", "").split()
        assert cells[:2] == ["1.000", "1.000"]
        shown = [
            counted[name]
            for counted in figures["ideal_counters"].values()
            for name in ("accuracy", "accuracy_free_running")
        ]
        assert cells[2:] == [f"{value:.3f}" for value in shown]
    assert all(len(line) == len(header) for line in rows)
    assert "on 3 sequences" in last
    assert "segments of 8 tokens" in last
