"""The map of a run: everything that can be set, with its type and its default.

An option `a.b.c=value` of the command line is the field `c` of `b` of `a` here. What is chosen by one word, such as
`optimizer=adam`, stands beside its class; models and experiments, which decide on many options, stand in `conf/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from infformer.data.options import DATA, SPLITS, DataConfig
from infformer.memory.cache import CacheConfig
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig, check_layers
from infformer.models.adapters import LoraConfig
from infformer.models.document_classifier import HeadConfig
from infformer.models.quantization import QUANTIZATIONS
from infformer.options import check_at_least, check_choices, check_finite, free, measuring, to_come
from infformer.tasks.associative_recall import AssociativeRecallConfig
from infformer.tasks.classification import ClassificationConfig
from infformer.tasks.haystack import NeedleConfig, PasskeyConfig
from infformer.tasks.ruler import MultikeyConfig, VariableTrackingConfig
from infformer.tasks.sorting import SortingConfig
from infformer.tasks.task import LanguageModellingConfig, TaskConfig

CONF = Path(__file__).parent / "conf"
"""The folder of the groups that the commands compose."""


def _check_baselines(option: str, baselines: bool, data: DataConfig) -> None:
    if baselines and "validation" not in data.splits:
        raise ValueError(
            f"{option}=true with data.validation=null: how baselines are mixed in is chosen on validation documents; "
            "name some, or leave the baselines out"
        )


def _check_place(option: str, value: str | None) -> None:
    if value == "":
        raise ValueError(f"{option}=: name a folder, such as {option}=outputs/mine")


TASKS: dict[str, TaskConfig] = {
    "language_modelling": LanguageModellingConfig(),
    "sorting": SortingConfig(),
    "passkey": PasskeyConfig(),
    "needle": NeedleConfig(),
    "multikey": MultikeyConfig(),
    "variable_tracking": VariableTrackingConfig(),
    "associative_recall": AssociativeRecallConfig(lengths=[512, 256, 1024], training_lengths=[256, 512, 1024]),
    "classification": ClassificationConfig(),
    "lra_listops": ClassificationConfig("listops", 2000),
    "lra_text": ClassificationConfig("bytes", 4000),
    "lra_retrieval": ClassificationConfig("pairs", 8000),
    "lra_image": ClassificationConfig("pixels", 1024),
    "lra_pathfinder": ClassificationConfig("pathfinder", 1024),
    "lra_path_x": ClassificationConfig("path_x", 128 * 128),
}
"""What `task=` chooses. The texts of `passkey`, `needle`, `multikey` and `variable_tracking` are those of `data`; a
needle's text is one document or a part of it, so longer ones than `data=sample` cuts its novels to want
data.max_held_out_characters=null. Sorting and recall are for models from scratch: experiment=sorting_…,
associative_recall_small. `classification`: your own
texts and their classes, data.train=mine.csv; `lra_…`: the tasks of Long-Range Arena, experiment=lra_…."""


def _memory(kind: type[MemoryConfig], **values: Any) -> DictConfig:
    """The options of a kind of memory, of which some follow others."""
    node: DictConfig = OmegaConf.structured(kind)
    node.update(values)
    return node


_AS_A_SEGMENT = "${training.segment_length}"
_SIZES = {"basis_functions": _AS_A_SEGMENT, "past_samples": _AS_A_SEGMENT}
PUBLISHED_MEMORY = {
    "short_term_length": None,  # with a decoder's short-term memory before it, alone beside a pretrained model
    "sink_tokens": None,
    "basis_functions": 512,
    "widths": [0.005, 0.01],
    "past_samples": 512,
    "contraction": "constant",
    "levels": 8,
    "contraction_rate": 0.5,
    "training_rates": [],
    "ridge": 0.5,
    "read": "affine",
    "points": None,
    "sharpness": 1.0,
    "density": "gaussian",
    "sticky": True,
    "sticky_by": "attention",
    "sticky_bins": 128,
    "sticky_placement": "published",  # half a sample late at every write
    "stores": "hidden",
    "combination": "gates",
    "key_convolution": 0,
    "heads": None,
    "input_gate": False,  # the published code has one switched on, the paper has none
    "divergence_weight": 1e-6,
    "prior_standard_deviation": 0.05,
}
"""Every constant of the published GPT-2 experiments, with stickiness; their segments had 512 tokens."""

MEMORIES: dict[str, DictConfig] = {
    "short_term": _memory(MemoryConfig),
    "compressive": _memory(CompressiveMemoryConfig, length=_AS_A_SEGMENT, rate=4),
    "long_term": _memory(LongTermMemoryConfig, **_SIZES),
    "sticky": _memory(LongTermMemoryConfig, **_SIZES, sticky=True),
    "published": _memory(LongTermMemoryConfig, **PUBLISHED_MEMORY),
    "fast_weight": _memory(FastWeightMemoryConfig),
    "cache": _memory(CacheConfig, length=_AS_A_SEGMENT),
}
"""What `model/memory=` chooses, beside `none`. As published, a long-term memory has as many basis functions, and
samples of the past, as a segment has tokens; a compressed one as many entries, each of four tokens."""

_PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """Which model, and what it remembers."""

    pretrained: str | None = None
    """A folder, or the name of a model on the hub. Null: a new model of `architecture`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """For a model from scratch: the fields of a Hugging Face configuration, `model_type` among them. With `decoder`,
    those of `DecoderConfig` (infformer/models/decoder.py)."""
    tokenizer: str | None = None
    """A folder, a name on the hub, or `words`: every word of the training documents. Null: the pretrained model's."""
    memory: MemoryConfig | None = None
    """What each layer remembers, one of `MEMORIES`. Null: nothing."""
    memory_layers: Any = None
    """Layers of a Hugging Face model that get one: a list, from 0, or `middle:6`, so many in the middle. Null: all."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """LoRA: adapters for a pretrained model, if `rank` is set. With them and the memory alone, all else stays as it
    was."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """For task=classification: what tells classes apart on top of the language model, if `kind` is set."""
    memories: str | None = None
    """A folder of memories, and adapters, that were trained beside the same model, to begin with; scripts/export.py
    writes it. Null: they are new."""
    attention: str | None = free(None)
    """The backbone's attention kernel, such as `sdpa` or `flash_attention_2`. Null: transformers' choice."""
    dtype: str = "float32"
    """Of the backbone's weights: `float32`, or if they are frozen `bfloat16` or `float16`, which take half the room.
    What learns, memories and adapters, is always float32: a small step would be rounded away in the others."""
    quantization: str | None = None
    """`4bit` or `8bit`, by bitsandbytes: the linear maps of a frozen backbone take an eighth or a quarter of float32's
    room. All else of it, such as embeddings, and the products with four bits are as `dtype` says: set that to bfloat16
    too, where float32 is slow or has no room. Null: all is as `dtype` says."""

    def __post_init__(self) -> None:
        check_choices("model.", self, dtype=_PRECISIONS)
        if self.quantization is not None:
            check_choices("model.", self, quantization=QUANTIZATIONS)
        for name in ("pretrained", "tokenizer", "attention", "memories"):
            if getattr(self, name) == "":
                raise ValueError(f"model.{name}=: give a folder or a name, or null")
        if (self.pretrained is None) == (not self.architecture):
            raise ValueError(
                "give one of model.pretrained= (a folder or a hub name) and model.architecture= (a model from scratch)"
            )
        own = {"lora.rank": self.lora.rank, "memories": self.memories, "quantization": self.quantization}
        for option, value in (*own.items(), ("dtype", None if self.dtype == "float32" else self.dtype)):
            if value is not None and self.pretrained is None:
                raise ValueError(
                    f"model.{option}={value}: this stands beside a pretrained model, and a model from scratch is "
                    f"trained as a whole; set it to {'float32' if option == 'dtype' else 'null'}, or choose a model by "
                    "model.pretrained="
                )
        check_layers(self.memory_layers)
        if self.is_classifier and (self.memory is not None or self.tokenizer is not None):
            raise ValueError(
                "a classifier takes a text at once, as bytes, and has neither memory nor tokenizer: set "
                "model/memory=none and model.tokenizer=null, or choose a model that remembers, such as model=decoder"
            )
        lower = self.dtype if self.dtype != "float32" else self.quantization
        if self.head.kind is not None and (self.is_classifier or lower is not None):
            raise ValueError(
                f"model.head.kind={self.head.kind}: a head stands on top of a language model in float32, and this is "
                f"{'an encoder that has one' if self.is_classifier else f'one in {lower}'}; set it to null"
            )
        if self.memory is not None and self.memory_layers is not None and not self.memory_layers:
            raise ValueError(
                "model.memory_layers=[]: name the layers that have a memory, from 0; null is all of them, and "
                "model/memory=none is no memory"
            )
        if self.memory is not None and not self.is_decoder:
            self.memory.check_pretrained()
        if self.is_decoder and self.memory_layers is not None:
            raise ValueError(
                f"model.memory_layers={self.memory_layers}: all layers of a decoder have the same memories; set "
                "it to null"
            )

    @property
    def is_classifier(self) -> bool:
        """Whether this is the project's own encoder, which knows classes and no next token."""
        return self.architecture.get("model_type") == "classifier"

    @property
    def is_decoder(self) -> bool:
        """Whether this is the project's own model from scratch."""
        return self.architecture.get("model_type") == "decoder"


@dataclass
class TrainingConfig:
    """The loop."""

    max_steps: int = to_come(1000)
    """Optimiser steps."""
    batch_size: int = 8
    """Lanes: streams of text read side by side, all processes and microbatches together."""
    segment_length: int = 512
    """Tokens that each lane reads at a time; the memory's segment as well."""
    bptt_segments: int = 1
    """Segments of each lane in one step. With more than one, gradients flow through the memory between them. In
    classification by a head: the last ones of each text, through which they flow; all are read."""
    gradient_accumulation: int = free(1)
    """Microbatches into which each process's lanes are cut, one after the other in memory; the step is the same."""
    gradient_clipping: float | None = 1.0
    """Largest norm of the gradient. Null: no limit."""
    precision: str = "float32"
    """`float32`, `bfloat16` or `float16` for autocast; weights, what is remembered and densities stay float32."""
    tf32: bool = True
    """On CUDA, round the operands of float32 products in training to TF32, 10 bits behind the point, which is 8 times
    faster; measurements never do."""
    gradient_checkpointing: bool = free(False)
    """Compute activations again in backward instead of keeping them."""
    compile: Any = free(None)
    """`true`: compile the layers for training, those of one kind once; it takes up to a minute, and less memory. Layers
    whose activations are computed again stay as they are. `graphs`: besides, on one CUDA device, record what a step
    computes once and replay it, which takes the processor next to nothing. Null: `true` on CUDA devices, else `false`.
    Losses do not depend on it, up to rounding."""
    freeze_backbone: bool = False
    """Train the memory alone."""
    memory_dropout: float = 0.0
    """The share of segments that a lane reads without its memory, which is written as always: so the model stays good
    where a document begins, and learns what the memory adds to it."""
    log_every: int = free(10)
    """Steps between two lines of metrics."""
    evaluate_every: int | None = to_come(200)
    """Steps between two evaluations on the validation documents, by which the best weights are chosen. Null: only
    at the end."""
    checkpoint_every: int | None = free(200)
    """Steps between two checkpoints. Null: only at the end."""
    keep_checkpoints: int = free(2)
    """How many of the last checkpoints stay, beside the best."""
    sample_every: int | None = free(None)
    """Steps between two samples of text. Null: none."""
    sample_tokens: int = free(64)
    """Length of a sample."""

    def __post_init__(self) -> None:
        check_finite("training.", self)
        check_choices("training.", self, precision=_PRECISIONS)
        if self.compile not in (None, True, False, "graphs"):
            raise ValueError(f"training.compile={self.compile}: choose true or false, graphs, or null")
        sizes = ("max_steps", "batch_size", "bptt_segments", "gradient_accumulation", "log_every", "sample_tokens")
        often = ("evaluate_every", "checkpoint_every", "keep_checkpoints", "sample_every")
        check_at_least(1, "training.", self, *sizes, *often)
        check_at_least(2, "training.", self, "segment_length")
        if not 0 <= self.memory_dropout < 1:
            raise ValueError(f"training.memory_dropout={self.memory_dropout}: must be at least 0 and less than 1")
        if self.gradient_clipping is not None and self.gradient_clipping <= 0:
            raise ValueError(
                f"training.gradient_clipping={self.gradient_clipping}: must be positive, or null for no limit"
            )


_WEIGHT_DECAYS = {"adamw": 0.01, "adam": 0.0}
"""Of each optimiser, if nothing else is said."""


@dataclass
class OptimizerConfig:
    """Adam, with a group of its own for the memory."""

    name: str = "adamw"
    """`adamw`, or `adam` (weight decay as an L2 penalty)."""
    learning_rate: float = 5e-5
    """The backbone's."""
    memory_learning_rate: float = 2.5e-4
    """The memory's: its parameters start from nothing, the backbone's do not."""
    gate_learning_rate: float = 1e-2
    """That of the gates, one number a head, behind which some memories begin: slower ones hardly open."""
    layer_decay: float = 1.0
    """By how much a layer of the backbone learns more slowly than the one above it, and embeddings than the first; 2.6
    in ULMFiT. 1: all alike."""
    weight_decay: float = _WEIGHT_DECAYS["adamw"]
    """Not for norms, biases and gates."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        check_finite("optimizer.", self)
        check_choices("optimizer.", self, name=_WEIGHT_DECAYS)
        rates = ("learning_rate", "memory_learning_rate", "gate_learning_rate", "weight_decay")
        check_at_least(0, "optimizer.", self, *rates)
        check_at_least(1, "optimizer.", self, "layer_decay")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas={list(self.betas)}: give two numbers in [0, 1)")
        if self.epsilon <= 0:
            raise ValueError(f"optimizer.epsilon={self.epsilon}: must be positive")


OPTIMIZERS = {name: OptimizerConfig(name, weight_decay=decay) for name, decay in _WEIGHT_DECAYS.items()}

_WARMUP_STEPS = {"cosine": 0, "linear": 0, "constant": 0, "inverse_sqrt": 1000, "slanted_triangular": 0}
"""Of each schedule, if nothing else is said."""


@dataclass
class ScheduleConfig:
    """How the learning rates change over the run, all by the same factor."""

    name: str = "cosine"
    """`cosine`: down half a cosine to `final_ratio` at the last step. `linear`: down a straight line to zero there.
    `constant`: the same factor throughout. `inverse_sqrt`: 1/sqrt(step) after the warm-up, which it needs.
    `slanted_triangular`: ULMFiT's, up a line until `cut` and down a flatter one."""
    warmup_steps: int = 0
    """Steps of linear growth from zero; `slanted_triangular` rises by itself."""
    final_ratio: float = 0.0
    """For `cosine`: where it ends, as a part of the highest rate."""
    cut: float = 0.1
    """For `slanted_triangular`: which part of the steps goes up."""
    ratio: float = 32.0
    """For `slanted_triangular`: the highest rate over that of the first step."""
    unfreeze_every: int | None = None
    """Gradual unfreezing: at first the head and the memories learn alone, and after each so many steps one more layer
    of the backbone, from the last one down to the embeddings. Null: all from the beginning."""
    unfreeze_layers: int | None = None
    """How many layers of the backbone, from the last one down, learn beside the head and the memories at all, the
    embeddings counted as the lowest; the others stay as they are. Null: all; 0: none."""
    restart: bool = False
    """Begin the schedule anew whenever a layer joins, over the steps until the next does."""

    def __post_init__(self) -> None:
        check_finite("schedule.", self)
        check_choices("schedule.", self, name=_WARMUP_STEPS)
        check_at_least(0, "schedule.", self, "warmup_steps", "unfreeze_layers")
        check_at_least(1, "schedule.", self, "ratio", "unfreeze_every")
        if not 0 < self.cut < 1:
            raise ValueError(f"schedule.cut={self.cut}: must lie between 0 and 1")
        if self.restart and self.unfreeze_every is None:
            raise ValueError("schedule.restart=true: it begins anew where layers join; set schedule.unfreeze_every too")
        if not 0 <= self.final_ratio <= 1:
            raise ValueError(f"schedule.final_ratio={self.final_ratio}: must lie between 0 and 1")


SCHEDULES = {name: ScheduleConfig(name, warmup_steps=steps) for name, steps in _WARMUP_STEPS.items()}


@dataclass
class EvaluationConfig:
    """How a model is measured."""

    batch_size: int = 8
    """Documents read side by side; the figures do not depend on it."""
    before: bool = True
    """Measure the test documents before training too."""
    controls: bool = True
    """In the final evaluation, measure again without the memory, with the memory of another document, and with a memory
    shuffled in time."""
    baselines: bool = False
    """In the final evaluation, also measure a continuous cache and the document's unigram in place of the memory, which
    need no training; how they are mixed in is chosen on the validation documents. It takes as long as reading the test
    documents twice more and the validation documents once."""
    inspected_segments: int = 16
    """In the end, look into the memory along so many segments of the longest test document. 0: do not."""
    max_validation_tokens: int | None = measuring(None, "validation")
    """In evaluations during training, read at most this much of the beginnings of the documents. Null: all."""

    def __post_init__(self) -> None:
        check_at_least(1, "evaluation.", self, "batch_size", "max_validation_tokens")
        check_at_least(0, "evaluation.", self, "inspected_segments")


_ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 100_000}  # smaller parameters stay whole
_DEEPSPEED: dict[str, dict[str, Any]] = {
    "auto": {},
    "ddp": {},
    "fsdp2": {},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": _ZERO3},
    "zero3_offload": {
        "zero_force_ds_cpu_optimizer": False,  # Adam as everywhere else; DeepSpeed's own has to be compiled
        "zero_optimization": {**_ZERO3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
}
"""What DeepSpeed is told by each engine; nothing by those that are not its own."""


@dataclass
class EngineConfig:
    """How several processes work together. None of it changes what is learned."""

    name: str = "auto"
    """`ddp`: every process has the whole model, the fastest as long as it fits. `fsdp2`: weights, gradients and moments
    are cut up (PyTorch). `zero1`, `zero2`, `zero3`: moments, and gradients, and weights are (DeepSpeed).
    `zero3_offload`: and all lie in the host's memory. `auto`: what accelerate was configured for, `ddp` if for
    nothing."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's configuration, for the zero engines."""
    config: str | None = None
    """A JSON file with such a configuration, instead of `deepspeed`."""
    patience: float = 1800.0
    """Seconds without progress after which a process is given up as hanging, and the run with it."""

    def __post_init__(self) -> None:
        check_finite("engine.", self)
        check_choices("engine.", self, name=_DEEPSPEED)
        if self.config is not None and not self.name.startswith("zero"):
            raise ValueError(
                f"engine.config={self.config} with engine={self.name}: a DeepSpeed configuration belongs to "
                "engine=zero1, zero2, zero3 or zero3_offload"
            )
        if self.patience <= 0:
            raise ValueError(f"engine.patience={self.patience}: must be a positive number of seconds")


ENGINES = {name: EngineConfig(name, options) for name, options in _DEEPSPEED.items()}

_TRACKERS = ("none", "wandb", "tensorboard")


@dataclass
class TrackerConfig:
    """Where the metrics are shown, beside `metrics.jsonl`. All but `name` concern wandb alone."""

    name: str = "none"
    """`none`; `wandb`: pip install 'infformer[wandb]', then `wandb login`, or tracker.mode=offline without an account;
    `tensorboard`: pip install 'infformer[tensorboard]', then tensorboard --logdir outputs."""
    project: str = "infformer"
    entity: str | None = None
    """A user or a team. Null: the account's default."""
    tags: list[str] = field(default_factory=list)
    mode: str | None = None
    """`online` or `offline`. Null leaves the choice to WANDB_MODE and wandb's own settings, which default to online."""

    def __post_init__(self) -> None:
        check_choices("tracker.", self, name=_TRACKERS)
        if not self.project:
            raise ValueError("tracker.project=: give the project a name, such as tracker.project=infformer")
        if self.mode is not None:
            check_choices("tracker.", self, mode=("online", "offline"))


TRACKERS = {name: TrackerConfig(name) for name in _TRACKERS}


@dataclass
class GrowthConfig:
    """Sizes that become larger at one step of a run, in this order; null: it stays as it is."""

    step: int
    """After which."""
    feed_forward_size: int | None = None
    """Width inside the feed-forward parts."""
    num_attention_heads: int | None = None
    """Heads of attention."""
    head_size: int | None = None
    """Width of a head's values; of a Hugging Face model of its queries and keys too."""
    key_size: int | None = None
    """Width of a head's queries and keys, of our own decoder."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_hidden_layers: int | None = None
    """Layers."""

    @property
    def sizes(self) -> dict[str, int]:
        """Those that become larger, by their names."""
        return {name: value for name, value in vars(self).items() if name != "step" and value is not None}


@dataclass(kw_only=True)
class RunConfig:
    """One training run."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    model: ModelConfig
    task: TaskConfig = field(default_factory=LanguageModellingConfig)
    """What to learn: language modelling, on the documents of `data`, or one of those of `TASKS`."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    growth: list[GrowthConfig] = to_come(list)
    """When the model becomes larger, one growth after the other, such as `[{step: 200, num_hidden_layers: 4}]`. A
    resumed run may change those that are still to come."""
    evaluation: EvaluationConfig = measuring(EvaluationConfig)
    engine: EngineConfig = free(EngineConfig)
    tracker: TrackerConfig = free(TrackerConfig)
    name: str = free("run")
    """The run's folder is `outputs/<name>`, unless `output_dir` says otherwise."""
    output_dir: str = free("outputs/${name}")
    seed: int = 0
    resume: str | None = free(None)
    """`auto`: go on from the newest whole checkpoint of `output_dir`, if there is one. A path: from that checkpoint.
    Null: start; an `output_dir` that already holds a run is an error."""
    dry_run: bool = free(False)
    """Make three steps in a temporary folder, and say what the run will take: memory, time, and room on the disk."""

    def __post_init__(self) -> None:
        _check_place("output_dir", self.output_dir)
        _check_baselines("evaluation.baselines", self.evaluation.baselines, self.data)
        self.output_dir = self.output_dir.replace("${name}", self.name)  # which in Python nobody has filled in
        if self.name in ("", ".", ".."):
            raise ValueError(f"name={self.name}: give the run a name, which its folder in outputs/ has too")
        if self.resume == "":
            raise ValueError("resume=: set it to auto, to a checkpoint, or to null")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: must be a whole number from 0 to 4294967295")
        if self.model.is_classifier and not self.task.has_examples:
            raise ValueError(
                "model=classifier tells classes apart and predicts no token: choose task=classification, or one of the "
                "tasks lra_…, or another model"
            )
        head = self.model.head.kind
        if head is not None and (not self.task.has_examples or getattr(self.task, "texts", 1) > 1):
            raise ValueError(
                f"model.head.kind={head}: a head says which class one text is of; choose task=classification "
                "task.kind=text, or set it to null"
            )
        if head == "batch_norm" and self.engine.name not in ("auto", "ddp"):
            raise ValueError(
                f"model.head.kind=batch_norm with engine={self.engine.name}: its statistics are those of the lanes of "
                "one process; choose engine=ddp, or model.head.kind=plain"
            )
        if self.has_tokenizer and self.model.pretrained is None and self.model.tokenizer is None:
            raise ValueError(
                "model.tokenizer=null: a model from scratch needs a tokenizer, a folder, a hub name, or words; the "
                "tasks of symbols, which need none, are chosen by task=sorting or task=associative_recall"
            )
        if self.model.memory is not None:
            self.model.memory.check_segment_length(self.training.segment_length)
            self.model.memory.check_training(self.training.bptt_segments)
        if self.training.freeze_backbone and (self.model.memory is None or self.model.is_decoder):
            raise ValueError(
                "training.freeze_backbone=true trains a memory beside a pretrained model, and this run has none: set "
                "it to false, or choose such a model and a memory"
            )
        if self.training.freeze_backbone and self.model.lora.rank is not None:
            raise ValueError(
                f"training.freeze_backbone=true model.lora.rank={self.model.lora.rank}: adapters are part of the "
                "backbone, whose own weights are frozen beside them anyway; set one of the two to false or null"
            )
        is_frozen = self.training.freeze_backbone or self.model.lora.rank is not None
        for option, usual in (("dtype", "float32"), ("quantization", None)):
            value = getattr(self.model, option)
            if value != usual and not is_frozen:
                raise ValueError(
                    f"model.{option}={value}: steps of training are too small for such weights, so they have to be "
                    "frozen; set training.freeze_backbone=true or model.lora.rank=, or "
                    f"model.{option}={'null' if usual is None else usual}"
                )
            if value != usual and self.engine.name not in ("auto", "ddp"):
                raise ValueError(
                    f"model.{option}={value} with engine={self.engine.name}: an engine that cuts up weights wants them "
                    "all in float32; choose engine=ddp"
                )
        if self.model.dtype == "float16" and self.training.precision != "float16":
            raise ValueError(
                f"model.dtype=float16 with training.precision={self.training.precision}: small gradients would vanish "
                "on their way through the backbone; set training.precision=float16, which scales them, or "
                "model.dtype=bfloat16"
            )
        if self.training.memory_dropout and self.model.memory is None:
            raise ValueError(
                f"training.memory_dropout={self.training.memory_dropout}: this run has no memory that could be left "
                "out; set it to 0, or choose one by model/memory="
            )
        self._check_growth()

    def _check_growth(self) -> None:
        """Make sure that growths come one after the other, in a run whose parts can become larger."""
        before = 0
        for number, growth in enumerate(self.growth):
            option = f"growth[{number}].step={growth.step}"
            if growth.step <= before:
                after = "at least 1" if number == 0 else f"more than {before}, the step of the growth before"
                raise ValueError(f"{option}: must be {after}")
            if growth.step >= self.training.max_steps:
                raise ValueError(
                    f"{option}: the run ends at training.max_steps={self.training.max_steps}, and who has grown has to "
                    "learn; take an earlier step, or leave this growth out"
                )
            if not growth.sizes:
                sizes = ", ".join(name for name in vars(growth) if name != "step")
                raise ValueError(f"{option}: nothing becomes larger; give one of {sizes}")
            before = growth.step
        rank, every, layers = self.model.lora.rank, self.schedule.unfreeze_every, self.schedule.unfreeze_layers
        refused = {
            "training.freeze_backbone=true": ("what is new would not learn", self.training.freeze_backbone),
            f"model.lora.rank={rank}": ("what is new beside adapters would not learn", rank is not None),
            f"schedule.unfreeze_every={every}": ("layers join by where they stand", every is not None),
            f"schedule.unfreeze_layers={layers}": ("layers learn by where they stand", layers is not None),
            f"model.head.kind={self.model.head.kind}": (
                "a head stays as wide as it is",
                self.model.head.kind is not None,
            ),
            "training.compile=graphs": ("what is recorded stays as it is", self.training.compile == "graphs"),
        }
        for option, (why, is_set) in refused.items():
            if self.growth and is_set:
                raise ValueError(f"{option} with growth: {why}; leave one of the two out")

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer cuts texts up: always, but for tasks of symbols, and for bytes where a model has none."""
        if self.task.vocabulary_size is None:
            return True
        return (
            self.task.takes_tokenizer
            and not self.model.is_classifier
            and (self.model.pretrained or self.model.tokenizer) is not None
        )


@dataclass
class EvaluationRunConfig:
    """One evaluation, by `eval.py`."""

    checkpoint: str
    """A checkpoint of a run, a model folder, or the name of a causal language model on the hub."""
    task: TaskConfig = field(default_factory=LanguageModellingConfig)
    """What to ask of it: perplexity on the documents of `data`, or one of `TASKS`."""
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = free(EngineConfig)
    split: str = "test"
    """`train`, `validation` or `test`."""
    segment_length: int | None = None
    """Tokens of a segment. Null: the memory's, or for a model without one all its positions."""
    stride: int | None = None
    """Tokens from one window to the next. Null: a whole segment, so that segments are disjoint, as in the papers. Less:
    a sliding window, in which every token is predicted from at least `segment_length` - `stride` tokens, at
    `segment_length` / `stride` times the cost."""
    warmup_documents: int = 0
    """Give the memory a head start: before each document, read as many of those before it in the list."""
    precision: str = "float32"
    batch_size: int = free(8)
    """Documents read side by side; the figures do not depend on it."""
    controls: bool = True
    """Measure again without the memory, with the memory of another document, and with a memory shuffled in time."""
    baselines: bool = False
    """Also measure a continuous cache and the document's unigram in place of the memory, as chosen on the validation
    documents of `data`."""
    short_term_length: int | None = None
    """Tokens of the short-term memory, which may be longer than in training; a model without memory gets one, if its
    positions are rotary or distances. Null: as in training."""
    tokenizer: str | None = None
    """A folder or a hub name. Null: the model's."""
    output_dir: str | None = free(None)
    """Where `results.json` and the plots go. Null: a folder in `outputs/evaluation`, called by the checkpoint and by
    what is asked of it."""
    overwrite: bool = free(False)
    """Write over what `output_dir` holds, if it is a training run or another evaluation. False: that is an error; the
    same evaluation writes over its own results."""

    def __post_init__(self) -> None:
        _check_place("output_dir", self.output_dir)
        _check_baselines("baselines", self.baselines, self.data)
        if not self.checkpoint:
            raise ValueError("checkpoint=: name a checkpoint of a run, a model folder, or a model on the hub")
        check_choices("", self, split=SPLITS)
        if self.baselines and self.split == "validation":
            raise ValueError(
                "baselines=true with split=validation: how baselines are mixed in is chosen on these documents, so "
                "their figures would be too good; measure others, by split=test, or leave the baselines out"
            )
        check_choices("", self, precision=_PRECISIONS)
        check_at_least(2, "", self, "segment_length")
        check_at_least(1, "", self, "stride", "short_term_length", "batch_size")
        check_at_least(0, "", self, "warmup_documents")
        if not self.task.is_language_modelling and (self.stride is not None or self.warmup_documents):
            raise ValueError(
                f"stride={self.stride}, warmup_documents={self.warmup_documents}: the texts of a task are read in "
                "disjoint segments, each from an empty memory; leave both out, or measure perplexity"
            )


@dataclass
class GenerationRunConfig:
    """What is read, and how to go on from there, by `generate.py`."""

    checkpoint: str
    """A checkpoint of a run, a model folder, or the name of a causal language model on the hub."""
    document: str | None = None
    """A file of UTF-8 text to read first, as long as it may be."""
    prompt: str | None = None
    """Text to read after it, which the model goes on from."""
    state: str | None = None
    """What the same model read before, a file of `save_state`. Document and prompt come after it."""
    save_state: str | None = None
    """Where to keep what was read, the prompt not included."""
    beginning_of_document: bool = True
    """Begin the text with the tokenizer's beginning-of-sequence token (or, if it has none, its end-of-sequence token),
    as `data.beginning_of_document` does in training. After `state` the text goes on, and no such token is read."""
    tokens: int = 200
    """How many to write, at most; a token that ends a text ends this one. 0: read only."""
    temperature: float = 1.0
    """Below 1 prefers what is likely, above 1 what is not; 0 takes the most likely token every time."""
    top_k: int = 0
    """Sample among so many most likely tokens. 0: among all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability."""
    seed: int = 0
    segment_length: int | None = None
    """Tokens of a segment. Null: the memory's, or for a model without one all its positions."""
    short_term_length: int | None = None
    """Tokens of the short-term memory; a model without memory gets one, if its positions are rotary or distances.
    Null: as in training."""
    precision: str = "float32"
    tokenizer: str | None = None
    """A folder or a hub name. Null: the model's."""

    def __post_init__(self) -> None:
        check_finite("", self)
        for name in ("checkpoint", "document", "prompt", "state", "save_state"):
            if getattr(self, name) == "":
                raise ValueError(f"{name}=: give one, or leave {name}= out")
        if self.document is None and self.prompt is None and self.state is None:
            raise ValueError("document=null prompt=null state=null: give a text to go on from, one of these three")
        if self.save_state is not None and self.document is None and self.state is None:
            raise ValueError(f"save_state={self.save_state}: there is nothing to keep; give document=, a file to read")
        check_choices("", self, precision=_PRECISIONS)
        check_at_least(0, "", self, "tokens", "temperature", "top_k", "seed")
        check_at_least(2, "", self, "segment_length")
        check_at_least(1, "", self, "short_term_length")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: a probability, more than 0 and at most 1")


ARENA = {
    "lra_listops": "sample",
    "lra_text": "imdb",
    "lra_retrieval": "sample",
    "lra_image": "cifar10",
    "lra_pathfinder": "sample",
    "lra_path_x": "sample",
}
"""The experiments of Long-Range Arena, each called like its task, with `data` where that comes from the hub. Models are
model=lra_small, lra_release and lra_paper."""


def _by_kind(values: Mapping[str, Any], *, _root_: DictConfig) -> Any:
    """Of values by the kind of a classification the one of this run's; texts of one's own are like bytes."""
    kind = _root_.task.get("kind")
    return values[kind] if kind in values else values["bytes"]


CHOICES: dict[str, Mapping[str, Any]] = {
    "task": TASKS,
    "data": DATA,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "engine": ENGINES,
    "tracker": TRACKERS,
    "model/memory": MEMORIES,
}
"""The groups that are chosen from by one word, such as `optimizer=adam`, beside those of `conf/`."""


_types_of: Callable[[Any], dict[str, Any]] = cache(get_type_hints)  # which reads them anew each time


def options_of(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every option and every group of a typed tree, as it is typed, those of every task and memory among them."""
    variants: dict[type[Any], list[type[Any]]] = {
        TaskConfig: [type(task) for task in TASKS.values()],
        MemoryConfig: MemoryConfig.kinds(),
    }
    hints = _types_of(kind)
    for declared in fields(kind):
        option = prefix + declared.name
        yield option, declared
        inner = without_none(hints[declared.name])
        for variant in variants.get(inner, [inner]):
            if is_dataclass(variant):
                yield from options_of(cast(type[Any], variant), f"{option}.")


def without_none(declared: Any) -> Any:
    """What an option holds that may be null."""
    kinds = get_args(declared)
    return next(kind for kind in kinds if kind is not NoneType) if NoneType in kinds else declared


def _new_schema(kind: Any) -> DictConfig:
    schema: DictConfig = OmegaConf.structured(kind)
    if "task" in schema:
        schema.task = MISSING
    return schema


schema_of: Callable[[Any], DictConfig] = cache(_new_schema)
"""A typed tree by which OmegaConf checks, whose task may be any: beside a default it would take its kind alone.

Not to be changed, as it is kept: what is merged with it is a copy."""


@cache
def register_schemas() -> None:
    """Tell Hydra the types by which it checks the commands' files in `conf/`, and what stands in `CHOICES`."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=schema_of(RunConfig))
    store.store(name="evaluation_schema", node=schema_of(EvaluationRunConfig))
    store.store(name="generation_schema", node=schema_of(GenerationRunConfig))
    OmegaConf.register_new_resolver("by_kind", _by_kind, replace=True)
    for name, data in ARENA.items():
        defaults = [{"override /task": name}, {"override /data": data}, {"override /model": "lra_small"}]
        node = {"defaults": defaults, "name": "${hydra:runtime.choices.experiment}"}
        store.store(group="experiment", name=name, node=node, package="_global_")
    for group, choices in CHOICES.items():
        for name, options in choices.items():
            package = group.replace("/", ".")
            training = getattr(OmegaConf.get_type(options), "training", {}) if group == "model/memory" else {}
            if training:
                options, package = {"model": {"memory": options}, "training": training}, "_global_"
            store.store(group=group, name=name, node=options, package=package)
