"""Low-memory training for JAX: quantized optimizer state, as plain optax.

>>> import optax_lowmem as lowmem
>>> tx = lowmem.adamw(3e-4)  # instead of optax.adamw(3e-4): a quarter of the state

NF4 weights and LoRA for Flax are in `optax_lowmem.nn` (NNX) and `optax_lowmem.linen`, which need
flax and are imported by themselves.
"""

from optax_lowmem import kernels
from optax_lowmem._backward.update_in_backward import BackwardTraining, update_in_backward
from optax_lowmem._host_memory.paged_state import paged, unpaged
from optax_lowmem._host_memory.pages import Paged
from optax_lowmem._host_memory.state_bytes import state_bytes
from optax_lowmem._masters.master_params import master_params, with_master_params
from optax_lowmem._masters.master_weights import MasterWeightsState, master_weights
from optax_lowmem._masters.stochastic_rounding import (
  StochasticRoundingState,
  stochastic_rounding,
)
from optax_lowmem._optimizers.adafactor import adafactor, relative_step_size
from optax_lowmem._optimizers.adagrad_rmsprop import adagrad, rmsprop
from optax_lowmem._optimizers.adam import adam, adamw
from optax_lowmem._optimizers.ademamix import ademamix
from optax_lowmem._optimizers.by_name import create
from optax_lowmem._optimizers.came import came
from optax_lowmem._optimizers.lamb_lars import lamb, lars
from optax_lowmem._optimizers.lion_sgd import lion, sgd
from optax_lowmem._optimizers.quantized import quantized
from optax_lowmem._optimizers.scale_by_came import ScaleByCameState, scale_by_came
from optax_lowmem._paging.offloaded import offloaded
from optax_lowmem._plan.compare import (
  OptimizerComparison,
  OptimizerMemory,
  compare_optimizer_memory,
)
from optax_lowmem._plan.memory_plan import MemoryPlan, Part
from optax_lowmem._plan.memory_report import (
  MemoryReport,
  memory_callback,
  memory_report,
  print_memory_usage,
  print_trainable_parameters,
)
from optax_lowmem._plan.plan import plan
from optax_lowmem._quantization.array import QuantizedArray
from optax_lowmem._quantization.codebook import Codebook
from optax_lowmem._quantization.codebooks import CodebookName, get_codebook
from optax_lowmem._quantization.quantize import quantize
from optax_lowmem._quantization.storage import Blockwise, Dense, Storage
from optax_lowmem._sharding.convert_state import convert_state, dequantized
from optax_lowmem._sharding.state_shardings import state_shardings
from optax_lowmem._state import serialization as _serialization
from optax_lowmem._state.leaves import is_stored
from optax_lowmem._state.pickled_names import name_after
from optax_lowmem._steps.loss_scaling import LossScalingState, loss_scaling, scale_loss
from optax_lowmem._steps.multi_steps import has_updated, multi_steps
from optax_lowmem._update.explain import Explained, Explanation, explain

_serialization.register()
name_after(
  __name__,
  BackwardTraining,
  Blockwise,
  Codebook,
  Dense,
  Explained,
  Explanation,
  LossScalingState,
  MasterWeightsState,
  MemoryPlan,
  MemoryReport,
  OptimizerComparison,
  OptimizerMemory,
  Paged,
  Part,
  QuantizedArray,
  ScaleByCameState,
  StochasticRoundingState,
  Storage,
  get_codebook,  # pickles hold the library's own codebooks as a call of it
)

__version__ = "0.1.0"

__all__ = [
  # Optimizers: optax's, their moments quantized.
  "adagrad",
  "adam",
  "adamw",
  "ademamix",
  "create",
  "lamb",
  "lars",
  "lion",
  "rmsprop",
  "sgd",
  # Factored second moments.
  "adafactor",
  "came",
  "relative_step_size",
  "scale_by_came",
  "ScaleByCameState",
  # Any other transformation.
  "quantized",
  # Parameters in bfloat16.
  "MasterWeightsState",
  "StochasticRoundingState",
  "master_params",
  "master_weights",
  "stochastic_rounding",
  "with_master_params",
  # Which gradients make a step.
  "LossScalingState",
  "has_updated",
  "loss_scaling",
  "multi_steps",
  "scale_loss",
  # The update within the backward pass.
  "BackwardTraining",
  "update_in_backward",
  # Where state is stored.
  "Paged",
  "offloaded",
  "paged",
  "state_shardings",
  "unpaged",
  # How a moment is held.
  "Blockwise",
  "Codebook",
  "CodebookName",
  "Dense",
  "Storage",
  "convert_state",
  "get_codebook",
  # As leaves of a state.
  "is_stored",
  # Arrays.
  "QuantizedArray",
  "dequantized",
  "quantize",
  # How updates are computed.
  "Explained",
  "Explanation",
  "explain",
  "kernels",
  # Memory, before a run and within it.
  "MemoryPlan",
  "MemoryReport",
  "OptimizerComparison",
  "OptimizerMemory",
  "Part",
  "compare_optimizer_memory",
  "memory_callback",
  "memory_report",
  "plan",
  "print_memory_usage",
  "print_trainable_parameters",
  "state_bytes",
]
