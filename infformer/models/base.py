"""What every language model with memories promises, whatever its backbone and its memories."""

from __future__ import annotations

import logging
import os
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from infformer.errors import ModelError, as_model_errors
from infformer.hub import HubError, ask_briefly
from infformer.memory.memory import DerivedBuffers, Earlier, Memory, SegmentContext
from infformer.memory.options import MemoryConfig
from infformer.memory.state import ModelState
from infformer.models.card import CARD, model_card
from infformer.models.chunked_loss import IGNORE_INDEX, chunked_token_losses
from infformer.models.compiling import compile_by_kind
from infformer.models.generation import ReadText, Writer
from infformer.models.lengths import check_lengths, lengths_of, mean_over_tokens, without_padding
from infformer.models.second_backward import refuse_second_backward
from infformer.models.segment_cache import SegmentCache
from infformer.models.segment_read import LayerRead, MemoryModelOutput, SegmentRead, SegmentToRead

logger = logging.getLogger(__name__)

PASSES_WITHOUT_STATE = 8
"""Passes in training, one after the other, after which it is no chance that none of them was given a state."""


class MemoryModel(PreTrainedModel, GenerationMixin):
    """A causal language model that reads a document segment by segment; its state is a value between two of them."""

    segment_length: int | None
    """Only complete segments of this many tokens are written to memory. None: there is no memory to write to."""
    card: str | None = None
    """The model card of the folder that it was loaded from; None for a new model, and for one that is trained on."""
    layers_see_alike = False
    """Whether attention of all layers has to see equally many entries of a memory."""
    _passes_without_state = 0

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        state: ModelState | None = None,
        reset: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        noise: Tensor | None = None,
        without_memory: Tensor | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int = 0,
        return_intermediates: bool = False,
        segment_cache: SegmentCache | None = None,
        use_cache: bool = False,
    ) -> MemoryModelOutput:
        """Read one segment of each row, of at most `segment_length` tokens, or the next tokens of one.

        Args:
            input_ids: one segment of each row, [batch, length].
            labels: as in transformers, shifted inside (`labels=input_ids`): the last position has no label here.
            state: what `state` was after the row's last segment; empty if not given.
            reset: rows that begin a new document with this segment, bool [batch].
            targets: the token that follows each position, [batch, length], -100 where nothing is scored; with them no
                label is lost between two segments. Instead of `labels`.
            lengths: real tokens of each row, [batch]; the rest is padding on the right, neither scored nor written.
            attention_mask: the same as a tokenizer and its collators say it, [batch, length]: 1 for a real token, and 0
                for the padding on the right. Instead of `lengths`.
            noise: random numbers in [0, 1) for the memories, [batch, noise_size]; without them they are deterministic.
            without_memory: rows that read the segment as if their memory were empty, and write it as always, bool
                [batch].
            return_logits: by default only where there are neither labels nor targets.
            logits_to_keep: only those of so many last positions, as in transformers; 0: all.
            return_intermediates: what happened inside each layer, for the memories' instruments.
            segment_cache, use_cache: what is kept of the segment so far, to go on within it. The tokens that complete
                the segment write all of it, so it does not matter in how many pieces it comes.

        Raises:
            ModelError: what was given is not of so many rows of so many tokens, or a document begins within a segment.
        """
        self._notice_empty_memories(state)
        if reset is not None and segment_cache is not None:
            raise ModelError(
                "reset= with segment_cache=: a cache is of a document's unfinished segment, and a new document begins "
                "with a segment; read it without a cache"
            )
        least = input_ids.shape[1] if use_cache else 0  # behind padding no segment goes on
        state, lengths = self._begin(input_ids, state, reset, without_memory, lengths, attention_mask, least)
        memories = list(self.layer_memories().values())
        cached = 0 if segment_cache is None else segment_cache.length
        complete = self._complete_rows(input_ids, cached, lengths)
        scored = labels is not None or targets is not None
        context = SegmentContext(complete, noise, without_memory=without_memory, scored=scored)
        prepared = (memory.prepare(layer, context) for memory, layer in zip(memories, state.layers, strict=True))
        shared = next((found for found in prepared if found is not None), None)
        inside = return_intermediates or use_cache  # what the layers saw
        read = self.read_segment(SegmentToRead(input_ids, state, context, shared, inside, segment_cache, use_cache))
        kept: tuple[tuple[Tensor, Tensor], ...] = ()  # what is scored when the segment is complete
        if any(memory.needs_losses for memory in memories):
            kept = (*(() if segment_cache is None else segment_cache.scored), (read.hidden, input_ids))
        after = self._state_after(memories, read.layers, kept)
        auxiliary = self._auxiliary_losses(memories, read.layers, lengths)
        refuse_second_backward(read.hidden, after)
        output = MemoryModelOutput(
            state=after,
            auxiliary_losses=auxiliary,
            intermediates=read.layers if return_intermediates else None,
            hidden=read.hidden if return_intermediates else None,
        )
        if use_cache and context.complete is None:
            output.segment_cache = _next_cache(read, segment_cache, cached + input_ids.shape[1], kept)
        if labels is not None:
            targets = F.pad(without_padding(labels, lengths)[:, 1:], (0, 1), value=IGNORE_INDEX)
        if targets is not None:
            targets = without_padding(targets, lengths)
            output.token_losses = self.segment_losses(read.hidden, targets)
            count = (targets != IGNORE_INDEX).sum().clamp(min=1)
            output.loss = output.token_losses.sum() / count + sum(auxiliary.values())
        if return_logits or (return_logits is None and targets is None):
            output.logits = self.logits(read.hidden[:, -logits_to_keep:])
        return output

    def generate(
        self,
        inputs: Tensor | None = None,
        *arguments: Any,
        read: ReadText | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Any:
        """Write on after prompts of any length, by all that transformers' `generate` knows, whose arguments these are.

        Prompts are read segment by segment, and whatever is read or written goes to memory when its segment is whole.

        Args:
            inputs: token ids, [batch, length]; shorter prompts with padding before them, which `attention_mask` says.
            read: a text that stands before every prompt, of `models.generation.read_text`.
            progress: show a progress bar while the prompts are read.

        Raises:
            ModelError: padding stands behind a prompt.
        """
        has_limit = self.segment_length or self.positions
        segment_length = self.choose_segment_length(None if has_limit else self.config.segment_length)
        writer = Writer(self, segment_length, read, progress)
        return writer.generate(inputs, *arguments, **options)

    @abstractmethod
    def layer_memories(self) -> dict[int, Memory]:
        """The memories by the numbers of their layers, from 0, in their order."""

    def read_segment(self, segment: SegmentToRead) -> SegmentRead:
        """Take a segment through all layers; asked by `forward`, of which one model has its own."""
        raise NotImplementedError

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [tokens, hidden] and targets [tokens] to nats [tokens]; not of models that score no tokens."""
        raise NotImplementedError

    def segment_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Hidden states [batch, length, hidden] and targets to nats [batch, length], without all logits at once."""
        return chunked_token_losses(hidden, self.token_losses, targets)

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [batch, length, hidden] to scores of the next token."""

    @abstractmethod
    def sharding_units(self) -> list[nn.Module]:
        """The modules that an engine which cuts up weights puts together, each as a whole, for the time of its call."""

    @property
    @abstractmethod
    def positions(self) -> int | None:
        """How many positions the model has; None if it has no such limit."""

    @property
    def has_memory(self) -> bool:
        """Whether anything is carried from one segment to the next."""
        return self.segment_length is not None

    @property
    def short_term_length(self) -> int:
        """How many tokens before its segment a token attends to as they were; 0 without a short-term memory."""
        memory = self.config.memory_config
        return 0 if memory is None else memory.short_term_length

    @property
    def noise_size(self) -> int:
        """How many random numbers a row's memories take for each segment in training."""
        return max((memory.noise_size for memory in self.layer_memories().values()), default=0)

    @property
    def learns_by_writing(self) -> bool:
        """Whether gradients flow through segments without targets too, as a memory learns from what later ones read.

        So do keys and values that a layer's own attention makes, unless these projections are frozen.
        """
        memories = self.layer_memories().values()
        if any(memory.learns_by_writing for memory in memories):
            return True
        if not any(memory.keeps_key_values for memory in memories):
            return False
        own = {id(parameter) for parameter in self.memory_parameters()}
        return any(parameter.requires_grad and id(parameter) not in own for parameter in self.parameters())

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the model knows."""
        return self.get_input_embeddings().weight.shape[0]  # type: ignore[return-value, index]

    def initial_state(self, batch: int) -> ModelState:
        """Empty memories for `batch` rows."""
        memories = self.layer_memories().values()
        return ModelState(tuple(memory.initial_state(batch) for memory in memories)).to(self.device)

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        """The memories' own parameters, as against the backbone's."""
        for memory in self.layer_memories().values():
            yield from memory.parameters()

    def time_shuffle(self) -> Any:
        """What `shuffle_time` needs, for whoever shuffles many states."""
        shuffles = (memory.time_shuffle() for memory in self.layer_memories().values())
        return next((shuffle for shuffle in shuffles if shuffle is not None), None)

    def shuffle_time(self, state: ModelState, shuffle: Any = None) -> ModelState:
        """The same state with its past in another order, a control: does the order of what is remembered matter?

        Each kind of memory is cut into 16 blocks of time, which change places in a fixed way (`memory.time_shuffle`).
        Rows stay apart, and an empty memory stays empty.

        Args:
            shuffle: what `time_shuffle` returns; computed if not given.
        """
        shuffle = self.time_shuffle() if shuffle is None else shuffle
        pairs = zip(self.layer_memories().values(), state.layers, strict=True)
        return replace(state, layers=tuple(memory.shuffle_time(layer, shuffle) for memory, layer in pairs))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        dtype: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load a model as transformers does, but in float32 unless another `dtype` is asked for or was the backbone's.

        Weights of a memory that the folder lacks are those of a new memory, and the log says so.

        Raises:
            ModelError: it lacks others.
        """
        dtype = kwargs.pop("torch_dtype", dtype)  # its old name
        name = pretrained_model_name_or_path
        if dtype is None:
            config, kind = kwargs.get("config"), cast(type[PreTrainedConfig], cls.config_class)
            dtype = dtype_of(config if isinstance(config, PreTrainedConfig) else kind.from_pretrained(name, **kwargs))
        loaded: Any = super().from_pretrained(name, *args, dtype=dtype, output_loading_info=True, **kwargs)
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
        model._freeze()
        card = Path(model.name_or_path) / CARD
        model.card = card.read_text(encoding="utf-8") if card.is_file() else None
        return loaded if output_loading_info else model

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.card = None  # its figures will be those of other weights
        return super().train(mode)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the model as transformers does, with its card."""
        if kwargs.get("push_to_hub"):
            raise ModelError("push_to_hub=True: call model.push_to_hub(name), which takes the card along")
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            (Path(save_directory) / CARD).write_text(self.card or model_card(self), encoding="utf-8")

    def push_to_hub(  # type: ignore[override] # whose signature is that of a decorator
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Put the model on the hub, with its card; one that is there already stays. The tokenizer is pushed by itself.

        Args:
            repo_id: its name there, `<owner>/<name>`; a new one is made.

        Returns:
            Where it is now.

        Raises:
            HubError: the hub cannot be reached, or takes nothing from this user.
        """
        hub = HfApi(token=token)
        problem = ask_briefly(hub.whoami)
        if problem is not None:
            raise HubError(
                f"repo_id={repo_id}: the hub does not say who you are ({problem}); log in with hf auth login, or "
                "give a token="
            ) from problem
        with tempfile.TemporaryDirectory() as place:
            self.save_pretrained(place)
            try:
                name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
                card = Path(place) / CARD
                card.write_text(card.read_text(encoding="utf-8").replace('place = "."', f'place = "{name}"'), "utf-8")
                if hub.file_exists(name, CARD, revision=revision):
                    card.unlink()
                return hub.upload_folder(
                    repo_id=name, folder_path=place, commit_message=commit_message, revision=revision,
                    create_pr=create_pr,
                )  # fmt: skip
            except Exception as error:  # whatever its client, or the network below it, raises
                raise HubError(
                    f"repo_id={repo_id}: this could not be put on the hub ({error}); choose a name that is yours, "
                    "<owner>/<name>, and a token= that may write there"
                ) from error

    def _freeze(self) -> None:
        """Let nothing learn that is not trained: what was loaded would."""

    def _renew(self, names: set[str]) -> None:
        """Give those of the memories' weights that were not loaded what a new memory has."""
        raise NotImplementedError

    def check_segment_length(self, length: int, option: str = "segment_length") -> None:
        """Make sure that the model can read segments of this length, and that its memory writes them.

        Args:
            option: by which it was chosen, for the error.

        Raises:
            ModelError: it cannot, or does not.
        """
        if self.segment_length is not None and length != self.segment_length:
            raise ModelError(
                f"{option}={length} is not that of the memory, which writes whole segments of "
                f"{self.segment_length} tokens and forgets all others: set it to {self.segment_length}"
            )
        if self.positions is not None and length > self.positions:
            raise ModelError(
                f"{option}={length} is longer than the {self.positions} positions of the model: set it to "
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

    def _notice_empty_memories(self, state: ModelState | None) -> None:
        """Warn of a loop, such as that of transformers' Trainer, that hands on no state: its memories learn nothing."""
        if not (self.has_memory and self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        self._passes_without_state = self._passes_without_state + 1 if state is None else 0
        if self._passes_without_state == PASSES_WITHOUT_STATE:
            logger.warning(
                "%d segments in a row were trained on without state=, and an empty memory learns nothing: give each "
                "the output.state.detach() of the one before it, as examples/hugging_face_trainer.py does with "
                "transformers' Trainer", PASSES_WITHOUT_STATE,
            )  # fmt: skip

    def _init_weights(self, module: nn.Module) -> None:
        """What is computed instead of learned is never loaded."""
        if isinstance(module, DerivedBuffers):
            module.reset_parameters()

    def _begin(
        self,
        input_ids: Tensor,
        state: ModelState | None,
        reset: Tensor | None,
        without_memory: Tensor | None,
        lengths: Tensor | None,
        attention_mask: Tensor | None,
        least: int,
    ) -> tuple[ModelState, Tensor | None]:
        """The state before a segment, and how many tokens of each row are real, at least so many; None for all.

        Raises:
            ModelError: what was given is not of so many rows of so many tokens.
        """
        batch, length = input_ids.shape
        if attention_mask is not None:
            if lengths is not None:
                raise ModelError("attention_mask= and lengths= say the same: give one of them")
            lengths = lengths_of(attention_mask, batch, length)
        for name, rows in (("reset", reset), ("without_memory", without_memory), ("lengths", lengths)):
            if rows is not None and rows.shape != (batch,):
                raise ModelError(f"{name}= has the shape {list(rows.shape)}: give one value for each of {batch} rows")
        if lengths is not None and not torch.compiler.is_compiling():
            check_lengths(lengths, least, length)
        state = self.initial_state(batch) if state is None else state
        if not isinstance(state, ModelState):
            raise ModelError(f"state= is a {type(state).__name__}: give the output.state of the row's last segment")
        for tensor in state.named_tensors().values():
            if len(tensor) != batch:
                raise ModelError(
                    f"state= has {len(tensor)} rows, input_ids {batch}: each row of the input goes on with its row of "
                    "the state; choose rows by state.select_rows(index), or begin with state=None"
                )
        return state if reset is None else state.reset_rows(reset), lengths

    def _complete_rows(self, input_ids: Tensor, cached: int, lengths: Tensor | None) -> Tensor | None:
        """Rows whose segment is complete and is written, bool [batch]; None where no row's can be.

        Args:
            cached: tokens of the segment that were read before.
            lengths: how many of those that are read now are real in each row, [batch]; all if not given.

        Raises:
            ModelError: these are more tokens than a segment has.
        """
        batch, length = input_ids.shape
        if self.segment_length is not None and cached + length > self.segment_length:
            raise ModelError(
                f"{cached + length} tokens are more than the memory's segment of {self.segment_length}: cut the text up"
            )
        if cached + length != self.segment_length:
            return None
        return torch.ones(batch, dtype=torch.bool, device=self.device) if lengths is None else lengths == length

    def _state_after(
        self, memories: list[Memory], layers: tuple[LayerRead, ...], kept: tuple[tuple[Tensor, Tensor], ...]
    ) -> ModelState:
        """What the memories hold after a segment, those among them that had to wait for its losses.

        Args:
            kept: last hidden states and tokens of the segment, in pieces.
        """
        states = [layer.memory.state for layer in layers]
        waiting = [number for number, layer in enumerate(layers) if layer.memory.pending is not None]
        if waiting:
            hidden, tokens = (torch.cat(pieces, dim=1) for pieces in zip(*kept, strict=True))
            losses = self._losses_within(hidden, tokens)
            for number in waiting:
                pending = layers[number].memory.pending
                states[number] = memories[number].write_by_losses(states[number], pending, losses)
        return ModelState(tuple(states))

    @torch.no_grad()
    def _losses_within(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Nats of each token of a segment, [batch, length]; the first has the mean of the others."""
        following = F.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
        losses = self.segment_losses(hidden, following)[:, :-1]
        mean = losses.sum(1, keepdim=True) / max(1, losses.shape[1])
        return torch.cat([mean, losses], dim=1)

    def _auxiliary_losses(
        self, memories: list[Memory], layers: tuple[LayerRead, ...], lengths: Tensor | None
    ) -> dict[str, Tensor]:
        """Means over tokens, sums over layers, by name."""
        losses = {}
        for name, weight in {n: w for memory in memories for n, w in memory.loss_weights.items()}.items():
            found = [layer.memory.losses[name] for layer in layers if name in layer.memory.losses]
            mean = (
                mean_over_tokens(torch.stack(found).sum(0), lengths) if found else torch.zeros((), device=self.device)
            )
            losses[name] = weight * mean
        return losses

    def compile_layers(self) -> None:
        """Compile each layer for training, with its memory, in place: layers of one kind share their graphs.

        So a model takes as long to compile as one of its layers.
        """
        memories = set(self.layer_memories().values())
        compile_by_kind(
            [layer for layer in self.sharding_units() if layer not in memories], isinstance(self, FSDPModule)
        )

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
        super()._set_gradient_checkpointing(enable, self._checkpointing(gradient_checkpointing_func), **kwargs)

    def _checkpointing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """How a layer is computed anew in the backward pass."""
        return function


def _next_cache(
    read: SegmentRead, before: SegmentCache | None, length: int, scored: tuple[tuple[Tensor, Tensor], ...]
) -> SegmentCache:
    """What is kept of a segment of which so many tokens have been read."""
    memories = []
    for number, layer in enumerate(read.layers):
        assert layer.hidden is not None
        pieces = () if before is None else before.memories[number].hidden
        memories.append(Earlier((*pieces, layer.hidden), layer.memory.projected))
    return SegmentCache(read.attention, tuple(memories), length, scored)


def dtype_of(config: PreTrainedConfig) -> torch.dtype:
    """In which a model's weights are loaded: that of the backbone when a memory was put beside it, else float32."""
    reader = getattr(config, "reader", config)  # of a classifier of documents
    return getattr(torch, getattr(reader, "backbone_dtype", None) or "float32")


def stored_memory(stored: dict[str, Any] | None, segment_length: int) -> MemoryConfig | None:
    """The memory in a model's `config.json`, as its own type.

    Raises:
        ModelError: it is not one that this version knows, or not one of such segments.
    """
    if stored is None:
        return None
    try:
        memory = MemoryConfig.from_json(stored)
    except ValueError as error:
        raise ModelError(
            f"the memory in this model's config.json is not one that this version knows: {error}"
        ) from error
    with as_model_errors():
        memory.check_segment_length(segment_length)
    return memory
