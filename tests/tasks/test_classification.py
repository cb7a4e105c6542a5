"""A model is asked for the class of an example at its end, whether it reads it at once or piece by piece."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from infformer.commands import eval as evaluation
from infformer.config import CONF, TASKS, EvaluationRunConfig, RunConfig
from infformer.data.examples import Example, Examples, keep_examples
from infformer.data.segments import IGNORE_INDEX
from infformer.errors import DataError, UserError
from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.document_classifier import DocumentClassifier, HeadConfig
from infformer.models.encoder import ClassifierConfig, TextClassifier
from infformer.models.pretrained import InfformerForCausalLM
from infformer.tasks.classification import (
    ClassificationConfig,
    ExampleStream,
    baselines,
    format_classification,
    measure,
    share_interval,
)
from infformer.tasks.task import Material
from infformer.training.command_line import compose
from infformer.training.metrics import read_metrics
from infformer.training.step import Microbatch, _forward, _Sums

pytestmark = pytest.mark.usefixtures("composed_quickly")
SMALL = [
    "model.architecture.hidden_size=16",
    "model.architecture.feed_forward_size=16",
    "training.batch_size=4",
    "training.max_steps=8",
    "training.evaluate_every=3",
    "training.checkpoint_every=2",
    "training.log_every=1",
    "schedule.warmup_steps=2",
]


@pytest.fixture(autouse=True)
def cache_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFFORMER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    """Texts of 3 to 20 tokens, of one of three classes, which is the first token less one."""
    random = np.random.default_rng(0)
    drawn = [random.integers(1, 4, size=random.integers(3, 21)) for _ in range(13)]
    made = (Example("here", (tokens,), str(tokens[0] - 1)) for tokens in drawn)
    return keep_examples(tmp_path / f"test-{'0' * 32}", made, 5, ["0", "1", "2"], "here")


@pytest.fixture
def reviews(tmp_path: Path) -> dict[str, str]:
    """A table for each split, of texts whose class is a word in them."""
    random = np.random.default_rng(0)
    paths = {}
    for split, count in {"train": 40, "validation": 10, "test": 20}.items():
        paths[split] = str(tmp_path / f"{split}.csv")
        with open(paths[split], "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(count):
                word = ("good", "bad")[number % 2]
                rest = " ".join(random.choice(["film", "plot", "actor"], size=random.integers(1, 9)))
                writer.writerow([f"{word} {rest}", word])
    return paths


def typed(reviews: dict[str, str], folder: Path, *options: str) -> RunConfig:
    """What `task=classification data.train=mine.csv …` means."""
    places = [f"data.{split}={path}" for split, path in reviews.items()]
    return compose("train", RunConfig, CONF, ["task=classification", *places, f"output_dir={folder}", *options])


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]


def test_a_table_of_ones_own_is_learned(reviews, train, tmp_path):
    """The classifier finds the word; what is known without reading is half."""
    options = ("model=classifier", "task.length=64", "training.max_steps=60", "optimizer.learning_rate=1e-2")
    results = train(typed(reviews, tmp_path / "run", *SMALL[:3], *SMALL[4:5], "schedule.warmup_steps=2", *options))
    assert (results["examples"], results["classes"], results["baselines"]) == (20, 2, {"majority": 0.5})
    assert results["accuracy"] > 0.9
    low, high = results["accuracy_interval"]
    assert low < results["accuracy"] <= high
    assert "this model" in format_classification(results)
    assert "attention looks" in format_classification(results)
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert written["accuracy"] == results["accuracy"]
    assert len(written["attention_span"]["layers"]) == 2
    validated = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/accuracy" in line]
    assert len(validated) == 20


@pytest.mark.parametrize("model", ["classifier", "tiny model.head.kind=plain training.segment_length=16"])
def test_a_measured_checkpoint_has_the_accuracy_of_its_run(reviews, train, one_layer_folder, tmp_path, model):
    own = SMALL if model == "classifier" else [*SMALL[2:], f"model.pretrained={one_layer_folder}"]
    results = train(typed(reviews, tmp_path / "run", *f"model={model}".split(), "task.length=64", *own))
    options = ["task=classification", "task.length=64", f"checkpoint={tmp_path / 'run' / 'checkpoints' / 'best'}"]
    places = [f"data.{split}={reviews[split]}" for split in ("train", "test")]
    config = compose("eval", EvaluationRunConfig, CONF, [*options, *places, f"output_dir={tmp_path / 'measured'}"])
    evaluation.run(config)
    measured = json.loads((tmp_path / "measured" / "results.json").read_text())
    assert measured["accuracy"] == results["accuracy"]
    assert measured["nll"] == pytest.approx(results["nll"], abs=1e-6)
    with pytest.raises(UserError, match="is a classifier and predicts no token"):
        evaluation.run(compose("eval", EvaluationRunConfig, CONF, [options[-1], f"output_dir={tmp_path / 'other'}"]))


@pytest.mark.parametrize("model", ["classifier", "tiny", "tiny model.head.kind=batch_norm training.bptt_segments=2"])
def test_learning_resumed_equals_learning_never_stopped(reviews, train, one_layer_folder, tmp_path, model):
    """Tiny has a memory, and a tokenizer cuts the texts up, which are longer than a segment of 16 tokens."""
    own = SMALL if model == "classifier" else SMALL[2:]
    small = ["training.segment_length=16", f"model.pretrained={one_layer_folder}"]
    segment = ["task.length=64"] if model == "classifier" else small
    options = [*f"model={model}".split(), *segment, *own, "schedule=constant", "evaluation.controls=false"]
    train(typed(reviews, tmp_path / "whole", *options))
    train(typed(reviews, tmp_path / "cut", *options, "training.max_steps=5"))
    train(typed(reviews, tmp_path / "cut", *options, "resume=auto"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    weights = [
        load_file(tmp_path / run / "checkpoints/step-00000008/model/model.safetensors") for run in ("cut", "whole")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert len(losses(tmp_path / "whole")) == 8


def test_a_run_goes_on_with_the_same_examples_alone(reviews, train, tmp_path):
    options = ["model=classifier", "task.length=64", *SMALL]
    train(typed(reviews, tmp_path / "run", *options, "training.max_steps=5"))
    with open(reviews["train"], "a") as file:
        file.write("good heavens,good\n")
    with pytest.raises(UserError, match="data"):
        train(typed(reviews, tmp_path / "run", *options, "resume=auto"))


def stream_of(examples: Examples, lanes: int = 4, segment_length: int = 8, rows: range | None = None) -> ExampleStream:
    material = Material(None, lanes=lanes, rank_rows=rows or range(lanes), segment_length=segment_length, seed=3)
    return ExampleStream(examples, material)


def test_every_epoch_reads_every_example_once_with_its_class_at_its_end(examples):
    stream, read = stream_of(examples), []
    for _ in range(13):  # of four examples each: four epochs
        segments = stream.next_step()
        tokens, targets = (torch.cat([getattr(s, name) for s in segments], 1) for name in ("input_ids", "targets"))
        lengths = torch.stack([segment.lengths for segment in segments]).sum(0)
        assert sum(segment.global_tokens for segment in segments) == 4
        assert segments[0].reset.all()
        for row, number in enumerate(segments[0].documents.tolist()):
            text = examples.text(number)
            assert tokens[row, : lengths[row]].tolist() == text.tolist()
            assert not tokens[row, lengths[row] :].any()
            scored = (targets[row] != IGNORE_INDEX).nonzero().flatten().tolist()
            assert scored == [len(text) - 1]
            assert targets[row, scored[0]] == text[0] - 1 == examples.labels[number]
            read.append(number)
    epochs = [read[first : first + 13] for first in range(0, 52, 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_what_a_lane_reads_does_not_depend_on_the_number_of_processes(examples):
    whole, parts = stream_of(examples), [stream_of(examples, rows=range(first, first + 2)) for first in (0, 2)]
    for _ in range(5):
        alone = whole.next_step()
        together = [part.next_step() for part in parts]
        assert {len(alone)} == {len(steps) for steps in together}
        for number, segment in enumerate(alone):
            for name in ("input_ids", "targets", "lengths", "documents"):
                joined = torch.cat([getattr(steps[number], name) for steps in together])
                assert torch.equal(getattr(segment, name), joined)
            assert {steps[number].global_tokens for steps in together} == {segment.global_tokens}


def test_batches_can_have_one_shape(examples):
    material = Material(None, lanes=2, rank_rows=range(2), segment_length=32)
    (segment,) = ExampleStream(examples, material, least=32).next_step()
    assert segment.input_ids.shape == (2, 32)


def document_classifier(labels: list[str], **options: Any) -> DocumentClassifier:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8, "dropout": 0.0}
    reader = DecoderForCausalLM(DecoderConfig(vocab_size=5, segment_length=8, **sizes, **options))
    return DocumentClassifier.on_top(reader, HeadConfig("plain", 4, 0.0), labels)


def gradients(model: Any, segments: list[Any], rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Of some lanes, as a step of training has them."""
    model.train().zero_grad()
    shares = [segment.rows(rows) for segment in segments]
    nothing = [None] * len(shares)
    memory = model.initial_state(len(shares[0].lanes))
    microbatch = Microbatch(shares, memory, nothing, nothing, 0)
    _forward(model, microbatch, 1, _Sums(torch.device("cpu")))[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bptt_segments", [1, 2, 9])
def test_a_text_gives_a_head_the_same_gradients_whatever_it_is_read_beside(examples, bptt_segments):
    """They flow through its last segments, which all texts of a step have in common."""
    model = document_classifier(["0", "1", "2"], memory=MemoryConfig(short_term_length=8))
    material = Material(None, lanes=13, rank_rows=range(13), segment_length=8, bptt_segments=bptt_segments)
    segments = ExampleStream(examples, material, together=True).next_step()
    assert [segment.global_tokens for segment in segments] == [0, 0, 13]
    assert [segment.is_learned for segment in segments] == [bptt_segments > 2, bptt_segments > 1, True]
    together = gradients(model, segments)
    alone: dict[str, torch.Tensor] = {}
    for row, number in enumerate(segments[0].documents.tolist()):
        text = torch.from_numpy(examples.text(number)).unsqueeze(0)
        pieces = text.split(8, dim=1)
        learned = [index >= len(pieces) - bptt_segments for index in range(len(pieces))]
        targets = torch.full_like(pieces[-1], IGNORE_INDEX)
        targets[0, -1] = int(examples.labels[number])
        own = [
            replace(
                segments[-1].rows(slice(row, row + 1)), input_ids=piece, lengths=torch.tensor([piece.shape[1]]),
                targets=targets if last else torch.full_like(piece, IGNORE_INDEX), is_learned=learns,
                global_tokens=int(last), reset=torch.tensor([False]),
            )
            for piece, learns, last in zip(
                pieces, learned, [index == len(pieces) - 1 for index in range(len(pieces))], strict=True
            )
        ]  # fmt: skip
        for name, gradient in gradients(model, own).items():
            alone[name] = alone.get(name, 0) + gradient
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-6, rtol=1e-4)


def test_the_texts_of_a_head_are_read_whole_and_end_together(examples):
    material = Material(None, lanes=4, rank_rows=range(1, 3), segment_length=8, seed=3)
    for segments in [ExampleStream(examples, material, together=True).next_step() for _ in range(3)]:
        assert segments[0].reset.all()
        for row, number in enumerate(segments[0].documents.tolist()):
            read = torch.cat([segment.input_ids[row, : segment.lengths[row]] for segment in segments])
            assert read.tolist() == examples.text(number).tolist()
            last = segments[-1]
            assert last.targets[row, last.lengths[row] - 1] == examples.labels[number]
            assert sum((segment.targets[row] != IGNORE_INDEX).sum() for segment in segments) == 1
            assert last.starts[row] == (len(examples.text(number)) - 1) // 8 * 8


def test_labels_that_a_head_does_not_know_are_refused(examples):
    evaluator = Evaluator(model=document_classifier(["a", "b", "c"]), protocol=ReadingProtocol(8))
    with pytest.raises(DataError, match=r"data\.test has the classes 0, 1, 2, and the model tells a, b, c apart"):
        ClassificationConfig().build_evaluation(Material(evaluator, examples={"test": examples}))


@pytest.fixture(params=["classifier", "decoder", "head"])
def model(request) -> Any:
    torch.manual_seed(0)
    if request.param == "head":
        return document_classifier(["0", "1", "2"], memory=MemoryConfig(short_term_length=8))
    if request.param == "classifier":
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "feed_forward_size": 8, "longest": 32}
        return TextClassifier(ClassifierConfig(vocab_size=5, classes=3, initializer_range=1.0, **sizes))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8}
    memory = MemoryConfig(short_term_length=8)
    return DecoderForCausalLM(DecoderConfig(vocab_size=5, memory=memory, segment_length=8, **sizes))


def read(model: Any, examples: Examples, batch_size: int = 3, processes: Processes | None = None) -> Any:
    length = model.choose_segment_length(None)
    silent = Processes(progress=False)
    return measure(Evaluator(model=model, protocol=ReadingProtocol(length), batch_size=batch_size,
                             processes=processes or silent), examples, "test")  # fmt: skip


def test_figures_are_those_of_each_example_read_alone(model, examples):
    right, nats = [], []
    for number in range(len(examples)):
        state, label = None, int(examples.labels[number])
        for segment in torch.from_numpy(examples.text(number)).split(model.choose_segment_length(None)):
            with torch.no_grad():
                output = model.eval()(segment.unsqueeze(0), state=state)
            state = output.state
        scores = output.logits[0, -1]
        right.append(int(scores[:3].argmax()) == label)
        nats.append(float(-scores.log_softmax(-1)[label]))
    found = read(model, examples)
    assert found["accuracy"] == np.mean(right)
    assert found["nll"] == pytest.approx(np.mean(nats), abs=1e-5)


def test_figures_do_not_depend_on_batches_and_processes(model, examples):
    alone = read(model, examples)
    assert read(model, examples, batch_size=100)["nll"] == pytest.approx(alone["nll"], abs=1e-6)
    sums: list[torch.Tensor] = []

    def keep(own: torch.Tensor) -> torch.Tensor:
        sums.append(own)
        return own

    for rank in range(3):
        read(model, examples, 4, Processes(rank, 3, reduce=keep, progress=False))
    nats = sum(sums)[1]
    assert float(nats.double().mean()) == pytest.approx(alone["nll"], abs=1e-6)
    assert float(sum(sums)[0].mean()) == pytest.approx(alone["accuracy"])


def test_figures_of_pairs_that_a_language_model_reads_do_not_depend_on_batches(examples, tmp_path):
    drawn = [examples.text(number) for number in range(len(examples))]
    pairs = [Example("here", (own, other), str(own[0] - 1)) for own, other in pairwise(drawn)]
    kept = keep_examples(tmp_path / f"test-{'1' * 32}", pairs, 5, ["0", "1", "2"], "here")
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2, initializer_range=1.0)
    model = InfformerForCausalLM.from_backbone(
        GPT2LMHeadModel(shape), LongTermMemoryConfig(basis_functions=4, past_samples=4), segment_length=8
    )
    assert read(model, kept, 12)["nll"] == pytest.approx(read(model, kept, 1)["nll"], abs=1e-5)


def test_an_example_that_a_model_cannot_see_is_refused(examples):
    model = TextClassifier(ClassifierConfig(vocab_size=5, classes=3, longest=16))
    evaluator = Evaluator(model=model, protocol=ReadingProtocol(16))
    with pytest.raises(DataError, match=r"training\.segment_length=16: an example of data\.test has 19 tokens"):
        ClassificationConfig().build_evaluation(Material(evaluator, examples={"test": examples}))


def test_what_a_measured_model_cannot_see_is_refused_by_options_of_eval(examples):
    model = TextClassifier(ClassifierConfig(vocab_size=5, classes=3, longest=16))
    material = Material(Evaluator(model=model, protocol=ReadingProtocol(16)), learns=False)
    with pytest.raises(DataError) as caught:
        ClassificationConfig().build_evaluation(replace(material, examples={"test": examples}))
    assert str(caught.value).startswith("segment_length=16: an example of data.test has 19 tokens")
    assert "model.architecture" not in str(caught.value)
    ClassificationConfig().build_evaluation(replace(material, examples={"train": examples}))  # which it does not read


def test_more_classes_than_a_model_knows_are_refused(examples):
    model = TextClassifier(ClassifierConfig(vocab_size=5, classes=2, longest=32))
    evaluator = Evaluator(model=model, protocol=ReadingProtocol(32))
    with pytest.raises(DataError, match=r"data\.train has 3 classes, and the model knows 2"):
        ClassificationConfig().build_evaluation(Material(evaluator, examples={"train": examples}))


def test_baselines_of_a_measured_model_are_those_of_its_training_examples(reviews, tmp_path):
    with open(reviews["train"], "a") as file:
        file.write("a plot,good\n")  # the most frequent class, which is that of a quarter in the test
    with open(reviews["test"], "a") as file:
        file.write("a film,bad\n" * 20)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "feed_forward_size": 8, "longest": 64}
    TextClassifier(ClassifierConfig(vocab_size=257, classes=2, **sizes)).save_pretrained(tmp_path / "model")
    options = ["task=classification", "task.length=64", f"checkpoint={tmp_path / 'model'}", "data.validation=null"]
    places = [f"data.{split}={reviews[split]}" for split in ("train", "test")]
    evaluation.run(
        compose("eval", EvaluationRunConfig, CONF, [*options, *places, f"output_dir={tmp_path / 'measured'}"])
    )
    assert json.loads((tmp_path / "measured" / "results.json").read_text())["baselines"] == {"majority": 0.25}


def test_without_training_examples_there_are_no_baselines(examples):
    model = TextClassifier(ClassifierConfig(vocab_size=5, classes=3, longest=32))
    evaluator = Evaluator(model=model, protocol=ReadingProtocol(32), processes=Processes(progress=False))
    task = ClassificationConfig().build_evaluation(Material(evaluator, examples={"test": examples}))
    assert task.measure("somewhere")["baselines"] == {}


def test_baselines_are_learned_and_then_measured(examples):
    train = replace(examples, labels=np.full(13, 2))
    assert baselines(train, examples, "text") == {"majority": float((examples.labels == 2).mean())}
    assert baselines(examples, examples, "listops")["root_operator"] == 1.0  # the class is the first token


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (99, 100, 0.9455, 0.9982)]
)
def test_intervals_are_those_of_wilson(count, total, low, high):
    assert share_interval(count, total) == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["task=classification", "task.kind=words"], "task.kind=words: choose one of text"),
        (["task=classification", "task.length=0"], "task.length=0: must be at least 1"),
        (["task=lra_retrieval", "task.length=7"], "task.length=7: the texts of a pair have half each"),
        (["task=classification", "task.label_field="], "task.label_field=: name the field"),
        (
            ["task=classification", f"task.examples_seed={2**32}"],
            "task.examples_seed=4294967296: must be a whole number",
        ),
        (["model=classifier"], "model=classifier tells classes apart and predicts no token"),
        (["model=classifier", "task=classification", "model/memory=sticky"], "a classifier takes a text at once"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(UserError) as caught:
        compose("train", RunConfig, CONF, options)
    assert said in str(caught.value)


ARENA = {
    "lra_listops": (2000, {"lra_small": 2, "lra_release": 4, "lra_paper": 6}),
    "lra_text": (4000, {"lra_small": 2, "lra_release": 4, "lra_paper": 6}),
    "lra_retrieval": (8000, {"lra_small": 2, "lra_release": 4, "lra_paper": 4}),
    "lra_image": (1024, {"lra_small": 2, "lra_release": 1, "lra_paper": 3}),
    "lra_pathfinder": (1024, {"lra_small": 2, "lra_release": 4, "lra_paper": 4}),
    "lra_path_x": (16384, {"lra_small": 2, "lra_release": 1, "lra_paper": 4}),
}
"""The length of each task, and the layers that each set of sizes has for it."""


@pytest.mark.parametrize("task", ARENA)
def test_every_task_of_the_arena_can_be_chosen(task):
    config = compose("train", RunConfig, CONF, [f"experiment={task}"])
    length, layers = ARENA[task]
    assert (config.training.segment_length, config.task.length) == (length, length)
    assert (config.name, config.model.architecture["num_hidden_layers"]) == (task, layers["lra_small"])


@pytest.mark.parametrize("chosen", ["lra_small", "lra_release", "lra_paper"])
def test_every_set_of_sizes_has_those_of_every_task(chosen):
    for task, (length, layers) in ARENA.items():
        of_the_task = [f"task.kind={TASKS[task].kind}", f"task.length={length}"]
        config = compose("train", RunConfig, CONF, ["experiment=lra_listops", f"model={chosen}", *of_the_task])
        assert (config.training.segment_length, config.task.length) == (length, length)
        assert config.model.architecture["num_hidden_layers"] == layers[chosen]


def test_lists_are_learned_from_the_command_line(train, tmp_path):
    options = ["task.length=60", "task.training_examples=50", "task.validation_examples=20", "task.test_examples=30"]
    options += ["model.architecture.attention=linear", f"output_dir={tmp_path / 'run'}", "schedule.warmup_steps=2"]
    config = compose("train", RunConfig, CONF, ["experiment=lra_listops", *options, *SMALL])
    results = train(config)
    assert results["examples"] == 30
    assert set(results["baselines"]) == {"majority", "root_operator"}
