"""The command line itself: help that fits a terminal, and the right word for a mistyped one."""

import argparse
import re
import shlex
import shutil
from pathlib import Path

import pytest
from places import ROOT
from tiny_model import make_tiny_model

from workshop_utils.checkpoints.sources import catalogue, directory
from workshop_utils.checkpoints.sources.catalogue import chosen_model
from workshop_utils.checkpoints.sources.proxy import without_credentials
from workshop_utils.cli import build_parser, main
from workshop_utils.core import paths
from workshop_utils.core.errors import WorkshopError
from workshop_utils.serving.nim.docker import Nim
from workshop_utils.training.script import predict as predictions
from workshop_utils.training.script.configuration import refuse_mistyped
from workshop_utils.training.script.plan import SCRIPT

README = (ROOT / "README.md").read_text(encoding="utf-8")
IMAGE = "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.6"


def parsers(parser: argparse.ArgumentParser):
    """``parser`` and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def test_every_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    helps = {parser.prog: parser.format_help() for parser in parsers(build_parser())}
    assert len(helps) > 20
    assert [line for text in helps.values() for line in text.splitlines() if len(line) > 80] == []


def test_tables_fit_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("models", "preflight"):
        main([command])
        text = capsys.readouterr().out
        assert text and all(len(line) <= 80 for line in text.splitlines())
    monkeypatch.delenv("COLUMNS")
    main(["models"])
    columns = ["name", "parameters", "source", "size", "licence", "gated", "present"]
    assert capsys.readouterr().out.splitlines()[0].split() == columns


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("inspct x", "inspect"),
        ("fintune a=b", "finetune"),
        ("models fech x", "fetch"),
        ("nim stge x", "stage"),
        ("export x --to hf-pfet", "hf-peft"),
        ("conform x --reader vlm", "vllm"),
        ("verify x --deeep", "--deep"),
        ("inspect x --tensor-s", "--tensors"),
        ("nim run --image a:1 --stroe x", "--store"),
        # Options that are required:
        ("conform x --raeder vllm", "--reader"),
        ("serve --bse x", "--base"),
        ("export x --too hf-peft", "--to"),
    ],
)
def test_the_right_word_for_a_mistyped_one(words, meant, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


def test_nothing_is_offered_for_what_is_like_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["xyzzy"])
    said = capsys.readouterr().err
    assert "choose from 'bridge'" in said and "Did you mean" not in said


@pytest.mark.parametrize("command", ["finetune", "predict"])
def test_a_mistyped_option_before_overrides(command, capsys):
    assert main([command, "--dta", "x.jsonl", "model.restore_from_path=x"]) == 1
    said = capsys.readouterr().err
    assert "unknown option --dta" in said and "Did you mean --data?" in said


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("+modle.restore_from_path", "model.restore_from_path"),
        ("++modle.restore_from_path", "model.restore_from_path"),
        ("+trainer.max_step", "trainer.max_steps"),
        ("++trainer.max_step", "trainer.max_steps"),
        ("+model.peft.lora_tuning.adpater_dim", "model.peft.lora_tuning.adapter_dim"),
        ("++trainer.max_stepz", "trainer.max_steps"),
        ("+trianer.new", "trainer.new"),
    ],
)
def test_a_mistyped_key_that_hydra_would_add(key, meant):
    for script in (SCRIPT, predictions.SCRIPT) if "lora" not in key else (SCRIPT,):
        with pytest.raises(WorkshopError, match=re.escape(f"Did you mean {meant},")):
            refuse_mistyped(script, {key: "1"})


def test_a_key_that_is_new_is_left_to_hydra():
    new = "+model.virtual_pipeline_model_parallel_size ++model.seed +trainer.max_time +mine.own"
    refuse_mistyped(SCRIPT, dict.fromkeys([*new.split(), "model.sed"], "1"))


@pytest.mark.parametrize("command", [["finetune", "--dry-run"], ["predict", "--data", "x.jsonl"]])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("modle.restore_from_path=x", "Did you mean model.restore_from_path?"),
        ("+modle.restore_from_path=x", "Did you mean model.restore_from_path,"),
        ("++model.restore_from_path=x", "Give model.restore_from_path as plain key=value"),
    ],
)
def test_a_mistyped_base(command, word, said, capsys):
    assert main([*command, word]) == 1
    error = capsys.readouterr().err
    assert said in error and "is missing" not in error


@pytest.mark.parametrize(
    "command",
    [
        "import nope",
        "models fetch nope",
        "generate --model nope hi",
        "evaluate --model nope",
        "serve --base nope",
        "recipe --hf_model_id nope --dry-run",
    ],
)
def test_an_unknown_model_lists_those_that_there_are(command, capsys):
    assert main(command.split()) != 0
    error = capsys.readouterr().err
    assert "no model is called 'nope'" in error and all(name in error for name in catalogue())


def test_an_unknown_model_of_the_settings_says_where_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_MODEL", "smolm2-135m-instruct")
    meant = "^WORKSHOP_MODEL: .* Did you mean smollm2-135m-instruct"
    with pytest.raises(WorkshopError, match=meant):
        chosen_model()
    monkeypatch.delenv("WORKSHOP_MODEL")
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    (tmp_path / "workshop.yaml").write_text("model: nope\n")
    with pytest.raises(WorkshopError, match=r"^workshop\.yaml, model: no model"):
        chosen_model()


def test_a_model_that_is_not_here_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "huggingface_model", lambda name: tmp_path / name)
    with pytest.raises(WorkshopError, match="`workshop models fetch llama-3.2-1b-instruct`"):
        directory("llama-3.2-1b-instruct", paths.huggingface_model)
    known = "/nope does not exist: give the directory of a model, or a name from `workshop models`"
    with pytest.raises(WorkshopError, match=known):
        directory("/nope")


@pytest.mark.parametrize(
    "words",
    [
        "generate --adapter /nope hi",
        "generate --file /nope",
        "evaluate --adapter /nope --data {rows}",
        "evaluate --data /nope",
        "evaluate --data {rows} --train /nope",
        "export /nope --to nemo",
        "nim stage /nope --name a",
        "serve --base {model} --store /nope",
        "serve --base /nope",
        "convert {model} {out} --to nemo2 --tokenizer /nope",
        "predict --data {rows} model.restore_from_path=/nope",
        "bridge /nope",
        "conform /nope --reader peft",
        "inspect /nope",
        "verify /nope",
        "migrate /nope",
        "recipe --config /nope",
        "recipe --hf_model_id /nope --dry-run",
        "finetune model.restore_from_path=/nope",
    ],
)
def test_a_missing_path_is_named_first(words, tiny, tmp_path, monkeypatch, capsys):
    own = "workshop_utils.inference.generate.model_directory"
    monkeypatch.setattr(own, lambda given=None: directory(given or tiny))
    for name, fault in (
        ("workshop_utils.inference.generate.generate", "it answers"),
        ("transformers.AutoModelForCausalLM.from_pretrained", "a model is loaded"),
        ("workshop_utils.runtime.processes.run_quietly", "something is started"),
    ):
        monkeypatch.setattr(name, lambda *_, fault=fault, **__: pytest.fail(fault))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input": "a", "output": "b"}\n')
    assert main(words.format(rows=rows, model=tiny, out=tmp_path / "out").split()) != 0
    assert "/nope" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def line_of_readme(start: str) -> list[str]:
    """The README's command line that begins with ``start``, as words, without its remark."""
    (line,) = (line for line in README.splitlines() if line.startswith(start))
    return shlex.split(line, comments=True)[1:]


def test_the_readmes_line_about_migration_works(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(line_of_readme("workshop migrate ")) == 0
    assert "llm.pretrain(" in capsys.readouterr().out


def test_the_readmes_docker_command_needs_no_docker(monkeypatch, capsys):
    for name in ("NGC_API_KEY", "WORKSHOP_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(ROOT)
    words = line_of_readme("workshop nim run ")
    assert "--print" in words and main(words) == 0
    assert '"$PWD"/runs/store:/opt/nim/loras:ro' in capsys.readouterr().out


def test_one_store_for_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    store = tmp_path / "runs" / "store"
    assert Nim(IMAGE).store == store
    parser = build_parser()
    for words in ("stage x --name a", f"run --image {IMAGE}", f"compose --image {IMAGE}"):
        assert parser.parse_args(["nim", *words.split()]).store == store
    served, server = [], "workshop_utils.serving.server.server"
    monkeypatch.setattr(f"{server}.Service", lambda *words: served.append(words[1]))
    monkeypatch.setattr(f"{server}.run", lambda *_: None)
    for words in ([], ["--no-store"], ["--store", "other"]):
        assert main(["serve", "--base", "x", *words]) == 0
    assert served == [store, None, Path("other")] and store.is_dir()


def test_migrate_drops_no_key(tmp_path, capsys):
    text = "model:\n  hidden_size: 65\n  ffn_hidden_size: 9\ntrainer:\n  max_steps: 5\n"
    (tmp_path / "b.yaml").write_text(text)
    assert main(["migrate", str(tmp_path / "b.yaml")]) == 0
    said = capsys.readouterr().out
    kept = "model.config.hidden_size = 65", "model.config.ffn_hidden_size = 9", "max_steps=5"
    assert all(line in said for line in kept)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "hf")


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """An empty root with a Hugging Face model, a person's folder and a person's file."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "hf")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    (tmp_path / "notes.md").write_text("mine")
    return tmp_path


@pytest.mark.parametrize("target", ["precious", "notes.md", "hf", "hf/inside", ".", "notes.md/x"])
@pytest.mark.parametrize(
    "command",
    ["import {hf} --out {target} --overwrite", "convert {hf} {target} --to nemo2 --overwrite"],
)
def test_overwrite_replaces_checkpoints_alone(here, command, target, capsys):
    def contents() -> dict:
        return {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}

    before = contents()
    assert main(command.format(hf=here / "hf", target=here / target).split()) == 1
    said = r"error: .*(exists and is no checkpoint|cannot lie inside|cannot be written)"
    assert re.match(said, capsys.readouterr().err)
    assert contents() == before


@pytest.mark.parametrize("action", ["compose", "kubernetes"])
def test_a_written_file_takes_no_strangers_place(here, action, capsys):
    command = ["nim", action, "--image", IMAGE, "--out"]
    assert main([*command, str(here / "notes.md")]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert (here / "notes.md").read_text() == "mine"
    for more in ([], ["--gpus", "2"]):
        assert main([*command, str(here / "nim.yaml"), *more]) == 0


def test_a_prompt_file_that_is_none(here, capsys):
    (here / "bin").write_bytes(b"\xff\xfe\x00")
    faults = {"precious": "is not a file", "bin": "is not UTF-8 text", "nope": "does not exist"}
    for name, said in faults.items():
        assert main(["generate", "--file", str(here / name)]) == 1
        assert said in capsys.readouterr().err


def test_a_system_error_is_a_sentence(here, capsys):
    assert main(["verify", str(here / "hf"), "--write-manifest", str(here / "precious")]) == 1
    assert capsys.readouterr().err.endswith("error: precious: Is a directory.\n")
    assert main(["verify", str(here / ("x" * 300))]) != 0
    assert "Traceback" not in (error := capsys.readouterr().err) and error.startswith("error: ")


@pytest.mark.parametrize(
    "text",
    [
        "http://bob:secret@host:1",
        "http://bob:sec#ret@host:1",
        "http://bob:sec/ret@host",
        "http://bob:secret@[::1",
        "at http://a:secret@b: no",
    ],
)
def test_no_password_of_a_proxy_is_shown(text):
    assert "sec" not in without_credentials(text) and "bob" not in without_credentials(text)
