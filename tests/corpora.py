"""A small tokenizer, and calibration data read with it."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reap_stream.calibration.corpus import load_corpus
from reap_stream.calibration.rules import RowSettings
from reap_stream.calibration.spec import parse_spec

CHAT_TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
VOCAB = 258


def make_tokenizer(*, chat=True, bos=True):
    """One token a byte: ids 1 to 256, with <s> = 0 before and </s> = 257 after a document."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, **{letter: n for n, letter in enumerate(letters, 1)}, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 257)]
        )
    template = CHAT_TEMPLATE if chat else None
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


TOKENIZER = make_tokenizer()


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def document(text):
    return [0, *ids_of(text), 257]


def load(*specs, tokenizer=TOKENIZER, **settings):
    vocab_size = settings.pop("vocab_size", VOCAB)
    defaults = {"samples": None, "sequence_length": 64, "seed": 0}
    parsed = [parse_spec(str(spec)) for spec in specs]
    return load_corpus(parsed, tokenizer, vocab_size, RowSettings(**{**defaults, **settings}))


def tokens_of(corpus):
    return [row.tokens.tolist() for row in corpus.rows]


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
