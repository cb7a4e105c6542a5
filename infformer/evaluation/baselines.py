"""What needs no training and no memory of the model's: a continuous cache, and the unigram of the document so far.

The continuous cache (Grave, Joulin & Usunier, ICLR 2017, arXiv 1612.04426) keeps the last hidden states h of the last
tokens, each with the token x that came after it, and mixes into the model's probabilities

    p(x) ∝ Σ exp(θ hᵢ·h) over all i that were followed by x

with a weight λ. States have length 1 here, so that the same θ serve all models. With θ = 0 and the whole document in
place of its last tokens, it is a unigram. How far back, θ and λ are those that read validation documents best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import tee
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from infformer.data.segments import IGNORE_INDEX, Segment
from infformer.data.tokenization import TokenizedDocuments
from infformer.evaluation.comparison import paired_difference
from infformer.evaluation.figures import figures_of
from infformer.evaluation.streaming import Evaluator, Situation, read_documents
from infformer.models.streaming import stream
from infformer.results import CONTINUOUS_CACHE, DOCUMENT_UNIGRAM, Baseline, Figures

SIZES = (128, 512, 2048)
SHARPNESS = (2.0, 5.0, 10.0, 20.0, 40.0)
WEIGHTS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)


class Settings(NamedTuple):
    """One way to mix the past in."""

    size: int | None
    """So many tokens back; None: all of the document, where no state is looked at."""
    sharpness: float
    """θ."""
    weight: float = 0.0
    """λ."""


UNIGRAM = Settings(None, 0.0)


def measure_baselines(
    evaluator: Evaluator, documents: TokenizedDocuments, validation: TokenizedDocuments, own: Figures
) -> dict[str, Baseline]:
    """The figures of the same model with its memory off and each baseline instead.

    Args:
        validation: documents by which size, θ and λ are chosen.
        own: the figures of the model as it is.
    """
    vocabulary = evaluator.model.vocabulary_size
    width = evaluator.read_a_token(return_intermediates=True).hidden.shape[-1]  # of a hidden state
    caches = [Settings(size, sharpness) for size in SIZES for sharpness in SHARPNESS]
    totals = torch.zeros(1 + len(caches), len(WEIGHTS), dtype=torch.float64, device=evaluator.model.device)
    read_documents(evaluator, validation, _with_past(evaluator, [UNIGRAM, *caches], totals), "choosing baselines")
    totals = evaluator.processes.reduce(totals).cpu()
    best = [
        settings._replace(weight=WEIGHTS[row.argmin()])
        for settings, row in zip([UNIGRAM, *caches], totals, strict=True)
    ]
    cache = min(zip(best[1:], totals[1:].amin(dim=1).tolist(), strict=True), key=lambda pair: pair[1])[0]
    found: dict[str, Baseline] = {}
    for name, settings in ((CONTINUOUS_CACHE, cache), (DOCUMENT_UNIGRAM, best[0])):
        nats = read_documents(evaluator, documents, with_past(evaluator, settings), name.replace("_", " "))
        figures = figures_of(evaluator, documents, nats)
        found[name] = {
            **figures,
            "difference": paired_difference(own["per_document"], figures["per_document"]),
            "settings": {
                "size": settings.size,
                "sharpness": settings.sharpness,
                "weight": settings.weight,
                "floats": vocabulary if settings.size is None else settings.size * width,
            },
        }
    return found


def with_past(evaluator: Evaluator, settings: Settings) -> Situation:
    """Each segment is read with an empty memory, and what came before in the document is mixed in."""
    return _with_past(evaluator, [settings])


def _with_past(evaluator: Evaluator, choices: Sequence[Settings], totals: Tensor | None = None) -> Situation:
    """The losses by the first of the choices.

    Args:
        totals: to which the nats of each choice with each of `WEIGHTS` are added, [choices, weights].
    """

    def read(segments: Iterable[Segment]) -> Iterator[Tensor]:
        pasts: dict[int, _Past] = {}
        length = max(settings.size or 0 for settings in choices)
        segments, read = tee(segments)
        outputs = stream(
            evaluator.model, read, carry=lambda segment, before, after: None, return_logits=False,
            return_intermediates=True,
        )  # fmt: skip
        for segment, (_, output) in zip(segments, outputs, strict=False):
            losses = output.token_losses.clone()
            for row, document in enumerate(segment.documents.tolist()):
                scored = segment.targets[row] != IGNORE_INDEX
                if not scored.any():
                    continue
                if row not in pasts or pasts[row].document != document:
                    pasts[row] = _Past(document, length, evaluator.model.vocabulary_size)
                nats, targets = output.token_losses[row, scored].double(), segment.targets[row, scored]
                shares = pasts[row].advance(output.hidden[row, scored], targets, choices)
                losses[row, scored] = mixed(nats, shares[0], choices[0].weight).to(losses.dtype)
                if totals is not None:
                    totals.add_(torch.stack([mixed(nats, shares, weight).sum(1) for weight in WEIGHTS], dim=1))
            yield losses

    return read


def mixed(nats: Tensor, shares: Tensor, weight: float) -> Tensor:
    """The losses of tokens to which a baseline gives these shares; where it says nothing (NaN), those of the model."""
    return torch.where(shares.isnan(), nats, -torch.log((1 - weight) * torch.exp(-nats) + weight * shares))


class _Past:
    """What one document's last tokens were, each with the state that it was predicted by, and how often each occurred.

    Args:
        document: its number.
        length: so many of the last tokens are kept with their states.
        vocabulary: how many tokens there are.
    """

    def __init__(self, document: int, length: int, vocabulary: int) -> None:
        self.document = document
        self._length = length
        self._states = torch.empty(0, 0)
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._counts = torch.zeros(vocabulary, dtype=torch.int64)

    def advance(self, hidden: Tensor, targets: Tensor, choices: Sequence[Settings]) -> Tensor:
        """Read the next tokens of the document, and keep them.

        Args:
            hidden: by which they are predicted, [tokens, hidden].
            targets: what they are, [tokens].

        Returns:
            The share of each token in what came before it, by each choice, float64 [choices, tokens]; NaN where nothing
            did.
        """
        count, before, device = len(targets), len(self._tokens), targets.device
        states = F.normalize(hidden.float(), dim=-1)
        if before:
            states = torch.cat([self._states, states])
        tokens = torch.cat([self._tokens.to(device), targets])
        same = tokens == targets[:, None]
        back = torch.arange(before, before + count, device=device)[:, None] - torch.arange(len(tokens), device=device)
        with torch.autocast(device.type, enabled=False):  # it would round what θ multiplies
            scores = states[before:] @ states.T
        shares = [
            self._frequency(targets, same[:, before:])
            if choice.size is None
            else _share(choice.sharpness * scores, same, (back > 0) & (back <= choice.size))
            for choice in choices
        ]
        self._states, self._tokens = (kept[max(0, len(kept) - self._length) :] for kept in (states, tokens))
        self._counts += torch.bincount(targets.cpu(), minlength=len(self._counts))
        return torch.stack(shares)

    def _frequency(self, targets: Tensor, same: Tensor) -> Tensor:
        """How much of all that came before is the same token."""
        before = int(self._counts.sum()) + torch.arange(len(targets), device=targets.device)
        occurred = self._counts[targets.cpu()].to(targets.device) + same.tril(-1).sum(-1)
        return occurred.double() / before


def _share(scores: Tensor, same: Tensor, seen: Tensor) -> Tensor:
    """How much of the softmax over what is seen falls on the same token, [tokens]."""
    weights = torch.softmax(scores.double().masked_fill(~seen, -torch.inf), dim=-1)
    return (weights * same).sum(-1)
