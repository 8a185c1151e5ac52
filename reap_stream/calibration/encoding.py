"""From text to token ids, with the model's own tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reap_stream.calibration.records import Conversation
from reap_stream.errors import CalibrationError

Tokens = NDArray[np.int64]

_PIECE_CHARS: Final = 1 << 18
# After a line break and before a word every common pre-tokenizer cuts anyway, so cutting the text
# there first changes no token of a byte-level BPE.
_BREAK: Final = re.compile(r"\n(?=\S)")


# What templates raise when a message is not as they expect it, beside their own errors.
_TEMPLATE_ERRORS: Final = (ValueError, TypeError, LookupError, AttributeError, ImportError)


class TextEncoder:
    """A transformers tokenizer, with what it gives checked against the model.

    Attributes:
        has_chat_template: whether conversations can be encoded.
    """

    def __init__(self, tokenizer: Callable[..., Any], vocab_size: int) -> None:
        self._tokenizer: Any = tokenizer
        self._vocab_size = vocab_size
        self.has_chat_template = getattr(tokenizer, "chat_template", None) is not None

    def encode(self, content: str | Conversation, where: str) -> Tokens:
        """Encode one document or conversation.

        A document gets the special tokens that the tokenizer puts around text, a conversation
        those of its template. Nothing but white space is encoded as no token at all.

        Returns:
            int64 [tokens].

        Raises:
            CalibrationError: the template refuses the conversation, the text is no valid Unicode,
                or an id lies outside the model's vocabulary.
        """
        if isinstance(content, str):
            return self._ids(content, where, special=True)
        if not content.messages:
            return np.empty(0, np.int64)
        return self._ids(self._rendered(content, where), where, special=False)

    def encode_document(self, chunks: Iterable[str], where: str) -> Iterator[Tokens]:
        """Encode one document of any length, piece by piece.

        The special tokens stand at its two ends alone. A tokenizer that marks the beginning of
        every text (SentencePiece) does so at each piece, of some 260,000 characters.

        Yields:
            int64 [tokens of a piece].

        Raises:
            CalibrationError: as `encode`.
        """
        special = np.asarray(self._tokenizer("")["input_ids"], np.int64)
        first_token = getattr(self._tokenizer, "bos_token_id", None)
        lead = 1 if special.size and special[0] == first_token else 0
        yield special[:lead]
        for piece in _pieces(chunks):
            yield self._ids(piece, where, special=False)
        yield special[lead:]

    def _ids(self, text: str, where: str, *, special: bool) -> Tokens:
        if not text.strip():
            return np.empty(0, np.int64)
        try:
            # A lone surrogate, which JSON can spell, is what tokenizers cannot take.
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise CalibrationError(f"{where}: text is no valid Unicode: {error}") from error
        # Not verbose: texts longer than the model's context are cut to rows, which is no news.
        encoded = self._tokenizer(text, add_special_tokens=special, verbose=False)
        ids = np.asarray(encoded["input_ids"], np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise CalibrationError(
                f"{where}: the tokenizer gives ids {ids.min()} to {ids.max()}, the model has"
                f" {self._vocab_size}: tokenizer and model do not belong together"
            )
        return ids

    def _rendered(self, conversation: Conversation, where: str) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                conversation.messages, tools=conversation.tools, tokenize=False
            )
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            raise CalibrationError(
                f"{where}: the model's chat template refuses this conversation: {error}"
            ) from error
        return text


def _pieces(chunks: Iterable[str]) -> Iterator[str]:
    """Join chunks and cut them again, where possible before a word that opens a line."""
    text = ""
    for chunk in chunks:
        text += chunk
        if len(text) >= _PIECE_CHARS:
            cut = max((match.end() for match in _BREAK.finditer(text)), default=len(text))
            yield text[:cut]
            text = text[cut:]
    yield text
