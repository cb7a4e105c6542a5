"""Every choice that `conf/` offers is one that the typed tree accepts, and the published ones are what they say."""

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

import eval as eval_command
import train as train_command
from infformer.config import EvaluationRunConfig, RunConfig, TrainingConfig
from infformer.memory.long_term import LongTermMemoryConfig

CONF = Path(__file__).parents[1] / "conf"
GROUPS = sorted({str(path.parent.relative_to(CONF)) for path in CONF.rglob("*.yaml")} - {".", "training"})
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
EXPERIMENTS = [choice for group, choice in CHOICES if group == "experiment"]
PUBLISHED_DATA = ["wikitext103", "pg19"]


@pytest.fixture(autouse=True)
def hydra_of_the_test() -> Iterator[None]:
    assert train_command.main
    assert eval_command.main  # importing them has registered the typed trees
    yield
    HydraConfig.instance().cfg = None


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose(name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(whole)
    return OmegaConf.masked_copy(whole, [key for key in whole if key != "hydra"])


def run_config(*overrides: str) -> RunConfig:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), composed("train", *overrides)))
    assert isinstance(config, RunConfig)
    return config


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def as_dictionary(config: RunConfig) -> dict[str, Any]:
    return flat(OmegaConf.to_container(OmegaConf.structured(config)))


def test_the_groups_that_are_documented_are_there():
    assert {"data", "engine", "experiment", "model", "model/memory", "optimizer", "schedule", "tracker"} <= set(GROUPS)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_composes(group, choice):
    config = run_config(f"{group}={choice}")
    assert config.output_dir == f"outputs/{config.name}"
    if group in ("optimizer", "schedule", "engine", "tracker"):
        assert getattr(config, group).name == choice
    if group in ("model", "experiment"):
        assert config.name == choice
    if config.model.memory is not None:
        assert config.model.memory.segment_length == config.training.segment_length


@pytest.mark.parametrize("memory", [choice for group, choice in CHOICES if group == "model/memory"])
@pytest.mark.parametrize("model", [choice for group, choice in CHOICES if group == "model"])
def test_every_model_with_every_memory(model, memory):
    config = run_config(f"model={model}", f"model/memory={memory}", "training.segment_length=64")
    assert (config.model.memory is None) == (memory == "none")
    if config.model.memory is not None:
        assert config.model.memory.segment_length == 64


@pytest.mark.parametrize("data", [choice for group, choice in CHOICES if group == "data"])
def test_evaluations_of_every_data(data):
    config = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(EvaluationRunConfig), composed("eval", f"data={data}", "checkpoint=here"))
    )
    assert isinstance(config, EvaluationRunConfig)
    assert config.checkpoint == "here"
    assert config.data == run_config(f"data={data}").data


def test_an_evaluation_needs_a_checkpoint():
    with pytest.raises(MissingMandatoryValue, match="checkpoint"):
        _ = composed("eval").checkpoint


def test_what_is_chosen_with_a_model_belongs_to_one():
    models = {path.stem for path in (CONF / "model").glob("*.yaml")}
    assert {path.stem for path in (CONF / "training").glob("*.yaml")} <= models
    chosen = OmegaConf.load(CONF / "training" / "tiny.yaml").training.segment_length
    assert run_config("model=tiny").training.segment_length == chosen != TrainingConfig().segment_length
    assert run_config("model=gpt2_ltm").training.segment_length == 512


def test_what_is_typed_wins():
    config = run_config(
        "experiment=wikitext103_gpt2_sticky", "training.max_steps=3", "model.memory.ridge=0.1", "name=mine"
    )
    assert (config.training.max_steps, config.model.memory.ridge, config.output_dir) == (3, 0.1, "outputs/mine")


class TestPublished:
    """Segment 512, N 512, τ 0.5, ridge 0.5, widths 0.005 and 0.01, σ₀ 0.05, weight 1e-6, rates 5e-5 and 2.5e-4."""

    CONSTANTS = {  # noqa: RUF012, no test changes it
        "segment_length": 512,
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
    def test_memory(self, chosen):
        memory = asdict(run_config(*chosen).model.memory)
        assert {name: memory[name] for name in self.CONSTANTS} == self.CONSTANTS

    def test_every_option_is_said(self):
        """So that no default that changes later changes what was published."""
        said = OmegaConf.load(CONF / "model" / "memory" / "published.yaml")
        assert {field.name for field in fields(LongTermMemoryConfig)} == set(said)

    @pytest.mark.parametrize("data", PUBLISHED_DATA)
    def test_rows(self, data):
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
