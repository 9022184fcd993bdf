"""What there is to say of a family of models, and what several of them say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optax_lowmem.qlora.models.llama_config import check_size
from optax_lowmem.qlora.models.rope_scaling import rope_scaling_from_hf

Keys = Mapping[str, Any]


def rope(read: Keys, theta: float = 10000.0) -> dict[str, Any]:
  """`rope_theta` and `rope_scaling` of a family whose heads are turned whole.

  Args:
    read: the keys of a ``config.json``.
    theta: the base where no key says it.

  Raises:
    ValueError: where a part of a head would be turned, and as `rope_scaling_from_hf`.
  """
  # transformers 5 writes `rope_parameters`; before that, `rope_theta` and `rope_scaling`.
  given = {**(read.get("rope_scaling") or {}), **(read.get("rope_parameters") or {})}
  if given.pop("partial_rotary_factor", None) not in (None, 1):
    raise ValueError("`partial_rotary_factor` other than 1 is not supported.")
  longest = read["max_position_embeddings"]
  original = read.get("original_max_position_embeddings")
  if original is not None:
    check_size("original_max_position_embeddings", original)
    # In transformers too, the outer one wins.
    given.pop("original_max_position_embeddings", None)
  said = given.get("rope_theta", read.get("rope_theta"))
  return {
    "rope_theta": theta if said is None else said,
    "rope_scaling": rope_scaling_from_hf(given, original or longest, longest),
  }


@dataclasses.dataclass(frozen=True)
class Family:
  """One kind of ``config.json``.

  Attributes:
    model_type: its name there.
    gguf: its name in GGUF files.
    gguf_adjacent_pairs: whether rows of q_proj and k_proj that are turned together are beside each
      other there, not half a head apart.
    defaults: the keys that the family reads, beside those that all do, and what Hugging Face takes
      where one is absent. None: from other keys.
    options: gives fields of `LlamaConfig`, of the file's keys and the defaults of those that are
      absent.
    rope: the same, for the fields of the rotary embedding.
    supported: of keys that are not read, the values that mean what is computed; more than, or
      other than, those that hold for every family.
  """

  model_type: str
  gguf: str
  defaults: Keys
  options: Callable[[Keys], dict[str, Any]] = lambda read: {}
  rope: Callable[[Keys], dict[str, Any]] = rope
  supported: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  gguf_adjacent_pairs: bool = False


def biases(read: Keys) -> dict[str, Any]:
  """Biases by Llama's two keys."""
  bias = read.get("attention_bias", False)
  return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": read.get("mlp_bias", False)}


def windows(read: Keys, types: Sequence[str] | None = None) -> tuple[int | None, ...]:
  """Each layer's window; Hugging Face's window counts the token itself, as here.

  Args:
    read: has `sliding_window`, and may have `layer_types`.
    types: the layers' types where `layer_types` says nothing; all have a window by default.

  Raises:
    ValueError: for types that are unknown or too few, and for a window that is not there.
  """
  count, window = read["num_hidden_layers"], read["sliding_window"]
  if read.get("layer_types") is not None:
    kinds: Sequence[str] = read["layer_types"]
  elif window is None:
    return ()
  else:
    kinds = ["sliding_attention"] * count if types is None else types
  if len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
    raise ValueError(
      f"`layer_types` must name 'full_attention' or 'sliding_attention' for each of {count} "
      f"layers, got {kinds!r}."
    )
  if "sliding_attention" not in kinds:
    return ()
  if window is None:
    raise ValueError("`layer_types` names 'sliding_attention', but there is no `sliding_window`.")
  return tuple(window if kind == "sliding_attention" else None for kind in kinds)
