"""LoRA (Hu et al., arXiv 2106.09685): small matrices that learn beside the linear maps of a backbone, which do not.

The only file that imports peft.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infformer.errors import ModelError
from infformer.models.backbone import find_layers
from infformer.options import check_finite


@dataclass
class LoraConfig:
    """Which adapters the backbone gets; its own weights stay as they are, and its memories learn as always."""

    rank: int | None = None
    """Width of an adapter. Null: there are none."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by `alpha` / `rank`."""
    dropout: float = 0.0
    """Of what an adapter sees, in training."""
    targets: list[str] | None = None
    """Linear maps that get one, by their names or the ends of them, such as [q_proj,v_proj]. Null: all in the
    layers."""

    def __post_init__(self) -> None:
        check_finite("model.lora.", self)
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if self.rank is None and value != option.default:
                raise ValueError(f"model.lora.{option.name}={value}: there are no adapters; set model.lora.rank= too")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"model.lora.rank={self.rank}: must be at least 1, or null for no adapters")
        if self.alpha <= 0:
            raise ValueError(f"model.lora.alpha={self.alpha}: must be positive; 0 would add nothing")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout={self.dropout}: must be at least 0 and less than 1")
        if self.targets is not None and not self.targets:
            raise ValueError("model.lora.targets=[]: name linear maps, or set it to null, which is all in the layers")

    def to_json(self) -> dict[str, Any] | None:
        """As it stands in a model's `config.json`; None if there are no adapters."""
        return None if self.rank is None else asdict(self)


def find_targets(backbone: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The linear maps in the layers that get an adapter, by their whole names in the backbone.

    Raises:
        ModelError: a target is none of them.
    """
    inside = {id(module) for layer in find_layers(backbone) for module in layer.modules()}
    linear = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside
    ]
    if lora.targets is None:
        return linear
    for target in lora.targets:
        if not any(_is_called(name, target) for name in linear):
            ends = dict.fromkeys(name.rpartition(".")[2] for name in linear)
            raise ModelError(
                f"model.lora.targets={list(lora.targets)}: the layers of this {backbone.config.model_type} have no "
                f"linear map called {target}; choose from {', '.join(ends)}, or from whole names such as {linear[0]}"
            )
    return [name for name in linear if any(_is_called(name, target) for target in lora.targets)]


def add_adapters(backbone: PreTrainedModel, lora: LoraConfig) -> None:
    """Put new adapters, which add nothing until they are trained, into a backbone; only they learn from then on.

    Raises:
        ModelError: a target is no linear map in its layers, or peft is not installed.
    """
    peft, targets = import_peft(lora), find_targets(backbone, lora)
    options = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=isinstance(backbone.get_submodule(targets[0]), Conv1D),
    )
    peft.inject_adapter_in_model(options, backbone)
    for name, parameter in backbone.named_parameters():
        if is_of_adapter(name):  # float32, as all that learns, whatever the type of the weights beside it
            parameter.data = parameter.data.float()


def is_of_adapter(name: str) -> bool:
    """Whether a weight of a backbone is one of its adapters', by its name."""
    return ".lora_A." in name or ".lora_B." in name


def freeze_all_but_adapters(backbone: PreTrainedModel) -> None:
    """Let the adapters of a backbone learn, and nothing else of it."""
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(is_of_adapter(name))


def merge_adapters(backbone: PreTrainedModel) -> None:
    """Add what the adapters have learned to the weights beside them: what is left is a stock model."""
    for module in _take_out(backbone):
        module.merge()
    backbone.requires_grad_(True)


def fit_adapters(backbone: PreTrainedModel, lora: LoraConfig) -> None:
    """Make the adapters of a backbone anew that was quantised after it got them: peft has others for such weights."""
    learned = {name: parameter for name, parameter in backbone.named_parameters() if is_of_adapter(name)}
    _take_out(backbone)
    add_adapters(backbone, lora)
    backbone.load_state_dict(learned, strict=False)


def _take_out(backbone: PreTrainedModel) -> list[Any]:
    """Leave a backbone without its adapters, which are returned."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [(name, module) for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in adapters:
        backbone.set_submodule(name, module.get_base_layer())
    del backbone.peft_config
    return [module for _, module in adapters]


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def import_peft(lora: LoraConfig) -> Any:
    """peft, which these adapters need.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(
            f"model.lora.rank={lora.rank} needs peft: pip install 'infformer[peft]' (in a checkout: pip install -e "
            "'.[peft]')"
        ) from error
    return peft
