"""DMD: gradient, weights, losses and the two updates against closed forms."""

import math
import sys

import numpy as np
import pytest
import torch
from conftest import Calls, Gaussian, Spy, randomise
from torch.testing import assert_close

import dmd_mnist as dmd
import edm_teacher as edm
from tools import metrics, plot

D64 = torch.float64


def cfg(**changes):
    return dmd.Config(device="cpu", batch=4, **changes)


class Linear1d(torch.nn.Module):
    """A one-step generator of single pixels x = a z + b, called as the denoiser it would be."""

    sigma_max = 80.0

    def __init__(self, a, b):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=D64))
        self.b = torch.nn.Parameter(torch.tensor(b, dtype=D64))

    def forward(self, x, sigma, labels=None):
        return self.a * x / self.sigma_max + self.b


# ---------------------------------------------------------------- noise levels and scores


def test_karras_sigma_runs_from_sigma_min_to_sigma_max():
    """EDM Eq. 5 with u = 1 at σ_max; in σ^(1/ρ) it is a straight line."""
    u = torch.tensor([0.0, 0.5, 1.0], dtype=D64)
    sigma = dmd.karras_sigma(u)
    assert_close(sigma[[0, 2]], torch.tensor([0.002, 80.0], dtype=D64))
    assert_close(sigma[1] ** (1 / 7), (sigma[0] ** (1 / 7) + sigma[2] ** (1 / 7)) / 2)
    assert_close(dmd.karras_sigma(u, 1.0, 16.0, 2.0), torch.tensor([1.0, 6.25, 16.0], dtype=D64))


def test_score_is_the_gradient_of_the_log_density():
    """(D(x; σ) - x) / σ² = ∇ log p(x; σ) for a mixture of two points, whose D is known."""
    points, sigma = torch.tensor([-1.0, 0.5], dtype=D64), torch.tensor([0.7, 0.7, 0.7], dtype=D64)
    x = torch.tensor([[-0.8], [0.1], [2.0]], dtype=D64, requires_grad=True)
    logits = -((x - points) ** 2) / (2 * 0.7**2)
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), x)
    denoised = (logits.softmax(1) * points).sum(1, keepdim=True)
    assert_close(dmd.score(denoised, x, sigma), gradient)


def test_diffuse_adds_sigma_times_unit_noise():
    torch.manual_seed(0)
    sigma = torch.tensor([0.5, 10.0])  # each sample has its own
    noise = dmd.diffuse(torch.ones(2, 1, 200, 200), sigma) - 1
    assert_close(noise.flatten(1).std(1), sigma, rtol=0.02, atol=0)
    assert abs(noise[0].mean()) < 0.01


# ---------------------------------------------------------------- weight, gradient, surrogate


def test_paper_weight_is_eq_8_for_the_score_difference():
    """w_t (s_fake - s_real) with w_t = σ² C S / |D_real - x|₁ equals weight (D_fake - D_real)."""
    x, real, fake, x_t = torch.randn(4, 2, 3, 4, 4, dtype=D64)
    sigma = torch.tensor([0.1, 7.0], dtype=D64)
    w_t = sigma**2 * 48 / (real - x).abs().flatten(1).sum(1)
    difference = dmd.score(fake, x_t, sigma) - dmd.score(real, x_t, sigma)
    grad = dmd.dmd_gradient(fake, real, dmd.dmd_weight(x, real, sigma, "paper"))
    assert_close(grad, w_t.reshape(2, 1, 1, 1) * difference)


def test_gradient_is_finite_where_the_teacher_returns_the_sample():
    """mean|x - D_real| = 0: the factor stays finite, so 0 stays 0 and the rest stays a number."""
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    weight = dmd.dmd_weight(x, x, torch.ones(1), "paper")
    assert weight.isfinite().all()
    assert not weight.requires_grad
    assert (dmd.dmd_gradient(x, x, weight) == 0).all()
    assert dmd.dmd_gradient(x + 1e-3, x, weight).isfinite().all()


def test_other_weightings():
    """kl: w_t = 1; sigma, sigma3: w_t = σ, σ³ (DMD Table 2); post: the code of the post."""
    x, real = torch.randn(2, 2, 1, 4, 4, dtype=D64)
    sigma = torch.tensor([0.5, 4.0], dtype=D64)
    for kind, w_t in [("kl", 1), ("sigma", sigma), ("sigma3", sigma**3)]:
        assert_close(dmd.dmd_weight(x, real, sigma, kind).flatten(), w_t / sigma**2)
    error = (x - real).abs().mean((1, 2, 3))
    post = ((sigma**2 + 1) / (error + 1e-5)).clamp(0.1, 10) / (sigma**2 + 1e-8)
    assert_close(dmd.dmd_weight(x, real, sigma, "post").flatten(), post)


def test_surrogate_derivative_is_grad_over_numel():
    """dL/dx = grad / numel: mean over batch, channels and pixels; nothing flows through grad."""
    x, grad = (torch.randn(2, 3, 4, 4, dtype=D64, requires_grad=True) for _ in range(2))
    loss = dmd.surrogate_loss(x, grad)
    gx, gg = torch.autograd.grad(loss, (x, grad), allow_unused=True)
    assert_close(gx, grad.detach() / 96)
    assert gg is None
    assert_close(loss.detach(), 0.5 * grad.detach().square().mean())


def quadrature(n=40):
    points, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_theta_gradient_equals_grad_kl_between_gaussians(sigma):
    """x = a z + b against N(m, s²), both blurred by σ: the surrogate's gradient is ∇_(a,b) KL.

    KL(N(b, a²+σ²) || N(m, s²+σ²)) = ½ [ v/u + (b-m)²/u - 1 - ln(v/u) ],  v = a²+σ², u = s²+σ²."""
    a, b, m, s = 0.6, 0.3, -0.4, 0.9
    generator = Linear1d(a, b)
    u, w = quadrature()
    z, eps = torch.cartesian_prod(u, u).T
    weights = torch.cartesian_prod(w, w).prod(1).reshape(-1, 1, 1, 1)
    x = dmd.generate(generator, z.reshape(-1, 1, 1, 1))
    level = torch.full((len(x),), sigma, dtype=D64)
    x_t = x + sigma * eps.reshape(-1, 1, 1, 1)
    real, fake = Gaussian(m, s)(x_t, level), Gaussian(b, a)(x_t, level)
    grad = dmd.dmd_gradient(fake, real, dmd.dmd_weight(x, real, level, "kl"))
    dmd.surrogate_loss(x, (grad * weights * x.numel()).detach()).backward()
    v, var = a**2 + sigma**2, s**2 + sigma**2
    assert_close(generator.a.grad.item(), a / var - a / v, rtol=1e-6, atol=0)
    assert_close(generator.b.grad.item(), (b - m) / var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weighting", ["paper", "kl", "sigma", "sigma3", "post"])
def test_gradient_descent_with_an_exact_fake_finds_the_data(weighting):
    """With D_fake exact, a generator of N(1.5, 0.2²) becomes one of N(-0.4, 0.6²)."""
    torch.manual_seed(0)
    generator, teacher = Linear1d(0.2, 1.5), Gaussian(-0.4, 0.6)
    settings = cfg(weighting=weighting, regression_weight=0.0)
    optimizer = torch.optim.Adam(generator.parameters(), 0.05, betas=(0.0, 0.99))
    for step in range(400):
        if step == 200:
            optimizer.param_groups[0]["lr"] = 0.01
        fake = Gaussian(generator.b.item(), abs(generator.a.item()))
        z = torch.randn(512, 1, 1, 1, dtype=D64)
        loss, _, _ = dmd.generator_step(generator, teacher, fake, settings, z, None, ())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(generator.b.item(), -0.4, atol=0.1, rtol=0)
    assert_close(abs(generator.a.item()), 0.6, atol=0.1, rtol=0)


# ---------------------------------------------------------------- pairs, regression, fake


def test_pairs_are_heun_solutions_with_the_labels_given(tiny):
    """y_i = ODE-solve(teacher, z_i, label_i)."""
    labels = torch.tensor([0, 1, 1, 3, 0, 1])
    z = torch.randn(6, 1, 8, 8)
    pairs = dmd.make_pairs(tiny, z, labels, 3, 2.0, "cpu")
    assert pairs["z"] is z
    assert pairs["labels"] is labels
    assert "labels" not in dmd.make_pairs(tiny, z, None, 3, 1.0, "cpu")
    expected = edm.heun_sampler(tiny, z, labels, 3, guidance=2.0)
    assert_close(pairs["y"], expected, atol=1e-5, rtol=1e-5)


def test_drawn_pairs_stay_together_and_are_new_each_time():
    """z, y and label of one index; any index may come, a second draw has others."""
    i = torch.arange(100)
    draws = [dmd.draw_pairs({"z": i, "y": i, "labels": i}, 500, "cpu") for _ in range(2)]
    for z, y, labels in draws:
        assert torch.equal(z, y)
        assert torch.equal(z, labels)
        assert len(z) == 500
        assert len(z.unique()) > 90
    assert not torch.equal(draws[0][0], draws[1][0])
    assert dmd.draw_pairs({"z": i, "y": i}, 5, "cpu")[2] is None


def test_l2_regression_is_the_mean_over_everything():
    x = torch.randn(2, 1, 3, 3, dtype=D64, requires_grad=True)
    y = torch.randn(2, 1, 3, 3, dtype=D64)
    loss = dmd.regression_loss(x, y)
    assert_close(torch.autograd.grad(loss, x)[0], 2 * (x.detach() - y) / 18)


def test_lpips_gets_rgb_of_224_pixels(monkeypatch):
    """Grey becomes RGB, 28 x 28 becomes 224 x 224, values stay in [-1, 1]; mean over the batch."""

    def network(x, y):
        assert x.shape == (2, 3, 224, 224)
        assert x.abs().max() <= 1
        assert_close(x, -y)
        return torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)

    monkeypatch.setattr(dmd, "lpips_network", lambda device: network)
    x = torch.rand(2, 1, 28, 28) * 2 - 1
    assert dmd.regression_loss(x, -x, "lpips").item() == 2.0


def test_fake_loss_is_algorithm_3():
    """mean (1/σ² + 1/σ_data²)(D - x)² over batch, channels and pixels."""
    x, denoised = torch.randn(2, 2, 1, 4, 4, dtype=D64)
    sigma = torch.tensor([0.1, 5.0], dtype=D64)
    squares = (denoised - x).square().flatten(1).mean(1)
    expected = ((1 / sigma**2 + 1 / 0.3**2) * squares).mean()
    assert_close(dmd.fake_loss(denoised, x, sigma, sigma_data=0.3), expected)
    assert_close(dmd.fake_loss(denoised, x, sigma), dmd.fake_loss(denoised, x, sigma, 0.5))


# ---------------------------------------------------------------- the two updates


def step_inputs(tiny, n=4):
    torch.manual_seed(3)
    z, labels = torch.randn(n, 1, 8, 8), torch.arange(n) % 4
    return z, labels, (torch.randn(n, 1, 8, 8), torch.rand(n, 1, 8, 8), labels.flip(0))


def assert_noised(call, x, *ends):
    """The network saw x + σ ε, each sample at its own σ = σ(u), u ~ U[ends]."""
    low, high = dmd.karras_sigma(torch.tensor(ends)).tolist()
    assert low * 0.999 <= call.sigma.min() < low * 1.1
    assert high * 1.001 >= call.sigma.max() > high * 0.98
    middle = (low ** (1 / 7) + high ** (1 / 7)) / 2  # uniform along the curve
    assert_close((call.sigma ** (1 / 7)).mean().item(), middle, rtol=0.02, atol=0)
    assert_close((call.x - x).flatten(1).std(1) / call.sigma, torch.ones(len(x)), atol=0.5, rtol=0)


def test_generator_step_reaches_the_generator_alone(tiny):
    """No gradient for teacher and fake, though they ask for one; every generator weight has one."""
    generator, teacher = edm.trainable_copy(tiny), edm.trainable_copy(tiny)
    fake = randomise(edm.trainable_copy(tiny), 1)
    z, labels, pair = step_inputs(tiny)
    loss, x, _ = dmd.generator_step(generator, teacher, fake, cfg(), z, labels, pair)
    loss.backward()
    assert all(p.grad is None for p in [*teacher.parameters(), *fake.parameters()])
    assert all(p.grad is not None for p in generator.parameters())
    assert not x.requires_grad
    assert_close(x, dmd.generate(generator, z, labels).detach())


def test_fake_step_denoises_each_sample_with_its_own_label_and_level(tiny):
    """fake_loss of D_fake(x + σ ε; σ, y) against x, at all levels: u ~ U[0, 1]."""
    fake, (x, labels, _) = Spy(tiny), step_inputs(tiny, 2000)
    fake.sigma_data = 0.3
    loss = dmd.fake_step(fake, x, labels)
    (call,) = fake.calls
    assert torch.equal(call.labels, labels)
    assert_noised(call, x, 0.0, 1.0)
    assert_close(loss, dmd.fake_loss(tiny(call.x, call.sigma, labels), x, call.sigma, 0.3))


def test_both_scores_see_the_same_noisy_sample_and_label(tiny):
    """x_t, σ and y are the same for D_real and D_fake, without gradient; u ~ U[0.02, 0.98]."""
    teacher, fake = Spy(tiny), Spy(tiny)
    z, labels, _ = step_inputs(tiny, 2000)
    _, x, _ = dmd.generator_step(tiny, teacher, fake, cfg(regression_weight=0.0), z, labels, ())
    (a,), (b,) = teacher.calls, fake.calls
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.sigma, b.sigma)
    for call in (a, b):
        assert torch.equal(call.labels, labels)
        assert not call.grad
    assert_noised(a, x, 0.02, 0.98)


def test_generator_objective_is_the_weighted_sum(tiny):
    """L = dm_weight L_DM + λ L_reg (DMD §3.3), regression on the pairs and their labels."""
    z, labels, pair = step_inputs(tiny)
    fake = randomise(edm.trainable_copy(tiny), 1)

    def loss(dm, regression):
        torch.manual_seed(9)
        settings = cfg(dm_weight=dm, regression_weight=regression)
        return dmd.generator_step(tiny, tiny, fake, settings, z, labels, pair)[0]

    expected = dmd.regression_loss(dmd.generate(tiny, pair[0], pair[2]), pair[1])
    assert_close(loss(0.0, 1.0), expected)
    assert_close(loss(2.0, 0.5), 2 * loss(1.0, 0.0) + 0.5 * expected)


@pytest.mark.parametrize("kind", ["paper", "kl"])
def test_gradient_on_the_sample_is_the_weighted_difference(tiny, kind):
    """numel dL/dx = w(x, D_real, σ) (D_fake - D_real) at x = z, logged as its root mean square.

    DMD §3.4: the guided mean replaces D_real; D_fake stays conditional."""
    z, labels, _ = step_inputs(tiny)
    teacher, fake, itself = Spy(tiny), randomise(edm.trainable_copy(tiny), 1), Linear1d(1.0, 0.0)
    settings = cfg(weighting=kind, guidance=2.0, regression_weight=0.0)
    z.requires_grad_()
    loss, x, log = dmd.generator_step(itself, teacher, fake, settings, z, labels, ())
    (grad,) = torch.autograd.grad(loss, z)
    seen = teacher.calls[0].x, teacher.calls[0].sigma, labels
    with torch.no_grad():
        real, generated = edm.guided(tiny, *seen, 2.0), fake(*seen)
    wanted = dmd.dmd_weight(x, real, seen[1], kind) * (generated - real)
    assert_close(grad * z.numel(), wanted, rtol=1e-2, atol=1e-4 * wanted.abs().max().item())
    assert_close(log["|grad|"], wanted.square().mean().sqrt())


def test_update_clips_the_gradient_norm(tmp_path):
    """|g| <= clip over all weights of the network, its direction stays; a NaN moves nothing."""
    run, network = edm.Run(cfg(out=str(tmp_path)), "dmd_mnist"), torch.nn.Linear(2, 1, bias=False)
    weight, optimizer = network.weight, torch.optim.SGD(network.parameters(), 1.0)
    before = weight.detach().clone()
    run.update(1, "fake", network, optimizer, 30 * weight[0, 0] + 40 * weight[0, 1], clip=2.0)
    assert_close(before - weight.detach(), torch.tensor([[1.2, 1.6]]))
    before, zero = weight.detach().clone(), (weight - weight).square().sum()
    with pytest.raises(ValueError, match="Step 1: fake gradient is not finite"):
        run.update(1, "fake", network, optimizer, zero.sqrt(), clip=2.0)  # its derivative is 0 / 0
    assert torch.equal(weight, before)


# ---------------------------------------------------------------- the whole script


@pytest.fixture
def main(tmp_path, tiny_teacher, monkeypatch):
    """main(...): the verdict of a run that takes a second, without titled pictures."""
    monkeypatch.setattr(plot, "save_rows", lambda path, rows: None)
    few = {"data": "synthetic", "teacher": str(tiny_teacher), "device": "cpu", "steps": 1}
    few |= {"eval_n": 40, "pairs": 40, "pair_steps": 2, "out": str(tmp_path / "run")}
    return lambda **changes: dmd.main(dmd.Config(**few | changes))["metrics"]


def test_pairs_are_of_the_datas_classes_and_give_the_teachers_row(main, tmp_path, monkeypatch):
    """Of 8 training images 3, 1, 2, 2 are of the classes (conftest's metric): so of 40 samples.

    The verdict has other noise. Pairs are paid for: they are the teacher's row if they are enough,
    else new samples are measured. Guidance doubles the network calls."""
    samples, drawn = Calls(monkeypatch, dmd, "generate"), Calls(monkeypatch, dmd, "draw_pairs")
    made, rows = (
        Calls(monkeypatch, dmd, "make_pairs"),
        Calls(monkeypatch, metrics.Metric, "measure"),
    )
    teacher = main(guidance=2.0, pair_batch=5)["teacher"]
    assert (made[0].steps, made[0].guidance) == (2, 2.0)
    assert [call.n for call in drawn] == [5]
    pairs, _ = edm.load_tensors(tmp_path / "run" / "pairs.safetensors")
    (measured,) = (call for call in samples if len(call.z) == 40)
    assert pairs["labels"].bincount().tolist() == [15, 5, 10, 10]
    assert torch.equal(measured.labels, pairs["labels"])
    assert torch.cdist(measured.z.flatten(1), pairs["z"].flatten(1)).min() > 1
    metric = metrics.Metric("synthetic", *edm.load_tensors(tmp_path / "run" / "metric.safetensors"))
    assert teacher["synthetic_fd"] == metric(pairs["y"], None)["synthetic_fd"]
    assert (teacher["nfe"], teacher["n"], len(rows)) == (6, 40, 1)
    teacher = main(pairs=39, out=str(tmp_path / "few"))["teacher"]
    assert (teacher["nfe"], teacher["n"], len(rows)) == (3, 40, 3)


def test_pairs_are_made_only_for_a_regression_that_can_run(main, tmp_path, monkeypatch):
    main(regression_weight=0.0)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        main(regression="lpips", out=str(tmp_path / "lpips"))
    assert not [*tmp_path.glob("*/pairs.safetensors")]
