"""What writers of checkpoints leave in their pickles is read, and ``getattr`` is taken for members
of enumerations and for nothing else."""

import enum
import importlib
import io
import pickle
import pickletools
import shutil
from pathlib import Path

import pytest
from places import TESTS

from workshop_utils.checkpoints.convert import convert
from workshop_utils.checkpoints.convert.bridge import bridge
from workshop_utils.checkpoints.formats import pickled_names, restricted_pickle, torch_archive
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.checkpoints.formats.tensor import DTYPE_BYTES
from workshop_utils.checkpoints.formats.values import read_tensor
from workshop_utils.checkpoints.verify.verify import verify
from workshop_utils.core.errors import UnsafeCheckpoint

SAMPLES = TESTS / "data" / "checkpoints"
GENUINE = [
    "megatron-bridge-0.3.1/llama/iter_0000000",
    "megatron-bridge-0.3.1/lora/iter_0000001",
    "megatron-core-0.19.2/iter_0000003",
    "megatron-bridge-0.6.2/llama/iter_0000000",
    "megatron-bridge-0.6.2/lora/iter_0000001",
    "python-3.11.2/iter_0000003",
]

ENUM = b"cmegatron.core.transformer.enums\nAttnBackend\n"
NAME = b"X\x05\x00\x00\x00flash"
GETATTR = b"c__builtin__\ngetattr\n"


class ByName(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.0 to 3.11.4 does, in any Python."""

    def reducer_override(self, value):
        return (
            (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented
        )


def by_name(value, protocol: int) -> bytes:
    stream = io.BytesIO()
    ByName(stream, protocol).dump(value)
    return stream.getvalue()


def calls(pickled: bytes) -> list[str]:
    """What the readers of both kinds of file say that ``pickled`` would call; they agree whether it
    is anything."""
    found = torch_archive.scan_bare(pickled)
    assert bool(restricted_pickle.survey(pickled, "x")[0]) == bool(found)
    return found


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_members_of_every_enumeration(protocol):
    tried = 0
    for text, members, _ in pickled_names.ENUMERATIONS:
        module, name = text.rsplit(".", 1)
        if module.startswith("transformer_engine"):  # is not installed
            continue
        kind = getattr(importlib.import_module(module), name, None)
        if kind is None:  # of a later Megatron-Core
            continue
        assert {member.name for member in kind} <= set(members.split()), text
        # One after the other: the class and getattr come from the memo from the second member on.
        assert calls(by_name([list(kind), {"again": list(kind)}], protocol)) == [], text
        assert calls(pickle.dumps(list(kind), protocol)) == [], text
        tried += 1
    assert tried > 8


@pytest.mark.parametrize(
    ("pickled", "called"),
    {
        "a chain": (
            GETATTR + GETATTR + ENUM + NAME + b"\x86R" + b"X\x04\x00\x00\x00name\x86R.",
            "builtins.getattr(",
        ),
        "a chain through a class": (
            GETATTR + GETATTR + ENUM + b"X\x09\x00\x00\x00__class__\x86R" + NAME + b"\x86R.",
            "__class__",
        ),
        "underscores": (
            GETATTR + ENUM + b"X\x0e\x00\x00\x00__subclasses__\x86R.",
            "__subclasses__",
        ),
        "one underscore": (GETATTR + ENUM + b"X\x0c\x00\x00\x00_member_map_\x86R.", "_member_map_"),
        "a member that does not exist": (GETATTR + ENUM + b"X\x05\x00\x00\x00smash\x86R.", "smash"),
        "a dotted name": (GETATTR + ENUM + b"X\x0a\x00\x00\x00flash.name\x86R.", "flash.name"),
        "a class that is no enumeration": (
            GETATTR + b"ctorch\nSize\n" + NAME + b"\x86R.",
            "getattr",
        ),
        "a class that only describes": (
            GETATTR + b"ctorch.distributed.checkpoint.metadata\nMetadata\n" + NAME + b"\x86R.",
            "getattr",
        ),
        "an enumeration that is not on the list": (
            GETATTR + b"cenum\nEnum\n" + NAME + b"\x86R.",
            "enum.Enum",
        ),
        "a module": (GETATTR + b"cos\npath\n" + b"X\x06\x00\x00\x00system\x86R.", "system"),
        "a name from the memo": (NAME + b"q\x000" + GETATTR + ENUM + b"h\x00\x86R.", "flash"),
        "a name from the memo, long": (
            NAME + b"r\x00\x00\x00\x000" + GETATTR + ENUM + b"j\x00\x00\x00\x00\x86R.",
            "flash",
        ),
        "a name from the memo, protocol 0": (
            NAME + b"p0\n0" + GETATTR + ENUM + b"g0\n\x86R.",
            "flash",
        ),
        "with no keywords": (GETATTR + ENUM + NAME + b"\x86}\x92.", "getattr"),
        "as an instance": (b"(" + ENUM + NAME + b"i__builtin__\ngetattr\n.", "getattr"),
        "the arguments from the memo": (
            ENUM + b"X\x05\x00\x00\x00smash\x86q\x000" + GETATTR + b"h\x00R.",
            "smash",
        ),
        "a name that is no text": (GETATTR + ENUM + b"C\x05flash\x86R.", "getattr"),
        "a default": (GETATTR + ENUM + NAME + b"K\x01\x87R.", "getattr"),
        "one argument": (GETATTR + ENUM + b"\x85R.", "getattr"),
        "no member, as an instance": (
            b"(" + ENUM + b"X\x05\x00\x00\x00smash" + b"i__builtin__\ngetattr\n.",
            "smash",
        ),
        "named only": (GETATTR + b".", "builtins.getattr"),
        "in a list": (b"]" + GETATTR + b"a.", "builtins.getattr"),
        "changed": (GETATTR + b"}b.", "getattr"),
        "hasattr": (b"c__builtin__\nhasattr\n" + ENUM + NAME + b"\x86R.", "hasattr"),
    }.values(),
)
def test_nothing_else_goes_through_getattr(pickled, called):
    for content in (
        b"\x80\x02" + pickled,
        b"\x80\x04" + pickled.replace(b"__builtin__", b"builtins"),
    ):
        assert any(called in call for call in calls(content)), calls(content)
        with pytest.raises(UnsafeCheckpoint):
            restricted_pickle.load_index(content, "x")


def test_a_member_beside_something_hostile_is_no_excuse():
    member = GETATTR + ENUM + NAME + b"\x86R"
    assert calls(b"\x80\x02]" + member + b"acposix\nsystem\nX\x01\x00\x00\x00x\x85Ra.") == [
        "posix.system('x')"
    ]


def test_the_samples_name_what_they_are_kept_for():
    def names(path: str) -> set[str]:
        texts = [
            argument
            for _, argument, _ in pickletools.genops((SAMPLES / path / ".metadata").read_bytes())
            if isinstance(argument, str)
        ]
        return {text for text in texts if text in ("getattr", "SavePlan", "MCoreSavePlan")}

    assert names(GENUINE[0]) == {"SavePlan", "getattr"} and names(GENUINE[-1]) == {
        "MCoreSavePlan",
        "getattr",
    }
    assert not (SAMPLES / GENUINE[2] / "common.pt").exists()


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_checkpoints_are_sound_and_read_as_torch_reads_them(name):
    """The values against torch's own reader of the same files, for every tensor."""
    import torch
    import torch.distributed.checkpoint as dcp

    assert verify(SAMPLES / name, deep=True).sound
    checkpoint = identify(SAMPLES / name)
    assert checkpoint.tensors
    reader = dcp.FileSystemReader(SAMPLES / name)
    stored = reader.read_metadata().state_dict_metadata
    for tensor in checkpoint.tensors:
        expected = {
            tensor.name: torch.empty(
                stored[tensor.name].size, dtype=stored[tensor.name].properties.dtype
            )
        }
        dcp.load(expected, storage_reader=reader, no_dist=True)
        assert torch.equal(
            torch.from_numpy(read_tensor(checkpoint, tensor)), expected[tensor.name]
        ), tensor.name


def test_what_debians_python_wrote_for_torch_save():
    with (SAMPLES / "python-3.11.2/state.pt").open("rb") as file:
        state = torch_archive.read_state(file, "x")
    assert "megatron.core.transformer.enums.AttnBackend." in repr(state)
    assert "signal.SIG" in repr(state)


@pytest.mark.parametrize("compressed", [False, True])
def test_tensors_in_a_plain_pickle_as_transformer_engine_has_them(compressed):
    """In its ``_extra_state``: torch.storage._load_from_bytes(what torch.save wrote)."""
    import torch

    state = {
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(4, 2),
        "extra_fp8_variables": {"num_gemms": 1},
    }
    content = pickle.dumps(state, 4)
    assert b"_load_from_bytes" in content and torch_archive.scan_bare(content) == []
    evil = io.BytesIO()
    torch.save({"a": Evil()}, evil, _use_new_zipfile_serialization=compressed)
    for inside in (evil.getvalue(), pickle.dumps(Loaded(pickle.dumps(state, 4)))):
        (call,) = torch_archive.scan_bare(pickle.dumps({"scale": Loaded(inside)}, 4))
        assert call.startswith("torch.storage._load_from_bytes("), call


class Evil:
    """Prints when it is loaded."""

    def __reduce__(self):
        return print, ("executed",)


class Loaded:
    """A storage as a plain pickle holds it, of any bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self):
        import torch

        return torch.storage._load_from_bytes, (self.content,)


def test_every_dtype_of_torch_is_known_with_its_size():
    import torch

    known = DTYPE_BYTES | restricted_pickle.OTHER_DTYPE_BYTES
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert {
        str(dtype).removeprefix("torch."): dtype.itemsize for dtype in dtypes
    }.items() <= known.items()


def test_state_that_megatron_core_019_keeps_in_the_index():
    found = identify(SAMPLES / GENUINE[2])
    assert "saved after iteration 3" in found.notes
    report = verify(SAMPLES / GENUINE[2])
    assert (
        "the state that is not sharded is in the index, as Megatron-Core 0.19 writes it"
        in report.checked
    )


def test_a_checkpoint_without_that_state_is_damaged(tmp_path):
    path = Path(shutil.copytree(SAMPLES / GENUINE[-1], tmp_path / "iter_0000003"))
    (path / "common.pt").unlink()
    assert any("common.pt is missing" in str(finding) for finding in verify(path).findings)


def test_a_megatron_bridge_checkpoint_becomes_a_nemo2_one(tmp_path):
    """Every weight is there, unchanged: read back by torch's own reader."""
    import torch
    import torch.distributed.checkpoint as dcp

    source = SAMPLES / GENUINE[0]
    convert(source, tmp_path / "nemo2", "nemo2", tokenizer=source / "tokenizer")
    assert verify(tmp_path / "nemo2", deep=True).sound
    found = identify(tmp_path / "nemo2")
    assert (
        found.architecture == identify(source).architecture and found.architecture.family == "Llama"
    )
    for tensor in identify(source).tensors:
        both = []
        for directory, prefix in ((source, ""), (tmp_path / "nemo2" / "weights", "module.")):
            both.append(
                {
                    prefix + tensor.name: torch.empty(
                        tensor.shape, dtype=getattr(torch, tensor.dtype)
                    )
                }
            )
            dcp.load(both[-1], storage_reader=dcp.FileSystemReader(directory), no_dist=True)
        assert torch.equal(*(value for state in both for value in state.values())), tensor.name


def test_trust_goes_on_past_a_name_that_is_not_on_the_list(tmp_path, capsys, monkeypatch):
    """A harmless name of a later writer, or worse: it is printed, nothing of it is run, and what is
    written does not have it."""
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    source = SAMPLES / GENUINE[0]
    convert(source, tmp_path / "nemo2", "nemo2", tokenizer=source / "tokenizer")
    index = tmp_path / "nemo2" / "weights" / ".metadata"
    content = index.read_bytes()
    # The state of the index gets one more item, which is called: print('executed').
    hostile = b"\x8c\x05extra\x8c\x08builtins\x8c\x05print\x93\x8c\x08executed\x85Rsb."
    assert content.endswith(b"ub.")
    index.write_bytes(content[:-3] + b"u" + hostile)
    with pytest.raises(UnsafeCheckpoint, match="print"):
        bridge(tmp_path / "nemo2", tmp_path / "view")
    capsys.readouterr()
    made = bridge(tmp_path / "nemo2", tmp_path / "view", trust=True)
    printed = capsys.readouterr()
    assert "builtins.print('executed')" in printed.err and "executed" not in printed.out
    assert (
        b"print" not in (made / "model_weights" / ".metadata").read_bytes() and verify(made).sound
    )
    convert(tmp_path / "nemo2", tmp_path / "nemo1", "nemo1", trust=True)
    assert b"print" not in (tmp_path / "nemo1" / "model_weights" / ".metadata").read_bytes()
