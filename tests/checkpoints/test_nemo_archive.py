"""Archives compressed with gzip are unpacked no more often than they have to be."""

import gzip
import os

import hostile_files
import pytest

from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.core.errors import UnsafeCheckpoint


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.nemo"
    path.write_bytes(gzip.compress(hostile_files.tar(*hostile_files.GOOD)))
    return path


def test_one_pass_serves_several_questions(archive, monkeypatch):
    opened = []
    original = nemo_archive._open
    monkeypatch.setattr(nemo_archive, "_open", lambda path: opened.append(path) or original(path))
    for _ in range(3):
        assert [member.name for member in nemo_archive.members(archive)] == [
            "model_config.yaml",
            "model_weights.ckpt",
        ]
    assert len(opened) == 1
    assert nemo_archive.read_config(archive) == {"num_layers": 2}
    assert len(opened) == 2


def test_a_changed_file_is_read_anew(archive):
    assert len(nemo_archive.members(archive)) == 2
    archive.write_bytes(gzip.compress(hostile_files.tar(*hostile_files.GOOD, ("../x", b""))))
    os.utime(archive, (1, 1))
    with pytest.raises(UnsafeCheckpoint):
        nemo_archive.members(archive)


def test_the_list_is_the_callers_own(archive):
    nemo_archive.members(archive).clear()
    assert len(nemo_archive.members(archive)) == 2


def test_names_and_times_of_any_length_in_extended_headers(tmp_path):
    """tarfile's default format writes a header before each entry with a fraction in its time or a
    long name."""
    import io
    import tarfile

    path = tmp_path / "a.nemo"
    with tarfile.open(path, "w:") as made:
        for name, content in (*hostile_files.GOOD, ("./" + "tokenizer/" * 30 + "é.json", b"{}")):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 1234567.25
            made.addfile(entry, io.BytesIO(content))
    with tarfile.open(path) as made:
        expected = [
            (entry.name.removeprefix("./"), entry.offset_data, entry.size) for entry in made
        ]
    assert [
        (member.name, member.start, member.size) for member in nemo_archive.members(path)
    ] == expected


def test_a_member_of_more_than_8_gigabytes(tmp_path):
    """Its size does not fit the header; written sparse, so that it takes no disk."""
    import tarfile

    size = 9 * 1024**3
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{form}.nemo"
        entry = tarfile.TarInfo("model_weights.ckpt")
        entry.size = size
        with path.open("wb") as file:
            file.write(entry.tobuf(form))
            start = file.tell()
            file.truncate(start + size + 1024)
        (member,) = nemo_archive.members(path)
        assert (member.start, member.size) == (start, size)
