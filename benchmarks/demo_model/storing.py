"""From the state of a training to checkpoints as they are published: bfloat16, then FP8 in blocks.

The FP8 is this package's own: a pruning that removes no expert, written with ``--weights fp8``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, Glm4MoeForCausalLM

from demo_model.network import NUM_EXPERTS, make_config
from demo_model.tokens import SPECIAL
from reap_stream import OutputSettings, RunSettings, prune
from reap_stream.verifying import verify_directory

# Four shards each: an index is part of how real checkpoints look.
_BF16_SHARD_NBYTES = 6_000_000
_FP8_SHARD_NBYTES = 3_200_000
_SHIPPED_NBYTES = 16_000_000
# What a pruning leaves, of no meaning where nothing was pruned.
_RECORDS = ("reap", "README.md")


def load_state(path: Path) -> tuple[Glm4MoeForCausalLM, int]:
    """The model of a training, finished or not, in float32, and the steps it was given."""
    state = torch.load(path, weights_only=True, map_location="cpu")  # noqa: TID251 - our own file
    model = Glm4MoeForCausalLM(make_config())
    model.load_state_dict(state["model"])
    return model.eval(), int(state["step"])


def store_bf16(model: Glm4MoeForCausalLM, tokenizer: Path, directory: Path) -> None:
    """Writes a checkpoint in bfloat16, an expert's matrices apart as on the Hub.

    Args:
        model: in float32; its parameters are rounded in place. Correction biases are buffers and
            stay float32, as in published checkpoints.
        tokenizer: directory of its files.
        directory: is made, or made anew.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    ends = {key: getattr(model.config, key) for key in ("eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    with _made(directory) as partial:
        model.save_pretrained(partial, max_shard_size=_BF16_SHARD_NBYTES)
        _write_config(partial)
        _write_tokenizer(tokenizer, partial)


def store_fp8(bf16: Path, directory: Path) -> None:
    """Writes a checkpoint in FP8 with a scale for each block of 128 × 128, and verifies it.

    Args:
        bf16: what `store_bf16` wrote.
        directory: is made, or made anew.
    """
    with _made(directory) as partial:
        # All experts stay: neither the criterion nor the text bears on a byte.
        run = RunSettings(
            model=bf16,
            calibration=("builtin:2",),
            sequence_length=64,
            method="random",
            device="cpu",
            progress=False,
        )
        settings = OutputSettings(
            output=partial,
            keep=str(NUM_EXPERTS),
            weights="fp8",
            max_shard_nbytes=_FP8_SHARD_NBYTES,
        )
        prune(run, settings)
        verify_directory(partial, bf16)
        for path in (partial / name for name in _RECORDS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def ship(stored: Path, package: Path) -> None:
    """Copies what the package carries: model, held-out texts, report.

    Args:
        stored: holds ``fp8``, ``held_out`` and ``training.json``.
        package: directory of the package; its own texts stay.

    Raises:
        ValueError: the model is larger than the package may carry.
    """
    nbytes = sum(path.stat().st_size for path in (stored / "fp8").iterdir())
    if nbytes > _SHIPPED_NBYTES:
        message = f"{stored / 'fp8'} has {nbytes} bytes, the package carries {_SHIPPED_NBYTES}"
        raise ValueError(message)
    with _made(package / "model") as partial:
        shutil.copytree(stored / "fp8", partial)
    with _made(package / "held_out") as partial:
        shutil.copytree(stored / "held_out", partial)
    shutil.copyfile(stored / "training.json", package / "training.json")


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _made(directory: Path) -> Iterator[Path]:
    """Gives a path to make, which then takes the place of `directory`: readers never see half."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        partial = Path(scratch) / directory.name
        yield partial
        for path in partial.iterdir():
            path.chmod(0o644)
        if directory.exists():
            directory.rename(Path(scratch) / "before")
        partial.rename(directory)


def _write_config(directory: Path) -> None:
    """config.json with the rotary settings where published checkpoints have them.

    Raises:
        ValueError: transformers reads another model from it than was trained.
    """
    path = directory / "config.json"
    saved = AutoConfig.from_pretrained(directory)
    values = json.loads(path.read_bytes())
    rope = values.pop("rope_parameters")
    values |= {key: rope[key] for key in ("partial_rotary_factor", "rope_theta")}
    write_json(path, dict(sorted(values.items())))
    if AutoConfig.from_pretrained(directory).to_dict() != saved.to_dict():
        message = (
            f"{path}: rotary settings are read otherwise where published checkpoints have them"
        )
        raise ValueError(message)


def _write_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer under the class that transformers of before version 5 know too."""
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(source / name, directory / name)
    settings = {
        "additional_special_tokens": list(SPECIAL[2:6]),
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[1],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(directory / "tokenizer_config.json", settings)
