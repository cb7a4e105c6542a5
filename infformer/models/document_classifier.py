"""A classifier on top of a language model, which reads a document of any length with its memory.

What the head sees goes from segment to segment beside what the memories hold: the last hidden state of a document, and
the maximum and the mean of all (concat pooling in ULMFiT, Howard & Ruder, arXiv 1801.06146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from infformer.data.segments import IGNORE_INDEX
from infformer.errors import ModelError
from infformer.memory.memory import Memory
from infformer.memory.options import MemoryConfig
from infformer.memory.state import MemoryState, ModelState
from infformer.models.base import MemoryModel
from infformer.models.block import initialize
from infformer.models.decoder import DecoderForCausalLM
from infformer.models.encoder import losses_of_classes
from infformer.models.second_backward import refuse_second_backward
from infformer.models.segment_read import MemoryModelOutput
from infformer.options import check_at_least, check_finite

HEADS = ("batch_norm", "plain")


@dataclass
class HeadConfig:
    """What stands on top of a language model and tells classes apart."""

    kind: str | None = None
    """`batch_norm`: ULMFiT's, two linear maps with ReLU between them, each behind batch norm and dropout; `plain`: the
    same without batch norm. Null: no head, and the first tokens of the vocabulary stand for the classes."""
    hidden_size: int = 50
    """Width between its two maps."""
    dropout: float = 0.1
    """Of what each of them sees."""

    def __post_init__(self) -> None:
        check_finite("model.head.", self)
        if self.kind is not None and self.kind not in HEADS:
            raise ValueError(f"model.head.kind={self.kind}: choose {' or '.join(HEADS)}, or null for no head")
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if self.kind is None and value != option.default:
                raise ValueError(f"model.head.{option.name}={value}: there is no head; set model.head.kind= too")
        check_at_least(1, "model.head.", self, "hidden_size")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.head.dropout={self.dropout}: must be at least 0 and less than 1")


class DocumentClassifierConfig(PreTrainedConfig):
    """Configuration of a `DocumentClassifier`.

    Args:
        reader: that of the language model.
        labels: the names of the classes, in the order of their numbers.
        head_kind, head_hidden_size, head_dropout: the options of a `HeadConfig`.
    """

    model_type = "document_classifier"

    def __init__(
        self,
        reader: PreTrainedConfig | dict[str, Any] | None = None,
        labels: Sequence[str] = ("0", "1"),
        head_kind: str = "plain",
        head_hidden_size: int = 50,
        head_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.reader: Any = AutoConfig.for_model(**reader) if isinstance(reader, dict) else reader
        if self.reader is None:
            self.reader = AutoConfig.for_model("decoder")
        self.labels = list(labels)
        self.head_kind = head_kind
        self.head_hidden_size = head_hidden_size
        self.head_dropout = head_dropout
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.reader, token, None))
        kwargs.setdefault("tie_word_embeddings", self.reader.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def classes(self) -> int:
        """How many there are."""
        return len(self.labels)

    @property
    def memory_config(self) -> MemoryConfig | None:
        """What a layer of the language model remembers."""
        return self.reader.memory_config

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The sizes of the language model."""
        return getattr(self.reader, "backbone", self.reader).get_text_config(*args, **kwargs)


@dataclass(frozen=True)
class PoolState(MemoryState):
    """What has been pooled of a document so far."""

    last: Tensor
    """The hidden state of its last token, [batch, hidden]."""
    maximum: Tensor
    """Of the hidden states of all tokens, [batch, hidden]."""
    total: Tensor
    """Their sum, [batch, hidden]."""
    tokens: Tensor
    """How many there are, int64 [batch]."""

    @classmethod
    def empty(cls, batch: int, width: int, device: torch.device) -> Self:
        """Nothing has been read in any row."""
        last, maximum, total = torch.zeros(3, batch, width, device=device)
        return cls(last, maximum, total, torch.zeros(batch, dtype=torch.int64, device=device))

    def after(self, hidden: Tensor, lengths: Tensor | None) -> PoolState:
        """With the next hidden states, [batch, length, hidden], of which so many are real in each row; by default all.

        However a document is cut up, it is the same, but for the rounding of the sum.
        """
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if lengths is None:
            lengths = torch.full_like(self.tokens, hidden.shape[1])
        padding = (torch.arange(hidden.shape[1], device=hidden.device) >= lengths.unsqueeze(-1)).unsqueeze(-1)
        reads, began = (lengths > 0).unsqueeze(-1), (self.tokens > 0).unsqueeze(-1)
        last = hidden.take_along_dim((lengths - 1).clamp(min=0).view(-1, 1, 1), dim=1).squeeze(1)
        maximum = hidden.masked_fill(padding, -torch.inf).amax(dim=1)
        maximum = torch.where(began, torch.maximum(self.maximum, maximum), maximum)
        return PoolState(
            last=torch.where(reads, last, self.last),
            maximum=torch.where(reads, maximum, self.maximum),
            total=self.total + hidden.masked_fill(padding, 0).sum(dim=1),
            tokens=self.tokens + lengths,
        )

    def vectors(self) -> Tensor:
        """What the head sees: last, maximum and mean side by side, [batch, 3 · hidden]."""
        return torch.cat([self.last, self.maximum, self.total / self.tokens.clamp(min=1).unsqueeze(-1)], dim=-1)


@dataclass(frozen=True)
class DocumentState(ModelState):
    """What a language model remembers of a document, and what has been pooled of it."""

    pool: PoolState


class DocumentClassifier(MemoryModel):
    """Says which class a document is of, from all that a language model has made of it, segment by segment.

    A target, the class, stands anywhere in the segment in which the document is asked for. With batch norm all rows
    that are asked in training are normalised together: whoever trains it asks all rows in one segment.

    Args:
        reader: the language model; a new one if not given.
    """

    config_class = DocumentClassifierConfig
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = {"maps", "norms.*.weight", "norms.*.bias", "norms.*.running_*"}  # noqa: RUF012, as it is declared

    def __init__(self, config: DocumentClassifierConfig, reader: MemoryModel | None = None) -> None:
        super().__init__(config)
        self.reader: MemoryModel = AutoModelForCausalLM.from_config(config.reader) if reader is None else reader
        self.segment_length = self.reader.segment_length
        self.width: int = config.get_text_config().hidden_size
        sizes = (3 * self.width, config.head_hidden_size), (config.head_hidden_size, config.classes)
        has_norm = config.head_kind == "batch_norm"
        self.norms = nn.ModuleList(nn.BatchNorm1d(inputs) if has_norm else nn.Identity() for inputs, _ in sizes)
        self.maps = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in sizes)
        self.dropout = nn.Dropout(config.head_dropout)
        self.post_init()
        self._freeze()

    @classmethod
    def on_top(cls, reader: MemoryModel, head: HeadConfig, labels: Sequence[str]) -> Self:
        """A new head on top of a language model.

        Args:
            labels: the names of the classes, in the order of their numbers.
        """
        for module in reader.modules():  # what is loaded must not be initialised again
            setattr(module, "_is_hf_initialized", True)  # noqa: B010, transformers' own mark
        options = {f"head_{option.name}": getattr(head, option.name) for option in fields(head)}
        model = cls(DocumentClassifierConfig(reader.config, labels, **options), reader)
        model.maps.to(reader.device)
        model.norms.to(reader.device)
        return model

    def forward(  # type: ignore[override] # a document has one class, and no labels by token
        self,
        input_ids: Tensor,
        state: DocumentState | None = None,
        reset: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_logits: bool | None = None,
        return_intermediates: bool = False,
        **options: Any,
    ) -> MemoryModelOutput:
        """Read one segment of each row, or the next tokens of one; arguments are those of `MemoryModel.forward`.

        Args:
            targets: the class of each row that is asked for now, at one of its places, [batch, length], and -100.
        """
        begun, lengths = self._begin(input_ids, state, reset, None, lengths, attention_mask, least=0)
        assert isinstance(begun, DocumentState)
        read = self.reader(
            input_ids, state=begun, lengths=lengths, return_logits=False, return_intermediates=True, **options
        )
        pool = begun.pool.after(read.hidden, lengths)
        refuse_second_backward(read.hidden, pool)
        hidden = pool.vectors().unsqueeze(1)
        output = MemoryModelOutput(
            state=DocumentState(read.state.layers, pool),
            auxiliary_losses=read.auxiliary_losses,
            intermediates=read.intermediates if return_intermediates else None,
            hidden=hidden if return_intermediates else None,
            segment_cache=read.segment_cache,
        )
        wants_logits = return_logits or (return_logits is None and targets is None)
        scores = self.logits(hidden) if wants_logits or targets is not None else None
        output.logits = scores if wants_logits else None
        if targets is not None and scores is not None:
            output.token_losses = losses_of_classes(scores, targets)
            asked = (targets != IGNORE_INDEX).sum().clamp(min=1)
            output.loss = output.token_losses.sum() / asked + sum(read.auxiliary_losses.values())
        return output

    def generate(self, *arguments: Any, **options: Any) -> Any:
        """Refused: a classifier writes no text.

        Raises:
            ModelError: always.
        """
        raise ModelError("a classifier writes no text; give the language model that it was made from")

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the classes, [batch, 1, classes], of what has been pooled, [batch, 1, 3 · hidden]."""
        if self.training and len(hidden) == 1 and self.config.head_kind == "batch_norm":
            raise ModelError("batch norm wants two documents side by side at least in training; or take a plain head")
        (first_norm, second_norm), (first, second) = self.norms, self.maps
        inner = torch.relu(first(self.dropout(first_norm(hidden.squeeze(1)))))
        return second(self.dropout(second_norm(inner))).unsqueeze(1)

    def initial_state(self, batch: int) -> DocumentState:
        layers = self.reader.initial_state(batch).layers
        return DocumentState(layers, PoolState.empty(batch, self.width, self.device))

    def layer_memories(self) -> dict[int, Memory]:
        return self.reader.layer_memories()

    def sharding_units(self) -> list[nn.Module]:
        return self.reader.sharding_units()

    def _checkpointing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.reader._checkpointing(function)

    def compile_layers(self) -> None:
        self.reader.compile_layers()

    @property
    def has_memory(self) -> bool:
        """What has been pooled is carried on, also where the language model remembers nothing."""
        return True

    @property
    def positions(self) -> int | None:
        return self.reader.positions

    @property
    def vocabulary_size(self) -> int:
        return self.reader.vocabulary_size

    def get_input_embeddings(self) -> nn.Module:
        return self.reader.get_input_embeddings()

    def _freeze(self) -> None:
        """What only scores tokens has nothing to learn from."""
        self.reader._freeze()
        reader: Any = self.reader
        scores = reader.vocabulary if isinstance(reader, DecoderForCausalLM) else reader.get_output_embeddings()
        read = {id(parameter) for parameter in self.get_input_embeddings().parameters()}
        for parameter in scores.parameters():
            if id(parameter) not in read or parameter.dim() == 1:
                parameter.requires_grad_(False)

    def _renew(self, names: set[str]) -> None:
        own = {name.removeprefix("reader.") for name in names}
        self.reader._renew(own)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize(module)


AutoConfig.register(DocumentClassifierConfig.model_type, DocumentClassifierConfig)
AutoModelForCausalLM.register(DocumentClassifierConfig, DocumentClassifier)
