"""Decides what becomes of every weight when the output is to be in another format.

    weight of the source                fp8, fp8-channel              bf16
    ----------------------------------  ----------------------------  --------------
    linear layer of a decoder layer,    encoded                       decoded
    routed expert
    router, head, embedding, other      decoded if it is quantised,   decoded if it is quantised,
    matrices                            else kept                     rounded if wider than bf16;
                                                                      routers kept
    norms, biases, buffers              kept                          kept

Whatever is stored as asked already keeps its bytes. The result is the model with recipes in the
roles of its tensors, so that planning, writing and verifying need not know of formats.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Final

from reap_stream.checkpoint.format_change import FormatChange
from reap_stream.checkpoint.recipes import Recipe
from reap_stream.checkpoint.refs import WHOLE, Role
from reap_stream.checkpoint.transfers import HELD_NBYTES
from reap_stream.errors import UnsupportedError, UsageError
from reap_stream.formats import Weight, group_weights, known_formats
from reap_stream.model.opened import OpenedModel, forward_faults
from reap_stream.model.transformers_api import get_tensor
from reap_stream.recoding.base import Encoder
from reap_stream.recoding.bfloat16 import BFloat16
from reap_stream.recoding.fp8_block import Fp8Block
from reap_stream.recoding.fp8_channel import Fp8Channel
from reap_stream.recoding.recipes import (
    FusedRecipe,
    SplitRecipe,
    WeightRecipe,
    can_slice,
    working_nbytes,
)
from reap_stream.recoding.splitting import Splitter
from reap_stream.recoding.targets import Kind, kinds_of

_ENCODERS: Final[dict[str, Encoder]] = {
    encoder.name: encoder for encoder in (Fp8Block(), Fp8Channel(), BFloat16())
}
_PLAIN: Final = _ENCODERS["bf16"]
_EXPERTS: Final = (Kind.EXPERT, Kind.FUSED)
_LAYER: Final = re.compile(r"^.*?layers\.\d+\.")
_MATRIX_DIMS: Final = 2
_WIDER: Final = frozenset({"F64", "F32", "F16"})


def recode(
    model: OpenedModel,
    weights: str,
    *,
    experts_only: bool = False,
    mtp: str = "match",
) -> OpenedModel:
    """A model whose weights will be written in the format that was asked for.

    Args:
        model: the source.
        weights: as ``--weights`` has it.
        experts_only: routed experts alone change.
        mtp: what happens to prediction layers: ``drop`` leaves them out, ``keep`` all experts in.

    Returns:
        The model; roles of weights that change have recipes, and `OpenedModel.change` says what
        that means for the files beside the shards.

    Raises:
        UnsupportedError: a weight cannot be decoded, or engines know no names for the result.
        UsageError: with `experts_only`, other weights are quantised in another way.
    """
    if weights == "keep":
        return model
    for fault in forward_faults(model):
        raise UnsupportedError(fault)
    return _Recoder(model, _ENCODERS[weights], experts_only, mtp).run()


class _Recoder:
    """One decision for each weight."""

    def __init__(self, model: OpenedModel, encoder: Encoder, experts_only: bool, mtp: str) -> None:
        self._model = model
        self._encoder = encoder
        self._experts_only = experts_only
        tensors, own = model.checkpoint.tensors, model.tensor_map.mtp_tensors
        dropped = own if mtp == "drop" else frozenset()
        self._weights = {
            name: weight
            for name, weight in group_weights(
                tensors, known_formats(model.checkpoint.config)
            ).items()
            if not any(ref.name in dropped for ref in weight.parts.values())
        }
        self._kinds = kinds_of(model, self._weights)
        left_whole = own if mtp == "keep" else ()
        self._roles = {**model.tensor_map.roles, **dict.fromkeys(left_whole, WHOLE)}
        self._splitters: dict[str, Splitter] = {}
        self._num_experts = model.architecture.num_experts
        self._groups: dict[tuple[str, ...], list[Weight]] = {}
        self._counts: Counter[str] = Counter()
        self._ignored: list[str] = []
        self._working = 0
        self._by_module: dict[str, list[str]] = {}
        for name in tensors:
            self._by_module.setdefault(name.rpartition(".")[0], []).append(name)

    def run(self) -> OpenedModel:
        """Decides on every weight."""
        if self._encoder is not _PLAIN:
            self._check_experts()
        rounds = False
        for name, weight in self._weights.items():
            encoder = self._encoder_of(weight, self._kinds[name])
            if encoder is None:
                self._note(weight, holds=self._encoder.holds(weight))
                continue
            rounds = rounds or (encoder is _PLAIN and weight.is_plain)
            self._recode(weight, encoder)
            self._note(weight, holds=encoder is self._encoder)
            self._counts[encoder.name] += 1
        counts = {**dict(sorted(self._counts.items())), "kept": self._num_kept()}
        if not self._counts:
            return replace(self._model, change=FormatChange(counts=counts))
        change = FormatChange(
            replaced=True,
            quantization=self._encoder.quantization_config(self._ignored_modules()),
            dtype="bfloat16" if rounds else None,
            working_nbytes=self._working + HELD_NBYTES,
            counts=counts,
        )
        tensor_map = replace(self._model.tensor_map, roles=self._roles)
        return replace(self._model, tensor_map=tensor_map, change=change)

    def _encoder_of(self, weight: Weight, kind: Kind) -> Encoder | None:
        """The format a weight is to have; None where its bytes stay."""
        if weight.is_plain and self._roles[weight.parts["weight"].name].recipe is not None:
            # An expert that the checkpoint numbers behind those it has, and that nothing reads.
            return None
        is_expert = kind in _EXPERTS
        wanted = is_expert or (kind is Kind.LINEAR and not self._experts_only)
        if self._encoder is _PLAIN:
            wanted = not weight.is_plain or self._is_wide(weight, kind)
        # Static activation scales beside a weight contradict the new quantization_config.
        if self._encoder.holds(weight) and len(self._replaced(weight)) == len(weight.parts):
            return None
        if wanted:
            return self._encoder
        if weight.is_plain:
            return None
        if self._experts_only:
            message = (
                f"{next(iter(weight.parts.values())).file}: {weight.name!r} is quantised in "
                f"another way than --weights {self._encoder.name}, and one quantization_config "
                "cannot describe both: leave out --fp8-experts-only"
            )
            raise UsageError(message)
        return _PLAIN

    def _is_wide(self, weight: Weight, kind: Kind) -> bool:
        """A plain matrix of more bits than bfloat16 has, and no router."""
        ref = next(iter(weight.parts.values()))
        role = self._roles[ref.name]
        is_router = role.dim is not None and kind is not Kind.FUSED
        return ref.dtype in _WIDER and kind is not Kind.OTHER and not is_router

    def _recode(self, weight: Weight, encoder: Encoder) -> None:
        """Puts recipes into the roles of a weight's tensors."""
        reason = weight.format.refusal(weight)
        place = next(iter(weight.parts.values()))
        if reason is not None:
            raise UnsupportedError(f"{place.file}: {reason}")
        role = self._roles[place.name]
        if role.recipe is not None:
            message = (
                f"{place.file}: {weight.name!r} is quantised and of an expert behind those that "
                f"the model has; --weights {self._encoder.name} cannot be written for it"
            )
            raise UnsupportedError(message)
        recipe = self._recipe(weight, encoder, role, place.name)
        for name in self._replaced(weight):
            self._roles[name] = replace(self._roles[name], recipe=recipe)
        experts = self._num_experts if role.dim is not None else 1
        self._working = max(self._working, working_nbytes(weight, encoder, experts))

    def _recipe(self, weight: Weight, encoder: Encoder, role: Role, place: str) -> Recipe:
        if role.dim is None and (encoder is _PLAIN or len(weight.shape) == _MATRIX_DIMS):
            members = [weight] if role.expert is None else self._members(weight, role)
            return WeightRecipe(place, weight.name, members, role.expert, encoder)
        if role.dim != 0 or role.extra or not can_slice(weight, self._num_experts):
            message = (
                f"{next(iter(weight.parts.values())).file}: {weight.name!r} {list(weight.shape)} "
                f"does not hold {self._num_experts} experts of which some are kept, one after the "
                f"other; --weights {self._encoder.name} cannot be written for it"
            )
            raise UnsupportedError(message)
        if encoder is _PLAIN:
            return FusedRecipe(place, weight, self._num_experts, encoder)
        return SplitRecipe(place, weight, self._splitter(weight), encoder)

    def _members(self, weight: Weight, role: Role) -> list[Weight]:
        """A weight's counterparts of all experts."""
        assert role.component is not None
        parts = weight.name.split(".")
        key = (*parts[: role.component], "*", *parts[role.component + 1 :])
        if key not in self._groups:
            names = [
                (*key[: role.component], str(e), *key[role.component + 1 :])
                for e in range(self._num_experts)
            ]
            missing = [name for name in map(".".join, names) if name not in self._weights]
            if missing:
                raise UnsupportedError(f"{weight.name!r} has no counterpart {missing[0]!r}")
            self._groups[key] = [self._weights[".".join(name)] for name in names]
        return self._groups[key]

    def _splitter(self, weight: Weight) -> Splitter:
        """How a fused weight comes apart; that of a prediction layer as its twin's."""
        rest = _rest(weight.name)
        if rest not in self._splitters:
            self._splitters[rest] = Splitter(self._model, self._parameter(weight, rest))
        return self._splitters[rest]

    def _parameter(self, weight: Weight, rest: str) -> str:
        """The parameter that a fused weight is, or would be in a decoder layer."""
        feeds = self._model.tensor_map.feeds
        for target, feed in feeds.items():
            if any(_rest(group[0].name) == rest for _, group in feed.groups):
                return target
        # The decoder's experts are stored apart: a fused tensor has the parameter's own name.
        network = self._model.architecture.model
        for target in feeds:
            alike = _rest(target) == rest
            if alike and get_tensor(network, target).shape[1:] == weight.shape[1:]:
                return target
        message = (
            f"{next(iter(weight.parts.values())).file}: {weight.name!r} {list(weight.shape)} is "
            f"like no parameter of {self._model.architecture.name}, so its experts cannot be told "
            f"apart; --weights {self._encoder.name} cannot be written for it"
        )
        raise UnsupportedError(message)

    def _replaced(self, weight: Weight) -> set[str]:
        """The tensors for which a weight's recipe stands: its parts, and companions of a quantised one."""
        names = {ref.name for ref in weight.parts.values()}
        if weight.is_plain:
            return names
        module, _, leaf = weight.name.rpartition(".")
        prefix = "" if leaf == "weight" else f"{weight.name}_"
        return names | {
            name
            for name in self._by_module.get(module, ())
            if name.startswith(prefix) and not name.endswith("bias")
        }

    def _num_kept(self) -> int:
        """Weights that stay; what only described a weight of another format is none."""
        places = (next(iter(weight.parts.values())).name for weight in self._weights.values())
        return sum(self._roles[place].recipe is None for place in places)

    def _note(self, weight: Weight, *, holds: bool) -> None:
        """Lists the modules that the new quantization_config must leave out."""
        module, _, leaf = weight.name.rpartition(".")
        if leaf == "weight" and len(weight.shape) == _MATRIX_DIMS and not holds:
            self._ignored.append(module)

    def _ignored_modules(self) -> list[str]:
        """Modules with a matrix that stays plain; embeddings are none, the head always is one."""
        architecture = self._model.architecture
        names = {id(module): name for name, module in architecture.model.named_modules()}
        embedding = names[id(architecture.embedding)].rpartition(".")[2]
        head = names.get(id(architecture.text_model.get_output_embeddings()))
        found = [name for name in self._ignored if name.rpartition(".")[2] != embedding]
        return list(dict.fromkeys([*([head] if head else []), *found]))

    def _check_experts(self) -> None:
        """Refuses experts of which no weight would be found."""
        found = {
            architecture.layer_of(target)
            for architecture in [self._model.architecture]
            for target, feed in self._model.tensor_map.feeds.items()
            if any(self._kinds[group[0].name] in _EXPERTS for _, group in feed.groups)
        }
        missing = sorted(self._model.architecture.experts_paths.keys() - found)
        if missing:
            message = (
                f"layer {missing[0]}: its experts are not stored as matrices that --weights "
                f"{self._encoder.name} knows; --weights keep can be written"
            )
            raise UnsupportedError(message)


def _rest(name: str) -> str:
    """A tensor's name behind the layer's number."""
    return _LAYER.sub("", name)
