"""How large a model is, what its memories hold of a text, how much it computes, and what a call of it held at most."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import profile

from infformer.memory.state import MemoryState
from infformer.models.base import MemoryModel
from infformer.models.vocabulary import TiedVocabulary
from infformer.results import Sizes


def model_sizes(model: MemoryModel) -> Sizes:
    """Of a whole model, as it is before an engine cuts it up; of a text, what is handed on from segment to segment."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    in_memory = sum(parameter.numel() for parameter in model.memory_parameters())
    state = model.initial_state(1)
    return {
        "backbone_parameters": sum(parameter.numel() for parameter in parameters) - in_memory,
        "memory_parameters": in_memory,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "weight_bytes": sum(parameter.nbytes for parameter in parameters),
        "optimizer_bytes": 2 * sum(parameter.nbytes for parameter in trained),
        "state_floats": [_floats(layer) for layer in state.layers],
        "state_bytes": state.nbytes,
    }


def describe_sizes(sizes: Sizes, lanes: int) -> list[str]:
    """The same in lines of a log.

    Args:
        lanes: how many texts are read side by side.
    """
    lines = [
        f"{sizes['backbone_parameters']:,} parameters of the backbone, {sizes['memory_parameters']:,} of the memory; "
        f"{sizes['trained_parameters']:,} are trained; weights {in_bytes(sizes['weight_bytes'])}, moments "
        f"{in_bytes(sizes['optimizer_bytes'])}"
    ]
    floats = sizes["state_floats"]
    if floats:
        each = f"{min(floats):,}" if len({*floats}) == 1 else f"{min(floats):,} to {max(floats):,}"
        lines.append(
            f"a layer's memory holds {each} floats a row, all {len(floats)} together {sum(floats):,} "
            f"({in_bytes(sizes['state_bytes'])}); of {lanes} lanes {in_bytes(lanes * sizes['state_bytes'])}"
        )
    return lines


def flops_of_a_token(model: MemoryModel, segment_length: int) -> float:
    """Floating-point operations of a model for a token that is learned from, as an estimate.

    Six for each parameter that a token is multiplied with: two forward, two for the gradient of what came in, and two
    for that of the parameter, which a frozen one does not have. And twelve a layer for each number of each token that
    attention sees, on average half a segment and all of a short-term memory. What a long-term memory reads beside its
    own parameters is not counted, nor what is computed again.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if model.config.tie_word_embeddings:
        looked_up -= {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    looked_up -= {id(module.embedding.weight) for module in model.modules() if isinstance(module, TiedVocabulary)}
    multiplied = [parameter for parameter in model.parameters() if id(parameter) not in looked_up]
    weights = sum((6 if parameter.requires_grad else 4) * parameter.numel() for parameter in multiplied)
    inner = getattr(model.config, "backbone", model.config).get_text_config()
    seen = (segment_length + 1) / 2 + model.short_term_length
    return weights + 12 * inner.num_hidden_layers * inner.hidden_size * seen


def peak_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    """How much more memory a CUDA device holds at one moment of a call than before it, by the allocator's own count."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def process_bytes(device: torch.device) -> int:
    """The most that this process had in memory at once: on CUDA what it allocated there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def most_held(profiler: profile) -> int:
    """Bytes that torch held at one moment beyond those at the beginning, of a profile of the CPU's memory.

    By every allocation and release that torch's allocator reports: tensors, and the scratch memory that operators ask
    torch for; not what a library such as oneDNN takes from the system by itself. The same at every repetition.
    """
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def in_bytes(count: float) -> str:
    """So many bytes, in the unit in which the number is short: `12.7 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def _floats(state: MemoryState) -> int:
    return sum(tensor.numel() for tensor in state.named_tensors().values() if tensor.is_floating_point())
