"""Fine-tune a language model in 4 bits: QLoRA with 8-bit AdamW, in plain JAX, Flax and optax.

  lowmem finetune                                      # a small real model and data set
  lowmem finetune --model DIR --data rows.json --out my-adapter
  lowmem finetune --config run.yaml --lr 2e-4          # settings from a file; flags go before it
  lowmem finetune --resume my-adapter                  # go on where it stopped
  lowmem finetune --full --model DIR --out my-model    # all parameters, in the place of adapters
  lowmem plan --model DIR --seq-len 2048               # would it fit?
  lowmem chat my-adapter                               # talk to the result
  lowmem merge my-adapter --out my-model               # a model without adapters
  lowmem export my-adapter --out my.gguf               # the adapter, for llama.cpp

From a clone, ``python examples/qlora/finetune.py`` stands for ``lowmem finetune``.

The base model is frozen, its linear layers packed in 4 bits (NF4). Beside each stands a trained
low-rank correction (LoRA), and only for these does an optimizer state exist, in 8 bits. With --full
all parameters are trained, each layer updated within the backward pass.
"""

import time
from contextlib import ExitStack

from optax_lowmem.qlora.commands.setup import Setup
from optax_lowmem.qlora.commands.training_run import Run
from optax_lowmem.qlora.files.disk import DiskError
from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.run.called import called
from optax_lowmem.qlora.run.settings import Settings
from optax_lowmem.qlora.run.terminal import complain, sentences


def finetune(s: Settings) -> int:
  """Runs one fine-tuning; returns the process's exit status."""
  begun = time.perf_counter()
  try:
    with ExitStack() as locks:
      with sentences():  # what can be refused is refused here, before anything slow begins
        setup = Setup.of(s)
        if s.dry_run:
          setup.show()
          return 0
        run = Run(setup, locks)
        run.load()
      run.begin()
      status = run.train()
      if run.ended:
        run.finish(begun)
      return status
  except DiskError as error:
    complain(str(error))
    return 1


def train(argv: list[str]) -> int:
  """``lowmem finetune``."""
  with sentences():
    settings = parse(__doc__ or "", argv, prog=called())
  return finetune(settings)
