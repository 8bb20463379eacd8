"What users give to the library beyond what one page can show: other programs that load its models, and states of the process that it runs in."
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close
from vae_diffusion import paths, sampling

models = sorted(p.name for p in paths.weights().iterdir())


def python(code, *args, **env):
    "Runs Python in a process of its own, in which this library cannot be imported."
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.modules['vae_diffusion'] = None\n{code}", *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


PLAIN = """
import torch
from diffusers import DiffusionPipeline
for name in sys.argv[2:]:
    for dtype in torch.float32, torch.float16, torch.bfloat16:
        pipe = DiffusionPipeline.from_pretrained(f"data/weights/{name}", custom_pipeline="pipeline", trust_remote_code=True, torch_dtype=dtype)
        x = pipe(batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=4, output_type="pt").images
        torch.save(x, f"{sys.argv[1]}/{name}-{dtype}.pt")
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HF_HOME", str(folder / "home"))
        python(PLAIN, folder, *models)
    return lambda name, dtype: torch.load(folder / f"{name}-{dtype}.pt")


@pytest.mark.parametrize("name", models)
def test_plain_diffusers_draws_the_same_images(drawn, name):
    "The published models, loaded with the code beside the weights: the same to the last bit, and nearly the same in half precision."
    same = sampling.load_pipeline(paths.weights() / name)(2, torch.Generator().manual_seed(7), 4, "pt").images
    assert_close(drawn(name, torch.float32), same, atol=0, rtol=0)
    for dtype, near in (torch.float16, 0.02), (torch.bfloat16, 0.1):
        x = drawn(name, dtype)
        assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
        assert (x - same).abs().mean() < near
