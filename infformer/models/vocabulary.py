"""From tokens to hidden states and back, with one set of weights for both ways."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infformer.errors import ModelError
from infformer.models.chunked_loss import cross_entropy


class TiedVocabulary(nn.Module):
    """One vector per token: what it is embedded as, and what scores it, with a bias of its own as in Transformer-XL."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, hidden)
        self.bias = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal vectors of standard deviation 0.02, and no bias."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [...] as vectors [..., hidden]."""
        return self.embedding(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, [..., vocabulary], for hidden states [..., hidden]."""
        return F.linear(hidden, self.embedding.weight, self.bias)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each label.

        Args:
            hidden: [tokens, hidden].
            labels: [tokens]; -100 where nothing is scored.

        Returns:
            Nats, float32, [tokens]; 0 where nothing is scored.
        """
        return cross_entropy(self.logits)(hidden, labels)


class AdaptiveVocabulary(nn.Module):
    """Adaptive softmax (Grave et al., arXiv 1609.04309) whose weights are the adaptive input embeddings too.

    Tokens are numbered by descending frequency and cut into bands. The softmax of the head is over the frequent tokens
    and the rare bands; a rare token costs its band, and itself in the softmax of its band:

        p(token) = p(token | head)                                  of a frequent token
        p(token) = p(band | head) p(token | band)                   of a rare one

    so that only the bands of the labels are ever computed. The input (Baevski & Auli, arXiv 1809.10853) reads the same
    vectors backwards: a frequent token is its row of the head; a rare one is its row in its band, of the band's width,
    through the band's projection.

    With divisor 1 all bands are as wide as the model. Transformer-XL's then have no projections, and a bias on the rare
    tokens too.

    Args:
        size: number of tokens.
        hidden: width of the model.
        cutoffs: the first token of each rare band, ascending. Transformer-XL's for the 267,735 words of WikiText-103:
            20,000, 40,000 and 200,000, with divisor 1.
        divisor: band i = 1, 2, ... is hidden / divisorⁱ wide, rounded down.

    Raises:
        ModelError: the cutoffs do not cut this vocabulary, or a band would have no width.
    """

    def __init__(self, size: int, hidden: int, cutoffs: list[int], divisor: float) -> None:
        super().__init__()
        if not cutoffs or any(first >= second for first, second in pairwise([0, *cutoffs, size])):
            raise ModelError(
                f"model.architecture.adaptive_cutoffs={list(cutoffs)} cannot cut a vocabulary of {size} tokens: give "
                f"the first token of each rare band, ascending, from 1 to {size - 1}, or none for a plain softmax"
            )
        if divisor < 1 or hidden < divisor ** len(cutoffs):
            raise ModelError(
                f"model.architecture.adaptive_divisor={divisor}: band {len(cutoffs)}, the last, would be {hidden} / "
                f"{divisor}^{len(cutoffs)} wide, and must be from 1 to {hidden}; set it from 1 to "
                f"{int(hidden ** (1 / len(cutoffs)))}, or give fewer adaptive_cutoffs"
            )
        self.cutoffs = list(cutoffs)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(hidden, size, self.cutoffs, divisor, head_bias=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal vectors and projections of standard deviation 0.02, and no bias."""
        for parameter in self.softmax.parameters():
            nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.softmax.head.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [...] as vectors [..., hidden]."""
        flat = tokens.flatten()
        bands = self._bands(flat)
        (frequent,) = torch.where(bands == 0)
        places, vectors = [frequent], [F.embedding(flat[frequent], self.softmax.head.weight)]
        for band, (first, tail) in enumerate(zip(self.cutoffs, self.softmax.tail, strict=True), start=1):
            projection, table = tail.parameters()
            (rare,) = torch.where(bands == band)
            places.append(rare)
            vectors.append(F.embedding(flat[rare] - first, table) @ projection)
        by_band = torch.cat(vectors)
        return torch.empty_like(by_band).index_copy(0, torch.cat(places), by_band).view(*tokens.shape, by_band.shape[1])

    def logits(self, hidden: Tensor) -> Tensor:
        """Log-probability of every token, [..., vocabulary], for hidden states [..., hidden]; float32 at least."""
        frequent, rare = _log_softmax(self.softmax.head(hidden)).split([self.cutoffs[0], len(self.cutoffs)], dim=-1)
        bands = [
            band + _log_softmax(tail(hidden))
            for band, tail in zip(rare.split(1, dim=-1), self.softmax.tail, strict=True)
        ]
        return torch.cat([frequent, *bands], dim=-1)

    def token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood of each label; only the bands that the labels are in are computed.

        Args:
            hidden: [tokens, hidden].
            labels: [tokens]; -100 where nothing is scored.

        Returns:
            Nats, float32, [tokens]; 0 where nothing is scored.
        """
        bands = self._bands(labels)
        losses = cross_entropy(self.softmax.head)(hidden, torch.where(bands == 0, labels, self.cutoffs[0] + bands - 1))
        # A band without labels is computed for none, so that every parameter takes part in every step.
        for band, (first, tail) in enumerate(zip(self.cutoffs, self.softmax.tail, strict=True), start=1):
            (rare,) = torch.where(bands == band)
            losses = losses.index_add(0, rare, cross_entropy(tail)(hidden[rare], labels[rare] - first))
        return losses

    def _bands(self, tokens: Tensor) -> Tensor:
        """The band that each token is in, of the same shape; 0 for frequent tokens, and for what is not scored."""
        return torch.stack([tokens >= first for first in self.cutoffs]).sum(0)


def _log_softmax(scores: Tensor) -> Tensor:
    return scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
