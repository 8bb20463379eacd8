"""Puts the faults of `mutants.toml` into copies of the checkout, one at a time, and asks the tests of each copy.

    python tests/mutants.py FILE            all of them; FILE becomes a table of what caught each
    python tests/mutants.py FILE WORD...    those whose file or description holds one of the words

The page that defines the line is asked first, then `test_reference.py`, then every other page and test file, until one
of them fails. A copy without a fault is asked everything, and must pass. PyTorch and the other packages are imported
once: each page and each test file runs in a process forked from this one.
"""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from conftest import ROOT, run, tracked
from tqdm import tqdm

MUTANTS = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
LEFT_OUT = {  # the pages, which are asked one by one, the list itself, speed, kills, and full data sets
    "test_2_pages",
    "test_mutants",
    "test_4_speed",
    "test_5_reliability",
    "test_data",
}
SECONDS = 900  # after which a page or a test file counts as failed
WARM = (  # imported before any fork
    "torch",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.models.unets.unet_2d",
    "diffusers.schedulers",
    "sklearn.datasets",
    "sklearn.model_selection",
    "scipy.stats",
    "pandas",
    "seaborn",
    "matplotlib.pyplot",
    "papermill",
    "pytest",
    "nbdev.test",
)


def page(file):
    "The page that a module is exported from."
    return re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)\.", (ROOT / file).read_text())[1]


def put(mutant, copy):
    "Puts a fault into the module and its page. Raises `ValueError` unless the line occurs exactly once in both."

    def changed(lines):
        at = [i for i, line in enumerate(lines) if line.strip() == mutant["before"]]
        if len(at) != 1:
            raise ValueError(f"{mutant['file']}: {len(at)} lines are {mutant['before']}")
        lines[at[0]] = lines[at[0]].replace(mutant["before"], mutant["after"])
        return lines

    module, source = copy / mutant["file"], copy / page(mutant["file"])
    module.write_text("".join(changed(module.read_text().splitlines(keepends=True))))
    book = json.loads(source.read_text())
    exported = [c for c in book["cells"] if "".join(c["source"]).startswith("#| export")]
    lines = iter(changed([line for c in exported for line in c["source"]]))
    for c in exported:
        c["source"] = [next(lines) for _ in c["source"]]
    source.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")


def ask(copy, test):
    "Runs a page or a test file of a copy in a forked process. Returns what failed, or nothing."
    log, process = copy.parent / "log", os.fork()
    if not process:
        passed = False
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            os.chdir(copy)
            os.environ |= {"PYTHONPATH": str(copy), "VAE_DIFFUSION_RUNS": str(copy.parent / "runs")}
            del sys.modules["conftest"]  # the copy has its own
            sys.path[:0] = [str(copy), str(copy / "tests")]
            if test.endswith("ipynb"):
                passed = sys.modules["nbdev.test"].test_nb(copy / test, ["notest"])[0]
            else:
                passed = not sys.modules["pytest"].main(["-qx", "-p", "no:cacheprovider", "-p", "no:xdist", test])
        finally:
            sys.stdout.flush()
            os._exit(not passed)
    end = time.monotonic() + SECONDS
    while not (done := os.waitpid(process, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    try:
        os.killpg(process, signal.SIGKILL)  # with all that it started
    except ProcessLookupError:
        pass
    if not done[0]:
        return os.waitpid(process, 0) and f"{test} does not end"
    if not done[1]:
        return
    said = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    if test.endswith("ipynb"):
        found = re.findall(r'File "<ipython-input.*\n +(.*)', said)  # the page's line first
    else:
        found = re.findall(r"^(?:FAILED|ERROR) [^\s:]+::(\S+)", said, re.M)
    return f"{test}: {found[0] if found else said.strip().splitlines()[-1]}"


def caught(clean, mutant):
    "What fails first with a fault, or nothing; without one, all that fails."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(shutil.copytree(clean, Path(tmp) / "checkout", symlinks=True))
        tests = [p for p in tracked("nbs/*.ipynb") if "/experiments/" not in p]
        tests += [t for t in tracked("tests/test_*.py") if Path(t).stem not in LEFT_OUT]
        first = ["tests/test_reference.py"]
        if mutant:
            put(mutant, copy)
            first = [page(mutant["file"]), *first]
        found = (failed for t in [*first, *(t for t in tests if t not in first)] if (failed := ask(copy, t)))
        return next(found, "nothing") if mutant else [*found]


def checkout(folder):
    "Copies the checkout, with a link to its environment."
    for f in tracked("."):
        (folder / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / f, folder / f)
    run("git", "init", "--quiet", folder)
    (folder / ".git" / "info" / "exclude").write_text(".venv\n")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def main(file, *words):
    os.environ["MPLBACKEND"] = "agg"
    for module in WARM:
        importlib.import_module(module)
    assert "vae_diffusion" not in sys.modules
    chosen, rows = [m for m in MUTANTS if not words or any(w in m["file"] or w in m["fault"] for w in words)], []
    workers = ProcessPoolExecutor(int(os.environ.get("CORES", 2)), get_context("fork"))
    with tempfile.TemporaryDirectory() as tmp, workers as pool, tqdm(total=len(chosen), unit="fault") as bar:
        clean = checkout(Path(tmp) / "checkout")
        control = None if words else pool.submit(caught, clean, None)
        for m, by in zip(chosen, pool.map(partial(caught, clean), chosen)):
            rows.append({"module": Path(m["file"]).stem, "fault": m["fault"], "why": m["why"], "caught by": by})
            bar.write(f"{rows[-1]['module']}: {m['fault']}: {by}", file=sys.stderr)
            bar.update()
        if control and (failed := control.result()):
            sys.exit("\n".join(["without any fault there failed", *failed]))
    Path(file).parent.mkdir(exist_ok=True)
    with open(file, "w", newline="") as f:
        table = csv.DictWriter(f, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"{sum(r['caught by'] != 'nothing' for r in rows)} of {len(rows)} faults were caught")


if __name__ == "__main__":
    main(*sys.argv[1:])
