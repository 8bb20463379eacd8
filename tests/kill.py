"""Kills the stages of an experiment at random moments and starts them again, or starts one many times at once.

    python tests/kill.py FOLDER TRIES

All stages run once in FOLDER/once and, at the same time, in FOLDER/killed. There each is also killed and started again,
TRIES times, and those of `TOGETHER` are started eight times at once. Prints a line of JSON for each stage of both, with
the digest of its results and its largest memory. Every run is forked from this process, so that it starts at once.
"""

import json
import multiprocessing
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

EVERY = 0.15  # seconds between checkpoints, so that there are some in a run of seconds
SLACK = 2.5  # seconds that a run may take to start or to write besides
GRACE = 5.0  # seconds in which a run that is told to stop must have left
SETTINGS = Settings(
    weights="trained",
    dm_images=3000,
    dm_judged=5,
    method="dmaapx",
    k=1,
    n_test=100,
    epochs=60,
    evaluate_at=(20, 40),
    star_images=10,
    star_steps=100,
    attack_steps=20,
    iwae_images=10,
    methods=("dmaapx",),
    seeds=(0,),
    ks=(1,),
)
STAGES = "train_diffusion", "sample_bank", "train_vae", "measure_gaps", "publish"
TOGETHER = "sample_bank", "train_vae"
KEPT = {  # what a stage resumes from
    "train_diffusion": "train_diffusion-*/checkpoint.safetensors",
    "train_vae": "train_vae-*/checkpoint.safetensors",
    "sample_bank": "bank-*/manifest.json",
    "measure_gaps": "measure_gaps-*/*.json",
}


def note_work():
    "Notes that this process does work that another may have done."
    with open(Path(os.environ["VAE_DIFFUSION_RUNS"]) / "worked", "a") as f:
        f.write(f"{os.getpid()}\n")


def checkpoint_often():
    "Lets every stage keep its work each `EVERY` seconds, and note that it works."
    fit_stack, train = training.fit_stack, diffusion_training.train
    fill, add = banks.SampleBank.fill, banks.SampleBank._add

    def fit_and_note(*args, **options):
        note_work()
        return fit_stack(*args, **options | {"checkpoint_seconds": EVERY})

    def add_and_note(*args):
        note_work()
        return add(*args)

    def train_often(*args, **options):
        return train(*args, **options | {"checkpoint_seconds": EVERY})

    def fill_often(*args, **options):
        return fill(*args, **options | {"batch": 64, "seconds": EVERY})

    training.fit_stack, diffusion_training.train = fit_and_note, train_often
    banks.SampleBank.fill, banks.SampleBank._add = fill_often, add_and_note


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
            forks.execute_in_folder(identity.Run(stage, SETTINGS), folder / f"{stage}-{os.getpid()}.log")
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


def is_done(stage, folder):
    "Whether the run of a stage has ended."
    return any((folder / "digits-smoke").glob(f"{stage}-*/metrics.csv"))


def seconds_lost(stage, folder, started):
    "Seconds of work that a run that was just killed does again: none if it had ended, or has nothing to resume from."
    if stage not in KEPT or is_done(stage, folder):
        return 0.0
    kept = [f.stat().st_mtime for f in (folder / "digits-smoke").glob(KEPT[stage])]
    return time.time() - max([started, *kept])


def kill(stage, before, expected, seconds, i):
    """Tries once: up to three kills at random moments, then a run to its end.

    Returns the number of kills, the most seconds of work that one of them lost, and what was wrong, if anything.
    """
    draw, folder = random.Random(f"{stage} {i}"), before.parent / f"{stage}-{i}"
    shutil.copytree(before, folder)
    kills, most_lost = 0, 0.0
    for last in False, False, False, True:
        started = time.time()
        process = start(stage, folder)
        longest = 1.1 if i or kills else 0.5  # the first try ends in time for a kill, also if the run is faster now
        status = wait(process, 600 if last else draw.uniform(0, longest * seconds))
        if status is not None:
            break
        how = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        told = time.monotonic()
        os.kill(process, how)
        if wait(process, 60) is None:
            return kills, most_lost, f"{how.name} did not end it"
        left_after = time.monotonic() - told
        kills += 1
        most_lost = max(most_lost, seconds_lost(stage, folder, started))
        if left_after > GRACE:
            return kills, most_lost, f"{how.name}: left after {left_after:.1f} s"
        if most_lost > EVERY + SLACK:
            return kills, most_lost, f"{how.name}: {most_lost:.1f} s of work were lost"
    if status:
        logs = "".join(f.read_text()[-800:] for f in folder.glob("*.log"))
        return kills, most_lost, f"exit status {status}: {logs}"
    found = content(folder)
    if found != expected:
        different = [name for name in found | expected if found.get(name) != expected.get(name)]
        return kills, most_lost, f"differs: {different}"
    shutil.rmtree(folder)
    return kills, most_lost, None


def start_together(stage, folder, expected):
    "Starts a stage eight times at once. Returns how many of these worked, and what was wrong, if anything."
    processes = [start(stage, folder) for _ in range(8)]
    wrong = [status for status in [wait(p, 600) for p in processes] if status]
    if content(folder) != expected:
        wrong.append("results differ")
    worked = set(map(int, (folder / "worked").read_text().split())) & set(processes)
    return len(worked), wrong


def run_stages(folder, tries):
    "Runs all stages, one after the other, and prints what came of each; kills those that are also tried."
    before = folder / "before"
    before.mkdir(parents=True)
    for stage in STAGES:
        stored = folder / f"before-{stage}"
        shutil.copytree(before, stored)
        began = time.monotonic()
        process = start(stage, before)
        if status := wait(process, 600):
            logs = "".join(f.read_text() for f in before.glob("*.log"))
            sys.exit(f"{stage} failed by itself with {status}: {logs}")
        seconds, expected = time.monotonic() - began, content(before)
        said = {"folder": folder.name, "stage": stage, "content": files.digest(expected), "peak": round(peaks[process])}
        if tries:
            found = [kill(stage, stored, expected, seconds, i) for i in range(tries)]
            said["tries"] = tries
            said["kills"] = sum(kills for kills, _, _ in found)
            said["lost"] = round(max(lost for _, lost, _ in found), 2)
            said["wrong"] = [f"try {i}: {wrong}" for i, (_, _, wrong) in enumerate(found) if wrong]
            if stage in TOGETHER:
                said["worked"], said["wrong together"] = start_together(stage, stored, expected)
        print(json.dumps(said), flush=True)


def main(folder, tries):
    checkpoint_often()
    once = multiprocessing.get_context("fork").Process(target=run_stages, args=(folder / "once", 0))
    once.start()
    run_stages(folder / "killed", tries)
    once.join()
    sys.exit(once.exitcode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
