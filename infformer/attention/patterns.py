"""Attention by fixed patterns: local blocks, Sparse Transformer, Longformer, BigBird; and the patterns as masks.

Each costs what its pattern allows: keys are cut into blocks, shifted and gathered, never masked in a product of all
pairs. `..._mask` says the same as a mask bool [length, length], for tests, figures and whoever wants to see it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from infformer.attention.softmax import Part, attend_part, causal_mask, join_parts, softmax_attention


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, block: int, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Each position attends within its block of so many."""
    length = query.shape[2]
    query, key, value = (_in_blocks(tensor, block) for tensor in (query, key, value))
    allowed = None
    if real is not None or query.shape[2] * block > length:
        allowed = _blocks_of_real(real, length, block, query.device).unsqueeze(-2)
    if causal:
        causal_block = causal_mask(block, query.device)
        allowed = causal_block if allowed is None else allowed & causal_block
    return attend_part(query, key, value, allowed).attended.flatten(2, 3)[:, :, :length]


def local_mask(length: int, block: int, causal: bool = False) -> Tensor:
    """What `local_attention` lets each position see, bool [length, length]."""
    query, key = _pairs(length)
    return (query // block == key // block) & _before(query, key, causal)


def strided_attention(
    query: Tensor, key: Tensor, value: Tensor, stride: int, real: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Sparse Transformer (Child et al., arXiv 1904.10509), strided: the last positions and every so many before them.

    Position i sees j where |i − j| ≤ stride, or where stride divides i − j.
    """
    length = query.shape[2]
    places = _places(length, stride, query.device)
    query, key, value = (_in_blocks(tensor, stride) for tensor in (query, key, value))
    real = _blocks_of_real(real, length, stride, query.device)
    near = _attend_window(query, key, value, real, places, stride, causal)
    # A column holds the positions of one remainder.
    query, key, value = (tensor.transpose(2, 3) for tensor in (query, key, value))
    query_place, key_place = places.T.unsqueeze(-1), places.T.unsqueeze(-2)
    allowed = real.transpose(2, 3).unsqueeze(-2) & ((query_place - key_place).abs() > stride)
    far = attend_part(query, key, value, allowed & _before(query_place, key_place, causal))
    far = Part(far.attended.transpose(2, 3), far.log_mass.transpose(2, 3))
    return join_parts([near, far]).flatten(2, 3)[:, :, :length]


def strided_mask(length: int, stride: int, causal: bool = False) -> Tensor:
    """What `strided_attention` lets each position see, bool [length, length]."""
    query, key = _pairs(length)
    return (((query - key).abs() <= stride) | ((query - key) % stride == 0)) & _before(query, key, causal)


def fixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    summaries: int,
    real: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Sparse Transformer, fixed: a position sees its block, and the last positions of every block, their summaries."""
    length = query.shape[2]
    places = _places(length, block, query.device)
    query, key, value = (_in_blocks(tensor, block) for tensor in (query, key, value))
    real = _blocks_of_real(real, length, block, query.device)
    query_place = places.unsqueeze(-1)
    own = attend_part(query, key, value, real.unsqueeze(-2) & _before(query_place, places.unsqueeze(-2), causal))
    key_place = places[:, -summaries:].flatten()
    elsewhere = key_place // block != query_place // block
    key, value = (tensor[:, :, :, -summaries:].flatten(2, 3).unsqueeze(2) for tensor in (key, value))
    real = real[..., -summaries:].flatten(2, 3)[:, :, None, None]
    far = attend_part(query, key, value, real & elsewhere & _before(query_place, key_place, causal))
    return join_parts([own, far]).flatten(2, 3)[:, :, :length]


def fixed_mask(length: int, block: int, summaries: int, causal: bool = False) -> Tensor:
    """What `fixed_attention` lets each position see, bool [length, length]."""
    query, key = _pairs(length)
    return ((query // block == key // block) | (key % block >= block - summaries)) & _before(query, key, causal)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reach: int,
    seen_by_all: int = 0,
    real: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Longformer (Beltagy et al., arXiv 2004.05150): |i − j| ≤ reach, and the first positions are seen by all.

    What those first positions themselves see is everything, with projections of their own: see `Longformer`.
    """
    length = query.shape[2]
    places = _places(length, reach, query.device)
    first_key, first_value = (tensor[:, :, :seen_by_all].unsqueeze(2) for tensor in (key, value))
    query, key, value = (_in_blocks(tensor, reach) for tensor in (query, key, value))
    blocks_of_real = _blocks_of_real(real, length, reach, query.device)
    parts = [_attend_window(query, key, value, blocks_of_real, places, reach, causal, places < seen_by_all)]
    if seen_by_all:
        allowed = _before(places.unsqueeze(-1), torch.arange(first_key.shape[3], device=query.device), causal)
        if real is not None:
            allowed = allowed & real[:, None, None, None, :seen_by_all]
        parts.append(attend_part(query, first_key, first_value, allowed))
    return join_parts(parts).flatten(2, 3)[:, :, :length]


def window_mask(length: int, reach: int, seen_by_all: int = 0, causal: bool = False) -> Tensor:
    """What `window_attention` lets each position see, bool [length, length]."""
    query, key = _pairs(length)
    return (((query - key).abs() <= reach) | (key < seen_by_all)) & _before(query, key, causal)


def big_bird_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: int,
    order: Tensor,
    random_blocks: int,
    real: Tensor | None = None,
) -> Tensor:
    """BigBird (Zaheer et al., arXiv 2007.14062): blocks see their neighbours, the two outer blocks, and random ones.

    The two outer blocks, of which the second is the last with anything real, see everything.

    Args:
        block: positions of a block.
        order: random numbers, [longest, longest], by which each block chooses the random ones, as `choose_blocks` does.
        random_blocks: how many.
    """
    length = query.shape[2]
    rows, row_keys, row_values = (_in_blocks(tensor, block) for tensor in (query, key, value))
    row_real = _blocks_of_real(real, length, block, query.device)
    number = torch.arange(row_real.shape[2], device=query.device)
    last = torch.where(row_real.any(dim=3).squeeze(1), number, 0).amax(dim=-1, keepdim=True)  # [batch or 1, 1]
    is_outer = (number == 0) | (number == last)

    def attend(index: Tensor, exists: Tensor) -> Part:
        """Attention of all blocks, or of each, to some blocks, both [batch or 1, 1 or blocks, asked]."""
        keys, values, shown = (_take_blocks(tensor, index) for tensor in (row_keys, row_values, row_real.unsqueeze(-1)))
        return attend_part(rows, keys, values, shown.mT & exists.repeat_interleave(block, dim=2)[:, None, :, None])

    # Whole blocks are near or far: a position counts by the number of its block.
    places = number.unsqueeze(-1).expand(-1, block)
    parts = [_attend_window(rows, row_keys, row_values, row_real, places, 1, False, is_outer[:, None, :, None])]
    outer = torch.stack([torch.zeros_like(last), last], dim=-1)
    parts.append(attend(outer, torch.stack([torch.ones_like(last > 0), last > 0], dim=-1)))
    if random_blocks:
        chosen = choose_blocks(order[: len(number), : len(number)], last.squeeze(-1) + 1, random_blocks)
        parts.append(attend(chosen.clamp(min=0), chosen >= 0))
    attended = join_parts(parts)
    everything = softmax_attention(_take_blocks(rows, outer).squeeze(2), key, value, real).unsqueeze(2)
    of_last, of_first = everything[:, :, :, block:], everything[:, :, :, :block]
    attended = torch.where((number == last)[:, None, :, None, None], of_last, attended)
    attended = torch.where((number == 0)[:, None, None], of_first, attended)
    return attended.flatten(2, 3)[:, :, :length]


def big_bird_mask(length: int, block: int, chosen: Tensor) -> Tensor:
    """What `big_bird_attention` lets each position of a text without padding see, bool [length, length].

    Args:
        chosen: of one text, [blocks, random blocks].
    """
    blocks = len(chosen)
    number = torch.arange(blocks)
    outer = (number == 0) | (number == blocks - 1)
    seen = (number.unsqueeze(-1) - number).abs() <= 1
    seen = seen | outer | outer.unsqueeze(-1)
    for of_block, others in zip(seen, chosen.tolist(), strict=True):
        of_block[[other for other in others if other >= 0]] = True
    return seen.repeat_interleave(block, 0).repeat_interleave(block, 1)[:length, :length]


def choose_blocks(order: Tensor, counts: Tensor, count: int) -> Tensor:
    """Random blocks for each block of some texts, none of them outer or its neighbour; −1 where there is none.

    Args:
        order: random numbers, [blocks, blocks], by which each block chooses; the same for all texts.
        counts: how many blocks of each text have anything real, [batch].
        count: how many are chosen.

    Returns:
        Their numbers, int64 [batch, blocks, count].
    """
    number = torch.arange(len(order), device=order.device)
    near = (number.unsqueeze(-1) - number).abs() <= 1
    known = near | (number == 0) | (number >= counts.view(-1, 1, 1) - 1)
    drawn = order.masked_fill(known, 2.0).sort(dim=-1)
    found = drawn.indices.masked_fill(drawn.values > 1, -1)[:, :, :count]
    return F.pad(found, (0, count - found.shape[2]), value=-1)


def _attend_window(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    places: Tensor,
    reach: int,
    causal: bool,
    hidden: Tensor | None = None,
) -> Part:
    """Attention of blocks [batch, heads, blocks, block, size] to themselves and their two neighbours.

    Args:
        real: [batch, 1, blocks, block].
        places: of the positions, [blocks, block].
        reach: how far away a place is seen.
        hidden: keys that are not seen here, bool, broadcast to `real`; None: all are.
    """
    nowhere = torch.iinfo(places.dtype).max // 2  # the place of keys beyond the ends
    key_places = _with_neighbours(places[None, None].unsqueeze(-1), nowhere).squeeze(-1)[0, 0].unsqueeze(-2)
    shown = (
        _with_neighbours((real if hidden is None else real & ~hidden).unsqueeze(-1), False).squeeze(-1).unsqueeze(-2)
    )
    query_places = places.unsqueeze(-1)
    near = ((query_places - key_places).abs() <= reach) & _before(query_places, key_places, causal)
    return attend_part(query, _with_neighbours(key, 0), _with_neighbours(value, 0), shown & near)


def _with_neighbours(blocks: Tensor, beyond: float) -> Tensor:
    """[batch, heads, blocks, block, size] to [batch, heads, blocks, 3 · block, size]: with those before and after."""
    padded = F.pad(blocks, (0, 0, 0, 0, 1, 1), value=beyond)
    return torch.cat([padded[:, :, :-2], blocks, padded[:, :, 2:]], dim=3)


def _take_blocks(blocks: Tensor, index: Tensor) -> Tensor:
    """Of blocks [batch, heads, blocks, block, size] those that some rows ask for.

    Args:
        index: which, [batch or 1, rows, asked].

    Returns:
        [batch, heads, rows, asked · block, size].
    """
    batch, heads, count = blocks.shape[:3]
    first = torch.arange(0, batch * heads * count, count, device=index.device).view(batch, heads, 1, 1)
    found = blocks.flatten(0, 2).index_select(0, (first + index.unsqueeze(1)).flatten())
    return found.unflatten(0, (batch, heads, *index.shape[1:])).flatten(3, 4)


def _in_blocks(tensor: Tensor, block: int) -> Tensor:
    """[batch, heads, length, size] to [batch, heads, blocks, block, size], with zeros behind the end."""
    return F.pad(tensor, (0, 0, 0, -tensor.shape[2] % block)).unflatten(2, (-1, block))


def _blocks_of_real(real: Tensor | None, length: int, block: int, device: torch.device) -> Tensor:
    """Which positions of all blocks are real, bool [batch or 1, 1, blocks, block]."""
    known = torch.ones(1, length, dtype=torch.bool, device=device) if real is None else real
    return F.pad(known, (0, -length % block), value=False).unflatten(1, (-1, block)).unsqueeze(1)


def _places(length: int, block: int, device: torch.device) -> Tensor:
    """The places of all positions, [blocks, block]."""
    return torch.arange(length + -length % block, device=device).unflatten(0, (-1, block))


def _pairs(length: int) -> tuple[Tensor, Tensor]:
    places = torch.arange(length)
    return places.unsqueeze(-1), places


def _before(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Which keys at these places a query may see, by their order."""
    return key <= query if causal else torch.ones((), dtype=torch.bool, device=query.device)
