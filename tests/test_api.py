"""What `import infformer` offers, what it costs, and what transformers knows after it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel

import infformer
from infformer import api
from infformer.models.decoder import DecoderConfig, DecoderForCausalLM
from infformer.models.pretrained import InfformerForCausalLM

ROOT = Path(__file__).parents[1]
ASKING = sorted(path.stem for path in (ROOT / "infformer" / "models").glob("*.py") if "AutoModel" in path.read_text())
"""The modules that import an Auto class themselves."""
REGISTERED = (
    "from transformers import AutoModelForCausalLM as auto; "
    "assert {'DecoderConfig', 'InfformerConfig'} <= {kind.__name__ for kind in auto._model_mapping}"
)


def run(code: str, *arguments: str) -> str:
    """What an interpreter prints in which nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_import_of_the_package_loads_no_library() -> None:
    code = "import infformer, sys; from infformer import command; print({'torch', 'transformers'} & {*sys.modules})"
    assert run(code) == "set()\n"


def test_all_that_the_list_of_names_imports_is_offered() -> None:
    assert {name for name in vars(api) if not name.startswith("_")} == {*api.__all__}
    assert {*dir(infformer)} == {*api.__all__, "__version__"}
    assert infformer.InfformerForCausalLM is InfformerForCausalLM
    names: dict[str, object] = {}
    exec("from infformer import *", names)
    assert {*api.__all__} <= {*names}


@pytest.mark.parametrize("name", ["Transformer", "_private", "__wrapped__"])
def test_a_name_that_is_not_offered_is_none(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(infformer, name)


FIRST = ("import infformer", "from transformers import AutoModelForCausalLM")
KINDS = "from infformer.memory.options import MemoryConfig; print(*(kind.kind for kind in MemoryConfig.kinds()))"
EACH_ALONE = """
import os, sys
import datasets, torch, transformers.modeling_utils  # most of what takes seconds, for all

assert not {"infformer", "transformers.models.auto.modeling_auto"} & {*sys.modules}
for code in sys.argv[1:]:
    if os.fork() == 0:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said(backbone: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What codes print, each in a process of its own that has not imported the package: what the Auto class has opened
    after each of two first imports, and the kinds of memories."""
    folder = tmp_path_factory.mktemp("saved")
    memory = infformer.LongTermMemoryConfig(basis_functions=8, past_samples=16)
    wrapped = InfformerForCausalLM.from_backbone(backbone, memory, segment_length=16)
    wrapped.save_pretrained(folder / "wrapped")
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    DecoderForCausalLM(DecoderConfig(**sizes, memory=memory, segment_length=16)).save_pretrained(folder / "decoder")
    opening = (
        f"{{}}; import infformer; from transformers import AutoModelForCausalLM as auto; print(*("
        f"type(auto.from_pretrained('{folder}/' + name)).__name__ for name in ('wrapped', 'decoder')))"
    )
    return run(EACH_ALONE, *map(opening.format, FIRST), KINDS).splitlines()


@pytest.mark.parametrize("order", range(len(FIRST)), ids=FIRST)
def test_both_kinds_of_model_are_opened_by_the_auto_class_after_an_import(order: int, said: list[str]) -> None:
    assert said[order] == "InfformerForCausalLM DecoderForCausalLM"


def test_every_kind_of_memory_is_known_to_whoever_imports_memories(said: list[str]) -> None:
    assert {*said[-1].split()} == {"short_term", "compressive", "long_term", "fast_weight", "cache"}


def test_no_module_that_the_models_are_made_of_imports_an_auto_class_before_them() -> None:
    """It would import the models, and they that module, which is not there yet."""
    waiting, seen = ["infformer.models.pretrained", "infformer.models.decoder"], set[str]()
    asking = set()
    while waiting:
        module = waiting.pop()
        place = ROOT.joinpath(*module.split("."))
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if module in seen or not file.is_file():
            continue
        seen.add(module)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                names = {name.name for name in node.names}
                waiting += [node.module, *(f"{node.module}.{name}" for name in names)]
                if node.module == "transformers" and any(name.startswith(("Auto", "MODEL_")) for name in names):
                    asking.add(module)
    assert len(seen) > 15
    assert asking == {"infformer.models.pretrained", "infformer.models.decoder"}


@pytest.mark.slow
@pytest.mark.parametrize("module", ASKING)
def test_the_models_are_registered_whichever_module_is_imported_first(module: str) -> None:
    run(f"import infformer.models.{module}; {REGISTERED}")
