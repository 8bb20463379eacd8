"What users give to the library beyond what one page can show: other programs that load its models, and states of the process that it runs in."
import subprocess
import sys

import torch
from conftest import ROOT
from torch.testing import assert_close
from vae_diffusion import paths, sampling

models = sorted(p.name for p in paths.weights().iterdir())


def python(code, *args):
    "Runs Python in a process of its own, in which this library cannot be imported."
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.modules['vae_diffusion'] = None\n{code}", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


PLAIN = """
import torch
from diffusers import DiffusionPipeline
def draw(name, dtype):
    pipe = DiffusionPipeline.from_pretrained(f"data/weights/{name}", custom_pipeline="pipeline", trust_remote_code=True, torch_dtype=dtype)
    x = pipe(batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=2, output_type="pt").images
    torch.save(x, f"{sys.argv[1]}/{name}-{dtype}.pt")
for name in sys.argv[2:]: draw(name, torch.float32)
for dtype in torch.float16, torch.bfloat16: draw("digits", dtype)
"""


def test_plain_diffusers_draws_the_same_images(tmp_path, monkeypatch):
    "The published models, loaded with the code beside the weights: the same to the last bit, and nearly the same in half precision."
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    python(PLAIN, tmp_path, *models)
    for name in models:
        same = sampling.load_pipeline(paths.weights() / name)(2, torch.Generator().manual_seed(7), 2, "pt").images
        assert_close(torch.load(tmp_path / f"{name}-torch.float32.pt"), same, atol=0, rtol=0)
    same = torch.load(tmp_path / "digits-torch.float32.pt")
    for dtype in "float16", "bfloat16":
        x = torch.load(tmp_path / f"digits-torch.{dtype}.pt")
        assert x.dtype == torch.float32 and (x - same).abs().mean() < 0.02
