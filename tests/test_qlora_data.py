"""The example's text side: tokenizers and templates, data files, batches, and what is fetched."""

import datetime
import hashlib
import json
import tracemalloc
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from optax_lowmem.qlora.data.batches import Batches, pad
from optax_lowmem.qlora.data.dataset import DataError, blocks, load
from optax_lowmem.qlora.files import fetch, locks
from optax_lowmem.qlora.text.chat_tokenizer import ChatTokenizer

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXT = ["the cat sat on the mat and the dog ran after 12 cats"] * 9


def save_tokenizer(folder, special=CHATML, eos="<|im_end|>", **config):
  backend = Tokenizer(models.BPE())
  digits = pre_tokenizers.Digits(individual_digits=True)
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  backend.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  backend.train_from_iterator(
    TEXT,
    trainers.BpeTrainer(
      vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    ),
  )
  folder.mkdir(exist_ok=True)
  backend.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, **config}))
  return backend


@pytest.fixture
def tokenizer(tmp_path):
  save_tokenizer(tmp_path / "model")
  return ChatTokenizer.from_model(tmp_path / "model")


def chat(*contents):
  roles = ["user", "assistant"] * len(contents)
  return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def raw_decode(tokenizer, ids):
  return tokenizer.backend.decode(list(ids), skip_special_tokens=False)


class TestChat:
  def test_chatml_and_what_is_learned(self, tokenizer):
    ids, learned = tokenizer.encode_chat(chat("the cat?", "the dög 😀 sat", "and?", "ran"))
    assert raw_decode(tokenizer, ids) == (
      "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\nthe dög 😀 sat<|im_end|>\n"
      "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nran<|im_end|>\n"
    )
    spoken = [i for i, yes in zip(ids, learned, strict=True) if yes]
    assert raw_decode(tokenizer, spoken) == "the dög 😀 sat<|im_end|>ran<|im_end|>"

  def test_prompt_ends_where_the_answer_starts(self, tokenizer):
    prompt = tokenizer.encode_prompt(chat("the cat?"))
    ids, learned = tokenizer.encode_chat(chat("the cat?", "sat"))
    assert prompt == ids[: learned.index(True)]

  def test_default_system_message_of_the_models_own_template(self, tmp_path):
    own = (
      "{% if messages[0].role != 'system' %}"
      "{{ '<|im_start|>system\nYou are Tom<|im_end|>\n' }}{% endif %}"
      "{% for m in messages %}"
      "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    save_tokenizer(tmp_path / "m", chat_template=own)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    text = raw_decode(tokenizer, tokenizer.encode_chat(chat("cat", "sat"))[0])
    assert text.startswith("<|im_start|>system\nYou are Tom<|im_end|>\n<|im_start|>user\ncat")
    system = [{"role": "system", "content": "be a dog"}]
    text = raw_decode(tokenizer, tokenizer.encode_chat(system + chat("cat", "sat"))[0])
    assert "Tom" not in text and text.startswith("<|im_start|>system\nbe a dog<|im_end|>")

  def test_llama_3_template(self, tmp_path):
    eos: Any = {"content": "<|eot_id|>"}
    save_tokenizer(tmp_path / "m", LLAMA3, eos=eos)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    ids, learned = tokenizer.encode_chat(chat("cat", " sat "))
    assert raw_decode(tokenizer, ids) == (
      "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\ncat<|eot_id|>"
      "<|start_header_id|>assistant<|end_header_id|>\n\nsat<|eot_id|>"
    )
    assert raw_decode(tokenizer, np.array(ids)[learned]) == "sat<|eot_id|>"

  def test_a_base_model_gets_the_plain_template(self, tmp_path):
    save_tokenizer(tmp_path / "m", ["</s>"], eos="</s>")
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    ids, _ = tokenizer.encode_chat(chat("cat", "sat"))
    assert raw_decode(tokenizer, ids) == "### User:\ncat</s>\n\n### Assistant:\nsat</s>\n\n"

  def test_llama_2_and_mistral_templates(self, tmp_path):
    talk = [{"role": "system", "content": "be brief"}, *chat("cat?", "sat", " and? ", "ran")]
    save_tokenizer(tmp_path / "a", ["<s>", "</s>"], eos="</s>", bos_token="<s>")
    tokenizer = ChatTokenizer.from_model(tmp_path / "a", "llama-2")
    ids, learned = tokenizer.encode_chat(talk)
    assert raw_decode(tokenizer, ids) == (
      "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\ncat? [/INST] sat </s>"
      "<s>[INST] and? [/INST] ran </s>"
    )
    assert raw_decode(tokenizer, np.array(ids)[learned]) == " sat </s> ran </s>"
    assert tokenizer.encode_prompt(talk[:2]) == ids[: learned.index(True)]
    assert tokenizer.stop_ids == (tokenizer.eos_id,)
    with pytest.raises(ValueError, match="must take turns"):
      tokenizer.encode_chat(chat("cat?", "sat")[::-1])
    with pytest.raises(ValueError, match=r"mistral needs the tokens \[INST\], \[/INST\]"):
      ChatTokenizer.from_model(tmp_path / "a", "mistral")

    special = ["<s>", "</s>", "[INST]", "[/INST]"]
    save_tokenizer(tmp_path / "b", special, eos="</s>", bos_token="<s>")
    tokenizer = ChatTokenizer.from_model(tmp_path / "b")
    ids, learned = tokenizer.encode_chat(talk)
    text = "[INST] be brief\n\ncat?[/INST] sat</s>[INST] and?[/INST] ran</s>"
    assert raw_decode(tokenizer, ids) == text  # this tokenizer adds no <s> of its own
    assert raw_decode(tokenizer, np.array(ids)[learned]) == " sat</s> ran</s>"

  def test_the_models_own_template_as_transformers_renders_it(self, tmp_path):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    own = """{{- bos_token }}
    {%- for message in messages %}
        {%- if message.role == 'assistant' %}
            {{- '<|im_start|>assistant\\n' }}
            {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
        {%- elif message.role == 'system' %}{% continue %}
        {%- else %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content | tojson) + '<|im_end|>' }}
        {%- endif %}
    {%- endfor %}
    {% if add_generation_prompt %}
<|im_start|>assistant
    {% endif %}"""
    talk = [{"role": "system", "content": "é"}, *chat("thé <cat>", "sat", "and", "ran")]
    save_tokenizer(tmp_path / "m", bos_token="<|endoftext|>", chat_template=own)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    for answer in (False, True):
      (want,), _ = utils.render_jinja_template(
        [talk], chat_template=own, add_generation_prompt=answer, **tokens
      )
      assert tokenizer.template.render(talk, tokens, answer=answer) == want

  def test_a_template_that_writes_the_date_is_given_the_day(self, tmp_path):
    own = "{{ strftime_now('%d %b %Y %H:%M') }} {{ messages[0].content }}"
    save_tokenizer(tmp_path / "m", chat_template=own)
    day = datetime.date(2024, 2, 29)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m", today=day)
    said = "29 Feb 2024 00:00 cat"
    assert tokenizer.decode(tokenizer.encode_prompt(chat("cat"))) == said and tokenizer.today == day
    assert tokenizer.decode(tokenizer.encode_chat(chat("cat"))[0]) == said
    first = datetime.date.today()
    assert first <= ChatTokenizer.from_model(tmp_path / "m").today <= datetime.date.today()

  def test_a_template_cannot_leave_the_sandbox(self, tmp_path):
    save_tokenizer(tmp_path / "m", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="refuses the conversation"):
      ChatTokenizer.from_model(tmp_path / "m").encode_chat(chat("cat", "sat"))

  def test_a_template_that_rewrites_earlier_answers_is_refused(self, tmp_path):
    own = (
      "{% for m in messages %}<|im_start|>{{ m.role }} "
      "{{ m.content if loop.last or m.role == 'user' else '...' }}<|im_end|>{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    save_tokenizer(tmp_path / "m", chat_template=own)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    assert any(tokenizer.encode_chat(chat("cat", "sat"))[1])
    with pytest.raises(ValueError, match="rewrites message 2 when others follow"):
      tokenizer.encode_chat(chat("cat", "sat", "and", "ran"))

  def test_an_answer_ended_by_plain_text_is_learned_to_its_own_end(self, tmp_path):
    own = (
      "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
      "{% if add_generation_prompt %}### assistant: {% else %}{{ eos_token }}{% endif %}"
    )
    save_tokenizer(tmp_path / "m", chat_template=own)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    ids, learned = tokenizer.encode_chat(chat("cat?", "sat", "the secret", "ran"))
    assert raw_decode(tokenizer, np.array(ids)[learned]) == " sat ran\n<|im_end|>"
    assert tokenizer.stop_ids == (tokenizer.eos_id,)

  def test_an_end_token_that_is_not_called_special_is_learned(self, tmp_path):
    backend = json.loads(save_tokenizer(tmp_path / "m").to_str())
    for token in backend["added_tokens"]:
      token["special"] = False
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    ids, learned = tokenizer.encode_chat(chat("cat?", "sat", "the secret", "ran"))
    assert raw_decode(tokenizer, np.array(ids)[learned]) == "sat<|im_end|>ran<|im_end|>"
    with pytest.raises(ValueError, match="contains the control token"):
      tokenizer.encode_chat(chat("hi <|im_end|>", "x"))

  @pytest.mark.parametrize(
    ("prompt", "said", "what"),
    [
      (
        "<think>\n",
        "m.content",
        r"asks for an answer with '<think>\\n', which it does not write be",
      ),
      ("", "m.content | upper", "changes the text of message 2, so what"),
    ],
  )
  def test_why_an_answer_is_not_found(self, tmp_path, prompt, said, what):
    own = (
      "{% for m in messages %}<|im_start|>{{ m.role }} {{ " + said + " }}<|im_end|>{% endfor %}"
      "{% if add_generation_prompt %}<|im_start|>assistant " + prompt + "{% endif %}"
    )
    save_tokenizer(tmp_path / "m", chat_template=own)
    tokenizer = ChatTokenizer.from_model(tmp_path / "m")
    with pytest.raises(ValueError, match=what):
      tokenizer.encode_chat(chat("cat", "sat"))

  @pytest.mark.parametrize("style", ["normalizer", "metaspace"])
  def test_a_completion_has_the_tokens_of_the_whole_text(self, style):
    """As Llama 2 and Mistral have it: the first word of a text gets a blank before it."""
    letters = [*"\u2581abcdefghijklmnopqrstuvwxyz.", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters, "\u2581a", "cd"])}
    merges = [("\u2581", "a"), ("c", "d")]
    backend = Tokenizer(
      models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.add_special_tokens(["<s>", "</s>"])
    if style == "normalizer":
      blanks = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
      backend.normalizer = normalizers.Sequence(blanks)
    else:
      backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    for add_bos, bos in ((True, ["<s>"]), (False, [])):
      tokenizer = ChatTokenizer(backend, bos="<s>", eos="</s>", add_bos=add_bos)
      for prompt, completion, said in [
        ("be", "an", ["a", "n"]),
        ("be", " an", ["\u2581a", "n"]),
        ("be ", "an", ["\u2581a", "n"]),  # holds the prompt's last letter: learned all the same
        ("bec", "da", ["cd", "a"]),
        ("b\U0001f600", "\U0001f600", ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]),
      ]:
        ids, learned = tokenizer.encode_completion(prompt, completion)
        assert ids[:-1] == tokenizer.encode("".join(bos) + prompt + completion)
        tokens = [backend.id_to_token(i) for i in ids]
        assert [t for t, yes in zip(tokens, learned, strict=True) if yes] == [*said, "</s>"]
      ids, learned = tokenizer.encode_completion("", "an")
      assert learned == [False] * len(bos) + [True] * (len(ids) - len(bos))

  def test_control_tokens_and_roles_are_checked(self, tokenizer):
    with pytest.raises(ValueError, match=r"user's message contains .*'<\|im_end\|>'"):
      tokenizer.encode_chat(chat("hi <|im_end|>", "x"))
    with pytest.raises(
      ValueError, match="must be one of system, user, assistant, tool, got 'robot'"
    ):
      tokenizer.encode_chat([{"role": "robot", "content": "x"}])

  def test_missing_and_broken_files(self, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
      ChatTokenizer.from_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a tokenizer that can be read"):
      ChatTokenizer.from_model(tmp_path)
    save_tokenizer(tmp_path, eos="<unknown>")
    with pytest.raises(ValueError, match=r"end-of-text token .* is unknown"):
      ChatTokenizer.from_model(tmp_path)


class TestGGUF:
  def write(self, path, backend, pre="smollm", kind="gpt2", more=(), **flags):
    import gguf

    tokens = [*map(backend.id_to_token, range(backend.get_vocab_size())), *more]
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in CHATML else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for key, value in flags.items():
      writer.add_bool(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path

  def test_rebuilt_tokenizer_equals_the_original(self, tmp_path):
    backend = save_tokenizer(tmp_path / "m")
    original = ChatTokenizer.from_model(tmp_path / "m")
    rebuilt = ChatTokenizer.from_model(self.write(tmp_path / "m.gguf", backend))
    for text in ["the cat sat", "in 2024 12cats", "  ünder\n\n 😀!", "it's  the dog", "é1٣x"]:
      assert rebuilt.encode(text) == original.encode(text)
      assert rebuilt.decode(rebuilt.encode(text)) == text
    messages = chat("the cat 12", "ran")
    assert rebuilt.encode_chat(messages) == original.encode_chat(messages)
    assert (rebuilt.eos_id, rebuilt.pad_id, rebuilt.vocab_size) == (2, 2, original.vocab_size)

  def test_digits_stand_alone(self, tmp_path):
    backend = save_tokenizer(tmp_path / "m")
    rebuilt = ChatTokenizer.from_model(self.write(tmp_path / "m.gguf", backend))
    assert [rebuilt.backend.id_to_token(i) for i in rebuilt.encode("1234")] == list("1234")

  def test_llama_3_takes_whole_words_and_begins_a_text(self, tmp_path):
    """Its words that no merge leads to are tokens all the same, and unless said it adds `bos`."""
    backend = save_tokenizer(tmp_path / "m")
    said: dict[str, Any]
    for pre, said, bos in (
      ("llama-bpe", {}, True),
      ("llama-bpe", {"add_bos_token": False}, False),
      ("smollm", {}, False),
      ("smollm", {"add_bos_token": True}, True),
    ):
      path = self.write(tmp_path / "m.gguf", backend, pre, more=["xyzzy"], **said)
      tokenizer = ChatTokenizer.from_model(path)
      words = [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("xyzzy")]
      assert words == (["xyzzy"] if pre == "llama-bpe" else list("xyzzy"))
      ids, learned = tokenizer.encode_completion("", "cat")
      assert (ids[0] == 1) == (not learned[0]) == bos

  def test_other_tokenizers_are_refused(self, tmp_path):
    backend = save_tokenizer(tmp_path / "m")
    with pytest.raises(ValueError, match=r"'llama' / 'default'.*Hugging Face directory"):
      ChatTokenizer.from_model(self.write(tmp_path / "a.gguf", backend, "default", "llama"))

  def test_truncated_file(self, tmp_path):
    path = self.write(tmp_path / "m.gguf", save_tokenizer(tmp_path / "m"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as a GGUF file"):
      ChatTokenizer.from_model(path)


SHAREGPT = [
  {"from": "system", "value": "be brief"},
  {"from": "human", "value": "say cat"},
  {"from": "gpt", "value": "cat"},
]
ALPACA = [{"instruction": "say cat", "input": "", "output": "cat"}] * 3
CHAT = [{"messages": chat("say cat", "cat")}] * 3


class TestData:
  @pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ""])
  @pytest.mark.parametrize("rows", [ALPACA, CHAT], ids=["alpaca", "chat"])
  @pytest.mark.parametrize("layout", ["list", "pretty", "lines"])
  def test_the_content_decides_not_the_name(self, tmp_path, tokenizer, suffix, rows, layout):
    text = {
      "list": json.dumps(rows),
      "pretty": json.dumps(rows, indent=2),
      "lines": "\n".join(map(json.dumps, rows)) + "\n\n",
    }[layout]
    path = tmp_path / f"rows{suffix}"
    path.write_text("\ufeff" + text, encoding="utf-8")
    data = load(path, tokenizer, 64)
    assert data.kind == ("Alpaca instructions" if rows is ALPACA else "chat messages")
    ids, learned = tokenizer.encode_chat(chat("say cat", "cat"))
    assert len(data.rows) == 3 and data.notes == []
    assert data.rows[0].ids.tolist() == ids and data.rows[0].learned.tolist() == learned

  def test_alpaca_input_follows_the_instruction(self, tmp_path, tokenizer):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "add", "input": "1 2", "output": "3"}] * 2))
    text = raw_decode(tokenizer, load(path, tokenizer, 64).rows[0].ids)
    assert "user\nadd\n\n1 2<|im_end|>" in text

  def test_sharegpt(self, tmp_path, tokenizer):
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"conversations": SHAREGPT}] * 2))
    data = load(path, tokenizer, 64)
    system = [{"role": "system", "content": "be brief"}]
    ids, learned = tokenizer.encode_chat(system + chat("say cat", "cat"))
    assert data.kind == "ShareGPT conversations"
    assert data.rows[0].ids.tolist() == ids and data.rows[0].learned.tolist() == learned

  @pytest.mark.parametrize(
    ("name", "who", "what"), [("messages", "role", "content"), ("conversations", "from", "value")]
  )
  def test_an_answer_of_weight_0_is_not_learned(self, tmp_path, tokenizer, name, who, what):
    talk = chat("the cat?", "sat", "and?", "ran", "so?", "on")
    ids, _ = tokenizer.encode_chat(talk)
    weights = [None, 0, None, 1, 0, ...]
    aliases = {"user": "human", "assistant": "gpt"} if who == "from" else {}
    row = [{who: aliases.get(m["role"], m["role"]), what: m["content"]} for m in talk]
    for message, weight in zip(row, weights, strict=True):
      message |= {} if weight is ... else {"weight": weight}
    (tmp_path / "a.json").write_text(json.dumps([{name: row}] * 2))
    for everything, want in ((False, "ran<|im_end|>on<|im_end|>"), (True, None)):
      data = load(tmp_path / "a.json", tokenizer, 128, train_on_prompt=everything).rows[0]
      assert data.ids.tolist() == ids
      left = raw_decode(tokenizer, data.ids[~data.learned])
      if everything:
        assert left == "sat<|im_end|>"
      else:
        assert raw_decode(tokenizer, data.ids[data.learned]) == want

  def test_alpaca_with_a_system_message_and_earlier_turns(self, tmp_path, tokenizer):
    more = {"system": "be brief", "history": [["the cat?", "sat"], ["and?", "ran"]]}
    row = {"instruction": "so?", "input": "", "output": "on"}
    (tmp_path / "a.json").write_text(
      json.dumps([row | more, row | {"system": "", "history": None}])
    )
    data = load(tmp_path / "a.json", tokenizer, 128)
    system = [{"role": "system", "content": "be brief"}]
    talks = [system + chat("the cat?", "sat", "and?", "ran", "so?", "on"), chat("so?", "on")]
    for found, talk in zip(data.rows, talks, strict=True):
      ids, learned = tokenizer.encode_chat(talk)
      assert found.ids.tolist() == ids and found.learned.tolist() == learned

  def test_completions_and_texts(self, tmp_path, tokenizer):
    path = tmp_path / "c.jsonl"
    rows = [{"prompt": "the cat ", "completion": "sat"}, {"text": "the dog ran"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = load(path, tokenizer, 64)
    assert data.kind == "prompts and completions and texts"
    first, second = data.rows
    assert raw_decode(tokenizer, first.ids) == "the cat sat<|im_end|>"
    assert raw_decode(tokenizer, first.ids[first.learned]) == " sat<|im_end|>"
    assert raw_decode(tokenizer, second.ids[second.learned]) == "the dog ran<|im_end|>"

  def test_train_on_prompt(self, tmp_path, tokenizer):
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    ways = (False, True)
    one, other = (load(tmp_path / "a.json", tokenizer, 64, train_on_prompt=p) for p in ways)
    assert other.rows[0].learned.all() and not one.rows[0].learned.all()
    assert (one.rows[0].ids == other.rows[0].ids).all()

  def test_plain_text_learns_each_token_once(self, tmp_path, tokenizer):
    path = tmp_path / "book"
    path.write_text("[1] the cat sat on the mat. " * 20)
    data = load(path, tokenizer, 32)
    assert data.kind == "plain text"
    targets = np.concatenate([row.ids[1:] for row in data.rows])
    whole = [*tokenizer.encode(path.read_text().strip()), tokenizer.eos_id]
    assert targets.tolist() == whole[1:] and all(row.learned.all() for row in data.rows)

  @pytest.mark.parametrize("between", ["\n", " ", "\n\n\n", "x"])
  def test_plain_text_is_encoded_in_blocks(self, tmp_path, tokenizer, monkeypatch, between):
    text = between.join(f"the cat sat on {i} mats" for i in range(400))
    parts = list(blocks(text, 1000))
    assert "".join(parts) == text and all(1000 <= len(part) <= 2000 for part in parts[:-1])
    if between[0] == "\n":
      assert all(a[-1] == "\n" and b[0] != "\n" for a, b in pairwise(parts))
    assert list(blocks(text, len(text))) == [text]
    assert [*map(len, blocks("a" * 2500, 1000))] == [1000, 1000, 500]
    (tmp_path / "book").write_text(text)
    whole = load(tmp_path / "book", tokenizer, 32)
    monkeypatch.setattr("optax_lowmem.qlora.data.dataset.BLOCK", 1000)
    rows = load(tmp_path / "book", tokenizer, 32).rows
    if between in ("\n", " "):  # where the tokenizer's own words end; elsewhere a token may differ
      assert [row.ids.tolist() for row in rows] == [row.ids.tolist() for row in whole.rows]
    ids = [rows[0].ids[:1], *(row.ids[1:] for row in rows)]
    assert raw_decode(tokenizer, np.concatenate(ids)) == text + "<|im_end|>"
    assert all(row.learned.all() and len(row.learned) == len(row.ids) for row in rows)

  def test_a_file_is_read_in_few_bytes_for_each_of_its_own(self, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("optax_lowmem.qlora.data.dataset.BLOCK", 20_000)
    (tmp_path / "book").write_text("the cat sat on the mat\n" * 20_000)
    words = "the cat sat " * 400
    (tmp_path / "rows").write_text((json.dumps({"text": words}) + "\n") * 100)
    for name in ("book", "rows"):
      size = (tmp_path / name).stat().st_size
      tracemalloc.start()
      try:
        load(tmp_path / name, tokenizer, 256)
        _, peak = tracemalloc.get_traced_memory()
      finally:
        tracemalloc.stop()
      assert peak < 8 * size, name

  def test_long_rows_are_cut_and_unlearnable_ones_dropped_and_counted(self, tmp_path, tokenizer):
    rows = [chat("hi", "cat")] * 3 + [chat("hi", "the cat " * 60)] * 2
    rows += [chat("the cat " * 60, "no"), chat("only a question")]
    path = tmp_path / "c.jsonl"
    path.write_text("\n".join(json.dumps({"messages": m}) for m in rows))
    data = load(path, tokenizer, 40)
    assert [len(row.ids) for row in data.rows][3:] == [41, 41] and len(data.rows) == 5
    assert data.notes == [
      "3 of 7 rows were longer than 40 tokens and were cut.",
      "2 rows were dropped: nothing in them was left to learn.",
    ]

  @pytest.mark.parametrize(
    ("name", "content", "message"),
    [
      ("a.json", b"", "a.json is empty"),
      ("a.json", b" \n\n", "a.json is empty"),
      ("a.json", b"[]", "no rows: the list is empty"),
      ("a.txt", b"ok\nthen \xff\xfe", r"a.txt, line 2: byte 0xff is not UTF-8"),
      ("a.json", b"\nhello", r"a.json, line 2: expected a JSON list .* found 'hello'"),
      ("a.jsonl", b'{"messages": [}\n', r"a.jsonl, line 1, column 15: .*one complete JSON object"),
      ("a", b'{"instruction": "a", "output": "b"}\n{"instru', r"a, line 2, column"),
      ("a.json", b'[{"instruction": "a",\n "output": "b"},\n\n {"x": }]', r"row 2 \(line 4\): .*4"),
      ("a.json", b'[\n{"instruction": "a", "output": "b"}\n', "line 3: .* after row 1.*end of the"),
      ("a.json", b'[{"instruction": "a", "output": "b"} {}]', "line 1: expected ',' or ']'"),
      ("a.json", b'[{"instruction": "a", "output": "b"}]\n\nmore', "line 3: unexpected 'more'"),
      ("a.json", b"[1, 2]", r"row 1 \(line 1\): expected a JSON object, found int"),
      ("a.json", b'[{"instruction": "a"}]', r"row 1 \(line 1\): 'output' is missing; an Alpaca"),
      ("a.json", b'[{"instruction": "a", "output": 3}]', "'output' is int; an Alpaca row"),
      ("a.json", b'[{"instruction": "a", "output": "b", "input": 1}]', "'input' is int"),
      (
        "a.json",
        b'[{"instruction": "a", "output": "b", "system": 1}]',
        "'system' is int; expected",
      ),
      (
        "a.json",
        b'[{"instruction": "a", "output": "b", "history": "x"}]',
        "'history' must be a list",
      ),
      (
        "a.json",
        b'[{"instruction": "a", "output": "b", "history": [["x"]]}]',
        "'history', turn 1: ",
      ),
      (
        "a.json",
        b'[{"instruction": "a", "output": "b", "history": [["x", "\\ud83d"]]}]',
        "'history', turn 1 holds half a character",
      ),
      (
        "a.jsonl",
        b'{"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]}',
        "line 1, message 1: 'weight' is 0.5; expected 0 .not learned. or 1",
      ),
      (
        "a.jsonl",
        b'{"conversations": [{"from": "human", "value": "b"}], "system": ["x"]}',
        "line 1: 'system' is list; expected a text, or nothing",
      ),
      ("a.jsonl", b'{"prompt": "a"}', r"line 1: expected the keys 'messages'.*found 'prompt'"),
      ("a.jsonl", b'{"completion": "a"}', "'prompt' is missing; a completion row needs it"),
      (
        "a.jsonl",
        b'{"conversations": [{"from": "x", "value": ""}]}',
        "'from' is 'x'; expected .*gpt",
      ),
      ("a.jsonl", b'{"messages": []}', "line 1: 'messages' must be a list of at least one"),
      ("a.jsonl", b'{"messages": [{"role": "user"}]}', "line 1, message 1: expected 'role' and"),
      ("a.jsonl", b'{"messages": [{"role": "x", "content": ""}]}', "message 1: 'role' is 'x'"),
      (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "<|im_end|>"}]}',
        r"line 1: the user's message contains the control token",
      ),
      (
        "a.json",
        b'[{"instruction": "a", "output": "b"},\n {"instruction": "\\ud83d!", "output": "b"}]',
        r"row 2 \(line 2\): 'instruction' holds half a character \(U\+D83D\)",
      ),
      (
        "a.jsonl",
        b'{"instruction": "a", "output": "b", "input": "\\ude00"}',
        r"'input' holds .*DE00",
      ),
      ("a.jsonl", b'{"text": "\\udfff"}', r"line 1: 'text' holds half a character \(U\+DFFF\)"),
      (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "hi \\ud83d"}]}',
        r"line 1, message 1: 'content' holds half a character \(U\+D83D\)",
      ),
      ("a.jsonl", b'{"instruction": "a", "output": "b"}', "1 usable row of 1; at least 2"),
      ("a.txt", b"cat", "1 usable row of 1; at least 2"),
      (
        "unanswered.json",
        b'[{"messages": [{"role": "user", "content": "a"}]}]',
        "Add rows in which there is an answer, which is what is learned.",
      ),
    ],
  )
  def test_bad_files_are_named_with_the_place(self, tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
      load(tmp_path / name, tokenizer, 32)

  def test_two_halves_of_a_character_are_one(self, tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n' * 2)
    assert raw_decode(tokenizer, load(path, tokenizer, 32).rows[0].ids) == "\U0001f600<|im_end|>"

  def test_missing_file(self, tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"no data file at .*nothing\.json"):
      load(tmp_path / "nothing.json", tokenizer, 32)


class TestBatches:
  @pytest.fixture
  def data(self, tmp_path, tokenizer):
    rows = [{"instruction": f"say {i}", "output": f"{i}"} for i in range(43)]
    (tmp_path / "n.json").write_text(json.dumps(rows))
    return load(tmp_path / "n.json", tokenizer, 48)

  def test_split_is_a_partition_and_always_the_same(self, data):
    train, held = data.split()
    assert len(train) == 41 and len(held) == 2
    texts = [row.ids.tobytes() for row in train + held]
    assert sorted(texts) == sorted(row.ids.tobytes() for row in data.rows)
    again = data.split()
    assert all(a is b for a, b in zip(train + held, again[0] + again[1], strict=True))

  def test_every_epoch_holds_every_row_once(self, data):
    rows = data.split()[0]
    batches = Batches(rows, 4, 2, seq_len=48, pad_id=2, seed=3)
    seen = np.concatenate([batches.at(i).inputs.reshape(8, 48) for i in range(11)])
    first, second = seen[:41], seen[41:82]
    known = sorted(row.tobytes() for row in pad(rows, 41, 48, 2).inputs)
    assert sorted(row.tobytes() for row in first) == known
    assert sorted(row.tobytes() for row in second)[:1] != [] and (first != second[:41]).any()

  def test_a_batch_depends_on_seed_and_step_only(self, data):
    rows = data.split()[0]
    make = lambda seed: Batches(rows, 4, 2, seq_len=48, pad_id=2, seed=seed)  # noqa: E731
    one = make(3)
    for i in range(12):
      one.at(i)
    for step in (11, 0, 6):
      for a, b in zip(one.at(step)[:4], make(3).at(step)[:4], strict=True):
        assert a.tobytes() == b.tobytes()
    assert (one.at(0).inputs != make(4).at(0).inputs).any()

  def test_shapes_shift_and_padding(self, data):
    rows = data.rows[:3]
    batch = pad(rows, 4, 48, pad_id=2)
    assert batch.inputs.shape == batch.targets.shape == batch.learned.shape == (4, 48)
    for i, row in enumerate(rows):
      n = len(row.ids) - 1
      assert batch.lengths[i] == n
      assert batch.inputs[i, :n].tolist() == row.ids[:-1].tolist()
      assert batch.targets[i, :n].tolist() == row.ids[1:].tolist()
      assert (batch.inputs[i, n + 1 :] == 2).all() and not batch.learned[i, n:].any()
      # The end token has the padding's id, and is learned all the same.
      assert 2 in batch.targets[i][batch.learned[i]]
    assert batch.lengths[3] == 0 and not batch.learned[3].any()


class TestFetch:
  """Real downloads by pip, from a folder instead of an index."""

  @pytest.fixture
  def source(self, tmp_path, monkeypatch):
    pytest.importorskip("pip")
    wheel = tmp_path / "index" / "tinywheel-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "tinywheel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
      archive.writestr("tinywheel/file.txt", "content")
      archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n")
      archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
      archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("OPTAX_LOWMEM_CACHE", str(tmp_path / "cache"))
    return fetch.Source(
      what="a test",
      requirement="tinywheel==1.0",
      wheel_sha256=fetch.sha256_of(wheel),
      member="tinywheel/file.txt",
      name="file.upper",
      sha256=hashlib.sha256(b"CONTENT").hexdigest(),
      convert=bytes.upper,
    )

  def cache(self):
    return sorted(p.name for p in fetch.cache_dir().iterdir())

  def test_fetched_once_and_again_when_damaged(self, source):
    said = []
    path = fetch.fetch(source, said.append)
    assert path.read_bytes() == b"CONTENT" and len(said) == 1
    assert fetch.fetch(source, said.append) == path and len(said) == 1
    path.write_bytes(b"CONTENT cut off")
    assert fetch.fetch(source, said.append).read_bytes() == b"CONTENT"
    assert "is damaged" in said[1] and self.cache() == ["file.upper"]

  def test_a_wrong_wheel_is_thrown_away(self, source):
    with pytest.raises(fetch.FetchError, match=r"tinywheel-1\.0.*has SHA-256 .*, expected 00"):
      fetch.fetch(replace(source, wheel_sha256="00"))
    assert self.cache() == []

  def test_a_wrong_result_is_thrown_away(self, source):
    with pytest.raises(fetch.FetchError, match=r"file\.upper came out with SHA-256"):
      fetch.fetch(replace(source, convert=None))
    assert self.cache() == []

  def test_offline(self, source):
    with pytest.raises(
      fetch.FetchError, match=r"could not download absent==1.*Are you offline.*--data"
    ):
      fetch.fetch(replace(source, requirement="absent==1"))
    assert self.cache() == []

  def test_interrupted(self, source):
    def interrupt(content):
      raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
      fetch.fetch(replace(source, convert=interrupt))
    assert self.cache() == []

  def test_what_a_killed_fetch_has_left_is_cleared_away(self, source):
    for _ in range(2):  # when something is fetched, and when it is there already
      left = fetch.cache_dir() / ".fetching-abc"
      left.mkdir(parents=True)
      (left / "half.whl").write_text("half")
      fetch.fetch(source, lambda _: None)
      assert self.cache() == ["file.upper"]

  def test_what_another_process_fetches_is_waited_for(self, source):
    fetch.cache_dir().mkdir()
    said = []
    with ExitStack() as stack:
      stack.enter_context(locks.held(fetch.cache_dir()))
      (fetch.cache_dir() / ".fetching-abc").mkdir()

      def say(sentence):
        said.append(sentence)
        (fetch.cache_dir() / ".fetching-abc").rmdir()
        (fetch.cache_dir() / "file.upper").write_bytes(b"CONTENT")
        stack.close()  # the other process is done

      assert fetch.fetch(source, say).read_bytes() == b"CONTENT"
    assert len(said) == 1 and "is fetching into" in said[0]

  def test_cache_that_cannot_be_made(self, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTAX_LOWMEM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(fetch.FetchError, match="Set OPTAX_LOWMEM_CACHE to a folder"):
      fetch.fetch(source)

  def test_chitchat_conversion(self):
    def conversation(*turns, ratings=None, prompt: str | None = "Why?"):
      messages = [[{"text": t, "sender": who} for t in texts] for who, *texts in turns]
      return {"messages": messages, "ratings": ratings, "prompt": prompt}

    good = [("a", "hi ", "you?"), ("b", "yo"), ("a", "so"), ("b", "yes", "ok"), ("a", "bye")]
    raw = {
      "good": conversation(*good),
      "short": conversation(*good[:3]),
      "monologue": conversation(*[("a", "x")] * 6),
      "empty": conversation(*good[:3], ("b", " ")),
      "disliked": conversation(*good, ratings={"witty": "1", "upbeat": 1}),
      "liked": conversation(*good, ratings={"witty": "5"}, prompt=None),
    }
    lines = fetch.chitchat_to_chat(json.dumps(raw).encode()).decode().splitlines()
    first, second = (json.loads(line)["messages"] for line in lines)
    assert [m["content"] for m in first[1:]] == ["hi\nyou?", "yo", "so", "yes\nok"]
    assert [m["role"] for m in first] == ["system", *["user", "assistant"] * 2]
    assert first[0]["content"].endswith("The question of the day: Why?")
    assert second[0]["content"] == "You are a student, chatting with another student."
