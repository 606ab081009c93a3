"""f-distill: h of every divergence, the density ratio and its means; else it is DMD2."""

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
    z, w = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(200))
    w = w / math.sqrt(2 * math.pi)
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
    ratio_mean, r = fd.RatioMean(2, decay=0.75), torch.tensor([2.0, 4.0, 6.0])
    assert_close(ratio_mean(r, torch.tensor([0.1, 0.2, 0.3])), r / 1.75)
    assert_close(ratio_mean.mean, torch.tensor([0.75 * 1 + 0.25 * 4, 1.0]))
    r = fd.RatioMean(2, decay=0.0)(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0.1, 0.3, 0.9]))
    assert_close(r, torch.tensor([0.5, 1.5, 1.0]))


def test_bins_are_equally_likely_in_training():
    """u ~ U[0.02, 0.98] falls into every bin as often; σ's own axis would put most into one."""
    ratio_mean, r = fd.RatioMean(10, decay=0.0), torch.arange(10.0) + 2
    for place in (0.1, 0.9):  # near both ends of each bin
        ratio_mean(r + place, 0.02 + 0.096 * (torch.arange(10) + place))
        assert_close(ratio_mean.mean, r + place)
    ratio_mean(torch.ones(2), torch.tensor([0.02, 0.98]))  # the ends are inside
    assert (ratio_mean.mean == 1).tolist() == [True] + [False] * 8 + [True]


def test_h_has_mean_1():
    """h / mean(h) over the batch."""
    h = fd.normalise_h(torch.tensor([1.0, 2.0, 6.0], dtype=D64))
    assert_close(h, torch.tensor([1 / 3, 2 / 3, 2.0], dtype=D64))


def generator_gradient(tiny, f, x, logits, ratio_mean):
    """numel dL/dx of step A where G returns x and the head `logits`; what the head was asked."""
    asked, settings = [], cfg(gan_weight=0.0, f=f)
    fake, inputs = randomise(edm.trainable_copy(tiny), 1), (x, torch.ones(4), torch.arange(4))
    nets = (lambda *inputs: x), tiny, fake, lambda *args: asked.append(args) or logits
    torch.manual_seed(1)  # the same σ and ε in all calls
    loss, _, _ = fd.generator_step(*nets, settings, inputs, ratio_mean)
    return torch.autograd.grad(loss, x)[0] * x.numel(), *asked


def test_each_sample_is_weighted_by_its_own_h(tiny):
    """numel dL/dx = h_i w_i (D_fake - D_real)_i, r from the logits of x_t at its σ and label."""
    x, logits = torch.randn(4, 1, 8, 8, requires_grad=True), torch.randn(4, 1)
    one, _ = generator_gradient(tiny, "rkl", x, logits, fd.RatioMean(1, 0.0))
    weighted, asked = generator_gradient(tiny, "kl", x, logits, fd.RatioMean(1, 0.0))
    h = logits.exp() / logits.exp().mean()
    assert_close(weighted, edm.expand(h[:, 0], x) * one, rtol=1e-3, atol=1e-6)
    _, x_t, sigma, labels = asked
    assert torch.equal(labels, torch.arange(4))
    assert ((x_t - x).flatten(1).std(1) / sigma - 1).abs().max() < 0.5


def test_ratios_are_clipped_and_divided_by_the_mean_of_their_bin_before_h(tiny):
    """js is not linear in r: clips, bins (by u, not σ) and their means all show in h."""
    x, logits = torch.randn(4, 1, 8, 8, requires_grad=True), torch.tensor([[-9.0], [0], [1], [9.0]])
    ratio_mean, means, r = fd.RatioMean(2, 0.5), [0.5, 4.0], torch.tensor([0.1, 1.0, math.e, 20.0])
    one, _ = generator_gradient(tiny, "rkl", x, logits, fd.RatioMean(2, 0.5))
    ratio_mean.mean = torch.tensor(means)
    weighted, (_, _, sigma, _) = generator_gradient(tiny, "js", x, logits, ratio_mean)
    upper = (sigma > fd.karras_sigma(torch.tensor(0.5))).long()  # u > 0.5: the second bin
    assert 0 < upper.sum() < 4
    means = torch.stack([0.5 * m + 0.5 * r[upper == k].mean() for k, m in enumerate(means)])
    assert_close(ratio_mean.mean, means)
    r = r / means[upper]
    h = r / (1 + r)
    assert_close(weighted, edm.expand(h / h.mean(), x) * one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_generator_step_reaches_the_generator_alone(tiny, features):
    """Not fake, teacher or head, which reads the encoder of --gan-features for r and the GAN."""
    generator, teacher = edm.trainable_copy(tiny), edm.trainable_copy(tiny)
    fake, head, asked = randomise(edm.trainable_copy(tiny), 1), fd.Discriminator(tiny), []
    head.register_forward_hook(lambda head, args, logits: asked.append(args[0]))
    nets, settings = (generator, teacher, fake, head), cfg(gan_features=features)
    inputs = 80 * torch.randn(4, 1, 8, 8), torch.full((4,), 80.0), torch.arange(4)
    fd.generator_step(*nets, settings, inputs, fd.RatioMean(10, 0.9))[0].backward()
    assert all(p.grad is not None for p in generator.parameters())
    for network in (teacher, fake, head):
        assert all(p.grad is None for p in network.parameters())
    assert asked == [{"teacher": teacher, "fake": fake}[features]] * 2


def test_gan_weight_0_still_trains_the_head(tiny):
    """r needs it (the paper's Table 10, without GAN loss); the generator feels no GAN."""
    head, settings, y = fd.Discriminator(tiny), cfg(gan_weight=0.0), torch.arange(4)
    nets = randomise(edm.trainable_copy(tiny), 1), tiny, head
    inputs, mean = (80 * torch.randn(4, 1, 8, 8), torch.full((4,), 80.0), y), fd.RatioMean(1, 0.9)
    _, x, log = fd.generator_step(tiny, tiny, nets[0], head, settings, inputs, mean)
    assert "GAN loss" not in log
    fd.fake_step(*nets, settings, x, y, x.flip(0), y)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def train(script, tiny, out, **options):
    few = {"device": "cpu", "batch": 4, "data": "synthetic", "steps": 3, "ratio": 2}
    settings = script.Config(**few | options, out=str(out))
    images = torch.arange(2048).remainder(251).to(torch.uint8).reshape(32, 1, 8, 8)
    run = edm.Run(settings, script.__name__)
    return script.train(settings, run, tiny, images, torch.arange(32) % 4).state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_steps": 2, "r1_weight": 0.5, "gan_weight": 0.1, "warmup": 2, "amp": True},
        {"sampling_steps": 2, "multistep_input": "data", "gan_features": "teacher"},
        {"guidance": 2.0, "weighting": "kl", "gan_noise": 0.5, "gan_levels": "4"},
    ],
)
def test_reverse_kl_is_dmd2_bit_for_bit(tmp_path, tiny, options):
    """h = 1: whole runs end with the same weights, so what holds for DMD2's updates holds here."""
    a = train(dmd2, tiny, tmp_path / "a", **options)
    b = train(fd, tiny, tmp_path / "b", f="rkl", **options)
    assert all(torch.equal(v, b[k]) for k, v in a.items())
