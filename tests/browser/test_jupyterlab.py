"""Every notebook as a learner sees it: opened in JupyterLab, with nothing broken on the page."""

import json
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
BROKEN = [
    "Error displaying widget",
    "Loading widget",
    "Javascript Error",
    "model not found",
    "Error rendering",
    "Syntax error in",
]

pytestmark = pytest.mark.browser

# Drawn: as many cells as the file has, every text cell rendered, every image loaded, and the kernel at rest.
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


def open_notebook(browser, lab, file: Path) -> dict:
    """Open ``file`` in a workspace of its own, wait until it is drawn, and return its content."""
    content = json.loads(file.read_text())
    kinds = [cell["cell_type"] for cell in content["cells"]]
    browser.get("about:blank")
    browser.get_log("browser")  # what leaving the page before had to say
    browser.get(f"{lab.address}/lab/workspaces/{file.stem}/tree/notebooks/{file.name}?reset&token={lab.token}")
    drawn = WebDriverWait(browser, 120)
    drawn.until(lambda page: page.execute_script(READY, len(kinds), kinds.count("markdown")), f"{file.name} was not drawn")
    return content


def screenshot(browser, name: str) -> None:
    """The whole page, in ``runs/browser``."""
    browser.set_window_size(1400, min(16000, browser.execute_script(HEIGHT) + 250))
    target = ROOT / "runs" / "browser" / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(target))
    browser.set_window_size(1400, 1800)


def texts(browser, selector: str) -> list[str]:
    """Texts of the elements in the open notebook, and in what lies over it, that match ``selector``."""
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_nothing_is_broken_on_the_page(browser, lab, file):
    content = open_notebook(browser, lab, file)
    screenshot(browser, file.stem)
    assert texts(browser, ".jp-Dialog, .Toastify__toast") == []
    meant = [output for cell in content["cells"] for output in cell.get("outputs", []) if output["output_type"] == "error"]
    assert len(texts(browser, ".jp-Notebook [data-mime-type='application/vnd.jupyter.error']")) == len(meant)
    assert texts(browser, ".jp-Notebook [data-mime-type='application/vnd.jupyter.stderr']") == []
    assert texts(browser, ".jp-Notebook .katex-error, .jp-Notebook mjx-merror, .jp-RenderedMermaid.jp-mod-error") == []
    page = "\n".join(texts(browser, ".jp-Notebook"))
    assert [sign for sign in BROKEN if sign in page] == []
    images = "return [...document.querySelectorAll('.jp-Notebook img')].filter(one => !one.naturalWidth).map(one => one.alt || one.src)"
    assert browser.execute_script(images) == []
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_first_notebook_runs_in_the_browser(browser, lab):
    """Run All in JupyterLab, not nbclient: the kernel is the right one, and the form is there to be used."""
    content = open_notebook(browser, lab, NOTEBOOKS[0])
    browser.set_script_timeout(180)
    run = "const done = arguments[0]; jupyterapp.commands.execute('notebook:run-all-cells').then(() => done(true), e => done(String(e)))"
    assert browser.execute_async_script(run) is True
    counts = "return jupyterapp.shell.currentWidget.content.widgets.map(one => one.model.executionCount).filter(one => one)"
    code = sum(cell["cell_type"] == "code" for cell in content["cells"])
    WebDriverWait(browser, 60).until(lambda page: len(page.execute_script(counts)) == code, "not every cell ran")
    WebDriverWait(browser, 30).until(lambda _: texts(browser, ".jp-Notebook .widget-dropdown"), "the form was not drawn")
    screenshot(browser, f"{NOTEBOOKS[0].stem}-run")
    assert texts(browser, ".jp-Notebook [data-mime-type='application/vnd.jupyter.error']") == []
    assert texts(browser, ".jp-Dialog") == []
