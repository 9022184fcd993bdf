"""A tiny random model with a tokenizer, small runs of the script, and what they leave."""

import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from optax_lowmem.qlora import cli

SCRIPT = str(pathlib.Path(__file__).parents[1] / "examples" / "qlora" / "finetune.py")
main = functools.partial(cli.main, default="finetune")  # as the script calls it

LAYERS, WIDTH, INNER, HEADS, GROUPS = 2, 64, 128, 4, 2


def save_model(folder, tied=True):
  """A Hugging Face directory with random weights and a tokenizer of 300 tokens."""
  folder.mkdir()
  backend = Tokenizer(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  backend.train_from_iterator(["the cat sat on the mat and the dog ran"] * 9, trainer)
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
  vocabulary = backend.get_vocab_size()
  config = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": vocabulary,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": tied,
    "hidden_act": "silu",
  }
  (folder / "config.json").write_text(json.dumps(config))
  rng = np.random.default_rng(0)
  kv = WIDTH * GROUPS // HEADS
  shapes = {"model.embed_tokens": (vocabulary, WIDTH), "model.norm": (WIDTH,)}
  if not tied:
    shapes["lm_head"] = (vocabulary, WIDTH)
  for i in range(LAYERS):
    layer = {
      "input_layernorm": (WIDTH,),
      "post_attention_layernorm": (WIDTH,),
      "self_attn.q_proj": (WIDTH, WIDTH),
      "self_attn.k_proj": (kv, WIDTH),
      "self_attn.v_proj": (kv, WIDTH),
      "self_attn.o_proj": (WIDTH, WIDTH),
      "mlp.gate_proj": (INNER, WIDTH),
      "mlp.up_proj": (INNER, WIDTH),
      "mlp.down_proj": (WIDTH, INNER),
    }
    shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
  weights = {
    f"{name}.weight": np.ones(shape, np.float32)
    if len(shape) == 1
    else (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)
    for name, shape in shapes.items()
  }
  save_file(weights, str(folder / "model.safetensors"))
  return folder


def save_rows(path, count=60):
  rows = [{"instruction": f"say {i}", "output": f"the cat sat on {i}"} for i in range(count)]
  path.write_text(json.dumps(rows))
  return path


def arguments(files, out, *more):
  """A small run, which compiles no generation; what `more` gives comes last and so wins."""
  given = f"--model {files}/model --data {files}/rows.json --seq-len 32 --batch-size 4"
  given += f" --eval-batches 1 --samples 0 --steps 8 --out {out}"
  return [*given.split(), *more]


def adapter(folder):
  return load_file(folder / "adapter" / "adapter_model.safetensors")


def records(folder):
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
  return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
