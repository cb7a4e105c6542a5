"""The machine at hand: what it is, how fast it multiplies matrices, and how fast it moves memory."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import synchronize

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """A device, as it computes in one precision."""

    device: torch.device
    name: str
    """Of the processor or the graphics card."""
    torch_version: str
    threads: int
    precision: str
    """`float32`, or `bfloat16` for autocast."""
    matmul_flops: float
    """Floating-point operations per second of a large product of matrices of that precision."""
    bandwidth: float
    """Bytes per second, read and written, of a large copy."""

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that forward passes run in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def describe(self) -> dict[str, str | int | float]:
        """As it is recorded beside every figure."""
        return {
            "device": str(self.device),
            "name": self.name,
            "torch": self.torch_version,
            "python": platform.python_version(),
            "threads": self.threads,
            "precision": self.precision,
            "matmul_flops": self.matmul_flops,
            "bandwidth": self.bandwidth,
        }

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' if self.threads > 1 else ''}" if self.device.type == "cpu" else ""
        return (
            f"{self.name}{threads}, torch {self.torch_version}, {self.precision}; matrix products "
            f"{self.matmul_flops / 1e9:,.0f} GFLOP/s, copies {self.bandwidth / 1e9:,.1f} GB/s"
        )


def measure_machine(device: torch.device, precision: str) -> Machine:
    """Name the device, and take the best of a few large products and copies.

    Those of float32 run as torch is set to: on CUDA without TF32, unless the caller allowed it.
    """
    on_cpu = device.type == "cpu"
    size = 1536 if on_cpu else 8192
    matrix = torch.randn(size, size, device=device, dtype=PRECISIONS[precision])
    product = torch.empty_like(matrix)
    # Larger than the caches. A copy is no product: the floor of what only moves memory.
    source = torch.zeros(2**26 if on_cpu else 2**28, device=device)
    target = torch.zeros_like(source)
    return Machine(
        device,
        _processor() if on_cpu else torch.cuda.get_device_name(device),
        torch.__version__,
        torch.get_num_threads(),
        precision,
        2 * size**3 / _best_seconds(lambda: torch.mm(matrix, matrix, out=product), device),
        2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
    )


def _best_seconds(call: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    seconds = []
    for _ in range(1 + repetitions):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()
