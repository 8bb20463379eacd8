"""Several processes that train one diffusion model: they train as one, and leave what one leaves.

Rounding alone may differ: sums over a batch are taken in another order, and Muon rounds its matrices to bfloat16.
"""

import csv
import json
import multiprocessing
import os
import re
import signal
import socket
import time
from dataclasses import replace

import forks
import pytest
import torch
from conftest import ROOT, run
from diffusers import UNet2DModel  # noqa: F401, so that no fork need import it
from safetensors.torch import load_file
from vae_diffusion import data, diffusion, diffusion_training
from vae_diffusion.harness import execution, identity, runs
from vae_diffusion.harness.settings import Settings
from vae_diffusion.recipe import Recipe

RECIPE = Recipe(batch=32, lr=2e-3, warmup_images=300, ema_halflife_images=200, p_mean=-0.8, sigma_data=0.75)
STEPS = 20
PAGE = json.loads((ROOT / "nbs/gpu.ipynb").read_text())


def started(count, work, log):
    "Begins the same work in forks of this process, as a launcher would; what each says is in `log`, by its number."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(count)}

    def begin(rank):
        forks.begin(f"{log}-{rank}.log")
        if count > 1:
            os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        work()

    group = [multiprocessing.get_context("fork").Process(target=begin, args=[rank]) for rank in range(count)]
    for process in group:
        process.start()
    return group


def train(count, folder, recipe=RECIPE, steps=STEPS, stop_at=0, ends=0):
    "Trains with as many processes. The last of them receives SIGTERM at a step, if one is given."

    def work():
        torch.manual_seed(0)
        net, images = diffusion.unet(8, 1, (16, 32), dropout=0.2), data.load("digits").train[:500]
        step = diffusion_training.TrainingState.step

        def step_and_stop(state, x):
            step(state, x)
            if state.steps == stop_at and int(os.environ.get("RANK", 0)) == count - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        diffusion_training.TrainingState.step = step_and_stop
        diffusion_training.train(net, images, 17, recipe, steps * recipe.batch, folder, log_images=160, progress=True)

    for process in started(count, work, folder):
        process.join(100)
        assert process.exitcode == ends, (folder.parent / f"{folder.name}-0.log").read_text()
    tensors = load_file(folder / "checkpoint.safetensors")
    return {k: v for k, v in tensors.items() if k.startswith(("net.", "ema."))}, curve(folder)


def curve(folder):
    "The losses of a checkpoint's curve."
    with open(folder / "checkpoint.safetensors", "rb") as f:
        head = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    note = json.loads(next(v for v in head["__metadata__"].values() if "curve" in v))
    return note["steps"], [(point["images"], point["loss"]) for point in note["curve"]]


def difference(found, expected, start, kind):
    "How far weights are from those expected, as a share of the way that these went in training."
    norm = lambda a, b: torch.stack([(a[k] - b[k]).norm() for k in b if k.startswith(kind)]).norm()
    return (norm(found, expected) / norm(start, expected)).item()


@pytest.mark.parametrize("muon_lr, rounding", [(0.0, 1e-4), (5e-3, 0.1)])
def test_two_processes_train_as_one(muon_lr, rounding, tmp_path):
    recipe = replace(RECIPE, muon_lr=muon_lr)
    start, _ = train(1, tmp_path / "start", recipe, 1)
    (one, points), (two, found) = (train(n, tmp_path / f"by {n}", recipe) for n in (1, 2))
    assert difference(two, one, start, "net.") < rounding > difference(two, one, start, "ema.")
    assert found[0] == points[0] == STEPS and len(points[1]) == 4
    torch.testing.assert_close(found[1], points[1], rtol=1e-4, atol=0)
    assert "img" in (tmp_path / "by 2-0.log").read_text() and not (tmp_path / "by 2-1.log").read_text()


def test_a_checkpoint_moves_between_one_process_and_two(tmp_path):
    start, _ = train(1, tmp_path / "start", steps=1)
    one, points = train(1, tmp_path / "whole")
    assert train(1, tmp_path / "moved", stop_at=7, ends=1)[1][0] == 7
    assert train(2, tmp_path / "moved", stop_at=13, ends=1)[1][0] in (13, 14)
    for rank, why in enumerate(["another process", "SIGTERM"]):
        assert f"stopped by {why}: 4" in (tmp_path / f"moved-{rank}.log").read_text()
    moved, found = train(1, tmp_path / "moved")
    assert difference(moved, one, start, "net.") < 1e-4 > difference(moved, one, start, "ema.")
    torch.testing.assert_close(found[1], points[1], rtol=1e-4, atol=0)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(3, tmp_path / "run", ends=1)
    said = (tmp_path / "run-0.log").read_text()
    assert "ProjectError: a batch of 32 images cannot be divided among 3 processes: start a number" in said


SMALL = Settings(n_train=300, dm_images=4000, dm_judged=20, dm_snapshots=2)


def experiment(count, folder):
    "Begins the experiment in as many processes. It makes many checkpoints."

    def work():
        train = diffusion_training.train
        diffusion_training.train = lambda *args, **how: train(*args, **how | {"checkpoint_seconds": 0.1})
        os.environ["VAE_DIFFUSION_RUNS"] = str(folder)
        out = folder / f"out-{os.environ.get('RANK', 0)}.ipynb"
        forks.execute_notebook("train_diffusion", out, execution.non_default_parameters(SMALL))

    return started(count, work, folder / f"by {count}")


def results(count, folder):
    "Runs the experiment to its end; its results and the files that it leaves."
    for process in experiment(count, folder):
        process.join(200)
        assert not process.exitcode, [f.read_text()[-2000:] for f in folder.glob("by*.log")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VAE_DIFFUSION_RUNS", str(folder))
        done = identity.Run("train_diffusion", SMALL)
        return runs.read_results(done), {f.relative_to(done.folder) for f in done.folder.rglob("*")}


def test_the_experiment_by_two_processes_that_were_killed(tmp_path):
    for name in "alone", "killed":
        (tmp_path / name).mkdir()
    expected, files = results(1, tmp_path / "alone")
    group = experiment(2, tmp_path / "killed")
    while not [*tmp_path.glob("killed/*/*/checkpoint.safetensors")]:
        assert all(process.is_alive() for process in group), (tmp_path / "killed/by 2-0.log").read_text()
        time.sleep(0.05)
    group[1].kill()  # the other notices
    group[0].join(100)
    assert group[0].exitcode == 1 and not [*tmp_path.glob("killed/*/*/metrics.csv")]
    table, left = results(2, tmp_path / "killed")
    assert left == files and set(table.hardware) == {f"2 × {expected.hardware[0]}"}
    assert list(table.metric) == list(expected.metric) and table.value.notna().all()
    torch.testing.assert_close(list(table.value), list(expected.value), rtol=1e-3, atol=0)


def test_what_one_process_does_is_refused_to_several(tmp_path):
    def work():
        runs.open_run("train_vae", Settings())

    for process in started(2, work, tmp_path / "run"):
        process.join(100)
    assert "ProjectError: train_vae runs in one process, and 2 were started" in (tmp_path / "run-0.log").read_text()


def test_the_command_for_several_gpus(tmp_path):
    "That of the page, by two processes on CPUs; those who start it see nothing of ours."
    if not (ROOT / "build/launch/ready").exists():
        pytest.skip("needs accelerate: make build/launch/ready")
    text = "".join(next(c for c in PAGE["cells"] if "accelerate launch" in "".join(c["source"]))["source"])
    install, command = re.search("```\n(pip.*)\n((?s:accelerate.*?))\n```", text).groups()
    assert f"--target build/launch {install.removeprefix('pip install ')}\n" in (ROOT / "Makefile").read_text()
    changed = {"_processes 8": "_processes 2", "out-": f"{tmp_path}/out-", "fashion_mnist-paper": "digits-smoke"}
    for before, after in changed.items():
        assert before in command
        command = command.replace(before, after)
    env = {
        "PATH": f"{ROOT}/build/launch/bin:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}/build/launch",
        "VAE_DIFFUSION_RUNS": str(tmp_path / "runs"),
    }
    said = run("bash", "-c", command, env=os.environ | env, timeout=300)
    copies = [json.loads((tmp_path / f"out-{rank}.ipynb").read_text()) for rank in (0, 1)]
    printed = ["".join(o.get("text", "")) for c in copies for cell in c["cells"] for o in cell.get("outputs", [])]
    assert not said and sum("| bound on log p, test images " in text for text in printed) == 2
    with open(next(tmp_path.glob("runs/*/train_diffusion-*/metrics.csv"))) as f:
        assert {row["hardware"].split()[0] for row in csv.DictReader(f)} == {"2"}
