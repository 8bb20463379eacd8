"""Kills the stages of an experiment at random moments and starts them again, or starts one many times at once.

    python tests/kill.py FOLDER 0      each stage runs once
    python tests/kill.py FOLDER TRIES  each is also killed and started again, TRIES times, and those of `TOGETHER` eight at once

Prints one line of JSON a stage, with the digest of its results and its largest memory. Every run is forked from this process,
so that it starts at once.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "workflow"))
import forks
from vae_diffusion import banks, diffusion_training, pipelines, training  # with diffusers, so that every run has it
from vae_diffusion.core import files, paths
from vae_diffusion.harness import figures, identity, results, style, tables
from vae_diffusion.harness.settings import Settings

EVERY = 0.3  # seconds between checkpoints, so that there are some in a run of seconds
SLACK = 2.5  # seconds that a run may take to start or to write besides
GRACE = 5.0  # seconds in which a run that is told to stop must have left
SETTINGS = Settings(
    weights="trained",
    method="dmaapx",
    dm_images=6000,
    dm_judged=5,
    n_test=100,
    epochs=150,
    evaluate_at=(50, 100),
    k=3,
    ks=(3,),
    seeds=(0,),
    methods=("dmaapx",),
    star_images=10,
    star_steps=100,
    attack_steps=20,
    iwae_images=10,
)
STAGES = "train_diffusion", "sample_bank", "train_vae", "measure_gaps", "publish"
TOGETHER = "sample_bank", "train_vae"
KEPT = {
    "train_diffusion": "train_diffusion-*/checkpoint.safetensors",
    "train_vae": "train_vae-*/checkpoint.safetensors",  # what they go on from
    "sample_bank": "bank-*/manifest.json",
    "measure_gaps": "measure_gaps-*/*.json",
}


def works():
    "Notes that this process does work that another may have done."
    with open(Path(os.environ["VAE_DIFFUSION_RUNS"]) / "worked", "a") as f:
        f.write(f"{os.getpid()}\n")


def checkpoint_often():
    fit, train, fill, add = training.fit_stack, diffusion_training.train, banks.SampleBank.fill, banks.SampleBank._add
    training.fit_stack = lambda *a, **k: (works(), fit(*a, **k | {"checkpoint_seconds": EVERY}))[1]
    banks.SampleBank._add = lambda *a: (works(), add(*a))[1]
    diffusion_training.train = lambda *a, **k: train(*a, **k | {"checkpoint_seconds": EVERY})
    banks.SampleBank.fill = lambda self, *a, **k: fill(self, *a, **k | {"batch": 64, "seconds": EVERY})


def publish(folder):
    "What the workflow does with the results of a grid that is done."
    paths.results, paths.figures = lambda: folder / "published", lambda: folder / "published"
    table = results.publish_results(results.collect_results(SETTINGS)[0], SETTINGS)
    for name, drawn in figures.figures_from_results(table, SETTINGS).items():
        style.save_figure(drawn, paths.figures(), name)


def start(stage, folder):
    "A process that runs the stage in a folder of runs; its number."
    process = os.fork()
    if process:
        return process
    failed = 1
    try:
        os.environ["VAE_DIFFUSION_RUNS"] = str(folder)
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)  # this process may have been started with them ignored
        if stage == "publish":
            publish(folder)
        else:
            forks.notebook(identity.Run(stage, SETTINGS), folder / f"{stage}-{os.getpid()}.log")
        failed = 0
    finally:
        os._exit(failed)


peaks = {}  # process -> its largest memory, MB


def wait(process, seconds):
    "The exit status, or None if the process still runs after so many seconds."
    end = time.monotonic() + seconds
    while True:
        done, status, used = os.wait4(process, os.WNOHANG)
        if done:
            peaks[process] = used.ru_maxrss / 1024
            return status
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def content(folder):
    "What the runs in a folder left: tables and manifests without their seconds, everything else by its digest."
    found = {}
    for f in sorted(folder.rglob("*")):
        name = f.relative_to(folder).as_posix()
        if f.name in ("metrics.csv", "digits-cpu.csv", "digits-smoke.csv"):
            found[name] = tables.read_table(f).drop(columns="seconds").to_csv()
        elif f.name == "manifest.json":
            found[name] = json.loads(files.read_verified(f)) | {"seconds": None}
        elif f.suffix in (".safetensors", ".npy", ".svg", ".png") and "checkpoint" not in name:
            found[name] = files.file_digest(f)
    return found


def lost(stage, folder, started):
    "Seconds of work that a run that has just been killed does again; 0 if it had ended, or is one that starts from the beginning."
    if stage not in KEPT or list((folder / "digits-smoke").glob(f"{stage}-*/metrics.csv")):
        return 0.0
    return time.time() - max([started, *(f.stat().st_mtime for f in (folder / "digits-smoke").glob(KEPT[stage]))])


def kill(stage, before, whole, seconds, i):
    "One try: up to three kills at random moments, then the end. Returns the kills, the most seconds lost by one, and what was wrong, if anything."
    draw, folder, kills, most = random.Random(f"{stage} {i}"), before.parent / f"{stage}-{i}", 0, 0.0
    shutil.copytree(before, folder)
    for last in False, False, False, True:
        started, process = time.time(), start(stage, folder)
        status = wait(process, 600 if last else draw.uniform(0, 1.1 * seconds))
        if status is not None:
            break
        how, told = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]), time.monotonic()
        os.kill(process, how)
        if wait(process, 60) is None:
            return kills, most, f"{how.name} did not end it"
        kills, most = kills + 1, max(most, lost(stage, folder, started))
        if time.monotonic() - told > GRACE:
            return kills, most, f"{how.name}: left after {time.monotonic() - told:.1f} s"
        if most > EVERY + SLACK:
            return kills, most, f"{how.name}: {most:.1f} s of work were lost"
    wrong = f"exit status {status}: {''.join(f.read_text()[-800:] for f in folder.glob('*.log'))}" if status else None
    if not wrong and (found := content(folder)) != whole:
        wrong = f"differs: {[k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k)]}"
    if not wrong:
        shutil.rmtree(folder)
    return kills, most, wrong


def together(stored, whole):
    "Starts a stage eight times at once. Returns how many of these worked, and what was wrong, if anything."
    processes = [start(stored.name.removeprefix("before-"), stored) for _ in range(8)]
    wrong = [status for p in processes if (status := wait(p, 600))] or (content(stored) != whole and ["results differ"])
    worked = set(map(int, (stored / "worked").read_text().split())) & set(processes)
    return len(worked), wrong or []


def main(folder, tries):
    checkpoint_often()
    before = folder / "before"
    before.mkdir(parents=True)
    for stage in STAGES:
        stored = folder / f"before-{stage}"
        shutil.copytree(before, stored)
        began = time.monotonic()
        if status := wait(process := start(stage, before), 600):
            sys.exit(f"{stage} failed by itself with {status}: {''.join(f.read_text() for f in before.glob('*.log'))}")
        seconds, whole = time.monotonic() - began, content(before)
        said = {"stage": stage, "content": files.digest(whole), "peak": round(peaks[process])}
        if tries:
            found = [kill(stage, stored, whole, seconds, i) for i in range(tries)]
            said |= {
                "tries": tries,
                "kills": sum(k for k, *_ in found),
                "lost": round(max(m for _, m, _ in found), 2),
                "wrong": [f"try {i}: {w}" for i, (*_, w) in enumerate(found) if w],
            }
            if stage in TOGETHER:
                said["worked"], said["wrong together"] = together(stored, whole)
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
