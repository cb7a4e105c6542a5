"""Whatever is typed that cannot be: the sentence names the option as it was typed, and says what to do."""

import dataclasses
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from infformer.config import TASKS, EvaluationRunConfig, RunConfig
from infformer.errors import UserError
from infformer.memory.layer import MemoryConfig
from infformer.memory.long_term import LongTermMemoryConfig
from infformer.models.loading import new_decoder
from infformer.training import before
from infformer.training.command_line import compose
from infformer.training.runtime import _read_deepspeed_file

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
pytestmark = pytest.mark.usefixtures("composed_quickly")
SMALL = (
    "model=decoder",
    "data=sample",
    "model.architecture.hidden_size=24",
    "model.architecture.num_hidden_layers=1",
    "training.segment_length=16",
    "training.batch_size=4",
)
SCRATCH = ("model=tiny_scratch", "training.segment_length=16", "training.batch_size=4")


COMPOSING = [
    # What there is not
    ("training.max_stepz=3", "training.max_stepz=3", "did you mean training.max_steps?"),
    ("+training.max_stepz=3", "training.max_stepz=3", "did you mean training.max_steps?"),
    ("++training.max_stepz=3", "training.max_stepz=3", "did you mean training.max_steps?"),
    ("+misspelt.option=1", "misspelt.option=1", "there are training, model, task"),
    ("++seeds=1", "seeds=1", "did you mean seed?"),
    ("learning_rate=1", "learning_rate=1", "did you mean optimizer.learning_rate"),
    ("optimizer.lr=1", "optimizer.lr=1", "optimizer has name, learning_rate"),
    ("modle=tiny", "modle=tiny", "did you mean model"),
    ("~nothing", "~nothing", "there is no option nothing"),
    ("model=tinny", "model=tinny", "did you mean tiny?"),
    ("model/memory=stiky", "model/memory=stiky", "did you mean sticky?"),
    ("experiment=nothing", "experiment=nothing", "choose one of associative_recall_small"),
    ("+model=gpt2", "+model=gpt2", "type it without +"),
    ("task=passkey task.nothing=1", "task.nothing=1", "digits"),
    ("task.length=20", "task.length=20", "choose task=sorting"),
    (
        "model=decoder model.architecture.hidden_sizes=3",
        "model.architecture.hidden_sizes=3",
        "did you mean hidden_size",
    ),
    ("+model.memory.rigde=1", "model.memory.rigde=1", "did you mean model.memory.ridge"),
    ("hydra.nothing=1", "hydra.nothing", "not in"),
    ("max_steps", "max_steps", "type name=value"),
    ("name=a=b", "name=a=b", "quote"),
    # Groups that are null or something else
    ("model=gpt2 model.memory.ridge=0.1", "model.memory.ridge=0.1", "such as model/memory=sticky"),
    ("model/memory=none model.memory.ridge=0.1", "model.memory.ridge=0.1", "such as model/memory=sticky"),
    ("model/memory=none ++model.memory.ridge=0.1", "model.memory.ridge=0.1", "such as model/memory=sticky"),
    ("model.compressive.rate=2", "model.compressive.rate=2", "such as model/memory=compressive"),
    ("model.memory=sticky", "model.memory=sticky", "options are set one by one"),
    ("model=null", "model=null", "choose one of decoder, gpt2"),
    ("optimizer=null", "optimizer=null", "choose one of adam, adamw"),
    ("optimizer=3", "optimizer=3", "choose one of adam, adamw"),
    ("schedule=null", "schedule=null", "choose one of constant"),
    ("task=null", "task=null", "choose one of"),
    ("data=null", "data=null", "choose one of"),
    ("engine=null", "engine=null", "choose one of auto, ddp"),
    ("tracker=null", "tracker=null", "choose one of none, tensorboard, wandb"),
    ("training=null", "training=null", "choose one of"),
    ("training=[1]", "training=[1]", "choose one of"),
    ("evaluation=null", "evaluation=null", "options are set one by one: batch_size"),
    ("evaluation=full", "evaluation=full", "options are set one by one: batch_size"),
    ("model.architecture=3", "model.architecture=3", "fields with values"),
    # Values of another kind
    ("training.max_steps=many", "training.max_steps=many", "must be a whole number"),
    ("training.max_steps=2.5", "training.max_steps=2.5", "must be a whole number"),
    ("training.max_steps=null", "training.max_steps=null", "must be a whole number"),
    ("training.evaluate_every=often", "training.evaluate_every=often", "must be a whole number, or null"),
    ("training.compile=maybe", "training.compile=maybe", "true or false"),
    ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast", "must be a number"),
    ("optimizer.betas=[a,b]", "optimizer.betas=[a,b]", "a list of numbers"),
    ("optimizer.betas=null", "optimizer.betas=null", "a list of numbers"),
    ("name=[1]", "name=[1]", "must be a text"),
    ("seed=1,2", "seed=1,2", "--multirun"),
    ("model.memory.ridge=${training.nothing}", "model.memory.ridge", "mend this value"),
    # Values that cannot be
    ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan", "finite"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1", "at least 0"),
    ("optimizer.epsilon=-1e-8", "optimizer.epsilon=-1e-08", "positive"),
    ("optimizer.epsilon=0", "optimizer.epsilon=0", "positive"),
    ("optimizer.betas=[0.9,nan]", "optimizer.betas=[0.9, nan]", "finite"),
    ("training.gradient_clipping=inf", "training.gradient_clipping=inf", "finite"),
    ("model.memory.ridge=1e300", "model.memory.ridge=1e+300", "from 1e-12 to 1e+12"),
    ("model.memory.ridge=0", "model.memory.ridge=0", "positive"),
    ("model.memory.divergence_weight=-1", "model.memory.divergence_weight=-1", "must not be negative"),
    ("model.memory.prior_standard_deviation=1e-300", "model.memory.prior_standard_deviation=1e-300", "from 1e-06"),
    ("model.memory.widths=[0.1,1e300]", "model.memory.widths=[0.1, 1e+300]", "positive, from"),
    ("model.memory.basis_functions=2", "model.memory.basis_functions=2", "at least 4"),
    ("model.memory_layers=[]", "model.memory_layers=[]", "model/memory=none"),
    ("training.segment_length=1", "training.segment_length=1", "at least 2"),
    ("training.segment_length=2", "training.segment_length=2", "at least 4"),
    ("training.segment_length=65", "training.segment_length=65", "take a multiple"),
    ("training.bptt_segments=0", "training.bptt_segments=0", "at least 1"),
    ("output_dir=", "output_dir=", "name a folder"),
    ("name=", "name=", "give the run a name"),
    ("name=..", "name=..", "give the run a name"),
    ("resume=", "resume=", "auto"),
    ("tracker.project=", "tracker.project=", "give the project a name"),
    ("tracker.mode=online_", "tracker.mode=online_", "online, offline"),
    ("engine.patience=nan", "engine.patience=nan", "finite"),
    ("task=passkey task.depths=[nan]", "task.depths=[nan]", "from 0"),
    ("model.pretrained=", "model.pretrained=", "a folder"),
]


@pytest.mark.parametrize(("options", "named", "remedy"), COMPOSING)
def test_a_bad_option_of_training_is_named_with_its_remedy(options, named, remedy):
    with pytest.raises(UserError) as caught:
        compose("train", RunConfig, CONF, options.split(" "))
    message = str(caught.value)
    assert named in message
    assert remedy in message
    assert "To append" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ("", "checkpoint=", "must be given"),
        ("checkpoint=", "checkpoint=", "name a checkpoint"),
        ("checkpoint=x output_dir=", "output_dir=", "name a folder"),
        ("checkpoint=x control=false", "control=false", "did you mean controls?"),
        ("checkpoint=x +controll=false", "controll=false", "did you mean controls?"),
        ("checkpoint=x training.precision=float32", "training.precision=float32", "did you mean precision?"),
        ("checkpoint=x segment_length=1", "segment_length=1", "at least 2"),
        ("checkpoint=x precision=float8", "precision=float8", "choose one of float32"),
        ("checkpoint=x task.length=9", "task.length=9", "choose task=sorting"),
        ("checkpoint=x task=null", "task=null", "choose one of"),
    ],
)
def test_a_bad_option_of_an_evaluation_is_named_with_its_remedy(options, named, remedy):
    with pytest.raises(UserError) as caught:
        compose("eval", EvaluationRunConfig, CONF, options.split())
    assert str(caught.value).removeprefix("+").startswith(named)
    assert remedy in str(caught.value)


GIB = 2**30


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        # Sizes that no machine has
        ("model/memory=sticky model.memory.basis_functions=1000000", "model.memory.basis_functions=1000000", "GiB"),
        ("model/memory=sticky model.memory.past_samples=10000000000", "model.memory.past_samples=10000000000", "GiB"),
        ("model/memory=sticky model.memory.sticky_bins=1000000000", "model.memory.sticky_bins=1000000000", "GiB"),
        ("training.bptt_segments=100000000", "training.bptt_segments=100000000", "GiB"),
        ("training.batch_size=1000000000", "training.batch_size=1000000000", "GiB"),
        ("training.segment_length=1000000", "training.segment_length=1000000", "GiB"),
        ("model.short_term_length=1000000000", "model.short_term_length=1000000000", "GiB"),
        ("model/memory=compressive model.compressive.length=1000000000", "model.compressive.length=1000000000", "GiB"),
        ("model.architecture.hidden_size=4000000", "model.architecture.hidden_size=4000000", "GiB"),
        ("experiment=sorting_small task.length=100000000000", "task.length=100000000000", "GiB"),
        ("experiment=sorting_small task.symbols=100000000000", "task.symbols=100000000000", "GiB"),
        # Architectures that there are not
        ("model.architecture.num_hidden_layers=0", "model.architecture.num_hidden_layers=0", "at least 1"),
        ("model.architecture.num_hidden_layers=-1", "model.architecture.num_hidden_layers=-1", "at least"),
        ("model.architecture.num_attention_heads=0", "model.architecture.num_attention_heads=0", "at least 1"),
        ("+model.architecture.dropout=2", "model.architecture.dropout=2", "less than 1"),
        ("+model.architecture.dropout=nan", "model.architecture.dropout=nan", "finite"),
        ("model.architecture.hidden_size=wide", "model.architecture.hidden_size=wide", "a whole number"),
        ("+model.architecture.hidden_sizes=3", "model.architecture.hidden_sizes=3", "it has activation"),
        ("model.architecture.feed_forward_size=0", "model.architecture.feed_forward_size=0", "at least 1"),
        # Documents, a place, a tracker
        ("data=text data.train=nowhere.txt", "data.train=nowhere.txt", "no such file"),
        ("data.test=other", "data.test=other", "choose one"),
        ("data=text data.train=null", "data.train=null", "set data.train="),
    ],
)
def test_what_would_stop_a_run_is_found_before_it(monkeypatch, options, named, remedy):
    monkeypatch.setattr(before, "memory_of_this_machine", lambda: 16 * GIB)
    config = compose("train", RunConfig, CONF, [*SMALL, *options.split()])
    with pytest.raises(UserError) as caught:
        before.check_run(config, 1, True)
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ("model.architecture.model_type=gpt22", "model.architecture.model_type=gpt22", "did you mean gpt2"),
        ("model.architecture.n_head=5", "model.architecture.n_head=5", "divisible"),
        ("model.architecture.n_head=0", "model.architecture.n_head=0", "at least 1"),
        ("model.architecture.n_layer=0", "model.architecture.n_layer=0", "at least 1"),
        ("model.architecture.n_layer=-1", "model.architecture.n_layer=-1", "at least"),
        ("model.architecture.attn_pdrop=2", "model.architecture.attn_pdrop=2", "between 0 and 1"),
        ("model.architecture.n_embd=wide", "model.architecture.n_embd=wide", "expected int"),
        ("+model.architecture.n_headz=2", "model.architecture.n_headz=2", "did you mean n_head"),
        ("+model.architecture.activation_function=no", "model.architecture.activation_function=no", "another value"),
        ("model.attention=fastest", "model.attention=fastest", "choose another value"),
    ],
)
def test_what_transformers_cannot_build_is_found_before_a_run(options, named, remedy):
    config = compose("train", RunConfig, CONF, [*SCRATCH, *options.split()])
    with pytest.raises(UserError) as caught:
        before.check_run(config, 1, True)
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ("model.attention=fastest", "model.attention=fastest", "choose another"),
        ("model.pretrained=./nowhere", "model.pretrained=./nowhere", "no such folder"),
    ],
)
def test_a_pretrained_model_that_there_is_not_is_found_before_a_run(options, named, remedy):
    config = compose("train", RunConfig, CONF, options.split())
    with pytest.raises(UserError) as caught:
        before.check_run(config, 1, True)
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        (),
        SMALL,
        (*SMALL, "model/memory=compressive"),
        SCRATCH,
        ("experiment=sorting_16k",),
        ("experiment=associative_recall_small",),
        ("experiment=wt103_infformer_sticky", "data=sample", "data.articles=false"),
        ("model=decoder", "training.bptt_segments=16", "training.batch_size=64"),
    ],
    ids=" ".join,
)
def test_what_can_be_run_is_not_refused(monkeypatch, tmp_path, options):
    monkeypatch.setattr(before, "memory_of_this_machine", lambda: 16 * GIB)
    before.check_run(compose("train", RunConfig, CONF, [*options, f"output_dir={tmp_path}/run"]), 1, True)
    assert not (tmp_path / "run").exists()


def floats(kind: type[Any], prefix: str = "") -> Iterator[tuple[type[Any], str]]:
    """Every number of a typed tree, with the class that holds it."""
    for name, declared in typing.get_type_hints(kind).items():
        parts = [part for part in (*typing.get_args(declared), declared) if dataclasses.is_dataclass(part)]
        if parts:
            yield from floats(parts[0], f"{prefix}{name}.")
        elif float in (declared, *typing.get_args(declared)):
            yield kind, prefix + name


NUMBERS = [
    *floats(RunConfig),
    *(number for task in TASKS.values() for number in floats(type(task), "task.")),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("kind", "option"), NUMBERS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_number_that_is_not_finite_is_refused_wherever_it_is_set(kind, option, value):
    name = option.split(".")[-1]
    listed = isinstance(getattr(kind(), name), list)
    with pytest.raises(ValueError, match=rf"^{option}="):
        kind(**{name: [value, value] if listed else value})


def test_numbers_are_found_in_the_typed_tree():
    assert {"optimizer.betas", "optimizer.epsilon", "model.memory.ridge", "training.gradient_clipping"} <= {
        option for _, option in NUMBERS
    }


class TestWandb:
    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"project": "a/b"}, "tracker.project="),
            ({"project": "x" * 200}, "tracker.project="),
        ],
    )
    def test_what_wandb_refuses_is_said_before_the_work(self, monkeypatch, options, named):
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        config = compose("train", RunConfig, CONF, ["tracker=wandb"])
        tracker = dataclasses.replace(config.tracker, **options)
        with pytest.raises(UserError, match=named):
            before.check_run(dataclasses.replace(config, tracker=tracker), 1, True)

    @pytest.mark.parametrize("name", ["wandb", "tensorboard"])
    def test_a_tracker_that_is_not_installed_is_missed_before_the_work(self, monkeypatch, name):
        for module in ("wandb", "tensorboard", "torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)
        config = compose("train", RunConfig, CONF, [f"tracker={name}"])
        with pytest.raises(UserError, match=rf"tracker\.name={name} needs the package .*pip install"):
            before.check_run(config, 1, True)


def test_an_evaluation_ends_in_a_sentence_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "checkpoint=infformer/checkpoints/tiny", "precision=float16"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: precision=float16")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def decoder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8}
    memory = MemoryConfig(16, 16, None, LongTermMemoryConfig(16, 8, [0.05, 0.1], 16))
    new_decoder({"vocab_size": len(tokenizer), **sizes}, memory).save_pretrained(folder)
    return folder


class TestEvaluation:
    @pytest.mark.parametrize(
        ("options", "named", "remedy"),
        [
            ("short_term_length=1600000000", "short_term_length=1600000000", "GiB"),
            ("segment_length=100000000", "segment_length=100000000", "GiB"),
            ("task=sorting task.length=100000000000", "task.length=100000000000", "GiB"),
            ("data=text data.test=nowhere.txt", "data.test=nowhere.txt", "no such file"),
            ("checkpoint=./nowhere", "checkpoint=./nowhere", "no such folder"),
        ],
    )
    def test_what_would_stop_it_is_found_before_it(self, monkeypatch, decoder, options, named, remedy):
        monkeypatch.setattr(before, "memory_of_this_machine", lambda: 16 * GIB)
        config = compose("eval", EvaluationRunConfig, CONF, [f"checkpoint={decoder}", *options.split()])
        with pytest.raises(UserError) as caught:
            before.check_evaluation(config)
        assert str(caught.value).startswith(named)
        assert remedy in str(caught.value)


class TestScripts:
    """What a script is given that cannot be, in this process."""

    @pytest.fixture
    def refused(self, monkeypatch, capsys) -> Callable[..., str]:
        def message(script: str, *arguments: object) -> str:
            monkeypatch.syspath_prepend(ROOT / "scripts")
            module = import_module(script)
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                module.main()
            return str(ended.value.code) + capsys.readouterr().err

        return message

    @pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/in_a_file"])
    @pytest.mark.parametrize(
        ("script", "arguments", "option"),
        [
            ("compare", ["a", "b", "--folder", "FOLDER"], "--folder=FOLDER"),
            ("inspect_memory", ["checkpoint", "sample", "--folder", "FOLDER"], "--folder=FOLDER"),
            ("benchmark", ["read", "--folder", "FOLDER"], "--folder=FOLDER"),
            ("benchmark", ["read", "--json", "FOLDER/read.jsonl"], "--json=FOLDER"),
            ("export_backbone", ["checkpoint", "FOLDER"], "FOLDER=FOLDER"),
        ],
    )
    def test_a_place_that_cannot_be_written_is_found_before_the_work(self, refused, script, arguments, option, folder):
        place = option.partition("=")[0]
        message = refused(script, *(argument.replace("FOLDER", folder) for argument in arguments))
        assert f"{place}={folder}: nothing can be written there" in message
        assert f"set {place}= to another place" in message

    @pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\0"])
    def test_results_that_cannot_be_read_are_named(self, refused, tmp_path, text):
        (tmp_path / "results.json").write_text(text)
        message = refused("compare", tmp_path, tmp_path, "--folder", tmp_path / "out")
        assert message.startswith(f"error: {tmp_path}: there are no results")
        assert "name the folder of a run" in message

    def test_a_pipe_is_not_waited_for(self, refused, tmp_path):
        os.mkfifo(tmp_path / "results.json")
        assert "it is a pipe" in refused("compare", tmp_path, tmp_path, "--folder", tmp_path / "out")

    def test_a_folder_that_holds_something_is_not_exported_into(self, refused, model_folder, tmp_path):
        (tmp_path / "mine.txt").touch()
        message = refused("export_backbone", model_folder, tmp_path)
        assert f"FOLDER={tmp_path} is not empty" in message
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

    def test_what_is_no_checkpoint_is_not_exported(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        message = refused("export_backbone", tmp_path / "empty", tmp_path / "out")
        assert f"checkpoint={tmp_path / 'empty'}: this folder is no model" in message
        assert not (tmp_path / "out").exists()

    def test_a_decoder_has_no_stock_model_to_export(self, refused, tokenizer, tmp_path):
        sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8}
        new_decoder({"vocab_size": len(tokenizer), **sizes}).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        message = refused("export_backbone", tmp_path / "model", tmp_path / "out")
        assert f"checkpoint={tmp_path / 'model'} is a decoder from scratch" in message

    def test_an_export_is_a_folder_that_is_whole(self, monkeypatch, model_folder, tmp_path):
        monkeypatch.syspath_prepend(ROOT / "scripts")
        monkeypatch.setattr(sys, "argv", ["export_backbone.py", str(model_folder), str(tmp_path / "out")])
        import_module("export_backbone").main()
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            path.name for path in (tmp_path / "out").iterdir()
        }
        assert not (tmp_path / "out.partial").exists()

    def test_the_harness_that_is_not_installed_is_missed_in_a_sentence(self, refused, monkeypatch):
        for module in ("lm_eval", "lm_eval.__main__"):
            monkeypatch.setitem(sys.modules, module, None)
        message = refused("evaluate_with_harness")
        assert message.startswith("error: this needs the Language Model Evaluation Harness")
        assert "pip install 'infformer[harness]'" in message


def test_a_deepspeed_configuration_that_is_too_deep_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text('{"a":' * 100_000)
    os.mkfifo(tmp_path / "pipe.json")
    for name, reason in (("deep", "not a DeepSpeed configuration"), ("pipe", "this is a pipe")):
        with pytest.raises(UserError, match=rf"engine\.config={tmp_path}/{name}\.json: {reason}"):
            _read_deepspeed_file(str(tmp_path / f"{name}.json"))
