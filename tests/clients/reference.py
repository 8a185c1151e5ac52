"""What a client must answer: transformers in float32 on a model pruned by hand.

The experts that were kept are read from the pruned checkpoint's own record; all else comes from the
source: its tensors are picked by name, decoded by the formats' formulas, and run unquantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.builders import load_tensors, read_config, write_checkpoint
from tests.clients.checkpoints import LAYERS, decode, store
from tests.engine import read_kept
from tests.oracle import Reference
from tests.oracle_pruning import expected_tensors

Rows = list[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Expected:
    """Natural-logarithm probabilities, float64.

    Attributes:
        rows: for each prompt [tokens, vocabulary]: of the next token.
        drafts: for each prompt [tokens, vocabulary]: of the next token but one, by the MTP layer;
            None without one.
    """

    rows: Rows
    drafts: Rows | None


# What `--weights` asks for, by the names of `checkpoints.store`.
_STORED = {"bf16": "bf16", "fp8": "fp8-block", "fp8-channel": "fp8-channel"}


def expect(
    source: Path, pruned: Path, prompts: Rows, scratch: Path, weights: str = "keep"
) -> Expected:
    """Runs the hand-pruned model.

    Args:
        source: the original checkpoint.
        pruned: what was made of it; only its record of kept experts is read.
        prompts: token arrays [tokens].
        scratch: is made.
        weights: ``--weights`` of the pruning.

    Raises:
        AssertionError: the prompts leave an expert unreached, so a comparison would not see it.
    """
    kept = read_kept(pruned)
    by_hand = _prune_by_hand(source, kept, scratch, weights)
    reference = Reference(by_hand, prompts, torch.float32)
    for layer, calls in reference.calls.items():
        reached = {int(expert) for call in calls for expert in call.index.unique()}
        assert reached == set(range(len(kept[layer]))), (layer, reached)
    rows = [_log_softmax(logits) for logits in reference.logits]
    drafts = _drafts(reference, prompts) if LAYERS in kept else None
    return Expected(rows, drafts)


def _prune_by_hand(source: Path, kept: dict[int, list[int]], directory: Path, weights: str) -> Path:
    config = read_config(source)
    config.pop("quantization_config", None)
    (keep,) = {len(experts) for experts in kept.values()}
    key = "num_experts" if "num_experts" in config else "n_routed_experts"
    tensors = decode(expected_tensors(load_tensors(source), kept))
    if weights != "keep":
        tensors = decode(store(tensors, _STORED[weights]))
    return write_checkpoint(directory, tensors, {**config, key: keep, "torch_dtype": "float32"})


def _drafts(reference: Reference, prompts: Rows) -> Rows:
    """The MTP layer behind each prompt's tokens and the likeliest token after them."""
    # Older transformers has none, and need not to collect these tests.
    from transformers.modeling_layers import MtpModel

    main = reference.model
    # transformers knows the published models' numbers of layers only.
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS}\."]
    mtp = MtpModel.from_pretrained(main).eval()
    seen: list[torch.Tensor] = []
    experts = mtp.layers[0].mtp_block.mlp.experts
    experts.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
    drafts = []
    for prompt, logits in zip(prompts, reference.logits, strict=True):
        tokens = torch.from_numpy(prompt)[None]
        following = torch.cat([tokens[:, 1:], logits[-1:].argmax(-1)[None]], dim=1)
        with torch.no_grad():
            hidden = main.model(input_ids=tokens, use_cache=False).last_hidden_state
            embeddings = main.get_input_embeddings()(following)
            # As serving engines do: there is nothing to predict from before the first token.
            embeddings[:, 0] = 0
            positions = torch.arange(len(prompt))[None]
            states = mtp.forward_layer(0, hidden, positions, None, inputs_embeds=embeddings)
            drafts.append(_log_softmax(main.lm_head(states)[0]))
    count = main.config.n_routed_experts
    assert {int(expert) for index in seen for expert in index.unique()} == set(range(count))
    return drafts


def _log_softmax(logits: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = logits.double().log_softmax(-1).numpy()
    return array
