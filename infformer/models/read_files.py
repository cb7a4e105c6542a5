"""What a model has read, in a file: a book is read once and asked many times."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infformer.durable import check_place, rename, synchronise
from infformer.errors import ModelError
from infformer.models.base import MemoryModel
from infformer.models.generation import ReadText


def save_read_text(read: ReadText, model: MemoryModel, path: Path) -> None:
    """Write what was read as safetensors, whole or not at all.

    Raises:
        UserError: nothing can be written there.
    """
    check_place("save_state", path.parent)
    tensors = {} if read.state is None else read.state.named_tensors()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".partial")
    save_file({**tensors, "unfinished": read.unfinished.cpu()}, temporary, metadata={"model": fingerprint(model)})
    synchronise(temporary)
    rename(temporary, path)


def load_read_text(model: MemoryModel, path: Path) -> ReadText:
    """What `save_read_text` wrote.

    Raises:
        ModelError: there is no such file, it is none, or another model or memory read it.
    """
    try:
        with safe_open(path, "pt") as file:
            reader = (file.metadata() or {}).get("model")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, a file is no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"state={path}: no state can be read there ({error}); give a file of save_state=") from error
    if reader != fingerprint(model):
        raise ModelError(
            f"state={path}: another model, or one with another memory, read this; give the checkpoint that did, with "
            "the same segment_length and short_term_length, or read the document again"
        )
    unfinished = tensors.pop("unfinished")
    return ReadText(model.initial_state(1).with_tensors(tensors) if tensors else None, unfinished)


def fingerprint(model: MemoryModel) -> str:
    """Names a model by its memory, its segments, and the beginning of each of its weights."""
    memory = model.config.memory_config
    said = json.dumps([memory and memory.to_json(), model.segment_length, type(model).__name__], sort_keys=True)
    digest = hashlib.sha256(said.encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(beginning(parameter))
    return digest.hexdigest()


def beginning(weight: Tensor) -> bytes:
    """The first numbers of a weight, in float32: training changes some of them."""
    return weight.detach().flatten()[:64].to("cpu", torch.float32).numpy().tobytes()
