"""What the options of an architecture must be; whoever builds a part of it asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

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


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Make sure that a choice of an architecture is one of those that there are.

    Raises:
        ModelError: it is not.
    """
    if value not in allowed:
        raise ModelError(f"model.architecture.{name}={value}: choose one of {', '.join(allowed)}")
