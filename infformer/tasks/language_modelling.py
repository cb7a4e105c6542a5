"""Language modelling: every token of documents from the tokens before it."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from infformer.data.segments import Lanes, LanesState, Segment
from infformer.evaluation.comparison import gain_parts
from infformer.evaluation.memory_instruments import inspect_document
from infformer.evaluation.perplexity import evaluate, measure
from infformer.evaluation.report import format_table
from infformer.evaluation.streaming import EvaluationError, describe_protocol
from infformer.models.generation import continue_text
from infformer.plots.evaluation import plot_results
from infformer.results import Figures, Inspection, Results
from infformer.tasks.task import Evaluation, Material, Validation

logger = logging.getLogger(__name__)


class DocumentStream:
    """Each lane reads documents from beginning to end, `bptt_segments` segments in one step."""

    def __init__(self, material: Material) -> None:
        self._documents = material.documents["train"]
        self._bptt_segments = material.bptt_segments
        self._tokens_of_a_step = material.lanes * material.segment_length * material.bptt_segments
        self._lanes = Lanes(
            self._documents,
            material.lanes,
            material.segment_length,
            material.seed,
            shuffle=material.data.shuffle,
            segments_per_visit=material.data.segments_per_visit,
            rank_rows=material.rank_rows,
        )

    def next_step(self) -> list[Segment]:
        return [next(self._lanes) for _ in range(self._bptt_segments)]

    def state_dict(self) -> LanesState:
        return self._lanes.state_dict()

    def load_state_dict(self, state: LanesState) -> None:
        self._lanes.load_state_dict(state)

    def locate(self, segment: Segment) -> list[str]:
        return segment.places(lambda document: repr(self._documents.ids[document]))

    def describe(self) -> str:
        tokens = int(self._documents.token_counts.sum())
        steps = math.ceil(tokens / self._tokens_of_a_step)
        return f"{len(self._documents):,} documents, {tokens:,} tokens to learn from, in about {steps:,} steps once"


class LanguageModelling(Evaluation[Results]):
    """The perplexity of held-out documents, each read with its memory."""

    def __init__(self, material: Material) -> None:
        assert material.tokenizer is not None
        self._material, self._tokenizer, self._evaluator = material, material.tokenizer, material.evaluator
        self._train = material.documents.get("train")
        self._validation = material.documents.get("validation")
        if self._validation is not None and material.max_validation_tokens is not None:
            self._validation = self._validation.beginnings(material.max_validation_tokens)
        self._test = material.documents.get("test")

    def measure_before(self) -> Figures | None:
        if self._test is None or not self._material.before:
            return None
        return evaluate(self._evaluator, self._test, "test, before training")

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

    def measure(self, checkpoint: str) -> Results | None:
        if self._test is None:
            return None
        chosen_on = self._validation if self._material.baselines else None
        return measure(self._evaluator, self._test, self._material.controls, checkpoint, chosen_on)

    def report(self, results: Results, folder: Path) -> list[Path]:
        super().report(results, folder)
        return plot_results(folder / "results.json")

    def table(self, results: Results) -> str:
        return format_table(results)

    def headline(self, results: Results) -> dict[str, float]:
        figures = {
            "test/loss": results["nll"] / results["tokens"],
            "test/perplexity": results["perplexity"]["token"],
            "test/perplexity_per_word": results["perplexity"]["word"],
            "test/bits_per_byte": results["bits_per_byte"],
        }
        for name, control in results["controls"].items():
            figures[f"test/rise_by_{name}"] = control["difference"]["nats_per_token"]
        parts = gain_parts(results)
        if parts is not None:
            figures["test/change_specific_to_the_document"] = parts["specific"]["nats_per_token"]
            figures["test/change_by_presence_of_a_memory"] = parts["presence"]["nats_per_token"]
        return figures

    def inspect(self) -> Inspection | None:
        """What the memory holds along the longest test document; None without a memory."""
        model = self._evaluator.model
        if not self._material.inspected_segments or self._test is None or not model.layer_memories():
            return None
        document = int(self._test.token_counts.argmax())
        tokens = torch.from_numpy(self._test.tokens(document, 0, int(self._test.token_counts[document])))
        try:
            return inspect_document(
                model,
                tokens,
                self._material.inspected_segments,
                progress=self._evaluator.processes.progress,
                decode=lambda part: str(self._tokenizer.decode(part, clean_up_tokenization_spaces=False)),
                after_segment=self._evaluator.processes.after_segment,
            )
        except EvaluationError as error:
            logger.info("the memory is not looked into: %s", error)
            return None

    def sample(self, step: int, tokens: int) -> str | None:
        """Continue the beginning of a document: the end of that beginning, an arrow, and what the model adds."""
        documents = self._train if self._validation is None else self._validation
        if documents is None:
            return None
        length = self._evaluator.protocol.segment_length
        prompt = torch.from_numpy(documents.tokens(0, 0, min(2 * length, int(documents.token_counts[0]))))
        generator = torch.Generator().manual_seed(step)
        sampled = continue_text(self._evaluator.model.eval(), prompt, tokens, length, generator=generator)
        return f"{self._tokenizer.decode(prompt[-32:])} ⟶ {self._tokenizer.decode(sampled)}"
