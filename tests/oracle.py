"""The reference: whole models in transformers, naive formulas, nothing of this package.

A row runs alone, unpadded, through transformers' own eager model. The router's choice is taken
from the call of the experts module, and an expert's output from that module run in float64 on one
expert at a time with a gate weight of one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from tests.builders import read_config
from tests.families import NUM_EXPERTS
from tests.oracle_pruning import LAYER, OTHERS, best

# Experts that do not go through transformers' experts call → how far above them the module is that
# is called with the router's choice, or chooses.
_OWN_CALL = {
    "Step3p7Experts": 0,
    "LongcatFlashExperts": 0,
    "DbrxExpertGLU": 1,
    "Llama4TextExperts": 1,
}


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
    model = load_class(directory).from_pretrained(
        directory, dtype=dtype, experts_implementation="eager"
    )
    return model.eval()


def load_class(directory: Path) -> Any:
    """The class that config.json names."""
    (name,) = read_config(directory)["architectures"]
    return getattr(transformers, name, transformers.AutoModelForCausalLM)


def experts_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Layer of the text decoder → the module that holds its routed experts' weights."""
    found = {}
    for name, module in model.named_modules():
        match = LAYER.search(f".{name}.")
        if match and not OTHERS.search(f".{name}.") and _holds_experts(module):
            found[int(match[1])] = module
    return found


def _holds_experts(module: nn.Module) -> bool:
    called = hasattr(module, "is_concatenated") and hasattr(module, "has_gate")
    return called or type(module).__name__ in _OWN_CALL


def _calls_experts(model: nn.Module) -> dict[int, nn.Module]:
    """Layer → the module that is called with tokens and their choice, or that chooses."""
    holders = experts_modules(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer, module in holders.items():
        levels = _OWN_CALL.get(type(module).__name__, 0)
        path = names[id(module)].split(".")
        found[layer] = model.get_submodule(".".join(path[: len(path) - levels]))
    return found


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, in order."""
    for name, module in model.named_modules():
        text = not OTHERS.search(f".{name}.")
        listed = name.rpartition(".")[2] in ("layers", "blocks")
        if text and listed and isinstance(module, nn.ModuleList):
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
                hidden = given[0].reshape(-1, given[0].shape[-1])
                choice = given[1:] or _llama4_choice(module, hidden)
                clones = (tensor.clone() for tensor in (hidden, *choice))
                self.calls[number].append(ExpertsCall(*clones))

            return hook

        layers = decoder_layers(self.model)
        handles = [layer.register_forward_hook(keep_state(n)) for n, layer in enumerate(layers)]
        for number, module in _calls_experts(self.model).items():
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
    if type(model).forward is nn.Module.forward:
        # An omni model: its thinker reads and writes text.
        model = model.get_submodule("thinker")
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits
    return logits[0]


def naive_sums(module: Any, calls: Iterable[ExpertsCall]) -> Sums:
    """The sums of eq. 9 and its relatives, one (token, expert) pair after the other."""
    count = NUM_EXPERTS
    tokens = np.zeros(count, np.int64)
    sums = {name: np.zeros(count) for name in ("gate", "norm", "gate_norm", "max")}
    for call in calls:
        for expert in range(count):
            # A gate of zero is a token that was sent nowhere.
            who, slot = torch.where((call.index == expert) & (call.gates != 0))
            if not len(who):
                continue
            gate = call.gates[who, slot].double()
            norms = _output(module, call.hidden[who], expert, gate).norm(dim=-1).numpy()
            gates = gate.numpy()
            tokens[expert] += len(who)
            sums["gate"][expert] += gates.sum()
            sums["norm"][expert] += norms.sum()
            sums["gate_norm"][expert] += (gates * norms).sum()
            sums["max"][expert] = max(sums["max"][expert], norms.max())
    return Sums(tokens, sums["gate"], sums["norm"], sums["gate_norm"], sums["max"])


def _output(module: Any, hidden: torch.Tensor, expert: int, gates: torch.Tensor) -> torch.Tensor:
    """f_j: the module's own eager forward with one expert a token and a gate weight of one.

    Where the gate is on the expert's input: what the expert adds to the sum, over the gate.
    """
    hidden = hidden.double()
    with torch.no_grad():
        if type(module).__name__ == "Llama4TextExperts":
            given = torch.zeros(NUM_EXPERTS, *hidden.shape, dtype=torch.float64)
            given[expert] = hidden * gates[:, None]
            added = module(given.flatten(0, 1)).view(given.shape)[expert]
            return added / gates[:, None]
        if type(module).__name__ == "DbrxExpertGLU":
            rows = [p.view(NUM_EXPERTS, -1, hidden.shape[1])[expert] for p in module.parameters()]
            return module(hidden, *rows)
        if type(module).__name__ == "LongcatFlashExperts":
            gate, up = (hidden @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            return (module.act_fn(gate) * up) @ module.down_proj[expert].T
        index = torch.full((len(hidden), 1), expert)
        ones = torch.ones(len(hidden), 1, dtype=torch.float64)
        output: torch.Tensor = module(hidden, index, ones)
    return output


def _llama4_choice(block: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts and their gates: all others have a gate of zero."""
    scores, _ = block.router(hidden)
    index = torch.stack([row.nonzero()[:, 0] for row in scores])
    return index, scores.gather(1, index)
