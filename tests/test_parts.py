"What nbs/library.ipynb says of the parts: in an installed wheel, and where nothing of ours is installed."

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import nbformat
import pytest
from conftest import ROOT, run, tracked
from test_1_gates import ORDER
from vae_diffusion.core import paths

PAGE = next(c.source for c in nbformat.read(ROOT / "nbs/library.ipynb", 4).cells if "## Use the parts" in c.source)
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
    "Runs code in an environment that has the packages but nothing of ours, in an empty home, without a network."
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    packages = sysconfig.get_path("purelib")  # as a path, whose .pth files, such as that of the checkout, do not count
    [site] = (tmp_path / "env").glob("lib/*/site-packages")
    (site / "packages.pth").write_text(f"import sys; sys.path.append({packages!r})")
    (tmp_path / "home").mkdir()

    def python(code, status=0):
        command = [*cut, tmp_path / "env/bin/python", "-W", "error::UserWarning", "-c", code]
        env = {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
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
