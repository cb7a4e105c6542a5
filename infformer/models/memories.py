"""Memories alone: a folder of what was trained beside a backbone that anybody has, without that backbone.

FOLDER/
    memories.json            the memory, the adapters, and the shape of the backbone that they stand beside
    memories.safetensors     their weights, by their names in the model
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from infformer.errors import ModelError
from infformer.models.adapters import LoraConfig, is_of_adapter
from infformer.models.backbone import key_value_shape
from infformer.models.base import stored_memory
from infformer.models.pretrained import InfformerForCausalLM
from infformer.models.read_files import beginning

logger = logging.getLogger(__name__)

OPTIONS = {
    "memory": "model.memory",
    "memory_layers": "model.memory_layers",
    "segment_length": "training.segment_length",
    "lora": "model.lora",
}
"""What of a model's configuration a folder holds, and by which options it is typed."""


class StoredMemories(TypedDict):
    """What `memories.json` holds."""

    backbone: dict[str, object]
    """What the memories fit beside."""
    weights: int
    """A checksum of the backbone's."""
    memory: dict[str, Any] | None
    memory_layers: list[int] | None
    segment_length: int
    lora: dict[str, Any] | None


def save_memories(model: InfformerForCausalLM, folder: str | Path) -> None:
    """Write the memories of a model, and the adapters in its backbone, into a folder.

    Raises:
        ModelError: it has neither.
    """
    if not model.has_memory and model.config.lora is None:
        raise ModelError("this model has neither memories nor adapters, so there is nothing but its backbone to save")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _own(model).items()}
    content = {
        "backbone": _shape(model.config.backbone),
        "weights": _fingerprint(model.backbone),
        **{name: getattr(model.config, name) for name in OPTIONS},
    }
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "memories.safetensors", metadata={"format": "pt"})
    (folder / "memories.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def load_memories(folder: str | Path, model: InfformerForCausalLM) -> None:
    """Give a model the memories, and the adapters, of a folder; it must have such ones.

    Raises:
        ModelError: it has others, or a backbone of another shape; or the folder is none of memories.
    """
    stored = check_memories(folder, model.config)
    file = Path(folder).expanduser() / "memories.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.memories={folder}: its weights cannot be read ({error}); copy it anew") from error
    own = _own(model)
    if wrong := sorted(
        own.keys() ^ tensors.keys() | {n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape}
    ):
        raise ModelError(
            f"model.memories={folder}: its weights are not those of its memories.json, {len(wrong)} differ, such as "
            f"{wrong[0]}; give the folder as it was saved"
        )
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ModelError(
            f"model.memories={folder}: the weights {broken[0]} there are not finite (NaN or infinite); save an earlier "
            "checkpoint"
        )
    if stored["weights"] != _fingerprint(model.backbone):
        logger.warning(
            "model.memories=%s: they were trained beside other weights than those of this backbone, and may be worth "
            "nothing beside these", folder,
        )  # fmt: skip
    model.load_state_dict(tensors, strict=False)


def attach_memories(folder: str | Path, backbone: PreTrainedModel | str) -> InfformerForCausalLM:
    """A stock model, its folder or its name on the hub, with the memories and the adapters of a folder.

    Raises:
        ModelError: the backbone has another shape, or the folder is none of memories.
    """
    stored = read_memories(folder)
    model = InfformerForCausalLM.from_backbone(
        backbone,
        stored_memory(stored["memory"], stored["segment_length"]),
        stored["memory_layers"],
        stored["segment_length"],
        None if stored["lora"] is None else LoraConfig(**stored["lora"]),
    )
    load_memories(folder, model)
    return model.eval()


def check_memories(folder: str | Path, config: PreTrainedConfig) -> StoredMemories:
    """What a folder holds beside the weights, if a model of this configuration has such memories and adapters.

    Raises:
        ModelError: it has others, or a backbone of another shape; or the folder is none of memories.
    """
    stored, shape = read_memories(folder), _shape(config.backbone)
    if stored["backbone"] != shape:
        others = [f"{name} {was}, here {shape.get(name)}" for name, was in stored["backbone"].items()]
        raise ModelError(
            f"model.memories={folder}: the backbone beside which they were trained has another shape ("
            f"{'; '.join(others)}); set model.pretrained= to that one"
        )
    there: Mapping[str, object] = stored
    options = [option for name in OPTIONS for option in _differing(name, there[name], getattr(config, name))]
    if options:
        raise ModelError(
            f"model.memories={folder}: this run has other memories or adapters than that folder; for those type "
            f"{' '.join(options)}"
        )
    return stored


def read_memories(folder: str | Path) -> StoredMemories:
    """What a folder holds beside the weights.

    Raises:
        ModelError: it is none of memories.
    """
    file = Path(folder).expanduser() / "memories.json"
    try:
        stored: StoredMemories = json.loads(file.read_text(encoding="utf-8"))
        missing = {"backbone", "weights", *OPTIONS} - stored.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model.memories={folder}: this folder holds no memories, its memories.json cannot be read ({error}); give "
            "one that scripts/export.py has written"
        ) from error
    if missing:
        raise ModelError(f"model.memories={folder}: its memories.json does not say {', '.join(sorted(missing))}")
    return stored


def _own(model: InfformerForCausalLM) -> dict[str, Tensor]:
    """The weights of memories and adapters, by their names in the model."""
    stored = model.state_dict()
    return {name: tensor for name, tensor in stored.items() if name.startswith("memories.") or is_of_adapter(name)}


def _shape(config: PreTrainedConfig) -> dict[str, object]:
    """What a memory, or an adapter, fits beside."""
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
    heads, width = key_value_shape(config)
    return {**{name: getattr(config, name, None) for name in sizes}, "key_value_heads": heads, "head_size": width}


def _fingerprint(backbone: PreTrainedModel) -> int:
    """A checksum of the stock weights' first numbers: training changes some of them, and adapters none."""
    checksum = 0
    for name, parameter in backbone.named_parameters():
        if not is_of_adapter(name):
            checksum = zlib.crc32(beginning(parameter), checksum)
    return checksum


def _differing(name: str, there: Any, here: Any) -> list[str]:
    """What has to be typed for a run to have what a folder holds."""
    option = OPTIONS[name]
    if there == here:
        return []
    if not isinstance(there, dict):
        option = {"model.memory": "model/memory", "model.lora": "model.lora.rank"}.get(option, option)
        return [_typed(option, "none" if option == "model/memory" else there)]
    kind = there.get("kind")
    if here is None or here.get("kind") != kind:
        here = {}
    options = [
        _typed(f"{option}.{key}", value) for key, value in there.items() if key not in here or here[key] != value
    ]
    return [_typed("model/memory", kind), *options[1:]] if kind and not here else options


def _typed(option: str, value: Any) -> str:
    return f"{option}={json.dumps(value, separators=(',', ':'))}".replace('"', "")
