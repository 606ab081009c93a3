"""DMD: gradient, weights, losses and the two updates against closed forms."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, Gaussian, Spy, make_denoiser, randomise
from torch.testing import assert_close

import dmd_mnist as dmd
import edm_teacher as edm

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
    other = dmd.karras_sigma(u, sigma_min=1.0, sigma_max=16.0, rho=2.0)
    assert_close(other, torch.tensor([1.0, 6.25, 16.0], dtype=D64))


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
    sigma = torch.tensor([0.5, 10.0])
    noise = dmd.diffuse(torch.ones(2, 1, 200, 200), sigma) - 1
    assert_close(noise.flatten(1).std(1), sigma, rtol=0.02, atol=0)
    assert abs(noise[0].mean()) < 0.01


def test_generate_is_one_call_at_sigma_max(tiny):
    """G(z) = D(80 z; 80, y)."""
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    assert_close(dmd.generate(tiny, z, labels), tiny(80 * z, 80.0, labels), rtol=0, atol=0)


# ---------------------------------------------------------------- weight, gradient, surrogate


def test_paper_weight_is_one_over_the_mean_error_of_each_sample():
    x = torch.randn(3, 2, 4, 4, dtype=D64)
    y = torch.randn(3, 2, 4, 4, dtype=D64)
    weight = dmd.dmd_weight(x, y)
    assert weight.shape == (3, 1, 1, 1)
    assert_close(
        weight.flatten(), torch.tensor([1 / (x - y)[i].abs().mean() for i in range(3)], dtype=D64)
    )


def test_paper_weight_is_eq_8_for_the_score_difference():
    """w_t (s_fake - s_real) with w_t = σ² C S / |D_real - x|₁ equals weight (D_fake - D_real)."""
    x, real, fake, x_t = torch.randn(4, 2, 3, 4, 4, dtype=D64)
    sigma = torch.tensor([0.1, 7.0], dtype=D64)
    w_t = sigma**2 * 48 / (real - x).abs().flatten(1).sum(1)
    difference = dmd.score(fake, x_t, sigma) - dmd.score(real, x_t, sigma)
    grad = dmd.dmd_gradient(fake, real, dmd.dmd_weight(x, real, sigma))
    assert_close(grad, w_t.reshape(2, 1, 1, 1) * difference)


def test_gradient_is_finite_where_the_teacher_returns_the_sample():
    """mean|x - D_real| = 0: the factor stays finite, so 0 stays 0 and the rest stays a number."""
    x = torch.zeros(1, 1, 4, 4)
    weight = dmd.dmd_weight(x, x)
    assert weight.isfinite().all()
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
    with pytest.raises(ValueError, match="choose paper"):
        dmd.dmd_weight(x, real, sigma, "nonsense")


def test_surrogate_derivative_is_grad_over_numel():
    """dL/dx = grad / numel: mean over batch, channels and pixels; nothing flows through grad."""
    x = torch.randn(2, 3, 4, 4, dtype=D64, requires_grad=True)
    grad = torch.randn(2, 3, 4, 4, dtype=D64, requires_grad=True)
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

    KL(N(b, a²+σ²) || N(m, s²+σ²)) = ½ [ v/u + (b-m)²/u - 1 - ln(v/u) ],  v = a²+σ², u = s²+σ².
    """
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
    pairs = dmd.make_pairs(tiny, 6, labels, 3, 2.0, seed=7, device="cpu")
    assert pairs["labels"] is labels
    assert "labels" not in dmd.make_pairs(tiny, 6, None, 3, 2.0, seed=7, device="cpu")
    expected = edm.heun_sampler(tiny, pairs["z"], pairs["labels"], 3, guidance=2.0)
    assert_close(pairs["y"], expected, atol=1e-5, rtol=1e-5)
    assert_close(pairs["z"], edm.noise(tiny, 6, 7), rtol=0, atol=0)
    assert not torch.equal(pairs["z"], edm.noise(tiny, 6, 8))


def test_l2_regression_is_the_mean_over_everything():
    x = torch.randn(2, 1, 3, 3, dtype=D64, requires_grad=True)
    y = torch.randn(2, 1, 3, 3, dtype=D64)
    loss = dmd.regression_loss(x, y)
    (gradient,) = torch.autograd.grad(loss, x)
    assert_close(gradient, 2 * (x.detach() - y) / 18)


def test_lpips_gets_rgb_of_224_pixels(monkeypatch):
    """Grey becomes RGB, 28 x 28 becomes 224 x 224, values stay in [-1, 1]; mean over the batch."""
    seen = []

    def network(x, y):
        seen.append((x, y))
        return torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)

    monkeypatch.setattr(dmd, "lpips_network", lambda device: network)
    x = torch.rand(2, 1, 28, 28) * 2 - 1
    assert dmd.regression_loss(x, -x, "lpips").item() == 2.0
    assert seen[0][0].shape == (2, 3, 224, 224)
    assert_close(seen[0][0], -seen[0][1])
    assert seen[0][0].abs().max() <= 1


def test_missing_lpips_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        dmd.regression_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), "lpips")


def test_unknown_regression_is_refused():
    with pytest.raises(ValueError, match="choose l2 or lpips"):
        dmd.regression_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), "l3")


def test_fake_loss_is_algorithm_3():
    """mean (1/σ² + 1/σ_data²)(D - x)² over batch, channels and pixels."""
    x, denoised = torch.randn(2, 2, 1, 4, 4, dtype=D64)
    sigma = torch.tensor([0.1, 5.0], dtype=D64)
    squares = (denoised - x).square().flatten(1).mean(1)
    expected = ((1 / sigma**2 + 1 / 0.3**2) * squares).mean()
    assert_close(dmd.fake_loss(denoised, x, sigma, sigma_data=0.3), expected)
    assert_close(dmd.fake_loss(denoised, x, sigma), dmd.fake_loss(denoised, x, sigma, 0.5))


def test_fake_loss_has_its_minimum_at_the_exact_denoiser():
    """Among denoisers of N(b, 0.5²) the loss on samples of N(0.3, 0.5²) is smallest at b = 0.3."""
    torch.manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(20_000, 1, 1, 1, dtype=D64)
    losses = []
    for mean in (0.1, 0.3, 0.5):
        torch.manual_seed(1)
        losses.append(dmd.fake_step(Gaussian(mean, 0.5), x, None).item())
    assert losses[1] < min(losses[0], losses[2])


# ---------------------------------------------------------------- the two updates


def step_inputs(tiny, n=4):
    torch.manual_seed(3)
    z, labels = torch.randn(n, 1, 8, 8), torch.arange(n) % 4
    return z, labels, (torch.randn(n, 1, 8, 8), torch.rand(n, 1, 8, 8), labels.flip(0))


def test_generator_step_reaches_the_generator_alone(tiny):
    """No gradient for teacher and fake, though they ask for one; every generator weight has one."""
    generator, fake, teacher = (edm.trainable_copy(tiny) for _ in range(3))
    with torch.no_grad():
        next(fake.parameters()).add_(0.1)
    z, labels, pair = step_inputs(tiny)
    loss, x, _ = dmd.generator_step(generator, teacher, fake, cfg(), z, labels, pair)
    loss.backward()
    assert all(p.grad is None for p in [*teacher.parameters(), *fake.parameters()])
    assert all(p.grad is not None for p in generator.parameters())
    assert not x.requires_grad
    assert_close(x, dmd.generate(generator, z, labels).detach())


def test_fake_step_reaches_the_fake_alone(tiny):
    generator, fake = edm.trainable_copy(tiny), edm.trainable_copy(tiny)
    z, labels, _ = step_inputs(tiny)
    x = dmd.generate(generator, z, labels).detach()
    dmd.fake_step(fake, x, labels).backward()
    assert all(p.grad is None for p in generator.parameters())
    assert any(p.grad.abs().sum() > 0 for p in fake.parameters())


def test_fake_step_trains_each_sample_with_its_own_label_and_level(tiny):
    """D_fake(x + σ ε; σ, y): labels arrive, σ differs from sample to sample."""
    fake = Spy(tiny)
    _, labels, _ = step_inputs(tiny, 64)
    dmd.fake_step(fake, torch.zeros(64, 1, 8, 8), labels)
    assert torch.equal(fake.calls[0].labels, labels)
    sizes = fake.calls[0].x.flatten(1).std(1) / fake.calls[0].sigma
    assert_close(sizes, torch.ones(64), atol=0.4, rtol=0)
    assert len(fake.calls[0].sigma.unique()) == 64


def test_both_scores_see_the_same_noisy_sample_and_label(tiny):
    """x_t, σ and labels are the same for D_real and D_fake, computed without gradient."""
    teacher, fake = Spy(tiny), Spy(tiny)
    z, labels, _ = step_inputs(tiny, 64)
    dmd.generator_step(tiny, teacher, fake, cfg(regression_weight=0.0), z, labels, ())
    (a,), (b,) = teacher.calls, fake.calls
    assert_close(a.x, b.x, rtol=0, atol=0)
    assert_close(a.sigma, b.sigma, rtol=0, atol=0)
    assert torch.equal(a.labels, labels)
    assert torch.equal(b.labels, labels)
    assert not a.grad
    assert not b.grad


def test_gradient_uses_the_middle_noise_levels_and_the_fake_loss_all(tiny):
    """u ~ U[0.02, 0.98] against u ~ U[0, 1] on the ρ = 7 curve."""
    teacher, fake = Spy(tiny), Spy(tiny)
    torch.manual_seed(0)
    z = torch.randn(2000, 1, 8, 8)
    _, x, _ = dmd.generator_step(tiny, teacher, tiny, cfg(regression_weight=0.0), z, None, ())
    dmd.fake_step(fake, x, None)
    low, high = dmd.karras_sigma(torch.tensor([0.02, 0.98])).tolist()
    sigma = teacher.calls[0].sigma
    assert low <= sigma.min() < low * 1.1
    assert high >= sigma.max() > high * 0.98
    curve = sigma ** (1 / 7)  # uniform along the curve
    middle = (low ** (1 / 7) + high ** (1 / 7)) / 2
    assert_close(curve.mean().item(), middle, rtol=0.02, atol=0)
    sigma = fake.calls[0].sigma
    assert 0.002 <= sigma.min() < 0.0025
    assert 80 >= sigma.max() > 78


def test_no_gradient_where_the_scores_agree(tiny):
    """D_fake = D_real: the generator is not moved by distribution matching."""
    z, labels, _ = step_inputs(tiny)
    generator = edm.trainable_copy(tiny)
    settings = cfg(regression_weight=0.0)
    loss, _, log = dmd.generator_step(generator, tiny, tiny, settings, z, labels, ())
    loss.backward()
    assert all((p.grad == 0).all() for p in generator.parameters())
    assert log["|D_fake - D_real|"] == 0


def test_generator_objective_is_the_weighted_sum(tiny):
    """L = dm_weight L_DM + λ L_reg (DMD §3.3), regression on the pairs and their labels."""
    z, labels, pair = step_inputs(tiny)
    fake = edm.trainable_copy(tiny)
    with torch.no_grad():
        for p in fake.parameters():
            p.mul_(1.1)

    def loss(dm, regression):
        torch.manual_seed(9)
        settings = cfg(dm_weight=dm, regression_weight=regression)
        return dmd.generator_step(tiny, tiny, fake, settings, z, labels, pair)[0]

    expected = dmd.regression_loss(dmd.generate(tiny, pair[0], pair[2]), pair[1])
    assert_close(loss(0.0, 1.0), expected)
    assert_close(loss(2.0, 0.5), 2 * loss(1.0, 0.0) + 0.5 * expected)


def test_guidance_changes_the_teacher_alone(tiny):
    """DMD §3.4: the guided mean replaces D_real; D_fake stays conditional."""
    teacher, fake = Spy(tiny), Spy(tiny)
    z, labels, _ = step_inputs(tiny)
    settings = cfg(guidance=2.0, regression_weight=0.0)
    dmd.generator_step(tiny, teacher, fake, settings, z, labels, ())
    assert [c.labels is None for c in teacher.calls] == [False, True]
    assert len(fake.calls) == 1


# ---------------------------------------------------------------- training


def make_run(tmp_path, name="run", **changes):
    settings = cfg(out=str(tmp_path / name), steps=4, **changes)
    torch.manual_seed(0)
    return settings, edm.Run(settings, "dmd_mnist")


def train(tmp_path, tiny, monkeypatch=None, **changes):
    settings, run = make_run(tmp_path, **changes)
    pairs = dmd.make_pairs(tiny, 8, torch.arange(8) % 4, 2, 1.0, 0, "cpu")
    return dmd.train(settings, run, tiny.requires_grad_(False), pairs)


@pytest.mark.parametrize("ratio", [0, 1, 3])
def test_ratio_counts_fake_updates_and_the_first_uses_the_generators_batch(
    tmp_path, tiny, monkeypatch, ratio
):
    """R fake updates a generator update; the first on the generator step's x (DMD Alg. 1)."""
    made, used = [], []
    generator_step, fake_step = dmd.generator_step, dmd.fake_step

    def spy_generator(*args):
        out = generator_step(*args)
        made.append(out[1])
        return out

    def spy_fake(fake, x, labels):
        used.append(x)
        return fake_step(fake, x, labels)

    monkeypatch.setattr(dmd, "generator_step", spy_generator)
    monkeypatch.setattr(dmd, "fake_step", spy_fake)
    train(tmp_path, tiny, ratio=ratio)
    assert len(made) == 4
    assert len(used) == 4 * ratio
    if ratio:
        assert all(a is b for a, b in zip(made, used[::ratio], strict=True))
        assert len({x.sum().item() for x in used}) == len(used)  # the others are new samples
    assert not any(x.requires_grad for x in used)


def test_training_moves_generator_and_fake_but_never_the_teacher(tmp_path, tiny):
    """The teacher stays in eval mode, frozen and bit-identical."""
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    ema = train(tmp_path, tiny)
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    for name, value in before.items():
        assert torch.equal(value, tiny.state_dict()[name])
    for part in ("generator", "fake", "ema"):
        moved = [not torch.equal(after[part][k], v) for k, v in before.items()]
        assert any(moved), part
    assert not any(m.training for m in tiny.modules())
    assert not any(p.requires_grad for p in tiny.parameters())
    for name, value in ema.state_dict().items():
        assert torch.equal(value, after["ema"][name])


@pytest.mark.parametrize(("rate", "part"), [("lr_generator", "generator"), ("lr_fake", "fake")])
def test_each_network_has_its_own_learning_rate(tmp_path, tiny, rate, part):
    """With its rate at 0 one network stays the teacher while the other learns."""
    train(tmp_path, tiny, **{rate: 0.0})
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    for name in ("generator", "fake"):
        same = all(torch.equal(parts[name][k], v) for k, v in tiny.state_dict().items())
        assert same == (name == part)


def test_update_clips_the_gradient_norm(tmp_path):
    """|g| <= clip over all weights of the network; the direction stays."""
    settings, run = make_run(tmp_path, clip=2.0)
    network = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    before = network.weight.detach().clone()
    loss = (network.weight * torch.tensor([[30.0, 40.0]])).sum()
    dmd.update(optimizer, loss, network, settings, run, 1, {})
    assert_close(before - network.weight.detach(), torch.tensor([[1.2, 1.6]]))


def test_loaded_teacher_is_frozen_and_in_eval_mode(tmp_path, tiny_teacher):
    teacher = dmd.load_teacher(cfg(teacher=str(tiny_teacher)))
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_untrained_fake_stays_the_teacher(tmp_path, tiny):
    """--ratio 0."""
    train(tmp_path, tiny, ratio=0)
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(parts["fake"][k], v) for k, v in tiny.state_dict().items())


def test_result_is_the_average_of_the_generators(tmp_path, tiny, monkeypatch):
    """ema_k = d ema_(k-1) + (1 - d) generator_k, d = min(decay, k / (4 + k))."""
    history, original = [], edm.ema_update

    def spy(ema, network, decay, step):
        original(ema, network, decay, step)
        history.append((network.model.map_layer0.weight.detach().clone(), step))

    monkeypatch.setattr(edm, "ema_update", spy)
    expected = tiny.model.map_layer0.weight.clone()
    ema = train(tmp_path, tiny, ema=0.4)
    assert [step for _, step in history] == [1, 2, 3, 4]
    for weight, step in history:
        decay = min(0.4, step / (4 + step))
        expected = decay * expected + (1 - decay) * weight
    assert_close(ema.model.map_layer0.weight, expected)


def test_same_seed_same_weights_other_seed_others(tmp_path, tiny):
    weights = []
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        settings = cfg(out=str(tmp_path / name), steps=3, seed=seed, threads=1)
        edm.set_up(settings)
        run = edm.Run(settings, "dmd_mnist")
        pairs = dmd.make_pairs(tiny, 8, torch.arange(8) % 4, 2, 1.0, 0, "cpu")
        ema = dmd.train(settings, run, tiny.requires_grad_(False), pairs)
        weights.append(torch.cat([p.flatten() for p in ema.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_nan_stops_with_step_and_tensor_and_keeps_the_checkpoint(tmp_path, tiny, monkeypatch):
    settings, run = make_run(tmp_path, save_every=2)
    step, original = [0], dmd.fake_step

    def poison(fake, x, labels):
        step[0] += 1
        loss = original(fake, x, labels)
        return loss * float("nan") if step[0] == 3 else loss

    monkeypatch.setattr(dmd, "fake_step", poison)
    settings.ratio = 1
    pairs = dmd.make_pairs(tiny, 8, torch.arange(8) % 4, 2, 1.0, 0, "cpu")
    with pytest.raises(ValueError, match=r"Step 3: fake loss is not finite.*checkpoint.pt keeps"):
        dmd.train(settings, run, tiny, pairs)
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 2
    assert all(v.isfinite().all() for v in kept["parts"]["generator"].values())


# ---------------------------------------------------------------- the whole script


def test_main_writes_everything_and_resume_repeats_the_verdict(tmp_path, tiny_teacher, capsys):
    """Run folder and result.json; --resume on a finished run prints the verdict again."""
    out = tmp_path / "run"
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 2, "eval_n": 40}
    options |= {"pairs": 40, "pair_steps": 3, "out": str(out), "device": "cpu", "save_every": 1}
    result = dmd.main(dmd.Config(**options))
    for name in ["log.jsonl", "samples.png", "samples_2.png", "denoised.png", "curves.png"]:
        assert (out / name).stat().st_size > 0
    for name in ["checkpoint.pt", "generator.safetensors", "pairs.safetensors", "result.json"]:
        assert (out / name).stat().st_size > 0
    teacher, generator = result["metrics"]["teacher"], result["metrics"]["generator"]
    assert (teacher["nfe"], generator["nfe"]) == (5, 1)
    assert teacher["n"] == generator["n"] == result["metrics"]["floor"]["n"] == 40
    assert {"synthetic_fd", "accuracy", "precision", "recall", "coverage"} <= generator.keys()
    assert result["config"]["steps"] == 2
    assert result["resumed_from"] == 0
    assert "generator" in capsys.readouterr().out
    again = dmd.main(dmd.Config(**options, resume=True))
    assert again == result
    assert "generator" in capsys.readouterr().out


def test_pairs_and_samples_of_the_verdict_have_the_classes_of_the_data(
    tmp_path, tiny_teacher, monkeypatch
):
    """Of 8 training images 3, 1, 2, 2 are of the classes (conftest's metric): so of 40 samples."""
    drawn, generate = [], dmd.generate
    monkeypatch.setattr(dmd, "generate", lambda g, z, y: drawn.append(y) or generate(g, z, y))
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 1, "eval_n": 40}
    dmd.main(dmd.Config(**options, pairs=40, pair_steps=2, out=str(tmp_path), device="cpu"))
    pairs, _ = edm.load_tensors(tmp_path / "pairs.safetensors")
    (measured,) = (y for y in drawn if len(y) == 40)
    assert pairs["labels"].bincount().tolist() == [15, 5, 10, 10]
    assert torch.equal(measured, pairs["labels"])


def test_sample_draws_the_wanted_classes_without_training(tmp_path, tiny_teacher, capsys):
    dmd.main(dmd.Config(sample=str(tiny_teacher), labels="3,1", n=4, out=str(tmp_path / "s")))
    assert (tmp_path / "s" / "sampled.png").stat().st_size > 0
    with pytest.raises(ValueError, match="0 to 3"):
        dmd.main(dmd.Config(sample=str(tiny_teacher), labels="3,7", n=4, out=str(tmp_path)))


def test_further_fake_updates_use_the_current_generator_and_the_labels_it_drew(
    tmp_path, tiny, monkeypatch
):
    """Each extra x is G(z) of the updated generator, for the labels that the fake is told."""
    calls, generate, fake_step = [], dmd.generate, dmd.fake_step

    def spy_generate(generator, z, labels=None):
        x = generate(generator, z, labels)
        calls.append((x, labels, next(generator.parameters()).detach().clone()))
        return x

    def spy_fake(fake, x, labels):
        x_made, labels_made, _ = calls[-1]
        if x is x_made:
            assert torch.equal(labels, labels_made)
            calls.append("used")
        return fake_step(fake, x, labels)

    monkeypatch.setattr(dmd, "generate", spy_generate)
    monkeypatch.setattr(dmd, "fake_step", spy_fake)
    monkeypatch.setattr(dmd, "pictures", lambda *args: None)
    train(tmp_path, tiny, ratio=2, regression_weight=0.0)
    assert calls.count("used") == 4
    weights = [c[2] for c in calls if c != "used"]
    assert all(not torch.equal(a, b) for a, b in zip(weights[0::2], weights[1::2], strict=True))


def test_unconditional_teachers_work(tmp_path, tiny_teacher):
    """No labels anywhere, no accuracy, and a teacher row that does not come from pairs."""
    torch.manual_seed(0)
    network = TINY | {"label_dim": 0, "img_resolution": 28}
    edm.save_denoiser(randomise(make_denoiser(network)), tmp_path / "u.safetensors")
    options = {"data": "synthetic", "teacher": str(tmp_path / "u.safetensors"), "eval_n": 30}
    options |= {"pairs": 8, "pair_steps": 2, "steps": 2, "guidance": 2.0, "device": "cpu"}
    rows = dmd.main(dmd.Config(**options, out=str(tmp_path / "u")))["metrics"]
    assert rows["teacher"]["nfe"] == 3
    assert rows["teacher"]["n"] == rows["generator"]["n"] == 30
    assert "accuracy" not in rows["generator"]


def test_guided_teachers_cost_two_calls_a_step(tmp_path, tiny_teacher):
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "eval_n": 20, "steps": 1}
    options |= {"pairs": 20, "pair_steps": 2, "guidance": 2.0, "device": "cpu", "pair_batch": 4}
    rows = dmd.main(dmd.Config(**options, out=str(tmp_path / "g")))["metrics"]
    assert rows["teacher"]["nfe"] == 6


def test_misspelt_options_stop_before_anything_is_computed(tmp_path):
    for wrong in (
        {"weighting": "papre"},
        {"regression": "L2"},
        {"steps": 0},
        {"eval_n": 1},
        {"ratio": -1},
        {"ema": 2.0},
        {"lr_fake": float("nan")},
    ):
        with pytest.raises(ValueError, match=r"choose|must be"):
            dmd.main(dmd.Config(**wrong, out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


def test_missing_teacher_names_the_command(tmp_path):
    settings = dmd.Config(data=str(tmp_path), out=str(tmp_path / "r"))
    with pytest.raises(ValueError, match=r"edm_teacher\.py --data .*--teacher"):
        dmd.main(settings)
