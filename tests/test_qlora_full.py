"""All parameters trained: `lowmem finetune --full`, from its step to the model that it leaves."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import optax_lowmem as lowmem
from optax_lowmem.qlora.data import batches, dataset
from optax_lowmem.qlora.files import disk
from optax_lowmem.qlora.kinds import kind_of
from optax_lowmem.qlora.loading.llama import Llama, load_llama
from optax_lowmem.qlora.loading.weights import open_checkpoint
from optax_lowmem.qlora.models.llama_config import LlamaConfig
from optax_lowmem.qlora.models.neftune import with_noise
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.planning.model_source import config_of
from optax_lowmem.qlora.planning.steps import step_of
from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.run.finished import of_run, of_run_or_model
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.training.step import compiled, ordinary, split
from optax_lowmem.qlora.training.within_backward import within_backward
from qlora_cases import arguments, main, records, same
from test_qlora_families import save_family

FULL = "--full --dtype bfloat16 --lr 1e-2 --warmup 0 --steps 4 --max-grad-norm 0".split()


@pytest.fixture(scope="module")
def run(files):
  """A run of bfloat16 weights with 16-bit masters and 8-bit AdamW, stopped and resumed."""
  out = files / "run"
  assert main(arguments(files, out, *FULL, "--eval-every", "2", "--stop-after", "1")) == 0
  assert main(["--resume", str(out)]) == 0
  return out


def weights(folder):
  return load_file(folder / "model.safetensors")


class TestRun:
  def test_the_loss_falls(self, run):
    losses = [r["held_out_loss"] for r in records(run) if "held_out_loss" in r]
    assert len(losses) == 3 and losses[-1] < 0.7 * losses[0]

  def test_what_it_leaves_is_the_model_that_was_measured(self, run, files):
    """In bfloat16, as it was trained; norms in float32, in which they were."""
    saved, last = weights(run / "model"), weights(run / "last")
    assert same(saved, last) and saved.keys() == weights(files / "model").keys()
    assert all(x.dtype == (jnp.float32 if x.ndim == 1 else jnp.bfloat16) for x in saved.values())
    model = load_llama(run / "model", dtype=jnp.bfloat16)
    tokenizer = ChatTokenizer.from_model(run / "model")
    s, base, _ = of_run(run)
    assert base == run / "last" and s.full and s.masters == "16"
    rows = dataset.load(files / "rows.json", tokenizer, 32).split()[1]
    batch = batches.pad(rows, 3, 32, tokenizer.pad_id)
    each = optax.softmax_cross_entropy_with_integer_labels(
      model(jnp.asarray(batch.inputs)).astype(jnp.float32), batch.targets
    )
    loss = float(each[batch.learned].mean())
    assert loss == pytest.approx(records(run)[-1]["held_out_loss"], rel=2e-3)

  def test_state_has_no_second_copy_of_the_weights(self, run):
    state = load_file(run / "last" / "state.safetensors")
    assert not any(name.startswith(".trained") for name in state)
    linears = sum(x.size for x in weights(run / "last").values() if x.ndim > 1)
    held = sum(x.nbytes for x in state.values())
    assert 4 * linears < held < 4.7 * linears  # remainders, 8-bit moments; small layers' in 32

  def test_its_folder_is_a_model_of_hugging_face(self, run):
    config = json.loads((run / "model/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == "llama"
    assert open_checkpoint(run / "model").config == open_checkpoint(run / "best").config
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    ids = np.arange(24).reshape(2, 12) * 7 % 270
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    with torch.no_grad():
      logits = theirs(torch.tensor(ids)).logits.numpy()
    want = load_llama(run / "model")(jnp.asarray(ids))
    np.testing.assert_allclose(logits, want, atol=1e-4 * float(abs(want).max()))

  def test_chat_takes_the_run_and_its_folders(self, run, monkeypatch, capsys):
    answers = []
    for folder, path in ((run, run / "last"), (run / "model", run / "model")):
      s, base, saved = of_run_or_model(folder)
      assert base == saved == path and s.full
      monkeypatch.setattr(sys, "stdin", io.StringIO("say 7\n"))
      assert main(["chat", str(folder), *"--temperature 0 --max-tokens 8".split()]) == 0
      answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()

  @pytest.mark.parametrize(
    ("folder", "flags", "message"),
    [
      (".", "--model {files}/model", "is the base of adapters, and {run} has trained all"),
      ("model", "--model {files}/model", "is the base of adapters, and {run}/model is a model"),
      ("model", "--best", "--best is of a run's folder, and {run}/model is a model"),
    ],
  )
  def test_chat_refuses_what_it_would_ignore(self, run, files, folder, flags, message, capsys):
    with pytest.raises(SystemExit):
      main(["chat", str(run / folder), *flags.format(files=files).split()])
    assert message.format(run=run) in capsys.readouterr().err

  @pytest.mark.parametrize("command", ["merge", "export"])
  def test_there_is_no_adapter(self, run, command, tmp_path, capsys):
    with pytest.raises(SystemExit):
      main([command, str(run), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert f"there is no adapter to {command}" in said and f"model is {run / 'model'}" in said

  def test_its_config_can_be_used_again(self, run):
    s = parse("", ["--config", str(run / "config.yaml")])
    assert s.full and s.lr == 1e-2 and "rank" not in (run / "config.yaml").read_text()

  def test_resumed_it_is_bit_for_bit_the_same(self, run, files, tmp_path):
    whole = tmp_path / "whole"
    assert main(arguments(files, whole, *FULL, "--eval-every", "2")) == 0
    for name in ("model/model", "last/model", "last/state", "best/model"):
      first, second = (load_file(out / f"{name}.safetensors") for out in (whole, run))
      assert same(first, second), name

  def test_a_model_that_a_run_has_left_is_trained_further(self, run, files, tmp_path):
    options = "--full --masters stochastic --dtype bfloat16 --steps 2 --neftune-alpha 5"
    options += " --optim paged_adamw_8bit"  # so that pages are saved, too
    argv = [*arguments(files, tmp_path / "out", *options.split()), "--model", str(run / "model")]
    assert (
      main([*argv, "--stop-after", "1"]) == 0 and main(["--resume", str(tmp_path / "out")]) == 0
    )
    of_run(tmp_path / "out")  # checksums too
    before, after = weights(run / "model"), weights(tmp_path / "out/model")
    assert before.keys() == after.keys() and not same(before, after)

  def test_without_the_update_in_the_backward_pass_it_accumulates(self, files, tmp_path):
    """Twice two rows are four, in float32."""
    plain = "--full --dtype float32 --optim sgd --lr 1e-1 --steps 2 --no-update-in-backward".split()
    parts = [*plain, *"--batch-size 2 --grad-accum 2 --eval-batches 2".split()]
    found = []
    for name, options in (("whole", plain), ("parts", parts)):
      assert main(arguments(files, tmp_path / name, *options)) == 0
      found.append(weights(tmp_path / name / "model"))
    for name, value in found[0].items():
      np.testing.assert_allclose(value, found[1][name], atol=2e-6, err_msg=name)

  @pytest.mark.parametrize("kind", ["gemma2", "phi3"])
  def test_families(self, kind, tmp_path):
    """Windows, fused and capped layers, norms of other names; masters of 8 bits."""
    save_family(tmp_path, kind)
    options = [*FULL, "--masters", "8", "--packing", "--seq-len", "64"]
    assert main(arguments(tmp_path, tmp_path / "run", *options)) == 0
    losses = [r["held_out_loss"] for r in records(tmp_path / "run") if "held_out_loss" in r]
    assert losses[-1] < losses[0]
    saved = open_checkpoint(tmp_path / "run/model")  # every name and shape
    assert saved.model_type == kind


def tiny(tied=True, dtype="float32", **options):
  config = LlamaConfig(96, 32, 48, 3, 4, 2, 8, tie_word_embeddings=tied, **options)
  return Llama(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


def packed_batch():
  rng = np.random.default_rng(0)
  rows = [
    batches.Row(rng.integers(0, 90, n).astype(np.int32), np.arange(n) > n // 3)
    for n in (20, 9, 14, 30, 11)
  ]
  batch = batches.pack([[rows[0], rows[1]], [rows[2], rows[4]], [rows[3]]], 3, 40, 0)
  return jax.tree.map(lambda x: x[None], batch)


def stepped(method, model, state, frozen, batch, steps=3):
  state = state._replace(opt_state=method.init(state.trained))
  run, seen = jax.jit(method.step), []
  for _ in range(steps):
    state, measured = run(state, frozen, batch)
    seen.append(measured)
  return state, seen


class TestStep:
  @pytest.mark.parametrize("tied", [True, False])
  @pytest.mark.parametrize("noise", [0.0, 5.0])
  def test_in_the_backward_pass_it_is_the_ordinary_step(self, tied, noise):
    """Of packed rows, with windows in one layer, and clipped."""
    model, batch = tiny(tied, windows=(None, 7, None)), packed_batch()
    if noise:
      model = with_noise(model, noise, nnx.Rngs(noise=1))
    tx, clip = optax.adamw(1e-2), 0.5
    graph, state, frozen = split(model, lambda trained: None, nnx.Param)
    usual = optax.chain(optax.clip_by_global_norm(clip), tx)
    plain = ordinary(graph, usual)
    backward = within_backward(graph, tx, clip_norm=clip)
    (a, first), (b, second) = (
      stepped(method, model, state, frozen, batch) for method in (plain, backward)
    )
    for one, other in zip(first, second, strict=True):
      assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
      assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-3)
    assert float(second[0]["grad_norm"]) > clip  # of what is clipped, the norm before
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(a.trained), jax.tree.leaves(b.trained), strict=True
    ):
      name = jax.tree_util.keystr(path)
      np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4, err_msg=name)
    if noise:
      counters = zip(*(jax.tree.leaves(s.rngs) for s in (a, b)), strict=True)
      assert all((x == y).all() for x, y in counters)

  def test_the_norm_is_that_of_all_gradients(self):
    model, batch = tiny(), packed_batch()
    graph, state, frozen = split(model, lambda trained: None, nnx.Param)
    tx = optax.sgd(1e-3)
    (_, (want,)), (_, (got,)) = (
      stepped(method, model, state, frozen, batch, 1)
      for method in (ordinary(graph, tx), within_backward(graph, tx))
    )
    assert float(got["grad_norm"]) == pytest.approx(float(want["grad_norm"]), rel=1e-5)

  def test_many_parts_add_up_in_bfloat16(self):
    """The same rows 400 times have the gradient of once, where a plain sum would stand still."""
    config = LlamaConfig(32, 8, 8, 1, 1, 1, 8, tie_word_embeddings=True)
    model = Llama(config, dtype=jnp.dtype("bfloat16"), rngs=nnx.Rngs(0))
    graph, state, frozen = split(model, lambda trained: None, nnx.Param)
    ids = np.arange(8, dtype=np.int32).reshape(1, 1, 8)
    part = batches.Batch(ids, ids + 1, ids >= 0, np.full((1, 1), 8, np.int32))
    parts = jax.tree.map(lambda x: np.repeat(x, 400, 0), part)
    (_, (once,)), (_, (many,)) = (
      stepped(ordinary(graph, optax.sgd(1e-3)), None, state, frozen, batch, 1)
      for batch in (part, parts)
    )
    assert float(many["loss"]) == pytest.approx(float(once["loss"]), rel=1e-3)
    assert float(many["grad_norm"]) == pytest.approx(float(once["grad_norm"]), rel=0.01)

  @pytest.mark.parametrize(
    "options", ["", "--optim paged_adamw_8bit", "--no-update-in-backward --masters 8"]
  )
  def test_a_plan_has_the_bytes_of_the_step(self, files, options):
    """Arguments and state are exact; the program is the run's own."""
    s = parse("", f"--full --dtype bfloat16 --seq-len 32 {options}".split())
    config, kind = open_checkpoint(files / "model").config, kind_of(s)
    step = Case("tiny", config, s).step()
    model = kind.load(files / "model", s)
    graph, state, frozen = split(model, lambda trained: None, kind.variables)
    method = kind.method(s, graph, kind.optimizer(s)[0])
    state = state._replace(opt_state=method.init(state.trained))
    ids = np.zeros((1, 4, 32), np.int32)
    batch = batches.Batch(ids, ids, ids > 0, np.zeros((1, 4), np.int32))
    real = compiled(method.step, state, frozen, batch).memory_analysis()
    there = step.state
    if "paged" in options:
      there = there._replace(opt_state=lowmem.paged(there.opt_state))
    asked = jax.jit(step.fn, donate_argnums=0).lower(there, step.frozen, step.batch)
    planned = asked.compile().memory_analysis()
    assert planned is not None
    assert planned.argument_size_in_bytes == real.argument_size_in_bytes
    assert planned.temp_size_in_bytes == real.temp_size_in_bytes
    plan = step.shapes()
    held = lowmem.state_bytes(state.opt_state)
    assert (plan.of("state"), plan.host_bytes) == (held["device"], held["pinned_host"])
    weights = sum(lowmem.state_bytes(state.trained).values())
    assert plan.of("weights") == weights
    if s.update_in_backward:  # one layer's, and what is no layer
      assert plan.of("gradients") < 0.8 * weights
    else:
      assert plan.of("gradients") == weights


REFUSED = {
  "--full --rank 8": "--rank is for adapters, and --full trains all parameters",
  "--full --rank 16": "--rank is for adapters",  # though it is the default
  "--full --quantize nf4": "--quantize is for adapters",
  "--full --dora": "--dora is for adapters",
  "--full --init loftq": "--init is for adapters",
  "--full --lora-plus-ratio 16": "--lora-plus-ratio is for adapters",
  "--full --modules-to-save lm_head": "--modules-to-save is for adapters",
  "--full --dropout 0.1": "--dropout is for adapters",
  "--masters 8": "--masters is for --full",
  "--no-update-in-backward": "--update-in-backward is for --full",
  "--full --grad-accum 2": "--grad-accum 2: with --full each layer is updated as soon as",
  "--full --dtype float32 --masters 16": "--masters 16 is for bfloat16 weights",
  "--full --masters none": "Add --dtype bfloat16, or leave it out",  # on a CPU
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_makes_no_sense_is_refused(line):
  with pytest.raises(ValueError) as error:
    parse("", line.split())
  assert REFUSED[line] in str(error.value)


def test_defaults():
  full, given, adapters = (
    parse("", ["--full"]),
    parse("", "--full --lr 1e-3".split()),
    parse("", []),
  )
  assert full.lr == 2e-5 and given.lr == adapters.lr == 1e-3
  assert parse("", "--full --grad-accum 2 --no-update-in-backward".split()).grad_accum == 2


def test_a_disk_without_room_is_a_sentence(files, tmp_path, monkeypatch, capsys):
  usage = disk.shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
  with pytest.raises(SystemExit):
    main(arguments(files, tmp_path / "out", *FULL))
  said = capsys.readouterr().err
  assert "GB will be written there" in said and "Free some space" in said
  assert not (tmp_path / "out").exists()


def test_a_lone_file_whose_configuration_cannot_be_written_is_refused_at_once(files):
  s = parse("", ["--full"])
  base = open_checkpoint(files / "model")
  odd = dataclasses.replace(base, config=dataclasses.replace(base.config, o_bias=True))
  with pytest.raises(ValueError, match=r"No config\.json is written"):
    kind_of(s).check(dataclasses.replace(s, model=str(files / "model.gguf")), odd)
  kind_of(s).check(dataclasses.replace(s, model=str(files / "model")), odd)


def test_sums_of_passes_are_made_where_jax_has_64_bits():
  """Noise takes the loss's 32 bits for a key, and counts positions of tiles in 32 bits."""
  config = dataclasses.replace(config_of("smollm2-135m"), num_hidden_layers=1)
  line = "--full --dtype bfloat16 --seq-len 16 --grad-accum 2 --no-update-in-backward"
  step = step_of(config, parse("", line.split()))
  args = step.state, step.frozen, step.batch
  narrow = jax.eval_shape(step.fn, *args)
  with jax.enable_x64(True):
    assert jax.eval_shape(step.fn, *args) == narrow
