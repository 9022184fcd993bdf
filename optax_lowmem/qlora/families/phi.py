"""Phi-3, 3.5 and 4 mini."""

from typing import Any

from optax_lowmem.qlora.families.family import Family, Keys, rope, windows


def phi3(read: Keys) -> dict[str, Any]:
  return {"windows": windows(read), "fused_linears": True}


def phi3_rope(read: Keys) -> dict[str, Any]:
  """A part of each head may be turned; the old names of "longrope" are known."""
  given = {**(read.get("rope_scaling") or {}), **(read.get("rope_parameters") or {})}
  if given.get("rope_type", given.get("type")) in ("su", "yarn"):
    given |= {"rope_type": "longrope"}
  factor = given.pop("partial_rotary_factor", read["partial_rotary_factor"])
  fields = rope({**read, "rope_scaling": None, "rope_parameters": given})
  return {**fields, "partial_rotary_factor": 1.0 if factor is None else factor}


PHI3 = Family(
  "phi3",
  gguf="phi3",
  defaults={
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
  },
  options=phi3,
  rope=phi3_rope,
  # Phi-4 mini's files say so.
  supported={"full_attn_mod": (1,), "interpolate_factor": (1,), "lm_head_bias": (False,)},
)
