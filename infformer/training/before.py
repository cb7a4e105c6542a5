"""Checks before any work: that there are documents, a tracker, a model, and enough memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from infformer.config import EvaluationRunConfig, RunConfig
from infformer.errors import ModelError, UserError
from infformer.memory.options import MemoryConfig
from infformer.models.architecture import try_adapters, try_architecture, try_kernel
from infformer.models.decoder import DecoderConfig
from infformer.models.document_classifier import DocumentClassifierConfig
from infformer.models.loading import load_config
from infformer.models.memories import check_memories
from infformer.models.pretrained import InfformerConfig
from infformer.models.quantization import check_installed
from infformer.training.runtime import off_the_device, resolve_engine
from infformer.training.tracking import check_tracker

GIB = 2.0**30
CONTROL_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much a container may take."""


class SizeError(UserError, ValueError):
    """Something that would not fit into memory."""


def check_run(config: RunConfig, processes: int, is_main_process: bool) -> None:
    """Find what would stop a run, as far as it can be found without work; what is quickest first.

    Raises:
        UserError: the message names the option.
    """
    config.task.check_data(config.data)
    if is_main_process:
        check_tracker(config.tracker)
    chosen, training = config.model, config.training
    side_by_side = training.batch_size // processes // training.gradient_accumulation
    if chosen.head.kind == "batch_norm" and (processes > 1 or side_by_side < 2):
        raise ModelError(
            f"model.head.kind=batch_norm with {processes} process(es), each of which reads {side_by_side} text(s) side "
            "by side: its statistics are those of all lanes; take one process, at least two lanes "
            "(training.batch_size) and training.gradient_accumulation=1, or model.head.kind=plain"
        )
    weights = offloaded = 0
    if chosen.pretrained is not None:
        shape: Any = load_config(chosen.pretrained, "model.pretrained")
        try_kernel(shape, chosen.attention)
        if chosen.quantization is not None:
            check_installed(chosen.quantization)
        if hasattr(shape, "quantization_config") and not training.freeze_backbone and chosen.lora.rank is None:
            raise ModelError(
                f"model.pretrained={chosen.pretrained}: its weights are quantised, so they have to be frozen; set "
                "training.freeze_backbone=true or model.lora.rank="
            )
        stock = shape.backbone if isinstance(shape, InfformerConfig) else shape
        if chosen.lora.rank is not None:
            try_adapters(stock, chosen.lora)
        if chosen.memories is not None:
            asked = InfformerConfig(
                stock, chosen.memory, chosen.memory_layers, training.segment_length, lora=chosen.lora
            )
            check_memories(chosen.memories, asked)
    else:
        # A vocabulary that a tokenizer will have is not known yet; an adaptive one only has to be larger than its cuts.
        unknown = 10**6 if chosen.architecture.get("adaptive_cutoffs") else 1000
        vocabulary = {"vocab_size": unknown} if config.has_tokenizer else config.task.sizes(chosen.is_classifier)
        if not chosen.is_classifier:
            vocabulary |= {"bos_token_id": None, "eos_token_id": None}
        model = try_architecture({**vocabulary, **chosen.architecture}, chosen.attention)
        shape = model.config
        engine = resolve_engine(config.engine)
        known = (parameter for parameter in model.parameters() if unknown not in parameter.shape)
        each = 4 * sum(parameter.numel() for parameter in known) // (1 if engine.name == "ddp" else processes)
        parts = {"param": each, "optimizer": 0 if training.freeze_backbone else 3 * each}  # gradients and two moments
        elsewhere = off_the_device(engine)
        weights = sum(size for part, size in parts.items() if part not in elsewhere)
        offloaded = sum(size for part, size in parts.items() if elsewhere.get(part) == "cpu")
    memory = chosen.memory
    if memory is not None:
        length = training.segment_length
        memory = memory.with_short_term_length(length) if chosen.is_decoder else memory.beside_pretrained(length)
    lanes = training.batch_size // processes
    check_size(
        shape,
        training.segment_length,
        memory,
        lanes=lanes,
        lanes_at_once=max(1, lanes // training.gradient_accumulation),
        bptt_segments=training.bptt_segments,
        weights=weights,
        offloaded=offloaded,
        longest_text=_longest_text(config),
        options={
            "training.batch_size": (training.batch_size, 64),
            "training.segment_length": (training.segment_length, 512),
            "training.bptt_segments": (training.bptt_segments, 8),
            **_whole_numbers("model.memory.", vars(memory) if memory else {}, 512),
            **_whole_numbers("model.architecture.", chosen.architecture, 4096),
            **_of_task(config),
        },
    )


def check_evaluation(config: EvaluationRunConfig) -> None:
    """Find what would stop an evaluation, as far as it can be found without work.

    Raises:
        UserError: the message names the option.
    """
    config.task.check_data(config.data, [config.split])
    shape: Any = load_config(config.checkpoint, "checkpoint")
    if hasattr(shape, "classes") and not config.task.has_examples:
        raise ModelError(
            f"checkpoint={config.checkpoint} is a classifier and predicts no token: choose task=classification, or "
            "give a language model"
        )
    shape = shape.reader if isinstance(shape, DocumentClassifierConfig) else shape
    ours = isinstance(shape, DecoderConfig | InfformerConfig)
    memory = shape.memory_config if ours else None
    length = config.segment_length or (shape.segment_length if memory else 1)
    if memory is not None and config.short_term_length is not None:
        memory.short_term_length = config.short_term_length
    check_size(
        shape,
        length,
        memory,
        longest_text=_longest_text(config),
        options={
            "segment_length": (length, 512),
            "short_term_length": (config.short_term_length or 0, 512),
            **_of_task(config),
        },
    )


def check_size(
    shape: Any,
    segment_length: int,
    memory: MemoryConfig | None,
    *,
    options: dict[str, tuple[int, int]],
    lanes: int = 1,
    lanes_at_once: int = 1,
    bptt_segments: int = 1,
    weights: int = 0,
    offloaded: int = 0,
    longest_text: int = 0,
) -> None:
    """Refuse what certainly does not fit into memory: what is counted is the least that it takes.

    Args:
        shape: the model's configuration.
        memory: what each layer remembers.
        options: those that decide on it, each with its value and a usual one; the message names the most unusual.
        weights: bytes of the model and of what is kept to train it, on the device.
        offloaded: the same in the host's memory.

    Raises:
        SizeError: it does not.
    """
    inner = shape.backbone if isinstance(shape, InfformerConfig) else shape.get_text_config()
    layers, hidden = getattr(inner, "num_hidden_layers", 1), getattr(inner, "hidden_size", 1)
    activations = 2 * lanes_at_once * bptt_segments * segment_length * hidden * layers
    remembered = 0 if memory is None else 4 * memory.numbers(hidden, layers, lanes, lanes_at_once, segment_length)
    seen = 0 if memory is None else memory.entries
    allowed = lanes_at_once * segment_length * (segment_length + seen) if seen else 0
    read = (activations, remembered, allowed, 8 * lanes * longest_text)
    of_weights = [name for name in options if name.startswith(("model.architecture.", "task."))]
    for needed, there, where, deciding in (
        (weights + sum(read), memory_of_this_machine(), "memory", of_weights if weights > max(read) else options),
        (offloaded, memory_of_the_host(), "the host's memory", of_weights),
    ):
        if needed > there:
            option = max(deciding, key=lambda name: options[name][0] / options[name][1])
            raise SizeError(
                f"{option}={options[option][0]}: this would take {needed / GIB:,.0f} GiB of {where} at least, and "
                f"there are {there / GIB:,.0f} GiB; choose less"
            )


def memory_of_this_machine() -> int:
    """Bytes that this process can have at most: of its accelerator, or of the host."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else memory_of_the_host()


def memory_of_the_host() -> int:
    """Bytes that this process can have at most of the host and of the container it runs in."""
    there = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in map(Path, CONTROL_GROUPS):
        limit = file.read_text().strip() if file.exists() else ""
        there += [int(limit)] if limit.isdigit() else []
    return min(there)


def _whole_numbers(group: str, options: Mapping[str, object], usual: int) -> dict[str, tuple[int, int]]:
    return {f"{group}{name}": (value, usual) for name, value in options.items() if type(value) is int}


def _of_task(config: RunConfig | EvaluationRunConfig) -> dict[str, tuple[int, int]]:
    """Options of a task that decide on how long its texts are, or how large its vocabulary is."""
    found = {}
    for name, value in vars(config.task).items():
        numbers = value if isinstance(value, list) else [value]
        if numbers and all(type(number) is int for number in numbers):
            found[f"task.{name}"] = (max(numbers), 100_000)
    return found


def _longest_text(config: RunConfig | EvaluationRunConfig) -> int:
    lengths = [value for name, (value, _) in _of_task(config).items() if "length" in name]
    return max(lengths, default=0)
