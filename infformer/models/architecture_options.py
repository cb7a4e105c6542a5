"""What the options of an architecture must be; whoever builds a part of it asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.activations import ACT2FN

from infformer.errors import ModelError


def check_size(name: str, value: Any, least: int = 1) -> None:
    """Make sure that a size of an architecture is a number of things.

    Raises:
        ModelError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ModelError(f"model.architecture.{name}={value}: give a whole number of at least {least}")


def check_number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> None:
    """Make sure that a number of an architecture can be.

    Args:
        wanted: what `holds` asks for, in words.

    Raises:
        ModelError: it cannot.
    """
    if not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
        raise ModelError(f"model.architecture.{name}={value}: give a number that is {wanted}")


def check_choices(config: Any, choices: Mapping[str, Sequence[str]]) -> None:
    """Make sure that an architecture's choices, and its activation, are some that there are.

    Args:
        choices: what there is, by the name of the field.

    Raises:
        ModelError: one is not.
    """
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise ModelError(f"model.architecture.{name}={getattr(config, name)}: choose one of {', '.join(allowed)}")
    if config.activation not in ACT2FN:
        raise ModelError(f"model.architecture.activation={config.activation}: transformers knows no such activation")
