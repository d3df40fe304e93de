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
        (path / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + bytes(8)
        )

    config = {
        "model_type": EVIL,
        "transformers_version": EVIL,
        "quantization_config": {"quant_method": EVIL},
        "torch_dtype": EVIL,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / f"{EVIL}.py").write_text("")
    write(1)
    return path, write


def harmless(text: str) -> bool:
    return all(
        line.isprintable() and not line.startswith("sound: forged") for line in text.split("\n")
    )


@pytest.mark.parametrize(
    "command",
    [
        ["inspect"],
        ["inspect", "--tensors"],
        ["inspect", "--shards"],
        ["inspect", "--json"],
        ["verify"],
        ["verify", "--json"],
    ],
)
@pytest.mark.parametrize("elements", [1, 2])
def test_commands(model, capsys, command, elements):
    path, write = model
    write(elements)
    main([command[0], str(path), *command[1:]])
    out, err = capsys.readouterr()
    assert "forged" in out + err
    assert harmless(out + err)


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
    assert "\x1b" not in error
    assert "\u202e" not in error


def test_the_tree(model):
    found = identify(model[0])
    assert harmless(as_text(found))
    assert harmless(as_html(found))


def test_other_texts_stay():
    assert terminal.one_line("模型 é – 😀 \\x1b") == "模型 é – 😀 \\x1b"
    assert terminal.one_line("a\tb\n") == "a\\tb\\n"
    assert terminal.lines("a\tb\nc\x1b[0m\n") == "a\tb\nc\\x1b[0m\n"
