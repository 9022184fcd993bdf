"""Plans by a card's own compiler: they say what the compiled step itself says."""

import json

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from accelerator_qlora import training_step
from compiled import compile_for, missing
from optax_lowmem._plan.cards import CARDS
from optax_lowmem.qlora import cli
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.run.settings import Settings
from registry import REGISTRY

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}")
CONFIG = LlamaConfig(1024, 256, 688, 4, 4, 2, 64)
SETTINGS = Settings(batch_size=1, seq_len=256, rank=16, targets="all-linear", dtype="bfloat16")
X = jax.ShapeDtypeStruct((256, 1024), jnp.float32)


def training(tx):
  """A step of a matrix, its gradient from a backward pass."""

  def step(params, state, x):
    grads = jax.grad(lambda params: jnp.mean(jnp.tanh(x @ params["w"]) ** 2))(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step, {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "came"])
def test_a_plan_is_what_the_examples_step_compiles_to(optim):
  """By the judge, which compiles in another way, from the example's own functions."""
  case = Case("tiny", CONFIG, SETTINGS).but(optim=optim)
  planned = case.plan("h100")
  fn, (state, *rest), donate = training_step(CONFIG, 256, rank=16, optim=optim)
  if optim.startswith("paged_"):
    state = state._replace(opt_state=lowmem.paged(state.opt_state))
  judged = compile_for(fn, (state, *rest), donate)
  assert planned.compiler == "h100" and planned.method == "compiled"
  assert planned.device_bytes == pytest.approx(judged.device_bytes, rel=0.01)
  assert planned.host_bytes == pytest.approx(judged.host_bytes, rel=0.01)
  assert planned.state_bytes == case.step().shapes().state_bytes


@pytest.mark.parametrize("name", ["adamw-8", "came-8"])
@pytest.mark.parametrize("paged", [False, True])
def test_a_step_of_ones_own(name, paged):
  tx = REGISTRY[name].ours(1e-3)
  tx = lowmem.offloaded(tx) if paged else tx
  step, params = training(tx)
  planned = lowmem.plan(params, tx, step=step, args=(X,), card="h100")
  state = jax.eval_shape(tx.init, params)
  judged = compile_for(step, (params, lowmem.paged(state) if paged else state, X), (0, 1))
  assert planned.device_bytes == pytest.approx(judged.device_bytes, rel=0.01)
  assert planned.host_bytes == pytest.approx(judged.host_bytes, rel=0.01)
  assert (planned.host_bytes > 0) == paged


NEWEST = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
# One of each compute capability.
KINDS = {card.capability: name for name, card in CARDS.items() if card.capability != (9, 0)}


# Which Pallas of jax 0.12 does not know by name.
UNKNOWN = {"l40s", "rtx-5090", "a10g"} if NEWEST else set()


@pytest.mark.parametrize("card", KINDS.values())
def test_every_kind_of_card_has_a_compiler(card):
  tx = lowmem.adamw(1e-3)
  step, params = training(tx)
  planned = lowmem.plan(params, tx, step=step, args=(X,), card=card)
  assert planned.compiler == card
  assert ("Without the kernel" in planned.note) == (card in UNKNOWN)
  assert planned.device_bytes > planned.of("weights") + planned.of("state") > 0


def test_the_update_alone_says_so():
  planned = lowmem.plan(training(optax.sgd(1e-3))[1], lowmem.adamw(1e-3), card="a100")
  assert "update alone" in planned.note and planned.compiler == "a100-80gb"


def test_on_a_mesh_each_card_is_planned(monkeypatch):
  """Each of eight cards holds a part of the base, as with `--fsdp`."""
  monkeypatch.setattr(jax, "device_count", lambda: 8)  # as in a process that has them
  # Of fewer than eight blocks along an axis, XLA's partitioner wants each on a device of its own.
  case = Case("tiny", LlamaConfig(1024, 1024, 2048, 8, 16, 8, 64), SETTINGS)
  spread = case.but(batch_size=8, fsdp=True, devices=8).plan("h100")
  alone = case.plan("h100")
  assert spread.devices == 8
  assert spread.of("weights") < alone.of("weights") / 4
  assert spread.of("adapters") == alone.of("adapters")


def test_pages_on_a_tpu_are_refused():
  tx = lowmem.offloaded(lowmem.adamw(1e-3))
  step, params = training(tx)
  with pytest.raises(ValueError, match="cannot be compiled for v5e"):
    lowmem.plan(params, tx, step=step, args=(X,), card="v5e")


@pytest.mark.skipif(missing("v5e") is not None, reason=f"not installed: {missing('v5e')}")
def test_for_a_tpu():
  tx = lowmem.adamw(1e-3)
  step, params = training(tx)
  planned = lowmem.plan(params, tx, step=step, args=(X,), card="v5e")
  assert planned.compiler == "v5e" and planned.device_bytes > planned.of("weights")


def test_the_largest_batch_is_one_that_was_compiled_and_fits(tmp_path, capsys):
  config = {
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
  }  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(config))
  line = f"plan {tmp_path}/config.json --card h100 --memory 700MiB --seq-len 256 --json"
  assert cli.main([*line.split(), "--max", "batch-size"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["method"] == "compiled" and found["fits"] and found["value"] >= 2
  assert cli.main([*line.split(), "--batch-size", str(int(found["value"] * 1.02) + 1)]) == 0
  assert not json.loads(capsys.readouterr().out)["fits"]
