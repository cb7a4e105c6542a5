"""Language models that read documents far longer than their context, in constant memory.

What is meant to be used from outside is imported from here: the names of `infformer/api.py`. They are loaded when the
first is asked for, because torch and transformers take seconds. And as soon as transformers' Auto classes are there,
they know our models: `AutoModelForCausalLM.from_pretrained(folder)` opens one after `import infformer`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infformer.api import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return import_module("infformer.api").__all__
    # Python asks here for a module of the package, too, before it imports it.
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("infformer.api"), name)


def __dir__() -> list[str]:
    return sorted({"__version__", *import_module("infformer.api").__all__})


def _register_models() -> None:
    for module in ("decoder", "encoder", "pretrained"):
        import_module(f"infformer.models.{module}")


class _AutoClasses(MetaPathFinder):
    """Has the models registered as soon as transformers' Auto classes have been imported."""

    name = "transformers.models.auto.modeling_auto"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == self.name else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_models()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if _AutoClasses.name in sys.modules:
    _register_models()
else:
    sys.meta_path.insert(0, _AutoClasses())
