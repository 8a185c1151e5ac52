"""What a model is, asked of transformers and not of a table of families.

transformers' own model class is built without weights from config.json. It is built a second
time with fewer experts, and the parameters whose shape differs are the ones that pruning
slices, along the dimension that differs: experts, router rows, correction biases, whatever
the family calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from reap_stream.errors import UnsupportedError
from reap_stream.model.counting import (
    build_smaller,
    extra_entries,
    shape_difference,
    with_expert_count,
)
from reap_stream.model.decoder import Decoder, expert_counts, find_decoder
from reap_stream.model.routing import Routing, read_routing
from reap_stream.model.transformers_api import build_meta_model, get_tensor, load_config

__all__ = ["Architecture", "read_architecture", "with_expert_count"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without weights and what pruning must know of it.

    Attributes:
        name: model class, as config.json's `architectures` has it where it says so.
        model: transformers' model on the meta device, its experts calling us.
        layers_path: dotted path of the list of decoder layers.
        num_layers: decoder layers.
        experts_paths: MoE layer → dotted path of its routed-experts module.
        num_experts: routed experts of each MoE layer.
        routing: how the routers choose.
        count_paths: raw config.json keys that hold the number of experts.
        sliced: parameter or buffer → dimension along which its experts lie.
        extras: those of `sliced` in which more lies behind the experts → how many entries.
        tied: parameters that share another's storage and need no tensor of their own.
        text_path: dotted path of the module whose forward takes text; empty: the model itself.
    """

    name: str
    model: Any
    layers_path: str
    num_layers: int
    experts_paths: dict[int, str]
    num_experts: int
    routing: Routing
    count_paths: tuple[tuple[str, ...], ...]
    sliced: dict[str, int]
    tied: frozenset[str] = field(default_factory=frozenset)
    text_path: str = ""
    extras: Mapping[str, int] = field(default_factory=dict)

    @property
    def text_model(self) -> Any:
        """The module whose forward takes text: in an omni model one of several."""
        return self.model.get_submodule(self.text_path)

    @property
    def decoder_path(self) -> str:
        """Dotted path of the module that owns the decoder layers."""
        return self.layers_path.rpartition(".")[0]

    @property
    def embedding(self) -> Any:
        """The module that embeds text tokens, weight [vocabulary, hidden]."""
        return self.text_model.get_input_embeddings()

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with routed experts, ascending."""
        return sorted(self.experts_paths)

    def runs_on_text(self, parameter: str) -> bool:
        """Whether text runs through a parameter: not one of a vision tower, a talker or the like."""
        head = self.text_model.get_output_embeddings()
        inside = not self.decoder_path or parameter.startswith(self.decoder_path + ".")
        return inside or get_tensor(self.model, parameter) is getattr(head, "weight", None)

    def layer_of(self, parameter: str) -> int | None:
        """The decoder layer a parameter belongs to, or None."""
        prefix = self.layers_path + "."
        if not parameter.startswith(prefix):
            return None
        return int(parameter.removeprefix(prefix).split(".", 1)[0])

    def total_parameters(self, keep: int | None = None) -> int:
        """Parameters of the decoder with `keep` experts a layer (default: all)."""
        kept = self.num_experts if keep is None else keep
        experts = set(self.experts_paths.values())
        total = 0
        parameters: Iterator[tuple[str, torch.Tensor]] = self.model.named_parameters()
        for name, tensor in parameters:
            dim = self.sliced.get(name)
            length = 1 if dim is None else self.pruned_length(name, tensor.shape[dim], kept)
            if name.rpartition(".")[0] in experts:
                # Behind the experts lies what nothing reads.
                length -= self.extras.get(name, 0)
            total += tensor.numel() // (1 if dim is None else tensor.shape[dim]) * length
        return total

    def pruned_length(self, name: str, length: int, keep: int) -> int:
        """Entries along the experts' dimension of a sliced parameter that hold `keep` experts."""
        extra = self.extras.get(name, 0)
        return (length - extra) // self.num_experts * keep + extra

    def entries_of_each(self, name: str) -> int:
        """Entries of one expert along the experts' dimension of a sliced parameter."""
        length = int(get_tensor(self.model, name).shape[self.sliced[name]])
        return (length - self.extras.get(name, 0)) // self.num_experts

    def active_parameters(self, keep: int | None = None) -> int:
        """Parameters one token uses: all but the experts it is not sent to."""
        kept = self.num_experts if keep is None else keep
        expert: int = sum(
            tensor.numel() // tensor.shape[self.sliced[name]] * self.entries_of_each(name)
            for path in self.experts_paths.values()
            for name, tensor in self.model.get_submodule(path).named_parameters(path, recurse=False)
        )
        return self.total_parameters(keep) - expert * (kept - self.routing.experts_per_token)


def read_architecture(
    directory: Path,
    raw_config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> Architecture:
    """Learns a model's architecture from its config.json.

    Args:
        directory: the checkpoint.
        raw_config: config.json as parsed JSON.
        dtype: dtype the forward computes in.
        trust_remote_code: let the checkpoint's own code build the model.

    Raises:
        UnsupportedError: the family has no MoE layers, does not run its experts through
            transformers' experts call, or does not have one number of experts.
    """
    config = load_config(directory, raw_config, trust_remote_code=trust_remote_code)
    model = build_meta_model(config, dtype, trust_remote_code=trust_remote_code)
    decoder = find_decoder(model)
    num_experts = _one_count(model, decoder)
    smaller = build_smaller(
        directory, raw_config, model, decoder, trust_remote_code=trust_remote_code
    )
    sliced = shape_difference(model, num_experts, smaller.model, smaller.count)
    _check_sliced(model, decoder, sliced)
    first = min(decoder.experts_paths)
    return Architecture(
        name=(raw_config.get("architectures") or [type(model).__name__])[0],
        model=model,
        layers_path=decoder.layers_path,
        num_layers=decoder.num_layers,
        experts_paths=decoder.experts_paths,
        num_experts=num_experts,
        routing=read_routing(
            model, f"{decoder.layers_path}.{first}", decoder.experts_paths[first], sliced
        ),
        count_paths=smaller.count_paths,
        sliced=sliced,
        tied=frozenset(getattr(model, "all_tied_weights_keys", None) or {}),
        text_path=decoder.text_path,
        extras=extra_entries(model, num_experts, smaller, sliced),
    )


def _one_count(model: Any, decoder: Decoder) -> int:
    counts = expert_counts(model, decoder.experts_paths.values())
    if len(counts) != 1:
        message = (
            f"{type(model).__name__} has MoE layers of {sorted(counts)} experts; serving engines "
            "and this tool expect one number for all layers"
        )
        raise UnsupportedError(message)
    return counts.pop()


def _check_sliced(model: Any, decoder: Decoder, sliced: Mapping[str, int]) -> None:
    outside = [name for name in sliced if not name.startswith(decoder.layers_path + ".")]
    if outside:
        message = (
            f"{type(model).__name__}: {outside[0]} depends on the number of experts but lies in no "
            "decoder layer"
        )
        raise UnsupportedError(message)
