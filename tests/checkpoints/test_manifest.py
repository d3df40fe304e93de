"""Manifests: what changed, what is missing, what is new; written all or nothing."""

import hashlib
import json
import os

import pytest

from workshop_utils.checkpoints.verify import manifest
from workshop_utils.core.errors import DamagedCheckpoint


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKSHOP_ROOT", str(tmp_path))
    directory = tmp_path / "a"
    (directory / "weights").mkdir(parents=True)
    for name in ("weights/.metadata", "weights/__0_0.distcp", "config.json"):
        (directory / name).write_bytes(name.encode() * 1000)
    return directory


def test_what_is_written(checkpoint):
    target = manifest.write(checkpoint)
    assert target == checkpoint.with_name("a.manifest.json")
    described = json.loads(target.read_text())
    files = described.pop("files")
    assert described == {"format": "workshop manifest", "version": 1, "checkpoint": "a"}
    content = (checkpoint / "config.json").read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert files["config.json"] == entry
    assert list(files) == ["config.json", "weights/.metadata", "weights/__0_0.distcp"]


def test_differences(checkpoint):
    target = manifest.write(checkpoint)
    assert not manifest.compare(checkpoint, target)
    shard = checkpoint / "weights" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    (checkpoint / "config.json").unlink()
    (checkpoint / "weights" / "__0_1.distcp").touch()
    assert manifest.compare(checkpoint, target) == manifest.Differences(
        changed=["weights/__0_0.distcp"], missing=["config.json"], new=["weights/__0_1.distcp"]
    )


def test_a_copy_elsewhere_and_a_manifest_inside(checkpoint, tmp_path):
    inside = manifest.write(checkpoint, checkpoint / "MANIFEST.json")
    assert not manifest.compare(checkpoint, inside)
    moved = checkpoint.rename(tmp_path / "b")
    assert not manifest.compare(moved, moved / "MANIFEST.json")
    single = moved / "config.json"
    assert manifest.write(single).name == "config.json.manifest.json"
    assert not manifest.compare(single, manifest.default_path(single))


def test_links_count_as_what_they_lead_to_and_end(checkpoint, tmp_path):
    view = tmp_path / "view"
    view.mkdir()
    (view / "__0_0.distcp").symlink_to(checkpoint / "weights" / "__0_0.distcp")
    (view / "again").symlink_to(view)
    target = manifest.write(view)
    assert list(json.loads(target.read_text())["files"]) == ["__0_0.distcp"]
    (checkpoint / "weights" / "__0_0.distcp").write_bytes(b"other")
    assert manifest.compare(view, target).changed == ["__0_0.distcp"]


HEAD = '{"format": "workshop manifest", "version": %s, "files": {"a": %s}}'


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", HEAD % (2, "{}"), HEAD % (1, '{"bytes": "1", "sha256": ""}')]
)
def test_what_is_no_manifest(checkpoint, content):
    file = checkpoint.with_name("m.json")
    file.write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"m\.json"):
        manifest.compare(checkpoint, file)
    with pytest.raises(DamagedCheckpoint, match="is missing"):
        manifest.compare(checkpoint, checkpoint.with_name("nothing.json"))


def test_an_interrupted_writing_leaves_the_old_one(checkpoint, monkeypatch):
    target = manifest.write(checkpoint)
    before = target.read_text()
    (checkpoint / "more").write_text("x")
    monkeypatch.setattr(os, "replace", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        manifest.write(checkpoint)
    assert target.read_text() == before
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["a", "a.manifest.json"]
