"VAEs trained by a CUDA graph, where there is a GPU, are those trained by plain steps."

import pytest
import torch
from vae_diffusion import data, models, sources, training, training_step
from vae_diffusion.likelihoods import family

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
DIGITS = data.load("digits")


def train(seeds, epochs, compiled):
    members = []
    for seed in seeds:
        torch.manual_seed(seed)
        vae = models.fully_connected(DIGITS.shape, family("binomial", levels=17), (32,), 4).to("cuda")
        members.append(training.Member(vae, sources.training_source("normal", DIGITS, seed), seed))
    how = dict(n_train=1437, levels=17, epochs=epochs, decay=True, compile=compiled, progress=False)
    fits = training.fit_stack(members, **how)
    return torch.tensor([fit.curve[-1]["loss"] for fit in fits]), [m.vae.state_dict() for m in members]


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_cuda_graph_gives_the_plain_numbers(seeds, capsys, monkeypatch):
    graphs, Graphed = [], training_step.Graphed
    monkeypatch.setattr(training_step, "Graphed", lambda f: graphs.append(Graphed(f)) or graphs[-1])
    (losses, plain), (found, fast) = (train(seeds, 2, compiled) for compiled in (False, True))
    assert len(graphs) == 1 and graphs[0].graph and "failed" not in capsys.readouterr().out
    torch.testing.assert_close(found, losses, rtol=0, atol=0.01)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-3)


def test_training_goes_on_where_compiling_fails(capsys, monkeypatch):
    plain, _ = train([0], 1, False)
    monkeypatch.setattr(torch, "compile", lambda f, **how: lambda *args: 1 / 0)
    found, _ = train([0], 1, True)
    assert capsys.readouterr().out.count("Compiling failed, training goes on without: ZeroDivisionError") == 1
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
