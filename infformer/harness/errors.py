"""The one error of this room."""

from infformer.errors import UserError


class HarnessError(UserError, ValueError):
    """Something that the harness asks for and this model cannot do.

    The message names the option as it is typed on the harness's command line, its value, and what to do.
    """
