"""What eight cards need for an update, as JSON: run by test_accelerator.py in its own process."""

import json

import jax
from jax.sharding import AxisType

from compiled import compile_for, mesh_of
from compiled.steps import CUTS, STACK, apply_step, cut_step
from registry import REGISTRY


def main():
  found = {}
  for name in ("adamw-8", "lion-4", "came-8"):
    tx = REGISTRY[name].ours(1e-3)
    one = compile_for(*apply_step(tx, {"w": jax.ShapeDtypeStruct(STACK, "float32")}))
    for kind in (AxisType.Auto, AxisType.Explicit):
      for axes, (sizes, names, spec) in CUTS.items():
        mesh = mesh_of("h100", sizes, names, kind)
        with jax.set_mesh(mesh):
          compiled = compile_for(*cut_step(tx, mesh, spec), count=8)
        found[f"{name} {kind.name} {axes}"] = {
          "collectives": compiled.traffic.collectives,
          "device_bytes": compiled.device_bytes,
          "kernels": compiled.kernels,
          "one": one.device_bytes,
        }
  print(json.dumps(found))


if __name__ == "__main__":
  main()
