"""Runs that are trained as one stack are the runs that they are alone.

What differs is rounding: matrices are multiplied by another routine. In five epochs of these networks it changes losses
by less than 1e-4 nats and weights by less than 1e-5; a fault changes them by nats.
"""

import shutil
import threading
import time

import pandas as pd
import pytest
import torch
from conftest import snakemake
from vae_diffusion import data, metrics, models, sources, training, training_step
from vae_diffusion.core import files
from vae_diffusion.harness import builders, identity, results, runs, settings, stacks
from vae_diffusion.core.errors import ProjectError
from vae_diffusion.likelihoods import family
import forks

MEMBERS = {"a": ("normal", 0), "b": ("normal", 1), "c": ("aug_naive", 0), "d": ("dmaapx", 2)}
DIGITS = data.load("digits")
HOW = dict(n_train=1437, levels=17, epochs=5, eval_epochs=(1,), progress=False)


class Dies(sources.ShuffledSource):
    "A source that fails when it is asked for an image that comes late."

    last = 64 * 100

    def batch(self, start, n):
        if start + n > self.last:
            raise KeyboardInterrupt
        return super().batch(start, n)


def score(vae):
    return {"elbo_test": metrics.elbo(vae, DIGITS.test, 17).mean().item()}


def member(name, folder=None, normalisation="none", bf16=False, dies=False, hidden=(32,)):
    method, seed = MEMBERS[name]
    torch.manual_seed(seed)
    vae = models.fully_connected(DIGITS.shape, family("binomial", levels=17), hidden, 4, normalisation=normalisation)
    vae.autocast = torch.bfloat16 if bf16 else None
    source = Dies(DIGITS.train, seed) if dies else sources.training_source(method, DIGITS, seed, DIGITS.train.flip(0))
    return training.Member(vae, source, seed, score, folder and folder / name, name)


def alone(name, folder=None, how=HOW, **kind):
    m = member(name, folder, **kind)
    return m.vae, training.fit(m.vae, m.source, seed=m.seed, evaluate=m.evaluate, folder=m.folder, run=m.run, **how)


def stack(names, folder=None, how=HOW, **kind):
    members = [member(name, folder, **kind) for name in names]
    return [(m.vae, fit) for m, fit in zip(members, training.fit_stack(members, **how))]


def same(found, wanted, loss=1e-3, elbo=1e-3, weights=1e-4):
    "The curves in nats, the last weights and the best; a step of Adam is 1e-3."
    assert found[1].step == wanted[1].step == 72 and found[1].best_epoch == wanted[1].best_epoch
    for a, b in zip(found[1].curve, wanted[1].curve, strict=True):
        assert a["epoch"] == b["epoch"] and a["loss"] == pytest.approx(b["loss"], abs=loss)
        assert a["elbo_test"] == pytest.approx(b["elbo_test"], abs=elbo)
    torch.testing.assert_close(found[0].state_dict(), wanted[0].state_dict(), rtol=0, atol=weights)
    torch.testing.assert_close(found[1].best, wanted[1].best, rtol=0, atol=weights)


@pytest.fixture(scope="module")
def wanted():
    return {name: alone(name) for name in MEMBERS}


def test_each_run_is_what_it_is_alone(wanted):
    start = time.perf_counter()
    found = stack(MEMBERS)
    assert sum(fit.seconds for _, fit in found) < time.perf_counter() - start
    for name, each in zip(MEMBERS, found):
        same(each, wanted[name])


def test_a_falling_step_size_and_batch_statistics():
    "A bias before BatchNorm has no gradient but rounding, of which Adam makes steps; what follows it is left out."
    how = HOW | {"decay": True}
    for name, (vae, fit) in zip("abc", stack("abc", how=how, normalisation="batch")):
        other, known = alone(name, how=how, normalisation="batch")
        assert [p["loss"] for p in fit.curve] == pytest.approx([p["loss"] for p in known.curve], abs=1e-3)
        assert fit.curve[-1]["elbo_test"] == pytest.approx(known.curve[-1]["elbo_test"], abs=0.5)
        for kind in "running_var", "num_batches_tracked", "2.weight", "2.bias":
            part = [{k: v for k, v in net.state_dict().items() if k.endswith(kind)} for net in (vae, other)]
            assert part[0]
            torch.testing.assert_close(*part, rtol=1e-3, atol=1e-4)


def test_bfloat16(wanted):
    "Rounding to eight bits, otherwise than alone, changes losses by up to 0.03 nats."
    for name, (_, fit) in zip("ac", stack("ac", bf16=True)):
        assert [p["loss"] for p in fit.curve] == pytest.approx(
            [p["loss"] for p in alone(name, bf16=True)[1].curve], abs=0.1
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_stack(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda f, compile=torch.compile, **how: compiled.append(f) or compile(f, **how)
    )
    how = HOW | {"epochs": 1, "eval_epochs": (), "compile": True}
    for name, (vae, fit) in zip("ab", stack("ab", how=how, hidden=())):
        other, known = alone(name, how=how | {"compile": False}, hidden=())
        assert fit.curve[0]["loss"] == pytest.approx(known.curve[0]["loss"], abs=0.01)
        torch.testing.assert_close(vae.state_dict(), other.state_dict(), rtol=0, atol=1e-3)
    assert compiled == [training_step.compiled_step]


def test_stopped_in_a_stack_and_finished_alone(wanted, tmp_path):
    members = [member("a", tmp_path), member("b", tmp_path, dies=True), member("c", tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        training.fit_stack(members, **HOW, checkpoint_seconds=0)
    steps = [files.load_tensors(tmp_path / name / "checkpoint.safetensors")[1]["step"] for name in "abc"]
    assert len({*steps}) == 1 and 0 < steps[0] < 72
    for name in "abc":
        same(alone(name, tmp_path), wanted[name])


def test_stopped_alone_and_finished_in_a_stack(wanted, tmp_path):
    "One has done some steps, one all, two none: they meet, and the finished one is left as it is."
    with pytest.raises(KeyboardInterrupt):
        training.fit_stack([member("b", tmp_path, dies=True)], **HOW, checkpoint_seconds=0)
    first = alone("a", tmp_path)
    calls, make = [], training_step.make_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training, "make_step", lambda group, *how: calls.append("".join(m.run for m in group)) or make(group, *how)
        )
        found = stack("abcd", tmp_path)
    assert calls == ["cd", "bcd"] and found[0][1].seconds == first[1].seconds
    for name, each in zip("abcd", found):
        same(each, wanted[name])


def test_a_loss_that_is_not_finite_names_its_run(wanted, tmp_path):
    def broken(name):
        m = member(name, tmp_path)
        with torch.no_grad():
            m.vae.encoder[-1].bias.fill_(1e30)
        return m

    with pytest.raises(KeyboardInterrupt):
        training.fit_stack([member("b", tmp_path, dies=True)], **HOW, checkpoint_seconds=0)
    checkpoint = (tmp_path / "b" / "checkpoint.safetensors").read_bytes()
    members = [member("a", tmp_path), member("b", tmp_path), broken("c"), member("d", tmp_path)]
    with pytest.raises(ProjectError, match="the loss of run c is .* at step 1 .*lower the learning rate"):
        training.fit_stack(members, **HOW)
    assert (tmp_path / "b" / "checkpoint.safetensors").read_bytes() == checkpoint
    assert all(m.vae.checks for m in members)
    same(alone("b", tmp_path), wanted["b"])


def test_a_grid_by_the_workflow_has_the_numbers_of_each_run_alone(tmp_path, monkeypatch):
    options = "--profile none --quiet all --snakefile workflow/Snakefile --cores 2 --nolock --force-use-threads"
    command = f"{options} --config scale=smoke stack=true --"
    tables = []
    for way in "stack", "alone":
        monkeypatch.setenv("VAE_DIFFUSION_RUNS", str(tmp_path / way))
        grid = [r for r in results.grid(settings.load_params("digits", "smoke")) if r.stage == "train_vae"]
        if way == "stack":
            workflow = snakemake(*command.split(), *(r.results for r in grid))
            workflow.join()
            assert not workflow.exitcode
            for r in grid:
                assert {f.name for f in r.folder.glob("[!.]*")} == {
                    "config.json",
                    "metrics.csv",
                    "values.safetensors",
                    "SHA256SUMS",
                    "best.safetensors",
                    "last.safetensors",
                    "notebook.ipynb",
                }
            assert [*grid[0].folder.parent.glob("logs/stack-*.log")]
        else:
            shutil.copytree(tmp_path / "stack", tmp_path / way, ignore=shutil.ignore_patterns("train_vae-*"))
            images = builders.build_dataset(grid[0].settings)
            for r in grid:
                stacks.train_runs(
                    [runs.open_run("train_vae", r.settings)], images, stacks.training_sources([r.settings], images)
                )
        tables.append(pd.concat([runs.read_results(r).drop(columns="seconds") for r in grid], ignore_index=True))
    assert set(tables[0].config) == {r.digest for r in grid}
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


def test_a_stack_that_is_stopped_is_not_run_alone(smoke, tmp_path, monkeypatch):
    def stopped(*stack):
        raise KeyboardInterrupt("stopped by SIGINT")

    monkeypatch.setattr(stacks, "train_stack", stopped)
    stack = [identity.Run("train_vae", settings.Settings(seed=i)) for i in (0, 1)]
    with pytest.raises(ProjectError, match="a stack of 2 runs was stopped: KeyboardInterrupt: stopped by SIGINT"):
        forks.train(stack, tmp_path / "log")


def test_a_stack_that_fails_or_is_started_twice(smoke, tmp_path, capfd):
    grid = [identity.Run("train_vae", settings.Settings(seed=i, epochs=20)) for i in (0, 1)]
    [stack], logs = stacks.group_stacks(grid), [tmp_path / "1.log", tmp_path / "2.log"]
    grid[1].folder.mkdir(parents=True)
    (grid[1].folder / "config.json").write_text("{}")
    assert (
        not forks.train(stack, logs[0])
        and "each is now run alone: " in capfd.readouterr().err
        and "delete the folder" in logs[0].read_text()
    )
    assert not any(r.done for r in grid)
    shutil.rmtree(grid[1].folder)
    both = [threading.Thread(target=forks.train, args=(stack, log)) for log in logs]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert all(r.done for r in grid) and sum("waiting for it to finish" in log.read_text() for log in logs) == 1
