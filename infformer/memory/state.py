"""Frozen states: what a memory is between two segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class MemoryState:
    """A value whose fields are tensors, other states or tuples of them, or None; the first axis of a tensor is the row.

    A row is one stream of text. Rows never mix. A row that is zero throughout is an empty memory.
    """

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state of the same shape with `function` applied to every tensor."""

        def apply(value: Any) -> Any:
            if value is None or isinstance(value, Tensor):
                return None if value is None else function(value)
            return value.map_tensors(function) if isinstance(value, MemoryState) else tuple(map(apply, value))

        return replace(self, **{field.name: apply(getattr(self, field.name)) for field in fields(self)})

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.named_tensors().values())

    def detach(self) -> Self:
        """The same values, without the graph that made them."""
        return self.map_tensors(Tensor.detach)

    def to(self, device: torch.device | str) -> Self:
        """The same values on another device."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def reset_rows(self, rows: Tensor) -> Self:
        """Empty the rows where `rows` (bool, [batch]) is true."""
        return self.replace_rows(rows, self.map_tensors(torch.zeros_like))

    def replace_rows(self, rows: Tensor, other: Self) -> Self:
        """The rows of another state of the same structure where `rows` (bool, [batch]) is true, its own elsewhere.

        Raises:
            ValueError: if a name or a shape past the first axis does not fit.
        """
        others = self.with_tensors(other.named_tensors()).named_tensors()
        replaced = {
            name: torch.where(rows.view(-1, *(1,) * (tensor.dim() - 1)), others[name], tensor)
            for name, tensor in self.named_tensors().items()
        }
        return self.with_tensors(replaced)

    def select_rows(self, index: Tensor) -> Self:
        """The rows that `index` (int64, [k], with repetitions if wished) names, in its order."""
        return self.map_tensors(lambda tensor: tensor.index_select(0, index))

    def split(self, parts: int) -> list[Self]:
        """`parts` states of equally many rows, in order."""
        return [
            self.map_tensors(lambda tensor, part=part: tensor.unflatten(0, (parts, -1))[part])  # type: ignore[misc]
            for part in range(parts)
        ]

    @classmethod
    def concatenate(cls, states: Sequence[Self]) -> Self:
        """The rows of several states of the same structure, one after the other."""
        named = [state.named_tensors() for state in states]
        rows = {name: torch.cat([tensors[name] for tensors in named]) for name in named[0]}
        return states[0].with_tensors(rows)

    def named_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every tensor by its path, such as `layers.0.coefficients`: what a checkpoint stores."""
        named: dict[str, Tensor] = {}

        def collect(name: str, value: Any) -> None:
            if isinstance(value, Tensor):
                named[name] = value
            elif isinstance(value, MemoryState):
                named.update(value.named_tensors(f"{name}."))
            elif value is not None:
                for position, element in enumerate(value):
                    collect(f"{name}.{position}", element)

        for field in fields(self):
            collect(prefix + field.name, getattr(self, field.name))
        return named

    def with_tensors(self, named: Mapping[str, Tensor]) -> Self:
        """A state of this structure with the tensors of `named_tensors()`.

        Raises:
            ValueError: if a name or a shape past the first axis does not fit.
        """
        own = self.named_tensors()
        if own.keys() != named.keys():
            raise ValueError(
                f"these memories have different parts: {sorted(own.keys() ^ named.keys())} are in one of them only"
            )
        for name, tensor in own.items():
            if tensor.shape[1:] != named[name].shape[1:]:
                raise ValueError(
                    f"{name} of the stored memory is {list(named[name].shape)}, this model's is {list(tensor.shape)}"
                )
        names = iter(own)
        return self.map_tensors(lambda tensor: named[next(names)].to(tensor))


@dataclass(frozen=True)
class ModelState(MemoryState):
    """What a model remembers between two segments."""

    layers: tuple[MemoryState, ...]
    """Of each layer that has a memory, in their order."""
