"""Kernels are Triton's: without a GPU its interpreter runs their tests on the processor."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="`pip install triton` beside PyTorch's CPU build")
@pytest.mark.parametrize("cases", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_hold_in_the_interpreter(cases):
    """In a process of its own: what Triton brings along is compiled or interpreted from its import on."""
    kernels = sorted(Path(__file__).parent.rglob("test_*_triton.py"))
    assert len(kernels) == 2
    options = ["-q", "-n", "0", "--dist", "no", "-p", "no:cacheprovider", "--noconftest", "-m", cases]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *kernels],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
