"""Which tokens an answer is, of those of a whole conversation."""

from collections.abc import Callable, Iterator, Sequence

from tokenizers import Encoding

from optax_lowmem.qlora.text.answers import Span, squeezed

Ids = Sequence[int]


def tokens_of(
  span: Span,
  encoding: Encoding,
  text: str,
  encode: Callable[[str], Ids],
  decode: Callable[[Ids], str],
) -> list[int]:
  """The numbers of an answer's tokens, from its first blank or letter to its end token.

  Args:
    span: the answer.
    encoding: the tokens of `text`, and where they stand in it.
    text: the conversation.
    encode: text to ids.
    decode: ids to text, control tokens included.

  Raises:
    ValueError: if these tokens do not stand for the answer and its end, and for nothing else.
  """
  inside = list(_within(encoding, text, span))
  ids, offsets = encoding.ids, encoding.offsets  # each access makes the whole list
  places = [offsets[k] for k in inside]
  first = min((start for start, _ in places), default=span.stop)
  last = max((stop for _, stop in places), default=span.start)
  missed = text[span.start : max(span.start, first)] + text[last : span.stop]
  said, meant = squeezed(decode([ids[k] for k in inside])), text[first:last]
  # A tokenizer may write text otherwise (lower case, NFKC): then as it writes that of the answer.
  if missed.strip() or (said != squeezed(meant) and said != squeezed(decode(encode(meant)))):
    raise ValueError(
      f"the tokens of message {span.number + 1} stand for {said[:60]!r}, its text is "
      f"{text[span.start : span.stop][:60]!r}, so what is to be learned cannot be told; the "
      "tokenizer does not keep where its tokens stand"
    )
  return inside


def _within(encoding: Encoding, text: str, span: Span) -> Iterator[int]:
  """One that ends an answer may take blanks behind it along, as `rstrip` has it."""
  for k, (first, last) in enumerate(encoding.offsets):
    begins = span.start <= first < span.stop or first < span.start < last
    if begins and not text[span.stop : last].strip():
      yield k
