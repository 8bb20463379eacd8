"Shared by all tests: one thread a process, and a last line that counts."
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
counts = dict(passed=0, failed=0, skipped=0)
LONG = {}  # seconds of the longest tests


def git(*arguments):
    "What git says of this folder, whoever owns it. Where it is no checkout, such as an unpacked archive, git sees new files only."
    with tempfile.TemporaryDirectory() as empty:
        if not (ROOT / ".git").exists():
            subprocess.run(["git", "init", "--quiet", "--bare", empty], check=True)
            arguments = f"--git-dir={empty}", f"--work-tree={ROOT}", *arguments
        done = subprocess.run(["git", "-c", "safe.directory=*", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.exit(f"git {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def tracked(pattern):
    "Files that git knows, or would add, as paths from the root."
    return sorted(f for f in git("ls-files", "--cached", "--others", "--exclude-standard", pattern).splitlines() if (ROOT / f).exists())


def run(*command, **options):
    "Runs a command from the root; its output is in the error if it fails."
    done = subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    "A folder of runs for this process, so that tests never touch the user's."
    folder = tmp_path_factory.mktemp("runs")
    os.environ["VAE_DIFFUSION_RUNS"] = str(folder)
    return folder


@pytest.fixture
def tries():
    "How often a fault is tried: `tries(sample, full)`, the full number in `make torture`."
    return lambda sample, full: full if "TORTURE" in os.environ else sample


@pytest.fixture
def record():
    "Adds a line to the record that `make torture` keeps: what was tried, how often, and what came of it."
    def add(fault, tried, outcome):
        if "TORTURE" not in os.environ: return
        file = Path(os.environ["TORTURE"])
        rows = ([] if file.exists() else [["fault", "tried", "outcome"]]) + [[fault, tried, outcome]]
        with open(file, "a") as f: csv.writer(f, lineterminator="\n").writerows(rows)
    return add


@pytest.fixture(autouse=True)
def asks_no_other_machine():
    "Fails a test that asked another machine, where `tests/offline` refuses and notes it."
    log = Path(os.environ.get("OFFLINE", os.devnull))
    before = log.read_text()
    yield
    assert log.read_text() == before, "another machine was asked"


def pytest_configure(config):
    config.addinivalue_line("markers", "data: needs the full data sets")


def pytest_collection_modifyitems(items):
    "Skips what needs the data where they are not. The longest tests begin first, so that no worker is left alone with one at the end."
    for item in items:
        if item.get_closest_marker("data") and not os.environ.get("VAE_DIFFUSION_DATA"): item.add_marker(pytest.mark.skip(
            reason="needs the full data sets: set VAE_DIFFUSION_DATA to the folder that holds the published files (README.md) to have it run"))
    items.sort(key=lambda item: -LONG.get(item.originalname, 0))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        counts[report.outcome] += 1


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
