"""Published numbers computed again, and the library beside plain loops that are written from the papers' equations.

What the library and a plain loop share is the random numbers. Published numbers must come out to every printed digit
where PyTorch rounds as it did for them. Another processor rounds differently; how much that changes was measured with
fewer instructions of this one (ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE): at most 0.015
nats in two epochs of any method, 3 nats in one evaluation of a later epoch, because a pixel of an augmented image falls
to another level; 6 % in an amortization gap and 15 % in a robustness gap, 30 % in their errors; no level of a sample.
"""

import re
import subprocess
from copy import deepcopy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import ROOT, forked
from test_readme import block, printed_by, section, table
from torch import nn
from vae_diffusion import banks, data, diffusion, diffusion_training, levels, metrics, pipelines, sources, training
from vae_diffusion.core import files, paths, rng
from vae_diffusion.harness import builders, execution, identity, measurements, results, runs, settings, tables
from vae_diffusion.core.precision import matmul_precision
from vae_diffusion.recipe import Recipe


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Published numbers are those of one thread."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def preconditioned(net, x, sigma, d):
    "D(x;σ) of Karras et al. 2022, table 1, column EDM, where σ_data is d."
    s = sigma.reshape(-1, 1, 1, 1)
    inner = net((x / (s**2 + d**2).sqrt()).float(), (sigma.log() / 4).float()).sample
    return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * inner


def plain_diffusion_training(net, images, levels, r, steps):
    """Adam (Kingma and Ba 2015, algorithm 1) on the loss of Karras et al. 2022.

    Returns a network with the average of the weights, and the loss of each step.
    """
    averaged, params, losses = deepcopy(net).eval(), list(net.train().parameters()), []
    m, v = [0.0] * len(params), [0.0] * len(params)
    epochs = steps * r.batch // len(images) + 1
    draw = lambda e: torch.randperm(len(images), generator=rng.generator("order", r.seed, e))
    order = torch.cat([draw(e) for e in range(epochs)])
    for t in range(1, steps + 1):
        x = images[order[(t - 1) * r.batch : t * r.batch]] / (levels - 1) * 2 - 1
        g, seen = rng.generator("diffusion", r.seed, t - 1), t * r.batch
        sigma = torch.exp(r.p_mean + r.p_std * torch.randn(r.batch, generator=g))
        noise = torch.randn(x.shape, generator=g)
        torch.manual_seed(rng.seed_of("dropout", r.seed, t - 1))
        error = preconditioned(net, x + sigma.reshape(-1, 1, 1, 1) * noise, sigma, r.sigma_data) - x
        weight = (sigma**2 + r.sigma_data**2) / (sigma * r.sigma_data) ** 2
        loss = (weight * (error**2).flatten(1).mean(1)).mean()
        rate = r.lr * min(1, seen / r.warmup_images) / max(1, seen / r.decay_images) ** 0.5
        decay = 2 ** (-r.batch / min(r.ema_halflife_images, seen / 20))
        for i, (gradient, average) in enumerate(zip(torch.autograd.grad(loss, params), averaged.parameters())):
            m[i] = 0.9 * m[i] + 0.1 * gradient
            v[i] = 0.999 * v[i] + 0.001 * gradient**2
            params[i].data -= rate * m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            average.data = decay * average.data + (1 - decay) * params[i].data
        losses.append(loss.item())
    return averaged, losses


def test_diffusion_training(digits, tmp_path):
    recipe = Recipe(
        batch=32,
        lr=2e-3,
        warmup_images=600,
        decay_images=1000,
        ema_halflife_images=50,
        p_mean=-0.8,
        p_std=1.1,
        sigma_data=0.75,
        seed=3,
    )
    torch.manual_seed(0)
    net = diffusion.unet(8, 1, (8, 16), dropout=0.2)
    beside, images = deepcopy(net), digits.train[:500]
    found, curve = diffusion_training.train(net, images, 17, recipe, 50 * 32, tmp_path, log_images=320, progress=False)
    averaged, losses = plain_diffusion_training(beside, images, 17, recipe, 50)
    means = torch.tensor(losses).reshape(5, 10).mean(1)
    torch.testing.assert_close(torch.tensor([p["loss"] for p in curve]), means, rtol=1e-4, atol=0)
    assert not found.training and [p["images"] for p in curve] == [320, 640, 960, 1280, 1600]
    x, c = torch.randn(100, 1, 8, 8, generator=rng.generator("inputs")), torch.linspace(-1, 1, 100)
    with torch.no_grad():
        assert not torch.equal(net(x, c).sample, net(x, c).sample)  # dropout
        ours, plain, last, plain_last = (n(x, c).sample for n in (found, averaged, net.eval(), beside.eval()))
    # rounding changes 2e-6
    assert (ours - plain).abs().max() < 1e-4 > (last - plain_last).abs().max() and (ours - last).abs().max() > 0.05


def heun(model, d, x, levels):
    "Karras et al. 2022, algorithm 1."
    for s, t in zip(levels, levels[1:]):
        slope = (x - preconditioned(model, x, s.expand(len(x)), d)) / s
        new = x + (t - s) * slope
        if t > 0:
            new = x + (t - s) / 2 * (slope + (new - preconditioned(model, new, t.expand(len(x)), d)) / t)
        x = new
    return x


def dpm(model, d, x, levels, noise=None):
    """Lu et al. 2022 (arXiv 2211.01095), algorithm 2 with α = 1; with noise its stochastic form, appendix B.

    The first step and the last are of first order.
    """
    before = None
    for s, t in zip(levels, levels[1:]):
        now = preconditioned(model, x, s.expand(len(x)), d)
        to = now
        if before is not None and t > 0:
            to = now + (now - before[0]) / 2 * (s / t).log() / (before[1] / s).log()
        if noise is None:
            x = t / s * x + (1 - t / s) * to
        else:
            x = (t / s) ** 2 * x + (1 - (t / s) ** 2) * to + t * (1 - (t / s) ** 2).sqrt() * noise()
        before = now, s
    return x


@pytest.mark.parametrize("solver, steps", [("heun", 6), ("multistep", 8), ("stochastic", 8)])
def test_bank_of_each_solver(digits, tmp_path, solver, steps):
    pipe, d = pipelines.load_pipeline(paths.weights() / "digits"), 0.75
    bank = banks.SampleBank(tmp_path)
    bank.fill(pipe, 24, seed=5, batch=8, shard=16, progress=False, num_inference_steps=steps, solver=solver)
    g = [rng.nth_generator(i, "bank", 5) for i in range(24)]
    levels = torch.cat([40 * (0.03 / 40) ** (torch.arange(steps).double() / (steps - 1)), torch.zeros(1)])
    draw = lambda kind: torch.stack([torch.randn(1, 8, 8, generator=one, dtype=kind) for one in g]).double()
    with torch.no_grad():
        start = 40 * draw(torch.float32)
        if solver == "heun":
            x = heun(pipe.unet, d, start, levels)
        else:
            x = dpm(pipe.unet, d, start, levels, (lambda: draw(torch.float64)) if solver == "stochastic" else None)
    wanted = ((x + 1) / 2 * 16).clamp(0, 16).round()
    apart = (bank[:].double() - wanted).abs()
    assert apart.max() <= 1 and apart.mean() < 1e-3


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    "The images that the published bank of digits begins with: all that k = 1 takes."
    s, pipe = settings.load_params("digits"), pipelines.load_pipeline(paths.weights() / "digits")
    bank = banks.SampleBank(tmp_path_factory.mktemp("bank"))
    how = dict(num_inference_steps=s.steps, solver=s.solver, precision="float32")
    return bank.fill(pipe, 1437, s.bank_seed, s.bank_noise, progress=False, **how)


def rounding():
    "A digest of what PyTorch's arithmetic makes of some steps of training, a convolution and a resampled image."
    draw = lambda *shape: torch.rand(shape, generator=rng.generator("rounding", *shape))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 8),
            nn.Softplus(),
            nn.Linear(8, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
        )
        conv = nn.Conv2d(32, 32, 3, padding=1)
    adam, cost = torch.optim.Adam(net.parameters(), 3e-3, fused=True), nn.functional.binary_cross_entropy_with_logits
    for precision in "medium", "medium", "highest":
        with matmul_precision(precision):
            cost(net(draw(128, 64)), draw(128, 64)).backward()
        adam.step()
    images, turned = draw(256, 32, 8, 8), draw(256, 2, 3)
    grid = nn.functional.affine_grid(turned, images.shape, align_corners=True)
    made = [net(draw(1000, 64)), conv(images), nn.functional.group_norm(images, 8)]
    made += [nn.functional.grid_sample(images, grid, align_corners=True), *net.parameters()]
    return files.digest(b"".join(t.detach().numpy().tobytes() for t in made))


@pytest.fixture(scope="module")
def same():
    "Whether numbers must be the published ones to the last digit."
    return rounding() == "ada9b395cd4e"


def published(**which):
    "Rows of the published results of digits."
    found = results.load_published("digits")
    for name, value in which.items():
        found = found[found[name] == value]
    return found


def beside(found, known, on):
    "Results with the published ones: of the same numbers, and of each."
    both = found.merge(known, on=on, suffixes=("", "_published"))
    assert len(both) == len(found) > 10
    return both


def test_published_bank(bank, digits, same):
    "The mean distance of its first thousand images, and of test images, to the training images."
    near = lambda x: metrics.nearest_neighbours(levels.to_unit(x, 17), levels.to_unit(digits.train, 17))[0]
    for metric, images in ("nearest_train_sample", bank[:1000]), ("nearest_train_test", digits.test):
        row, known = tables.result_row(metric, near(images)), published(metric=metric).iloc[0]
        assert [row["value"], row["stderr"]] == pytest.approx([known.value, known.stderr], rel=1e-5 if same else 1e-3)


@pytest.mark.parametrize("method, seed", [("normal", 0), ("aug_naive", 0), ("aug_tuned", 1), ("dmaapx", 2)])
def test_published_training(method, seed, same, bank):
    "Twenty epochs of each method."
    s = replace(settings.load_params("digits"), method=method, seed=seed, k=1)
    images, known = builders.build_dataset(s), published(method=method, seed=seed)
    fit = training.fit(
        builders.build_vae(s, images),
        sources.training_source(method, images, seed, bank, 1),
        len(images.train),
        images.levels,
        20,
        s.batch,
        s.lr,
        seed,
        lambda vae: measurements.measure_elbos(vae, images, s.elbo_samples),
        s.evaluate_at,
        progress=False,
    )
    found = pd.DataFrame(measurements.curve_rows(fit.curve, fit.best_epoch, images)).query("metric != 'elbo_test_best'")
    both = beside(found, known if method != "dmaapx" else known[known.k == 1], ["metric", "epoch", "n"])
    apart, errors = (both.value - both.value_published).abs(), (both.stderr / both.stderr_published - 1).abs()
    assert apart[both.epoch <= 2].max() < (0.001 if same else 0.15)
    assert apart.max() < (0.001 if same else 10) and errors.max() < (2e-5 if same else 0.4)


def file_times(folder):
    "When each table of results was written, and each piece of a bank."
    return {f: f.stat().st_mtime_ns for kind in ("metrics.csv", "*.npy") for f in folder.rglob(kind)}


def test_published_run(same, tmp_path, monkeypatch):
    "All numbers of a run of `make reproduce` at full length, and those that README's command prints."
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path))
    text = section("Rerun one number")
    command = block(text, "bash").replace(".venv/bin/papermill", "papermill")
    command = command.replace("/tmp/out.ipynb", str(tmp_path / "out.ipynb"))
    promised = table(text.split("It prints,")[1])
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    said, bar = done.stdout, r"(\s*Executing: [^]]*\])*\s*"
    assert re.fullmatch(bar, done.stderr), f"more than the bar that shows progress: {done.stderr}"
    s = replace(settings.load_params("digits"), method="dmaapx", seed=1)
    assert len(builders.open_bank(s)) == s.k * 1437 < max(s.ks) * 1437, "more was drawn than the run takes"
    printed = {row["metric"]: row for row in table(said)}
    assert len(promised) == len(printed) > 3
    for row in promised:
        found = printed[row["metric"]]
        assert [found[c] for c in ("epoch", "n", "unit")] == [row[c] for c in ("epoch", "n", "unit")]
        assert float(found["value"]) == pytest.approx(float(row["value"]), abs=float(row["stderr"]))
    for stage in "train_vae", "measure_gaps":
        run = identity.Run(stage, s)
        found, known = runs.read_results(run), published(config=run.digest)
        assert len(found) == len(known)
        if not same:
            found = found[found.metric != "elbo_test_best"]  # it may be another epoch
        both = beside(
            found, known, ["dataset", "scale", "method", "seed", "k", "epoch", "metric", "n", "unit", "config"]
        )
        for r in both.itertuples():
            wide = 0.3 if "gap" in r.metric or "floor" in r.metric else 0.05
            assert r.value == pytest.approx(r.value_published, rel=1e-5 if same else wide), r.metric
            assert r.stderr == pytest.approx(r.stderr_published, rel=2e-5 if same else 0.6), r.metric
    before = file_times(tmp_path)
    process = forked("measure_gaps", tmp_path / "again.ipynb", execution.non_default_parameters(s))
    process.join()
    assert process.exitcode == 0 and printed_by(tmp_path / "again.ipynb") == said, "a second call prints the same"
    assert file_times(tmp_path) == before, "a second call only reads"
