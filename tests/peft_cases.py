"""Adapters that PEFT made, and such as it makes on the spot, on a small Llama."""

import pathlib
import warnings

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "peft"
BASE = GOLDEN / "base"
IDS = np.load(GOLDEN / "input_ids.npy")
ADAPTERS = (
    "lora", "rslora", "dora", "lora_pattern", "lora_embed_head", "lora_modules_to_save", "minimal",
)  # fmt: skip

BIASED, TIED = {"attention_bias": True}, {"tie_word_embeddings": True}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
  "rank 16, alpha 8": {"r": 16, "lora_alpha": 8, "target_modules": ALL},
  "all-linear": {"target_modules": "all-linear"},
  "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True, "target_modules": ALL},
  "DoRA, patterns": {
    "use_dora": True,
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {"layers.1.mlp.up_proj": 3},
    "alpha_pattern": {"q_proj": 5},
  },
  "DoRA on the embedding": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
  "patterns, rsLoRA": {
    "use_rslora": True,
    "target_modules": ALL,
    "rank_pattern": {"^model.layers.0.*proj": 2, "down_proj": 6},
    "alpha_pattern": {r"layers\.1\.self_attn\.(q|k)_proj": 3},
  },
  "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
  "some layers, DoRA": {"use_dora": True, "target_modules": ALL, "layers_to_transform": 0},
  "excluded": {"target_modules": ALL, "exclude_modules": r".*layers\.0\.mlp.*"},
  "biases": {"target_modules": ["q_proj"], "bias": "lora_only", "_base": BIASED},
  "all biases": {"target_modules": ["q_proj", "o_proj"], "bias": "all", "_base": BIASED},
  "all biases, a module whole": {
    "target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["o_proj"], "_base": BIASED,
  },
  "bias, nothing to train": {"target_modules": ALL, "bias": "all"},
  "a bias of its own": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True, "_base": BIASED},
  "norms": {"target_modules": ["v_proj"], "modules_to_save": ["norm", "input_layernorm"]},
  "embedding, head": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
  "head": {"target_modules": [*ALL, "lm_head"]},
  "embedding, tied": {
    "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    "_base": TIED,
  },
}  # fmt: skip


def torch_base(**changes):
  import torch
  import transformers

  torch.set_num_threads(1)
  torch.manual_seed(0)
  if not changes:
    return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
  config = transformers.AutoConfig.from_pretrained(BASE)
  config.update(changes)
  model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
  for name, p in model.named_parameters():
    if name.endswith("bias"):
      torch.nn.init.normal_(p, std=0.1)
  return model


def logits(model, ids=IDS):
  import torch

  with torch.no_grad(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return model(input_ids=torch.tensor(ids).long()).logits.numpy()


def randomized(peft, base, kind):
  """An adapter of PEFT in which everything that is trained is random."""
  import torch

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    config = {"r": 4, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | kind
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
  torch.manual_seed(1)
  with torch.no_grad():
    for p in model.parameters():
      if p.requires_grad:
        p.add_(torch.randn(p.shape) * 0.1)
  return model
