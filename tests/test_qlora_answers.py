"""What is learned of a conversation: the answer and its end, whatever template and tokenizer."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from optax_lowmem.qlora.data.dataset import DataError, load
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer
from test_qlora_data import CHATML, chat, raw_decode, save_tokenizer

# As Qwen3 has it: thoughts, empty ones too, before the last answers, none before earlier ones.
THINKS = r"""
{%- if tools %}
  {{- '<|im_start|>system\n# Tools\n' }}
  {%- for tool in tools %}{{- tool | tojson(sort_keys=true) + '\n' }}{%- endfor %}
  {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{%- set ns.last = messages.index(m) %}{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set content = m.content %}
    {%- set thoughts = '' %}
    {%- if m.reasoning_content is string %}
      {%- set thoughts = m.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > ns.last %}
      {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
      {{- '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
  {%- else %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
WITHOUT_END = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
WITHOUT_END += "{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def thinks(tmp_path):
  save_tokenizer(tmp_path / "m", chat_template=THINKS)
  return ChatTokenizer.from_model(tmp_path / "m")


def learned(tokenizer, messages, **extras):
  ids, mask = tokenizer.encode_chat(messages, **extras)
  return raw_decode(tokenizer, np.array(ids)[mask])


def write(path, *rows):
  path.write_text("\n".join(map(json.dumps, rows)))
  return path


# Where the answer stands -------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["n", "hi", "in", "think", "yes", "<think", "assistant", "."])
def test_short_answers_are_not_found_in_what_the_template_writes(thinks, answer):
  assert learned(thinks, chat("the cat?", answer)) == f"{answer}<|im_end|>"
  text = learned(thinks, chat("the cat?", answer, "and?", answer))
  assert text == f"{answer}<|im_end|>" * 2


def test_yes_and_no_are_both_kept(thinks, tmp_path):
  rows = [{"messages": chat(f"{i}?", "yn"[i % 2])} for i in range(20)]
  data = load(write(tmp_path / "rows.jsonl", *rows), thinks, 64)
  assert len(data.rows) == 20 and data.notes == []


def test_thoughts_are_learned_where_they_are_written(thinks):
  thought = chat("the cat?", "<think>\nthe mat\n</think>\n\nsat")
  assert learned(thinks, thought) == "<think>\nthe mat\n</think>\n\nsat<|im_end|>"
  apart = [thought[0], {"role": "assistant", "content": "sat", "reasoning_content": "the mat"}]
  assert learned(thinks, apart) == "<think>\nthe mat\n</think>\n\nsat<|im_end|>"
  for first in (thought, apart):  # of earlier turns they are left out
    assert learned(thinks, [*first, *chat("and?", "ran")]) == "sat<|im_end|>ran<|im_end|>"


@pytest.mark.parametrize("strip", ["rstrip", "lstrip", "normalized", None])
@pytest.mark.parametrize("trim", [True, False])
def test_blanks_beside_control_tokens(tmp_path, strip, trim):
  """As Phi-3's <|end|>, which takes a line break along; and byte-level offsets without blanks."""
  template = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n ' }}{% endif %}"
  )
  backend = save_tokenizer(tmp_path / "m", chat_template=template)
  state = json.loads(backend.to_str())
  if strip:
    for token in state["added_tokens"]:
      token[strip] = True
  backend = Tokenizer.from_str(json.dumps(state))
  backend.post_processor = processors.ByteLevel(trim_offsets=trim)
  backend.save(str(tmp_path / "m" / "tokenizer.json"))
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  for answers in (["sat"], ["sat", "the dog ran"], ["a", "b", "cd"]):
    talk = [m for answer in answers for m in chat("the cat?", answer)]
    ids, mask = tokenizer.encode_chat(talk)
    tokens = [backend.id_to_token(i) for i in np.array(ids)[mask]]
    said = [m["content"] for m in talk if m["role"] == "assistant"]
    assert tokens.count("<|im_end|>") == len(answers)
    text = raw_decode(tokenizer, np.array(ids)[mask])
    ends = [part.strip() for part in text.split("<|im_end|>")]
    assert ends == [*(answer.strip() for answer in said), ""]
    assert not {"Ġ", "Ċ"} & {*tokens} or " " in "".join(answers)  # these are the prompt's
  assert tokenizer.end_of_answer == tokenizer.eos_id
  assert tokenizer.backend.post_processor is not None


def test_a_conversation_that_begins_with_the_assistant(thinks, tmp_path):
  talk = [{"role": "assistant", "content": "hi"}, *chat("the cat?", "sat")]
  assert learned(thinks, talk).replace("<think>\n\n</think>\n\n", "") == "hi<|im_end|>sat<|im_end|>"
  needy = "{% if messages[0].role == 'x' %}{% endif %}" + THINKS
  save_tokenizer(tmp_path / "n", chat_template=needy)
  assert learned(ChatTokenizer.from_model(tmp_path / "n"), talk) == "hi<|im_end|>sat<|im_end|>"


def test_a_template_that_ends_no_answer_is_said(tmp_path):
  save_tokenizer(tmp_path / "m", chat_template=WITHOUT_END)
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  assert tokenizer.end_of_answer is None
  data = load(write(tmp_path / "a.jsonl", *[{"messages": chat("cat", "sat")}] * 2), tokenizer, 64)
  assert len(data.notes) == 1 and "does not learn where to stop" in data.notes[0]
  assert load(write(tmp_path / "b.jsonl", *[{"text": "sat"}] * 2), tokenizer, 64).notes == []


def test_tokens_that_stand_for_something_else_are_refused(tmp_path, monkeypatch):
  save_tokenizer(tmp_path / "m")
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  monkeypatch.setattr(tokenizer, "_encoding", lambda text: tokenizer.backend.encode("xyz" + text))
  with pytest.raises(ValueError, match=r"tokens of message 2 stand for .*, its text is 'sat"):
    tokenizer.encode_chat(chat("the cat?", "sat"))


# What a message holds ----------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
CALLED = [
  {"role": "user", "content": "the cat?"},
  {"role": "assistant", "content": "", "tool_calls": [CALL]},
  {"role": "tool", "content": "on the mat"},
  {"role": "assistant", "content": "sat"},
]


def test_calls_of_tools_are_learned(thinks, tmp_path):
  tools = [{"name": "look", "args": {"b": 1, "a": 2}}]
  row = {"messages": CALLED, "tools": json.dumps(tools)}
  data = load(write(tmp_path / "a.jsonl", row, row | {"tools": tools}), thinks, 256)
  first, second = data.rows
  assert first.ids.tolist() == second.ids.tolist()
  assert '{"args": {"a": 2, "b": 1}, "name": "look"}' in raw_decode(thinks, first.ids)
  call = '<tool_call>\n{"name": "look", "arguments": {"at": "cat"}}\n</tool_call>'
  said = raw_decode(thinks, first.ids[first.learned]).replace("<think>\n\n</think>\n\n", "")
  assert said == f"{call}<|im_end|>sat<|im_end|>"
  without = [CALLED[0], {"role": "assistant", "tool_calls": [CALL]}, *CALLED[2:]]
  again = load(
    write(tmp_path / "b.jsonl", *[{"messages": without, "tools": tools}] * 2), thinks, 256
  )
  assert again.rows[0].ids.tolist() == first.ids.tolist()


@pytest.mark.parametrize(
  ("row", "what"),
  [
    ({"messages": CALLED}, "tool, tool_calls"),
    ({"messages": chat("a", "b"), "tools": [{}]}, "tools"),
    ({"messages": chat("a", "b"), "documents": [{}]}, "documents"),
    ({"messages": [*chat("a"), {**chat("", "b")[1], "reasoning_content": "x"}]}, "reasoning_conte"),
    ({"messages": [*chat("a"), {**chat("", "b")[1], "function_call": {"name": "x"}}]}, "function_"),
  ],
)
def test_what_a_template_does_not_write_is_refused(tmp_path, row, what):
  save_tokenizer(tmp_path / "m")
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  with pytest.raises(DataError, match=f"line 1: the chat template .* does not write {what}"):
    load(write(tmp_path / "a.jsonl", row, row), tokenizer, 64)


def test_other_fields_are_named_once(thinks, tmp_path):
  talk = [m | {"name": "Tom", "id": 3} for m in chat("the cat?", "sat")]
  data = load(write(tmp_path / "a.jsonl", *[{"messages": talk}] * 3), thinks, 64)
  assert data.notes == ["The chat template writes nothing of these fields of messages: id, name."]


def test_what_is_not_to_be_trained(thinks, tmp_path):
  talk = chat("the cat?", "sat", "and?", "ran")
  talk[1] |= {"train": False}
  talk[3] |= {"train": True}
  rows = load(write(tmp_path / "a.jsonl", *[{"messages": talk}] * 2), thinks, 64).rows
  assert raw_decode(thinks, rows[0].ids[rows[0].learned]).endswith("ran<|im_end|>")
  assert "sat" not in raw_decode(thinks, rows[0].ids[rows[0].learned])
  for bad, what in (({"train": "no"}, "'train' is 'no'"), ({"weight": 1}, "keep one of them")):
    row = {"messages": [talk[0], talk[1] | bad]}
    with pytest.raises(DataError, match=f"line 1, message 2: .*{what}"):
      load(write(tmp_path / "b.jsonl", row), thinks, 64)


@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_the_system_beside_the_messages(thinks, tmp_path, name):
  who, what, user = (
    ("role", "content", "user") if name == "messages" else ("from", "value", "human")
  )
  talk = [{who: user, what: "the cat?"}, {who: "assistant", what: "sat"}]
  if name == "conversations":
    talk[1][who] = "gpt"
  rows = load(
    write(tmp_path / "a.jsonl", *[{name: talk, "system": "be a dog"}] * 2), thinks, 64
  ).rows
  assert raw_decode(thinks, rows[0].ids).startswith("<|im_start|>system\nbe a dog<|im_end|>")
  assert raw_decode(thinks, rows[0].ids[rows[0].learned]) == "sat<|im_end|>"
  both = {name: [{who: "system", what: "x"}, *talk], "system": "be a dog"}
  with pytest.raises(DataError, match="line 1: 'system' and a first message of the system"):
    load(write(tmp_path / "b.jsonl", both), thinks, 64)


# Texts without a template ------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("end", ["", "</s>"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_text_with_its_own_beginning_and_end_has_them_once(tmp_path, begin, end, adds):
  backend = save_tokenizer(tmp_path / "m", ["<s>", "</s>"], eos="</s>", bos_token="<s>")
  if adds:
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "m" / "tokenizer.json"))
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  whole = ("<s>" if adds or begin else "") + "the cat sat</s>"
  for row in (
    {"text": f"{begin}the cat sat{end}"},
    {"prompt": begin + "the", "completion": f" cat sat{end}"},
  ):
    ids, mask = (rows := load(write(tmp_path / "a.jsonl", row, row), tokenizer, 64).rows)[0]
    assert raw_decode(tokenizer, ids) == whole and len(rows) == 2
    # A beginning that the tokenizer does not add is a part of the text.
    text = "the cat sat</s>" if adds else whole
    assert raw_decode(tokenizer, ids[mask]) == (" cat sat</s>" if "prompt" in row else text)
  (tmp_path / "a.txt").write_text(f"the cat sat {'on the mat ' * 40}{end}")
  rows = load(tmp_path / "a.txt", tokenizer, 32).rows
  assert raw_decode(tokenizer, rows[-1].ids).count("</s>") == 1


# The tokenizer's files ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["added_tokens_decoder", "additional_special_tokens", "extra"])
def test_special_tokens_that_only_the_configuration_names(tmp_path, where):
  backend = save_tokenizer(tmp_path / "m", [*CHATML, "<|tool|>"])
  state = json.loads(backend.to_str())
  number = backend.token_to_id("<|tool|>")
  state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != "<|tool|>"]
  (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(state))
  config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
  token = {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": False}
  config |= {
    "added_tokens_decoder": {"added_tokens_decoder": {str(number): token}},
    "additional_special_tokens": {"additional_special_tokens": [token]},
    "extra": {"extra_special_tokens": {"tool_token": "<|tool|>"}},
  }[where]
  (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  assert tokenizer.encode("a<|tool|>b")[1:-1] == [number]
  with pytest.raises(ValueError, match=r"contains the control token '<\|tool\|>'"):
    tokenizer.encode_chat(chat("a<|tool|>", "b"))


def test_a_special_token_with_another_number_is_refused(tmp_path):
  save_tokenizer(tmp_path / "m", added_tokens_decoder={"7": {"content": "<|im_end|>"}})
  with pytest.raises(ValueError, match=r"'<\|im_end\|>' the number 7.*tokenizer\.json 2"):
    ChatTokenizer.from_model(tmp_path / "m")


def test_what_templates_are_given(tmp_path):
  own = (
    "{{ tools is none }} {{ documents is none }} {{ pad_token }} {{ unk_token }} "
    "{{ {'b': 'é', 'a': [1]} | tojson(sort_keys=true, separators=(',', ':')) }} "
    "{{ {'b': 'é'} | tojson(ensure_ascii=true) }} {{ [1] | tojson(indent=1) }}"
  )
  named = {"pad_token": "<|endoftext|>", "unk_token": "<|im_start|>"}
  save_tokenizer(tmp_path / "m", chat_template=own, **named)
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  assert raw_decode(tokenizer, tokenizer.encode_prompt(chat("x"))) == (
    'True True <|endoftext|> <|im_start|> {"a":[1],"b":"é"} {"b": "\\u00e9"} [\n 1\n]'
  )


def test_added_tokens_keep_their_blanks(tmp_path):
  """`normalized` and `rstrip` come from the configuration, too."""
  backend = save_tokenizer(tmp_path / "m", [*CHATML, "<|tool|>"])
  state = json.loads(backend.to_str())
  state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != "<|tool|>"]
  (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(state))
  config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
  config["added_tokens_decoder"] = {
    str(backend.token_to_id("<|tool|>")): {"content": "<|tool|>", "rstrip": True, "special": True}
  }
  (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
  tokenizer = ChatTokenizer.from_model(tmp_path / "m")
  tokens = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("<|tool|> \na")]
  assert tokens == ["<|tool|>", "a"]
