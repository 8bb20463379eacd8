"""Published numbers computed again, and the library beside plain loops that are written from the papers' equations.

What the library and a plain loop share is the random numbers. Tolerances are ten times what rounding changes, which was
measured by two threads in the place of one and by other instructions of the same processor (ATEN_CPU_CAPABILITY=default).
"""
from copy import deepcopy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from vae_diffusion import banks, data, diffusion, metrics, paths, results, runs, sampling, settings, training
from vae_diffusion.likeness import ms_ssim


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
    "D(x;σ) of Karras et al. 2022, table 1, with the parameter that the published models have."
    s = sigma.reshape(-1, 1, 1, 1)
    inner = net((x / (s**2 + d**2).sqrt()).float(), (sigma.log() / 4).float()).sample
    return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * inner


def plain_diffusion_training(net, images, levels, r, steps):
    "Adam (Kingma and Ba 2015, algorithm 1) on the loss of Karras et al. 2022. Returns a network with the average of the weights, and the loss of each step."
    averaged, params, losses = deepcopy(net).eval(), list(net.train().parameters()), []
    m, v = [0.] * len(params), [0.] * len(params)
    order = torch.cat([torch.randperm(len(images), generator=paths.generator("order", r.seed, e)) for e in range(steps * r.batch // len(images) + 1)])
    for t in range(1, steps + 1):
        x = images[order[(t - 1) * r.batch:t * r.batch]] / (levels - 1) * 2 - 1
        g, seen = paths.generator("diffusion", r.seed, t - 1), t * r.batch
        sigma = torch.exp(r.p_mean + r.p_std * torch.randn(r.batch, generator=g))
        noise = torch.randn(x.shape, generator=g)
        torch.manual_seed(paths.seed_of("dropout", r.seed, t - 1))
        error = preconditioned(net, x + sigma.reshape(-1, 1, 1, 1) * noise, sigma, r.sigma_data) - x
        weight = (sigma**2 + r.sigma_data**2) / (sigma * r.sigma_data)**2
        loss = (weight * (error**2).flatten(1).mean(1)).mean()
        rate = r.lr * min(1, seen / r.warmup_images) / max(1, seen / r.decay_images)**.5
        decay = 2**(-r.batch / min(r.ema_halflife_images, seen / 20))
        for i, (gradient, average) in enumerate(zip(torch.autograd.grad(loss, params), averaged.parameters())):
            m[i] = .9 * m[i] + .1 * gradient
            v[i] = .999 * v[i] + .001 * gradient**2
            params[i].data -= rate * m[i] / (1 - .9**t) / ((v[i] / (1 - .999**t)).sqrt() + 1e-8)
            average.data = decay * average.data + (1 - decay) * params[i].data
        losses.append(loss.item())
    return averaged, losses


def test_diffusion_training(digits, tmp_path):
    recipe = diffusion.Recipe(batch=32, lr=2e-3, warmup_images=600, decay_images=1000, ema_halflife_images=50, p_mean=-.8, p_std=1., sigma_data=.75, seed=3)
    torch.manual_seed(0)
    net = diffusion.unet(8, 1, (8, 16), dropout=.2)
    beside, images = deepcopy(net), digits.train[:500]
    found, curve = diffusion.train(net, images, 17, recipe, 50 * 32, tmp_path, log_images=320, progress=False)
    averaged, losses = plain_diffusion_training(beside, images, 17, recipe, 50)
    torch.testing.assert_close(torch.tensor([p["loss"] for p in curve]), torch.tensor(losses).reshape(5, 10).mean(1), rtol=1e-4, atol=0)
    x, c = torch.randn(100, 1, 8, 8, generator=paths.generator("inputs")), torch.linspace(-1, 1, 100)
    with torch.no_grad(): ours, plain, last, plain_last = (model(x, c).sample for model in (found, averaged, net.eval(), beside.eval()))
    assert (ours - plain).abs().max() < 1e-4 > (last - plain_last).abs().max() and (ours - last).abs().max() > .05
    assert not found.training


def heun(model, d, x, levels):
    "Karras et al. 2022, algorithm 1."
    for s, t in zip(levels, levels[1:]):
        slope = (x - preconditioned(model, x, s.expand(len(x)), d)) / s
        new = x + (t - s) * slope
        if t > 0: new = x + (t - s) / 2 * (slope + (new - preconditioned(model, new, t.expand(len(x)), d)) / t)
        x = new
    return x


def dpm(model, d, x, levels, noise=None):
    "Lu et al. 2022 (arXiv 2211.01095), algorithm 2 (2M) with α = 1; with noise its stochastic form, appendix B. The first and the last step are of first order."
    before = None
    for s, t in zip(levels, levels[1:]):
        now = preconditioned(model, x, s.expand(len(x)), d)
        towards = now
        if before is not None and t > 0: towards = now + (now - before[0]) / 2 * (s / t).log() / (before[1] / s).log()
        if noise is None: x = t / s * x + (1 - t / s) * towards
        else: x = (t / s)**2 * x + (1 - (t / s)**2) * towards + t * (1 - (t / s)**2).sqrt() * noise()
        before = now, s
    return x


@pytest.mark.parametrize("solver, steps", [("heun", 6), ("multistep", 8), ("stochastic", 8)])
def test_bank_of_each_solver(digits, tmp_path, solver, steps):
    pipe, d = sampling.load_pipeline(paths.weights() / "digits"), .75
    bank = banks.SampleBank(tmp_path).fill(pipe, 24, seed=5, batch=8, shard=16, progress=False, steps=steps, solver=solver)
    g = [paths.generator("bank", 5, i) for i in range(24)]
    levels = torch.cat([40 * (.03 / 40)**(torch.arange(steps).double() / (steps - 1)), torch.zeros(1)])
    draw = lambda kind=torch.float64: torch.stack([torch.randn(1, 8, 8, generator=one, dtype=kind) for one in g])
    with torch.no_grad():
        start = 40 * draw(torch.float32).double()
        x = heun(pipe.unet, d, start, levels) if solver == "heun" else dpm(pipe.unet, d, start, levels, draw if solver == "stochastic" else None)
    wanted = ((x + 1) / 2 * 16).clamp(0, 16).round()
    apart = (bank[:].double() - wanted).abs()
    assert apart.max() <= 1 and apart.mean() < 1e-3
