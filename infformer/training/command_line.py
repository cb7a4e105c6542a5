"""From the options of a command line to the typed tree of a run, or to a sentence about the one that is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from infformer.config import CHOICES, MEMORIES, TASKS, options_of, register_schemas, schema_of, without_none
from infformer.errors import UserError

Options = TypeVar("Options")


class OptionError(UserError, ValueError):
    """An option that there is not, or that cannot have this value."""


def start(name: str, kind: type[Options], conf: Path, run: Callable[[Options], None]) -> bool:
    """Compose what the command line asks for, check it, and run it.

    Args:
        name: of the primary configuration in `conf`.
        kind: the typed tree that it has to fit.
        conf: the folder of the groups.
        run: what is done with it; with `--multirun` several times.

    Returns:
        Whether several runs were asked for.

    Raises:
        UserError: what was typed cannot be composed.
        SystemExit: anything else that a user can mend is wrong, with the sentence that says what.
    """
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised here: Hydra's own words about them would mislead
    running = False

    def task(composed: DictConfig) -> None:
        nonlocal running
        running = True
        try:
            run(check(composed, kind))
        except UserError as error:  # Hydra would add a line of its own, and go on with the next run of a sweep
            sys.exit(f"error: {error}")
        running = False

    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)()
    except Exception as error:
        if running:
            raise
        arguments = get_args_parser().parse_args()
        conf = Path(arguments.config_path or conf)
        raise explain(error, arguments.config_name or name, kind, conf, arguments.overrides) from error
    return bool(get_args_parser().parse_args().multirun)


def end_of_sweep(folders: Sequence[Path]) -> str:
    """The table of all runs, or how to have one where they were made elsewhere, as by SLURM."""
    from infformer.training.sweep import write_summary  # this loads for seconds

    if not folders:
        return "The sweep is through; one table of its runs: python scripts/summarise.py and their folders"
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    try:
        return write_summary(folders, common / "summary")
    except UserError as error:
        return f"The sweep is through; there is no table of its runs: {error}"


def compose(name: str, kind: type[Options], conf: Path, overrides: Sequence[str]) -> Options:
    """Compose what `start` would run with the options of a command line.

    Raises:
        UserError: an option is wrong.
    """
    try:
        composed = _compose(name, conf, overrides)
    except Exception as error:
        raise explain(error, name, kind, conf, overrides) from error
    return check(composed, kind)


def check(composed: DictConfig, kind: type[Options]) -> Options:
    """The typed tree of a configuration as Hydra composed it.

    Raises:
        UserError: it has options that there are not, or values that cannot be.
    """
    for option, value in _unknown(composed, kind):
        while isinstance(value, dict) and len(value) == 1:  # as it was typed
            ((name, value),) = value.items()
            option = f"{option}.{name}"
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        raise _no_such_option(f"{option}={shown}", option, kind)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema_of(kind), composed))  # type: ignore[return-value]
    except UserError:
        raise
    except MissingMandatoryValue as error:
        raise OptionError(f"{error.full_key}=: this must be given; set {error.full_key}= to a value") from error
    except OmegaConfBaseException as error:
        raise OptionError(f"{error.full_key}: {_first_line(error)}; mend this value, or leave it out") from error
    except ValueError as error:
        raise OptionError(_as_typed(_first_line(error), composed)) from error


def explain(error: Exception, name: str, kind: type[Any], conf: Path, overrides: Sequence[str]) -> UserError:
    """Say what is wrong with a command line that Hydra could not compose.

    Args:
        error: what Hydra raised.
        overrides: the options as they are typed.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OverrideParseException):
        return OptionError(
            f"{error.override}: this cannot be read as an option ({_first_line(error)}); type name=value, and quote "
            "a value with special characters twice: 'name=\"a=b\"'"
        )
    typed = OverridesParser.create().parse_overrides(list(overrides))
    chosen: list[Override] = []
    values: list[Override] = []
    for override in typed:
        choices = choices_of(override.key_or_group, conf)
        choice = override._value
        chooses = bool(choices or override.package) and not isinstance(choice, dict)
        (chosen if chooses else values).append(override)
        if not chooses or override.is_delete() or override.is_sweep_override():
            continue
        if str(error).startswith("Multiple values for ") and override.is_add():
            return OptionError(f"{_line(override)}: this is chosen already; type it without +")
        if not isinstance(choice, str) or (isinstance(error, MissingConfigException) and choice not in choices):
            own_files = (
                ", or for files of your own text with data.train=FILES" if override.key_or_group == "data" else ""
            )
            return OptionError(
                f"{_line(override)}: there is no such choice{_perhaps(_near(str(choice), choices))}; choose one of "
                f"{', '.join(choices)}{own_files}"
            )
    try:
        base = _compose(name, conf, [_line(override) for override in chosen])
    except Exception:
        return OptionError(_in_one_line(error))
    for override in values:
        ours = not override.key_or_group.startswith("hydra.") and not override.is_sweep_override()
        problem = _problem(override, base, kind, conf) if ours else None
        if problem is not None:
            return problem
    return OptionError(_in_one_line(error))


@cache
def choices_of(group: str, conf: Path) -> list[str]:
    """The choices of one of Hydra's groups; empty if there is no such group."""
    register_schemas()
    with hydra.initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        return GlobalHydra.instance().config_loader().get_group_options(group)


def _compose(name: str, conf: Path, overrides: Sequence[str]) -> DictConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        composed = hydra.compose(name, list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(composed.copy())
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _problem(override: Override, base: DictConfig, kind: type[Any], conf: Path) -> OptionError | None:
    """What is wrong with one option, seen from what the chosen groups make; None if nothing is."""
    option, line = override.key_or_group, _line(override)
    for group in CHOICES:
        above, _, name = group.rpartition("/")
        if above in base and option in (group.replace("/", "."), name) and isinstance(override.value(), str):
            choices = ", ".join(choices_of(group, conf))
            return OptionError(f"{line}: a {name} is chosen with a slash; type {group}=, one of {choices}")
    *parents, last = option.split(".")
    node: Any = base
    for depth, parent in enumerate(parents):
        if not isinstance(node, DictConfig) or parent not in node:
            return _no_such_option(line, option, kind)
        node = node._get_node(parent)  # as it is: a value may refer to others that are wrong themselves
        if node is None or node._is_none():
            path = ".".join(parents[: depth + 1])
            return OptionError(
                f"{line}: {path} is null in this run, so it has no options; choose a memory that has it, such as "
                "model/memory=sticky, or leave this option out"
            )
    kind_of_node = OmegaConf.get_type(node)
    if not isinstance(node, DictConfig) or not dataclasses.is_dataclass(kind_of_node):
        if not isinstance(node, DictConfig) or last in node or override.is_add() or override.is_force_add():
            return None
        near = _perhaps(_near(last, map(str, node)))
        return OptionError(f"{line}: there is no {option} in this run{near}; to add it, type +{line}")
    if last not in _names(kind_of_node):
        return _no_such_option(line, option, kind)
    declared = typing.get_type_hints(kind_of_node)[last]
    if override.is_delete():
        return None
    try:
        OmegaConf.update(base.copy(), option, override.value(), merge=True)
    except (OmegaConfBaseException, AssertionError) as error:
        return OptionError(f"{line}: {_in_words(declared) or _first_line(error)}")
    return None


def _unknown(node: DictConfig, kind: type[Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The options of a composed tree that its types do not have, and their values."""
    found: list[tuple[str, Any]] = []
    hints = typing.get_type_hints(kind)
    for name in map(str, node):
        inner = node._get_node(name)
        option = prefix + name
        if name not in hints:
            plain: Any = OmegaConf.to_container(OmegaConf.create({option: inner}))
            found.append((option, plain[option]))
        elif isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():
            inner_kind = OmegaConf.get_type(inner)
            if inner_kind is not None and dataclasses.is_dataclass(inner_kind):
                found += _unknown(inner, inner_kind, f"{option}.")
    return found


def _no_such_option(typed: str, option: str, kind: type[Any]) -> OptionError:
    group, _, last = option.rpartition(".")
    variants: dict[str, Mapping[str, object]] = {"task": TASKS, "model.memory": MEMORIES}
    others = [name for name, variant in variants.get(group, {}).items() if last in OmegaConf.structured(variant)]
    if others:
        chosen = " or ".join(f"{group.replace('.', '/')}={name}" for name in others)
        what = group.removeprefix("model.")
        return OptionError(f"{typed}: the {what} of this run has no such option; leave it out, or choose {chosen}")
    options = list(dict.fromkeys(option for option, _ in options_of(kind)))
    names = dict.fromkeys(name.rpartition(".")[2] for name in options)
    # `lr` and `batch` are a name's initials and one of its words.
    near = [name for name in names if last in ("".join(word[:1] for word in name.split("_")), *name.split("_"))]
    near += _near(last, names)
    alike = [option for name in near for option in options if option.rpartition(".")[2] == name]
    alike.sort(key=lambda name: (name.rpartition(".")[2] != last, name.rpartition(".")[0] != group))
    while group and not any(name.startswith(f"{group}.") for name in options):
        group = group.rpartition(".")[0]
    there = dict.fromkeys(name.rpartition(".")[2] for name in options if name.rpartition(".")[0] == group)
    return OptionError(
        f"{typed}: there is no option {option}{_perhaps(alike)}"
        + (f"; {group or 'there'} {'has' if group else 'are'} {', '.join(there)}" if there else "")
    )


def _near(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.7)


def _perhaps(meant: Sequence[str]) -> str:
    """` (did you mean …?)`, if anything may be meant; of what stands there twice the first."""
    return f" (did you mean {' or '.join(list(dict.fromkeys(meant))[:3])}?)" if meant else ""


def _in_words(declared: Any) -> str:
    """What a value of this type must be."""
    inner = without_none(declared)
    words = {
        int: "must be a whole number",
        float: "must be a number",
        bool: "must be true or false",
        str: "must be a text",
        list[int]: "must be a list of whole numbers, such as [0,2]",
        list[float]: "must be a list of numbers, such as [0.9,0.999]",
        list[str]: "must be a list of texts, such as [one,two]",
    }
    if dataclasses.is_dataclass(inner):
        return f"this is a group, whose options are set one by one: {', '.join(_names(inner))}"
    if typing.get_origin(inner) is list and dataclasses.is_dataclass(typing.get_args(inner)[0]):
        required, *options = typing.get_type_hints(typing.get_args(inner)[0])
        return f"must be a list of groups, such as [{{{required}: 1, {options[-1]}: 2}}], of {', '.join(options)}"
    if typing.get_origin(inner) is dict:
        return "must be fields with values, such as {name: value}"
    said = words.get(inner, "")
    return f"{said}, or null" if said and inner is not declared else said


def _names(kind: Any) -> list[str]:
    """The options of a group."""
    return [field.name for field in dataclasses.fields(kind)]


def _as_typed(message: str, composed: DictConfig) -> str:
    """Blame a value that follows another option on that one: `${a.b}` was typed as `a.b`."""
    match = re.match(r"([\w.]+)=([^\s:,]+):? ", message)
    if match is None:
        return message
    parent, _, last = match[1].rpartition(".")
    node = OmegaConf.select(composed, parent) if parent else composed
    raw = node._get_node(last) if isinstance(node, DictConfig) and last in node else None
    followed = None if raw is None else re.fullmatch(r"\$\{([\w.]+)\}", str(raw._value()))
    if followed is None:
        return message
    return f"{followed[1]}={match[2]}, which {match[1]} follows: {message[match.end() :]}"


def _line(override: Override) -> str:
    return str(override.input_line)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _in_one_line(error: Exception) -> str:
    """Hydra's own words in one line, without its advice to add options that there are not."""
    lines = [str(error), str(error.__cause__ or "")]
    kept = [line for text in lines for line in text.splitlines() if not line.startswith(("To append", "    "))]
    return " ".join(" ".join(kept).split()) or type(error).__name__
