"""QLoRA as it is done in PyTorch, by transformers, PEFT and bitsandbytes; for `qlora_vs_peft.py`.

`tests/test_qlora_parity.py` takes its losses from here too, so nothing here knows of JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
from typing import Any

import numpy as np
import torch

OPTIMIZERS = {
  "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr),
  "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=1e-4),
}


def packed(linear: torch.nn.Linear, device: str, dtype: torch.dtype) -> torch.nn.Module:
  """The layer as bitsandbytes' `Linear4bit`: NF4, blocks of 64, scales in 8 bits too.

  `transformers.BitsAndBytesConfig` makes the same layers, but not of a model that is in memory, and
  not on a CPU.
  """
  import bitsandbytes as bnb

  if linear.bias is not None:
    raise ValueError("a linear layer with a bias is not a Llama's.")
  new = bnb.nn.Linear4bit(
    linear.in_features,
    linear.out_features,
    bias=False,
    compute_dtype=dtype,
    compress_statistics=True,
    quant_type="nf4",
    device="meta",
  )
  new.weight = bnb.nn.Params4bit(
    linear.weight.data.contiguous(),
    requires_grad=False,
    quant_type="nf4",
    blocksize=64,
    compress_statistics=True,
    module=new,
  ).to(device)  # quantizes
  return new


def load(
  model: str | os.PathLike[str],
  adapter: str | os.PathLike[str],
  *,
  nf4: bool,
  dtype: torch.dtype = torch.float32,
  device: str = "cpu",
  checkpoint: bool = False,
) -> Any:
  """A `peft.PeftModel` ready to train: frozen base, adapters in float32.

  Args:
    model: a Hugging Face directory.
    adapter: a directory that `save_peft` or PEFT wrote.
    nf4: quantize every linear layer but the output layer.
    dtype: of the base and of the computation.
    device: where it runs.
    checkpoint: compute each layer's forward pass again in the backward pass.
  """
  import peft
  import transformers

  base: Any = transformers.LlamaForCausalLM.from_pretrained(model, dtype=dtype)
  base.config.use_cache = False
  if nf4:
    for layer in base.model.layers:
      for parent in (layer.self_attn, layer.mlp):
        for name, child in list(parent.named_children()):
          if isinstance(child, torch.nn.Linear):
            setattr(parent, name, packed(child, device, dtype))
  # Read from safetensors, a tensor is a window on its file. The few that are left of a file would
  # keep all of it in memory, the dense weights included.
  for parameter in base.parameters():
    if parameter.is_floating_point():
      parameter.data = parameter.data.clone()
  base.to(device)
  if checkpoint:
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.enable_input_require_grads()
  peer = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
  return peer.train()


def packed_bits(model: Any) -> dict[str, np.ndarray]:
  """What bitsandbytes holds: `<layer>.` and `codes`, `scales`, `scale_scales`, `offset`."""
  out = {}
  for name, module in model.named_modules():
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None:
      continue
    name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
    parts = {
      "codes": module.weight.data.reshape(-1),
      "scales": state.absmax.reshape(-1),
      "scale_scales": state.state2.absmax.reshape(-1),
      "offset": state.offset.reshape(-1),
    }
    out |= {f"{name}.{key}": value.cpu().numpy() for key, value in parts.items()}
  return out


def adapter_tensors(model: Any) -> dict[str, np.ndarray]:
  """The adapter by the names of PEFT's file."""
  import peft

  state = peft.get_peft_model_state_dict(model)
  return {name: value.detach().cpu().numpy().copy() for name, value in state.items()}


class Trainer:
  """One step at a time: the mean cross-entropy of all tokens but the first, then an update."""

  def __init__(self, model: Any, optimizer: str, lr: float, dtype: torch.dtype = torch.float32):
    self.model = model
    self.device = next(model.parameters()).device
    params = [p for p in model.parameters() if p.requires_grad]
    self.optimizer = OPTIMIZERS[optimizer](params, lr)
    # As Hugging Face's Trainer does with bf16=True: the adapters, float32, multiply in bfloat16.
    self.cast = (
      torch.autocast(self.device.type, dtype)
      if dtype != torch.float32
      else contextlib.nullcontext()
    )

  def step(self, ids: np.ndarray) -> float:
    tokens = torch.from_numpy(ids.astype(np.int64)).to(self.device)
    with self.cast:
      logits = self.model(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()
    return loss.item()  # waits for the device


def main() -> None:
  from _turns import arguments, resident, serve

  parser = arguments(argparse.ArgumentParser(description=__doc__))
  parser.add_argument("--device", default="cpu")
  args = parser.parse_args()
  import bitsandbytes  # noqa: F401  (before the base line of the memory, as all imports)
  import peft  # noqa: F401
  import transformers  # noqa: F401

  before = resident()
  folder, dtype = pathlib.Path(args.folder), getattr(torch, args.dtype)
  ids = np.load(folder / "ids.npy")
  model = load(
    args.model,
    folder / "adapter",
    nf4=args.side.endswith("nf4"),
    dtype=dtype,
    device=args.device,
    checkpoint=True,
  )
  trainer = Trainer(model, "adamw", args.lr, dtype)
  on_gpu = args.device == "cuda"

  def memory() -> dict[str, int]:
    return {"device peak": torch.cuda.max_memory_allocated()} if on_gpu else {}

  serve(
    lambda i: trainer.step(ids[i]),
    before,
    memory,
    reset=torch.cuda.reset_peak_memory_stats if on_gpu else None,
  )


if __name__ == "__main__":
  main()
