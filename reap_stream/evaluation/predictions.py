"""From what the heads see to loss, divergence and agreement, a slice of logits at a time.

Logits of all tokens would be the largest tensor of the whole evaluation by far. So a few tokens at
a time go through the heads: the reference's first, then each candidate's, compared at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch

from reap_stream.errors import ForwardError
from reap_stream.evaluation.lockstep import Lockstep
from reap_stream.evaluation.metrics import Comparison, log_softmax_
from reap_stream.evaluation.opening import OpenedEvaluation
from reap_stream.evaluation.positions import Positions
from reap_stream.model.lm_head import slice_tokens
from reap_stream.progress import Progress


def compare_predictions(
    opened: OpenedEvaluation,
    lockstep: Lockstep,
    positions: Positions,
    progress: Progress,
) -> list[Comparison]:
    """Predicts every token but the first of each row, for everyone.

    Args:
        opened: what is evaluated.
        lockstep: the pass behind its last layer.
        positions: what is known of each token.
        progress: is told of tokens.

    Returns:
        The sums of each contestant.

    Raises:
        ForwardError: logits that are no numbers; the message names the candidate.
    """
    found = [Comparison(positions.num_sources) for _ in opened.contestants]
    progress.stage("predictions")
    with ExitStack() as stack:
        for head in {id(head): head for head in opened.heads}.values():
            stack.enter_context(head)
        for tokens in _slices(opened, len(positions.targets)):
            _compare_slice(opened, lockstep, positions, tokens, found)
            progress.tokens(len(found) * (tokens.stop - tokens.start))
    return found


def _slices(opened: OpenedEvaluation, num_tokens: int) -> Iterator[slice]:
    nbytes = opened.memory.slice_nbytes
    step = min(slice_tokens(head.vocab_size, nbytes) for head in opened.heads)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def _compare_slice(
    opened: OpenedEvaluation,
    lockstep: Lockstep,
    positions: Positions,
    tokens: slice,
    found: Sequence[Comparison],
) -> None:
    (places,) = torch.nonzero(positions.targets[tokens] >= 0, as_tuple=True)
    if not len(places):
        return
    targets, sources = (all_[tokens][places] for all_ in (positions.targets, positions.sources))
    reference: torch.Tensor | None = None
    everyone = zip(opened.contestants, lockstep.states, lockstep.seen, found, strict=True)
    for contestant, states, seen, comparison in everyone:
        hidden = seen.taken_from(states.load(tokens.start, tokens.stop)[places])
        logits = opened.heads[contestant.model].logits(hidden)
        try:
            comparison.add(logits, reference, targets, sources)
        except ForwardError as error:
            message = f"{contestant.label}: {error}; --compute-dtype float32 may help"
            raise ForwardError(message) from error
        if reference is None:
            reference = log_softmax_(logits)
