"""The recipe of a run: optimizer, learning rate, adapters."""

import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import optax
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem import nn as lowmem_nn
from optax_lowmem._arguments.spelling import nearest
from optax_lowmem._optimizers.by_name import SPELLED, letters_of
from optax_lowmem.qlora.loading.llama import Quantize, abstract_llama, load_llama
from optax_lowmem.qlora.models.attention import AttentionKind
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.neftune import with_noise
from optax_lowmem.qlora.run.settings import Settings


def learning_rate(s: Settings) -> optax.Schedule:
  """Rises in the first steps, then stays, or falls to 0."""
  warmup = s.steps // 20 if s.warmup is None else s.warmup
  rest = max(1, s.steps - warmup)
  after = {
    "constant": optax.constant_schedule(s.lr),
    "linear": optax.linear_schedule(s.lr, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(s.lr, rest),
  }[s.schedule]
  # The first step's rate is lr / (warmup + 1), not 0: a step at 0 would be wasted.
  rise = optax.linear_schedule(s.lr / (warmup + 1), s.lr, max(1, warmup))
  return optax.join_schedules([rise, after], [warmup])


def check_optim(name: str) -> None:
  """Raises ValueError for the name of no optimizer.

  What `create` says of it is for those who write Python.
  """
  asked = letters_of(name)
  if asked in SPELLED:
    return
  near = [SPELLED[each] for each in nearest(asked, SPELLED, count=3, cutoff=0.5)]
  hint = f" Nearest: {', '.join(near)}." if near else ""
  known = sorted(each for each in SPELLED.values() if not each.startswith("paged_"))
  raise ValueError(
    f"--optim {name:.100}: no such optimizer.{hint} Known: {', '.join(known)}; each also with "
    "paged_ before it."
  )


def named_rule(s: Settings, name: str) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimizer of that name, at a learning rate that rises and falls."""
  check_optim(s.optim)
  schedule = learning_rate(s)
  decay = {} if s.weight_decay is None else {"weight_decay": s.weight_decay}
  try:
    return lowmem.create(name, schedule, **decay), schedule
  except TypeError as error:
    raise ValueError(f"--weight-decay: {s.optim} has none ({error}).") from error


def clipping(s: Settings) -> optax.GradientTransformation:
  """What is done to gradients before the optimizer has them."""
  return optax.clip_by_global_norm(s.max_grad_norm) if s.max_grad_norm else optax.identity()


def optimizer(s: Settings) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Clipping, then the named optimizer of adapters."""
  rule, schedule = named_rule(s, s.optim)
  plus = lowmem_nn.scale_lora_b(s.lora_plus_ratio) if s.lora_plus_ratio else optax.identity()
  return optax.chain(clipping(s), rule, plus), schedule


def adapted(model: Any, s: Settings) -> Any:
  """The model with fresh adapters, which change nothing yet, and its base packed.

  PiSSA and LoftQ start from the weights as they were, so there the base is packed afterwards.
  """
  rngs = nnx.Rngs(params=s.seed, dropout=s.seed + 1)
  codebook: Any = s.quantize
  model = lowmem_nn.add_lora(
    model,
    s.rank,
    s.alpha,
    s.targets,
    dropout=s.dropout,
    use_rslora=s.rslora,
    use_dora=s.dora,
    rank_pattern=s.rank_pattern or None,
    alpha_pattern=s.alpha_pattern or None,
    modules_to_save=s.modules_to_save or None,
    init=lowmem_nn.LoftQ(codebook=codebook) if s.init == "loftq" else cast(Any, s.init),
    param_dtype=jnp.dtype(s.adapter_dtype),
    rngs=rngs,
  )
  if packed_as_read(s) is None:
    model = packed(model, s)
  if s.neftune_alpha:
    model = with_noise(model, s.neftune_alpha, nnx.Rngs(noise=s.seed + 2))
  return model


def packed_as_read(s: Settings) -> Quantize:
  """The codes into which each matrix goes as it is read, so that the base is never held unpacked.

  None where that cannot be: `packed` is for after it has been read.
  """
  plain = s.init in ("default", "gaussian") and not s.modules_to_save
  return cast(Quantize, s.quantize) if plain and s.quantize != "none" else None


def packed(model: Any, s: Settings) -> Any:
  """The model with its linear layers packed, but for the head and what is trained whole."""
  if s.quantize == "none":
    return model
  kept = ["output head", *(f"(.*\\.)?{re.escape(name)}(\\..*)?" for name in s.modules_to_save)]
  if s.init == "loftq" and not _dense_linears(model, kept):  # LoftQ has packed what it adapted
    return model
  return lowmem_nn.quantize_model(model, exclude=kept, codebook=cast(Any, s.quantize))


def _dense_linears(model: Any, kept: list[str]) -> list[str]:
  """The paths of linear layers that are not packed, but for those to be kept."""
  paths = [
    ".".join(map(str, path)) for path, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear)
  ]
  either = re.compile("|".join(["lm_head", *kept]))
  return [p for p in paths if not either.fullmatch(p) and not either.fullmatch(p.split(".")[-1])]


def abstract_model(config: LlamaConfig, s: Settings) -> Any:
  """The adapted model's shapes, without its weights."""
  kind = cast(AttentionKind, s.attention)
  base = abstract_llama(config, packed_as_read(s), jnp.dtype(s.dtype), kind)
  return nnx.eval_shape(partial(adapted, s=s), base)


def loaded_model(path: Path, s: Settings) -> Any:
  """The adapted model."""
  kind = cast(AttentionKind, s.attention)
  base = load_llama(path, packed_as_read(s), dtype=jnp.dtype(s.dtype), attention=kind)
  return adapted(base, s)


def trained_model(path: Path, s: Settings, adapter: Path) -> Any:
  """The model with the adapter that a run has left, to be used and not to be trained."""
  base = load_llama(path, packed_as_read(s), dtype=jnp.dtype(s.dtype))
  model = lowmem_nn.load_peft(base if packed_as_read(s) else packed(base, s), adapter)
  model.eval()
  return model
