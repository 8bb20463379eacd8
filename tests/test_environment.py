"What the surroundings may be: whose disk it is, what it can do, and where the variables point."

import errno
import fcntl
import mmap
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, forked, made
from vae_diffusion import data
from vae_diffusion.core import files, formats, locks, paths, published
from vae_diffusion.harness import builders, execution, identity, runs, tables
from vae_diffusion.banks import SampleBank
from vae_diffusion.core.errors import ProjectError
from vae_diffusion.harness.settings import Settings
import forks


class Grey:
    "Stands for a diffusion model."

    def identity(self):
        return {"levels": 17, "shape": [1, 2, 2]}

    def __call__(self, n, generator, output_type):
        return SimpleNamespace(images=torch.full((n, 1, 2, 2), 0.5))


@contextmanager
def read_only(folder):
    "Within, this process is a user to whom the folder belongs as little as any other, and who may only read it."
    for f in [folder, *folder.rglob("*")]:
        f.chmod(0o555 if f.is_dir() else 0o444)
    if root := not os.geteuid():
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for f in [folder, *folder.rglob("*")]:
            f.chmod(0o755 if f.is_dir() else 0o644)


@contextmanager
def read_only_mount(folder):
    "Within, the folder lies on a disk that nobody may write."
    if (
        done := subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True, text=True)
    ).returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def folder():
    "A folder that every user may enter; that of `tmp_path` only its owner."
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_finished_run_and_a_full_bank_are_read_without_permission_to_write(folder, monkeypatch):
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(folder))
    done = runs.open_run("train_vae", Settings())
    runs.checkpointed_part(done, "part", lambda: [tables.result_row("elbo_test", -90.0)])
    runs.finish_run(done, [tables.result_row("elbo_test", -90.0)], 1.0)
    SampleBank(folder / "bank").fill(Grey(), 20, batch=5, shard=10, progress=False)
    with read_only(folder):
        again = execution.require("train_vae", Settings())
        assert (
            runs.open_run("train_vae", Settings()).done
            and runs.read_results(again).value.item()
            == runs.checkpointed_part(again, "part", None)[0][0]["value"]
            == -90
        )
        bank = SampleBank(folder / "bank").fill(Grey(), 15, batch=5, shard=10, progress=False)
        assert len(bank) == 20 and bank[3].shape == (1, 2, 2)
        with pytest.raises(ProjectError, match="cannot be written .Permission denied"):
            bank.fill(Grey(), 21, batch=5, shard=10, progress=False)
        with pytest.raises(ProjectError, match="cannot be written .Permission denied"):
            runs.open_run("train_vae", Settings(seed=1))
    (done.folder).chmod(0)
    with read_only(folder / "bank"), pytest.raises(ProjectError, match="cannot be written .Permission denied"):
        runs.open_run("train_vae", Settings())
    done.folder.chmod(0o755)


def test_a_full_cache_is_read_without_permission_to_write(folder, monkeypatch):
    monkeypatch.setenv("VAE_DIFFUSION_CACHE", str(folder))
    here = folder / "datasets/tiny"
    here.mkdir(parents=True)
    (here / "a.bin").write_bytes(b"known")
    source = published.PublishedFiles(
        "tiny",
        ("http://127.0.0.1:9/",),
        {"a.bin": formats.md5_digest(b"known")},
        {"a.bin": (5, formats.md5_digest(b"known"))},
        list,
    )
    with read_only(folder):
        assert published.fetch(source) == here
    (here / "a.bin").write_bytes(b"other")
    with read_only(folder), pytest.raises(ProjectError, match=".lock cannot be written .Permission denied"):
        published.fetch(source)


SMALL = dict(n_train=300, dm_images=500)


def test_finished_experiments_are_shown_from_a_read_only_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / "runs"))
    stages = "train_diffusion", "sample_bank", "train_vae", "measure_gaps", "measure_encoder", "measure_diffusion"
    for stage in stages:
        forks.execute(identity.Run(stage, Settings(**SMALL)), tmp_path / "log")
    with read_only_mount(tmp_path / "runs"):
        for stage in stages:
            process = forked(stage, tmp_path / "out.ipynb", SMALL)
            process.join()
            assert process.exitcode == 0, stage


def test_a_disk_without_locks_or_permissions(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for write in [
        lambda: locks.acquire(tmp_path / "run"),
        lambda: files.write_text(tmp_path / "a.txt", "a", checksum=True),
        lambda: SampleBank(tmp_path / "bank").fill(Grey(), 5, batch=5, shard=5),
        lambda: published.download("a.bin", "0" * 32, ("http://127.0.0.1:9/",), tmp_path / "cache"),
    ]:
        with pytest.raises(
            ProjectError, match=f"{tmp_path}.* cannot be locked .Function not implemented.*VAE_DIFFUSION_CACHE"
        ):
            write()
    monkeypatch.undo()
    monkeypatch.setattr(os, "chmod", refuse)
    files.write_text(tmp_path / "a.txt", "a", checksum=True)
    assert files.read_verified(tmp_path / "a.txt") == b"a"


def test_a_disk_that_cannot_be_mapped_into_memory(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    bank = SampleBank(tmp_path / "bank").fill(Grey(), 20, batch=5, shard=10, progress=False)
    assert len(bank[:]) == len(SampleBank(tmp_path / "bank")[:]) == 20


def test_a_model_is_published_where_permissions_cannot_be_set(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    (tmp_path / "model/unet").mkdir(parents=True)
    for name in "model_index.json", "unet/config.json", "SHA256SUMS":
        (tmp_path / "model" / name).write_text(name)
    monkeypatch.setattr(builders, "weights_folder", lambda s: tmp_path / "model")
    monkeypatch.setattr(paths, "weights", lambda: tmp_path / "weights")
    monkeypatch.setattr(os, "chmod", refuse)
    builders.publish_weights(Settings())
    files.verify_folder(tmp_path / "weights/digits")
    assert (tmp_path / "weights/digits/unet/config.json").read_text() == "unet/config.json"


PLACES = """
from vae_diffusion.core import paths
print(paths.runs(), paths.cache(), paths.folder_from_env("VAE_DIFFUSION_DATA", paths.root()), sep="|")
"""


@pytest.mark.parametrize(
    "given, place",
    [
        ("~/large", Path.home() / "large"),
        ("large", ROOT / "large"),
        ("../large", ROOT / "../large"),
        ("/large", Path("/large")),
    ],
)
def test_folders_of_variables_do_not_depend_on_the_working_directory(given, place, tmp_path):
    names = dict.fromkeys(["VAE_DIFFUSION_RUNS", "VAE_DIFFUSION_CACHE", "VAE_DIFFUSION_DATA"], given)
    said = subprocess.run(
        [sys.executable, "-c", PLACES], cwd=tmp_path, env=os.environ | names, capture_output=True, text=True, check=True
    ).stdout
    assert said.split("|") == [str(place)] * 2 + [f"{place}\n"]


def test_the_data_folder_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAE_DIFFUSION_DATA", "~/no such data")
    with pytest.raises(ProjectError, match=f"^{Path.home()}/no such data/mnist"):
        data.load("binary_mnist")
    monkeypatch.setenv("VAE_DIFFUSION_DATA", "no such data")
    with pytest.raises(ProjectError, match=f"^{ROOT}/no such data/mnist"):
        data.load("binary_mnist")


def test_what_cannot_be_compiled_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/none/g++")
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / "runs"))
    alone = forked("measure_gaps", tmp_path / "out.ipynb", {"compile": True, "method": "dmaapx"})
    alone.join()
    for status, said in (alone.exitcode, (tmp_path / "out.log").read_text()), made("reproduce", "DATASET=binary_mnist"):
        assert status and "the C++ compiler /none/g++ cannot be used: No such file or directory. Install one" in said
    assert not (tmp_path / "runs").exists()
