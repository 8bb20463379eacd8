"The additions of `nbs/adding.ipynb` are applied to a copy of the project, and reach tables, figures and claims."
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, tracked

PAGE = ROOT / "nbs/adding.ipynb"
DIFFS = re.findall(r"```diff\n(.*?)```", "".join(
    "".join(c["source"]) for c in json.loads(PAGE.read_text())["cells"] if c["cell_type"] == "markdown"), re.S)


def changes(diff):
    "Splits a diff: path -> hunks, each the lines before and the lines after; a new file has none before."
    found = {}
    for part in re.split(r"^--- .*\n", diff, flags=re.M)[1:]:
        name, body = part.split("\n", 1)
        hunks = [hunk.splitlines() for hunk in body.split("@@\n")]
        before = [[line[1:] for line in hunk if line[0] != "+"] for hunk in hunks]
        after = [[line[1:] for line in hunk if line[0] != "-"] for hunk in hunks]
        found[name.removeprefix("+++ ")] = [*zip(before, after)]
    return found


def patched(text, before, after):
    "Replaces lines that must occur once."
    lines, n = text.split("\n"), len(before)
    places = [i for i in range(len(lines) - n + 1) if lines[i:i + n] == before]
    assert len(places) == 1, f"found {len(places)} times: {before}"
    return "\n".join(lines[:places[0]] + after + lines[places[0] + n:])


def apply(diff, root):
    "Applies a diff: to the one cell of a page that holds its lines, or to a plain file."
    for file, hunks in changes(diff).items():
        path = root / file
        if not path.exists():
            [(_, lines)] = hunks
            path.write_text("\n".join(lines) + "\n")
        elif path.suffix != ".ipynb":
            for before, after in hunks: path.write_text(patched(path.read_text(), before, after))
        else:
            page = json.loads(path.read_text())
            for before, after in hunks:
                [cell] = [c for c in page["cells"] if "\n".join(before) in "".join(c["source"])]
                cell["source"] = patched("".join(cell["source"]), before, after).splitlines(keepends=True)
            path.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n")


def copied(root):
    "Copies the project without data that the additions do not need."
    for file in tracked("*"):
        if file.startswith(("figures/", "data/weights/")) and not file.startswith("data/weights/digits"): continue
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, root / file)
    return root


@pytest.mark.parametrize("diff", DIFFS)
def test_an_addition_is_small(diff):
    files = changes(diff)
    added = [line for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]
    assert len(files) <= 2 and len(added) <= 15
    assert all(len(line) <= 121 for line in added)


EXPORT = """
import sys
from pathlib import Path
from nbdev.export import nb_export
for page in sys.argv[1:]: nb_export(page, lib_path=Path("vae_diffusion"))
"""

COMPARE = """
import dataclasses, sys
import numpy as np
from pathlib import Path
sys.path.insert(0, "workflow")
import forks
import vae_diffusion
from vae_diffusion import data, metrics
from vae_diffusion.harness import comparisons, figures, results, runs, settings
assert Path(vae_diffusion.__file__).is_relative_to(Path.cwd())
data.register("photos", np.random.default_rng(0).integers(256, size=(300, 8, 8)))
methods = "normal", "erased", "dmaapx"
chosen = dataclasses.replace(settings.load_params("photos", "cpu"), methods=methods, seeds=(0, 1), epochs=2,
                             dm_images=1000, n_test=20, ks=(2,))
for run in results.grid(chosen):
    forks.execute(run, Path("log"))
    measured = {name for name, metric in metrics.METRICS.items() if metric.stage == run.stage}
    assert measured <= {*runs.read_results(run).metric}, (run.stage, measured)
table, missing = results.collect_results(chosen)
assert not missing
print(comparisons.summary_markdown(comparisons.summarize(table, chosen.k)))
print(comparisons.claims_markdown({"photos": comparisons.judge_claims(table, chosen.k)}))
drawn = figures.figures_from_results(table, chosen)["gaps"]
print([ax.get_title().splitlines()[0] for ax in drawn.axes])
print([label.get_text() for label in drawn.axes[0].get_yticklabels()])
"""


def test_the_additions_reach_tables_figures_and_claims(tmp_path):
    root = copied(tmp_path / "copy")
    for diff in DIFFS: apply(diff, root)
    pages = sorted(file for diff in DIFFS for file in changes(diff) if file.endswith(".ipynb"))
    env = os.environ | {"PYTHONPATH": str(root), "VAE_DIFFUSION_RUNS": str(tmp_path / "runs")}
    def python(script, *arguments):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert not done.returncode, done.stderr
        return done.stdout
    python(EXPORT, *pages)
    said = python(COMPARE)
    print(said)
    head, _, *rows = said.splitlines()
    assert "PSNR" in head and any(row.startswith("| Erased pixels | ") for row in rows)
    for claim in "DMaaPx has a higher PSNR than Normal", "DMaaPx has a higher test ELBO than Erased pixels":
        assert re.search(rf"\| {claim} \| [+-].* \*\*(holds|fails|equivalent|open)\*\*", said), said
    assert "'PSNR / dB'" in rows[-2] and "'Erased pixels'" in rows[-1]
