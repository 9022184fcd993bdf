"""``lowmem plan``, ``compare`` and ``recommend``: models by name, verdicts, bad input."""

import json
import pathlib
import shlex
import subprocess
import sys

import jax
import pytest

import optax_lowmem as lowmem
import plan as bench
from optax_lowmem.qlora import cli, model_shapes
from optax_lowmem.qlora.commands.asked import case_of, parser_for
from optax_lowmem.qlora.kinds import kind_of
from optax_lowmem.qlora.loading.config_files import config_from_hf
from optax_lowmem.qlora.planning import case as planned_case
from optax_lowmem.qlora.planning import changes, search
from optax_lowmem.qlora.planning.budget import GIB, budget_of
from optax_lowmem.qlora.planning.case import Case
from optax_lowmem.qlora.planning.known_models import ALSO, MODELS
from optax_lowmem.qlora.planning.model_source import config_of, name_of
from optax_lowmem.qlora.planning.recipes import RECIPES, TASKS
from optax_lowmem.qlora.run.arguments import given, parser_of
from optax_lowmem.qlora.run.settings import Settings
from qlora_cases import save_model

ROOT = pathlib.Path(__file__).parents[1]

# As the models' pages, or the tensors of their files, have them.
COUNTS = {
  "smollm2-135m": 134_515_008,
  "smollm2-360m": 361_821_120,
  "smollm2-1.7b": 1_711_376_384,
  "smollm3-3b": 3_075_098_624,
  "tinyllama-1.1b": 1_100_048_384,
  "llama-7b": 6_738_415_616,
  "llama-13b": 13_015_864_320,
  "llama-33b": 32_528_943_616,
  "llama-65b": 65_285_660_672,
  "llama-2-7b": 6_738_415_616,
  "llama-2-13b": 13_015_864_320,
  "llama-2-70b": 68_976_648_192,
  "llama-3-8b": 8_030_261_248,
  "llama-3-70b": 70_553_706_496,
  "llama-3.1-8b": 8_030_261_248,
  "llama-3.1-70b": 70_553_706_496,
  "llama-3.1-405b": 405_853_388_800,
  "llama-3.2-1b": 1_235_814_400,
  "llama-3.2-3b": 3_212_749_824,
  "llama-3.3-70b": 70_553_706_496,
  "mistral-7b": 7_241_732_096,
  "mistral-7b-v0.2": 7_241_732_096,
  "mistral-7b-v0.3": 7_248_023_552,
  "mistral-large": 122_610_069_504,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen2.5-32b": 32_763_876_352,
  "qwen2.5-72b": 72_706_203_648,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "gemma-2-2b": 2_614_341_888,
  "gemma-2-9b": 9_241_705_984,
  "gemma-2-27b": 27_227_128_320,
  "gemma-3-1b": 999_885_952,
  "phi-3-mini": 3_821_079_552,
  "olmo-2-7b": 7_298_617_344,
  "olmo-2-13b": 13_716_198_400,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save_model(tmp_path_factory.mktemp("plan") / "model")


def ran(capsys, line):
  assert cli.main(shlex.split(line)) == 0
  return capsys.readouterr().out


def record(capsys, line):
  return json.loads(ran(capsys, f"{line} --json"))


def refused(capsys, line):
  with pytest.raises(SystemExit) as ended:
    cli.main(line.split())
  assert ended.value.code == 2
  said = capsys.readouterr().err.replace("Starting ...\n", "")
  assert said.startswith("error: ") and said.count("\n") == 1, said
  return said


def test_every_known_model_has_its_number_of_parameters():
  found = {name: config_from_hf(config).parameter_count() for name, config in MODELS.items()}
  assert found == COUNTS
  assert set(ALSO.values()) <= set(MODELS)


@pytest.mark.parametrize(
  ("typed", "meant"),
  [
    ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
    ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
    ("Llama-2-70b-chat-hf", "llama-2-70b"),
    ("LLAMA-30B", "llama-33b"),
    ("google/gemma-2-9b-it", "gemma-2-9b"),
    ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
    ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
  ],
)
def test_names_are_read_as_people_write_them(typed, meant):
  assert name_of(typed) == meant


def test_shapes_of_a_model():
  shapes = model_shapes("llama-2-7b", "bfloat16")
  planned = lowmem.plan(shapes, lowmem.adamw(1e-3))
  assert planned.parts[0].parameters == 6_738_415_616
  assert planned.of("weights") == 2 * 6_738_415_616
  assert model_shapes(MODELS["llama-2-7b"]).keys() == shapes.keys()


def test_a_plan_has_a_table_and_a_verdict(capsys):
  said = ran(capsys, "plan llama-2-7b --memory 24GB --rank 64 --batch-size 1 --seq-len 512")
  assert "adapters of rank 64 on a base in NF4, adamw_8bit, 1 x 512 tokens." in said
  assert "frozen weights, NF4                   6,476,005,376   3.11 GiB" in said
  assert "\nfits: about 5.6 of 21.9 GiB\n" in said
  assert "a formula estimates" in said


def test_numbers_as_json(capsys):
  found = record(capsys, "plan llama-2-7b --memory 24GB --rank 64 --batch-size 1 --seq-len 512")
  assert found["fits"] is True and found["method"] == "estimate"
  assert found["device_bytes"] == sum(part["device"] for part in found["parts"])
  assert found["flags"] == "--seq-len 512 --batch-size 1 --rank 64"


def test_what_would_make_it_fit_does(capsys):
  line = "plan llama-33b --rank 64 --batch-size 8 --seq-len 1024"
  found = record(capsys, f"{line} --memory 26GB")
  assert not found["fits"] and found["remedies"]
  for remedy in found["remedies"]:
    then = record(capsys, f"{line} {remedy['flags']} --memory 26GB")
    assert then["fits"] and then["device_bytes"] == remedy["device_bytes"]


def test_several_changes_together_where_none_is_enough(capsys):
  found = record(capsys, "plan llama-2-7b --full --dtype float32 --optim adamw --memory 16GB")
  (remedy,) = found["remedies"]
  assert "--no-full" in remedy["flags"]
  assert "smaller model" in ran(capsys, "plan llama-3.1-405b --memory 8GB")


def test_a_remedy_that_is_a_default_is_spelled_out(capsys):
  line = "plan llama-2-7b --full --optim adamw --no-update-in-backward --memory 80GB"
  found = record(capsys, line)
  assert found["remedies"][0]["flags"] == "--optim adamw_8bit"


def test_full_training_and_pages(capsys):
  line = "plan llama-2-7b --full --optim paged_adamw_8bit --no-update-in-backward --memory 80GB"
  found = record(capsys, f"{line} --masters none")
  assert found["host_bytes"] == pytest.approx(2.125 * 6.738e9, rel=1e-3)
  masters = record(capsys, line)["host_bytes"] - found["host_bytes"]
  assert masters == pytest.approx(2 * 6.738e9, rel=1e-3)
  assert {part["kind"] for part in found["parts"]} == {
    "weights", "gradients", "state", "batch", "temporaries"
  }  # fmt: skip


def test_sums_of_several_passes_are_a_part(capsys):
  line = "plan llama-2-7b --full --no-update-in-backward --batch-size 1 --memory 80GB"
  one, four = record(capsys, line), record(capsys, f"{line} --grad-accum 4")
  (sums,) = (p for p in four["parts"] if p["name"] == "sums of the gradients of 4 passes")
  assert sums["device"] == next(p["device"] for p in one["parts"] if p["name"] == "gradients")
  batches = [next(p["device"] for p in x["parts"] if p["name"] == "batch") for x in (one, four)]
  more = four["device_bytes"] - one["device_bytes"]
  assert more == sums["device"] + batches[1] - batches[0]


@pytest.fixture
def eight(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 8)  # as in a process that has them


def test_on_several_devices(capsys, eight):
  line = "plan llama-2-70b --memory 24GB --mesh 8 --batch-size 8 --seq-len 512"
  whole, parts = record(capsys, line), record(capsys, f"{line} --fsdp")
  assert whole["devices"] == 8 and not whole["fits"] and parts["fits"]
  frozen = [
    sum(p["device"] for p in found["parts"] if p["name"].startswith("frozen"))
    for found in (whole, parts)
  ]
  assert frozen[1] == pytest.approx(frozen[0] / 8, rel=1e-2)
  assert "on each device" in ran(capsys, line)


def test_the_command_makes_itself_the_devices():
  """In a process of its own, before JAX begins."""
  command = [sys.executable, "-m", "optax_lowmem.qlora", "plan", "smollm2-135m", "--memory", "4GB"]
  command += ["--mesh", "2", "--fsdp"]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert "device (each device)" in done.stdout and "\nfits: " in done.stdout


@pytest.mark.parametrize("what", ["seq-len", "batch-size"])
def test_the_largest_fits_and_one_more_does_not(what, capsys):
  line = "plan llama-3.1-8b --rank 64 --batch-size 1 --seq-len 512 --memory 16GB"
  found = record(capsys, f"{line} --max {what}")
  assert found["fits"] and found["value"] > 1
  more = {"seq-len": 128, "batch-size": 1}[what]
  much = int(found["value"] * 1.02) + more  # where the search ends
  assert not record(capsys, f"{line} --{what} {much}")["fits"]


def test_the_models_positions_may_be_what_ends_it(capsys):
  said = ran(capsys, "plan llama-2-7b --batch-size 1 --memory 80GB --max seq-len")
  assert "--max seq-len: 4,096, all of the model's positions" in said
  nothing = record(capsys, "plan llama-2-70b --memory 8GB --max seq-len")
  assert nothing["value"] == 0 and not nothing["fits"]


@pytest.mark.parametrize("per", [1.0, 0.9, 1.3])
@pytest.mark.parametrize("room", [-1, 0, 3, 99, 4000])
def test_search_finds_the_largest_with_few_calls(room, per):
  """Of what grows almost in proportion; `per` bends it."""
  calls = []

  def left(units):
    calls.append(units)
    return room - int(units**per)

  found = search._search(left, 1000)
  most = max((n for n in range(1001) if room - int(n**per) >= 0), default=0)
  assert most * 0.97 - 1 <= found <= most
  assert len(set(calls)) <= 9


def test_a_local_config_and_a_directory(folder, capsys):
  by_file = record(capsys, f"plan {folder}/config.json --memory 1GB")
  by_folder = record(capsys, f"plan {folder} --memory 1GB")
  assert by_file["parts"] == by_folder["parts"] and by_file["fits"]
  by_flag = record(capsys, f"plan --model {folder} --memory 1GB")
  assert record(capsys, f"plan --model {folder} --qlora")["parts"] == by_flag["parts"]
  assert by_flag["parts"] == by_file["parts"]


def test_without_a_question_it_plans_a_run_as_ever(folder, capsys):
  said = ran(capsys, f"plan --model {folder} --seq-len 32")
  assert "temporaries of a training step" in said


def test_a_picture(tmp_path, capsys):
  ran(capsys, f"plan smollm2-135m --memory 4GB --plot {tmp_path}/plan.png")
  assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_compare(capsys):
  said = ran(capsys, "compare llama-2-7b")
  assert "Masters of 16 bits come besides: 2 B/param of what is in bfloat16." in said
  assert "adamw             53.91 GB   0.00 GB    8.000" in said
  rows = record(capsys, "compare llama-2-7b --optim adamw,came --qlora --rank 64")
  assert [row["name"] for row in rows] == ["adamw", "came"]
  assert rows[0]["device"] == pytest.approx(8 * 159_907_840, abs=16)


def test_recommend(capsys):
  said = ran(capsys, "recommend llama-2-13b --memory 24GB")
  assert "on 21.9 GiB, 4 x 128 tokens; instructions" in said
  take = "lowmem finetune --model DIR --batch-size 4 --seq-len 128 --quantize int8"
  assert "Take: LoRA on 8-bit weights" in said and take in said
  found = record(capsys, "recommend llama-3.2-1b --memory 80GB --task domain")
  assert found["rows"][0]["recipe"] == "float32 weights, 8-bit AdamW" and found["rows"][0]["fits"]
  assert found["rows"][0]["flags"] == "--full --dtype float32"
  said = ran(capsys, "recommend llama-3.2-1b --memory 12GB --task domain --seq-len 1024")
  assert "4 x 1,024 tokens" in said and said.count("--seq-len") == 1
  assert "lowmem finetune --model DIR --batch-size 4 --seq-len 1024 --full" in said
  assert "Nothing fits." in ran(capsys, "recommend llama-3.1-405b --memory 24GB")


def test_what_to_take_is_a_command_for_a_shell(capsys):
  """A `|` that is not quoted would be a pipe."""
  for targets in ("'q_proj|v_proj'", "q_proj,v_proj"):
    said = ran(capsys, f"recommend smollm2-135m --memory 0.9GB --targets {targets}")
    (take,) = (line for line in said.splitlines() if line.startswith("Take: "))
    assert f"--targets {targets}" in take


@pytest.fixture
def file(tmp_path):
  def written(*lines):
    path = tmp_path / "run.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path

  return written


def test_the_settings_of_a_file_are_those_of_flags(file, capsys):
  """Nothing that a command takes for usual goes over them."""
  path = file("full: true", "dtype: float32")
  line = "plan smollm2-135m --memory 24GB"
  by_flags = record(capsys, f"{line} --full --dtype float32")
  assert record(capsys, f"{line} --config {path}") == by_flags
  line = "compare smollm2-135m --optim adamw"
  for flags, lines in {"--rank 8": ["rank: 8"], "--no-full": ["full: false"]}.items():
    by_flags = record(capsys, f"{line} {flags}")
    assert by_flags[0]["device"] < 1e8  # of adapters
    assert record(capsys, f"{line} --config {file(*lines)}") == by_flags
  path = file("model: smollm2-135m", "optim: came, lion_8bit")
  by_flags = record(capsys, "compare smollm2-135m --optim came,lion_8bit")
  assert [row["name"] for row in by_flags] == ["came", "lion_8bit"]
  assert record(capsys, f"compare --config {path}") == by_flags
  assert record(capsys, f"compare llama-2-7b --config {path}") != by_flags
  rows = record(capsys, f"compare --config {path} --optim adamw")
  assert [row["name"] for row in rows] == ["adamw"]


def test_an_error_names_the_file_whose_key_it_is(file, capsys):
  path = file("optim: came", "seq_len: 64")
  said = refused(capsys, f"recommend smollm2-135m --memory 9GB --config {path}")
  assert f"{path}: optim is what `lowmem recommend` chooses" in said


@pytest.mark.parametrize(("flags", "in_parts"), [("", True), ("--no-fsdp", False)])
def test_recipes_are_in_parts_where_nothing_else_is_said(flags, in_parts, eight, capsys):
  found = record(capsys, f"recommend smollm2-135m --memory 9GB --mesh 2 {flags}")
  assert {"--fsdp" in row["flags"] for row in found["rows"]} == {in_parts}


def test_what_to_take_is_a_command_of_finetune(eight, capsys):
  """Not `--mesh`, which is of plans: `finetune` has it as `--devices`."""
  said = ran(capsys, "recommend smollm2-135m --memory 9GB --mesh 2")
  (take,) = (line for line in said.splitlines() if line.startswith("Take: "))
  words = shlex.split(take[take.index("lowmem finetune") :])[2:]
  found = given(parser_of(""), words)
  assert found["devices"] == 2 and found["fsdp"]


def test_the_tables_are_whole(eight):
  """Each change changes something or says that it cannot; each recipe is made of settings."""
  settings = Settings(
    optim="adamw", dtype="float32", seq_len=512, full=True, update_in_backward=False
  )
  case = Case("m", config_of("llama-3.2-1b"), settings, 2)
  for change in changes.CHANGES:
    others = case.but(full=False, quantize="none"), case.but(dtype="bfloat16")
    changed = next(filter(None, map(change.of, (case, *others))), None)
    assert changed is not None and changed != case, change.what
  assert {kind for kinds, _ in TASKS.values() for kind in kinds} == {r.trained for r in RECIPES}


ASKED = [
  "--init loftq --batch-size 8",
  "--targets q_proj,v_proj --rank-pattern '{\".*[qk]_proj\": 8}'",
  "--grad-accum 4 --optim adafactor",
  "--full --dtype float32 --optim adamw_torch",
  "--full --masters 8 --grad-accum 4 --no-update-in-backward",
  "--full --optim paged_adamw_8bit --weight-decay 0.1",
  "--full --optim paged_adamw_8bit --no-update-in-backward",
]


@pytest.mark.parametrize("line", ASKED)
def test_what_is_proposed_is_taken(line):
  """As flags of the whole run, and added to those that were given."""

  def asked(*flags):
    return case_of(given(parser_for("plan"), ["llama-3.2-1b", *shlex.split(" ".join(flags))]))

  case = asked(line)
  changed = [*filter(None, (change.of(case) for change in changes.CHANGES))]
  for each in (*changed, *(recipe.of(case) for recipe in RECIPES)):
    kind_of(each.settings).optimizer(each.settings)
    assert asked(each.flags()).flags() == each.flags()
  for each in changed:
    if each.full == case.full:
      assert asked(line, each.flags(case)).flags() == each.flags()


def test_what_is_of_all_parameters_is_left_out_with_adapters(capsys):
  line = "plan llama-2-7b --full --masters 8 --max-grad-norm 0"
  (remedy,) = record(capsys, f"{line} --memory 6GB")["remedies"]
  assert "--no-full" in remedy["flags"] and remedy["without"] == ["--masters"]
  assert f"{remedy['flags']} without --masters (" in ran(capsys, f"{line} --memory 6GB")
  rest = line.replace("--masters 8", "")
  assert record(capsys, f"{rest} {remedy['flags']} --memory 6GB")["fits"]


REFUSED = {
  "plan lama-2-7b --memory 24GB": "Did you mean 'llama-2-7b'",
  "plan llama-2-7b --memory 24": "--memory 24 has no unit. Write 24GB (10^9 bytes each) or 24GiB",
  "plan llama-2-7b --memory much": "such as '4GB'",
  "plan llama-2-7b --memory 24GB --mesh 3": "--batch-size 4 is not a multiple of the 3 devices",
  "plan llama-2-7b --memory 24GB --mesh 0": "--mesh must be a positive number of devices, got 0",
  "plan llama-2-7b --card h10": "`card` 'h10' is unknown. Did you mean 'h100'",
  "plan llama-2-7b --seq-len 8192 --memory 24GB": "more than the 4096 positions",
  "plan llama-2-7b --max seq-len": "needs --memory or --card",
  "plan llama-2-7b --optim adamw_9bit --memory 1GB": "Nearest: adamw_",
  "plan --memory 24GB": "Name a model",
  "plan llama-2-7b --model llama-3-8b": "--model llama-3-8b contradicts llama-2-7b, which is named",
  "plan llama-2-7b --targets q_proj,v_porj --memory 9GB": "'v_porj' matches no module that can",
  "plan llama-2-7b --optim muon --memory 1GB": "--optim muon: no such optimizer. Nearest: lion.",
  "plan nothing.json --memory 24GB": "There is no file nothing.json",
  "plan llama-2-7b --full --rank 8 --memory 1GB": "--rank is for adapters, and --full trains all",
  "plan llama-2-7b --full --qlora --memory 1GB": "--full trains all parameters, and --qlora",
  "plan llama-2-7b --memmory 24GB": "unrecognized arguments: --memmory",
  "recommend llama-2-7b --memory 9GB --masters 8": "--masters is what `lowmem recommend` chooses",
  "recommend llama-2-7b": "Say what there is: --memory 24GB",
  "compare llama-2-7b --memory 24GB": "--memory has no part in `lowmem compare`",
  "recommend llama-2-7b --memory 24GB --full": "say --task (instructions: adapters, then",
  "compare llama-2-7b --optim adamw,lyon": "--optim lyon: no such optimizer. Nearest: lion",
  "compare llama-2-7b --optim adamw,,lion": "--optim adamw,,lion has an empty name",
}


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input_is_one_sentence(line, capsys):
  assert REFUSED[line] in refused(capsys, line)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("{", "not valid JSON"),
    ("[]", "must hold a JSON object"),
    ("{}", "`model_type` is None; supported: 'llama'"),
    ('{"model_type": "llama"}', "lacks vocab_size"),
    (json.dumps(MODELS["llama-7b"] | {"num_experts": 8}), "`num_experts` is 8, a key that is not"),
    (json.dumps(MODELS["llama-7b"] | {"hidden_size": "big"}), "`hidden_size` must be a positive"),
  ],
)
def test_a_malformed_config_is_one_sentence(text, said, tmp_path, capsys):
  path = tmp_path / "config.json"
  path.write_text(text)
  assert said in refused(capsys, f"plan {path} --memory 24GB")


@pytest.mark.parametrize(
  ("needed", "verdict", "more"),
  [
    (5.0, "fits: about 5.0 of 23.5 GiB", ()),
    (20.0, "fits: about 20.0 of 23.5 GiB", ("XLA_PYTHON_CLIENT_MEM_FRACTION to 0.84",)),
    (23.46, "fits: about 23.46 of 23.50 GiB", ("to 0.98 or more", "--card asks a compiler")),
    (23.52, "does not fit: about 23.52 of 23.50 GiB, 0.02 too many", ("asks a compiler",)),
    (42.1, "does not fit: about 42.1 of 23.5 GiB, 18.6 too many", ()),
  ],
)
def test_verdicts(needed, verdict, more):
  budget = budget_of("24GiB", None)
  assert budget is not None
  planned = lowmem.MemoryPlan((lowmem.Part("all", "weights", int(needed * GIB)),), "estimate")
  assert budget.verdict(planned) == verdict
  said = budget.explained(planned)
  assert said.startswith("24GiB has 24.0 GiB, of which 0.5 are left to the driver and CUDA.")
  assert all(text in said for text in more) and (bool(more) or said.endswith("CUDA."))


def test_without_the_cards_compiler_the_answer_is_the_formulas(monkeypatch, capsys, eight):
  """Which is nearer than the CPU's compiler."""
  monkeypatch.setattr(planned_case, "missing", lambda card: "a compiler")
  for line in ("--qlora", "--mesh 8 --batch-size 8 --fsdp"):
    ask = f"plan llama-2-7b --seq-len 32 {line}"
    said = ran(capsys, f"{ask} --card h100")
    assert "The compiler of h100 would know; it needs a compiler." in said
    assert "\nfits: about " in said and "of 78.6 GiB" in said
    found = [record(capsys, f"{ask} {of}") for of in ("--card h100", "--memory 80GB")]
    assert found[0]["device_bytes"] == found[1]["device_bytes"]
  said = ran(capsys, "recommend llama-2-7b --card h100")
  assert "(as estimated; the compiler of h100 would know" in said


def test_the_memory_of_a_card():
  card = budget_of(None, "rtx-4090")
  assert card is not None and card.name == "rtx-4090" and card.usable == card.total - GIB // 2
  both = budget_of("24GiB", "h100")
  assert both is not None and both.total == 24 * GIB
  assert budget_of(None, None) is None
  tpu = budget_of(None, "v5e")
  assert tpu is not None and tpu.usable == tpu.total == 16 * GIB


RESULTS = json.loads((ROOT / "benchmarks" / "results" / "plan-h100.json").read_text())


def named(row):
  """The id of a row: its words and counts, without what was measured."""
  return " ".join(str(value) for value in row.values() if isinstance(value, str | int))


@pytest.mark.parametrize("row", RESULTS["figure8"] + RESULTS["lengths"], ids=named)
def test_estimates_of_adapters_are_near_what_was_compiled(row):
  more = {"adapter_dtype": row.get("adapters", "float32"), "seq_len": row.get("tokens", 512)}
  estimate = bench.case(row["model"], **more).plan().device_bytes
  assert estimate == pytest.approx(row["device GB"] * 1e9, rel=0.03)


@pytest.mark.parametrize("row", RESULTS["full"], ids=lambda row: f"{row['optimizer']}")
def test_estimates_of_full_training_are_near_what_was_compiled(row):
  case = bench.whole(row["model"], optim=row["optimizer"], dtype=row["weights"])
  assert case.plan().device_bytes == pytest.approx(row["device GB"] * 1e9, rel=0.05)


@pytest.mark.parametrize("row", RESULTS["backward"], ids=named)
def test_estimates_of_the_backward_form_are_near_what_was_compiled(row):
  settings = {"optim": row["optimizer"], "seq_len": row["tokens"], "max_grad_norm": 0.0}
  case = bench.whole(row["model"], row["masters"], True, **settings)
  assert case.plan().device_bytes == pytest.approx(row["device GB"] * 1e9, rel=0.05)


def test_state_in_the_committed_table_is_todays():
  assert list(bench.state("h100")) == RESULTS["state"]
