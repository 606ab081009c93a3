"""f-distill: h of every divergence, the density ratio and its means, and what they do."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import Gaussian, randomise
from torch.testing import assert_close

import dmd2_cifar as dmd2
import edm_teacher as edm
import f_distill as fd

D64 = torch.float64
F = {  # D_f(p || q) = E_q f(p / q)
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * (0.5 + 0.5 / r).log(),
    "sh": lambda r: 1 - r.sqrt(),
    "jf": lambda r: (r - 1) * r.log(),
    "neyman": lambda r: (1 - r) ** 2 / r,
}


def cfg(**changes):
    return fd.Config(**{"device": "cpu", "batch": 4, "data": "synthetic"} | changes)


def trio(tiny):
    torch.manual_seed(3)
    generator, fake = edm.trainable_copy(tiny), randomise(edm.trainable_copy(tiny), 1)
    x_t, sigma = fd.backward_simulation(generator, torch.randn(4, 1, 8, 8), None, 1, 0)
    return generator, fake, fd.Discriminator(tiny), (x_t, sigma, torch.arange(4))


# ---------------------------------------------------------------- the weight


@pytest.mark.parametrize("name", F)
def test_h_is_r_squared_times_the_second_derivative_of_f(name):
    """h(r) = r² f''(r) (f-distill, Table 1), f'' by autograd."""
    r = torch.tensor([0.1, 0.5, 1.0, 2.0, 20.0], dtype=D64, requires_grad=True)
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    assert_close(fd.F_DIVERGENCES[name](r.detach()), (r**2 * second).detach())
    assert set(F) == set(fd.F_DIVERGENCES)


@pytest.mark.parametrize("name", F)
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_weighted_gradient_is_that_of_the_divergence(name, sigma):
    """d/dθ D_f(p || q_θ) = E_q[h(r) (s_q - s_p) dx/dθ]: p a mixture, q = N(θ, 0.5²), blurred."""
    points, weights = np.polynomial.hermite_e.hermegauss(200)
    z = torch.from_numpy(points)
    w = torch.from_numpy(weights / math.sqrt(2 * math.pi))
    std = math.sqrt(0.5**2 + sigma**2)  # of x_t = θ + std z

    def log_p(v):
        var = 0.6**2 + sigma**2
        logits = [math.log(a) - (v - m) ** 2 / (2 * var) for a, m in ((0.7, -0.5), (0.3, 0.8))]
        return torch.stack(logits).logsumexp(0) - 0.5 * math.log(2 * math.pi * var)

    def log_q(v, theta):
        return -((v - theta) ** 2) / (2 * std**2) - 0.5 * math.log(2 * math.pi * std**2)

    theta = torch.tensor(0.2, dtype=D64, requires_grad=True)
    x = theta + std * z
    r = (log_p(x) - log_q(x, theta)).exp()
    (wanted,) = torch.autograd.grad((w * F[name](r)).sum(), theta)

    x_t = x.detach().requires_grad_()
    (score_p,) = torch.autograd.grad(log_p(x_t).sum(), x_t)
    real = (x + sigma**2 * score_p).detach().reshape(-1, 1, 1, 1)
    level = torch.full((len(z),), sigma, dtype=D64)
    fake = Gaussian(0.2, 0.5)(x.detach().reshape(-1, 1, 1, 1), level)
    weight = fd.dmd_weight(real, real, level, "kl")
    ratio = fd.density_ratio(r.detach().log()[:, None], 0.0, math.inf)
    grad = fd.F_DIVERGENCES[name](ratio) * fd.dmd_gradient(fake, real, weight).flatten()
    assert_close((w * grad).sum(), wanted, rtol=1e-6, atol=1e-9)


def test_density_ratio_is_the_clipped_exponential_of_the_mean_logit():
    """r = exp(mean of the heads' logits), in [lower, upper], without gradient."""
    logits = torch.tensor([[0.0, 2.0], [-9.0, -9.0], [9.0, 9.0]], requires_grad=True)
    r = fd.density_ratio(logits, 0.1, 20.0)
    assert_close(r, torch.tensor([math.e, 0.1, 20.0]))
    assert not r.requires_grad


def test_ratios_are_divided_by_the_mean_of_their_bin():
    """E_q[r] = 1 at every noise level; the mean moves by 1 - decay, empty bins stay."""
    mean = fd.RatioMean(2, decay=0.75)
    u = torch.tensor([0.1, 0.2, 0.3])
    r = mean(torch.tensor([2.0, 4.0, 6.0]), u)
    assert_close(mean.mean, torch.tensor([0.75 * 1 + 0.25 * 4, 1.0]))
    assert_close(r, torch.tensor([2.0, 4.0, 6.0]) / 1.75)
    mean = fd.RatioMean(10, decay=0.9)
    torch.manual_seed(0)
    for _ in range(300):
        u = 0.02 + 0.96 * torch.rand(64)
        r = mean(torch.rand(64) * 6 * (u > 0.5) + 0.5, u)
    assert_close(r[u > 0.52].mean().item(), 1.0, rtol=0.2, atol=0)
    assert_close(mean.mean[0].item(), 0.5, rtol=1e-3, atol=0)


def test_bins_are_equally_likely_in_training():
    """u ~ U[0.02, 0.98] falls into every bin as often; σ's own axis would put most into one."""
    mean = fd.RatioMean(10, decay=0.0)
    for i in range(10):  # the middle of bin i, and nothing else
        mean.mean.fill_(1.0)
        mean(torch.tensor([5.0]), torch.tensor([0.02 + 0.096 * (i + 0.5)]))
        assert mean.mean.tolist() == [5.0 if k == i else 1.0 for k in range(10)]
    mean(torch.ones(2), torch.tensor([0.02, 0.98]))  # the ends are inside


def test_h_has_mean_1():
    h = fd.normalise_h(torch.tensor([1.0, 2.0, 6.0], dtype=D64))
    assert_close(h, torch.tensor([1 / 3, 2 / 3, 2.0], dtype=D64))


# ---------------------------------------------------------------- the updates


def test_each_sample_is_weighted_by_its_own_h(tiny):
    """numel dL/dx = h_i w_i (D_fake - D_real)_i, r from the logits of x_t at its σ and label."""
    torch.manual_seed(0)
    x, labels = torch.randn(4, 1, 8, 8, requires_grad=True), torch.arange(4)
    fake, seen = randomise(edm.trainable_copy(tiny), 1), []

    def head(backbone, x_t, sigma, labels):
        seen.append((backbone, x_t, sigma, labels))
        return torch.tensor([[0.0], [1.0], [-1.0], [2.0]])

    def gradient(f):
        torch.manual_seed(1)
        inputs, mean = (x, torch.ones(4), labels), fd.RatioMean(1, 0.0)
        settings = cfg(gan_weight=0.0, f=f)
        net = fd.generator_step(lambda x, *_: x, tiny, fake, head, settings, inputs, mean)
        return torch.autograd.grad(net[0], x)[0]

    r = torch.tensor([0.0, 1.0, -1.0, 2.0]).exp()
    h = r / r.mean()
    wanted = (h / h.mean()).reshape(4, 1, 1, 1) * gradient("rkl")
    assert_close(gradient("kl"), wanted, rtol=1e-3, atol=1e-9)
    backbone, x_t, sigma, y = seen[0]
    assert backbone is fake
    assert torch.equal(y, labels)
    assert ((x_t - x).flatten(1).std(1) / sigma - 1).abs().max() < 0.5


def test_ratios_are_clipped_and_divided_by_the_mean_of_their_bin_before_h(tiny, monkeypatch):
    """js is not linear in r: clips, bins (by u, not σ) and their means all show in h."""
    torch.manual_seed(0)
    x, logits = torch.randn(4, 1, 8, 8, requires_grad=True), torch.tensor([[-9.0], [0], [1], [9.0]])
    u, level = torch.tensor([0.1, 0.45, 0.7, 0.8]), torch.rand
    fake, mean = randomise(edm.trainable_copy(tiny), 1), fd.RatioMean(2, 0.5)
    mean.mean = torch.tensor([0.5, 4.0])

    def gradient(f, ratio_mean):
        torch.manual_seed(1)
        draws = iter([(u - 0.02) / 0.96])
        monkeypatch.setattr(torch, "rand", lambda *a, **k: next(draws, None))
        nets = lambda x, *_: x, tiny, fake, lambda *_: logits
        inputs = x, torch.ones(4), torch.arange(4)
        loss, _, _ = fd.generator_step(*nets, cfg(gan_weight=0.0, f=f), inputs, ratio_mean)
        monkeypatch.setattr(torch, "rand", level)
        return torch.autograd.grad(loss, x)[0]

    r = torch.tensor([0.1, 1.0, math.e, 20.0])
    means = torch.tensor([0.5 * 0.5 + 0.5 * 1.1 / 2, 0.5 * 4.0 + 0.5 * (math.e + 20) / 2])
    r = r / means[[0, 0, 1, 1]]
    h = r / (1 + r)
    wanted = (h / h.mean()).reshape(4, 1, 1, 1) * gradient("rkl", fd.RatioMean(2, 0.5))
    assert_close(gradient("js", mean), wanted, rtol=1e-3, atol=1e-9)
    assert_close(mean.mean, means)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_generator_step_reaches_the_generator_alone(tiny, features):
    generator, fake, head, inputs = trio(tiny)
    teacher, settings = edm.trainable_copy(tiny), cfg(gan_features=features)
    nets = generator, teacher, fake, head
    loss, _, _ = fd.generator_step(*nets, settings, inputs, fd.RatioMean(10, 0.9))
    loss.backward()
    for network in (fake, teacher, head):
        assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in generator.parameters())


def train(module, tmp_path, tiny, name, **changes):
    options = {"device": "cpu", "batch": 4, "data": "synthetic", "steps": 4}
    settings = module.Config(**options | changes, out=str(tmp_path / name))
    torch.manual_seed(0)
    run = edm.Run(settings, name.split("-")[0])
    images, classes = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.arange(32) % 4
    return module.train(settings, run, tiny.requires_grad_(False), images, classes)


def test_reverse_kl_is_dmd2_bit_for_bit(tmp_path, tiny):
    """h = 1: whole training runs, with GAN, several steps and R1, end with the same weights."""
    same = {"sampling_steps": 2, "r1_weight": 0.5, "ratio": 2, "gan_weight": 0.1}
    a = train(dmd2, tmp_path, tiny, "a", **same)
    b = train(fd, tmp_path, tiny, "b", f="rkl", **same)
    c = train(fd, tmp_path, tiny, "c", f="js", **same)
    for v, w in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(v, w)
    assert any(not torch.equal(v, w) for v, w in zip(a.parameters(), c.parameters(), strict=True))


def test_resumed_runs_are_bit_identical(tmp_path, tiny):
    """The means of r are in the checkpoint."""
    whole = train(fd, tmp_path, tiny, "whole", f="kl")
    train(fd, tmp_path, tiny, "parts", f="kl", steps=2)
    again = train(fd, tmp_path, tiny, "parts", f="kl", resume=True)
    for v, w in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(v, w)


def test_gan_weight_0_still_trains_the_discriminator(tmp_path, tiny):
    """r needs it (the paper's Table 10, without GAN loss); the generator gets no GAN gradient."""
    generator, fake, head, inputs = trio(tiny)
    settings = cfg(gan_weight=0.0)
    nets = generator, tiny, fake, head
    _, x, log = fd.generator_step(*nets, settings, inputs, fd.RatioMean(10, 0.9))
    assert "GAN loss" not in log
    loss, _ = fd.fake_step(fake, tiny, head, settings, x, inputs[-1], x.flip(0), inputs[-1])
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


# ---------------------------------------------------------------- the mixture


def test_mixture_denoiser_is_the_score_of_the_blurred_density():
    """D = x + σ² ∇ log p(x; σ), p(x; σ) = Σ w_k N(m_k, s² + σ²)."""
    teacher = fd.Mixture().double()
    x = torch.randn(6, 2, 1, 1, dtype=D64, requires_grad=True)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 50.0], dtype=D64)
    var = (sigma**2 + 0.2**2)[:, None]
    squares = ((x.flatten(1)[:, None] - teacher.means) ** 2).sum(2)
    log_p = (torch.tensor([0.6, 0.4], dtype=D64).log() - squares / (2 * var)).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    wanted = x + sigma.reshape(-1, 1, 1, 1) ** 2 * score
    assert_close(teacher(x, sigma), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    samples = fd.Mixture().sample(20_000).flatten(1)
    assert_close(samples.mean(0), torch.tensor([-0.2, 0.0]), atol=0.03, rtol=0)
    assert_close(samples.std(0), torch.tensor([math.sqrt(0.96 + 0.04), 0.2]), atol=0.02, rtol=0)


@pytest.mark.slow
def test_reverse_kl_seeks_a_mode_and_forward_kl_covers(tmp_path, monkeypatch):
    """A single Gaussian on two modes (std 1 together, 0.2 each): rkl takes one, kl spreads."""
    three = {name: fd.F_DIVERGENCES[name] for name in ("rkl", "js", "kl")}
    monkeypatch.setattr(fd, "F_DIVERGENCES", three)
    rows = fd.main(fd.Config(data="mixture", out=str(tmp_path)))["metrics"]
    assert rows["rkl"]["std"] < 0.25
    assert rows["rkl"]["mean"] < -0.9
    assert rows["kl"]["std"] > 0.4
    assert rows["rkl"]["std"] < rows["js"]["std"] < rows["kl"]["std"]
    assert (tmp_path / "samples.png").stat().st_size > 0
    assert json.loads((tmp_path / "result.json").read_text())["config"]["data"] == "mixture"


@pytest.mark.parametrize("gan_weight", [0.02, 0.0])  # real images are needed with 0 too
def test_main_runs_and_options_are_checked(tmp_path, tiny_teacher, gan_weight):
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 2, "eval_n": 40}
    options |= {"teacher_steps": 2, "device": "cpu", "batch": 4, "f": "kl"}
    options["gan_weight"] = gan_weight
    rows = fd.main(fd.Config(**options, out=str(tmp_path / "r")))["metrics"]
    assert rows["generator"]["n"] == 40
    with pytest.raises(ValueError, match="--f fkl: choose rkl or kl"):
        fd.main(fd.Config(f="fkl"))
    for wrong in ({"ratio_bins": 0}, {"ratio_ema": 1.0}, {"ratio_lower": 0}, {"ratio_upper": 0.5}):
        with pytest.raises(ValueError, match="must be"):
            fd.main(fd.Config(**wrong))
    for wrong in ({"ratio": 0}, {"discriminator_weight": 0.0}):
        with pytest.raises(ValueError, match="nothing would train the head"):
            fd.main(fd.Config(**wrong))
