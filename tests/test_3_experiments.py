"The experiments, at smoke scale: alone, through the workflow, killed, and with bad parameters."

import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT, forked, made, run, snakemake
import forks

PAPERMILL = "papermill", "--log-level", "ERROR", "--no-progress-bar", "-k", "python3"


def execute(folder, *stages, **parameters):
    "Runs stages one after the other as the workflow does."
    from vae_diffusion.harness import identity, settings

    for stage in stages:
        forks.execute(identity.Run(stage, settings.Settings(**parameters)), folder / f"{stage}.log")


def test_measure_gaps_alone_runs_what_it_needs(smoke, tmp_path):
    process = forked("measure_gaps", tmp_path / "out.ipynb", {"method": "dmaapx", "n_train": 300, "gaps_at": [1]})
    process.join()
    assert process.exitcode == 0, (tmp_path / "out.log").read_text()
    folder = smoke / "digits-smoke"
    done = {f.parent.name.split("-")[0] for f in folder.glob("*/metrics.csv")}
    assert done == {"sample_bank", "train_vae", "measure_gaps"}
    table = pd.read_csv(*folder.glob("measure_gaps-*/metrics.csv"))
    assert table[table.metric == "amortization_gap"].epoch.tolist() == [1, 2]
    assert set(table[table.metric == "iwae_test"].epoch) == {2}


def test_measure_encoder_alone_trains_both_vaes(smoke, tmp_path):
    from vae_diffusion.metrics.encoder import ENCODER

    process = forked("measure_encoder", tmp_path / "out.ipynb", {"n_train": 300})
    process.join()
    assert process.exitcode == 0, (tmp_path / "out.log").read_text()
    done = sorted(f.parent.name.rpartition("-")[0] for f in smoke.glob("digits-smoke/*/metrics.csv"))
    vaes = ["train_vae-dmaapx-k2-seed0", "train_vae-normal-seed0"]
    assert done == ["measure_encoder-normal-seed0", "sample_bank-k2", *vaes]
    table = pd.read_csv(*smoke.glob("digits-smoke/measure_encoder-*/metrics.csv")).set_index("metric").value
    assert {*table.index} == {*ENCODER}
    parts = table.robustness_encoder + table.robustness_decoder
    assert parts == pytest.approx(table.robustness_gap, abs=1e-5)


def test_trained_weights_feed_the_bank_and_are_published_with_their_study(smoke, tmp_path, monkeypatch):
    from vae_diffusion import pipelines
    from vae_diffusion.core import paths
    from vae_diffusion.harness import studies

    execute(tmp_path, "train_diffusion", "sample_bank", weights="trained", dm_images=1000)
    shutil.copytree(paths.results(), tmp_path / "results")
    for place, folder in {"results": "results", "weights": "weights", "figures": "figures"}.items():
        monkeypatch.setattr(paths, place, lambda folder=tmp_path / folder: folder)
    studies.publish_study(
        studies.Study(
            "digits-toy",
            "digits",
            "smoke",
            ("train_diffusion", "sample_bank"),
            {"shorter": {"weights": "trained", "dm_images": 1000}},
            {"method": ["dmaapx"]},
        )
    )
    assert pipelines.load_pipeline(tmp_path / "weights/digits-toy").shape == (1, 8, 8)
    assert (
        set(studies.load_published_study("digits-toy").method) == {"train_diffusion", "sample_bank"}
        and not (tmp_path / "weights/digits").exists()
    )


def test_every_snapshot_of_a_diffusion_model_is_judged(smoke, tmp_path):
    from vae_diffusion.harness import identity, settings

    execute(tmp_path, "train_diffusion", weights="trained", dm_images=1500, dm_snapshots=2)
    forks.execute(
        identity.Run("train_vae", identity.reference_settings(settings.Settings())), tmp_path / "reference.log"
    )
    execute(tmp_path, "measure_diffusion", weights="trained", dm_images=1500, dm_snapshots=2)
    table = pd.concat([pd.read_csv(f) for f in smoke.glob("digits-smoke/measure_diffusion-*/metrics.csv")])
    assert sorted(table[table.metric == "two_sample_sample"].epoch) == pytest.approx(
        [750 / 1437, 1500 / 1437], rel=1e-4
    )
    assert table[table.metric == "two_sample_test"].epoch.isna().all()


def test_every_study_can_be_run(smoke, tries):
    "The runs of all are made. The workflow plans one study for every sequence of experiments; in `make stress` all."
    from vae_diffusion.harness import studies

    found = [studies.load_study(f.stem) for f in sorted((ROOT / "nbs/experiments/studies").glob("*.yaml"))]
    for study in found:
        assert study.name.startswith(study.dataset + "-") and study.runs()
    planned = tries({study.stages: study for study in found}.values(), found)
    for study in planned:
        options = "--dry-run", "--nolock", "--forceall", "--quiet", "rules", "--config", f"study={study.name}"
        process = snakemake("--snakefile", "workflow/Snakefile", *options, "--", "study")
        process.join()
        assert process.exitcode == 0, f"study {study.name} cannot be run"

SMALL = dict(
    n_train=300,
    n_test=60,
    nc=8,
    dm_images=3200,
    dm_batch=25,
    dm_judged=10,
    k=2,
    ks=(1, 2),
    epochs=2,
    evaluate_at=(1,),
    gaps_at=(1,),
    compile=False,
    quality_images=50,
    quality_epochs=1,
    quality_vae_epochs=1,
    star_images=20,
    star_steps=3,
    iwae_images=5,
    iwae_samples=4,
    attack_images=3,
    attack_restarts=1,
    attack_steps=2,
)
KIND = "weights method decoder_of net likelihood solver dm_schedule dm_muon_lr dm_soap_lr dm_snapshots".split()


def test_what_studies_run_comes_to_an_end(smoke, tmp_path, tries):
    "One run of each kind, with the study's parameters but for the sizes: in `make stress`, of all whose data is here."
    from vae_diffusion.harness import identity, settings, studies

    here = [name for name in studies.study_files() if name.startswith("digits-") or "VAE_DIFFUSION_DATA" in os.environ]
    names, most = tries((["digits-retrained"], 1), (here, None))
    for name in names:
        kinds = set()
        for _, planned in studies.load_study(name).runs()[:most]:
            s = planned.settings
            kind = planned.stage, bool(s.dm_seen), *(getattr(s, parameter) for parameter in KIND)
            if kind in kinds:
                continue
            kinds.add(kind)
            small = replace(s, **SMALL, dm_seen=0)
            if s.dm_seen:
                small = replace(small, dm_seen=settings.snapshots(small)[settings.snapshots(s).index(s.dm_seen)])
            begun = identity.Run(planned.stage, small)
            if not begun.done:
                forks.execute(begun, tmp_path / "log")
            assert begun.done


def test_workflow_is_interrupted_fails_in_part_resumes_and_reports(tmp_path, monkeypatch, cut, record):
    "One grid: stopped after its first run, then with a run that fails, then without a network. Nothing is done twice."
    from vae_diffusion.harness import results, settings

    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path))
    command, folder = ("make", "--no-print-directory", "reproduce", "SCALE=smoke"), tmp_path / "digits-smoke"
    times = lambda: {f: f.stat().st_mtime_ns for f in folder.glob("*/metrics.csv")}
    make = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not times():
        assert make.poll() is None and not time.sleep(0.05)
    os.killpg(make.pid, signal.SIGINT)
    assert make.wait(60)
    caught = times()

    wish = lambda r: (r.stage, r.settings.method, r.settings.k)
    bad = next(
        r for r in results.grid(settings.load_params("digits", "smoke")) if wish(r) == ("train_vae", "dmaapx", 1)
    )
    assert not bad.done, "it was interrupted too late"
    bad.folder.mkdir(parents=True, exist_ok=True)
    (bad.folder / "config.json").write_text("{}")
    status, said = made("reproduce", "SCALE=smoke")
    assert status and "Some runs failed" in said
    assert "does not hold the configuration" in (folder / "logs" / f"{bad.name}.log").read_text()
    assert len(list(folder.glob("train_vae-*/metrics.csv"))) == 2 and (folder / "report.html").exists()
    others = times()
    assert caught.items() < others.items(), "what was done before the interruption was done again"

    shutil.rmtree(bad.folder)
    said = run(*cut, *command)
    assert "| Normal |" in said and "| DMaaPx |" in said and bad.done
    assert others.items() < times().items(), "finished runs were run again"
    table = pd.read_csv(folder / "results.csv")
    assert {
        "elbo_train",
        "elbo_test",
        "elbo_test_best",
        "elbo_star_test",
        "generalization_gap",
        "amortization_gap",
        "robustness_gap",
        "ms_ssim_input",
        "ms_ssim_reconstruction",
        "iwae_test",
    } <= set(table.metric)
    assert set(table.method) == {"normal", "dmaapx", "sample_bank"} and set(table.k.dropna()) == {1, 2}
    page = (folder / "report.html").read_text()
    assert "<html" in page and "<script" not in page and not re.search(r'(src|href)="https?:', page)
    links = re.findall(r'href="([^"#]+)', page)
    assert links and all((folder / link).exists() for link in links), links
    if cut:
        record("no network after the installation", 1, "make reproduce runs")


def test_killed_run_ends_with_the_same_numbers(tmp_path, monkeypatch):
    "By a signal that no process can refuse; a new kernel resumes it."
    wish = {"scale": "smoke", "epochs": 150, "seed": 7, "evaluate_at": [20, 60]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(whole))
    forked("train_vae", tmp_path / "whole.ipynb", wish).join()

    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(killed))
    process = forked("train_vae", tmp_path / "killed.ipynb", wish)
    deadline = time.monotonic() + 120
    while not list(killed.glob("*/*/checkpoint.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert list(killed.glob("*/*/checkpoint.safetensors")), "the run was killed before its first checkpoint"
    assert not list(killed.glob("*/*/metrics.csv")), "the run had ended before it was killed"
    parameters = [part for name, value in wish.items() for part in ("-y", f"{name}: {value}")]
    run(*PAPERMILL, *parameters, "nbs/experiments/train_vae.ipynb", tmp_path / "killed.ipynb")

    tables = [pd.read_csv(*folder.glob("*/*/metrics.csv")).drop(columns="seconds") for folder in (whole, killed)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_run_started_three_times_at_once_is_trained_once(smoke, tmp_path):
    outs = [tmp_path / f"{i}.ipynb" for i in range(3)]
    processes = [forked("train_vae", out, {"epochs": 150}) for out in outs]
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert len(list(smoke.glob("*/*/metrics.csv"))) == 1
    assert sum("Another process works in" in out.read_text() for out in outs) == 2


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("methd", "dmaapx", "did you mean method"),
        ("method", "oracle", "choose one of normal"),
        ("epochs", -1, "must lie between"),
        ("dataset", "svhn", "choose one of digits"),
    ],
)
def test_bad_parameters_are_refused_before_any_work(smoke, tmp_path, name, value, message):
    process = forked("train_vae", tmp_path / "out.ipynb", {name: value})
    process.join()
    assert process.exitcode and message in (tmp_path / "out.log").read_text() and not smoke.exists()


@pytest.mark.data
@pytest.mark.parametrize("dataset", ["binary_mnist", "fashion_mnist", "cifar10"])
def test_real_data_sets_from_diffusion_to_gaps(smoke, tmp_path, dataset):
    from vae_diffusion.harness import identity, settings

    parameters = replace(settings.load_params(dataset, "smoke"), method="dmaapx")
    for stage in "train_diffusion", "sample_bank", "train_vae", "measure_gaps":
        experiment = identity.Run(stage, parameters)
        forks.execute(experiment, tmp_path / "log")
        assert experiment.done
