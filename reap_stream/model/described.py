"""A checkpoint without weights, described as its headers would: from config.json and the index.

transformers' meta model gives every parameter, its own conversion turned round gives the names
and shapes in which a checkpoint holds them. Config and index say which are FP8, and whether
next-token-prediction (MTP) layers follow. What comes back is an `OpenedModel` like any other,
except that its tensors point to no bytes, so whatever reads only headers works on it unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn

from reap_stream.checkpoint.dtypes import tensor_nbytes
from reap_stream.checkpoint.index import INDEX_NAME
from reap_stream.checkpoint.refs import TensorRef
from reap_stream.checkpoint.side_files import list_side_files
from reap_stream.checkpoint.source import (
    CONFIG_NAME,
    Checkpoint,
    ConfigOnly,
    has_weights,
    open_config,
)
from reap_stream.errors import UnsupportedError
from reap_stream.formats import TORCH_DTYPES, group_weights, known_formats
from reap_stream.model.adapters import is_experts_module
from reap_stream.model.architecture import Architecture, read_architecture
from reap_stream.model.declared_fp8 import declared_weights
from reap_stream.model.described_mtp import Spec, Twins, assumed_mtp, extra_shape, listed_mtp
from reap_stream.model.opened import OpenedModel, check_mtp_count, open_model
from reap_stream.model.roles import map_tensors
from reap_stream.model.transformers_api import (
    KeyMap,
    build_meta_model,
    checkpoint_tensors,
    load_config,
    parameter_dtype,
)

_TAGS: Final = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}
# Of what an MTP layer's twin holds these are no numbers: the layer lists the same tensors itself.
_CODES: Final = ("U8", "I8", "I32")
_TOLERANCE: Final = 0.01


@dataclass(frozen=True, slots=True)
class DescribedModel:
    """A model to inspect or plan for.

    Attributes:
        model: the opened model.
        estimated: there were no weights; sizes are what config and index let expect.
        notes: what could not be told, for the user.
    """

    model: OpenedModel
    estimated: bool
    notes: tuple[str, ...] = ()


def open_or_describe(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> DescribedModel:
    """Opens a checkpoint where its shards are there, else describes it.

    Raises:
        CheckpointError: files are damaged, inconsistent, unsafe, or only partly there.
        UnsupportedError: the model is none that can be pruned, or cannot be described.
    """
    if has_weights(directory):
        model = open_model(directory, dtype=dtype, trust_remote_code=trust_remote_code)
        return DescribedModel(model, estimated=False)
    return describe_model(directory, dtype=dtype, trust_remote_code=trust_remote_code)


def describe_model(
    directory: Path, *, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> DescribedModel:
    """Describes a checkpoint of which only config.json and perhaps the index are there.

    Args:
        directory: holds config.json.
        dtype: dtype the forward computes in.
        trust_remote_code: let the checkpoint's own code build the model.

    Raises:
        CheckpointError: either file is not what it must be.
        UnsupportedError: the model is none that can be pruned, or its weights are quantised in a
            way that config and index do not describe.
    """
    only = open_config(directory)
    architecture = read_architecture(
        directory, only.config, dtype=dtype, trust_remote_code=trust_remote_code
    )
    keys = KeyMap(architecture.model)
    writer = _Description(only, architecture, keys)
    writer.describe(trust_remote_code=trust_remote_code)
    checkpoint = writer.checkpoint()
    weights = group_weights(checkpoint.tensors, known_formats(checkpoint.config))
    tensor_map = map_tensors(architecture, keys, checkpoint.tensors, weights)
    check_mtp_count(directory, checkpoint.config, tensor_map)
    model = OpenedModel(checkpoint, architecture, keys, tensor_map)
    return DescribedModel(model, estimated=True, notes=tuple(writer.notes))


class _Description:
    """Gathers the tensors of a checkpoint that is not there."""

    def __init__(self, only: ConfigOnly, architecture: Architecture, keys: KeyMap) -> None:
        self.notes: list[str] = []
        self._only = only
        self._architecture = architecture
        self._keys = keys
        self._names: Collection[str] | None = only.weight_map
        self._tensors: dict[str, Spec] = {}
        self._covered = False
        self._modules = dict(architecture.model.named_modules())
        self._stored = self._stored_dtype()
        self._declared = declared_weights(
            only.config, self._names, _TAGS[self._stored], only.directory / CONFIG_NAME
        )

    def describe(self, *, trust_remote_code: bool) -> None:
        """Decoder, then MTP layers, then what the index says against it."""
        for name, spec in self._plain_tensors(trust_remote_code=trust_remote_code):
            self._add(name, spec)
        self._check_declared()
        self._add_mtp()
        self._compare()

    def checkpoint(self) -> Checkpoint:
        """The tensors as a checkpoint; `shards` is empty and no tensor's file need exist."""
        only = self._only
        files = {name: only.directory / name for name in set((only.weight_map or {}).values())}
        shards = only.weight_map or {}
        source = only.directory / CONFIG_NAME
        tensors: dict[str, TensorRef] = {}
        offset = 0
        for name, (tag, shape) in self._tensors.items():
            nbytes = tensor_nbytes(tag, shape)
            file = files.get(shards.get(name, ""), source)
            tensors[name] = TensorRef(name, file, tag, shape, offset, nbytes)
            offset += nbytes
        known = frozenset({CONFIG_NAME, INDEX_NAME})
        side_files, skipped_files = list_side_files(only.directory, known)
        return Checkpoint(
            directory=only.directory,
            config=only.config,
            config_text=only.config_text,
            tensors=tensors,
            shards=(),
            index_metadata={},
            metadata={},
            side_files=side_files,
            skipped_files=skipped_files,
            fingerprint="",
        )

    def _stored_dtype(self) -> torch.dtype:
        config = self._only.config
        parts = (config, config.get("text_config") or {})
        named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
        name = next((value for value in named if value), None)
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype) and dtype in _TAGS and dtype.is_floating_point:
            return dtype
        self.notes.append(f"config.json gives the dtype of weights as {name}: bfloat16 is assumed")
        return torch.bfloat16

    def _plain_tensors(self, *, trust_remote_code: bool) -> Iterator[tuple[str, Spec]]:
        """The decoder's tensors as a checkpoint without quantisation has them."""
        architecture, only = self._architecture, self._only
        model = architecture.model
        if model.dtype != self._stored:
            # Only a model built in the stored dtype shows which parameters have one of their own.
            config = load_config(only.directory, only.config, trust_remote_code=trust_remote_code)
            model = build_meta_model(config, self._stored, trust_remote_code=trust_remote_code)
        listed = self._names or ()
        state = {
            name: tensor.to(parameter_dtype(model, name, self._stored))
            for name, tensor in model.state_dict().items()
            if name not in architecture.tied or name in listed
        }
        for name, tensor in checkpoint_tensors(model, state).items():
            yield name, (_TAGS[tensor.dtype], tuple(tensor.shape))

    def _check_declared(self) -> None:
        if self._declared is not None and self._names is None and not self._covered:
            message = (
                f"{self._only.directory / CONFIG_NAME}: the weights are quantised, but in none of "
                "the model's tensors as far as this file tells; give a directory that holds the "
                "safetensors shards"
            )
            raise UnsupportedError(message)

    def _is_quantised(self, name: str, spec: Spec) -> bool:
        if self._declared is None:
            return False
        linear = self._names is None and self._is_linear(name)
        covered = self._declared.covers(name, linear=linear)
        if covered and not self._declared.takes(spec[1]):
            message = (
                f"{self._only.directory / CONFIG_NAME}: {name!r} holds all experts in one quantised "
                "tensor, whose scales cannot be told without the safetensors shards; give a "
                "directory that holds them"
            )
            raise UnsupportedError(message)
        return covered

    def _is_linear(self, name: str) -> bool:
        mapped = self._keys.target(name)
        target = "" if mapped is None else mapped[0]
        module = self._modules.get(target.rpartition(".")[0])
        if module is None or target.endswith("bias"):
            return False
        if is_experts_module(module):
            return True
        head = self._architecture.text_model.get_output_embeddings()
        is_router = target in self._architecture.sliced
        return isinstance(module, nn.Linear) and module is not head and not is_router

    def _add(self, name: str, spec: Spec) -> None:
        """Adds a weight as it would be unquantised, in the tensors that store it."""
        if self._declared is not None and self._is_quantised(name, spec):
            self._tensors.update(self._declared.tensors(name, spec[1]))
            self._covered = True
        else:
            self._tensors[name] = spec

    def _add_mtp(self) -> None:
        own = {name: spec for name, spec in self._tensors.items() if self._is_decoders(name)}
        twins = Twins(own, self._architecture)
        if self._names is None:
            assumed, notes = assumed_mtp(self._only.config, self._architecture, twins)
            self.notes += notes
            for name, rest in assumed:
                spec = self._mtp_spec(name, rest, twins)
                if spec is not None:
                    self._tensors[name] = spec
            return
        suffix = None if self._declared is None else self._declared.suffix
        for name, rest in listed_mtp(self._names, self._architecture.num_layers, suffix):
            spec = self._mtp_spec(name, rest, twins)
            if spec is None or name in self._tensors:
                continue
            tag, shape = spec
            if tag in _CODES:
                self._tensors[name] = spec
                continue
            plain = (_TAGS[self._stored] if tag == "F8_E4M3" else tag, shape)
            self._add(name, plain)

    def _is_decoders(self, name: str) -> bool:
        """Whether a tensor, or the weight that it is a part of, is a decoder layer's."""
        weight = f"{name.rpartition('.')[0]}.weight"
        mapped = self._keys.target(name) or self._keys.target(weight)
        return mapped is not None and self._architecture.layer_of(mapped[0]) is not None

    def _mtp_spec(self, name: str, rest: str, twins: Twins) -> Spec | None:
        """A twin's dtype and shape, or those of what only MTP layers have."""
        shape = extra_shape(name, self._architecture)
        return twins.get(rest) or (None if shape is None else (_TAGS[self._stored], shape))

    def _compare(self) -> None:
        """Notes where the index disagrees with the description."""
        names = self._only.weight_map
        if names is None:
            return
        for found, text in (
            (sorted(names.keys() - self._tensors.keys()), "of unknown shape, counted as nothing"),
            (sorted(self._tensors.keys() - names.keys()), "counted, though the index lacks them"),
        ):
            if found:
                self.notes.append(f"{INDEX_NAME}: {len(found)} tensors {text}, e.g. {found[0]}")
        described = sum(tensor_nbytes(tag, shape) for tag, shape in self._tensors.values())
        claimed = self._only.total_size
        if claimed is not None and abs(described - claimed) > _TOLERANCE * claimed:
            self.notes.append(
                f"{INDEX_NAME} says {claimed / 1e9:.2f} GB of tensors, config.json lets expect "
                f"{described / 1e9:.2f} GB: sizes below are of the latter"
            )
