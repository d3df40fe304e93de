"""Write the tables of NOTICE.md: the licences of the pinned packages, and what their wheels bring
along from others.

    python scripts/licences.py            in an environment with the pinned packages ("make lock"
    calls it)

It says what the wheels declare: their metadata, their licence texts and their lists of components
(CycloneDX).
"""

import json
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from workshop_utils.core.paths import write_text
from workshop_utils.series.lock import normalised, read_lock

ROOT = Path(__file__).resolve().parent.parent
START, END = (
    "<!-- Written by scripts/licences.py: do not edit. -->",
    "<!-- End of what it wrote. -->",
)

# How packages that do not use SPDX's names call these licences.
SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD (variant in its text)",
    "BSD License": "BSD (variant in its text)",
    "BSD-3": "BSD-3-Clause",
    "GNU General Public License (GPL)": "GPL-2.0-or-later",
    "GNU General Public License v2 or later (GPLv2+)": "GPL-2.0-or-later",
    "GPL-3.0-with-GCC-exception": "GPL-3.0-or-later WITH GCC-exception-3.1",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
# Copyleft of what is linked in shows only in the licence texts of a wheel.
TEXTS = {
    r"GCC RUNTIME LIBRARY EXCEPTION": "GPL-3.0-or-later WITH GCC-exception-3.1",
    r"GNU LESSER GENERAL PUBLIC LICENSE\s+Version 2\.1|LGPL 2\.1": "LGPL-2.1-or-later",
    r"Mozilla Public License,? [Vv]ersion 2\.0\n": "MPL-2.0",
}
# Part of GCC; three wheels that carry it say nothing about it.
RUNTIME_OF_GCC = {"libgomp": "GPL-3.0-or-later WITH GCC-exception-3.1"}


@cache
def licence(distribution: metadata.Distribution) -> str:
    """What ``distribution`` declares, in SPDX's words where it is clear which of them is meant."""
    declared = distribution.metadata
    classifiers = [
        text.split(" :: ")[-1]
        for text in declared.get_all("Classifier", [])
        if text.startswith("License ::")
    ]
    field = (declared.get("License") or "").strip()
    named = [
        SPDX.get(text, text)
        for text in classifiers
        if text not in ("OSI Approved", "Other/Proprietary License")
    ]
    if expression := declared.get("License-Expression"):
        return expression
    if re.fullmatch(r"[\w.+-]+-[\d.]+[\w.-]*( (AND|OR) [\w.+-]+)*", field):
        return SPDX.get(field, field)
    if named:
        return " OR ".join(sorted(set(named), reverse=True))
    if field:
        return SPDX.get(field.splitlines()[0], field.splitlines()[0])
    text = "\n".join(_texts(distribution).values())
    if "Apache License, Version 2.0" in text or re.search(r"Apache License\s+Version 2\.0", text):
        return "Apache-2.0"
    return "not declared"


def shared_libraries(distribution: metadata.Distribution) -> list[str]:
    """Paths of the shared libraries of others: those that were copied into ``NAME.libs``, and GCC's
    wherever they lie."""
    names = [str(file) for file in _files(distribution) if re.search(r"\.so(\.\d+)*$", file.name)]
    return sorted(name for name in names if ".libs/" in name or _library(name) in RUNTIME_OF_GCC)


def brought_along(distribution: metadata.Distribution) -> tuple[set[str], set[str]]:
    """Names of the libraries of others in the wheel, and the licences that it names for what it
    contains beside its own."""
    libraries = {_library(name) for name in shared_libraries(distribution)}
    licences = {RUNTIME_OF_GCC[name] for name in libraries & set(RUNTIME_OF_GCC)}
    for text in _texts(distribution).values():
        named = re.findall(
            r"^Name: .*\nFiles: .*\n(?:.*\n){0,4}?License: (.*)$", text, re.MULTILINE
        )
        licences |= {SPDX.get(spdx, spdx) for spdx in named}
        licences |= {spdx for phrase, spdx in TEXTS.items() if re.search(phrase, text)}
    for file in _files(distribution):
        if file.parent.name == "sboms" and file.name.endswith("json"):
            for component in json.loads(file.read_text()).get("components", []):
                licences |= set().union(*map(_chosen, component.get("licenses", [])))
    own = licence(distribution)
    return libraries, {spdx for spdx in licences if spdx.removesuffix("-or-later") not in own}


def _chosen(entry: dict) -> set[str]:
    """The licences of a component, each that has to be kept; of several that it offers, MIT or
    Apache-2.0."""
    words = entry.get("expression") or entry["license"].get("id") or entry["license"].get("name")
    kept = set()
    for part in re.split(r" AND ", words):
        offered = {one.strip("() ") for one in re.split(r" OR |/", part)}
        kept |= offered & {"MIT"} or offered & {"Apache-2.0"} or {part.strip("() ")}
    return kept


def tables(lock: Path) -> str:
    """Both tables, in Markdown."""
    installed = {
        name: metadata.distribution(name) for name in sorted(map(normalised, read_lock(lock)))
    }
    by_licence: dict[str, list[str]] = {}
    for name, distribution in installed.items():
        by_licence.setdefault(licence(distribution), []).append(name)
    lines = ["| Licence | Packages |", "|---|---|"]
    lines += [
        f"| {spdx} | {', '.join(names)} |"
        for spdx, names in sorted(by_licence.items(), key=lambda row: row[0].lower())
    ]
    lines += [
        "",
        "What wheels bring along from others, as far as they say so; texts are in the wheels:",
        "",
    ]
    lines += [
        "| Wheel | Shared libraries in it | Licences named for what is in it |",
        "|---|---|---|",
    ]
    for name, distribution in installed.items():
        libraries, licences = brought_along(distribution)
        if libraries or licences:
            named = ", ".join(sorted(licences, key=str.lower)) or "see its licence text"
            lines.append(
                f"| {name} | {', '.join(sorted(libraries, key=str.lower)) or '–'} | {named} |"
            )
    return "\n".join(lines)


def updated(notice: str, lock: Path) -> str:
    """``notice`` with the tables between its two marks written anew."""
    before, rest = notice.split(START)
    return f"{before}{START}\n\n{tables(lock)}\n\n{END}{rest.split(END)[1]}"


def _library(path: str) -> str:
    """``libgfortran`` for ``numpy.libs/libgfortran-040039e1.so.5.0.0``."""
    return re.sub(r"(-[0-9a-f]{8})+|-r\d+-[0-9a-f]{8}[\d.]*(dev)?|\.so.*$", "", Path(path).name)


@cache
def _files(distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    """What the wheel installed: a file is read for it, which for torch has some ten thousand
    lines."""
    return distribution.files or []


@cache
def _texts(distribution: metadata.Distribution) -> dict[str, str]:
    """Licence texts in the wheel's metadata, by path; the rest of a wheel may hold those of test
    data."""
    found = [
        file
        for file in _files(distribution)
        if re.search(
            r"\.dist-info/(licenses/)?[^/]*(licen[cs]e|copying|notice)", str(file), re.IGNORECASE
        )
    ]
    return {
        str(file): file.read_text(encoding="utf-8")
        for file in found
        if Path(file.locate()).is_file() and file.suffix != ".py"
    }


if __name__ == "__main__":
    notice = ROOT / "NOTICE.md"
    write_text(notice, updated(notice.read_text(encoding="utf-8"), ROOT / "requirements.txt"))
    print("wrote NOTICE.md")
