"""``lowmem chat RUN``: a conversation with what a run has trained."""

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from optax_lowmem.qlora.kinds import kind_of
from optax_lowmem.qlora.models.generation import padded, read
from optax_lowmem.qlora.run.finished import of_run_or_model, parser_of
from optax_lowmem.qlora.run.runs import began
from optax_lowmem.qlora.run.terminal import say, sentences
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from optax_lowmem.qlora.text.templates import Message


def talk(argv: Sequence[str]) -> int:
  """Reads questions, a line each, and writes the answers as they come."""
  parser = parser_of("chat", "Talk to what a run has trained, a line a question.")
  parser.add_argument("--system", help="a message to the model before the conversation")
  for flag, kind, default, what in (
    ("--temperature", float, 0.7, "0: the likeliest token"),
    ("--top-p", float, 1.0, "share of the likeliest tokens"),
    ("--max-tokens", int, 256, "length of an answer"),
    ("--seed", int, 0, "of what is drawn"),
  ):
    parser.add_argument(flag, type=kind, default=default, help=f"{what} (default: {default})")
  given = parser.parse_args(argv)
  with sentences():
    check(given)
    s, path, saved = of_run_or_model(given.run, best=given.best, model=given.model)
    day = began(given.run) if (given.run / "run.json").exists() else None
    tokenizer = ChatTokenizer.from_model(path, s.chat_template, day)
    model = kind_of(s).use(path, s, saved)
    model.eval()
  speaker = Speaker(model, tokenizer.stop_ids, given.max_tokens, given.temperature, given.top_p)
  first: list[Message] = [{"role": "system", "content": given.system}] if given.system else []
  messages = list(first)
  limit = model.config.max_position_embeddings
  if isinstance(sys.stdin, io.TextIOWrapper):
    with contextlib.suppress(io.UnsupportedOperation):  # something has been read already
      sys.stdin.reconfigure(errors="surrogateescape")  # a bad byte must not cost what follows it
  terminal = sys.stdin.isatty()
  if terminal:
    say("Ask something. /clear forgets the conversation; Ctrl-D ends it.")
  while line := _line("> " if terminal else ""):
    question = line.strip()
    if question == "/clear":
      messages = list(first)
    if question in ("", "/clear"):
      continue
    if bad := unreadable("The question", question, sys.stdin.encoding):
      say(f"({bad}; of a file, `iconv -f LATIN1 -t UTF-8` makes one.)")
      continue
    messages.append({"role": "user", "content": question})
    try:
      prompt = tokenizer.encode_prompt(messages)
    except ValueError as error:
      say(f"({error})")
      messages.pop()
      continue
    if len(prompt) + given.max_tokens > limit:
      say(f"(The conversation has outgrown the model's {limit} tokens. /clear begins anew.)")
      messages.pop()
      continue
    said, written = [], ""
    for token in speaker(prompt, given.seed + len(messages)):
      said.append(token)
      text = tokenizer.decode(said)
      if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
        print(text[len(written) :], end="", flush=True)
        written = text
    print(tokenizer.decode(said)[len(written) :], flush=True)
    messages.append({"role": "assistant", "content": tokenizer.decode(said)})
  return 0


def check(given: argparse.Namespace) -> None:
  """Raises ValueError for what no answer can be drawn with."""
  if given.max_tokens < 1:
    raise ValueError(f"--max-tokens must be at least 1, got {given.max_tokens}.")
  if not 0 <= given.temperature < float("inf"):
    raise ValueError(f"--temperature must be 0 or a positive number, got {given.temperature}.")
  if not 0 < given.top_p <= 1:
    raise ValueError(f"--top-p must be above 0 and at most 1, got {given.top_p}.")
  if bad := unreadable("--system", given.system or "", sys.getfilesystemencoding()):
    raise ValueError(f"{bad}.")


def unreadable(what: str, text: str, encoding: str | None) -> str:
  """What to say of a text with bytes that are no characters, which no tokenizer takes; or "".

  Args:
    what: what the text is.
    text: of which Python holds such bytes as halves of characters.
    encoding: in which it was read.
  """
  if not re.search("[\ud800-\udfff]", text):
    return ""
  bad = text if len(text) <= 100 else re.sub("[^\ud800-\udfff]+", "...", text)[:100]
  name = (encoding or "UTF-8").upper()
  return f"{what} {bad!a} holds bytes that are not {name}. Write it in that encoding"


class Speaker:
  """Gives the tokens of an answer one by one, each at the cost of one token.

  A prompt is padded to a power of two, so that a conversation that grows needs few programs.
  """

  def __init__(
    self,
    model: Any,
    stop_ids: Sequence[int],
    max_tokens: int,
    temperature: float = 0.7,
    top_p: float = 1.0,
  ):
    graph, self.variables = nnx.split(model)
    self.stop_ids, self.max_tokens = set(stop_ids), max_tokens
    self.draw = jnp.float32(temperature), jnp.float32(top_p)

    def token(variables: Any, cache: Any, ids: jax.Array, length: jax.Array, *draw: Any) -> Any:
      model = nnx.merge(graph, variables, copy=True)
      if cache is None:
        cache = model.init_cache(1, ids.shape[1] + max_tokens)
      return read(model, ids, cache, length, *draw)

    self.first = jax.jit(token)
    self.next = jax.jit(token, donate_argnums=1)

  def __call__(self, prompt: Sequence[int], seed: int = 0) -> Iterator[int]:
    (ids, length), one = padded([prompt]), np.ones(1, np.int32)
    key, now = jax.random.split(jax.random.key(seed))
    token, cache = self.first(self.variables, None, ids, length, now, *self.draw)
    for _ in range(self.max_tokens):
      if (said := token.item()) in self.stop_ids:
        return
      yield said
      key, now = jax.random.split(key)
      new = np.array([[said]], np.int32)
      token, cache = self.next(self.variables, cache, new, one, now, *self.draw)


def _line(prompt: str) -> str:
  """A line with its line break; "" at the end of the input."""
  if prompt:
    print(prompt, end="", flush=True)
  return sys.stdin.readline()
