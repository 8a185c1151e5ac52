"""transformers' own prediction layers, run whole and row by row: what streaming must equal."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from tests.builders import load_tensors, read_config, write_checkpoint
from tests.oracle import ExpertsCall, Sums, load_model, naive_sums

Rows = Sequence["np.ndarray[Any, Any]"]


class MtpReference:
    """A whole model with its prediction layers, run row by row as speculative decoding would.

    Every layer is given the true tokens, not its predecessor's drafts.

    Attributes:
        main: transformers' model.
        head: transformers' prediction layers.
        states: layer → row → hidden states after the layer, [tokens - layer - 1, hidden].
        logits: layer → row → [tokens - layer - 1, vocabulary].
        calls: layer → the experts call of each row.
    """

    def __init__(self, directory: Path, rows: Rows, **kinds: Any) -> None:
        self._learn(*load_head(directory, **kinds), rows)

    @classmethod
    def of(cls, main: Any, head: Any, rows: Rows) -> MtpReference:
        """Of models that are loaded already."""
        made = cls.__new__(cls)
        made._learn(main, head, rows)
        return made

    def _learn(self, main: Any, head: Any, rows: Rows) -> None:
        self.main, self.head = main, head
        count = len(self.head.layers)
        self.states: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(count)]
        self.calls: list[list[ExpertsCall]] = [[] for _ in range(count)]
        handles = [self._hook(number) for number in range(count)]
        for row in rows:
            self._run(torch.from_numpy(row)[None])
        for handle in handles:
            handle.remove()

    def _hook(self, number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            names = ("hidden_states", "top_k_index", "top_k_weights")
            given = [*args, *(kwargs[name] for name in names if name in kwargs)]
            self.calls[number].append(ExpertsCall(*(tensor.clone() for tensor in given)))

        experts = experts_of(self.head, number)
        return experts.register_forward_pre_hook(hook, with_kwargs=True)

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> None:
        hidden = last_hidden_state(self.main, ids)
        for number in range(len(self.head.layers)):
            # One position less for each layer: the row holds no token to predict with.
            hidden = forward_layer(self.head, number, hidden[:, : ids.shape[1] - number - 1], ids)
            self.states[number].append(hidden[0].clone())
            self.logits[number].append(self.head._project_to_logits(hidden)[0])

    def sums(self, number: int) -> Sums:
        """The naive float64 sums of a layer's experts over all rows."""
        module = copy.deepcopy(experts_of(self.head, number)).double()
        return naive_sums(module, self.calls[number])


def load_head(directory: Path, **kinds: Any) -> tuple[Any, Any]:
    """A model and transformers' prediction layers of it, as transformers loads them.

    Args:
        directory: the checkpoint.
        kinds: config values that transformers' config class lacks for this family.
    """
    main = load_model(directory)
    text = main.config.get_text_config()
    for key, value in kinds.items():
        setattr(text, key, value)
    # transformers knows GLM's prediction layers by the numbers that published checkpoints have.
    numbers = range(text.num_hidden_layers, text.num_hidden_layers + text.num_mtp_layers)
    main._keys_to_ignore_on_load_unexpected = [
        r"(^|\.)mtp\.",
        *(rf"layers\.{number}\." for number in numbers),
    ]
    head = MtpModel.from_pretrained(main)
    return main, head.eval()


def loadable(source: Path) -> Path:
    """A checkpoint as transformers' loading wants it: MiMo's last norm by the name it knows."""
    tensors = load_tensors(source)
    if not any("final_layernorm" in name for name in tensors):
        return source
    renamed = {n.replace("final_layernorm", "post_norm"): t for n, t in tensors.items()}
    return write_checkpoint(
        source.with_name(f"{source.name}-loadable"), renamed, read_config(source)
    )


def prune_head(head: Any, smaller: Any, kept: Mapping[int, Sequence[int]], first: int) -> Any:
    """A head with only the kept experts, by cutting every parameter that is as long as they are.

    Args:
        head: the whole head.
        smaller: one of as many experts as stay; `head` itself: experts are taken out of it.
        kept: kept experts by layer.
        first: number of the first prediction layer.
    """
    pruned = copy.deepcopy(smaller)
    for number, layer in enumerate(pruned.layers):
        experts = kept.get(first + number)
        for name, tensor in head.layers[number].state_dict().items():
            routed = name.startswith(("mtp_block.mlp.gate.", "mtp_block.mlp.experts."))
            cut = experts is not None and routed
            value = tensor.index_select(0, torch.tensor(list(experts))) if cut else tensor
            owner, leaf = name.rpartition(".")[::2]
            module = layer.get_submodule(owner)
            if leaf in module._buffers:
                module._buffers[leaf] = value.clone()
            else:
                setattr(module, leaf, nn.Parameter(value.clone()))
        mlp = layer.mtp_block.mlp
        for module in (mlp, mlp.gate, mlp.experts) if experts is not None else ():
            for attribute in ("num_experts", "n_routed_experts"):
                if hasattr(module, attribute):
                    setattr(module, attribute, len(experts))
    return pruned


def experts_of(head: Any, number: int) -> Any:
    """The routed experts of a prediction layer."""
    return head.layers[number].mtp_block.mlp.experts


def last_hidden_state(main: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the model's head, and the first prediction layer, see."""
    output = main(input_ids=ids, output_hidden_states=True, use_cache=False)
    states: torch.Tensor = output.hidden_states[-1]
    return states


def forward_layer(head: Any, number: int, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One prediction layer on hidden states [1, n, hidden] of a row's first n tokens."""
    width = hidden.shape[1]
    tokens = ids[:, number + 1 : number + 1 + width]
    positions = torch.arange(number + 1, number + 1 + width)[None]
    cache = MtpCache(config=head.config)
    if not hasattr(head, "forward_layer"):
        return _step_of_the_loop(head, number, hidden, tokens, positions)
    output: torch.Tensor = head.forward_layer(number, hidden, positions, cache, input_ids=tokens)
    return output


def _step_of_the_loop(
    head: Any, number: int, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """What older releases do for each layer within their loop over drafted tokens."""
    embeddings = head.embed_tokens(tokens)
    cache = MtpCache(config=head.config)
    output: torch.Tensor = head.layers[number](
        embeddings,
        hidden,
        position_embeddings=head.rotary_emb(embeddings, position_ids=positions),
        position_ids=positions,
        past_key_values=cache,
        **head.create_masks_for_mtp_layer(number, embeddings, cache, positions),
    )
    return output
