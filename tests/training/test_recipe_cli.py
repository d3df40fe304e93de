"""``workshop recipe``: options from the command line, YAML and presets; the dry run and the list,
without NeMo."""

import os
import subprocess
import sys

import pytest
import yaml

from workshop_utils.cli import main, recipe
from workshop_utils.core.errors import DataError
from workshop_utils.training.recipe import index, options


def dry_run(capsys, *words):
    assert main(["recipe", *words, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_dry_run_prints_every_value_on_a_line_of_its_own(capsys):
    assert main(["recipe", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "global_batch_size: 64" in lines and "data_parallel_size: 1" in lines
    sizes = ["world_size", "data_parallel_size", "global_batch_size"]
    names = [line.partition(":")[0] for line in lines if not line.startswith("#")]
    assert names == [*sizes, *options.FIELDS]


def test_command_line_over_yaml_over_preset_over_default(capsys, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("max_steps: 77\nseed: 5\nlearning_rate: 3e-4\n")
    values = dry_run(capsys, "--preset", "cpu", "--config", str(file), "--max_steps", "99")
    assert (values["max_steps"], values["seed"], values["learning_rate"]) == (99, 5, 3e-4)
    assert (values["lora_dim"], values["max_samples"]) == (32, 16)  # of the preset
    assert values["random_seed"] == 42  # the default
    words = ["--config", str(file), "--max_steps", "900", "--learning_rate", "none"]
    assert dry_run(capsys, *words)["learning_rate"] == 1e-4  # the recipe's


def test_what_is_left_to_the_recipe_is_shown_as_its_numbers_and_places(capsys):
    """Null stands only where there is nothing: in the index there are the recipe's own numbers."""
    values, own = dry_run(capsys), index.find("qwen3_8b").schemes["lora"]
    assert own.keys() == {
        *("learning_rate", "warmup_steps", "lora_dim", "lora_alpha", "lora_dropout"),
        "lora_target_modules",
    }
    assert {name: values[name] for name in own} == own
    layers = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
    assert values["lora_target_modules"] == layers
    assert values["nemo_logs_dir"] == f"{values['output_dir']}/nemo_logs"
    assert values["test_path"] == f"{values['data_dir']}/test.jsonl"
    nulls = [name for name, value in values.items() if value is None]
    assert nulls == ["hfdc_custom_converter"]
    full, theirs = dry_run(capsys, "--full_ft"), index.find("qwen3_8b").schemes["full_ft"]
    assert (full["learning_rate"], full["lora_dim"]) == (theirs["learning_rate"], None)
    assert dry_run(capsys, "--test_path", "mine.jsonl")["test_path"] == "mine.jsonl"


def test_the_dry_run_of_a_preset_is_a_configuration_again(capsys, tmp_path):
    values = dry_run(capsys, "--preset", "cpu")
    given = {name: value for name, value in values.items() if name in options.FIELDS}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(given))
    assert dry_run(capsys, "--config", str(tmp_path / "again.yaml")) == values


def listing(folder):
    """Every name below ``folder`` with what a write would change of it."""
    stats = {path: path.lstat() for path in [folder, *folder.rglob("*")]}
    return {path: (one.st_ino, one.st_size, one.st_mtime_ns) for path, one in stats.items()}


@pytest.mark.parametrize("action", recipe.ACTIONS)
def test_a_dry_run_leaves_disk_and_environment_as_they_were(action, tmp_path, monkeypatch):
    for name in ("HOME", "WORKSHOP_ROOT"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "output": "b"}\n')
    (tmp_path / "base/context").mkdir(parents=True)
    words = ["--preset", "cpu", "--hfdc_dataset_name", "rows.jsonl", "--nemo_ckpt_dir", "base"]
    main(["recipe", "--list"])  # what any command sets of the environment is set
    before, environment = listing(tmp_path), dict(os.environ)
    assert main(["recipe", action, *words, "--dry-run"]) == 0
    assert listing(tmp_path) == before and dict(os.environ) == environment


def test_flags_can_be_switched_on_and_off(capsys):
    values = dry_run(capsys, "--no_merge", "--no-resume", "--use_wandb")
    assert (values["no_merge"], values["resume"], values["use_wandb"]) == (True, False, True)
    assert dry_run(capsys, "--no_merge", "--merge")["no_merge"] is False


def test_what_would_record_nothing_is_said(capsys):
    short = ["recipe", "--preset", "cpu", "--dry-run", "--val_check_interval", "5"]
    short += ["--enable_speed_monitor", "--enable_pytorch_profiler", "--max_steps"]
    notes = {
        name: f"note: {name} records nothing in a run of fewer than {least} steps; max_steps is "
        for name, least in (("enable_speed_monitor", 11), ("enable_pytorch_profiler", 10))
    }
    for steps, said in (("11", []), ("10", ["enable_speed_monitor"]), ("9", list(notes))):
        assert main([*short, steps]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert sorted(lines) == sorted(f"{notes[name]}{steps}." for name in said)


@pytest.mark.parametrize("name", options.FIELDS)
def test_every_option_is_one_of_the_command_line(name, capsys):
    words, value = [f"--{name}"], options.default(name)
    if not isinstance(value, bool):
        words.append("none" if value is None else "{}" if value == {} else str(value))
    code = main(["recipe", *words, "--dry-run"])
    # use_modelopt and two profilers' friends are refused by name
    assert code == 0 or name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_step 5", "--max_step is no option. Did you mean --max_steps"),
        ("--max-steps 5", "Did you mean --max_steps"),
        ("--global_batch_size 5", "micro_batch_size x accumulate_grad_batches"),
        ("--max_steps ten", "--max_steps is 'ten'; it must be a whole number"),
        ("trian", "Did you mean train"),
        ("cpu", "--preset cpu"),
        ("train export", "There are: train"),
        ("--preset gpu", "There are: cpu"),
        ("--config absent.yaml", "absent.yaml"),
        ("--hfdc_field_mapping {a:b}", "single quotes"),
        ("--recipe_cls_name llama3_1_8b", "llama31_8b"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(words, message, capsys):
    assert main(["recipe", *words.split()]) == 1
    assert message in capsys.readouterr().err


def test_the_list_shows_what_can_be_fine_tuned(capsys):
    assert main(["recipe", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "lora, dora, full_ft" in lines["llama32_1b"]
    assert lines["llama3_8b_16k"].split()[1] == "-"


def test_help_is_grouped_by_the_references_scripts(capsys):
    with pytest.raises(SystemExit):
        main(["recipe", "--help"])
    text = capsys.readouterr().out
    places = [text.index(script) for script in options.SCRIPTS]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ("--dry-run", "torch nemo transformers lightning nemo_run datasets"),
        ("--preset cpu --dry-run", "torch nemo transformers lightning nemo_run datasets"),
        ("--list", "torch nemo transformers lightning nemo_run datasets pydantic"),
        ("--help", "torch nemo transformers lightning nemo_run datasets pydantic"),
    ],
)
def test_none_of_it_imports_what_takes_long(words, heavy):
    program = f"""if True:
        import sys
        from workshop_utils.cli import main
        try:
            main({["recipe", *words.split()]!r})
        except SystemExit:
            pass
        print(sorted(set({heavy.split()!r}) & set(sys.modules)))"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("option", "value"),
    [("hfdc_dataset_name", "./absent.jsonl"), ("hf_model_id", "smollm2-135m-instrukt")],
)
def test_a_missing_source_is_found_before_the_import(option, value, phases, capsys):
    assert main(["recipe", "--preset", "cpu", f"--{option}", value]) == 1
    assert value.removeprefix("./") in capsys.readouterr().err and not phases


def test_several_machines_are_planned_and_not_started(phases, capsys):
    words = ["recipe", "--preset", "cpu", "--num_nodes", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert "note: num_nodes is above 1" in capsys.readouterr().err
    assert main([*words, "all"]) == 1 and not phases
    said = capsys.readouterr().err
    assert said.startswith("error: num_nodes is above 1") and "SlurmExecutor" in said


@pytest.fixture
def phases(monkeypatch):
    """The phases themselves have tests of their own; here they only say that they were called."""
    done = []
    for name in recipe.PHASES:
        monkeypatch.setitem(recipe.PHASES, name, lambda resolved, name=name: done.append(name))
    return done


def test_phases_run_in_order_and_stop_at_the_first_failure(phases, monkeypatch, capsys):
    assert main(["recipe", "--preset", "cpu", "all"]) == 0
    assert phases == ["import", "data", "train", "test", "export"]
    phases.clear()
    assert main(["recipe", "--preset", "cpu"]) == 0
    assert phases == ["import", "data", "train"]
    phases.clear()

    def fails(resolved):
        raise DataError("no column of that name")

    monkeypatch.setitem(recipe.PHASES, "data", fails)
    assert main(["recipe", "--preset", "cpu", "all"]) == 1
    assert phases == ["import"] and "no column" in capsys.readouterr().err
