"""What the options of every floor share: a check of their numbers, and marks of what a resumed run may change."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def check_finite(group: str, options: DataclassInstance) -> None:
    """Make sure that no number among some options is NaN or infinite.

    Args:
        group: what is typed before their names, such as `training.`.

    Raises:
        ValueError: one is.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise ValueError(f"{group}{field.name}={value}: must be finite; set it to a number")


def check_at_least(minimum: float, group: str, options: DataclassInstance, *names: str) -> None:
    """Make sure that some options are null or no less than a number.

    Args:
        group: as above.

    Raises:
        ValueError: one is less.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ValueError(f"{group}{name}={value}: must be at least {minimum}")


def check_choices(group: str, options: DataclassInstance, **choices: Collection[str]) -> None:
    """Make sure that some options are each one of what there is to choose from.

    Args:
        group: as above.
        choices: of each option.

    Raises:
        ValueError: one is another.
    """
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value not in allowed:
            raise ValueError(f"{group}{name}={value}: choose one of {', '.join(allowed)}")


def free(default: Any) -> Any:
    """The field of an option that changes neither what is learned nor what is measured.

    A resumed run may have it otherwise than before, and an evaluation may write over the results of one that had.
    """
    return _marked(default, "free")


def to_come(default: Any) -> Any:
    """The field of an option that decides on what is still to come: a resumed run may change it, and learns otherwise.

    So runs that differ in it are not the same.
    """
    return _marked(default, "to come")


def measuring(default: Any, *splits: str) -> Any:
    """The field of an option that changes what is measured, not what is learned: a resumed run may change it.

    Args:
        splits: `validation`, `test` or both, if it says which texts these are: figures from before it was changed are
            not compared with those after.
    """
    return _marked(default, "measuring", *splits)


def _marked(default: Any, *marks: str) -> Any:
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"marks": marks})
    return dataclasses.field(default=default, metadata={"marks": marks})
