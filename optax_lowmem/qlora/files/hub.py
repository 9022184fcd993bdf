"""A model by its name on the Hugging Face hub."""

import re
from pathlib import Path

# What a model consists of here: weights in safetensors, and the texts beside them.
FILES = ["*.json", "*.safetensors", "*.jinja", "LICENSE*", "README*"]
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_name(model: str) -> bool:
  """Whether this is no path here, and may be a name there."""
  return not Path(model).exists() and _NAME.fullmatch(model) is not None


def check_model(model: str) -> None:
  """Raises FileNotFoundError for what is neither on this machine nor to be had."""
  if Path(model).exists():
    return
  if not is_name(model):
    raise FileNotFoundError(f"--model {model}: there is no such file or directory.")
  try:
    import huggingface_hub as huggingface_hub
  except ImportError as error:
    raise FileNotFoundError(
      f"--model {model}: there is no such file or directory. {how_to_get(model)} With "
      "`pip install huggingface_hub` it is fetched by its name."
    ) from error


def how_to_get(model: str) -> str:
  name = model.rpartition("/")[2]
  return (
    f"If it is a model of the Hugging Face hub, fetch its files, `hf download {model} "
    f"--local-dir {name}`, and give --model {name}."
  )


def fetched(model: str) -> Path:
  """The model's folder, fetched where it is a name of the hub and not here yet.

  Raises:
    OSError: where it cannot be fetched.
  """
  if not is_name(model):
    return Path(model)
  from huggingface_hub import snapshot_download

  try:
    return Path(snapshot_download(model, allow_patterns=FILES))
  except Exception as error:  # of the network, of the hub, of the name: it has a dozen kinds
    said = " ".join(str(error).split())[:200]
    raise OSError(
      f"--model {model}: there is no such file or directory, and it could not be fetched from the "
      f"Hugging Face hub ({said}). {how_to_get(model)}"
    ) from error
