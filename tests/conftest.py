"""What the tests share."""

import os
import pathlib

# One thread a test process: the suite runs on as many processes as there are cores.
os.environ.setdefault(
  "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

GOLDEN = pathlib.Path(__file__).parent / "golden"
