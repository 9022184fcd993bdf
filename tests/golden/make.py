"""Makes the golden files anew, from what stands in them as inputs, and compares.

    python tests/golden/make.py                 # all: says what differs, and fails if it is much
    python tests/golden/make.py came peft       # some
    python tests/golden/make.py --write came    # writes what was made in the place of what stands

Inputs (parameters, gradients, weights, adapters' tensors) were drawn at random once, and stay as
they are; README.md says which. Results are made by the packages that are named there.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).parent
Arrays = dict[str, Any]

ADAFACTOR: dict[str, dict[str, Any]] = {
  "rel": {"lr": None, "relative_step": True, "scale_parameter": True, "warmup_init": False},
  "rel_warm": {"lr": None, "relative_step": True, "scale_parameter": True, "warmup_init": True},
  "rel_noscale": {"lr": None, "relative_step": True, "scale_parameter": False},
  "lr": {"lr": 1e-3, "relative_step": False, "scale_parameter": False},
  "lr_scale": {"lr": 1e-3, "relative_step": False, "scale_parameter": True},
  "lr_b1_wd": {
    "lr": 1e-3,
    "relative_step": False,
    "scale_parameter": False,
    "beta1": 0.9,
    "weight_decay": 0.01,
  },
  "rel_b1": {"lr": None, "relative_step": True, "scale_parameter": True, "beta1": 0.9},
  "clip05_d05": {
    "lr": 1e-3,
    "relative_step": False,
    "scale_parameter": False,
    "clip_threshold": 0.5,
    "decay_rate": -0.5,
  },
}
# Of each peer, by the name in the file: its class and arguments.
BITSANDBYTES: dict[str, tuple[str, dict[str, Any]]] = {
  "AdamW8bit": ("AdamW8bit", {"lr": 1e-3, "weight_decay": 0.01}),
  "AdamW8bit/float32": ("AdamW", {"lr": 1e-3, "weight_decay": 0.01}),
  "Lion8bit": ("Lion8bit", {"lr": 1e-4, "weight_decay": 0.01}),
  "Lion8bit/float32": ("Lion", {"lr": 1e-4, "weight_decay": 0.01}),
  "SGD8bit": ("SGD8bit", {"lr": 1e-2, "momentum": 0.9}),
  "SGD8bit_wd": ("SGD8bit", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.01}),
  "RMSprop8bit": ("RMSprop8bit", {"lr": 1e-3}),
  "Adagrad8bit": ("Adagrad8bit", {"lr": 1e-2}),
  "AdEMAMix8bit": ("AdEMAMix8bit", {"lr": 1e-3}),
}
TORCHAO = {
  "AdamW8bit": ("AdamW8bit", {"lr": 1e-3, "weight_decay": 0.01}),
  "Adam8bit": ("Adam8bit", {"lr": 1e-3, "weight_decay": 0.01}),
  "AdamW4bit": ("AdamW4bit", {"lr": 1e-3, "weight_decay": 0.01}),
}


def trajectory(old: Arrays, name: str, make: Callable[[Any], Any], steps: tuple[int, ...]) -> Any:
  """A parameter after these steps along the gradients of a file, and the optimizer's last state."""
  import torch

  p = torch.nn.Parameter(torch.from_numpy(old[f"p0/{name}"].copy()))
  tx, found = make([p]), {}
  for t, g in enumerate(old[f"g/{name}"].astype(np.float32), 1):
    p.grad = torch.from_numpy(g)
    tx.step()
    if t in steps:
      found[t] = p.detach().numpy().copy()
  return found, tx.state[p]


def names(old: Arrays) -> list[str]:
  return [key.removeprefix("p0/") for key in old if key.startswith("p0/")]


def nearest(a: Any, code: Any, length: int) -> tuple[Any, Any]:
  """The codes of the nearest values, and the largest magnitudes of blocks.

  That is what bitsandbytes computes on CUDA, and where it has no kernel; its CPU build looks codes
  up in a table of 65,536 bins.
  """
  import torch

  flat = a.reshape(-1).float()
  blocks = torch.nn.functional.pad(flat, (0, -len(flat) % length)).reshape(-1, length)
  absmax = blocks.abs().amax(-1)
  scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
  codes = torch.bucketize(scaled.reshape(-1)[: len(flat)], (code[:-1] + code[1:]) / 2)
  return codes.to(torch.uint8).reshape(a.shape), absmax


def blockwise(old: Arrays) -> Arrays:
  import bitsandbytes.functional as bnb
  import torch
  from torchao.optim.quant_utils import create_dynamic_map, quantize_8bit_with_qmap

  new: Arrays = {}
  maps = {}
  for kind, signed in (("signed", True), ("unsigned", False)):
    maps[kind] = bnb.create_dynamic_map(signed=signed)
    new[f"map/{kind}"] = maps[kind].numpy()
    new[f"map4/{kind}_torchao"] = np.float32(
      create_dynamic_map(signed, 3, 4) if signed else np.linspace(0, 1, 17)[1:]
    )
  for name in ("normal", "heavy", "zeros", "wide"):
    for kind, code in maps.items():
      x = torch.from_numpy(old[f"x/{name}"].copy())
      x = x if kind == "signed" else x.abs()
      for length in (256, 2048):
        at = f"{name}/{kind}/{length}"
        codes, absmax = nearest(x, code, length)
        new[f"{at}/codes_exact"], new[f"{at}/absmax"] = codes.numpy(), absmax.numpy()
        codes_cpu, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, length)
        new[f"{at}/codes_cpu"] = codes_cpu.numpy()
        for which, c in (("exact", codes), ("cpu", codes_cpu)):
          args = c, absmax, code, length, torch.float32
          new[f"{at}/deq_{which}"] = torch.ops.bitsandbytes.dequantize_blockwise(*args).numpy()
      if f"{name}/{kind}/256/codes_torchao" in old:
        whole = x[: len(x) // 256 * 256].view(-1, 256)
        scaled = whole / whole.abs().amax(-1, keepdim=True).clip(1e-12)
        codes = quantize_8bit_with_qmap(scaled, code)
        new[f"{name}/{kind}/256/codes_torchao"] = codes.numpy().reshape(-1)
  return new


def four_bits(old: Arrays) -> Arrays:
  import bitsandbytes.functional as bnb
  import torch

  new: Arrays = {}
  for kind in ("nf4", "fp4"):
    new[f"code/{kind}"] = bnb.get_4bit_type(kind, device="cpu").numpy()
    for name in (key.removeprefix("x/") for key in old if key.startswith("x/")):
      x = torch.from_numpy(old[f"x/{name}"].copy())
      plain = f"{kind}/{name}/plain"
      packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type=kind)
      new[f"{plain}/packed"], new[f"{plain}/absmax"] = packed.numpy(), state.absmax.numpy()
      new[f"{plain}/deq"] = bnb.dequantize_4bit(packed, state).numpy()
      at = f"{kind}/{name}/dq"
      args = {"blocksize": 64, "quant_type": kind, "compress_statistics": True}
      packed, nested = bnb.quantize_4bit(x, **args)
      new[f"{at}/packed"] = packed.numpy()
      new[f"{at}/deq"] = bnb.dequantize_4bit(packed, nested).numpy()
      new[f"{at}/offset"] = nested.offset.numpy()
      new[f"{at}/qabsmax_cpu"] = nested.absmax.numpy()
      new[f"{at}/state2_absmax"] = nested.state2.absmax.numpy()
      new[f"{at}/state2_code"] = nested.state2.code.numpy()
      new[f"{at}/state2_blocksize"] = np.asarray(nested.state2.blocksize)
      centred = state.absmax - nested.offset
      codes, scales = nearest(centred, nested.state2.code, nested.state2.blocksize)
      args = codes, scales, nested.state2.code, nested.state2.blocksize, torch.float32
      absmax = torch.ops.bitsandbytes.dequantize_blockwise(*args) + nested.offset
      new[f"{at}/qabsmax_exact"], new[f"{at}/absmax_exact"] = codes.numpy(), absmax.numpy()
      state.absmax = absmax
      new[f"{at}/deq_exact"] = bnb.dequantize_4bit(packed, state).numpy()
  return new


def came(old: Arrays) -> Arrays:
  from came_pytorch import CAME

  new: Arrays = {}
  for case, config in ast.literal_eval(str(old["config"])).items():
    for name in names(old):
      found, state = trajectory(old, name, functools.partial(CAME, **config), (1, 5, 20))
      new |= {f"{case}/{name}/p{t}": p for t, p in found.items()}
      wanted = f"{case}/{name}/state/"
      new |= {key: state[key[len(wanted) :]].numpy() for key in old if key.startswith(wanted)}
  return new


def adafactor(old: Arrays) -> Arrays:
  from transformers.optimization import Adafactor

  new: Arrays = {}
  for case, config in ADAFACTOR.items():
    for name in names(old):
      found, _ = trajectory(old, name, functools.partial(Adafactor, **config), (1, 5, 20))
      new |= {f"hf/{case}/{name}/p{t}": p for t, p in found.items()}
  return new


def trajectories(old: Arrays) -> Arrays:
  import bitsandbytes.backends.cpu.ops as cpu
  import bitsandbytes.optim
  import torch
  import torchao.optim

  def quantize(a, code, absmax, out, length):
    codes, scales = nearest(a, code, length)
    out.copy_(codes)
    absmax.copy_(scales)

  new: Arrays = {}
  kept, cpu._quant_blockwise_fp32_direct = cpu._quant_blockwise_fp32_direct, quantize
  compile_, torch.compile = torch.compile, lambda f, **_: f  # as they were made, without a compiler
  try:
    for peer, package, table in (
      ("bitsandbytes", bitsandbytes.optim, BITSANDBYTES),
      ("torchao", torchao.optim, TORCHAO),
      ("torchao", torch.optim, {"AdamW8bit/float32": ("AdamW", TORCHAO["AdamW8bit"][1])}),
    ):
      for case, (cls, config) in table.items():
        for name in names(old):
          if f"{peer}/{case}/{name}" in old:
            make = functools.partial(getattr(package, cls), **config)
            new[f"{peer}/{case}/{name}"] = trajectory(old, name, make, (20,))[0][20]
  finally:
    cpu._quant_blockwise_fp32_direct, torch.compile = kept, compile_
  return new


def peft(old: Arrays) -> Arrays:
  """Logits, merged weights, and what PEFT writes of an adapter that it has read."""
  import torch
  import transformers
  from safetensors.numpy import load_file

  library = importlib.import_module("peft")  # pyright would take the folder beside this file
  folder = HERE / "peft"
  ids = torch.from_numpy(np.load(folder / "input_ids.npy")).long()

  def base():
    return transformers.AutoModelForCausalLM.from_pretrained(
      folder / "base", dtype=torch.float32
    ).eval()

  def logits(model):
    with torch.no_grad():
      return model(input_ids=ids).logits.numpy()

  new: Arrays = {"logits_base.npy": logits(base())}
  for adapter in sorted(path.parent for path in folder.glob("*/adapter_model.safetensors")):
    model = library.PeftModel.from_pretrained(base(), adapter).eval()
    at = adapter.name
    if f"{at}/logits.npy" in old:  # `minimal` has none
      new[f"{at}/logits.npy"] = logits(model)
    with tempfile.TemporaryDirectory() as scratch:
      model.save_pretrained(scratch)
      written = load_file(f"{scratch}/adapter_model.safetensors")
    new |= {f"{at}/adapter_model.safetensors/{key}": value for key, value in written.items()}
    if any(key.startswith(f"{at}/merged.safetensors") for key in old):
      merged = model.merge_and_unload().state_dict()
      new |= {f"{at}/merged.safetensors/{key}": value.numpy() for key, value in merged.items()}
  return new


def read_peft() -> Arrays:
  from safetensors.numpy import load_file

  folder, old = HERE / "peft", {}
  for path in sorted(folder.rglob("*.npy")):
    old[str(path.relative_to(folder))] = np.load(path)
  for path in sorted(folder.glob("*/*.safetensors")):
    tensors = load_file(path)
    old |= {f"{path.relative_to(folder)}/{key}": value for key, value in tensors.items()}
  return old


def write_peft(new: Arrays) -> None:
  from safetensors.numpy import save_file

  files: dict[str, Arrays] = {}
  for key, value in new.items():
    path, _, tensor = key.partition(".safetensors/")
    if tensor:
      files.setdefault(path, {})[tensor] = value
    elif key.endswith(".npy"):
      np.save(HERE / "peft" / key, value)
  for path, tensors in files.items():
    save_file(tensors, HERE / "peft" / f"{path}.safetensors", metadata={"format": "pt"})


def llama() -> tuple[Arrays, Arrays]:
  """What stands in `llama/*.npz`, and what `make_llama.py` makes of it."""
  import make_llama

  old, new = {}, {}
  for name in make_llama.CASES:
    config, weights, measured = make_llama.read(name)
    model = make_llama.build(name)
    made = {k: v.numpy().astype(np.float16) for k, v in model.state_dict().items()}
    old |= {f"{name}/{k}": v for k, v in (weights | measured).items()}
    new |= {f"{name}/{k}": made[k] for k in weights}
    new |= {f"{name}/{k}": v for k, v in make_llama.measure(model).items()}
    for found, written in ((old, config), (new, model.config.to_diff_dict())):
      written = {k: v for k, v in written.items() if k != "transformers_version"}
      found[f"{name}/config"] = np.asarray(json.dumps(written, sort_keys=True))
  return old, new


def qlora(old: Arrays) -> Arrays:
  """Twenty steps of transformers, PEFT and bitsandbytes."""
  sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "benchmarks"), str(HERE.parent)]
  from test_qlora_parity import results_of_torch

  return results_of_torch(old)


NPZ: dict[str, Callable[[Arrays], Arrays]] = {
  "a_blockwise": blockwise,
  "b_4bit": four_bits,
  "came": came,
  "adafactor": adafactor,
  "trajectories": trajectories,
  "qlora": qlora,
}


def compare(old: Arrays, new: Arrays) -> float:
  """Prints what differs, by the last part of a key; returns the largest difference, relatively."""
  worst: dict[str, tuple[float, int, str]] = {}
  for key in sorted(new):
    a, b = old.get(key), np.asarray(new[key])
    if a is None or a.shape != b.shape or a.dtype != b.dtype:
      print(f"  {key}: {'absent' if a is None else f'{a.dtype}{a.shape}'}, now {b.dtype}{b.shape}")
      worst[key] = float("inf"), 1, key
    elif not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
      if a.dtype.kind in "iuU":
        size = float(np.mean(a != b))
        kind = "codes or numbers, part of them"
      else:
        size = float(np.nanmax(np.abs(a - b)) / max(float(np.nanmax(np.abs(a))), 1e-30))
        kind = "floats, of the largest"
      largest, count, where = worst.get(kind, (0.0, 0, key))
      worst[kind] = max(largest, size), count + 1, key if size > largest else where
  inputs = sorted(set(old) - set(new))
  differ = sum(count for _, count, _ in worst.values())
  same = f"{len(new) - differ} of them the same bits"
  print(f"  {len(new)} made, {same}; {len(inputs)} kept as inputs")
  for kind, (size, count, key) in worst.items():
    print(f"  {count} differ ({kind}): {size:.1e} at most, in {key}")
  return max((size for size, _, _ in worst.values()), default=0.0)


def main() -> int:
  parser = argparse.ArgumentParser(description="Makes golden files anew, and compares.")
  parser.add_argument("files", nargs="*", metavar="FILE", help="all if none")
  parser.add_argument("--write", action="store_true", help="write what was made")
  parser.add_argument("--most", type=float, default=1e-5, help="largest difference to let pass")
  arguments = parser.parse_args()
  warnings.simplefilter("ignore")
  failed = []
  for name in arguments.files or [*NPZ, "peft", "llama"]:
    print(name, flush=True)
    try:
      if name == "llama":
        old, new = llama()
      else:
        old = read_peft() if name == "peft" else dict(np.load(HERE / f"{name}.npz"))
        new = peft(old) if name == "peft" else NPZ[name](old)
    except ImportError as error:
      print(f"  not made: {error}")
      failed.append(name)
      continue
    if compare(old, new) > arguments.most:
      failed.append(name)
    if arguments.write and name == "peft":
      write_peft(new)
    elif arguments.write and name != "llama":
      np.savez_compressed(HERE / f"{name}.npz", **(old | new))
  print("differ:", ", ".join(failed) or "none")
  return bool(failed)


if __name__ == "__main__":
  sys.exit(main())
