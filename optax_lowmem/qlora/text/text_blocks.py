"""Long texts in blocks: a tokenizer needs 176 bytes for each character while it works."""

import re
from collections.abc import Iterator

BLOCK = 1 << 19  # characters that are encoded at once
_NEWLINES, _BLANK = re.compile(r"\n+(?=\S)"), re.compile(r"(?<=\S)(?=\s\S)")


def blocks(text: str, size: int) -> Iterator[str]:
  """Parts of a text, of `size` to ``2 * size`` characters, the last of at most `size`.

  Each but the last ends behind line breaks, where most tokenizers end a token anyway; where there
  are none, before a blank; where there is neither, anywhere.
  """
  start = 0
  while len(text) - start > size:
    first, last = start + size, start + 2 * size
    if found := _NEWLINES.search(text, first - 1, last) or _BLANK.search(text, first, last):
      first = found.end()
    yield text[start:first]
    start = first
  yield text[start:]
