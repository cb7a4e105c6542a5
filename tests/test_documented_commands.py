"""Every command that README, CONTRIBUTING or a page of docs/ shows can be typed: its options are known.

What the README's commands do is tried in `test_readme.py`.
"""

import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch.distributed.run import get_args_parser as torchrun_parser

from infformer.config import CONF, EvaluationRunConfig, GenerationRunConfig, RunConfig
from infformer.training.command_line import compose

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"hydra/launcher=submitit_slurm": "hydra-submitit-launcher", "evaluate_with_harness.py": "lm_eval"}
RUN_BY_OTHERS = {
    "pip install -e '.[dev]' -c constraints.txt",  # .ci/run
    "python -m pytest",  # .ci/run
    "pip install -e '.[harness]'",  # .ci/run, with every other extra
    # Shown as never tried: there is no cluster to try them on.
    'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    '[ -e outputs/books/results.json ] || scontrol requeue "$SLURM_JOB_ID"',
}


def commands_of(page: Path) -> list[str]:
    """The commands in a page's blocks, and those of Python in its sentences."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    typed = [command.strip() for line in lines for command in re.sub(r"(^|\s)#.*", "", line).split("&&")]
    return [command for command in typed if command] + re.findall(r"`(python (?!-)[^`\n]+)`", text)


def benchmarks() -> list[str]:
    """Those of the tables in docs/performance.md, each in the last cell of its row."""
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    return [f"python scripts/benchmark.py {row}" for row in re.findall(r"\| `(\w[^`]*)`[^|]*\|$", table, re.MULTILINE)]


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)} | {*benchmarks()})
RUNS, SCRIPTS = (
    [
        pytest.param(command, marks=[pytest.mark.needs(need) for what, need in NEEDS.items() if what in command])
        for command in COMMANDS
        if re.search(pattern, command)
    ]
    for pattern in (r"\b(train|eval|generate)\.py\b", r"\bscripts/\w+\.py\b")
)


def words_of(command: str) -> tuple[list[str], Path, list[str]]:
    """What stands before a program in Python, the program, and its options."""
    words = shlex.split(command)
    place = [word.endswith(".py") for word in words].index(True)
    return words[:place], Path(words[place]), words[place + 1 :]


def test_every_command_is_one_whose_options_are_tried():
    tried = {command for kind in (RUNS, SCRIPTS) for parameters in kind for command in parameters.values}
    assert {*COMMANDS} - tried == RUN_BY_OTHERS
    assert len(benchmarks()) > 10


@pytest.mark.usefixtures("composed_quickly")
@pytest.mark.parametrize("command", RUNS)
def test_the_options_of_a_run_are_known(command):
    before, program, options = words_of(command)
    if "torchrun" in before:
        launched = [word.replace("$NODE", "0") for word in before[before.index("torchrun") + 1 :]]
        torchrun_parser().parse_args([*launched, str(program)])
    overrides = [option for option in options if "=" in option or option.startswith("~")]  # ~: what is taken out
    assert [option for option in options if option not in overrides] in ([], ["-m"], ["--cfg", "job"])
    typed = OverridesParser.create().parse_overrides(overrides)
    first_of_a_sweep = [
        f"{one.key_or_group}={next(one.sweep_string_iterator())}" if one.is_sweep_override() else str(one.input_line)
        for one in typed
    ]
    number = ["hydra.job.num=0"] if "hydra:job.num" in command else []
    kind = {"train": RunConfig, "eval": EvaluationRunConfig, "generate": GenerationRunConfig}[program.stem]
    compose(program.stem, kind, CONF, [*first_of_a_sweep, *number])


@pytest.mark.parametrize("command", SCRIPTS)
def test_the_options_of_a_script_are_known(command, monkeypatch):
    class ParsedError(Exception):
        pass

    def parse_only(parse):
        def parse_and_end(parser: ArgumentParser, arguments: Sequence[str] | None = None) -> Namespace:
            parse(parser, arguments)
            raise ParsedError

        return parse_and_end

    _, program, options = words_of(command)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, name, parse_only(getattr(ArgumentParser, name)))
    monkeypatch.setattr(sys, "argv", [str(program), *options])
    with pytest.raises(ParsedError):
        import_module(program.stem).main()
