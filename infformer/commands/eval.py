"""Measure a language model: `python eval.py checkpoint=outputs/tiny/checkpoints/best data=sample`.

By the perplexity of documents, or by another task: `task=passkey 'task.lengths=[1024,4096]'`.
"""

from __future__ import annotations

from infformer import command

if __name__ == "__main__":
    command.begin()  # what follows is imported for seconds

import logging
from pathlib import Path

import torch

from infformer.config import CONF, EvaluationRunConfig
from infformer.data.tokenization import TokenizedDocuments, beginning_of_documents, tokenize_documents
from infformer.evaluation.streaming import Evaluator, ReadingProtocol
from infformer.models.loading import check_vocabulary, has_tokenizer, load_tokenizer, load_trained
from infformer.tasks.task import Material
from infformer.training.before import check_evaluation
from infformer.training.building import processes_of
from infformer.training.command_line import start
from infformer.training.folder import check_that_it_may_be_written, evaluation_folder, held, write_record
from infformer.training.runtime import Accelerator, EngineError, init_distributed, resolve_engine

logger = logging.getLogger(__name__)


def main() -> None:
    """Compose the configuration, check it, measure, report."""
    start("eval", EvaluationRunConfig, CONF, run)


def run(config: EvaluationRunConfig) -> None:
    """Read; print the table; write `results.json` and the plots."""
    engine = resolve_engine(config.engine)
    if engine.name != "ddp":
        raise EngineError(
            f"engine={engine.name} cuts the model up, and to measure, each process needs all of it: choose engine=ddp, "
            "and launch with torchrun, or with accelerate as it is before `accelerate config`"
        )
    accelerator = init_distributed(engine, config.precision, option="precision")
    folder = evaluation_folder(config)
    with held(accelerator, folder, lambda: check_that_it_may_be_written(config, folder)):
        _measure(config, accelerator, folder)


def _measure(config: EvaluationRunConfig, accelerator: Accelerator, folder: Path) -> None:
    check_evaluation(config)
    model = load_trained(config.checkpoint, config.segment_length, config.short_term_length)
    tokenizer, documents = None, dict[str, TokenizedDocuments]()
    name = config.tokenizer or config.checkpoint
    if config.task.vocabulary_size is None or (config.task.takes_tokenizer and has_tokenizer(name)):
        option = "tokenizer" if config.tokenizer else "checkpoint"
        tokenizer = load_tokenizer(name, option)
        check_vocabulary(model, tokenizer, "tokenizer")
    evaluator = Evaluator(
        model=model.to(accelerator.device),
        protocol=ReadingProtocol(
            model.choose_segment_length(config.segment_length),
            config.stride,
            getattr(torch, config.precision),
            config.warmup_documents,
        ),
        batch_size=config.batch_size,
        processes=processes_of(accelerator),
    )
    first = accelerator.main_process_first  # each one made anew: a context can be entered once
    examples = config.task.read_examples(config.data, tokenizer, first(), [config.split])
    if tokenizer is not None and not config.task.has_examples:
        documents["test"] = tokenize_documents(config.data, config.split, tokenizer, first())
        if config.baselines:
            documents["validation"] = tokenize_documents(config.data, "validation", tokenizer, first())
        if accelerator.is_main_process:
            logger.info(beginning_of_documents(config.data, tokenizer))
    if examples:
        examples = {**examples, "test": examples[config.split]}
    material = Material(
        evaluator,
        tokenizer,
        documents,
        config.data,
        learns=False,
        controls=config.controls,
        baselines=config.baselines,
        examples=examples,
    )
    evaluation = config.task.build_evaluation(material)
    results = evaluation.measure(config.checkpoint)
    assert results is not None  # there are documents, or none are asked for
    if accelerator.is_main_process:
        # Whenever it is killed, there is no record beside the results of another evaluation.
        (folder / "results.json").unlink(missing_ok=True)
        write_record(config, folder)
        drawn = evaluation.report(results, folder)
        print(f"written to {folder / 'results.json'}" + (f", drawn in {drawn[0].parent}" if drawn else ""))


if __name__ == "__main__":
    command.run(main)
