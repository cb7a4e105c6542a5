"""What the training asks of a task: options that build a stream to learn from, and an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypedDict, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from infformer.data.examples import Examples
from infformer.data.options import DataConfig
from infformer.data.segments import IGNORE_INDEX, Segment, check_identity
from infformer.data.sources import check_sources
from infformer.data.tokenization import TokenizedDocuments
from infformer.results import Inspection

if TYPE_CHECKING:
    from infformer.evaluation.streaming import Evaluator
    from infformer.tasks.language_modelling import DocumentStream, LanguageModelling

State = TypeVar("State", bound=Mapping[str, object])
"""Where a stream stands, as JSON: a `TypedDict` of its own."""
Measured = TypeVar("Measured", bound=Mapping[str, object])
"""What a task's `results.json` holds: a `TypedDict` of `infformer.results`, or of its own."""


@dataclass(frozen=True)
class Material:
    """What a task is made of, beside its own options. Every process has its own, for its lanes."""

    evaluator: Evaluator
    """The model to be measured, and how it reads."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """None for a task of symbols."""
    documents: Mapping[str, TokenizedDocuments] = field(default_factory=dict)
    """By split: `train` to learn from, `validation` and `test` where there are any. None for a task of symbols."""
    data: DataConfig = field(default_factory=DataConfig)
    lanes: int = 1
    """How many lanes of the global batch there are to learn from."""
    rank_rows: Sequence[int] = (0,)
    """The lanes of this process."""
    segment_length: int = 512
    """Tokens that each lane reads at a time."""
    bptt_segments: int = 1
    """Segments of each lane in one step of language modelling."""
    seed: int = 0
    learns: bool = True
    """The model learns, in a run of `train.py`; False: `eval.py` measures it as it is, by options of its own."""
    before: bool = True
    """Measure before training too; this and what follows are as in `evaluation.*`."""
    controls: bool = True
    baselines: bool = False
    inspected_segments: int = 0
    max_validation_tokens: int | None = None
    examples: Mapping[str, Examples] = field(default_factory=dict)
    """By split, of a task that has some instead of documents."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """The checksums of the texts, by split."""
        return {
            **{split: documents.fingerprint for split, documents in self.documents.items()},
            **{split: examples.fingerprint for split, examples in self.examples.items()},
        }


@dataclass
class TaskConfig(ABC):
    """What a model is to learn. Each task adds its own options, and builds what learns and measures by them."""

    is_language_modelling = False
    """Whether its texts are documents, each read from its beginning."""
    has_examples = False
    """Whether its texts are examples, each of a class, and no documents."""

    @property
    def vocabulary_size(self) -> int | None:
        """How many tokens there are, for a task of symbols; None for a task of text, which a tokenizer cuts up."""
        return None

    def sizes(self, of_classifier: bool) -> dict[str, int | None]:
        """What the configuration of a model from scratch says of the tokens of a task of symbols."""
        return {"vocab_size": self.vocabulary_size}

    @property
    def takes_tokenizer(self) -> bool:
        """Whether a task of symbols has the model's tokenizer cut its texts up, where there is one."""
        return False

    def describe_drawn(self, data: DataConfig) -> str | None:
        """What it draws to learn from, in a sentence; None where it reads what `data` names."""
        return None if self.vocabulary_size is None else f"Sequences of symbols, drawn anew: `{type(self).__name__}`."

    def own_data(self, data: DataConfig) -> DataConfig:
        """The options of `data`, as a task that reads them takes them."""
        return data

    def check_data(self, data: DataConfig, splits: Sequence[str] | None = None) -> None:
        """Make sure, before any work, that there is something to read for these splits, or for all that are named.

        Raises:
            DataError: there is not.
        """
        if self.vocabulary_size is None:
            check_sources(data, data.splits if splits is None else splits)

    def read_examples(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        main_process_first: AbstractContextManager[Any] | None = None,
        splits: Sequence[str] | None = None,
    ) -> Mapping[str, Examples]:
        """The examples of these splits, or of all that are named, of a task that has some.

        Those to learn from are there too where they had to be read, as they say which classes there are.

        Raises:
            DataError: they cannot be read.
        """
        return {}

    @abstractmethod
    def build_stream(self, material: Material) -> TrainingStream[Any]:
        """What is learned from.

        Raises:
            DataError: there is nothing to learn from.
        """

    @abstractmethod
    def build_evaluation(self, material: Material) -> Evaluation[Any]:
        """How the model is measured.

        Raises:
            DataError: the model, the documents or the tokenizer do not do for this task.
        """


@dataclass
class LanguageModellingConfig(TaskConfig):
    """The task of predicting every token of the documents of `data` from the tokens before it."""

    is_language_modelling = True

    def build_stream(self, material: Material) -> DocumentStream:
        from infformer.tasks.language_modelling import DocumentStream  # what measures loads for seconds

        return DocumentStream(material)

    def build_evaluation(self, material: Material) -> LanguageModelling:
        from infformer.tasks.language_modelling import LanguageModelling

        return LanguageModelling(material)


@dataclass(frozen=True)
class Validation:
    """What was measured in the middle of a run; the same on every process."""

    loss: float
    """Nats per scored token. The checkpoint with the lowest loss is the best."""
    metrics: dict[str, float]
    """As they are recorded: `validation/loss`, and what else the task knows, such as `validation/perplexity`."""
    text: str
    """The same in a few words, for the log."""


class TrainingStream(Protocol[State]):
    """What a model learns from, step by step."""

    def next_step(self) -> list[Segment]:
        """What the lanes of this process read in the next optimiser step, one segment after the other.

        Every process gets the same number of segments, with the same `global_tokens`: how many tokens are scored in all
        lanes of the global batch together. A segment that scores nothing is read into memory, and no gradient flows
        back through it; at least one scores something.
        """

    def state_dict(self) -> State:
        """Where the stream stands, as JSON; it is the same on every process, and fits any number of them."""

    def load_state_dict(self, state: State) -> None:
        """Go on exactly where the state was taken.

        Raises:
            UserError: the state was taken with other material or options.
        """

    def locate(self, segment: Segment) -> list[str]:
        """Where each lane of a segment is, in words: `lane 3: 'a book' at token 512`."""

    def describe(self) -> str:
        """What there is to learn from, in words: `17 documents, 5,042,123 tokens to learn from, …`."""


class TextStreamState(TypedDict):
    """Where a stream of whole texts stands, as JSON."""

    identity: dict[str, object]
    """What decides on the texts, by the options that say it."""
    step: int
    reads: int
    """How many segments each lane has read."""


class TextStream(ABC):
    """Whole texts, which follow from the number of the step: in each every lane reads one, from an empty memory.

    Args:
        material: the lanes, the segment and the seed.
        identity: what decides on the texts beside these, as JSON, by the options that say it.
    """

    def __init__(self, material: Material, identity: Mapping[str, object]) -> None:
        self._material = material
        self._step = 0
        self._reads = 0
        self._identity: dict[str, object] = {
            "training.batch_size": material.lanes,
            "training.segment_length": material.segment_length,
            "seed": material.seed,
            **identity,
        }

    def next_step(self) -> list[Segment]:
        """The next text of every lane of this process, in segments, of which the last may be shorter."""
        segments = self._segments(self._step, self._reads)
        self._step += 1
        self._reads += len(segments)
        return segments

    def state_dict(self) -> TextStreamState:
        """Where the reading stands, as JSON; it is the same on every process, and fits any number of them."""
        return {"identity": dict(self._identity), "step": self._step, "reads": self._reads}

    def load_state_dict(self, state: TextStreamState) -> None:
        """Go on exactly where the state was taken.

        Raises:
            DataError: the state was taken with other texts or options.
        """
        check_identity(state["identity"], self._identity, "stream")
        self._step, self._reads = state["step"], state["reads"]

    @abstractmethod
    def _segments(self, step: int, reads: int) -> list[Segment]:
        """What the lanes read in a step, when each has read so many segments."""


def cut_texts(
    inputs: Tensor,
    targets: Tensor,
    numbers: Sequence[int] | NDArray[np.int64],
    material: Material,
    reads: int,
    lengths: Tensor | None = None,
    waits: Tensor | None = None,
) -> list[Segment]:
    """The lanes of this process read whole texts from an empty memory, in segments, of which the last may be shorter.

    Args:
        inputs, targets: of all lanes of the global batch, [lanes, length].
        numbers: what each lane's text is called, [lanes].
        reads: how many segments each lane has read before.
        lengths: how much of each lane's text is real, [lanes]; all of it if not given.
        waits: how many segments of padding stand before each lane's text, [lanes]; none if not given.
    """
    rows, length = torch.tensor(material.rank_rows), material.segment_length
    real = torch.full((len(inputs),), inputs.shape[1]) if lengths is None else lengths
    begins = torch.zeros_like(rows) if waits is None else waits[rows] * length
    return [
        Segment(
            input_ids=own[rows],
            targets=labels[rows],
            lengths=(real[rows] + begins - index * length).clamp(0, own.shape[1]) * (begins <= index * length),
            reset=torch.full_like(rows, index == 0, dtype=torch.bool),
            documents=torch.as_tensor(numbers)[rows],
            starts=(index * length - begins).clamp(min=0),
            reads=torch.full_like(rows, reads + index),
            lanes=rows,
            global_tokens=int((labels != IGNORE_INDEX).sum()),
        )
        for index, (own, labels) in enumerate(
            zip(inputs.split(length, dim=1), targets.split(length, dim=1), strict=True)
        )
    ]


def numbers_of_step(step: int, lanes: int, size: int, seed: int) -> NDArray[np.int64]:
    """Which of `size` texts the lanes read in a step: epoch after epoch, each in an order of its own."""
    epochs, places = np.divmod(np.arange(step * lanes, (step + 1) * lanes), size)
    first, last = epochs[0], epochs[-1]
    orders = [np.random.default_rng([seed, epoch]).permutation(size) for epoch in range(first, last + 1)]
    return np.stack(orders)[epochs - first, places]


class Evaluation(Generic[Measured]):
    """How a model is measured, as it is at the moment of the call; it may be left in evaluation mode.

    What all processes call together is marked so: they may wait there for each other, and all get the same answer. What
    a task does not measure it leaves out: then the answer is None.
    """

    def validate(self) -> Validation | None:
        """Measure in the middle of a run; None if there is nothing to measure by. All processes together."""
        return None

    def measure_before(self) -> Mapping[str, object] | None:
        """The test figures before the first step, as JSON; None if they are not wanted. All processes together."""
        return None

    def measure(self, checkpoint: str) -> Measured | None:
        """The final test figures, as JSON; None if there is nothing to measure by. All processes together.

        Args:
            checkpoint: where the model's weights come from, for the record.
        """
        return None

    def report(self, results: Measured, folder: Path) -> list[Path]:
        """Write `results.json` and print its table; on the main process only. Tasks draw figures besides.

        Args:
            results: what `measure` returned; of a run with what `measure_before` returned under `before`.
            folder: where to.

        Returns:
            The figures, as PNG files.
        """
        from infformer.evaluation.report import write_results  # this loads for seconds

        write_results(folder / "results.json", results)
        if table := self.table(results):
            print(table, flush=True)
        return []

    def table(self, results: Measured) -> str:
        """The figures in words, each with the protocol that it was measured by, for the model card; empty: none."""
        return ""

    def headline(self, results: Measured) -> dict[str, float]:
        """The final figures in a few numbers by name, as `test/loss`, for trackers; on the main process only."""
        return {}

    def inspect(self) -> Inspection | None:
        """What the memory holds in the end; None if there is nothing to look at. All processes together."""
        return None

    def sample(self, step: int, tokens: int) -> str | None:
        """What the model writes, to be looked at; None if there is nothing to show. All processes together.

        It draws its own random numbers, so the training goes on as if nothing had been written.

        Args:
            step: of the run; decides what is drawn.
            tokens: how many to write, at most.
        """
        return None
