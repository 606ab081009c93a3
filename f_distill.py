"""f-distill: DMD2 with its gradient weighted by h(r), so that it descends any f-divergence.

Papers      [f-distill] Xu et al. 2025, arXiv 2502.15681        [DMD2] 2405.14867, [EDM] 2206.00364
Objects     teacher    D_real(x_t, σ)   EDM denoiser of the data (edm_teacher.py)       frozen
            generator  G(x_t, σ)        N calls, one by default; starts from teacher    trained
            fake       D_fake(x_t, σ)   denoiser of the generator's samples; same start trained
            discriminator               head on the fake's encoder: its logit is log r  trained
            r = p/q    (B,)             density of noisy data over that of noisy samples
Shapes      x, z, eps, real: (B, C, H, W), x in [-1, 1]; sigma, labels: (B,); logits: (B, heads)
Differences from the paper, most of them because the demo has minutes on two CPU cores
            1. AdamW, learning rates, GAN weights and EMA of dmd2_cifar.py; paper, CIFAR-10: batch
               2048, 1e-4, GAN weight 1e-3 with R1, features of 32 x 32, 16 x 16 and 8 x 8 pixels
            2. bins and clips of r are FastGen's, but our bins are equally likely in training; its
               are even in σ, where most of them are hardly ever hit
            3. neyman is not the paper's, but FastGen's
Run         python f_distill.py                 # MNIST, js: 4.5 minutes on 2 CPU cores; MNIST-FD
                                                # 0.039 ± 0.003 (n = 10,000, 3 seeds)
            python f_distill.py --data mixture  # seven divergences in two dimensions, two minutes
            diff -w dmd2_cifar.py f_distill.py  # what the paper adds
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import edm_teacher as edm
from edm_teacher import EDMPrecond, Run, UserError, expand, guided, heun_sampler

# ------------------------------------------------------------------------------------------------
# 1. The method                                                    f-distill Table 1; DMD2 §3, §4
# ------------------------------------------------------------------------------------------------


# --- the generator: one step, or N with fresh noise between them (DMD2 §4.4, §4.5) ---
def karras_sigma(
    u: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """σ(u) = (σ_min^1/ρ + u (σ_max^1/ρ - σ_min^1/ρ))^ρ, u in [0, 1], u = 1: σ_max  (EDM Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def sigma_of(denoiser, u: Tensor) -> Tensor:
    """σ(u) on the noise axis of the denoiser: EDM's, or a large backbone's own."""
    if hasattr(denoiser, "sigma_of"):
        return denoiser.sigma_of(u)
    return karras_sigma(u, denoiser.sigma_min, denoiser.sigma_max)


def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def sampling_sigmas(generator, steps: int) -> Tensor:
    """σ_k = σ(u = 1 - k/N), k = 0 ... N-1: DMD2's times 999, 749, 499, 249 on the EDM axis."""
    u = 1 - torch.arange(steps) / steps
    sigma = sigma_of(generator, u)
    sigma[0] = generator.sigma_max  # not a rounding error beside it
    return sigma


def backward_simulation(
    generator, z: Tensor, labels: Tensor | None, steps: int, k: int, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x_t, σ_k): what the generator sees at step k of N after its own steps 0 ... k-1, no grad.

    Training on the sampler's own inputs (DMD2 §4.5); with `real` images on real + σ_k ε instead.
    """
    sigma = sampling_sigmas(generator, steps).to(z.device)[:, None].expand(-1, len(z))
    if real is not None and k > 0:
        return diffuse(real, sigma[k]), sigma[k]
    x_t = generator.sigma_max * z
    with torch.no_grad():
        for i in range(k):
            x_t = diffuse(generator(x_t, sigma[i], labels), sigma[i + 1])
    return x_t, sigma[k]


def generate(generator, z: Tensor, labels: Tensor | None = None, steps: int = 1) -> Tensor:
    """The sampler: N network calls, with N = 1  x = G(σ_max z; σ_max, y)  (DMD2 §4.4).

    z: unit Gaussian noise (B, C, H, W).   labels: (B,) or None.
    """
    x_t, sigma = backward_simulation(generator, z, labels, steps, steps - 1)
    return generator(x_t, sigma, labels)


# --- distribution matching, as in DMD (DMD2 §3, Eq. 2) ---
def dmd_weight(
    x: Tensor, denoised_real: Tensor, sigma: Tensor | None = None, kind: str = "paper"
) -> Tensor:
    """The factor on D_fake - D_real, i.e. w_t / σ²: (B, 1, 1, 1); without gradient.

    paper   1 / mean|D_real - x|, the mean of each sample, i.e. w_t = σ² C S / |D_real - x|₁  (DMD
            Eq. 8): gradients of one size at every σ. In the post's text a fraction bar got lost.
    kl      1 / σ²: w_t = 1, the gradient of the KL divergence itself
    sigma   1 / σ: w_t = σ;   sigma3: σ: w_t = σ³   (the other weights of DMD Table 2)
    post    the post's code: clamp((σ² + 1) / (mean|D_real - x| + 1e-5), 0.1, 10) / (σ² + 1e-8)
    """
    error = (x - denoised_real).abs().flatten(1).mean(1).detach()
    if kind == "paper":
        weight = 1 / error.clamp_min(1e-8)  # where x = D_real a gradient of 0 stays 0, never 0/0
    elif kind == "post":
        weight = ((sigma**2 + 1) / (error + 1e-5)).clamp(0.1, 10) / (sigma**2 + 1e-8)
    elif kind in ("kl", "sigma", "sigma3"):
        weight = sigma ** {"kl": -2, "sigma": -1, "sigma3": 1}[kind]
    else:
        raise UserError(f"--weighting {kind}: choose paper, kl, sigma, sigma3 or post.")
    return expand(weight, x)


def dmd_gradient(denoised_fake: Tensor, denoised_real: Tensor, weight: Tensor) -> Tensor:
    """∇_x KL(fake || real), up to the weight:  w (D_fake - D_real)  (DMD Eq. 7, Alg. 2).

    Points uphill: the generator descends it. The same for every noise schedule with α = 1.
    """
    return weight * (denoised_fake - denoised_real)


def surrogate_loss(x: Tensor, grad: Tensor) -> Tensor:
    """½ mean (x - sg[x - grad])²: its derivative is dL/dx = grad / numel  (DMD Alg. 2).

    Mean over batch, channels and pixels. Its value says nothing about progress.
    """
    return 0.5 * F.mse_loss(x, (x - grad).detach())


# --- the fake's own loss, as in DMD ---
def fake_loss(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """mean (1/σ² + 1/σ_data²) (D_fake(x_t; σ) - x)²  (DMD Eq. 6, Alg. 3): EDM's weight.

    x: samples of the generator, detached.   Mean over batch, channels and pixels.
    """
    weight = 1 / sigma**2 + 1 / sigma_data**2
    return (expand(weight, x) * (denoised - x) ** 2).mean()


# --- the GAN on noised images (DMD2 §4.3) ---
def gan_diffuse(x: Tensor, teacher, gan_noise: float) -> tuple[Tensor, Tensor]:
    """(x_t, σ) for the discriminator, at noise levels of its own: σ(u), u ~ U(0, gan_noise)."""
    u = gan_noise * torch.rand(len(x), device=x.device)
    sigma = sigma_of(teacher, u)
    return diffuse(x, sigma), sigma


def gan_generator_loss(logits_fake: Tensor) -> Tensor:
    """mean softplus(-l) = mean -log sigmoid(l)  (DMD2 Eq. 4, second term, non-saturating)."""
    return F.softplus(-logits_fake).mean()


def gan_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """mean softplus(-l_real) + mean softplus(l_fake); the best l is log p_real / p_fake.

    The logistic pair of the official code; DMD2 Eq. 4 as printed has no lower bound.
    """
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def r1_penalty(logits: Tensor, logits_perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)², n ~ N(0, I): |∇l|² as std -> 0, at first order.

    Both logits are those of the same noisy real image x_t at the same σ. APT (arXiv 2501.08316) and
    FastGen do not divide: their weight times std² is ours.
    """
    return ((logits_perturbed - logits) / std).square().mean()


def gan_gradient(x: Tensor, logits_of) -> tuple[Tensor, Tensor]:
    """(L_G, numel ∂L_G/∂x) for logits = logits_of(x): in the units of dmd_gradient.

    So the two gradients add up, and their sizes can be compared. No network gets a gradient.
    """
    x = x.detach().requires_grad_()
    loss = gan_generator_loss(logits_of(x))
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad * x.numel()


# --- the weight of an f-divergence (f-distill Table 1) ---
F_DIVERGENCES = {  # D_f = E_q f(r), r = p/q -> h(r) = r² f''(r), the factor on the DMD gradient
    "rkl": torch.ones_like,  # reverse KL, f = -log r: DMD2
    "kl": lambda r: r,  # forward KL, f = r log r
    "js": lambda r: r / (1 + r),  # Jensen-Shannon, f = r log r - (r + 1) log((r + 1) / 2)
    "sf": lambda r: 1 / (1 + r),  # softened reverse KL, f = (r + 1) log(1/2 + 1/(2r))
    "sh": lambda r: r.sqrt() / 4,  # squared Hellinger, f = 1 - √r
    "jf": lambda r: 1 + r,  # Jeffreys, f = (r - 1) log r
    "neyman": lambda r: 2 / r,  # Neyman's χ², f = (1 - r)² / r; in FastGen, not in the paper
}


def density_ratio(logits: Tensor, lower: float, upper: float) -> Tensor:
    """r = p/q = exp(l), l the mean over heads, clipped to [lower, upper]: (B,); no gradient.

    The best discriminator has l = log p/q; ours is not the best one, so r is normalised below.
    """
    return logits.detach().mean(1).exp().clamp(lower, upper)


class RatioMean(nn.Module):
    """r / E_q[r] for each bin of noise levels, as E_q[p/q] = 1; E_q is a moving average.

    u: (B,) in [0.02, 0.98], uniform in training, so that all bins are equally likely.
    """

    def __init__(self, bins: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.ones(bins))

    def forward(self, r: Tensor, u: Tensor) -> Tensor:
        bins = len(self.mean)
        i = ((u - 0.02) / 0.96 * bins).long().clamp(0, bins - 1)
        count = edm.averaged(torch.bincount(i, minlength=bins).to(r))
        now = edm.averaged(torch.zeros_like(self.mean).index_add(0, i, r)) / count.clamp(min=1e-9)
        self.mean = torch.where(count > 0, self.mean.lerp(now, 1 - self.decay), self.mean)
        return r / self.mean[i]


def normalise_h(h: Tensor) -> Tensor:
    """h / mean(h): over the batch the gradient keeps the size that it has without h."""
    return h / edm.averaged(h.mean())


# ------------------------------------------------------------------------------------------------
# 2. The two updates                                                                    DMD2 §4.6
# ------------------------------------------------------------------------------------------------


def generator_step(generator, teacher, fake, discriminator, cfg, inputs: tuple, ratio_mean):
    """Step A: (loss of the generator, its samples x detached, what to log)  (DMD2 Eq. 2, Eq. 4).

    inputs: (x_t, σ, labels) of the generator. Gradients reach it alone: both are computed at x,
    then sent through it. They are logged as root mean squares with their weights in, so equal
    numbers pull equally hard.
    """
    x, labels = generator(*inputs), inputs[-1]
    backbone = fake if cfg.gan_features == "fake" else teacher
    total, log = torch.zeros_like(x), {}
    if cfg.dm_weight:
        u = 0.02 + 0.96 * torch.rand(len(x), device=x.device)  # the ends' scores are useless
        sigma = sigma_of(teacher, u)
        with torch.no_grad():
            x_t = diffuse(x, sigma)
            denoised_real = guided(teacher, x_t, sigma, labels, cfg.guidance)
            denoised_fake = fake(x_t, sigma, labels)
            weight = dmd_weight(x, denoised_real, sigma, cfg.weighting)
            grad = cfg.dm_weight * dmd_gradient(denoised_fake, denoised_real, weight)
            logits = discriminator(backbone, x_t, sigma, labels)
            r = ratio_mean(density_ratio(logits, cfg.ratio_lower, cfg.ratio_upper), u)
            h = normalise_h(F_DIVERGENCES[cfg.f](r))
            grad = expand(h, x) * grad
        log |= {"smallest h": h.min(), "largest h": h.max()}
        gap = (denoised_fake - denoised_real).abs().mean()
        log |= {"|grad|": grad.square().mean().sqrt(), "|D_fake - D_real|": gap}
        total = total + grad
    if cfg.gan_weight:
        loss, grad = gan_gradient(
            x, lambda x: discriminator(backbone, *gan_diffuse(x, teacher, cfg.gan_noise), labels)
        )
        grad = cfg.gan_weight * grad
        log |= {"|GAN grad|": grad.square().mean().sqrt(), "GAN loss": loss}
        total = total + grad
    return surrogate_loss(x, total), x.detach(), log


def fake_step(fake, teacher, discriminator, cfg, x, labels, real, real_labels=None):
    """Step B: (loss, what to log): denoising of detached samples x, and real against generated.

    With gan_features = fake the discriminator's loss also trains the encoder of the fake.
    """
    sigma = sigma_of(fake, torch.rand(len(x), device=x.device))
    loss = fake_loss(fake(diffuse(x, sigma), sigma, labels), x, sigma, fake.sigma_data)
    log = {"fake loss": loss}
    backbone = fake if cfg.gan_features == "fake" else teacher
    x_t, sigma = gan_diffuse(torch.cat([real, x]), teacher, cfg.gan_noise)
    both = None if labels is None else torch.cat([real_labels, labels])
    logits_real, logits_fake = discriminator(backbone, x_t, sigma, both).chunk(2)
    gan = gan_discriminator_loss(logits_real, logits_fake)
    loss = loss + cfg.discriminator_weight * gan
    log |= {"logit real": logits_real.mean(), "logit generated": logits_fake.mean()}
    if cfg.r1_weight:
        x_t, sigma = x_t[: len(real)], sigma[: len(real)]
        x_t = x_t + cfg.r1_std * torch.randn_like(x_t)
        perturbed = discriminator(backbone, x_t, sigma, real_labels)
        log["R1"] = r1_penalty(logits_real, perturbed, cfg.r1_std)
        loss = loss + cfg.r1_weight * log["R1"]
    return loss, log


# ------------------------------------------------------------------------------------------------
# 3. Networks: generator and fake are copies of the teacher, the discriminator is a head
# ------------------------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """One head on each chosen feature map of a denoiser's encoder -> logits (B, heads).

    Head: 4 x 4 convolutions with stride 2 down to 4 x 4 pixels, one over all that is left, linear
    (DMD2 App. F.1). resolutions: of the feature maps; none: the coarsest, as in the paper.
    """

    def __init__(self, denoiser, resolutions=()):
        super().__init__()
        with torch.no_grad():  # one picture through the encoder tells the shapes
            x = torch.zeros(1, *denoiser.shape, device=next(denoiser.parameters()).device)
            _, features = denoiser(x, 1.0, return_features="only")
        found = [f.shape[-1] for f in features]
        if not set(resolutions) <= set(found):
            raise UserError(f"--gan-levels {resolutions}: this network has {found}.")
        self.chosen = [found.index(r) for r in resolutions] or [len(found) - 1]
        features = [features[i].flatten(2, -2) for i in self.chosen]  # video: frames in a column
        self.heads = nn.ModuleList(self.head(f.shape[1], min(f.shape[2:])) for f in features)

    @staticmethod
    def head(channels: int, size: int) -> nn.Sequential:
        layers, width = [], min(channels, 512)  # of a large transformer it would outgrow all else
        while size > 1:
            kernel, stride, padding = (4, 2, 1) if size > 4 else (size, size, 0)
            layers += [nn.Conv2d(channels, width, kernel, stride, padding)]
            channels = width
            layers += [edm.group_norm(channels), nn.SiLU()]
            size = (size + 2 * padding - kernel) // stride + 1
        return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1), nn.Flatten())

    def forward(self, backbone, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        _, features = backbone(x_t, sigma, labels, return_features="only")
        features = [features[i].flatten(2, -2).float() for i in self.chosen]
        with torch.autocast(x_t.device.type, enabled=False):  # logits in full precision
            return torch.cat([h(f) for h, f in zip(self.heads, features, strict=True)], 1)


def load_teacher(cfg) -> EDMPrecond:
    """--teacher, else the shipped one for this data set; frozen, in eval mode."""
    if edm.is_large(cfg.teacher):
        import diffusers_backbones

        return diffusers_backbones.load_teacher(cfg)
    path = Path(cfg.teacher) if cfg.teacher else edm.asset(cfg.data, "teacher")
    if not cfg.teacher and not path.exists():
        raise UserError(
            f"No teacher for {cfg.data} is shipped: train one with python edm_teacher.py "
            f"--data {cfg.data}, then add --teacher runs/edm_teacher-0/teacher.safetensors."
        )
    return edm.load_denoiser(path, cfg.device).requires_grad_(False)


def synthetic_teacher(cfg, run: Run) -> EDMPrecond:
    """For --data synthetic a small teacher is trained on the spot, once for a run folder."""
    path = run.path("teacher") / "teacher.safetensors"
    if not path.exists():
        small = {"model_channels": 16, "steps": 300, "batch": 64, "data": "synthetic"}
        own = edm.Config(
            **small, out=str(path.parent), resume=True, device=cfg.device, seed=cfg.seed
        )
        torch.manual_seed(cfg.seed)
        images, labels = edm.load_data("synthetic")
        inner = Run(own, "edm_teacher")
        inner.command = run.command  # what to type after Ctrl-C
        edm.save_denoiser(edm.train(own, inner, images, labels), path)
    return edm.load_denoiser(path, cfg.device).requires_grad_(False)


# --- --data mixture: two dimensions, an exact teacher, a generator that is a single Gaussian ---
class Mixture(nn.Module):
    """The exact denoiser of Σ_k w_k N(m_k, s² I) in two dimensions; x: (B, 2, 1, 1).

    D(x; σ) = Σ_k p(k | x) (σ² m_k + s² x) / (σ² + s²).
    """

    sigma_min, sigma_max, label_dim, img_channels, img_resolution = 0.002, 80.0, 0, 2, 1

    def __init__(self, means=((-1.0, 0.0), (1.0, 0.0)), weights=(0.6, 0.4), std: float = 0.2):
        super().__init__()
        self.register_buffer("means", torch.tensor(means))
        self.register_buffer("weights", torch.tensor(weights))
        self.std = std

    def forward(self, x: Tensor, sigma: Tensor, labels=None) -> Tensor:
        v, s2 = x.flatten(1)[:, None], sigma[:, None, None] ** 2  # (B, 1, 2), (B, 1, 1)
        var = s2 + self.std**2
        logits = self.weights.log() - ((v - self.means) ** 2 / (2 * var)).sum(2)
        denoised = (s2 * self.means + self.std**2 * v) / var
        return (logits.softmax(1)[:, :, None] * denoised).sum(1).reshape(x.shape)

    def sample(self, n: int) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True)
        x = self.means[k] + self.std * torch.randn(n, 2, device=k.device)
        return x.reshape(n, 2, 1, 1)


class Perceptron(nn.Module):
    """A network for EDMPrecond in two dimensions: three hidden layers, the last is the feature."""

    img_channels, img_resolution, label_dim = 2, 1, 0

    def __init__(self, width: int = 128):
        super().__init__()
        sizes = [3, width, width, width]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 2)

    def forward(self, x, noise_labels, class_labels=None, return_features=False):
        h = self.body(torch.cat([x.flatten(1), noise_labels[:, None]], 1))
        features = [h[:, :, None, None]]
        if return_features == "only":
            return None, features
        out = self.head(h).reshape(x.shape)
        return (out, features) if return_features else out


class Affine(nn.Module):
    """G(σ_max z) = A z + b: the generator that cannot have two modes. It starts left of 0."""

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.eye(2))
        self.bias = nn.Parameter(torch.tensor([-0.5, 0.0]))

    def forward(self, x_t: Tensor, sigma: Tensor, labels=None) -> Tensor:
        z = x_t.flatten(1) / sigma[:, None]
        return (z @ self.weight.T + self.bias).reshape(x_t.shape)


# ------------------------------------------------------------------------------------------------
# 4. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = "mnist"  # mixture, mnist, cifar10, synthetic, or a folder of class folders
    data_dir: str = "data"  # where data sets are, or are downloaded to
    teacher: str = ""  # .safetensors of edm_teacher.py, or sd15:PATH, sdxl:, flux:, wan:, ...
    steps: int = 0  # generator updates; default: 300, on cifar10 150; paper 60,000 iterations
    batch: int = 32  # samples an update; paper, CIFAR-10: 2048
    ratio: int = 5  # updates of fake and discriminator per generator update; paper 5
    sampling_steps: int = 1  # network calls N of the generator, also for --sample
    multistep_input: str = "simulation"  # inputs of steps 2..N: simulation, or data (noised)
    f: str = "js"  # divergence: rkl (DMD2), kl, js (Jensen-Shannon), sf, sh, jf, neyman
    ratio_lower: float = 0.1  # smallest and ...
    ratio_upper: float = 20.0  # largest density ratio r; FastGen 0.1, 20
    ratio_bins: int = 10  # bins of noise levels in which r is divided by its mean
    ratio_ema: float = 0.9  # decay of these means; FastGen 0, on ImageNet 0.5
    dm_weight: float = 1.0  # weight of the distribution matching gradient; 0: GAN alone
    weighting: str = "paper"  # weight over noise levels: paper, kl, sigma, sigma3, post
    gan_weight: float = 0.02  # weight of the GAN in the generator; paper 1e-3; 0: head for r only
    discriminator_weight: float = 0.1  # weight of its loss beside the fake's; official code 1e-2
    gan_features: str = "fake"  # whose encoder the head reads: fake (as DMD2), teacher (frozen)
    gan_levels: str = ""  # resolutions of the feature maps, like 16,8; default: the coarsest
    pairs: int = 1000  # latents that sd15:PATH and the like make for it without a --data FOLDER
    gan_noise: float = 1.0  # largest u of the GAN's noise levels sigma(u); r is known there alone
    r1_weight: float = 0.0  # weight of the approximate R1 penalty; 0: none
    r1_std: float = 0.1  # size of its perturbation
    guidance: float = 1.0  # classifier-free guidance of the teacher; 1 is off
    teacher_steps: int = 18  # Heun steps N of the teacher in the verdict: 2 N - 1 calls; 0: none
    lr_generator: float = 1e-3  # learning rate of the generator; paper, CIFAR-10: 1e-4
    lr_fake: float = 1e-3  # of fake and discriminator; paper, CIFAR-10: 1e-4
    beta1: float = 0.0  # AdamW's decay of the mean gradient
    beta2: float = 0.99  # AdamW's decay of the squared gradient
    warmup: int = 0  # generator updates until the learning rates are full
    ema: float = 0.995  # decay of the average that is the result, d of ema_update
    clip: float = 10.0  # largest gradient norm of a network
    prompts: str = ""  # for sd15:PATH and the like: a file of prompts, one a line
    size: str = ""  # of their pictures: height,width[,frames]; default: the model's
    lora_rank: int = 0  # trains adapters on one copy of their weights; 0: copies
    gradient_checkpointing: bool = False  # of their blocks: less memory, more time
    amp: bool = False  # bfloat16 autocast: faster where the hardware has it
    sample: str = ""  # only draw --n pictures from this generator.safetensors
    labels: str = ""  # classes for --sample, like 3,1,4; default: all in turn
    n: int = 64  # pictures of --sample
    benchmark: int = 0  # only time this many steps; without --teacher of an untrained network
    eval_n: int = 1000  # samples behind the numbers of the verdict
    fid: bool = False  # measure FID too (pip install torch-fidelity); slow without a GPU
    seed: int = 0  # of everything random
    device: str = "auto"  # cuda, cpu, mps; auto: cuda if there is one, else cpu
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/f_distill-<k>
    resume: bool = False  # go on with the run in --out, or the last one
    save_every: int = 100  # generator updates between checkpoints


# ------------------------------------------------------------------------------------------------
# 5. Training                                                                           DMD2 §4.6
# ------------------------------------------------------------------------------------------------


def train(cfg: Config, run: Run, teacher: EDMPrecond, images, classes) -> EDMPrecond:
    """Alternates the two updates; returns the average of the generator's weights.

    images, classes: uint8 real images and their labels.
    """
    device = torch.device(cfg.device)
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    discriminator = Discriminator(fake, edm.numbers(cfg.gan_levels)).to(device)
    both = nn.ModuleDict({"fake": fake, "discriminator": discriminator})  # share an optimiser
    ratio_mean = RatioMean(cfg.ratio_bins, cfg.ratio_ema).to(device)
    adam = {"betas": (cfg.beta1, cfg.beta2), "weight_decay": 0.01, "fused": True}
    edm.shard(generator, fake, ema, *discriminator.heads)
    optimizer_generator = torch.optim.AdamW(generator.parameters(), cfg.lr_generator, **adam)
    optimizer_fake = torch.optim.AdamW(both.parameters(), cfg.lr_fake, **adam)
    parts = {"generator": generator, "both": both, "ema": ema, "ratio_mean": ratio_mean}
    parts |= {"optimizer_generator": optimizer_generator, "optimizer_fake": optimizer_fake}
    batch = edm.rows(cfg.batch)  # of this process
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cfg.amp)

    def draw():
        """((x_t, σ, labels) for one of the generator's steps, real images, their labels)"""
        z, real, real_labels = torch.randn(batch, *teacher.shape, device=device), None, None
        labels = torch.randint(max(teacher.label_dim, 1), (batch,), device=device)
        if images is not None:
            i = torch.randint(len(images), (batch,))
            real, real_labels = edm.to_float(images[i].to(device)), classes[i].to(device)
        noised = real if cfg.multistep_input == "data" else None
        labels = labels if noised is None else real_labels
        if not teacher.label_dim:
            labels = real_labels = None
        k = int(torch.randint(cfg.sampling_steps, ()))
        with autocast():
            inputs = backward_simulation(generator, z, labels, cfg.sampling_steps, k, noised)
        return (*inputs, labels), real, real_labels

    for step in run.loop(cfg.steps, **parts):
        for optimizer, lr in (optimizer_generator, cfg.lr_generator), (optimizer_fake, cfg.lr_fake):
            optimizer.param_groups[0]["lr"] = lr * min(1, step / max(cfg.warmup, 1))
        # Step A: the generator
        inputs, real, real_labels = draw()
        with autocast():
            nets = generator, teacher, fake, discriminator
            loss, x, log = generator_step(*nets, cfg, inputs, ratio_mean)
        update(optimizer_generator, loss, generator, cfg, run, step, log | {"generator loss": loss})
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: fake and discriminator, first on the same x
        for i in range(cfg.ratio):
            if i:
                inputs, real, real_labels = draw()
                with torch.no_grad(), autocast():
                    x = generator(*inputs)
            given = x, inputs[-1], real, real_labels
            with autocast():
                loss, more = fake_step(fake, teacher, discriminator, cfg, *given)
            log |= more
            update(optimizer_fake, loss, both, cfg, run, step, log)
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            pictures(run, step, ema, teacher, fake, cfg)
    return edm.whole(ema, teacher)


def update(optimizer, loss: Tensor, network, cfg, run: Run, step: int, log: dict) -> None:
    """One optimiser step with clipped gradients; a NaN stops the run, not the weights."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
    run.check_finite(step, log | {"gradient norm": norm})
    optimizer.step()


# ------------------------------------------------------------------------------------------------
# 6. Pictures, evaluation, verdict
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def pictures(run: Run, step: int, generator, teacher, fake, cfg: Config) -> None:
    """samples_<step>.png from fixed z; denoised.png: x, x_t, D_real and D_fake at σ = 1."""
    if edm.is_large(cfg.teacher):
        sampler = partial(generate, generator, steps=cfg.sampling_steps)
        return generator.pictures(run.path(f"samples_{step}.png"), sampler, cfg.seed)
    device = torch.device(cfg.device)
    labels = edm.sample_labels("", 32, teacher.label_dim)
    labels = None if labels is None else labels.to(device)
    z = edm.noise(teacher, 32, cfg.seed + 20000).to(device)
    with edm.own_random_numbers(cfg.seed + 20000):
        x = generate(generator, z, labels, cfg.sampling_steps)
    edm.save_rows(run.path(f"samples_{step}.png"), {f"generator, step {step}": x})
    x, labels = x[:16], None if labels is None else labels[:16]
    sigma = torch.full((16,), 1.0, device=device)
    x_t = x + edm.noise(teacher, 16, cfg.seed + 30000).to(device)
    rows = {"x = G(z)": x, "x_t = x + ε": x_t, "D_real(x_t; 1)": teacher(x_t, sigma, labels)}
    edm.save_rows(run.path("denoised.png"), rows | {"D_fake(x_t; 1)": fake(x_t, sigma, labels)})


def evaluate(cfg: Config, run: Run, generator, teacher, metric) -> dict:
    """Rows of the verdict, all at the same n, and samples.png: the same rows from the same z."""
    n, device, seed = min(cfg.eval_n, len(metric.test)), torch.device(cfg.device), cfg.seed + 20000
    nfe = edm.network_calls(cfg.teacher_steps, cfg.guidance, teacher.label_dim)
    many_steps = partial(heun_sampler, teacher, steps=cfg.teacher_steps, guidance=cfg.guidance)
    few_steps = partial(generate, generator, steps=cfg.sampling_steps)
    samplers = {"teacher": (many_steps, nfe)} if cfg.teacher_steps else {}
    samplers |= {  # start: what the generator was before training
        "start": (partial(generate, teacher, steps=cfg.sampling_steps), cfg.sampling_steps),
        "generator": (few_steps, cfg.sampling_steps),
    }
    rows, grids = {}, {}
    z, labels = edm.noise(teacher, 64, seed), edm.sample_labels("", 64, teacher.label_dim)
    for name, (sampler, calls) in samplers.items():
        rows[name] = edm.measure(sampler, teacher, metric, calls, n, seed, cfg, cfg.fid)
        grids[f"{name}, {calls} NFE"] = edm.in_batches(sampler, z, labels, device)[0]
    edm.save_rows(run.path("samples.png"), grids)
    return rows | {"floor": metric.floor(n)}


def mixture(cfg: Config, run: Run) -> dict:
    """--data mixture: where each divergence ends, {name: mean and std along x}, and samples.png.

    Its own settings: 300 updates, batch 256, weight kl (the divergence itself), no GAN gradient.
    """
    teacher, rows, samples = Mixture(), {}, {}
    fixed = {"batch": 256, "weighting": "kl", "dm_weight": 1.0, "gan_features": "fake"}
    cfg = replace(cfg, **fixed, gan_weight=0.0, discriminator_weight=1.0)
    for name in tqdm(F_DIVERGENCES, desc="mixture"):
        torch.manual_seed(cfg.seed)
        generator, fake = Affine(), EDMPrecond(Perceptron())
        discriminator, ratio_mean = Discriminator(fake), RatioMean(cfg.ratio_bins, cfg.ratio_ema)
        both = nn.ModuleList([fake, discriminator])
        optimizer_generator = torch.optim.Adam(generator.parameters(), 3e-3, betas=(0.0, 0.99))
        optimizer_fake = torch.optim.Adam(both.parameters(), 2e-3, betas=(0.5, 0.99))

        def inputs(generator=generator):
            z = torch.randn(cfg.batch, 2, 1, 1)
            return (*backward_simulation(generator, z, None, 1, 0), None)

        for step in range(-100, 300):  # at first the fake and the discriminator alone
            if step >= 0:
                nets = generator, teacher, fake, discriminator
                loss, _, log = generator_step(*nets, replace(cfg, f=name), inputs(), ratio_mean)
                update(optimizer_generator, loss, generator, cfg, run, step, log)
            for _ in range(cfg.ratio):
                x, real = generator(*inputs()).detach(), teacher.sample(cfg.batch)
                loss, log = fake_step(fake, teacher, discriminator, cfg, x, None, real)
                update(optimizer_fake, loss, both, cfg, run, step, log)
        covariance = generator.weight @ generator.weight.T
        rows[name] = {"mean": generator.bias[0].item(), "std": covariance[0, 0].sqrt().item()}
        samples[name] = generator(*inputs()).detach().flatten(1).cpu()
    draw_mixture(run.path("samples.png"), teacher.sample(1000).flatten(1).cpu(), samples)
    return rows


def draw_mixture(path, real: Tensor, samples: dict) -> None:
    """One panel for each divergence: samples of the data in grey, of the generator on top."""
    plt = edm.pyplot()
    fig, axes = plt.subplots(1, len(samples), figsize=(2 * len(samples), 2.2), sharey=True)
    for ax, (name, x) in zip(axes, samples.items(), strict=True):
        ax.scatter(*real.T, s=2, color="0.8")
        ax.scatter(*x.T, s=2, color="tab:red")
        ax.set(title=name, xlim=(-2.2, 2.2), ylim=(-1, 1))
    fig.tight_layout()
    edm.write_atomic(path, lambda tmp: fig.savefig(tmp, dpi=110, format="png"))
    plt.close(fig)


def main(cfg: Config) -> dict:
    """Runs everything; returns what result.json holds."""
    cfg.steps = cfg.steps or (150 if cfg.data == "cifar10" else 300)  # minutes on two CPU cores
    device = edm.set_up(cfg)
    if cfg.sample:
        edm.draw_samples(cfg, partial(generate, steps=cfg.sampling_steps))
        return {}
    zeros = torch.zeros(1, 1, 32, 32, device=device)
    # misspelt options stop here
    dmd_weight(zeros, zeros, torch.ones(1, device=device), cfg.weighting)
    edm.one_of("multistep-input", cfg.multistep_input, "simulation", "data")
    edm.one_of("gan-features", cfg.gan_features, "fake", "teacher")
    edm.one_of("f", cfg.f, *F_DIVERGENCES)
    if not cfg.dm_weight and not cfg.gan_weight:
        raise UserError("--dm-weight 0 --gan-weight 0: nothing would train the generator.")
    if not cfg.ratio or not cfg.discriminator_weight:
        raise UserError("--ratio 0, --discriminator-weight 0: nothing would train the head for r.")
    if cfg.benchmark:
        teacher = load_teacher(cfg) if cfg.teacher else edm.Benchmark.untrained(device)
        run = edm.Benchmark(cfg, cfg.ratio * cfg.batch + cfg.batch)
        train(cfg, run, teacher, *edm.Benchmark.images(teacher))
        return run.result
    if cfg.data == "mixture":
        run = Run(cfg, "f_distill")
        with torch.device(device):
            result = run.finish(mixture(cfg, run))
        edm.print_verdict(result, run.folder)
        return result
    on_the_spot = cfg.data == "synthetic" and not cfg.teacher
    teacher = None if on_the_spot else load_teacher(cfg)
    run = Run(cfg, "f_distill")
    if result := run.finished():
        edm.print_verdict(result, run.folder)
        return result
    if edm.is_large(cfg.teacher):  # latents and prompts; pictures, no metric
        real = teacher.real_latents(cfg, run)
        train(cfg, run, teacher, *real).save(run.path("generator"))
        run.curves()
        return run.finish({})
    teacher = teacher or synthetic_teacher(cfg, run)
    shape = {"resolution": teacher.img_resolution, "channels": teacher.img_channels}
    metric = edm.get_metric(cfg.data, cfg.data_dir, run.folder, device, **shape)
    metric.check(teacher)
    images, classes = edm.load_data(cfg.data, cfg.data_dir, **shape)  # r needs real images
    generator = train(cfg, run, teacher, images, classes)
    edm.save_denoiser(generator, run.path("generator.safetensors"))
    run.curves()
    result = run.finish(evaluate(cfg, run, generator, teacher, metric))
    edm.print_verdict(result, run.folder)
    return result


if __name__ == "__main__":
    edm.command_line(main, Config)
