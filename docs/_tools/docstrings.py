"""Docstrings as Markdown: theirs is that of Sphinx, as optax's is."""

import re

import griffe
from latex2mathml.converter import convert

MATH = re.compile(r"^( *)\.\. math::(.*\n(?:\1 +\S.*\n?)*)", re.M)
INLINE = re.compile(r":math:`([^`]+)`", re.S)
LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>\s]+)>`_+", re.S)
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([^`]+)`")
# At the margin; within a section `Examples` mkdocstrings knows them.
EXAMPLE = re.compile(r"^>>> .*\n(?:.*\S.*\n?)*", re.M)


def block(found: re.Match) -> str:
  """A formula of its own lines, as MathML: no script, and nothing is fetched."""
  latex = " ".join(found[2].split())
  if "&" in latex or r"\\" in latex:
    latex = rf"\begin{{align*}}{latex}\end{{align*}}"
  return f"{found[1]}<p>{convert(latex, display='block')}</p>\n\n"


def to_markdown(text: str) -> str:
  """A docstring with MathML for formulas, and with links and names as Markdown has them."""
  text = MATH.sub(block, text + "\n")
  text = INLINE.sub(lambda m: f"<span>{convert(' '.join(m[1].split()))}</span>", text)
  text = LINK.sub(lambda m: f"[{' '.join(m[1].split())}]({m[2]})", text)
  text = EXAMPLE.sub(lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", text)
  return ROLE.sub(r"`\1`", text)


class Docstrings(griffe.Extension):
  """Converts each docstring as it is read."""

  def on_object(self, *, obj, **kwargs):  # noqa: D102
    if obj.docstring:
      obj.docstring.value = to_markdown(obj.docstring.value)
