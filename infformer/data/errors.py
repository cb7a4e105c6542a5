"""The one error of the data floor."""


class DataError(ValueError):
    """Documents that cannot be read, or cannot be read as asked.

    The message names the option, file, line or document at fault and says what to do about it.
    """
