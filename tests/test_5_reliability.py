"Faults that a long campaign on shared machines meets. `make torture` tries all of them and keeps a record; `make test` a seeded sample."
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tracked
from vae_diffusion import data, paths, results, runs, sampling, settings
from vae_diffusion.banks import SampleBank
from vae_diffusion.paths import ProjectError

RANDOM = random.Random


def mutate(content, seed):
    "One of the faults of a disk or a copy: a flipped bit, an early end, more bytes, a number of the header made huge, two pieces swapped."
    draw, kind = RANDOM(seed), seed % 5
    at = draw.randrange(len(content))
    if kind == 0: return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1:]
    if kind == 1: return content[:at]
    if kind == 2: return content + draw.randbytes(draw.randint(1, 100))
    if kind == 3: return content[:at % 16] + (2**60).to_bytes(8, draw.choice(["big", "little"])) + content[at % 16 + 8:]
    a, b = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:a] + content[b:b + 8] + content[a + 8:b] + content[a:a + 8] + content[b + 8:]


class Formats:
    "Every stored format: makes a file of it in a folder, and says how it is read and what reading gives."
    def __init__(self, folder): self.folder = folder

    def tiny_source(self, name, files):
        "A data set of a few images in the published formats, with their true MD5s."
        known = {f: (len(raw), data.md5_of(raw)) for f, raw in files.items()}
        (self.folder / name).mkdir()
        for f, raw in files.items(): (self.folder / name / f).write_bytes(raw)
        return data.Source(name, 256, (), {}, known, data.sources[name].parse)

    def idx(self):
        image, label = (b"\0\0\x08\x03" + b"\0\0\0\x05\0\0\0\x04\0\0\0\x04" + bytes(range(80)), b"\0\0\x08\x01\0\0\0\x05" + bytes(5))
        source = self.tiny_source("fashion_mnist", {"train-images": image, "train-labels": label, "test-images": image, "test-labels": label})
        return self.folder / "fashion_mnist" / "train-images", lambda: self.load("fashion_mnist", source)

    def cifar(self):
        source = self.tiny_source("cifar10", {f"{i}.bin": bytes([i]) + bytes(range(256)) * 12 for i in range(2)})
        return self.folder / "cifar10" / "0.bin", lambda: self.load("cifar10", source)

    def load(self, name, source):
        with patch.dict(data.sources, {name: source}): return data.load(name, self.folder).train.numpy().tobytes()

    def bank(self):
        SampleBank(self.folder / "bank").fill(self, 20, batch=5, shard=10, progress=False)
        return lambda: SampleBank(self.folder / "bank")[:].numpy().tobytes()

    def identity(self): return {"levels": 17, "shape": [1, 2, 2]}
    def __call__(self, generators): return torch.stack([torch.randint(17, (1, 2, 2), generator=g) for g in generators]).to(torch.uint8)

    def bank_shard(self):
        read = self.bank()
        return self.folder / "bank" / "00000000-00000010.npy", read

    def bank_manifest(self):
        read = self.bank()
        return self.folder / "bank" / "manifest.json", read

    def safetensors(self):
        file = self.folder / "checkpoint.safetensors"
        paths.save_tensors(file, {"a": torch.arange(50.), "b": torch.ones(3, 2)}, {"step": 7})
        return file, lambda: repr(sorted((k, v.tolist()) if isinstance(v, torch.Tensor) else (k, v) for part in paths.load_tensors(file) for k, v in part.items()))

    def run(self):
        with patch.object(paths, "runs", lambda: self.folder):
            run = runs.open_run("train_vae", settings.Settings())
            runs.finish(run, [runs.row("elbo_test", [1., 2.], epoch=3)], 1.)
        return run

    def run_configuration(self):
        run = self.run()
        with patch.object(paths, "runs", lambda: self.folder): file = run.folder / "config.json"
        def read():
            with patch.object(paths, "runs", lambda: self.folder): return runs.open_run("train_vae", settings.Settings()).config
        return file, read

    def results(self):
        run = self.run()
        return run.results, lambda: runs.read_table(run.results).to_csv()

    def published_results(self):
        (self.folder / "published").mkdir()
        file = self.folder / "published" / "digits-cpu.csv"
        results.store(results.published("digits").head(40), file)
        def read():
            with patch.object(paths, "published", lambda: file.parent): return results.published("digits").to_csv()
        return file, read

    def params(self):
        folder = self.folder / "nbs" / "experiments" / "params"
        folder.mkdir(parents=True)
        file = shutil.copy(ROOT / "nbs/experiments/params/digits-cpu.yaml", folder)
        def read():
            with patch.object(paths, "root", lambda: self.folder): return asdict(settings.params("digits"))
        return Path(file), read

    def weights(self):
        shutil.copytree(ROOT / "data/weights/digits", self.folder / "digits")
        return lambda: json.dumps(sampling.load_pipeline(self.folder / "digits").identity())

    def weights_config(self):
        read = self.weights()
        return self.folder / "digits/unet/config.json", read

    def weights_tensors(self):
        read = self.weights()
        return self.folder / "digits/unet/diffusion_pytorch_model.safetensors", read


FORMATS = ["idx", "cifar", "bank_shard", "bank_manifest", "safetensors", "run_configuration", "results", "published_results", "params", "weights_config", "weights_tensors"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_bad_file_is_refused_by_name(name, tmp_path, tries, record):
    "Whatever happens to a file, it gives what was written, or an error that names it: no other error, no hang, no memory for what a header claims."
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
            try: same = read() == content
            except ProjectError as e:
                assert str(file) in str(e) and "\n" not in str(e)[:200], f"mutation {seed}: {e}"
                refused, same = refused + 1, True
            finally: signal.alarm(0)
            # a params file is for editing: another good value is another wish, and no fault
            assert same or name == "params", f"mutation {seed} of {name} was taken for good"
    finally: resource.setrlimit(resource.RLIMIT_AS, soft)
    file.write_bytes(good)
    assert refused and read() == content
    record(f"bad file: {name.replace('_', ' ')}", seed + 1, "refused by name, or read as it was written")
