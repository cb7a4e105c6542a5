"""Any Hugging Face causal language model with a long-term memory beside its attentions.

The backbone stays the stock class with its stock parameter names. A forward hook on each chosen attention module adds
what the memory returns to what the attention returns; the memory itself travels through the call as a keyword argument,
so that a recomputed layer (gradient checkpointing) reads the memory it read the first time.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from infformer.memory.long_term import (
    ContinuousSignal,
    LongTermMemory,
    LongTermMemoryConfig,
    LongTermState,
    WriteOperators,
)
from infformer.memory.state import LayerMemories
from infformer.models.chunked_loss import cross_entropy
from infformer.models.folders import load_config, load_weights, model_folder
from infformer.models.memory_model import MemoryModel, ModelError, mean_over_tokens
from infformer.models.outputs import Intermediates, MemoryModelOutput
from infformer.models.second_backward import refuse_second_backward

LongTermMemories = LayerMemories[LongTermState]

ATTENTION_PATHS = {
    "gpt2": ("transformer.h", "attn"),
    "llama": ("model.layers", "self_attn"),
}
"""Where a backbone keeps its layers, and its attention in a layer. A new kind of backbone is a line here, if its layers
hand keyword arguments on to their attention, and its logits are its output embeddings times its last hidden states."""


class InfformerConfig(PreTrainedConfig):
    """Configuration of `InfformerForCausalLM`.

    Args:
        backbone: the stock model's configuration.
        memory: what each memory is; None for a model without memory.
        memory_layers: indices of the layers that have one, from 0; None for all.
    """

    model_type = "infformer"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}

    def __init__(
        self,
        backbone: PreTrainedConfig | dict[str, Any] | None = None,
        memory: LongTermMemoryConfig | dict[str, Any] | None = None,
        memory_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone, dict):
            backbone = AutoConfig.for_model(**backbone)
        self.backbone = backbone if backbone is not None else AutoConfig.for_model("gpt2")
        self.memory = asdict(memory) if isinstance(memory, LongTermMemoryConfig) else memory
        self.memory_layers = memory_layers
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.backbone, token, None))
        kwargs.setdefault("tie_word_embeddings", self.backbone.tie_word_embeddings)
        # transformers hands its own choice on to the backbone, also where it is none: attention without a causal mask.
        kwargs.setdefault("attn_implementation", self.backbone._attn_implementation)
        super().__init__(**kwargs)

    @property
    def memory_config(self) -> LongTermMemoryConfig | None:
        """The memory's configuration as its own type; an unknown option in a stored one is an error."""
        try:
            return None if self.memory is None else LongTermMemoryConfig(**self.memory)
        except TypeError as error:
            raise ModelError(
                f"the memory in this model's config.json is not one that this version knows: {error}"
            ) from error


class _MemoryCall:
    """One forward pass's memory on its way through the layers, and what they make of it.

    No dataclass: FSDP2 hands a copy of those to each layer, and what the layer adds to it is lost.

    Args:
        signal: the caller's, by which its layers know that the call is for them.
        memory: before this pass.
        operators: for writing; all layers write at the same time, so they share them. None where no row's segment can
            be whole.
        whole: rows whose segment is whole and is written, bool [batch].
        offsets: of sticky samples.
        traced: whether what happens in each layer is wanted too.
    """

    def __init__(
        self,
        signal: ContinuousSignal,
        memory: LongTermMemories,
        operators: WriteOperators | None,
        whole: Tensor | None,
        offsets: Tensor | None,
        traced: bool,
    ) -> None:
        self.signal = signal
        self.memory = memory
        self.operators = operators
        self.whole = whole
        self.offsets = offsets
        self.traced = traced
        self.written: dict[int, LongTermState] = {}
        self.divergences: dict[int, Tensor] = {}
        self.intermediates: dict[int, Intermediates] = {}


def _attend_to_memory(
    index: int, layer: LongTermMemory, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook of an attention module: add the memory's context to its output, and write the segment.

    A recomputation stores the same results a second time in a call that nobody reads any more.
    """
    call: _MemoryCall | None = kwargs.get("memory_call")
    if call is None or call.signal is not layer.signal:  # the backbone used on its own, or wrapped a second time
        return output
    hidden = args[0] if args else kwargs["hidden_states"]
    state = call.memory.layers[index]
    reading, call.written[index] = layer(hidden, state, call.operators, call.offsets, call.whole)
    call.divergences[index] = layer.divergence(reading.attention)
    attended, *others = output
    if call.traced:
        call.intermediates[index] = Intermediates(hidden, attended, reading)
    return (attended + reading.context.to(attended.dtype), *others)


class InfformerForCausalLM(MemoryModel):
    """A stock causal language model with a long-term memory beside its attentions.

    `backbone` is the stock model, `memories` the learned parts of the memories, one for each layer that has one.
    """

    config_class = InfformerConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = {"memories"}  # noqa: RUF012, transformers declares it as an attribute
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InfformerConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone) if backbone is None else backbone
        self._cache_argument = cache_argument(self.backbone)
        memory = config.memory_config
        self.memories = nn.ModuleList()
        self.segment_length: int | None = None
        if memory is not None:
            self.check_segment_length(memory.segment_length)
            self.segment_length = memory.segment_length
            self.signal = ContinuousSignal(memory)
            attentions = _attention_modules(self.backbone)
            layers = list(range(len(attentions))) if config.memory_layers is None else config.memory_layers
            if len(set(layers)) < len(layers) or not set(layers) <= set(range(len(attentions))):
                raise ModelError(
                    f"model.memory_layers={layers}: name each layer at most once; this backbone has layers 0 to "
                    f"{len(attentions) - 1}"
                )
            width, heads = config.backbone.hidden_size, config.backbone.num_attention_heads
            for index, layer in enumerate(layers):
                long_term = LongTermMemory(memory, width, heads, self.signal)
                self.memories.append(long_term)
                hook = partial(_attend_to_memory, index, long_term)
                attentions[layer].register_forward_hook(hook, with_kwargs=True)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | os.PathLike[str],
        memory: LongTermMemoryConfig | None = None,
        memory_layers: list[int] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Put memories beside the attentions of a pretrained model; until trained, they change nothing.

        Args:
            backbone: a model, a folder, or the name of a model on the hub.
            memory: what each memory is; None wraps the model without any.
            memory_layers: layers that get one; all if not given.
            kwargs: for the backbone's `from_pretrained`; its weights come in float32 unless there is a `dtype`.

        Raises:
            ModelError: there is no such model, or it is not one that a memory can be put beside.
        """
        if isinstance(backbone, str | os.PathLike):
            folder = model_folder(os.fspath(backbone))
            backbone = load_weights(AutoModelForCausalLM, load_config(folder, "backbone"), folder, "backbone", **kwargs)
        backbone = _checked(backbone)
        # What is loaded must not be initialised again by the composite model.
        for module in backbone.modules():
            setattr(module, "_is_hf_initialized", True)  # noqa: B010, transformers' own mark
        attention = backbone.config._attn_implementation
        config = InfformerConfig(backbone.config, memory, memory_layers, attn_implementation=attention)
        model = cls(config, backbone)
        model.memories.to(backbone.device)
        if memory is not None:
            model.signal.to(backbone.device)
        return model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        memory: LongTermMemories | None = None,
        reset: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        noise: Tensor | None = None,
        return_logits: bool | None = None,
        return_intermediates: bool = False,
        segment_cache: Any = None,
        use_cache: bool = False,
    ) -> MemoryModelOutput:
        """Read one segment of each row, of at most `segment_length` tokens.

        Args:
            segment_cache, use_cache: the backbone's key-value cache, to generate within a segment. The others are those
                of every `MemoryModel`.
        """
        memory, lengths = self._begin(input_ids, memory, reset, lengths, attention_mask)
        cached = 0 if segment_cache is None else segment_cache.get_seq_length()
        call = self._begin_call(memory, cached, input_ids.shape[1], lengths, noise, return_intermediates)
        cache = {self._cache_argument: segment_cache, "use_cache": use_cache}
        if self.config.backbone.model_type in ATTENTION_PATHS:
            read = self.backbone.base_model(input_ids, memory_call=call, **cache)
            hidden, head = read.last_hidden_state, self.backbone.get_output_embeddings()
        else:  # without memory, and perhaps with more between hidden states and logits than a matrix
            read = self.backbone(input_ids, **cache)
            hidden, head = read.logits, nn.Identity()
        output = MemoryModelOutput(segment_cache=read[self._cache_argument] if use_cache else None)
        output.memory = (
            LayerMemories(tuple(call.written[index] for index in range(len(self.memories)))) if call else memory
        )
        if return_intermediates:
            output.intermediates = (
                tuple(call.intermediates[index] for index in range(len(self.memories))) if call else ()
            )
        output.auxiliary_losses = self._auxiliary_losses(call, lengths)
        refuse_second_backward(hidden, output.memory)

        scored = self._score(output, hidden, cross_entropy(head), labels, targets, lengths)
        if return_logits or (return_logits is None and not scored):
            output.logits = head(hidden)
        return output

    @property
    def positions(self) -> int | None:
        """How many positions the backbone has; None if it has no such limit."""
        return getattr(self.config.backbone, "max_position_embeddings", None)

    @property
    def short_term_length(self) -> int:
        return 0

    @property
    def noise_size(self) -> int:
        memory = self.config.memory_config
        return memory.past_samples if memory is not None and memory.sticky else 0

    def initial_memory(self, batch: int) -> LongTermMemories:
        """Empty memories for `batch` rows."""
        return LayerMemories(tuple(layer.initial_state(batch) for layer in self.long_term_memories().values()))

    def long_term_memories(self) -> dict[int, LongTermMemory]:
        layers = range(len(self.memories)) if self.config.memory_layers is None else self.config.memory_layers
        # A model that was wrapped without memory may name layers all the same.
        return dict(zip(layers, cast(Iterator[LongTermMemory], iter(self.memories)), strict=False))

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        return self.memories.parameters()

    def sharding_units(self) -> list[nn.Module]:
        known = ATTENTION_PATHS.get(self.config.backbone.model_type)
        layers = [] if known is None else list(self.backbone.get_submodule(known[0]).children())
        return [*layers, *self.memories]

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def _begin_call(
        self,
        memory: LongTermMemories,
        cached: int,
        length: int,
        lengths: Tensor | None,
        offsets: Tensor | None,
        traced: bool,
    ) -> _MemoryCall | None:
        if self.segment_length is None or not self.memories:
            return None
        segments = memory.layers[0].segments
        whole = self._whole_rows(len(segments), cached, length, lengths)
        operators = None if whole is None else self.signal.operators(segments)
        return _MemoryCall(self.signal, memory, operators, whole, offsets, traced)

    def _auxiliary_losses(self, call: _MemoryCall | None, lengths: Tensor | None) -> dict[str, Tensor]:
        """The divergence of the densities' variance, mean over tokens, sum over layers."""
        if call is None:
            return {}
        divergence = torch.stack([call.divergences[index] for index in range(len(self.memories))]).sum(0)
        weight = self.signal.config.divergence_weight
        written = call.memory.layers[0].segments.unsqueeze(-1) > 0
        return {"divergence": weight * mean_over_tokens(divergence * written, lengths)}

    def _init_weights(self, module: nn.Module) -> None:
        """The backbone initialises itself, and so does a memory; its buffers are never loaded."""
        if isinstance(module, ContinuousSignal):
            module.reset_parameters()

    @torch.no_grad()
    def _renew(self, names: set[str]) -> None:
        for prefix, memory in self.memories.named_children():
            parameters = {f"memories.{prefix}.{name}": parameter for name, parameter in memory.named_parameters()}
            if names.isdisjoint(parameters):
                continue
            loaded = {name: parameter.clone() for name, parameter in parameters.items() if name not in names}
            cast(LongTermMemory, memory).reset_parameters()
            for name, tensor in loaded.items():
                parameters[name].copy_(tensor)


def cache_argument(model: PreTrainedModel) -> str:
    """What a stock model calls its key-value cache, as an argument and in its output: transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _checked(backbone: Any) -> PreTrainedModel:
    """A model, if a memory can be put beside it, and the two can be saved and loaded again.

    Raises:
        ModelError: they cannot.
    """
    kind = type(backbone).__name__
    if hasattr(backbone, "merge_and_unload") or getattr(backbone, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"backbone={kind}: adapters give the weights other names, by which they would not be found again; merge "
            "them first: a PeftModel by backbone.merge_and_unload()"
        )
    if not isinstance(backbone, PreTrainedModel) or backbone.get_output_embeddings() is None:
        raise ModelError(f"backbone={kind}: give a causal language model of transformers, its folder or its name")
    if getattr(backbone, "hf_quantizer", None) is not None or hasattr(backbone.config, "quantization_config"):
        raise ModelError(
            f"backbone={kind} is quantised, and what is saved of it beside a memory could not be loaded again; load it "
            "without quantization_config, or call backbone.dequantize() first"
        )
    return backbone


def _attention_modules(backbone: PreTrainedModel) -> list[nn.Module]:
    """The self-attention of each layer, from the first."""
    kind = backbone.config.model_type
    if kind not in ATTENTION_PATHS:
        raise ModelError(
            f"no memory can be put beside the attention of a {kind!r} yet, only of "
            f"{', '.join(sorted(ATTENTION_PATHS))}: add where it keeps its attention to ATTENTION_PATHS in "
            "infformer/models/pretrained.py"
        )
    layers, attention = ATTENTION_PATHS[kind]
    return [layer.get_submodule(attention) for layer in backbone.get_submodule(layers).children()]


AutoConfig.register(InfformerConfig.model_type, InfformerConfig)
AutoModelForCausalLM.register(InfformerConfig, InfformerForCausalLM)
