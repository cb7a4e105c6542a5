"""What every language model with a memory promises, whatever its backbone and its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from infformer.errors import UserError
from infformer.memory.long_term import LongTermMemory
from infformer.memory.state import LayerMemories, MemoryState
from infformer.models.chunked_loss import IGNORE_INDEX, chunked_token_losses
from infformer.models.outputs import MemoryModelOutput

logger = logging.getLogger(__name__)


class ModelError(UserError, ValueError):
    """A model or tokenizer that cannot be loaded, or does not fit."""


class MemoryModel(PreTrainedModel):
    """A causal language model that reads a document segment by segment; its memory is a value between two of them.

    `forward(input_ids, labels, memory, reset, *, targets, lengths, attention_mask, noise, return_logits,
    return_intermediates)` returns a `MemoryModelOutput`:

        input_ids: one segment of each row, [batch, length].
        labels: as in transformers, shifted inside (`labels=input_ids`): the last position has no label here.
        memory: what `memory` was after the row's last segment; empty if not given.
        reset: rows that begin a new document with this segment, bool [batch].
        targets: the token that follows each position, [batch, length], -100 where nothing is scored; with them no
            label is lost between two segments. Instead of `labels`.
        lengths: real tokens of each row, [batch]; the rest is padding on the right, neither scored nor written.
        attention_mask: the same as a tokenizer and its collators say it, [batch, length]: 1 for a real token, and 0 for
            the padding on the right. Instead of `lengths`.
        noise: random offsets in [0, 1) for sticky memories, [batch, noise_size]; deterministic without.
        return_logits: by default only where there are no labels.
        return_intermediates: what happened inside each layer, for the memory's instruments.
    """

    segment_length: int | None
    """Only whole segments of this many tokens are written to memory. None: there is no memory to write to."""

    @classmethod
    def from_pretrained(
        cls, *args: Any, dtype: Any = torch.float32, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a model as transformers does, but in float32 unless another `dtype` is asked for.

        Weights of a memory that the folder lacks are those of a new memory, and the log says so.

        Raises:
            ModelError: it lacks others.
        """
        dtype = kwargs.pop("torch_dtype", dtype)  # its old name
        loaded: Any = super().from_pretrained(*args, dtype=dtype, output_loading_info=True, **kwargs)
        model, report = loaded
        missing = set(report["missing_keys"])
        memories = {id(parameter) for parameter in model.memory_parameters()}
        new = {name for name, parameter in model.named_parameters() if name in missing and id(parameter) in memories}
        if missing - new:
            raise ModelError(
                f"the folder lacks {len(missing - new)} weights of the model, such as {min(missing - new)}: it is not "
                "whole, or they have other names there; give the folder as it was saved"
            )
        if new:
            logger.warning("the folder lacks %d weights of the memory, such as %s: they are new", len(new), min(new))
            model._renew(new)
        return loaded if output_loading_info else model

    def _renew(self, names: set[str]) -> None:
        """Give those of the memory's weights that were not loaded what a new memory has."""
        raise NotImplementedError

    @property
    def has_memory(self) -> bool:
        """Whether anything is carried from one segment to the next."""
        return self.segment_length is not None

    @property
    def short_term_length(self) -> int:
        """How many tokens before its segment a token attends to as they were; 0 without a short-term memory."""
        raise NotImplementedError

    @property
    def noise_size(self) -> int:
        """How many random offsets a row's sticky memories take in training; 0 without stickiness."""
        raise NotImplementedError

    @property
    def positions(self) -> int | None:
        """How many positions the model has; None if it has no such limit."""
        raise NotImplementedError

    def initial_memory(self, batch: int) -> MemoryState:
        """Empty memories for `batch` rows."""
        raise NotImplementedError

    def long_term_memories(self) -> dict[int, LongTermMemory]:
        """The long-term memories by the numbers of their layers, from 0, in the order of the memory's layers."""
        raise NotImplementedError

    def time_shuffle(self) -> Tensor | None:
        """The matrix by which `shuffle_time` puts the long-term memories in another order; None without any."""
        memories = self.long_term_memories()
        return next(iter(memories.values())).signal.time_shuffle() if memories else None

    def shuffle_time(self, memory: Any, shuffle: Tensor | None = None) -> Any:
        """The same memory with its past in another order, a control: does the order of what is remembered matter?

        Each kind of memory is cut into 16 blocks of time, which change places in a fixed way (`memory.time_shuffle`).
        Rows stay apart, and an empty memory stays empty.

        Args:
            shuffle: what `time_shuffle` returns, for who shuffles many memories; computed if not given.
        """
        shuffle = self.time_shuffle() if shuffle is None else shuffle
        return LayerMemories(tuple(state.shuffle_time(shuffle) for state in memory.layers))

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        """The memory's own parameters, as against the backbone's."""
        raise NotImplementedError

    def sharding_units(self) -> list[nn.Module]:
        """The modules that an engine which cuts up weights puts together, each as a whole, for the time of its call."""
        raise NotImplementedError

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the model knows."""
        return self.get_input_embeddings().weight.shape[0]  # type: ignore[return-value, index]

    def check_segment_length(self, length: int) -> None:
        """Make sure that the model can read segments of this length, and that its memory writes them.

        Raises:
            ModelError: it cannot, or does not.
        """
        if self.segment_length is not None and length != self.segment_length:
            raise ModelError(
                f"segment_length={length} is not that of the memory, which writes whole segments of "
                f"{self.segment_length} tokens and forgets all others: set it to {self.segment_length}"
            )
        if self.positions is not None and length > self.positions:
            raise ModelError(
                f"segment_length={length} is longer than the {self.positions} positions of the model: set it to "
                f"{self.positions} at most"
            )

    def choose_segment_length(self, wanted: int | None) -> int:
        """The length of the segments to read: as wanted, or the memory's, or for a model without one all positions.

        Raises:
            ModelError: the model cannot read such segments, or it has no limit by which to choose.
        """
        length = wanted or self.segment_length or self.positions
        if length is None:
            raise ModelError("segment_length=null: this model has no limit of positions; say how long a segment is")
        self.check_segment_length(length)
        return length

    def _begin(
        self,
        input_ids: Tensor,
        memory: Any,
        reset: Tensor | None,
        lengths: Tensor | None,
        attention_mask: Tensor | None,
    ) -> tuple[Any, Tensor | None]:
        """The memory before a segment, and how many tokens of each row are real; None for all.

        Raises:
            ModelError: what was given is not of so many rows of so many tokens.
        """
        batch, length = input_ids.shape
        if attention_mask is not None:
            if lengths is not None:
                raise ModelError("attention_mask= and lengths= say the same: give one of them")
            lengths = _lengths_of(attention_mask, batch, length)
        for name, rows in (("reset", reset), ("lengths", lengths)):
            if rows is not None and rows.shape != (batch,):
                raise ModelError(f"{name}= has the shape {list(rows.shape)}: give one value for each of {batch} rows")
        if lengths is not None and not torch.compiler.is_compiling():
            _check_lengths(lengths, length)
        memory = self.initial_memory(batch) if memory is None else memory
        for tensor in memory.named_tensors().values():
            if len(tensor) != batch:
                raise ModelError(
                    f"memory= has {len(tensor)} rows, input_ids {batch}: each row of the input goes on with its row of "
                    "the memory; choose rows by memory.select_rows(index), or begin with memory=None"
                )
        return memory if reset is None else memory.reset_rows(reset), lengths

    def _whole_rows(self, batch: int, cached: int, length: int, lengths: Tensor | None) -> Tensor | None:
        """Rows whose segment is whole and is written, bool [batch]; None where no row's can be.

        Args:
            cached: tokens of the segment that were read before.
            length: tokens that are read now,
            lengths: and how many of them are real in each row, [batch]; all if not given.

        Raises:
            ModelError: these are more tokens than a segment has.
        """
        if self.segment_length is not None and cached + length > self.segment_length:
            raise ModelError(
                f"{cached + length} tokens are more than the memory's segment of {self.segment_length}: cut the text up"
            )
        if length != self.segment_length:
            return None
        return torch.ones(batch, dtype=torch.bool, device=self.device) if lengths is None else lengths == length

    def checkpoint_activations(self) -> None:
        """Compute each layer anew in the backward pass instead of keeping what is inside it: less memory, more time."""
        # The newer of transformers' two names, where it has it; the older one is deprecated there.
        enable = getattr(self, "activation_checkpointing_enable", None) or self.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def _set_gradient_checkpointing(  # type: ignore[override] # of which the last arguments differ between versions
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ModelError(
                "use_reentrant=True: reentrant checkpointing runs the first forward pass without a graph, so nothing "
                "would flow back through the memory; take {'use_reentrant': False}"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _score(
        self,
        output: MemoryModelOutput,
        hidden: Tensor,
        token_losses: Callable[[Tensor, Tensor], Tensor],
        labels: Tensor | None,
        targets: Tensor | None,
        lengths: Tensor | None,
    ) -> bool:
        """Fill in the losses of an output, if there are labels; whether there are.

        Args:
            hidden: last hidden states, [batch, length, hidden].
            token_losses: hidden states [tokens, hidden] and labels [tokens] to nats.
        """
        if labels is not None:
            targets = F.pad(_without_padding(labels, lengths)[:, 1:], (0, 1), value=IGNORE_INDEX)
        if targets is None:
            return False
        targets = _without_padding(targets, lengths)
        output.token_losses = chunked_token_losses(hidden, token_losses, targets)
        scored = (targets != IGNORE_INDEX).sum().clamp(min=1)
        output.loss = output.token_losses.sum() / scored + sum((output.auxiliary_losses or {}).values())
        return True


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


def _lengths_of(attention_mask: Tensor, batch: int, length: int) -> Tensor:
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


def _check_lengths(lengths: Tensor, length: int) -> None:
    possible = ((lengths >= 0) & (lengths <= length)).all()
    if lengths.is_cuda:
        torch._assert_async(possible, f"lengths= are from 0 to {length}, the tokens of a row")  # waits for nothing
    elif not possible:
        raise ModelError(f"lengths={lengths.tolist()}: a row has from 0 to {length} tokens")


def _without_padding(labels: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return labels
    padding = torch.arange(labels.shape[1], device=labels.device) >= lengths.unsqueeze(-1)
    return labels.masked_fill(padding, IGNORE_INDEX)
