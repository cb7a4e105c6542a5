"""How many tokens of each row of a segment are real; the rest is padding behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from infformer.errors import ModelError
from infformer.models.chunked_loss import IGNORE_INDEX


def lengths_of(attention_mask: Tensor, batch: int, length: int) -> Tensor:
    """The number of real tokens of each row, [batch], of a mask that is 1 for them and 0 for the padding behind them.

    Raises:
        ModelError: another mask.
    """
    if attention_mask.shape != (batch, length):
        raise ModelError(
            f"attention_mask= has the shape {list(attention_mask.shape)}: give a value for each token, "
            f"[{batch}, {length}]"
        )
    lengths = (attention_mask != 0).sum(dim=1)
    places = torch.arange(length, device=lengths.device)
    if not torch.equal(attention_mask != 0, places < lengths.unsqueeze(-1)):
        raise ModelError(
            "attention_mask= has zeros before ones: padding stands behind the text, since a segment goes on from the "
            "one before; set tokenizer.padding_side='right'"
        )
    return lengths


def check_lengths(lengths: Tensor, least: int, most: int) -> None:
    """Make sure how many real tokens each row has.

    Raises:
        ModelError: one has too few or too many; on CUDA an error of the device, later.
    """
    message = (
        f"a row has from {least} to {most} tokens"
        if least < most
        else (
            f"each row has {most} tokens where use_cache=True: the segment goes on behind them, and not behind padding"
        )
    )
    if lengths.is_cuda:
        torch._assert_async(((lengths >= least) & (lengths <= most)).all(), f"lengths=: {message}")  # waits for nothing
    elif ((numbers := lengths.numpy(force=True)) < least).any() or (numbers > most).any():
        raise ModelError(f"lengths={lengths.tolist()}: {message}")


def without_padding(labels: Tensor, lengths: Tensor | None) -> Tensor:
    """Labels [batch, length] with those of padding ignored."""
    if lengths is None:
        return labels
    padding = torch.arange(labels.shape[1], device=labels.device) >= lengths.unsqueeze(-1)
    return labels.masked_fill(padding, IGNORE_INDEX)


def mean_over_tokens(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean of [batch, length] over the real tokens of all rows.

    A row that does not count is zero and not left out: otherwise the mean of two halves of a batch would not be that of
    the whole.

    Args:
        lengths: real tokens of each row, [batch]; all if not given.
    """
    if lengths is None:
        return values.mean()
    real = torch.arange(values.shape[1], device=lengths.device) < lengths.unsqueeze(-1)
    return (values * real).sum() / lengths.sum().clamp(min=1)
