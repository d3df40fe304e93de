"""Two processes over gloo: tensor, pipeline and data parallelism train what one process trains, and
leave one adapter."""

from pathlib import Path

import numpy
import pytest

from workshop_utils.adapters.read import read_adapter
from workshop_utils.adapters.read_nemo1 import read_state
from workshop_utils.checkpoints.formats import nemo_archive
from workshop_utils.checkpoints.formats.identify import identify
from workshop_utils.training import script

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(scope="module")
def train(tiny):
    """A function from a name, a number of processes and overrides to the plan of a finished run;
    each run is made once."""
    made: dict[str, script.Plan] = {}

    def run(name: str, processes: int, *overrides: str) -> script.Plan:
        if name in made:
            return made[name]
        words = [
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
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORKSHOP_DEVICE", "cpu")
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("WORKSHOP_ROOT", str(tiny))
            rows = tiny / "rows.jsonl"
            made[name] = script.make_plan(words, data=rows, nproc_per_node=processes)
            script.finetune(made[name], progress=False)
        return made[name]

    return run


def losses(plan: script.Plan) -> numpy.ndarray:
    events = script.read_events(plan.events)
    told = [event["loss"] for event in events if event["event"] in ("step", "validation")]
    assert len(told) == STEPS + 2
    return numpy.array(told)


def one(train) -> script.Plan:
    return train("one", 1)


def has_one_part(plan: script.Plan) -> bool:
    names = [member.stored_name for member in nemo_archive.members(plan.adapter)]
    return names == ["model_config.yaml", "model_weights.ckpt"]


def assert_close(ours, right, what: str) -> None:
    """Up to the rounding of sums in another order."""
    assert float((ours - right).abs().max()) < 1e-3 * float(right.abs().max()), what


def test_the_same_seed_gives_the_same_losses_bit_for_bit(train):
    assert losses(train("again", 1)).tolist() == losses(one(train)).tolist()


def test_tensor_parallel_equals_one_process(train):
    """Losses and the merged adapter, gated feed-forward included."""
    plan = train("tensor", 2, "model.tensor_model_parallel_size=2")
    assert numpy.abs(losses(plan) - losses(one(train))).max() < 1e-4
    right, ours = (read_adapter(made.adapter).weights for made in (one(train), plan))
    assert ours.keys() == right.keys()
    for place, halves in right.items():
        for half, our_half in zip(halves, ours[place], strict=True):
            assert_close(our_half, half, place)


def test_data_parallel_equals_one_process(train):
    """The mean over ranks of means over rows weighs tokens a little differently; hence the
    tolerance."""
    assert numpy.abs(losses(train("data", 2)) - losses(one(train))).max() < 0.02


def test_pipeline_parallel_learns_alike(train):
    """Each stage draws its own random numbers, so that its A differ from those of one process; the
    first loss (B = 0) cannot."""
    plan, whole = train("pipeline", 2, "model.pipeline_model_parallel_size=2"), one(train)
    assert abs(losses(plan)[0] - losses(whole)[0]) < 1e-5
    assert losses(plan)[-1] < losses(plan)[0] - 0.1
    ours, right = (read_adapter(made.adapter).weights for made in (plan, whole))
    assert ours.keys() == right.keys()


@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_what_is_delivered_is_one_part_that_nemo_itself_loads(train, name):
    from workshop_utils.inference.nemo1_engine import nemo_logits

    plan = train(name, 2, f"model.{name}_model_parallel_size=2")
    assert has_one_part(plan)
    tokens = numpy.random.default_rng(0).integers(3, 250, size=(1, 40))
    base = Path(plan.overrides["model.restore_from_path"])
    tuned, untouched = (nemo_logits(base, adapter, tokens) for adapter in (plan.adapter, None))
    assert numpy.abs(tuned - untouched).max() > 0.05


@pytest.mark.parametrize("scheme", ["adapter", "ia3"])
def test_other_adapters_split_over_two_are_put_together(train, scheme):
    """In the same tensors as those of one process."""
    settings = [f"model.peft.peft_scheme={scheme}", "model.peft.adapter_tuning.adapter_dim=8"]
    split = train(f"{scheme}-split", 2, "model.tensor_model_parallel_size=2", *settings)
    whole = train(scheme, 1, *settings)
    assert numpy.abs(losses(split) - losses(whole)).max() < 1e-4
    assert has_one_part(split)
    ours, right = (
        read_state(plan.adapter, nemo_archive.read_config(plan.adapter)) for plan in (split, whole)
    )
    assert ours.keys() == right.keys()
    for name, tensor in right.items():
        assert_close(ours[name], tensor, name)


def test_full_fine_tuning_split_over_two_is_delivered_whole(train):
    """NeMo writes a distributed checkpoint then, which any number of processes reads."""
    settings = ["model.peft.peft_scheme=none", "model.optim.lr=1e-3"]
    split = train("full-split", 2, "model.tensor_model_parallel_size=2", *settings)
    whole = train("full", 1, *settings)
    assert numpy.abs(losses(split) - losses(whole)).max() < 1e-3
    ours, right = identify(split.adapter), identify(whole.adapter)
    shapes = [{tensor.name: tensor.shape for tensor in of.tensors} for of in (ours, right)]
    assert shapes[0] == shapes[1]
    assert (ours.parameters, ours.parallel) == (right.parameters, (1, 1))
