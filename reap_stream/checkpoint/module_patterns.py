"""Patterns that select modules, in the spellings of the libraries that write them.

    re:REGEX            compressed-tensors, torchao, Quark: `re.match`, so the end is open
    +:REGEX  -:REGEX    keys of GPTQModel's ``dynamic``, where the first match wins
    REGEX               transformers' ``modules_to_not_convert``, AutoRound's ``extra_config``
    GLOB                ModelOpt's and Quark's lists of exceptions

A pattern comes from a stranger's file and Python's matcher knows no time limit, so only patterns
that cannot backtrack for long are run; the others are judged by their text alone.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_SIGNS: Final = ("re:", "+:", "-:")
_SPECIAL: Final = re.compile(r"[\\^$*+?{}\[\]|()]")
_REGEX_ONLY: Final = re.compile(r"[\\^$+{}|()]")
_REGEX_FIELDS: Final = frozenset({"dynamic"})
_GLOB_FIELDS: Final = frozenset(
    {"exclude", "exclude_modules", "ignore", "layer_quant_config", "quantized_layers"}
)

_MAX_LENGTH: Final = 10_000
_MAX_REPEATS: Final = 4
_MAX_OPTIONAL: Final = 8
_LITERALS: Final = re.compile(r"\\.|\[[^\]]*\]", re.DOTALL)

# What stands for "any number"; digits left in the component after these are removed name certain
# experts.
_ANY_NUMBER: Final = re.compile(r"(?:\\d|\[0-9\])(?:[+*]|\{\d+,\d*\})[+?]?")
# The digit of `w2` is part of a word.
_CERTAIN_NUMBER: Final = re.compile(r"(?<![A-Za-z_])\d|\\d")
_NUMBER_COMPONENT: Final = re.compile(r"experts(?:\\?\.|\[\.\])(.*?)(?:\\\.|\[\.\]|\.(?![*+?])|$)")

# A dot of a name: escaped, in brackets, or bare before a letter, where it cannot stand for a digit.
_DOT: Final = r"(?:\\\.|\[\.\]|\.(?=[A-Za-z_]))"
_WRITTEN_OUT: Final = re.compile(
    r"(?:layers|blocks|h)(?:\\?\.|\[\.\])(?P<layer>0|[1-9][0-9]{0,8})"
    rf"(?:{_DOT}[A-Za-z_]+)*?{_DOT}experts(?:\\?\.|\[\.\])"
    rf"(?P<expert>0|[1-9][0-9]{{0,8}})(?={_DOT}(?:[^*+?{{]|$)|\$$)"
)
_WRITTEN_OUT_GLOB: Final = re.compile(
    r"(?:layers|blocks|h)\.(?P<layer>0|[1-9][0-9]{0,8})"
    r"(?:\.[A-Za-z_]+)*?\.experts\.(?P<expert>0|[1-9][0-9]{0,8})(?=\.|$)"
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern and how it is read.

    Attributes:
        sign: ``re:``, ``+:``, ``-:`` or nothing.
        text: what follows.
        is_glob: shell wildcards, which match the whole name, not a regular expression.
    """

    sign: str
    text: str
    is_glob: bool

    @property
    def entry(self) -> str:
        """The pattern as it was written."""
        return self.sign + self.text

    @property
    def has_digit(self) -> bool:
        """Whether it can tell one number from another of as many digits."""
        return re.search(r"[0-9]", self.text) is not None

    def readings(self) -> list[Callable[[str], bool]]:
        """Whether it selects a name, as each of its readers has it.

        None where that cannot be found out, or not in short time. Two of transformers' versions
        differ in whether an expression may end inside a component of the name.
        """
        if len(self.text) > _MAX_LENGTH or not (self.is_glob or _is_tame(self.text)):
            return []
        if self.is_glob:
            texts = [fnmatch.translate(self.text)]
        else:
            bounded = rf"(?:{self.text})(?:(?<=\.)|(?=\.|$))"
            texts = [self.text] if self.sign else [self.text, bounded]
        try:
            return [_matcher(re.compile(text)) for text in texts]
        except (re.error, OverflowError, RecursionError):
            return []

    def names_a_number(self) -> bool:
        """Whether its text, as a person reads it, names experts by number."""
        plain = _ANY_NUMBER.sub("", self.text[:_MAX_LENGTH])
        return any(_CERTAIN_NUMBER.search(match[1]) for match in _NUMBER_COMPONENT.finditer(plain))

    def written_out(self) -> re.Match[str] | None:
        """Layer and expert (groups of that name), where both are plain numbers.

        None where other text of the pattern could select a second layer or expert.
        """
        if len(self.text) > _MAX_LENGTH or self.text.count("experts") != 1:
            return None
        if self.is_glob:
            return None if "[" in self.text else _WRITTEN_OUT_GLOB.search(self.text)
        return None if re.search(r"[|(]", self.text) else _WRITTEN_OUT.search(self.text)

    def exact(self, name: str) -> str:
        """An entry that selects one module where this pattern stands."""
        if self.sign in ("+:", "-:"):
            return f"{self.sign}{name.replace('.', chr(92) + '.')}$"
        return name


def read_pattern(entry: str, field: str) -> Pattern | None:
    """The pattern that an entry of a field is; None for a plain name."""
    sign = entry[:3] if entry.startswith("re:") else entry[:2] if entry[:2] in _SIGNS else ""
    text = entry[len(sign) :]
    if sign or field in _REGEX_FIELDS:
        return Pattern(sign, text, is_glob=False)
    if not _SPECIAL.search(text):
        return None
    is_glob = field in _GLOB_FIELDS and not _REGEX_ONLY.search(text)
    return Pattern(sign, text, is_glob=is_glob or not _compiles(text))


def _matcher(expression: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda name: expression.match(name) is not None


def _compiles(text: str) -> bool:
    try:
        re.compile(text[:_MAX_LENGTH])
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_tame(text: str) -> bool:
    """Whether a regular expression backtracks at most polynomially, by a small power."""
    plain = _LITERALS.sub("x", text)
    if re.search(r"\)[*+{]", plain):
        return False
    repeats = sum(plain.count(character) for character in "*+{")
    return repeats <= _MAX_REPEATS and plain.count("?") <= _MAX_OPTIONAL
