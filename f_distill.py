"""f-distill: DMD2 with its gradient weighted by h(r), so that it descends any f-divergence.

Papers      [f-distill] Xu et al. 2025, arXiv 2502.15681        [DMD2] 2405.14867, [EDM] 2206.00364
Objects     teacher    D_real(x_t, σ)   EDM denoiser of the data (edm_teacher.py)       frozen
            generator  G(x_t, σ)        N calls, one by default; starts from teacher    trained
            fake       D_fake(x_t, σ)   denoiser of the generator's samples; same start trained
            discriminator               head on the fake's encoder: its logit is log r  trained
            r = p/q    (B,)             density of noisy data over that of noisy samples
Shapes      x, z, eps, real: (B, C, H, W), x in [-1, 1]; sigma, labels: (B,); logits: (B, heads)
Differences from the paper; its values: docs/f_distill.md
            1. AdamW, learning rates, weights of the GAN and EMA are those of dmd2_cifar.py
            2. bins and clips of r are FastGen's, but our bins are equally likely in training
            3. neyman is not the paper's, but FastGen's
Run         python f_distill.py                 # MNIST, js: 4.5 minutes on 2 CPU cores; MNIST-FD
                                                # 0.039 ± 0.003 (n = 10,000, 3 seeds)
            python f_distill.py --sample runs/f_distill-0/generator.safetensors --labels 3,1,4
            python -m tools.mixture             # seven divergences in two dimensions
            diff -w dmd2_cifar.py f_distill.py  # what the paper adds
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edm_teacher as edm
from edm_teacher import Denoiser, Run, UserError, expand, guided, heun_sampler

# == 1. The method ================================================= f-distill Table 1; DMD2 §3, §4
Weighting = Literal["paper", "kl", "sigma", "sigma3", "post"]


# --- the generator: one step, or N with fresh noise between them (DMD2 §4.4, §4.5) ---
def karras_sigma(u: Tensor, sigma_min=0.002, sigma_max=80.0, rho=7.0) -> Tensor:
    """σ(u) = (σ_min^1/ρ + u (σ_max^1/ρ - σ_min^1/ρ))^ρ, u in [0, 1], u = 1: σ_max  (EDM Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def sampling_sigmas(generator, steps: int) -> Tensor:
    """σ_k = σ(u = 1 - k/N), k = 0 ... N-1: DMD2's times 999, 749, 499, 249 on the EDM axis."""
    u = 1 - torch.arange(steps) / steps
    sigma = generator.sigma_of(u, karras_sigma)
    sigma[0] = generator.sigma_max  # not a rounding error beside it
    return sigma


def backward_simulation(
    generator, z: Tensor, labels: Tensor | None, steps: int, k: int, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x_t, σ_k): what the generator sees at step k of N after its own steps 0 ... k-1, no grad.

    Training on the sampler's own inputs (DMD2 §4.5); with `real` images on real + σ_k ε instead."""
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

    z: unit Gaussian noise (B, C, H, W).   labels: (B,) or None."""
    x_t, sigma = backward_simulation(generator, z, labels, steps, steps - 1)
    return generator(x_t, sigma, labels)


# --- distribution matching, as in DMD (DMD2 §3, Eq. 2) ---
def dmd_weight(x: Tensor, denoised_real: Tensor, sigma: Tensor, kind: Weighting) -> Tensor:
    """The factor on D_fake - D_real, i.e. w_t / σ²: (B, 1, 1, 1); without gradient.

    paper: w_t = σ² C S / |D_real - x|₁  (DMD Eq. 8; C S: numbers in an image), gradients of one
    size at every σ; the post's text multiplies by the norm, its code (post) divides. kl: w_t = 1,
    the KL divergence itself; sigma, sigma3: w_t = σ, σ³  (DMD Table 2)."""
    error = (x - denoised_real).abs().flatten(1).mean(1).detach()
    if kind == "paper":
        weight = 1 / error.clamp_min(1e-8)  # where x = D_real a gradient of 0 stays 0, never 0/0
    elif kind == "post":
        weight = ((sigma**2 + 1) / (error + 1e-5)).clamp(0.1, 10) / (sigma**2 + 1e-8)
    else:
        weight = sigma ** {"kl": -2, "sigma": -1, "sigma3": 1}[kind]
    return expand(weight, x)


def dmd_gradient(denoised_fake: Tensor, denoised_real: Tensor, weight: Tensor) -> Tensor:
    """∇_x KL(fake || real), up to the weight:  w (D_fake - D_real)  (DMD Eq. 7). Points uphill."""
    return weight * (denoised_fake - denoised_real)


def surrogate_loss(x: Tensor, grad: Tensor) -> Tensor:
    """½ mean (x - sg[x - grad])²: its derivative is dL/dx = grad / numel  (DMD Alg. 2)."""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


# --- the fake's own loss, as in DMD ---
def fake_loss(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """mean (1/σ² + 1/σ_data²) (D_fake(x_t; σ) - x)²  (DMD Eq. 6, Alg. 3): EDM's weight."""
    weight = 1 / sigma**2 + 1 / sigma_data**2
    return (expand(weight, x) * (denoised - x) ** 2).mean()


# --- the GAN on noised images (DMD2 §4.3) ---
def gan_diffuse(x: Tensor, teacher, gan_noise: float) -> tuple[Tensor, Tensor]:
    """(x_t, σ) for the discriminator, at noise levels of its own: σ(u), u ~ U(0, gan_noise)."""
    u = gan_noise * torch.rand(len(x), device=x.device)
    sigma = teacher.sigma_of(u, karras_sigma)
    return diffuse(x, sigma), sigma


def gan_generator_loss(logits_fake: Tensor) -> Tensor:
    """mean softplus(-l) = mean -log sigmoid(l)  (DMD2 Eq. 4, second term, non-saturating)."""
    return F.softplus(-logits_fake).mean()


def gan_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """mean softplus(-l_real) + mean softplus(l_fake); the best l is log p_real / p_fake.

    The logistic pair of the official code; DMD2 Eq. 4 as printed has no lower bound."""
    return F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean()


def r1_penalty(logits: Tensor, logits_perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)², n ~ N(0, I): |∇l|² as std -> 0, at first order.

    Both logits are those of the same noisy real image x_t at the same σ (APT, arXiv 2501.08316).
    FastGen compares x_t with a perturbed clean image: another quantity, another weight."""
    return ((logits_perturbed - logits) / std).square().mean()


def gan_gradient(x: Tensor, logits_of) -> tuple[Tensor, Tensor]:
    """(L_G, numel ∂L_G/∂x) for logits = logits_of(x): in the units of dmd_gradient.

    So the two gradients add up, and their sizes can be compared. No network gets a gradient."""
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

    The best discriminator has l = log p/q; ours is not the best one, so r is normalised below."""
    return logits.detach().mean(1).exp().clamp(lower, upper)


class RatioMean(nn.Module):
    """r / E_q[r] for each bin of noise levels, as E_q[p/q] = 1; E_q is a moving average.

    u: (B,) in [0.02, 0.98], uniform in training, so that all bins are equally likely."""

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


# == 2. The two updates ================================================================= DMD2 §4.6


def generator_step(generator, teacher, fake, discriminator, cfg, inputs: tuple, ratio_mean):
    """Step A: (loss of the generator, its samples x detached, what to log)  (DMD2 Eq. 2, Eq. 4).

    inputs: (x_t, σ, labels) of the generator. Gradients reach it alone: both are computed at x,
    then sent through it. They are logged as root mean squares with their weights in, so equal
    numbers pull equally hard."""
    x, labels = generator(*inputs), inputs[-1]
    backbone = fake if cfg.gan_features == "fake" else teacher
    total, log = torch.zeros_like(x), {}
    if cfg.dm_weight:
        u = 0.02 + 0.96 * torch.rand(len(x), device=x.device)  # the ends' scores are useless
        sigma = teacher.sigma_of(u, karras_sigma)
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

    With gan_features = fake the discriminator's loss also trains the encoder of the fake."""
    sigma = fake.sigma_of(torch.rand(len(x), device=x.device), karras_sigma)
    loss = fake_loss(fake(diffuse(x, sigma), sigma, labels), x, sigma, fake.sigma_data)
    log = {"fake loss": loss}
    backbone = fake if cfg.gan_features == "fake" else teacher
    x_t, sigma = gan_diffuse(torch.cat([real, x]), teacher, cfg.gan_noise)
    y = None if labels is None else torch.cat([real_labels, labels])
    logits_real, logits_fake = discriminator(backbone, x_t, sigma, y).chunk(2)
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


# == 3. Networks: generator and fake are copies of the teacher, the discriminator is a head =======


class Discriminator(nn.Module):
    """One head on each chosen feature map of a denoiser's encoder -> logits (B, heads).

    Head: 4 x 4 convolutions with stride 2 down to 4 x 4 pixels, one over all that is left, linear
    (DMD2 App. F.1). resolutions: of the feature maps; none: the coarsest, as in the paper."""

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


# == 4. Settings: the method's own; the others are edm.RunConfig's and edm.BackboneConfig's =======


@dataclass
class Config(edm.BackboneConfig):
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder of class folders with images
    steps: int = 0  # generator updates; paper 60,000 iterations; 0: 300, on cifar10 150
    batch: edm.Count = 32  # samples an update; paper, CIFAR-10: 2048
    ratio: int = 5  # updates of fake and discriminator per generator update; paper 5
    sampling_steps: edm.Count = 1  # network calls N of the generator
    multistep_input: Literal["simulation", "data"] = "simulation"  # of steps 2..N; data: noised
    f: Literal["rkl", "kl", "js", "sf", "sh", "jf", "neyman"] = "js"  # divergence; rkl: DMD2
    ratio_lower: edm.Share = 0.1  # smallest and ...
    ratio_upper: Annotated[float, (1, 1e18)] = 20.0  # largest density ratio r; FastGen 0.1, 20
    ratio_bins: edm.Count = 10  # bins of noise levels in which r is divided by its mean
    ratio_ema: edm.Decay = 0.9  # decay of these means; FastGen 0, on ImageNet 0.5
    dm_weight: float = 1.0  # weight of the distribution matching gradient; 0: GAN alone
    weighting: Weighting = "paper"  # weight over noise levels
    gan_weight: float = 0.02  # weight of the GAN in the generator; paper 1e-3; 0: head for r
    discriminator_weight: float = 0.1  # weight of its loss beside the fake's; official code 1e-2
    gan_features: Literal["fake", "teacher"] = "fake"  # whose encoder the head reads
    gan_levels: str = ""  # resolutions of the feature maps, like 16,8; default: the coarsest
    gan_noise: edm.Share = 1.0  # largest u of the GAN's noise levels; r is known there alone
    r1_weight: float = 0.0  # weight of the approximate R1 penalty; 0: none
    r1_std: edm.Share = 0.1  # size of its perturbation
    guidance: float = 1.0  # classifier-free guidance of the teacher; 1 is off
    teacher_steps: int = 18  # Heun steps N of the teacher in the verdict: 2 N - 1 calls; 0: none
    pairs: edm.Count = 1000  # latents that sd15:PATH and the like make without a --data FOLDER
    lr_generator: float = 1e-3  # learning rate of the generator; paper, CIFAR-10: 1e-4
    lr_fake: float = 1e-3  # of fake and discriminator; paper, CIFAR-10: 1e-4
    beta1: edm.Decay = 0.0  # AdamW's decay of the mean gradient
    beta2: edm.Decay = 0.99  # AdamW's decay of the squared gradient
    warmup: int = 0  # generator updates until the learning rates are full
    ema: edm.Decay = 0.995  # decay of the average that is the result
    clip: edm.Positive = 10.0  # largest gradient norm of a network
    fid: bool = False  # measure FID too (pip install torch-fidelity); slow without a GPU

    def __post_init__(self):
        super().__post_init__()
        self.steps = self.steps or (150 if self.data == "cifar10" else 300)  # minutes on 2 cores
        if not self.dm_weight and not self.gan_weight:
            raise UserError("--dm-weight 0 --gan-weight 0: nothing would train the generator.")
        if not self.ratio or not self.discriminator_weight:
            raise UserError("--ratio 0, --discriminator-weight 0: nothing would train the head.")


# == 5. Training ======================================================================== DMD2 §4.6


def load_teacher(cfg: Config, run: Run) -> Denoiser:
    """--teacher, or --sample, else the shipped one for this data set; frozen, in eval mode."""
    path = cfg.sample or cfg.teacher
    if ":" in cfg.teacher[2:] or path.endswith((".pkl", ".pth")):  # sd15:PATH_OR_HUB_ID, not C:\\
        from backbones.scripts import load_teacher

        return load_teacher(cfg)
    teacher = edm.load_denoiser(path, cfg.device) if path else edm.default_teacher(cfg, run)
    return teacher.requires_grad_(False)


def train(cfg: Config, run: Run, teacher: Denoiser, images, classes) -> Denoiser:
    """Alternates the two updates; returns the average of the generator's weights.

    images, classes: uint8 real images and their labels."""
    device = torch.device(cfg.device)
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    discriminator = Discriminator(fake, edm.numbers(cfg.gan_levels)).to(device)
    critic = nn.ModuleDict({"fake": fake, "discriminator": discriminator})  # share an optimiser
    ratio_mean = RatioMean(cfg.ratio_bins, cfg.ratio_ema).to(device)
    edm.shard(generator, fake, ema, *discriminator.heads)
    betas = cfg.beta1, cfg.beta2
    adamw = partial(torch.optim.AdamW, betas=betas, weight_decay=0.01, fused=True)
    optimizer_generator = adamw(generator.parameters(), lr=cfg.lr_generator)
    optimizer_fake = adamw(critic.parameters(), lr=cfg.lr_fake)
    trained = {"generator": (generator, optimizer_generator), "fake": (critic, optimizer_fake)}
    trained |= {"ema": (ema, None), "ratio_mean": (ratio_mean, None)}
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
        k = edm.from_first(int(torch.randint(cfg.sampling_steps, ())))  # all call as often
        with autocast():
            inputs = backward_simulation(generator, z, labels, cfg.sampling_steps, k, noised)
        return (*inputs, labels), real, real_labels

    start = run.load(trained)  # 0, or with --resume the step of checkpoint.pt
    for step in run.bar(start, cfg.steps):
        for optimizer, lr in (optimizer_generator, cfg.lr_generator), (optimizer_fake, cfg.lr_fake):
            optimizer.param_groups[0]["lr"] = lr * min(1, step / max(cfg.warmup, 1))
        # Step A: the generator
        inputs, real, real_labels = draw()
        with autocast():
            loss, x, log = generator_step(
                generator, teacher, fake, discriminator, cfg, inputs, ratio_mean
            )
        run.update(step, "generator", generator, optimizer_generator, loss, cfg.clip)
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: fake and discriminator, first on the same x
        for i in range(cfg.ratio):
            if i > 0:
                inputs, real, real_labels = draw()
                with torch.no_grad(), autocast():
                    x = generator(*inputs)
            with autocast():
                loss, log_fake = fake_step(
                    fake, teacher, discriminator, cfg, x, inputs[-1], real, real_labels
                )
            run.update(step, "fake", critic, optimizer_fake, loss, cfg.clip)
            log |= log_fake
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(step, trained)
            run.pictures(step, ema, partial(generate, ema, steps=cfg.sampling_steps), teacher, fake)
    return edm.whole(ema, teacher)


# == 6. Pictures and verdict ======================================================================


def evaluate(cfg: Config, run: Run, generator, teacher, metric) -> dict:
    """{name: numbers}, all at the same n; samples.png has the same z in each row."""
    if metric is None:
        return {}
    many_steps = partial(heun_sampler, teacher, steps=cfg.teacher_steps, guidance=cfg.guidance)
    nfe = metric.network_calls(cfg.teacher_steps, cfg.guidance, teacher)
    samplers, k = {"teacher": (many_steps, nfe)} if cfg.teacher_steps else {}, cfg.sampling_steps
    samplers["start"] = partial(generate, teacher, steps=k), k  # the generator before training
    samplers["generator"] = partial(generate, generator, steps=k), k
    return metric.verdict(run, teacher, cfg, samplers, with_fid=cfg.fid)


def main(cfg: Config) -> dict:
    """Runs everything; returns what result.json holds."""
    run = Run(cfg, "f_distill")
    teacher = load_teacher(cfg, run)
    if cfg.sample:
        return run.draw_samples(teacher, partial(generate, teacher, steps=cfg.sampling_steps))
    metric = edm.load_metric(cfg, run, teacher)
    images, classes = teacher.real_images(cfg, run)
    generator = train(cfg, run, teacher, images, classes)
    generator.save(run.path("generator"))
    return run.finish(evaluate(cfg, run, generator, teacher, metric))


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
