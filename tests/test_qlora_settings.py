"""Where settings come from: flags, YAML, an earlier run."""

import json
from dataclasses import fields

import pytest
import yaml

from optax_lowmem.qlora.run.arguments import parse
from optax_lowmem.qlora.run.runs import save_settings
from optax_lowmem.qlora.run.settings import CHOICES, HELP, Settings, flag_of, type_of


def write(path, text):
  path.write_text(text)
  return str(path)


def test_every_setting_has_a_help_line_and_fits_its_choices():
  assert [f.name for f in fields(Settings)] == list(HELP)
  for name, choices in CHOICES.items():
    assert getattr(Settings(), name) in choices


def test_flags_go_before_yaml_and_yaml_before_defaults(tmp_path):
  config = write(
    tmp_path / "run.yaml", "rank: 4\nlr: 1e-4\nbatch-size: 2\nwarmup: null\npacking: true\n"
  )
  s = parse("", ["--config", config, "--rank", "8", "--no-packing"])
  assert (s.rank, s.lr, s.batch_size, s.warmup, s.packing) == (8, 1e-4, 2, None, False)
  assert s.steps == Settings().steps
  assert parse("", ["--config", config]).packing


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("rnk: 4", r"no setting 'rnk'\. Did you mean 'rank'\?"),
    ("something: 4", r"no setting 'something'\.$"),
    ("rank: 4.5", "rank: 4.5 is not an int"),
    ("rank: big", "rank: 'big' is not an int"),
    ("rank: [4]", "is not an int"),
    ("rank: true", "is not an int"),
    ("rank: null", "is not an int"),
    ("rank_pattern: {q_proj: 8.7}", "is not an int"),
    ("rank_pattern: {q_proj: true}", "is not an int"),
    ("packing: 1", "is neither true nor false"),
    ("lr: fast", "lr: 'fast' is not a float"),
    ("quantize: nf8", "quantize must be one of nf4"),
    ("config: other.yaml", r"run.yaml: config: a file names no other\. Put all settings into one"),
    ("confg: other.yaml", r"no setting 'confg'\.$"),
    ("- rank", "must hold lines such as"),
    ("rank: 4: 5", "is not YAML"),
    ("rank: 4\nlr: 1\nrank: 8", "'rank' is there twice"),
    ("alpha_pattern: {q_proj: 8, q_proj: 8}", "'q_proj' is there twice"),
    ("rank: 0", "--rank must be at least 1"),
  ],
)
def test_bad_yaml_is_refused(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    parse("", ["--config", write(tmp_path / "run.yaml", text)])


def test_empty_patterns_and_lists_are_the_defaults(tmp_path):
  config = write(tmp_path / "run.yaml", "rank_pattern:\nmodules_to_save:\n")
  s = parse("", ["--config", config])
  assert s.rank_pattern == {} and s.modules_to_save == []


def test_automatic_dtype_does_not_contradict_what_it_was(tmp_path):
  s = parse("", ["--dtype", "auto"])
  save_settings(s, tmp_path, "0")
  write(tmp_path / "run.yaml", "dtype: auto\n")
  again = parse("", ["--config", str(tmp_path / "run.yaml"), "--resume", str(tmp_path)])
  assert again.dtype == s.dtype == "float32"


def test_missing_yaml():
  with pytest.raises(FileNotFoundError, match="--config nowhere"):
    parse("", ["--config", "nowhere"])


def test_saved_settings_give_the_same_run_again(tmp_path):
  s = parse("", "--rank 8 --lr 0.002 --packing --dtype bfloat16 --weight-decay 0.5".split())
  save_settings(s, tmp_path, "00")
  again = parse("", ["--config", str(tmp_path / "config.yaml")])
  again.config = None
  assert again == s
  assert set(yaml.safe_load((tmp_path / "config.yaml").read_text())) < set(HELP)
  assert json.loads((tmp_path / "run.json").read_text())["settings"]["rank"] == 8


def test_masters_of_float32_weights_are_refused_where_they_were_asked_for(tmp_path):
  save_settings(parse("", ["--full"]), tmp_path, "00")
  assert "masters: '16'" in (tmp_path / "config.yaml").read_text()
  assert parse("", ["--config", str(tmp_path / "config.yaml")]).full
  write(tmp_path / "config.yaml", "full: true\nmasters: none\n")
  with pytest.raises(ValueError, match="--masters none is for bfloat16 weights"):
    parse("", ["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("--packing --buckets 2", "--packing fills every row"),
    ("--packing --attention cudnn", "--attention cudnn cannot keep the rows apart"),
    ("--patience 2", "--patience 2 needs --eval-every"),
    ("--neftune-alpha -1", "--neftune-alpha must be 0 or a positive"),
    ("--weight-decay nan", "--weight-decay must be 0 or a positive"),
    ("--buckets -1", "--buckets must be at least 0"),
    ("--devices -1", "--devices must be at least 0"),
  ],
)
def test_refused(options, message):
  with pytest.raises(ValueError, match=message):
    parse("", options.split())


def test_flags_are_named_like_settings():
  assert flag_of("seq_len") == "--seq-len" and {type_of(f) for f in fields(Settings)} >= {int, bool}


@pytest.mark.parametrize(
  ("line", "yaml", "names"),
  [
    ("--target_modules q_proj,v_proj", "target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("--targets [(]?q_proj,v_proj", "targets: ['[(]?q_proj', v_proj]", ["[(]?q_proj", "v_proj"]),
    ("--targets q_proj|v_proj", "targets: q_proj|v_proj", "q_proj|v_proj"),
    ("--targets q_proj,", "targets: q_proj,", "q_proj"),
    ("--targets=\tq_proj", "targets: ' q_proj '", "q_proj"),
    ("--targets .{1,2}_proj", "lora_target: ['.{1,2}_proj']", ".{1,2}_proj"),
    ("--targets all-linear", "targets: [all-linear]", "all-linear"),
  ],
)
def test_targets_may_be_a_list(tmp_path, line, yaml, names):
  """As PEFT and others have them; names are kept apart, since each must match a layer."""
  config = write(tmp_path / "run.yaml", yaml + "\n")
  s = parse("", line.split(" "))
  assert s.targets == names
  assert parse("", ["--config", str(config)]).targets == names
  save_settings(s, tmp_path, "00")
  assert parse("", ["--config", str(tmp_path / "config.yaml")]).targets == names
  assert parse("", ["--resume", str(tmp_path), *line.split(" ")]).targets == names


def test_a_run_that_has_its_targets_as_one_pattern_is_resumed_with_their_names(tmp_path):
  """As all had them once."""
  save_settings(parse("", ["--targets", "q_proj|v_proj"]), tmp_path, "00")
  resume = ["--resume", str(tmp_path), "--targets"]
  assert parse("", [*resume, "q_proj,v_proj"]).targets == ["q_proj", "v_proj"]
  assert parse("", resume[:2]).targets == "q_proj|v_proj"
  with pytest.raises(ValueError) as error:
    parse("", [*resume, "q_proj,k_proj"])
  assert "--targets q_proj,k_proj contradicts the run in" in str(error.value)
  assert "which has q_proj|v_proj." in str(error.value)
  with pytest.raises(ValueError, match=r"--modules-to-save norm contradicts .* has none\."):
    parse("", [*resume[:2], "--modules-to-save", "norm"])


@pytest.mark.parametrize(
  ("yaml", "message"),
  [
    ("targets: [q_proj, 3]", "targets: ['q_proj', 3] is neither a text nor a list of texts"),
    ("targets: []", "is neither a text nor a list"),
    ("targets: ','", "targets: ',' names no layer"),
    ("targets: ['', ' ']", "names no layer"),
    ("targets: [all-linear, lm_head]", "names all-linear beside others"),
  ],
)
def test_lists_of_targets_that_are_none_are_refused(tmp_path, yaml, message):
  with pytest.raises(ValueError) as error:
    parse("", ["--config", str(write(tmp_path / "run.yaml", yaml + "\n"))])
  assert message in str(error.value)


def test_a_list_with_spaces_is_told_of_commas(capsys):
  with pytest.raises(SystemExit):
    parse("", "--targets q_proj v_proj".split())
  assert "unrecognized arguments: v_proj. What is several has commas" in capsys.readouterr().err
