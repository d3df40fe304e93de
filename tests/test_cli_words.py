"""The command line itself: help that fits a terminal, and the right word for a mistyped one."""

import argparse

import pytest

from workshop_utils.cli import build_parser, main


def parsers(parser: argparse.ArgumentParser):
    """``parser`` and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def test_every_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = list(parsers(build_parser()))
    assert len(found) > 20
    assert [(one.prog, line) for one in found for line in one.format_help().splitlines() if len(line) > 80] == []



@pytest.mark.parametrize("words", [["models"], ["preflight"]])
def test_tables_fit_80_columns(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    main(words)
    text = capsys.readouterr().out
    assert text and all(len(line) <= 80 for line in text.splitlines())


def test_a_table_keeps_its_columns_where_no_terminal_is(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    main(["models"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "parameters", "source", "size", "licence", "gated", "present"]


@pytest.mark.parametrize(("words", "meant"), [
    ("inspct x", "inspect"), ("fintune a=b", "finetune"), ("models fech x", "fetch"), ("nim stge x", "stage"),
    ("export x --to hf-pfet", "hf-peft"), ("conform x --reader vlm", "vllm"),
    ("verify x --deeep", "--deep"), ("inspect x --tensor-s", "--tensors"), ("nim run --image a:1 --stroe x", "--store"),
])  # fmt: skip
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
    assert "unknown option --dta" in (said := capsys.readouterr().err) and "Did you mean --data?" in said
