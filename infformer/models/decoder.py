"""A decoder-only language model from scratch, with any of the memories: none, Transformer-XL's, the Compressive
Transformer's, ∞-former's.

Each layer's attention sees the compressed memory, the short-term memory and the segment under one softmax; what it
reads from the long-term memory is added to that. A layer is built of four parts, attention, memory, feed-forward and
norms, whose sizes all stand in `DecoderConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from infformer.errors import ModelError, as_model_errors
from infformer.memory.memory import Memory, SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.architecture_options import check_choice, check_number, check_size
from infformer.models.base import MemoryModel, stored_memory
from infformer.models.block import (
    Attention,
    BlockSizes,
    FeedForward,
    Residual,
    Stream,
    encode_positions,
    initialize,
)
from infformer.models.mechanisms import AttentionShape, Mechanism, build_mechanism
from infformer.models.segment_read import LayerRead, SegmentRead, SegmentToRead
from infformer.models.vocabulary import AdaptiveVocabulary, TiedVocabulary

CHOICES: dict[str, Collection[str]] = {
    "positions": ("relative", "rotary"),
    "normalization": ("layer", "rms"),
    "normalization_placement": ("post", "pre", "dual"),
    "activation": ACT2FN,
}


class DecoderConfig(PreTrainedConfig):
    """Sizes and choices of a `DecoderForCausalLM`.

    Args:
        vocab_size: tokens that the model knows.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        num_attention_heads: heads of each attention, also of the long-term memory, where they must divide the width.
        head_size: width of a head; by default the heads divide the hidden size.
        key_size: width of its queries and keys, if another than that of its values.
        feed_forward_size: width inside the feed-forward part.
        activation: of the feed-forward part, by its name in transformers.
        positions: `relative`, Transformer-XL's scheme; `rotary`, with which the scores need no bias.
        normalization: `layer` or `rms`.
        normalization_placement: `post`, after the residual sum, as in Transformer-XL; `pre`, before each part;
            `dual`, after it, and with the norm of the sum of all parts at the end (ResiDual).
        norm_epsilon: what norms add to the variance.
        attention: a mechanism by its name, or its name as `kind` with its own options: see `models.mechanisms`. Another
            than `softmax` takes rotary positions, and no memory that attention itself looks at.
        dropout: of embeddings, of what each part adds to the residual stream, and inside the feed-forward part.
        attention_dropout: of attention weights, for softmax.
        initializer_range: standard deviation of new weights; None: 1/√inputs of each matrix, better for small widths.
        adaptive_cutoffs: where the bands of an adaptive vocabulary begin; empty for a plain one.
        adaptive_divisor: by how much each band of it is narrower than the one before.
        memory: what each layer remembers; None for nothing.
        segment_length: tokens of a segment; memories are written by complete ones.
    """

    model_type = "decoder"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        head_size: int | None = None,
        key_size: int | None = None,
        feed_forward_size: int = 2048,
        activation: str = "relu",
        positions: str = "relative",
        normalization: str = "layer",
        normalization_placement: str = "post",
        norm_epsilon: float = 1e-5,
        attention: str | Mapping[str, Any] = "softmax",
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        initializer_range: float | None = 0.02,
        adaptive_cutoffs: list[int] | None = None,
        adaptive_divisor: float = 1.0,
        memory: MemoryConfig | dict[str, Any] | None = None,
        segment_length: int = 512,
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
        self.norm_epsilon = norm_epsilon
        self.attention = attention if isinstance(attention, str) else dict(attention)
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.adaptive_cutoffs = adaptive_cutoffs or []
        self.adaptive_divisor = adaptive_divisor
        self.segment_length = segment_length
        if isinstance(memory, MemoryConfig):
            if memory.sink_tokens:
                raise ValueError(
                    f"model.memory.sink_tokens={memory.sink_tokens}: a decoder learns without them; set it to null"
                )
            memory = memory.with_short_term_length(segment_length)
            with as_model_errors():
                memory = memory.matched(num_hidden_layers, num_hidden_layers, hidden_size).to_json()
        self.memory = memory
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "feed_forward_size"):
            check_size(name, getattr(self, name))
        self.head_size = hidden_size // num_attention_heads if head_size is None else head_size
        check_size("head_size", self.head_size)
        self.key_size = self.head_size if key_size is None else key_size
        check_size("key_size", self.key_size)
        for name in ("dropout", "attention_dropout"):
            check_number(name, getattr(self, name), "0 or more and less than 1", lambda value: 0 <= value < 1)
        if initializer_range is not None:
            check_number("initializer_range", initializer_range, "more than 0, or null", lambda value: value > 0)
        check_number("norm_epsilon", norm_epsilon, "0 or more", lambda value: value >= 0)
        check_number("adaptive_divisor", adaptive_divisor, "at least 1", lambda value: value >= 1)
        for cutoff in self.adaptive_cutoffs:
            check_size("adaptive_cutoffs", cutoff)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if positions == "rotary" and self.key_size % 2:
            option = "head_size" if key_size is None else "key_size"
            raise ModelError(f"model.architecture.{option}={self.key_size}: rotary positions turn pairs; make it even")
        if attention != "softmax":
            self._check_mechanism()
        if self.key_size != self.head_size and (kept := self.memory_config) is not None and kept.keeps_key_values:
            raise ModelError(
                f"model.architecture.key_size={self.key_size}: model.memory.stores=keys_values keeps keys and values "
                f"of one width, and that of values is {self.head_size}; make them equal"
            )
        kwargs.setdefault("tie_word_embeddings", False)  # the vocabulary is one module and ties its own
        super().__init__(**kwargs)

    @property
    def memory_config(self) -> MemoryConfig | None:
        """What each layer remembers, as its own type; an unknown option in a stored one is an error."""
        return stored_memory(self.memory, self.segment_length)

    def _check_mechanism(self) -> None:
        """Make sure that attention of another kind than softmax has what it needs."""
        said = f"model.architecture.attention={self.attention}"
        if self.positions != "rotary":
            raise ModelError(f"{said}: it knows no distances; set model.architecture.positions=rotary")
        if self.attention_dropout:
            raise ModelError(f"{said}: it has no weights to drop; set model.architecture.attention_dropout=0")
        memory = self.memory_config
        if memory is not None and memory.entries:
            raise ModelError(
                f"{said}: it looks at the segment alone, and this memory is looked at by attention itself; set "
                "model/memory=none, or model.memory.short_term_length=0 with one that adds to what attention returns"
            )
        if memory is not None and memory.keeps_key_values:
            raise ModelError(
                f"{said}: a memory of keys and values is asked as softmax asks; set model.memory.stores=hidden"
            )


class DecoderLayer(GradientCheckpointingLayer):
    """Attention with its memory, then feed-forward, each with its residual sum and its norm.

    Args:
        memory: of this layer; None for none.
        mechanism: of its attention; None for softmax.
    """

    def __init__(self, sizes: BlockSizes, memory: Memory | None, mechanism: Mechanism | None) -> None:
        super().__init__()
        self.attention = Attention(sizes, mechanism)
        self.memory = memory
        self.feed_forward = FeedForward(sizes)
        self.attention_residual = Residual(sizes)
        self.feed_forward_residual = Residual(sizes)

    def forward(
        self,
        stream: Stream,
        state: Any,
        past: Tensor | None,
        encoding: Tensor,
        allowed: Tensor,
        context: SegmentContext,
        shared: Any,
        return_intermediates: bool,
    ) -> tuple[Stream, Tensor, LayerRead | None]:
        """Read a segment, or more tokens of one.

        Args:
            stream: before the layer.
            state: of the memory.
            past: what attention saw of the segment's earlier tokens, [batch, earlier, hidden].
            encoding: of positions; see `encode_positions`.
            allowed: which entries of the context each token may see; see `causal_mask`.
            context, shared: see `Memory.forward`.

        Returns:
            The stream after it, what attention saw of the segment so far, and what the memory made of it.
        """
        seen = self.attention_residual.enter(stream)
        segment = seen if past is None else torch.cat([past, seen], dim=1)
        entries = None if self.memory is None else self.memory.entries(state)
        visible = segment if entries is None else torch.cat([entries.hidden.to(segment.dtype), segment], dim=1)
        if (length := visible.shape[1]) < len(encoding):  # other layers see more
            allowed, encoding = allowed[..., -length:], encoding[-length:]
        added = attended = self.attention(seen, visible, allowed, encoding)
        read: LayerRead | None = None
        if self.memory is not None:
            context = context._replace(attend=partial(self.attention.attend_by_content, segment))
            if self.memory.keeps_key_values:
                context = context._replace(heads=self.attention.heads_of(seen, visible, allowed, encoding))
            output = self.memory(seen, state, context, shared)
            if output.context is not None:
                added = context.added(attended, output.context, self.memory.reads_segment)
            read = LayerRead.of(output, seen, attended, return_intermediates)
        stream = self.attention_residual.leave(stream, added)

        seen = self.feed_forward_residual.enter(stream)
        return self.feed_forward_residual.leave(stream, self.feed_forward(seen)), segment, read


class DecoderForCausalLM(MemoryModel):
    """A language model from scratch that reads a document segment by segment."""

    config_class = DecoderConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        memory = config.memory_config
        self.segment_length = None if memory is None else config.segment_length
        self.sizes = sizes = BlockSizes.of(config)
        self.vocabulary = (
            AdaptiveVocabulary(config.vocab_size, config.hidden_size, config.adaptive_cutoffs, config.adaptive_divisor)
            if config.adaptive_cutoffs
            else TiedVocabulary(config.vocab_size, config.hidden_size)
        )
        layers = config.num_hidden_layers
        memories: list[Memory | None] = [None] * layers
        if memory is not None:
            widths = config.hidden_size, config.num_attention_heads
            memories = [*memory.build(*widths, layers, config.segment_length, (widths[1], config.head_size))]
        self.layers = nn.ModuleList(
            DecoderLayer(sizes, own, _mechanism(config, layer)) for layer, own in enumerate(memories)
        )
        self.final_norm = sizes.new_final_norm()
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def read_segment(self, segment: SegmentToRead) -> SegmentRead:
        input_ids, state, context, cache = segment.input_ids, segment.state, segment.context, segment.cache
        length = input_ids.shape[1]
        cached = 0 if cache is None else cache.length
        real = self._real_entries(state, context)
        visible = (0 if real is None else real.shape[1]) + cached + length
        allowed = causal_mask(real, length, visible, self.device)
        rotary = self.config.positions == "rotary"
        width = self.config.key_size if rotary else self.config.hidden_size
        encoding = encode_positions(visible, width, self.config.positions, self.device)
        encoding = encoding if rotary else self.dropout(encoding)

        stream = self.sizes.begin(self.dropout(self.vocabulary.embed(input_ids) * math.sqrt(self.config.hidden_size)))
        reads, seen = [], []
        for index, layer in enumerate(self.layers):
            own = state.layers[index] if state.layers else None
            past = None if cache is None else cache.attention[index]
            told = segment.context_of(index) if state.layers else context
            stream, whole, read = layer(
                stream, own, past, encoding, allowed, told, segment.shared, segment.return_intermediates
            )
            seen.append(whole)
            if read is not None:
                reads.append(read)
        hidden = self.dropout(stream.end(self.final_norm))
        return SegmentRead(hidden, tuple(reads), tuple(seen) if segment.use_cache else None)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self.vocabulary.token_losses(hidden, targets)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.vocabulary.logits(hidden)

    def layer_memories(self) -> dict[int, Memory]:
        layers = enumerate(cast(Iterator[DecoderLayer], iter(self.layers)))
        return {number: layer.memory for number, layer in layers if layer.memory is not None}

    def sharding_units(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def positions(self) -> int | None:
        return None

    @property
    def vocabulary_size(self) -> int:
        return self.config.vocab_size

    def get_input_embeddings(self) -> nn.Module:
        vocabulary = self.vocabulary
        return vocabulary.embedding if isinstance(vocabulary, TiedVocabulary) else vocabulary

    def _real_entries(self, state: ModelState, context: SegmentContext) -> Tensor | None:
        """Which entries before the segment are real and seen, bool [batch, entries], in the layers that see most.

        None without any. All layers are written together: what is real in one is real in all.
        """
        memories = zip(self.layer_memories().values(), state.layers, strict=True)
        found = [entries.real for memory, layer in memories if (entries := memory.entries(layer)) is not None]
        return context.visible(max(found, key=lambda real: real.shape[1])) if found else None

    def _renew(self, names: set[str]) -> None:
        """They are new already: each belongs to a module that `_init_weights` has seen."""

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights and zero biases, in the memories too: there is nothing pretrained that they could disturb."""
        super()._init_weights(module)
        initialize(module, self.config.initializer_range)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            initialization.ones_(module.weight)
        if isinstance(module, nn.LayerNorm):
            initialization.zeros_(module.bias)
        if isinstance(module, Memory):
            module.reset_numbers()
        if isinstance(module, Attention) and not module.rotary:
            initialization.zeros_(module.content_bias)
            initialization.zeros_(module.distance_bias)


def _mechanism(config: DecoderConfig, layer: int) -> Mechanism | None:
    """That of a layer's attention; None for softmax."""
    if config.attention == "softmax":
        return None
    sizes = config.hidden_size, config.num_attention_heads, config.key_size, config.segment_length
    return build_mechanism(config.attention, AttentionShape(*sizes, causal=True, layer=layer))


def causal_mask(real: Tensor | None, queries: int, length: int, device: torch.device) -> Tensor:
    """Which entries of a context the last tokens of it may see, bool [batch or 1, 1, queries, length].

    Args:
        real: the context begins with entries of a memory, of which only these may be seen, bool [batch, entries].
        queries: how many tokens look.
        length: of the context.
    """
    entries = torch.arange(length, device=device)
    causal = entries <= entries[length - queries :].unsqueeze(-1)
    if real is None:
        return causal[None, None]
    return F.pad(real, (0, length - real.shape[1]), value=True)[:, None, None, :] & causal


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
