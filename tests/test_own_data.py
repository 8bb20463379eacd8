"Images of a reader's own: a folder of colour pictures goes the whole way, and never meets results of other images."

import shutil

import forks
import numpy as np
import pytest
from PIL import Image
from vae_diffusion import augment, data
from vae_diffusion.core import files
from vae_diffusion.harness import comparisons, execution, packing, results, runs
from vae_diffusion.harness.identity import Run
from vae_diffusion.harness.settings import Settings


def drawn(folder, seed=0):
    "Draws pictures of two classes, a disc or a square of any colour, 12×12 pixels, into files of three kinds."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:12, :12]
    for i in range(80):
        at, radius, colours = rng.uniform(3, 8, 2), rng.uniform(2, 4), rng.integers(256, size=(2, 3), dtype=np.uint8)
        far = np.abs([y - at[0], x - at[1]])
        inside = np.hypot(*far) < radius if i % 2 else far.max(0) < radius
        file = folder / ("discs" if i % 2 else "squares") / f"{i:02d}{('.png', '.bmp', '.PPM')[i % 3]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours[inside.astype(int)]).save(file)
    return folder


def test_a_folder_of_pictures_is_compared(tmp_path, smoke):
    found = data.register("shapes", drawn(tmp_path / "files"))
    assert repr(found) == "shapes: 64 train and 16 test images, 3×12×12, 256 levels"
    shutil.rmtree(tmp_path / "files")  # the images are kept
    methods = "normal", "aug_naive", "aug_tuned", "dmaapx"
    settings = Settings(dataset="shapes", side=12, likelihood="mol", components=2, weights="trained", methods=methods,
                        dm_images=500, seeds=(0, 1), ks=(2,))
    for run in [Run("train_diffusion", settings), *results.grid(settings)]:
        forks.execute(run, tmp_path / "log")
        assert run.done and run.config["images"] == data.DATASETS["shapes"].digest
    table, missing = results.collect_results(settings)
    claims = comparisons.judge_claims(table, settings.k)
    assert not missing and len(claims) >= 7 and {*methods} < {*table.method}
    forks.write_report(settings, smoke / "shapes-smoke", tmp_path / "log")
    assert "shapes, smoke scale" in (smoke / "shapes-smoke/report.html").read_text()
    data.register("shapes", drawn(tmp_path / "others", seed=1))
    assert not any(run.done for run in results.grid(settings))  # other images, other runs


def test_a_name_that_nobody_registered_is_refused_by_every_experiment(smoke):
    refused = "dataset is 'shapes'; choose one of digits, .*; or register your own images with data.register"
    with pytest.raises(data.ProjectError, match=refused):
        Settings(dataset="shapes")
    data.register("shapes", np.zeros((50, 8, 8), int))
    assert not execution.non_default_parameters(Settings(dataset="shapes")).keys() - {"dataset", "scale"}


def test_a_pack_carries_the_images(smoke, tmp_path, monkeypatch):
    "And augments them as where they were registered; images of another kind with that name are left as they are."
    images = np.random.default_rng(0).integers(256, size=(60, 8, 8))
    wanted = data.register("shapes", images, augment="cifar10")
    settings = Settings(dataset="shapes", likelihood="mol", weights="trained")
    monkeypatch.setattr(packing, "load_params", lambda *_: settings)  # which are a file beside those of the project
    monkeypatch.setattr(runs, "retain_freed_memory", lambda: None)
    run = Run("train_vae", settings)
    runs.open_run("train_vae", settings)
    packing.pack_runs("shapes", "smoke", to=tmp_path / "pack")
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / "there"))
    packing.unpack_runs(tmp_path / "pack")
    packing.unpack_runs(tmp_path / "pack")  # once more changes nothing
    found = data.load("shapes")
    assert (found.train == wanted.train).all() and (found.test_labels == wanted.test_labels).all()
    assert augment.policy_for("aug_tuned", "shapes") == augment.policy_for("aug_tuned", "cifar10")
    assert run.folder.exists() and Run("train_vae", settings).digest == run.digest
    shutil.rmtree(run.folder)
    data.register("shapes", images[::-1])
    before = files.file_digest(data.own_file("shapes"))
    with pytest.raises(data.ProjectError, match="other images are registered here as shapes: register them"):
        packing.unpack_runs(tmp_path / "pack")
    assert files.file_digest(data.own_file("shapes")) == before and not run.folder.exists()
