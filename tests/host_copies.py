"""What a compiled program copies to and from host memory, read from its text."""

import re


def loops(text):
  """The bodies of loops that copy to and from host memory: what is begun and ended, in order."""
  for body in re.split(r"\n(?=%|ENTRY)", text):
    lines = re.findall(
      r"%([\w.\-]+) = [^\n]*? (fusion-start|fusion-done|fusion|custom-call)\(", body
    )
    if not body.startswith("ENTRY") and any("dynamic-update-slice-start" in n for n, _ in lines):
      yield lines


def overlaps(lines):
  """Whether copies both ways are under way at once, and beside computation; all are ended."""
  fetching, storing, together, beside = 0, 0, False, False
  for op, kind in lines:
    step = {"fusion-start": 1, "fusion-done": -1}.get(kind, 0)
    fetching += step * op.startswith("dynamic-slice")
    storing += step * op.startswith("dynamic-update-slice")
    together |= fetching > 0 and storing > 0
    beside |= not step and fetching + storing > 0
  return together and beside and fetching == storing == 0
