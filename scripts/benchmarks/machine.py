"""The machine at hand: what it is, how fast it multiplies matrices, and how fast it moves memory."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import Clock, take_turns
from infformer.results import BenchmarkMachine

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """Where contestants run, and how."""

    clock: Clock
    precision: str = "float32"
    """`float32`, or `bfloat16` for autocast."""

    @property
    def device(self) -> torch.device:
        """Where the contestants run."""
        return self.clock.device

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


@dataclass(frozen=True)
class Machine:
    """What a device is, and how fast it can be in one precision."""

    setting: Setting
    name: str
    """Of the processor or the graphics card."""
    threads: int
    matmul_flops: float
    """Floating-point operations per second of a large product of matrices of that precision."""
    bandwidth: float
    """Bytes per second, read and written, of a large copy."""

    def describe(self) -> BenchmarkMachine:
        """As it is recorded beside every figure."""
        return {
            "device": str(self.setting.device),
            "name": self.name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": self.threads,
            "precision": self.setting.precision,
            "clock": self.setting.clock.kind,
            "matmul_flops": self.matmul_flops,
            "bandwidth": self.bandwidth,
        }

    def __str__(self) -> str:
        on_cpu = self.setting.device.type == "cpu"
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if on_cpu else ""
        return (
            f"{self.name}{threads}, torch {torch.__version__}, {self.setting.precision}, {self.setting.clock.kind} "
            f"clock; matrix products {self.matmul_flops / 1e9:,.0f} GFLOP/s, copies {self.bandwidth / 1e9:,.1f} GB/s"
        )


def measure_machine(setting: Setting) -> Machine:
    """Name the device, and take the best of a few large products and copies.

    Those of float32 run as torch is set to: on CUDA without TF32, unless the caller allowed it. It takes half a
    gigabyte on the CPU, so that a process whose own peak of memory is of interest does this last.
    """
    device = setting.device
    on_cpu = device.type == "cpu"
    size = 1536 if on_cpu else 8192
    matrix = torch.randn(size, size, device=device, dtype=PRECISIONS[setting.precision])
    product = torch.empty_like(matrix)
    # Larger than the caches. A copy is no product: the floor of what only moves memory.
    source = torch.zeros(2**26 if on_cpu else 2**28, device=device)
    target = torch.zeros_like(source)
    return Machine(
        setting,
        _processor() if on_cpu else torch.cuda.get_device_name(device),
        torch.get_num_threads(),
        2 * size**3 / _best_seconds(lambda: torch.mm(matrix, matrix, out=product), setting.clock),
        2 * source.nbytes / _best_seconds(lambda: target.copy_(source), setting.clock),
    )


def _best_seconds(call: Callable[[], object], clock: Clock) -> float:
    return min(take_turns({"": call}, rounds=5, warmup=1, clock=clock)[""])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
