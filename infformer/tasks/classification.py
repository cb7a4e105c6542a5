"""Classification: a model reads an example to its end, and is asked there for its class.

The classes are the first tokens of a language model's vocabulary, or all that a classifier knows. An example is as
many segments as it takes, of which only the last has a target: a classifier takes it whole, a model with a memory, or a
head that pools what is read, may read it piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from infformer.data.examples import Examples
from infformer.data.long_range_arena import KINDS, ExampleSource
from infformer.data.options import DataConfig
from infformer.data.segments import IGNORE_INDEX, Segment
from infformer.errors import DataError
from infformer.evaluation.attention_span import measure_attention_span
from infformer.models.document_classifier import DocumentClassifier
from infformer.models.streaming import TextSegment, reading, stream
from infformer.options import check_at_least, check_choices, measuring
from infformer.progress import Pace
from infformer.results import ClassificationResults, Interval
from infformer.tasks.task import Evaluation, Material, TaskConfig, TextStream, Validation, cut_texts, numbers_of_step

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase

    from infformer.evaluation.streaming import Evaluator
    from infformer.models.base import MemoryModel


@dataclass
class ClassificationConfig(TaskConfig):
    """The task of saying which class an example is of: a text, a pair of texts, or an image."""

    kind: str = "text"
    """`text`: texts with labels of `data`, cut up by the model's tokenizer if it has one. `bytes`: the same as bytes.
    `pairs`: of two texts, as bytes. `pixels`: images, in levels of grey. `listops`, `pathfinder`, `path_x`: what
    Long-Range Arena calls so; drawn here, unless `data` names files, or by `data.path` its archive."""
    length: int = 1024
    """Tokens of an example, at most: longer texts are cut, and each of a pair to half of it. Pixels of an image."""
    label_field: str = "label"
    """The field, or the column, that holds the class, a number or a word."""
    training_examples: int | None = None
    """How many to learn from, taken from all. Null: all."""
    validation_examples: int | None = measuring(None, "validation")
    """How many are measured during training. Null: all."""
    test_examples: int | None = measuring(None, "test")
    """How many are measured at the end. Null: all."""
    pad_to_length: bool = False
    """Pad all texts to `length`, so that every step has the same shape: for training.compile. False: to the longest
    one of the step."""
    examples_seed: int = 0
    """Of examples that are drawn: another one gives other lists and images, for all runs that share it."""

    has_examples = True

    def __post_init__(self) -> None:
        check_choices("task.", self, kind=KINDS)
        check_at_least(1, "task.", self, "length", "training_examples", "validation_examples", "test_examples")
        if self.length % self.texts:
            raise ValueError(f"task.length={self.length}: the texts of a pair have half each; choose an even number")
        if not 0 <= self.examples_seed < 2**32:
            raise ValueError(f"task.examples_seed={self.examples_seed}: must be a whole number from 0 to 4294967295")
        if not self.label_field.strip():
            raise ValueError("task.label_field=: name the field that holds the class, such as task.label_field=label")

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are, where no tokenizer cuts texts up."""
        return self.source.vocabulary_size

    @property
    def takes_tokenizer(self) -> bool:
        """Whether the model's own tokenizer cuts texts up, if it has one."""
        return self.kind == "text"

    def sizes(self, of_classifier: bool) -> dict[str, int | None]:
        if not of_classifier:
            return super().sizes(of_classifier)
        return {"vocab_size": self.vocabulary_size, "texts": self.texts, "longest": self.length // self.texts}

    @property
    def texts(self) -> int:
        """How many texts an example has."""
        return 2 if self.kind == "pairs" else 1

    @property
    def source(self) -> ExampleSource:
        """Where the examples come from."""
        return ExampleSource(self.kind, self.length // self.texts, self.label_field, self.examples_seed)  # type: ignore[arg-type]

    def describe_drawn(self, data: DataConfig) -> str | None:
        drawn = self.source.is_drawn(data)
        return f"Examples of `{self.kind}` of Long-Range Arena, drawn by seed {self.examples_seed}." if drawn else None

    def own_data(self, data: DataConfig) -> DataConfig:
        return self.source.own(data)

    def check_data(self, data: DataConfig, splits: Sequence[str] | None = None) -> None:
        self.source.check(data, self.source.splits(data) if splits is None else splits)

    def read_examples(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        main_process_first: AbstractContextManager[Any] | None = None,
        splits: Sequence[str] | None = None,
    ) -> dict[str, Examples]:
        most = {"train": self.training_examples, "validation": self.validation_examples, "test": self.test_examples}
        chosen = self.source.splits(data) if splits is None else splits
        return self.source.read(data, chosen, most.__getitem__, tokenizer, main_process_first)

    def build_stream(self, material: Material) -> ExampleStream:
        model = material.evaluator.model
        towers = _towers(model)
        least = self.length // towers + self.texts - towers if self.pad_to_length else 1
        return ExampleStream(material.examples["train"], material, least, isinstance(model, DocumentClassifier), towers)

    def build_evaluation(self, material: Material) -> Classification:
        return Classification(self, material)


class ExampleStream(TextStream):
    """Examples epoch after epoch, each epoch in an order of its own: in one step every lane reads one, from its start.

    Args:
        examples: to learn from.
        material: the lanes, the segment and the seed.
        least: to which length texts are padded at least.
        together: the texts of a step all end in its last segment, shorter ones begin later, and gradients flow through
            the last `bptt_segments` of each, whatever it is read beside.
        towers: how many texts of an example the model reads apart; None: all.
    """

    def __init__(
        self,
        examples: Examples,
        material: Material,
        least: int = 1,
        together: bool = False,
        towers: int | None = None,
    ) -> None:
        super().__init__(material, {"data": examples.fingerprint})
        self._examples = examples
        self._least = least
        self._together = together
        self._towers = towers

    def _segments(self, step: int, reads: int) -> list[Segment]:
        material = self._material
        numbers = numbers_of_step(step, material.lanes, len(self._examples), material.seed)
        tokens, lengths, targets = _with_targets(self._examples, numbers, self._least, self._towers)
        if not self._together:
            return cut_texts(tokens, targets, numbers, material, reads, lengths)
        tokens, targets, waits = _ending_together(tokens, targets, lengths, material.segment_length)
        segments = cut_texts(tokens, targets, numbers, material, reads, lengths, waits)
        last = len(segments) - material.bptt_segments
        return [replace(segment, is_learned=index >= last) for index, segment in enumerate(segments)]

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(lambda number: f"example {number}")

    def describe(self) -> str:
        examples = self._examples
        return f"{len(examples):,} examples of {len(examples.classes)} classes to learn from"


def _towers(model: MemoryModel) -> int:
    """How many texts of an example a model reads apart: two, if it was made for pairs."""
    return int(getattr(model.config, "texts", 1))


def _with_targets(
    examples: Examples, numbers: NDArray[np.int64], least: int, towers: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Examples side by side, how long they are, and their classes at their last tokens, [examples, length]."""
    tokens, lengths = map(torch.from_numpy, examples.batch(numbers, least, towers))
    labels = torch.from_numpy(examples.labels[numbers]).unsqueeze(1)
    return tokens, lengths, torch.full_like(tokens, IGNORE_INDEX).scatter_(1, lengths.unsqueeze(1) - 1, labels)


def _ending_together(tokens: Tensor, targets: Tensor, lengths: Tensor, segment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Texts and their targets behind as many segments of padding as let all of them end in the last segment.

    Returns:
        Tokens and targets, [texts, whole segments], and how many segments of padding stand before each text, [texts].
    """
    count = -(-tokens.shape[1] // segment)
    if count == 1:
        return tokens, targets, torch.zeros_like(lengths)
    waits = count - (lengths + segment - 1) // segment
    places = torch.arange(count * segment) - waits.unsqueeze(1) * segment
    is_inside = (places >= 0) & (places < tokens.shape[1])
    places = places.clamp(0, tokens.shape[1] - 1)
    later = tokens.gather(1, places).where(is_inside, 0), targets.gather(1, places).where(is_inside, IGNORE_INDEX)
    return *later, waits


class Measured(TypedDict):
    """How well the examples of one split are told apart."""

    examples: int
    nll: float
    """Nats per example."""
    accuracy: float
    accuracy_interval: Interval


class Classification(Evaluation[ClassificationResults]):
    """How often a model says the right class.

    Args:
        config: which examples.
        material: the examples, and how they are read, by which model.

    Raises:
        DataError: the model does not know as many classes, or cannot see a whole example.
    """

    def __init__(self, config: ClassificationConfig, material: Material) -> None:
        self._config = config
        self._evaluator = material.evaluator
        self._examples = material.examples
        model, length, learns = material.evaluator.model, material.evaluator.protocol.segment_length, material.learns
        for split, examples in self._examples.items():
            longest = examples.longest * examples.texts + examples.texts - _towers(model)
            is_read = learns or split != "train"
            if is_read and not model.has_memory and longest > length:
                option, sees_more, remembers = (
                    ("training.segment_length", "and model.architecture.longest of a classifier", "by model/memory=")
                    if learns
                    else ("segment_length", "if the model has as many positions", "in another model")
                )
                raise DataError(
                    f"{option}={length}: an example of data.{split} has {longest:,} tokens, and a model without memory "
                    f"would see only a piece of it: set it to {longest} ({sees_more}), shorten examples by "
                    f"task.length=, or choose a memory {remembers}"
                )
            labels = getattr(model.config, "labels", None)
            if labels is not None and examples.classes != labels:
                raise DataError(
                    f"data.{split} has the classes {', '.join(examples.classes)}, and the model tells "
                    f"{', '.join(labels)} apart: give texts of these classes, the task.label_field= that says them, "
                    "and data.train= as in training, by which they are numbered; or train a new head"
                )
            classes = len(examples.classes)
            known = getattr(model.config, "classes", model.vocabulary_size)
            if classes > known:
                remedy = " (model.architecture.vocab_size, or classes of a classifier)" if learns else ""
                raise DataError(
                    f"data.{split} has {classes} classes, and the model knows {known}: choose one with more{remedy}"
                )

    def validate(self) -> Validation | None:
        if "validation" not in self._examples:
            return None
        figures = measure(self._evaluator, self._examples["validation"], "validation")
        loss, accuracy = figures["nll"], figures["accuracy"]
        return Validation(
            loss,
            {"validation/loss": loss, "validation/accuracy": accuracy},
            f"validation accuracy {accuracy:.3f}, loss {loss:.3f}",
        )

    def measure(self, checkpoint: str) -> ClassificationResults | None:
        if "test" not in self._examples:
            return None
        test, train = self._examples["test"], self._examples.get("train")
        protocol = self._evaluator.protocol
        results: ClassificationResults = {
            **measure(self._evaluator, test, "test"),
            "classes": len(test.classes),
            "baselines": {} if train is None else baselines(train, test, self._config.kind),
            "protocol": {
                "task": self._config.kind,
                "length": self._config.length,
                "segment": protocol.segment_length,
                "dtype": protocol.dtype,
                "checkpoint": checkpoint,
            },
        }
        span = measure_attention_span(self._evaluator.model, test)
        if span is not None:
            results["attention_span"] = span
        return results

    def table(self, results: ClassificationResults) -> str:
        return format_classification(results)

    def headline(self, results: ClassificationResults) -> dict[str, float]:
        return {"test/loss": results["nll"], "test/accuracy": results["accuracy"]}


def measure(evaluator: Evaluator, examples: Examples, title: str) -> Measured:
    """Ask a model for the class of every example; it is left in evaluation mode. All processes together."""
    outcome = np.zeros((2, len(examples)))
    with reading(evaluator.model, evaluator.protocol.precision):
        order = np.argsort(-examples.lengths.sum(axis=1), kind="stable")
        total = len(order[evaluator.processes.rank :: evaluator.processes.world_size])
        with Pace(title, total, "examples", evaluator.processes.progress) as pace:
            for numbers, counted in evaluator.shares(order):  # alike in length
                outcome[:, numbers[:counted]] = _answer(evaluator, examples, numbers)[:, :counted]
                pace.advance(counted)
    right, nats = evaluator.of_all_processes(outcome)
    count = int(right.sum())
    return {
        "examples": len(examples),
        "nll": float(nats.mean(dtype=np.float64)),
        "accuracy": count / len(examples),
        "accuracy_interval": share_interval(count, len(examples)),
    }


def share_interval(count: int, total: int) -> Interval:
    """Wilson's interval of 95 % of a share of independent examples."""
    share, z = count / total, 1.959964
    middle = share + z * z / (2 * total)
    half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return [(middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)]


def baselines(train: Examples, test: Examples, kind: str) -> dict[str, float]:
    """What is right without reading: the most frequent class; of lists, that of all with the same first operation."""
    most = np.bincount(train.labels, minlength=len(train.classes)).argmax()
    found = {"majority": float((test.labels == most).mean())}
    if kind == "listops":
        counts = np.zeros((256, len(train.classes)), dtype=np.int64)
        np.add.at(counts, (_first_tokens(train), train.labels), 1)
        found["root_operator"] = float((counts.argmax(axis=1)[_first_tokens(test)] == test.labels).mean())
    return found


def _first_tokens(examples: Examples) -> NDArray[np.int64]:
    return np.array([examples.text(number)[0] for number in range(len(examples))], dtype=np.int64)


def format_classification(results: ClassificationResults) -> str:
    """A line for the model and for each baseline."""
    low, high = results["accuracy_interval"]
    protocol = results["protocol"]
    lines = [
        f"{'accuracy':<16} {'':>7} {'(95 %)':>15} {'nats':>8}",
        f"{'this model':<16} {results['accuracy']:>7.3f} {f'{low:.3f} – {high:.3f}':>15} {results['nll']:>8.4f}",
    ]
    lines += [f"{name.replace('_', ' '):<16} {value:>7.3f}" for name, value in results["baselines"].items()]
    if (span := results.get("attention_span")) is not None:
        layers = ", ".join(f"{layer:.0f}" for layer in span["layers"])
        lines.append(f"attention looks {layers} tokens away, layer by layer; alike on all tokens {span['even']:.0f}")
    lines.append(
        f"{results['examples']:,} examples of {results['classes']} classes, up to {protocol['length']:,} tokens; "
        f"segments of {protocol['segment']:,}, {protocol['dtype']}"
    )
    return "\n".join(lines)


def _answer(evaluator: Evaluator, examples: Examples, numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Whether the true class of each example is the most likely one, and its nats, [2, examples]."""
    tokens, lengths, targets = _with_targets(examples, numbers, 1, _towers(evaluator.model))
    labels = torch.from_numpy(examples.labels[numbers])
    found = torch.zeros(2, len(numbers), dtype=torch.float64)
    length, ends = evaluator.protocol.segment_length, targets != IGNORE_INDEX
    pieces = list(zip(tokens.split(length, dim=1), ends.split(length, dim=1), strict=True))
    for (_, ending), (_, output) in zip(
        pieces, stream(evaluator.model, _segments(evaluator, pieces, lengths)), strict=True
    ):
        if output.logits is None:
            continue
        rows, places = ending.nonzero(as_tuple=True)
        scores = output.logits[rows, places.clamp(max=output.logits.shape[1] - 1)].float().cpu()  # a classifier has one
        found[0, rows] = (scores[:, : len(examples.classes)].argmax(dim=-1) == labels[rows]).double()
        found[1, rows] = F.cross_entropy(scores, labels[rows], reduction="none").double()
    return found.numpy()


def _segments(evaluator: Evaluator, pieces: Sequence[tuple[Tensor, Tensor]], lengths: Tensor) -> Iterator[TextSegment]:
    """Pieces of examples, with what is real of each; scores are asked for where an example ends."""
    device, start = evaluator.model.device, 0
    for tokens, ending in pieces:
        real = (lengths - start).clamp(0, tokens.shape[1])
        unscored = None if ending.any() else torch.full_like(tokens, IGNORE_INDEX).to(device)
        yield TextSegment(tokens.to(device), unscored, real.to(device))
        start += tokens.shape[1]
