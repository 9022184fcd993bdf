"""Real training, where only the outcome counts."""

import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))


@pytest.mark.slow
def test_state_in_few_bits_trains_a_transformer_as_well_as_float32():
  """Real text, three seeds: the held-out loss at the end, seed by seed."""
  import train

  curves = train.run(steps=400, seeds=3)
  last = {name: np.array(each)[:, -1] for name, each in curves.items()}
  assert (last["optax.adamw"] < 2.2).all()  # it did learn: a uniform guess is 5.5
  np.testing.assert_allclose(last["adamw, 8 bits"], last["optax.adamw"], rtol=0.005)
  np.testing.assert_allclose(last["adamw, 4 bits"], last["optax.adamw"], rtol=0.02)
