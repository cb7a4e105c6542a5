"""Errors that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something a run was given, or runs on, is not as it must be.

    The message names the option or file, its value, and what to do; the commands print it without a traceback.
    """


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be loaded, or does not fit."""


@contextmanager
def as_model_errors() -> Iterator[None]:
    """Within it a ValueError, as options raise it that know no model, is a ModelError of the same words."""
    try:
        yield
    except ValueError as error:
        raise ModelError(str(error)) from error


def in_one_line(error: Exception) -> str:
    """Which error a library has raised, and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class DataError(UserError, ValueError):
    """Documents that cannot be read, or cannot be read as asked.

    The message names the option, file, line or document at fault and says what to do about it.
    """
