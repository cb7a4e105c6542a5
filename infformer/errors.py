"""The errors that a user can mend."""


class UserError(Exception):
    """Something a run was given, or runs on, is not as it must be.

    The message names the option or file, its value, and what to do; the commands print it without a traceback.
    """
