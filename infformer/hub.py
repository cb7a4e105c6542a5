"""Whether the Hugging Face hub has something, asked briefly: its libraries would try a dead network for minutes."""

import threading
from collections.abc import Callable
from functools import cache
from typing import Literal

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from infformer.errors import UserError

PATIENCE = 10.0
"""Seconds in which the hub must have answered."""

WITHOUT_A_NETWORK = (
    "or fill the cache on a machine that has a network, copy it (HF_HOME names its place) and set HF_HUB_OFFLINE=1; "
    "HF_ENDPOINT=https://... names a mirror of the hub."
)
"""What else can be done, after a local folder."""


class HubError(UserError, ValueError):
    """The hub answers that it has no such thing, or not for everyone."""


class SilentHubError(HubError):
    """The hub does not answer."""


def ask_briefly(ask: Callable[[], object]) -> Exception | None:
    """What asking the hub raises, within its time; None if it answers."""
    answers: list[Exception | None] = []

    def note() -> None:
        try:
            ask()
            answers.append(None)
        except Exception as error:
            answers.append(error)

    # In a thread that may be left behind: looking up a name can hang for longer than any timeout of a connection.
    thread = threading.Thread(target=note, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return answers[0] if answers else SilentHubError(f"{constants.ENDPOINT} does not answer within {PATIENCE:.0f} s")


@cache
def problem_with_the_hub(kind: Literal["dataset", "model"], name: str, option: str) -> str | None:
    """What keeps a dataset or a model from being downloaded, in words; None if the hub answers that it has it.

    Args:
        option: where the name was given, for the message.

    Raises:
        HubError: the hub answers that there is no such thing, or that it is not for everyone.
    """
    # Twice as long: of two limits that end together now the one speaks and now the other.
    answer = ask_briefly(lambda: HfApi().repo_info(name, repo_type=kind, timeout=2 * PATIENCE))
    if answer is None:
        return None
    if isinstance(answer, SilentHubError):
        return str(answer)
    if isinstance(answer, GatedRepoError):
        raise HubError(
            f"{option}={name}: the hub gives this {kind} only to those who asked for it; ask on its page, then log in "
            "with hf auth login or set HF_TOKEN."
        ) from answer
    if isinstance(answer, RepositoryNotFoundError | HFValidationError):
        raise HubError(
            f"{option}={name}: {constants.ENDPOINT} has no such {kind} (or it is private: log in with hf auth login); "
            "check the name, which is <owner>/<name>."
        ) from answer
    if isinstance(answer, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network"
    return f"{constants.ENDPOINT} cannot be reached ({type(answer).__name__}: {answer})"
