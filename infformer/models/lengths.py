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


def check_lengths(lengths: Tensor, length: int) -> None:
    """Make sure that no row has fewer real tokens than none, or more than there are.

    Raises:
        ModelError: one has; on CUDA an error of the device, later.
    """
    if lengths.is_cuda:
        possible = ((lengths >= 0) & (lengths <= length)).all()
        torch._assert_async(possible, f"lengths= are from 0 to {length}, the tokens of a row")  # waits for nothing
    elif not ((numbers := lengths.numpy(force=True)) >= 0).all() or (numbers > length).any():
        raise ModelError(f"lengths={lengths.tolist()}: a row has from 0 to {length} tokens")


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
