"""The zip of ``torch.save``: its pickle, and where its storages lie, once it is known to be one
file to every reader.

A zip says twice what it holds, before each part and in the directory at its end, and may hold one
name twice, parts inside others, or something else before its beginning. What differs between
readers of zips is refused. Nothing is decompressed: torch only stores. Source of the format:
``torch/serialization.py`` and ``caffe2/serialize/inline_container.cc`` (torch 2.13).
"""

import struct
import zipfile
from typing import IO

from workshop_utils.checkpoints.formats import restricted_pickle
from workshop_utils.checkpoints.formats.pickle_machine import Inert
from workshop_utils.core.errors import DamagedCheckpoint, UnsafeCheckpoint, UnsupportedCheckpoint
from workshop_utils.core.terminal import plain

MAX_PICKLE = 64 * 1024**2
MAX_ENTRIES = 200_000


def read(
    file: IO[bytes], where: str, allowed: restricted_pickle.Allowed
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The pickle of the archive, and key -> (start, length) of its storages in ``file``; ``where``
    names it in errors.

    Raises :class:`DamagedCheckpoint`, :class:`UnsafeCheckpoint` (two readers would see two files,
    TorchScript, or no zip but a pickle that calls names outside ``allowed``) and
    :class:`UnsupportedCheckpoint` (torch before 1.6, big-endian).
    """
    file.seek(0)
    start = file.read(4)
    if start != b"PK\x03\x04":
        raise _no_zip(file, where, start, allowed)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise DamagedCheckpoint(
                    f"{where} has {len(entries):,} parts; at most {MAX_ENTRIES:,} are read."
                )
            places = _places(file, where, entries)
            top = entries[0].filename.partition("/")[0] if entries else ""
            if f"{top}/data.pkl" not in places or not all(
                name.startswith(f"{top}/") for name in places
            ):
                raise DamagedCheckpoint(
                    f"{where} is a zip but none that torch.save wrote: it has no data.pkl, or "
                    "several."
                )
            if f"{top}/constants.pkl" in places or any(
                name.startswith(f"{top}/code/") for name in places
            ):
                raise UnsafeCheckpoint(
                    f"{where} holds a program (TorchScript), which torch.load would compile. "
                    "Nothing was executed."
                )
            if (length := places[f"{top}/data.pkl"][1]) > MAX_PICKLE:
                raise DamagedCheckpoint(
                    f"{where}: data.pkl has {length:,} bytes; at most {MAX_PICKLE:,} are read."
                )
            data = archive.read(f"{top}/data.pkl")
            order = (
                archive.read(f"{top}/byteorder")
                if places.get(f"{top}/byteorder", (0, 99))[1] < 10
                else b"little"
            )
    except zipfile.BadZipFile as error:
        raise DamagedCheckpoint(
            f"{where} is no file that torch.save wrote, or it is cut off: {plain(str(error), 200)}"
        ) from error
    except (
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        OverflowError,
        struct.error,
    ) as error:
        raise DamagedCheckpoint(f"{where} cannot be read: {plain(str(error), 200)}") from error
    if order != b"little":
        raise UnsupportedCheckpoint(
            f"{where} was written on a big-endian machine. Load and save it once on this one "
            "with torch."
        )
    prefix = f"{top}/data/"
    return data, {
        name.removeprefix(prefix): place
        for name, place in places.items()
        if name.startswith(prefix)
    }


def _places(
    file: IO[bytes], where: str, entries: list[zipfile.ZipInfo]
) -> dict[str, tuple[int, int]]:
    """Name -> (start, length) of each part. Raises UnsafeCheckpoint where two readers could see two
    things, or parts overlap."""
    places: dict[str, tuple[int, int]] = {}
    seen: set[str] = set()
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = plain(entry.filename, 100)
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04" or entry.header_offset < end:
            raise UnsafeCheckpoint(
                f"{where}: {name} overlaps another part or lies elsewhere: two readers may see "
                "two files."
            )
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        stored_name = file.read(name_length)
        if (
            stored_name
            != entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
            or entry.filename.lower() in seen
        ):
            raise UnsafeCheckpoint(
                f"{where}: {name} is there twice or under two names: two readers may see two files."
            )
        if (
            entry.compress_type != zipfile.ZIP_STORED
            or entry.flag_bits & 1
            or entry.compress_size != entry.file_size
        ):
            raise DamagedCheckpoint(
                f"{where}: {name} is compressed or encrypted, which torch.save never does."
            )
        start = entry.header_offset + 30 + name_length + extra_length
        end = start + entry.file_size
        seen.add(entry.filename.lower())
        places[entry.filename] = start, entry.file_size
    return places


def _no_zip(
    file: IO[bytes], where: str, start: bytes, allowed: restricted_pickle.Allowed
) -> Exception:
    """What is wrong with a file that is no zip: pickles of the time before, harmless or not, or
    something else."""
    if start[:1] == b"\x80":
        file.seek(0)
        data = file.read(MAX_PICKLE)
        calls, _ = restricted_pickle.scan_all(data, allowed, lambda key: Inert("storage"))
        if calls:
            return restricted_pickle.unsafe(where, calls)
    if start[:2] == b"\x80\x02":
        return UnsupportedCheckpoint(
            f"{where} is in the format of torch before 1.6. Load and save it once: "
            "torch.save(torch.load(file, weights_only=True), new)"
        )
    return DamagedCheckpoint(f"{where} is no file that torch.save wrote, or it is cut off.")
