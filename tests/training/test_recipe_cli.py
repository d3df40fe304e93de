"""``workshop recipe``: options from the command line, YAML and presets; the dry run and the list,
without NeMo."""

import subprocess
import sys

import pytest
import yaml

from workshop_utils.cli import main
from workshop_utils.training.recipe import index, options


def dry_run(capsys, *words):
    assert main(["recipe", *words, "--dry-run"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_the_dry_run_prints_every_value_on_a_line_of_its_own(capsys):
    assert main(["recipe", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "global_batch_size: 64" in lines
    assert "data_parallel_size: 1" in lines
    assert [line.partition(":")[0] for line in lines if not line.startswith("#")] == [
        "world_size",
        "data_parallel_size",
        "global_batch_size",
        *options.names(),
    ]


def test_command_line_over_yaml_over_preset_over_default(capsys, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("max_steps: 77\nseed: 5\nlearning_rate: 3e-4\n")
    found = dry_run(capsys, "--preset", "cpu", "--config", str(file), "--max_steps", "99")
    assert (found["max_steps"], found["seed"], found["learning_rate"]) == (99, 5, 3e-4)
    assert (found["lora_dim"], found["max_samples"]) == (32, 16)  # of the preset
    assert found["random_seed"] == 42  # the default
    assert (
        dry_run(capsys, "--config", str(file), "--max_steps", "900", "--learning_rate", "none")[
            "learning_rate"
        ]
        == 1e-4
    )  # the recipe's


def test_what_is_left_to_the_recipe_is_shown_as_its_numbers_and_places(capsys):
    """Null stands only where there is nothing: in the index there are the recipe's own numbers."""
    found = dry_run(capsys)
    own = index.find("qwen3_8b").schemes["lora"]
    assert own.keys() == {
        "learning_rate",
        "warmup_steps",
        "lora_dim",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
    }
    assert {name: found[name] for name in own} == own and found["lora_target_modules"] == [
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    ]
    assert (
        found["nemo_logs_dir"] == f"{found['output_dir']}/nemo_logs"
        and found["test_path"] == f"{found['data_dir']}/test.jsonl"
    )
    assert [name for name, value in found.items() if value is None] == ["hfdc_custom_converter"]
    full = dry_run(capsys, "--full_ft")
    assert (
        full["learning_rate"] == index.find("qwen3_8b").schemes["full_ft"]["learning_rate"]
        and full["lora_dim"] is None
    )
    assert dry_run(capsys, "--test_path", "mine.jsonl")["test_path"] == "mine.jsonl"


def test_the_dry_run_of_a_preset_is_a_configuration_again(capsys, tmp_path):
    found = dry_run(capsys, "--preset", "cpu")
    computed = [name for name in found if name not in options.names()]
    (tmp_path / "again.yaml").write_text(
        yaml.safe_dump({name: value for name, value in found.items() if name not in computed})
    )
    assert dry_run(capsys, "--config", str(tmp_path / "again.yaml")) == found


def test_flags_can_be_switched_on_and_off(capsys):
    found = dry_run(capsys, "--no_merge", "--no-resume", "--use_wandb")
    assert (found["no_merge"], found["resume"], found["use_wandb"]) == (True, False, True)
    assert dry_run(capsys, "--no_merge", "--merge")["no_merge"] is False


def test_what_would_record_nothing_is_said(capsys):
    short = [
        "recipe",
        "--preset",
        "cpu",
        "--dry-run",
        "--val_check_interval",
        "5",
        "--enable_speed_monitor",
        "--enable_pytorch_profiler",
    ]
    assert main([*short, "--max_steps", "10"]) == 0
    assert capsys.readouterr().err == (
        "note: enable_speed_monitor records nothing in a run of fewer than 11 steps; max_steps "
        "is 10.\n"
    )
    assert main([*short, "--max_steps", "9"]) == 0
    assert (
        "note: enable_pytorch_profiler records nothing in a run of fewer than 10 steps"
        in capsys.readouterr().err
    )
    assert main([*short, "--max_steps", "11"]) == 0 and not capsys.readouterr().err


@pytest.mark.parametrize("name", options.names())
def test_every_option_is_one_of_the_command_line(name, capsys):
    if isinstance(options.default(name), bool):
        words = [f"--{name}"]
    else:
        value = options.default(name)
        words = [f"--{name}", "none" if value is None else "{}" if value == {} else str(value)]
    code = main(["recipe", *words, "--dry-run"])
    assert (
        code == 0 or f"{name}" in capsys.readouterr().err
    )  # use_modelopt and two profilers' friends are refused by name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_step", "5"], "--max_step is no option. Did you mean --max_steps"),
        (["--max-steps", "5"], "Did you mean --max_steps"),
        (["--global_batch_size", "5"], "micro_batch_size x accumulate_grad_batches"),
        (["--max_steps", "ten"], "--max_steps is 'ten'; it must be a whole number"),
        (["trian"], "Did you mean train"),
        (["cpu"], "--preset cpu"),
        (["train", "export"], "There are: train"),
        (["--preset", "gpu"], "There are: cpu"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--hfdc_field_mapping", "{a: b}"], "single quotes"),
        (["--recipe_cls_name", "llama3_1_8b"], "llama31_8b"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(words, message, capsys):
    assert main(["recipe", *words]) == 1
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
    "words", [["--dry-run"], ["--preset", "cpu", "--dry-run"], ["--list"], ["--help"]]
)
def test_none_of_it_imports_torch_or_nemo(words):
    program = (
        "import sys; from workshop_utils.cli import main\ntry: "
        f"main({['recipe', *words]!r})\nexcept SystemExit: pass\n"
    )
    program += (
        "print(sorted({'torch', 'nemo', 'transformers', 'lightning', 'nemo_run', 'datasets'} & "
        "set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("option", "value"),
    [("hfdc_dataset_name", "./absent.jsonl"), ("hf_model_id", "smollm2-135m-instrukt")],
)
def test_a_missing_source_is_found_before_the_import(option, value, monkeypatch, capsys):
    from workshop_utils.cli import recipe

    monkeypatch.setattr(recipe, "_import", lambda resolved: pytest.fail("imported"))
    assert main(["recipe", "--preset", "cpu", f"--{option}", value]) == 1
    assert value.removeprefix("./") in capsys.readouterr().err


def test_several_machines_are_planned_and_not_started(monkeypatch, capsys):
    from workshop_utils.cli import recipe

    monkeypatch.setattr(recipe, "_import", lambda resolved: pytest.fail("imported"))
    words = ["recipe", "--preset", "cpu", "--num_nodes", "2"]
    assert main([*words, "--dry-run"]) == 0
    assert "note: num_nodes is above 1" in capsys.readouterr().err
    assert main([*words, "all"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: num_nodes is above 1") and "SlurmExecutor" in said


def test_phases_run_in_order_and_stop_at_the_first_failure(monkeypatch, capsys):
    """The phases themselves have tests of their own; here they only say that they were called."""
    from workshop_utils.cli import recipe
    from workshop_utils.core.errors import DataError

    done = []
    for name in ("import", "data", "train", "test", "export"):
        monkeypatch.setattr(recipe, f"_{name}", lambda resolved, name=name: done.append(name))
    assert main(["recipe", "--preset", "cpu", "all"]) == 0
    assert done == ["import", "data", "train", "test", "export"]
    done.clear()
    assert main(["recipe", "--preset", "cpu"]) == 0
    assert done == ["import", "data", "train"]
    done.clear()

    def fails(resolved):
        raise DataError("no column of that name")

    monkeypatch.setattr(recipe, "_data", fails)
    assert main(["recipe", "--preset", "cpu", "all"]) == 1
    assert done == ["import"]
    assert "no column" in capsys.readouterr().err
