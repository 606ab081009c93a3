"""DMD2: backward simulation, GAN, R1, the ratio and who gets gradients."""

import math
from unittest.mock import Mock

import pytest
import torch
from conftest import Calls, Gaussian, Spy, randomise
from torch.testing import assert_close

import dmd2_cifar as dmd2
import edm_teacher as edm

D64 = torch.float64


def cfg(**changes):
    return dmd2.Config(**{"device": "cpu", "batch": 4, "data": "synthetic"} | changes)


def trio(tiny):
    """generator, fake and discriminator, all trainable, and a batch of inputs (x_t, σ, labels)."""
    torch.manual_seed(3)
    generator, fake = edm.trainable_copy(tiny), randomise(edm.trainable_copy(tiny), 1)
    x_t, sigma = dmd2.backward_simulation(generator, torch.randn(4, 1, 8, 8), None, 1, 0)
    return generator, fake, dmd2.Discriminator(tiny), (x_t, sigma, torch.arange(4))


# ---------------------------------------------------------------- steps of the generator


def test_noise_levels_of_the_steps_divide_the_time_axis_evenly():
    """σ_k = σ(u = 1 - k/N): times 999, 749, 499, 249 of DMD2 §4.4."""
    z, u = torch.randn(2, 1, 1, 1), torch.tensor([1.0, 0.75, 0.5, 0.25])
    levels = [dmd2.backward_simulation(Gaussian(), z, None, 4, k)[1] for k in range(4)]
    assert_close(torch.stack(levels), dmd2.karras_sigma(u)[:, None].expand(4, 2))
    assert (levels[0] == 80).all()


def test_training_inputs_are_what_the_sampler_sees(tiny):
    """Backward simulation (DMD2 §4.5): x_t and σ_k of the sampler itself at every k, to the bit.

    Only the last of the sampler's calls is differentiated."""
    z, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3])
    seen = Spy(edm.trainable_copy(tiny))
    torch.manual_seed(5)
    dmd2.generate(seen, z, labels, steps=4)
    assert [call.grad for call in seen.calls] == [False, False, False, True]
    for k, call in enumerate(seen.calls):
        torch.manual_seed(5)
        x_t, sigma = dmd2.backward_simulation(tiny, z, labels, 4, k)
        assert torch.equal(x_t, call.x)
        assert torch.equal(sigma, call.sigma)
        assert torch.equal(call.labels, labels)
        assert not call.x.requires_grad


def test_noise_between_steps_is_fresh():
    """x_(k+1) = G(x_k) + σ_(k+1) ε with a new ε: for a generator of zeros Var = σ², no memory."""
    torch.manual_seed(0)
    z = torch.randn(20_000, 1, 1, 1)
    x_t, sigma = dmd2.backward_simulation(Gaussian(0.0, 1e-6), z, None, 2, 1)
    assert_close(x_t.std(), sigma[0], rtol=0.02, atol=0)
    assert abs(torch.corrcoef(torch.stack([x_t.flatten(), z.flatten()]))[0, 1]) < 0.03


def test_data_input_is_noised_real_images_except_at_the_first_step():
    """--multistep-input data: real + σ_k ε for k > 0; pure noise for k = 0, as at inference."""
    torch.manual_seed(0)
    z, real = torch.randn(5000, 1, 1, 1), torch.full((5000, 1, 1, 1), 3.0)
    x_t, sigma = dmd2.backward_simulation(Gaussian(), z, None, 4, 3, real)
    assert_close(x_t.mean().item(), 3.0, atol=0.02, rtol=0)
    assert_close(x_t.std(), sigma[0], rtol=0.03, atol=0)
    x_t, _ = dmd2.backward_simulation(Gaussian(), z, None, 4, 0, real)
    assert torch.equal(x_t, 80 * z)


# ---------------------------------------------------------------- the GAN


def test_best_discriminator_is_the_log_density_ratio():
    """L_D is smallest at l = log p/q; there L_D = 2 log 2 - 2 JS(p, q) (three-point densities)."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=D64), torch.tensor([0.1, 0.3, 0.6], dtype=D64)
    counts_p, counts_q = (p * 10).round().long(), (q * 10).round().long()
    points = torch.arange(3)
    real, fake = points.repeat_interleave(counts_p), points.repeat_interleave(counts_q)
    logits = (p / q).log().requires_grad_()
    loss = dmd2.gan_discriminator_loss(logits[real], logits[fake])
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(gradient, torch.zeros(3, dtype=D64), atol=1e-12, rtol=0)
    m = (p + q) / 2
    js = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum()
    assert_close(loss, 2 * math.log(2) - 2 * js)


def test_generator_loss_is_non_saturating():
    """-log sigmoid(l): its slope goes to -1 where the discriminator is sure of a fake."""
    logits = torch.tensor([[-30.0], [0.0]], dtype=D64, requires_grad=True)
    loss = dmd2.gan_generator_loss(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(gradient.flatten(), torch.tensor([-0.5, -0.25], dtype=D64))  # mean of two
    assert_close(loss, -torch.sigmoid(logits).log().mean())


def test_r1_is_the_squared_gradient_for_small_perturbations():
    """Over n = √d e_i (all directions, E n n' = I): mean ((l(x + s n) - l(x))/s)² -> |∇l|²."""
    x = torch.randn(6, dtype=D64, requires_grad=True)

    def logit(x):
        return (x.sin() * torch.arange(1, 7, dtype=D64)).sum(-1)

    (gradient,) = torch.autograd.grad(logit(x), x)
    n = torch.eye(6, dtype=D64) * math.sqrt(6)
    errors = []
    for std in (1e-2, 1e-3):
        penalty = dmd2.r1_penalty(logit(x.expand(6, -1)), logit(x + std * n), std)
        errors.append((penalty - gradient.square().sum()).abs() / gradient.square().sum())
    assert errors[1] < 1e-2
    assert errors[1] < errors[0]


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_discriminator_sees_both_kinds_at_levels_of_their_own(tiny, features):
    """Real and generated, each with its labels, own σ ~ σ(U[0, gan_noise]) and ε (DMD2 Eq. 4).

    R1 perturbs the same noisy real images, at the same σ and labels, by r1_std."""
    real, x = torch.full((500, 1, 8, 8), 5.0), torch.full((500, 1, 8, 8), -5.0)
    labels, nets = torch.arange(500) % 4, {"fake": Spy(tiny), "teacher": Spy(tiny)}
    settings = cfg(gan_noise=0.5, r1_weight=1.0, r1_std=0.01, gan_features=features)
    data = x, labels, real, labels.flip(0)
    _, log = dmd2.fake_step(*nets.values(), dmd2.Discriminator(tiny), settings, *data)
    call, perturbed = [c for c in nets[features].calls if c.how]
    assert torch.equal(call.labels, torch.cat([labels.flip(0), labels]))
    assert len(call.sigma.unique()) == 1000
    limit = dmd2.karras_sigma(torch.tensor(0.5)).item()
    assert 0.9 * limit < call.sigma.max() <= limit
    sizes = (call.x - torch.cat([real, x])).flatten(1).std(1) / call.sigma
    assert_close(sizes, torch.ones(1000), atol=0.5, rtol=0)
    assert torch.equal(perturbed.labels, labels.flip(0))
    assert torch.equal(perturbed.sigma, call.sigma[:500])
    assert_close((perturbed.x - call.x[:500]).std().item(), 0.01, rtol=0.05, atol=0)
    assert log["R1"] > 0


@pytest.mark.parametrize("size", [2, 4, 7, 8, 16, 32])
def test_heads_end_in_one_logit_a_sample(size):
    """4 x 4 stride-2 convolutions to 4 x 4 or less, one over the rest, one logit."""
    head = dmd2.Discriminator.head(8, size)
    assert head(torch.randn(3, 8, size, size)).shape == (3, 1)
    kernels = [m.kernel_size[0] for m in head if isinstance(m, torch.nn.Conv2d)]
    assert kernels[-1] == 1
    assert kernels[-2] <= 4


def test_levels_choose_the_feature_maps(tiny):
    """Default: the coarsest; --gan-levels 4,2: one logit each; others are refused by name."""
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    assert dmd2.Discriminator(tiny)(tiny, x, torch.ones(3), labels).shape == (3, 1)
    assert dmd2.Discriminator(tiny).chosen == [1]
    both = dmd2.Discriminator(tiny, [4, 2])
    assert both(tiny, x, torch.ones(3), labels).shape == (3, 2)
    with pytest.raises(ValueError, match=r"gan-levels.*4, 2"):
        dmd2.Discriminator(tiny, [7])


# ---------------------------------------------------------------- who gets gradients


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_generator_step_reaches_the_generator_alone(tiny, features):
    """Not fake, teacher or head, though all ask for gradients."""
    generator, fake, head, inputs = trio(tiny)
    teacher, settings = edm.trainable_copy(tiny), cfg(gan_features=features)
    loss, x, log = dmd2.generator_step(generator, teacher, fake, head, settings, inputs)
    loss.backward()
    for network in (fake, teacher, head):
        assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in generator.parameters())
    assert not x.requires_grad
    assert_close(x, generator(*inputs).detach())
    assert log["|GAN grad|"] > 0


def test_generator_objective_is_the_weighted_sum(tiny):
    """dm_weight times the DM gradient plus gan_weight times the GAN's (DMD2 §4.6)."""
    generator, fake, head, inputs = trio(tiny)

    def loss_gradient(dm, gan):
        torch.manual_seed(0)  # the DM part draws first: its numbers are the same in all cases
        settings = cfg(dm_weight=dm, gan_weight=gan)
        loss, _, _ = dmd2.generator_step(generator, tiny, fake, head, settings, inputs)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, generator.parameters())])

    dm, both, thrice = loss_gradient(1.0, 0.0), loss_gradient(1.0, 0.2), loss_gradient(1.0, 0.6)
    assert_close(thrice - dm, 3 * (both - dm), rtol=1e-3, atol=1e-6)
    assert_close(loss_gradient(2.0, 0.2) - both, dm, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_discriminator_trains_the_encoder_of_the_fake_or_nothing_but_its_head(tiny, features):
    """fake (the paper): its loss reaches the fake's encoder; teacher (FastGen): frozen."""
    _, fake, head, (x, _, labels) = trio(tiny)
    teacher = edm.trainable_copy(tiny).requires_grad_(False)
    encoder = "model.enc.4x4_block0.conv0.weight"

    def gradient(weight):
        torch.manual_seed(0)
        settings = cfg(gan_features=features, discriminator_weight=weight)
        loss, _ = dmd2.fake_step(fake, teacher, head, settings, x, labels, x.flip(0), labels)
        fake.zero_grad()
        head.zero_grad()
        loss.backward()
        return dict(fake.named_parameters())[encoder].grad.clone()

    with_gan = gradient(5.0)
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(with_gan, gradient(0.0)) == (features == "teacher")


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_gan_alone_asks_neither_score(tiny, features):
    """--dm-weight 0 (the paper's ablation): one call, of the encoder in --gan-features."""
    generator, fake, head, inputs = trio(tiny)
    nets = {"teacher": Spy(tiny), "fake": Spy(fake)}
    settings = cfg(dm_weight=0.0, gan_features=features)
    _, _, log = dmd2.generator_step(generator, *nets.values(), head, settings, inputs)
    assert [c.how for c in nets.pop(features).calls] == [{"return_features": "only"}]
    assert not next(iter(nets.values())).calls
    assert log.keys() == {"|GAN grad|", "GAN loss"}


# ---------------------------------------------------------------- the two updates in numbers


def mean_head(backbone, x_t, sigma, labels):
    """A discriminator whose logits are known: the mean of each noisy image."""
    return x_t.flatten(1).mean(1, keepdim=True)


def test_objective_of_the_fake_is_denoising_plus_weighted_gan_and_r1(tiny):
    """DMD2 §4.6; real and generated are not swapped; R1 is differentiated at both points."""
    real, x, labels = torch.full((4, 1, 8, 8), 2.0), torch.full((4, 1, 8, 8), -3.0), torch.arange(4)
    a = torch.tensor(1.3, requires_grad=True)
    nets, data = (tiny, tiny, lambda *args: a * mean_head(*args)), (x, labels, real, labels)
    settings = cfg(gan_noise=1e-6, discriminator_weight=30.0, r1_weight=70.0)
    loss, log = dmd2.fake_step(*nets, settings, *data)
    gan = dmd2.gan_discriminator_loss(torch.tensor(2.6), torch.tensor(-3.9))
    assert_close(loss - log["fake loss"], 30 * gan + 70 * log["R1"], rtol=0.02, atol=0)
    assert_close(log["logit real"].item(), 2.6, rtol=0, atol=0.01)
    settings.discriminator_weight = 0.0
    loss, log = dmd2.fake_step(*nets, settings, *data)
    (slope,) = torch.autograd.grad(loss, a)  # R1 is proportional to a²
    assert_close(slope, 70 * 2 * log["R1"].detach() / 1.3, rtol=1e-3, atol=0)


def test_gan_pushes_noised_samples_towards_larger_logits(tiny):
    """dL/dx = gan_weight dL_G/dx, L_G at x + σ ε, σ ~ σ(U[0, gan_noise]), with x's labels.

    Logged as the root mean square of numel dL/dx; guidance is none of the discriminator's."""
    torch.manual_seed(0)
    x, labels = torch.randn(256, 1, 8, 8, requires_grad=True), torch.arange(256) % 4
    head = Mock(side_effect=mean_head)
    settings = cfg(dm_weight=0.0, gan_weight=0.3, gan_noise=0.5, guidance=2.0)
    inputs = (x, torch.ones(256), labels)
    loss, _, log = dmd2.generator_step(lambda x, *_: x, tiny, tiny, head, settings, inputs)
    (grad,) = torch.autograd.grad(loss, x)
    ((_, x_t, sigma, seen),) = (call.args for call in head.call_args_list)
    logits = mean_head(None, x_t.detach(), sigma, seen)
    slope = 0.3 * -torch.sigmoid(-logits[:, 0]) / x.numel()
    assert_close(grad, dmd2.expand(slope, x).expand_as(x), rtol=1e-2, atol=1e-9)
    assert_close(log["|GAN grad|"], slope.square().mean().sqrt() * x.numel())
    assert_close(log["GAN loss"], dmd2.gan_generator_loss(logits))
    assert torch.equal(seen, labels)
    limit = dmd2.karras_sigma(torch.tensor(0.5)).item()
    assert 0.9 * limit < sigma.max() <= limit
    eps = (x_t - x).detach() / dmd2.expand(sigma, x)
    assert_close(eps.std().item(), 1.0, rtol=0.05, atol=0)
    assert eps.mean(0).abs().max() < 0.4  # every sample has its own


def test_scores_get_noisy_samples_labels_and_levels_of_2_to_98_percent(tiny):
    """x_t = x + σ ε and labels are the same for D_real and D_fake; σ = σ(u), u in [0.02, 0.98]."""
    x, labels = torch.randn(500, 1, 8, 8), torch.arange(500) % 4
    teacher, fake, settings = Spy(tiny), Spy(tiny), cfg(gan_weight=0.0)
    dmd2.generator_step(lambda x, *_: x, teacher, fake, None, settings, (x, None, labels))
    (real,), (score,) = teacher.calls, fake.calls
    for call in (real, score):
        assert torch.equal(call.x, real.x)
        assert torch.equal(call.sigma, real.sigma)
        assert torch.equal(call.labels, labels)
        assert not call.grad
    assert ((real.x - x).flatten(1).std(1) / real.sigma - 1).abs().max() < 0.5
    low, high = dmd2.karras_sigma(torch.tensor([0.02, 0.98])).tolist()
    assert low * 0.999 < real.sigma.min() < 2 * low
    assert high / 1.2 < real.sigma.max() < high * 1.001


def test_the_fake_learns_samples_and_no_real_images(tiny):
    """Its loss is fake_loss of D_fake(x + σ ε; σ, y) against x, at all levels, as in DMD."""
    x, labels, real = torch.randn(500, 1, 8, 8), torch.arange(500) % 4, torch.ones(500, 1, 8, 8)
    fake, head = Spy(tiny), dmd2.Discriminator(tiny)
    fake.sigma_data = 0.3
    _, log = dmd2.fake_step(fake, tiny, head, cfg(), x, labels, real, labels.flip(0))
    (call,) = [c for c in fake.calls if not c.how]
    assert torch.equal(call.labels, labels)
    assert ((call.x - x).flatten(1).std(1) / call.sigma - 1).abs().max() < 0.5
    assert call.sigma.min() < 0.005
    assert call.sigma.max() > 60
    denoised = tiny(call.x, call.sigma, labels)
    assert_close(log["fake loss"], dmd2.fake_loss(denoised, x, call.sigma, 0.3))


@pytest.mark.parametrize("kind", ["paper", "kl"])
def test_gradient_on_the_sample_is_the_weighted_difference(tiny, kind):
    """numel dL/dx = w(x, D_real, σ) (D_fake - D_real), with --weighting; logged as its RMS.

    Guidance changes D_real alone."""
    x, labels = torch.randn(4, 1, 8, 8, requires_grad=True), torch.arange(4)
    teacher, fake = Spy(tiny), randomise(edm.trainable_copy(tiny), 1)
    settings = cfg(gan_weight=0.0, weighting=kind, guidance=2.0)
    nets, inputs = (lambda x, *_: x, teacher, fake, None), (x, torch.ones(4), labels)
    loss, _, log = dmd2.generator_step(*nets, settings, inputs)
    (grad,) = torch.autograd.grad(loss, x)
    seen = teacher.calls[0].x, teacher.calls[0].sigma, labels
    with torch.no_grad():
        real, generated = edm.guided(tiny, *seen, 2.0), fake(*seen)
        wanted = dmd2.dmd_weight(x, real, seen[1], kind) * (generated - real)
    assert_close(grad * x.numel(), wanted, rtol=1e-2, atol=1e-4 * wanted.abs().max().item())
    assert_close(log["|grad|"], wanted.square().mean().sqrt())


# ---------------------------------------------------------------- training


def train(tmp_path, tiny, **changes):
    settings = cfg(out=str(tmp_path), save_every=99, **changes)
    images, classes = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.arange(32) % 4
    run = edm.Run(settings, "dmd2_cifar")
    run.pictures = lambda *args: None
    return dmd2.train(settings, run, tiny, images, classes)


def test_all_steps_are_trained_with_the_inputs_of_the_sampler(tmp_path, tiny, monkeypatch):
    """k ~ U{0 .. N-1}; x_t and σ_k come from backward simulation of the generator itself."""
    steps = Calls(monkeypatch, dmd2, "generator_step")
    draws = Calls(monkeypatch, dmd2, "backward_simulation")
    train(tmp_path, tiny, steps=20, sampling_steps=3, ratio=0, gan_weight=0.0)
    assert torch.tensor([draw.k for draw in draws]).bincount(minlength=3).min() > 0
    for step, draw in zip(steps, draws, strict=True):
        assert draw.steps == 3
        assert draw.generator is step.generator
        assert step.inputs[:2] == draw.result
        assert step.inputs[2] is draw.labels


def test_warmup_raises_both_learning_rates_linearly(tmp_path, tiny, monkeypatch):
    """lr min(1, step / warmup)."""
    rates, rate_of = [], lambda update: update.optimizer.param_groups[0]["lr"]
    Calls(monkeypatch, edm.Run, "update", lambda update: rates.append(rate_of(update)))
    train(tmp_path, tiny, steps=3, ratio=1, warmup=2, lr_generator=1e-3, lr_fake=4e-3)
    assert_close(rates, [5e-4, 2e-3, 1e-3, 4e-3, 1e-3, 4e-3])
