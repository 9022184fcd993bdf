"""Rows of tables: CSV and Parquet."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optax_lowmem.qlora.files.json_files import DataError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
# Columns that hold lists; a table of texts has them as JSON.
_LISTS = ("messages", "conversations", "history", "tools", "documents")
_LARGEST = 1 << 27  # characters of a field: csv's own limit is 128 KiB
_UNPACKED = 100  # how much larger than the file its rows may be: one text can be there many times


def is_parquet(path: Path) -> bool:
  """By its content; one that is only named so is not."""
  with path.open("rb") as file:
    return file.read(4) == b"PAR1"


def parquet(path: Path) -> Iterator[tuple[str, Any]]:
  """``(place, row)`` for each row, read a batch at a time."""
  try:
    import pyarrow as pa
    from pyarrow import parquet as files
  except ImportError as error:
    raise DataError(
      f"{path} is a Parquet file, which pyarrow reads: pip install 'optax_lowmem[parquet]'."
    ) from error
  number, unpacked = 0, 0
  most = _UNPACKED * path.stat().st_size + _LARGEST
  try:
    with files.ParquetFile(path) as file:
      for batch in file.iter_batches(64):
        unpacked += batch.nbytes
        if unpacked > most:
          raise DataError(
            f"{path}, row {number + 1}: unpacked, its rows are more than {most:,} bytes, "
            f"{_UNPACKED} times the file. Save it again as JSON if that is what it should hold."
          )
        for row in batch.to_pylist():
          number += 1
          yield f"{path}, row {number}", {k: v for k, v in row.items() if v is not None}
  except (pa.ArrowException, OSError) as error:
    raise DataError(f"{path} is a Parquet file that cannot be read: {error}.") from error


def separated(path: Path, text: str) -> Iterator[tuple[str, Any]]:
  """``(place, row)`` for each record under the names in the first line."""
  csv.field_size_limit(_LARGEST)
  reader = csv.DictReader(
    io.StringIO(text, newline=""), delimiter=SEPARATORS[path.suffix.lower()], strict=True
  )
  first = 1
  try:
    names = reader.fieldnames or []
    if len(set(names)) < len(names):
      raise DataError(f"{path}, line 1: a name is there twice, in {', '.join(names)}.")
    while True:
      first = reader.line_num + 1
      row: dict[Any, Any] | None = next(reader, None)
      if row is None:
        return
      where = f"{path}, line {first}"
      if None in row or None in row.values():
        count = len(names) + len(row.get(None, ())) - list(row.values()).count(None)
        raise DataError(
          f"{where}: {count} fields where the first line names {len(names)}; put quotation marks "
          "around a text that holds a separator or a line break."
        )
      yield where, {name: _value(name, field, where) for name, field in row.items()}
  except csv.Error as error:
    raise DataError(f"{path}, line {first}: {error}.") from error


def _value(name: str, field: str, where: str) -> Any:
  if name not in _LISTS or not field.strip():
    return field if name not in _LISTS else None
  try:
    return json.loads(field)
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: '{name}' is not JSON ({error}).") from error
