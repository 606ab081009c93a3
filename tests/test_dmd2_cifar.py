"""DMD2: backward simulation, GAN, R1, the ratio and who gets gradients."""

import math

import pytest
import torch
from conftest import TINY, Gaussian, Spy, make_denoiser, randomise
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


def test_one_step_is_one_call_at_sigma_max(tiny):
    """G(z) = D(80 z; 80, y): what load_denoiser's users call."""
    z, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 3])
    assert_close(dmd2.generate(tiny, z, labels), tiny(80 * z, 80.0, labels), rtol=0, atol=0)


def test_noise_levels_of_the_steps_divide_the_time_axis_evenly():
    """σ_k = σ(u = 1 - k/N): times 999, 749, 499, 249 of DMD2 §4.4."""
    levels = [
        dmd2.backward_simulation(Gaussian(), torch.randn(2, 1, 1, 1), None, 4, k)[1]
        for k in range(4)
    ]
    u = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert_close(torch.stack(levels)[:, 0], dmd2.karras_sigma(u))
    assert_close(levels[0], torch.full((2,), 80.0))


def test_training_inputs_are_what_the_sampler_sees(tiny):
    """Backward simulation (DMD2 §4.5): x_t and σ_k of the sampler itself at every k, to the bit."""
    z, labels, seen = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 3]), Spy(tiny)
    torch.manual_seed(5)
    dmd2.generate(seen, z, labels, steps=4)
    assert len(seen.calls) == 4
    for k, call in enumerate(seen.calls):
        torch.manual_seed(5)
        x_t, sigma = dmd2.backward_simulation(tiny, z, labels, 4, k)
        assert torch.equal(x_t, call.x)
        assert torch.equal(sigma, call.sigma)
        assert torch.equal(call.labels, labels)


def test_noise_between_steps_is_fresh():
    """x_(k+1) = G(x_k) + σ_(k+1) ε with a new ε: for a generator of zeros Var = σ², no memory."""
    torch.manual_seed(0)
    z = torch.randn(20_000, 1, 1, 1)
    x_t, sigma = dmd2.backward_simulation(Gaussian(0.0, 1e-6), z, None, 2, 1)
    assert_close(x_t.std(), sigma[0], rtol=0.02, atol=0)
    assert abs(torch.corrcoef(torch.stack([x_t.flatten(), z.flatten()]))[0, 1]) < 0.03


def test_backward_simulation_carries_no_gradient(tiny):
    """Only the last of the calls is differentiated."""
    generator = Spy(edm.trainable_copy(tiny))
    dmd2.generate(generator, torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), steps=3)
    assert [c.grad for c in generator.calls] == [False, False, True]
    assert not generator.calls[-1].x.requires_grad


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


def test_gan_gradient_is_autograds_in_the_units_of_the_dmd_gradient(tiny):
    """surrogate_loss(x, numel dL/dx) has the gradient of L itself."""
    generator, _, head, inputs = trio(tiny)
    weights = list(generator.parameters())
    sigma, labels = torch.full((4,), 0.7), inputs[-1]

    def logits_of(x):
        return head(tiny, x, sigma, labels)

    direct = torch.autograd.grad(dmd2.gan_generator_loss(logits_of(generator(*inputs))), weights)
    x = generator(*inputs)
    loss, grad = dmd2.gan_gradient(x, logits_of)
    through = torch.autograd.grad(dmd2.surrogate_loss(x, grad), weights)
    for a, b in zip(direct, through, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-7)
    assert not loss.requires_grad
    assert all(p.grad is None for p in [*head.parameters(), *tiny.parameters()])


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
def test_r1_perturbs_the_same_noisy_real_images(tiny, features):
    """Both passes see one x_t at one σ with one label; the difference has the size r1_std."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 4
    real = torch.randn(64, 1, 8, 8)
    settings = cfg(r1_weight=1.0, r1_std=0.01, gan_features=features)
    spies = {"fake": Spy(tiny), "teacher": Spy(tiny)}
    head = dmd2.Discriminator(tiny)
    x = torch.randn(64, 1, 8, 8)
    _, log = dmd2.fake_step(
        spies["fake"], spies["teacher"], head, settings, x, labels, real, labels.flip(0)
    )
    first, second = [c for c in spies[features].calls if c.how]
    assert torch.equal(first.sigma[:64], second.sigma)
    assert torch.equal(second.labels, labels.flip(0))
    assert_close((second.x - first.x[:64]).std().item(), 0.01, rtol=0.05, atol=0)
    assert log["R1"] > 0


def test_discriminator_sees_both_kinds_at_levels_of_their_own(tiny):
    """Real and generated, each with its labels, own σ ~ σ(U[0, gan_noise]) and ε (DMD2 Eq. 4)."""
    torch.manual_seed(0)
    fake = Spy(tiny)
    real, x = torch.full((500, 1, 8, 8), 5.0), torch.full((500, 1, 8, 8), -5.0)
    labels = torch.zeros(500, dtype=torch.long)
    head = dmd2.Discriminator(tiny)
    dmd2.fake_step(fake, tiny, head, cfg(gan_noise=0.5), x, labels, real, labels + 1)
    (call,) = [c for c in fake.calls if c.how]
    assert call.labels.tolist() == [1] * 500 + [0] * 500
    assert len(call.sigma.unique()) == 1000
    limit = dmd2.karras_sigma(torch.tensor(0.5)).item()
    assert 0.9 * limit < call.sigma.max() <= limit
    clean = torch.cat([real, x])
    sizes = (call.x - clean).flatten(1).std(1) / call.sigma
    assert_close(sizes, torch.ones(1000), atol=0.5, rtol=0)


def test_features_only_are_those_of_the_whole_network(tiny):
    """return_features="only" leaves the decoder out and nothing else."""
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 3])
    _, features = tiny(x, 0.7, labels, return_features=True)
    none, only = tiny(x, 0.7, labels, return_features="only")
    assert none is None
    for a, b in zip(features, only, strict=True):
        assert torch.equal(a, b)


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
    """Not fake, teacher or head, though all ask for gradients; the GAN's share arrives."""
    generator, fake, head, inputs = trio(tiny)
    teacher = edm.trainable_copy(tiny)

    def gradient(**weights):
        torch.manual_seed(0)
        settings = cfg(gan_features=features, **weights)
        loss, x, log = dmd2.generator_step(generator, teacher, fake, head, settings, inputs)
        generator.zero_grad()
        loss.backward()
        assert not x.requires_grad
        return torch.cat([p.grad.flatten() for p in generator.parameters()]), log

    both, log = gradient(gan_weight=0.5)
    for network in (fake, teacher, head):
        assert all(p.grad is None for p in network.parameters())
    assert log["|grad|"] > 0
    assert log["|GAN grad|"] > 0
    dm, _ = gradient(gan_weight=0.0)
    assert not torch.allclose(both, dm)


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


def test_gan_weight_0_needs_no_discriminator_and_no_real_images(tiny):
    generator, fake, _, inputs = trio(tiny)
    settings = cfg(gan_weight=0.0)
    loss, x, log = dmd2.generator_step(generator, tiny, fake, None, settings, inputs)
    assert "GAN loss" not in log
    loss, log = dmd2.fake_step(fake, tiny, None, settings, x, inputs[-1])
    assert_close(loss, log["fake loss"])


def test_gan_alone_asks_neither_score(tiny):
    """--dm-weight 0: the paper's ablation without distribution matching."""
    generator, fake, head, inputs = trio(tiny)
    teacher, fake = Spy(tiny), Spy(fake)
    settings = cfg(dm_weight=0.0)
    loss, _, log = dmd2.generator_step(generator, teacher, fake, head, settings, inputs)
    assert not teacher.calls
    assert all(c.how == {"return_features": "only"} for c in fake.calls)
    assert loss > 0
    assert "|grad|" not in log


def test_guidance_changes_the_teacher_alone(tiny):
    generator, fake, head, inputs = trio(tiny)
    teacher, fake = Spy(tiny), Spy(fake)
    settings = cfg(guidance=2.0)
    dmd2.generator_step(generator, teacher, fake, head, settings, inputs)
    assert [c.labels is None for c in teacher.calls] == [False, True]
    assert [c.how for c in fake.calls] == [{}, {"return_features": "only"}]


def test_gradient_descent_with_an_exact_fake_finds_the_data():
    """generator_step on Gaussians: a generator of N(1.5, 0.2²) becomes one of N(-0.4, 0.6²)."""

    class Affine(torch.nn.Module):
        sigma_min, sigma_max = 0.002, 80.0

        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.2, dtype=D64))
            self.b = torch.nn.Parameter(torch.tensor(1.5, dtype=D64))

        def forward(self, x, sigma, labels=None):
            return self.a * x / dmd2.expand(sigma, x) + self.b

    torch.manual_seed(0)
    generator, teacher, settings = Affine(), Gaussian(-0.4, 0.6), cfg(gan_weight=0.0)
    optimizer = torch.optim.Adam(generator.parameters(), 0.05, betas=(0.0, 0.99))
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 200 else 0.01
        fake = Gaussian(generator.b.item(), abs(generator.a.item()))
        z = torch.randn(512, 1, 1, 1, dtype=D64)
        inputs = (*dmd2.backward_simulation(generator, z, None, 1, 0), None)
        loss, _, _ = dmd2.generator_step(generator, teacher, fake, None, settings, inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(generator.b.item(), -0.4, atol=0.1, rtol=0)
    assert_close(abs(generator.a.item()), 0.6, atol=0.1, rtol=0)


# ---------------------------------------------------------------- the two updates in numbers


def mean_head(backbone, x_t, sigma, labels):
    """A discriminator whose logits are known: the mean of each noisy image."""
    return x_t.flatten(1).mean(1, keepdim=True)


def test_objective_of_the_fake_is_denoising_plus_weighted_gan_and_r1(tiny):
    """DMD2 §4.6; real and generated are not swapped; R1 is differentiated at both points."""
    real, x, labels = torch.full((4, 1, 8, 8), 2.0), torch.full((4, 1, 8, 8), -3.0), torch.arange(4)
    a = torch.tensor(1.3, requires_grad=True)

    def head(*args):
        return a * mean_head(*args)

    settings = cfg(gan_noise=1e-6, discriminator_weight=30.0, r1_weight=70.0)
    loss, log = dmd2.fake_step(tiny, tiny, head, settings, x, labels, real, labels)
    gan = dmd2.gan_discriminator_loss(torch.tensor(2.6), torch.tensor(-3.9))
    assert_close(loss - log["fake loss"], 30 * gan + 70 * log["R1"], rtol=0.02, atol=0)
    assert_close(log["logit real"].item(), 2.6, rtol=0, atol=0.01)
    settings.discriminator_weight = 0.0
    loss, log = dmd2.fake_step(tiny, tiny, head, settings, x, labels, real, labels)
    (slope,) = torch.autograd.grad(loss, a)  # R1 is proportional to a²
    assert_close(slope, 70 * 2 * log["R1"].detach() / 1.3, rtol=1e-3, atol=0)


def test_gan_pushes_noised_samples_towards_larger_logits(tiny):
    """dL/dx = gan_weight dL_G/dx, L_G at x + σ ε, σ ~ σ(U[0, gan_noise]), with x's labels."""
    torch.manual_seed(0)
    x, labels, calls = torch.randn(256, 1, 8, 8, requires_grad=True), torch.arange(256) % 4, []

    def head(backbone, x_t, sigma, labels):
        calls.append((x_t.detach(), sigma, labels))
        return mean_head(backbone, x_t, sigma, labels)

    settings = cfg(dm_weight=0.0, gan_weight=0.3, gan_noise=0.5)
    inputs = (x, torch.ones(256), labels)
    loss, _, _ = dmd2.generator_step(lambda x, *_: x, tiny, tiny, head, settings, inputs)
    (grad,) = torch.autograd.grad(loss, x)
    ((x_t, sigma, seen),) = calls
    slope = -torch.sigmoid(-x_t.flatten(1).mean(1)) / x.numel()
    assert_close(grad, 0.3 * dmd2.expand(slope, x).expand_as(x), rtol=1e-2, atol=1e-9)
    assert torch.equal(seen, labels)
    limit = dmd2.karras_sigma(torch.tensor(0.5)).item()
    assert 0.9 * limit < sigma.max() <= limit
    eps = (x_t - x) / dmd2.expand(sigma, x)
    assert_close(eps.std().item(), 1.0, rtol=0.05, atol=0)
    assert eps.mean(0).abs().max() < 0.4  # every sample has its own


def test_scores_get_noisy_samples_labels_and_levels_of_2_to_98_percent(tiny):
    """Gradient: u in [0.02, 0.98], x_t and labels the same for both; fake loss: all u."""
    torch.manual_seed(0)
    x, labels = torch.randn(500, 1, 8, 8), torch.arange(500) % 4
    teacher, fake, settings = Spy(tiny), Spy(tiny), cfg(gan_weight=0.0)
    dmd2.generator_step(lambda x, *_: x, teacher, fake, None, settings, (x, None, labels))
    dmd2.fake_step(fake, tiny, None, settings, x, labels)
    (real,), (score, denoising) = teacher.calls, fake.calls
    assert torch.equal(real.x, score.x)
    low, high = dmd2.karras_sigma(torch.tensor([0.02, 0.98])).tolist()
    for call in (real, score, denoising):
        assert torch.equal(call.labels, labels)
        assert ((call.x - x).flatten(1).std(1) / call.sigma - 1).abs().max() < 0.5
    assert low <= real.sigma.min()
    assert real.sigma.max() <= high
    assert denoising.sigma.min() < low
    assert denoising.sigma.max() > high


@pytest.mark.parametrize("kind", ["paper", "kl", "sigma3", "post"])
def test_gradient_on_the_sample_is_the_weighted_difference(tiny, kind):
    """numel dL/dx = w(x, D_real, σ) (D_fake - D_real), with --weighting; logged as its RMS."""
    x, labels = torch.randn(4, 1, 8, 8, requires_grad=True), torch.arange(4)
    teacher, fake = Spy(tiny), Spy(randomise(edm.trainable_copy(tiny), 1))
    settings = cfg(gan_weight=0.0, weighting=kind)
    inputs = (x, torch.ones(4), labels)
    loss, _, log = dmd2.generator_step(lambda x, *_: x, teacher, fake, None, settings, inputs)
    (grad,) = torch.autograd.grad(loss, x)
    (call,) = teacher.calls
    with torch.no_grad():
        real, generated = (f(call.x, call.sigma, labels) for f in (tiny, fake.network))
        wanted = dmd2.dmd_weight(x, real, call.sigma, kind) * (generated - real)
    assert_close(grad * x.numel(), wanted, rtol=1e-2, atol=1e-4 * wanted.abs().max().item())
    assert_close(log["|grad|"], wanted.square().mean().sqrt())


# ---------------------------------------------------------------- training


def train(tmp_path, tiny, name="run", **changes):
    settings = cfg(**{"out": str(tmp_path / name), "steps": 4} | changes)
    torch.manual_seed(0)
    run = edm.Run(settings, "dmd2_cifar")
    images, classes = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8), torch.arange(32) % 4
    return dmd2.train(settings, run, tiny.requires_grad_(False), images, classes)


@pytest.mark.parametrize("ratio", [0, 1, 5])
def test_ratio_counts_updates_of_fake_and_discriminator(tmp_path, tiny, monkeypatch, ratio):
    """R for each update of the generator, the first on the same x (DMD2 §4.2)."""
    made, used, real = [], [], []
    generator_step, fake_step = dmd2.generator_step, dmd2.fake_step

    def spy_generator(*args):
        out = generator_step(*args)
        made.append(out[1])
        return out

    def spy_fake(fake, teacher, discriminator, cfg, x, labels, real_x, real_labels):
        used.append(x)
        real.append(real_x)
        return fake_step(fake, teacher, discriminator, cfg, x, labels, real_x, real_labels)

    monkeypatch.setattr(dmd2, "generator_step", spy_generator)
    monkeypatch.setattr(dmd2, "fake_step", spy_fake)
    train(tmp_path, tiny, ratio=ratio)
    assert (len(made), len(used)) == (4, 4 * ratio)
    if ratio:
        assert all(a is b for a, b in zip(made, used[::ratio], strict=True))
    for batches in (used, real):
        assert len({x.sum().item() for x in batches}) == 4 * ratio  # never a batch twice
    assert not any(x.requires_grad for x in used)


@pytest.mark.parametrize("options", [{}, {"gan_features": "teacher"}, {"gan_weight": 0.0}])
def test_training_moves_every_network_but_never_the_teacher(tmp_path, tiny, options):
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    ema = train(tmp_path, tiny, **options)
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(v, tiny.state_dict()[k]) for k, v in before.items())
    fake = {k[5:]: v for k, v in after["both"].items() if k.startswith("fake.")}
    for part in (after["generator"], after["ema"], fake):
        assert any(not torch.equal(part[k], v) for k, v in before.items())
    assert any("discriminator" in k for k in after["both"]) == ("gan_weight" not in options)
    assert not any(m.training for m in tiny.modules())
    assert all(torch.equal(v, after["ema"][k]) for k, v in ema.state_dict().items())


def test_all_steps_are_trained_with_the_inputs_of_the_sampler(tmp_path, tiny, monkeypatch):
    """k ~ U{0 .. N-1}, one for the whole batch; x_t has the size that its σ_k says."""
    seen, generator_step = [], dmd2.generator_step

    def spy(*args):
        seen.append(args[-1])
        return generator_step(*args)

    monkeypatch.setattr(dmd2, "generator_step", spy)
    train(tmp_path, tiny, steps=30, sampling_steps=3, ratio=0, gan_weight=0.0)
    levels = dmd2.karras_sigma(torch.tensor([1 / 3, 2 / 3, 1.0])).tolist()
    found = sorted({sigma.unique().item() for _, sigma, _ in seen})
    assert_close(found, levels, rtol=1e-5, atol=0)
    for x_t, sigma, _ in seen:
        assert_close(x_t.std() / (sigma[0] ** 2 + 0.25).sqrt(), torch.tensor(1.0), rtol=0.5, atol=0)


def test_warmup_raises_both_learning_rates_linearly(tmp_path, tiny, monkeypatch):
    rates, update = [], dmd2.update

    def spy(optimizer, *args):
        rates.append(optimizer.param_groups[0]["lr"])
        update(optimizer, *args)

    monkeypatch.setattr(dmd2, "update", spy)
    train(tmp_path, tiny, ratio=1, warmup=2, lr_generator=1e-3, lr_fake=4e-3)
    assert_close(rates, [5e-4, 2e-3, 1e-3, 4e-3, 1e-3, 4e-3, 1e-3, 4e-3])


def test_real_images_and_labels_stay_together(tmp_path, tiny, monkeypatch):
    """Real batches come with the labels of the images; with multistep data also the generator's."""
    seen, fake_step = [], dmd2.fake_step

    def spy(fake, teacher, discriminator, cfg, x, labels, real, real_labels):
        seen.append((labels, real, real_labels))
        return fake_step(fake, teacher, discriminator, cfg, x, labels, real, real_labels)

    monkeypatch.setattr(dmd2, "fake_step", spy)
    torch.manual_seed(0)
    images = (torch.arange(4, dtype=torch.uint8) * 60)[:, None, None, None].expand(4, 1, 8, 8)
    settings = cfg(out=str(tmp_path / "r"), steps=3, multistep_input="data", sampling_steps=2)
    run = edm.Run(settings, "dmd2_cifar")
    dmd2.train(settings, run, tiny.requires_grad_(False), images, torch.arange(4))
    for labels, real, real_labels in seen:
        assert_close(edm.to_uint8(real)[:, 0, 0, 0].long() // 60, real_labels)
        assert torch.equal(labels, real_labels)


@pytest.mark.parametrize(
    "options", [{}, {"sampling_steps": 2}, {"gan_features": "teacher", "r1_weight": 1.0}]
)
def test_resumed_runs_are_bit_identical(tmp_path, tiny, options):
    """4 steps, or 2 and then 2 more from the checkpoint: the same weights."""
    whole = train(tmp_path, tiny, "whole", **options)
    train(tmp_path, tiny, "parts", steps=2, save_every=2, **options)
    again = train(tmp_path, tiny, "parts", save_every=2, resume=True, **options)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nan_stops_with_step_and_tensor(tmp_path, tiny, monkeypatch):
    original = dmd2.gan_discriminator_loss
    monkeypatch.setattr(
        dmd2, "gan_discriminator_loss", lambda *logits: original(*logits) * float("nan")
    )
    with pytest.raises(ValueError, match=r"Step 1: gradient norm is not finite"):
        train(tmp_path, tiny)


def test_every_network_has_its_optimizer(tmp_path, tiny, monkeypatch):
    """The second optimiser holds the fake and the head; both have beta1, beta2."""
    update = dmd2.update

    def spy(optimizer, loss, network, *args):
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in network.parameters()}
        assert (group["betas"], group["weight_decay"]) == ((0.3, 0.7), 0.01)
        update(optimizer, loss, network, *args)

    monkeypatch.setattr(dmd2, "update", spy)
    train(tmp_path, tiny, beta1=0.3, beta2=0.7)


def test_average_is_of_the_generator(tmp_path, tiny):
    """--ema 0: the result is the generator itself."""
    ema = train(tmp_path, tiny, ema=0.0)
    parts = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["parts"]
    assert all(torch.equal(v, parts["generator"][k]) for k, v in ema.state_dict().items())


def test_amp_computes_in_bfloat16(tmp_path, tiny, monkeypatch):
    seen = []
    tiny.model.enc["4x4_block0"].conv0.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    train(tmp_path, tiny, amp=True, steps=1, save_every=9, sampling_steps=2)
    assert torch.bfloat16 in seen


def test_start_does_not_depend_on_numbers_drawn_before(tmp_path, tiny):
    """The head too comes from --seed, whether or not a metric was trained before."""
    images, classes, results = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8) % 4, []
    for drawn in (1, 2):
        run = edm.Run(settings := cfg(out=str(tmp_path / str(drawn)), steps=2), "dmd2_cifar")
        torch.randn(drawn)
        results.append(dmd2.train(settings, run, tiny.requires_grad_(False), images, classes))
    for a, b in zip(*(r.parameters() for r in results), strict=True):
        assert torch.equal(a, b)


def test_pictures_leave_the_random_numbers_of_the_run_alone(tmp_path, tiny):
    """Several steps draw noise: --save-every must not change the weights."""
    a = train(tmp_path, tiny, "a", sampling_steps=2, save_every=1)
    b = train(tmp_path, tiny, "b", sampling_steps=2, save_every=9)
    for v, w in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(v, w)


def test_further_fake_updates_see_new_samples_of_the_generator(tmp_path, tiny, monkeypatch):
    """x = G(x_t, σ, y) of the updated generator itself, with the labels that made it."""
    drawn, backward_simulation, fake_step = [], dmd2.backward_simulation, dmd2.fake_step

    def spy_input(generator, z, labels, *args):
        drawn.append((generator, *backward_simulation(generator, z, labels, *args), labels))
        return drawn[-1][1:3]

    def spy_fake(fake, teacher, discriminator, cfg, x, labels, *real):
        generator, x_t, sigma, y = drawn[-1]
        assert torch.equal(labels, y)
        if len(drawn) % 3 != 1:  # the first x is from before the update
            assert torch.equal(x, generator(x_t, sigma, y))
        return fake_step(fake, teacher, discriminator, cfg, x, labels, *real)

    monkeypatch.setattr(dmd2, "backward_simulation", spy_input)
    monkeypatch.setattr(dmd2, "fake_step", spy_fake)
    train(tmp_path, tiny, ratio=3, save_every=99, steps=3)


# ---------------------------------------------------------------- the whole script


def test_every_sampler_of_the_script_takes_sampling_steps(tmp_path, tiny_teacher, monkeypatch):
    seen, generate = [], dmd2.generate

    def spy(generator, z, labels=None, steps=1):
        seen.append(steps)
        return generate(generator, z, labels, steps)

    monkeypatch.setattr(dmd2, "generate", spy)
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 1, "eval_n": 40}
    options |= {"teacher_steps": 2, "device": "cpu", "batch": 4, "sampling_steps": 3}
    dmd2.main(dmd2.Config(**options, out=str(tmp_path / "r")))
    path = str(tmp_path / "r" / "generator.safetensors")
    dmd2.main(dmd2.Config(sample=path, n=4, sampling_steps=3, out=str(tmp_path / "s")))
    assert set(seen) == {3}


def test_options_reach_the_head_and_the_teachers_sampler(tmp_path, tiny_teacher, monkeypatch):
    """--gan-levels in train; --guidance in the teacher's row, as in its gradient."""
    seen, heun, head = [], dmd2.heun_sampler, dmd2.Discriminator

    def sampler(*args, guidance, **how):
        seen.append(guidance)
        return heun(*args, guidance=guidance, **how)

    monkeypatch.setattr(dmd2, "heun_sampler", sampler)
    monkeypatch.setattr(dmd2, "Discriminator", lambda d, r=(): seen.append(r) or head(d, r))
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 1, "eval_n": 40}
    options |= {
        "teacher_steps": 2,
        "device": "cpu",
        "batch": 4,
        "gan_levels": "14",
        "guidance": 2.0,
    }
    dmd2.main(dmd2.Config(**options, out=str(tmp_path / "r")))
    assert seen == [[14], 2.0, 2.0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling_steps": 2, "multistep_input": "data"},
        {"gan_weight": 0.0, "guidance": 2.0},
        {"amp": True, "gan_levels": "14,7", "gan_features": "teacher"},
    ],
)
def test_main_writes_everything_and_resume_repeats_the_verdict(tmp_path, tiny_teacher, options):
    out = tmp_path / "run"
    options |= {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 2, "eval_n": 40}
    options |= {"teacher_steps": 3, "out": str(out), "device": "cpu", "save_every": 1, "batch": 4}
    result = dmd2.main(dmd2.Config(**options))
    for name in ["log.jsonl", "samples.png", "samples_2.png", "denoised.png", "curves.png"]:
        assert (out / name).stat().st_size > 0
    rows, steps = result["metrics"], options.get("sampling_steps", 1)
    assert rows["teacher"]["nfe"] == 5 * (2 if "guidance" in options else 1)
    assert rows["generator"]["nfe"] == rows["start"]["nfe"] == steps
    assert {row["n"] for row in rows.values()} == {40}
    assert dmd2.main(dmd2.Config(**options, resume=True)) == result
    dmd2.main(dmd2.Config(sample=str(out / "generator.safetensors"), n=4, out=str(tmp_path / "s")))
    assert (tmp_path / "s" / "sampled.png").stat().st_size > 0


def test_start_of_the_verdict_is_the_untrained_generator(tmp_path, tiny_teacher):
    """With learning rates of 0 the generator stays at its start."""
    options = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 1, "eval_n": 40}
    options |= {"teacher_steps": 2, "device": "cpu", "batch": 4, "lr_generator": 0.0}
    rows = dmd2.main(dmd2.Config(**options, out=str(tmp_path / "r")))["metrics"]
    assert rows["start"]["synthetic_fd"] == rows["generator"]["synthetic_fd"]
    assert rows["start"]["synthetic_fd"] != rows["teacher"]["synthetic_fd"]


def test_unconditional_teachers_work(tmp_path, tiny_teacher):
    torch.manual_seed(0)
    network = TINY | {"label_dim": 0, "img_resolution": 28}
    edm.save_denoiser(randomise(make_denoiser(network)), tmp_path / "u.safetensors")
    options = {"data": "synthetic", "teacher": str(tmp_path / "u.safetensors"), "eval_n": 30}
    options |= {"teacher_steps": 0, "steps": 2, "batch": 4, "device": "cpu", "r1_weight": 1.0}
    rows = dmd2.main(dmd2.Config(**options, out=str(tmp_path / "u")))["metrics"]
    assert "accuracy" not in rows["generator"]
    assert "teacher" not in rows


def test_missing_images_name_the_option_that_needs_none(tmp_path, tiny_teacher, monkeypatch):
    def absent(*args, **kwargs):
        raise edm.UserError("There is no data.")

    monkeypatch.setattr(edm, "load_data", absent)
    settings = cfg(teacher=str(tiny_teacher), out=str(tmp_path / "r"))
    with pytest.raises(ValueError, match=r"There is no data. .*--gan-weight 0"):
        dmd2.main(settings)


def test_misspelt_options_stop_before_anything_is_computed(tmp_path):
    for wrong in (
        {"weighting": "papre"},
        {"multistep_input": "real"},
        {"gan_features": "both"},
        {"sampling_steps": 0},
        {"gan_weight": -1.0},
        {"gan_noise": 1.5},
        {"r1_std": 0.0},
        {"beta2": 1.0},
    ):
        with pytest.raises(ValueError, match=r"choose|must be"):
            dmd2.main(dmd2.Config(**wrong, out=str(tmp_path / "r")))
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match="nothing would train"):
        dmd2.main(dmd2.Config(dm_weight=0.0, gan_weight=0.0))


def test_benchmark_times_whole_cycles(tiny_teacher, capsys):
    """(1 + R) batches a cycle; prints images a second and memory, writes nothing."""
    settings = cfg(benchmark=2, ratio=2, teacher=str(tiny_teacher))
    result = dmd2.main(settings)
    assert_close(result["images_per_second"], 3 * 4 / result["seconds_per_step"])
    assert "images per second" in capsys.readouterr().out


@pytest.mark.parametrize(("data", "steps"), [("cifar10", 150), ("mnist", 300)])
def test_default_number_of_updates_fits_the_data(tmp_path, data, steps):
    settings = dmd2.Config(data=data, teacher=str(tmp_path / "absent.safetensors"), device="cpu")
    with pytest.raises(FileNotFoundError):
        dmd2.main(settings)
    assert settings.steps == steps
