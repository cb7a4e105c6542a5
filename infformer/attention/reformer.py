"""Reformer's attention (Kitaev et al., arXiv 2001.04451): each position sees those that hash into its bucket."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infformer.attention.softmax import Part, join_parts, weigh_part

ALONE = -1e5
"""The score of a position with itself, which it attends to only if it sees no other."""


def reformer_attention(
    query: Tensor, value: Tensor, rotations: Tensor, chunk: int, real: Tensor | None = None
) -> Tensor:
    """Attention with keys k = q/‖q‖ in the same bucket, and in the same chunk of the sorted text or the one before.

    Rounds are joined by the mass of what they saw; a pair that meets in several counts as often, as in the authors'
    code and Hugging Face's.

    Args:
        query: also the keys, [batch, heads, length, size].
        value: like the query.
        rotations: R, random, [heads, rounds, size, buckets / 2]: the bucket of x is argmax [xR; −xR].
        chunk: how many sorted positions attend together.
    """
    buckets = hash_buckets(query, rotations)
    if real is not None:  # all padding is in one more bucket
        buckets = torch.where(real[:, None, None, :], buckets, 2 * rotations.shape[-1])
    shown = torch.ones_like(query[:, :1, :, 0], dtype=torch.bool) if real is None else real.unsqueeze(1)
    return join_parts(
        [_attend_round(query, value, buckets[:, :, number], chunk, shown) for number in range(buckets.shape[2])]
    )


def hash_buckets(query: Tensor, rotations: Tensor) -> Tensor:
    """The bucket of each position in each round, int64 [batch, heads, rounds, length]."""
    rotated = torch.einsum("bhld,hrdn->bhrln", query.detach(), rotations.to(query))
    return torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)


def _attend_round(query: Tensor, value: Tensor, buckets: Tensor, chunk: int, real: Tensor) -> Part:
    """One round, in the order of the text."""
    length = query.shape[2]
    order = buckets.argsort(dim=-1, stable=True)  # within a bucket in the order of the text
    padding = -length % chunk

    def in_chunks(tensor: Tensor) -> Tensor:
        """[batch, heads, length, …] sorted, [batch, heads, chunks, chunk, …]; what fills up is the first position."""
        index = F.pad(order, (0, padding)) if tensor.dim() == 3 else F.pad(order, (0, padding)).unsqueeze(-1)
        return tensor.gather(2, index.expand(*index.shape[:3], *tensor.shape[3:])).unflatten(2, (-1, chunk))

    def with_previous(chunks: Tensor) -> Tensor:
        """Behind each chunk the one before it; before the first the last, which buckets hide."""
        return torch.cat([chunks, chunks.roll(1, dims=2)], dim=3)

    places = torch.arange(length, device=query.device).expand_as(buckets)
    filled = F.pad(torch.ones_like(order, dtype=torch.bool), (0, padding)).unflatten(2, (-1, chunk))
    chunks, bucket, place = in_chunks(query), in_chunks(buckets), in_chunks(places)
    shown = in_chunks(real.expand_as(buckets)) & filled
    key = F.normalize(chunks, dim=-1)
    if chunks.shape[2] == 1:  # there is no chunk before
        keys, values, seen, key_bucket, key_place = key, in_chunks(value), shown, bucket, place
    else:
        keys, values = with_previous(key), with_previous(in_chunks(value))
        seen, key_bucket, key_place = (with_previous(tensor) for tensor in (shown, bucket, place))
    allowed = seen.unsqueeze(-2) & (bucket.unsqueeze(-1) == key_bucket.unsqueeze(-2))
    scores = chunks @ keys.mT
    alone = max(ALONE, torch.finfo(scores.dtype).min / 8)  # above what is hidden, also in float16
    scores = scores.masked_fill(place.unsqueeze(-1) == key_place.unsqueeze(-2), alone)
    part = weigh_part(scores, values, allowed)

    back = order.argsort(dim=-1)
    attended = part.attended.flatten(2, 3)[:, :, :length]
    attended = attended.gather(2, back.unsqueeze(-1).expand_as(attended))
    return Part(attended, part.log_mass.flatten(2, 3)[:, :, :length].gather(2, back))
