"Every output that README, and the pages that carry on from it, promise comes when their commands are typed."

import re
import shlex

import nbformat
import PIL.Image
import pytest
import torch
import yaml
from conftest import ROOT, forked
from vae_diffusion.harness import settings

README = (ROOT / "README.md").read_text()


def words(page):
    "The prose of a page."
    cells = nbformat.read(ROOT / f"nbs/{page}.ipynb", 4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def section(title, text=README):
    "The text below a heading."
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def block(text, language):
    "The first block of code in a language."
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


def table(text):
    "The first table of a text: a dict a row."
    lines = [
        [c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in re.search(r"(\|.*\|\n?)+", text)[0].splitlines()
    ]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_the_lines_for_a_hosted_notebook():
    "They name what is there; the page itself runs the last one, at scale smoke."
    page = nbformat.read(ROOT / "nbs/gpu.ipynb", 4).cells[0].source
    lines = re.search(r"```\n(.*?)```", page, re.S)[1].splitlines()
    assert len(lines) <= 10 and "pip install --quiet -e '.[experiments]'" in lines[2]
    for file in re.findall(r"nbs/\S+", "\n".join(lines)):
        assert (ROOT / file).exists(), file


def printed_by(page):
    "What an executed notebook printed."
    outputs = [output for cell in nbformat.read(page, 4).cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


SAMPLES, TESTS = "samples", "test images"
PROMISED = {
    "train_vae": {"test ELBO", "test ELBO at the best epoch", "generalization gap"},
    "measure_gaps": {"amortization gap", "robustness gap", "importance-weighted bound"},
    "measure_encoder": {"norm of the encoder's Jacobian", "approximation gap", "robustness gap, the encoder's part"},
    "sample_bank": {f"distance to the nearest training image: {images}" for images in (SAMPLES, TESTS)},
    "train_diffusion": {"bound on log p, training images", "bound on log p, test images"},
    "measure_diffusion": {f"told from training images: {images}" for images in (SAMPLES, TESTS)},
}


def test_every_other_number_is_printed(tmp_path, monkeypatch):
    "By the command of the page, which is README's with another notebook and other parameters."
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path))
    rows, before = table(section("Any number", words("reproduce"))), []
    assert {row["notebook"].strip("`") for row in rows} == {*PROMISED, ""}
    commands = block(section("Rerun one number"), "bash"), block(section("Any number", words("reproduce")), "bash")
    changed = [pair for pair in zip(*map(shlex.split, commands), strict=True) if len(set(pair)) > 1]
    assert [b for _, b in changed] == ["nbs/experiments/train_vae.ipynb", "aug_tuned", "2"], changed
    for row in rows[:-1]:
        options = shlex.split(row["parameters"].strip("`")) if row["parameters"] != "the same" else before
        before, stage = options, row["notebook"].strip("`")
        wishes = {name: yaml.safe_load(value) for name, value in zip(options[1::3], options[2::3])}
        process = forked(stage, tmp_path / "out.ipynb", wishes | {"n_train": 300})
        process.join()
        assert process.exitcode == 0, row
        assert PROMISED[stage] <= {r["metric"] for r in table(printed_by(tmp_path / "out.ipynb"))}, row
    names = yaml.safe_load((ROOT / shlex.split(rows[-1]["parameters"].strip("`"))[1]).read_text())
    assert settings.load_params(names["dataset"], names["scale"]).dataset == "binary_mnist"


def test_the_parts_do_what_their_comments_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = block(section("Use the parts", words("library")), "python")
    exec(lines, names := {})
    count = int(re.findall(r"images = .*# (\d+) PIL images", lines)[0])
    assert [type(image) for image in names["images"]] == [PIL.Image.Image] * count
    assert names["digits"].train.ndim == names["digits"].test.ndim == 4 and names["digits"].train.dtype == torch.uint8


def test_readme_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("link", sorted({*re.findall(r"\]\(([^)#:]+)\)", README)}))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
