"""The site of `make site`: what it holds, that its links lead somewhere, and that it looks right in a browser.

Its tools come with `make build/site-tools/ready`.
"""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest
import tidy
from conftest import ROOT, run
from test_1_gates import ORDER, file_of

TOOLS = ROOT / "build/site-tools"
if not (TOOLS / "ready").exists():
    pytest.skip("needs Sphinx: make build/site-tools/ready", allow_module_level=True)
PAGES = {file.relative_to(tidy.NBS).with_suffix(".html").as_posix(): file for file in tidy.pages()}


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "Builds the site, for all workers that need it."
    own = tmp_path_factory.mktemp("site") / "site"
    built = tmp_path_factory.getbasetemp().parent / "site" if "PYTEST_XDIST_WORKER" in os.environ else own
    if not built.exists():
        plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        run("make", "--no-print-directory", "site", f"SITE={own}", env=plain)
        if not built.exists():
            own.rename(built)
    return built


def text(file):
    "What a page says, without its marks, spaces as one."
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", file.read_text())).split())


def test_links_of_the_site_lead_somewhere(site):
    "Those to anchors too; and nothing is loaded from another host."
    pages = {file: file.read_text() for file in site.rglob("*.html")}
    anchors = {file: {html.unescape(i) for i in re.findall(r'\bid="([^"]+)"', page)} for file, page in pages.items()}
    wrong = []
    for file, page in pages.items():
        for kind, link in re.findall(r'<(\w+)[^>]*? (?:href|src)="([^"]+)"', page):
            path, _, anchor = unquote(html.unescape(link)).partition("#")
            path = path.split("?")[0]
            if re.match(r"\w+:|//", link):
                wrong += [(file, link)] if kind != "a" else []
                continue
            target = (file.parent / path).resolve() if path else file
            if not target.is_file() or (anchor and target in anchors and anchor not in anchors[target]):
                wrong.append((file.relative_to(site), link))
    assert not wrong, wrong


def test_every_page_is_in_the_order_of_the_pages(site):
    "A reader who goes on and on sees each once."
    page, seen = site / "index.html", []
    while page:
        seen.append(page.relative_to(site).as_posix())
        following = re.search(r'<link rel="next" [^>]*href="([^"]+)"', page.read_text())
        page = following and (page.parent / following[1]).resolve()
    assert [page for page in seen if page in PAGES] == [*PAGES]
    assert seen[-2:] == ["contributing.html", "changelog.html"] and "reference/index.html" in seen


def functions(module):
    "Each public function and method of a module, and class: its name, and what its code says of it."
    code = file_of(module).read_text()
    tree, lines = ast.parse(code), code.splitlines()
    names = next((ast.literal_eval(n.value) for n in tree.body
                  if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), [])
    kinds = ast.FunctionDef, ast.ClassDef
    for node in tree.body:
        if isinstance(node, kinds) and node.name in names:
            yield node.name, node, lines
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
                yield from ((f"{node.name}.{n.name}", n, lines) for n in methods if n.name[0] != "_")


def comments(node, lines):
    "The comments of the parameters of a function, or of those with which a class is made."
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            numbers = [n.end_lineno for n in node.body if isinstance(n, ast.AnnAssign)]
        elif made:
            return comments(made[0], lines)
        else:
            return []
    else:
        a = node.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        numbers = [each.lineno for each in given]
        numbers += range(max(numbers, default=node.lineno), node.body[0].lineno)
    found = [re.search(r"  ?# ?(?:-> )?(.+)", lines[n - 1]) for n in dict.fromkeys(numbers)]
    return [each[1].strip() for each in found if each]


def test_every_function_is_in_the_reference(site):
    "With the comment of each of its parameters, and of what it returns."
    lost, found = [], 0
    for module in ORDER:
        file = site / f"reference/vae_diffusion.{module}.html"
        parts = re.split(r'<dt class="sig sig-object py" id="([^"]+)"', file.read_text())
        said = {name: html.unescape(re.sub(r"<[^>]+>", "", part)) for name, part in zip(parts[1::2], parts[2::2])}
        for name, node, lines in functions(module):
            there = " ".join(said.get(f"vae_diffusion.{module}.{name}", "nothing").split())
            wanted = [(ast.get_docstring(node) or "").split("\n")[0], *comments(node, lines)]
            lost += [(module, name, each) for each in wanted if " ".join(each.replace("`", "").split()) not in there]
            found += len(wanted)
    assert not lost, lost
    assert found > 1500


def test_cells_are_shown_as_the_pages_have_them(site):
    "No directive of nbdev; what only imports or checks is collapsed; each picture has its words."
    for name, file in PAGES.items():
        cells = [c for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
        page = (site / name).read_text()
        hidden = [c for c in cells if c["metadata"].get("jupyter") and "hide" not in c["metadata"].get("tags", [])]
        assert page.count('<details class="admonition hide') == len(hidden), name
        assert "#| " not in text(site / name), name
        pictures = [o for c in cells for o in c["outputs"] if "image/png" in o.get("data", {})]
        words = [html.unescape(words) for words in re.findall(r'<img alt="([^"]*)"', page)]
        given = [o["metadata"]["image/png"]["alt"] for o in pictures]
        assert not {*given} - {*words} and len(pictures) <= len(words), name


def test_broken_links_fail(tmp_path):
    "Each of them is named."
    shutil.copytree(ROOT / "workflow", tmp_path / "workflow")
    for f in "settings.ini", "CONTRIBUTING.md", "CHANGELOG.md":
        (tmp_path / f).write_text((ROOT / f).read_text() if f == "settings.ini" else "# Title\n")
    order = tmp_path / "workflow/tidy.py"
    order.write_text(re.sub(r'HALLWAY = """.*?"""', 'HALLWAY = """index glossary"""', order.read_text(), flags=re.S))
    links = "nowhere.ipynb", "glossary.ipynb#No-such-heading", "../figures/none.png", "../nowhere.txt"
    marks = [f"{'!' * link.endswith('png')}[words]({link})" for link in (*links, "glossary.ipynb#A-heading")]
    for name, lines in {"index": marks, "glossary": ["## A heading"]}.items():
        source = "\n\n".join(["# Page", "> Says", *lines])
        cell = {"cell_type": "markdown", "id": name, "metadata": {}, "source": source}
        page = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / "nbs").mkdir(exist_ok=True)
        (tmp_path / f"nbs/{name}.ipynb").write_text(json.dumps(page))
    (tmp_path / "sources").mkdir()
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", tmp_path / "workflow/site"]
    own = os.environ | {"PYTHONPATH": str(TOOLS)}
    done = subprocess.run([*command, tmp_path / "sources", tmp_path / "site"], env=own, capture_output=True, text=True)
    assert done.returncode, done.stderr
    assert all(link.split("/")[-1].split("#")[-1] in done.stderr for link in links), done.stderr
    assert "A-heading" not in done.stderr


class Quiet(SimpleHTTPRequestHandler):
    "Says nothing of what it serves."

    def log_message(self, *args):
        pass


@pytest.fixture
def address(site):
    "Where the site is served."
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


CUT_OFF = """() => {
    const auto = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX)
    const scrolls = e => e.tagName != "ARTICLE" && (auto(e) || scrolls(e.parentElement))
    const wide = e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e)
    return [...document.querySelectorAll("article :is(p, img, table, pre, dl)")].filter(wide).map(e => e.outerHTML)
}"""


@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_site_in_a_browser(address, browser, width, theme):
    "Nothing is wider than the screen, formulas are set, and a word is found."
    tab, wrong = browser.new_page(), []
    tab.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: asked.url.startswith((address, "data:")) or wrong.append(asked.url))
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=theme)
    for page in "index", "glossary", "results/fashion_mnist", "method/04_augment", "reference/vae_diffusion.data":
        tab.goto(f"{address}/{page}.html")
        assert tab.evaluate("document.documentElement.scrollWidth") == width and not tab.evaluate(CUT_OFF), page
        if tab.locator(".math").count():
            tab.wait_for_selector("mjx-container")
        assert not tab.locator("mjx-merror, [data-mjx-error]").count(), page
    tab.goto(f"{address}/search.html?q=amortization")
    tab.wait_for_selector("#search-results li a")
    tab.close()
    assert not wrong
