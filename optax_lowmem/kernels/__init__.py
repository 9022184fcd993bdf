"""Optional kernels, and the one setting that says whether they run.

XLA runs every rule on every platform. A kernel does the same in one launch for each parameter: on
CUDA of arrays whose blocks form one run, on TPUs of matrices whose rows fill their lanes. `using`
chooses, or the environment variable `OPTAX_LOWMEM_KERNELS`; both are read when an update is traced,
so choose before the first step:

- `auto`, the default: the platform's kernel for every parameter that it supports, XLA for all else;
- `xla`: no kernels;
- `pallas`: the kernel, or an error that says why not (on another platform, when it is compiled);
- `interpret`: the body of CUDA's kernel as plain XLA operations on any platform, slowly, for tests.
"""

from optax_lowmem.kernels._choice import map_blocks as map_blocks
from optax_lowmem.kernels._choice import platforms as platforms
from optax_lowmem.kernels._choice import refusal as refusal
from optax_lowmem.kernels._choice import setting as setting
from optax_lowmem.kernels._choice import using as using
from optax_lowmem.kernels._guard import trusted as trusted

__all__ = ["map_blocks", "platforms", "refusal", "setting", "trusted", "using"]
