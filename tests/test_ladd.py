"""LADD: levels, losses, R1, gradients through frozen features, teacher-made data."""

from types import SimpleNamespace

import pytest
import torch
from conftest import Calls, Gaussian, Spy, randomise
from torch.testing import assert_close

import edm_teacher as edm
import ladd

D64 = torch.float64


def cfg(**changes):
    small = {"device": "cpu", "batch": 4, "data": "synthetic", "noise_mean": 1.0}  # the paper's
    return ladd.Config(**small | changes)


def trio(tiny):
    """generator and discriminator, trainable, a frozen teacher, and inputs (x_t, σ, labels)."""
    torch.manual_seed(3)
    generator = randomise(edm.trainable_copy(tiny), 1)
    inputs = (80 * torch.randn(4, 1, 8, 8), torch.full((4,), 80.0), torch.arange(4))
    return generator, ladd.Discriminator(tiny), tiny.requires_grad_(False), inputs


class Known:
    """A discriminator of known logits: a times the mean of each noisy image, or another l(a, x)."""

    def __init__(self, a=1.0, l=lambda a, x: a * x.mean(1, keepdim=True)):
        self.a, self.l, self.calls = torch.tensor(a, requires_grad=True), l, []

    def features(self, backbone, x_t, sigma, labels):
        self.calls.append(SimpleNamespace(x=x_t, sigma=sigma, labels=labels))
        return [x_t]

    def logits(self, features, sigma, labels):
        return self.l(self.a, features[0].flatten(1))

    def __call__(self, *args):
        return self.logits(self.features(*args), *args[2:])


# ---------------------------------------------------------------- the generator


def test_levels_are_those_of_the_paper_at_standard_deviation_one_half():
    """t = 1, .75, .5, .25: σ = t/(1-t) = ∞, 3, 1, 1/3 for latents, half of that for pixels."""
    assert_close(ladd.sampling_sigmas(Gaussian(), 4), torch.tensor([80.0, 1.5, 0.5, 1 / 6]))
    for n in (1, 3, 1000):  # any N: falling, within what the teacher knows
        sigma, t = ladd.sampling_sigmas(Gaussian(), n), 1 - torch.arange(n) / n
        inside = (sigma > 0.002) & (sigma < 80)
        assert_close((sigma / (sigma + 0.5))[inside], t[inside])
        assert sigma.max() == sigma[0] == 80
        assert sigma.min() >= 0.002


@torch.no_grad()
def test_sampler_calls_the_generator_at_every_level_with_fresh_noise(tiny):
    """x_(k+1) = G(x_k) + σ_(k+1) ε: N calls, levels and labels as told, ε new and of unit size."""
    seen, z, labels = Spy(tiny), torch.randn(512, 1, 8, 8), torch.arange(512) % 4
    x, x_before, noise = ladd.generate(seen, z, labels, steps=4), 0, []
    assert len(seen.calls) == 4
    for k, call in enumerate(seen.calls):
        assert torch.equal(call.labels, labels)
        assert_close(call.sigma, ladd.sampling_sigmas(tiny, 4)[k].expand(512))
        noise.append((call.x - x_before) / call.sigma[0])
        x_before = tiny(call.x, call.sigma, labels)
    assert torch.equal(x, x_before)
    assert_close(noise[0], z)
    correlation = torch.corrcoef(torch.stack([n.flatten() for n in noise]))
    assert_close(correlation, torch.eye(4), atol=0.03, rtol=0)
    assert_close([n.std().item() for n in noise], [1.0] * 4, atol=0.02, rtol=0)


@pytest.mark.parametrize("p", [[0.7, 0.1, 0.1, 0.1], [0.7, 0.15, 0.15], [1.0]])
def test_inputs_are_noised_images_and_pure_noise_at_the_first_level(p):
    """x_t = real + σ_k z, for k = 0 without real; each sample draws its k, with LADD's p."""
    torch.manual_seed(0)
    z, real = torch.randn(40_000, 1, 1, 1), torch.randn(40_000, 1, 1, 1) + 3
    x_t, sigma = ladd.training_inputs(Gaussian(), z, real, len(p))
    chosen = sigma[:, None] == ladd.sampling_sigmas(Gaussian(), len(p))
    assert_close(chosen.float().mean(0), torch.tensor(p), atol=0.01, rtol=0)
    noise = edm.expand(sigma, z) * z
    assert_close(x_t, torch.where(edm.expand(sigma == 80, z), noise, real + noise))


# ---------------------------------------------------------------- the GAN: noise, losses, R1, heads


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
    _, sigma = ladd.gan_diffuse(torch.zeros(1000, 1, 1, 1), Gaussian(), mean, 20.0)
    assert_close([sigma.min().item(), sigma.max().item()], [0.002, 80.0])  # the teacher's ends


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


# ---------------------------------------------------------------- who gets gradients


@pytest.mark.parametrize("loss", ["hinge", "softplus"])
def test_gradient_reaches_the_generator_through_the_frozen_features(tiny, loss):
    """It is autograd's d L_G / dθ through noise, encoder and heads; nothing else gets any."""
    generator, discriminator, teacher, inputs = trio(tiny)
    weights, settings = list(generator.parameters()), cfg(loss=loss)
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
    assert not x.requires_grad
    assert_close(log["GAN loss"], wanted.detach())


def test_sample_is_pushed_towards_larger_logits_at_levels_of_its_own():
    """hinge, logit = mean of x_t: dL/dx = -1/numel, at ln(σ/σ_data) ~ N(m, s²). Outside [-1, 1],
    where no file has pixels, the discriminator sees the edge and there is no gradient."""
    torch.manual_seed(0)
    x, labels, head = torch.rand(256, 1, 8, 8) * 2 - 1, torch.arange(256), Known()
    x[:, :, 0], outside = -1.5, torch.zeros_like(x)
    outside[:, :, 0] = 0.5
    x.requires_grad_()
    settings, inputs = cfg(noise_mean=-2.0, noise_std=0.3), (x, torch.ones(256), labels)
    loss, _, log = ladd.generator_step(lambda x, *_: x, Gaussian(), head, settings, inputs)
    (grad,) = torch.autograd.grad(loss, x)
    assert_close(grad, (outside == 0) * torch.full_like(x, -1 / x.numel()), rtol=1e-2, atol=1e-9)
    assert_close(log["|GAN grad|"].item(), (7 / 8) ** 0.5)
    (call,) = head.calls
    assert torch.equal(call.labels, labels)
    level = (call.sigma / 0.5).log()
    assert_close([level.mean().item(), level.std().item()], [-2.0, 0.3], atol=0.05, rtol=0)
    eps = (call.x - x - outside) / edm.expand(call.sigma, x)
    assert_close(eps.std().item(), 1.0, rtol=0.05, atol=0)
    assert eps.mean(0).abs().max() < 0.4  # every sample has its own


@pytest.mark.parametrize("options", [{}, {"loss": "softplus", "r1_weight": 1.0}])
def test_discriminator_step_leaves_generator_and_teacher_untouched(tiny, options):
    """Its gradient reaches the heads alone, even from an x that is still attached."""
    generator, discriminator, _, inputs = trio(tiny)
    teacher, x, labels = edm.trainable_copy(tiny), generator(*inputs), inputs[-1]
    data = x, labels, x.detach().flip(0), labels
    loss, _ = ladd.discriminator_step(teacher, discriminator, cfg(**options), *data)
    loss.backward()
    assert all(p.grad is None for p in [*generator.parameters(), *teacher.parameters()])
    assert all(p.grad is not None for p in discriminator.parameters())


# ---------------------------------------------------------------- the discriminator in numbers


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_objective_of_the_discriminator_is_the_weighted_sum(kind):
    """L_D + γ R1(features) + weight R1(inputs); real and generated are not swapped.

    For l = a |f|²/2, R1 is a² |f|², of the real images alone, and it trains the head."""
    head = Known(0.05, lambda a, x: a * x.square().sum(1, keepdim=True) / 2)
    labels, real = torch.arange(4), torch.full((4, 1, 8, 8), 0.5)
    x = real / 2
    settings = cfg(loss=kind, noise_mean=-30.0, noise_std=0.0, r1_features=50.0, r1_weight=7.0)
    loss, log = ladd.discriminator_step(Gaussian(), head, settings, x, labels, real, labels)
    gan = ladd.gan_discriminator_loss(torch.tensor(0.4), torch.tensor(0.1), kind)
    assert_close(log["discriminator loss"], gan, rtol=0.01, atol=0)
    assert_close(log["logit real"].item(), 0.4, rtol=0.01, atol=0)
    assert_close(log["logit generated"].item(), 0.1, rtol=0.01, atol=0)
    assert_close(log["R1 features"].item(), 0.05**2 * 16, rtol=0.01, atol=0)
    penalty = 50 * log["R1 features"] + 7 * log["R1"]
    assert_close(loss, log["discriminator loss"] + penalty)
    (slope,) = torch.autograd.grad(loss - log["discriminator loss"], head.a)  # both go with a²
    assert_close(slope, 2 * penalty.detach() / 0.05, rtol=1e-3, atol=0)


def test_no_penalty_costs_nothing(tiny):
    """Weights of 0: one pass through the encoder, nothing logged."""
    teacher, x, labels = Spy(tiny), torch.randn(4, 1, 8, 8), torch.arange(4)
    nets, settings = (teacher, ladd.Discriminator(tiny)), cfg(r1_features=0.0)
    _, log = ladd.discriminator_step(*nets, settings, x, labels, x, labels)
    (call,) = teacher.calls
    assert call.how == {"return_features": "only"}
    assert not call.grad
    assert log.keys() == {"discriminator loss", "logit real", "logit generated"}


def test_discriminator_sees_both_kinds_at_levels_of_their_own():
    """Real and generated, each with its labels, own σ and ε.

    R1 on inputs perturbs the same noisy real images, at the same σ and labels, by r1_std."""
    real, x = torch.full((500, 1, 8, 8), 0.9), torch.full((500, 1, 8, 8), -5.0)  # -1 is seen
    labels, head = torch.arange(500) % 4, Known()
    settings = cfg(noise_mean=0.3, noise_std=0.6, r1_features=0.0, r1_weight=1.0, r1_std=0.01)
    _, log = ladd.discriminator_step(Gaussian(), head, settings, x, labels, real, labels.flip(0))
    call, perturbed = head.calls
    assert torch.equal(call.labels, torch.cat([labels.flip(0), labels]))
    assert len(call.sigma.unique()) == 1000
    level = (call.sigma / 0.5).log()
    assert_close([level.mean().item(), level.std().item()], [0.3, 0.6], atol=0.1, rtol=0)
    noise = (call.x - torch.cat([real, x.clamp(-1)])) / edm.expand(call.sigma, call.x)
    assert noise.mean((1, 2, 3)).abs().max() < 0.6
    sizes = noise.flatten(1).std(1)
    assert_close(sizes, torch.ones(1000), atol=0.5, rtol=0)
    assert torch.equal(perturbed.labels, labels.flip(0))
    assert torch.equal(perturbed.sigma, call.sigma[:500])
    difference = perturbed.x - call.x[:500]
    assert_close(difference.std().item(), 0.01, rtol=0.05, atol=0)
    assert_close(log["R1"], (difference.mean((1, 2, 3)) / 0.01).square().mean(), rtol=1e-3, atol=0)


def test_heads_read_the_chosen_features_of_noisy_image_level_and_label(tiny):
    """Logits: heads on the teacher's encoder at (x_t, σ, y); each of them can move x_t.

    Default: all levels; --gan-levels 2: that one; others are refused by name."""
    x, labels = torch.randn(3, 1, 8, 8, requires_grad=True), torch.tensor([0, 1, 3])
    sigma = torch.rand(3) + 0.1
    _, features = tiny(x, sigma, labels, return_features=True)
    for levels, chosen in (((), features), ([2], features[1:])):
        discriminator = ladd.Discriminator(tiny, levels)
        heads = zip(discriminator.heads, chosen, strict=True)
        wanted = [head(f, sigma, labels) for head, f in heads]
        logits = discriminator(tiny, x, sigma, labels)
        assert torch.equal(logits, torch.cat(wanted, 1))
        for level in logits.sum(0):
            assert torch.autograd.grad(level, x, retain_graph=True)[0].abs().max() > 0
    with pytest.raises(ValueError, match=r"gan-levels.*4, 7"):
        ladd.Discriminator(tiny, [4, 7])


def test_heads_are_told_class_and_noise_level_by_projection():
    """l(class) - l(no class) = <h, e(class) - e(none)> / √C, and σ in the same way."""
    head, f, ones = ladd.Head(4, 2, 3), torch.randn(2, 4, 2, 2), torch.ones(2)
    h, e, none = head.body(f).flatten(1), head.by_class.weight, torch.full((2,), -1)
    difference = head(f, ones, torch.tensor([0, 2])) - head(f, ones, none)
    assert_close(difference[:, 0], (h * (e[[1, 3]] - e[0])).sum(1) / 2)
    inputs = []
    head.by_noise[0].register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    slope = head(f, 9 * ones, none) - head(f, ones, none)
    levels = torch.tensor([9.0, 1.0]).log()[:, None] / 4 * torch.tensor([1, 2, 4, 8])
    assert_close(torch.stack(inputs)[:, 0], torch.cat([levels.sin(), levels.cos()], 1))
    change = (head.by_noise(inputs[0]) - head.by_noise(inputs[1])) * h
    assert_close(slope[:, 0], change.sum(1) / 2)


def test_adversarial_training_alone_finds_the_data():
    """Both steps on numbers: a generator of N(1.5, 0.2²) moves to data of N(-0.4, 0.6²).

    The log ratio of two Gaussians at each σ is quadratic: l = a0 + a1 x + a2 x²."""
    torch.manual_seed(0)
    head = Known([0.0, 0.0, 0.0], lambda a, x: a[0] + a[1] * x + a[2] * x**2)
    ends, settings = [], cfg(loss="softplus", noise_mean=-1.0)
    teacher = Gaussian()
    teacher.latents = True  # no bounds
    std, mean = weights = [torch.tensor(v, requires_grad=True) for v in (0.2, 1.5)]
    optimizers = [torch.optim.Adam(p, 0.05, betas=(0.0, 0.99)) for p in (weights, [head.a])]

    def update(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(400):
        z, real = torch.randn(256, 1, 1, 1), 0.6 * torch.randn(256, 1, 1, 1) - 0.4
        inputs, nets = (z, torch.ones(256), None), (teacher, head, settings)
        loss, x, _ = ladd.generator_step(lambda z, *_: std * z + mean, *nets, inputs)
        update(optimizers[0], loss)
        update(optimizers[1], ladd.discriminator_step(*nets, x, None, real, None)[0])
        ends.append([std.abs().item(), mean.item()])
    assert_close(torch.tensor(ends)[200:].mean(0), torch.tensor([0.6, -0.4]), atol=0.1, rtol=0)


# ---------------------------------------------------------------- training


def test_images_noised_inputs_and_labels_stay_together(tmp_path, tiny, monkeypatch):
    """The generator's input is the image of its label k, of brightness 80 k, plus noise."""
    steps = Calls(monkeypatch, ladd, "generator_step")
    images = (torch.arange(4, dtype=torch.uint8) * 80)[:, None, None, None].expand(4, 1, 8, 8)
    settings = cfg(out=str(tmp_path), steps=2, batch=64, sampling_steps=4)
    ladd.train(settings, edm.Run(settings, "ladd"), tiny, images, torch.arange(4))
    for step in steps:
        x_t, sigma, labels = step.inputs
        low = sigma < 0.2
        assert low.any()
        value = edm.to_uint8(x_t[low].mean((1, 2, 3)))
        assert_close((value.float() / 80).round().long(), labels[low])


def test_teacher_made_images_need_no_data_and_are_reused(tmp_path, tiny_teacher, monkeypatch):
    """--real teacher: Heun's images with guidance, made once; the run trains on them."""
    made, trained = Calls(monkeypatch, ladd, "make_pairs"), Calls(monkeypatch, ladd, "train")
    some = {"data": "absent", "eval_n": 0, "teacher": str(tiny_teacher), "device": "cpu"}
    some |= {"real": "teacher", "pairs": 12, "guidance": 2.0, "teacher_steps": 2, "batch": 4}
    some |= {"out": str(tmp_path / "run")}
    ladd.main(ladd.Config(**some, steps=1))
    ladd.main(ladd.Config(**some, steps=2, resume=True))
    (pairs,) = made
    assert torch.equal(pairs.labels, torch.arange(12) % 4)
    assert not torch.equal(pairs.z, edm.noise(pairs.teacher, 12, 20000))  # the verdict's
    y = edm.heun_sampler(pairs.teacher, pairs.z, pairs.labels, 2, guidance=2.0)
    for run in trained:
        assert (run.images.float() - edm.to_uint8(y).float()).abs().max() <= 1  # rounding
        assert torch.equal(run.classes, pairs.labels)
