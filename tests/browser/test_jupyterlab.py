"""Every notebook as a learner sees it: opened in JupyterLab, with nothing broken on the page."""

import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from contrast import LINES, TEXT, contrast
from places import ROOT
from selenium.webdriver.support.ui import WebDriverWait

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
BROKEN = ["Error displaying widget", "Loading widget", "Javascript Error", "model not found"]
BROKEN += ["Error rendering", "Syntax error in"]
ERRORS = ".jp-Notebook [data-mime-type='application/vnd.jupyter.error']"

pytestmark = pytest.mark.browser

# Drawn: as many cells as the file has, every text cell rendered, every image loaded, and the kernel
# at rest.
READY = """
    const panel = window.jupyterapp?.shell.currentWidget;
    if (!panel?.content?.widgets || !panel.sessionContext?.isReady) return false;
    const node = panel.content.node;
    return node.querySelectorAll('.jp-Cell').length === arguments[0]
        && node.querySelectorAll('.jp-MarkdownCell.jp-mod-rendered').length === arguments[1]
        && [...node.querySelectorAll('img')].every(image => image.complete)
        && panel.sessionContext.session?.kernel?.status === 'idle';
"""

# From the top of the page to the notebook's last line.
HEIGHT = """
    const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)');
    const footer = panel.querySelector('.jp-Notebook-footer').getBoundingClientRect().bottom;
    return Math.ceil(footer + panel.querySelector('.jp-WindowedPanel-outer').scrollTop);
"""

THEMES = ["JupyterLab Light", "JupyterLab Dark", "JupyterLab Dark High Contrast"]

# Of every diagram: each text with its colour and the one behind it, and the colours of the lines
# with that of the page. A diagram is
# an image, of which a page sees no colours; so it is taken apart beside the page, where the page's
# styles do not reach it.
COLOURS = """
    const opaque = colour => /^rgb\\(/.test(colour) ? colour : null;
    return [...document.querySelectorAll('.jp-Notebook .jp-RenderedMermaid img')].map(image => {
        let page = image;
        while (!opaque(getComputedStyle(page).backgroundColor)) page = page.parentElement;
        page = getComputedStyle(page).backgroundColor;
        const host = document.body.appendChild(document.createElement('div'));
        host.style.all = 'initial';
        const source = decodeURIComponent(image.src.slice(image.src.indexOf(',') + 1));
        const svg = document.importNode(new DOMParser().parseFromString(source, 'image/svg+xml').documentElement, true);
        host.attachShadow({mode: 'open'}).append(svg);
        const texts = [], lines = [];
        for (const one of svg.querySelectorAll(':not(style, title, desc)')) {
            const style = getComputedStyle(one);
            if (one.closest('marker')) lines.push([style.fill, page]);
            else if (style.fill === 'none' && opaque(style.stroke)) lines.push([style.stroke, page]);
            if (![...one.childNodes].some(child => child.nodeType === Node.TEXT_NODE && child.data.trim())) continue;
            let behind = null;
            for (let place = one; place !== svg && !behind; place = place.parentElement) {
                const shape = place.matches('.node, .cluster') && place.querySelector('rect, path, polygon, circle, ellipse');
                behind = opaque(shape ? getComputedStyle(shape).fill : getComputedStyle(place).backgroundColor);
            }
            texts.push([one.textContent, one instanceof SVGElement ? style.fill : style.color, behind ?? page]);
        }
        host.remove();
        return {alt: image.alt, texts, lines};
    });
"""  # noqa: E501


def open_notebook(browser, lab, file: Path) -> dict:
    """Open ``file`` in a workspace of its own, wait until it is drawn, and return its content."""
    content = json.loads(file.read_text())
    kinds = [cell["cell_type"] for cell in content["cells"]]
    browser.get("about:blank")
    browser.get_log("browser")  # what leaving the page before had to say
    place = f"{lab.address}/lab/workspaces/{file.stem}/tree/notebooks/{file.name}"
    browser.get(f"{place}?reset&token={lab.token}")
    counts = len(kinds), kinds.count("markdown")
    wait(browser, 120, f"{file.name} was not drawn", READY, *counts)
    return content


def wait(browser, seconds: int, fault: str, script: str, *words) -> None:
    """Until ``script`` returns something."""
    drawn = WebDriverWait(browser, seconds)
    drawn.until(lambda page: page.execute_script(script, *words), fault)


def screenshot(browser, name: str) -> None:
    """The whole page, in ``runs/browser``."""
    browser.set_window_size(1400, min(16000, browser.execute_script(HEIGHT) + 250))
    target = ROOT / "runs" / "browser" / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(target))
    browser.set_window_size(1400, 1800)


def texts(browser, selector: str) -> list[str]:
    """Texts of the elements in the open notebook, and in what lies over it, that match
    ``selector``."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector
    )


def change_theme(browser, name: str) -> None:
    """As the menu does it, without closing anything."""
    change = (
        "const [theme, done] = arguments; jupyterapp.commands.execute('apputils:change-theme', "
        "{theme}).then(() => done(''), done)"
    )
    assert not browser.execute_async_script(change, name)
    shown = (
        "return document.body.dataset.jpThemeName === arguments[0] && "
        "document.body.dataset.jpThemeLight"
    )
    wait(browser, 30, f"there is no theme {name}", shown, name)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_nothing_is_broken_on_the_page(browser, lab, file):
    content = open_notebook(browser, lab, file)
    screenshot(browser, file.stem)
    assert texts(browser, ".jp-Dialog, .Toastify__toast") == []
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", [])]
    meant = [output for output in outputs if output["output_type"] == "error"]
    assert len(texts(browser, ERRORS)) == len(meant)
    assert texts(browser, ERRORS.replace("jupyter.error", "jupyter.stderr")) == []
    formulas = ".jp-Notebook .katex-error, .jp-Notebook mjx-merror"
    assert texts(browser, f"{formulas}, .jp-RenderedMermaid.jp-mod-error") == []
    page = "\n".join(texts(browser, ".jp-Notebook"))
    assert [sign for sign in BROKEN if sign in page] == []
    images = (
        "return [...document.querySelectorAll('.jp-Notebook img')].filter(one => "
        "!one.naturalWidth).map(one => one.alt || one.src)"
    )
    assert browser.execute_script(images) == []
    log = browser.get_log("browser")
    assert [entry["message"] for entry in log if entry["level"] == "SEVERE"] == []


def test_the_first_notebook_runs_in_the_browser(browser, lab):
    """Run All in JupyterLab, not nbclient: the kernel is the right one, and the form is there to be
    used."""
    content = open_notebook(browser, lab, NOTEBOOKS[0])
    browser.set_script_timeout(180)
    run = (
        "const done = arguments[0]; "
        "jupyterapp.commands.execute('notebook:run-all-cells').then(() => done(true), e => "
        "done(String(e)))"
    )
    assert browser.execute_async_script(run) is True
    counts = (
        "return jupyterapp.shell.currentWidget.content.widgets.map(one => "
        "one.model.executionCount).filter(one => one).length === arguments[0]"
    )
    code = sum(cell["cell_type"] == "code" for cell in content["cells"])
    wait(browser, 60, "not every cell ran", counts, code)
    form = "return document.querySelector('.jp-Notebook .widget-dropdown')"
    wait(browser, 30, "the form was not drawn", form)
    screenshot(browser, f"{NOTEBOOKS[0].stem}-run")
    assert texts(browser, ERRORS) == []
    assert texts(browser, ".jp-Dialog") == []


def test_the_map_of_the_series_leads_to_the_notebooks(browser, lab):
    open_notebook(browser, lab, NOTEBOOKS[0])
    links = browser.find_elements("css selector", ".jp-Notebook table a")
    names = [Path(urlsplit(link.get_attribute("href")).path).name for link in links]
    assert names == [file.name for file in NOTEBOOKS]
    links[4].click()
    opened = "return window.jupyterapp.shell.currentWidget.context?.path === arguments[0]"
    wait(browser, 30, "the notebook did not open", opened, f"notebooks/{NOTEBOOKS[4].name}")


@pytest.mark.parametrize("first", THEMES[:2])
@pytest.mark.parametrize(
    "file",
    [file for file in NOTEBOOKS if "```mermaid" in file.read_text()],
    ids=lambda file: file.stem,
)
def test_diagrams_stay_legible_when_the_theme_changes(browser, lab, file, first):
    open_notebook(browser, lab, file)
    try:
        change_theme(browser, first)
        open_notebook(browser, lab, file)
        for theme in THEMES:
            change_theme(browser, theme)
            diagrams = browser.execute_script(COLOURS)
            assert diagrams
            for diagram in diagrams:
                assert f"accTitle: {diagram['alt']}\\n" in file.read_text()
                assert diagram["texts"] and diagram["lines"]
                pale = [text for text in diagram["texts"] if contrast(*text[1:]) < TEXT]
                assert pale == [], theme
                assert [line for line in diagram["lines"] if contrast(*line) < LINES] == [], theme
    finally:
        change_theme(browser, THEMES[0])
