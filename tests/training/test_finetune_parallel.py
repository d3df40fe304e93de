"""Two processes over gloo: tensor, pipeline and data parallelism train what one process trains, and
leave one adapter."""

from pathlib import Path

import numpy
import pytest
from tiny_model import write_rows

from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.read_nemo1 import read_state
from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.training import script

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def tiny(bridged_tiny, tmp_path_factory):
    """A folder with ``bridged/tiny`` and rows, in which the runs of this module end up."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "bridged").symlink_to(bridged_tiny / "bridged")
    write_rows(folder / "rows.jsonl", 32)
    return folder


@pytest.fixture(scope="module")
def train(tiny):
    """A function from a name, a number of processes and overrides to the plan of a finished run;
    each run is made once."""
    made: dict[str, script.Plan] = {}

    def run(name: str, processes: int, *overrides: str) -> script.Plan:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("WORKSHOP_DEVICE", "cpu")
                patch.setenv("OMP_NUM_THREADS", "1")
                patch.setenv("WORKSHOP_ROOT", str(tiny))
                made[name] = script.make_plan(
                    [
                        f"model.restore_from_path={tiny / 'bridged' / 'tiny'}",
                        f"exp_manager.exp_dir={tiny / 'runs'}",
                        f"exp_manager.name={name}",
                        f"trainer.max_steps={STEPS}",
                        "trainer.val_check_interval=4",
                        "model.peft.lora_tuning.target_modules=[all]",
                        "model.peft.lora_tuning.adapter_dim=8",
                        "model.peft.lora_tuning.alpha=8",
                        "model.optim.lr=5e-3",
                        "model.micro_batch_size=2",
                        "model.use_cpu_initialization=true",
                        *overrides,
                    ],
                    data=tiny / "rows.jsonl",
                    nproc_per_node=processes,
                )
                script.finetune(made[name], progress=False)
        return made[name]

    return run


def losses(plan: script.Plan) -> numpy.ndarray:
    found = [
        event["loss"]
        for event in script.read_events(plan.events)
        if event["event"] in ("step", "validation")
    ]
    assert len(found) == STEPS + 2
    return numpy.array(found)


def one(train) -> script.Plan:
    return train("one", 1)


def test_the_same_seed_gives_the_same_losses_bit_for_bit(train):
    assert losses(train("again", 1)).tolist() == losses(one(train)).tolist()


def test_tensor_parallel_equals_one_process(train):
    """Losses and the merged adapter, gated feed-forward included, up to the rounding of sums in
    another order."""
    plan = train("tensor", 2, "model.tensor_model_parallel_size=2")
    assert numpy.abs(losses(plan) - losses(one(train))).max() < 1e-4
    right, found = read_adapter(one(train).adapter), read_adapter(plan.adapter)
    assert found.weights.keys() == right.weights.keys()
    for place, halves in right.weights.items():
        for half, ours in zip(halves, found.weights[place], strict=True):
            assert float((half - ours).abs().max()) < 1e-3 * float(half.abs().max()), place


def test_data_parallel_equals_one_process(train):
    """The mean over ranks of means over rows weighs tokens a little differently; hence the
    tolerance."""
    assert numpy.abs(losses(train("data", 2)) - losses(one(train))).max() < 0.02


def test_pipeline_parallel_learns_alike(train):
    """Each stage draws its own random numbers, so that its A differ from those of one process; the
    first loss (B = 0) cannot."""
    plan = train("pipeline", 2, "model.pipeline_model_parallel_size=2")
    assert abs(losses(plan)[0] - losses(one(train))[0]) < 1e-5
    assert losses(plan)[-1] < losses(plan)[0] - 0.1
    assert (
        read_adapter(plan.adapter).weights.keys() == read_adapter(one(train).adapter).weights.keys()
    )


@pytest.mark.parametrize("name, size", [("tensor", "tensor"), ("pipeline", "pipeline")])
def test_what_is_delivered_is_one_part_that_nemo_itself_loads(train, tiny, name, size):
    from workshop_utils.inference.nemo1_engine import nemo_logits

    plan = train(name, 2, f"model.{size}_model_parallel_size=2")
    assert [member.stored_name for member in nemo_archive.members(plan.adapter)] == [
        "model_config.yaml",
        "model_weights.ckpt",
    ]
    tokens = numpy.random.default_rng(0).integers(3, 250, size=(1, 40))
    base = Path(plan.overrides["model.restore_from_path"])
    changed = numpy.abs(
        nemo_logits(base, plan.adapter, tokens) - nemo_logits(base, None, tokens)
    ).max()
    assert changed > 0.05


@pytest.mark.parametrize("scheme", ["adapter", "ia3"])
def test_other_adapters_split_over_two_are_put_together(train, scheme):
    """In the same tensors as those of one process, up to the rounding of sums in another order."""
    settings = [f"model.peft.peft_scheme={scheme}", "model.peft.adapter_tuning.adapter_dim=8"]
    split, whole = (
        train(f"{scheme}-split", 2, "model.tensor_model_parallel_size=2", *settings),
        train(scheme, 1, *settings),
    )
    assert numpy.abs(losses(split) - losses(whole)).max() < 1e-4
    assert [member.stored_name for member in nemo_archive.members(split.adapter)] == [
        "model_config.yaml",
        "model_weights.ckpt",
    ]
    found, right = (
        read_state(plan.adapter, nemo_archive.read_config(plan.adapter)) for plan in (split, whole)
    )
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert float((found[name] - tensor).abs().max()) < 1e-3 * float(tensor.abs().max()), name


def test_full_fine_tuning_split_over_two_is_delivered_whole(train):
    """NeMo writes a distributed checkpoint then, which any number of processes reads."""
    settings = ["model.peft.peft_scheme=none", "model.optim.lr=1e-3"]
    split, whole = (
        train("full-split", 2, "model.tensor_model_parallel_size=2", *settings),
        train("full", 1, *settings),
    )
    assert numpy.abs(losses(split) - losses(whole)).max() < 1e-3
    found, right = identify(split.adapter), identify(whole.adapter)
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        tensor.name: tensor.shape for tensor in right.tensors
    }
    assert (found.parameters, found.parallel) == (right.parameters, (1, 1))
