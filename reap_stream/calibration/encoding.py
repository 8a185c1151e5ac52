"""From text to token ids, with the model's own tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from reap_stream.calibration.conversations import Conversation
from reap_stream.calibration.rendering import ChatTemplate, Rendering, reasoning_turns
from reap_stream.errors import CalibrationError

Tokens = NDArray[np.int64]

NOTHING_NEW: Final[Tokens] = np.empty(0, np.int64)
"""Stands for a row that others make superfluous, which is no fault of the data."""

_PIECE_CHARS: Final = 1 << 18
# After a line break and before a word every common pre-tokenizer cuts anyway, so cutting the text
# there first changes no token of a byte-level BPE.
_BREAK: Final = re.compile(r"\n(?=\S)")


class TextEncoder:
    """A transformers tokenizer, with what it gives checked against the model.

    Attributes:
        has_chat_template: whether conversations can be encoded.
    """

    def __init__(self, tokenizer: Callable[..., Any], vocab_size: int) -> None:
        self._tokenizer: Any = tokenizer
        self._vocab_size = vocab_size
        self._template = ChatTemplate(tokenizer)
        self.has_chat_template = getattr(tokenizer, "chat_template", None) is not None

    def rows(
        self, content: str | Conversation, where: str
    ) -> Sequence[str | Conversation | Rendering]:
        """Return what of a record becomes a row each, to be encoded one by one.

        That is the record, unless it has reasoning in earlier turns, which templates may drop: see
        `ChatTemplate.render_rows`.

        Raises:
            CalibrationError: the template refuses a conversation that it is asked about.
        """
        if isinstance(content, str):
            return [content]
        last = len(content.messages) - 1
        if all(turn == last for turn in reasoning_turns(content.messages)):
            return [content]
        return self._template.render_rows(content, where)

    def encode(
        self, content: str | Conversation | Rendering, where: str, most: int | None = None
    ) -> Tokens:
        """Encode one document or conversation.

        A document gets the special tokens that the tokenizer puts around text, a conversation
        those of its template. Nothing but white space is encoded as no token at all.

        Args:
            content: what to encode.
            where: file and line, for the message.
            most: where the row is cut; None: nowhere.

        Returns:
            int64 [tokens]; `NOTHING_NEW` where all that is left of a rendering when it is cut
            stands in a longer row of the same conversation too.

        Raises:
            CalibrationError: the template refuses the conversation, the text is no valid Unicode,
                or an id lies outside the model's vocabulary.
        """
        if isinstance(content, str):
            return _cut(self._document(content, where), most)
        if isinstance(content, Conversation):
            if not content.messages:
                return np.empty(0, np.int64)
            content = Rendering(self._template.render(content, where))
        if content.shared and most is not None:
            before = self._ids(content.text[: content.shared], where, special=False)
            if before.size >= most:
                return NOTHING_NEW
        return _cut(self._ids(content.text, where, special=False), most)

    def _document(self, text: str, where: str) -> Tokens:
        ids = self._ids(text, where, special=True)
        first = getattr(self._tokenizer, "bos_token_id", None)
        # Text that was made by a chat template brings its own first token.
        doubled = first is not None and ids.size > 1 and ids[0] == ids[1] == first
        return ids[1:] if doubled else ids

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


def _cut(tokens: Tokens, most: int | None) -> Tokens:
    # A copy: a view would hold on to all of a long text's tokens.
    return tokens if most is None or tokens.size <= most else tokens[:most].copy()


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
