"""Checkpoints made in the test: tiny, random, in the layout transformers itself writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.families import COMMON, NUM_EXPERTS, Family

VOCABULARY = COMMON["vocab_size"]
# Widths of three calibration files: rows of one batch differ in length, so batches are padded.
ROW_SHAPES = ((4, 24), (3, 17), (1, 9))


def tiny_config(family: Family, **changes: Any) -> Any:
    """The family's config with tiny sizes; `changes` of the text part, dotted where nested."""
    values = {**COMMON, **family.values}
    for key, value in changes.items():
        values = _merged(values, _nested(key.split("."), value))
    values = _merged(_nested(family.text, values), family.around)
    values["tie_word_embeddings"] = changes.get("tie_word_embeddings", False)
    return AutoConfig.for_model(family.config_type or family.model_type, **values)


def _nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return dict(value)


def _merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(values)
    for key, value in more.items():
        old = both.get(key)
        deeper = isinstance(old, Mapping) and isinstance(value, Mapping)
        both[key] = _merged(old, value) if deeper else value
    return both


def model_class(family: Family) -> Any:
    """The class of transformers by which a model of the family is made and loaded."""
    return getattr(transformers, family.auto)


def tiny_model(family: Family, seed: int = 0, **changes: Any) -> Any:
    """A float32 model with random weights, spread enough that routing is decided clearly."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = model_class(family).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(token_table(tensor.shape, generator))
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(noise * 0.1)
            elif "correction_bias" in name or "expert_bias" in name:
                tensor.copy_(noise * 0.05)
            elif name.endswith("bias"):
                tensor.add_(noise * 0.1)
            elif tensor.dim() >= 2 and "conv" not in name and "A_log" not in name:
                tensor.copy_(noise * 0.3)
    return model.eval()


def token_table(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Rows of different experts, as hash-routed layers look them up by token id."""
    return torch.rand((shape[0], NUM_EXPERTS), generator=generator).argsort()[:, : shape[1]]


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Writes the checkpoint as transformers writes it: original key names, safetensors."""
    model.save_pretrained(directory, **options)
    return directory


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def write_checkpoint(
    directory: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> Path:
    """Writes tensors as one shard beside a config."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2), encoding="utf-8")
    return directory


def read_config(directory: Path) -> dict[str, Any]:
    """config.json."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def make_rows(seed: int = 0) -> list[np.ndarray[Any, Any]]:
    """Token arrays of three widths, without the special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, shape) for shape in ROW_SHAPES]


def write_rows(directory: Path, arrays: list[np.ndarray[Any, Any]]) -> tuple[str, ...]:
    """Writes each array as a calibration file of its own; the SPECs."""
    directory.mkdir(parents=True, exist_ok=True)
    specs = []
    for number, array in enumerate(arrays):
        path = directory / f"rows-{number}.npy"
        np.save(path, array)
        specs.append(str(path))
    return tuple(specs)


def quantise(
    source: Path,
    directory: Path,
    scheme: str,
    scale_dtype: torch.dtype = torch.float32,
    block: int = 128,
) -> tuple[Path, Path]:
    """Stores the linear layers of a checkpoint as FP8 and all else as bfloat16.

    Args:
        source: a checkpoint whose tensors are named ``*_proj.weight`` where they are linear layers.
        directory: holds both results.
        scheme: ``block``, ``channel`` or ``tensor``.
        scale_dtype: of the scales.
        block: rows and columns of a block.

    Returns:
        The FP8 checkpoint, and a float32 one of the values it stands for.
    """
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    for name, tensor in load_tensors(source).items():
        if not _is_linear(name):
            stored[name] = tensor.to(torch.bfloat16)
            meant[name] = stored[name].float()
            continue
        scale, grown = _scales(tensor, scheme, scale_dtype, block)
        stored[name] = (tensor / grown).to(torch.float8_e4m3fn)
        stored[name + ("_scale_inv" if scheme == "block" else "_scale")] = scale
        meant[name] = stored[name].float() * grown
    config = read_config(source)
    quantised = {**config, "quantization_config": quantization_config(scheme, block)}
    return (
        write_checkpoint(directory / "fp8", stored, quantised),
        write_checkpoint(directory / "meant", meant, config),
    )


def quantization_config(scheme: str, block: int) -> dict[str, Any]:
    """What the publishers of such checkpoints write."""
    if scheme == "channel":
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
        group = {"targets": ["Linear"], "weights": weights}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "model.layers.1.mlp.gate"],
        }
    own = {"weight_block_size": [block, block]} if scheme == "block" else {}
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **own}


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or "_proj_with_mqa.weight" in name


def _scales(
    tensor: torch.Tensor, scheme: str, dtype: torch.dtype, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales that take the largest value of their part to 448, and the same for each element."""
    rows, columns = tensor.shape
    high = {"block": (block, block), "channel": (1, columns), "tensor": (rows, columns)}[scheme]
    grid = (-(-rows // high[0]), -(-columns // high[1]))
    scale = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = tensor[i * high[0] : (i + 1) * high[0], j * high[1] : (j + 1) * high[1]]
            scale[i, j] = part.abs().max() / 448
    scale = scale.to(dtype)
    wide = scale.float().repeat_interleave(high[0], 0)[:rows]
    grown = wide.repeat_interleave(high[1], 1)[:, :columns]
    return (scale.reshape(()) if scheme == "tensor" else scale), grown


def add_mtp(source: Path, directory: Path, style: str, count: int = 1) -> Path:
    """Adds next-token-prediction layers to a checkpoint, alike its last layer.

    Args:
        source: the checkpoint without them.
        directory: the new one.
        style: ``nextn``: ``model.layers.N`` as GLM and DeepSeek, embeddings and head stored again;
            ``mtp``: ``mtp.layers.0`` as Qwen; ``mimo``: ``model.mtp.layers.0`` as MiMo.
        count: how many; ``mtp`` holds one.
    """
    tensors, config = load_tensors(source), read_config(source)
    number = config["num_hidden_layers"]
    last = f"model.layers.{number - 1}."
    hidden = config["hidden_size"]
    generator = torch.Generator().manual_seed(9)
    block = {n.removeprefix(last): t.shape for n, t in tensors.items() if n.startswith(last)}

    def noise(name: str, shape: Sequence[int]) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator) * 0.3
        return values + 1 if "norm" in name else values

    for index in range(count):
        prefix = {
            "nextn": f"model.layers.{number + index}.",
            "mtp": "mtp.layers.0.",
            "mimo": f"model.mtp.layers.{index}.",
        }[style]
        own = {
            "nextn": _joining("eh_proj", "enorm", "hnorm", "shared_head.norm", hidden),
            "mtp": {},
            "mimo": _joining("eh_proj", "enorm", "hnorm", "final_layernorm", hidden),
        }[style]
        if style == "nextn":
            own["shared_head.head.weight"] = own["embed_tokens.weight"] = (VOCABULARY, hidden)
        for name, shape in {**block, **own}.items():
            tensors[prefix + name] = noise(name, shape)
    if style == "mtp":
        names = ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        for name, shape in _joining(*names, hidden).items():
            tensors[f"mtp.{name}"] = noise(name, shape)
    return write_checkpoint(directory, tensors, {**config, "num_nextn_predict_layers": count})


def _joining(
    projection: str, enorm: str, hnorm: str, norm: str, hidden: int
) -> dict[str, tuple[int, ...]]:
    """What a prediction layer has beside its decoder layer."""
    norms = {f"{name}.weight": (hidden,) for name in (enorm, hnorm, norm)}
    return {f"{projection}.weight": (hidden, 2 * hidden), **norms}
