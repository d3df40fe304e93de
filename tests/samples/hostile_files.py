"""Files that want to harm their reader, made when the tests run: what each is, the reader it is
for, and how it must be refused.

:func:`corpus` returns :class:`Case` objects. ``content`` is the file; ``reader`` one of ``index``
(``.metadata``), ``state`` (``common.pt``, ``.ckpt``, ``.bin``), ``nemo``, ``yaml``, ``json``,
``safetensors`` and ``gguf``.
"""

import gzip
import io
import json
import pickle
import struct
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

UNSAFE, DAMAGED, NOTHING, UNSUPPORTED = (
    "UnsafeCheckpoint",
    "DamagedCheckpoint",
    "NotACheckpoint",
    "UnsupportedCheckpoint",
)


@dataclass(frozen=True)
class Case:
    """One file: ``expected`` is the class of the error."""

    name: str
    reader: str
    content: bytes
    expected: str


def short(text: str) -> bytes:
    """Opcode SHORT_BINUNICODE: a string."""
    return b"\x8c" + bytes([len(text.encode())]) + text.encode()


def name(module: str, attribute: str) -> bytes:
    """Opcode STACK_GLOBAL: a name."""
    return short(module) + short(attribute) + b"\x93"


def gadgets(command: str) -> dict[str, bytes]:
    """Pickles that run the shell command ``command`` if they are loaded, or load or fetch
    something, each in its own way."""
    words = short(command) + b"\x85"
    system = b"cposix\nsystem\n"
    code = short(f"__import__('os').system({command!r})") + b"\x85"
    metadata = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81"
    ways = {
        "REDUCE": system + words + b"R.",
        "GLOBAL of another spelling": b"cos\nsystem\n" + words + b"R.",
        "STACK_GLOBAL": name("posix", "system") + words + b"R.",
        "dotted name": name("torch", "serialization.os.system") + words + b"R.",
        "INST": b"(" + words[:-1] + b"iposix\nsystem\n.",
        "OBJ": b"(" + system + words[:-1] + b"o.",
        "NEWOBJ": b"csubprocess\nPopen\n" + words + b"\x81.",
        "NEWOBJ_EX": b"csubprocess\nPopen\n" + words + b"}" + short("shell") + b"\x88s\x92.",
        "BUILD": b"cfoo\nBar\n)\x81}" + short("x") + words[:-1] + b"sb.",
        "eval": b"cbuiltins\neval\n" + code + b"R.",
        "exec of Python 2": b"c__builtin__\nexec\n" + code + b"R.",
        "getattr": b"cbuiltins\ngetattr\n" + b"cbuiltins\n__import__\n" + short("os") + b"\x85R"
            + short("system") + b"\x86R" + words + b"R.",
        "import": b"cimportlib\nimport_module\n" + short("antigravity") + b"\x85R.",
        "reduce": b"cfunctools\nreduce\ncoperator\nadd\n" + words + b"\x86R.",
        "runpy": b"crunpy\n_run_code\n" + code[:-1] + b"}\x86R.",
        "pickle in a pickle": b"c_pickle\nloads\nC" + bytes([len(words) + 18]) + b"\x80\x04"
            + system + words + b"R." + b"\x85R.",
        "torch.load": b"ctorch\nload\n" + words + b"R.",
        "torch's bytes": b"ctorch.storage\n_load_from_bytes\nC\x01x\x85R.",
        "torch.hub": b"ctorch.hub\nload\n" + short("a/b") + short("c") + b"\x86R.",
        "numpy.load": b"cnumpy\nload\n" + words + b"R.",
        "a file": b"cbuiltins\nopen\n" + short("/dev/zero") + b"\x85R.",
        "inside a list": b"]" + system + words + b"Ra.",
        "thrown away": b"}" + system + words + b"R0.",
        "as a value": b"}" + short("a") + system + words + b"Rs.",
        "as a state": metadata + system + words + b"Rb.",
        "after a bad call": b"ctorch\nSize\n]\x85R0" + system + words + b"R.",
        "before a break": system + words + b"R\xff",
        "named only": b"cwebbrowser\nopen\n.",
        "method of an allowed class": name("torch", "Size.__new__") + words + b"R.",
        "EXT1": b"\x82\x05" + words + b"R.",
        "EXT2": b"\x83\x05\x01" + words + b"R.",
        "EXT4": b"\x84\x05\x01\x01\x01" + words + b"R.",
        "memo": system + b"\x940" + words + b"\x940h\x00h\x01R.",
        "through DUP": system + b"20" + words + b"R.",
    }  # fmt: skip
    return {way: b"\x80\x04" + content for way, content in ways.items()}


def breaking_pickles() -> dict[str, bytes]:
    """Pickles that exhaust memory, time or the stack of a machine that follows them."""
    pair = b"K\x01\x85\x94" + b"".join(
        b"h" + bytes([n]) * 1 + b"h" + bytes([n]) + b"\x86\x94" for n in range(60)
    )
    deep_tuple = b")" + b"\x85" * 300_000
    ways = {
        "empty": b"",
        "no end": b"\x80\x04",
        "nothing on the stack": b"\x80\x04.",
        "unknown opcode": b"\x80\x04\xfe.",
        "memo of 2^31": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "memo of 2^60": b"\x80\x04Np1152921504606846976\n.",
        "memo below zero": b"\x80\x04Np-1\n.",
        "get below zero": b"\x80\x04N\x94g-1\n.",
        "string of 2^62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "bytes of 2^62 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "bytearray of 2^40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
        "frame of 2^62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "string with a negative length": b"\x80\x02T\xff\xff\xff\xffx.",
        "key that hashes for ever": b"\x80\x04}" + pair + b"Ns.",
        "member that hashes for ever": b"\x80\x04\x8f(" + pair + b"\x90.",
        "frozenset that hashes for ever": b"\x80\x04(" + pair + b"\x91.",
        "key that overflows the stack": b"\x80\x04}" + deep_tuple + b"Ns.",
        "tuples 300,000 deep": b"\x80\x04" + deep_tuple + b".",
        "lists 300,000 deep": b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "dicts 200,000 deep": b"\x80\x04" + b"}K\x01" * 200_000 + b"N" + b"s" * 200_000 + b".",
        "marks": b"\x80\x04" + b"(" * 900_000 + b".",
        "sets": b"\x80\x04(" + b"\x8f" * 900_000 + b"l.",
        "dictionaries": b"\x80\x04(" + b"}" * 900_000 + b"l.",
        "number of 300,000 bytes": b"\x80\x04\x8b" + struct.pack("<I", 300_000) + b"\x01" *
            300_000 + b".",
        "number of 300,000 digits": b"\x80\x02L" + b"9" * 300_000 + b"L\n.",
        "large number as a key": b"\x80\x04}\x8a\x40" + b"\x01" * 64 + b"Ns.",
        "keys of one hash": b"\x80\x04}(" + b"".join(b"\x8a\x0b" + (n * (2**61 -
            1)).to_bytes(11, "little") + b"N" for n in range(60_000)) + b"u.",
        "tuples as keys": b"\x80\x04}(" + b"".join(b"M" + struct.pack("<H", n) + b"\x85N" for n
            in range(60_000)) + b"u.",
        "a long key over and over": b"\x80\x04}"
        + 2 * (b"X" + struct.pack("<I", 2**22) + b"k" * 2**22 + b"\x94N\x94s")
        + 40_000 * b"h\x00Nsh\x02Ns"
        + b".",
        "a dictionary as a key": b"\x80\x04}}Ns.",
        "a key without a value": b"\x80\x04}(K\x01u.",
        "items into a number": b"\x80\x04K\x01K\x02K\x03s.",
        "a mark below the stack": b"\x80\x04NN(00u.",
        "change of a class":
            b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.",
        "persistent name": b"\x80\x02Px\n.",
        "call of a number": b"\x80\x04K\x01)R.",
        "call with a list": b"\x80\x04ctorch\nSize\n]R.",
        "half a surrogate": b"\x80\x02V\\ud800\n.",
        "line without end": b"\x80\x02I" + b"1" * 500_000,
    }  # fmt: skip
    return ways


def states() -> dict[str, bytes]:
    """Pickles of states that no loop over them gets to the end of, or with tensors that contradict
    their storages."""

    def tensor(
        offset: bytes = b"K\x00",
        size: bytes = b"K\x04\x85",
        stride: bytes = b"K\x01\x85",
        elements: bytes = b"K\x10",
        key: str = "0",
    ) -> bytes:
        storage = (
            b"("
            + short("storage")
            + b"ctorch\nFloatStorage\n"
            + short(key)
            + short("cpu")
            + elements
            + b"tQ"
        )
        return (
            b"}"
            + short("w")
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + storage
            + offset
            + size
            + stride
            + b"\x89NtRs."
        )

    big = b"\x8a\x09" + (2**63).to_bytes(9, "little")
    doubling = (
        b"]\x94"
        + b"".join(b"]\x94(h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(60))
        + b"."
    )
    ways = {
        "references to references": b"}" + short("a") + doubling[:-1] + b"s.",
        "a list that holds itself": b"}" + short("a") + b"]\x94h\x00as.",
        "a mapping that holds itself": b"}\x94" + short("a") + b"h\x00s.",
        "lists 200 deep": b"}" + short("a") + b"]" * 200 + b"a" * 199 + b"s.",
        "a tensor that ends outside": tensor(offset=b"K\x0e"),
        "a tensor larger than its storage": tensor(size=b"K\x20\x85"),
        "strides that lead outside": tensor(stride=b"K\x09\x85"),
        "a storage that is missing": tensor(key="7"),
        "a shape of 2^63": tensor(size=big + b"\x85"),
        "a shape of 2^90": tensor(size=(b"\x8a\x05" + (2**30).to_bytes(5, "little")) * 3 +
            b"\x87", stride=b"K\x00K\x00K\x00\x87"),
        "an offset of 2^63": tensor(offset=big),
        "a negative offset": tensor(offset=b"J\xff\xff\xff\xff"),
        "a shape without strides": tensor(stride=b")"),
        "elements that are no number": tensor(elements=b"N"),
        "a tensor that is changed afterwards": tensor()[:-2] + b"(" + b"N" * 4 + b"tbs.",
        "no tensors": b"N.",
    }  # fmt: skip
    return {way: b"\x80\x04" + content for way, content in ways.items()}


def archive(pickled: bytes, *more: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """``pickled`` as torch.save stores it, with one storage of 64 bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as made:
        for part, data in (("a/data.pkl", pickled), ("a/data/0", bytes(64)), *more):
            made.writestr(zipfile.ZipInfo(part) if method == zipfile.ZIP_STORED else part, data)
    return content.getvalue()


def _zips(evil: bytes) -> dict[str, tuple[bytes, str]]:
    good = archive(b"\x80\x02}.")
    order = archive(b"\x80\x02}.", ("a/byteorder", b"big"))
    central = good.index(b"PK\x01\x02")
    encrypted = bytearray(good)
    encrypted[central + 8] |= 1
    moved = bytearray(good)
    second = good.index(b"PK\x01\x02", central + 4)
    # The second part begins where the first does.
    moved[second + 42 : second + 46] = bytes(4)
    renamed = good.replace(b"a/data.pkl", b"a/DATA.PKL", 1)
    many = bytearray(good)
    many[-10:-6] = b"\xff\xff\xff\xff"
    return {
        "the pickle twice": (_twice(evil), UNSAFE),
        "the pickle twice in another case": (archive(b"\x80\x02}.", ("a/Data.pkl", evil)), UNSAFE),
        "two models": (archive(b"\x80\x02}.", ("b/data.pkl", evil)), DAMAGED),
        "another name in the local header": (renamed, UNSAFE),
        "parts that overlap": (bytes(moved), UNSAFE),
        "encrypted": (bytes(encrypted), DAMAGED),
        "compressed": (archive(b"\x80\x02}.", method=zipfile.ZIP_DEFLATED), DAMAGED),
        "a bomb": (archive(bytes(60_000_000), method=zipfile.ZIP_DEFLATED), DAMAGED),
        "a pickle before the zip": (evil + good, UNSAFE),
        "something before the zip": (b"x" * 100 + good, DAMAGED),
        "TorchScript": (archive(b"\x80\x02}.", ("a/constants.pkl", b""), ("a/code/x.py",
            b"")), UNSAFE),
        "a zip as its pickle": (archive(good), DAMAGED),
        "no pickle": (archive(b"").replace(b"a/data.pkl", b"a/data.pkx"), DAMAGED),
        "big-endian": (order, UNSUPPORTED),
        "a pickle alone": (evil, UNSAFE),
        "several pickles": (b"\x80\x02N." + b"\x80\x02N." + evil, UNSAFE),
        "pickles of the time before":
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.", UNSUPPORTED),
        "directory of parts elsewhere": (bytes(many), DAMAGED),
    }  # fmt: skip


def _twice(evil: bytes) -> bytes:
    """Two parts of one name, which zipfile itself warns of."""
    content = archive(b"\x80\x02}.", ("a/data.pkm", evil))
    return content.replace(b"a/data.pkm", b"a/data.pkl")


GOOD = (("model_config.yaml", b"num_layers: 2\n"), ("model_weights.ckpt", archive(b"\x80\x02}.")))


def tar(
    *entries: tarfile.TarInfo | tuple[str, bytes],
    mode: str = "w",
    form: int = tarfile.GNU_FORMAT,
    **fields: dict,
) -> bytes:
    """A tar of files and special entries; ``fields`` go into the extended header of the archive."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode, format=form, **fields) as made:
        for entry in entries:
            if isinstance(entry, tuple):
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                made.addfile(info, io.BytesIO(entry[1]))
            else:
                made.addfile(entry)
    return content.getvalue()


def special(path: str, kind: bytes, target: str = "", **more: object) -> tarfile.TarInfo:
    """An entry that is no plain file."""
    entry = tarfile.TarInfo(path)
    entry.type, entry.linkname = kind, target
    for field, value in more.items():
        setattr(entry, field, value)
    return entry


def _raw(path: bytes, size: bytes, kind: bytes, content: bytes = b"") -> bytes:
    """An entry byte by byte; ``size`` is the field's text or its number in base 256."""
    header = bytearray(512)
    header[: len(path)] = path
    header[100:108] = b"0000644\0"
    header[124 : 124 + len(size)] = size
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % 512)


def _pax(path: str = "", **fields: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(path or "x")
    entry.pax_headers = fields
    return entry


def _tars(evil: bytes) -> dict[str, tuple[bytes, str]]:
    pax = {"form": tarfile.PAX_FORMAT}
    good = tar(*GOOD)
    body = good[: good.rindex(b"PK\x05\x06") // 512 * 512 + 512]
    record = b"60000 path=" + b"1" * (60000 - 12) + b"\n"
    digits = _raw(b"p", b"%011o" % 60_000, b"x", b"1" * 60_000) + _raw(b"a", b"%011o" % 0, b"0")
    end = bytes(1024)
    return {
        **{f"the name {path}": (tar(*GOOD, (path, b"x")), UNSAFE) for path in
            ("../outside", "a/../../outside", "/absolute", "..\\outside", "C:\\x",
            "a\nb", "a\x1b[2J", "..")},
        "a symbolic link": (tar(*GOOD, special("link", tarfile.SYMTYPE, "/etc/passwd")), UNSAFE),
        "a hard link": (tar(*GOOD, special("link", tarfile.LNKTYPE, "model_config.yaml")), UNSAFE),
        "a link as the weights": (tar(GOOD[0], special("model_weights.ckpt",
            tarfile.SYMTYPE, "/etc/passwd")), UNSAFE),
        "a character device": (tar(*GOOD, special("device", tarfile.CHRTYPE)), UNSAFE),
        "a block device": (tar(*GOOD, special("device", tarfile.BLKTYPE)), UNSAFE),
        "a pipe": (tar(*GOOD, special("pipe", tarfile.FIFOTYPE)), UNSAFE),
        "an unknown type": (tar(*GOOD, special("x", b"Z")), UNSAFE),
        "a sparse file": (body + _raw(b"x", b"%011o" % 0, b"S") + end, UNSAFE),
        "a directory with content": (body + _raw(b"d/", b"%011o" % 512, b"5", bytes(512)) +
            end, UNSAFE),
        "one name twice": (tar(*GOOD, GOOD[0]), UNSAFE),
        "one name twice, with a dot": (tar(*GOOD, (".//model_config.yaml", b"a: 1")), UNSAFE),
        "one name twice, in capitals": (tar(*GOOD, ("MODEL_CONFIG.yaml", b"a: 1")), UNSAFE),
        "one name twice, in Unicode": (tar(*GOOD, ("caf\u00e9", b""),
            (unicodedata.normalize("NFD", "caf\u00e9"), b"")), UNSAFE),
        "a directory in the place of a file": (tar(*GOOD, special("model_config.yaml",
            tarfile.DIRTYPE)), UNSAFE),
        "PAX path": (tar(*GOOD, _pax(path="../outside"), **pax), UNSAFE),
        "PAX path with a NUL": (body + _raw(b"p", b"%011o" % 13, b"x", b"13 path=a\0bc\n") +
            _raw(b"a", b"0" * 11, b"0") + end, UNSAFE),
        "PAX linkpath": (tar(*GOOD, _pax(linkpath="/etc/passwd"), **pax), UNSAFE),
        "PAX sparse": (tar(*GOOD, _pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
            **pax), UNSAFE),
        "PAX size": (body + _raw(b"p", b"%011o" % 20, b"x", b"20 size=9999999999 \n"[:20]) +
            _raw(b"a", b"0" * 11, b"0") + end, DAMAGED),
        "PAX size below zero": (body + _raw(b"p", b"%011o" % 12, b"x", b"12 size=-99\n") +
            _raw(b"a", b"0" * 11, b"0") + end, DAMAGED),
        "PAX for all entries": (tar(*GOOD, pax_headers={"path": "x"}, **pax), UNSAFE),
        "PAX of digits": (body + digits * 16 + end, DAMAGED),
        "PAX of 60,000 characters": (body + _raw(b"p", b"%011o" % len(record), b"x", record) +
            _raw(b"a", b"0" * 11, b"0") + end, DAMAGED),
        "PAX of 10 MB": (body + _raw(b"p", b"%011o" % 10_000_000, b"x", bytes(900_000)) +
            end, DAMAGED),
        "PAX before nothing": (body + _raw(b"p", b"%011o" % 12, b"x", b"12 path=abc\n") +
            end, DAMAGED),
        "GNU long name": (tar(*GOOD, ("../" * 60 + "outside", b"x")), UNSAFE),
        "GNU long link": (tar(*GOOD, special("link", tarfile.SYMTYPE, "x" * 200)), UNSAFE),
        "a negative size": (_raw(b"a", b"\xff" + (2**88 - 1024).to_bytes(11, "big"), b"0") +
            good, NOTHING),
        "a size of 2^80": (body + _raw(b"a", b"\x80" + (2**80).to_bytes(11, "big"), b"0") +
            end, DAMAGED),
        "a size of 8 GB": (body + _raw(b"a", b"77777777777\0", b"0") + end, DAMAGED),
        "no end": (body, DAMAGED),
        "a damaged header": (body + b"x" * 512 + end, DAMAGED),
        "a gzip bomb": (gzip.compress(body + _raw(b"a", b"77777777777\0", b"0") +
            bytes(150_000_000)), UNSAFE),
        "a gzip cut off": (tar(*GOOD, mode="w:gz")[:-40], DAMAGED),
        "gzip of something else": (gzip.compress(b"hello" * 1000), NOTHING),
        "gzip in gzip": (gzip.compress(tar(*GOOD, mode="w:gz")), NOTHING),
        "100,000 entries": (gzip.compress(b"".join(_raw(b"%d" % n, b"0" * 11, b"0") for n in
            range(100_000)) + end), DAMAGED),
        "weights that run a command": (tar(GOOD[0], (GOOD[1][0], archive(evil))), UNSAFE),
        "weights that are a pickle": (tar(GOOD[0], (GOOD[1][0], evil)), UNSAFE),
        "a configuration with a tag": (tar(("model_config.yaml",
            b"a: !!python/name:os.system"), GOOD[1]), UNSAFE),
        "a .nemo in a .nemo": (tar(("a.nemo", good)), DAMAGED),
        "nothing": (b"", NOTHING),
        "zeros": (bytes(10_240), NOTHING),
    }  # fmt: skip


def yamls(command: str) -> dict[str, tuple[bytes, str]]:
    """``model.yaml`` files."""
    laughs = b"a0: &a0 [1, 1]\n" + b"".join(
        b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 12)
    )
    merges = b"a0: &a0 {x: 1}\n" + b"".join(
        b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 40)
    )
    return {
        "object/apply": (f"a: !!python/object/apply:os.system ['{command}']".encode(), UNSAFE),
        "object/new": (f"a: !!python/object/new:subprocess.Popen ['{command}']".encode(), UNSAFE),
        "name": (b"a: !!python/name:os.system", UNSAFE),
        "module": (b"!!python/module:antigravity : 1", UNSAFE),
        "tuple": (b"a: !!python/tuple [1, 2]", UNSAFE),
        "long tag": (b"a: !<tag:yaml.org,2002:python/object/apply:os.system> [x]", UNSAFE),
        "tag of a prefix":
            (b"%TAG !x! tag:yaml.org,2002:python/\n---\na: !x!name:os.system ''", UNSAFE),
        "as a key": (b"? !!python/name:os.system\n: 1", UNSAFE),
        "aliases": (laughs, DAMAGED),
        "merge keys": (merges, DAMAGED),
        "contains itself": (b"a: &a [*a]", DAMAGED),
        "brackets": (b"a: " + b"[" * 500_000, DAMAGED),
        "dashes": (b"a:\n " + b"- " * 200_000, DAMAGED),
        "question marks": (b"? " * 200_000, DAMAGED),
        "values": (b"a: [" + b"1," * 490_000 + b"]", DAMAGED),
        "one key twice": (b"a: 1\nb: 2\na: 3\n", DAMAGED),
        "one key twice, quoted": (b"a: 1\n'a': 3\n", DAMAGED),
        "a number of 10,000 digits": (b"a: " + b"9" * 10_000, DAMAGED),
        "a number in base 60": (b"a: 1" + b":59" * 100_000, DAMAGED),
        "a number that is none": (b"a: !!int ''", DAMAGED),
        "a date that is none": (b"a: !!timestamp x", DAMAGED),
        "a month that is none": (b"a: 2001-99-99", DAMAGED),
        "a truth that is none": (b"a: !!bool perhaps", DAMAGED),
        "bytes that are none": (b"a: !!binary 'x'", DAMAGED),
        "an unknown tag": (b"a: !mine 1", DAMAGED),
        "a mapping as a key": (b"? {a: 1}\n: 2", DAMAGED),
        "no UTF-8": (b"a: \xff\xfe\x80", DAMAGED),
        "NUL": (b"a: \x00b", DAMAGED),
        "two documents": (b"a: 1\n---\nb: 2\n", DAMAGED),
        "a list": (b"- 1\n", DAMAGED),
        "nothing": (b"", DAMAGED),
        "cut off": (b"a: [1, 2", DAMAGED),
        "a tab": (b"a:\n\t- 1\n  b: 2", DAMAGED),
    }  # fmt: skip


def jsons() -> dict[str, bytes]:
    """``config.json`` files; all are damaged."""
    return {
        "brackets": b'{"a": ' + b"[" * 500_000,
        "nested 150 deep": b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}",
        "objects": b'{"a":' * 100_000,
        "NaN": b'{"a": NaN}',
        "a number of 10,000 digits": b'{"a": ' + b"9" * 10_000 + b"}",
        "one key twice": b'{"a": 1, "a": 2}',
        "one key twice, escaped": b'{"a": 1, "\\u0061": 2}',
        "half a surrogate": b'{"a": "\\ud800"}',
        "no UTF-8": b'{"a": "\xff"}',
        "a list": b"[1]",
        "a number": b"1",
        "nothing": b"",
        "NUL": b"\x00",
        "something after": b'{"a": 1} {"a": 2}',
        "cut off": b'{"a": [1',
    }


def safetensors(entry: dict | str, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    """A safetensors file of the header ``entry``, which says it has ``length`` bytes."""
    header = (entry if isinstance(entry, str) else json.dumps(entry)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _safetensors() -> dict[str, bytes]:
    def one(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> bytes:
        return safetensors({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})

    return {
        "nothing": b"",
        "a header of 2^63 bytes": safetensors({}, 2**63),
        "a header longer than the file": safetensors({}, 100),
        "a header of brackets": safetensors("[" * 200_000),
        "a header with a key twice": safetensors('{"a": 1, "a": 2}'),
        "a shape of 2^63": one([2**63]),
        "a shape that overflows": one([2**32, 2**32, 2], (0, 8)),
        "a negative shape": one([-2]),
        "a shape of a float": one([2.0]),
        "a shape of a truth": one([True, 2]),
        "offsets of 2^63": one(offsets=(2**63, 2**63 + 8)),
        "offsets outside": one(offsets=(4, 12)),
        "offsets turned round": one(offsets=(8, 0)),
        "three offsets": one(offsets=(0, 4, 8)),
        "a tensor that is a list": safetensors({"a": []}),
    }


def _gguf() -> dict[str, tuple[bytes, str]]:
    def header(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)

    def text(value: bytes, length: int | None = None) -> bytes:
        return struct.pack("<Q", len(value) if length is None else length) + value

    def tensor(dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
        body = (
            text(b"a")
            + struct.pack("<I", len(dimensions))
            + b"".join(struct.pack("<Q", size) for size in dimensions)
        )
        return header(1) + body + struct.pack("<IQ", kind, offset) + bytes(256)

    nested = text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 60_000
    return {
        "nothing": (b"", NOTHING),
        "another magic": (b"GGML" + bytes(100), NOTHING),
        "version 99": (header(version=99), UNSUPPORTED),
        "2^63 tensors": (header(2**63), DAMAGED),
        "2^63 pairs": (header(0, 2**63), DAMAGED),
        "a key of 2^63 bytes": (header(0, 1) + text(b"a", 2**63), DAMAGED),
        "an unknown type of value": (header(0, 1) + text(b"a") + struct.pack("<I", 99), DAMAGED),
        "an array of 2^62": (header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 0, 2**62),
            DAMAGED),
        "an array of 2^62 strings": (header(0, 1) + text(b"a") + struct.pack("<IIQ", 9, 8,
            2**62), DAMAGED),
        "arrays in arrays": (header(0, 1) + nested, DAMAGED),
        "a dimension of 2^63": (tensor([2**63]), DAMAGED),
        "dimensions that overflow": (tensor([2**32, 2**32, 2]), DAMAGED),
        "99 dimensions": (tensor([1] * 99), DAMAGED),
        "an offset of 2^63": (tensor([4], 0, 2**63), DAMAGED),
        "cut off": (tensor([4])[:40], DAMAGED),
    }  # fmt: skip


def _indexes() -> dict[str, tuple[bytes, str]]:
    """Indexes of torch's own classes that contradict themselves, or lead out of the directory."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    def index(
        place: tuple = ("__0_0.distcp", 0, 100),
        size: object = torch.Size((2, 4)),
        chunk: tuple = (torch.Size((0, 0)), torch.Size((2, 4))),
        change: Callable[[Metadata], object] = lambda metadata: None,
    ) -> bytes:
        entry = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), size, [ChunkStorageMetadata(*chunk)]
        )
        metadata = Metadata(
            {"a": entry},
            None,
            {
                MetadataIndex(
                    "a", chunk[0] if isinstance(chunk[0], torch.Size) else None
                ): _StorageInfo(*place)
            },
        )
        change(metadata)
        return pickle.dumps(metadata)

    def many(metadata: Metadata) -> None:
        """Each of 3,000 tensors names one chunk 100,000 times."""
        entry = metadata.state_dict_metadata["a"]
        entry.chunks *= 100_000
        place = next(iter(metadata.storage_data.values()))
        for number in range(3000):
            metadata.state_dict_metadata[f"a{number}"] = entry
            metadata.storage_data[MetadataIndex(f"a{number}", torch.Size((0, 0)))] = place

    def long_name(metadata: Metadata) -> None:
        """A name of 500 kB in thousands of faults."""
        name, place = "x" * 500_000, next(iter(metadata.storage_data.values()))
        place.offset = -1
        for number in range(8000):
            metadata.storage_data[MetadataIndex(name, torch.Size((number,)))] = place

    return {
        **{f"the file {path!r}": (index((path, 0, 100)), UNSAFE) for path in ("../x",
            "/etc/passwd", "a/../../x", "..\\x", "a\0b")},
        **{f"the offset {value!r}": (index(("__0_0.distcp", value, 100)), DAMAGED) for value in
            (-1, 2**63, 2**70, 2**62, True, 1.0, None)},
        **{f"the length {value!r}": (index(("__0_0.distcp", 0, value)), DAMAGED) for value in
            (-1, 2**63, 2**70, 2**62, "1")},
        **{f"the size {value!r}": (index(size=value), DAMAGED) for value in ((-1, 4), (2**63, 1),
            (2**70,), (True, 4), "ab", None, [2, 4], ((1, 2), 4))},
        "a chunk of another rank": (index(chunk=(torch.Size((0,)), torch.Size((2,)))), DAMAGED),
        "a chunk without a place": (index(change=lambda metadata:
            metadata.storage_data.clear()), DAMAGED),
        "a chunk named over and over": (index(change=many), DAMAGED),
        "a long name": (index(change=long_name), DAMAGED),
        "a shape of 65 dimensions": (index(size=torch.Size((1,) * 65)), DAMAGED),
        "a file that is missing": (index(("__9_9.distcp", 0, 100)), DAMAGED),
        "compressed": (index(("__0_0.distcp", 0, 100, ["zstd"])), UNSUPPORTED),
    }  # fmt: skip


def corpus(command: str) -> list[Case]:
    """Every case; those that run something run the shell command ``command``."""
    evil = gadgets(command)["REDUCE"]
    cases: list[Case] = []

    def add(reader: str, files: dict, expected: str | None = None) -> None:
        for what, content in files.items():
            cases.append(
                Case(
                    f"{reader}: {what}",
                    reader,
                    *(content if expected is None else (content, expected)),
                )
            )

    add("index", gadgets(command), UNSAFE)
    add("index", breaking_pickles(), DAMAGED)
    add("index", _indexes())
    add(
        "state",
        {
            f"zip of {way}": archive(content)
            for way, content in gadgets(command).items()
            if way != "as a state"
        },
        UNSAFE,
    )
    breaking = {
        way: content for way, content in breaking_pickles().items() if way != "change of a class"
    }
    add(
        "state",
        {f"zip of {way}": archive(content) for way, content in (breaking | states()).items()},
        DAMAGED,
    )
    add("state", _zips(evil))
    add("nemo", _tars(evil))
    add("yaml", yamls(command))
    add("json", jsons(), DAMAGED)
    add("safetensors", _safetensors(), DAMAGED)
    add("gguf", _gguf())
    return cases
