"""Faults that a long campaign on shared machines meets.

`make stress` tries all of them and keeps a record; `make test` tries a seeded sample.
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import ROOT, made, run, tracked
from vae_diffusion import data, levels, pipelines
from vae_diffusion.core import batches, files, formats, locks, paths, published, rng
from vae_diffusion.harness import identity, results, runs, settings, tables
from vae_diffusion.banks import SampleBank
from vae_diffusion.core.errors import ProjectError
import forks

RANDOM = random.Random


def mutate(content, seed):
    "A fault of a disk or a copy: a flipped bit, an early end, more bytes, a huge number in the header, pieces swapped."
    draw, kind = RANDOM(seed), seed % 5
    at = draw.randrange(len(content))
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content + draw.randbytes(draw.randint(1, 100))
    if kind == 3:
        return content[: at % 16] + (2**60).to_bytes(8, draw.choice(["big", "little"])) + content[at % 16 + 8 :]
    a, b = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:a] + content[b : b + 8] + content[a + 8 : b] + content[a : a + 8] + content[b + 8 :]


class Formats:
    "Every stored format: makes a file of it in a folder, and says how it is read and what reading gives."

    def __init__(self, folder):
        self.folder = folder

    def tiny_source(self, name, files):
        "A data set of a few images in the published formats, with their true MD5s."
        known = {f: (len(raw), formats.md5_digest(raw)) for f, raw in files.items()}
        (self.folder / name).mkdir()
        for f, raw in files.items():
            (self.folder / name / f).write_bytes(raw)
        return published.PublishedFiles(name, (), {}, known, data.DATASETS[name].source.parse)

    def idx(self):
        image, label = (
            b"\0\0\x08\x03" + b"\0\0\0\x05\0\0\0\x04\0\0\0\x04" + bytes(range(80)),
            b"\0\0\x08\x01\0\0\0\x05" + bytes(5),
        )
        source = self.tiny_source(
            "fashion_mnist", {"train-images": image, "train-labels": label, "test-images": image, "test-labels": label}
        )
        return self.folder / "fashion_mnist" / "train-images", lambda: self.load("fashion_mnist", source)

    def cifar(self):
        source = self.tiny_source("cifar10", {f"{i}.bin": bytes([i]) + bytes(range(256)) * 12 for i in range(2)})
        return self.folder / "cifar10" / "0.bin", lambda: self.load("cifar10", source)

    def load(self, name, source):
        shape, n = ((1, 4, 4), 5) if name == "fashion_mnist" else ((3, 32, 32), 1)
        tiny = replace(data.DATASETS[name], source=source, shape=shape, n_train=n, n_test=n)
        with patch.dict(data.DATASETS, {name: tiny}):
            return data.load(name, self.folder).train.numpy().tobytes()

    def bank(self):
        SampleBank(self.folder / "bank").fill(self, 20, batch=5, shard=10, progress=False)
        return lambda: SampleBank(self.folder / "bank")[:].numpy().tobytes()

    def identity(self):
        return {"levels": 17, "shape": [1, 2, 2]}

    def __call__(self, batch_size, generator, output_type):
        return SimpleNamespace(images=torch.stack([torch.randint(17, (1, 2, 2), generator=g) for g in generator]) / 16)

    def bank_shard(self):
        read = self.bank()
        return self.folder / "bank" / "00000000-00000010.npy", read

    def bank_manifest(self):
        read = self.bank()
        return self.folder / "bank" / "manifest.json", read

    def safetensors(self):
        file = self.folder / "checkpoint.safetensors"
        files.save_tensors(file, {"a": torch.arange(50.0), "b": torch.ones(3, 2)}, {"step": 7})
        return file, lambda: repr(
            sorted(
                (k, v.tolist()) if isinstance(v, torch.Tensor) else (k, v)
                for part in files.load_tensors(file)
                for k, v in part.items()
            )
        )

    def run(self):
        with patch.object(paths, "runs", lambda: self.folder):
            run = runs.open_run("train_vae", settings.Settings())
            runs.finish_run(run, [tables.result_row("elbo_test", [1.0, 2.0], epoch=3)], 1.0)
        return run

    def run_configuration(self):
        run = self.run()
        with patch.object(paths, "runs", lambda: self.folder):
            file = run.folder / "config.json"

        def read():
            with patch.object(paths, "runs", lambda: self.folder):
                return runs.open_run("train_vae", settings.Settings()).config

        return file, read

    def results(self):
        run = self.run()
        return run.results, lambda: tables.read_table(run.results).to_csv()

    def published_results(self):
        (self.folder / "published").mkdir()
        file = self.folder / "published" / "digits-cpu.csv"
        tables.write_table(results.load_published("digits").head(40), file)

        def read():
            with patch.object(paths, "results", lambda: file.parent):
                return results.load_published("digits").to_csv()

        return file, read

    def params(self):
        folder = self.folder / "nbs" / "experiments" / "params"
        folder.mkdir(parents=True)
        file = shutil.copy(ROOT / "nbs/experiments/params/digits-cpu.yaml", folder)

        def read():
            with patch.object(paths, "root", lambda: self.folder):
                return asdict(settings.load_params("digits"))

        return Path(file), read

    def weights(self):
        shutil.copytree(ROOT / "data/weights/digits", self.folder / "digits")
        return lambda: json.dumps(pipelines.load_pipeline(self.folder / "digits").identity())

    def weights_config(self):
        read = self.weights()
        return self.folder / "digits/unet/config.json", read

    def weights_tensors(self):
        read = self.weights()
        return self.folder / "digits/unet/diffusion_pytorch_model.safetensors", read


FORMATS = [
    "idx",
    "cifar",
    "bank_shard",
    "bank_manifest",
    "safetensors",
    "run_configuration",
    "results",
    "published_results",
    "params",
    "weights_config",
    "weights_tensors",
]


@pytest.mark.parametrize("name", FORMATS)
def test_a_bad_file_is_refused_by_name(name, tmp_path, tries, record):
    """Whatever happens to a file, it gives what was written, or an error that names it.

    No other error comes, nothing hangs, and no memory is taken for what a header claims.
    """
    file, read = getattr(Formats(tmp_path), name)()
    good, content = file.read_bytes(), read()
    soft = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, soft[1]))
    refused = 0
    try:
        for seed in range(tries(40, 2000)):
            file.write_bytes(mutate(good, seed))
            signal.alarm(20)
            try:
                same = read() == content
            except ProjectError as e:
                assert str(file) in str(e) and "\n" not in str(e)[:200], f"mutation {seed}: {e}"
                refused, same = refused + 1, True
            finally:
                signal.alarm(0)
            # a params file is for editing: another good value is another wish, and no fault
            assert same or name == "params", f"mutation {seed} of {name} was taken for good"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, soft)
    file.write_bytes(good)
    assert refused and read() == content
    record(f"bad file: {name.replace('_', ' ')}", seed + 1, "refused by name, or read as it was written")


def test_stages_that_are_repeated_killed_and_started_at_once(tmp_path, tries, record):
    """All stages, twice at the same time: bit for bit the same.

    The same again after SIGKILL, SIGTERM and Ctrl-C at random moments, up to three in a row. Of eight that are started
    at once, the first works, and the others wait and take what it left. And no stage needs more memory than it should.
    """
    n = tries(1, 50)
    lines = [json.loads(line) for line in run(sys.executable, "tests/kill.py", tmp_path, n).splitlines()]
    once, stages = ([line for line in lines if line["folder"] == name] for name in ("once", "killed"))
    assert [s["stage"] for s in stages] == ["train_diffusion", "sample_bank", "train_vae", "measure_gaps", "publish"]
    assert [s["content"] for s in stages] == [s["content"] for s in once]
    record("the same command, twice at once", 2 * len(stages), "the same results, bit for bit")
    for s in stages:
        name = s["stage"].replace("_", " ")
        assert not s["wrong"] and s["tries"] == n and s["kills"], s
        again = "starts from the beginning" if name == "publish" else f"at most {s['lost']:.1f} s of work done again"
        record(f"killed: {name}", s["kills"], f"the same results, bit for bit; left within 5 s when told to; {again}")
        assert s["peak"] < 1500, s
        record(f"memory of {name}, digits", 1, f"at most {s['peak']} MB, 1500 allowed")
        if "worked" in s:
            assert s["worked"] == 1 and not s["wrong together"], s
            record(f"eight at once: {name}", 8, "one works, the others wait; the same results, bit for bit")
    assert sum("worked" in s for s in stages) == 2


DOWNLOAD = """
import dataclasses, json, os, sys
from vae_diffusion import data
from vae_diffusion.core import formats, published
source = published.PublishedFiles(**json.loads(sys.argv[1]), parse=data.cifar10.parse)
data.DATASETS["cifar10"] = dataclasses.replace(data.DATASETS["cifar10"], source=source, n_train=1, n_test=1)
parent, children = os.getpid(), []
while os.getpid() == parent and len(children) < 7: children.append(os.fork()) # eight processes
print(formats.md5_digest(data.load("cifar10").train.numpy().tobytes()), flush=True)
sys.exit(os.getpid() == parent and any(os.waitpid(child, 0)[1] for child in children))
"""


def test_eight_downloads_at_once(tmp_path, record):
    "The first downloads and unpacks, the others wait: every process has the images, and the server was asked once."
    batches, asked = {f"{i}.bin": bytes([i]) + bytes(range(256)) * 12 for i in range(2)}, []
    served = tmp_path / "served" / "tiny.tar.gz"
    served.parent.mkdir()
    with tarfile.open(served, "w:gz") as tar:
        for name, raw in batches.items():
            (tmp_path / name).write_bytes(raw)
            tar.add(tmp_path / name, name)

    class Slow(SimpleHTTPRequestHandler):
        def __init__(self, *a):
            super().__init__(*a, directory=served.parent)

        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            time.sleep(1)
            super().do_GET()

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = {
            "folder": "tiny",
            "mirrors": [f"http://127.0.0.1:{server.server_port}/"],
            "containers": {served.name: formats.md5_digest(served.read_bytes())},
            "files": {name: [len(raw), formats.md5_digest(raw)] for name, raw in batches.items()},
        }
        env = {k: v for k, v in os.environ.items() if k != "VAE_DIFFUSION_DATA"} | {
            "VAE_DIFFUSION_CACHE": str(tmp_path / "cache")
        }
        said = run(sys.executable, "-c", DOWNLOAD, json.dumps(source), env=env, timeout=120)
        server.shutdown()
    assert said.count(formats.md5_digest(batches["0.bin"][1:])) == 8, said
    assert len(asked) == 1 and "waiting for it to finish" in said, (asked, said)
    record("eight at once: download", 8, "one downloads, the others wait; the server is asked once")


@contextmanager
def plain_user():
    "Within, permissions apply: to the superuser they do not."
    if root := not os.geteuid():
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    "A folder that every user may enter; that of `tmp_path` only its owner."
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_may_not_be_read(name, open_folder, record):
    file, read = getattr(Formats(open_folder), name)()
    file.chmod(0)
    with plain_user(), pytest.raises(ProjectError) as e:
        read()
    assert str(file) in str(e.value) and "Permission denied" in str(e.value)
    file.chmod(0o644)
    with plain_user():
        read()
    record(f"no permission to read: {name.replace('_', ' ')}", 1, "an error that names the file")


def test_a_folder_that_may_not_be_written(open_folder, record):
    (open_folder / "results").mkdir(mode=0o555)
    bank, table = Formats(open_folder), results.load_published("digits").head(3)
    for write in [
        lambda f: tables.write_table(table, f / "digits-cpu.csv"),
        lambda f: locks.acquire(f / "run"),
        lambda f: SampleBank(f / "bank").fill(bank, 20, progress=False),
        lambda f: files.save_tensors(f / "a.safetensors", {"a": torch.ones(2)}),
    ]:
        with (
            plain_user(),
            pytest.raises(ProjectError, match=f"{open_folder}/results/.* cannot be written .Permission denied"),
        ):
            write(open_folder / "results")
    assert not any((open_folder / "results").iterdir())
    record("no permission to write", 4, "an error that names the file")


@pytest.fixture
def small_disk(tmp_path):
    "A function that makes a folder on a disk of its own, with mount options; again with others for the same disk."
    disk, mounted = tmp_path / "disk", []
    disk.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", *(["-o", f"remount,{options}"] if mounted else ["-t", "tmpfs", "-o", options, "tmpfs"]), disk],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(True)
        return disk

    yield mount
    if mounted:
        subprocess.run(["umount", disk], check=True)


def papermill(stage, folder, *parameters):
    "Runs an experiment as a user would: the exit status, all that was printed, and the peak of the memory in MB."
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [
                "papermill",
                "--log-level",
                "ERROR",
                "--no-progress-bar",
                "-k",
                "python3",
                *parameters,
                f"nbs/experiments/{stage}.ipynb",
                "/dev/null",
            ],
            cwd=ROOT,
            stdout=said,
            stderr=said,
            env=os.environ | {"VAE_DIFFUSION_RUNS": str(folder)},
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        return process.returncode, said.read(), used.ru_maxrss // 1000


def train(folder, *parameters):
    return papermill("train_vae", folder, "-p", "scale", "smoke", *parameters)[:2]


def test_a_full_disk(small_disk, tmp_path, record):
    status, said = train(small_disk("size=64k") / "runs")
    assert status and "cannot be written (No space left on device)" in said
    assert not list(tmp_path.rglob("metrics.csv"))
    status, said = train(small_disk("size=20m") / "runs")
    assert not status and list(tmp_path.rglob("metrics.csv")) and not list(tmp_path.rglob("*.tmp")), said
    record("full disk", 1, "an error that names the file; with more room the same command ends well")


def test_a_disk_that_may_not_be_written(small_disk, tmp_path, record):
    small_disk("size=1m")
    status, said = train(small_disk("ro") / "runs")
    assert status and "cannot be written (Read-only file system)" in said
    (tmp_path / "file").touch()
    with patch.dict(os.environ, {"VAE_DIFFUSION_CACHE": str(tmp_path / "file" / "cache")}):
        os.environ.pop("VAE_DIFFUSION_DATA", None)
        with pytest.raises(ProjectError, match="cannot be written .Not a directory"):
            data.load("binary_mnist")
    record("read-only disk, unwritable cache", 2, "an error that names the file")


WRONG = {
    int: [-(10**9), 10**18, 2.5, "many", None, [1], {"a": 1}],
    float: [float("nan"), -1e9, 1e12, "much", None, [1.0], {"a": 1}],
    bool: ["no", 2, None, []],
    str: ["nonsense", "", 3, None, ["normal"]],
    list: [[], 3, "text", [-1], [None], ["nonsense"], None],
}


@pytest.mark.parametrize("page", tracked("nbs/experiments/*.ipynb"))
def test_every_parameter_is_checked(page, record):
    "Each parameter of each notebook, with a wrong type, negative, absurd and missing: one line that names it."
    cell = next(
        c for c in json.loads((ROOT / page).read_text())["cells"] if "parameters" in c["metadata"].get("tags", [])
    )
    exec(re.sub(r"^# (?=[a-z_0-9]+ = )", "", "".join(cell["source"]), flags=re.M), names := {})
    del names["__builtins__"]
    tried = 0
    for name, value in (names | {"dataset": "digits", "scale": "cpu"}).items():
        for wrong in WRONG[type(value)]:
            if (name, wrong) in (("gaps_at", []), ("decoder_of", "")):
                continue  # none is a good wish
            with pytest.raises(ProjectError, match=rf"\b{name}\b") as e:
                settings.collect_settings(names | {name: wrong})
            assert "\n" not in str(e.value)
            tried += 1
    with pytest.raises(ProjectError, match="is not a parameter"):
        settings.collect_settings(names | {"colour": "red"})
    record(
        f"bad parameters of {Path(page).stem}",
        tried + 1,
        "refused before any work, in one line that names the parameter",
    )


@pytest.mark.parametrize(
    "wish, answer",
    [
        ("DATASET=svhn", "no parameters for svhn"),
        ("SCALE=huge", "no parameters for digits at scale huge"),
        ("PART=methods=oracle", "choose one of normal"),
        ("PART=seeds=first", "seeds must be of type int"),
        ("PART=colour=red", "colour is no part"),
        ("PART=stack=maybe", "stack is maybe; choose true or false"),
        ("STUDY=none", "there is no study none"),
    ],
)
def test_the_workflow_says_what_is_wrong(wish, answer, tmp_path, record):
    target = "study" if "STUDY" in wish else "reproduce"
    status, said = made(
        target,
        *([] if "SCALE" in wish or "DATASET" in wish else ["SCALE=smoke"]),
        wish,
        VAE_DIFFUSION_RUNS=str(tmp_path),
    )
    assert status and answer in said and not list(tmp_path.iterdir())
    record(f"make {target} {wish}", 1, "refused before any work, in one line")


def test_a_download_without_a_network(tmp_path, cut, record):
    if not cut:
        pytest.skip("the network cannot be cut off here")
    env = {k: v for k, v in os.environ.items() if k not in ("VAE_DIFFUSION_DATA", "OFFLINE")}
    with pytest.raises(AssertionError, match="but the download failed"):
        run(
            *cut,
            sys.executable,
            "-c",
            "from vae_diffusion import data; data.load('cifar10')",
            env=env | {"VAE_DIFFUSION_CACHE": str(tmp_path / "cache")},
        )
    record("no network for a download", 1, "an error that says so and what to do")


SHORT = """
import resource, torch
from vae_diffusion import data, levels, metrics, models
from vae_diffusion.likelihoods import family
torch.set_num_threads(1)
images = levels.pad(data.load("digits").train, 64)
vae = models.fully_connected((1, 64, 64), family("binomial", levels=17), (64,), 4)
metrics.elbo(vae, images[:10], 17)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, limits[1]))
short = metrics.elbo(vae, images, 17)
resource.setrlimit(resource.RLIMIT_AS, limits)
torch.testing.assert_close(short, metrics.elbo(vae, images, 17), rtol=1e-6, atol=0)
"""


def test_short_memory(record):
    assert "not enough memory: continuing with" in run(sys.executable, "-c", SHORT)
    record("memory for a part of the batch only", 1, "the batch is halved until it fits, and says so; the same ELBOs")


FULL = {  # shorter, with all that is held in memory at its size
    "train_diffusion": ["-p", "dm_images", "3200", "-p", "dm_judged", "50"],
    "sample_bank": ["-p", "n_train", "1000", "-y", "ks: [1]", "-p", "k", "1"],
    "train_vae": ["-p", "epochs", "1"],
    "measure_gaps": ["-p", "epochs", "1"],
}


@pytest.mark.data
@pytest.mark.parametrize("stage", FULL if "STRESS" in os.environ else ["sample_bank"])
def test_memory_at_full_size(stage, tmp_path, record):
    status, said, peak = papermill(stage, tmp_path, "-f", "nbs/experiments/params/binary_mnist-cpu.yaml", *FULL[stage])
    assert not status and peak < 3000, (peak, said)
    record(f"memory of {stage.replace('_', ' ')}, binary_mnist", 1, f"at most {peak} MB, 3000 allowed")


def test_another_seed_or_number_of_threads(tmp_path, monkeypatch, record):
    "Two threads change the rounding, another seed changes everything."
    elbo, chosen = {}, torch.set_num_threads
    for name, threads, seed in ("one", 1, 0), ("two", 2, 0), ("seed", 1, 1):
        monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / name))
        trained = identity.Run("train_vae", settings.Settings(epochs=30, seed=seed))
        with patch.object(torch, "set_num_threads", lambda n, given=threads: chosen(given)):
            forks.execute(trained, tmp_path / "log")
        elbo[name] = runs.read_results(trained).query("metric == 'elbo_test' and epoch == 30").value.item()
    assert abs(elbo["one"] - elbo["two"]) < 0.5 < abs(elbo["one"] - elbo["seed"]), elbo
    record("two threads in the place of one", 1, "test ELBO within 0.5 nats")
    record("another seed", 1, "another test ELBO")


def test_another_batch_of_the_sampler():
    "Image i depends on its own noise; its batch changes the rounding alone: at most one level in a thousand pixels."
    pipe = pipelines.load_pipeline(paths.weights() / "digits")

    def draw(rows):
        generators = [rng.generator("bank", 0, i) for i in rows.tolist()]
        return levels.to_levels(pipe(len(rows), generators, 8, "pt", solver="multistep").images, 17).int()

    together, apart = (torch.cat(batches.map_batches(draw, size, torch.arange(64))) for size in (64, 7))
    assert (together != apart).float().mean() < 1e-3 and (together - apart).abs().max() <= 1


def test_every_experiment_can_be_run_again_in_the_same_kernel(tmp_path):
    assert json.loads(run(sys.executable, "tests/soak.py", tmp_path, 0))["runs"] == 12


def test_a_long_session_leaves_nothing_behind(tmp_path, tries, record):
    "One seed after the other in kernels that are not restarted: neither memory nor open files grow."
    found = json.loads(run(sys.executable, "tests/soak.py", tmp_path, seconds := tries(8, 1800)))
    grown = found["late"]["mb"] - found["early"]["mb"]
    assert found["late"]["files"] <= found["early"]["files"] and grown < 100, found
    record(
        f"{seconds // 60} minutes of runs in one kernel",
        found["runs"],
        f"memory grew by {grown:.0f} MB, 100 allowed; no more open files",
    )


def test_a_long_workflow_leaves_nothing_behind(tmp_path, tries, record):
    """A thousand runs under one `make reproduce`, which SIGTERM ends.

    Neither the memory nor the open files of the process that starts them grow.
    """
    seconds, seen = tries(10, 1800), []
    count = lambda: len(list(tmp_path.glob("digits-smoke/*/metrics.csv")))
    make = subprocess.Popen(
        ["make", "reproduce", "SCALE=smoke", f"PART=methods=normal seeds={','.join(map(str, range(seconds * 2)))}"],
        cwd=ROOT,
        start_new_session=True,
        env=os.environ | {"VAE_DIFFUSION_RUNS": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not count():
            assert make.poll() is None and not time.sleep(0.1)
        workflow = next(p for p in psutil.Process(make.pid).children() if "snakemake" in " ".join(p.cmdline()))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.5)
            seen.append((workflow.memory_info().rss / 2**20, workflow.num_fds()))
        finished = count()
    finally:
        os.killpg(make.pid, signal.SIGTERM)
    (early, opened), (late, left) = (
        map(max, zip(*part)) for part in (seen[len(seen) // 5 : len(seen) * 2 // 5], seen[-len(seen) // 5 :])
    )
    assert finished > seconds / 10 and left <= opened + 5 and late - early < 100, (finished, early, late, opened, left)
    record(
        f"{seconds // 60} minutes of runs in one workflow",
        finished,
        f"memory grew by {late - early:.0f} MB, 100 allowed; no more open files",
    )
    assert make.wait(300)  # it may make the report of all these runs first
