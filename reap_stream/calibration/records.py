"""Records of data files, read one by one, with the place each of them stands at.

What their fields mean is said in `schemas`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from reap_stream.calibration.conversations import unknown_fields
from reap_stream.calibration.schemas import KNOWN_FIELDS, holds_mapped, is_known, mapped_columns
from reap_stream.errors import CalibrationError

_PARQUET_ROWS: Final = 256


def read_records(
    path: Path, field_map: Mapping[str, str] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each record of a ``.jsonl`` or ``.parquet`` file with the place it stands at.

    Args:
        path: the file.
        field_map: fields that are needed beside known ones; of Parquet no others are read.

    Raises:
        CalibrationError: unreadable, or a line that is no JSON object; the place is named.
    """
    try:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, field_map or {})
        else:
            yield from _read_jsonl(path)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error


def require_pyarrow(path: Path) -> None:
    """Refuse a Parquet file where nothing can read it.

    Raises:
        CalibrationError: pyarrow is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise CalibrationError(
            f'{path}: reading Parquet needs pyarrow: pip install "reap-stream[data]"'
        ) from error


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                # Its own line number counts from this line.
                why = f"{error.msg} at character {error.pos + 1}"
                raise CalibrationError(f"{where}: is no JSON: {why}") from error
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{where}: is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise CalibrationError(
                    f"{where}: must be an object with fields, not {type(record).__name__}"
                )
            yield where, record


def _read_parquet(path: Path, field_map: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not is_known(names) and not holds_mapped(names, field_map):
                raise CalibrationError(unknown_fields(names, str(path), field_map))
            wanted = KNOWN_FIELDS | mapped_columns(field_map)
            columns = [name for name in names if name in wanted]
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", without_nulls(record, keep=set(columns))
    except pa.ArrowException as error:
        raise CalibrationError(f"{path}: cannot be read as Parquet: {error}") from error


def without_nulls(value: Any, keep: Collection[str] = ()) -> Any:
    """Drop what Parquet fills in: every struct of a column has all fields that any of them has.

    A chat template would print such a null, where the field was never there.
    """
    if isinstance(value, dict):
        return {
            key: without_nulls(item)
            for key, item in value.items()
            if item is not None or key in keep
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
