"""Language modelling: every token of documents from the tokens before it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from infformer.data.lanes import Lanes, Segment
from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.memory_instruments import inspect_document, long_term_memories
from infformer.evaluation.perplexity import evaluate, measure
from infformer.evaluation.report import format_table, write_results
from infformer.evaluation.streaming import EvaluationError, Evaluator, describe_protocol
from infformer.models.generation import continue_text
from infformer.plots.evaluation import plot_results
from infformer.results import Results
from infformer.tasks.task import Validation

logger = logging.getLogger(__name__)


class LanguageModelling:
    """The task of reading documents, each with its memory; measured by the perplexity of held-out documents.

    Args:
        tokenizer: of the documents.
        documents: by split: `train`, and `validation` and `test` where there are any.
        lanes: how the training documents are read.
        evaluator: how held-out documents are read, and by which model.
        bptt_segments: segments of each lane in one step.
        before: measure the test documents before training too.
        controls: in the final figures, also in the situations in which the memory cannot help.
        inspected_segments: of the longest test document, along which the memory is looked into in the end; 0: none.
        max_validation_tokens: during training, read at most this much of the beginnings of the validation documents;
            None: all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        documents: Mapping[str, TokenizedDocuments],
        lanes: Lanes,
        evaluator: Evaluator,
        bptt_segments: int = 1,
        before: bool = True,
        controls: bool = True,
        inspected_segments: int = 0,
        max_validation_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._train = documents["train"]
        self._validation = documents.get("validation")
        if self._validation is not None and max_validation_tokens is not None:
            self._validation = self._validation.beginnings(max_validation_tokens)
        self._test = documents.get("test")
        self._lanes = lanes
        self._evaluator = evaluator
        self._bptt_segments = bptt_segments
        self._before = before
        self._controls = controls
        self._inspected_segments = inspected_segments

    def next_step(self) -> list[Segment]:
        return [next(self._lanes) for _ in range(self._bptt_segments)]

    def state_dict(self) -> dict[str, Any]:
        return self._lanes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lanes.load_state_dict(state)

    def measure_before(self) -> dict[str, Any]:
        if self._test is None or not self._before:
            return {}
        return dict(evaluate(self._evaluator, self._test, "test, before training"))

    def validate(self) -> Validation | None:
        if self._validation is None:
            return None
        figures = evaluate(self._evaluator, self._validation, "validation")
        loss, perplexity = figures["nll"] / figures["tokens"], figures["perplexity"]["token"]
        return Validation(
            loss,
            {"validation/loss": loss, "validation/perplexity": perplexity},
            f"validation perplexity {perplexity:.3f} per token "
            f"({describe_protocol(self._evaluator.protocol.as_json())})",
        )

    def measure(self, checkpoint: str) -> dict[str, Any]:
        return {} if self._test is None else dict(measure(self._evaluator, self._test, self._controls, checkpoint))

    def report(self, results: dict[str, Any], folder: Path) -> list[Path]:
        write_results(folder / "results.json", results)
        print(format_table(cast(Results, results)), flush=True)
        return plot_results(folder / "results.json")

    def inspect(self) -> dict[str, Any]:
        """What the memory holds along the longest test document; empty without a long-term memory."""
        model = self._evaluator.model
        if not self._inspected_segments or self._test is None or not long_term_memories(model):
            return {}
        document = int(self._test.token_counts.argmax())
        tokens = torch.from_numpy(self._test.tokens(document, 0, int(self._test.token_counts[document])))
        try:
            return inspect_document(
                model, tokens, self._inspected_segments, progress=self._evaluator.processes.progress
            )
        except EvaluationError as error:
            logger.info("the memory is not looked into: %s", error)
            return {}

    def sample(self, step: int, tokens: int) -> str:
        """Continue the beginning of a document: the end of that beginning, an arrow, and what the model adds."""
        documents = self._train if self._validation is None else self._validation
        length = self._evaluator.protocol.segment_length
        prompt = torch.from_numpy(documents.tokens(0, 0, min(2 * length, int(documents.token_counts[0]))))
        generator = torch.Generator().manual_seed(step)
        sampled = continue_text(self._evaluator.model.eval(), prompt, tokens, length, generator=generator)
        return f"{self.tokenizer.decode(prompt[-32:])} ⟶ {self.tokenizer.decode(sampled)}"

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(lambda document: repr(self._train.ids[document]))

    def describe(self) -> str:
        return f"{len(self._train):,} documents, {int(self._train.token_counts.sum()):,} tokens to learn from"
