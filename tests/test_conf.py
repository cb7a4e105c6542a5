"""Every choice that `conf/` offers is one that the typed tree accepts, and the published ones are what they say."""

from dataclasses import asdict, fields
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from infformer.config import CHOICES as TYPED
from infformer.config import CONF, PUBLISHED_MEMORY, TASKS, EngineConfig, EvaluationRunConfig, RunConfig, TrainingConfig
from infformer.memory.cache import CacheConfig
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.models.decoder import DecoderForCausalLM
from infformer.models.loading import new_decoder
from infformer.training.command_line import choices_of, compose

pytestmark = pytest.mark.usefixtures("composed_quickly")
FOLLOWING = {*(str(path.relative_to(CONF)) for path in CONF.glob("model/*_memory"))}
"""Groups that nobody chooses: what is in them comes with a model and a memory."""
GROUPS = sorted({str(path.parent.relative_to(CONF)) for path in CONF.rglob("*.yaml")} - {"."} - FOLLOWING | {*TYPED})
CHOICES = [(group, choice) for group in GROUPS for choice in choices_of(group, CONF)]
CLASSIFIERS = ("classifier", "lra_small", "lra_release", "lra_paper")
"""Models that learn no text and have no memory."""
MODELS, MEMORIES, EXPERIMENTS = (
    [choice for group, choice in CHOICES if group == wanted and choice not in CLASSIFIERS]
    for wanted in ("model", "model/memory", "experiment")
)
EXPERIMENTS_WITHOUT_TEXT = {"sorting": "sorting_4k", "sorting_small": "sorting_small"}
"""By their model, which is one without text: alone it has nothing to learn."""
TEXT = [model for model in MODELS if model not in EXPERIMENTS_WITHOUT_TEXT]
NEEDED = {"hf": ["model.pretrained=owner/model"]}
"""What a choice leaves to whoever makes it."""
PAIRS = [
    (model, memory)
    for row, model in enumerate(MODELS)
    for column, memory in enumerate(MEMORIES)
    if model in ("tiny", "decoder", "sorting")
    or row % 3 == column % 3
    or (CONF / f"model/{model}_memory/{memory}.yaml").exists()
]
"""A model with every memory where it is one of its kind, or has a file of its own for it; others share them out."""
PUBLISHED_DATA = ["wikitext103", "pg19"]


@cache
def run_config(*overrides: str) -> RunConfig:
    """What a command line means; not to be changed, as it is kept."""
    return compose("train", RunConfig, CONF, overrides)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def as_dictionary(config: RunConfig) -> dict[str, Any]:
    return flat(OmegaConf.to_container(OmegaConf.structured(config)))


def test_the_groups_that_are_documented_are_there():
    assert {"data", "engine", "experiment", "model", "model/memory", "optimizer", "schedule", "task", "tracker"} <= set(
        GROUPS
    )


@pytest.mark.parametrize(
    ("group", "choice"),
    [(group, choice) for group, choice in CHOICES if group == "experiment" or (group == "model" and choice in TEXT)],
)
def test_every_choice_composes(group, choice):
    config = run_config(f"{group}={choice}", *NEEDED.get(choice, []))
    assert config.output_dir == f"outputs/{config.name}"
    assert config.name == choice


def test_what_is_in_code_can_be_chosen():
    for group, choices in TYPED.items():
        assert {*choices} <= {choice for of, choice in CHOICES if of == group}


@pytest.mark.parametrize("row", range(max(map(len, TYPED.values()))))
def test_every_choice_is_what_it_is_in_code_in_runs_and_evaluations(row):
    """One of each group at a time: none of them looks at another."""
    chosen = {group: [*choices][row % len(choices)] for group, choices in TYPED.items() if group != "model/memory"}
    config = run_config(*(f"{group}={choice}" for group, choice in chosen.items()))
    for group, choice in chosen.items():
        if group not in ("optimizer", "schedule"):  # whose numbers come with a model
            assert getattr(config, group) == TYPED[group][choice]
        assert getattr(getattr(config, group), "name", choice) == choice
    assert config.task.is_language_modelling == (chosen["task"] == "language_modelling")
    evaluation = evaluation_config(*(f"{group}={chosen[group]}" for group in ("task", "data", "engine")))
    assert (evaluation.task, evaluation.data, evaluation.engine) == (config.task, config.data, config.engine)
    assert evaluation.checkpoint == "here"


def choosing(model: str) -> str:
    """The option that chooses a model, and with it something to learn."""
    return f"experiment={EXPERIMENTS_WITHOUT_TEXT[model]}" if model in EXPERIMENTS_WITHOUT_TEXT else f"model={model}"


@pytest.mark.parametrize(("model", "memory"), PAIRS)
def test_every_kind_of_model_can_have_every_memory_that_goes_with_it(model, memory):
    """A decoder can have them all, a Hugging Face model none for which its attention would have to be another."""
    chosen = [choosing(model), *NEEDED.get(model, [])]
    options = [*chosen, f"model/memory={memory}", "training.segment_length=64"]
    is_decoder = run_config(*chosen).model.is_decoder
    if memory == "compressive" and not is_decoder:
        with pytest.raises(ValueError, match="model/memory=compressive: only model=decoder"):
            run_config(*options)
        return
    config = run_config(*options).model
    assert config.is_decoder == is_decoder
    kinds = {
        "none": type(None),
        "short_term": MemoryConfig,
        "compressive": CompressiveMemoryConfig,
        "fast_weight": FastWeightMemoryConfig,
        "cache": CacheConfig,
    }
    assert type(config.memory) is kinds.get(memory, LongTermMemoryConfig)
    if memory not in ("none", "published"):
        sizes = [getattr(config.memory, name, 64) for name in ("length", "past_samples", "basis_functions")]
        assert model.startswith("sorting") or sizes == [64, 64, 64]


def evaluation_config(*overrides: str) -> EvaluationRunConfig:
    return compose("eval", EvaluationRunConfig, CONF, ["checkpoint=here", *overrides])


class TestTasks:
    def test_language_modelling_is_the_default(self):
        assert run_config().task == evaluation_config().task == TASKS["language_modelling"]

    def test_what_is_typed_wins(self):
        asked = ("task=passkey", "task.lengths=[1024,262144]", "task.depths=[0,0.5]", "task.digits=7")
        for task in (run_config(*asked).task, evaluation_config(*asked).task):
            assert (task.lengths, task.depths, task.digits) == ([1024, 262144], [0.0, 0.5], 7)

    def test_recall_in_small_can_be_asked_at_every_length(self):
        """Every length that is learned or measured can be asked, with the keys and the segments that there are."""
        config = run_config("experiment=associative_recall_small")
        source = config.task.build_source(None)
        for length in (*config.task.training_lengths, *config.task.lengths):
            assert source.draw("test", [0], 0, length, np.zeros((1, 8))).tokens.shape == (1, length)
        assert max(config.task.lengths) > 2 * config.training.segment_length + config.training.segment_length


class TestEngines:
    def test_the_engine_is_the_launcher_s_by_default(self):
        assert run_config().engine == evaluation_config().engine == EngineConfig("auto")

    def test_deepspeed_is_told_the_stage_of_its_name(self):
        for name, engine in TYPED["engine"].items():
            said = engine.deepspeed.get("zero_optimization", {}).get("stage")
            assert said == (int(name[4]) if name.startswith("zero") else None)
            assert (engine.deepspeed == {}) == (said is None)

    def test_deepspeed_takes_a_configuration_of_its_own(self):
        assert run_config("engine=zero2", "engine.config=mine.json").engine.config == "mine.json"


def test_a_model_says_how_it_is_best_trained():
    chosen = OmegaConf.load(CONF / "model" / "tiny.yaml").training.segment_length
    assert run_config("model=tiny").training.segment_length == chosen != TrainingConfig().segment_length
    assert run_config("model=gpt2_ltm").training.segment_length == 512


@pytest.mark.parametrize("folder", sorted(CONF.glob("model/*_memory")), ids=lambda folder: folder.name)
def test_what_is_chosen_with_a_model_and_a_memory_belongs_to_both(folder):
    model = folder.name.removesuffix("_memory")
    assert model in MODELS
    assert {path.stem for path in folder.iterdir()} <= set(MEMORIES)


def test_what_is_typed_wins():
    config = run_config(
        "experiment=wikitext103_gpt2_sticky", "training.max_steps=3", "model.memory.ridge=0.1", "name=mine"
    )
    assert (config.training.max_steps, config.model.memory.ridge, config.output_dir) == (3, 0.1, "outputs/mine")


class TestPublished:
    """Segment 512, N 512, τ 0.5, ridge 0.5, widths 0.005 and 0.01, σ₀ 0.05, weight 1e-6, rates 5e-5 and 2.5e-4."""

    CONSTANTS = {  # noqa: RUF012, no test changes it
        "basis_functions": 512,
        "widths": [0.005, 0.01],
        "past_samples": 512,
        "contraction": "constant",
        "contraction_rate": 0.5,
        "ridge": 0.5,
        "read": "affine",
        "density": "gaussian",
        "sticky": True,
        "sticky_bins": 128,
        "input_gate": False,
        "divergence_weight": 1e-6,
        "prior_standard_deviation": 0.05,
    }

    @pytest.mark.parametrize("chosen", [["model=gpt2_ltm", "model/memory=published"], ["experiment=pg19_gpt2_sticky"]])
    def test_memory_has_the_published_constants(self, chosen):
        memory = asdict(run_config(*chosen).model.memory)
        assert {name: memory[name] for name in self.CONSTANTS} == self.CONSTANTS

    def test_every_option_of_the_published_memory_is_said(self):
        """So that no default that changes later changes what was published."""
        said = PUBLISHED_MEMORY
        assert {field.name for field in fields(LongTermMemoryConfig)} == set(said)

    @pytest.mark.parametrize("data", PUBLISHED_DATA)
    def test_published_rows_differ_in_their_memory_and_in_nothing_else(self, data):
        """Three rows that differ in their memory and in nothing else."""
        alone, plain, sticky = (run_config(f"experiment={data}_gpt2{row}") for row in ("", "_long_term", "_sticky"))
        assert alone.model.memory is None
        assert (sticky.optimizer.learning_rate, sticky.optimizer.memory_learning_rate) == (5e-5, 2.5e-4)
        rows = [as_dictionary(row) for row in (alone, plain, sticky)]
        for row in rows:
            assert row["model.pretrained"] == "gpt2"
            assert row["training.segment_length"] == 512
            assert row["data.repository"] == run_config(f"data={data}").data.repository
        differing = {key for row in rows for key in row if any(row.get(key) != other.get(key) for other in rows)}
        assert {key for key in differing if not key.startswith("model.memory")} == {"name", "output_dir"}
        differing = {key for key in rows[1] if rows[1][key] != rows[2][key]}
        assert differing == {"name", "output_dir", "model.memory.sticky"}


def differing(configs: list[RunConfig]) -> set[str]:
    """The options in which they are not all the same."""
    rows = [as_dictionary(config) for config in configs]
    return {key for row in rows for key in row if any(row.get(key) != other.get(key) for other in rows)}


class TestPublishedSorting:
    """3 layers, 6 heads, width 300, segments of 1,024, 512 basis functions, τ 0.75, ridge 1, Adam at 2e-4."""

    def test_sorting_has_the_published_sizes(self):
        config = run_config("experiment=sorting_4k")
        sizes = {"hidden_size": 300, "num_hidden_layers": 3, "num_attention_heads": 6, "feed_forward_size": 300}
        assert config.model.architecture.items() >= sizes.items()
        training, optimizer, task = config.training, config.optimizer, config.task
        assert (training.segment_length, training.batch_size, training.max_steps) == (1024, 8, 20000)
        assert (optimizer.name, optimizer.learning_rate, optimizer.memory_learning_rate) == ("adam", 2e-4, 2e-4)
        assert (task.symbols, task.training_sequences, task.training_lengths, task.test_sequences) == (
            20,
            8000,
            [],
            800,
        )

    @pytest.mark.parametrize("memory", ["long_term", "sticky"])
    def test_sorting_has_the_published_memory(self, memory):
        constants = {"basis_functions": 512, "contraction": "constant", "contraction_rate": 0.75, "ridge": 1.0}
        chosen = asdict(run_config("experiment=sorting_4k", f"model/memory={memory}").model.memory)
        assert chosen.items() >= {**constants, "widths": [0.01, 0.05], "sticky": memory == "sticky"}.items()

    @pytest.mark.parametrize("memory", ["none", "short_term", "compressive"])
    def test_no_other_row_has_a_long_term_memory(self, memory):
        model = run_config("experiment=sorting_4k", f"model/memory={memory}").model
        assert not isinstance(model.memory, LongTermMemoryConfig)

    def test_memories_differ_in_nothing_else(self):
        rows = [run_config("experiment=sorting_4k", f"model/memory={memory}") for memory in MEMORIES]
        memories = ("model.memory", "training.bptt_segments")
        assert {option for option in differing(rows) if not option.startswith(memories)} == set()

    def test_lengths_differ_in_nothing_else(self):
        rows = [run_config(f"experiment=sorting_{length}k") for length in (4, 8, 16)]
        assert [row.task.length for row in rows] == [4000, 8000, 16000]
        assert differing(rows) == {"name", "output_dir", "task.length"}


class TestPublishedFromScratch:
    """Transformer-XL base, and the other three beside it, at the published sizes and in small."""

    ROWS = ("transformer_xl", "compressive", "infformer", "infformer_sticky")
    WORDS = {"": 267_735, "_small": 33_278}  # noqa: RUF012, no test changes it
    """Of WikiText-103 and of WikiText-2."""

    def configs(self, size: str) -> list[RunConfig]:
        return [run_config(f"experiment=wt103_{row}{size}") for row in self.ROWS]

    def models(self, size: str) -> list[DecoderForCausalLM]:
        """Without weights: these would be several gigabytes."""
        with torch.device("meta"):
            return [
                new_decoder(
                    {**config.model.architecture, "vocab_size": self.WORDS[size]},
                    config.model.memory,
                    config.training.segment_length,
                )
                for config in self.configs(size)
            ]

    def test_models_from_scratch_have_the_published_sizes(self):
        sizes = {
            "hidden_size": 410,
            "num_hidden_layers": 16,
            "num_attention_heads": 10,
            "head_size": 41,
            "feed_forward_size": 2100,
            "adaptive_cutoffs": [20000, 40000, 200000],
        }
        for config in self.configs(""):
            assert config.model.architecture.items() >= sizes.items()
            assert config.training.segment_length == 150
            assert (config.data.subset, config.model.tokenizer) == ("wikitext-103-v1", "words")

    def test_transformer_xl_has_its_published_number_of_parameters(self):
        model = self.models("")[0]
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(151e6, rel=0.03)

    def test_rows_differ_in_their_memory_and_in_nothing_else(self):
        options = differing(self.configs(""))
        assert {option for option in options if not option.startswith("model.memory")} == {"name", "output_dir"}

    def test_small_rows_differ_in_their_memory_and_in_what_makes_them_equally_large(self):
        options = differing(self.configs("_small"))
        assert {option for option in options if not option.startswith("model.memory")} == {
            "name",
            "output_dir",
            "model.architecture.feed_forward_size",
        }

    def test_small_rows_remember_equally_many_vectors(self):
        for config in self.configs("_small"):
            memory = config.model.memory
            assert (
                memory.short_term_length + sum(getattr(memory, name, 0) for name in ("length", "basis_functions"))
                == 128
            )

    def test_small_rows_have_equally_many_parameters(self):
        sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in self.models("_small")]
        assert max(sizes) < 1.02 * min(sizes)

    @pytest.mark.parametrize("size", ["", "_small"])
    def test_rows_have_the_memories_of_their_names(self, size):
        def kinds(config: RunConfig) -> tuple[bool, bool, bool]:
            memory = config.model.memory
            kinds = (isinstance(memory, kind) for kind in (CompressiveMemoryConfig, LongTermMemoryConfig))
            return *kinds, getattr(memory, "sticky", False)

        assert [kinds(config) for config in self.configs(size)] == [
            (False, False, False),
            (True, False, False),
            (False, True, False),
            (False, True, True),
        ]
