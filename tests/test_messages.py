"""What users write first: each error names the argument, the value and what to write instead."""

# What is called here is called wrongly on purpose.
# pyright: reportArgumentType=false, reportCallIssue=false

import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import optax_lowmem as lowmem
from optax_lowmem import nn

PARAMS = {"w": jnp.ones((64, 96)), "b": jnp.ones(4)}


def init(tx):
  return tx.init(PARAMS)


def update(tx, gradients, params=PARAMS):
  return tx.update(gradients, init(tx), params)


def less(**changes):
  return {k: x for k, x in (PARAMS | changes).items() if x is not None}


ROW = jnp.ones((1, 96))
NO_FUNCTION = r"must be an optax transformation, got the function `{0}`\. Call it first: `{0}\(…\)`"
OTHER = r"gradient of \['w'\] has shape \(1, 96\), and the parameter \(64, 96\)"
MISSING = r"parameter \['b'\] of shape \(4,\) has no gradient"

# What is called, the exception, and its message.
CASES = {
  "quantized a function": (
    lambda: lowmem.quantized(optax.adam),
    TypeError,
    "`inner` " + NO_FUNCTION.format("adam"),
  ),
  "offloaded a function": (
    lambda: lowmem.offloaded(lowmem.adamw),
    TypeError,
    "`inner` " + NO_FUNCTION.format("adamw"),
  ),
  "offloaded a class": (lambda: lowmem.offloaded(optax.MultiSteps), TypeError, "got the function"),
  "explain a function": (
    lambda: lowmem.explain(lowmem.adamw, PARAMS),
    TypeError,
    "`tx` " + NO_FUNCTION.format("adamw"),
  ),
  "quantized a number": (
    lambda: lowmem.quantized(1e-3),
    TypeError,
    "`inner` must be an optax transformation, got float",
  ),
  "quantized twice": (
    lambda: init(lowmem.quantized(lowmem.adamw(1e-3))),
    ValueError,
    r"`inner` holds \[0\]\.mu\['w'\] quantized already\. Leave `quantized` out",
  ),
  "quantized twice, 32 bits": (
    lambda: init(lowmem.quantized(lowmem.came(1e-3), 32)),
    ValueError,
    "quantized already",
  ),
  "storage of no codebook": (
    lambda: lowmem.quantized(optax.adam(1e-3), storage={"mu": "log9"}),
    ValueError,
    "`codebook` 'log9' is unknown. Did you mean 'log8'",
  ),
  "storage of a dtype": (
    lambda: lowmem.quantized(optax.adam(1e-3), storage={"mu": jnp.bfloat16}),
    TypeError,
    r"`storage` of 'mu' must be a storage, got .*bfloat16.*`Dense\(jnp\.bfloat16\)`",
  ),
  "storage of a class": (
    lambda: lowmem.quantized(optax.adam(1e-3), storage={"mu": lowmem.Dense}),
    TypeError,
    "`storage` of 'mu' must be a storage",
  ),
  "storage is none": (
    lambda: lowmem.quantized(optax.adam(1e-3), storage="log8"),
    TypeError,
    "`storage` must map fields to storages, got 'log8'",
  ),
  "min_size": (
    lambda: lowmem.adamw(1e-3, min_size=None),
    ValueError,
    "`min_size` must be a number, got None. Pass 0",
  ),
  "min_size of a storage": (
    lambda: lowmem.Blockwise("log8", min_size=None),
    ValueError,
    "`min_size` must be a number, got None",
  ),
  "learning rate as text": (
    lambda: lowmem.adamw("1e-3"),
    TypeError,
    "`learning_rate` takes no text, got '1e-3'.*YAML reads 1e-3 as text",
  ),
  "learning rate None": (
    lambda: lowmem.came(None),
    TypeError,
    "`learning_rate` must be a number or a schedule, got None",
  ),
  "created with text": (
    lambda: lowmem.create("lamb", 1e-3, eps="1e-8"),
    TypeError,
    "`eps` takes no text, got '1e-8'",
  ),
  "gradients that would broadcast": (
    lambda: update(lowmem.adamw(1e-3), less(w=ROW)),
    ValueError,
    OTHER,
  ),
  "gradients that would broadcast, 32 bits": (
    lambda: update(lowmem.adamw(1e-3, bits=32), less(w=ROW)),
    ValueError,
    OTHER,
  ),
  "gradients that would broadcast, CAME": (
    lambda: update(lowmem.came(1e-3), less(w=ROW)),
    ValueError,
    OTHER,
  ),
  "gradients that would broadcast, within jit": (
    lambda: jax.jit(lambda g: update(lowmem.lion(1e-3), g))(less(w=ROW)),
    ValueError,
    OTHER,
  ),
  "gradients that would broadcast, offloaded": (
    lambda: update(lowmem.offloaded(optax.adam(1e-3)), less(w=ROW)),
    ValueError,
    OTHER,
  ),
  "gradients that are missing": (
    lambda: update(lowmem.adamw(1e-3), less(b=None)),
    ValueError,
    MISSING,
  ),
  "gradients that are missing, LAMB": (
    lambda: update(lowmem.lamb(1e-3), less(b=None)),
    ValueError,
    MISSING,
  ),
  "gradients that are missing, offloaded": (
    lambda: update(lowmem.offloaded(optax.adam(1e-3)), less(b=None)),
    ValueError,
    MISSING,
  ),
  "gradients of other parameters": (
    lambda: update(lowmem.adamw(1e-3), less(c=ROW)),
    ValueError,
    r"gradient \['c'\] has no parameter",
  ),
  "gradients, no parameters": (
    lambda: update(lowmem.adam(1e-3), less(w=ROW), None),
    ValueError,
    r"a moment of shape \(64, 96\) for which `updates` has no gradient",
  ),
  "where": (
    lambda: init(lowmem.offloaded(lowmem.adamw(1e-3), where="mv|nv")),
    ValueError,
    "`where` 'mv|nv' names no array of the state. Its paths: 0/mu/b, 0/mu/w/codes",
  ),
  "quantize_mask, a tree": (
    lambda: init(lowmem.adamw(1e-3, quantize_mask={"w": False, "b": False})),
    ValueError,
    "`quantize_mask` is False for every parameter.*`bits=32`",
  ),
  "quantize_mask, a function": (
    lambda: init(lowmem.came(1e-3, quantize_mask=lambda p: {k: k == "head" for k in p})),
    ValueError,
    "`quantize_mask` is False for every parameter",
  ),
  "quantize_mask as text": (
    lambda: lowmem.adamw(1e-3, quantize_mask="head"),
    TypeError,
    "`quantize_mask` takes no text, got 'head'",
  ),
  "state_bytes of a transformation": (
    lambda: lowmem.state_bytes(lowmem.adamw(1e-3)),
    TypeError,
    r"`tree` must hold arrays, got a Gradient.*`state_bytes\(tx\.init\(params\)\)`",
  ),
  "state_bytes of a function": (
    lambda: lowmem.state_bytes(lowmem.adamw),
    TypeError,
    "`tree` must hold arrays, got a function",
  ),
  "no size": (
    lambda: lowmem.offloaded(lowmem.adamw(1e-3), max_bytes="4 gigs"),
    ValueError,
    "`max_bytes` must be a number of bytes.*'4GB'.*got '4 gigs'",
  ),
  "an optimizer of optax's": (
    lambda: lowmem.create("muon", 1e-3),
    ValueError,
    r"'muon' is optax's own: pass `quantized\(optax\.contrib\.muon\(learning_rate\), 8\)`",
  ),
  "an optimizer of optax's, 4 bits, paged": (
    lambda: lowmem.create("PagedAdaBelief4bit", 1e-3),
    ValueError,
    r"pass `offloaded\(quantized\(optax\.adabelief\(learning_rate\), 4\)\)`",
  ),
  "schedule-free": (
    lambda: lowmem.create("schedule_free_adamw", 1e-3),
    ValueError,
    r"`quantized\(optax\.contrib\.schedule_free_adamw\(learning_rate\), 8\)`",
  ),
  "a name that is no text": (lambda: lowmem.create(None, 1e-3), ValueError, "name None is unknown"),
  "betas": (
    lambda: lowmem.adamw(1e-3, betas=(0.9, 0.99)),
    TypeError,
    r"adamw\(\) takes no argument 'betas'\. Say b1=, b2=\.",
  ),
  "three betas": (
    lambda: lowmem.came(1e-3, betas=(0.9, 0.99, 0.999)),
    TypeError,
    r"came\(\) takes no argument 'betas'\. Say b1=, b2=, b3=\.",
  ),
  "created with betas": (
    lambda: lowmem.create("lion", 1e-3, betas=(0.9, 0.99)),
    TypeError,
    r"lion\(\) takes no argument 'betas'\. Say b1=, b2=\.",
  ),
  "lr": (lambda: lowmem.lars(lr=1e-3), TypeError, r"lars\(\).*'lr'\. Say learning_rate=\."),
  "optim_bits": (lambda: lowmem.sgd(1e-3, optim_bits=8), TypeError, r"'optim_bits'\. Say bits=\."),
  "paging in bitsandbytes": (
    lambda: lowmem.adamw(1e-3, is_paged=True),
    TypeError,
    r"'is_paged'\. Wrap it: `offloaded\(…\)`",
  ),
  "clipping in bitsandbytes": (
    lambda: lowmem.adamw(1e-3, percentile_clipping=5),
    TypeError,
    r"'percentile_clipping'\. Clip before it: `optax\.chain",
  ),
  "PEFT's rank": (
    lambda: nn.add_lora(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), r=8, alpha=8, rngs=nnx.Rngs(0)),
    TypeError,
    r"add_lora\(\) takes no argument 'r'\. Say rank=\.",
  ),
  "bits of weights": (
    lambda: nn.quantize_model(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), bits=4),
    TypeError,
    r"'bits'\. Say codebook=\"nf4\", of 4 bits",
  ),
  "a typing error": (
    lambda: lowmem.adamw(1e-3, wieght_decay=0.1),
    TypeError,
    "'wieght_decay'. Did you mean 'weight_decay'?",
  ),
  "nothing like it": (
    lambda: lowmem.sgd(1e-3, qqq=1),
    TypeError,
    "'qqq'. It takes: learning_rate, momentum, nesterov",
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_message_says_what_to_do(case):
  call, exception, message = CASES[case]
  with pytest.raises(exception, match=message):
    call()


def test_a_codebook_stands_for_its_storage():
  storage = {"mu": "log8"}
  given = lowmem.quantized(optax.adam(1e-3), storage=storage, block_size=32, min_size=0)
  spelled = lowmem.quantized(optax.adam(1e-3), storage={"mu": lowmem.Blockwise("log8", 32, 0)})
  mu, same = optax.tree.get(init(given), "mu"), optax.tree.get(init(spelled), "mu")
  assert jax.tree.structure(mu) == jax.tree.structure(same)
  assert jax.tree.map(jnp.shape, mu) == jax.tree.map(jnp.shape, same)


@pytest.mark.parametrize("name", ["adamw", "came", "adafactor"])
def test_a_mask_may_leave_out_what_is_small(name):
  """As under `optax.partition`: biases that are in a group of their own."""
  tx = getattr(lowmem, name)(1e-3, quantize_mask=lambda p: {k: x.ndim > 1 for k, x in p.items()})
  tx.init({"b": jnp.ones(4)})
  getattr(lowmem, name)(1e-3, quantize_mask=False).init(PARAMS)


def test_sizes_are_read_in_one_way():
  nn = pytest.importorskip("optax_lowmem.nn")
  for size in ("4gb", "4 GB", "512mib", "4GiB", "1.5tb", 5):
    lowmem.offloaded(lowmem.adamw(1e-3), max_bytes=size, device_budget=size)
    with pytest.raises(Exception, match="model"):  # the size is right
      nn.save_merged(None, "nowhere", max_shard_size=size)


@pytest.mark.parametrize(
  ("name", "same"),
  [
    ("PagedAdamW8bit", "paged_adamw_8bit"),
    ("AdamW8bit", "adamw_8bit"),
    ("ADAMW-4BIT", "adamw_4bit"),
    ("PagedAdEMAMix32bit", "paged_ademamix_32bit"),
    ("pagedlion", "paged_lion"),
    ("RMSprop32bit", "rmsprop_32bit"),
    ("adamw_torch_xla", "adamw"),
    ("adamw_bnb_8bit", "adamw_8bit"),
    ("Lamb8bit", "lamb_8bit"),
  ],
)
def test_names_in_any_spelling(name, same):
  ours, theirs = (jax.eval_shape(lowmem.create(n, 1e-3).init, PARAMS) for n in (name, same))
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)


def test_without_flax():
  """The packages that need it say how to get it; the optimizers do without."""
  program = """
import sys
sys.modules["flax"] = None
import optax_lowmem
for name in ("nn", "linen"):
  try:
    __import__("optax_lowmem." + name)
  except ImportError as error:
    print(error)
"""
  out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert out.stdout.count("pip install 'optax_lowmem[flax]'") == 2, out.stdout
