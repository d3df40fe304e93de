"""Rules that every notebook keeps: its outputs are there and compared, and its page is in order."""

import itertools
import json
import re
from pathlib import Path

import pytest
from contrast import LINES, TEXT, contrast
from places import ROOT

FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9][0-9]_*.ipynb"))
NOT_COMPARED = {"nbval-ignore-output", "nbval-skip", "skip-execution"}

every_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells(file: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == kind]


def tags(cell: dict) -> set[str]:
    return set(cell["metadata"].get("tags", []))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_series_is_there():
    numbers = [file.name[:2] for file in NOTEBOOKS]
    assert len(numbers) >= 8
    assert numbers == [f"{number:02}" for number in range(len(numbers))]


@every_notebook
def test_most_cells_are_executed_and_compared(file):
    code = cells(file, "code")
    markers = re.compile(r"#\s*(NBVAL_IGNORE_OUTPUT|NBVAL_SKIP|PYTEST_VALIDATE_IGNORE_OUTPUT)")
    compared = [
        cell
        for cell in code
        if cell["execution_count"]
        and not tags(cell) & NOT_COMPARED
        and not markers.search(source(cell))
    ]
    assert len(compared) >= 0.6 * len(code), (
        f"{len(compared)} of {len(code)}; store outputs with `workshop run --save-outputs`"
    )


@every_notebook
def test_every_cell_was_executed_in_order_in_a_fresh_kernel(file):
    executed = [cell for cell in cells(file, "code") if "skip-execution" not in tags(cell)]
    counts = [cell["execution_count"] for cell in executed]
    assert counts == list(range(1, len(counts) + 1))


@every_notebook
def test_no_error_in_the_outputs_but_those_that_are_meant(file):
    """nbval allows an exception in a cell with the tag; it does not ask for one."""
    for cell in cells(file, "code"):
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert ("error" in kinds) == ("raises-exception" in tags(cell)), source(cell)
        assert "UsageError:" not in json.dumps(cell["outputs"]), source(cell)
        assert "stderr" not in [output.get("name") for output in cell["outputs"]], source(cell)


@every_notebook
def test_no_shell_and_no_magic_that_nbval_cannot_see_fail(file):
    for cell in cells(file, "code"):
        assert not re.search(r"^\s*(!|%)", source(cell), re.MULTILINE), source(cell)


@every_notebook
def test_small_and_without_widget_state(file):
    assert file.stat().st_size <= 200_000
    whole = json.loads(file.read_text())
    assert "widgets" not in whole["metadata"]
    outputs = json.dumps([cell.get("outputs") for cell in whole["cells"]])
    assert "application/vnd.jupyter.widget" not in outputs


@every_notebook
def test_nothing_of_the_machine_it_ran_on(file):
    outputs = json.dumps([cell["outputs"] for cell in cells(file, "code")])
    assert not re.search(r"/(home|root|Users|tmp|work|usr)/", outputs)
    assert json.loads(file.read_text())["metadata"]["language_info"] == {"name": "python"}


@every_notebook
def test_one_title_and_no_level_left_out(file):
    text = "\n\n".join(source(cell) for cell in cells(file, "markdown"))
    without_code = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    levels = [len(hashes) for hashes in re.findall(r"^(#{1,6}) ", without_code, re.MULTILINE)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels


@every_notebook
def test_images_have_alternative_text(file):
    text = "\n".join(source(cell) for cell in cells(file, "markdown"))
    assert "![](" not in text
    assert all("alt=" in image for image in re.findall(r"<img[^>]*>", text))


def test_hardly_a_cell_is_over_twenty_lines():
    lines = [len(source(cell).splitlines()) for file in NOTEBOOKS for cell in cells(file, "code")]
    assert sum(count > 20 for count in lines) <= 0.02 * len(lines)


@every_notebook
def test_links_to_files_of_the_repository_lead_somewhere(file):
    text = "\n".join(source(cell) for cell in cells(file, "markdown"))
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (file.parent / target).exists(), target


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the Markdown table in ``text`` whose first line begins with ``head``, that line
    and the one below left out."""
    table = text[text.index(f"| {head} |") :].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def diagrams(file: Path) -> list[str]:
    text = "\n\n".join(source(cell) for cell in cells(file, "markdown"))
    return re.findall(r"^```mermaid\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_map_of_notebook_00_is_the_table_of_the_readme():
    readme = rows((ROOT / "README.md").read_text().replace("](notebooks/", "]("), "Notebook")
    assert rows(source(cells(NOTEBOOKS[0], "markdown")[1]), "Notebook") == readme
    linked = [re.search(r"\]\((.+)\)", name)[1] for name, *_ in readme]
    assert linked == [file.name for file in NOTEBOOKS]


def test_the_ways_through_the_series_take_as_long_as_their_notebooks():
    text = source(cells(NOTEBOOKS[0], "markdown")[1])
    run = {
        re.search(r"\d\d", row[0])[0]: int(re.search(r"\d+", row[-1])[0])
        for row in rows(text, "Notebook")
    }
    read = {}
    for file in NOTEBOOKS:
        first = source(cells(file, "markdown")[0])
        read[file.name[:2]] = int(re.search(r"(\d+) minutes to read", first)[1])
    boxes = dict(re.findall(r"\bn(\d\d)(\[|\(\[)(?=\1 )", diagrams(NOTEBOOKS[0])[0]))
    assert boxes.keys() == run.keys()
    shorter = sorted(number for number, box in boxes.items() if box == "([")
    ways = (shorter, shorter), (["00", max(run)], run)
    for row, (named, way) in zip(rows(text, "Way"), ways, strict=True):
        assert re.findall(r"\d\d", row[1]) == named
        times = [sum(known[number] for number in way) for known in (read, run)]
        assert [int(minutes) for minutes in row[2:]] == times


def test_diagrams_have_one_look_and_a_title():
    """JupyterLab draws a diagram once; it keeps its colours when the theme changes. The title
    becomes the image's alternative text."""
    drawn = [diagram for file in NOTEBOOKS for diagram in diagrams(file)]
    looks = {diagram.splitlines()[0] for diagram in drawn}
    assert len(looks) == 1, "every diagram begins with the same line, %%{init: ...}%%"
    assert all("\n  accTitle: " in diagram for diagram in drawn)
    colours = json.loads(looks.pop().removeprefix("%%{init: ").removesuffix("}%%"))[
        "themeVariables"
    ]
    assert contrast(colours["primaryTextColor"], colours["primaryColor"]) >= TEXT
    for ground in ("#ffffff", "#111111"):  # of JupyterLab's light and dark themes
        assert contrast(colours["lineColor"], ground) >= LINES
        assert contrast(colours["primaryBorderColor"], ground) >= LINES


@every_notebook
def test_what_is_imported_is_taught_or_of_the_series(file):
    """Nothing of the terminal's room, and of the lowest only what ``series`` hands on."""
    code = "\n".join(source(cell) for cell in cells(file, "code"))
    assert not re.findall(r"workshop_utils\.(?:cli|core)\b.*|from workshop_utils import .*", code)
