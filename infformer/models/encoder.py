"""An encoder that reads a text at once, both ways, and says which class it is of; any mechanism of attention.

Texts may come in pairs, as in Long-Range Arena's retrieval: the same encoder reads both, and the head sees what it made
of each. Padding is a token of its own, so a text says itself where it ends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from infformer.data.segments import IGNORE_INDEX
from infformer.errors import ModelError
from infformer.memory.memory import Memory, split_heads
from infformer.models.architecture_options import check_choice, check_number, check_size
from infformer.models.base import MemoryModel
from infformer.models.block import (
    BlockSizes,
    FeedForward,
    Residual,
    Stream,
    encode_positions,
    initialize,
)
from infformer.models.mechanisms import AttentionShape, Mechanism, build_mechanism
from infformer.models.segment_read import SegmentRead, SegmentToRead

CHOICES: dict[str, Collection[str]] = {
    "positions": ("learned", "sinusoidal"),
    "pooling": ("mean", "first"),
    "normalization": ("layer", "rms"),
    "normalization_placement": ("post", "pre", "dual"),
    "activation": ACT2FN,
}


class ClassifierConfig(PreTrainedConfig):
    """Sizes and choices of a `TextClassifier`.

    Args:
        vocab_size: tokens that the model knows, padding among them.
        classes: how many there are.
        texts: 1, or 2 for pairs, whose texts are the two halves of what is read.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        num_attention_heads: heads of each attention.
        head_size: width of a head; by default the heads divide the hidden size.
        feed_forward_size: width inside the feed-forward part.
        head_hidden_size: width inside the head; by default as wide as the feed-forward part.
        activation: of the feed-forward part, by its name in transformers.
        attention: a mechanism by its name, or its name as `kind` with its own options: see `models.mechanisms`.
        longest: positions of the longest text.
        positions: vectors of the places, `learned` or `sinusoidal`.
        pooling: what the head sees of a text, the `mean` over its tokens, or a `first` one that stands before it.
        normalization: `layer` or `rms`.
        normalization_placement: `post`, after the residual sum; `pre`, before each part;
            `dual`, after it, and with the norm of the sum of all parts at the end (ResiDual).
        dropout: of embeddings, of what each part adds to the residual stream, and inside the feed-forward part.
        initializer_range: standard deviation of new weights; None: 1/√inputs of each matrix.
        pad_token_id: the token of padding, which stands behind a text.
    """

    model_type = "classifier"
    memory = memory_config = None  # a text is read at once

    def __init__(
        self,
        vocab_size: int = 257,
        classes: int = 2,
        texts: int = 1,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        head_size: int | None = None,
        feed_forward_size: int = 128,
        head_hidden_size: int | None = None,
        activation: str = "gelu_pytorch_tanh",
        attention: str | Mapping[str, Any] = "softmax",
        longest: int = 1024,
        positions: str = "learned",
        pooling: str = "mean",
        normalization: str = "layer",
        normalization_placement: str = "pre",
        dropout: float = 0.1,
        initializer_range: float | None = None,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.classes = classes
        self.texts = texts
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            check_size(name, getattr(self, name))
        self.head_size = hidden_size // num_attention_heads if head_size is None else head_size
        self.feed_forward_size = feed_forward_size
        self.head_hidden_size = feed_forward_size if head_hidden_size is None else head_hidden_size
        self.activation = activation
        self.attention = attention if isinstance(attention, str) else dict(attention)
        self.longest = longest
        self.positions = positions
        self.pooling = pooling
        self.normalization = normalization
        self.normalization_placement = normalization_placement
        self.dropout = dropout
        self.initializer_range = initializer_range
        for name in (
            "vocab_size", "classes", "head_size", "feed_forward_size", "head_hidden_size", "longest",
        ):  # fmt: skip
            check_size(name, getattr(self, name))
        if texts not in (1, 2):
            raise ModelError(f"model.architecture.texts={texts}: give 1, or 2 for pairs of texts")
        check_number("dropout", dropout, "0 or more and less than 1", lambda value: 0 <= value < 1)
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": False}
        super().__init__(**kwargs)


class EncoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, with norms before or after each."""

    def __init__(self, sizes: BlockSizes, mechanism: Mechanism) -> None:
        super().__init__()
        self.heads = sizes.heads
        width = sizes.heads * sizes.head_size
        self.query = nn.Linear(sizes.hidden_size, width, bias=False)
        self.key = nn.Linear(sizes.hidden_size, width, bias=False) if mechanism.has_keys else None
        self.value = nn.Linear(sizes.hidden_size, width, bias=False)
        self.output = nn.Linear(width, sizes.hidden_size, bias=False)
        self.mechanism = mechanism
        self.attention_residual = Residual(sizes)
        self.feed_forward = FeedForward(sizes)
        self.feed_forward_residual = Residual(sizes)

    def forward(self, stream: Stream, real: Tensor) -> Stream:
        """The stream after a layer, of positions that are real or not, bool [batch, length]."""
        seen = self.attention_residual.enter(stream)
        query, value = (split_heads(part(seen), self.heads) for part in (self.query, self.value))
        key = query if self.key is None else split_heads(self.key(seen), self.heads)
        attended = self.mechanism(seen, query, key, value, real)
        stream = self.attention_residual.leave(stream, self.output(attended.transpose(1, 2).flatten(2)))
        return self.feed_forward_residual.leave(stream, self.feed_forward(self.feed_forward_residual.enter(stream)))


class TextClassifier(MemoryModel):
    """Says of each text, or pair of texts, which class it is of.

    It is read as one segment with one target, the class, at any position. Nothing goes on to the next segment.
    """

    config_class = ClassifierConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__(config)
        self.segment_length = None
        others = {"key_size": config.head_size, "norm_epsilon": 1e-5, "attention_dropout": 0.0}
        self.sizes = sizes = BlockSizes.of(config, **others)
        first = config.pooling == "first"
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.first = nn.Parameter(torch.zeros(config.hidden_size)) if first else None
        if config.positions == "learned":
            self.place = nn.Embedding(config.longest + first, config.hidden_size)
        self.layers = nn.ModuleList()
        for layer in range(config.num_hidden_layers):
            shape = AttentionShape(
                config.hidden_size, sizes.heads, sizes.head_size, config.longest + first, causal=False, layer=layer
            )
            self.layers.append(EncoderLayer(sizes, build_mechanism(config.attention, shape)))
        self.final_norm = sizes.new_final_norm()
        self.dropout = nn.Dropout(config.dropout)
        self.head_input = nn.Linear(config.texts * config.hidden_size, config.head_hidden_size)
        self.head_output = nn.Linear(config.head_hidden_size, config.classes)
        self.post_init()

    def read_segment(self, segment: SegmentToRead) -> SegmentRead:
        input_ids = segment.input_ids
        texts = self.config.texts
        if input_ids.shape[1] % texts or input_ids.shape[1] > texts * self.config.longest:
            raise ModelError(
                f"input_ids= has {input_ids.shape[1]} tokens: give {texts} text{'s' * (texts - 1)} of at most "
                f"{self.config.longest} each (model.architecture.longest), equally long with their padding"
            )
        pooled = self.encode(input_ids.unflatten(1, (texts, -1)).flatten(0, 1))
        return SegmentRead(pooled.unflatten(0, (-1, texts)).flatten(1).unsqueeze(1), (), None)

    def encode(self, input_ids: Tensor) -> Tensor:
        """What the head sees of texts [batch, length], [batch, hidden]."""
        hidden, real = self.embedding(input_ids), input_ids != self.config.pad_token_id
        if self.first is not None:
            hidden = torch.cat([self.first.expand(len(hidden), 1, -1), hidden], dim=1)
            real = F.pad(real, (1, 0), value=True)
        length = hidden.shape[1]
        if self.config.positions == "learned":
            places = self.place.weight[:length]
        else:
            # Those of distances, which begin with the longest: turned round they are places.
            places = encode_positions(length, self.config.hidden_size, "relative", hidden.device).flip(0)
        stream = self.sizes.begin(self.dropout(hidden + places))
        for layer in self.layers:
            stream = layer(stream, real)
        hidden = stream.end(self.final_norm)
        if self.first is not None:
            return hidden[:, 0]
        weight = real.unsqueeze(-1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def segment_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return losses_of_classes(self.logits(hidden), targets)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the classes, [batch, 1, classes], of what the head sees, [batch, 1, texts · hidden]."""
        return self.head_output(self.dropout(torch.relu(self.head_input(hidden))))

    def layer_memories(self) -> dict[int, Memory]:
        return {}

    def sharding_units(self) -> list[nn.Module]:
        return list(self.layers)

    @property
    def positions(self) -> int | None:
        return self.config.texts * self.config.longest

    @property
    def vocabulary_size(self) -> int:
        return self.config.vocab_size

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def _renew(self, names: set[str]) -> None:
        """There are no memories."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module, self.config.initializer_range)


def losses_of_classes(scores: Tensor, targets: Tensor) -> Tensor:
    """Nats of the class of each row that has a target, at the target's place, [batch, length]; 0 elsewhere.

    Args:
        scores: of the classes, [batch, 1, classes].
        targets: classes, [batch, length], and -100.
    """
    is_target = targets != IGNORE_INDEX
    labels = targets.masked_fill(~is_target, 0).amax(dim=1)
    return F.cross_entropy(scores.squeeze(1).float(), labels, reduction="none").unsqueeze(1) * is_target


AutoConfig.register(ClassifierConfig.model_type, ClassifierConfig)
AutoModelForCausalLM.register(ClassifierConfig, TextClassifier)
