"""Loss, divergence and agreement of a candidate, summed slice by slice.

With p the reference's probabilities of the next token, q the candidate's and t the token that came:

    loss      -log q_t, in nats; perplexity = exp(mean loss)
    kl        KL(p || q) = sum_i p_i (log p_i - log q_i), in nats (Kullback and Leibler 1951)
    agreement how often the most likely token is the same

The divergence of two nearly equal models is a small difference of large sums: rounding of the
logarithms alone would exceed it, and could make it negative. Since p and q both sum to one,

    KL(p || q) = sum_i (p_i d_i + q_i - p_i),   d = log p - log q

of which no term is negative, and an error e of log q_i (all of which share their normaliser's)
costs (q_i - p_i) e and not p_i e: next to nothing where the models nearly agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reap_stream.errors import ForwardError

# Rows are gone through a few at a time, so that the five temporaries of a piece are small beside
# a slice of logits and, on a CPU, stay in its cache.
_PIECE_ELEMENTS = {"cpu": 2**19}
_DEVICE_PIECE_ELEMENTS = 2**23

Sums = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Figures:
    """What is said of a candidate on some tokens.

    Attributes:
        tokens: tokens that were predicted.
        loss: mean negative log-likelihood of the next token, in nats; infinite where a token came
            that the candidate holds impossible; NaN where there are no tokens.
        perplexity: exp of it.
        kl: mean KL(reference || candidate) in nats; infinite where the candidate holds impossible
            what the reference does not.
        top1_agreement: share of tokens of which both find the same one most likely.
    """

    tokens: int
    loss: float
    perplexity: float
    kl: float
    top1_agreement: float

    def document(self) -> dict[str, int | float | None]:
        """As JSON has it, which knows neither infinity nor NaN: these are None."""
        values = {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "kl": self.kl,
            "top1_agreement": self.top1_agreement,
        }
        finite = {key: v if math.isfinite(v) else None for key, v in values.items()}
        return {"tokens": self.tokens, **finite}


class Comparison:
    """Sums of one candidate against the reference, for each source of text.

    Args:
        num_sources: number of sources.
    """

    def __init__(self, num_sources: int) -> None:
        self._tokens = np.zeros(num_sources, dtype=np.int64)
        self._loss: Sums = np.zeros(num_sources)
        self._kl: Sums = np.zeros(num_sources)
        self._agreed = np.zeros(num_sources, dtype=np.int64)

    def add(
        self,
        logits: torch.Tensor,
        reference: torch.Tensor | None,
        targets: torch.Tensor,
        sources: torch.Tensor,
    ) -> None:
        """Adds some tokens.

        Args:
            logits: float32 [n, vocabulary], the candidate's; not changed. Minus infinity stands for
                a token that cannot come.
            reference: float32 [n, vocabulary] log-probabilities of the reference, as `log_softmax_`
                makes them; None: the candidate is the reference.
            targets: int64 [n], the tokens that came.
            sources: int32 [n], where each is from.

        Raises:
            ForwardError: logits are NaN or plus infinity, all of a token's are minus infinity, or
                the model has no logit for a target; the message names the token's place.
        """
        if not len(logits):
            return
        _check_targets(targets, logits.shape[-1])
        found = [
            _compare(
                _log_softmax(logits[rows], rows.start),
                None if reference is None else reference[rows],
                targets[rows].to(logits.device),
            )
            for rows in _pieces(logits)
        ]
        loss, kl, agreed = (torch.cat(own).cpu().numpy() for own in zip(*found, strict=True))
        places, count = sources.cpu().numpy(), len(self._tokens)
        self._tokens += np.bincount(places, minlength=count)
        self._loss += np.bincount(places, loss, count)
        self._kl += np.bincount(places, kl, count)
        self._agreed += np.bincount(places[agreed], minlength=count)

    def figures(self, source: int | None = None) -> Figures:
        """The means of a source, or over the tokens of all sources."""
        tokens = int(_of(self._tokens, source))
        if not tokens:
            return Figures(0, math.nan, math.nan, math.nan, math.nan)
        loss = float(_of(self._loss, source)) / tokens
        # Rounding may leave a sum of terms that are not negative a little below zero.
        kl = max(0.0, float(_of(self._kl, source)) / tokens)
        return Figures(tokens, loss, _exp(loss), kl, int(_of(self._agreed, source)) / tokens)


class HiddenError:
    """How far a candidate's hidden states are from the reference's, for each source of text.

    Args:
        num_sources: number of sources.
    """

    def __init__(self, num_sources: int) -> None:
        self._apart: Sums = np.zeros(num_sources)
        self._whole: Sums = np.zeros(num_sources)

    def add(self, candidate: torch.Tensor, reference: torch.Tensor, sources: torch.Tensor) -> None:
        """Adds some tokens.

        Args:
            candidate: [n, ...], the candidate's hidden states after a layer.
            reference: [n, ...], the reference's, on the same device.
            sources: int32 [n], where each token is from.

        Raises:
            ForwardError: hidden states are not finite.
        """
        if not len(candidate):
            return
        found = []
        for rows in _pieces(candidate):
            theirs = reference[rows].flatten(1).double()
            apart = candidate[rows].flatten(1).double().sub_(theirs)
            found.append((apart.square_().sum(-1), theirs.square_().sum(-1)))
        apart, whole = (torch.cat(own) for own in zip(*found, strict=True))
        _check((apart + whole).isfinite(), "hidden states")
        places, count = sources.cpu().numpy(), len(self._apart)
        self._apart += np.bincount(places, apart.cpu().numpy(), count)
        self._whole += np.bincount(places, whole.cpu().numpy(), count)

    def relative_error(self, source: int | None = None) -> float:
        """||candidate - reference|| / ||reference|| over the tokens of a source, or of all.

        Frobenius norms; NaN where there is nothing to compare.
        """
        apart, whole = float(_of(self._apart, source)), float(_of(self._whole, source))
        if whole:
            return math.sqrt(apart / whole)
        return math.inf if apart else math.nan


def log_softmax_(logits: torch.Tensor) -> torch.Tensor:
    """Turns logits into log-probabilities in their own memory.

    Args:
        logits: float32 [n, vocabulary].

    Returns:
        The same tensor.

    Raises:
        ForwardError: as `Comparison.add` raises it.
    """
    for rows in _pieces(logits):
        logits[rows] = _log_softmax(logits[rows], rows.start)
    return logits


def _compare(
    own: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of log-probabilities [n, vocabulary]: loss, divergence (float64 [n]), agreement (bool [n])."""
    loss = -own.gather(1, targets[:, None])[:, 0].double()
    if reference is None:
        return loss, torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool)
    agreed = own.argmax(-1) == reference.argmax(-1)
    return loss, _divergence(reference, own), agreed


def _divergence(reference: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """KL(reference || own) of log-probabilities [n, vocabulary], float64 [n]."""
    p, q = reference.exp(), own.exp()
    terms = (reference - own).mul_(p).add_(q.sub_(p))
    sums = terms.sum(-1, dtype=torch.float64)
    if bool(torch.isfinite(sums).all()):
        return sums
    # Minus infinity somewhere. What the reference holds impossible counts as what is given to it.
    terms = torch.where(p > 0, (reference - own).mul_(p), 0.0).add_(q)
    return terms.sum(-1, dtype=torch.float64)


def _log_softmax(logits: torch.Tensor, first: int) -> torch.Tensor:
    """Log-probabilities of some rows, of which the first is number `first`, in new memory."""
    made = torch.log_softmax(logits, -1)
    # One value that is no number, or infinite, leaves none of its row.
    _check(~made[:, 0].isnan(), "logits", first)
    return made


def _check(good: torch.Tensor, what: str, first: int = 0) -> None:
    if not bool(good.all()):
        number = first + int((~good).int().argmax())
        message = f"{what} of token {number} of the slice are not finite numbers"
        raise ForwardError(message)


def _check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    least, largest = int(targets.min()), int(targets.max())
    if least < 0 or largest >= vocabulary:
        wrong = least if least < 0 else largest
        message = f"token {wrong} is to be predicted, but the model has {vocabulary} logits"
        raise ForwardError(message)


def _pieces(rows: torch.Tensor) -> Iterator[slice]:
    """Divides [n, ...] into a few rows at a time."""
    elements = _PIECE_ELEMENTS.get(rows.device.type, _DEVICE_PIECE_ELEMENTS)
    each = max(1, elements // max(1, rows[0].numel()))
    for start in range(0, len(rows), each):
        yield slice(start, min(start + each, len(rows)))


def _of(sums: np.ndarray[Any, Any], source: int | None) -> Any:
    return sums.sum() if source is None else sums[source]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
