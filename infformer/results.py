"""What the files of results hold: their names, said once for who writes, compares and draws them.

A value is handed on as it is written, a mapping of known keys. In this order: `results.json` of language modelling and
`comparison.json` of two of them; `results.json` of retrieval, of classification and of sorting; `inspection.json`; a
benchmark's lines.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

MEMORY_OFF = "memory_off"
MEMORY_OF_ANOTHER_DOCUMENT = "memory_of_another_document"
MEMORY_SHUFFLED_IN_TIME = "memory_shuffled_in_time"

CONTINUOUS_CACHE = "continuous_cache"
DOCUMENT_UNIGRAM = "document_unigram"

RECENCY = {"within_window": "within the window", "beyond_window": "before the window", "never": "nowhere"}
"""Where the token to be predicted occurred last in its document, and the same in words: among the tokens that attention
sees (the window and the short-term memory), before these, or nowhere. A long-term memory has to show in the second."""

Part = Literal["specific", "presence", "without_memory"]
PARTS: dict[Part, str] = {
    "specific": "specific to the document",
    "presence": "presence of a memory",
    "without_memory": "with memories off",
}
"""The parts of what one model gains over another, in words."""

Interval = list[float]
"""An interval of 95 %: from, to."""


class PerUnit(TypedDict):
    """A perplexity, per token of the model and per word of the text; null where it is more than a number can hold, as
    per word of a text without blanks."""

    token: float
    word: float


class IntervalPerUnit(TypedDict):
    """The intervals of both perplexities, None for a single document."""

    token: Interval | None
    word: Interval | None


Position = TypedDict("Position", {"from": int, "to": int, "tokens": int, "nll": float})


class Recency(TypedDict):
    """Tokens whose previous occurrence is of one class."""

    previous_occurrence: str
    tokens: int
    nll: float


class Document(TypedDict):
    """The figures of one document; in the classes of position, of place and of recency its tokens and nats,
    [classes, 2]."""

    id: str
    tokens: int
    words: int
    bytes: int
    nll: float
    by_position: list[list[float]]
    by_place: list[list[float]]
    by_recency: list[list[float]]


class Figures(TypedDict):
    """What a model's nats say of some documents, read in one situation."""

    tokens: int
    words: int
    bytes: int
    documents: int
    nll: float
    """Negative log-likelihood, the sum over all tokens, in nats."""
    perplexity: PerUnit
    perplexity_interval: IntervalPerUnit
    bits_per_byte: float
    by_position: list[Position]
    """Classes of tokens by their distance from the document's beginning."""
    by_place: list[Position]
    """By their place in the window in which they are predicted: at its first, attention sees the least."""
    by_recency: list[Recency]
    per_document: list[Document]


class Ratio(TypedDict):
    """Nats per token of model b less those of model a; None where there are no tokens."""

    nats_per_token: float | None
    interval: Interval | None


class Difference(TypedDict):
    """By how much model b differs from model a on all tokens, and on how many documents it is better and worse."""

    nats_per_token: float
    interval: Interval | None
    documents: int
    better: int
    worse: int


class Control(Figures):
    """The figures of a situation in which the memory cannot help, and by how much they are worse."""

    difference: Difference


class BaselineSettings(TypedDict):
    """By what a baseline was mixed in, as chosen on the validation documents."""

    size: int | None
    """How many tokens it goes back; None: all of the document's."""
    sharpness: float
    weight: float
    floats: int
    """How many numbers it holds of a text: states, or how often each token occurred."""


class Baseline(Figures):
    """The figures without the memory, but with a baseline that needs no training; and by how much they are worse."""

    difference: Difference
    settings: BaselineSettings


class Protocol(TypedDict):
    """How text was read."""

    segment: int
    stride: int
    warmup_documents: int
    reset: str
    dtype: str


class Measurement(Protocol):
    """How text was read, which text, and by which model."""

    documents: str
    memory: dict[str, object] | None
    checkpoint: str


class Cost(TypedDict):
    """What a token cost when a model read with its memory."""

    seconds_per_token: float
    """Of one process that reads alone; of several, their seconds together."""
    state_bytes: int
    """What one text hands on from segment to segment."""
    window_bytes: int
    """The keys and values (or what else attention keeps) of one text's window."""
    batch_size: int
    processes: int
    device: str


class Sizes(TypedDict):
    """How large the model of a run is, before an engine cuts it up; every run adds this to its `results.json`."""

    backbone_parameters: int
    memory_parameters: int
    trained_parameters: int
    """Of both."""
    weight_bytes: int
    optimizer_bytes: int
    """Of two moments of each parameter that is trained."""
    state_floats: list[int]
    """How many floats the memory of each layer that has one holds of one row, which is one text."""
    state_bytes: int
    """Of all of them together, and of what is counted beside them."""


class Results(Figures):
    """What `results.json` of language modelling holds."""

    controls: dict[str, Control]
    baselines: NotRequired[dict[str, Baseline]]
    protocol: Measurement
    cost: NotRequired[Cost]
    """Not in the results of earlier versions."""
    sizes: NotRequired[Sizes]
    before: NotRequired[Figures | None]


class GainParts(TypedDict):
    """Of what a difference is made; its three parts add up to it."""

    specific: Difference
    """By what is specific to the document: its own memory less another document's."""
    presence: Difference
    """By the mere presence of a memory: another document's less none."""
    without_memory: Difference
    """By all else: with memories off."""


class Compared(TypedDict):
    """One of the two models that are compared."""

    checkpoint: str
    perplexity: PerUnit
    protocol: str
    cost: Cost | None
    parts_unknown: str | None
    """Why it is not known what its memory gains by its document; None if it is, or there is no memory."""


PositionRatio = TypedDict(
    "PositionRatio",
    {"from": int, "to": int, "tokens": int, "nats_per_token": float | None, "interval": Interval | None},
)


class RecencyRatio(Ratio):
    """The difference on tokens whose previous occurrence is of one class."""

    previous_occurrence: str
    tokens: int


class DocumentDifference(TypedDict):
    """The difference on one document."""

    id: str
    tokens: int
    nats_per_token: float


class Comparison(TypedDict):
    """What `comparison.json` holds; all differences are those of model b less model a."""

    protocol: str
    documents: int
    tokens: int
    a: Compared
    b: Compared
    difference: Difference
    parts: GainParts | None
    """Of the difference; None where it is not known, and where neither has a memory."""
    by_position: list[PositionRatio]
    by_place: list[PositionRatio]
    by_recency: list[RecencyRatio]
    """This and the one before without the classes that hold other tokens in one than in the other, as windows of other
    lengths make them."""
    per_document: list[DocumentDifference]


class StudyRow(TypedDict):
    """Runs of a study that differ in their seed alone, and their differences from their opponents; pooled over seeds.

    A difference is None where one of the two has not been run.
    """

    name: str
    seeds: list[int]
    perplexity: list[float]
    """Per token, of each seed."""
    against_none: Comparison | None
    against_cache: Comparison | None
    """Against a cache of as many floats."""
    on_short_term: Comparison | None
    """Of the memory behind a short-term memory, against that alone."""
    shuffled: list[float]
    """How many nats per token more it costs with its memory shuffled in time, of each seed."""
    floats: int
    """Of all memories together, of one text."""
    memory_parameters: int
    seconds_per_token: float | None
    """Of reading; None of a baseline, which was not timed."""


class Study(TypedDict):
    """What `study.json` holds."""

    rows: list[StudyRow]


class SweepRow(TypedDict):
    """Runs that differ in their seed alone."""

    name: str
    """The options by which they differ from the other rows."""
    runs: list[str]
    seeds: list[int]
    value: float
    interval: Interval | None
    by_seed: list[float]
    behind: Difference | None
    """Nats per token more than the first row; None in that, and where there is no perplexity."""
    specific: float | None
    """What their memory changes by what is specific to the document, in nats per token; None where it is not known."""


class Sweep(TypedDict):
    """What `summary.json` holds, the best row first."""

    measure: str
    """`perplexity`, `exact match` or `accuracy`."""
    rows: list[SweepRow]


class RetrievalCell(TypedDict):
    """How well answers at one depth of texts of one length were found."""

    length: int
    """How many tokens the texts have."""
    depth: float
    """Where the answer stood, as a part of the text: 0 is its beginning, 1 its end."""
    answers: int
    """How many answers were asked for."""
    tokens: int
    """How many tokens the answers have together."""
    exact_match: float
    """The share of the answers that are right to the last token, free running."""
    accuracy_free_running: float
    """The share of the tokens that are right, free running."""
    accuracy: float
    """The share of the tokens that are right, teacher forced."""
    nll: float
    """Nats per token of the answers, teacher forced."""


class TaskProtocol(TypedDict):
    """How texts were read, and by which model."""

    segment: int
    dtype: str
    checkpoint: str


class RetrievalProtocol(TaskProtocol):
    """What was asked beside that, and what could be seen."""

    task: str
    window: int
    """How many tokens a model without long-term memory would see."""
    reset: str


class RetrievalResults(TypedDict):
    """What `results.json` of a retrieval task holds."""

    cells: list[RetrievalCell]
    """A cell for each length and depth."""
    controls: dict[str, list[RetrievalCell]]
    """The same cells in situations in which the memory cannot help, by their names."""
    chance: float
    """How often a whole answer is right by chance."""
    protocol: RetrievalProtocol
    sizes: NotRequired[Sizes]
    before: NotRequired[None]


class ClassificationProtocol(TaskProtocol):
    """Which examples were read beside that."""

    task: str
    length: int
    """Tokens of a text, at most."""


class AttentionSpan(TypedDict):
    """How far away attention looks in the mean, in tokens (Tay et al., arXiv 2011.04006)."""

    layers: list[float]
    even: float
    """What attention would have that is alike on all tokens: about a third of a text's length."""
    examples: int
    """Of which it was measured."""


class ClassificationResults(TypedDict):
    """What `results.json` of classification holds."""

    examples: int
    classes: int
    nll: float
    """Nats per example."""
    accuracy: float
    accuracy_interval: Interval
    """Of the share of independent examples, by Wilson."""
    baselines: dict[str, float]
    """What is right without reading: `majority`, and of lists by their first operation `root_operator`, as learned from
    the training examples; nothing where those were not read."""
    protocol: ClassificationProtocol
    attention_span: NotRequired[AttentionSpan]
    """Of a classifier with softmax attention alone."""
    before: NotRequired[None]


class TeacherForced(TypedDict):
    """Figures of sorting where each place of the answer is predicted from the true places before it."""

    nll: float
    """Nats per symbol of the answer."""
    accuracy: float
    accuracy_by_position: list[float]


class Accuracies(TypedDict):
    """Accuracies of sorting, teacher forced and from the own answers before, also at every place of the answer."""

    accuracy: float
    accuracy_by_position: list[float]
    accuracy_free_running: float
    accuracy_free_running_by_position: list[float]


class SortingFigures(Accuracies):
    """What is measured of a model on sequences of one length."""

    length: int
    sequences: int
    nll: float
    """Nats per symbol of the answer, teacher forced."""
    ideal_counters: dict[str, Accuracies]
    """What ideal counters reach on the same sequences, by their names: marks beside the model's figures."""


class SortingProtocol(TaskProtocol):
    """How memories began beside that."""

    reset: str


class SortingResults(TypedDict):
    """What `results.json` of sorting holds."""

    lengths: list[SortingFigures]
    protocol: SortingProtocol
    sizes: NotRequired[Sizes]
    before: NotRequired[None]


class SortingRun(SortingFigures):
    """A row of `accuracy.json`, of one model of a grid of runs on sequences of one length."""

    memory: str
    seed: int


class InspectedDocument(TypedDict):
    """How much of a document was read, and what it cost."""

    tokens: int
    """How many tokens were predicted."""
    segments: int
    nats: float
    """Nats per token."""


class InspectedMemory(TypedDict):
    """What the memories are that were looked into, and the numbers of their layers; all their options beside that."""

    kind: str
    segment_length: int
    short_term_length: int
    layers: list[int]
    basis_functions: NotRequired[int]
    """This and what follows is of memories that are continuous signals."""
    contraction: NotRequired[str]
    contraction_rate: NotRequired[float]
    read: NotRequired[str]
    sticky: NotRequired[bool]


DensityFigure = Literal["centre", "centre_spread", "width", "width_spread", "tokens_back"]
"""A figure of the densities by which one head read a segment, in parts of the memory, of which 1 is the newest end.

`centre` is the mean of the densities' means over the segment's tokens, `centre_spread` their standard deviation;
`width` is the mean of the densities' standard deviations, `width_spread` the standard deviation of these; `tokens_back`
is how many tokens before the segment's first lies what is at the centre."""


class Readings(TypedDict):
    """What is measured when a segment is read that finds something in memory.

    Lists run over these segments, then over layers, then over heads. Those of densities are empty for a memory that is
    no signal, and so is `contribution` for one that adds nothing to what attention returns.
    """

    segment: list[int]
    """The number of the segment, from 0."""
    tokens: list[int]
    """How many tokens the segment has."""
    centre: list[list[list[float]]]
    """The first of five figures that `DensityFigure` explains."""
    centre_spread: list[list[list[float]]]
    width: list[list[list[float]]]
    width_spread: list[list[list[float]]]
    tokens_back: list[list[list[float]]]
    contribution: list[list[float]]
    """‖memory's context‖ / ‖self-attention's output‖, the mean over the segment's tokens."""
    nats: list[float]
    """Nats per token with all memories."""
    nats_without_layer: list[list[float | None]]
    """Nats per token where one memory is empty when the segment is read. Only one of the layers has its turn in each
    segment; the others are None."""
    nats_without_memory: list[float]
    """Nats per token where all memories are empty when the segment is read."""


class Writings(TypedDict, total=False):
    """What is measured when a sticky memory is written that holds something; an empty mapping where none was.

    Lists run over these writes, then over layers.
    """

    segment: list[int]
    """The number of the segment that was read then."""
    sampled_places: list[list[list[float]]]
    """The share of the samples in each of equal parts of [0, 1]."""


class Explained(TypedDict):
    """How much of the past one layer's signal still tells, as R²; None where nothing differs from the mean."""

    total: float | None
    """R² over all tokens."""
    by_age: list[float | None]
    """R² of each segment, the newest first."""
    best: float | None
    """R² over all tokens of the best that as many coefficients could tell at the places where the tokens lie now."""


class Reconstruction(TypedDict):
    """How much of the past the signals of all layers still tell after some writes."""

    segments: int
    """How many segments had been written."""
    tokens_back: list[float]
    """How many tokens the middle of each segment lies before the next one to be read, the newest first."""
    best: list[float | None]
    """For each layer what `Explained` says; so `total` and `by_age`."""
    total: list[float | None]
    by_age: list[list[float | None]]


class Source(TypedDict):
    """A passage of the past that was looked at."""

    first: int
    """The number of its first token, from 0."""
    tokens_back: int
    """How many tokens before the stretch it begins."""
    share: float
    """Of all in the memory that the heads of all layers looked at."""
    even_share: float
    """What that would be if they looked everywhere alike."""
    text: str


class Stretch(TypedDict):
    """A few tokens of the document, and what the memories gained of each."""

    first: int
    """The number of its first token, from 0."""
    gain: float
    """Nats per token that it costs more without the memories; below 0 they cost something."""
    pieces: list[str]
    """Its text, token by token."""
    gains: list[float]
    """The gain of each token, in nats."""
    sources: list[Source]
    """Where the densities lay most, for memories that are signals."""


class Costs(TypedDict):
    """What the document costs more without memories, with intervals over its segments."""

    without_memory: Ratio
    without_layer: list[Ratio]
    """Of each layer; None where no segment was read without it."""


class Inspection(TypedDict):
    """What `inspection.json` holds: what memories held and did along one document."""

    document: InspectedDocument
    memory: InspectedMemory
    reading: Readings
    costs: Costs
    stretches: list[Stretch]
    """The one in which the memories gained most and the one in which they gained least, where the text is known."""
    writing: Writings
    reconstruction: list[Reconstruction]
    """What is left after 1, 2, 4, … and after all writes."""
    checkpoint: NotRequired[str]
    """The model that `scripts/inspect_memory.py` looked into."""
    name: NotRequired[str]
    """The document that it read."""


class BenchmarkMachine(TypedDict):
    """On which machine something was measured, and how fast that is."""

    device: str
    name: str
    torch: str
    python: str
    threads: int
    precision: str
    clock: str
    matmul_flops: float
    """Floating-point operations per second of a large product of matrices."""
    bandwidth: float
    """Bytes per second, read and written, of a large copy."""


class BenchmarkOptions(TypedDict, total=False):
    """The only one that is drawn of a comparison's sizes and choices, of which each has its own."""

    segment: int


class ArenaRun(TypedDict):
    """A row of `accuracy.json` of Long-Range Arena: one run."""

    task: str
    attention: str
    seed: int
    accuracy: float
    examples: int
    baselines: dict[str, float]
    attention_span: NotRequired[AttentionSpan]


class InitialGradients(TypedDict):
    """A row of `norms.json`: a placement of norms before the first step, the mean over seeds."""

    placement: str
    normalization: str
    depth: int
    width: int
    seeds: int
    initializer_range: float | None
    gradients: list[float]
    """Of each layer: the norm of the gradient of the last map of its feed-forward part."""
    squares: list[float]
    """Of each layer: ‖x‖²/d of what that part adds up to."""
    identities: NotRequired[dict[str, float]]
    """With dual norms: by what part two identities do not hold."""


class NormTraining(TypedDict):
    """Another row of it: a placement that was trained."""

    placement: str
    normalization: str
    depth: int
    width: int
    warmup: int
    steps: int
    learning_rate: float
    seed: int
    losses: list[float | None]
    """Nats per byte of each step; None where they were not finite."""


class NormResults(TypedDict):
    """`norms.json`."""

    initialisation: list[InitialGradients]
    training: list[NormTraining]
    byte_frequencies: float
    """Nats per byte of who knows nothing but how often each byte occurs."""


class CapacityRun(TypedDict):
    """A row of `capacity.json`: a mechanism that learned to hold so many associations."""

    keys: str
    mechanism: str
    associations: int
    steps: int
    seed: int
    loss: float
    """½‖answer − value‖², the mean over questions."""


class BenchmarkFigures(TypedDict, total=False):
    """What else was measured or counted of a contestant, each figure where it makes sense."""

    tokens_per_second: float
    first_call_seconds: float
    """Of the first call, in which all is compiled."""
    multiplications_per_token: float
    bytes: float
    memory_bytes: int
    """How large is what is remembered."""
    peak_extra_bytes: int
    peak_process_bytes: int
    text_tokens: int
    """How long the text is."""
    reach_tokens: int
    """How many tokens of the document are in reach when the contestant reads."""
    times_early_by_segment: list[tuple[int, float]]
    """Numbers of segments, each with how many times as long as an early one it took."""


class BenchmarkLine(BenchmarkFigures):
    """What one contestant took, or a part of it; lines of the kind `ratio` have other names, and nobody reads them."""

    comparison: str
    machine: BenchmarkMachine
    options: BenchmarkOptions
    kind: Literal["contestant", "part", "ratio"]
    name: str
    seconds: list[float]
    """How long each round took."""
    median_seconds: float
    quartiles_seconds: list[float]
    flops: NotRequired[float]
    """Floating-point operations by formula, where there is one, as then are the `bytes`."""
    floor_seconds: NotRequired[float]
