"""Checkpoints made in the test: tiny, random, in the layout transformers itself writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import COMMON, Family


def tiny_config(family: Family, **changes: Any) -> Any:
    """The family's config with tiny sizes."""
    return AutoConfig.for_model(
        family.config_type or family.model_type, **{**COMMON, **family.values, **changes}
    )


def tiny_model(family: Family, seed: int = 0, **changes: Any) -> Any:
    """A float32 model with random weights, spread enough that routing is decided clearly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(noise * 0.1)
            elif "correction_bias" in name or "expert_bias" in name:
                tensor.copy_(noise.to(tensor.dtype) * 0.05)
            elif tensor.dim() >= 2 and "conv" not in name and "A_log" not in name:
                tensor.copy_(noise.to(tensor.dtype) * 0.3)
    return model.eval()


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Writes the checkpoint as transformers writes it: original key names, safetensors."""
    model.save_pretrained(directory, **options)
    return directory
