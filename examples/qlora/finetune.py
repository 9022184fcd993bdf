"""Fine-tune a language model in 4 bits: ``lowmem``, from a clone of the repository.

  python examples/qlora/finetune.py                      # a small real model and data set
  python examples/qlora/finetune.py --model DIR --data rows.json --out my-adapter
  python examples/qlora/finetune.py chat my-adapter      # talk to the result

``--help`` lists the settings; the program is `optax_lowmem.qlora`.
"""

import sys

if __name__ == "__main__" and not {"-h", "--help"} & {*sys.argv}:
  print("Starting ...", file=sys.stderr, flush=True)  # JAX takes seconds to import

from optax_lowmem.qlora.cli import main

if __name__ == "__main__":
  sys.exit(main(default="finetune"))
