"""What the files of results hold: their names, said once for who writes, compares and draws them.

A value is handed on as it is written, a mapping of known keys. In this order: `results.json` of language modelling and
`comparison.json` of two of them; `results.json` of retrieval, and of sorting; `inspection.json`; a benchmark's lines.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

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
    memory: dict[str, object] | None
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


class RetrievalCell(TypedDict):
    """Answers at one depth of texts of one length."""

    length: int
    depth: float
    answers: int
    """How many were asked for, and of how many tokens they are."""
    tokens: int
    exact_match: float
    """Answers that are right to the last token, free running."""
    accuracy_free_running: float
    """Tokens."""
    accuracy: float
    """Tokens, teacher forced."""
    nll: float
    """Nats per token of the answers."""


class RetrievalProtocol(TypedDict):
    """What was asked, how the texts were read, and by which model."""

    task: str
    segment: int
    window: int
    """Tokens that a model without long-term memory sees."""
    reset: str
    dtype: str
    checkpoint: str


class RetrievalResults(TypedDict):
    """`results.json` of a retrieval task."""

    cells: list[RetrievalCell]
    """Of all lengths and depths."""
    controls: dict[str, list[RetrievalCell]]
    chance: float
    """How often a whole answer is right by chance."""
    protocol: RetrievalProtocol
    before: NotRequired[None]


class TeacherForced(TypedDict):
    """Sorting where each place of the answer is predicted from the true places before it."""

    nll: float
    """Nats per symbol of the answer."""
    accuracy: float
    accuracy_by_position: list[float]


class Accuracies(TypedDict):
    """Sorting teacher forced, and from the own answers; each also at every place of the answer."""

    accuracy: float
    accuracy_by_position: list[float]
    accuracy_free_running: float
    accuracy_free_running_by_position: list[float]


class SortingFigures(Accuracies):
    """Of a model, on sequences of one length."""

    length: int
    sequences: int
    nll: float
    """Nats per symbol of the answer, teacher forced."""
    ideal_counters: dict[str, Accuracies]


class SortingProtocol(TypedDict):
    """How the sequences were read, and by which model."""

    segment: int
    reset: str
    dtype: str
    checkpoint: str


class SortingResults(TypedDict):
    """`results.json` of sorting."""

    lengths: list[SortingFigures]
    protocol: SortingProtocol
    before: NotRequired[None]


class SortingRun(SortingFigures):
    """A row of `accuracy.json`: one model of a grid of runs, on sequences of one length."""

    memory: str
    seed: int


class InspectedDocument(TypedDict):
    """What was read of a document."""

    tokens: int
    """That were predicted."""
    segments: int
    nats: float
    """Per token."""


class InspectedOptions(TypedDict):
    """Of a long-term memory's options, which are all in the file, those that are shown."""

    basis_functions: int
    contraction: str
    contraction_rate: float
    read: str
    sticky: bool


class InspectedMemory(InspectedOptions):
    """The memories, and the numbers of their layers."""

    segment_length: int
    short_term_length: int
    layers: list[int]


DensityFigure = Literal["centre", "centre_spread", "width", "width_spread", "tokens_back"]
"""What is said of a head's densities, in parts of the memory, of which 1 is the newest end: the mean over the segment's
tokens of their means, and these means' standard deviation; the mean of their standard deviations, and the standard
deviation of these; how many tokens before the segment's first lies what is at the centre."""


class LossesWithoutLayers(TypedDict):
    """What a segment costs if long-term memories are empty when it is read, in nats per token."""

    nats: float
    """With all memories."""
    nats_without_layer: list[float]
    """Without each of these."""
    nats_without_memory: float
    """Without any."""


class Readings(TypedDict):
    """Of every segment that found something in memory; lists run over segments, then over layers, then over heads."""

    segment: list[int]
    """Its number, from 0."""
    tokens: list[int]
    centre: list[list[list[float]]]
    """This and what follows: see `DensityFigure`."""
    centre_spread: list[list[list[float]]]
    width: list[list[list[float]]]
    width_spread: list[list[list[float]]]
    tokens_back: list[list[list[float]]]
    contribution: list[list[float]]
    """‖memory's context‖ / ‖self-attention's output‖."""
    nats: list[float]
    """This and what follows: see `LossesWithoutLayers`."""
    nats_without_layer: list[list[float]]
    nats_without_memory: list[float]


class Writings(TypedDict, total=False):
    """Of every write to a sticky memory that held something; nothing where there was none."""

    segment: list[int]
    """The number of the one that was read then."""
    sampled_places: list[list[list[float]]]
    """Of each layer the share of the samples in each of equal parts of [0, 1]."""


class Explained(TypedDict):
    """How much of the past one layer's signal still tells, as R²; None where nothing differs from the mean."""

    total: float | None
    """Over all tokens."""
    by_age: list[float | None]
    """Of each segment, the newest first."""


class Reconstruction(TypedDict):
    """The same of each layer, after some writes."""

    segments: int
    """How many had been written."""
    tokens_back: list[float]
    """How far the middle of each lies from the next token to be read, the newest first."""
    limit: float
    """min(1, N / tokens written): N coefficients hold no more than N independent vectors."""
    total: list[float | None]
    by_age: list[list[float | None]]


class Inspection(TypedDict):
    """`inspection.json`: what long-term memories held and did along one document."""

    document: InspectedDocument
    memory: InspectedMemory
    reading: Readings
    writing: Writings
    reconstruction: list[Reconstruction]
    """After 1, 2, 4, … and all writes."""
    checkpoint: NotRequired[str]
    """Of which model, and in which document, where `scripts/inspect_memory.py` looked."""
    name: NotRequired[str]


class BenchmarkMachine(TypedDict):
    """Where something was measured, and how fast that is."""

    device: str
    name: str
    torch: str
    python: str
    threads: int
    precision: str
    clock: str
    matmul_flops: float
    """Operations per second of a large product."""
    bandwidth: float
    """Bytes per second of a large copy."""


class BenchmarkOptions(TypedDict, total=False):
    """Sizes and choices, of which every comparison has its own: the one that is drawn."""

    segment: int


class BenchmarkFigures(TypedDict, total=False):
    """What else was measured or counted of a contestant, where it makes sense."""

    tokens_per_second: float
    multiplications_per_token: float
    bytes: float
    memory_bytes: int
    """Of what is remembered."""
    peak_extra_bytes: int
    peak_process_bytes: int
    reach_tokens: int
    """Of the document, when it reads."""
    times_early_by_segment: list[tuple[int, float]]
    """How many times as long as an early segment took one, up to this segment."""


class BenchmarkLine(BenchmarkFigures):
    """What one contestant took, or a part of it. Lines of the kind `ratio` are others, and nobody reads them."""

    comparison: str
    machine: BenchmarkMachine
    options: BenchmarkOptions
    kind: Literal["contestant", "part", "ratio"]
    name: str
    seconds: list[float]
    """Of every round."""
    median_seconds: float
    quartiles_seconds: list[float]
    flops: NotRequired[float]
    """Of the work by formula, where there is one, as are the `bytes` then."""
    floor_seconds: NotRequired[float]
