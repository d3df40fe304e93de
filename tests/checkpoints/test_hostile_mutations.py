"""Whatever is done to a genuine file, or made up from the parts of its format: only a WorkshopError
comes out, in bounded memory."""

import pickle
import struct

import pytest
from fuzz import readers, seeds
from hostile_reader import bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(
    max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None
)

INTERESTING = [
    0,
    1,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Target -> genuine files."""
    directory = tmp_path_factory.mktemp("seeds")
    seeds.write(directory)
    return {
        target: [file.read_bytes() for file in sorted((directory / target).iterdir())]
        for target in readers.TARGETS
    }


def run(target: str, data: bytes) -> bool:
    with bounded(len(data)):
        return readers.run(target, data)


@st.composite
def edits(draw: st.DrawFn) -> list[tuple]:
    """Changes of a file: where (as a part of its length), what, and with what."""
    place = st.floats(0, 1)
    number = st.tuples(
        st.sampled_from(INTERESTING), st.sampled_from(["<B", "<H", "<I", "<Q", ">I"])
    )
    return draw(
        st.lists(
            st.one_of(
                st.tuples(place, st.just("set"), st.binary(min_size=1, max_size=4)),
                st.tuples(place, st.just("insert"), st.binary(min_size=1, max_size=20)),
                st.tuples(place, st.just("number"), number),
                st.tuples(place, st.just("remove"), st.integers(1, 40)),
                st.tuples(
                    place, st.just("repeat"), st.tuples(st.integers(1, 60), st.integers(2, 2000))
                ),
                st.tuples(place, st.just("copy"), st.tuples(place, st.integers(1, 60))),
                st.tuples(place, st.just("cut"), st.none()),
            ),
            min_size=1,
            max_size=5,
        )
    )


def changed(data: bytes, steps: list[tuple]) -> bytes:
    for place, what, detail in steps:
        at = int(place * len(data))
        if what == "set":
            data = data[:at] + detail + data[at + len(detail) :]
        elif what == "insert":
            data = data[:at] + detail + data[at:]
        elif what == "number":
            value, form = detail
            content = struct.pack(form, value % (1 << 8 * struct.calcsize(form)))
            data = data[:at] + content + data[at + len(content) :]
        elif what == "remove":
            data = data[:at] + data[at + detail :]
        elif what == "repeat":
            data = data[:at] + data[at : at + detail[0]] * detail[1] + data[at:]
        elif what == "copy":
            start = int(detail[0] * len(data))
            data = data[:at] + data[start : start + detail[1]] + data[at:]
        else:
            data = data[:at]
    return data[: 1 << 20]


@pytest.mark.parametrize("target", readers.TARGETS)
def test_changed_files(corpus, target):
    for data in corpus[target]:
        assert run(target, data) or target == "tar", "the file as it was has to be read"

    @SETTINGS
    @given(st.sampled_from(corpus[target]), edits())
    def check(data, steps):
        run(target, changed(data, steps))

    check()


OPCODES = st.one_of(
    st.sampled_from(
        [
            bytes([op])
            for op in b"()]}Nlteusab.012R\x81\x92\x93\x94\x85\x86\x87\x88\x89\x8f\x90\x91oQ"
        ]
    ),
    st.integers(0, 20).map(lambda n: b"h" + bytes([n])),
    st.integers(0, 20).map(lambda n: b"q" + bytes([n])),
    st.integers(0, 255).map(lambda n: b"K" + bytes([n])),
    st.sampled_from(INTERESTING).map(lambda n: b"\x8a\x09" + n.to_bytes(9, "little")),
    st.sampled_from(
        ["a", "0", "storage", "cpu", "state_dict", "torch", "Size", "fqn", "offset", "latin1"]
    ).map(lambda text: b"\x8c" + bytes([len(text)]) + text.encode()),
    st.sampled_from(
        [
            b"ctorch\nSize\n",
            b"ctorch\nFloatStorage\n",
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\nOrderedDict\n",
            b"cargparse\nNamespace\n",
            b"cposix\nsystem\n",
            b"c_codecs\nencode\n",
            b"ccollections\ndefaultdict\n",
            b"cbuiltins\nlist\n",
            b"ctorch.distributed.checkpoint.metadata\nMetadata\n",
            b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n",
            b"ctorch.distributed.checkpoint.metadata\nTensorProperties\n",
            b"\x82\x01",
            b"Px\n",
            b"iposix\nsystem\n",
        ]
    ),
)


@pytest.mark.parametrize("target", ["index", "scan", "state"])
def test_made_up_pickles(target):
    @settings(SETTINGS, max_examples=300)
    @given(st.lists(OPCODES, max_size=60))
    def check(parts):
        run(target, b"\x80\x04" + b"".join(parts) + b".")

    check()


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
KEYS = st.text() | st.integers(-(2**61) + 2, 2**61 - 2) | st.none() | st.booleans() | st.binary()
VALUES = st.recursive(
    PLAIN,
    lambda inside: st.lists(inside) | st.lists(inside).map(tuple) | st.dictionaries(KEYS, inside),
    max_leaves=40,
)


@settings(SETTINGS, max_examples=300)
@given(VALUES, st.integers(0, 5))
def test_plain_values_come_back_as_pickle_has_them(value, protocol):
    from workshop_utils.checkpoints.formats import restricted_pickle

    allowed = {
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
        ("__builtin__", "bytes"): bytes,
    }
    assert restricted_pickle.survey(pickle.dumps(value, protocol), "x", allowed) == ([], value)


@SETTINGS
@given(st.data())
def test_made_up_indexes(data):
    """torch's own classes with any values in their fields."""
    import torch
    from torch.distributed.checkpoint import metadata as classes
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62]), max_size=3).map(torch.Size)
    odd = sizes | st.sampled_from(
        [None, -1, 2**70, "x", (1, "a"), (-1,), [1], (True,), ((1,),), 1.5, {}]
    )
    names = st.sampled_from(["a", "b", "module.x", "", "../x", "é\n", None, 3, ("a",)])
    file = st.sampled_from(["__0_0.distcp", "__0_1.distcp", "../x", "/x", "", None, 3, "a\0"])
    metadata = classes.Metadata({}, None, {})
    for _ in range(data.draw(st.integers(0, 4))):
        chunks = []
        name = data.draw(names)
        for _ in range(data.draw(st.integers(0, 3))):
            offsets = data.draw(odd)
            chunks.append(classes.ChunkStorageMetadata(offsets, data.draw(odd)))
            key = classes.MetadataIndex("x")
            object.__setattr__(key, "fqn", data.draw(st.just(name) | names))
            object.__setattr__(key, "offset", data.draw(st.just(offsets) | odd))
            try:
                metadata.storage_data[key] = _StorageInfo(
                    data.draw(file), data.draw(st.sampled_from(INTERESTING) | st.none()), 10
                )
            except TypeError:  # a list as an offset has no hash in torch either
                continue
        properties = classes.TensorProperties(
            dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.complex64]))
        )
        entry = classes.TensorStorageMetadata(
            properties, data.draw(odd), data.draw(st.just(chunks) | st.none())
        )
        metadata.state_dict_metadata[name] = data.draw(
            st.just(entry) | st.sampled_from([classes.BytesStorageMetadata(), None, 3])
        )
    run("index", pickle.dumps(metadata))
