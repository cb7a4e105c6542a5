"""The kernels of the loss of a GPU, on one, or without one on the processor in Triton's interpreter."""

import os
from importlib.util import find_spec

import pytest
import torch

from infformer.models import linear_loss
from infformer.models.chunked_loss import IGNORE_INDEX
from infformer.models.linear_loss import ALIGNMENT

if find_spec("triton") is None:
    pytest.skip(
        "triton comes with PyTorch's CUDA builds; `pip install triton` beside the CPU build", allow_module_level=True
    )

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_kernels_in_the_interpreter.py"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 64, 129, 5000])
def test_the_kernels_compute_as_the_formula_says(monkeypatch, dtype, vocabulary):
    from infformer.models import linear_loss_triton

    monkeypatch.setattr(linear_loss, "can_fuse", lambda tensor: False)
    rows = 5
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, -vocabulary % ALIGNMENT + vocabulary, device=DEVICE)).to(dtype)
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    targets[2] = IGNORE_INDEX
    upstream = torch.rand(rows, device=DEVICE)
    nats, normaliser = linear_loss_triton.losses(logits, targets, vocabulary)
    for one, other in zip((nats, normaliser), linear_loss._losses(logits, targets, vocabulary), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    gradient = linear_loss._differentiate(logits.clone(), targets, normaliser, upstream, vocabulary)
    made = linear_loss_triton.differentiate(logits.clone(), targets, normaliser, upstream, vocabulary)
    torch.testing.assert_close(made, gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert (made[:, vocabulary:] == 0).all()
    assert (made[2] == 0).all()
