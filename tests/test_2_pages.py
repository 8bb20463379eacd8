"The pages that define and read, as a user of nbdev tests them."

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, tracked

PAGES = [
    p for p in tracked("nbs/*.ipynb") if "/experiments/" not in p
]  # those write results, and have tests of their own


def guard(*arguments):
    return subprocess.run(
        [sys.executable, "tests/guard.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


def check(seed, workers):
    "Tests all pages in a shuffled order."
    done = guard(seed, workers)
    assert not done.returncode, f"order {seed}: {done.stderr[-6000:]}"
    found = [line.split()[-1] for line in done.stdout.splitlines() if "- Completed" in line]
    assert sorted(found) == sorted(str(ROOT / p) for p in PAGES)


def test_nbdev_test_as_it_is_typed(tries):
    "Several pages one after the other in each worker, in a shuffled order; none may leave its process changed."
    for seed, workers in enumerate(tries(["default"], ["default", 1, 0, 3])):
        check(seed, workers)


@pytest.mark.data
@pytest.mark.parametrize("page", ["nbs/method/01_data.ipynb", "nbs/method/04_augment.ipynb"])
def test_page_shows_all_data_sets(page):
    "Two pages do so where there are data sets; the others are the same with and without."
    done = guard(0, 1, page)
    assert not done.returncode and done.stdout.count("- Completed") == 1, done.stderr[-6000:]


LEAKS = {  # what a page may do -> what is then said to have changed
    "import os; os.environ['VAE_DIFFUSION_RUNS'] = '/nowhere'": "environment: VAE_DIFFUSION_RUNS",
    "import os; os.chdir('/')": "working folder",
    "import os; os.umask(0o77)": "umask",
    "import tempfile; tempfile.mkdtemp(prefix='left')": "temporary files: left",
    "open('left.txt', 'w').close()": "files of the project: .*left.txt",
    "import torch; torch.manual_seed(0)": "random numbers: torch",
    "import numpy; numpy.random.rand()": "random numbers: numpy",
    "import random; random.random()": "random numbers: random",
    "import torch; torch.set_num_threads(3)": "PyTorch: get_num_threads",
    "import torch; torch.set_default_dtype(torch.float64)": "PyTorch: get_default_dtype",
    "import matplotlib.pyplot as plt; plt.rcParams['axes.grid'] = True": "matplotlib: axes.grid",
    "import pandas as pd; pd.options.display.precision = 2": "pandas",
    "import threading as t; t.Thread(target=t.Event().wait, daemon=True, name='left').start()": "threads: left",
    "import subprocess as s; s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL)": "processes",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)": "signals: SIGTERM",
    "import gzip; gzip.open = print": "names: .*'gzip', 'open'",
    "from vae_diffusion import data; del data.DATASETS['cifar10']": "names: .*'DATASETS'",
    "from vae_diffusion.banks import SampleBank; SampleBank.fill = None": "names: .*'SampleBank', 'fill'",
    "import logging; logging.disable()": "logging: all",
    "from vae_diffusion.harness import runs; runs.retain_freed_memory()": "memory: True before, False after",
}


def test_a_page_that_changes_the_process_is_seen(tmp_path):
    parts = ["figure = 1 + 1"], *([*LEAKS][i::4] for i in range(4))
    for i, part in enumerate(parts):
        cells = [
            {
                "cell_type": "code",
                "id": f"cell{j}",
                "source": code,
                "metadata": {},
                "execution_count": None,
                "outputs": [],
            }
            for j, code in enumerate(part)
        ]
        page = {"cells": cells, "metadata": {"kernelspec": {"language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / f"{i}.ipynb").write_text(json.dumps(page))
    done = guard(0, 0, str(tmp_path))
    said = {text.split(".ipynb")[0].split("/")[-1]: text for text in done.stderr.split("AssertionError in ")[1:]}
    assert done.returncode and said.keys() == {"1", "2", "3", "4"}, done.stderr[-6000:]
    for i, part in enumerate(parts[1:], 1):
        for code in part:
            assert re.search(f"^  {LEAKS[code]}", said[str(i)], re.M), said[str(i)]
