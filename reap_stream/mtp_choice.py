"""What happens to next-token-prediction (MTP) layers, decided before any work.

    score  they are run on the calibration rows and pruned by their own routing
    match  they keep the experts that the last decoder layer with experts keeps
    keep   they stay as they are
    drop   they are left out

Unless told otherwise they are scored. Where that cannot be done they match, and say so.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch

from reap_stream.errors import UnsupportedError, UsageError
from reap_stream.model.mtp_head import MtpHead, read_mtp_head
from reap_stream.model.mtp_inputs import try_mtp
from reap_stream.model.opened import OpenedModel

MtpKind: TypeAlias = Literal["score", "match", "keep", "drop"]


@dataclass(frozen=True, slots=True)
class MtpChoice:
    """What happens to the prediction layers of one model.

    Attributes:
        kind: which of the four.
        head: the layers to run; None: none is run.
        notes: what the user should know of it.
    """

    kind: MtpKind
    head: MtpHead | None = None
    notes: tuple[str, ...] = ()

    def record(self, model: OpenedModel) -> dict[str, object]:
        """The part of run.json that speaks of prediction layers."""
        layers = list(model.tensor_map.mtp_layers)
        return {"choice": self.kind, "layers": layers, "notes": list(self.notes)}


def choose_mtp(model: OpenedModel, asked: str | None, device: torch.device) -> MtpChoice:
    """Decides for a job that runs the model and writes it pruned.

    Args:
        model: the checkpoint.
        asked: what the user said, or None.
        device: where layers run.

    Raises:
        UnsupportedError: the layers have another number of experts than the decoder's, or cannot
            be run though the user asked for it.
    """
    _refuse_uneven(model, asked)
    if asked in ("match", "keep", "drop"):
        return _unscored(model, cast("MtpKind", asked))
    if not model.mtp_kept_layers():
        return MtpChoice("score")
    try:
        return MtpChoice("score", open_head(model, device))
    except UnsupportedError as error:
        if asked == "score":
            message = (
                f"--mtp score: {error}; --mtp match prunes next-token-prediction layers like the "
                "last MoE layer, --mtp drop leaves them out"
            )
            raise UnsupportedError(message) from error
        note = (
            "next-token-prediction layers cannot be run, so they keep the experts of the last MoE "
            f"layer (--mtp match): {error}"
        )
        return MtpChoice("match", notes=(note,))


def choose_observed_mtp(model: OpenedModel, device: torch.device) -> MtpChoice:
    """Decides for a job that only scores: what can be run is."""
    if not model.mtp_kept_layers():
        return MtpChoice("score")
    try:
        return MtpChoice("score", open_head(model, device))
    except UnsupportedError as error:
        note = f"next-token-prediction layers cannot be run, so they have no scores: {error}"
        return MtpChoice("match", notes=(note,))


def choose_scored_mtp(
    model: OpenedModel, asked: str | None, scored: Collection[int], label: str
) -> MtpChoice:
    """Decides for a job that writes by saved scores.

    Args:
        model: the checkpoint.
        asked: what the user said, or None.
        scored: layers of which there are scores.
        label: the scores, for messages.

    Raises:
        UsageError: there are none of the prediction layers, though they could be had.
        UnsupportedError: the layers have another number of experts than the decoder's.
    """
    _refuse_uneven(model, asked)
    if asked in ("match", "keep", "drop"):
        return _unscored(model, cast("MtpKind", asked))
    missing = [layer for layer in model.mtp_kept_layers() if layer not in scored]
    if not missing:
        return MtpChoice("score")
    if asked is None:
        try:
            open_head(model, torch.device("cpu"))
        except UnsupportedError as error:
            note = (
                f"{label} has no scores of next-token-prediction layers, which cannot be run: they "
                f"keep the experts of the last MoE layer (--mtp match): {error}"
            )
            return MtpChoice("match", notes=(note,))
    message = (
        f"{label}: no scores of next-token-prediction layer {missing[0]}: take them with this "
        "version's `observe`, or say --mtp match to prune it like the last MoE layer, --mtp drop "
        "to leave it out"
    )
    raise UsageError(message)


def open_head(model: OpenedModel, device: torch.device) -> MtpHead:
    """The prediction layers, tried out.

    Raises:
        UnsupportedError: they cannot be run; the message says why.
    """
    head = read_mtp_head(model)
    try_mtp(head, device)
    return head


def _unscored(model: OpenedModel, kind: MtpKind) -> MtpChoice:
    if kind != "keep" or not model.mtp_kept_layers():
        return MtpChoice(kind)
    experts = model.architecture.num_experts
    note = (
        f"--mtp keep: next-token-prediction layers keep all {experts} experts while config.json "
        "counts fewer: llama.cpp's converter and vLLM's speculation refuse such a checkpoint; use "
        "it where these layers are ignored or loaded by other means"
    )
    return MtpChoice(kind, notes=(note,))


def _refuse_uneven(model: OpenedModel, asked: str | None) -> None:
    uneven = model.tensor_map.mtp_uneven
    if not uneven or asked in ("keep", "drop"):
        return
    layer, count = next(iter(uneven.items()))
    message = (
        f"next-token-prediction layer {layer} has {count} experts and the decoder's layers "
        f"{model.architecture.num_experts}, so it cannot be pruned to their number: --mtp drop "
        "leaves it out, --mtp keep leaves it as it is"
    )
    raise UnsupportedError(message)
