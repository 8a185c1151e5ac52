"""The routed experts of a layer, run on the tokens the router sent to them.

This is the function behind transformers' experts call. It takes the router's own choice of
experts and its gate weights as they are, runs each expert on its tokens only, and shows every
(expert, gate weight, output) to the statistics before the outputs are weighted and summed:

    S_j = 1/|X_j| * sum over tokens x in X_j of g_j(x) * ||f_j(x)||_2      (arXiv 2510.13999, eq. 9)

g_j is the number that multiplies f_j(x) in the model's own sum, so no routing is re-derived. Where a
model puts the gate on the expert's input, f_j(g_j x) / g_j stands for f_j(x): g_j × norm is then, as
everywhere, the norm of what the expert adds to the layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import torch
from torch import nn
from torch.nn import functional

from reap_stream import _native
from reap_stream.errors import ReapStreamError, UnsupportedError
from reap_stream.model.adapters import Linear, find_adapter
from reap_stream.model.routed_pairs import RoutedPairs, bucket, sort_by_expert
from reap_stream.model.transformers_api import grouped_product

_NATIVE_TAGS: Final[dict[torch.dtype, Literal["bf16", "f16", "f32"]]] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
}


class ParameterSource(Protocol):
    """Where an expert's parameters come from; see `ExpertStore`."""

    def stacked(self, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
        """The parameters of all experts at once, [experts, ...] each."""
        ...

    def parameters(
        self, expert: int, dtype: torch.dtype, device: torch.device, following: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The parameters of one expert by leaf name."""
        ...


class Statistics(Protocol):
    """What is done with every expert's outputs."""

    def add(
        self,
        experts: int | torch.Tensor,
        rows: torch.Tensor,
        gates: torch.Tensor,
        sources: torch.Tensor,
    ) -> None:
        """Takes outputs [n, hidden], their expert (one, or [n]), gate weights [n], sources [n]."""
        ...


@dataclass(frozen=True, slots=True)
class BatchTokens:
    """The tokens of the batch that runs.

    Attributes:
        valid: bool [rows × width], False at padding.
        sources: int32 [rows × width], the calibration source of each token and the half of it that
            its row belongs to; see `scoring.halves.row_shares`.
    """

    valid: torch.Tensor
    sources: torch.Tensor


class RoutedExperts:
    """Runs one layer's experts from a store of their weights.

    Args:
        module: the experts module, whose kind says what is computed; its weights are unused.
        store: where parameters come from.
        experts_per_token: top-k that the router must show.
        kept: for a pruned layer, the store's expert behind each of the layer's; None: all.
        statistics: is shown the outputs; None: the forward alone.
        grouped: run all experts in grouped matrix products, which holds all of them decoded.
    """

    def __init__(
        self,
        module: nn.Module,
        store: ParameterSource,
        experts_per_token: int,
        *,
        kept: Sequence[int] | None = None,
        statistics: Statistics | None = None,
        grouped: bool = False,
    ) -> None:
        adapter = find_adapter(module)
        assert adapter is not None
        self._module: Any = module
        self._adapter = adapter
        (self._num_experts,) = adapter.counts(module)
        self._store = store
        self._experts_per_token = experts_per_token
        self._kept = kept
        self._statistics = statistics
        self._grouped = grouped and adapter.grouped
        self.batch: BatchTokens | None = None
        self.calls = 0

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sums the weighted expert outputs of each token.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] expert numbers.
            top_k_weights: [tokens, k] gate weights.

        Returns:
            [tokens, hidden], zero at padding.
        """
        self.calls += 1
        batch = self._check(hidden_states, top_k_index)
        gates = top_k_weights.float()
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        # A gate of zero is a router's way to send a token nowhere (zaya's skipped tokens).
        chosen = torch.where(gates == 0, self._num_experts, top_k_index)
        routed = sort_by_expert(chosen, batch.valid, self._num_experts)
        run = self._run_grouped if self._grouped else self._run_each
        # Prediction layers may find no token in a batch of short rows.
        if any(routed.counts):
            run(hidden_states, gates, routed, out)
        return out.to(hidden_states.dtype)

    def _run_each(
        self,
        hidden_states: torch.Tensor,
        gates: torch.Tensor,
        routed: RoutedPairs,
        out: torch.Tensor,
    ) -> None:
        assert self.batch is not None
        reached = [expert for expert, count in enumerate(routed.counts) if count]
        start = 0
        for expert, following in zip(reached, [*reached[1:], None], strict=True):
            stop = start + routed.counts[expert]
            tokens, slots = routed.tokens[start:stop], routed.slots[start:stop]
            start = stop
            parameters = self._store.parameters(
                self._source(expert),
                hidden_states.dtype,
                hidden_states.device,
                None if following is None else self._source(following),
            )
            padded = functional.pad(tokens, (0, bucket(len(tokens)) - len(tokens)))
            padded_slots = functional.pad(slots, (0, len(padded) - len(slots)))
            inputs = self._inputs(hidden_states, gates, padded, padded_slots)
            rows = self._run(inputs, parameters, functional.linear)
            rows, gate = rows[: len(tokens)], gates[tokens, slots]
            _combine(out, rows, self._factors(gate), tokens)
            if self._statistics is not None:
                self._statistics.add(
                    expert, self._measured(rows, gate), gate, self.batch.sources[tokens]
                )

    def _run_grouped(
        self,
        hidden_states: torch.Tensor,
        gates: torch.Tensor,
        routed: RoutedPairs,
        out: torch.Tensor,
    ) -> None:
        assert self.batch is not None
        stacked = self._store.stacked(hidden_states.dtype, hidden_states.device)
        if self._kept is not None:
            stacked = {leaf: tensor[list(self._kept)] for leaf, tensor in stacked.items()}
        device = hidden_states.device
        counts = torch.tensor(routed.counts, device=device)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        experts = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)

        def linear(
            rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            product = grouped_product(rows, weight.transpose(-2, -1), ends)
            return product if bias is None else product + bias[experts]

        inputs = self._inputs(hidden_states, gates, routed.tokens, routed.slots)
        rows = self._run(inputs, stacked, linear)
        gate = gates[routed.tokens, routed.slots]
        if self._statistics is not None:
            sources = self.batch.sources[routed.tokens]
            self._statistics.add(experts, self._measured(rows, gate), gate, sources)
        # A place for each (token, choice), summed in order: adding rows of one token as they come
        # would give other last bits in every run on a GPU.
        places = out.new_zeros((len(out) * gates.shape[1], out.shape[1]))
        places[routed.tokens * gates.shape[1] + routed.slots] = (
            rows.float() * self._factors(gate)[:, None]
        )
        out += places.view(len(out), gates.shape[1], -1).sum(dim=1)

    def _source(self, expert: int) -> int:
        return expert if self._kept is None else self._kept[expert]

    def _check(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor) -> BatchTokens:
        batch = self.batch
        kind = type(self._module).__name__
        if batch is None:
            message = f"{kind} was called outside a batch"
            raise ReapStreamError(message)
        if hidden_states.dim() != 2 or len(hidden_states) != len(batch.valid):
            message = (
                f"{kind} got hidden states {list(hidden_states.shape)}, expected one row for each "
                f"of {len(batch.valid)} tokens; this version has no adapter for it"
            )
            raise UnsupportedError(message)
        if tuple(top_k_index.shape) != (len(batch.valid), self._experts_per_token):
            message = (
                f"{kind} got a choice of experts {list(top_k_index.shape)}, expected "
                f"[{len(batch.valid)}, {self._experts_per_token}]"
            )
            raise UnsupportedError(message)
        return batch

    def _run(
        self, rows: torch.Tensor, parameters: dict[str, torch.Tensor], linear: Linear
    ) -> torch.Tensor:
        return self._adapter.run(self._module, rows, parameters, linear)

    def _inputs(
        self,
        hidden_states: torch.Tensor,
        gates: torch.Tensor,
        tokens: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """What experts are given: tokens, scaled where the gate is on the input."""
        rows = hidden_states.index_select(0, tokens)
        if not self._adapter.gate_on_input:
            return rows
        return rows * gates[tokens, slots].to(rows.dtype)[:, None]

    def _factors(self, gates: torch.Tensor) -> torch.Tensor:
        """What experts' outputs are multiplied with in the layer's sum."""
        return torch.ones_like(gates) if self._adapter.gate_on_input else gates

    def _measured(self, rows: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Outputs before the gate weight, as the statistics want them."""
        if not self._adapter.gate_on_input:
            return rows
        return rows.float() / gates[:, None]


def _combine(
    out: torch.Tensor, rows: torch.Tensor, gates: torch.Tensor, tokens: torch.Tensor
) -> None:
    tag = _NATIVE_TAGS.get(rows.dtype)
    if out.device.type != "cpu" or tag is None:
        out.index_add_(0, tokens, rows.float() * gates[:, None])
        return
    _native.combine(
        rows.contiguous().view(torch.uint8).numpy(),
        tag,
        gates.contiguous().numpy(),
        tokens.numpy(),
        out.numpy(),
        rows.shape[1],
        threads=torch.get_num_threads(),
    )
