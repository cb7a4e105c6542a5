"""A decoder-only language model from scratch, with any of the memories: none, Transformer-XL's, the Compressive
Transformer's, ∞-former's.

Each layer's attention sees the compressed memory, the short-term memory and the segment under one softmax; what it
reads from the long-term memory is added to that. A layer is built of four parts, attention, memory, feed-forward and
norms, whose sizes all stand in `DecoderConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.layer import LayerMemory, LayerState, MemoryConfig
from infformer.memory.long_term import ContinuousSignal, LongTermMemory, LongTermMemoryConfig, WriteOperators
from infformer.memory.state import LayerMemories
from infformer.models.attention import Attention, encode_positions
from infformer.models.memory_model import MemoryModel, ModelError, mean_over_tokens
from infformer.models.outputs import Intermediates, MemoryModelOutput
from infformer.models.second_backward import refuse_second_backward
from infformer.models.vocabulary import AdaptiveVocabulary, TiedVocabulary

DecoderMemories = LayerMemories[LayerState]

CHOICES = {
    "positions": ("relative", "rotary"),
    "normalization": ("layer", "rms"),
    "normalization_placement": ("post", "pre"),
}


class DecoderConfig(PreTrainedConfig):
    """Sizes and choices of a `DecoderForCausalLM`.

    Args:
        vocab_size: tokens that the model knows.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        num_attention_heads: heads of each attention, also of the long-term memory, where they must divide the width.
        head_size: width of a head; by default the heads divide the hidden size.
        feed_forward_size: width inside the feed-forward part.
        activation: of the feed-forward part, by its name in transformers.
        positions: `relative`, Transformer-XL's scheme; `rotary`, with which the scores need no bias.
        normalization: `layer` or `rms`.
        normalization_placement: `post`, after the residual sum, as in Transformer-XL; `pre`, before each part.
        dropout: of embeddings, of what each part adds to the residual stream, and inside the feed-forward part.
        attention_dropout: of attention weights.
        initializer_range: standard deviation of new weights; None: 1/√inputs of each matrix, better for small widths.
        adaptive_cutoffs: where the bands of an adaptive vocabulary begin; empty for a plain one.
        adaptive_divisor: by how much each band of it is narrower than the one before.
        memory: which memories there are; None for none at all.
    """

    model_type = "decoder"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        head_size: int | None = None,
        feed_forward_size: int = 2048,
        activation: str = "relu",
        positions: str = "relative",
        normalization: str = "layer",
        normalization_placement: str = "post",
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        initializer_range: float | None = 0.02,
        adaptive_cutoffs: list[int] | None = None,
        adaptive_divisor: float = 1.0,
        memory: MemoryConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.feed_forward_size = feed_forward_size
        self.activation = activation
        self.positions = positions
        self.normalization = normalization
        self.normalization_placement = normalization_placement
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.adaptive_cutoffs = adaptive_cutoffs or []
        self.adaptive_divisor = adaptive_divisor
        self.memory = asdict(memory) if isinstance(memory, MemoryConfig) else memory
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "feed_forward_size"):
            _check_size(name, getattr(self, name))
        self.head_size = hidden_size // num_attention_heads if head_size is None else head_size
        _check_size("head_size", self.head_size)
        for name in ("dropout", "attention_dropout"):
            _check_number(name, getattr(self, name), "0 or more and less than 1", lambda value: 0 <= value < 1)
        if initializer_range is not None:
            _check_number("initializer_range", initializer_range, "more than 0, or null", lambda value: value > 0)
        _check_number("adaptive_divisor", adaptive_divisor, "at least 1", lambda value: value >= 1)
        for cutoff in self.adaptive_cutoffs:
            _check_size("adaptive_cutoffs", cutoff)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ModelError(f"model.architecture.{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        if activation not in ACT2FN:
            raise ModelError(f"model.architecture.activation={activation}: transformers knows no such activation")
        if positions == "rotary" and self.head_size % 2:
            raise ModelError(
                f"model.architecture.head_size={self.head_size}: rotary positions turn pairs; make it even"
            )
        if self.memory_config.long_term is not None and hidden_size % num_attention_heads:
            raise ModelError(
                f"model.architecture.num_attention_heads={num_attention_heads}: the heads of a long-term memory divide "
                f"model.architecture.hidden_size={hidden_size} among them; choose a number that divides it"
            )
        kwargs.setdefault("tie_word_embeddings", False)  # the vocabulary is one module and ties its own
        super().__init__(**kwargs)

    @property
    def memory_config(self) -> MemoryConfig:
        """The memories' configuration as its own type; an unknown option in a stored one is an error."""
        stored = dict(self.memory or {})
        kinds = {"compressive": CompressiveMemoryConfig, "long_term": LongTermMemoryConfig}
        try:
            parts = {name: kind(**stored.pop(name)) for name, kind in kinds.items() if stored.get(name) is not None}
            return MemoryConfig(**{**stored, **parts})
        except TypeError as error:
            raise ModelError(
                f"the memory in this model's config.json is not one that this version knows: {error}"
            ) from error


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"model.architecture.{name}={value}: give a whole number of at least 1")


def _check_number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value) or not holds(value):
        raise ModelError(f"model.architecture.{name}={value}: give a number that is {wanted}")


class FeedForward(nn.Module):
    """Two linear maps with an activation between them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.hidden_size, config.feed_forward_size)
        self.activation = ACT2FN[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        self.contract = nn.Linear(config.feed_forward_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.contract(self.dropout(self.activation(self.expand(hidden))))


class Surroundings(NamedTuple):
    """What all layers need to know of a segment."""

    encoding: Tensor
    """Of positions; see `encode_positions`."""
    allowed: Tensor
    """Which entries of the context each token may see; see `causal_mask`."""
    whole: Tensor | None
    """Rows whose segment is whole and is written, bool [batch]; None where no row's can be."""
    operators: WriteOperators | None
    offsets: Tensor | None
    traced: bool
    """Whether a layer also returns what happened in it."""


class LayerOutput(NamedTuple):
    """What a layer returns."""

    hidden: Tensor
    state: LayerState
    segment: Tensor
    """What attention saw of the segment so far, [batch, length so far, hidden]."""
    divergence: Tensor | None
    """Of the long-term memory's densities, [batch, queries]."""
    reconstruction: Tensor | None
    """Error of the compression, [batch, queries]."""
    trace: Intermediates | None


class DecoderLayer(GradientCheckpointingLayer):
    """Attention with its memories, then feed-forward, each with its residual sum and its norm."""

    def __init__(self, config: DecoderConfig, memory: MemoryConfig, signal: ContinuousSignal | None) -> None:
        super().__init__()
        self.pre_norm = config.normalization_placement == "pre"
        self.attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            config.head_size,
            config.positions,
            config.attention_dropout,
        )
        self.memory = LayerMemory(memory, config.hidden_size, config.num_attention_heads, signal)
        self.feed_forward = FeedForward(config)
        self.attention_norm = new_norm(config)
        self.feed_forward_norm = new_norm(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, state: LayerState, past: Tensor | None, around: Surroundings) -> LayerOutput:
        """Read a segment, or more tokens of one.

        Args:
            hidden: [batch, length, hidden].
            past: what attention saw of the segment's earlier tokens, [batch, earlier, hidden].
        """
        residual = hidden
        seen = self.attention_norm(hidden) if self.pre_norm else hidden
        segment = seen if past is None else torch.cat([past, seen], dim=1)
        memories = torch.cat([state.compressed.entries, state.short_term.entries], dim=1)
        context = torch.cat([memories.to(segment.dtype), segment], dim=1)
        attended = self.attention(seen, context, around.allowed, around.encoding)
        reading = self.memory.read(seen, state)
        trace = Intermediates(seen, attended, reading) if around.traced else None
        if reading is not None:
            attended = attended + reading.context.to(attended.dtype)
        hidden = residual + self.dropout(attended)
        hidden = hidden if self.pre_norm else self.attention_norm(hidden)

        residual = hidden
        hidden = self.feed_forward(self.feed_forward_norm(hidden) if self.pre_norm else hidden)
        hidden = residual + self.dropout(hidden)
        hidden = hidden if self.pre_norm else self.feed_forward_norm(hidden)

        reconstruction = None
        if around.whole is not None:

            def attend(entries: Tensor) -> tuple[Tensor, Tensor]:
                return self.attention.attend_by_content(seen, entries)

            state, reconstruction = self.memory.write(
                seen, state, around.whole, reading, around.operators, around.offsets, attend
            )
        long_term = self.memory.long_term
        divergence = None if reading is None or long_term is None else long_term.divergence(reading.attention)
        return LayerOutput(hidden, state, segment, divergence, reconstruction, trace)


class DecoderForCausalLM(MemoryModel):
    """A language model from scratch that reads a document segment by segment."""

    config_class = DecoderConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.memory_config = memory = config.memory_config
        self.segment_length = memory.segment_length if config.memory else None
        self.signal = None if memory.long_term is None else ContinuousSignal(memory.long_term)
        self.vocabulary = (
            AdaptiveVocabulary(config.vocab_size, config.hidden_size, config.adaptive_cutoffs, config.adaptive_divisor)
            if config.adaptive_cutoffs
            else TiedVocabulary(config.vocab_size, config.hidden_size)
        )
        self.layers = nn.ModuleList(DecoderLayer(config, memory, self.signal) for _ in range(config.num_hidden_layers))
        self.final_norm = new_norm(config) if config.normalization_placement == "pre" else None
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        memory: DecoderMemories | None = None,
        reset: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        noise: Tensor | None = None,
        return_logits: bool | None = None,
        return_intermediates: bool = False,
        segment_cache: tuple[Tensor, ...] | None = None,
        use_cache: bool = False,
    ) -> MemoryModelOutput:
        """Read one segment of each row, of at most `segment_length` tokens.

        Args:
            segment_cache, use_cache: what each layer's attention saw of the segment so far, to generate within it; such
                tokens are not written. The others are those of every `MemoryModel`.
        """
        memory, lengths = self._begin(input_ids, memory, reset, lengths, attention_mask)
        before = 0 if segment_cache is None else segment_cache[0].shape[1]
        around = self._surroundings(memory, input_ids, before, lengths, noise, return_intermediates)

        hidden = self.dropout(self.vocabulary.embed(input_ids) * math.sqrt(self.config.hidden_size))
        outputs: list[LayerOutput] = []
        for index, layer in enumerate(self.layers):
            past = None if segment_cache is None else segment_cache[index]
            outputs.append(layer(hidden, memory.layers[index], past, around))
            hidden = outputs[-1].hidden
        hidden = self.dropout(hidden if self.final_norm is None else self.final_norm(hidden))

        written = LayerMemories(tuple(layer.state for layer in outputs))
        refuse_second_backward(hidden, written)
        output = MemoryModelOutput(
            memory=written,
            auxiliary_losses=self._auxiliary_losses(outputs, memory, lengths),
            intermediates=tuple(layer.trace for layer in outputs if layer.trace is not None)
            if return_intermediates
            else None,
            segment_cache=tuple(layer.segment for layer in outputs) if use_cache else None,
        )
        scored = self._score(output, hidden, self.vocabulary.token_losses, labels, targets, lengths)
        if return_logits or (return_logits is None and not scored):
            output.logits = self.vocabulary.logits(hidden)
        return output

    def initial_memory(self, batch: int) -> DecoderMemories:
        """Empty memories for `batch` rows."""
        layers = cast(Iterator[DecoderLayer], iter(self.layers))
        return LayerMemories(tuple(layer.memory.initial_state(batch, self.device) for layer in layers))

    def long_term_memories(self) -> dict[int, LongTermMemory]:
        layers = enumerate(cast(Iterator[DecoderLayer], iter(self.layers)))
        return {number: layer.memory.long_term for number, layer in layers if layer.memory.long_term is not None}

    def sharding_units(self) -> list[nn.Module]:
        return list(self.layers)

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        for layer in cast(Iterator[DecoderLayer], iter(self.layers)):
            yield from layer.memory.parameters()

    @property
    def short_term_length(self) -> int:
        return self.memory_config.short_term_length

    @property
    def noise_size(self) -> int:
        memory = self.memory_config.long_term
        return memory.past_samples if memory is not None and memory.sticky else 0

    @property
    def positions(self) -> int | None:
        return None

    @property
    def vocabulary_size(self) -> int:
        return self.config.vocab_size

    def _surroundings(
        self,
        memory: DecoderMemories,
        input_ids: Tensor,
        before: int,
        lengths: Tensor | None,
        offsets: Tensor | None,
        traced: bool,
    ) -> Surroundings:
        batch, length = input_ids.shape
        whole = self._whole_rows(batch, before, length, lengths)
        state = memory.layers[0]  # all layers are written together: what is real in one is real in all
        context = state.compressed.length + state.short_term.length + before + length
        width = self.config.head_size if self.config.positions == "rotary" else self.config.hidden_size
        encoding = encode_positions(context, width, self.config.positions, self.device)
        operators = None
        if whole is not None and self.signal is not None and state.long_term is not None:
            operators = self.signal.operators(state.long_term.segments)
        dropped = encoding if self.config.positions == "rotary" else self.dropout(encoding)
        return Surroundings(dropped, causal_mask(state, length, context), whole, operators, offsets, traced)

    def _auxiliary_losses(
        self, outputs: list[LayerOutput], memory: DecoderMemories, lengths: Tensor | None
    ) -> dict[str, Tensor]:
        """Means over tokens, sums over layers, by name."""
        config, losses = self.memory_config, {}
        divergences = [layer.divergence for layer in outputs if layer.divergence is not None]
        if config.long_term is not None and divergences:
            state = memory.layers[0].long_term
            assert state is not None
            divergence = torch.stack(divergences).sum(0) * (state.segments.unsqueeze(-1) > 0)
            losses["divergence"] = config.long_term.divergence_weight * mean_over_tokens(divergence, lengths)
        if config.compressive is not None:
            errors = [layer.reconstruction for layer in outputs if layer.reconstruction is not None]
            error = (
                mean_over_tokens(torch.stack(errors).sum(0), lengths) if errors else torch.zeros((), device=self.device)
            )
            losses["reconstruction"] = config.compressive.reconstruction_weight * error
        return losses

    def _renew(self, names: set[str]) -> None:
        """They are new already: each belongs to a module that `_init_weights` has seen."""

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases, in the memories too: there is nothing pretrained that they could disturb."""
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
            inputs = module.weight[0].numel()
            deviation = self.config.initializer_range
            initialization.normal_(module.weight, std=1 / math.sqrt(inputs) if deviation is None else deviation)
        if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
            initialization.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            initialization.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            initialization.zeros_(module.bias)
        if isinstance(module, Attention) and not module.rotary:
            initialization.zeros_(module.content_bias)
            initialization.zeros_(module.distance_bias)
        if isinstance(module, ContinuousSignal):  # not learned, so never loaded
            module.reset_parameters()


def new_norm(config: DecoderConfig) -> nn.Module:
    """A norm of the residual stream."""
    kind = nn.LayerNorm if config.normalization == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=1e-5)


def causal_mask(state: LayerState, queries: int, length: int) -> Tensor:
    """Which entries of a context the last tokens of it may see, bool [batch, 1, queries, length].

    The context is the compressed memory, the short-term memory and the segment; in the memories only what is real.
    """
    memory = torch.cat([state.compressed.real, state.short_term.real], dim=1)
    real = F.pad(memory, (0, length - memory.shape[1]), value=True)
    entries = torch.arange(length, device=real.device)
    places = entries[length - queries :]
    return real[:, None, None, :] & (entries <= places.unsqueeze(-1))


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
