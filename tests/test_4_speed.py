"Fast paths give the numbers of plain ones, the benchmark runs, and memory does not grow with the bank."

import json
import os
import shutil
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import run
from torch._dynamo.utils import counters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from vae_diffusion import banks, data, diffusion, diffusion_training, levels, metrics, models, pipelines, sampling
from vae_diffusion import sources, training
from vae_diffusion.benchmark import command, diffusion_cases, metric_cases, report, suite, timing, vae_cases
from vae_diffusion.core import files, precision
from vae_diffusion.harness import runs, style
from vae_diffusion.core.errors import ProjectError
from vae_diffusion.likelihoods import family
from vae_diffusion.recipe import Recipe


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "bf16, build",
    [
        (True, lambda shape: models.fully_connected(shape, family("binomial", levels=17), (64, 64), 4)),
        (False, lambda shape: models.residual(shape, family("mol", levels=17), 8)),
    ],
    ids=["fully connected, bfloat16", "residual"],
)
def test_compiled_training_gives_the_plain_numbers(bf16, build):
    digits, losses, elbos = data.load("digits"), [], []
    for fast in False, True:
        torch.manual_seed(0)
        vae = build(digits.shape)
        vae.autocast = torch.bfloat16 if fast and bf16 else None
        curve = training.fit(
            vae, sources.training_source("normal", digits, 0), 1437, 17, 5, compile=fast, progress=False
        ).curve
        losses.append(curve[-1]["loss"])
        elbos.append(metrics.elbo(vae, digits.test, 17, samples=4).mean().item())
    assert abs(losses[0] - losses[1]) < 0.1 and abs(elbos[0] - elbos[1]) < 0.1, "nats"
    assert losses[0] != losses[1], "both ran the same code"


class Toy(torch.nn.Module):
    "A network small enough to be compiled in seconds."

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 8), (8, 8), (8, 1))))

    def forward(self, x, c):
        return SimpleNamespace(sample=self.layers(torch.nn.functional.silu(x) + c.reshape(-1, 1, 1, 1)))


def diffusion_losses(build, compiled, device="cpu", steps=6):
    "Losses of the first steps, and the moving average that they leave."
    digits = data.load("digits")
    torch.manual_seed(0)
    net = build().to(device)
    recipe = Recipe(batch=32, lr=2e-3, muon_lr=0.01, warmup_images=100, ema_halflife_images=1000)
    state, losses = diffusion_training.TrainingState(net, recipe, compiled), []
    for x in digits.train[: 32 * steps].split(32):
        state.step(2 * levels.to_unit(x.to(device), 17) - 1)
        losses.append(state.mean_loss())
        state.total.zero_()
        state.counted = 0
    return torch.tensor(losses), torch.cat([p.flatten().cpu() for p in state.ema.parameters()]), state


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_diffusion_training_gives_the_plain_numbers():
    (plain, ema, _), (fast, fast_ema, state) = (diffusion_losses(Toy, compiled) for compiled in (False, True))
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=0)
    torch.testing.assert_close(fast_ema, ema, rtol=0, atol=2e-3)
    assert state.denoiser.net is not state.net, "both ran the same code"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_diffusion_training_as_a_cuda_graph_gives_the_plain_numbers():
    build = lambda: diffusion.unet(8, 1, (8, 16))
    (plain, ema, _), (fast, fast_ema, state) = (
        diffusion_losses(build, compiled, "cuda", 12) for compiled in (False, True)
    )
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=0)
    assert (fast_ema - ema).abs().mean() < 1e-3  # Adam makes steps of the rounding where a gradient is zero
    assert state.run.graph is not None


def test_diffusion_training_goes_on_where_compiling_fails(monkeypatch, capsys):
    def fails(net, **how):
        return lambda *args: 1 / 0

    plain = diffusion_losses(Toy, False)
    monkeypatch.setattr(torch, "compile", fails)
    found = diffusion_losses(Toy, True)
    assert capsys.readouterr().out.count("Compiling failed, training goes on without: ZeroDivisionError") == 1
    for a, b in zip(found[:2], plain):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


SOLVERS = "heun", "multistep", "stochastic"


class ToyUNet(Toy):
    "What a pipeline asks of a U-Net."

    config, dtype, device = SimpleNamespace(in_channels=1, sample_size=8), torch.float32, torch.device("cpu")


def samplers(net, batch, device="cpu"):
    "A plain pipeline and a compiled one with the same weights; both draw images with the numbers of `rows`."

    def sampler(kind):
        pipe = kind(
            net, sampling.EDMDPMSolverMultistepScheduler(sigma_data=0.75, sigma_max=40.0, sigma_min=0.03), 17
        ).to(device)
        pipe.set_progress_bar_config(disable=True)
        if kind is pipelines.CompiledPipeline:
            pipe.batch = batch
        return (
            pipe,
            lambda rows, solver, precision="float32": (
                pipe(len(rows), banks.image_generators(rows), 5, "latent", solver=solver, precision=precision).images
            ),
        )

    torch.manual_seed(0)
    return sampler(sampling.EDMPipeline), sampler(pipelines.CompiledPipeline)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_sampling_gives_the_plain_numbers():
    (_, plain), (pipe, fast) = samplers(ToyUNet(), 4)
    for solver in SOLVERS:
        assert_close(fast(range(4), solver), plain(range(4), solver), atol=1e-4, rtol=0)
        compilations = counters["stats"]["unique_graphs"]
        assert_close(fast(range(2, 8), solver), plain(range(2, 8), solver), atol=1e-4, rtol=0)
        assert pipe.run is not pipe.plain and counters["stats"]["unique_graphs"] == compilations > 0, (
            "once for whole and other batches"
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("precision, apart", [("float32", 0.01), ("bfloat16", 0.1)])
def test_sampling_as_a_cuda_graph_gives_the_plain_numbers(precision, apart):
    (_, plain), (pipe, fast) = samplers(diffusion.unet(8, 1, (8, 16)).eval(), 8, "cuda")
    for solver in SOLVERS:
        assert_close(fast(range(37), solver, precision), plain(range(37), solver, precision), atol=apart, rtol=0)
        assert pipe.run.graph is not None


def test_sampling_goes_on_where_compiling_fails(monkeypatch, capsys):
    (_, plain), (_, fast) = samplers(diffusion.unet(8, 1, (8, 16)).eval(), 4)
    monkeypatch.setattr(torch, "compile", lambda net, **how: lambda *args: 1 / 0)
    for solver in SOLVERS:
        for precision in "float32", "bfloat16":
            assert_close(fast(range(4), solver, precision), plain(range(4), solver, precision), atol=0, rtol=0)
            assert fast(range(6), solver, precision).shape == (6, 1, 8, 8)
            assert capsys.readouterr().out.count("Compiling failed, sampling goes on without: ZeroDivisionError") == 1


class Device(TorchDispatchMode):
    'Raises where something goes between the host and the device, which is "meta" here.'

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, kwargs = function(*args, **(kwargs or {})), kwargs or {}
        if "_to_copy" in str(function) or "aten.copy_" in str(function):
            assert args[0].device == out.device == args[-1 if "copy_" in str(function) else 0].device, (
                f"{function} between host and device"
            )
        return out


@pytest.mark.parametrize("solver", SOLVERS)
def test_sampling_asks_nothing_of_the_host_between_steps(solver, monkeypatch):
    pipe, scheduler = samplers(ToyUNet(), 2)[1][0], sampling.EDMDPMSolverMultistepScheduler()
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # which knows no such device
    monkeypatch.setattr(torch, "Generator", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda net, **how: net)
    pipe.unet, plain = Toy().to("meta"), sampling.EDMDPMSolverMultistepScheduler.set_timesteps

    def on_device(self, steps, device):
        plain(self, steps)
        self.timesteps = self.timesteps.to(device)

    monkeypatch.setattr(sampling.EDMDPMSolverMultistepScheduler, "set_timesteps", on_device)
    pipe.make(
        sampling.stochastic_scheduler(scheduler) if solver == "stochastic" else scheduler,
        solver,
        4,
        torch.device("meta"),
        None,
    )
    with torch.no_grad(), Device():
        pipe.run(torch.zeros(2, 5, 1, 8, 8, dtype=torch.float64, device="meta"))


def test_search_and_attack_bear_fast_products():
    digits = data.load("digits")
    torch.manual_seed(0)
    vae = models.fully_connected(digits.shape, family("binomial", levels=17), (64, 64), 4)
    training.fit(vae, sources.training_source("normal", digits, 0), 1437, 17, 20, lr=3e-3, progress=False)
    x, plain = levels.to_unit(digits.test[:20], 17), precision.matmul_precision
    users = sys.modules["vae_diffusion.metrics.amortization"], sys.modules["vae_diffusion.metrics.robustness"]
    found = []
    for products in plain, lambda precision: plain("highest"):
        for module in users:
            module.matmul_precision = products
        found.append(
            (
                metrics.amortization_gap(vae, digits.test[:50], 17).elbo_star.mean().item(),
                metrics.attack(vae, x).kl.mean().item(),
            )
        )
    for module in users:
        module.matmul_precision = plain
    assert abs(found[0][0] - found[1][0]) < 0.1 and found[0][1] == pytest.approx(found[1][1], rel=0.05)


GROWTH = """
import json
from vae_diffusion.benchmark import timing, vae_cases
case = lambda k: (vae_cases.train_on_bank, {"k": k, "train": 3000, "steps": 60})
found = timing.run_interleaved({("growth", "k", k): case(k) for k in (1, 20)}, 1, 1, progress=False)
print(json.dumps([*found.memory]))
"""


def test_memory_does_not_grow_with_k():
    "In processes of their own, with mapped files left out, as the benchmark measures it."
    one, twenty = json.loads(run(sys.executable, "-c", GROWTH).splitlines()[-1])
    assert one > 5 and twenty < one + 15, "MB; the larger bank holds 58 MB more"


@pytest.mark.parametrize(
    "case, arguments",
    [
        (timing.multiply_matrices, {"dtype": "bfloat16", "size": 64, "seconds": 0.01}),
        (diffusion_cases.sample_ours, {"steps": 2, "n": 2}),
        (diffusion_cases.sample_ddim, {"steps": 2, "n": 2}),
        (diffusion_cases.sample_euler, {"steps": 2, "n": 2}),
        (vae_cases.train_residual, {"n": 8, "nc": 8, "batch": 4}),
        (diffusion_cases.train_diffusion, {"widths": (8,), "batch": 2, "seconds": 0.01}),
        (diffusion_cases.train_diffusers, {"widths": (8,), "batch": 2, "seconds": 0.01}),
        (
            diffusion_cases.sample_ours,
            {"steps": 2, "n": 2, "compiled": True, "widths": (8,), "solver": "stochastic", "precision": "bfloat16"},
        ),
        (metric_cases.compare_ms_ssim, {"package": "ours", "n": 2}),
        (metric_cases.compare_ms_ssim, {"package": "pytorch_msssim", "n": 2}),
    ],
)
def test_cases_that_need_no_data(case, arguments, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, **how: net)  # which would take longer than the rest
    assert timing.run_case(case, 1, arguments)["value"] > 0


@pytest.mark.data
@pytest.mark.parametrize(
    "case, arguments",
    [
        (vae_cases.train_ours, {"n": 200, "epochs": 1}),
        (vae_cases.train_ours, {"n": 200, "epochs": 1, "members": 2}),
        (metric_cases.attack_ours, {"n": 2, "restarts": 2, "steps": 2}),
        (metric_cases.attack_loop, {"n": 1, "restarts": 1, "steps": 2}),
        (metric_cases.search_q_star, {"n": 2, "steps": 2}),
    ],
)
def test_cases_on_mnist(case, arguments):
    assert timing.run_case(case, 1, arguments)["value"] > 0


def test_bench_stores_resumes_and_draws(monkeypatch, tmp_path):
    product = {"size": 64, "seconds": 0.01}
    monkeypatch.setattr(
        suite,
        "SPEED",
        {
            ("matrix product", t, None): (timing.multiply_matrices, {"dtype": t} | product)
            for t in ("float32", "bfloat16")
        }
        | {
            ("MS-SSIM", package, None): (metric_cases.compare_ms_ssim, {"package": package, "n": 2})
            for package in ("pytorch_msssim", "ours")
        },
    )
    monkeypatch.setattr(suite, "ELBO", {})
    monkeypatch.setattr(suite, "GROWTH", {"k": (1, 2), "batch": (50, 100)})
    monkeypatch.setattr(
        suite,
        "COST",
        {
            ("growth", name, x): (vae_cases.train_on_bank, {"train": 200, "steps": 2, name: x})
            for name, values in suite.GROWTH.items()
            for x in values
        },
    )
    monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / "runs"))
    for what in "results", "figures":
        monkeypatch.setattr(command.paths, what, lambda what=what: tmp_path / what)
    kept = tmp_path / "runs" / f"bench-{runs.machine_name()}-{torch.get_num_threads()}-threads" / "speed.csv"
    kept.parent.mkdir(parents=True)
    files.write_text(
        kept,
        "benchmark,case,x,repetition,value,seconds,gflop,memory\nmatrix product,float32,,0,123,1,1,1\n",
        checksum=True,
    )
    whole = kept.read_text()
    kept.write_text(whole[:-4])
    with pytest.raises(ProjectError, match="speed.csv"):
        command.run_benchmark(repetitions=2)
    kept.write_text(whole)
    command.run_benchmark(repetitions=2)
    table = pd.read_csv(tmp_path / "results" / f"bench-{runs.machine_name()}.csv")
    assert table.groupby("benchmark").size().to_dict() == {"matrix product": 4, "MS-SSIM": 4, "growth": 12}
    assert table.value[0] == 123 and not table.duplicated(["benchmark", "case", "x", "repetition"]).any(), (
        "a stopped benchmark resumes"
    )
    assert {f.name for f in (tmp_path / "figures" / f"bench-{runs.machine_name()}").glob("*.png")} == {
        "speed.png",
        "growth.png",
    }
    for name, fig in report.benchmark_figures(table).items():
        style.save_figure(fig, tmp_path, name)
        assert (tmp_path / f"{name}.svg").read_text() == (
            tmp_path / "figures" / f"bench-{runs.machine_name()}" / f"{name}.svg"
        ).read_text(), "drawn from what is stored"
    assert not kept.parent.exists()
    file = tmp_path / "results" / f"bench-{runs.machine_name()}.csv"
    before, lines = table, file.read_text().splitlines()
    monkeypatch.setattr(
        suite,
        "SPEED",
        suite.SPEED
        | {
            ("MS-SSIM", "torchmetrics", None): (timing.multiply_matrices, {"dtype": "float32"} | product),
            ("MS-SSIM", "gpu", None): (suite.require_gpu, {"case": None}),
        },
    )
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    command.run_benchmark(repetitions=2)
    added = [line for line in file.read_text().splitlines() if line not in lines]
    assert [line.split(",")[:3] for line in added] == [["MS-SSIM", "torchmetrics", i] for i in "01"], (
        "only what is missing is measured, a GPU's rows never on a CPU"
    )
    assert [line for line in file.read_text().splitlines() if line not in added] == lines
    file.write_text(file.read_text().replace(before.hardware[0], "another"))
    files.write_checksums(file.parent)
    with pytest.raises(ProjectError, match="measured on another.*Delete it"):
        command.run_benchmark(repetitions=2)
