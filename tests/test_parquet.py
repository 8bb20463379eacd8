"""A bank as a data set of images, read by `datasets` itself.

Its packages come with `make build/parquet/ready`.
"""

import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from vae_diffusion.banks import SampleBank

TOOLS = ROOT / "build/parquet"
if not (TOOLS / "ready").exists():
    pytest.skip("needs pyarrow and datasets: make build/parquet/ready", allow_module_level=True)
TAKE = """
import sys
from pathlib import Path
import datasets, numpy, pyarrow.parquet
from vae_diffusion import banks
banks.PER_FILE, banks.PER_GROUP = 20, 8  # as if the bank were large
for place in map(Path, sys.argv[1:]):
    banks.SampleBank(place / "bank").to_parquet(place / "samples", 37, {"model": "toy", "k": 3})
    found = datasets.load_dataset(str(place / "samples"), split="train", cache_dir=str(place / "cache"))
    assert isinstance(found.features["image"], datasets.Image), found.features
    numpy.save(place / "read.npy", numpy.stack([numpy.array(row["image"]) for row in found]))
    streamed = datasets.load_dataset(str(place / "samples"), split="train", streaming=True)
    assert next(iter(streamed))["image"] == found[0]["image"]
    for file in sorted((place / "samples/data").iterdir()):
        about = pyarrow.parquet.ParquetFile(file).metadata
        print(file.name, about.num_rows, about.num_row_groups)
"""
TEAR = """
import sys
from pathlib import Path
from vae_diffusion import banks
bank, place = banks.SampleBank(sys.argv[1]), Path(sys.argv[2])
try: bank.to_parquet(place / "there")
except banks.ProjectError as e: print(e)
banks.png_bytes = lambda image: 1 / 0
try: bank.to_parquet(place / "torn")
except ZeroDivisionError: print("torn")
"""


class Toy:
    "Draws images of any levels and shape."

    def __init__(self, levels, *shape):
        self.levels, self.shape = levels, shape

    def identity(self):
        return {"weights": "toy", "levels": self.levels, "shape": self.shape}

    def __call__(self, n, generator, num_inference_steps, output_type):
        images = torch.stack([torch.randint(self.levels, self.shape, generator=g) for g in generator])
        return type("Drawn", (), {"images": images / (self.levels - 1)})


def python(code, *arguments):
    "Runs code with the packages, which ask no other machine."
    env = os.environ | {"PYTHONPATH": f"{TOOLS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    return run(sys.executable, "-c", code, *arguments, env=env).splitlines()


def filled(folder, *toy):
    "A bank of 40 images."
    return SampleBank(folder).fill(Toy(*toy), 40, batch=5, shard=10, progress=False, num_inference_steps=8)


def test_datasets_reads_what_a_bank_holds(tmp_path):
    toys = {"grey": (17, 1, 8, 8), "binary": (2, 1, 5, 5), "coloured": (256, 3, 6, 6)}
    wanted = {name: filled(tmp_path / name / "bank", *toy)[:37].numpy() for name, toy in toys.items()}
    said = python(TAKE, *(tmp_path / name for name in toys))
    assert said == ["train-00000-of-00002.parquet 20 3", "train-00001-of-00002.parquet 17 3"] * 3
    for name, (levels, *_) in toys.items():
        x = np.load(tmp_path / name / "read.npy")
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        assert x.dtype == np.uint8 and x.max() == 255 and x.min() == 0
        np.testing.assert_array_equal(np.round(x / 255 * (levels - 1)), wanted[name])
        card = (tmp_path / name / "samples/README.md").read_text()
        assert "| k | 3 |" in card and f"`round(pixel/255*{levels - 1})` is the level" in card


def test_what_is_there_is_not_replaced_and_what_is_torn_is_not_there(tmp_path):
    filled(tmp_path / "bank", 17, 1, 8, 8)
    (tmp_path / "out/there").mkdir(parents=True)
    refused, torn = python(TEAR, tmp_path / "bank", tmp_path / "out")
    assert "there exists: name another folder" in refused and torn == "torn"
    assert [*(tmp_path / "out").rglob("*")] == [tmp_path / "out/there"]
