"""The reference: whole models in transformers, naive formulas, nothing of this package.

A row runs alone, unpadded, through transformers' own eager model. The router's choice is taken
from the call of the experts module, and an expert's output from that module run in float64 on one
expert at a time with a gate weight of one.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.builders import load_tensors
from tests.families import NUM_EXPERTS

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class ExpertsCall:
    """One call of a routed-experts module: [tokens, hidden], [tokens, k], [tokens, k]."""

    hidden: torch.Tensor
    index: torch.Tensor
    gates: torch.Tensor


@dataclass(frozen=True)
class Sums:
    """What the experts of a layer did, float64 [experts] each."""

    tokens: np.ndarray[Any, Any]
    gate_sum: np.ndarray[Any, Any]
    norm_sum: np.ndarray[Any, Any]
    gate_norm_sum: np.ndarray[Any, Any]
    norm_max: np.ndarray[Any, Any]

    def scores(self, method: str) -> np.ndarray[Any, Any]:
        """Mean over the expert's tokens; the number of them for ``frequency``."""
        if method == "frequency":
            return self.tokens.astype(np.float64)
        sums = {"reap": self.gate_norm_sum, "ean": self.norm_sum, "gate": self.gate_sum}[method]
        return np.array([s / n if n else 0.0 for s, n in zip(sums, self.tokens, strict=True)])


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model as transformers loads it, experts run by its own eager code."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager"
    )
    return model.eval()


def experts_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer → the module behind transformers' experts call."""
    found = {}
    for name, module in model.named_modules():
        match = _LAYER.search(f".{name}.")
        if match and hasattr(module, "is_concatenated") and hasattr(module, "has_gate"):
            found[int(match[1])] = module
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "layers" and isinstance(module, nn.ModuleList):
            return list(module)
    raise AssertionError(type(model).__name__)


class Reference:
    """A whole model run row by row.

    Attributes:
        model: transformers' model.
        states: layer → row → hidden states after the layer, [tokens, hidden].
        calls: MoE layer → the experts call of each row.
        logits: row → [tokens, vocabulary].
    """

    def __init__(
        self, directory: Path, rows: Sequence[np.ndarray[Any, Any]], dtype: torch.dtype
    ) -> None:
        self.model = load_model(directory, dtype)
        self.states: list[list[torch.Tensor]] = [[] for _ in decoder_layers(self.model)]
        self.calls: dict[int, list[ExpertsCall]] = {n: [] for n in experts_modules(self.model)}
        self._sums: dict[tuple[int, tuple[int, ...]], Sums] = {}
        handles = self._hook()
        self.logits = [run(self.model, row) for row in rows]
        for handle in handles:
            handle.remove()

    def _hook(self) -> list[Any]:
        def keep_state(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                self.states[number].append(first[0].clone())

            return hook

        def keep_call(number: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                names = ("hidden_states", "top_k_index", "top_k_weights")
                given = [*args, *(kwargs[name] for name in names if name in kwargs)]
                self.calls[number].append(ExpertsCall(*(tensor.clone() for tensor in given)))

            return hook

        layers = decoder_layers(self.model)
        handles = [layer.register_forward_hook(keep_state(n)) for n, layer in enumerate(layers)]
        for number, module in experts_modules(self.model).items():
            handles.append(module.register_forward_pre_hook(keep_call(number), with_kwargs=True))
        return handles

    def sums(self, layer: int, rows: Sequence[int] | None = None) -> Sums:
        """The naive sums of a layer over some rows (default: all)."""
        chosen = tuple(range(len(self.calls[layer])) if rows is None else rows)
        if (layer, chosen) not in self._sums:
            calls = [self.calls[layer][row] for row in chosen]
            module = copy.deepcopy(experts_modules(self.model)[layer]).double()
            self._sums[layer, chosen] = naive_sums(module, calls)
        return self._sums[layer, chosen]

    def kept(self, keep: int, method: str = "reap", groups: int = 1) -> dict[int, list[int]]:
        """The experts that stay in each layer."""
        return {n: best(self.sums(n).scores(method), keep, groups) for n in sorted(self.calls)}


def run(model: nn.Module, row: np.ndarray[Any, Any]) -> torch.Tensor:
    """Logits of one row, [tokens, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits
    return logits[0]


def naive_sums(module: Any, calls: Iterable[ExpertsCall]) -> Sums:
    """The sums of eq. 9 and its relatives, one (token, expert) pair after the other."""
    count = int(module.num_experts)
    tokens = np.zeros(count, np.int64)
    sums = {name: np.zeros(count) for name in ("gate", "norm", "gate_norm", "max")}
    for call in calls:
        for expert in range(count):
            who, slot = torch.where(call.index == expert)
            if not len(who):
                continue
            norms = _output(module, call.hidden[who], expert).norm(dim=-1).numpy()
            gates = call.gates[who, slot].double().numpy()
            tokens[expert] += len(who)
            sums["gate"][expert] += gates.sum()
            sums["norm"][expert] += norms.sum()
            sums["gate_norm"][expert] += (gates * norms).sum()
            sums["max"][expert] = max(sums["max"][expert], norms.max())
    return Sums(tokens, sums["gate"], sums["norm"], sums["gate_norm"], sums["max"])


def _output(module: nn.Module, hidden: torch.Tensor, expert: int) -> torch.Tensor:
    """f_j: the module's own eager forward with one expert a token and a gate weight of one."""
    index = torch.full((len(hidden), 1), expert)
    gates = torch.ones(len(hidden), 1, dtype=torch.float64)
    with torch.no_grad():
        output: torch.Tensor = module(hidden.double(), index, gates)
    return output


def best(scores: np.ndarray[Any, Any], keep: int, groups: int) -> list[int]:
    """The highest scores, in each group as many, of equal ones the lower index."""
    size = len(scores) // groups
    kept: list[int] = []
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        kept += sorted(members, key=lambda j: (-scores[j], j))[: keep // groups]
    return sorted(kept)


def prune_by_hand(model: Any, smaller: Any, kept: Mapping[int, Sequence[int]]) -> Any:
    """Gives a model of fewer experts the weights of the kept ones, by comparing shapes.

    Args:
        model: the original.
        smaller: a model of the same family with as many experts as are kept, weights unused.
        kept: kept experts by layer.
    """
    source = model.state_dict()
    picked = {}
    for name, tensor in smaller.state_dict().items():
        whole = source[name]
        for dim, (before, after) in enumerate(zip(whole.shape, tensor.shape, strict=True)):
            if before != after:
                match = _LAYER.search(name)
                assert match is not None
                whole = whole.index_select(dim, torch.tensor(list(kept[int(match[1])])))
        picked[name] = whole
    smaller.load_state_dict(picked)
    return smaller.eval()


def assert_kept_bytes(
    source: Path, output: Path, kept: Mapping[int, Sequence[int]], num_layers: int = 0
) -> None:
    """Compares every tensor of a pruned checkpoint with what names and shapes say it must be.

    Args:
        source: the original.
        output: what was pruned from it.
        kept: kept experts by layer.
        num_layers: decoder layers, on which the count of layers under ``mtp.`` carries on.
    """
    expected = expected_tensors(load_tensors(source), kept, num_layers)
    found = load_tensors(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(_bits(found[name]), _bits(tensor)), name


def expected_tensors(
    source: Mapping[str, torch.Tensor], kept: Mapping[int, Sequence[int]], num_layers: int = 0
) -> dict[str, torch.Tensor]:
    """The kept tensors by their new names."""
    expected = {}
    for name, tensor in source.items():
        match = _LAYER.search(f".{name}")
        number = int(match[1]) if match else -1
        experts = kept.get(number + num_layers if name.startswith("mtp.") else number)
        own = _EXPERT.search(name)
        if experts is None:
            expected[name] = tensor
        elif own is None:
            dim = _expert_dim(name, tensor)
            picked = tensor if dim is None else tensor.index_select(dim, torch.tensor(experts))
            expected[name] = picked
        elif int(own[1]) in experts:
            slot = list(experts).index(int(own[1]))
            expected[f"{name[: own.start(1)]}{slot}{name[own.end(1) :]}"] = tensor
    return expected


def _expert_dim(name: str, tensor: torch.Tensor) -> int | None:
    """Router rows, correction biases and fused experts: the first dimension of that length."""
    routed = ("gate.", "router", "experts.", "correction_bias", "expert_bias", "_linear.weight")
    if not any(part in name for part in routed) or "shared" in name or "_proj.weight" in name:
        return None
    return next((d for d, length in enumerate(tensor.shape) if length == NUM_EXPERTS), None)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
