"What nbs/library.ipynb says of the parts: in an installed wheel, and where nothing of ours is installed."

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT, run, tracked
from hub import hub
from huggingface_hub import ModelCard
from test_1_gates import ORDER
from vae_diffusion import models
from vae_diffusion.core import paths
from vae_diffusion.harness import measurements, studies

PAGE = next(c.source for c in nbformat.read(ROOT / "nbs/library.ipynb", 4).cells if "## Use the parts" in c.source)
PUSH = re.findall(r"`((?:pipe|vae)[.]push_to_hub[(].+?[)])`", PAGE)
OURS, VAE, PLAIN = re.findall(r"```python\n(.*?)```", PAGE, re.S)
LOOK = "\nimport hashlib\nprint(hashlib.sha256(b''.join(i.tobytes() for i in images)).hexdigest())"
DRAW = "\nimport torch\nimages = pipe(batch_size=8, generator=torch.Generator().manual_seed(0)).images" + LOOK
EVERYTHING = f"\nimport importlib\nfor module in {ORDER}: importlib.import_module('vae_diffusion.' + module)"
NOT_THERE = """
from vae_diffusion.core import errors, paths
assert paths.root() == paths.cache(), paths.root()
try: EDMPipeline.published("fashion_mnist")
except errors.ProjectError as e: print(e)
"""


@pytest.fixture
def elsewhere(tmp_path, cut):
    "Runs code in an environment that has the packages but nothing of ours, in an empty home, with at most a hub."
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    packages = sysconfig.get_path("purelib")  # as a path, whose .pth files, such as that of the checkout, do not count
    [site] = (tmp_path / "env").glob("lib/*/site-packages")
    (site / "packages.pth").write_text(f"import sys; sys.path.append({packages!r})")
    (tmp_path / "home").mkdir()

    def python(code, status=0, **hub):
        command = [*([] if hub else cut), tmp_path / "env/bin/python", "-W", "error::UserWarning", "-c", code]
        env = {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]} | hub
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done

    python.folder, python.site = tmp_path, site
    return python


def test_a_model_is_drawn_from_where_nothing_of_ours_is_installed(elsewhere):
    assert "No module named 'vae_diffusion'" in elsewhere("import vae_diffusion", status=1).stderr
    shutil.copytree(paths.weights() / "digits", elsewhere.folder / "data/weights/digits")
    done = elsewhere(PLAIN + DRAW)
    exec(OURS + LOOK.replace("print(", "found = ("), names := {})
    assert done.stdout.strip() == names["found"]
    assert "accelerate" not in done.stderr


def test_the_wheel_works_without_the_checkout(elsewhere):
    source = elsewhere.folder / "source"
    for f in tracked("."):
        (source / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f, source / f)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", elsewhere.folder, source)
    shutil.rmtree(source)
    [wheel] = elsewhere.folder.glob("*.whl")
    assert wheel.stat().st_size < 1_000_000
    quiet = "--quiet", "--no-index", "--disable-pip-version-check", "--no-deps"
    run(sys.executable, "-m", "pip", "install", *quiet, "--target", elsewhere.site, wheel)
    done = elsewhere("import sys; sys.modules['nbdev'] = None\n" + OURS + LOOK + NOT_THERE + EVERYTHING)
    exec(OURS + LOOK.replace("print(", "found = ("), names := {})
    digest, refused = done.stdout.splitlines()
    assert digest == names["found"] and "'fashion_mnist'" in refused and "which holds digits: choose" in refused
    assert "accelerate" not in done.stderr and "components" not in done.stderr


def test_a_published_vae_loads_with_one_line(monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    exec(OURS.split("pipe = ")[0] + VAE, names := {})
    assert names["bound"].shape == (360,) and abs(names["bound"].mean() + 91.8) < 0.5
    assert capfd.readouterr() == ("", "")


STUDIES = {
    "digits": ["digits-ladder"],
    "binary_mnist": ["binary_mnist-diffusion"],
    "fashion_mnist": ["fashion_mnist-diffusion"],
    "fashion_mnist-stronger": ["fashion_mnist-stronger", "fashion_mnist-quality"],
    "cifar10": ["cifar10-diffusion"],
    "cifar10-stronger": ["cifar10-stronger", "cifar10-quality"],
}


def facts(card):
    "The rows of a card's first table."
    return dict(re.findall(r"^[|] (.+?) [|] (.+?) [|]$", card, re.M))


@pytest.mark.parametrize("name", sorted(f.parent.name for f in paths.weights().glob("*/model_index.json")))
def test_a_model_card_says_how_good_the_model_is(name):
    "As the studies have it that judged it."
    found = facts((paths.weights() / name / "README.md").read_text())
    runs = {label: run.settings for study in STUDIES[name] for label, run in studies.load_study(study).runs()}
    table = pd.concat(map(studies.load_published_study, STUDIES[name]))
    by = {label: f"the solver {s.solver}, {s.steps} steps" for label, s in runs.items()}
    told = measurements.quality_facts(table.assign(variant=table.variant.map(by)))
    assert len(told) > 2 and told.items() <= found.items()


def test_what_is_to_be_cited():
    asked = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    text = " ".join(models.CITATION.split())
    for part in asked["title"].replace("&", r"\&"), asked["journal"], str(asked["year"]), asked["url"]:
        assert part in text
    for author in asked["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in models.CITATION


def test_models_go_to_the_hub_and_come_back(elsewhere):
    "With the lines of the page and, where nothing of ours is installed, those of the card that arrived."
    with hub() as there:
        env = os.environ | there.env | {"HF_HOME": str(elsewhere.folder / "cache")}
        again = f'pipe.save_pretrained({env["HF_HOME"]!r}, push_to_hub=True, repo_id="user/again")'
        run(sys.executable, "-c", "\n".join([OURS.split("images = ")[0] + VAE, *PUSH, again]), env=env)
        files, vae = there.files["user/digits"], there.files["user/vae-digits"]
        cards = {name: found["README.md"].decode() for name, found in there.files.items()}
        [lines] = re.findall(r"```python\n(.*?)```", cards["user/digits"], re.S)
        drawn = elsewhere(lines + DRAW, **there.env).stdout.strip()
        [lines] = re.findall(r"```python\n(.*?)```", cards["user/vae-digits"], re.S)
        loaded = run(sys.executable, "-c", lines + "print(images.shape, vae.latent_shape)", env=env)
    exec(OURS + LOOK.replace("print(", "found = ("), names := {})
    assert drawn == names["found"] and loaded == "torch.Size([8, 1, 8, 8]) (8,)\n"
    assert cards["user/again"] == cards["user/digits"].replace("user/digits", "user/again")
    assert vae["model.safetensors"] == (paths.weights() / "vae-digits/dmaapx/model.safetensors").read_bytes()
    assert not [name for name in files if b"_name_or_path" in files[name] and name != "pipeline.py"]
    assert facts(cards["user/digits"]).keys() > {"data set", "images seen", "training images"}
    assert "Each saw 287,400 images" in cards["user/vae-digits"] and "test ELBO" in cards["user/vae-digits"]
    for name, card in cards.items():
        about = ModelCard(card).data
        assert about.license == "apache-2.0" and about.datasets == ["digits"] and about.tags and about.pipeline_tag
        assert f'"{name}"' in card and '"."' not in card and models.CITATION in card


def test_a_vae_that_is_not_there(elsewhere):
    code = "from vae_diffusion.models import VAE\nVAE.from_pretrained('user/none')"
    with hub() as there:
        env = os.environ | there.env | {"HF_HOME": str(elsewhere.folder / "cache")}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "ProjectError: user/none" in done.stderr and "holds no VAE that can be read" in done.stderr
