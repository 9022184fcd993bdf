"""What eight cards need for an update, as JSON: run by test_accelerator.py in its own process."""

import json

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_lowmem as lowmem
from compiled import compile_for, mesh_of
from compiled.steps import CUTS, STACK, apply_step, cut_step
from registry import REGISTRY

CASES = {name: (REGISTRY[name].ours(1e-3), "float32") for name in ("adamw-8", "lion-4", "came-8")}
CASES["masters"] = lowmem.master_weights(lowmem.adamw(1e-3)), "bfloat16"
CASES["sums"] = lowmem.multi_steps(lowmem.adamw(1e-3), 4, bits=8), "float32"
CASES["rounding"] = lowmem.stochastic_rounding(lowmem.adamw(1e-3), seed=0), "bfloat16"


def quantized(mesh, double):
  """The collectives of an array by rows and columns that is quantized and decoded."""
  x = jax.ShapeDtypeStruct((512, 2048), "float32", sharding=NamedSharding(mesh, P("x", "y")))
  with jax.set_mesh(mesh):
    compiled = compile_for(
      lambda x: lowmem.quantize(x, "nf4", 64, double).dequantize(), (x,), count=8
    )
  return compiled.traffic.collectives


def main():
  found = {}
  for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = mesh_of("h100", (4, 2), ("x", "y"), kind)
    for name, double in (("quantize", False), ("quantize doubly", True)):
      found[f"{name} {kind.name}"] = quantized(mesh, double)
  for name, (tx, dtype) in CASES.items():
    one = compile_for(*apply_step(tx, {"w": jax.ShapeDtypeStruct(STACK, dtype)}))
    for kind in (AxisType.Auto, AxisType.Explicit):
      for axes, (sizes, names, spec) in CUTS.items():
        mesh = mesh_of("h100", sizes, names, kind)
        with jax.set_mesh(mesh):
          compiled = compile_for(*cut_step(tx, mesh, spec, dtype), count=8)
        found[f"{name} {kind.name} {axes}"] = {
          "collectives": compiled.traffic.collectives,
          "device_bytes": compiled.device_bytes,
          "kernels": compiled.kernels,
          "one": one.device_bytes,
        }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
