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

from infformer.config import CONF, TASKS, EvaluationRunConfig, RunConfig
from infformer.errors import UserError
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.models.loading import new_decoder
from infformer.training import before
from infformer.training.command_line import compose
from infformer.training.runtime import _read_deepspeed_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("composed_quickly")
BASES = {
    "SMALL": "model=decoder data=sample model.architecture.hidden_size=24 model.architecture.num_hidden_layers=1 "
    "training.segment_length=16 training.batch_size=4",
    "TEXTS": f"task=classification data.train={ROOT / 'infformer/data/sample/train.jsonl.gz'} data.validation=null "
    "data.test=null",
    "SCRATCH": "model=tiny_scratch training.segment_length=16 training.batch_size=4",
}
GIB = 2**30
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": lambda typed: before.check_run(compose("train", RunConfig, CONF, typed), 1, True),
    "eval": lambda typed: before.check_evaluation(compose("eval", EvaluationRunConfig, CONF, typed)),
}

# The command, what is typed, what is named if that is not the last option, and what is said to do about it.
REFUSED = [
    # What there is not
    ("train", "training.max_stepz=3", "", "did you mean training.max_steps?"),
    ("train", "+training.max_stepz=3", "", "did you mean training.max_steps?"),
    ("train", "++training.max_stepz=3", "", "did you mean training.max_steps?"),
    ("train", "+misspelt.option=1", "", "there are training, model, task"),
    ("train", "++seeds=1", "", "did you mean seed?"),
    ("train", "learning_rate=1", "", "did you mean optimizer.learning_rate"),
    ("train", "training.lr=1", "", "did you mean optimizer.learning_rate?"),
    ("train", "training.batch=1", "", "did you mean training.batch_size"),
    ("train", "optimizer.lr=1", "", "optimizer has name, learning_rate"),
    ("train", "modle=tiny", "", "did you mean model"),
    ("train", "~nothing", "~nothing", "there is no option nothing"),
    ("train", "model=tinny", "", "did you mean tiny?"),
    ("train", "model/memory=stiky", "", "did you mean sticky?"),
    ("train", "experiment=nothing", "", "choose one of associative_recall_segment"),
    ("train", "+model=gpt2", "", "type it without +"),
    ("train", "task=passkey task.nothing=1", "", "digits"),
    ("train", "task.length=20", "", "choose task=sorting"),
    ("train", "model=decoder model.architecture.hidden_sizes=3", "", "did you mean hidden_size"),
    ("train", "+model.memory.rigde=1", "", "did you mean model.memory.ridge"),
    ("train", "hydra.nothing=1", "Could not override 'hydra.nothing'", "not in"),
    ("train", "max_steps", "", "type name=value"),
    ("train", "name=a=b", "", "quote"),
    # Groups that are null or something else
    ("train", "model=gpt2 model.memory.ridge=0.1", "", "such as model/memory=sticky"),
    ("train", "model/memory=none model.memory.ridge=0.1", "", "such as model/memory=sticky"),
    ("train", "model/memory=none ++model.memory.ridge=0.1", "", "such as model/memory=sticky"),
    ("train", "model.memory.rate=2", "", "choose model/memory=compressive"),
    ("train", "model.memory=sticky", "", "type model/memory=, one of"),
    ("train", "model=null", "", "choose one of classifier, decoder, gpt2"),
    ("train", "optimizer=null", "", "choose one of adam, adamw"),
    ("train", "optimizer=3", "", "choose one of adam, adamw"),
    ("train", "schedule=null", "", "choose one of constant"),
    ("train", "task=null", "", "choose one of"),
    ("train", "data=null", "", "choose one of"),
    ("train", "engine=null", "", "choose one of auto, ddp"),
    ("train", "tracker=null", "", "choose one of none, tensorboard, wandb"),
    ("train", "training=null", "", "options are set one by one: max_steps"),
    ("train", "training=[1]", "", "options are set one by one: max_steps"),
    ("train", "evaluation=null", "", "options are set one by one: batch_size"),
    ("train", "evaluation=full", "", "options are set one by one: batch_size"),
    ("train", "model.architecture=3", "", "fields with values"),
    # Values of another kind
    ("train", "training.max_steps=many", "", "must be a whole number"),
    ("train", "training.max_steps=2.5", "", "must be a whole number"),
    ("train", "training.max_steps=null", "", "must be a whole number"),
    ("train", "training.evaluate_every=often", "", "must be a whole number, or null"),
    ("train", "training.compile=maybe", "", "choose true or false, graphs, or null"),
    ("train", "optimizer.learning_rate=fast", "", "must be a number"),
    ("train", "optimizer.betas=[a,b]", "", "a list of numbers"),
    ("train", "optimizer.betas=null", "", "a list of numbers"),
    ("train", "name=[1]", "", "must be a text"),
    ("train", "seed=1,2", "Ambiguous value for argument 'seed=1,2'", "--multirun"),
    ("train", "model.memory.ridge=${training.nothing}", "model.memory.ridge", "mend this value"),
    # Values that cannot be
    ("train", "optimizer.learning_rate=nan", "", "finite"),
    ("train", "optimizer.weight_decay=-1", "", "at least 0"),
    ("train", "optimizer.epsilon=-1e-8", "optimizer.epsilon=-1e-08", "positive"),
    ("train", "optimizer.epsilon=0", "", "positive"),
    ("train", "optimizer.betas=[0.9,nan]", "optimizer.betas=[0.9, nan]", "finite"),
    ("train", "training.gradient_clipping=inf", "", "finite"),
    ("train", "model.memory.ridge=1e300", "model.memory.ridge=1e+300", "from 1e-06 to 1e+12"),
    ("train", "model.memory.ridge=0", "", "positive"),
    ("train", "model.memory.divergence_weight=-1", "", "must be at least 0"),
    ("train", "model.memory.prior_standard_deviation=1e-300", "", "from 1e-06"),
    ("train", "model.memory.widths=[0.1,1e300]", "model.memory.widths=[0.1, 1e+300]", "positive, from"),
    ("train", "model.memory.basis_functions=2", "", "at least 4"),
    ("train", "model.memory_layers=[]", "", "model/memory=none"),
    ("train", "model.memory_layers=middle:0", "", "such as middle:6"),
    ("train", "training.segment_length=1", "", "at least 2"),
    ("train", "training.segment_length=2", "", "at least 4"),
    ("train", "training.segment_length=65", "", "take a multiple"),
    ("train", "training.bptt_segments=0", "", "at least 1"),
    ("train", "output_dir=", "", "name a folder"),
    ("train", "name=", "", "give the run a name"),
    ("train", "name=..", "", "give the run a name"),
    ("train", "resume=", "", "auto"),
    ("train", "tracker.project=", "", "give the project a name"),
    ("train", "tracker.mode=online_", "", "online, offline"),
    ("train", "engine.patience=nan", "", "finite"),
    ("train", "task=passkey task.depths=[nan]", "", "from 0"),
    ("train", "model.pretrained=", "", "a folder"),
    ("train", "training.max_steps=0", "", "at least 1"),
    ("train", "training.precision=float8", "", "float32, bfloat16, float16"),
    ("train", "optimizer.name=sgd", "", "adamw, adam"),
    ("train", "schedule.final_ratio=2", "", "between 0 and 1"),
    ("train", "engine.name=zero4", "", "choose one of auto, ddp, fsdp2, zero1"),
    ("train", "engine.patience=0", "", "a positive number of seconds"),
    ("train", "engine.patience=-1", "", "a positive number of seconds"),
    ("train", "engine=auto engine.config=mine.json", "engine.config=mine.json with engine=auto", "engine=zero1, zero2"),
    ("train", "engine=ddp engine.config=mine.json", "engine.config=mine.json with engine=ddp", "engine=zero1, zero2"),
    (
        "train",
        "engine=fsdp2 engine.config=mine.json",
        "engine.config=mine.json with engine=fsdp2",
        "engine=zero1, zero2",
    ),
    ("train", "data.source=internet", "", "sample, hub, files"),
    ("train", "seed=-1", "", "from 0 to"),
    ("train", "task=sorting task.symbols=1", "", "at least 2"),
    ("train", "task=sorting task.length=0", "", "at least 1"),
    ("train", "task=sorting task.training_lengths=[64,0]", "task.training_lengths=[64, 0]", "each must be at least 1"),
    # Models and memories that do not fit together
    ("train", "model.memory.read=all", "", "affine, moments, slots"),
    ("train", "model.memory.basis_functions=9", "", "the 2 widths"),
    ("train", "model.pretrained=null", "give one of model.pretrained=", "model.architecture="),
    ("train", "model=gpt2_ltm model/memory=compressive", "model/memory=compressive", "only model=decoder"),
    ("train", "model=hf", "give one of model.pretrained=", "a folder or a hub name"),
    ("train", "model=sorting", "model.tokenizer=null", "needs a tokenizer"),
    ("train", "model=sorting_small", "model.tokenizer=null", "needs a tokenizer"),
    ("train", "model=decoder model/memory=compressive model.memory.rate=3", "", "128"),
    ("train", "model=decoder model/memory=long_term model.memory.short_term_length=40", "", "multiple of"),
    ("train", "model=decoder model.memory_layers=[0]", "", "set it to null"),
    ("train", "model=decoder training.freeze_backbone=true", "", "false"),
    # Training less than everything
    ("train", "model.lora.rank=0", "", "at least 1, or null"),
    ("train", "model.lora.rank=2 model.lora.alpha=0", "model.lora.alpha=0.0", "must be positive"),
    ("train", "model.lora.rank=2 model.lora.dropout=1", "model.lora.dropout=1.0", "less than 1"),
    ("train", "model.lora.rank=2 model.lora.dropout=-0.1", "", "at least 0"),
    ("train", "model.lora.rank=2 model.lora.targets=[]", "", "set it to null"),
    ("train", "model.lora.targets=[c_attn]", "model.lora.targets=['c_attn']", "set model.lora.rank="),
    ("train", "model=decoder model.lora.rank=2", "", "choose a model by model.pretrained="),
    (
        "train",
        "model.lora.rank=2 training.freeze_backbone=true",
        "training.freeze_backbone=true model.lora.rank=2",
        "set one of the two",
    ),
    ("train", "model.memories=", "", "a folder"),
    ("train", "model.memories=./nowhere", "", "scripts/export.py"),
    ("train", "model=decoder model.memories=mine", "", "choose a model by model.pretrained="),
    ("train", "training.memory_dropout=1", "training.memory_dropout=1.0", "less than 1"),
    ("train", "training.memory_dropout=-0.1", "", "at least 0"),
    ("train", "model/memory=none training.memory_dropout=0.1", "", "choose one by model/memory="),
    pytest.param(
        "train",
        "model.lora.rank=2 model.lora.targets=[query]",
        "model.lora.targets=['query']",
        "choose from c_attn, c_proj, c_fc",
        marks=pytest.mark.needs("peft"),
    ),
    ("train", "model.dtype=float8", "", "choose one of float32, bfloat16"),
    ("train", "model.quantization=2bit", "", "choose one of 4bit, 8bit"),
    ("train", "model.dtype=bfloat16", "", "training.freeze_backbone=true"),
    ("train", "model.quantization=4bit", "", "training.freeze_backbone=true"),
    ("train", "model=decoder model.dtype=bfloat16", "", "set it to float32"),
    ("train", "model=decoder model.quantization=4bit", "", "choose a model by model.pretrained="),
    ("train", "model=tiny_scratch model.quantization=8bit", "", "choose a model by model.pretrained="),
    ("train", "training.freeze_backbone=true engine=zero2 model.dtype=bfloat16", "", "choose engine=ddp"),
    ("train", "training.freeze_backbone=true engine=fsdp2 model.quantization=8bit", "", "choose engine=ddp"),
    ("train", "training.freeze_backbone=true model.dtype=float16", "", "set training.precision=float16"),
    # Evaluations
    ("eval", "", "checkpoint=", "must be given"),
    ("eval", "checkpoint=", "", "name a checkpoint"),
    ("eval", "checkpoint=x output_dir=", "", "name a folder"),
    ("eval", "checkpoint=x baselines=true data.validation=null", "baselines=true", "name some"),
    ("eval", "checkpoint=x split=validation baselines=true", "baselines=true", "by split=test"),
    ("train", "evaluation.baselines=true data.validation=null", "evaluation.baselines=true", "name some"),
    ("eval", "checkpoint=x control=false", "", "did you mean controls?"),
    ("eval", "checkpoint=x +controll=false", "", "did you mean controls?"),
    ("eval", "checkpoint=x training.precision=float32", "", "did you mean precision?"),
    ("eval", "checkpoint=x segment_length=1", "", "at least 2"),
    ("eval", "checkpoint=x precision=float8", "", "choose one of float32"),
    ("eval", "checkpoint=x task.length=9", "", "choose task=sorting"),
    ("eval", "checkpoint=x task=null", "", "choose one of"),
    ("eval", "checkpoint=x split=dev", "", "train, validation, test"),
    ("eval", "checkpoint=x batch_size=0", "", "at least 1"),
    ("eval", "checkpoint=x short_term_length=0", "", "at least 1"),
    ("eval", "checkpoint=x task=passkey task.depths=[0,2]", "task.depths=[0.0, 2.0]", "from 0, the beginning"),
    ("eval", "checkpoint=x task=passkey task.nothing=1", "", "there is no option task.nothing"),
    ("eval", "checkpoint=x task=passkey stride=8", "", "disjoint segments"),
    # What an evaluation cannot read
    ("eval", "checkpoint=DECODER short_term_length=1600000000", "", "GiB"),
    ("eval", "checkpoint=DECODER segment_length=100000000", "", "GiB"),
    ("eval", "checkpoint=DECODER task=sorting task.length=100000000000", "", "GiB"),
    ("eval", "checkpoint=DECODER data=text data.test=nowhere.txt", "", "no such file"),
    ("eval", "checkpoint=DECODER checkpoint=./nowhere", "", "no such folder"),
    ("eval", "checkpoint=DECODER data=text", "data.test=null", "needs test documents"),
    # Sizes that no machine has
    ("train", "SMALL model/memory=sticky model.memory.basis_functions=1000000", "", "GiB"),
    ("train", "SMALL model/memory=sticky model.memory.past_samples=10000000000", "", "GiB"),
    ("train", "SMALL model/memory=sticky model.memory.sticky_bins=1000000000", "", "GiB"),
    ("train", "SMALL training.bptt_segments=100000000", "", "GiB"),
    ("train", "SMALL training.batch_size=1000000000", "", "GiB"),
    ("train", "SMALL training.segment_length=1000000", "", "GiB"),
    ("train", "SMALL model.memory.short_term_length=1000000000", "", "GiB"),
    ("train", "SMALL model/memory=compressive model.memory.length=1000000000", "", "GiB"),
    ("train", "SMALL model.architecture.hidden_size=4000000", "", "GiB"),
    ("train", "SMALL experiment=sorting_small task.length=100000000000", "", "GiB"),
    ("train", "SMALL experiment=sorting_small task.symbols=100000000000", "", "GiB"),
    # Architectures that there are not
    ("train", "SMALL model.architecture.num_hidden_layers=0", "", "at least 1"),
    ("train", "SMALL model.architecture.num_hidden_layers=-1", "", "at least"),
    ("train", "SMALL model.architecture.num_attention_heads=0", "", "at least 1"),
    ("train", "SMALL +model.architecture.dropout=2", "", "less than 1"),
    ("train", "SMALL +model.architecture.dropout=nan", "", "finite"),
    ("train", "SMALL model.architecture.hidden_size=wide", "", "a whole number"),
    ("train", "SMALL +model.architecture.hidden_sizes=3", "", "it has activation"),
    ("train", "SMALL model.architecture.feed_forward_size=0", "", "at least 1"),
    ("train", "SMALL model.architecture.positions=none", "", "relative, rotary"),
    # Documents
    ("train", "SMALL data=text data.train=nowhere.txt", "", "no such file"),
    ("train", "SMALL data.test=other", "", "choose one"),
    ("train", "SMALL data=text data.train=null", "", "set data.train="),
    # What transformers cannot build
    ("train", "SCRATCH model.architecture.model_type=gpt22", "", "did you mean gpt2"),
    ("train", "SCRATCH model.architecture.n_head=5", "", "divisible"),
    ("train", "SCRATCH model.architecture.n_head=0", "", "at least 1"),
    ("train", "SCRATCH model.architecture.n_layer=0", "", "at least 1"),
    ("train", "SCRATCH model.architecture.n_layer=-1", "", "at least"),
    ("train", "SCRATCH model.architecture.attn_pdrop=2", "", "between 0 and 1"),
    ("train", "SCRATCH model.architecture.n_embd=wide", "", "expected int"),
    ("train", "SCRATCH +model.architecture.n_headz=2", "", "did you mean n_head"),
    ("train", "SCRATCH +model.architecture.activation_function=no", "", "another value"),
    ("train", "SCRATCH model.attention=fastest", "", "choose another value"),
    ("train", "model.attention=fastest", "", "choose another"),
    ("train", "model.pretrained=./nowhere", "", "no such folder"),
    # Heads
    ("train", "model.head.kind=linear", "", "choose batch_norm or plain"),
    ("train", "model.head.kind=plain", "", "choose task=classification"),
    ("train", "model.head.dropout=0.5", "", "set model.head.kind="),
    ("train", "TEXTS model.head.kind=plain model.head.dropout=1", "model.head.dropout=1", "less than 1"),
    ("train", "TEXTS model.head.kind=plain model.head.hidden_size=0", "model.head.hidden_size=0", "at least 1"),
    ("train", "TEXTS task.kind=pairs model.head.kind=plain", "", "task.kind=text"),
    ("train", "TEXTS model=classifier model.head.kind=plain", "", "set it to null"),
    ("train", "TEXTS training.batch_size=1 model.head.kind=batch_norm", "", "at least two lanes"),
    ("train", "TEXTS engine=fsdp2 model.head.kind=batch_norm", "", "model.head.kind=plain"),
    ("train", "schedule.unfreeze_layers=-1", "", "at least 0"),
]


@pytest.mark.parametrize(("command", "options", "named", "remedy"), REFUSED)
def test_what_is_refused_is_named_with_its_remedy_before_any_work(
    monkeypatch, decoder, command, options, named, remedy
):
    monkeypatch.setattr(before, "memory_of_this_machine", lambda: 16 * GIB)
    for base, stands_for in {**BASES, "DECODER": str(decoder)}.items():
        options = options.replace(base, stands_for)
    typed = options.split(" ") if options else []
    with pytest.raises(UserError) as caught:
        COMMANDS[command](typed)
    message = str(caught.value)
    assert message.lstrip("+").startswith(named or typed[-1].lstrip("+"))
    assert remedy in message
    assert "To append" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        "",
        BASES["SMALL"],
        BASES["SMALL"] + " model/memory=compressive",
        BASES["SCRATCH"],
        "experiment=sorting_16k",
        "experiment=associative_recall_small",
        "experiment=wt103_infformer_sticky data=sample data.articles=false",
        "model=decoder training.bptt_segments=16 training.batch_size=64",
    ],
)
def test_what_can_be_run_is_not_refused(monkeypatch, tmp_path, options):
    monkeypatch.setattr(before, "memory_of_this_machine", lambda: 16 * GIB)
    before.check_run(compose("train", RunConfig, CONF, [*options.split(), f"output_dir={tmp_path}/run"]), 1, True)
    assert not (tmp_path / "run").exists()


LARGE = [*BASES["SMALL"].split(), "model.architecture.hidden_size=1024"]


class TestWhereWeightsLie:
    """A model whose weights, gradients and moments take some 90 MiB, and what is read hardly anything."""

    @pytest.fixture
    def check(self, monkeypatch) -> Callable[..., None]:
        def check(*options: str, device: int = GIB, host: int = GIB, processes: int = 1) -> None:
            monkeypatch.setattr(before, "memory_of_this_machine", lambda: device)
            monkeypatch.setattr(before, "memory_of_the_host", lambda: host)
            before.check_run(compose("train", RunConfig, CONF, [*LARGE, *options]), processes, True)

        return check

    @pytest.mark.parametrize("engine", ["ddp", "zero3"])
    def test_a_size_of_the_model_is_named_where_its_weights_are_too_large(self, check, engine):
        with pytest.raises(UserError, match=r"^model\.architecture\.hidden_size=1024: .* GiB of memory"):
            check(f"engine={engine}", "training.segment_length=512", device=64 * 2**20)

    def test_what_is_offloaded_is_held_against_the_memory_of_the_host(self, check):
        check("engine=zero3_offload", device=64 * 2**20)
        with pytest.raises(UserError, match=r"^model\.architecture\.hidden_size=1024: .* GiB of the host's memory"):
            check("engine=zero3_offload", host=64 * 2**20)

    def test_an_engine_that_accelerate_was_configured_for_is_counted_as_it_is(self, check, monkeypatch):
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        with pytest.raises(UserError, match=r"hidden_size=1024"):
            check(device=64 * 2**20)
        check(device=64 * 2**20, processes=4)
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
        check(device=64 * 2**20)


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
    *(number for kind in (CompressiveMemoryConfig, LongTermMemoryConfig) for number in floats(kind, "model.memory.")),
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
        ("options", "named"), [({"project": "a/b"}, "tracker.project="), ({"project": "x" * 200}, "tracker.project=")]
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


@pytest.mark.slow
def test_a_command_ends_in_a_sentence_from_any_folder(tmp_path):
    """As a user sees it, in a process of its own, without a network."""
    command = [sys.executable, str(ROOT / "eval.py"), "checkpoint=someone/something"]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    sentence = "error: checkpoint=someone/something: http://127.0.0.1:9 cannot be reached"
    assert done.stderr.splitlines()[-1].startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def decoder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "feed_forward_size": 8}
    memory = LongTermMemoryConfig(16, 8, [0.05, 0.1], 16)
    new_decoder({"vocab_size": len(tokenizer), **sizes}, memory, segment_length=16).save_pretrained(folder)
    return folder


class TestScripts:
    """What a script is given that cannot be, in this process."""

    @pytest.fixture
    def refused(self, monkeypatch, capsys) -> Callable[..., str]:
        def message(script: str, *arguments: object) -> str:
            monkeypatch.syspath_prepend(ROOT / "scripts")
            module = import_module(script)
            monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
            with pytest.raises((SystemExit, UserError)) as ended:
                module.main()
            said = ended.value.code if isinstance(ended.value, SystemExit) else f"error: {ended.value}"
            return f"{said}{capsys.readouterr().err}"

        return message

    @pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/in_a_file"])
    @pytest.mark.parametrize(
        ("script", "arguments", "option"),
        [
            ("compare", ["a", "b", "--folder", "FOLDER"], "--folder=FOLDER"),
            ("inspect_memory", ["checkpoint", "sample", "--folder", "FOLDER"], "--folder=FOLDER"),
            ("benchmark", ["read", "--folder", "FOLDER"], "--folder=FOLDER"),
            ("benchmark", ["read", "--json", "FOLDER/read.jsonl"], "--json=FOLDER"),
            ("export", ["checkpoint", "FOLDER"], "FOLDER=FOLDER"),
            ("context", ["--model", "somewhere", "text", "--folder", "FOLDER"], "--folder=FOLDER"),
        ],
    )
    def test_a_place_that_cannot_be_written_is_found_before_the_work(self, refused, script, arguments, option, folder):
        place = option.partition("=")[0]
        message = refused(script, *(argument.replace("FOLDER", folder) for argument in arguments))
        assert f"{place}={folder}: nothing can be written there" in message
        assert f"set {place}= to another place" in message

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["TEXT", "--model", "/nowhere"], "--model=/nowhere: there is no such folder"),
            (["nowhere.txt", "--model", "/nowhere"], "nowhere.txt: cannot be read"),
            (
                ["TEXT", "--model", "MODEL", "--characters", "1", "--segment", "8", "--before", "8"],
                "there are fewer than 2 tokens in it",
            ),
            (["TEXT", "--model", "MODEL", "--before", "4000"], "--before 4000 --segment 512: these are 4512 tokens"),
            (["TEXT", "--model", "MODEL", "--segment", "0"], "--segment 0: must be at least 1"),
            (["TEXT", "--model", "MODEL", "--before", "8", "-1"], "--before -1: must be at least 0"),
            (["TEXT", "--model", "MODEL", "--characters", "0"], "--characters 0: must be at least 1"),
        ],
    )
    def test_contexts_that_cannot_be_measured_are_named(self, refused, model_folder, tmp_path, arguments, said):
        (tmp_path / "text.txt").write_text("The white whale")
        places = {"TEXT": tmp_path / "text.txt", "MODEL": model_folder}
        typed = [places.get(argument, argument) for argument in arguments]
        message = refused("context", *typed, "--folder", tmp_path / "out")
        assert message.startswith("error: ")
        assert said in message

    @pytest.mark.parametrize("text", ["", "[1]", "[" * 100_000, "\0"])
    def test_results_that_cannot_be_read_are_named(self, refused, tmp_path, text):
        (tmp_path / "results.json").write_text(text)
        message = refused("compare", tmp_path, tmp_path, "--folder", tmp_path / "out")
        assert message.startswith(f"error: {tmp_path}: there are no results")
        assert "name the folder of a run" in message

    def test_a_pipe_is_not_waited_for(self, refused, tmp_path):
        os.mkfifo(tmp_path / "results.json")
        assert "it is a pipe" in refused("compare", tmp_path, tmp_path, "--folder", tmp_path / "out")

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
