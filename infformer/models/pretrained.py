"""Any Hugging Face causal language model with memories beside its attentions.

The backbone stays the stock class with its stock parameter names. A forward hook on each chosen attention module adds
what the memory returns to what the attention returns. What the memory is told stands beside it for the time of a
forward pass, so that no layer of a foreign library has to hand it on; a recomputed layer (gradient checkpointing) is
told again what it was told the first time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from infformer.errors import ModelError, UserError, as_model_errors, in_one_line
from infformer.memory.memory import KeyValues, Memory, SegmentContext
from infformer.memory.options import MemoryConfig, choose_layers
from infformer.memory.state import MemoryState, ModelState
from infformer.models.adapters import LoraConfig, add_adapters, fit_adapters, freeze_all_but_adapters, merge_adapters
from infformer.models.backbone import (
    CACHE_ARGUMENTS,
    Rotation,
    cache_argument,
    find_attentions,
    find_layers,
    find_rotations,
    head,
    is_causal,
    is_head_known,
    key_value_shape,
    looked_at,
    plain_head,
)
from infformer.models.base import MemoryModel, stored_memory
from infformer.models.chunked_loss import cross_entropy
from infformer.models.linear_loss import can_fuse, linear_token_losses
from infformer.models.listening import Ear
from infformer.models.past import Past, PastLayer
from infformer.models.quantization import adopt_quantization, check_quantized, copy_marks, is_quantized
from infformer.models.segment_cache import copy_cache
from infformer.models.segment_read import LayerRead, SegmentRead, SegmentToRead

logger = logging.getLogger(__name__)


class InfformerConfig(PreTrainedConfig):
    """Configuration of `InfformerForCausalLM`.

    Args:
        backbone: the stock model's configuration.
        memory: what a layer remembers; None for a model without memory.
        memory_layers: indices of the layers that have one, from 0, or `middle:6`, six in the middle; None for all.
        segment_length: tokens of a segment; memories are written by complete ones.
        rotated_layers: layers of the backbone whose keys are rotated by their places; None where nobody has to know.
        head_is_known: the backbone's scores are those of `models.backbone.head`.
        lora: the adapters in the backbone; None for none.
        backbone_dtype: of the backbone's weights, which are loaded in it again; None for float32.
    """

    model_type = "infformer"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}

    def __init__(
        self,
        backbone: PreTrainedConfig | dict[str, Any] | None = None,
        memory: MemoryConfig | dict[str, Any] | None = None,
        memory_layers: list[int] | str | None = None,
        segment_length: int = 512,
        rotated_layers: list[int] | None = None,
        head_is_known: bool = True,
        lora: LoraConfig | dict[str, Any] | None = None,
        backbone_dtype: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone, dict):
            backbone = AutoConfig.for_model(**backbone)
        self.backbone = backbone if backbone is not None else AutoConfig.for_model("gpt2")
        if isinstance(memory_layers, str):
            with as_model_errors():
                memory_layers = choose_layers(memory_layers, self.backbone.num_hidden_layers)
        if isinstance(memory, MemoryConfig):
            memory = _matched(memory.beside_pretrained(segment_length), self.backbone, memory_layers).to_json()
        self.memory = memory
        self.segment_length = segment_length
        self.memory_layers = memory_layers
        self.rotated_layers = rotated_layers
        self.head_is_known = head_is_known
        self.lora = lora.to_json() if isinstance(lora, LoraConfig) else lora
        self.backbone_dtype = backbone_dtype
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.backbone, token, None))
        kwargs.setdefault("tie_word_embeddings", getattr(self.backbone, "tie_word_embeddings", False))
        # transformers hands its own choice on to the backbone, also where it is none: attention without a causal mask.
        kwargs.setdefault("attn_implementation", self.backbone._attn_implementation)
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Tokens that the backbone knows."""
        return self.backbone.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.backbone.vocab_size = size

    @property
    def memory_config(self) -> MemoryConfig | None:
        """What a layer remembers, as its own type; an unknown option in a stored one is an error."""
        return stored_memory(self.memory, self.segment_length)

    @property
    def lora_config(self) -> LoraConfig | None:
        """The adapters in the backbone, as their own type.

        Raises:
            ModelError: they are not such as this version knows.
        """
        try:
            return None if self.lora is None else LoraConfig(**self.lora)
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"the adapters in this model's config.json are not such as this version knows: {error}"
            ) from error


def _matched(memory: MemoryConfig, backbone: PreTrainedConfig, layers: list[int] | None) -> MemoryConfig:
    """The same with its size chosen, if that is said by the floats that it holds.

    Raises:
        ModelError: there is no such size.
    """
    if getattr(memory, "match_floats", None) is None:
        return memory
    (heads, width), depth = key_value_shape(backbone), backbone.num_hidden_layers
    with as_model_errors():
        return memory.matched(depth if layers is None else len(layers), depth, 2 * heads * width)


@dataclass
class _LayerCall:
    """What one layer's memory is told in one forward pass, and what it makes of it."""

    memory: Memory
    state: MemoryState
    context: SegmentContext
    shared: Any
    return_intermediates: bool
    past: Past | None
    """What attention sees before the segment; None without a short-term memory."""
    table: Tensor | None = None
    """Of the places of the past and then of the segment, where the layer is listened to; see `Rotation.table`."""
    read: LayerRead | None = None
    over: bool = False
    """The pass is over: a recomputed layer has nobody to tell what it made."""


class _Attachment:
    """A memory beside an attention module, with what it is told for the time of a forward pass.

    Args:
        memories: of the model.
        place: of this one among them.
        attention: of the layer.
        layer: its number.
        rotation: of its keys; None where they are not rotated, or nobody has to know.
    """

    def __init__(
        self, memories: nn.ModuleList, place: int, attention: nn.Module, layer: int, rotation: Rotation | None
    ) -> None:
        self.memories = memories
        self.place = place
        self.layer = layer
        self.rotation = rotation
        self.ear = Ear(attention) if self.memory.keeps_key_values else None
        self.call: _LayerCall | None = None
        attention.register_forward_hook(self._add_memory, with_kwargs=True)

    @property
    def memory(self) -> Memory:
        """What stands in its place now: peft's `modules_to_save` puts something there that trains a copy."""
        return cast(Memory, self.memories[self.place])

    def _add_memory(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the attention: add the memory's context to its output, and write the segment."""
        call = self.call
        if call is None:  # the backbone used on its own, or wrapped a second time
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        attended, *others = output
        context = call.context
        if self.ear is not None:
            heads, pair = self.ear.heads(self.rotation, call.table, 0 if call.past is None else call.past.places)
            context = context._replace(heads=heads, key_values=pair)
        elif call.past is not None and context.complete is not None:
            context = context._replace(key_values=call.past.key_values(self.layer))
        read = call.memory(hidden, call.state, context, call.shared)
        if not call.over:
            call.read = LayerRead.of(read, hidden, attended, call.return_intermediates)
        if read.context is None:
            return output
        return (context.added(attended, read.context, call.memory.reads_segment), *others)


@contextmanager
def _told(attachments: Sequence[_Attachment], calls: Sequence[_LayerCall | None]) -> Iterator[None]:
    """Within it, each memory is told its part of a forward pass."""
    before = [attachment.call for attachment in attachments]
    ears = [attachment.ear for attachment in attachments if attachment.ear is not None]
    configs = [ear.listen() for ear in ears]
    for attachment, call in zip(attachments, calls, strict=True):
        attachment.call = call
    try:
        yield
    finally:
        for ear, config in zip(ears, configs, strict=True):
            ear.attention.config = config
        for attachment, call in zip(attachments, before, strict=True):
            attachment.call = call


@contextmanager
def _one_text_a_row(device: torch.device) -> Iterator[None]:
    """Within it transformers does not look for several texts in a row, for which it would wait for the device."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        yield
        return
    answers = {"find_packed_sequence_indices": lambda position_ids: None, "is_tracing": lambda *tensors: False}
    before = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    for name in before:
        setattr(masking_utils, name, answers[name])
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masking_utils, name, function)


def _see_less(
    layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hook before the attention of a layer: its own mask, if it sees fewer tokens before a segment than others do."""
    past = next((kwargs[name] for name in CACHE_ARGUMENTS if isinstance(kwargs.get(name), Past)), None)
    if past is None or cast(PastLayer, past.layers[layer]).places == past.places:
        return None
    return args, {**kwargs, "attention_mask": past.mask_in(layer, kwargs["attention_mask"])}


class InfformerForCausalLM(MemoryModel):
    """A stock causal language model with memories beside its attentions.

    `backbone` is the stock model, `memories` the learned parts of the memories, one for each layer that has one.
    """

    config_class = InfformerConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = {"memories", "lora_A", "lora_B"}  # noqa: RUF012, transformers declares it as an attribute
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InfformerConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone) if backbone is None else backbone
        self._cache_argument = str(cache_argument(self.backbone))
        memory = config.memory_config
        self.memories = nn.ModuleList()
        self._attachments: list[_Attachment] = []
        self._seen = 0  # keys and values before a segment
        self.segment_length: int | None = None
        if memory is not None:
            with as_model_errors():
                memory.check_pretrained()
            self.check_segment_length(config.segment_length, "training.segment_length")
            self.segment_length = config.segment_length
            self._seen = memory.key_values
            self._check_places(memory, config.segment_length)
            window = getattr(config.backbone, "sliding_window", None) or None  # Qwen2-MoE says 0 for none
            if memory.keeps_key_values and window is not None and window < config.segment_length:
                raise ModelError(
                    f"training.segment_length={config.segment_length}: a segment in pieces loses its first keys where "
                    f"attention sees {window} tokens, so model.memory.stores=keys_values cannot write it; take at most "
                    f"{window}"
                )
            attentions = find_attentions(self.backbone)
            layers = list(range(len(attentions))) if config.memory_layers is None else config.memory_layers
            if len(set(layers)) < len(layers) or not set(layers) <= set(range(len(attentions))):
                raise ModelError(
                    f"model.memory_layers={layers}: name each layer at most once; this backbone has layers 0 to "
                    f"{len(attentions) - 1}"
                )
            memories = memory.build_beside(
                layers,
                config.segment_length,
                hidden_size=config.backbone.hidden_size,
                heads=config.backbone.num_attention_heads,
                key_values=key_value_shape(config.backbone),
                depth=len(attentions),
            )
            self.memories.extend(memories.values())
            if self._seen:
                self.layers_see_alike = set(config.rotated_layers or ()) != set(range(len(attentions)))
                lengths = {getattr(memories.get(layer), "length", 0) for layer in range(len(attentions))}
                if self.layers_see_alike and len(lengths) > 1:
                    raise ModelError(
                        f"model.memory_layers={config.memory_layers}: a {config.backbone.model_type!r} knows places by "
                        "distances that all layers share, so that all must see equally many tokens; set it to null"
                    )
                for layer, attention in enumerate(attentions):
                    attention.register_forward_pre_hook(partial(_see_less, layer), with_kwargs=True)
            for place, layer in enumerate(memories):
                is_rotated = layer in (config.rotated_layers or ())
                rotation = Rotation(self.backbone, attentions[layer], layer) if is_rotated else None
                self._attachments.append(_Attachment(self.memories, place, attentions[layer], layer, rotation))
        self.post_init()
        if (lora := config.lora_config) is not None:
            add_adapters(self.backbone, lora)

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | os.PathLike[str],
        memory: MemoryConfig | None = None,
        memory_layers: list[int] | str | None = None,
        segment_length: int = 512,
        lora: LoraConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put memories beside the attentions of a pretrained model; until trained, they change nothing.

        Args:
            backbone: a model, a folder, or the name of a model on the hub.
            memory: what a layer remembers; None wraps the model without any memory.
            memory_layers: layers that get one, a list or `middle:6`; all if not given.
            segment_length: tokens of a segment; memories are written by complete ones.
            lora: adapters for the backbone, which then alone of it are trained.
            kwargs: for the backbone's `from_pretrained`; its weights come in float32 unless there is a `dtype`.

        Raises:
            ModelError: there is no such model, or it is not one that a memory can be put beside.
        """
        if not isinstance(memory, MemoryConfig | None):
            raise ModelError(
                f"memory={memory}: give its options, such as LongTermMemoryConfig() of infformer, or None for none"
            )
        if isinstance(backbone, str | os.PathLike):
            from infformer.models.folders import load_config, load_weights, model_folder  # it asks the Auto classes

            folder = model_folder(os.fspath(backbone))
            backbone = load_weights(AutoModelForCausalLM, load_config(folder, "backbone"), folder, "backbone", **kwargs)
        backbone = _checked(backbone)
        # What is loaded must not be initialised again by the composite model.
        for module in backbone.modules():
            setattr(module, "_is_hf_initialized", True)  # noqa: B010, transformers' own mark
        config = InfformerConfig(
            backbone.config,
            memory,
            memory_layers,
            segment_length,
            head_is_known=is_head_known(backbone),
            lora=lora,
            backbone_dtype=None if backbone.dtype == torch.float32 else str(backbone.dtype).removeprefix("torch."),
            attn_implementation=backbone.config._attn_implementation,
        )
        try:
            if (own := config.memory_config) is not None and (own.key_values or own.keeps_key_values):
                config.rotated_layers = find_rotations(backbone, move=bool(own.key_values))
            model = cls(config, backbone)
            model.memories.to(backbone.device)
            with looked_at(backbone):
                model(torch.zeros(1, 1, dtype=torch.int64, device=backbone.device))
        except UserError:
            raise
        except Exception as error:  # whatever an attention of an unusual kind makes of it
            raise ModelError(
                f"backbone={type(backbone).__name__}: this memory cannot stand beside such attentions; choose "
                "model/memory=long_term, which asks least of them, or another backbone such as Llama "
                f"({in_one_line(error):.300})"
            ) from error
        if backbone.generation_config is not None:
            model.generation_config = backbone.generation_config
        if any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules()):
            # Layers that are computed anew have to be told again what they remember.
            model.checkpoint_activations()
        adopt_quantization(model, backbone)
        return model

    def stock_backbone(self) -> PreTrainedModel:
        """The backbone as a stock model; what its adapters have learned is added to its weights, here too.

        Raises:
            ModelError: these are quantised.
        """
        if self.config.lora is not None:
            if is_quantized(self):
                raise ModelError(
                    "what adapters have learned cannot be added to weights of four or eight bits without loss; save "
                    "memories and adapters alone (save_memories, scripts/export.py --what memories), and attach them "
                    "to the backbone in float32"
                )
            merge_adapters(self.backbone)
            self.config.lora = None
        return self.backbone

    def read_segment(self, segment: SegmentToRead) -> SegmentRead:
        if any(attachment.call is not None for attachment in self._attachments):
            raise ModelError("this model is reading a segment already, perhaps in another thread: let it end first")
        input_ids, use_cache = segment.input_ids, segment.use_cache
        kept = None if segment.cache is None else copy_cache(segment.cache.attention)
        past, options = None, {self._cache_argument: kept, "use_cache": use_cache}
        is_heard = any(attachment.ear for attachment in self._attachments)
        tables = self._tables() if is_heard or (self._seen and kept is None) else {}
        if self._seen:
            past = self._past(segment.state, segment.context, tables) if kept is None else cast(Past, kept)
            options |= {self._cache_argument: past, "attention_mask": past.visible(input_ids.shape[1])}
        calls = []
        for number, (attachment, layer) in enumerate(zip(self._attachments, segment.state.layers, strict=True)):
            own = segment.context_of(number)
            table = None if attachment.rotation is None else tables.get(attachment.rotation.kind)
            calls.append(
                _LayerCall(attachment.memory, layer, own, segment.shared, segment.return_intermediates, past, table)
            )
        with _told(self._attachments, calls), _one_text_a_row(input_ids.device):
            if self.config.head_is_known:
                read = self.backbone.base_model(input_ids, **options)
                hidden = read.last_hidden_state
            else:
                read = self.backbone(input_ids, **options)
                hidden = read.logits
        reads = tuple(cast(LayerRead, call.read) for call in calls)
        for call in calls:
            call.read, call.over = None, True
        if past is not None and use_cache:
            past.keep()
        return SegmentRead(hidden, reads, read[self._cache_argument] if use_cache else None)

    def _past(self, state: ModelState, context: SegmentContext, tables: dict[str, Tensor]) -> Past:
        """What the short-term memories let attention see before a segment.

        Their M tokens have the places 0 … M − 1, however long ago the document began, and those of the segment the
        places M … M + T − 1.
        """
        found: dict[int, PastLayer] = {}
        for attachment, layer in zip(self._attachments, state.layers, strict=True):
            rotation = attachment.rotation
            key_values, real = cast(tuple[KeyValues, Tensor], attachment.memory.key_values(layer))
            table = None if rotation is None else tables[rotation.kind][:, :, self._seen - real.shape[1] :]
            found[attachment.layer] = PastLayer(key_values, rotation, table, context.visible(real))
        nothing = KeyValues(*(part[:, :, :0] for part in key_values))
        layers = [
            found.get(layer) or PastLayer(nothing, None, None, real[:, :0])
            for layer in range(self.config.backbone.num_hidden_layers)
        ]
        return Past(layers, max((layer.real for layer in layers), key=lambda real: real.shape[1]))

    def _tables(self) -> dict[str, Tensor]:
        """The rotations of all places of what stands before a segment, and of the segment, by their kinds."""
        places = self._seen + self.config.segment_length
        rotations = {
            attachment.rotation.kind: attachment.rotation
            for attachment in self._attachments
            if attachment.rotation is not None
        }
        return {kind: rotation.table(places, self.device) for kind, rotation in rotations.items()}

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(self.logits)(hidden, targets)

    def segment_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        weight = plain_head(self.backbone) if self.config.head_is_known and can_fuse(hidden) else None
        return (
            super().segment_losses(hidden, targets) if weight is None else linear_token_losses(hidden, weight, targets)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        return head(self.backbone, hidden) if self.config.head_is_known else hidden

    @property
    def positions(self) -> int | None:
        """How many positions the backbone has; None if it has no such limit."""
        return getattr(self.config.backbone, "max_position_embeddings", None)

    def layer_memories(self) -> dict[int, Memory]:
        return {attachment.layer: attachment.memory for attachment in self._attachments}

    def sharding_units(self) -> list[nn.Module]:
        try:
            layers = find_layers(self.backbone)
        except ModelError:  # of a stock model without such layers, which no memory stands beside
            layers = []
        return [*layers, *self.memories]

    def compile_layers(self) -> None:
        if self._seen or any(attachment.ear for attachment in self._attachments):
            logger.warning(
                "layers behind a short-term memory, or with a memory of keys and values, are not compiled: each would "
                "be compiled by itself"
            )
            return
        super().compile_layers()

    def _check_places(self, memory: MemoryConfig, segment_length: int) -> None:
        if memory.key_values and self.positions is not None and memory.key_values + segment_length > self.positions:
            most = self.positions - segment_length - (memory.sink_tokens or 0)
            option, value = "short_term_length", memory.short_term_length or 0
            if memory.entries > value:
                option, value, most = "length", memory.entries - value, most - value
            raise ModelError(
                f"model.memory.{option}={value}: with a segment of {segment_length} tokens and {memory.sink_tokens} "
                f"first ones these are more than the {self.positions} positions of the backbone; set it to "
                f"{max(0, most)} at most"
            )
        rotation = getattr(self.config.backbone, "rope_parameters", None) or {}
        short = rotation.get("original_max_position_embeddings", 0) if rotation.get("rope_type") == "longrope" else 0
        seen = memory.key_values
        if (seen or memory.keeps_key_values) and seen < short < seen + segment_length:
            # It chooses by the last place that it is asked for, so that a segment in pieces would have both.
            raise ModelError(
                f"training.segment_length={segment_length}: this backbone rotates otherwise where a text is longer "
                f"than {short} tokens, and a segment behind {seen} others would begin before that and end after it; "
                f"take segments of at most {short - seen} tokens, or see at least {short} before each "
                "(model.memory.short_term_length=)"
            )

    def _checkpointing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A layer that is computed anew is told what it was told the first time."""

        def checkpoint_told(layer: Callable[..., Any], *args: Any, **options: Any) -> Any:
            calls = [attachment.call for attachment in self._attachments]
            past = None if not calls or calls[0] is None else calls[0].past
            # transformers takes a cache away from a layer that is computed twice; this one may be asked twice.
            names = [name for name in CACHE_ARGUMENTS if past and name in getattr(layer, "keywords", {})]

            def told(*inputs: Any) -> Any:
                with _told(self._attachments, calls):
                    return layer(*inputs, **dict.fromkeys(names, past))

            return function(told, *args, **options)

        return checkpoint_told

    def _freeze(self) -> None:
        if (lora := self.config.lora_config) is not None:
            if is_quantized(self):
                copy_marks(self, self.backbone)
                fit_adapters(self.backbone, lora)
            freeze_all_but_adapters(self.backbone)

    @torch.no_grad()
    def _renew(self, names: set[str]) -> None:
        for prefix, memory in self.memories.named_children():
            parameters = {f"memories.{prefix}.{name}": parameter for name, parameter in memory.named_parameters()}
            if names.isdisjoint(parameters):
                continue
            loaded = {name: parameter.clone() for name, parameter in parameters.items() if name not in names}
            cast(Memory, memory).reset_parameters()
            for name, tensor in loaded.items():
                parameters[name].copy_(tensor)

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def resize_token_embeddings(self, *arguments: Any, **options: Any) -> nn.Embedding:
        embeddings = self.backbone.resize_token_embeddings(*arguments, **options)
        self.config.vocab_size = self.backbone.config.vocab_size  # if each has its own configuration
        return embeddings


def _checked(backbone: Any) -> PreTrainedModel:
    """A model, if a memory can be put beside it, and the two can be saved and loaded again.

    Raises:
        ModelError: they cannot.
    """
    kind = type(backbone).__name__
    if isinstance(backbone, MemoryModel):
        raise ModelError(
            f"backbone={kind}: this model has its memories already; give the stock model (.stock_backbone()), or go on "
            "with it as it is"
        )
    if hasattr(backbone, "merge_and_unload") or getattr(backbone, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"backbone={kind}: adapters give the weights other names, by which they would not be found again; merge "
            "them first: a PeftModel by backbone.merge_and_unload()"
        )
    if not isinstance(backbone, PreTrainedModel) or backbone.get_output_embeddings() is None:
        raise ModelError(f"backbone={kind}: give a causal language model of transformers, its folder or its name")
    check_quantized(backbone)
    if backbone.config.is_encoder_decoder or not is_causal(backbone):
        raise ModelError(
            f"backbone={kind}: its tokens see those after them, or an encoder does; give a causal language model"
        )
    return backbone


AutoConfig.register(InfformerConfig.model_type, InfformerConfig)
AutoModelForCausalLM.register(InfformerConfig, InfformerForCausalLM)
