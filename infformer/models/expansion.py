"""Larger models that compute the same: six expansions (Gesmundo & Maile, arXiv 2308.06103), with moments and memories.

Each makes one size of a model larger: the width inside the feed-forward part, the number of heads, the width of their
values, that of their queries and keys, the width of the residual stream, the number of layers. What is new either reads
zeros, or is multiplied by zeros, so the function stays what it was up to rounding; yet all of it learns from the first
or the second step on. An expansion is worked out from a configuration alone and applied to whatever has its shapes:
weights, Adam's moments, a state in the middle of a book.

How each axis of a tensor grows stands in tables below, in words:

- `read`: it is multiplied with the residual stream, or with what a norm made of it;
- `write`: it is added to the stream, or is a part of it; `norm`, `last norm`: it scales the stream, for a layer or for
  the vocabulary; `vocabulary`: the vectors of tokens; `distances`: the sinusoids of relative positions;
- names of sizes, such as `heads value`: that many numbers for each head. After a name, `:zero` says that new ones are
  zero, `:score` that moreover old ones are multiplied by √(new / old), as attention divides its scores by √key.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from infformer.errors import ModelError
from infformer.memory.compressive import CompressiveMemoryConfig
from infformer.memory.fast_weights import FastWeightMemoryConfig
from infformer.memory.long_term_options import LongTermMemoryConfig
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.decoder import DecoderConfig
from infformer.models.pretrained import InfformerConfig

NAMES_IN_LLAMA = {"feed_forward_size": "intermediate_size", "head_size": "head_dim"}
LLAMA_SHAPED = ("llama", "mistral", "qwen2")
"""Stock models that are a Llama but for biases and windows."""
MECHANISMS = ("softmax", "local", "sparse", "strided")
"""Attentions that know nothing of queries and keys but their products divided by √key, and learn nothing themselves."""

Rules = Mapping[str, tuple[str, ...]]
DECODER: Rules = {
    r"vocabulary\.embedding\.weight": ("", "vocabulary"),
    r"vocabulary\.bias": (),
    r"vocabulary\.softmax\.head\.weight": ("", "vocabulary"),
    r"vocabulary\.softmax\.head\.bias": (),
    r"layers\.\d+\.attention\.query\.weight": ("heads key", "read"),
    r"layers\.\d+\.attention\.key\.weight": ("heads key:score", "read"),
    r"layers\.\d+\.attention\.value\.weight": ("heads value", "read"),
    r"layers\.\d+\.attention\.output\.weight": ("write", "heads:zero value:zero"),
    r"layers\.\d+\.attention\.distance\.weight": ("heads key:score", "distances"),
    r"layers\.\d+\.attention\.\w+_bias": ("heads:zero", "", "key:zero"),
    r"layers\.\d+\.feed_forward\.expand\.weight": ("inner", "read"),
    r"layers\.\d+\.feed_forward\.expand\.bias": ("inner:zero",),
    r"layers\.\d+\.feed_forward\.contract\.weight": ("write", "inner:zero"),
    r"layers\.\d+\.feed_forward\.contract\.bias": ("write",),
    r"layers\.\d+\.\w+_residual\.norm\.\w+": ("norm",),
    r"final_norm\.\w+": ("last norm",),
}
LLAMA: Rules = {
    r"model\.embed_tokens\.weight": ("", "write"),
    r"lm_head\.weight": ("", "read"),
    r"model\.norm\.weight": ("norm",),
    r"model\.layers\.\d+\.\w+layernorm\.weight": ("norm",),
    r"model\.layers\.\d+\.self_attn\.q_proj\.weight": ("heads group key", "read"),
    r"model\.layers\.\d+\.self_attn\.q_proj\.bias": ("heads:zero group key:zero",),
    r"model\.layers\.\d+\.self_attn\.k_proj\.weight": ("heads key:score", "read"),
    r"model\.layers\.\d+\.self_attn\.k_proj\.bias": ("heads:zero key:score",),
    r"model\.layers\.\d+\.self_attn\.v_proj\.weight": ("heads value", "read"),
    r"model\.layers\.\d+\.self_attn\.v_proj\.bias": ("heads:zero value:zero",),
    r"model\.layers\.\d+\.self_attn\.o_proj\.weight": ("write", "heads:zero group value:zero"),
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.weight": ("inner", "read"),
    r"model\.layers\.\d+\.mlp\.(gate|up)_proj\.bias": ("inner:zero",),
    r"model\.layers\.\d+\.mlp\.down_proj\.weight": ("write", "inner:zero"),
    r"model\.layers\.\d+\.\w+\.(o|down)_proj\.bias": ("write",),
}
LONG_TERM: Rules = {
    r"(query|value)\.weight": ("memory_heads memory_size", "read"),
    r"key\.weight": ("memory_heads memory_size:score", "read"),
    r"output\.weight": ("write", "memory_heads memory_size:zero"),
    r"placement\.weight": (),
    r"gate\.weight": ("write", "read"),
    r"gate\.bias": ("write",),
}
KEYS_AND_VALUES: Rules = {
    r"gate": ("heads:zero group",),
    r"convolution\.weight": ("heads key",),
    r"placement\.weight": (),
}
FAST_WEIGHT: Rules = {
    r"(query|writing\.key|writing\.value)\.weight": ("memory_heads memory_size", "read"),
    r"writing\.(strength|forgetting)\.weight": ("memory_heads", "read"),
    r"writing\.(strength_offset|forgetting_offset|surprise)": ("memory_heads",),
    r"writing\.convolution\.weight": ("memory_heads memory_size",),
    r"scale": ("memory_heads memory_size",),
    r"gate": ("memory_heads:zero",),
    r"output\.weight": ("write", "memory_heads memory_size"),
}
COMPRESSIVE: Rules = {
    r"compression\.convolution\.weight": ("write", "read"),
    r"compression\.convolution\.bias": ("write",),
}
ADDS = (
    r".*layers\.\d+\.(attention\.output|feed_forward\.contract|self_attn\.o_proj|mlp\.down_proj)\.(weight|bias)"
    r"|layers\.\d+\.memory\.(behind\.)?{memory}|memories\.\d+\.(behind\.)?{memory}"
)
"""By what a layer, and the memory in it, adds to the stream."""


class _Growth(NamedTuple):
    """One size that becomes larger."""

    size: str
    old: int
    new: int
    copies: int = 0
    """Of the stream: so many copies of it stand side by side. 0: zeros stand behind it."""
    in_pairs: bool = False
    """The old numbers are of sinusoids, whose frequencies stand further apart among the new ones."""

    def places(self) -> Tensor:
        """Where the old numbers stand among the new."""
        if not self.in_pairs:
            return torch.arange(self.old)
        step, first, new_first = self.new // self.old, (self.old + 1) // 2, (self.new + 1) // 2
        return torch.cat([step * torch.arange(first), new_first + step * torch.arange(self.old - first)])


@dataclass(frozen=True)
class Expansion:
    """One size of a model that becomes larger, for whatever has the model's shapes.

    Its methods return new tensors, and change none.
    """

    before: PreTrainedConfig
    """The configuration of the smaller model."""
    after: PreTrainedConfig
    """That of the larger."""
    growths: tuple[_Growth, ...] = ()
    layers: tuple[int, ...] = ()
    """For each layer of the larger model that of the smaller which it is, or in front of which it is put; () where
    their number stays."""
    _sizes: dict[str, int] = field(default_factory=dict)

    def weights(self, weights: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
        """Those of the larger model, by their names.

        New numbers that are free are drawn as widely as the old ones of their tensor lie.
        """
        generator = torch.Generator().manual_seed(seed)
        adds = re.compile(ADDS.format(memory=_adding(self.before)))
        grown = {}
        for name, tensor, is_new in self._of_layers(weights):
            tensor = torch.zeros_like(tensor) if is_new and adds.fullmatch(name) else tensor
            grown[name] = self._grown(tensor, _axes_of_weight(self.before, name), 1, generator)
        return grown

    def moments(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adam's moments, as a checkpoint names them; zero for what is new.

        A weight that was multiplied by c has a gradient divided by c, and its square by c². Copies of the stream share
        their gradient, on average evenly.
        """
        grown = {}
        for name, tensor, is_new in self._of_layers(moments):
            weight, kind = name.rsplit(".", 1)
            if kind == "step":
                grown[name] = tensor.clone()
            else:
                tensor = torch.zeros_like(tensor) if is_new else tensor
                grown[name] = self._grown(tensor, _axes_of_weight(self.before, weight), -1 if kind == "exp_avg" else -2)
        return grown

    def state(self, state: ModelState) -> ModelState:
        """What the larger model remembers in the place of the smaller, between two segments."""
        layers = list(state.layers)
        if self.layers:
            numbers = _layers_with_memory(self.before)
            layers = [layers[numbers.index(source)] for source in self.layers if source in numbers]
        state = ModelState(tuple(layers))
        axes = iter([_axes_of_state(self.after, name) for name in state.named_tensors()])
        return state.map_tensors(lambda tensor: self._grown(tensor, next(axes), 1))

    def _grown(
        self, tensor: Tensor, axes: tuple[str, ...], power: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """A tensor grown along all of its axes.

        Args:
            axes: how each of them grows, as the tables say it.
            power: 1 for weights and states, −1 and −2 for gradients and their squares.
            generator: of new numbers that are free; None: they are zero.
        """
        grows_alone = sum(map(bool, axes)) == 1
        for growth, (axis, words) in product(self.growths, enumerate(axes)):
            if growth.size == "stream" and words in ("read", "write", "norm", "last norm", "vocabulary", "distances"):
                tensor = _along_stream(tensor, axis, words, growth, power, generator)
            elif re.search(rf"\b{growth.size}\b", words) or (growth.size == "stream" and "write |" in words):
                tensor = self._along_sizes(tensor, axis, words, growth, power, generator, grows_alone)
        return tensor.clone()

    def _along_sizes(
        self,
        tensor: Tensor,
        axis: int,
        words: str,
        growth: _Growth,
        power: int,
        generator: torch.Generator | None,
        grows_alone: bool,
    ) -> Tensor:
        """Grow an axis that is cut into sizes, or several of these side by side."""
        sizes = {**self._sizes, growth.size: growth.old}
        for earlier in self.growths[: self.growths.index(growth)]:
            sizes[earlier.size] = earlier.new
        blocks = [[word.partition(":") for word in block.split()] for block in words.split("|")]
        shapes = [[sizes["stream"] if name == "write" else sizes[name] for name, _, _ in block] for block in blocks]
        grown = []
        pieces = tensor.split([math.prod(shape) for shape in shapes], dim=axis)
        for piece, block, shape in zip(pieces, blocks, shapes, strict=True):
            names = [name for name, _, _ in block]
            if growth.size == "stream" and names == ["write"]:
                piece = _along_stream(piece, axis, "write", growth, power, generator)
            elif growth.size in names:
                place = names.index(growth.size)
                rule = block[place][2]
                scale = math.sqrt(growth.new / growth.old) ** power if rule == "score" else 1.0
                free = None if rule else generator
                piece = _placed(piece.unflatten(axis, shape), axis + place, growth, scale, free, grows_alone)
                piece = piece.flatten(axis, axis + len(shape) - 1)
            grown.append(piece)
        return torch.cat(grown, dim=axis)

    def _of_layers(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, bool]]:
        """Tensors by their names in the larger model, those of new layers copied, and whether their layer is new."""
        numbers, places = _layers_with_memory(self.before), _layers_with_memory(self.after)
        for name, tensor in tensors.items():
            match = re.search(r"\b(layers|memories)\.(\d+)\.", name)
            if match is None or not self.layers:
                yield name, tensor, False
                continue
            old = int(match[2]) if match[1] == "layers" else numbers[int(match[2])]
            for layer, source in enumerate(self.layers):
                if source == old:
                    is_new = source in self.layers[layer + 1 :]
                    number = layer if match[1] == "layers" else places.index(layer)
                    yield f"{name[: match.start(2)]}{number}{name[match.end(2) :]}", tensor, is_new


def expand_feed_forward(config: PreTrainedConfig, size: int) -> Expansion:
    """Widen the inside of the feed-forward parts: new columns of the second map are zero."""
    old = _check_growth(config, "feed_forward_size", size)
    return _expansion(config, {"feed_forward_size": size}, _Growth("inner", old, size))


def expand_heads(config: PreTrainedConfig, number: int) -> Expansion:
    """Add heads of attention: what they read is multiplied by zeros. Those of a memory stay as many as they were.

    Raises:
        ModelError: the heads of a group do not divide the number, or a memory looks at what all heads look at.
    """
    old = _check_growth(config, "num_attention_heads", number)
    group = _sizes_of(config)["group"]
    if number % group:
        raise ModelError(
            f"num_attention_heads={number}: each head of keys and values has {group} of queries, so that they come in "
            f"groups; give a multiple of {group}"
        )
    memory = _memory_of(config)
    changes: dict[str, Any] = {"num_attention_heads": number}
    if isinstance(memory, LongTermMemoryConfig) and memory.keeps_key_values and memory.sticky:
        raise ModelError(
            f"num_attention_heads={number}: a sticky memory of keys and values gives room by where all heads look, and "
            "new ones look elsewhere; leave the number of heads as it is"
        )
    if isinstance(memory, CompressiveMemoryConfig) and memory.function == "most_used":
        raise ModelError(
            f"num_attention_heads={number}: model.memory.function=most_used keeps what all heads look at, and new ones "
            "look elsewhere; leave the number of heads as it is"
        )
    if getattr(memory, "heads", 0) is None and not (memory and memory.keeps_key_values):
        changes["memory"] = {**cast(Any, config).memory, "heads": old}
    return _expansion(config, changes, _Growth("heads", old // group, number // group))


def expand_values(config: PreTrainedConfig, size: int) -> Expansion:
    """Widen the values of each head, of a stock model its queries and keys as well, which have the same width there."""
    old = _check_growth(config, "head_size", size)
    growths = [_Growth("value", old, size)]
    if not isinstance(config, DecoderConfig):
        growths.append(_growth_of_keys(config, "head_size", size))
    return _expansion(config, {"head_size": size}, *growths)


def expand_keys(config: PreTrainedConfig, size: int) -> Expansion:
    """Widen the queries and keys of each head: new numbers of keys are zero, and old ones scaled against 1/√width.

    Rotary positions have frequencies that follow from the width: those of the old are among the new ones if the new
    width is a multiple of the old.

    Raises:
        ModelError: it is none; or the model has one width for keys and values.
    """
    if not isinstance(config, DecoderConfig):
        raise ModelError(
            f"key_size={size}: a {_stock(config).model_type!r} has one width for queries, keys and values; set "
            "head_size"
        )
    _check_growth(config, "key_size", size)
    return _expansion(config, {"key_size": size}, _growth_of_keys(config, "key_size", size))


def expand_hidden(config: PreTrainedConfig, size: int) -> Expansion:
    """Widen the residual stream.

    With RMSNorm zeros stand behind the old stream, so that its mean square is smaller: gains and ε are scaled. With
    LayerNorm, whose mean would change, the stream is repeated, and what reads it is divided among its copies, unevenly,
    so that they part when they learn.

    Raises:
        ModelError: with LayerNorm, or with relative positions, whose sinusoids follow from the width, it is no multiple
            of the old; or the heads of the long-term memory, or the width of a head of fast weights, do not divide it.
    """
    old = _check_growth(config, "hidden_size", size)
    stock, copies = _stock(config), 0
    if isinstance(config, DecoderConfig):
        if config.normalization == "layer" and size % old:
            raise ModelError(
                f"hidden_size={size}: LayerNorm takes the mean of the whole stream, which only copies of it leave as "
                f"it is; give a multiple of {old}, or grow a model with model.architecture.normalization=rms"
            )
        if config.positions == "relative" and size % old:
            raise ModelError(
                f"hidden_size={size}: the sinusoids of relative positions follow from the width, and those of {old} "
                "are among those of its multiples alone; give one, or grow a model with positions=rotary"
            )
        copies = size // old if config.normalization == "layer" else 0
    changes: dict[str, Any] = {"hidden_size": size}
    if not copies:
        name = "norm_epsilon" if isinstance(config, DecoderConfig) else "rms_norm_eps"
        changes[name] = getattr(stock, name) * old / size
    growths = [_Growth("stream", old, size, copies)]
    memory, sizes = _memory_of(config), _sizes_of(config)
    heads, width = sizes.get("memory_heads", 1), sizes.get("memory_size", 1)
    if isinstance(memory, FastWeightMemoryConfig):
        if size % width:
            raise ModelError(
                f"hidden_size={size}: fast weights get more heads, each {width} wide; give a multiple of {width}"
            )
        changes["memory"] = {**cast(Any, config).memory, "heads": size // width}
        growths.append(_Growth("memory_heads", heads, size // width))
    elif "memory_heads" in sizes:
        if size % heads:
            raise ModelError(
                f"hidden_size={size}: the {heads} heads of the long-term memory divide it among them; give a multiple "
                f"of {heads}"
            )
        growths.append(_Growth("memory_size", width, size // heads))
    if isinstance(config, DecoderConfig):
        for band in range(len(config.adaptive_cutoffs)):
            divisor = config.adaptive_divisor ** (band + 1)
            growths.append(_Growth(f"band_{band}", int(old // divisor), int(size // divisor)))
    return _expansion(config, changes, *growths)


def expand_layers(config: PreTrainedConfig, number: int) -> Expansion:
    """Put new layers among the old ones: each is a copy of the one after it that adds nothing to the stream.

    So it sees what that one sees, and in the middle of a book it remembers what that one remembers.

    Raises:
        ModelError: norms that stand after the sum would change the stream again.
    """
    old = _check_growth(config, "num_hidden_layers", number)
    if getattr(config, "normalization_placement", "pre") != "pre":
        raise ModelError(
            f"num_hidden_layers={number}: with model.architecture.normalization_placement="
            f"{cast(Any, config).normalization_placement} a new layer is never without effect, as its norms change the "
            "stream; only a model with pre can have more layers"
        )
    sources = tuple(layer * old // number for layer in range(number))
    changes: dict[str, Any] = {"num_hidden_layers": number}
    for name in ("memory_layers", "rotated_layers"):
        if (chosen := getattr(config, name, None)) is not None:
            changes[name] = [layer for layer, source in enumerate(sources) if source in chosen]
    if (kinds := getattr(_stock(config), "layer_types", None)) is not None:
        changes["layer_types"] = [kinds[source] for source in sources]
    return replace(_expansion(config, changes), layers=sources)


EXPANSIONS = {
    "feed_forward_size": expand_feed_forward,
    "num_attention_heads": expand_heads,
    "head_size": expand_values,
    "key_size": expand_keys,
    "hidden_size": expand_hidden,
    "num_hidden_layers": expand_layers,
}
"""Each by the size that it makes larger, which has its name in a decoder's configuration."""


def expansions(config: PreTrainedConfig, **sizes: int) -> list[Expansion]:
    """One after the other, those that give a model some sizes, in the order in which they are named.

    Raises:
        ModelError: a size cannot become so large without a change of what the model computes.
    """
    found: list[Expansion] = []
    for name, size in sizes.items():
        if name not in EXPANSIONS:
            raise ModelError(f"{name}={size}: there is no such size; what grows is {', '.join(EXPANSIONS)}")
        found.append(EXPANSIONS[name](found[-1].after if found else config, size))
    return found


def expand(
    config: PreTrainedConfig, weights: Mapping[str, Tensor], seed: int = 0, **sizes: int
) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
    """The configuration and the weights of a model that computes the same with larger sizes.

    Args:
        config: of a decoder, of a stock model that is shaped as Llama, or of one with memories beside it.
        weights: its `state_dict`.
        seed: of new numbers that are free.
        sizes: those of `EXPANSIONS` that become larger, each in turn.

    Raises:
        ModelError: a size cannot become so large without a change of what the model computes.
    """
    grown = dict(weights)
    for number, expansion in enumerate(expansions(config, **sizes)):
        config, grown = expansion.after, expansion.weights(grown, seed + number)
    return config, grown


Model = TypeVar("Model", bound=PreTrainedModel)


def expand_model(model: Model, seed: int = 0, **sizes: int) -> Model:
    """A larger model that computes the same; the arguments are those of `expand`."""
    config, weights = expand(model.config, model.state_dict(), seed, **sizes)
    larger: Any = new_model_of(type(model), config)
    larger = larger.to(device=model.device, dtype=model.dtype).train(model.training)
    for name, parameter in larger.named_parameters():
        parameter.data = parameter.data.to(weights[name].dtype)  # memories stay in float32 beside a shorter type
    larger.load_state_dict(weights)
    if model.generation_config is not None:
        larger.generation_config = copy.deepcopy(model.generation_config)
    return cast(Model, larger)


def new_model_of(kind: type[Model], config: PreTrainedConfig) -> Model:
    """A model with new weights, of a configuration that an expansion has made.

    Raises:
        ModelError: its sizes do not fit each other.
    """
    if isinstance(config, DecoderConfig):
        config = type(config).from_dict(config.to_dict())  # its sizes are looked at together
    return cast(Model, cast(Any, kind)(config))


def _stock(config: PreTrainedConfig) -> Any:
    """The configuration in which the sizes stand."""
    return config.backbone if isinstance(config, InfformerConfig) else config


def _check_growth(config: PreTrainedConfig, name: str, size: int) -> int:
    """How large the size is now.

    Raises:
        ModelError: it would not become larger, or the model is not one that can grow.
    """
    if isinstance(config, DecoderConfig):
        kind = config.attention if isinstance(config.attention, str) else config.attention.get("kind")
        if kind not in MECHANISMS:
            raise ModelError(
                f"model.architecture.attention={kind}: models grow whose attention is one of {', '.join(MECHANISMS)}"
            )
    elif _stock(config).model_type not in LLAMA_SHAPED:
        raise ModelError(
            f"a {_stock(config).model_type!r} does not grow: only our own decoder, and models that are shaped as "
            f"{', '.join(LLAMA_SHAPED)}"
        )
    elif getattr(config, "lora", None) is not None:
        raise ModelError("a model with adapters does not grow: merge them first, scripts/export.py --what backbone")
    old = size_of(config, name)
    if not isinstance(size, int) or size <= old:
        raise ModelError(f"{name}={size}: the model has {old}, and it can only become larger")
    return old


def size_of(config: PreTrainedConfig, name: str) -> int:
    """How large a size of `EXPANSIONS` is now."""
    sizes = _sizes_of(config)
    found = {
        "feed_forward_size": sizes["inner"],
        "num_attention_heads": sizes["heads"] * sizes["group"],
        "head_size": sizes["value"],
        "key_size": sizes["key"],
        "hidden_size": sizes["stream"],
        "num_hidden_layers": _stock(config).num_hidden_layers,
    }
    return found[name]


def _growth_of_keys(config: PreTrainedConfig, name: str, size: int) -> _Growth:
    old = _sizes_of(config)["key"]
    rotary = not isinstance(config, DecoderConfig) or config.positions == "rotary"
    if rotary:
        rope = getattr(_stock(config), "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
            raise ModelError(f"{name}={size}: the frequencies of rotary positions of the kind {kind!r} would change")
        if size % old:
            raise ModelError(
                f"{name}={size}: the frequencies of rotary positions follow from the width, and those of {old} are "
                f"among those of its multiples alone; give one"
            )
    return _Growth("key", old, size, in_pairs=rotary)


def _expansion(config: PreTrainedConfig, changes: Mapping[str, Any], *growths: _Growth) -> Expansion:
    """With the configuration after some changes."""
    after, sizes = copy.deepcopy(config), _sizes_of(config)
    stock = _stock(after)
    if not isinstance(config, DecoderConfig):
        stock.head_dim = sizes["value"]  # where nobody says so, it follows from the other sizes
    for name, value in changes.items():
        if name in ("memory", "memory_layers", "rotated_layers") or isinstance(after, DecoderConfig):
            setattr(after, name, value)
        else:
            setattr(stock, NAMES_IN_LLAMA.get(name, name), value)
            if name == "num_attention_heads":
                stock.num_key_value_heads = value // sizes["group"]
    return Expansion(config, after, growths, (), sizes)


def _memory_of(config: PreTrainedConfig) -> MemoryConfig | None:
    return config.memory_config if isinstance(config, DecoderConfig | InfformerConfig) else None


def _sizes_of(config: PreTrainedConfig) -> dict[str, int]:
    """The sizes into which axes are cut, by their names."""
    stock = _stock(config)
    hidden, heads = stock.hidden_size, stock.num_attention_heads
    sizes = {"stream": hidden}
    if isinstance(config, DecoderConfig):
        sizes |= {"heads": heads, "group": 1, "value": config.head_size, "key": config.key_size}
        sizes["inner"] = config.feed_forward_size
        for band in range(len(config.adaptive_cutoffs)):
            sizes[f"band_{band}"] = int(hidden // config.adaptive_divisor ** (band + 1))
    else:
        shared = stock.num_key_value_heads or heads
        width = getattr(stock, "head_dim", None) or hidden // heads
        sizes |= {"heads": shared, "group": heads // shared, "value": width, "key": width}
        sizes["inner"] = stock.intermediate_size
    memory = _memory_of(config)
    if isinstance(memory, LongTermMemoryConfig | FastWeightMemoryConfig) and not memory.keeps_key_values:
        own = memory.heads or heads
        sizes |= {"memory_heads": own, "memory_size": hidden // own}
    return sizes


def _rules_of_memory(config: PreTrainedConfig) -> Rules:
    memory = _memory_of(config)
    if isinstance(memory, LongTermMemoryConfig):
        return KEYS_AND_VALUES if memory.keeps_key_values else LONG_TERM
    if isinstance(memory, FastWeightMemoryConfig):
        return FAST_WEIGHT
    return COMPRESSIVE if isinstance(memory, CompressiveMemoryConfig) else {}


def _adding(config: PreTrainedConfig) -> str:
    """By what a memory adds to the stream beside attention, as an expression of its name."""
    rules = _rules_of_memory(config)
    return r"output\.weight" if rules is LONG_TERM else "gate" if rules is FAST_WEIGHT else "nothing"


def _layers_with_memory(config: PreTrainedConfig) -> list[int]:
    """In their order."""
    memory, every = _memory_of(config), list(range(_stock(config).num_hidden_layers))
    if memory is None:
        return []
    chosen = getattr(config, "memory_layers", None)
    if chosen is None or memory.short_term_length:
        return every
    return sorted(chosen) if memory.stands_alone else list(chosen)


def _axes_of_weight(config: PreTrainedConfig, name: str) -> tuple[str, ...]:
    """How the axes of a weight grow.

    Raises:
        ModelError: there is no rule for such a weight.
    """
    own = re.fullmatch(r"(?:layers\.\d+\.memory|memories\.\d+)\.(?:behind\.)?(.*)", name)
    if own is not None:
        rules, name_there = _rules_of_memory(config), own[1]
    elif isinstance(config, DecoderConfig):
        rules, name_there = DECODER, name
        if (tail := re.fullmatch(r"vocabulary\.softmax\.tail\.(\d+)\.([01])\.weight", name)) is not None:
            return (f"band_{tail[1]}:zero", "vocabulary") if tail[2] == "0" else ("", f"band_{tail[1]}")
        last = f"layers.{config.num_hidden_layers - 1}.feed_forward_residual.norm."
        if config.normalization_placement != "pre" and name.startswith(last):
            return ("last norm",)
    else:
        rules, name_there = LLAMA, name.removeprefix("backbone.")
        if name_there == "lm_head.weight" and _stock(config).tie_word_embeddings:
            name_there = "model.embed_tokens.weight"
    for pattern, axes in rules.items():
        if re.fullmatch(pattern, name_there):
            return axes
    raise ModelError(f"a model with the weights {name} does not grow: it is not known what they do")


def _axes_of_state(config: PreTrainedConfig, name: str) -> tuple[str, ...]:
    """How the axes of a tensor of a state grow."""
    memory = _memory_of(config)
    pair = "heads key:score | heads value"
    keeps_pairs = memory is not None and memory.keeps_key_values
    if name.endswith((".short_term.entries", ".sinks")) and isinstance(config, InfformerConfig):
        layer = _layers_with_memory(config)[int(name.split(".")[1])]
        is_chosen = config.memory_layers is None or layer in config.memory_layers
        wants_hidden = memory is not None and not memory.stands_alone and not keeps_pairs and is_chosen
        return ("", "", f"write | {pair}" if wants_hidden else pair)
    if name.endswith(".coefficients"):
        return ("", "", pair if keeps_pairs else "write")
    if name.endswith(".weights"):
        return ("", "memory_heads:zero", "", "memory_size:zero")
    if name.endswith(".entries") and not name.endswith(".losses.entries"):
        return ("", "", "write")
    if name.endswith((".filled", ".segments", ".losses", ".losses.entries", ".written")):
        return ()
    raise ModelError(
        f"a model with {name} in its state does not grow in the middle of a text: it is not known what it is"
    )


def _along_stream(
    tensor: Tensor, axis: int, words: str, growth: _Growth, power: int, generator: torch.Generator | None
) -> Tensor:
    """Grow an axis along the residual stream; see `Expansion._grown` for the arguments.

    The vectors of tokens are multiplied by √width when they are embedded, so they are divided by that; what scores
    them, behind the last norm, has to be the larger.
    """
    old, new, copies = growth.old, growth.new, growth.copies
    ratio = math.sqrt(old / new)
    if words == "distances":
        return _placed(tensor, axis, growth._replace(in_pairs=True), 1.0, None)
    if copies:
        scale = {"vocabulary": ratio, "last norm": ratio}.get(words, 1.0) ** power
        repeated = torch.cat([tensor] * copies, dim=axis)
        if words != "read":
            return repeated * (scale * (1 if power > 0 else float(copies) ** power))
        if power < 0:
            return repeated
        parts = (tensor / copies).unsqueeze(0).expand(copies, *tensor.shape)
        if generator is not None:
            uneven = _drawn(parts, generator, float(tensor.float().std()) / copies)
            parts = parts + (uneven - uneven.mean(0))
        return torch.cat(list(parts), dim=axis)
    scale = {"vocabulary": ratio, "norm": ratio}.get(words, 1.0) ** power
    if words in ("norm", "last norm"):
        return _placed(tensor, axis, growth, scale, generator, True)
    return _placed(tensor, axis, growth, scale, generator if words == "read" else None)


def _placed(
    tensor: Tensor,
    axis: int,
    growth: _Growth,
    scale: float,
    generator: torch.Generator | None,
    one_for_all: bool = False,
) -> Tensor:
    """A tensor with the old numbers, scaled, at their places along an axis, and new ones at the others.

    Args:
        generator: of the new ones; None: they are zero.
        one_for_all: they are the mean of the old along the axis, as with gains.
    """
    tensor = tensor * scale
    shape = list(tensor.shape)
    shape[axis] = growth.new
    if generator is None:
        larger = tensor.new_zeros(shape)
    elif one_for_all:
        larger = tensor.mean(axis, keepdim=True).expand(shape).clone()
    else:
        larger = _drawn(tensor.new_empty(shape), generator, float(tensor.float().std(correction=0)))
    return larger.index_copy(axis, growth.places().to(tensor.device), tensor)


def _drawn(like: Tensor, generator: torch.Generator, deviation: float) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return (deviation * drawn).to(like)
