"""What a model card says of the run that the model comes from: its data, how it was trained, its figures."""

from __future__ import annotations

import logging
from pathlib import Path

from infformer.config import RunConfig
from infformer.durable import write_text
from infformer.models.base import MemoryModel
from infformer.models.card import CARD, is_hub_name, model_card

logger = logging.getLogger(__name__)


def write_cards(model: MemoryModel, config: RunConfig, step: int, tokens: int, measured: Path, table: str) -> None:
    """Write the cards of a run's best and last checkpoints, at its end.

    Args:
        step: the last.
        tokens: how many all lanes have read until then.
        measured: the checkpoint of which the figures are.
        table: the figures, each beside its protocol, with the controls; empty if nothing was measured.
    """
    last = Path(config.output_dir) / "checkpoints" / f"step-{step:08d}"
    for checkpoint in dict.fromkeys((measured, last)):
        if checkpoint == measured or not table:
            figures = [f"```\n{table}\n```", _READING] if table else ["Nothing was measured."]
        else:
            figures = [f"These weights were not measured. The run's figures are those of {measured.name}."]
        text = model_card(
            model,
            config.name,
            {
                "Data": _data(config),
                "Training": [_training(config, checkpoint.name, step, tokens)],
                "Figures": figures,
            },
            reads_text=config.has_tokenizer,
            datasets=None if (dataset := _on_the_hub(config)) is None else [dataset],
        )
        try:
            write_text(checkpoint / "model" / CARD, text)
        except OSError as error:
            logger.warning("%s: no model card could be written there (%s)", checkpoint, error)


_READING = """Compare figures only with those of the same documents by the same protocol, and perplexities per token
only between models of one tokenizer; those per word, and bits per byte, are of the text itself. The controls (the
memory off, another document's, the document's own shuffled in time) show what the memory is worth."""


def _data(config: RunConfig) -> list[str]:
    if (drawn := config.task.describe_drawn(config.data)) is not None:
        return [drawn]
    data = config.task.own_data(config.data)
    if data.path is not None:
        return ["The released archive of Long-Range Arena."]
    if data.source == "sample":
        return ["The novels that come with infformer, `data=sample`."]
    lines = []
    if data.source == "hub":
        subset = f" (`{data.subset}`)" if data.subset else ""
        lines.append(f"`{_on_the_hub(config) or Path(str(data.repository)).name}`{subset}")
    for split in data.splits:
        places = [Path(place).name for place in data.places(split)]  # what a folder is called is nobody's business
        drawn = f"{data.held_out} of " if split in data.drawn_splits else ""
        lines.append(f"{split}: {drawn}{', '.join(f'`{place}`' for place in places)}")
    return ["; ".join(lines) + "."]


def _on_the_hub(config: RunConfig) -> str | None:
    """The name on the hub of what was learned from, if it has one."""
    data = config.data
    if data.source != "hub" or data.path is not None or config.task.describe_drawn(data) is not None:
        return None
    return data.repository if data.repository is not None and is_hub_name(data.repository) else None


def _training(config: RunConfig, checkpoint: str, step: int, tokens: int) -> str:
    training, optimizer = config.training, config.optimizer
    begun = "from scratch" if config.model.pretrained is None else f"from `{Path(config.model.pretrained).name}`"
    only = ", only what stands beside the backbone" if training.freeze_backbone else ""
    adapters = "" if config.model.lora.rank is None else f", with LoRA of rank {config.model.lora.rank}"
    return (
        f"Trained {begun}{only}{adapters}: {step:,} steps of {training.batch_size} lanes, {training.bptt_segments} "
        f"segments of {training.segment_length} tokens each, {tokens:,} tokens in all; {optimizer.name}, learning rate "
        f"{optimizer.learning_rate:g}, of the memory {optimizer.memory_learning_rate:g}; {training.precision}; seed "
        f"{config.seed}. The weights are those of `{checkpoint}`."
    )
