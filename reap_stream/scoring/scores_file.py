"""scores.safetensors: the statistics of a calibration run on disk.

For each MoE layer index i, tensors of shape [sources, experts]: ``layers.i.tokens`` (I64),
``layers.i.gate_sum``, ``layers.i.norm_sum``, ``layers.i.gate_norm_sum`` and ``layers.i.norm_max``
(F64). Files of earlier versions lack ``layers.i.output_max`` (F64) and ``layers.i.odd.*``: the first
four over half of the rows. The metadata holds ``format_version``, ``model_fingerprint``, ``sources`` (a JSON list of
labels) and whatever else the run added.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from reap_stream.checkpoint.atomic import write_atomically
from reap_stream.checkpoint.files import open_regular, pread_exact
from reap_stream.checkpoint.header import Header, read_header, render_header
from reap_stream.errors import CalibrationError, CheckpointError, UsageError
from reap_stream.scoring.saliency import (
    OPTIONAL_STATISTICS,
    STATISTICS,
    SUMS,
    LayerStats,
    Scores,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FORMAT_VERSION: Final = "1"
_OWN_KEYS: Final = ("format_version", "model_fingerprint", "sources")
_NAME: Final = re.compile(r"layers\.(0|[1-9][0-9]{0,8})\.((?:odd\.)?[a-z_]+)")
_DTYPES: Final = {**STATISTICS, **OPTIONAL_STATISTICS}
_TAGS: Final[dict[np.dtype[Any], str]] = {np.dtype(np.int64): "I64", np.dtype(np.float64): "F64"}


def save_scores(path: Path, scores: Scores) -> None:
    """Write scores; the file appears whole or not at all.

    Raises:
        CalibrationError: the scores contradict themselves, or their metadata uses a key that the
            format itself uses.
        OutputError: the file could not be written.
    """
    scores.check(str(path))
    taken = [key for key in _OWN_KEYS if key in scores.metadata]
    if taken:
        raise CalibrationError(f"{path}: metadata key {taken[0]!r} belongs to the format itself")
    metadata = {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": scores.model_fingerprint,
        "sources": json.dumps(scores.sources, ensure_ascii=False),
        **scores.metadata,
    }
    arrays = {
        f"layers.{layer}.{name}": array
        for layer in sorted(scores.layers)
        for name, array in scores.layers[layer].arrays().items()
    }
    entries, end = [], 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        entries.append((name, _TAGS[array.dtype], array.shape, begin, end))
    data = (array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays.values())
    write_atomically(path, itertools.chain([render_header(entries, metadata)], data), end)


def check_scores_file(path: Path) -> None:
    """Refuse to write scores over anything that is not scores.

    Raises:
        UsageError: something else is there, such as a directory or a model's weights.
    """
    if not path.exists():
        return
    try:
        load_scores(path)
    except (CalibrationError, CheckpointError, OSError) as error:
        raise UsageError(
            f"{path}: is there and holds no scores ({error}); choose another --output"
        ) from error


def load_scores(path: Path) -> Scores:
    """Read scores, trusting nothing in the file.

    Raises:
        CalibrationError: the file is missing, damaged, of another format or version, or its
            statistics are impossible.
    """
    try:
        header = read_header(path)
        sources = _read_sources(path, header)
        arrays = _read_arrays(path, header)
    except CheckpointError as error:
        raise CalibrationError(f"not a scores file: {error}") from error
    layers = {}
    for layer in sorted(arrays):
        halved = any(name.startswith("odd.") for name in arrays[layer])
        wanted = [*STATISTICS, *(f"odd.{name}" for name in SUMS if halved)]
        missing = [name for name in wanted if name not in arrays[layer]]
        if missing:
            raise CalibrationError(f"{path}: layers.{layer}.{missing[0]} is missing")
        layers[layer] = LayerStats.of_arrays(arrays[layer])
    num_experts = next((stats.tokens.shape[-1] for stats in layers.values()), 0)
    extra = {key: text for key, text in header.metadata.items() if key not in _OWN_KEYS}
    scores = Scores(layers, sources, num_experts, header.metadata["model_fingerprint"], extra)
    scores.check(str(path))
    return scores


def _read_sources(path: Path, header: Header) -> tuple[str, ...]:
    version = header.metadata.get("format_version")
    if version != FORMAT_VERSION or "model_fingerprint" not in header.metadata:
        raise CalibrationError(
            f"{path}: format version {version!r}, this version reads {FORMAT_VERSION!r}; is it a"
            " scores file of reap-stream?"
        )
    try:
        sources: Any = json.loads(header.metadata.get("sources", ""))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: metadata 'sources' is no JSON: {error}") from error
    if not isinstance(sources, list) or not all(isinstance(label, str) for label in sources):
        raise CalibrationError(f"{path}: metadata 'sources' must be a JSON list of strings")
    return tuple(sources)


def _read_arrays(path: Path, header: Header) -> dict[int, dict[str, NDArray[Any]]]:
    arrays: dict[int, dict[str, NDArray[Any]]] = {}
    with open_regular(path) as (fd, _):
        for name, ref in header.tensors.items():
            match = _NAME.fullmatch(name)
            dtype = _DTYPES.get(match[2]) if match else None
            if match is None or dtype is None or ref.dtype != _TAGS[dtype] or len(ref.shape) != 2:
                raise CalibrationError(
                    f"{path}: tensor {name!r}, {ref.dtype} {list(ref.shape)}, is none of a scores"
                    " file: counts of tokens are I64, the other statistics F64, [sources, experts]"
                )
            raw = pread_exact(fd, ref.nbytes, ref.offset, path)
            array = np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype)
            arrays.setdefault(int(match[1]), {})[match[2]] = array.reshape(ref.shape)
    return arrays
