"""What holds while tests are collected and run. The fixtures of all of them are in `fixtures.py`."""

import gc
import os
from collections.abc import Iterator
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

gc.disable()  # until all tests are collected: what is imported stays, and is not looked through again and again

# Before the libraries are imported: nothing here may reach for the network, and workers side by side share the cores.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.pop("HF_HUB_OFFLINE", None)  # what happens without a network is tried by tests of their own
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests out to workers, which wait for it, does not import for seconds what they do."""
    hands_out = config.getoption("numprocesses", None) and not config.option.collectonly
    if hands_out and not hasattr(config, "workerinput"):
        return
    spec = spec_from_file_location("fixtures_of_all", Path(__file__).with_name("fixtures.py"))
    assert spec is not None
    assert spec.loader is not None
    fixtures = module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    config.pluginmanager.register(fixtures, spec.name)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Garbage is looked for among what the tests make, not in the million objects that were there before them."""
    yield
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Libraries that count what is left of them when the interpreter ends find nothing to complain of."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest is begun first, two files and all others of runs: one begun last would be waited for."""
    first = ("test_engines.py", "test_resume.py")
    items.sort(key=lambda item: (item.path.name not in first, item.path.parent.name != "training"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs an extra is skipped where it is not installed, each by itself."""
    import torch  # which the process that hands tests out does without

    for mark in item.iter_markers("needs"):
        try:
            metadata.distribution(mark.args[0])
        except metadata.PackageNotFoundError:
            pytest.skip(f"{mark.args[0]} is not installed")
    if item.get_closest_marker("processor") and torch.accelerator.is_available():
        pytest.skip("tried on the processor, where the accelerator is hidden: CUDA_VISIBLE_DEVICES= python -m pytest")
