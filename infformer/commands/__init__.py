"""The commands: `infformer-train` is `python -m infformer.commands.train`, and `python train.py` in a checkout."""

from runpy import run_module


def run_train() -> None:
    """Train: `infformer-train`."""
    _run("train")


def run_eval() -> None:
    """Measure: `infformer-eval`."""
    _run("eval")


def run_generate() -> None:
    """Read, and write what comes after it: `infformer-generate`."""
    _run("generate")


def _run(name: str) -> None:
    run_module(f"infformer.commands.{name}", run_name="__main__", alter_sys=True)
