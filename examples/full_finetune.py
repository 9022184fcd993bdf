"""Fine-tune all of SmolLM2-135M, each layer updated within the backward pass.

    python examples/full_finetune.py                      # some minutes on two cores
    python examples/full_finetune.py --memory             # the table of memory alone
    python examples/full_finetune.py --model DIR --data rows.json --dtype bfloat16 --steps 200

First it compiles one step in three ways and says what each takes; then it is `lowmem finetune
--full`, whose settings it takes (`--help` lists them). What a run or a file says that --resume or
--config names goes before what is usual here. A step of one's own model is
`optax_lowmem.update_in_backward`.
"""

import sys

if __name__ == "__main__" and not {"-h", "--help"} & {*sys.argv}:
  print("Starting ...", file=sys.stderr, flush=True)  # JAX takes seconds to import

import dataclasses
import time

import jax

from optax_lowmem.qlora import cli
from optax_lowmem.qlora.commands.setup import Setup
from optax_lowmem.qlora.planning.steps import step_of
from optax_lowmem.qlora.run.arguments import given, parse, parser_of
from optax_lowmem.qlora.run.checks import check
from optax_lowmem.qlora.run.terminal import sentences
from optax_lowmem.qlora.training.report import human, nbytes

# A norm to clip to would take a second backward pass.
USUAL = "--full --steps 20 --lr 1e-4 --max-grad-norm 0 --eval-batches 4 --samples 1".split()
WAYS = {
  "all gradients, then 32-bit AdamW": {"optim": "adamw", "update_in_backward": False},
  "all gradients, then 8-bit AdamW": {"optim": "adamw_8bit", "update_in_backward": False},
  "8-bit AdamW in the backward pass": {"optim": "adamw_8bit", "update_in_backward": True},
}


def flags_of(asked: list[str]) -> list[str]:
  """What is asked for as flags of `lowmem finetune`, after what is usual here.

  Raises:
    ValueError: for a setting of another trainer that has no counterpart.
  """
  words = given(parser_of(__doc__ or ""), asked)
  return [*(["--full"] if {"resume", "config"} & {*words} else USUAL), *asked]


def print_memory(setup: Setup) -> None:
  """What one step takes, by the compiler of the device that is here."""
  s, config = setup.settings, setup.config
  shape = f"{s.batch_size} x {s.seq_len} tokens"
  print(f"A step of {shape}, {config.parameter_count():,} parameters in {s.dtype}:")
  print(f"{'':34}{'weights':>10}{'state':>12}{'temporaries':>14}{'in all':>12}")
  for name, way in WAYS.items():
    one = dataclasses.replace(s, **way)
    try:
      check(one)
    except ValueError as error:
      print(f"{name:34}refused: {error}")
      continue
    step = step_of(config, one)
    lowered = jax.jit(step.fn, donate_argnums=0).lower(step.state, step.frozen, step.batch)
    planned = lowered.compile().memory_analysis()
    assert planned is not None  # no backend here is without
    weights, state = nbytes(step.state.trained), nbytes(step.state.opt_state)
    rest = planned.temp_size_in_bytes
    sizes = [human(size) for size in (weights, state, rest, weights + state + rest)]
    print(f"{name:34}{sizes[0]:>10}{sizes[1]:>12}{sizes[2]:>14}{sizes[3]:>12}", flush=True)


def main() -> int:
  alone = "--memory" in sys.argv
  with sentences():
    flags = flags_of([flag for flag in sys.argv[1:] if flag != "--memory"])
    settings = parse(__doc__ or "", flags)
    setup = Setup.of(settings)
  if alone or not settings.resume:
    print_memory(setup)
  begun = time.perf_counter()
  status = 0 if alone else cli.main(["finetune", *flags])
  print(f"In {time.perf_counter() - begun:.0f} s." * (not alone), end="\n" * (not alone))
  return status


if __name__ == "__main__":
  sys.exit(main())
