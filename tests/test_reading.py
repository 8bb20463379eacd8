"Pages that are read: links lead somewhere, numbers come from the stored results, and words are words."
import json
import re
import statistics

import pandas as pd
import pytest
from conftest import ROOT, tracked

READ = [p for p in tracked("nbs/*.ipynb") if p.count("/") == 1 or p.startswith(("nbs/results/", "nbs/experiments/"))]
RESULTS = [p for p in READ if p.startswith("nbs/results/")]
SHORT = [p for p in READ if p.startswith(("nbs/results/", "nbs/experiments/"))]
DATA = "digits", "binary_mnist", "fashion_mnist", "cifar10", "overview"


def cells(page, kind):
    return [c for c in json.loads((ROOT / page).read_text())["cells"] if c["cell_type"] == kind]


def prose(page):
    return "\n\n".join("".join(c["source"]) for c in cells(page, "markdown"))


def headings(page):
    "As JupyterLab links to them."
    return {h.replace(" ", "-") for h in re.findall(r"^#+ (.+)$", prose(page), re.M)}


def shown(page):
    "What is seen below the cells, but for pictures."
    for c in cells(page, "code"):
        for o in c["outputs"]:
            data = o.get("data", {})
            text = o.get("text") or data.get("text/markdown") or data.get("text/plain", [])
            if "image/png" not in data: yield "".join(text)


def plain(text):
    "Prose without code, commands and addresses."
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", text)


def stored_names():
    "Names of metrics and data sets that are no words."
    files = [ROOT / f for f in tracked("data/results/*.csv") if "/bench-" not in f]
    metrics = {m for f in files for m in pd.read_csv(f, usecols=["metric"]).metric.unique()}
    return {"binary_mnist", "fashion_mnist", "cifar10", "_coarse4", "_sample"} | {m for m in metrics if "_" in m}


LINKS = [(page, *link) for page in tracked("nbs/*.ipynb")
         for link in dict.fromkeys(re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", prose(page)))]


@pytest.mark.parametrize("page, file, anchor", LINKS)
def test_links_lead_somewhere(page, file, anchor):
    target = (ROOT / page).parent / file if file else ROOT / page
    assert target.is_file(), "JupyterLab opens files, not folders"
    if anchor: assert anchor in headings(target.resolve().relative_to(ROOT))


HALLWAY = "nbs/index.ipynb", "nbs/tour.ipynb", "nbs/glossary.ipynb"


@pytest.mark.parametrize("page", [p for p in READ if p not in HALLWAY])
def test_pages_lead_on(page):
    "Back to a page of the hallway, or to the one before."
    assert re.search(r"\]\((\.\./)?[a-z_./]+\.ipynb(#[\w-]+)?\)", prose(page))


@pytest.mark.parametrize("page", [*RESULTS, "nbs/index.ipynb", "nbs/differences.ipynb"])
def test_no_interval_is_typed(page):
    typed = re.findall(r"\[[-−+]?\d[\d.,]*, [-−+]?\d[\d.,]*\]", prose(page))
    assert not typed, f"take it from the results by code: {typed}"


MAY_BE_TYPED = {  # number -> why
    "1 nat": "the margin of equivalence",
    "595 nats": "the paper's",
    "200 million": "the images that the paper's diffusion models saw",
    "200 nats": "seen once, and said not to be among the stored results",
    **dict.fromkeys(["4.85 nats", "0.2 nats", "1.38 nats"], "worked out from σ and the size of a level"),
    **dict.fromkeys(["0.6 million", "6 million"], "the weights of a network"),
}


@pytest.mark.parametrize("page", [*RESULTS, "nbs/index.ipynb", "nbs/tour.ipynb", "nbs/differences.ipynb"])
def test_no_result_is_typed(page):
    typed = set(re.findall(r"\d[\d.,]* (?:nats?|million)\b", plain(prose(page)))) - MAY_BE_TYPED.keys()
    assert not typed, f"take it from the results by code: {typed}"


@pytest.mark.parametrize("page", RESULTS)
def test_names_of_storage_are_not_shown(page):
    text = plain(prose(page)) + "\n".join(shown(page) if "reliability" not in page else [])
    def pattern(name): return rf"(?<!\w){name}(?!\w)" if name[0] != "_" else rf"{name}\b"
    found = [name for name in stored_names() if re.search(pattern(name), text)]
    assert not found, f"say it in words: {found}"


@pytest.mark.parametrize("page", RESULTS)
def test_a_results_page_begins_with_its_result(page):
    first = [line for line in next(shown(page)).splitlines() if line and not line.startswith("On ")]
    assert 1 <= len(first) <= 5 and re.search(r"\d", first[0])
    if any(page.endswith(f"/{name}.ipynb") for name in DATA): assert len(first) == 5 and "test ELBO" in first[0]


@pytest.mark.parametrize("page", SHORT)
def test_code_is_short(page):
    "But for the parameters of an experiment, which are a list."
    sources = ["".join(c["source"]) for c in cells(page, "code") if "parameters" not in c["metadata"].get("tags", [])]
    assert max(len(line) for s in sources for line in s.splitlines()) <= 120
    assert statistics.median(len(s.strip().splitlines()) for s in sources) <= 6


@pytest.mark.parametrize("page", [p for p in READ if p.startswith("nbs/experiments/")])
def test_experiments_hold_the_output_of_their_parameters(page):
    "Which the parameters cell names, and whose numbers mean something."
    assert "`digits` at [scale](../glossary.ipynb#scale) `cpu`" in prose(page)
    assert "smoke" not in prose(page) + "\n".join(shown(page))
