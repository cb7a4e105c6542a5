"""The model `infformer` of the Language Model Evaluation Harness. Importing this file makes it known there."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from infformer.data.sources import Document
from infformer.data.tokenization import TokenizedDocuments
from infformer.errors import UserError
from infformer.evaluation.streaming import Evaluator, Processes, ReadingProtocol, read_documents, with_memory
from infformer.harness.continuations import Continuation, score_continuations
from infformer.harness.generation import GenerationOptions, write_text
from infformer.models.loading import check_vocabulary, load_tokenizer, load_trained
from infformer.progress import follow

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16", "float16")


@register_model("infformer")
class InfformerLM(TemplateLM):
    """A checkpoint of ours, or any causal language model, that reads texts of any length segment by segment.

    Nothing is ever cut off a text. A text is read from an empty memory; texts that are read side by side never mix.

    Args:
        checkpoint: a checkpoint of a run, a model folder, or the name of a model on the hub.
        tokenizer: a folder or a hub name; None: the model's.
        segment_length: tokens of a segment; None: as in training, or all positions of a model without memory.
        short_term_length: tokens of a decoder's short-term memory; None: as in training.
        precision: autocast type; float32 for none.
        batch_size: texts read side by side, at most; the figures do not depend on it.
        device: such as `cuda:0`; None, or CUDA where there is none: the accelerator if there is one, else the CPU.
        others: of the harness's own models; they are an error here.

    Raises:
        UserError: the model cannot be loaded, or not be used as asked.
    """

    def __init__(
        self,
        checkpoint: str = "",
        tokenizer: str | None = None,
        segment_length: int | None = None,
        short_term_length: int | None = None,
        precision: str = "float32",
        batch_size: int | str = 1,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        for option, value in others.items():
            raise UserError(f"model_args {option}={value}: infformer has no such option; take it out")
        if not checkpoint:
            raise UserError("model_args checkpoint=: say which model, such as checkpoint=outputs/tiny/checkpoints/best")
        if precision not in PRECISIONS:
            raise UserError(f"model_args precision={precision}: choose one of {', '.join(PRECISIONS)}")
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise UserError(f"{processes} processes were launched, and this model works in one: use python")
        _check_number("segment_length", segment_length)
        _check_number("short_term_length", short_term_length)
        batch_size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        _check_number("batch_size", batch_size)

        model = load_trained(checkpoint, segment_length, short_term_length)
        self.tokenizer = load_tokenizer(tokenizer or checkpoint, "model_args tokenizer" if tokenizer else "checkpoint")
        check_vocabulary(model, self.tokenizer)
        if self.tokenizer.bos_token_id is None and self.tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer or checkpoint} has neither a beginning-of-sequence nor an "
                "end-of-sequence token, from which the first token of a text could be predicted: give it a bos_token"
            )
        length = model.choose_segment_length(segment_length)
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            logger.info("device=%s: there is no CUDA device here, so another is taken", device)
            device = None  # the harness's command asks for CUDA wherever nothing else is asked for
        place = torch.accelerator.current_accelerator(check_available=True) if device is None else device
        try:
            model.to("cpu" if place is None else place)  # type: ignore[arg-type] # whose decorator hides its own self
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device={device}: {error}; choose another with --device") from error
        protocol = ReadingProtocol(length, precision=getattr(torch, precision))
        self.evaluator = Evaluator(model=model, protocol=protocol, batch_size=int(batch_size))

    @property
    def device(self) -> torch.device:
        return self.evaluator.model.device

    @property
    def max_length(self) -> int:
        """For the record only: texts are not limited to it."""
        return self.evaluator.protocol.segment_length

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text begins with if nothing else precedes it; as in training, by `data.beginning_of_document`."""
        first = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if first is None else first

    def get_model_info(self) -> dict[str, object]:
        """What the harness's results say of the model: the protocol by which its figures were measured."""
        memory = getattr(self.evaluator.model.config, "memory", None)
        return {"protocol": {**self.evaluator.protocol.as_json(), "memory": memory}}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the harness's own models do it: with the tokenizer's special tokens, but not with a second beginning."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self.prefix_token_id])))
        # Not verbose: it would warn that a text is longer than the model's context.
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole documents, in nats: what `eval.py` measures."""
        texts = [Document(str(number), request.args[0]) for number, request in enumerate(requests)]
        documents = TokenizedDocuments.from_texts(texts, self.tokenizer, self.prefix_token_id, skip_short=True)
        likelihoods = [0.0] * len(requests)  # of documents without a token
        if len(documents) == 0:
            return likelihoods
        evaluator = replace(self.evaluator, processes=Processes(progress=not disable_tqdm))
        nats = read_documents(evaluator, documents, with_memory(evaluator), "reading documents")
        last = (documents.token_counts - 1).cumsum()
        for name, losses in zip(documents.ids, np.split(nats.astype(np.float64), last[:-1]), strict=True):
            likelihoods[int(name)] = -float(losses.sum())
        return likelihoods

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        # A context of nothing but blanks has become empty: they are the continuation's.
        continuations = [Continuation(context or [self.prefix_token_id], tokens) for _, context, tokens in requests]
        evaluator = replace(self.evaluator, processes=Processes(progress=not disable_tqdm))
        scores = score_continuations(evaluator, continuations, "reading continuations")
        return [(score.log_likelihood, score.greedy) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts of any length, one after the other."""
        options = [GenerationOptions.from_request(request.args[1]) for request in requests]
        texts: list[str] = []
        for request, option in zip(
            follow(requests, "writing", "texts", len(requests), not disable_tqdm), options, strict=True
        ):
            prompt = self.tok_encode(request.args[0]) or [self.prefix_token_id]
            texts.append(write_text(self.evaluator, self.tokenizer, prompt, option))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def _check_number(option: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int) and value >= 1):
        raise UserError(f"{option}={value}: give a number of at least 1")
