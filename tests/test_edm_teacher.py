"""The denoiser: preconditioning, network, loss, guidance and sampler against closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Calls, Gaussian, make_denoiser, randomise
from torch import nn
from torch.testing import assert_close

import edm_teacher as edm

D64 = torch.float64
SIGMAS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=D64)
SMALL = {"img_resolution": 8, "img_channels": 1, "model_channels": 8, "num_blocks": 1}


class Recorder(nn.Module):
    """A raw network F that keeps its inputs and returns a fixed multiple of the first."""

    img_channels, img_resolution, label_dim = 1, 4, 3

    def __init__(self, factor=0.0):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=D64))

    def forward(self, x, noise, labels, return_features=False):
        self.x, self.noise, self.labels = x, noise, labels
        return self.factor * x


class Shrink(nn.Module):
    """Somebody's own network: the exact denoiser of N(0, ¼), D(x; σ) = x / (1 + 4 σ²)."""

    def forward(self, x, sigma, labels):
        return x / (1 + 4 * edm.expand(sigma, x) ** 2)


# ---------------------------------------------------------------- preconditioning


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_network_input_and_target_have_unit_variance_at_every_sigma(sd):
    """c_in² (σ² + σ_data²) = 1; Var[(y - c_skip (y + n)) / c_out] = 1, c_out the least possible.

    So c_skip = σ_data² / (σ² + σ_data²)  (EDM App. B.6, Table 1); c_noise = ln(σ) / 4."""
    net, x, one = edm.EDMPrecond(Recorder(1.0), sd), torch.ones(5, 1, 4, 4).double(), SIGMAS**0
    full = net(x, SIGMAS)[:, 0, 0, 0]  # c_skip + c_out c_in
    c_in = net.model.x[:, 0, 0, 0]
    net.model.factor.data.zero_()
    c_skip = net(x, SIGMAS)[:, 0, 0, 0]
    c_out = (full - c_skip) / c_in
    assert_close(c_in**2 * (SIGMAS**2 + sd**2), one)
    assert_close(((1 - c_skip) ** 2 * sd**2 + c_skip**2 * SIGMAS**2) / c_out**2, one)
    assert_close(c_skip * (SIGMAS**2 + sd**2) / sd**2, one)
    assert (c_out > 0).all()
    assert_close(net.model.noise, SIGMAS.log() / 4)


def test_labels_are_one_hot_and_minus_one_is_no_class(tiny):
    """The label -1 is a row of zeros, like no labels at all; other labels change the result."""
    net = edm.EDMPrecond(Recorder())
    net(torch.zeros(3, 1, 4, 4), 1.0, torch.tensor([0, 2, -1]))
    rows = [[1.0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert_close(net.model.labels, torch.tensor(rows, dtype=D64))
    x, none = torch.randn(2, 1, 8, 8), torch.tensor([-1, -1])
    assert_close(tiny(x, 1.0, none), tiny(x, 1.0), rtol=0, atol=0)
    assert not torch.allclose(tiny(x, 1.0, torch.tensor([1, 2])), tiny(x, 1.0), atol=1e-3)


def test_samples_of_a_batch_do_not_mix(tiny):
    """D of a batch = D of its samples one by one, each with its own σ and label."""
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.arange(3)
    alone = torch.cat([tiny(x[i : i + 1], sigma[i : i + 1], labels[i : i + 1]) for i in range(3)])
    assert_close(tiny(x, sigma, labels), alone, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- your own network


def test_any_module_becomes_a_denoiser():
    """Denoiser(network, shape, label_dim) is all: guidance and sampler take it."""
    net = edm.Denoiser(Shrink(), shape=(1, 2, 2), label_dim=3)
    z, labels = torch.randn(4, 1, 2, 2), torch.tensor([0, 1, 2, -1])
    assert_close(edm.guided(net, z, torch.ones(4), labels, 3.0), z / 5)
    x = edm.heun_sampler(net, z, labels, steps=200)
    assert_close(x, exact(z, 0.0, 0.5), atol=1e-3, rtol=0)


# ---------------------------------------------------------------- network


@pytest.mark.parametrize(
    ("label_dim", "count", "entries"), [(10, 55735299, 427), (0, 55733891, 425)]
)
def test_cifar10_configuration_has_the_published_size(label_dim, count, entries):
    """EDM's CIFAR-10 network, conditional or not: so many weights, by these names."""
    with torch.device("meta"):
        net = edm.SongUNet(32, 3, label_dim, 9, num_blocks=4, dropout=0.13)
    assert sum(p.numel() for p in net.parameters()) == count
    assert len(net.state_dict()) == entries
    names = "map_augment.weight enc.32x32_conv.bias enc.16x16_down.conv0.resample_filter "
    names += "enc.16x16_block0.qkv.weight dec.8x8_in0.norm2.bias dec.32x32_aux_conv.weight"
    assert {*names.split()} <= net.state_dict().keys()


def test_initial_weights_are_xavier_uniform():
    """Bound sqrt(6 / (fan_in + fan_out)); last layers 1e-5 of it, qkv sqrt(0.2) of it, biases 0."""
    torch.manual_seed(0)
    net = edm.SongUNet(8, 1, 4, model_channels=32, channel_mult=[2], num_blocks=1)
    block = net.dec["8x8_in0"]
    for layer, scale, fans in [
        (block.conv0, 1.0, 9 * (64 + 64)),
        (block.conv1, 1e-5, 9 * (64 + 64)),
        (block.qkv, math.sqrt(0.2), 64 + 192),
        (block.affine, 1.0, 128 + 64),
        (net.map_label, 1.0, 4 + 32),
    ]:
        bound = scale * math.sqrt(6 / fans)
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert_close(layer.weight.std().item(), bound / math.sqrt(3), rtol=0.1, atol=0)
        assert (layer.bias == 0).all()


def test_embedding_is_sines_then_cosines_plus_label_and_augmentation():
    """emb = [sin(c f), cos(c f)] + W (√K one-hot) + b + W' augment, f_i = 10000^(-i / (half - 1)).

    Two layers with silu follow."""
    torch.manual_seed(0)
    net = randomise(edm.SongUNet(**SMALL, label_dim=4, augment_dim=3, channel_mult=[1]))
    label, augment, c = torch.tensor([[0.0, 0, 1, 0]]), torch.randn(1, 3), torch.tensor([0.7])
    f = 10000.0 ** (-torch.arange(4) / 3)
    plain = torch.cat([(c * f).sin(), (c * f).cos()])
    more = 2 * net.map_label.weight[:, 2] + net.map_label.bias
    more = more + net.map_augment.weight @ augment[0]

    def layers(v):
        return F.silu(net.map_layer1(F.silu(net.map_layer0(v))))

    assert_close(net.embed(c, None, None)[0], layers(plain))
    assert_close(net.embed(c, label, augment)[0], layers(plain + more))


@pytest.mark.parametrize(("cin", "cout"), [(8, 8), (8, 16)])
def test_block_is_two_convolutions_and_a_skip_scaled_by_root_half(cin, cout):
    """(skip x + conv1 silu norm1(conv0 silu norm0 x + affine emb)) sqrt(½)."""
    torch.manual_seed(0)
    block = randomise(edm.UNetBlock(cin, cout, 16, 0.0))
    x, emb = torch.randn(2, cin, 4, 4), torch.randn(2, 16)

    def norm(v, layer):  # groups of 4 channels
        g = v.reshape(2, v.shape[1] // 4, -1)
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
    """Down: 0, 1, 2, 3 -> 1.5. Up: every pixel becomes four."""
    down, up = edm.Conv2d(1, 1, 1, down=True), edm.Conv2d(1, 1, 1, up=True)
    for conv in (down, up):
        conv.weight.data.fill_(1.0)
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert down(x).item() == 1.5
    four = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    assert_close(up(x)[0, 0], four)


def test_patch_size_is_pixel_unshuffle_around_the_same_network():
    """F(x) = shuffle(F'(unshuffle(x))), F' of a quarter of the pixels and 4 times the channels."""
    torch.manual_seed(0)
    folded = randomise(edm.SongUNet(**SMALL, channel_mult=[1, 2], patch_size=2)).eval()
    quarter = SMALL | {"img_resolution": 4, "img_channels": 4}
    plain = edm.SongUNet(**quarter, channel_mult=[1, 2]).eval()
    plain.load_state_dict(folded.state_dict())
    x, c = torch.randn(2, 1, 8, 8), torch.randn(2)
    assert_close(folded(x, c), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2), c), 2))


def test_dropout_and_label_dropout_act_in_training_but_not_in_a_trainable_copy(tiny):
    """A copy in train mode answers as the frozen teacher does; label dropout 1 is no label."""
    twin, x, labels = edm.trainable_copy(tiny), torch.randn(64, 1, 8, 8), torch.arange(64) % 4
    assert_close(twin(x, 1.0, labels), tiny(x, 1.0, labels), rtol=0, atol=0)
    assert twin.training
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in tiny.parameters())
    assert not any(m.training for m in tiny.modules())
    twin.model.label_dropout = 1.0
    assert_close(twin(x, 1.0, labels), twin(x, 1.0, None), rtol=0, atol=0)
    tiny.train().model.label_dropout = 0.0
    assert not torch.equal(tiny(x, 1.0, labels), tiny(x, 1.0, labels))


def test_features_are_the_last_encoder_activation_of_each_resolution(tiny):
    """Finest first; with "only" the decoder is not called, with True it changes nothing."""
    x, seen = torch.randn(2, 1, 8, 8), {}
    for name, block in tiny.model.enc.items():
        block.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    denoised, features = tiny(x, 1.0, return_features=True)
    assert_close(features, [seen["4x4_block0"], seen["2x2_block0"]], rtol=0, atol=0)
    assert_close(denoised, tiny(x, 1.0), rtol=0, atol=0)
    tiny.model.dec = None
    nothing, only = tiny(x, 1.0, return_features="only")
    assert nothing is None
    assert_close(only, features, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"img_resolution": 28}, {"model_channels": 200}])
def test_networks_that_cannot_be_built_are_refused(wrong):
    """28 pixels in patches of 2 cannot be halved twice; 200 channels make no 32 groups."""
    with pytest.raises(edm.UserError, match="choose another"):
        edm.SongUNet(**SMALL | {"channel_mult": (1, 1, 1), "patch_size": 2} | wrong)


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("law", [(), (0.5, 1.7)])
def test_edm_loss_of_the_exact_denoiser_equals_quadrature(law):
    """x ~ N(0, 1): loss = E_σ[λ σ² / (1 + σ²)], λ = 1/σ² + 4, ln σ ~ N(-1.2, 1.2²), or others."""
    torch.manual_seed(0)
    x = torch.randn(400_000, 1, 1, 1, dtype=D64)
    loss = edm.edm_loss(Gaussian(0.0, 1.0), x, None, *law)
    u = torch.linspace(-8, 8, 4001, dtype=D64)
    mean, std = law or (-1.2, 1.2)
    sigma = (std * u + mean).exp()
    density = (-(u**2) / 2).exp() / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(density * (1 + 4 * sigma**2) / (1 + sigma**2), u)
    assert_close(loss.item(), expected.item(), rtol=5e-3, atol=0)


# ---------------------------------------------------------------- guidance and sampler


def exact(z, mean, std, sigma_min=0.002, sigma_max=80.0):
    """The probability-flow ODE of N(mean, std²) solved down to σ_min, then one Euler step to 0."""
    x = mean + (z * sigma_max - mean) * math.sqrt((std**2 + sigma_min**2) / (std**2 + sigma_max**2))
    return (std**2 * x + sigma_min**2 * mean) / (std**2 + sigma_min**2)


def test_heun_is_of_second_order():
    """Halving the step quarters the error against the exact solution for N(0.3, 0.5²)."""
    z = torch.tensor([-1.5, -0.2, 0.7, 2.0], dtype=D64).reshape(4, 1, 1, 1)
    errors = []
    for steps in (72, 144, 288):
        x = edm.heun_sampler(Gaussian(0.3, 0.5), z, steps=steps)
        errors.append((x - exact(z, 0.3, 0.5)).abs().max().item())
    assert 3.8 < errors[0] / errors[1] < 4.3
    assert 3.8 < errors[1] / errors[2] < 4.3


def test_heun_calls_the_network_2n_minus_1_times_at_the_levels_of_eq_5():
    """t_i = (σ_max^1/ρ + i/(N-1) (σ_min^1/ρ - σ_max^1/ρ))^ρ; with churn t (1 + γ)  (EDM Alg. 2).

    γ = min(S_churn / N, √2 - 1) where S_min <= t <= S_max, else 0."""
    a, b = 10 ** (1 / 3), 0.1 ** (1 / 3)
    t = [(a + i / 3 * (b - a)) ** 3 for i in range(4)]
    for churn, factor in ((0.0, 1.0), (0.4, 1.1), (9.0, math.sqrt(2))):
        net, how = Gaussian(), {"sigma_min": 0.1, "sigma_max": 10.0, "rho": 3.0, "s_max": 9.0}
        edm.heun_sampler(net, torch.randn(1, 1, 1, 1), None, 4, **how, s_churn=churn, s_min=0.2)
        first, second = ([c.item() for c in net.calls[k::2]] for k in (0, 1))
        assert_close(first, [t[0], factor * t[1], factor * t[2], t[3]])
        assert_close(second, t[1:])  # the correction is evaluated where the step ends


def test_churn_keeps_the_distribution():
    """With S_churn the samples of the exact denoiser of N(0.3, 0.5²) keep mean and spread."""
    torch.manual_seed(0)
    z = torch.randn(40_000, 1, 1, 1, dtype=D64)
    x = edm.heun_sampler(Gaussian(0.3, 0.5), z, steps=200, s_churn=20.0, s_min=0.05, s_max=50.0)
    assert_close(x.mean().item(), 0.3, atol=0.01, rtol=0)
    assert_close(x.std().item(), 0.5, atol=0.01, rtol=0)
    assert (x - exact(z, 0.3, 0.5)).abs().mean() > 0.1  # noise was added


def test_guidance_extrapolates_from_unconditional_to_conditional(tiny):
    """D_u + w (D_c - D_u): w = 1 is D_c and needs one call, w = 0 is D_u."""
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([0, 3])
    c, u = tiny(x, sigma, labels), tiny(x, sigma)
    assert_close(edm.guided(tiny, x, sigma, labels, 1.0), c, rtol=0, atol=0)
    assert_close(edm.guided(tiny, x, sigma, labels, 0.0), u)
    assert_close(edm.guided(tiny, x, sigma, labels, 2.5), u + 2.5 * (c - u))
    with pytest.raises(edm.UserError, match="no classes"):
        edm.guided(tiny, x, sigma, None, 2.5)
    tiny.model.label_dropout = 0.0
    with pytest.warns(UserWarning, match="never saw images without a label"):
        edm.guided(tiny, x, sigma, labels, 2.5)


@pytest.mark.parametrize(
    "labels", [torch.arange(3), torch.tensor([0.0, 1.0]), torch.tensor([0, 4])]
)
def test_labels_of_another_number_type_or_range_are_refused(tiny, labels):
    with pytest.raises(edm.UserError, match=r"labels: expected 2 integers from -1 .* to 3\."):
        tiny(torch.randn(2, 1, 8, 8), 1.0, labels)
    with pytest.raises(edm.UserError, match="labels: this network has no classes"):
        make_denoiser(TINY | {"label_dim": 0})(torch.randn(2, 1, 8, 8), 1.0, labels)


def test_one_heun_step_is_the_one_step_generator(tiny):
    """An Euler step from σ_max to 0 returns D(σ_max z; σ_max), with guidance if wanted."""
    z, labels, top = torch.randn(2, 1, 8, 8), torch.tensor([0, 3]), torch.full((2,), 80.0)
    x = edm.heun_sampler(tiny, z, labels, 1, guidance=2.5)
    assert_close(x, edm.guided(tiny, 80 * z, top, labels, 2.5))


# ---------------------------------------------------------------- files and pictures


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_saved_denoiser_comes_back(tmp_path, tiny, dtype):
    """Weights bit for bit, or those of float16 as float32; σ_data, configuration, eval mode."""
    tiny.sigma_data = 0.7
    edm.save_denoiser(tiny.train(), tmp_path / "d.safetensors", dtype)
    again = edm.load_denoiser(tmp_path / "d.safetensors")
    for name, value in tiny.state_dict().items():
        wanted = value if dtype is None else value.to(dtype).float()
        assert_close(again.state_dict()[name], wanted, rtol=0, atol=0)
    assert (again.sigma_data, again.model.config) == (0.7, tiny.model.config)
    assert not again.training


def test_images_survive_the_way_to_floats_and_back():
    """x / 127.5 - 1; back to the nearest of 256 values (0.0039 is 128, not 127), clipped."""
    images = torch.arange(256, dtype=torch.uint8)
    assert (edm.to_float(images).min(), edm.to_float(images).max()) == (-1, 1)
    assert torch.equal(edm.to_uint8(edm.to_float(images)), images)
    assert edm.to_uint8(torch.tensor([-9.0, 0.0039, 9.0])).tolist() == [0, 128, 255]


def test_pictures_are_drawn_from_fixed_noise_and_leave_the_random_numbers_alone(tiny, tmp_path):
    """z and classes in turn whatever the training has drawn before."""
    seen = []

    def sampler(z, labels):
        seen.append((z, labels))
        return torch.rand_like(z)

    before = torch.get_rng_state()
    tiny.draw(tmp_path / "a.png", sampler, seed=5, n=300)
    assert torch.equal(torch.get_rng_state(), before)
    z, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))  # two batches
    assert torch.equal(z, edm.noise(tiny, 300, 5))
    assert labels.tolist() == [0, 1, 2, 3] * 75
    torch.rand(1)
    tiny.draw(tmp_path / "b.png", sampler, seed=5, n=300)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ---------------------------------------------------------------- training a teacher


def train(folder, images, labels, **options):
    cfg = edm.Config(**{"model_channels": 8, "channel_mult": "1", "device": "cpu"} | options)
    cfg.out = str(folder)
    return edm.train(cfg, edm.Run(cfg, "edm_teacher"), images, labels)


CONSTANT = torch.full((64, 1, 8, 8), 200, dtype=torch.uint8), torch.zeros(64, dtype=torch.long)


def test_ema_update_moves_by_one_minus_decay():
    """ema <- d ema + (1 - d) network, d = min(0.9, step / (4 + step))."""
    network = nn.Linear(1, 1)
    for step, decay in ((1, 0.2), (16, 0.8), (10**6, 0.9)):
        ema = nn.Linear(1, 1)
        wanted = decay * ema.weight + (1 - decay) * network.weight
        edm.ema_update(ema, network, 0.9, step)
        assert_close(ema.weight, wanted)


def test_training_approaches_the_exact_denoiser(tmp_path):
    """A teacher trained on constant images learns them: D(x_t; 1) is the constant."""
    torch.manual_seed(0)
    ema = train(tmp_path, *CONSTANT, steps=300, batch=32, lr=2e-2, ema=0.9)
    value, none = 200 / 127.5 - 1, torch.zeros(256, dtype=torch.long)
    with torch.no_grad():
        x = ema(value + torch.randn(256, 1, 8, 8), 1.0, none)
    assert (x - value).abs().mean() < 0.1
    assert not ema.training
    wanted = {"label_dim": 1, "patch_size": 2, "channel_mult": [1], "label_dropout": 0.1}
    assert ema.model.config == ema.model.config | wanted | {"model_channels": 8, "num_blocks": 1}


def test_learning_rate_warms_up_and_decays_along_a_cosine(tmp_path, monkeypatch):
    """lr min(1, k / 200) (1 + cos(π k / K)) / 2 at step k of K: three quarters, a quarter, 0.

    What is drawn is the average."""
    rates, rate_of = [], lambda update: update.optimizer.param_groups[0]["lr"]
    Calls(monkeypatch, edm.Run, "update", lambda update: rates.append(rate_of(update)))
    drawn = Calls(monkeypatch, edm.Denoiser, "draw")
    ema = train(tmp_path, *CONSTANT, steps=3, batch=2, lr=0.2)
    assert [call.self for call in drawn] == [ema]
    assert_close(rates, [0.2 * 1 / 200 * 0.75, 0.2 * 2 / 200 * 0.25, 0.0])


def test_a_teacher_can_start_from_another(tmp_path):
    """--init: with a learning rate of 0 the result is that file's network; it has to fit."""
    torch.manual_seed(0)
    before, path = randomise(make_denoiser(TINY)), tmp_path / "init.safetensors"
    edm.save_denoiser(before, path)
    images, labels = CONSTANT[0], torch.arange(64) % 4
    options = {"init": str(path), "lr": 0.0, "steps": 1, "batch": 4}
    after = train(tmp_path / "a", images, labels, **options)
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())
    with pytest.raises(edm.UserError, match=r"--init .*init.safetensors"):
        train(tmp_path / "b", images, labels % 2, **options)
