"""The one error of this floor."""

from infformer.errors import UserError


class DataError(UserError, ValueError):
    """Documents that cannot be read, or cannot be read as asked.

    The message names the option, file, line or document at fault and says what to do about it.
    """
