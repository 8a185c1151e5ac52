"""Every model type of the installed transformers that builds a language model with experts.

Asked of transformers' own sources and not of a list: a class has experts if it, or a class that it
names, goes through the experts call or reads a number of experts. What a multimodal model builds
its text part from stands in its config.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Tasks whose models write text token by token; the first that knows a type names its class.
TASKS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
_MODELS = Path(transformers.__file__).parent / "models"
_EXPERT_COUNT = re.compile(r"(?:^|_)(?:num|n)_(?:\w+_)?experts$|experts_per_tok")
_EXPERTS_CALL = "use_experts_implementation"
_CLASS = re.compile(r"^class (\w+)", re.MULTILINE)
# A file with neither leads to no experts, and most have neither: they need not be parsed.
_WORTH_PARSING = re.compile(
    rf"{_EXPERTS_CALL}|_experts\b|experts_per_tok|^from \.\.(?!auto)\w+\.modeling", re.MULTILINE
)


@dataclass(frozen=True)
class _Source:
    """A modelling file: which names each class uses, and whether it has experts of its own."""

    names: dict[str, frozenset[str]]
    experts: frozenset[str]


def moe_types() -> dict[str, str]:
    """Model type → class of the model, for every type that has experts."""
    own = {
        model_type: found[0]
        for model_type, classes in _text_models().items()
        if (found := [name for name in classes if _has_experts(name)])
    }
    return own | {
        model_type: classes[0]
        for model_type, classes in _text_models().items()
        if model_type not in own and _text_type(model_type) in own
    }


@cache
def _text_models() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for task in TASKS:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        for model_type, named in mapping.items():
            classes = named if isinstance(named, tuple) else (named,)
            found[model_type] = (*found.get(model_type, ()), *classes)
    return found


def _text_type(model_type: str) -> str | None:
    """The type of a composite model's text part, as its config has it by default.

    Types that take any language model and have a dense one by default are no families of experts:
    what counts for them is the type of the text part that a checkpoint names.
    """
    config_class = CONFIG_MAPPING[model_type]
    part = getattr(config_class, "sub_configs", {}).get("text_config")
    if part is AutoConfig:
        part = config_class.sub_configs_defaults["text_config"]
    return None if part is None else str(part.model_type)


def _has_experts(class_name: str) -> bool:
    return any(name in _source(path).experts for path, name in _reachable(class_name))


def _reachable(class_name: str) -> Iterator[tuple[Path, str]]:
    """The class and those it names, with the files that define them."""
    path = _files().get(class_name)
    left = [] if path is None else [(path, class_name)]
    seen = set(left)
    while left:
        path, name = left.pop()
        yield path, name
        source = _source(path)
        for other in source.names.get(name, ()):
            home = path if other in source.names else _files().get(other)
            if home is not None and (home, other) not in seen:
                seen.add((home, other))
                left.append((home, other))


@cache
def _files() -> dict[str, Path]:
    """Class → modelling file; of names that several files define, none."""
    found: dict[str, Path] = {}
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        for name in _CLASS.findall(path.read_text(encoding="utf-8")):
            found[name] = path
    return found


@cache
def _source(path: Path) -> _Source:
    text = path.read_text(encoding="utf-8")
    body = ast.parse(text).body if _WORTH_PARSING.search(text) else []
    classes = [node for node in body if isinstance(node, ast.ClassDef)]
    names = {
        node.name: frozenset(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
        for node in classes
    }
    experts = (node.name for node in classes if _is_of_experts(node))
    return _Source(names, frozenset(experts))


def _is_of_experts(node: ast.ClassDef) -> bool:
    if any(_EXPERTS_CALL in ast.unparse(decorator) for decorator in node.decorator_list):
        return True
    attributes = (n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute))
    return any(_EXPERT_COUNT.search(attribute) for attribute in attributes)
