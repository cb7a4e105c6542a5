"""The errors that a user can mend, and a check that all options share."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class UserError(Exception):
    """Something a run was given, or runs on, is not as it must be.

    The message names the option or file, its value, and what to do; the commands print it without a traceback.
    """


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
