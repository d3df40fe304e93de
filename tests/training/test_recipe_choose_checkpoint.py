"""The choice among checkpoints that bear NeMo's names: by validation loss or step, never by time;
half-written ones passed over."""

import os

import pytest

from workshop_utils.core.errors import CheckpointError, DamagedCheckpoint, NotACheckpoint
from workshop_utils.training.recipe.choose_checkpoint import choose, read_name


@pytest.fixture
def run(tmp_path):
    """Makes checkpoints (their parts, empty) of the given names in a run's directory."""
    folder = tmp_path / "qwen2.5-0.5b" / "checkpoints"

    def make(*names, missing=()):
        for age, name in enumerate(names):
            for part in ("weights/metadata.json", "weights/.metadata", "context/model.yaml"):
                file = folder / name / part
                file.parent.mkdir(parents=True, exist_ok=True)
                if part not in missing:
                    file.touch()
            os.utime(folder / name, (age, age))
        return tmp_path

    make.folder = folder
    return make


def test_best_is_the_lowest_loss_whatever_the_times_say(run):
    top = run(
        "m--val_loss=0.5000-step=29", "m--val_loss=0.3100-step=19", "m--val_loss=1.2000-step=9"
    )
    assert choose(top).name == "m--val_loss=0.3100-step=19"
    assert choose(top, "last").name == "m--val_loss=0.5000-step=29"
    for name in os.listdir(run.folder):
        os.utime(run.folder / name, (0, 0) if "0.31" in name else (9e9, 9e9))
    assert choose(top).name == "m--val_loss=0.3100-step=19"


@pytest.mark.parametrize(
    "name, loss, step, last",
    [
        ("qwen2.5-0.5b--val_loss=0.4321-step=39", 0.4321, 39, False),
        ("qwen2.5-0.5b--val_loss=0.4321-step=39-last", 0.4321, 39, True),
        ("step=3-val_loss=4.321-last", 4.321, 3, True),
        ("a--val_loss=9.0-b--val_loss=0.1000-step=1-consumed_samples=40.0", 0.1, 1, False),
        ("m--val_loss=1.2e-05-epoch=0-step=7", 1.2e-05, 7, False),
        ("m--val_loss=-0.25-step=7", -0.25, 7, False),
        ("m-substep=5", None, None, False),
        ("model", None, None, False),
    ],
)
def test_what_a_name_says(tmp_path, name, loss, step, last):
    found = read_name(tmp_path / name)
    assert (found.val_loss, found.step, found.is_last) == (loss, step, last)


def test_equal_losses_take_the_later_one_and_nan_none(run):
    top = run("m--val_loss=0.3000-step=9", "m--val_loss=0.3000-step=19", "m--val_loss=nan-step=29")
    assert choose(top).name == "m--val_loss=0.3000-step=19"


def test_the_last_may_be_a_link_or_a_state_of_its_own(run):
    top = run("m--val_loss=0.3-step=9")
    (run.folder / "m--val_loss=0.3-step=9-last").symlink_to("m--val_loss=0.3-step=9")
    (run.folder / "m--val_loss=0.9-step=4-last").symlink_to("removed")
    assert choose(top, "last").resolve() == choose(top).resolve()
    run("m--val_loss=0.1-step=14-last")
    assert choose(top, "last").name == "m--val_loss=0.1-step=14-last"
    assert choose(top).name == "m--val_loss=0.3-step=9", (
        "the last one's name repeats a loss that is not its own"
    )


def test_a_half_written_best_is_passed_over_and_said(run, capsys):
    top = run("m--val_loss=0.5-step=9", "m--val_loss=0.1-step=19", "m--val_loss=0.2-step=29")
    (run.folder / "m--val_loss=0.1-step=19-unfinished").touch()
    run("m--val_loss=0.15-step=39", missing=("weights/.metadata",))
    assert choose(top).name == "m--val_loss=0.2-step=29"
    said = capsys.readouterr().err
    assert "step=19 is passed over: m--val_loss=0.1-step=19-unfinished stands beside it" in said
    assert "step=39 is passed over: weights/.metadata is missing" in said


def test_a_link_to_a_half_written_one_is_half_written(run):
    run("m--val_loss=0.5-step=9")
    (run.folder / "m--val_loss=0.5-step=9-last").symlink_to("m--val_loss=0.5-step=9")
    (run.folder / "m--val_loss=0.5-step=9-unfinished").touch()
    with pytest.raises(
        DamagedCheckpoint, match="(?s)No checkpoint in .* is whole.*step=9: .*step=9-last: "
    ):
        choose(run.folder, "last")


@pytest.mark.parametrize(
    "names, which, message",
    [
        ((), "best", "does not exist: nothing has been trained there"),
        (
            ("model",),
            "best",
            r"tells a validation loss \(val_loss=NUMBER\): model. Ask for the last one",
        ),
        (("m--val_loss=nan-step=1",), "best", "tells a validation loss"),
        (("a", "b"), "last", r"cannot be told from their names \(step=NUMBER\): "),
        (("m--val_loss=0.5-step=9",), "lsat", "lsat does not exist"),
    ],
)
def test_what_cannot_be_chosen(run, names, which, message):
    run(*names)
    with pytest.raises(CheckpointError, match=message):
        choose(run.folder, which)


def test_an_empty_run_and_two_runs(run, tmp_path):
    with pytest.raises(NotACheckpoint, match="holds no checkpoint: train first"):
        choose(tmp_path)
    run("m--val_loss=0.5-step=9")
    other = tmp_path / "other" / "checkpoints"
    other.parent.mkdir()
    (run.folder).rename(other)
    run("m--val_loss=0.4-step=9")
    with pytest.raises(NotACheckpoint, match="checkpoints of 2 runs; give one"):
        choose(tmp_path)
    assert choose(other).name == "m--val_loss=0.5-step=9"


def test_one_named_by_path_or_name(run):
    top = run("m--val_loss=0.5-step=9", "m--val_loss=0.4-step=19")
    wanted = run.folder / "m--val_loss=0.5-step=9"
    assert choose(top, str(wanted)) == choose(top, wanted.name) == choose(wanted) == wanted
    (wanted / "weights" / ".metadata").unlink()
    with pytest.raises(DamagedCheckpoint, match="half-written: weights/.metadata is missing"):
        choose(top, str(wanted))
