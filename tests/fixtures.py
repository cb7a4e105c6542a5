"""A model of a few thousand weights and a few short documents: enough for everything to happen, in a blink."""

import json
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import omegaconf._utils
import omegaconf.base
import pytest
import torch
import yaml
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.defaults_list import _create_interpolation_map
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from infformer.config import CHOICES, CONF, RunConfig, register_schemas, schema_of
from infformer.errors import UserError
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.tasks import language_modelling
from infformer.training import command_line, trainer

WORDS = ("the", "whale", "sea", "ship", "captain", "white", "deep", "wind", "harpoon", "of", "to", "a", "in", "under")
MEMORY = LongTermMemoryConfig(basis_functions=8, widths=[0.05, 0.1], past_samples=16, sticky=True, sticky_bins=16)
Train = Callable[..., dict[str, Any]]
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one that begins a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({letter: number for number, letter in enumerate(["<s>", *letters])}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="session")
def backbone(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A stock GPT-2 of two layers, with the usual dropout; not to be changed."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).eval()


@pytest.fixture(scope="session")
def model_folder(
    backbone: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The backbone and its tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("model")
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_one_layer(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    """A model of one layer, which is enough for what a run does and takes half the time, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def one_layer_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the usual dropout."""
    return save_one_layer(tmp_path_factory.mktemp("one_layer"), tokenizer)


@pytest.fixture(scope="session")
def without_dropout(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Changes of a run to a model whose losses do not depend on which lanes are read side by side."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {"model.pretrained": str(save_one_layer(tmp_path_factory.mktemp("without_dropout"), tokenizer, **dropout))}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.jsonl`, `validation.jsonl` and `test.jsonl`: documents of very different lengths."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    for split, lengths in {"train": (60, 5, 33, 90, 17, 48), "validation": (10, 5), "test": (9, 3, 16, 5)}.items():
        documents = [" ".join(random.choice(WORDS, size=length)) for length in lengths]
        lines = [f'{{"id": "{split} {number}", "text": "{text}"}}\n' for number, text in enumerate(documents)]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the documents are kept as tokens."""
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="session")
def base_config(one_layer_folder: Path, texts: Path, token_cache: Path) -> dict[str, Any]:
    """A run in which everything that has to survive a stop is at work: dropout, sticky memory, visits, accumulation."""
    return {
        "model": {"pretrained": str(one_layer_folder), "memory": MEMORY},
        "data": {
            "source": "files",
            **{split: str(texts / f"{split}.jsonl") for split in ("train", "validation", "test")},
            "segments_per_visit": 3,
            "cache_dir": str(token_cache),
        },
        "training": {
            "max_steps": 8,
            "batch_size": 4,
            "segment_length": 16,
            "bptt_segments": 2,
            "gradient_accumulation": 2,
            "log_every": 1,
            "evaluate_every": 3,
            "checkpoint_every": 2,
        },
        "optimizer": {"learning_rate": 3e-3, "memory_learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "evaluation": {"inspected_segments": 0, "controls": False},
    }


@pytest.fixture(scope="session")
def configure(base_config: dict[str, Any]) -> Configure:
    """The configuration of a small run, some options changed: `configure(folder, {"training.max_steps": 3})`."""

    base, of_one_task = OmegaConf.create(base_config), OmegaConf.structured(RunConfig)

    def make(folder: Path, changes: dict[str, Any] | None = None) -> RunConfig:
        config = deepcopy(base)
        config.output_dir = str(folder)
        for option, value in (changes or {}).items():
            OmegaConf.update(config, option, value)
        schema = schema_of(RunConfig) if "task" in config else of_one_task
        return OmegaConf.to_object(OmegaConf.merge(schema, config))

    return make


@pytest.fixture(scope="session")
def train() -> Train:
    """A whole run, without the plots, unless asked for: they take longer than all the rest."""

    def start(config: RunConfig, plots: bool = False) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            if not plots:
                patch.setattr(trainer, "plot_run", lambda folder: [])
                patch.setattr(language_modelling, "plot_results", lambda results: [])
            return trainer.train(config)

    return start


@pytest.fixture(scope="session", autouse=True)
def files_of_conf_are_parsed_once() -> Iterator[None]:
    """Hydra parses about twenty for each composition, several times each, and copies all that it could choose from.

    The tests compose hundreds of times. What is chosen is still a copy of its own. And what a `${…}` in them says is
    read once. A command composes everything once more before, to look for a `hydra.mode`, which nobody sets here.
    Hydra's own files are loaded once, and embedded as copies; and choices are prepared for a `${…}` where one is.
    """
    load, load_config, prepare = OmegaConf.load, CachingConfigRepository.load_config, _create_interpolation_map
    parsed: Callable[[Path], Any] = cache(lambda path: yaml.load(path.read_text(), get_yaml_loader()))
    own: dict[str, Any] = {}

    def load_once(file: Any) -> Any:
        path = Path(getattr(file, "name", file))
        return OmegaConf.create(parsed(path)) if CONF in path.parents else load(file)

    def load_own_once(repository: CachingConfigRepository, config_path: str) -> Any:
        if config_path not in own:
            loaded = load_config(repository, config_path)
            if not config_path.startswith("hydra/"):
                return loaded
            own[config_path] = loaded
        return own[config_path]

    def prepare_if_needed(overrides: Any, defaults: list[Any], self_added: bool) -> DictConfig | None:
        return prepare(overrides, defaults, self_added) if any(one.is_interpolation() for one in defaults) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(load_once))
        patch.setattr(CachingConfigRepository, "load_config", load_own_once)
        patch.setattr(defaults_list, "_create_interpolation_map", prepare_if_needed)
        for module in (omegaconf.base, omegaconf._utils):
            patch.setattr(module, "parse", cache(module.parse))
        patch.setattr(Hydra, "get_mode", lambda *arguments, **options: None)
        patch.setattr(ConfigRepository, "__deepcopy__", lambda repository, memo: copy(repository), raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def seeds_for_no_gpu_are_not_kept() -> Iterator[None]:
    """With every seed PyTorch would write down where in the code it was set, until a GPU is looked for."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
        yield


@pytest.fixture(scope="session")
def composed_quickly() -> Iterator[None]:
    """What the chosen groups make is composed once; Hydra applies the single options to a copy of that.

    Such a tree is pickled and read again in a sixth of the time in which it is copied.
    """
    compose = command_line._compose

    @cache
    def composed_of(name: str, conf: Path, chosen: tuple[str, ...]) -> tuple[bytes, DictConfig]:
        return pickle.dumps(compose(name, conf, chosen)), HydraConfig.instance().cfg

    def compose_quickly(name: str, conf: Path, options: Sequence[str]) -> DictConfig:
        typed = OverridesParser.create().parse_overrides(list(options))
        if any(one.key_or_group.startswith("hydra.") or one.is_sweep_override() for one in typed):
            return compose(name, conf, options)
        chosen = tuple(str(one.input_line) for one in typed if command_line.choices_of(one.key_or_group, CONF))
        pickled, own = composed_of(name, conf, chosen)
        composed = pickle.loads(pickled)
        HydraConfig.instance().cfg = own
        single = [one for one in typed if str(one.input_line) not in chosen]
        ConfigLoaderImpl._apply_overrides_to_config(single, composed)
        return composed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "_compose", compose_quickly)
        yield


@pytest.fixture
def add_choice(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Any], None]:
    """One more choice of the command line, as a line of `config.py` makes it: `add_choice(group, word, options)`."""

    def add(group: str, word: str, options: Any) -> None:
        register_schemas()
        chosen_from = ConfigStore.instance().repo
        for part in group.split("/"):
            chosen_from = chosen_from[part]
        monkeypatch.setitem(CHOICES[group], word, options)
        monkeypatch.setitem(chosen_from, f"{word}.yaml", None)  # to be taken away again
        register_schemas.cache_clear()
        register_schemas()

    return add


@pytest.fixture(scope="session")
def options_of() -> Callable[[RunConfig], list[str]]:
    """What has to be typed on the command line of `train.py` for a configuration: all that is not so by itself."""

    def flat(value: Any, option: str = "") -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            return {option: value}
        return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{option}.{name}").items()}

    def options(config: RunConfig) -> dict[str, Any]:
        return flat(OmegaConf.to_container(OmegaConf.structured(config)))

    default = options(command_line.compose("train", RunConfig, CONF, []))
    missing = object()
    return lambda config: [
        f"{option.removeprefix('.')}={json.dumps(value)}"
        for option, value in options(config).items()
        if default.get(option, missing) != value
    ]


@pytest.fixture
def signals_heard() -> Iterator[None]:
    """SIGHUP and SIGINT are heard, also where the tests were started by `nohup` or in the background of a script."""
    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_script(monkeypatch, capsys) -> Callable[..., str]:
    """What a script prints, or the sentence in which it ends, by its name and its arguments."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")

    def run(name: str, *arguments: object) -> str:
        script = import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            script.main()
        except SystemExit as ended:
            return str(ended.code) + capsys.readouterr().err
        except UserError as error:
            return f"error: {error}" + capsys.readouterr().err
        return capsys.readouterr().out

    return run
