"""The options that every memory has, and how a stored configuration finds the kind that it is of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

from infformer.errors import UserError
from infformer.memory.memory import Memory
from infformer.memory.short_term import KeyValueMemory, ShortTermMemory
from infformer.options import check_at_least


@dataclass
class MemoryConfig:
    """What the layers of a model remember. This kind: Transformer-XL's short-term memory and nothing else.

    Every other kind is a subclass that builds what stands behind the short-term memory: what leaves that is written to
    it.
    """

    kind: ClassVar[str] = "short_term"
    """By which a stored configuration is known; each subclass has its own."""
    training: ClassVar[dict[str, Any]] = {}
    """What of `training` a run with it has, unless something else is said."""

    short_term_length: int | None = None
    """Transformer-XL: the last tokens that attention sees before the segment, as hidden states in a decoder, as keys
    and values beside a pretrained model. It may be longer when a model is measured than it was in training. 0: none.
    Null: as many as a segment has; beside a pretrained model that has another memory none."""

    sink_tokens: int | None = field(default=None, kw_only=True)
    """Beside a pretrained model: so many first tokens of a document stay in sight when they have left the short-term
    memory. Without any, most read worse than without a memory (attention sinks, arXiv 2309.17453). Null: 4; a decoder,
    which learned without them, has none."""

    def __post_init__(self) -> None:
        check_at_least(0, "model.memory.", self, "short_term_length", "sink_tokens")
        if type(self) is MemoryConfig and self.short_term_length == 0:
            raise ValueError(
                "model.memory.short_term_length=0: this would be no memory at all; choose model/memory=none, or set it "
                "to null, which is as many tokens as a segment has"
            )

    def with_short_term_length(self, default: int) -> Self:
        """The same with so long a short-term memory, if it is not said how long it is."""
        return self if self.short_term_length is not None else replace(self, short_term_length=default)

    def beside_pretrained(self, segment_length: int) -> Self:
        """The same beside a pretrained model: without a short-term memory, unless it is asked for or all there is."""
        memory = self.with_short_term_length(0 if self.adds_to_attention else segment_length)
        if memory.entries and memory.sink_tokens is None:
            return replace(memory, sink_tokens=min(4, segment_length))
        return memory

    def check_segment_length(self, segment_length: int) -> None:
        """Make sure that segments of this length can be written.

        Raises:
            ValueError: they cannot.
        """
        if (self.sink_tokens or 0) > segment_length:
            raise ValueError(
                f"model.memory.sink_tokens={self.sink_tokens}: they are of a document's first segment, which has "
                f"training.segment_length={segment_length} tokens; take 4"
            )
        if not self.stands_alone and (self.short_term_length or 0) % segment_length:
            raise ValueError(
                f"model.memory.short_term_length={self.short_term_length}: what leaves it is written segment by "
                f"segment; make it a multiple of training.segment_length={segment_length}"
            )

    def check_pretrained(self) -> None:
        """Make sure that this can stand beside the attention of a pretrained model.

        Raises:
            ValueError: it cannot.
        """

    def check_training(self, bptt_segments: int) -> None:
        """Make sure that all of it learns.

        Args:
            bptt_segments: segments through which gradients flow.

        Raises:
            ValueError: something does not.
        """

    def build(
        self,
        hidden_size: int,
        heads: int,
        layers: int,
        segment_length: int,
        key_values: tuple[int, int] | None = None,
    ) -> list[Memory]:
        """A new memory for each layer, none where nothing is remembered.

        Args:
            hidden_size: width of the model.
            heads: attention heads.
            layers: how many have a memory.
            segment_length: tokens of a segment; only complete ones are written.
            key_values: heads of keys and values, and numbers of each head; the heads, which share the width, if not
                given.
        """
        key_values = key_values or (heads, hidden_size // heads)
        behind = self.build_told(hidden_size, heads, layers, segment_length, key_values)
        if not self.short_term_length:
            return behind
        return [
            ShortTermMemory(self.short_term_length, hidden_size, behind[layer] if behind else None)
            for layer in range(layers)
        ]

    def build_beside(
        self,
        layers: Sequence[int],
        segment_length: int,
        *,
        hidden_size: int,
        heads: int,
        key_values: tuple[int, int],
        depth: int,
    ) -> dict[int, Memory]:
        """A new memory beside each attention of a pretrained model, by the number of its layer.

        Args:
            layers: that have a memory; a short-term one stands in all, as all attend to the same tokens.
            segment_length: tokens of a segment; only complete ones are written.
            hidden_size: width of the model.
            heads: attention heads.
            key_values: heads of keys and values, and numbers of each head.
            depth: how many layers there are.
        """
        memories = self.build_told(hidden_size, heads, len(layers), segment_length, key_values)
        behind = dict(zip(layers, memories, strict=False))  # none where the short-term memory is all
        if not self.short_term_length:
            return behind
        return {
            layer: KeyValueMemory(
                self.short_term_length, self.sink_tokens or 0, key_values, hidden_size, behind.get(layer)
            )
            for layer in range(depth)
        }

    def build_behind(self, hidden_size: int, heads: int, layers: int, segment_length: int) -> list[Memory]:
        """For each layer what stands behind its short-term memory; here nothing."""
        return []

    def build_told(
        self, hidden_size: int, heads: int, layers: int, segment_length: int, key_values: tuple[int, int]
    ) -> list[Memory]:
        """`build_behind`, told what keys and values the layers' own attention has: for memories that keep these."""
        return self.build_behind(hidden_size, heads, layers, segment_length)

    def matched(self, layers: int, depth: int, floats: int) -> Self:
        """The same with its size chosen, where it is said by its floats.

        Args:
            layers: how many have this memory,
            depth: of how many.
            floats: of one token in one layer.

        Raises:
            ValueError: there is no such size.
        """
        return self

    @property
    def stands_alone(self) -> bool:
        """Whether there is nothing but what attention sees of the last tokens, and nothing behind that."""
        return type(self) is MemoryConfig

    @property
    def adds_to_attention(self) -> bool:
        """Whether something is added to what attention returns; otherwise attention looks at the memory itself."""
        return not self.stands_alone

    @property
    def keeps_key_values(self) -> bool:
        """Whether what is behind the short-term memory keeps keys and values and not hidden states."""
        return False

    @property
    def key_values(self) -> int:
        """How many keys and values a pretrained model's attention sees before the segment."""
        return self.entries + (self.sink_tokens or 0) if self.entries else 0

    @property
    def entries(self) -> int:
        """How many states attention sees beside the segment."""
        return self.short_term_length or 0

    def numbers(self, hidden_size: int, layers: int, rows: int, rows_at_once: int, segment_length: int) -> int:
        """How many float32 numbers the memories of a model take at least, for the refusal of what cannot fit.

        Args:
            rows: whose states are kept,
            rows_at_once: and how many of them are read side by side.
        """
        return rows * layers * hidden_size * self.entries

    def to_json(self) -> dict[str, Any]:
        """As it stands in a model's `config.json`."""
        return {"kind": self.kind, **asdict(self)}

    @classmethod
    def kinds(cls) -> list[type[Self]]:
        """This kind and all that were derived from it."""
        return [cls, *(kind for derived in cls.__subclasses__() for kind in derived.kinds())]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """The configuration that `to_json` wrote, of whichever kind that has been imported.

        Raises:
            ValueError: there is no such kind, or it has no such option.
        """
        fields = dict(stored)
        kinds = {kind.kind: kind for kind in cls.kinds()}
        kind = kinds.get(fields.pop("kind", ""))
        if kind is None:
            raise ValueError(f"memory.kind={stored.get('kind')}: there are {', '.join(kinds)}")
        try:
            return kind(**fields)
        except TypeError as error:
            raise ValueError(str(error)) from error


def own_heads(wanted: int | None, heads: int, hidden_size: int, what: str) -> int:
    """The heads of a memory that divide the width of the model: as many as are wanted, or as attention has.

    Args:
        what: has them, for the error.

    Raises:
        UserError: they do not divide it.
    """
    option, heads = ("architecture.num_attention_heads", heads) if wanted is None else ("memory.heads", wanted)
    if hidden_size % heads:
        raise UserError(
            f"model.{option}={heads}: the heads of {what} divide model.architecture.hidden_size={hidden_size} among "
            "them; choose a number that divides it"
        )
    return heads


def check_layers(said: Any) -> None:
    """Make sure that this says layers: a list of numbers, so many in the middle (`middle:6`), or None for all.

    Raises:
        ValueError: it does not.
    """
    in_middle = isinstance(said, str) and re.fullmatch(r"middle:[1-9]\d*", said)
    listed = isinstance(said, Sequence) and not isinstance(said, str) and all(type(layer) is int for layer in said)
    if not (said is None or in_middle or listed):
        raise ValueError(
            f"model.memory_layers={said}: list the layers that have a memory, from 0, such as [3,4], or say how many "
            "in the middle have one, such as middle:6; null is all of them"
        )


def choose_layers(said: Sequence[int] | str | None, depth: int) -> list[int] | None:
    """The layers that `check_layers` has let pass, as a list, of so many; None for all.

    Raises:
        ValueError: there are not so many.
    """
    if not isinstance(said, str):
        return None if said is None else list(said)
    check_layers(said)
    count = int(said.removeprefix("middle:"))
    if count > depth:
        raise ValueError(f"model.memory_layers={said}: this backbone has {depth} layers; take at most middle:{depth}")
    first = (depth - count) // 2
    return list(range(first, first + count))
