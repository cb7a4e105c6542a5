"""What `results.json` and `comparison.json` hold: their names, said once for who writes, compares and draws them.

A run, an evaluation and a comparison hand on these values as they are written: a value is a mapping of known keys.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

MEMORY_OFF = "memory_off"
MEMORY_OF_ANOTHER_DOCUMENT = "memory_of_another_document"
MEMORY_SHUFFLED_IN_TIME = "memory_shuffled_in_time"

RECENCY = {"within_window": "within the window", "beyond_window": "before the window", "never": "nowhere"}
"""Where the token to be predicted occurred last in its document, and the same in words: among the tokens that attention
sees (the window and the short-term memory), before these, or nowhere. A long-term memory has to show in the second."""

Interval = list[float]
"""Of 95 %: from, to."""


class PerUnit(TypedDict):
    """A perplexity, per token of the model and per word of the text."""

    token: float
    word: float


class IntervalPerUnit(TypedDict):
    """The interval of each."""

    token: Interval | None
    word: Interval | None


Position = TypedDict("Position", {"from": int, "to": int, "tokens": int, "nll": float})


class Recency(TypedDict):
    """Tokens whose previous occurrence is of one class."""

    previous_occurrence: str
    tokens: int
    nll: float


class Document(TypedDict):
    """The figures of one document; in the classes of position and of recency its tokens and nats, [classes, 2]."""

    id: str
    tokens: int
    words: int
    bytes: int
    nll: float
    by_position: list[list[float]]
    by_recency: list[list[float]]


class Figures(TypedDict):
    """What a model's nats say of some documents, read in one situation."""

    tokens: int
    words: int
    bytes: int
    documents: int
    nll: float
    """Nats, total."""
    perplexity: PerUnit
    perplexity_interval: IntervalPerUnit
    """None for a single document."""
    bits_per_byte: float
    by_position: list[Position]
    """By distance from the document's beginning."""
    by_recency: list[Recency]
    per_document: list[Document]


class Ratio(TypedDict):
    """Nats per token of b less those of a; None where there are no tokens."""

    nats_per_token: float | None
    interval: Interval | None


class Difference(TypedDict):
    """Of all tokens, and on how many documents b is better and worse."""

    nats_per_token: float
    interval: Interval | None
    documents: int
    better: int
    worse: int


class Control(Figures):
    """The figures where the memory cannot help, and what that makes worse."""

    difference: Difference


class Protocol(TypedDict):
    """How text was read."""

    segment: int
    stride: int
    warmup_documents: int
    reset: str
    dtype: str


class Measurement(Protocol):
    """How text was read, which, and by which model."""

    documents: str
    memory: Any
    checkpoint: str


class Results(Figures):
    """`results.json` of language modelling."""

    controls: dict[str, Control]
    protocol: Measurement
    before: NotRequired[Figures | None]


class Compared(TypedDict):
    """One of two models."""

    checkpoint: str
    perplexity: PerUnit


PositionRatio = TypedDict(
    "PositionRatio",
    {"from": int, "to": int, "tokens": int, "nats_per_token": float | None, "interval": Interval | None},
)


class RecencyRatio(Ratio):
    """Of tokens whose previous occurrence is of one class."""

    previous_occurrence: str
    tokens: int


class DocumentDifference(TypedDict):
    """Of one document."""

    id: str
    tokens: int
    nats_per_token: float


class Comparison(TypedDict):
    """`comparison.json`: differences are those of b less a."""

    protocol: str
    documents: int
    tokens: int
    a: Compared
    b: Compared
    difference: Difference
    by_position: list[PositionRatio]
    by_recency: list[RecencyRatio]
    per_document: list[DocumentDifference]
