"""Pickles that Python's own machine would let run something although each name in them is on the
list, or that take for ever."""

import io
import pickle
import time
import zipfile

import pytest
import torch
from hostile_files import archive

from workshop_utils.checkpoints.formats import restricted_pickle, torch_archive
from workshop_utils.checkpoints.verify import pickles
from workshop_utils.checkpoints.verify.report import Report
from workshop_utils.core.errors import CheckpointError

LOAD = b"ctorch.storage\n_load_from_bytes\n"
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def blob(data: bytes) -> bytes:
    return b"B" + len(data).to_bytes(4, "little") + data


def evil(touch: str) -> bytes:
    return b"cposix\nsystem\n" + text(f"touch {touch}") + b"\x85R"


def old_format(pickled: bytes) -> bytes:
    """What torch.save wrote before 1.6, with ``pickled`` as the storage."""
    return OLD + b"\x80\x02" + pickled + b".\x80\x02]."


def takeovers(touch: str) -> dict[str, bytes]:
    """The last object of the pickle is made by a call that the file has put into another object."""
    payload = blob(old_format(evil(touch)))

    def into(name: str, then: bytes, what: bytes) -> bytes:
        return b"\x80\x03" + what + b"}" + text(name) + LOAD + b"sb" + then + b"."

    made = {
        "OrderedDict": b"ccollections\nOrderedDict\n)R",
        "Counter": b"ccollections\nCounter\n)R",
        "a new class": b"cbuiltins\ntype\n" + text("X") + b"cbuiltins\nobject\n\x85}\x87R)R",
    }
    found = {
        f"__setstate__ of {name}": into("__setstate__", payload + b"b", what)
        for name, what in made.items()
    }
    found["append of a Counter"] = into("append", payload + b"a", made["Counter"])
    found["state of a BytesIO"] = (
        b"\x80\x03c_io\nBytesIO\n)RC\x00K\x00}"
        + text("__setstate__")
        + LOAD
        + b"s\x87b"
        + payload
        + b"b."
    )
    return found


def gaps(touch: str) -> dict[str, bytes]:
    """What stops the workshop's machine and not Python's, before something that runs."""
    return {
        "a gap in the memo": b"Nr\x05\x00\x00\x000" + evil(touch),
        "a long number": b"\x8b\x2c\x01\x00\x00" + b"\x01" * 300 + b"0" + evil(touch),
        "half a surrogate pair": text("\ud800") + b"0" + evil(touch),
        "a hexadecimal number": b"I0x10\n0" + evil(touch),
        "an item of a list": b"]N" + b"aK\x00K\x01s0" + evil(touch),
    }


@pytest.mark.parametrize("way", takeovers(""))
def test_no_object_takes_a_call_over(way, tmp_path):
    canary = tmp_path / "touched"
    pickled = takeovers(str(canary))[way]
    pickle.loads(pickled)
    assert canary.exists(), "the sample is real"
    canary.unlink()
    reported = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        try:
            torch_archive.read_state(io.BytesIO(archive(pickled)), "x", reported.append)
        except CheckpointError as error:
            reported.append(error)
    assert reported and not canary.exists()


@pytest.mark.parametrize("way", gaps(""))
@pytest.mark.parametrize("place", ["a storage", "a storage in a zip", "extra state"])
def test_what_breaks_here_alone_is_not_called_harmless(way, place, tmp_path):
    canary = tmp_path / "touched"
    pickled = gaps(str(canary))[way]
    pickle.loads(b"\x80\x04" + pickled + b".")
    assert canary.exists(), "the sample is real"
    canary.unlink()
    if place == "extra state":
        content = b"\x80\x04" + pickled + b"."
    else:
        inner = (
            old_format(pickled) if place == "a storage" else archive(b"\x80\x02" + pickled + b".")
        )
        content = b"\x80\x03" + LOAD + blob(inner) + b"\x85R."
    stored = io.BytesIO()
    torch.save([torch.frombuffer(bytearray(content), dtype=torch.uint8)], stored)
    report = Report(tmp_path)
    pickles._check(report, "x", stored.getvalue(), extra_state=True)
    assert report.findings and not canary.exists()


@pytest.mark.parametrize(
    "value",
    {
        "int8": torch.frombuffer(bytearray(pickle.dumps(1)), dtype=torch.int8),
        "every other byte": torch.zeros(60, dtype=torch.uint8)[::2],
        "float32": torch.ones(5),
    }.values(),
)
def test_extra_state_that_cannot_be_told_is_not_called_harmless(value, tmp_path):
    stored = io.BytesIO()
    torch.save(value, stored)
    report = Report(tmp_path)
    pickles._check(report, "x", stored.getvalue(), extra_state=True)
    assert "what they would run is not known" in str(report.findings[0])
    report = Report(tmp_path)
    pickles._check(report, "x", stored.getvalue())
    assert report.findings == [], "what nobody unpickles"


@pytest.mark.parametrize(
    "state",
    [
        b"(C\x02K\x01tR",
        b")R(c__builtin__\nbytearray\nC\x01x\x85RK\x00NtbN0",
        b")R(c_codecs\nencode\n" + text("x") + text("ascii") + b"\x86RK\x00NtbN0",
    ],
)
def test_a_buffer_whose_bytes_are_not_plain(state, tmp_path):
    report = Report(tmp_path)
    pickles._check(
        report, "x", archive(b"\x80\x03c_io\nBytesIO\n" + state + b"."), extra_state=True
    )
    assert report.findings


@pytest.mark.parametrize(
    "pickled",
    {
        "an enumeration": b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
        + b"N}"
        + text("__new__")
        + b"Ns\x86b.",
        "an enumeration's member": b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
        + b"N}"
        + text("TENSOR")
        + b"Ns\x86b.",
        "a path": b"cpathlib\nPosixPath\n" + b"N}" + text("exists") + b"Ns\x86b.",
    }.values(),
)
def test_no_class_is_changed(pickled):
    content = b"\x80\x02" + pickled
    assert "__setstate__" in torch_archive.scan_bare(content)[0]
    with pytest.raises(CheckpointError):
        restricted_pickle.load_index(content, "x")


def probes(count: int) -> list[int]:
    """Numbers below 2^61 that all fall on one place of a dictionary that has room for them."""
    return [1 + (number << 40) for number in range(count)]


@pytest.mark.parametrize(
    "pickled",
    {
        "one storage over and over": blob(OLD + b"\x80\x02K\x01.\x80\x02].".ljust(400_000, b"\x00"))
        + b"q\x000"
        + (LOAD + b"h\x00\x85R0") * 2000
        + b"N.",
        "long texts to a class": text("\x00" * 250_000)
        + b"q\x000"
        + b"(c__builtin__\nstr\n"
        + b"h\x00" * 20_000
        + b"o.",
        "long texts to an enumeration": text("\x00" * 250_000)
        + b"q\x000"
        + b"ctorch.distributed.checkpoint.planner\nWriteItemType\nq\x010"
        + b"h\x01h\x00\x85R0" * 50_000
        + b"N.",
        "one long tuple to a class": b"("
        + b"N" * 400_000
        + b"tq\x000"
        + b"cbuiltins\nint\nq\x010"
        + b"h\x01h\x00R0" * 50_000
        + b"N.",
        "one long tuple to a tensor": b"("
        + b"N" * 400_000
        + b"tq\x000"
        + b"ctorch._tensor\n_rebuild_from_type_v2\nq\x010"
        + b"ctorch._utils\n_rebuild_parameter\nq\x020"
        + b"h\x01(h\x02Nh\x00NtR0" * 10_000
        + b"N.",
        "numbers on one place": b"}("
        + b"".join(b"\x8a\x08" + key.to_bytes(8, "little") + b"N" for key in probes(80_000))
        + b"u.",
    }.values(),
)
def test_bounded_time(pickled):
    assert len(pickled) < 1_100_000
    began = time.process_time()
    torch_archive.scan_bare(b"\x80\x03" + pickled)
    assert time.process_time() - began < 5


def test_an_archive_of_the_samples_is_one():
    assert zipfile.is_zipfile(io.BytesIO(archive(b"\x80\x02N.")))
