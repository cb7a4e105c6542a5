"""A key-value cache that a memory has filled: what the attention of a stock model sees before a segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor
from transformers.cache_utils import Cache, DynamicLayer

from infformer.errors import ModelError
from infformer.memory.memory import KeyValues
from infformer.models.backbone import Rotation


class PastLayer(DynamicLayer):
    """What the attention of one layer sees before the tokens that are read.

    It may be asked for twice, as where a layer is computed anew in the backward pass: only `keep` adds to it.

    Args:
        past: keys and values before the segment, without their rotation.
        rotation: of the layer's keys; None where they are not rotated.
        table: of the places of the past, and then of the segment; see `Rotation.table`.
        real: which tokens of the past are seen, bool [batch, length].
    """

    def __init__(self, past: KeyValues, rotation: Rotation | None, table: Tensor | None, real: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(past.keys, past.values)
        self.real = real
        self.rotation, self.table, self.places = rotation, table, past.keys.shape[2]
        self.keys: Tensor
        self.values: Tensor
        self.keys, self.values = past
        if rotation is not None and table is not None:
            self.keys = rotation.turn(past.keys, table[:, :, : self.places])
        self.segment: KeyValues | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What attention sees in all; `keys` and `values` stay."""
        self.segment = KeyValues(key_states, value_states)
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=2)
        return keys, torch.cat([self.values.to(value_states.dtype), value_states], dim=2)

    def key_values(self) -> KeyValues:
        """Those of the segment so far, without their rotation."""
        assert self.segment is not None
        keys, values = (
            torch.cat([kept[:, :, self.places :].to(new.dtype), new], dim=2)
            for kept, new in zip((self.keys, self.values), self.segment, strict=True)
        )
        if self.rotation is not None and self.table is not None:
            table = self.table[:, :, self.places : self.places + keys.shape[2]]
            keys = self.rotation.turn_back(keys, table)
        return KeyValues(keys, values)

    @property
    def read(self) -> int:
        """How many tokens of the segment are kept."""
        return self.keys.shape[2] - self.places

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.real = self.real.index_select(0, beam_idx)

    def keep(self) -> None:
        """Let what was read be seen by what is read next."""
        assert self.segment is not None
        self.keys, self.values = self.update(*self.segment)


class Past(Cache):
    """What the attention of every layer sees before the tokens that are read.

    Args:
        layers: of the model.
        real: which tokens before the segment are seen in the layers that see most, bool [batch, length].
    """

    def __init__(self, layers: Sequence[PastLayer], real: Tensor) -> None:
        super().__init__(layers=list(layers))
        self.real = real

    @property
    def places(self) -> int:
        """How many keys stand before the segment."""
        return self.real.shape[1]

    def visible(self, length: int) -> Tensor:
        """Which tokens attention may see, so many new ones among them; int64 [batch, past + length]."""
        seen = self.get_seq_length() + length
        return F.pad(self.real.long(), (0, seen - self.real.shape[1]), value=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many there are in the layers that see most, whose places the segment's go on from."""
        return self.places + cast(PastLayer, self.layers[0]).read

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def mask_in(self, layer: int, mask: Any) -> Any:
        """What one layer's attention may see, of a mask for the layers that see most.

        Raises:
            ModelError: the mask is no tensor.
        """
        if mask is None:  # all is seen, here too
            return mask
        own = cast(PastLayer, self.layers[layer])
        if not isinstance(mask, Tensor):
            raise ModelError(
                "model/memory=cache in some layers alone: these attentions share a mask of another kind than a tensor; "
                "set model.attention=sdpa"
            )
        segment = mask[..., self.places :]
        if mask.dim() == 2:
            return torch.cat([own.real.to(mask.dtype), segment], dim=-1)
        seen = own.real[:, None, None, :].expand(-1, *segment.shape[1:3], -1)
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, torch.finfo(mask.dtype).min)
        return torch.cat([seen, segment.expand(len(seen), -1, -1, -1)], dim=-1)

    def key_values(self, layer: int) -> KeyValues:
        """Those of the segment so far in a layer, without their rotation."""
        return cast(PastLayer, self.layers[layer]).key_values()

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Choose rows, as beam search does."""
        super().reorder_cache(beam_idx)
        self.real = self.real.index_select(0, beam_idx)

    def keep(self) -> None:
        """Let what was read be seen by what is read next."""
        for layer in cast(list[PastLayer], self.layers):
            layer.keep()
