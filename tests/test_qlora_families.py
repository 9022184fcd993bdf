"""The script with models of the new families: it trains, goes on, merges, and says something."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optax_lowmem import nn
from optax_lowmem.qlora.commands.chat import Speaker
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.loading.llama import load_llama
from optax_lowmem.qlora.models.llama_config import expected_shapes
from optax_lowmem.qlora.run.finished import of_run
from optax_lowmem.qlora.run.recipe import trained_model
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from qlora_cases import adapter, arguments, main, records, save_model, save_rows

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
CASES = {
  "gemma": {"head_dim": 16},
  "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9},
  "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 9},
  "phi3": {"sliding_window": 9},
  "smollm3": {},
  "olmo2": {},
  "granite": {"embedding_multiplier": 4.0, "attention_multiplier": 0.1, "logits_scaling": 2.0},
}


def save_family(folder, kind):
  """A Hugging Face directory with random weights, and `rows.json` beside it."""
  save_model(folder / "model")
  vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
  config = SMALL | CASES[kind] | {"model_type": kind, "vocab_size": vocabulary}
  (folder / "model" / "config.json").write_text(json.dumps(config))
  rng, weights = np.random.default_rng(0), {}
  for name, shape in expected_shapes(config_from_hf(config)).items():
    norm = np.zeros if kind.startswith("gemma") else np.ones
    value = norm(shape) if len(shape) == 1 else rng.normal(size=shape) / shape[-1] ** 0.5
    weights[name] = value.astype(np.float32)
  save_file(weights, folder / "model" / "model.safetensors")
  save_rows(folder / "rows.json")


# Each compiles programs of its own: the other families are run with `-m slow`.
@pytest.mark.parametrize(
  "kind",
  [k if k == "phi3" else pytest.param(k, marks=pytest.mark.slow) for k in CASES],
)
def test_the_script_trains_and_merges(tmp_path, kind, capsys):
  save_family(tmp_path, kind)
  options = "--packing --seq-len 64 --lr 1e-2 --steps 4 --stop-after 2 --adapter-dtype bfloat16"
  run = tmp_path / "run"
  assert main(arguments(tmp_path, run, *options.split())) == 0
  assert main(["--resume", str(run)]) == 0
  losses = [r["held_out_loss"] for r in records(run) if "held_out_loss" in r]
  assert losses[-1] < losses[0] - 0.05
  targets = {name.split(".")[-3] for name in adapter(run)}
  fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
  plain = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
  assert targets == (fused if kind == "phi3" else plain)

  s, path, folder = of_run(run)
  model, tokenizer = trained_model(path, s, folder), ChatTokenizer.from_model(path)
  speaker = Speaker(model, tokenizer.stop_ids, 8, temperature=0.0)
  prompt = tokenizer.encode_prompt([{"role": "user", "content": "say 7"}])
  ids = np.array([[*prompt, *speaker(prompt)]])
  logits = np.asarray(model(ids))
  said = ids[0, len(prompt) :]
  assert len(said) and (logits[0, len(prompt) - 1 : -1].argmax(-1) == said).all()

  argv = ["merge", str(run), "--out", str(tmp_path / "merged"), "--dtype", "float32"]
  assert main(argv) == 0
  want = jax.jit(lambda ids: nn.load_peft(load_llama(path), folder)(ids))(ids)
  got = load_llama(tmp_path / "merged")(jnp.asarray(ids))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
  stored = load_file(tmp_path / "merged" / "model.safetensors")
  assert {k: v.shape for k, v in stored.items()} == expected_shapes(model.config)
  assert main(["export", str(run), "--out", str(tmp_path / "adapter.gguf")]) == 0
