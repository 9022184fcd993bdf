"""``python -m optax_lowmem.qlora``: the same as ``lowmem``."""

import sys

from optax_lowmem.qlora.cli import main

if __name__ == "__main__":
  sys.exit(main())
