"What users give to the library beyond what one page can show: other programs, and other states of the process."

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.testing import assert_close
from vae_diffusion import augment, data, diffusion, diffusion_training, levels, metrics, pipelines, sources, training
from vae_diffusion.core import paths, rng
from vae_diffusion.harness import builders
from vae_diffusion.banks import SampleBank
from vae_diffusion.harness.settings import Settings
from vae_diffusion.likelihoods import family
from vae_diffusion.models import residual
from vae_diffusion.recipe import Recipe

models = sorted(p.parent.name for p in paths.weights().glob("*/model_index.json"))


def python(code, *args):
    "Runs Python in a process of its own, in which this library cannot be imported."
    code = f"import sys; sys.modules['vae_diffusion'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


PLAIN = """
import torch
from diffusers import DiffusionPipeline
def draw(name, dtype):
    how = dict(custom_pipeline="pipeline", trust_remote_code=True, torch_dtype=dtype)
    pipe = DiffusionPipeline.from_pretrained(f"data/weights/{name}", **how)
    x = pipe(batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=2, output_type="pt").images
    torch.save(x, f"{sys.argv[1]}/{name}-{dtype}.pt")
for name in sys.argv[2:]: draw(name, torch.float32)
for dtype in torch.float16, torch.bfloat16: draw("digits", dtype)
"""


def test_plain_diffusers_draws_the_same_images(tmp_path, monkeypatch):
    "The published models, with the code beside the weights: the same to the last bit, and nearly so in half precision."
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    python(PLAIN, tmp_path, *models)
    for name in models:
        same = pipelines.load_pipeline(paths.weights() / name)(2, torch.Generator().manual_seed(7), 2, "pt").images
        assert_close(torch.load(tmp_path / f"{name}-torch.float32.pt"), same, atol=0, rtol=0)
    same = torch.load(tmp_path / "digits-torch.float32.pt")
    for dtype in "float16", "bfloat16":
        x = torch.load(tmp_path / f"digits-torch.{dtype}.pt")
        assert x.dtype == torch.float32 and (x - same).abs().mean() < 0.02


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


digits = data.load("digits")
unit = levels.to_unit(digits.test[:6], 17)


def vae():
    return builders.build_vae(Settings(), digits)


def fitted(source, net=vae):
    training.fit(net := net(), source, 100, 17, 1, 50, progress=False)
    return [p.detach() for p in net.parameters()]


def likelihoods():
    "Of every family: probability of an image, mean and a sample."
    found = []
    for name, levels in ("bernoulli", 2), ("binomial", 17), ("gaussian", 256), ("mol", 256):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            p = residual((3, 8, 8), family(name, 3, levels), 4).eval().generate(2, rng.generator("z"))
        found += [p.log_prob(torch.ones(2, 3, 8, 8, dtype=torch.float32)), p.mean, p.sample(rng.generator("x"))]
    return found


def diffusion_model(folder):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = diffusion.unet(8, 1, (8, 8))
    recipe = Recipe(batch=20, warmup_images=0)
    net, curve = diffusion_training.train(net, digits.train, 17, recipe, 60, folder, progress=False)
    return [*net.parameters(), diffusion.nll_bound(diffusion.Denoiser(net), digits.test[:6], 17, 0.1, 40.0, 2)]


def pipeline(solver):
    pipe = pipelines.load_pipeline(paths.weights() / "digits")
    return [pipe(3, rng.generator("pipe"), 5, kind, solver=solver).images for kind in ("latent", "pt")]


def bank(folder):
    pipe = pipelines.load_pipeline(paths.weights() / "digits")
    how = dict(batch=4, shard=4, progress=False, num_inference_steps=4, solver="multistep")
    return [SampleBank(folder / "bank").fill(pipe, 5, **how)[:]]


def robustness():
    found = metrics.attack(net := vae(), unit, 2, 3)
    return [found.x_a, found.kl, (r := metrics.compare_attacked(net, unit, found.x_a)).gap, r.gap_sample]


calls = dict(
    likelihoods=lambda folder: likelihoods(),
    robustness=lambda folder: robustness(),
    diffusion=diffusion_model,
    bank=bank,
    normal=lambda folder: fitted(sources.training_source("normal", digits, 0)),
    augmented=lambda folder: fitted(sources.training_source("aug_naive", digits, 0)),
    elbo=lambda folder: [metrics.elbo(vae(), digits.test[:9], 17, 2), metrics.iwae(vae(), digits.test[:9], 17, 3)],
    amortization=lambda folder: [(g := metrics.amortization_gap(vae(), digits.test[:9], 17, 3, final=4)).gap, g.trace],
    generalization=lambda folder: [torch.tensor(metrics.generalization_gap([1, 2, 4], [2, 3]), dtype=torch.float64)],
    augment=lambda folder: [
        augment.augmentation("aug_tuned", "cifar10")(unit.expand(-1, 3, -1, -1), rng.generator("page"))
    ],
    likeness=lambda folder: [metrics.ms_ssim(unit, unit.flip(0)), *metrics.nearest_neighbours(unit, unit.flip(0))],
    quality=lambda folder: [metrics.two_sample_test(digits.train[:60], digits.test[:60], 17, 1)],
    heun=lambda folder: pipeline("heun"),
    multistep=lambda folder: pipeline("multistep"),
    stochastic=lambda folder: pipeline("stochastic"),
)


@pytest.mark.parametrize("name", calls)
def test_float64_as_default(tmp_path, name, request):
    "A notebook that has set float64 as PyTorch's default gets the same numbers of the same type, bit by bit."
    as_usual = calls[name](tmp_path / "float32")
    request.getfixturevalue("float64")
    assert_close(calls[name](tmp_path / "float64"), as_usual, rtol=0, atol=0)
