"Minutes, not days: a command stops in time and resumes, runs move to another machine, and the time is known before."

import os
import re
import subprocess

import pytest
from conftest import ROOT
from vae_diffusion.core import errors, stopping
from vae_diffusion.harness import identity, packing, plan, settings, tables
from vae_diffusion.core.errors import ProjectError
from vae_diffusion.core.stopping import Stopped
import forks


def make(*arguments, **variables):
    "Exit status and what was said to the user."
    plain = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}  # of `make test`
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, env=plain | variables
    )
    return done.returncode, done.stdout + done.stderr


def content(folder):
    "The results of runs, without their seconds."
    return {f.parent.name: tables.read_table(f).drop(columns="seconds").to_csv() for f in folder.glob("*/metrics.csv")}


@pytest.mark.parametrize("minutes", ["0", "-1", "soon", "1e3", "0.0", "1 2"])
def test_minutes_that_make_no_sense(minutes, tmp_path):
    for target in "reproduce", "study", "weights":
        status, said = make(target, f"MINUTES={minutes}", VAE_DIFFUSION_RUNS=str(tmp_path))
        assert status == 2 and f"MINUTES={minutes}: give the minutes" in said and said.count("\n") == 1
    with pytest.raises(ProjectError, match="minutes (is|must be)"):
        settings.collect_settings({"minutes": minutes if minutes != "1e3" else 1e7})
    assert not list(tmp_path.iterdir())


def test_a_workflow_whose_minutes_are_over_begins_nothing_and_has_not_failed(tmp_path):
    status, said = make("reproduce", "SCALE=smoke", "MINUTES=0.01", VAE_DIFFUSION_RUNS=str(tmp_path))
    assert status == 2 and "Error 75" in said, said
    assert "0 of 6 runs are done" in said and "To resume, run the same command again" in said, said
    assert "fail" not in said and "rror in" not in said and not list(tmp_path.glob("*/*/config.json")), said


def test_a_notebook_whose_minutes_are_over(tmp_path):
    command = (
        "papermill",
        "--log-level",
        "ERROR",
        "--no-progress-bar",
        "-k",
        "python3",
        "-p",
        "minutes",
        "0.01",
        "-p",
        "epochs",
        "100000",
        "-p",
        "scale",
        "smoke",
    )
    done = subprocess.run(
        [*command, "nbs/experiments/train_vae.ipynb", "/dev/null"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"VAE_DIFFUSION_RUNS": str(tmp_path)},
    )
    (last,) = done.stderr.split("Exception encountered at")[1].strip().splitlines()[1:]  # no traceback of the notebook
    assert done.returncode == 1 and re.match(
        r"Stopped: stopped by the end of its minutes: .* of 143,700,000 images are done", last
    ), done.stderr
    assert identity.Run("train_vae", settings.Settings(epochs=100_000)).name in [
        f.parent.name for f in tmp_path.glob("*/*/config.json")
    ]
    assert "minutes" not in next(tmp_path.glob("*/*/config.json")).read_text()


SETTINGS = settings.Settings(
    weights="trained",
    epochs=20,
    evaluate_at=(5,),
    gaps_at=(5,),
    n_test=60,
    dm_images=1500,
    dm_judged=5,
    dm_snapshots=2,
    steps=3,
    ks=(2,),
    star_images=5,
    star_steps=5,
    quality_epochs=1,
)
DMAAPX = settings.Settings(**vars(SETTINGS) | {"method": "dmaapx"})
STAGES = [
    *plan.all_runs(
        [
            identity.Run("train_vae", DMAAPX),
            identity.Run("measure_gaps", SETTINGS),
            identity.Run("measure_encoder", SETTINGS),
            identity.Run("measure_diffusion", SETTINGS),
        ]
    )
]


def execute(run, folder, looks=None):
    "Runs a stage as the workflow does, with the time over after so many looks at the clock."
    left = [0.0] + [float("inf")] * (looks or 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_DIFFUSION_RUNS", str(folder))
        if looks:
            patch.setattr(stopping, "deadline", lambda: left.pop() if len(left) > 1 else left[0])
        forks.execute(run, folder / "log")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The results of runs that nobody stopped or moved."
    folder = tmp_path_factory.mktemp("whole")
    for run in STAGES:
        execute(run, folder)
    return content(folder / "digits-smoke")


LOOKS = {
    "train_diffusion": 14,
    "sample_bank": 8,
    "train_vae": 24,
    "measure_gaps": 12,
    "measure_encoder": 12,
    "measure_diffusion": 20,
}  # until the time is over


def move(a, b):
    "Packs the runs in one folder, in small pieces, and unpacks them in another."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_DIFFUSION_RUNS", str(a))
        packing.pack_runs("digits", "smoke", 0.05, a / "pack")
        assert not list(a.glob("pack/*.npy")) and max(f.stat().st_size for f in a.glob("pack/*.tar.*")) <= 0.05 * 2**20
        patch.setenv("VAE_DIFFUSION_RUNS", str(b))
        packing.unpack_runs(a / "pack")


def test_runs_that_are_stopped_in_time_and_moved_to_and_fro_end_with_the_same_results(whole, tmp_path):
    "Each stage is stopped at least once and resumes on the other machine, which has no bank until it draws one."
    here, there, kept = tmp_path / "here", tmp_path / "there", 0
    for folder in here, there:
        folder.mkdir()
    for run in STAGES:
        for stops in range(9):
            parts = {f: f.stat().st_mtime_ns for f in here.glob("*/measure_encoder-*/amortization.json")}
            try:
                execute(run, here, LOOKS[run.stage] + 5 * stops)
            except Stopped as e:
                said = str(e)
            else:
                break
            assert (
                said.endswith("run the same command again to resume from here")
                and (here / "log").read_text().strip() == said
            )
            assert all(f.stat().st_mtime_ns == when for f, when in parts.items()), "a finished search was repeated"
            kept += len(parts)
            if run.stage == "sample_bank":
                continue  # whose work is not packed
            move(here, there)
            here, there = there, here
        else:
            raise AssertionError(f"{run.name} does not end")
        assert stops or run.settings.epochs == 2, f"{run.name} was not stopped"  # the reference takes two epochs
    assert kept, "the search in measure_encoder was never done before a stop"
    move(there, here)  # which has nothing that is further
    assert content(here / "digits-smoke") == whole
    assert len(list(tmp_path.glob("*/digits-smoke/bank-*"))) == 2 and not list(
        tmp_path.glob("*/digits-smoke/*/checkpoint*measured*")
    )


def test_a_plan_is_printed_before_anything_runs(tmp_path):
    status, said = make("plan", "SCALE=smoke", "CORES=3", VAE_DIFFUSION_RUNS=str(tmp_path))
    assert not status and not list(tmp_path.glob("*/*/*")), said
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in said.splitlines()
        if line.startswith("| ")
    }
    assert [*rows][2:] == [
        "sample_bank",
        "train_vae normal",
        "train_vae dmaapx",
        "measure_gaps normal",
        "measure_gaps dmaapx",
    ], said
    assert rows["train_vae dmaapx"][:2] == ["2", "0"] and re.search(
        r"minutes of computing, [0-9.]+ minutes with CORES=3", said
    ), said
    for wish, answer in (("svhn",), "no parameters for svhn"), (("digits", "cpu", "none"), "there is no study none"):
        with pytest.raises(SystemExit, match=answer):
            errors.exit_on_error(plan.print_plan, *wish)
