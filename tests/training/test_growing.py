"""A run whose model grows in the middle of its books: nothing jumps, and however it is stopped it is the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from infformer.config import CONF, EngineConfig, GrowthConfig, RunConfig
from infformer.errors import ModelError, UserError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.loading import load_trained
from infformer.tasks.language_modelling import LanguageModelling
from infformer.training import growing, trainer
from infformer.training.before import SizeError
from infformer.training.command_line import compose
from infformer.training.metrics import read_metrics
from infformer.training.resuming import RunError

DECODER = {
    "model_type": "decoder", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "feed_forward_size": 20, "dropout": 0.0, "positions": "rotary", "normalization": "rms",
    "normalization_placement": "pre",
}  # fmt: skip
MEMORY = LongTermMemoryConfig(
    short_term_length=16, basis_functions=8, widths=[0.05, 0.1], past_samples=16, sticky=True, sticky_bins=16
)
GROWTH = [
    GrowthConfig(3, num_hidden_layers=3),
    GrowthConfig(6, hidden_size=18, num_attention_heads=3, feed_forward_size=32, key_size=12),
]
"""In a run of 8 steps with checkpoints after 2, 4, 6 and 8."""


class Killed(BaseException):
    """As if by SIGKILL: nothing in a run may catch it."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """In the middle of the step that follows."""
    made = 0

    def step(*arguments: Any) -> Any:
        nonlocal made
        if made == steps:
            raise Killed
        made += 1
        return train_step(*arguments)

    train_step = trainer.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        patch.setattr(trainer.CheckpointWriter, "begin", partialmethod(begin_and_wait, trainer.CheckpointWriter.begin))
        yield


def begin_and_wait(writer: Any, begin: Any, *arguments: Any) -> None:
    """A checkpoint has its name before the next step."""
    begin(writer, *arguments)
    writer.finish(wait=True)


def records(folder: Path) -> list[dict[str, float]]:
    """All that a run measured, except for how fast it was."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "train/tokens_per_second"} for line in lines]


def losses(folder: Path) -> dict[int, float]:
    return {int(line["step"]): line["train/loss"] for line in records(folder) if "train/loss" in line}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: weights, moments, memories."""
    return {
        f"{path.name}.{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_goes_on_like(folder: Path, other: Path, step: int, last: int = 8) -> None:
    """From this step on both are the same to the last bit."""
    assert records(folder) == [line for line in records(other) if line["step"] > step]
    found, expected = (tensors(each / "checkpoints" / f"step-0000000{last}") for each in (folder, other))
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


@pytest.fixture(scope="module")
def changes(one_layer_folder) -> dict[str, Any]:
    """Of a run: to a decoder with memories."""
    model = {"model.pretrained": None, "model.architecture": DECODER, "model.tokenizer": str(one_layer_folder)}
    quiet = {"data.validation": None, "evaluation.before": False}
    return {**model, "model.memory": MEMORY, **quiet, "schedule.name": "constant", "schedule.warmup_steps": 0}


@pytest.fixture(scope="module")
def whole(configure, train, changes, tmp_path_factory) -> Path:
    """The folder of a run that grows twice, and that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(configure(folder, {**changes, "growth": GROWTH, "training.keep_checkpoints": 4}))
    return folder


class TestAGrowth:
    def test_the_step_after_a_growth_has_the_loss_that_it_would_have_had(
        self, configure, train, changes, whole, tmp_path
    ):
        """In the middle of all lanes' books, read with what is remembered of them."""
        for growth, before, step in (([], 2, 4), (GROWTH[:1], 4, 7)):
            resumed = {"resume": str(whole / "checkpoints" / f"step-0000000{before}"), "training.max_steps": step}
            train(configure(tmp_path / str(step), {**changes, **resumed, "growth": growth, "data.test": None}))
            assert losses(tmp_path / str(step))[step] == pytest.approx(losses(whole)[step], rel=1e-5)

    def test_no_loss_jumps(self, whole):
        found = losses(whole)
        changed = {step: found[step] - found[step - 1] for step in range(2, 9)}
        spread = max(abs(change) for step, change in changed.items() if step not in (4, 7))
        assert max(changed[4], changed[7]) <= spread, found

    def test_moments_go_on_and_those_of_new_parts_begin(self, whole):
        """After step 6 the wider model has made no step yet; by step 8 all of it learns."""
        at, after = (tensors(whole / "checkpoints" / f"step-0000000{step}") for step in (6, 8))
        name = "optimizer.safetensors.layers.2.feed_forward.expand.weight"
        assert at[f"{name}.exp_avg"].shape == (32, 18)
        assert at[f"{name}.exp_avg"][:20, :12].count_nonzero() > 200
        assert at[f"{name}.exp_avg"][20:].count_nonzero() == 0
        assert after[f"{name}.exp_avg"][20:, 12:].count_nonzero() > 20  # of 72, but for units that are shut
        assert at[f"{name}.step"] == 6

    def test_metrics_say_where_the_model_has_grown(self, whole):
        grown = [line for line in records(whole) if "growth/parameters" in line]
        assert [line["step"] for line in grown] == [3, 6]
        assert grown[0]["growth/num_hidden_layers"] == 3
        assert {name for name in grown[1] if name.startswith("growth/")} == {"growth/parameters"} | {
            f"growth/{name}" for name in GROWTH[1].sizes
        }
        sizes = json.loads((whole / "results.json").read_text())["sizes"]
        assert grown[1]["growth/parameters"] == sizes["backbone_parameters"] + sizes["memory_parameters"]
        assert len(sizes["state_floats"]) == 3

    def test_the_log_says_what_has_grown(self, configure, train, changes, tmp_path, caplog):
        caplog.set_level("INFO")
        growth = [GrowthConfig(1, num_hidden_layers=2, feed_forward_size=24)]
        train(configure(tmp_path, {**changes, "growth": growth, "training.max_steps": 2, "data.test": None}))
        assert "after step 1 the model grows: feed_forward_size 20 → 24, num_hidden_layers 1 → 2; " in caplog.text


class TestGoesOnExactly:
    @pytest.mark.parametrize("step", [2, 4, 6], ids=["before", "between", "after"])
    def test_a_run_goes_on_exactly_from_before_between_and_after_its_growths(
        self, configure, train, changes, whole, tmp_path, step
    ):
        """After step 6 the model has just grown."""
        checkpoint = whole / "checkpoints" / f"step-0000000{step}"
        train(configure(tmp_path, {**changes, "growth": GROWTH, "data.test": None, "resume": str(checkpoint)}))
        assert_goes_on_like(tmp_path, whole, step)

    def test_a_run_that_was_killed_writes_every_line_once(self, configure, train, changes, whole, tmp_path):
        """That of a growth too, after which the last checkpoint was taken."""
        checkpoint, grows = whole / "checkpoints" / "step-00000004", {**changes, "growth": GROWTH, "data.test": None}
        with killed_after(3), pytest.raises(Killed):
            train(configure(tmp_path, {**grows, "resume": str(checkpoint)}))
        train(configure(tmp_path, {**grows, "resume": "auto"}))
        assert_goes_on_like(tmp_path, whole, 4)

    def test_growths_that_are_still_to_come_may_change_and_others_may_not(
        self, configure, train, changes, whole, tmp_path
    ):
        resumed = {**changes, "resume": str(whole / "checkpoints" / "step-00000006"), "data.test": None}
        with pytest.raises(RunError, match=r"growth=\[\], and until .*step-00000006 the model has grown otherwise"):
            train(configure(tmp_path / "run", resumed))
        growth = [*GROWTH, GrowthConfig(7, num_hidden_layers=4)]  # to which the run had not come
        train(configure(tmp_path / "run", {**resumed, "growth": growth}))
        assert load_trained(str(tmp_path / "run")).config.num_hidden_layers == 4

    def test_a_llama_with_a_memory_beside_it_grows_and_goes_on_exactly(self, configure, train, tokenizer, tmp_path):
        """Layers learn at different rates and are computed again, and some have no memory."""
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokens = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
        LlamaForCausalLM(LlamaConfig(**sizes, **tokens, attention_dropout=0.1)).save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        changes = {"model.pretrained": str(tmp_path / "llama"), "model.memory_layers": [1], "data.test": None}
        changes |= {"model.memory": replace(MEMORY, short_term_length=None), "training.gradient_checkpointing": True}
        changes |= {"growth": [GrowthConfig(3, num_hidden_layers=4, hidden_size=32)], "data.validation": None}
        changes["optimizer.layer_decay"] = 1.5
        changes |= {"training.max_steps": 5, "training.keep_checkpoints": 3}
        train(configure(tmp_path / "whole", changes))
        checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
        train(configure(tmp_path / "run", {**changes, "resume": str(checkpoint)}))
        assert_goes_on_like(tmp_path / "run", tmp_path / "whole", 2, last=5)
        checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000004"
        train(configure(tmp_path / "after", {**changes, "resume": str(checkpoint)}))
        assert_goes_on_like(tmp_path / "after", tmp_path / "whole", 4, last=5)
        assert load_trained(str(tmp_path / "run")).config.memory_layers == [2, 3]


class TestAGrownCheckpoint:
    def test_it_is_measured_as_the_run_measured_it_writes_and_is_exported(self, run_script, whole, tmp_path):
        folder = str(whole / "checkpoints" / "step-00000008")
        model = load_trained(folder)
        assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.key_size) == (18, 3, 12)
        assert model.generate(torch.arange(20)[None], max_new_tokens=4, do_sample=False).shape == (1, 24)
        assert run_script("export", folder, tmp_path / "out") == f"written to {tmp_path / 'out'}\n"
        exported = load_trained(str(tmp_path / "out"))
        text = torch.arange(16)[None]
        assert torch.equal(exported(text).logits, model(text).logits)

    def test_the_best_checkpoint_is_measured_with_the_sizes_that_it_has(
        self, configure, train, changes, texts, tmp_path, monkeypatch
    ):
        validate, times = LanguageModelling.validate, iter(range(10))

        def worse_and_worse(task: LanguageModelling) -> Any:
            return replace(validate(task), loss=5.0 + next(times))

        monkeypatch.setattr(LanguageModelling, "validate", worse_and_worse)
        growth = [GrowthConfig(2, num_hidden_layers=2, hidden_size=18)]
        often = {"training.max_steps": 3, "training.evaluate_every": 1, "training.checkpoint_every": None}
        validated = {**changes, "data.validation": str(texts / "validation.jsonl")}
        results = train(configure(tmp_path / "run", {**validated, **often, "growth": growth}))
        assert results["protocol"]["checkpoint"].endswith("step-00000001")
        without = train(configure(tmp_path / "without", {**validated, **often, "training.max_steps": 1}))
        assert results["nll"] == without["nll"]
        assert results["sizes"] == without["sizes"]


def test_a_dry_run_tries_every_growth_and_says_what_the_largest_model_takes(
    configure, train, changes, whole, tmp_path, capsys
):
    train(configure(tmp_path / "run", {**changes, "growth": GROWTH, "dry_run": True}))
    table = capsys.readouterr().out
    sizes = json.loads((whole / "results.json").read_text())["sizes"]
    assert f"{sizes['backbone_parameters']:,}  after 2 growths" in table
    assert "8 steps of" in table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_compiled_run_grows_too(configure, train, changes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    train(configure(tmp_path, {**changes, "growth": GROWTH, "training.compile": True, "data.test": None}))
    assert losses(tmp_path) == pytest.approx(losses(whole), rel=1e-5)


class TestWhatIsRefused:
    """Before the first step."""

    @pytest.mark.parametrize(
        ("growth", "others", "message"),
        [
            ([GrowthConfig(0, hidden_size=24)], {}, r"growth\[0\]\.step=0: must be at least 1"),
            (GROWTH[::-1], {}, r"growth\[1\]\.step=3: must be more than 6, the step of the growth before"),
            ([GROWTH[0]] * 2, {}, r"growth\[1\]\.step=3: must be more than 3"),
            ([GrowthConfig(8, hidden_size=24)], {}, r"growth\[0\]\.step=8: the run ends at training\.max_steps=8"),
            ([GrowthConfig(2)], {}, r"growth\[0\]\.step=2: nothing becomes larger; give one of feed_forward_size, "),
            (GROWTH, {"training.compile": "graphs"}, r"training\.compile=graphs with growth: what is recorded stays"),
            (GROWTH, {"schedule.unfreeze_every": 2}, r"schedule\.unfreeze_every=2 with growth: layers join by where"),
        ],
    )
    def test_what_cannot_be(self, configure, changes, tmp_path, growth, others, message):
        with pytest.raises(ValueError, match=message):
            configure(tmp_path, {**changes, "growth": growth, **others})

    @pytest.mark.parametrize(
        "others", [{"training.freeze_backbone": True}, {"model.lora.rank": 2}], ids=["frozen", "adapters"]
    )
    def test_what_is_frozen(self, configure, tmp_path, others):
        with pytest.raises(ValueError, match=r"with growth: what is new .*would not learn; leave one of the two out"):
            configure(tmp_path, {"growth": GROWTH, **others})

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ({"hidden_size": 12}, r"growth\[1\]=\{'hidden_size': 12\}: hidden_size=12: the model has 12"),
            ({"num_hidden_layers": 2}, r"num_hidden_layers=2: the model has 3, and it can only become larger"),
            ({"hidden_size": 15}, r"hidden_size=15: the 2 heads of the long-term memory divide it among them"),
            ({"key_size": 8}, r"key_size=8: the frequencies of rotary positions follow from the width"),
            ({"feed_forward_size": 10**13}, r"growth\[1\]=.*this would take .* GiB of memory at least"),
        ],
    )
    def test_sizes_that_the_second_growth_cannot_have(self, configure, train, changes, tmp_path, second, message):
        config = configure(tmp_path / "run", {**changes, "growth": [GROWTH[0], GrowthConfig(6, **second)]})
        with pytest.raises((ModelError, SizeError), match=message):
            train(config)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()

    def test_a_model_of_another_shape(self, configure, train, tmp_path):
        with pytest.raises(ModelError, match=r"growth\[0\]=\{'num_hidden_layers': 3\}: a 'gpt2' does not grow"):
            train(configure(tmp_path, {"growth": GROWTH[:1]}))

    @pytest.mark.parametrize("name", ["fsdp2", "zero1", "zero3"])
    def test_an_engine_that_cuts_up_weights(self, name):
        with pytest.raises(UserError, match=f"engine={name} with growth: an engine that cuts up weights"):
            growing.check_engine(GROWTH, EngineConfig(name))

    @pytest.mark.usefixtures("composed_quickly")
    def test_what_is_no_growth_on_the_command_line(self):
        typed = "growth=[{step: 2, num_hidden_layers: 6}, {step: 4, hidden_size: 384}]"
        config = compose("train", RunConfig, CONF, ["model=decoder", typed])
        assert config.growth == [GrowthConfig(2, num_hidden_layers=6), GrowthConfig(4, hidden_size=384)]
        for wrong in ("growth=3", "growth=[{step: 2, width: 9}]"):
            with pytest.raises(
                UserError, match=r"must be a list of groups, such as \[\{step: 1, num_hidden_layers: 2\}"
            ):
                compose("train", RunConfig, CONF, ["model=decoder", wrong])
