"The pages that a newcomer opens first: short, and every link of theirs leads somewhere."

import re

import nbformat
import pytest
from conftest import ROOT


def page(name):
    return nbformat.read(ROOT / f"nbs/{name}.ipynb", 4).cells


def text(name):
    return "\n".join(c.source for c in page(name) if c.cell_type == "markdown")


HEADINGS = re.findall(r"^### (.+)$", text("glossary"), re.M)
LINKS = [
    (name, *link)
    for name in ("tour", "glossary", "adding")
    for link in dict.fromkeys(re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text(name)))
]


@pytest.mark.parametrize("name, file, anchor", LINKS)
def test_links_lead_somewhere(name, file, anchor):
    assert (ROOT / "nbs" / file).exists()
    if anchor:
        assert file in ("", "glossary.ipynb") and anchor in [h.replace(" ", "-") for h in HEADINGS]


def test_words_can_be_linked_to():
    "JupyterLab keeps capitals in the address of a heading, other readers do not: there are none."
    assert HEADINGS == [h.lower() for h in HEADINGS] and len(set(HEADINGS)) == len(HEADINGS)


def test_the_tour_is_short_and_explains_its_words():
    assert len(page("tour")) <= 15
    lines = [line for c in page("tour") if c.cell_type == "code" for line in c.source.splitlines()]
    assert max(map(len, lines)) <= 120
    words = {anchor for name, _, anchor in LINKS if name == "tour"}
    assert words >= {
        "bank",
        "k",
        "effective-epoch",
        "scale",
        "study",
        "gap",
        "normal",
        "aug_naive",
        "aug_tuned",
        "dmaapx",
    }
