"""The notebooks in JupyterLab as a reader has them, in a real browser.

Chromium is Debian's package `chromium`; Playwright, which drives it, comes with `make build/browser/ready`.
"""

import os
import re
import shutil
import subprocess
import time

import pytest
from conftest import ROOT, run, tracked

if not shutil.which("chromium"):
    pytest.skip("needs Chromium, such as Debian's package `chromium`", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make build/browser/ready")
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session.kernel"
READY = "window." + KERNEL.replace(".", "?.") + "?.status == 'idle'"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab as `make lab` starts it, in a copy of the notebooks: the address that it opens."
    folder = tmp_path_factory.mktemp("lab")
    for f in tracked("nbs/*.ipynb") + tracked("figures/*.png"):
        (folder / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, folder / f)
    names = "HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"
    own = os.environ | {name: str(folder / "own") for name in names}
    for name in "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "OMP_NUM_THREADS":
        own.pop(name, None)
    command = run("make", "--no-print-directory", "--dry-run", "lab", env=own).replace("\\\n", " ").strip()
    options = f"--no-browser --ServerApp.root_dir={folder} --LabApp.expose_app_in_browser=True --ServerApp.port=0"
    with open(folder / "log", "w") as log:
        shell = ["bash", "-c", f"exec env {command} {options}"]
        server = subprocess.Popen(shell, cwd=ROOT, env=own, stdout=log, stderr=log)
    end = time.monotonic() + 60
    try:
        while not (said := re.search(r"http://127.0.0.1:\S+\?token=\w+", (folder / "log").read_text())):
            assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.1)
        yield said[0]
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def opened(lab, browser):
    "Opens a notebook in a tab of its own; at the end nothing may have gone wrong there."
    tabs, wrong = [], []

    def begin(page):
        tabs.append(tab := browser.new_page())
        tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(re.sub(r"nbs/\w+\.ipynb", page, lab) + "&reset")
        tab.wait_for_function(READY, timeout=60_000)
        return tab

    yield begin
    for tab in tabs:
        tab.close()
    assert not wrong


def test_make_lab_opens_the_tour_with_the_threads_of_the_runs(lab, opened):
    assert "/lab/tree/nbs/tour.ipynb?" in lab
    tab = opened("nbs/tour.ipynb")
    asked = "{code: 'import torch', user_expressions: {threads: 'torch.get_num_threads()'}}"
    reply = tab.evaluate(f"async () => (await {KERNEL}.requestExecute({asked}).done).content.user_expressions")
    assert reply["threads"]["data"]["text/plain"] == "1"


@pytest.mark.parametrize("page", ["nbs/tour.ipynb", "nbs/method/03_models.ipynb", "nbs/experiments/train_vae.ipynb"])
def test_a_page_opens_unchanged(opened, page):
    tab = opened(page)
    tab.wait_for_timeout(2000)
    assert tab.evaluate("jupyterapp.shell.currentWidget.context.path") == page
    assert not tab.evaluate("jupyterapp.shell.currentWidget.context.model.dirty")


def test_sliders_move_their_pictures(opened):
    "Each picture is a still one first; when its page has run, every slider changes it."
    tab = opened("nbs/play.ipynb")
    sync_api.expect(tab.locator(".jp-RenderedImage img")).to_have_count(5)
    assert not tab.locator(".noUi-handle").count()
    tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    tab.wait_for_function("document.querySelectorAll('.jupyter-widgets img[alt]').length == 5", timeout=120_000)
    sliders = tab.locator(".noUi-handle").all()
    assert len(sliders) == 9
    for slider in sliders:
        image = slider.locator("xpath=ancestor::div[contains(@class, 'widget-vbox')][1]").locator("img[alt]")
        before, said = image.get_attribute("src"), image.get_attribute("alt")
        slider.scroll_into_view_if_needed()
        slider.focus()
        slider.press("ArrowRight")
        sync_api.expect(image).not_to_have_attribute("src", before, timeout=10_000)
        assert image.get_attribute("alt") != said
