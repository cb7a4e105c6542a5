"""Errors that a user can mend."""


class UserError(Exception):
    """Something a run was given, or runs on, is not as it must be.

    The message names the option or file, its value, and what to do; the commands print it without a traceback.
    """


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be loaded, or does not fit."""


class DataError(UserError, ValueError):
    """Documents that cannot be read, or cannot be read as asked.

    The message names the option, file, line or document at fault and says what to do about it.
    """
