"How parameters reach an experiment: what counts, and how it may be spelt."

import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, run
from vae_diffusion import models
from vae_diffusion.core import files
from vae_diffusion.harness import builders, pages, results, studies
from vae_diffusion.harness.identity import Run
from vae_diffusion.harness.settings import Settings, load_params

PAPERMILL = "papermill", "--log-level", "ERROR", "--no-progress-bar", "-k", "python3"


@pytest.fixture
def started(tmp_path):
    "The environment of a user whose kernels start with variables of his own."
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00-mine.py").write_text("DEBUG = True\nMETHOD = 'mine'\nepochs = 7\nmethd = 'dmaapx'\nseed = print\n")
    return os.environ | {"IPYTHONDIR": str(tmp_path / "ipython"), "VAE_DIFFUSION_RUNS": str(tmp_path / "runs")}


def test_only_what_is_declared_and_told_counts_however_it_is_spelt(started, tmp_path):
    (tmp_path / "mine.yaml").write_text("scale: smoke\nlr: 1e-3\nbatch: 1e2\nevaluate_at: ['1']\n")
    asked = Settings(lr=0.001, batch=100, evaluate_at=[1], bf16=False, steps=18)
    run(
        *PAPERMILL,
        "--inject-paths",
        "-f",
        tmp_path / "mine.yaml",
        "-p",
        "bf16",
        "false",
        "-p",
        "steps",
        "1.8e1",
        "nbs/experiments/train_vae.ipynb",
        tmp_path / "out.ipynb",
        env=started,
    )
    assert [f.parent.name for f in tmp_path.glob("runs/*/*/metrics.csv")] == [Run("train_vae", asked).name]


def test_a_misspelt_parameter_is_refused_beside_a_variable_of_that_name(started, tmp_path):
    done = subprocess.run(
        [*PAPERMILL, "-p", "methd", "dmaapx", "nbs/experiments/train_vae.ipynb", tmp_path / "out.ipynb"],
        cwd=ROOT,
        env=started,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "methd is not a parameter; did you mean method?" in done.stderr


EVERYWHERE = dict(  # what the paper says of every data set; its diffusion model is that of EDM (Karras et al. 2022)
    n_train=0,
    n_test=0,
    side=32,
    epochs=1000,
    methods=("normal", "aug_naive", "aug_tuned", "dmaapx"),
    seeds=(0, 1, 2),
    attack_restarts=10,
    attack_lr=1.0,
    dm_images=200_000_000,
    dm_lr=0.001,
    dm_muon_lr=0.0,
    dm_soap_lr=0.0,
    dm_decay=0,
    dm_ema=500_000,
    dm_dropout=0.13,
    dm_p_std=1.2,
    dm_sigma_data=0.5,
    dm_sigma_max=80.0,
    dm_sigma_min=0.002,
    dm_schedule="karras",
)
MNISTS = dict(
    net="fully_connected", hidden=(512, 512), latent=16, ks=(10,), attack_images=50, attack_steps=50, attack_delta=0.1
)
PAPER = {
    "binary_mnist": MNISTS | dict(likelihood="bernoulli"),
    "fashion_mnist": MNISTS | dict(likelihood="gaussian", dm_p_mean=-1.2),
    "cifar10": dict(
        net="residual",
        nc=256,
        mz=1,
        likelihood="mol",
        components=10,
        ks=(1, 10),
        dm_p_mean=-1.2,
        attack_images=20,
        attack_steps=100,
        attack_delta=0.05,
    ),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_scale_paper_is_the_papers_comparison(dataset):
    s = load_params(dataset, "paper")
    fixed = EVERYWHERE | PAPER[dataset]
    assert {name: getattr(s, name) for name in fixed} == fixed
    images = SimpleNamespace(shape=(3 if dataset == "cifar10" else 1, 32, 32), levels=256)
    if dataset == "cifar10":
        assert models.count_parameters(builders.build_vae(s, images)) == 5_812_582


@pytest.mark.parametrize("dataset", ["digits", *PAPER])
def test_scale_paper_trains_no_diffusion_model(dataset):
    s = load_params(dataset, "paper")
    grid = results.grid(s)
    assert "train_diffusion" not in {r.stage for r in grid} and s.weights != "trained"
    assert {r.settings.weights for r in grid} == {s.weights}
    assert len([r for r in grid if r.stage == "measure_gaps"]) == 12
    files.verify_folder(builders.weights_folder(s))  # it is there
    asked = replace(s, weights="trained", solver="heun", steps=18)  # `make weights` trains what these take
    assert Run("train_diffusion", asked).digest == Run("train_diffusion", s).digest


@pytest.mark.parametrize("dataset", PAPER)
def test_scale_paper_states_how_good_its_diffusion_model_is(dataset):
    "As the model's card and the stored study have it."
    s, text = load_params(dataset, "paper"), (ROOT / f"nbs/experiments/params/{dataset}-paper.yaml").read_text()
    assert f" saw {pages.images_seen(s):,} images, the paper's 200 million" in text
    study = f"{dataset}-diffusion" if s.weights == "published" else f"{dataset}-quality"
    table = studies.load_published_study(study)
    judged = {label: run.settings for label, run in studies.load_study(study).runs()}
    assert f"(study {study})" in text
    same = [label for label, v in judged.items() if (v.solver, v.steps) == (s.solver, s.steps)]
    right = table[table.variant.isin(same) & (table.metric == "two_sample_sample")]
    share = 100 * right[right.epoch == right.epoch.max()].value.item()
    assert f"A classifier is right on {share:.0f} % of" in text
