"""The torch section of `gpu.py`: the peers on the same shapes. A row is a line of JSON."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
  if DEVICE == "cuda":
    torch.cuda.synchronize()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
  """Bytes of all tensors of the state, those inside torchao's subclasses included."""

  def count(x: Any) -> int:
    if not isinstance(x, torch.Tensor) or x.ndim == 0:
      return 0
    if flatten := getattr(x, "__tensor_flatten__", None):
      return sum(count(getattr(x, name)) for name in flatten()[0])
    return x.numel() * x.element_size()

  return sum(count(x) for entry in optimizer.state.values() for x in entry.values())


def cost(make: Callable[[Any], Any], args: argparse.Namespace) -> dict[str, Any]:
  """Time of a step, bytes that must move and peak memory beyond parameters and gradients."""
  side = max(64, round((args.params / args.leaves) ** 0.5 / 64) * 64)
  torch.manual_seed(0)
  shape = {"dtype": torch.bfloat16, "device": DEVICE}
  params = [torch.nn.Parameter(torch.randn(side, side, **shape)) for _ in range(args.leaves)]
  for p in params:
    p.grad = torch.randn(side, side, **shape)
  size = sum(p.numel() for p in params)
  optimizer = make(params)
  start = time.perf_counter()
  optimizer.step()  # makes the state, and compiles where a peer compiles
  wait()
  first = time.perf_counter() - start
  optimizer.step()
  wait()
  before = 0
  if DEVICE == "cuda":
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
  times = []
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(args.repeat):
      optimizer.step()
    wait()
    times.append((time.perf_counter() - start) / args.repeat)
  state = state_bytes(optimizer)
  row = {"B/param": state / size, "moved": 3 * 2 * size + 2 * state, "compile_s": first}
  if DEVICE == "cuda":
    row["temp B/param"] = (torch.cuda.max_memory_allocated() - before) / size
  return row | {"step_s": min(times), "ms": min(times) * 1e3}


def rows() -> Iterator[tuple[str, Callable[[Any], Any]]]:
  def bitsandbytes(name):
    def make(params):
      import bitsandbytes as bnb

      return getattr(bnb.optim, name)(params, lr=1e-3)

    return make

  def torchao(params):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, lr=1e-3)

  # Its state has the dtype of the parameters.
  yield "torch AdamW fused, bf16 state", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
  yield "bitsandbytes AdamW32bit", bitsandbytes("AdamW32bit")
  yield "bitsandbytes AdamW8bit", bitsandbytes("AdamW8bit")
  yield "bitsandbytes Lion8bit", bitsandbytes("Lion8bit")
  # Beside the section "offload"; its unified memory leaves the device only when that is full.
  yield "bitsandbytes PagedAdamW32bit", bitsandbytes("PagedAdamW32bit")
  yield "bitsandbytes PagedAdamW8bit", bitsandbytes("PagedAdamW8bit")
  yield "torchao AdamW8bit", torchao


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--section")
  parser.add_argument("--params", type=float)
  parser.add_argument("--leaves", type=int)
  parser.add_argument("--repeat", type=int)
  args = parser.parse_args()
  for name, make in rows():
    try:
      row = cost(make, args)
    except Exception as error:  # not installed, most often
      row = {"error": "".join(traceback.format_exception(error))[-1500:]}
    print(json.dumps({"name": name} | row), flush=True)
    if DEVICE == "cuda":
      torch.cuda.empty_cache()


if __name__ == "__main__":
  main()
