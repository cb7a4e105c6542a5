"""Sequences are drawn and sorted as by a literal loop; accuracy is that of models whose answers are known."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from infformer.data.options import SPLITS
from infformer.errors import DataError
from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.answering import answer, answer_forced
from infformer.tasks.questions import HELD_OUT_SEED
from infformer.tasks.sorting import (
    Sorting,
    SortingConfig,
    as_questions,
    draw_sequences,
    evaluate_teacher_forced,
    format_accuracy,
    ideal_counters,
    measure_accuracy,
)
from infformer.tasks.task import Material

LENGTH, SYMBOLS, SEGMENT = 18, 5, 8
"""The answer of five places is predicted from the inputs 18 to 22."""
FEW = 4
CONFIG = SortingConfig(length=LENGTH, symbols=SYMBOLS)


def drawn_literally(seed: int, split: int, number: int, length: int, symbols: int) -> list[int]:
    random = np.random.Generator(np.random.Philox(key=[seed, split], counter=[0, 0, length, number]))
    weights = random.integers(1, 10, size=(2, symbols))
    initial, final = weights[0] / weights[0].sum(), weights[1] / weights[1].sum()
    sequence = []
    for j, uniform in enumerate(random.random(length), start=1):
        probabilities = (1 - j / length) * initial + j / length * final
        symbol, reached = 0, probabilities[0]
        while uniform >= reached:
            symbol += 1
            reached += probabilities[symbol]
        sequence.append(symbol)
    return sequence


def sorted_literally(sequence: Sequence[int], symbols: int) -> list[int]:
    def rank(symbol: int) -> tuple[int, int]:
        count = list(sequence).count(symbol)
        return -count, list(sequence).index(symbol) if count else symbol

    return sorted(range(symbols), key=rank)


@pytest.mark.parametrize(
    ("length", "symbols", "split"),
    [(1, 2, "train"), (1, 20, "test"), (7, 20, "validation"), (40, 3, "train"), (500, 20, "test")],
)
def test_sequences_and_answers_are_the_literal_ones(length, symbols, split):
    config = SortingConfig(length=length, symbols=symbols)
    for number, row in enumerate(draw_sequences(config, split, range(30), 3).tolist()):
        assert row[:length] == drawn_literally(3, SPLITS.index(split), number, length, symbols)
        assert row[length] == symbols == config.vocabulary_size - 1
        assert row[length + 1 :] == sorted_literally(row[:length], symbols)


def test_a_sequence_depends_on_its_number_alone():
    whole = draw_sequences(CONFIG, "test", range(20), 7)
    assert (draw_sequences(CONFIG, "test", [13, 2, 13], 7) == whole[[13, 2, 13]]).all()
    assert draw_sequences(CONFIG, "test", [], 7).shape == (0, LENGTH + 1 + SYMBOLS)
    assert (draw_sequences(SortingConfig(symbols=SYMBOLS), "test", range(20), 7, length=LENGTH) == whole).all()
    assert len(np.unique(whole, axis=0)) == 20


@pytest.mark.parametrize(("training_lengths", "expected"), [([], LENGTH), ([7], 7)])
def test_sequences_of_task_length_are_learned_from_where_training_lengths_is_empty(training_lengths, expected):
    config = SortingConfig(length=LENGTH, symbols=SYMBOLS, training_lengths=training_lengths)
    material = Material(None, lanes=2, seed=0, rank_rows=range(2), segment_length=64)
    (segment,) = config.build_stream(material).next_step()
    assert segment.lengths.tolist() == [expected + SYMBOLS] * 2


def test_options_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="split=valid: choose one of train, validation, test"):
        draw_sequences(CONFIG, "valid", [0], 0)
    with pytest.raises(DataError, match="length=0: a sequence has at least 1 symbol"):
        draw_sequences(CONFIG, "test", [0], 0, length=0)
    for option in ("length", "training_sequences", "validation_sequences", "test_sequences"):
        with pytest.raises(ValueError, match=f"task.{option}=0: must be at least 1"):
            SortingConfig(**{option: 0})
    with pytest.raises(ValueError, match=r"task.symbols=1: must be at least 2"):
        SortingConfig(symbols=1)
    for option in ("training_lengths", "evaluation_lengths"):
        with pytest.raises(ValueError, match=rf"task.{option}=\[10, 0\]: each must be at least 1"):
            SortingConfig(**{option: [10, 0]})


def test_the_answer_is_asked_for_whole():
    sequences = draw_sequences(CONFIG, "test", range(4), 7)
    questions = as_questions(sequences, SYMBOLS)
    assert (questions.tokens == sequences).all()
    assert questions.answers.tolist() == [[0] * SYMBOLS] * 4
    assert questions.true_answers.reshape(4, SYMBOLS).tolist() == sequences[:, LENGTH + 1 :].tolist()


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


@pytest.mark.parametrize(
    ("segment_length", "batch_size"), [(1, 3), (3, 10), (6, 1), (8, 3), (9, 10), (20, 1), (23, 3), (64, 10)]
)
def test_who_counts_is_right_everywhere(counter, segment_length, batch_size):
    """Where the answer begins with a segment (6, 9), straddles two (8, 20) or more, or everything is in one (64)."""
    read = Evaluator(
        model=counter(SYMBOLS, segment_length), protocol=ReadingProtocol(segment_length), batch_size=batch_size
    )
    figures = measure_accuracy(read, draw(7), SYMBOLS, 10)
    assert figures["length"] == LENGTH
    assert figures["sequences"] == 7
    assert figures["accuracy"] == figures["accuracy_free_running"] == 1
    assert figures["accuracy_by_position"] == figures["accuracy_free_running_by_position"] == [1] * SYMBOLS
    assert figures["nll"] == pytest.approx(np.log(1 + SYMBOLS * np.exp(-5)))
    assert figures["ideal_counters"] == ideal_counters(draw(7), SYMBOLS, 10, 0)


@pytest.mark.parametrize("length", [3, 16, 18, 23])
def test_accuracy_is_that_of_a_literal_loop(model, length):
    sequences = draw(3, length)
    answers = sequences[:, -SYMBOLS:]
    nll, forced, free = literally(model.eval(), sequences, length)
    assert forced != free
    given = answer(evaluator(model), as_questions(sequences, SYMBOLS), "answers").free
    assert given.reshape(-1, SYMBOLS).tolist() == free
    figures = measure_accuracy(evaluator(model, 5), sequences, SYMBOLS, 10)
    assert figures["nll"] == pytest.approx(nll, rel=1e-5)
    for name, given in (("accuracy", forced), ("accuracy_free_running", free)):
        right = given == answers
        assert figures[name] == pytest.approx(right.mean())
        assert figures[f"{name}_by_position"] == pytest.approx(right.mean(axis=0))


def test_the_true_answer_is_not_looked_at(model):
    sequences = draw(10)
    others = sequences.copy()
    others[:, -SYMBOLS:] = sequences[:, : -SYMBOLS - 1 : -1]
    one, other = (answer(evaluator(model), as_questions(each, SYMBOLS), "answers").free for each in (sequences, others))
    assert (one == other).all()


@pytest.mark.parametrize(
    ("processes", "evaluate"),
    [(2, evaluate_teacher_forced), (3, partial(measure_accuracy, window=10)), (5, evaluate_teacher_forced)],
)
def test_shares_add_up(model, evaluate, processes):
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
    ("ask", "questions", "processes", "batch_size"),
    [(answer, 5, 2, 2), (answer_forced, 4, 3, 3), (answer, 2, 5, 5), (answer_forced, 7, 3, 9), (answer, 1, 2, 1)],
)
def test_all_processes_read_as_often(model, ask, questions, processes, batch_size):
    """Also who has fewer questions, or none: engines that cut weights up need all of them, and so do agreements."""
    asked = as_questions(draw(questions), SYMBOLS)
    events: list[str] = []
    share = {"world_size": processes, "after_segment": lambda: events.append("called")}
    told = []
    with model.register_forward_hook(lambda *_: events.append("read")):
        for process in range(processes):
            events.clear()
            ask(evaluator(model, batch_size, rank=process, **share), asked, "some")
            told.append(list(events))
    assert told == told[:1] * processes
    side_by_side = ceil(batch_size / processes)
    batches = ceil(ceil(questions / processes) / side_by_side)
    assert told[0].count("called") == batches
    assert told[0].count("read") > batches


def test_bfloat16_is_near_float32_and_another_figure(model):
    exact = evaluate_teacher_forced(evaluator(model), draw(10), SYMBOLS)["nll"]
    rounded = evaluate_teacher_forced(evaluator(model, precision=torch.bfloat16), draw(10), SYMBOLS)["nll"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.05)


def test_measuring_leaves_the_model_and_the_random_numbers_as_before(model):
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    measure_accuracy(evaluator(model.train()), draw(5), SYMBOLS, 10)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training


SORTING = SortingConfig(length=18, symbols=5, validation_sequences=6, test_sequences=9, evaluation_lengths=[30, 18, 7])


@pytest.fixture
def sorting(counter: Callable) -> Sorting:
    return make(counter(5, SEGMENT))


def make(model: torch.nn.Module) -> Sorting:
    return Sorting(SORTING, evaluator(model))


def test_validation_is_teacher_forced(sorting, stubborn):
    perfect = sorting.validate()
    assert perfect.metrics == {"validation/loss": perfect.loss, "validation/accuracy": 1}
    assert perfect.loss == pytest.approx(np.log(1 + 5 * np.exp(-5)))
    assert "validation accuracy 1.000" in perfect.text
    poor = make(stubborn(5, SEGMENT)).validate()
    assert poor.metrics["validation/accuracy"] == pytest.approx(0.2)
    assert poor.loss == pytest.approx(perfect.loss + 0.8 * 5)


def test_the_final_figures_are_of_every_length(sorting, stubborn):
    results = sorting.measure("here")
    assert [(figures["length"], figures["sequences"]) for figures in results["lengths"]] == [(18, 9), (30, 9), (7, 9)]
    assert all(figures["accuracy"] == figures["accuracy_free_running"] == 1 for figures in results["lengths"])
    assert results["protocol"] == {
        "segment": SEGMENT,
        "reset": "each sequence begins with an empty memory",
        "dtype": "float32",
        "checkpoint": "here",
    }
    model = stubborn(5, SEGMENT)
    sequences = draw_sequences(SORTING, "test", range(9), HELD_OUT_SEED, length=30)
    expected = measure_accuracy(evaluator(model), sequences, 5, 10)
    assert make(model).measure("here")["lengths"][1] == expected


def test_the_report_is_a_file_a_table_and_a_figure(counter, tmp_path, capsys):
    sorting = Sorting(replace(SORTING, evaluation_lengths=[]), evaluator(counter(5, SEGMENT)))
    results = sorting.measure("here") | {"before": None}
    figures = sorting.report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert capsys.readouterr().out.splitlines() == format_accuracy(results).splitlines()
    assert [figure.relative_to(tmp_path).as_posix() for figure in figures] == ["plots/accuracy_by_position.png"]
    assert figures[0].is_file()


def test_a_sample_shows_what_is_true_and_what_is_said(sorting, stubborn):
    (sequence,) = draw_sequences(SORTING, "validation", [2], HELD_OUT_SEED)
    answer = " ".join(map(str, sequence[-5:]))
    assert sorting.sample(8, 64) == f"sequence 2: {answer}; the model: {answer}"
    assert make(stubborn(5, SEGMENT)).sample(2, 3) == f"sequence 2: {answer[:5]}; the model: 3 3 3"


def test_a_model_that_knows_too_few_tokens_is_refused(counter):
    make(counter(6, SEGMENT))
    with pytest.raises(DataError, match=r"task.symbols=5: .* the model knows 5: take one that knows .*vocab_size=6\)"):
        make(counter(4, SEGMENT))


def test_the_table_has_a_line_for_each_length_and_a_column_for_each_counter():
    """Teacher forced first."""

    def accuracies(start: float) -> dict:
        return {"accuracy": start, "accuracy_free_running": start - 0.05}

    lengths = [
        {
            "length": length,
            "sequences": 30,
            **accuracies(start),
            "ideal_counters": {"last_2048": accuracies(start + 0.1), "chance": accuracies(start + 0.2)},
        }
        for length, start in ((1000, 0.3), (16000, 0.6))
    ]
    assert format_accuracy(
        {
            "lengths": lengths,
            "protocol": {"segment": 64, "reset": "each begins with an empty memory", "dtype": "bfloat16"},
        }
    ).splitlines() == [
        "length         this model        last 2048           chance",
        "1,000       0.300 / 0.250    0.400 / 0.350    0.500 / 0.450",
        "16,000      0.600 / 0.550    0.700 / 0.650    0.800 / 0.750",
        "accuracy teacher forced / free running, on 30 sequences of each length; segments of 64 tokens, each begins "
        "with an empty memory, bfloat16",
    ]


def distinct(parts: list[slice], length: int = 24) -> NDArray[np.int64]:
    """Sequences in whose parts no two symbols are equally frequent, so that nothing is left to chance."""
    config = SortingConfig(length=length, symbols=FEW)
    sequences = draw_sequences(config, "test", range(3000), 1)
    chosen = [
        row
        for row in sequences
        if all(len({list(row[:length][part]).count(symbol) for symbol in range(FEW)}) == FEW for part in parts)
    ]
    assert len(chosen) > 20
    return np.stack(chosen)


def counted_literally(sequences: NDArray[np.int64], part: slice, length: int = 24) -> dict[str, list[float]]:
    """Accuracy by position of who counts a part of each sequence."""
    forced, free = np.zeros(FEW), np.zeros(FEW)
    for row in sequences.tolist():
        counts = [row[:length][part].count(symbol) for symbol in range(FEW)]
        answer = row[length + 1 :]
        for position, true in enumerate(answer):
            free[position] += sorted(range(FEW), key=lambda symbol: -counts[symbol])[position] == true
            left = [symbol for symbol in range(FEW) if symbol not in answer[:position]]
            forced[position] += max(left, key=lambda symbol: counts[symbol]) == true
    return {
        "accuracy_by_position": (forced / len(sequences)).tolist(),
        "accuracy_free_running_by_position": (free / len(sequences)).tolist(),
    }


def test_counters_are_as_accurate_as_a_literal_count():
    last, half = slice(24 - 9, 24), slice(12, 24)
    sequences = distinct([last, half])
    counters = ideal_counters(sequences, FEW, 9, 0)
    for name, part in (("last_9", last), ("last_half", half)):
        for key, expected in counted_literally(sequences, part).items():
            assert counters[name][key] == pytest.approx(expected)
            assert counters[name][key.removesuffix("_by_position")] == pytest.approx(np.mean(expected))


def test_who_counts_everything_is_right():
    sequences = distinct([slice(None)])
    for window in (24, 30, 1000):
        assert ideal_counters(sequences, FEW, window, 0)[f"last_{window}"] == {
            "accuracy": 1.0,
            "accuracy_by_position": [1.0] * FEW,
            "accuracy_free_running": 1.0,
            "accuracy_free_running_by_position": [1.0] * FEW,
        }


# Measured once with another implementation, of 200 sequences each: a standard error of 0.01.
@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (512, {"last_128": 0.11, "last_half": 0.17, "noise_3_percent": 0.66, "noise_1_percent": 0.78}),
        (1024, {"last_128": 0.09, "last_half": 0.19, "noise_3_percent": 0.67, "noise_1_percent": 0.84}),
    ],
)
def test_counters_are_as_accurate_as_was_measured_elsewhere(length, expected):
    sequences = draw_sequences(SortingConfig(length=length), "test", range(200), 0)
    counters = ideal_counters(sequences, 20, 128, 0)
    free = {name: counters[name]["accuracy_free_running"] for name in expected}
    assert free == pytest.approx(expected, abs=0.035)


def test_chance_is_the_share_of_the_symbols_that_are_left():
    """Free running each place is one of 20; teacher forced one of those that are left: H_20 / 20 in the mean."""
    sequences = draw_sequences(SortingConfig(length=50), "test", range(2000), 0)
    chance = ideal_counters(sequences, 20, 10, 0)["chance"]
    left = [1 / (20 - position) for position in range(20)]
    error = 4 * np.sqrt(0.25 / 2000)
    assert chance["accuracy_by_position"] == pytest.approx(left, abs=error)
    assert chance["accuracy"] == pytest.approx(np.mean(left), abs=error / 4)
    assert chance["accuracy_free_running_by_position"] == pytest.approx([0.05] * 20, abs=error / 2)
    assert chance["accuracy_free_running"] == pytest.approx(0.05, abs=error / 4)


def test_the_same_seed_is_the_same_noise():
    sequences = draw_sequences(SortingConfig(length=50), "test", range(20), 0)
    one = ideal_counters(sequences, 20, 10, 4)
    assert ideal_counters(sequences, 20, 10, 4) == one
    assert ideal_counters(sequences, 20, 10, 5) != one
