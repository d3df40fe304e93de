"""Names and values of a stranger's file are printed without what a terminal would obey, and cannot
forge a line."""

import json

import pytest

from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.verify.tree import as_html, as_text
from workshop_utils.checkpoints.verify.verify import require_sound
from workshop_utils.cli import main
from workshop_utils.core import terminal
from workshop_utils.core.errors import CheckpointError

EVIL = "\x1b]0;title\x07\x1b[31m\r\nsound: forged\u202e\x85"


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    path = tmp_path / "model"
    path.mkdir()

    def write(second: int) -> None:
        """Two tensors of one and ``second`` elements, in four bytes each."""
        entries = {
            EVIL: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            f"{EVIL}.b": {"dtype": "F32", "shape": [second], "data_offsets": [4, 8]},
        }
        header = json.dumps(entries).encode()
        length = len(header).to_bytes(8, "little")
        (path / "model.safetensors").write_bytes(length + header + bytes(8))

    config = dict.fromkeys(("model_type", "transformers_version", "torch_dtype"), EVIL)
    config["quantization_config"] = {"quant_method": EVIL}
    (path / "config.json").write_text(json.dumps(config))
    (path / f"{EVIL}.py").write_text("")
    write(1)
    return path, write


def harmless(text: str) -> bool:
    lines = text.split("\n")
    return all(line.isprintable() and not line.startswith("sound: forged") for line in lines)


@pytest.mark.parametrize("elements", [1, 2])
def test_commands(model, capsys, elements):
    path, write = model
    write(elements)
    for words in (
        "inspect",
        "inspect --tensors",
        "inspect --shards",
        "inspect --json",
        "verify",
        "verify --json",
    ):
        command, *options = words.split()
        main([command, str(path), *options])
        text = "".join(capsys.readouterr())
        assert "forged" in text and harmless(text), words


def test_errors_and_warnings(model, capsys):
    path, write = model
    write(2)
    with pytest.raises(CheckpointError) as raised:
        require_sound(path)
    assert harmless(str(raised.value))
    require_sound(path, trust=True)
    assert harmless(capsys.readouterr().err)
    assert main(["inspect", str(path / f"nothing{EVIL}")]) == 2
    assert main(["generate", "--model", str(path / f"nothing{EVIL}"), "hello"]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\u202e" not in error


def test_the_tree(model):
    checkpoint = identify(model[0], lambda fault: None)
    assert harmless(as_text(checkpoint)) and harmless(as_html(checkpoint))


def test_other_texts_stay():
    assert terminal.one_line("模型 é – 😀 \\x1b") == "模型 é – 😀 \\x1b"
    assert terminal.one_line("a\tb\n") == "a\\tb\\n"
    assert terminal.lines("a\tb\nc\x1b[0m\n") == "a\tb\nc\\x1b[0m\n"
