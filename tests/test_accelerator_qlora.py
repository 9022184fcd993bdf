"""The QLoRA example's own training step, compiled for an H100: what it holds."""

import pytest

from accelerator_qlora import MODELS, training_step
from compiled import compile_for, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}")
GIB = 2**30
BF16 = {"adapter_dtype": "bfloat16"}


# Model, tokens of the one row, options, most GiB on the device. Rank 64 on all linear layers.
@pytest.mark.parametrize(
  ("model", "tokens", "options", "most"),
  [
    ("33B", 512, BF16, 20.5),
    ("65B", 512, BF16, 39),
    ("Llama-2-70B", 512, {}, 44),
    ("Llama-2-70B", 512, BF16, 41),
    ("7B", 4096, {}, 8),
    ("7B", 32768, BF16, 20),
  ],
)
def test_device_bytes(model, tokens, options, most):
  compiled = compile_for(*training_step(MODELS[model], tokens, **options))
  assert compiled.device_bytes <= most * GIB


def test_attention_grows_with_the_length():
  """Twice the tokens need at most some twice the temporaries; scores held whole would need four."""
  short, long = (compile_for(*training_step(MODELS["7B"], n)).temp_bytes for n in (4096, 8192))
  assert long <= 2.3 * short
