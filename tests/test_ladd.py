"""LADD: levels, losses, R1, gradients through frozen features, the ratio, teacher-made data."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, Gaussian, Spy, make_denoiser, randomise
from torch.testing import assert_close

import edm_teacher as edm
import ladd

D64 = torch.float64


def cfg(**changes):
    small = {"device": "cpu", "batch": 4, "data": "synthetic", "ratio": 1}
    paper = {"noise_mean": 1.0, "noise_std": 1.0}
    return ladd.Config(**small | paper | changes)


def trio(tiny):
    """generator and discriminator, trainable, a frozen teacher, and inputs (x_t, σ, labels)."""
    torch.manual_seed(3)
    generator = randomise(edm.trainable_copy(tiny), 1)
    inputs = (80 * torch.randn(4, 1, 8, 8), torch.full((4,), 80.0), torch.arange(4))
    return generator, ladd.Discriminator(tiny), tiny.requires_grad_(False), inputs


class MeanHead:
    """A discriminator whose logits are known: a times the mean of each noisy image."""

    def __init__(self, a=1.0):
        self.a, self.calls = torch.tensor(a, requires_grad=True), []

    def features(self, backbone, x_t, sigma, labels):
        self.calls.append(SimpleNamespace(x=x_t, sigma=sigma, labels=labels))
        return [x_t]

    def logits(self, features):
        return self.a * features[0].flatten(1).mean(1, keepdim=True)

    def __call__(self, *args):
        return self.logits(self.features(*args))


# ---------------------------------------------------------------- steps of the generator


def test_one_step_is_one_call_at_sigma_max(tiny):
    """G(z) = D(80 z; 80, y): what load_denoiser's users call."""
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    assert_close(ladd.generate(tiny, z, labels), tiny(80 * z, 80.0, labels), rtol=0, atol=0)


def test_levels_are_those_of_the_paper_at_standard_deviation_one_half():
    """t = 1, .75, .5, .25: σ = t/(1-t) = ∞, 3, 1, 1/3 for latents, half of that for pixels."""
    assert_close(ladd.sampling_sigmas(Gaussian(), 4), torch.tensor([80.0, 1.5, 0.5, 1 / 6]))
    assert ladd.sampling_sigmas(Gaussian(), 1).tolist() == [80.0]
    for n in (2, 3, 1000):  # any N: falling, within what the teacher knows
        sigma = ladd.sampling_sigmas(Gaussian(), n)
        t = 1 - torch.arange(n) / n
        inside = (sigma > 0.002) & (sigma < 80)
        assert_close((sigma / (sigma + 0.5))[inside], t[inside])
        assert sigma.max() == sigma[0] == 80
        assert sigma.min() >= 0.002
        assert (sigma.diff() <= 0).all()


def test_sampler_calls_the_generator_at_every_level_with_fresh_noise(tiny):
    """x_(k+1) = G(x_k) + σ_(k+1) ε: N calls, levels and labels as told, ε new and of unit size."""
    torch.manual_seed(0)
    seen, labels = Spy(tiny), torch.arange(512) % 4
    z = torch.randn(512, 1, 8, 8)
    with torch.no_grad():
        x = ladd.generate(seen, z, labels, steps=4)
    assert len(seen.calls) == 4
    noise = [z]
    for k, call in enumerate(seen.calls):
        assert torch.equal(call.labels, labels)
        assert_close(call.sigma, ladd.sampling_sigmas(tiny, 4)[k].expand(512))
        if k:
            before = seen.calls[k - 1]
            with torch.no_grad():
                x_before = tiny(before.x, before.sigma, labels)
            noise.append((call.x - x_before) / call.sigma[0])
    correlation = torch.corrcoef(torch.stack([n.flatten() for n in noise]))
    assert_close(correlation, torch.eye(4), atol=0.03, rtol=0)
    assert_close([n.std().item() for n in noise], [1.0] * 4, atol=0.02, rtol=0)
    with torch.no_grad():
        assert torch.equal(x, tiny(call.x, call.sigma, labels))


# ---------------------------------------------------------------- inputs of training


def test_input_probabilities_are_those_of_the_paper():
    """LADD §5: p = .7, .1, .1, .1; one step is always pure noise."""
    assert_close(ladd.input_probabilities(4), torch.tensor([0.7, 0.1, 0.1, 0.1]))
    assert ladd.input_probabilities(1).tolist() == [1.0]
    assert_close(ladd.input_probabilities(2), torch.tensor([0.7, 0.3]))
    for n in (3, 7):
        assert_close(ladd.input_probabilities(n).sum().item(), 1.0)


def test_inputs_are_noised_images_and_pure_noise_at_the_first_level():
    """x_t = real + σ_k z, for k = 0 without real; k drawn for each sample with these p."""
    torch.manual_seed(0)
    z, real = torch.randn(40_000, 1, 1, 1), torch.randn(40_000, 1, 1, 1) + 3
    x_t, sigma = ladd.training_inputs(Gaussian(), z, real, 4)
    levels = ladd.sampling_sigmas(Gaussian(), 4)
    k = (sigma[:, None] == levels).int().argmax(1)
    share = torch.bincount(k, minlength=4) / len(k)
    assert_close(share, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.01, rtol=0)
    s = levels[k][:, None, None, None]
    assert torch.equal(s.flatten(), sigma)
    wanted = torch.where((k == 0)[:, None, None, None], s * z, real + s * z)
    assert_close(x_t, wanted)
    x_t, sigma = ladd.training_inputs(Gaussian(), z, real, 1)
    assert torch.equal(x_t, 80 * z)
    assert sigma.unique().tolist() == [80.0]


# ---------------------------------------------------------------- the discriminator's noise


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.0), (-0.6, 0.5)])
def test_noise_levels_of_the_discriminator_are_logit_normal_in_t(mean, std):
    """t = σ/(σ + σ_data) = sigmoid(m + s u): quantiles 1 10 50 90 99 % (.21 .43 .73 .91 .97)."""
    torch.manual_seed(0)
    _, sigma = ladd.gan_diffuse(torch.zeros(100_000, 1, 1, 1), Gaussian(), mean, std)
    t = sigma / (sigma + 0.5)
    q = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])
    wanted = torch.sigmoid(mean + std * torch.special.ndtri(q))
    assert_close(t.quantile(q), wanted, atol=0.01, rtol=0)
    if mean == 1:
        assert_close(wanted, torch.tensor([0.21, 0.43, 0.73, 0.91, 0.97]), atol=0.006, rtol=0)


def test_noise_of_the_discriminator_stays_within_what_the_teacher_knows():
    torch.manual_seed(0)
    x = torch.full((2000, 1, 8, 8), 5.0)
    x_t, sigma = ladd.gan_diffuse(x, Gaussian(), 0.0, 20.0)
    assert (sigma.min().item(), sigma.max().item()) == pytest.approx((0.002, 80.0))
    sizes = (x_t - x).flatten(1).std(1) / sigma
    assert_close(sizes, torch.ones(2000), atol=0.5, rtol=0)


# ---------------------------------------------------------------- losses


def test_hinge_is_that_of_add():
    """ADD's hinge: mean -l and mean max(0, 1 - l_real) + mean max(0, 1 + l_fake)."""
    real = torch.tensor([[-1.0, 0.5], [2.0, 1.5]], dtype=D64, requires_grad=True)
    fake = torch.tensor([[-3.0, 0.5], [-0.5, 4.0]], dtype=D64, requires_grad=True)
    loss = ladd.gan_discriminator_loss(real, fake, "hinge")
    assert_close(loss.item(), (2 + 0.5 + 0 + 0) / 4 + (0 + 1.5 + 0.5 + 5) / 4)
    a, b = torch.autograd.grad(loss, (real, fake))
    assert a.tolist() == [[-0.25, -0.25], [0, 0]]
    assert b.tolist() == [[0, 0.25], [0.25, 0.25]]
    loss = ladd.gan_generator_loss(fake, "hinge")
    assert_close(loss.item(), -0.25)
    assert torch.autograd.grad(loss, fake)[0].tolist() == [[-0.25, -0.25]] * 2


def test_softplus_is_the_logistic_pair_of_fastgen():
    """-log sigmoid(l_real) - log(1 - sigmoid(l_fake)); generator: -log sigmoid(l)."""
    real, fake = torch.randn(2, 5, 3, dtype=D64, generator=torch.Generator().manual_seed(0))
    wanted = -torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()
    assert_close(ladd.gan_discriminator_loss(real, fake, "softplus"), wanted)
    assert_close(ladd.gan_generator_loss(fake, "softplus"), -torch.sigmoid(fake).log().mean())


def test_best_hinge_discriminator_is_the_sign_of_the_density_difference():
    """min over l of p max(0, 1-l) + q max(0, 1+l) is 2 min(p, q), at l = sign(p - q)."""
    p, q = torch.tensor([0.5, 0.2, 0.3]), torch.tensor([0.1, 0.7, 0.2])
    counts_p, counts_q = (p * 10).round().long(), (q * 10).round().long()
    points, l = torch.arange(3), torch.sign(p - q)
    real, fake = points.repeat_interleave(counts_p), points.repeat_interleave(counts_q)
    best = ladd.gan_discriminator_loss(l[real], l[fake])
    assert_close(best, 2 * torch.minimum(p, q).sum())
    for other in torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * 2:
        assert ladd.gan_discriminator_loss(other[real], other[fake]) >= best - 1e-6


def test_losses_refuse_other_names():
    with pytest.raises(ValueError, match="--loss wgan: choose hinge or softplus"):
        ladd.gan_generator_loss(torch.zeros(1), "wgan")
    with pytest.raises(ValueError, match="choose"):
        ladd.gan_discriminator_loss(torch.zeros(1), torch.zeros(1), "wgan")


# ---------------------------------------------------------------- R1


def test_r1_of_features_is_the_gradient_penalty_of_each_head_at_its_own_features():
    """l_k = a_k |f_k|²/2: |∂l_k/∂f_k|² = a_k² |f_k|²; mean over batch and heads."""
    torch.manual_seed(0)
    f = [torch.randn(3, 2, 4, 4, dtype=D64).requires_grad_() for _ in range(2)]
    a = torch.tensor([0.7, -2.0], dtype=D64, requires_grad=True)
    squares = torch.stack([v.square().flatten(1).sum(1) for v in f], 1)
    penalty = ladd.r1_of_features(a * squares / 2, f)
    assert_close(penalty, (a**2 * squares).mean())
    (slope,) = torch.autograd.grad(penalty, a)  # it trains the heads
    assert_close(slope, 2 * a.detach() * squares.detach().mean(0) / 2)


def test_r1_of_features_equals_finite_differences_of_the_heads(tiny):
    """The shipped heads in float64: |∂l_k/∂f_k|² entry by entry."""
    torch.manual_seed(0)
    discriminator = ladd.Discriminator(tiny).double()
    heads = discriminator.heads
    f = [torch.randn(1, *s, dtype=D64).requires_grad_() for s in ((8, 4, 4), (16, 2, 2))]
    penalty = ladd.r1_of_features(discriminator.logits(f), f)
    total = 0.0
    with torch.no_grad():
        for head, v in zip(heads, f, strict=True):
            d = 1e-5 * torch.eye(v.numel(), dtype=D64).reshape(-1, *v.shape[1:])
            total += ((head(v + d) - head(v - d)) / 2e-5).square().sum() / 2
    assert_close(penalty, total, rtol=1e-6, atol=0)


def test_r1_on_inputs_is_autograds_gradient_penalty_in_the_limit(tiny):
    """Through encoder and heads: over n = √d e_i, mean ((l(x + s n) - l(x))/s)² -> |∇_x l|²."""
    torch.manual_seed(0)
    discriminator = ladd.Discriminator(tiny, [2])
    x, label = torch.randn(1, 1, 8, 8, requires_grad=True), torch.tensor([2])

    def logit(x):
        return discriminator(tiny, x, torch.full((len(x),), 0.5), label.expand(len(x)))

    (gradient,) = torch.autograd.grad(logit(x).sum(), x)
    wanted = gradient.square().sum()
    n = torch.eye(64).reshape(64, 1, 8, 8) * 8
    errors = []
    with torch.no_grad():
        for std in (0.1, 0.001):
            penalty = ladd.r1_penalty(logit(x.expand(64, -1, -1, -1)), logit(x + std * n), std)
            errors.append(((penalty - wanted).abs() / wanted).item())
    assert errors[1] < 0.01
    assert errors[1] < errors[0]


def test_r1_on_inputs_perturbs_the_same_noisy_real_images():
    """Both passes see one x_t at one σ with one label; the difference has the size r1_std."""
    torch.manual_seed(0)
    labels, real, x = torch.arange(64) % 4, *torch.randn(2, 64, 1, 8, 8)
    head = MeanHead()
    settings = cfg(r1_weight=1.0, r1_std=0.01, r1_features=0.0)
    _, log = ladd.discriminator_step(Gaussian(), head, settings, x, labels, real, labels.flip(0))
    first, second = head.calls
    assert torch.equal(first.sigma[:64], second.sigma)
    assert torch.equal(second.labels, labels.flip(0))
    assert_close((second.x - first.x[:64]).std().item(), 0.01, rtol=0.05, atol=0)
    difference = head.logits([second.x]) - head.logits([first.x[:64]])
    assert_close(log["R1"], (difference / 0.01).square().mean(), rtol=1e-3, atol=0)


# ---------------------------------------------------------------- who gets gradients


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_gradient_reaches_the_generator_through_the_frozen_features(tiny, loss):
    """It is autograd's d L_G / dθ through noise, encoder and heads; nothing else gets any."""
    generator, discriminator, teacher, inputs = trio(tiny)
    weights, settings = list(generator.parameters()), cfg(loss=loss)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    torch.manual_seed(0)
    x_t, sigma = ladd.gan_diffuse(generator(*inputs), teacher)
    logits = discriminator(teacher, x_t, sigma, inputs[-1])
    wanted = ladd.gan_generator_loss(logits, loss)
    direct = torch.autograd.grad(wanted, weights)
    torch.manual_seed(0)
    surrogate, x, log = ladd.generator_step(generator, teacher, discriminator, settings, inputs)
    surrogate.backward()
    for p, gradient in zip(weights, direct, strict=True):
        assert_close(p.grad, gradient, rtol=1e-3, atol=1e-7)
    assert max(p.grad.abs().max() for p in weights) > 1e-4
    assert all(p.grad is None for p in [*discriminator.parameters(), *teacher.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.training
    assert not x.requires_grad
    assert_close(log["GAN loss"], wanted.detach())
    assert not log["GAN loss"].requires_grad


def test_gradient_reaches_every_level_of_the_encoder(tiny):
    """Each head alone moves the sample: no level is detached."""
    _, _, teacher, _ = trio(tiny)
    for level in (4, 2):
        discriminator = ladd.Discriminator(tiny, [level])
        x = torch.randn(2, 1, 8, 8)

        def logits_of(x, discriminator=discriminator):
            return discriminator(teacher, x, torch.ones(2), None)

        _, grad = ladd.gan_gradient(x, logits_of, ladd.gan_generator_loss)
        assert grad.abs().max() > 0


def test_sample_is_pushed_towards_larger_logits_at_levels_of_its_own():
    """hinge, logit = mean of x_t: numel dL/dx = -1 per mean, i.e. dL/dx = -1/numel everywhere."""
    torch.manual_seed(0)
    x, labels, head = (
        torch.randn(256, 1, 8, 8, requires_grad=True),
        torch.arange(256) % 4,
        MeanHead(),
    )
    settings = cfg(noise_mean=-2.0, noise_std=0.3)
    loss, _, log = ladd.generator_step(
        lambda x, *_: x, Gaussian(), head, settings, (x, torch.ones(256), labels)
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert_close(grad, torch.full_like(x, -1 / x.numel()), rtol=1e-2, atol=0)
    assert_close(log["|GAN grad|"].item(), 1.0)
    (call,) = head.calls
    assert torch.equal(call.labels, labels)
    assert_close((call.sigma / 0.5).log().mean().item(), -2.0, atol=0.1, rtol=0)
    assert_close((call.sigma / 0.5).log().std().item(), 0.3, atol=0.05, rtol=0)
    eps = (call.x - x) / edm.expand(call.sigma, x)
    assert_close(eps.std().item(), 1.0, rtol=0.05, atol=0)
    assert eps.mean(0).abs().max() < 0.4  # every sample has its own


@pytest.mark.parametrize("options", [{}, {"loss": "softplus", "r1_weight": 1.0}])
def test_discriminator_step_leaves_generator_and_teacher_untouched(tiny, options):
    """Its gradient reaches the heads alone, even from an x that is still attached."""
    generator, discriminator, _, inputs = trio(tiny)
    teacher = edm.trainable_copy(tiny)
    x, labels = generator(*inputs), inputs[-1]
    real = x.detach().flip(0)
    loss, _ = ladd.discriminator_step(
        teacher, discriminator, cfg(**options), x, labels, real, labels
    )
    loss.backward()
    assert all(p.grad is None for p in [*generator.parameters(), *teacher.parameters()])
    assert all(p.grad is not None for p in discriminator.parameters())
    assert sum(p.grad.abs().sum() for p in discriminator.parameters()) > 0


# ---------------------------------------------------------------- the discriminator in numbers


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_objective_of_the_discriminator_is_the_weighted_sum(kind):
    """L_D + γ R1(features) + weight R1(inputs); real and generated are not swapped."""
    torch.manual_seed(0)
    real, x, labels = (
        torch.full((4, 1, 8, 8), 0.5),
        torch.full((4, 1, 8, 8), -0.25),
        torch.arange(4),
    )
    head = MeanHead(1.3)
    settings = cfg(loss=kind, noise_mean=-30.0, noise_std=0.0, r1_features=50.0, r1_weight=7.0)
    loss, log = ladd.discriminator_step(Gaussian(), head, settings, x, labels, real, labels)
    gan = ladd.gan_discriminator_loss(torch.tensor(0.65), torch.tensor(-0.325), kind)
    assert_close(log["discriminator loss"], gan, rtol=0.01, atol=0)
    assert_close(log["logit real"].item(), 0.65, rtol=0.01, atol=0)
    assert_close(log["logit generated"].item(), -0.325, rtol=0.01, atol=0)
    assert_close(log["R1 features"].item(), 1.3**2 / 64)  # of 64 slopes a/64 each
    parts = log["discriminator loss"] + 50 * log["R1 features"] + 7 * log["R1"]
    assert_close(loss, parts)
    (slope,) = torch.autograd.grad(loss - log["discriminator loss"], head.a)  # both go with a²
    wanted = 2 * (50 * log["R1 features"] + 7 * log["R1"]) / 1.3
    assert_close(slope, wanted.detach(), rtol=1e-3, atol=0)


def test_no_penalty_costs_nothing(tiny):
    """Weights of 0: one pass through the encoder, nothing logged."""
    _, discriminator, _, inputs = trio(tiny)
    teacher, labels, x = Spy(tiny), inputs[-1], torch.randn(4, 1, 8, 8)
    settings = cfg(r1_features=0.0)
    _, log = ladd.discriminator_step(teacher, discriminator, settings, x, labels, x, labels)
    (call,) = teacher.calls
    assert call.how == {"return_features": "only"}
    assert not call.grad
    assert set(log) == {"discriminator loss", "logit real", "logit generated"}


def test_discriminator_sees_both_kinds_at_levels_of_their_own(tiny):
    """Real and generated, each with its labels, own σ and ε; R1 on features of real ones alone."""
    torch.manual_seed(0)
    real, x = torch.full((500, 1, 8, 8), 5.0), torch.full((500, 1, 8, 8), -5.0)
    labels, head = torch.zeros(500, dtype=torch.long), MeanHead()
    ladd.discriminator_step(tiny, head, cfg(noise_mean=0.3), x, labels, real, labels + 1)
    (call,) = head.calls
    assert call.labels.tolist() == [1] * 500 + [0] * 500
    assert len(call.sigma.unique()) == 1000
    assert_close((call.sigma / 0.5).log().mean().item(), 0.3, atol=0.1, rtol=0)
    sizes = (call.x - torch.cat([real, x])).flatten(1).std(1) / call.sigma
    assert_close(sizes, torch.ones(1000), atol=0.5, rtol=0)


def test_r1_of_features_is_taken_at_real_images():
    """l = |f|²/2 has |∂l/∂f|² = |f|²: that of the real images, not of the generated."""

    class Square(MeanHead):
        def logits(self, features):
            return self.a * features[0].square().flatten(1).sum(1, keepdim=True) / 2

    real, x, labels = torch.full((4, 1, 8, 8), 0.5), torch.full((4, 1, 8, 8), -2.0), torch.arange(4)
    settings = cfg(noise_mean=-30.0, noise_std=0.0)
    _, log = ladd.discriminator_step(Gaussian(), Square(), settings, x, labels, real, labels)
    assert_close(log["R1 features"].item(), 16.0, rtol=0.01, atol=0)


def test_levels_choose_the_feature_maps(tiny):
    """Default: all, one logit each; --gan-levels 2: that one; others are refused by name."""
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    assert ladd.Discriminator(tiny)(tiny, x, torch.ones(3), labels).shape == (3, 2)
    assert ladd.Discriminator(tiny).chosen == [0, 1]
    assert ladd.Discriminator(tiny, [2]).chosen == [1]
    with pytest.raises(ValueError, match=r"gan-levels.*4, 7"):
        ladd.Discriminator(tiny, [4, 7])


def test_heads_read_the_features_of_noisy_image_level_and_label(tiny):
    """Logits are those of the heads on the teacher's encoder at (x_t, σ, y)."""
    discriminator = ladd.Discriminator(tiny)
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.rand(3) + 0.1, torch.tensor([0, 1, 3])
    _, features = tiny(x, sigma, labels, return_features=True)
    wanted = torch.cat([h(f) for h, f in zip(discriminator.heads, features, strict=True)], 1)
    assert torch.equal(discriminator(tiny, x, sigma, labels), wanted)


def test_adversarial_training_alone_finds_the_data(tiny):
    """Both steps on numbers: a generator of N(1.5, 0.2²) moves to data of N(-0.4, 0.6²)."""

    class Affine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.tensor(v)) for v in (0.2, 1.5))

        def forward(self, x, sigma, labels=None):
            return self.a * x / edm.expand(sigma, x) + self.b

    class Quadratic(torch.nn.Module, MeanHead):
        """The log ratio of two Gaussians at each σ is quadratic: l = w0 + w1 f + w2 f²."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(3))

        def features(self, backbone, x_t, sigma, labels):
            return [x_t.flatten(1)]

        def logits(self, features):
            f = features[0]
            return self.w[0] + self.w[1] * f + self.w[2] * f**2

        def forward(self, *args):
            return self.logits(self.features(*args))

    torch.manual_seed(0)
    generator, head = Affine(), Quadratic()
    settings = cfg(loss="softplus", r1_features=0.05, noise_mean=-1.0)
    optimizers = [
        torch.optim.Adam(m.parameters(), 0.02, betas=(0.0, 0.99)) for m in (generator, head)
    ]
    averages = []
    for step in range(1200):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 if step < 800 else 0.004
        z, real = torch.randn(256, 1, 1, 1), 0.6 * torch.randn(256, 1, 1, 1) - 0.4
        inputs = (*ladd.training_inputs(Gaussian(), z, real, 1), None)
        loss, x, _ = ladd.generator_step(generator, Gaussian(), head, settings, inputs)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        loss, _ = ladd.discriminator_step(Gaussian(), head, settings, x, None, real, None)
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
        if step >= 800:
            averages.append((abs(generator.a.item()), generator.b.item()))
    a, b = torch.tensor(averages).mean(0).tolist()
    assert_close(b, -0.4, atol=0.1, rtol=0)
    assert_close(a, 0.6, atol=0.12, rtol=0)


# ---------------------------------------------------------------- training


def train(tmp_path, tiny, name="run", **changes):
    settings = cfg(**{"out": str(tmp_path / name), "steps": 4} | changes)
    torch.manual_seed(0)
    run = edm.Run(settings, "ladd")
    images, classes = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.arange(32) % 4
    return ladd.train(settings, run, tiny.requires_grad_(False), images, classes)


@pytest.mark.parametrize("ratio", [1, 3])
def test_ratio_counts_updates_of_the_discriminator(tmp_path, tiny, monkeypatch, ratio):
    """R for each update of the generator, which comes first; the first on the same x."""
    made, used, real, order = [], [], [], []
    generator_step, discriminator_step = ladd.generator_step, ladd.discriminator_step

    def spy_generator(*args):
        out = generator_step(*args)
        made.append(out[1])
        order.append("G")
        return out

    def spy_discriminator(*args):
        used.append(args[3])
        real.append(args[5])
        order.append("D")
        return discriminator_step(*args)

    monkeypatch.setattr(ladd, "generator_step", spy_generator)
    monkeypatch.setattr(ladd, "discriminator_step", spy_discriminator)
    train(tmp_path, tiny, ratio=ratio)
    assert "".join(order) == ("G" + "D" * ratio) * 4
    assert all(a is b for a, b in zip(made, used[::ratio], strict=True))
    for batches in (used, real):
        assert len({x.sum().item() for x in batches}) == 4 * ratio  # never a batch twice
    assert not any(x.requires_grad for x in used)


def test_further_discriminator_updates_see_new_samples_of_the_generator(
    tmp_path, tiny, monkeypatch
):
    """x = G(x_t, σ, y) of the updated generator itself, with the labels that made it."""
    drawn, training_inputs, step = [], ladd.training_inputs, ladd.discriminator_step

    def spy_input(generator, *args):
        drawn.append((generator, *training_inputs(generator, *args)))
        return drawn[-1][1:]

    def spy(teacher, discriminator, cfg, x, labels, *real):
        generator, x_t, sigma = drawn[-1]
        if len(drawn) % 3 != 1:  # the first x is from before the update
            assert torch.equal(x, generator(x_t, sigma, labels))
        return step(teacher, discriminator, cfg, x, labels, *real)

    monkeypatch.setattr(ladd, "training_inputs", spy_input)
    monkeypatch.setattr(ladd, "discriminator_step", spy)
    train(tmp_path, tiny, ratio=3, save_every=99, steps=3)
    assert len(drawn) == 9


def test_training_moves_generator_and_heads_but_never_the_teacher(tmp_path, tiny):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    torch.manual_seed(0)
    start = ladd.Discriminator(tiny).state_dict()
    ema = train(tmp_path, tiny)
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(v, tiny.state_dict()[k]) for k, v in before.items())
    assert not any(m.training for m in tiny.modules())
    for part in (after["generator"], after["ema"]):
        assert any(not torch.equal(part[k], v) for k, v in before.items())
    assert after["discriminator"].keys() == start.keys()
    assert all(not torch.equal(after["discriminator"][k], v) for k, v in start.items())
    assert all(torch.equal(v, after["ema"][k]) for k, v in ema.state_dict().items())


def test_images_noised_inputs_and_labels_stay_together(tmp_path, tiny, monkeypatch):
    """One image, its label: of the real batch, and of the input that its noised copy makes."""
    seen, inputs = [], []
    generator_step, discriminator_step = ladd.generator_step, ladd.discriminator_step
    monkeypatch.setattr(
        ladd, "discriminator_step", lambda *a: seen.append(a[4:]) or discriminator_step(*a)
    )
    monkeypatch.setattr(
        ladd, "generator_step", lambda *a: inputs.append(a[-1]) or generator_step(*a)
    )
    images = (torch.arange(4, dtype=torch.uint8) * 80)[:, None, None, None].expand(4, 1, 8, 8)
    settings = cfg(out=str(tmp_path / "r"), steps=3, batch=64, sampling_steps=4)
    run = edm.Run(settings, "ladd")
    ladd.train(settings, run, tiny.requires_grad_(False), images, torch.arange(4))
    for labels, real, real_labels in seen:
        assert_close(edm.to_uint8(real)[:, 0, 0, 0].long() // 80, real_labels)
        assert torch.equal(labels, real_labels)
    for x_t, sigma, labels in inputs:
        low = sigma < 0.2
        assert low.any()
        value = edm.to_uint8(x_t[low].mean((1, 2, 3)))
        assert_close((value.float() / 80).round().long(), labels[low])


@pytest.mark.parametrize(
    "options", [{}, {"sampling_steps": 2, "ratio": 2, "loss": "softplus", "r1_weight": 1.0}]
)
def test_resumed_runs_are_bit_identical(tmp_path, tiny, options):
    """4 steps, or 2 and then 2 more from the checkpoint: the same weights."""
    whole = train(tmp_path, tiny, "whole", **options)
    train(tmp_path, tiny, "parts", steps=2, save_every=2, **options)
    again = train(tmp_path, tiny, "parts", save_every=2, resume=True, **options)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nan_stops_with_step_and_tensor(tmp_path, tiny, monkeypatch):
    original = ladd.gan_discriminator_loss
    monkeypatch.setattr(
        ladd, "gan_discriminator_loss", lambda *args: original(*args) * float("nan")
    )
    with pytest.raises(ValueError, match=r"Step 1: discriminator loss is not finite"):
        train(tmp_path, tiny)


def test_every_network_has_its_optimizer(tmp_path, tiny, monkeypatch):
    """Each with its learning rate; both with beta1, beta2."""
    rates, update = [], ladd.update

    def spy(optimizer, loss, network, *args):
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}
        assert (group["betas"], group["weight_decay"]) == ((0.3, 0.7), 0.01)
        rates.append((group["lr"], isinstance(network, ladd.Discriminator)))
        update(optimizer, loss, network, *args)

    monkeypatch.setattr(ladd, "update", spy)
    train(tmp_path, tiny, beta1=0.3, beta2=0.7, lr_generator=1e-4, lr_discriminator=3e-4, steps=1)
    assert rates == [(1e-4, False), (3e-4, True)]


def test_average_is_of_the_generator(tmp_path, tiny):
    """--ema 0: the result is the generator itself."""
    ema = train(tmp_path, tiny, ema=0.0)
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(v, parts["generator"][k]) for k, v in ema.state_dict().items())


def test_amp_computes_in_bfloat16_and_logits_in_float32(tmp_path, tiny, monkeypatch):
    seen, logits, original = [], [], ladd.Discriminator.logits
    tiny.model.enc["4x4_block0"].conv0.register_forward_hook(lambda m, i, o: seen.append(o.dtype))

    def spy(self, features):
        logits.append(original(self, features))
        return logits[-1]

    monkeypatch.setattr(ladd.Discriminator, "logits", spy)
    train(tmp_path, tiny, amp=True, steps=1, save_every=9, sampling_steps=2)
    assert torch.bfloat16 in seen
    assert {l.dtype for l in logits} == {torch.float32}


def test_start_does_not_depend_on_numbers_drawn_before(tmp_path, tiny):
    """The heads too come from --seed, whether or not pairs were made before."""
    images, classes, results = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 4, []
    for drawn in (1, 2):
        run = edm.Run(settings := cfg(out=str(tmp_path / str(drawn)), steps=2), "ladd")
        torch.randn(drawn)
        results.append(ladd.train(settings, run, tiny.requires_grad_(False), images, classes))
    for a, b in zip(*(r.parameters() for r in results), strict=True):
        assert torch.equal(a, b)


def test_pictures_leave_the_random_numbers_of_the_run_alone(tmp_path, tiny):
    """Several steps draw noise: --save-every must not change the weights."""
    a = train(tmp_path, tiny, "a", sampling_steps=2, save_every=1)
    b = train(tmp_path, tiny, "b", sampling_steps=2, save_every=9)
    for v, w in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(v, w)


# ---------------------------------------------------------------- the whole script


def options(tmp_path, tiny_teacher, **changes):
    few = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 1, "eval_n": 40, "batch": 4}
    return few | {"teacher_steps": 2, "device": "cpu", "out": str(tmp_path / "r")} | changes


def test_every_sampler_of_the_script_takes_sampling_steps(tmp_path, tiny_teacher, monkeypatch):
    seen, generate = [], ladd.generate

    def spy(generator, z, labels=None, steps=1):
        seen.append(steps)
        return generate(generator, z, labels, steps)

    monkeypatch.setattr(ladd, "generate", spy)
    ladd.main(ladd.Config(**options(tmp_path, tiny_teacher, sampling_steps=3)))
    path = str(tmp_path / "r" / "generator.safetensors")
    ladd.main(ladd.Config(sample=path, n=4, sampling_steps=3, out=str(tmp_path / "s")))
    assert set(seen) == {3}


def test_teacher_made_images_need_no_data_and_are_reused(tmp_path, tiny_teacher, monkeypatch):
    """--real teacher: Heun's images with guidance, once; the run trains on these and labels."""

    def absent(*args, **kwargs):
        raise edm.UserError("There is no data.")

    made, trained, make_pairs, train = [], [], ladd.make_pairs, ladd.train
    monkeypatch.setattr(edm, "load_data", absent)
    monkeypatch.setattr(ladd, "make_pairs", lambda *a: made.append(a) or make_pairs(*a))
    monkeypatch.setattr(ladd, "train", lambda *a: trained.append(a[3:]) or train(*a))
    some = options(tmp_path, tiny_teacher, real="teacher", pairs=12, guidance=2.0, save_every=1)
    ladd.main(ladd.Config(**some))
    ((teacher, n, labels, *how, _),) = made
    assert (n, labels.tolist(), how) == (12, [0, 1, 2, 3] * 3, [2, 2.0, 10000])
    (tmp_path / "r" / "result.json").unlink()
    ladd.main(ladd.Config(**some | {"resume": True, "steps": 2}))
    assert len(made) == 1
    pairs, _ = edm.load_tensors(tmp_path / "r" / "pairs.safetensors")
    with torch.no_grad():
        y = edm.heun_sampler(teacher, pairs["z"], pairs["labels"], 2, guidance=2.0)
    for images, classes in trained:
        difference = images.float() - edm.to_uint8(y).float()
        assert difference.abs().max() <= 1  # rounding
        assert torch.equal(classes, torch.arange(12) % 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling_steps": 2, "real": "teacher", "pairs": 8, "guidance": 2.0},
        {"amp": True, "gan_levels": "14,7", "loss": "softplus", "r1_weight": 1.0, "ratio": 2},
    ],
)
def test_main_writes_everything_and_resume_repeats_the_verdict(tmp_path, tiny_teacher, changes):
    some = options(tmp_path, tiny_teacher, steps=2, save_every=1, **changes)
    out, result = tmp_path / "r", ladd.main(ladd.Config(**some))
    for name in ["log.jsonl", "samples.png", "samples_2.png", "denoised.png", "curves.png"]:
        assert (out / name).stat().st_size > 0
    rows, steps = result["metrics"], changes.get("sampling_steps", 1)
    assert rows["teacher"]["nfe"] == 3 * (2 if "guidance" in changes else 1)
    assert rows["generator"]["nfe"] == rows["start"]["nfe"] == steps
    assert {row["n"] for row in rows.values()} == {40}
    assert (out / "pairs.safetensors").exists() == ("real" in changes)
    assert ladd.main(ladd.Config(**some, resume=True)) == result
    ladd.main(ladd.Config(sample=str(out / "generator.safetensors"), n=4, out=str(tmp_path / "s")))
    assert (tmp_path / "s" / "sampled.png").stat().st_size > 0


def test_start_of_the_verdict_is_the_untrained_generator(tmp_path, tiny_teacher):
    """With learning rates of 0 the generator stays at its start."""
    rows = ladd.main(ladd.Config(**options(tmp_path, tiny_teacher, lr_generator=0.0)))["metrics"]
    assert rows["start"]["synthetic_fd"] == rows["generator"]["synthetic_fd"]
    assert rows["start"]["synthetic_fd"] != rows["teacher"]["synthetic_fd"]


@pytest.mark.parametrize("real", ["data", "teacher"])
def test_unconditional_teachers_work(tmp_path, tiny_teacher, real):
    torch.manual_seed(0)
    network = TINY | {"label_dim": 0, "img_resolution": 28}
    edm.save_denoiser(randomise(make_denoiser(network)), tmp_path / "u.safetensors")
    some = options(tmp_path, tmp_path / "u.safetensors", steps=2, r1_weight=1.0, sampling_steps=2)
    rows = ladd.main(ladd.Config(**some, real=real, pairs=8))["metrics"]
    assert "accuracy" not in rows["generator"]


def test_options_reach_the_heads(tmp_path, tiny_teacher, monkeypatch):
    seen, head = [], ladd.Discriminator
    monkeypatch.setattr(ladd, "Discriminator", lambda d, r=(): seen.append(r) or head(d, r))
    ladd.main(ladd.Config(**options(tmp_path, tiny_teacher, gan_levels="14")))
    assert seen == [[14]]


def test_missing_images_name_the_option_that_needs_none(tmp_path, tiny_teacher, monkeypatch):
    def absent(*args, **kwargs):
        raise edm.UserError("There is no data.")

    monkeypatch.setattr(edm, "load_data", absent)
    with pytest.raises(ValueError, match=r"There is no data. .*--real teacher"):
        ladd.main(ladd.Config(**options(tmp_path, tiny_teacher)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"loss": "wgan"},
        {"real": "fake"},
        {"ratio": 0},
        {"sampling_steps": 0},
        {"pairs": 0},
        {"noise_std": -1.0},
        {"r1_features": -1.0},
        {"r1_weight": -1.0},
        {"r1_std": 0.0},
        {"lr_discriminator": -1.0},
        {"beta2": 1.0},
    ],
)
def test_misspelt_options_stop_before_anything_is_computed(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"choose|must be|nothing would train"):
        ladd.main(ladd.Config(**wrong, out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()


def test_benchmark_times_whole_cycles(tiny_teacher, capsys):
    """(1 + R) batches a cycle; prints images a second and memory, writes nothing."""
    result = ladd.main(cfg(benchmark=2, ratio=2, teacher=str(tiny_teacher)))
    assert_close(result["images_per_second"], 3 * 4 / result["seconds_per_step"])
    assert "images per second" in capsys.readouterr().out
    assert math.isfinite(result["peak_memory_mb"])
