"""The store: what is new, replaced, broken, half-written or gone, while the server runs."""

import json
import os
import shutil
import threading

import export_samples
import pytest
from safetensors.torch import load_file, save_file
from serve_samples import SHAPE, write_base, write_nemo, write_peft

from workshop_utils.core.errors import CheckpointError, NotACheckpoint, UnsupportedAdapter
from workshop_utils.inference.generate import generate, load
from workshop_utils.serving.server import adapters, engine
from workshop_utils.serving.server.adapters import Store, read
from workshop_utils.serving.server.engine import Row
from workshop_utils.serving.server.sampling import RequestSampling


class Engine:
    """Remembers what it is told to serve."""

    def __init__(self):
        self.served = {}

    @property
    def adapters(self):
        return sorted(self.served)

    def install(self, name, config, tensors):
        self.served[name] = float(sum(abs(value).sum() for value in tensors.values()))
        return self

    def remove(self, name):
        del self.served[name]
        return self

    def result(self):
        return None


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "_SETTLE", 0.01)
    (tmp_path / "store").mkdir()
    said = []
    made = Store(tmp_path / "store", Engine(), "tiny", say=said.append)
    made.said, made.served = said, made._engine.served
    return made


def test_new_replaced_removed(store):
    write_peft(store.directory / "a", 1)
    write_nemo(store.directory / "b")
    store.refresh()
    assert sorted(store.said) == ["adapter a: served", "adapter b: served"]
    first = store.served["a"]
    store.refresh()
    assert len(store.said) == 2  # nothing has changed
    write_peft(store.directory / "a", 2)
    shutil.rmtree(store.directory / "b")
    store.refresh()
    assert sorted(store.said[2:]) == ["adapter a: replaced", "adapter b: removed"]
    assert store.served.keys() == {"a"}
    assert store.served["a"] != first


def test_broken_replacement_leaves_the_old_one(store):
    write_peft(store.directory / "a", 1)
    store.refresh()
    first, file = store.served["a"], store.directory / "a" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    for _ in range(2):
        store.refresh()
    assert store.served == {"a": first}
    assert len(store.said) == 2  # said once
    assert store.said[1].startswith("adapter a: NOT served; the one before is still served. ")
    file.write_bytes(whole)
    store.refresh()
    assert store.said[2] == "adapter a: replaced"


def test_what_is_being_written_is_not_read(store, monkeypatch):
    write_peft(store.directory / "a", 1)
    weights = store.directory / "a" / "adapter_model.safetensors"

    def copied_meanwhile(seconds):
        os.truncate(weights, weights.stat().st_size - 8)

    monkeypatch.setattr(store._stop, "wait", copied_meanwhile)
    store.refresh()
    assert store.served == {} and store.said == []


def test_what_changes_while_it_is_read_is_not_kept(store, monkeypatch):
    write_peft(store.directory / "a", 1)
    real = adapters.read

    def read_and_changed(directory, *options):
        found = real(directory, *options)
        (directory / "adapter_config.json").touch()
        return found

    monkeypatch.setattr(adapters, "read", read_and_changed)
    store.refresh()
    assert store.served == {} and store.said == []
    monkeypatch.setattr(adapters, "read", real)
    store.refresh()
    assert store.served.keys() == {"a"}


def test_served_weights_are_not_the_file(tmp_path):
    """A mapped file that is written over would change what is served, and one that is cut would end
    the server."""
    _, tensors = read(write_peft(tmp_path / "a", 1))
    before = {key: value.clone() for key, value in tensors.items()}
    weights = tmp_path / "a" / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.write(bytes(weights.stat().st_size))
        file.truncate(0)
    assert all(bool((value == before[key]).all()) for key, value in tensors.items())


def test_names(store):
    names = (".hidden", "tiny", "with blank", "-x", "a" * 129, "a\x1b[2J")
    for name in names:
        write_peft(store.directory / name, 1)
    (store.directory / "file").write_text("x")
    store.refresh()
    assert store.served == {}
    assert len(store.said) == len(names) - 1  # nothing of what is hidden: it is being written
    assert "adapter tiny: NOT served. it has the base's name, give it another one." in store.said
    words = "NOT served. its directory's name cannot be a model's id, rename it: up to 128"
    assert sum(words in line for line in store.said) == 4
    assert "\x1b" not in "".join(store.said)


def test_a_rank_over_the_maximum_is_not_served(store):
    small = Store(store.directory, Engine(), "tiny", max_rank=3, say=store.said.append)
    write_peft(store.directory / "a", 1)
    write_nemo(store.directory / "b")
    small.refresh()
    assert small._engine.adapters == []
    assert sorted(store.said) == [
        (
            f"adapter {name}: NOT served. the rank is at most 3: it is 4. Raise --max-rank of the "
            "server, or train with a rank of 3 or less."
        )
        for name in "ab"
    ]
    store._max_rank = 4
    store.refresh()
    assert store.served.keys() == {"a", "b"}


def test_store_that_goes_away_keeps_what_is_served(store):
    write_peft(store.directory / "a", 1)
    store.refresh()
    store.directory.rename(store.directory.with_name("away"))
    store.refresh()
    assert store.served.keys() == {"a"}
    assert "cannot be read" in store.said[-1]


def test_links(store, tmp_path):
    """As Kubernetes mounts a volume."""
    write_peft(tmp_path / "version1", 1)
    (store.directory / "a").symlink_to(tmp_path / "version1")
    store.refresh()
    first = store.served["a"]
    write_peft(tmp_path / "version2", 2)
    (store.directory / "a").unlink()
    (store.directory / "a").symlink_to(tmp_path / "version2")
    store.refresh()
    assert store.served["a"] != first


def test_nothing_and_too_much(tmp_path):
    directory = tmp_path / "a"
    directory.mkdir()
    with pytest.raises(NotACheckpoint, match="is empty"):
        read(directory)
    write_nemo(directory)
    shutil.copy(directory / "lora.nemo", directory / "second.nemo")
    with pytest.raises(UnsupportedAdapter, match="lora.nemo, second.nemo"):
        read(directory)
    (directory / "second.nemo").unlink()
    write_peft(directory, 1)
    with pytest.raises(UnsupportedAdapter, match="it holds adapter_config.json, lora.nemo"):
        read(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("alora_invocation_tokens", [1]),
        ("r", "4"),
    ],
)
def test_adapters_that_cannot_share_a_batch(tmp_path, field, value):
    with pytest.raises((UnsupportedAdapter, CheckpointError), match=field):
        read(write_peft(tmp_path / "a", 1, **{field: value}))


def test_dora_cannot_share_a_batch(tmp_path):
    directory = write_peft(tmp_path / "a", 1, use_dora=True)
    weights = directory / "adapter_model.safetensors"
    state = load_file(weights)
    lengths = {
        key.replace("lora_B.weight", "lora_magnitude_vector"): value[:, 0].abs()
        for key, value in state.items()
        if "lora_B" in key
    }
    save_file(state | lengths, weights, metadata={"format": "pt"})
    with pytest.raises(UnsupportedAdapter, match="use_dora.*merge it"):
        read(directory)


def test_one_that_is_away_for_a_moment_is_not_removed(store, monkeypatch):
    """A directory cannot be replaced in one step: between two renames there is none."""
    write_peft(store.directory / "a", 1)
    store.refresh()
    away = (store.directory / "a").rename(store.directory / ".a.old")
    monkeypatch.setattr(store._stop, "wait", lambda _: away.rename(store.directory / "a") and False)
    store.refresh()
    assert store.served.keys() == {"a"}
    assert store.said == ["adapter a: served"]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "("},
        {"exclude_modules": "("},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"v_proj": "x"}},
        {"lora_alpha": float("inf")},
        {"layers_to_transform": [0, 1], "layers_pattern": "("},
    ],
)
def test_no_configuration_changes_the_base_or_ends_the_engine(tmp_path, config):
    made = engine.Engine(*load(write_base(tmp_path / "tiny")))

    def answer() -> list[int]:
        ended = threading.Event()
        row = Row(
            [5, 6, 7],
            RequestSampling(max_new_tokens=12, temperature=0),
            lambda piece: piece.finish and ended.set(),
        )
        made.submit([row], None)
        assert ended.wait(30)
        return row.tokens

    before = answer()
    write_peft(tmp_path / "store" / "a", 1, **config)
    Store(tmp_path / "store", made, "tiny", say=str).refresh()
    assert answer() == before
    made.close()
    made.thread.result()


def test_hostile_and_broken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_peft(tmp_path / name, 1)
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "other.safetensors")
    (tmp_path / "b" / "adapter_config.json").write_text("{")
    nemo = write_nemo(tmp_path / "c") / "lora.nemo"
    os.truncate(nemo, nemo.stat().st_size // 2)
    config = export_samples.config_of(SHAPE)
    export_samples.write_adapter(tmp_path / "d" / "x.nemo", config, {"x": Evil()})
    for name in "abcd":
        with pytest.raises(CheckpointError):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


class Evil:
    """What a pickle can do."""

    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("order", ["interleaved", "qkv"])
def test_row_order_and_scale_are_those_the_nemo_states(tmp_path, order):
    """Served weights equal those of a Hugging Face export made by hand, for both row orders of a
    fused q, k, v."""
    from workshop_utils.adapters.export import export

    base = write_base(tmp_path / "tiny")
    source = write_nemo(tmp_path / "a", targets=("attention_qkv",)) / "lora.nemo"
    reader = "trtllm" if order == "qkv" else "nemo"
    made = export(source, "nemo", tmp_path / "b" / "x.nemo", reader=reader)
    config, tensors = read(made.parent)
    state = export_samples.tensors_of(SHAPE, ("attention_qkv",))
    state = {key: value * 1.07 for key, value in state.items()}
    model = export_samples.add_like_nemo(load(base)[0], SHAPE, state, 2)
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    plain, tokenizer = load(base)
    plain = get_peft_model(plain, LoraConfig(**config)).eval()
    missing = set_peft_model_state_dict(plain, tensors).missing_keys
    assert not [key for key in missing if "lora" in key]
    ask = [[{"role": "user", "content": "Hello"}]]
    assert generate(plain, tokenizer, ask, 20, progress=False) == generate(
        model, tokenizer, ask, 20, progress=False
    )
    assert json.dumps(config)
