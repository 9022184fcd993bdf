"""How the rotary embedding of a model for long contexts differs from the plain one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
  """Positions are divided by `factor`."""

  factor: float
  magnitude = 1.0

  def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
    return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3:
  """Slow frequencies are divided by `factor`, fast ones kept, those between interpolated.

  A frequency is slow where it turns less than `low_freq_factor` times in
  `original_max_position_embeddings` positions, and fast where more than `high_freq_factor` times.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  magnitude = 1.0

  def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
    turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return frequency * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True)
class Yarn:
  """As `Llama3`, with the ramp along the pair's index; `magnitude` scales queries and keys.

  References:
    Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023,
    arXiv:2309.00071.
  """

  factor: float
  magnitude: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True

  def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
    pairs = len(frequency)

    def pair_that_turns(times: float) -> float:
      longest = self.original_max_position_embeddings / (times * 2 * math.pi)
      return pairs * math.log(longest) / math.log(theta)

    low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    ramp = (np.arange(pairs) - low) / ((high - low) or 0.001)
    slow = np.clip(ramp, 0, 1)
    return frequency * ((1 - slow) + slow / self.factor)


@dataclasses.dataclass(frozen=True)
class Divided:
  """Each frequency divided by its own number, as GGUF files hold them in ``rope_freqs.weight``."""

  factors: tuple[float, ...]
  magnitude: float = 1.0

  def __call__(self, frequency: np.ndarray, theta: float) -> np.ndarray:
    return frequency / np.asarray(self.factors)


@dataclasses.dataclass(frozen=True)
class LongRope:
  """Each frequency divided by its own number, of which there are others for long rows.

  Which of them holds for a row follows from the positions that it has, or may come to have: were
  it to change while a row is generated, the keys in the cache would be wrong. So it is a matter of
  the length of a batch's rows, and the sequences that are packed in one row share it.

  References:
    Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, 2024,
    arXiv:2402.13753.
  """

  short_factor: tuple[float, ...]
  long_factor: tuple[float, ...]
  magnitude: float
  original_max_position_embeddings: int

  def at(self, length: int) -> Divided:
    """The scaling of rows of `length` positions."""
    short = length <= self.original_max_position_embeddings
    return Divided(self.short_factor if short else self.long_factor, self.magnitude)


RopeScaling = Linear | Llama3 | Yarn | Divided | LongRope

# Rope type -> (required keys, optional keys), beside those that every type may have.
KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "default": ((), ()),
  "linear": (("factor",), ()),
  "llama3": (
    ("factor", "low_freq_factor", "high_freq_factor"),
    ("original_max_position_embeddings",),
  ),
  "yarn": (
    ("factor",),
    (
      "original_max_position_embeddings",
      "attention_factor",
      "beta_fast",
      "beta_slow",
      "mscale",
      "mscale_all_dim",
      "truncate",
    ),
  ),
  "longrope": (
    ("short_factor", "long_factor"),
    ("factor", "original_max_position_embeddings", "attention_factor"),
  ),
}
COMMON_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def rope_scaling_from_hf(
  rope: Mapping[str, Any],
  original_max_position_embeddings: int,
  max_position_embeddings: int | None = None,
) -> RopeScaling | None:
  """Reads ``rope_parameters`` or ``rope_scaling`` of a ``config.json``.

  Args:
    rope: the dictionary.
    original_max_position_embeddings: what to take where `rope` does not say it.
    max_position_embeddings: how many positions there are now; "longrope" takes its factor from it.

  Returns:
    The scaling, None for the plain embedding.

  Raises:
    ValueError: for an unknown type or key, a missing key, or a number that cannot be.

  Example:
    >>> rope_scaling_from_hf({"rope_type": "linear", "factor": 2.0}, 2048)
    Linear(factor=2.0)
    >>> rope_scaling_from_hf({"type": "dynamic", "factor": 2.0}, 2048)
    Traceback (most recent call last):
    ...
    ValueError: Rope scaling 'dynamic' is not supported; needs default, linear, llama3, ...
  """
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in KEYS:
    # "dynamic" turns by the length of the batch it meets, so that a cached key would be wrong.
    raise ValueError(f"Rope scaling {kind!r} is not supported; needs {', '.join(KEYS)}.")
  required, optional = KEYS[kind]
  given = {k: v for k, v in rope.items() if v is not None and k not in COMMON_KEYS}
  if missing := [key for key in required if key not in given]:
    raise ValueError(f"Rope scaling {kind!r} lacks {', '.join(missing)}.")
  if unknown := [key for key in given if key not in required + optional]:
    raise ValueError(f"Rope scaling {kind!r} has unknown keys: {', '.join(unknown)}.")
  truncate = given.pop("truncate", True)
  lists = {key: given.pop(key) for key in ("short_factor", "long_factor") if key in given}
  for key, value in lists.items():
    if not isinstance(value, (list, tuple)) or not all(map(_is_positive, value)):
      raise ValueError(f"Rope scaling's `{key}` must be a list of positive numbers, got {value!r}.")
  for key, value in given.items():
    if not _is_positive(value):
      raise ValueError(f"Rope scaling's `{key}` must be a positive number, got {value!r}.")
  given.setdefault("original_max_position_embeddings", original_max_position_embeddings)
  match kind:
    case "linear":
      return Linear(given["factor"])
    case "llama3":
      if given["low_freq_factor"] >= given["high_freq_factor"]:
        raise ValueError(
          f"Rope scaling's `high_freq_factor` ({given['high_freq_factor']}) must be above "
          f"`low_freq_factor` ({given['low_freq_factor']})."
        )
      return Llama3(**given)
    case "yarn":
      scales = given.pop("mscale", None), given.pop("mscale_all_dim", None)
      magnitude = given.pop("attention_factor", None) or _magnitude(given["factor"], *scales)
      return Yarn(magnitude=magnitude, truncate=bool(truncate), **given)
    case "longrope":
      original = given["original_max_position_embeddings"]
      # In transformers too, the two numbers of positions go before a factor that is given.
      factor = (max_position_embeddings or original) / original
      if factor == 1:
        factor = given.get("factor", 1.0)
      magnitude = given.get("attention_factor") or _longrope_magnitude(factor, original)
      factors = {key: tuple(map(float, value)) for key, value in lists.items()}
      return LongRope(magnitude=magnitude, original_max_position_embeddings=original, **factors)
  return None


def _is_positive(value: Any) -> bool:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return number and 0 < value < math.inf


def _longrope_magnitude(factor: float, original: int) -> float:
  return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _magnitude(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
  def of(scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

  return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1.0)
