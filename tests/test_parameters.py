"How parameters reach an experiment: what counts, and how it may be spelt."
import os
import subprocess

import pytest
from conftest import ROOT, run
from vae_diffusion.runs import Run
from vae_diffusion.settings import Settings

PAPERMILL = "papermill", "--log-level", "ERROR", "--no-progress-bar", "-k", "python3"


@pytest.fixture
def started(tmp_path):
    "The environment of a user whose kernels start with variables of his own."
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00-mine.py").write_text("DEBUG = True\nMETHOD = 'mine'\nepochs = 7\nmethd = 'dmaapx'\nseed = print\n")
    return os.environ | {"IPYTHONDIR": str(tmp_path / "ipython"), "VAE_DIFFUSION_RUNS": str(tmp_path / "runs")}


def test_only_what_is_declared_and_told_counts_however_it_is_spelt(started, tmp_path):
    (tmp_path / "mine.yaml").write_text("lr: 1e-3\nbatch: 1e2\nevaluate_at: ['1']\n")
    asked = Settings(lr=.001, batch=100, evaluate_at=[1], bf16=False, steps=18)
    run(*PAPERMILL, "--inject-paths", "-f", tmp_path / "mine.yaml", "-p", "bf16", "false", "-p", "steps", "1.8e1", "nbs/experiments/train_vae.ipynb", tmp_path / "out.ipynb", env=started)
    assert [f.parent.name for f in tmp_path.glob("runs/*/*/metrics.csv")] == [Run("train_vae", asked).name]


def test_a_misspelt_parameter_is_refused_beside_a_variable_of_that_name(started, tmp_path):
    done = subprocess.run([*PAPERMILL, "-p", "methd", "dmaapx", "nbs/experiments/train_vae.ipynb", tmp_path / "out.ipynb"], cwd=ROOT, env=started, capture_output=True, text=True)
    assert done.returncode and "methd is no parameter; did you mean method?" in done.stderr
