"""The plan: what pruning would give and take, as a function of headers, config and kept count.

Nothing is read but headers, nothing is written. What is planned here is what `prune` does: the
same layout, the same targets with the same refusals, the same division of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from reap_stream.checkpoint.source import open_config
from reap_stream.download import Download, read_download
from reap_stream.errors import UsageError
from reap_stream.inspection import (
    ModelFacts,
    Refusals,
    forward_refusals,
    model_facts,
    mtp_notes,
    mtp_parameters,
)
from reap_stream.memory import BudgetError, MemoryPlan
from reap_stream.model.described import open_or_describe
from reap_stream.model.mtp_head import MtpHead
from reap_stream.model.opened import OpenedModel
from reap_stream.mtp_choice import choose_mtp
from reap_stream.preparation import choose_device, choose_dtype, memory_for
from reap_stream.pruning import Variant, check_config, plan_variants, read_targets, recoded
from reap_stream.resident import available_nbytes, gib
from reap_stream.scoring.selection import Target, kept_count
from reap_stream.serving import engine_warnings
from reap_stream.settings import OutputSettings, RunSettings
from reap_stream.shard_order import shard_order

# Between two measurements the process itself may grow by a little.
_SLACK_NBYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class PassPlan:
    """How the calibration pass would run, whatever the targets.

    Attributes:
        tokens: of the calibration data, the most that samples × sequence length give.
        device: where layers run.
        compute_dtype: what they compute in.
        memory_budget_bytes: host memory that may be used.
        batch_tokens: tokens that run together.
        hidden_state_bytes: of all tokens between two layers.
        hidden_states_in_file: whether they go to a file, for want of memory.
        expert_slots: experts of a layer held at a time.
        fits: whether the budget can hold the pass; else the figures are for the least that can.
    """

    tokens: int
    device: str
    compute_dtype: str
    memory_budget_bytes: int
    batch_tokens: int
    hidden_state_bytes: int
    hidden_states_in_file: bool
    expert_slots: int
    fits: bool


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """One target.

    Attributes:
        sparsity: fraction of routed experts asked to go.
        keep: experts that stay in every layer.
        total_parameters: of the decoder.
        active_parameters: of these, what one token uses.
        mtp_parameters: of next-token-prediction layers.
        bytes: of all tensors written, headers left out.
        file_bytes: of all shards, headers counted.
        shards: files of weights.
        peak_host_bytes: predicted peak of resident memory.
        peak_device_bytes: predicted peak of device memory; 0 on the CPU.
        warnings: what to know before it is run or served.
    """

    sparsity: float
    keep: int
    total_parameters: int
    active_parameters: int
    mtp_parameters: int
    bytes: int
    file_bytes: int
    shards: int
    peak_host_bytes: int
    peak_device_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Everything `plan` says.

    Attributes:
        facts: what the source is.
        variants: one for each target.
        calibration: how the pass would run.
        disk_bytes: free space that the output needs: all variants, the snapshot of the hidden
            states and the one that replaces it, and hidden states in a file.
        notes: what could not be told.
        download: what fetching the source takes; None: it is a directory.
    """

    facts: ModelFacts
    variants: tuple[VariantPlan, ...]
    calibration: PassPlan
    disk_bytes: int
    notes: tuple[str, ...]
    download: Download | None = None

    def document(self) -> dict[str, Any]:
        """`plan --json`: the facts beside the rest, not below it."""
        rest = asdict(self)
        facts: dict[str, Any] = rest.pop("facts")
        return {**facts, **rest}


def plan_pruning(run: RunSettings, output: OutputSettings) -> PruningPlan:
    """Plans a pruning job without weights being read, or even being there.

    A memory budget that is too small is a warning here, for the plan is what tells how much is
    needed; what `prune` refuses for other reasons is refused.

    Args:
        run: the model and how it would be run; its calibration is not opened.
        output: the targets and how they would be written; nothing is written.

    Raises:
        UsageError: targets that leave the router too few experts, or malformed settings.
        CheckpointError: files are damaged, inconsistent or unsafe.
        UnsupportedError: it is no model that can be pruned.
    """
    samples = run.samples or 0
    if samples < 1 or run.sequence_length < 1:
        message = (
            f"--samples is {run.samples} and --sequence-length {run.sequence_length}: both must "
            "be at least 1"
        )
        raise UsageError(message)
    device = choose_device(run.device)
    dtype = choose_dtype(run.compute_dtype, open_config(run.model).config, device)
    described = open_or_describe(run.model, dtype=dtype, trust_remote_code=run.trust_remote_code)
    model = described.model
    mtp = choose_mtp(model, output.mtp, device)
    output = replace(output, mtp=mtp.kind)
    model = recoded(model, output, mtp.kind)
    variants = plan_variants(model, read_targets(model, output), output)
    check_config(model, variants, output.mtp)
    tokens = samples * run.sequence_length
    memory, shortage = _memory(model, tokens, device, run, mtp.head)
    calibration = _pass_plan(model, tokens, device, memory, fits=shortage is None)
    common = [
        *mtp.notes,
        *_common_warnings(model, calibration),
        *([shortage] if shortage else []),
        *_choice_warnings(run),
    ]
    # An old snapshot stays until the new one is whole.
    copies = 3 if memory.spill else 2
    return PruningPlan(
        facts=model_facts(described),
        variants=tuple(
            _variant_plan(
                model,
                variant,
                memory,
                [
                    *_target_warnings(model, variant.target, output),
                    *engine_warnings(model, variant),
                    *common,
                ],
            )
            for variant in variants
        ),
        calibration=calibration,
        disk_bytes=sum(variant.plan.nbytes for variant in variants)
        + copies * calibration.hidden_state_bytes,
        notes=described.notes,
        download=read_download(model, shard_order(model, mtp.head, writes=True, mtp=mtp.kind)),
    )


def _memory(
    model: OpenedModel,
    tokens: int,
    device: torch.device,
    run: RunSettings,
    head: MtpHead | None,
) -> tuple[MemoryPlan, str | None]:
    """The memory of the pass, and what is wrong with the budget, if anything is."""
    longest = run.sequence_length
    try:
        return memory_for(model, tokens, device, run, longest_row=longest, head=head), None
    except BudgetError as error:
        enough = replace(run, memory=error.least + _SLACK_NBYTES)
        least = memory_for(model, tokens, device, enough, longest_row=longest, head=head)
        budget = available_nbytes() if run.memory is None else run.memory
        least = replace(least, peak_host=error.least, budget=budget)
        return least, f"prune would refuse: {error}"


def _pass_plan(
    model: OpenedModel, tokens: int, device: torch.device, memory: MemoryPlan, *, fits: bool
) -> PassPlan:
    network = model.architecture.model
    dtype: torch.dtype = network.dtype
    return PassPlan(
        tokens=tokens,
        device=str(device),
        compute_dtype=str(dtype).removeprefix("torch."),
        memory_budget_bytes=memory.budget,
        batch_tokens=memory.batch_tokens,
        hidden_state_bytes=memory.hidden_nbytes,
        hidden_states_in_file=memory.spill,
        expert_slots=memory.expert_slots,
        fits=fits,
    )


def _variant_plan(
    model: OpenedModel, variant: Variant, memory: MemoryPlan, warnings: Sequence[str]
) -> VariantPlan:
    architecture, keep = model.architecture, variant.target.keep
    keeps_mtp = bool(model.tensor_map.mtp_tensors & variant.plan.tensors.keys())
    return VariantPlan(
        sparsity=variant.target.sparsity,
        keep=keep,
        total_parameters=architecture.total_parameters(keep),
        active_parameters=architecture.active_parameters(keep),
        mtp_parameters=mtp_parameters(model, keep) if keeps_mtp else 0,
        bytes=variant.plan.total_size,
        file_bytes=variant.plan.nbytes,
        shards=len(variant.plan.shards),
        peak_host_bytes=memory.peak_host,
        peak_device_bytes=memory.peak_device,
        warnings=tuple(warnings),
    )


def _target_warnings(model: OpenedModel, target: Target, output: OutputSettings) -> Iterator[str]:
    architecture, keep = model.architecture, target.keep
    groups = architecture.routing.groups
    if keep == architecture.num_experts:
        yield f"all {keep} experts stay: nothing is pruned"
    if output.sparsity is not None and groups > 1:
        exact = kept_count(architecture.num_experts, target.sparsity, 1)
        if exact != keep:
            yield (
                f"sparsity {target.sparsity:g} would keep {exact} experts: rounded up to {keep}, "
                f"a multiple of the router's {groups} groups"
            )


def _choice_warnings(run: RunSettings) -> Iterator[str]:
    if run.protect != "none":
        yield (
            f"--protect {run.protect}: experts are chosen once all layers are scored, so prune reads "
            "them from the source a second time to write them, and refuses --evict"
        )


def _common_warnings(model: OpenedModel, calibration: PassPlan) -> Iterator[str]:
    yield from mtp_notes(model)
    refusals = forward_refusals(model)
    if refusals.count:
        yield _forward_warning(refusals)
    num_experts = model.architecture.num_experts
    if calibration.expert_slots < num_experts:
        yield (
            f"memory holds {calibration.expert_slots} of {num_experts} experts of a layer: the "
            "others are read again for every batch; more --memory is faster"
        )
    if calibration.hidden_states_in_file:
        yield (
            f"hidden states ({gib(calibration.hidden_state_bytes)}) go to a file beside the "
            "output; more --memory keeps them in memory"
        )


def _forward_warning(refusals: Refusals) -> str:
    return (
        f"{refusals.count} weights cannot be decoded, so prune and observe refuse this model "
        f"(compact works with scores of the model in another format): {refusals.reasons[0]}"
    )
