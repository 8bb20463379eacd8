"Shared by all tests: one thread a process, and a last line that counts."
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
counts = dict(passed=0, failed=0, skipped=0)


def tracked(pattern):
    "Files that git knows, or would add, as paths from the root."
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern], cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(f for f in listed.stdout.splitlines() if (ROOT / f).exists())


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


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        counts[report.outcome] += 1


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
