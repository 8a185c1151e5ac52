"""What a long job shows: a bar with tokens/s, GB/s and time left; nothing where no one looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm
from typing_extensions import Self


def is_shown() -> bool:
    """Whether someone looks: standard error is a terminal."""
    return sys.stderr.isatty()


def byte_bar(nbytes: int) -> Any:
    """A bar over bytes, with bytes/s and time left; silent unless standard error is a terminal."""
    return tqdm(total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True, disable=not is_shown())


class Progress:
    """One bar over all tokens of all layers; silent unless standard error is a terminal.

    Args:
        layers: number of layers.
        tokens_per_layer: calibration tokens.
        bytes_read: tells how many bytes were read so far.
        total: tokens that will go through something, where not through each layer once.
        shown: False keeps it silent whatever standard error is.
    """

    def __init__(
        self,
        layers: int,
        tokens_per_layer: int,
        bytes_read: Callable[[], int],
        *,
        total: int | None = None,
        shown: bool = True,
    ) -> None:
        self._layers = layers
        self._bytes_read = bytes_read
        self._started = time.monotonic()
        self._bar: Any = tqdm(
            total=layers * tokens_per_layer if total is None else total,
            unit=" tok",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=not (shown and is_shown()),
        )

    def __enter__(self) -> Self:
        """The bar is there already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes the bar away."""
        self._bar.close()

    def layer(self, index: int) -> None:
        """A layer begins."""
        self._bar.set_description(f"layer {index + 1}/{self._layers}", refresh=False)

    def stage(self, name: str) -> None:
        """Something that is no layer begins."""
        self._bar.set_description(name, refresh=False)

    def skip(self, layers: int, tokens_per_layer: int) -> None:
        """Layers that an earlier run finished."""
        self._bar.update(layers * tokens_per_layer)
        self._bar.unpause()

    def tokens(self, count: int) -> None:
        """Tokens went through a layer."""
        if self._bar.disable:
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        self._bar.set_postfix_str(f"{self._bytes_read() / seconds / 1e9:.2f} GB/s", refresh=False)
        self._bar.update(count)
