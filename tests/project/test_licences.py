"""NOTICE.md names the licences of what is installed, bundled libraries included."""

import platform
import runpy
from importlib import metadata
from pathlib import Path

import pytest
from places import ROOT

licences = runpy.run_path(str(ROOT / "scripts" / "licences.py"))


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "+cpu" not in metadata.version("torch"),
    reason="other wheels bring other libraries",
)
def test_notice_is_current():
    notice = (ROOT / "NOTICE.md").read_text(encoding="utf-8")
    assert notice == licences["updated"](notice, ROOT / "requirements.txt"), "run `make lock`"


@pytest.mark.parametrize("name", ["numpy", "scipy"])
def test_the_runtime_of_fortran_is_named(name):
    libraries, named = licences["brought_along"](metadata.distribution(name))
    assert {"libgfortran", "libquadmath"} <= libraries
    assert {"GPL-3.0-or-later WITH GCC-exception-3.1", "LGPL-2.1-or-later", "BSD-3-Clause"} <= named


def wheel(
    folder: Path, fields: str, text: str = "", name: str = "LICENSE"
) -> metadata.Distribution:
    info = folder / "a-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: a\nVersion: 1\n{fields}")
    (info / name).write_text(text)
    (info / "RECORD").write_text(
        f"a-1.dist-info/METADATA,,\na-1.dist-info/{name},,\na.libs/libx-0123abcd-4567cdef.so.2.0,,\n"
    )
    return metadata.Distribution.at(info)


@pytest.mark.parametrize(
    ("fields", "text", "expected"),
    [
        ("License-Expression: MIT OR Apache-2.0", "", "MIT OR Apache-2.0"),
        ("License: BSD-3-Clause\nClassifier: License :: OSI Approved :: BSD", "", "BSD-3-Clause"),
        ("License: Granted is\nClassifier: License :: OSI Approved :: MIT License", "", "MIT"),
        (
            "Classifier: License :: Other/Proprietary License",
            "Licensed under the Apache License, Version 2.0",
            "Apache-2.0",
        ),
        ("", "", "not declared"),
    ],
)
def test_the_most_exact_declaration_counts(tmp_path, fields, text, expected):
    assert licences["licence"](wheel(tmp_path, f"{fields}\n", text)) == expected


def test_libraries_and_copyleft_texts_are_found(tmp_path):
    text = "Name: X\nFiles: a.libs/*\nLicense: LGPL-2.1-or-later\n"
    made = wheel(tmp_path, "License-Expression: MIT\n", text, "LICENSES.txt")
    assert licences["brought_along"](made) == ({"libx"}, {"LGPL-2.1-or-later"})
