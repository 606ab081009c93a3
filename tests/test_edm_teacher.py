"""The shared module: preconditioning, network, loss and sampler against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Gaussian, make_denoiser, randomise
from torch.testing import assert_close

import edm_teacher as edm


class Recorder(torch.nn.Module):
    """A raw network F that keeps its inputs and returns a fixed multiple of the first."""

    img_channels, img_resolution, label_dim = 1, 4, 3

    def __init__(self, factor=0.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=torch.float64))

    def forward(self, x, noise, labels, return_features=False):
        self.x, self.noise, self.labels = x, noise, labels
        return self.factor * x


SIGMAS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)


# ---------------------------------------------------------------- preconditioning


def test_network_input_and_target_have_unit_variance_at_every_sigma():
    """c_in² (σ² + σ_data²) = 1 and Var[(y - c_skip (y + n)) / c_out] = 1  (EDM App. B)."""
    net = edm.EDMPrecond(Recorder(1.0))
    x = torch.ones(5, 1, 4, 4, dtype=torch.float64)
    full = net(x, SIGMAS)  # c_skip + c_out c_in
    c_in = net.model.x[:, 0, 0, 0]
    net.model.factor.data.zero_()
    c_skip = net(x, SIGMAS)[:, 0, 0, 0]
    c_out = (full[:, 0, 0, 0] - c_skip) / c_in
    assert_close(c_in**2 * (SIGMAS**2 + 0.25), torch.ones(5, dtype=torch.float64))
    variance = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * SIGMAS**2) / c_out**2
    assert_close(variance, torch.ones(5, dtype=torch.float64))
    assert_close(net.model.noise, SIGMAS.log() / 4)


def test_preconditioning_values_of_table_1():
    """c_skip(0.5) = ½, c_out(80) = 40 / sqrt(6400.25), at σ_data = 0.5; and for another σ_data."""
    net = edm.EDMPrecond(Recorder(0.0))
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    assert_close(net(x, 0.5)[0, 0, 0, 0].item(), 0.5)
    net.model.factor.data.fill_(1.0)
    c_skip, c_in = 0.25 / 6400.25, 1 / math.sqrt(6400.25)
    assert_close(net(x, 80.0)[0, 0, 0, 0].item(), c_skip + 40 * c_in * c_in, rtol=1e-12, atol=0)
    net = edm.EDMPrecond(Recorder(0.0), sigma_data=1.0)
    assert_close(net(x, 1.0)[0, 0, 0, 0].item(), 0.5)


def test_denoiser_returns_its_input_as_sigma_goes_to_zero(tiny):
    """D(x; σ) -> x."""
    x = torch.rand(2, 1, 8, 8)
    assert_close(tiny(x, 1e-6), x, atol=1e-4, rtol=0)


def test_labels_are_one_hot_and_minus_one_is_no_class(tiny):
    """label -1 = all-zero row = None; other labels change the result."""
    net = edm.EDMPrecond(Recorder())
    net(torch.zeros(3, 1, 4, 4), 1.0, torch.tensor([0, 2, -1]))
    expected = [[1.0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert_close(net.model.labels, torch.tensor(expected, dtype=torch.float64))
    x = torch.randn(2, 1, 8, 8)
    none = torch.tensor([-1, -1])
    assert_close(tiny(x, 1.0, none), tiny(x, 1.0), rtol=0, atol=0)
    assert not torch.allclose(tiny(x, 1.0, torch.tensor([1, 2])), tiny(x, 1.0), atol=1e-3)


def test_samples_of_a_batch_do_not_mix(tiny):
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.arange(3)
    alone = torch.cat([tiny(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert_close(tiny(x, sigma, labels), alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("label_dim", "count", "entries"), [(10, 55735299, 427), (0, 55733891, 425)]
)
def test_cifar10_configuration_has_the_published_size(label_dim, count, entries):
    with torch.device("meta"):
        net = edm.SongUNet(32, 3, label_dim, 9, num_blocks=4, dropout=0.13)
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(net.state_dict()) == entries
    for name in [
        "map_augment.weight",
        "enc.32x32_conv.bias",
        "enc.16x16_down.conv0.resample_filter",
        "enc.16x16_block0.qkv.weight",
        "dec.8x8_in0.norm2.bias",
        "dec.32x32_up.skip.weight",
        "dec.32x32_aux_conv.weight",
    ]:
        assert name in net.state_dict()


def test_keywords_of_genuine_files_are_checked():
    """DDPM++ files name their own architecture; another one must not be built silently."""
    kwargs = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "num_blocks": 1}
    edm.SongUNet(**kwargs, embedding_type="positional", resample_filter=[1, 1])
    with pytest.raises(ValueError, match="embedding_type='fourier'"):
        edm.SongUNet(**kwargs, embedding_type="fourier")


def test_initial_weights_are_xavier_uniform():
    """Bound sqrt(6 / (fan_in + fan_out)); last layers 1e-5 of it, qkv sqrt(0.2) of it, biases 0."""
    torch.manual_seed(0)
    net = edm.SongUNet(8, 1, 4, model_channels=32, channel_mult=[2], num_blocks=1)
    block = net.dec["8x8_in0"]
    bound = math.sqrt(6 / (2 * 64 * 9))
    for weight, scale, fan in [
        (block.conv0.weight, 1.0, bound),
        (block.conv1.weight, 1e-5, bound),
        (block.qkv.weight, math.sqrt(0.2), math.sqrt(6 / (64 + 192))),
        (block.affine.weight, 1.0, math.sqrt(6 / (128 + 64))),
        (net.map_label.weight, 1.0, math.sqrt(6 / (4 + 32))),
    ]:
        assert 0.97 * fan * scale < weight.abs().max() <= fan * scale
        assert_close(weight.std().item(), fan * scale / math.sqrt(3), rtol=0.1, atol=0)
    assert all((m.bias == 0).all() for m in [block.conv0, block.affine, net.map_label])


def test_noise_embedding_is_sines_then_cosines():
    """emb = [sin(c f), cos(c f)], f_i = 10000^(-i / (half - 1))."""
    net = edm.SongUNet(8, 1, model_channels=8, channel_mult=[1], num_blocks=1)
    c = torch.tensor([0.7])
    f = 10000.0 ** (-torch.arange(4) / 3)
    emb = torch.cat([(c * f).sin(), (c * f).cos()])
    expected = F.silu(net.map_layer1(F.silu(net.map_layer0(emb))))
    assert_close(net.embed(c, None, None)[0], expected)


def test_labels_and_augmentation_are_added_to_the_noise_embedding():
    """emb + W (sqrt(K) one-hot) + b + W' augment, before the two layers."""
    torch.manual_seed(0)
    net = randomise(edm.SongUNet(8, 1, 4, 3, model_channels=8, channel_mult=[1], num_blocks=1))
    label, augment, c = torch.tensor([[0.0, 0, 1, 0]]), torch.randn(1, 3), torch.tensor([0.7])
    f = 10000.0 ** (-torch.arange(4) / 3)
    emb = torch.cat([(c * f).sin(), (c * f).cos()])
    emb = emb + 2 * net.map_label.weight[:, 2] + net.map_label.bias
    emb = emb + net.map_augment.weight @ augment[0]
    expected = F.silu(net.map_layer1(F.silu(net.map_layer0(emb))))
    assert_close(net.embed(c, label, augment)[0], expected)


@pytest.mark.parametrize(("cin", "cout"), [(8, 8), (8, 16)])
def test_block_is_two_convolutions_and_a_skip_scaled_by_root_half(cin, cout):
    """(skip x + conv1 silu norm1(conv0 silu norm0 x + affine emb)) sqrt(½)."""
    torch.manual_seed(0)
    block = randomise(edm.UNetBlock(cin, cout, 16, 0.0))
    x, emb = torch.randn(2, cin, 4, 4), torch.randn(2, 16)

    def norm(v, layer):
        groups = v.shape[1] // 4
        g = v.reshape(2, groups, -1)
        g = (g - g.mean(2, keepdim=True)) / (g.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
        return g.reshape(v.shape) * layer.weight[:, None, None] + layer.bias[:, None, None]

    h = F.conv2d(F.silu(norm(x, block.norm0)), block.conv0.weight, block.conv0.bias, padding=1)
    h = h + (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    h = F.conv2d(F.silu(norm(h, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    skip = x if cin == cout else F.conv2d(x, block.skip.weight, block.skip.bias)
    assert_close(block(x, emb), (skip + h) * math.sqrt(0.5), atol=1e-5, rtol=1e-5)


def test_attention_equals_softmax_of_interleaved_qkv():
    """a = softmax(q k^T / sqrt(C)) v, channels ordered q0 k0 v0 q1 ...; residual times sqrt(½)."""
    torch.manual_seed(0)
    block = randomise(edm.UNetBlock(8, 8, 16, 0.0, attention=True))
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    block.attention = False
    h = block(x, emb)
    block.attention = True
    qkv = block.qkv(block.norm2(h)).flatten(2)
    q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
    weights = torch.einsum("bcq,bck->bqk", q, k).div(math.sqrt(8)).softmax(2)
    a = torch.einsum("bqk,bck->bcq", weights, v).reshape(h.shape)
    assert_close(block(x, emb), (block.proj(a) + h) * math.sqrt(0.5))


def test_resampling_is_mean_of_four_and_nearest_neighbour():
    down, up = edm.Conv2d(1, 1, 1, down=True), edm.Conv2d(1, 1, 1, up=True)
    for conv in (down, up):
        conv.weight.data.fill_(1.0)
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert down(x).item() == 1.5
    assert_close(
        up(x)[0, 0], torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    )


def test_patch_size_is_pixel_unshuffle_around_the_same_network():
    torch.manual_seed(0)
    folded = randomise(
        edm.SongUNet(8, 1, model_channels=8, channel_mult=[1, 2], num_blocks=1, patch_size=2)
    )
    plain = edm.SongUNet(4, 4, model_channels=8, channel_mult=[1, 2], num_blocks=1)
    plain.load_state_dict(folded.state_dict())
    folded.eval(), plain.eval()
    x, c = torch.randn(2, 1, 8, 8), torch.randn(2)
    assert_close(folded(x, c), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), c), 2))


def test_dropout_and_label_dropout_act_in_training_only(tiny):
    x, labels = torch.randn(64, 1, 8, 8), torch.ones(64, dtype=torch.long)
    assert_close(tiny(x, 1.0, labels), tiny(x, 1.0, labels), rtol=0, atol=0)
    tiny.train()
    assert not torch.equal(tiny(x, 1.0, labels), tiny(x, 1.0, labels))
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tiny.model.label_dropout = 1.0
    assert_close(tiny(x, 1.0, labels), tiny(x, 1.0, None))


def test_trainable_copy_is_deterministic_in_train_mode_and_leaves_the_original_frozen(tiny):
    tiny.requires_grad_(False)
    twin = edm.trainable_copy(tiny).train()
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert_close(twin(x, 1.0, labels), tiny(x, 1.0, labels), rtol=0, atol=0)
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in tiny.parameters())
    assert not any(m.training for m in tiny.modules())


def test_features_are_the_last_encoder_activation_of_each_resolution(tiny):
    x = torch.randn(2, 1, 8, 8)
    denoised, features = tiny(x, 1.0, return_features=True)
    assert [tuple(f.shape) for f in features] == [(2, 8, 4, 4), (2, 16, 2, 2)]
    assert_close(denoised, tiny(x, 1.0), rtol=0, atol=0)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("law", [(), (0.5, 1.7)])
def test_edm_loss_of_the_exact_denoiser_equals_quadrature(law):
    """x ~ N(0, 1): loss = E_σ[λ σ² / (1 + σ²)], λ = 1/σ² + 4, ln σ ~ N(-1.2, 1.2²), or others."""
    torch.manual_seed(0)
    x = torch.randn(400_000, 1, 1, 1, dtype=torch.float64)
    loss = edm.edm_loss(Gaussian(0.0, 1.0), x, None, *law)
    u = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    mean, std = law or (-1.2, 1.2)
    sigma = (std * u + mean).exp()
    density = (-(u**2) / 2).exp() / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(density * (1 + 4 * sigma**2) / (1 + sigma**2), u)
    assert_close(loss.item(), expected.item(), rtol=5e-3, atol=0)


def test_posterior_mean_in_closed_form():
    """Images m - a and m + a: E[x | x_t] = m + a tanh(a (x_t - m) / σ²). One image: that image."""
    images = torch.tensor([51, 255, 102], dtype=torch.uint8).view(3, 1, 1, 1)
    mean = edm.PosteriorMean(images, torch.tensor([0, 0, 1]))
    x_t = torch.tensor([0.7, -0.2, 3.0, 0.3]).view(4, 1, 1, 1)
    sigma = torch.tensor([0.5, 2.0, 1.0, 0.002])
    expected = [0.2 + 0.8 * math.tanh(0.8 * (v - 0.2) / s**2) for v, s in ((0.7, 0.5), (-0.2, 2.0))]
    with torch.autocast("cpu", torch.bfloat16):  # must not make it coarse
        x = mean(x_t, sigma, torch.tensor([0, 0, 1, 0]))
    assert_close(x.flatten(), torch.tensor([*expected, 102 / 127.5 - 1, 1.0]))
    assert mean(x_t, sigma, torch.full((4,), -1)).isnan().all()


def test_posterior_mean_as_target_keeps_the_gradient_and_calms_it():
    """D = a x_t / (σ² + 1/4), blind to labels: the same mean of dL/da, a third of its variance."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 1, 2), dtype=torch.uint8)
    classes = torch.arange(20) % 2
    target = edm.PosteriorMean(images, classes)
    a = torch.tensor(0.3, requires_grad=True)
    denoiser = Gaussian()
    denoiser.forward = lambda x, sigma, labels: a * x / edm.expand(sigma**2 + 0.25, x)
    gradients = []
    for seed in range(200):
        for t in (None, target):
            torch.manual_seed(seed)
            i = torch.randint(20, (200,))
            loss = edm.edm_loss(denoiser, edm.to_float(images[i]), classes[i], 1.0, 0.5, t)
            gradients.append(torch.autograd.grad(loss, a)[0])
    plain, calm = torch.stack(gradients).view(200, 2).unbind(1)
    difference = plain - calm
    assert difference.mean().abs() < 4 * difference.std() / 200**0.5
    assert calm.var() < plain.var() / 3


@pytest.mark.parametrize("stable", [False, True])
def test_stable_target_reaches_the_loss(tmp_path, monkeypatch, stable):
    cfg = edm.Config(model_channels=8, channel_mult="1", steps=1, stable_target=stable)
    cfg.device, cfg.out, seen, loss = "cpu", str(tmp_path), [], edm.edm_loss
    monkeypatch.setattr(edm, "edm_loss", lambda *args: seen.append(args) or loss(*args))
    images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 1, 8, 8)
    edm.train(cfg, edm.Run(cfg, "edm_teacher"), images, torch.tensor([0, 1]))
    ((_, x, labels, p_mean, p_std, target),) = seen
    assert (p_mean, p_std) == (-1.2, 1.2)
    assert (target is not None) == stable
    if stable:  # a class of one image: x itself
        assert_close(target(torch.randn_like(x), torch.ones(len(x)), labels), x)


def test_edm_loss_is_the_unweighted_error_of_the_raw_network(tiny):
    """λ(σ) |D - x|² = |F - target|², because λ c_out² = 1  (EDM Eq. 8)."""
    tiny.double()
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    torch.manual_seed(5)
    loss = edm.edm_loss(tiny, x)
    torch.manual_seed(5)
    sigma = (torch.randn(3) * 1.2 - 1.2).exp().double()
    n = edm.expand(sigma, x) * torch.randn_like(x)
    s = edm.expand(sigma, x)
    c_skip, c_out = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt()
    target = (x - c_skip * (x + n)) / c_out
    raw = tiny.model((x + n) / (s**2 + 0.25).sqrt(), sigma.log() / 4, torch.zeros(3, 4).double())
    assert_close(loss, (raw - target).square().mean())


# ---------------------------------------------------------------- sampler


def exact(z, mean, std, sigma_min=0.002, sigma_max=80.0):
    """The probability-flow ODE of N(mean, std²) solved down to σ_min, then one Euler step to 0."""
    x = mean + (z * sigma_max - mean) * math.sqrt((std**2 + sigma_min**2) / (std**2 + sigma_max**2))
    return (std**2 * x + sigma_min**2 * mean) / (std**2 + sigma_min**2)


def test_heun_is_of_second_order():
    """Halving the step quarters the error against the exact solution for N(0.3, 0.5²)."""
    z = torch.tensor([-1.5, -0.2, 0.7, 2.0], dtype=torch.float64).reshape(4, 1, 1, 1)
    errors = []
    for steps in (72, 144, 288):
        x = edm.heun_sampler(Gaussian(0.3, 0.5), z, steps=steps)
        errors.append((x - exact(z, 0.3, 0.5)).abs().max().item())
    assert 3.8 < errors[0] / errors[1] < 4.3
    assert 3.8 < errors[1] / errors[2] < 4.3


@pytest.mark.parametrize("steps", [1, 2, 18])
def test_heun_calls_the_network_2n_minus_1_times(steps):
    net = Gaussian()
    edm.heun_sampler(net, torch.randn(2, 1, 4, 4), steps=steps)
    assert len(net.calls) == 2 * steps - 1
    assert net.calls[0][0].item() == pytest.approx(80)
    if steps > 1:
        assert net.calls[-1][0].item() == pytest.approx(0.002)


def test_heun_levels_follow_eq_5():
    net = Gaussian()
    edm.heun_sampler(net, torch.randn(1, 1, 1, 1), steps=4, sigma_min=0.1, sigma_max=10.0, rho=3.0)
    levels = [net.calls[0].item()] + [c.item() for c in net.calls[1::2]]
    a, b = 10 ** (1 / 3), 0.1 ** (1 / 3)
    assert_close(levels, [(a + i / 3 * (b - a)) ** 3 for i in range(4)])


def test_one_heun_step_is_the_one_step_generator(tiny):
    """An Euler step from σ_max to 0 returns D(σ_max z; σ_max)."""
    z = torch.randn(2, 1, 8, 8)
    assert_close(edm.heun_sampler(tiny, z, steps=1), tiny(80 * z, 80.0).detach())


def test_churn_keeps_the_distribution():
    """With S_churn the samples of the exact denoiser of N(0.3, 0.5²) keep mean and spread."""
    torch.manual_seed(0)
    z = torch.randn(40_000, 1, 1, 1, dtype=torch.float64)
    x = edm.heun_sampler(Gaussian(0.3, 0.5), z, steps=200, s_churn=20.0, s_min=0.05, s_max=50.0)
    assert_close(x.mean().item(), 0.3, atol=0.01, rtol=0)
    assert_close(x.std().item(), 0.5, atol=0.01, rtol=0)
    plain = edm.heun_sampler(Gaussian(0.3, 0.5), z, steps=200)
    assert (x - plain).abs().mean() > 0.1  # noise was added
    quiet = edm.heun_sampler(Gaussian(0.3, 0.5), z, steps=200, s_churn=20.0, s_min=90.0)
    assert_close(quiet, plain, rtol=0, atol=0)


def test_guidance_extrapolates_from_unconditional_to_conditional(tiny):
    """D_u + w (D_c - D_u): w = 1 is D_c and needs one call, w = 0 is D_u."""
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 3])
    c, u = tiny(x, sigma, labels), tiny(x, sigma)
    assert_close(edm.guided(tiny, x, sigma, labels, 1.0), c, rtol=0, atol=0)
    assert_close(edm.guided(tiny, x, sigma, labels, 0.0), u)
    assert_close(edm.guided(tiny, x, sigma, labels, 2.5), u + 2.5 * (c - u))
    z = torch.randn(2, 1, 8, 8)
    assert not torch.allclose(
        edm.heun_sampler(tiny, z, labels, 3, guidance=3.0), edm.heun_sampler(tiny, z, labels, 3)
    )


# ---------------------------------------------------------------- training


def test_ema_update_moves_by_one_minus_decay():
    """ema <- 0.9 ema + 0.1 network."""
    ema, network = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(ema.weight, 1.0)
    torch.nn.init.constant_(network.weight, 2.0)
    edm.ema_update(ema, network, 0.9, 10**6)
    assert_close(ema.weight.item(), 1.1)
    assert network.weight.item() == 2.0


def test_training_approaches_the_exact_denoiser(tmp_path):
    """A teacher trained on constant images learns them: D(x_t; 1) is the constant."""
    cfg = edm.Config(
        model_channels=8, channel_mult="1", steps=300, batch=32, lr=2e-2, ema=0.9, out=str(tmp_path)
    )
    cfg.device = "cpu"
    torch.manual_seed(0)
    images = torch.full((64, 1, 8, 8), 200, dtype=torch.uint8)
    run = edm.Run(cfg, "edm_teacher")
    ema = edm.train(cfg, run, images, torch.zeros(64, dtype=torch.long))
    value = 200 / 127.5 - 1
    with torch.no_grad():
        x = ema(value + torch.randn(256, 1, 8, 8), 1.0, torch.zeros(256, dtype=torch.long))
    assert (x - value).abs().mean() < 0.1
    assert not ema.training
    assert ema.model.config["label_dim"] == 1


def test_label_dim_and_shapes_of_the_published_constructor_arguments():
    net = make_denoiser(TINY)
    assert (net.img_channels, net.img_resolution, net.label_dim) == (1, 8, 4)
    assert (net.sigma_data, net.sigma_min, net.sigma_max) == (0.5, 0.002, 80.0)


def test_options_of_the_sampler_reach_it(tiny, tmp_path, monkeypatch):
    """--sample-steps, --guidance, --s-churn."""
    seen, options = [], {"sample_steps": 3, "guidance": 2.0, "s_churn": 1.5}

    def sampler(denoiser, z, labels, **how):
        seen.append(how)
        return z

    monkeypatch.setattr(edm, "heun_sampler", sampler)
    edm.save_denoiser(tiny, tmp_path / "t.safetensors")
    cfg = edm.Config(sample=str(tmp_path / "t.safetensors"), out=str(tmp_path), n=2, **options)
    edm.main(cfg)
    assert seen == [{"steps": 3, "guidance": 2.0, "s_churn": 1.5}]
    with pytest.raises(edm.UserError, match="s-churn -1"):
        edm.main(edm.Config(s_churn=-1.0))
