"""Metrics for TensorBoard, as event files."""

from pathlib import Path
from typing import Any


class Board:
  """Writes every number of a record as a curve of its own name.

  Args:
    folder: for the event files.
    start: the step from which a resumed run goes on; curves of an interrupted run end there.

  Raises:
    ValueError: where tensorboardX is not installed.
  """

  def __init__(self, folder: Path, start: int = 0):
    try:
      from tensorboardX import SummaryWriter
    except ImportError as error:
      raise ValueError(
        "--tensorboard needs the package tensorboardX: pip install tensorboardX"
      ) from error
    self.writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)

  def add(self, record: dict[str, Any]) -> None:
    for name, value in record.items():
      if name != "step" and isinstance(value, (int, float)):
        self.writer.add_scalar(name, value, record["step"])
    self.writer.flush()

  def close(self) -> None:
    self.writer.close()
