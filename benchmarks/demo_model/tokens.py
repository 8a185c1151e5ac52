"""The demo's own tokenizer, and the documents as tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.texts import Document, documents, is_held_out

DOMAINS = ("python", "prose", "tools")
VOCABULARY = 4096
SPECIAL = (
    "<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
    "<tool_call>", "</tool_call>",
)  # fmt: skip
# Characters of each domain that the merges are learnt from: equal parts.
_SAMPLE_CHARACTERS = 4_000_000

TEMPLATE = """\
{%- if tools %}<|system|>
Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|observation|>
{{ message.content }}
{% else %}<|{{ message.role }}|>
{% if message.content %}{{ message.content }}
{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ {'name': call.function.name, \
'arguments': call.function.arguments} | tojson }}</tool_call>
{% endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""


def make_tokenizer(directory: Path, prose: Path) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE from all domains and saves it with its chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(prose), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:6]),
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(directory)
    return fast


def _sample(prose: Path) -> Iterator[str]:
    for domain in DOMAINS:
        left = _SAMPLE_CHARACTERS
        for name, content in documents(domain, prose):
            if left <= 0:
                break
            if is_held_out(name):
                continue
            text = content if isinstance(content, str) else _flat(content)
            left -= len(text)
            yield text


def _flat(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)


def encode(tokenizer: Any, document: Document) -> list[int]:
    """The tokens of a document, an end-of-text token behind them."""
    content = document[1]
    if isinstance(content, dict):
        text = tokenizer.apply_chat_template(
            content["messages"], tools=content["tools"], tokenize=False
        )
    else:
        text = content
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id]


def encoded(tokenizer: Any, domain: str, prose: Path, directory: Path) -> dict[str, np.ndarray]:
    """``train`` and ``held-out`` tokens of a domain [tokens], kept in files beside each other."""
    paths = {part: directory / f"{domain}-{part}.npy" for part in ("train", "held-out")}
    if not all(path.exists() for path in paths.values()):
        streams: dict[str, list[int]] = {"train": [], "held-out": []}
        for document in documents(domain, prose):
            part = "held-out" if is_held_out(document[0]) else "train"
            streams[part].extend(encode(tokenizer, document))
        for part, path in paths.items():
            np.save(path, np.array(streams[part], dtype=np.int32))
    return {part: np.load(path) for part, path in paths.items()}
