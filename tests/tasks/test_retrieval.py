"""Who forgets nothing finds everything; who reads the last segment alone, what stands in it; and all of it adds up."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from infformer.data.options import DataConfig
from infformer.data.tokenization import tokenize_documents
from infformer.errors import DataError
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.answering import answer
from infformer.tasks.associative_recall import AssociativeRecallConfig
from infformer.tasks.haystack import NeedleConfig, PasskeyConfig
from infformer.tasks.questions import Questions
from infformer.tasks.retrieval import Retrieval, format_accuracy, measure_cells
from infformer.tasks.ruler import MultikeyConfig
from infformer.tasks.task import Material

SEGMENT = 8
CONFIG = AssociativeRecallConfig(
    keys=20, values=4, queries=2, lengths=[36, 20], depths=[0, 0.5, 1], validation_questions=4, test_questions=5
)
SOURCE = CONFIG.build_source(None)


def reader(model: nn.Module, batch_size: int = 8, segment_length: int = SEGMENT) -> Evaluator:
    return Evaluator(model=model, protocol=ReadingProtocol(segment_length), batch_size=batch_size)


def make(model: nn.Module, config: AssociativeRecallConfig = CONFIG, controls: bool = True) -> Retrieval:
    return config.build_evaluation(Material(reader(model, 4), controls=controls))


@pytest.fixture(scope="module")
def model() -> InfformerForCausalLM:
    """A small model of random weights, whose memory decides on what it answers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=CONFIG.vocabulary_size, n_positions=SEGMENT, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0
    )
    memory = LongTermMemoryConfig(basis_functions=8, widths=[0.05, 0.1], past_samples=16)
    model = InfformerForCausalLM.from_backbone(GPT2LMHeadModel(config), memory, segment_length=SEGMENT)
    for parameter in model.memories.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def test_who_remembers_all_is_right_everywhere(witness):
    results = make(witness(CONFIG.vocabulary_size, SEGMENT)).measure("here")
    assert [(cell["length"], cell["depth"]) for cell in results["cells"]] == [
        (length, depth) for length in (36, 20) for depth in (0, 0.5, 1)
    ]
    for cell in results["cells"]:
        assert (cell["answers"], cell["tokens"]) == (10, 10)
        assert cell["exact_match"] == cell["accuracy"] == cell["accuracy_free_running"] == 1
        assert cell["nll"] == pytest.approx(np.log(1 + 24 * np.exp(-5)))
    assert results["chance"] == 0.25
    assert results["protocol"] == {
        "task": "associative recall",
        "segment": SEGMENT,
        "window": 8,
        "reset": "each text begins with an empty memory; memory off: its last segment alone",
        "dtype": "float32",
        "checkpoint": "here",
    }


def test_without_memory_only_the_last_segment_is_known(witness):
    """Of the last 8 inputs 3 are those of the queries and 1 is the separator: two pairs are left."""
    config = AssociativeRecallConfig(keys=20, values=4, queries=2, lengths=[36], depths=[0, 0.93, 1], test_questions=30)
    off = make(witness(config.vocabulary_size, SEGMENT), config).measure("here")["controls"]["memory_off"]
    assert off[0]["exact_match"] < 0.3  # a value may well have been the other query's
    assert [cell["exact_match"] for cell in off[1:]] == [1, 1]
    assert make(witness(CONFIG.vocabulary_size, SEGMENT), controls=False).measure("here")["controls"] == {}


@pytest.mark.parametrize(("kind", "length"), [(PasskeyConfig, 301), (NeedleConfig, 301), (MultikeyConfig, 401)])
def test_who_remembers_all_finds_what_is_hidden_in_text(kind, length, witness, tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("The white whale rose, and nobody saw it. " * 30)
    data = DataConfig(source="files", test=str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "cache"))
    documents = {"test": tokenize_documents(data, "test", tokenizer)}
    evaluator = reader(witness(len(tokenizer), 64), segment_length=64)
    retrieval = kind(lengths=[length], depths=[0, 0.5, 1], test_questions=1).build_evaluation(
        Material(evaluator, tokenizer, documents, controls=False)
    )
    cells = retrieval.measure("here")["cells"]
    assert [cell["exact_match"] for cell in cells] == [1] * 3
    assert all(cell["answers"] == 1 and cell["tokens"] >= 6 for cell in cells)
    assert retrieval.validate() is None
    assert retrieval.sample(0, 5) is None


def seeing_all(memory: MemoryConfig) -> InfformerForCausalLM:
    """A model with rotary positions."""
    config = LlamaConfig(
        vocab_size=CONFIG.vocabulary_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=1.0,
    )  # fmt: skip
    return InfformerForCausalLM.from_backbone(LlamaForCausalLM(config), memory, segment_length=SEGMENT)


READERS = {
    "gpt2, long-term": None,
    "llama, short-term": lambda: seeing_all(MemoryConfig(short_term_length=16)),
    "llama, both": lambda: seeing_all(LongTermMemoryConfig(short_term_length=16, basis_functions=8, past_samples=16)),
    "decoder": lambda: DecoderForCausalLM(
        DecoderConfig(
            vocab_size=CONFIG.vocabulary_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            feed_forward_size=24, segment_length=SEGMENT, initializer_range=1.0,
            memory=LongTermMemoryConfig(basis_functions=8, past_samples=16),
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@torch.no_grad()
def test_answers_are_those_of_reading_everything_anew(model, name):
    """Where not every token is asked for, the true ones stand between the model's own."""
    if READERS[name] is not None:
        torch.manual_seed(1)
        model = READERS[name]().eval()
    questions = SOURCE.draw("test", range(6), 0, 20, np.random.default_rng(0).random((6, 2)))
    nats, forced, free = [], [], []
    for row in questions.tokens.tolist():
        own = list(row)
        for place in (17, 19):
            for text, answers in ((row, forced), (own, free)):
                memory = None
                for segment in torch.tensor([text[:place]]).split(SEGMENT, dim=1):
                    output = model(segment, state=memory)
                    memory = output.state
                answers.append(int(output.logits[0, -1].argmax()))
                if text is row:
                    nats.append(-float(output.logits[0, -1].log_softmax(dim=0)[row[place]]))
            own[place] = free[-1]
    given = answer(reader(model, 4), questions, "answers")
    assert given.free.tolist() == free != forced
    assert (given.forced.right == (np.array(forced) == questions.true_answers)).all()
    assert given.forced.nats == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("length", [19, 20, 24, 33])
def test_no_token_is_read_twice(model, length):
    """The text once; then the answers once as they are, and once as the model gives them."""
    random = np.random.default_rng(0)
    answers = np.array([[0, 0, -1, 1, 1, 1, -1, 2]] * 3)
    questions = Questions(random.integers(CONFIG.vocabulary_size, size=(3, length)), answers)
    read, scored = [], []
    with (
        model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].shape[1])),
        model.backbone.lm_head.register_forward_pre_hook(lambda _, arguments: scored.append(arguments[0].shape[1])),
    ):
        answer(reader(model), questions, "answers")
    assert sum(read) == length - 8 + 7 + 7
    segments = -(-(length - 8) // SEGMENT)
    assert sum(scored) == segments + 7 + 5  # what is asked for first is known from the text


def test_figures_do_not_depend_on_the_batch(model):
    one, other = (measure_cells(reader(model, size), SOURCE, "test", 36, [0, 1], 4, "recall") for size in (1, 5))
    for found, cell in zip(other, one, strict=True):
        assert found == pytest.approx(cell, rel=1e-5)


def test_who_knows_nothing_is_at_chance(model):
    config = AssociativeRecallConfig(keys=20, values=4, queries=2, depths=[0.5], lengths=[36], test_questions=60)
    (cell,) = make(model, config).measure("here")["cells"]
    assert cell["exact_match"] < 0.25 + 4 * np.sqrt(0.25 * 0.75 / 120)


def test_validation_is_of_the_first_length(witness, model):
    perfect = make(witness(CONFIG.vocabulary_size, SEGMENT)).validate()
    assert perfect.metrics == {"validation/loss": perfect.loss, "validation/accuracy": 1, "validation/exact_match": 1}
    assert perfect.loss == pytest.approx(np.log(1 + 24 * np.exp(-5)))
    cells = measure_cells(reader(model), SOURCE, "validation", 36, [0, 0.5, 1], 4, "")
    measured = make(model).validate()
    assert measured.loss == pytest.approx(np.mean([cell["nll"] for cell in cells]), rel=1e-5)
    assert measured.loss > perfect.loss


def test_the_headline_is_the_mean_over_all_answers_and_over_all_of_their_tokens(model):
    cells = [
        {"answers": answers, "tokens": tokens, "exact_match": exact, "accuracy": accuracy}
        for answers, tokens, exact, accuracy in ((2, 4, 0.5, 0.75), (6, 24, 1.0, 1.0))
    ]
    headline = make(model).headline({"cells": cells, "controls": {}})
    assert headline == {"test/exact_match": pytest.approx(7 / 8), "test/accuracy": pytest.approx(27 / 28)}


def test_the_report_is_a_file_a_table_and_a_figure(witness, tmp_path, capsys):
    retrieval = make(witness(CONFIG.vocabulary_size, SEGMENT))
    results = retrieval.measure("here") | {"before": None}
    (figure,) = retrieval.report(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert figure == tmp_path / "plots" / "accuracy_by_length_and_depth.png"
    assert figure.is_file()
    headline = retrieval.headline(results)
    assert headline["test/exact_match"] == headline["test/accuracy"] == 1  # a witness
    assert headline.keys() == {
        f"test/{name}" for name in ("exact_match", "accuracy", "memory_off/exact_match", "memory_off/accuracy")
    }
    shown = capsys.readouterr().out
    assert shown == format_accuracy(results) + "\n"
    header, *rows, last = shown.splitlines()
    assert header.split() == ["depth", "36", "20"]
    assert rows[0].split() == ["0.00", "1.000", "/", "1.000", "1.000", "/", "1.000"]
    assert [row.split()[0] for row in rows] == ["0.00", "0.50", "1.00"] * 2
    off = results["controls"]["memory_off"]
    assert rows[3].split()[1:4] == ["memory", "off", f"{off[0]['exact_match']:.3f}"]
    assert all(len(row) == len(header) for row in rows)
    assert re.search(r"associative recall by depth .* 10 answers each, chance 0.25; segments of 8 tokens", last)


def test_a_sample_shows_what_is_true_and_what_is_said(witness):
    retrieval = make(witness(CONFIG.vocabulary_size, SEGMENT))
    true = SOURCE.draw("validation", [1], 0, 36, np.ones((1, 2))).true_answers.tolist()
    assert retrieval.sample(5, 64) == f"text 1, depth 1: {true[0]} {true[1]}; the model: {true[0]} {true[1]}"
    assert retrieval.sample(5, 1) == f"text 1, depth 1: {true[0]}; the model: {true[0]}"


def test_what_cannot_be_asked_is_refused_at_once(witness):
    with pytest.raises(DataError, match=r"25 symbols, and the model knows 24: take one that knows .*vocab_size=25\)"):
        make(witness(24, SEGMENT))
    short = AssociativeRecallConfig(keys=20, values=4, queries=2, lengths=[36, 8])
    with pytest.raises(DataError, match=r"a length of 8 .*task.queries=2"):
        make(witness(25, SEGMENT), short)


def test_the_table_has_a_line_for_each_depth_and_a_column_for_each_length():
    """Whole answers first."""

    def cells(start: float) -> list[dict]:
        return [
            {
                "length": length,
                "depth": depth,
                "answers": 20,
                "exact_match": start + 0.1 * row + 0.01 * column,
                "accuracy": start + 0.1 * row + 0.01 * column + 0.005,
                "accuracy_free_running": 0.999,
            }
            for column, length in enumerate((4096, 1024))
            for row, depth in enumerate((0.0, 0.5))
        ]

    protocol = {"segment": 64, "reset": "each begins with an empty memory", "dtype": "bfloat16", "task": "passkey"}
    results = {"cells": cells(0.5), "controls": {"memory_off": cells(0.1)}, "chance": 1e-5, "protocol": protocol}
    assert format_accuracy(results).splitlines() == [
        "depth                               4,096            1,024",
        "0.00                        0.500 / 0.505    0.510 / 0.515",
        "0.50                        0.600 / 0.605    0.610 / 0.615",
        "0.00    memory off          0.100 / 0.105    0.110 / 0.115",
        "0.50    memory off          0.200 / 0.205    0.210 / 0.215",
        "passkey by depth (0: beginning) and length (tokens): whole answers free running / tokens teacher forced; 20 "
        "answers each, chance 1e-05; segments of 64 tokens, each begins with an empty memory, bfloat16",
    ]
