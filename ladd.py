"""LADD: adversarial only, on the features of the frozen teacher; no score matching, no fake.

Papers      [LADD] Sauer et al. 2024, arXiv 2403.12015    [ADD] 2311.17042    [EDM] 2206.00364
Objects     teacher    D_real(x_t, σ)   EDM denoiser; its encoder reads noisy images    frozen
            generator  G(x_t, σ)        N calls, one by default; starts from teacher    trained
            discriminator               a head on each level of the teacher's encoder   trained
Shapes      x, z, eps, real: (B, C, H, W), x in [-1, 1]; sigma, labels: (B,); logits: (B, heads)
Differences from the paper; why, and its values: docs/ladd.md
            1. pixels and EDM's σ for latents and t: σ = σ_data t / (1 - t), σ_data = 0.5
            2. LADD prints no loss: hinge and R1 on head features are ADD's, softplus is FastGen's
            3. small convolutional heads, one for each resolution; means over heads for sums
            4. real images are the data; paper: guided samples of the teacher (--real teacher)
            5. the discriminator's noise has logit t ~ N(0, 1); paper N(1, 1)
            6. a generator of N steps is trained on its own N levels; paper: on four
            7. AdamW, learning rates, batch, ratio and EMA are ours; LADD names none
            8. the discriminator sees pixels cut to [-1, 1]
Run         python ladd.py                      # MNIST: 3 to 5 minutes on 2 cores; MNIST-FD
                                                # 0.036 ± 0.002 (n = 10,000, 3 seeds)
            python ladd.py --sample runs/ladd-0/generator.safetensors --labels 3,1,4
"""

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edm_teacher as edm
from edm_teacher import Denoiser, Run, UserError, expand, heun_sampler

# == 1. The method =================================================================== LADD, Method
Loss = Literal["hinge", "softplus"]


# --- the generator: one step, or N with fresh noise (LADD, Comparison to State-of-the-Art) ---
def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def sampling_sigmas(generator, steps: int) -> Tensor:
    """σ_k = σ_data t / (1 - t), t = 1 - k/N, k = 0 ... N-1: LADD's t = 1, .75, .5, .25 for N = 4.

    Kept between σ_min and σ_max, which stands for the infinity of t = 1. σ_data of latents: 1."""
    k = torch.arange(steps)
    sigma = min(generator.sigma_data, 1) * (steps - k) / k  # t / (1 - t)
    return sigma.clamp(generator.sigma_min, generator.sigma_max)


def input_probabilities(steps: int) -> Tensor:
    """p of k = 0 ... N-1 in training: .7 for pure noise, the rest shared (LADD: .7 .1 .1 .1)."""
    return torch.tensor([1.0] if steps == 1 else [0.7] + [0.3 / (steps - 1)] * (steps - 1))


def training_inputs(generator, z: Tensor, real: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(x_t, σ_k), x_t = real + σ_k z with k ~ p for each sample, but for k = 0 noise alone.

    The generator's inputs are noised images, as in ADD: no backward simulation."""
    k = torch.multinomial(input_probabilities(steps), len(z), replacement=True)
    sigma = sampling_sigmas(generator, steps)[k].to(z.device)
    k = expand(k.to(z.device), z)
    return torch.where(k == 0, 0, real) + expand(sigma, z) * z, sigma


def generate(generator, z: Tensor, labels: Tensor | None = None, steps: int = 1) -> Tensor:
    """The sampler: N network calls, with N = 1  x = G(σ_max z; σ_max, y).

    z: unit Gaussian noise (B, C, H, W).   labels: (B,) or None."""
    sigma = sampling_sigmas(generator, steps).to(z.device)[:, None].expand(-1, len(z))
    x = generator(generator.sigma_max * z, sigma[0], labels)
    for k in range(1, steps):
        x = generator(diffuse(x, sigma[k]), sigma[k], labels)
    return x


def surrogate_loss(x: Tensor, grad: Tensor) -> Tensor:
    """½ mean (x - sg[x - grad])²: its derivative is dL/dx = grad / numel  (DMD Alg. 2)."""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


# --- real images made by the teacher (LADD, Synthetic Data) ---
def make_pairs(
    teacher: Denoiser, z: Tensor, labels: Tensor | None, steps: int, guidance: float, device
) -> dict[str, Tensor]:
    """D = {(z_i, y_i, label_i)}, y = ODE-solve(teacher, z) by Heun's method  (DMD §3.3)."""
    sampler, start = partial(heun_sampler, teacher, steps=steps, guidance=guidance), time.time()
    pairs = {"z": z, "y": edm.in_batches(sampler, z, labels, device)}
    pairs["seconds_per_1000"] = torch.tensor((time.time() - start) / len(z) * 1000)
    return pairs if labels is None else pairs | {"labels": labels}


# --- the GAN on noised images (LADD, Teacher Noise Distribution) ---
def visible(x: Tensor, teacher) -> Tensor:
    """What a file can hold of x: pixels cut to [-1, 1]; latents, which have no bounds, as they are.

    Uncut, generated black differs from real black, exactly -1, by what nobody can see."""
    return x if teacher.latents else x.clamp(-1, 1)


def gan_diffuse(x: Tensor, teacher, mean: float = 1.0, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """(x_t, σ) for the discriminator: ln σ ~ N(mean + ln σ_data, std²), a level for each sample.

    That is t = sigmoid(mean + std u), u ~ N(0, 1), logit-normal, since logit t = ln(σ/σ_data)
    (LADD). More noise asks for global structure, less for texture."""
    sigma = min(teacher.sigma_data, 1) * (mean + std * torch.randn(len(x), device=x.device)).exp()
    sigma = sigma.clamp(teacher.sigma_min, teacher.sigma_max)
    return diffuse(x, sigma), sigma


def gan_generator_loss(logits_fake: Tensor, kind: Loss = "hinge") -> Tensor:
    """hinge: mean -l  (ADD Eq. 2);   softplus: mean softplus(-l) = mean -log sigmoid(l)."""
    return -logits_fake.mean() if kind == "hinge" else F.softplus(-logits_fake).mean()


def gan_discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, kind: Loss = "hinge"
) -> Tensor:
    """hinge: mean max(0, 1 - l_real) + mean max(0, 1 + l_fake)  (ADD Eq. 3), best l: ±1.

    softplus: mean softplus(-l_real) + mean softplus(l_fake), best l: log p_real / p_fake."""
    f = F.softplus if kind == "softplus" else lambda l: F.relu(1 + l)
    return f(-logits_real).mean() + f(logits_fake).mean()


def r1_penalty(logits: Tensor, logits_perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)², n ~ N(0, I): |∇l|² as std -> 0, at first order.

    Both logits are those of the same noisy real image x_t at the same σ (APT, arXiv 2501.08316).
    FastGen compares x_t with a perturbed clean image: another quantity, another weight."""
    return ((logits_perturbed - logits) / std).square().mean()


def r1_of_features(logits: Tensor, features: list[Tensor]) -> Tensor:
    """mean |∂l_k/∂f_k|²: R1 of each head at its own input, exact  (ADD Eq. 3).

    features: (B, ...) of real images, with requires_grad, that gave logits (B, heads).
    Mean over batch and heads, sum over a map. Can be differentiated again."""
    grads = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return torch.stack([grad.square().flatten(1).sum(1) for grad in grads]).mean()


def gan_gradient(x: Tensor, logits_of, loss_of) -> tuple[Tensor, Tensor]:
    """(L_G, numel ∂L_G/∂x) for L_G = loss_of(logits_of(x)): what surrogate_loss wants.

    As dmd_gradient in the other scripts, to compare sizes. No network gets a gradient."""
    x = x.detach().requires_grad_()
    loss = loss_of(logits_of(x))
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad * x.numel()


# == 2. The two updates ============================================================== LADD, Method


def generator_step(generator, teacher, discriminator, cfg, inputs: tuple):
    """Step A: (loss of the generator, its samples x detached, what to log): adversarial alone.

    inputs: (x_t, σ, labels) of the generator. Gradients reach it alone: they are computed at x,
    through noise, frozen encoder and heads, then sent through it."""
    x, labels = generator(*inputs), inputs[-1]

    def logits_of(x):
        x_t, sigma = gan_diffuse(visible(x, teacher), teacher, cfg.noise_mean, cfg.noise_std)
        return discriminator(teacher, x_t, sigma, labels)

    loss, grad = gan_gradient(x, logits_of, partial(gan_generator_loss, kind=cfg.loss))
    log = {"|GAN grad|": grad.square().mean().sqrt(), "GAN loss": loss}
    return surrogate_loss(x, grad), x.detach(), log


def discriminator_step(teacher, discriminator, cfg, x, labels, real, real_labels):
    """Step B: (loss, what to log): real against generated, both noised.

    x: samples of the generator, detached. Gradients reach the heads alone."""
    pair, n = torch.cat([real, visible(x, teacher)]), len(real)
    x_t, sigma = gan_diffuse(pair, teacher, cfg.noise_mean, cfg.noise_std)
    y = None if labels is None else torch.cat([real_labels, labels])
    with torch.no_grad():  # the encoder is frozen, and nothing before it is trained here
        features = discriminator.features(teacher, x_t, sigma, y)
    features_real = [f[:n].requires_grad_(cfg.r1_features > 0) for f in features]
    logits_real = discriminator.logits(features_real, sigma[:n], real_labels)
    logits_fake = discriminator.logits([f[n:] for f in features], sigma[n:], labels)
    loss = gan_discriminator_loss(logits_real, logits_fake, cfg.loss)
    log = {"discriminator loss": loss}
    log |= {"logit real": logits_real.mean(), "logit generated": logits_fake.mean()}
    if cfg.r1_features:
        log["R1 features"] = r1_of_features(logits_real, features_real)
        loss = loss + cfg.r1_features * log["R1 features"]
    if cfg.r1_weight:
        x_t = x_t[:n] + cfg.r1_std * torch.randn_like(x_t[:n])
        with torch.no_grad():
            features = discriminator.features(teacher, x_t, sigma[:n], real_labels)
        perturbed = discriminator.logits(features, sigma[:n], real_labels)
        log["R1"] = r1_penalty(logits_real, perturbed, cfg.r1_std)
        loss = loss + cfg.r1_weight * log["R1"]
    return loss, log


# == 3. Networks: the generator is a copy of the teacher, the discriminator is heads on the teacher


class Head(nn.Module):
    """l = w·h + b + <h, e(class) + e(σ)> / √C, h: 4 x 4 convolutions of a feature map (B, C, H, W).

    Stride 2 down to 4 x 4 pixels, then one over all that is left (DMD2 App. F.1). Class and noise
    level enter by projection (Miyato & Koyama 2018), as LADD's heads are told both."""

    def __init__(self, channels: int, size: int, classes: int):
        super().__init__()
        layers, width = [], min(channels, 512)  # of a large transformer it would outgrow all else
        while size > 1:
            kernel, stride, padding = (4, 2, 1) if size > 4 else (size, size, 0)
            layers += [nn.Conv2d(channels, width, kernel, stride, padding)]
            channels = width
            layers += [edm.group_norm(channels), nn.SiLU()]
            size = (size + 2 * padding - kernel) // stride + 1
        self.body, self.last = nn.Sequential(*layers), nn.Conv2d(channels, 1, 1)
        self.by_class = nn.Embedding(classes + 1, channels)  # entry 0: no class
        self.by_noise = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, channels))

    def forward(self, features: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        angle = sigma.float().log()[:, None] / 4 * 2 ** torch.arange(4, device=sigma.device)
        e = self.by_class(labels + 1) + self.by_noise(torch.cat([angle.sin(), angle.cos()], 1))
        h = self.body(features)  # (B, C, 1, 1); of videos a column
        projected = (h * e[..., None, None]).sum(1, keepdim=True) / math.sqrt(h.shape[1])
        return (self.last(h) + projected).flatten(1)


class Discriminator(nn.Module):
    """One head on each chosen feature map of a denoiser's encoder -> logits (B, heads).

    resolutions: of the feature maps; none: all of them. Prompts are no classes for the heads."""

    def __init__(self, denoiser, resolutions=()):
        super().__init__()
        with torch.no_grad():  # one picture through the encoder tells the shapes
            x = torch.zeros(1, *denoiser.shape, device=next(denoiser.parameters()).device)
            _, features = denoiser(x, 1.0, return_features="only")
        found = [f.shape[-1] for f in features]
        if not set(resolutions) <= set(found):
            raise UserError(f"--gan-levels {resolutions}: this network has {found}.")
        self.chosen = [found.index(r) for r in resolutions] or [*range(len(found))]
        self.classes = 0 if denoiser.latents else denoiser.label_dim
        shapes = [
            features[i].flatten(2, -2).shape for i in self.chosen
        ]  # video: a column of frames
        self.heads = nn.ModuleList(Head(c, min(size), self.classes) for _, c, *size in shapes)

    def features(self, backbone, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> list[Tensor]:
        _, features = backbone(x_t, sigma, labels, return_features="only")
        return [features[i].flatten(2, -2).float() for i in self.chosen]

    def logits(self, features: list[Tensor], sigma: Tensor, labels: Tensor | None) -> Tensor:
        if not self.classes:
            labels = torch.full_like(sigma, -1, dtype=torch.long)
        with torch.autocast(sigma.device.type, enabled=False):  # logits in full precision
            heads = zip(self.heads, features, strict=True)
            return torch.cat([head(f, sigma, labels) for head, f in heads], 1)

    def forward(self, backbone, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return self.logits(self.features(backbone, x_t, sigma, labels), sigma, labels)


# == 4. Settings: the method's own; the others are edm.RunConfig's and edm.BackboneConfig's =======


@dataclass
class Config(edm.BackboneConfig):
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder of class folders with images
    steps: int = 0  # generator updates; paper 10,000; 0: 650, on cifar10 400
    batch: edm.Count = 32  # samples an update
    ratio: edm.Count = 2  # updates of the discriminator per generator update
    sampling_steps: edm.Count = 1  # network calls N of the generator; paper 1 to 4
    real: Literal["data", "teacher"] = "data"  # the discriminator's real images; paper: teacher's
    pairs: edm.Count = 1000  # images that --real teacher makes
    loss: Loss = "hinge"  # hinge (ADD), or softplus (FastGen)
    noise_mean: edm.Real = (
        0.0  # mean of the discriminator's logit t = ln(sigma/sigma_data); paper 1
    )
    noise_std: float = 1.0  # its standard deviation; paper 1
    gan_levels: str = ""  # resolutions of the feature maps, like 16,8; default: all
    r1_features: float = 1e-5  # weight of the R1 penalty on head features; ADD 1e-5; 0: none
    r1_weight: float = 0.0  # weight of the approximate R1 penalty on inputs; 0: none
    r1_std: edm.Share = 0.1  # size of its perturbation
    guidance: float = 1.0  # classifier-free guidance of the teacher's images; 1 is off
    teacher_steps: int = 18  # Heun steps N of the teacher's images: 2 N - 1 calls; 0: none
    lr_generator: float = 3e-4  # learning rate of the generator; falls to 0 from half way on
    lr_discriminator: float = 1e-3  # learning rate of the heads
    beta1: edm.Decay = 0.0  # AdamW's decay of the mean gradient
    beta2: edm.Decay = 0.99  # AdamW's decay of the squared gradient
    ema: edm.Decay = 0.995  # decay of the average that is the result
    clip: edm.Positive = 10.0  # largest gradient norm of a network
    fid: bool = False  # measure FID too (pip install torch-fidelity); slow without a GPU

    def __post_init__(self):
        super().__post_init__()
        self.steps = self.steps or (400 if self.data == "cifar10" else 650)  # minutes on 2 cores
        if self.real == "teacher" and not self.teacher_steps:
            raise UserError("--real teacher needs --teacher-steps of 1 or more.")


# == 5. Training ===================================================================== LADD, Method


def load_teacher(cfg: Config, run: Run) -> Denoiser:
    """--teacher, or --sample, else the shipped one for this data set; frozen, in eval mode."""
    path = cfg.sample or cfg.teacher
    if ":" in cfg.teacher[2:] or path.endswith((".pkl", ".pth")):  # sd15:PATH_OR_HUB_ID, not C:\\
        from backbones.scripts import load_teacher

        return load_teacher(cfg)
    teacher = edm.load_denoiser(path, cfg.device) if path else edm.default_teacher(cfg, run)
    return teacher.requires_grad_(False)


def load_images(cfg: Config, run: Run, teacher: Denoiser) -> tuple[Tensor, Tensor]:
    """The real images for the GAN: uint8 (N, C, H, W), or latents; and their labels (N,)."""
    if cfg.real == "teacher" and not teacher.latents:  # its samples, made once for a run
        z = edm.noise(teacher, cfg.pairs, cfg.seed + 10000)
        labels = edm.class_labels(cfg.pairs, teacher.label_dim)
        how = cfg.teacher_steps, cfg.guidance, cfg.device
        pairs = run.once("pairs.safetensors", lambda: make_pairs(teacher, z, labels, *how))
        images = edm.to_uint8(pairs["y"])
        return images, pairs.get("labels", torch.zeros(len(images), dtype=torch.long))
    return teacher.real_images(cfg, run)


def train(cfg: Config, run: Run, teacher: Denoiser, images, classes) -> Denoiser:
    """Alternates the two updates; returns the average of the generator's weights.

    images, classes: uint8 real images (of the data or of the teacher) and their labels."""
    device = torch.device(cfg.device)
    generator = edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    discriminator = Discriminator(generator, edm.numbers(cfg.gan_levels)).to(device)
    edm.shard(generator, ema)
    edm.replicate(discriminator)  # R1 on features differentiates its gradients again
    betas = cfg.beta1, cfg.beta2
    adamw = partial(torch.optim.AdamW, betas=betas, weight_decay=0.01, fused=True)
    optimizer_generator = adamw(generator.parameters(), lr=cfg.lr_generator)
    optimizer_discriminator = adamw(discriminator.parameters(), lr=cfg.lr_discriminator)
    trained = {"generator": (generator, optimizer_generator), "ema": (ema, None)}
    trained["discriminator"] = (discriminator, optimizer_discriminator)
    batch = edm.rows(cfg.batch)  # of this process
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cfg.amp)

    def draw():
        """((x_t, σ, labels) for the generator, real images, their labels: the same)"""
        i = torch.randint(len(images), (batch,))
        real, labels = edm.to_float(images[i].to(device)), classes[i].to(device)
        if not teacher.label_dim:
            labels = None
        inputs = training_inputs(generator, torch.randn_like(real), real, cfg.sampling_steps)
        return (*inputs, labels), real, labels

    start = run.load(trained)  # 0, or with --resume the step of checkpoint.pt
    for step in run.bar(start, cfg.steps):
        lr = cfg.lr_generator * min(1, 2 - 2 * (step - 1) / cfg.steps)  # falls from half way on
        optimizer_generator.param_groups[0]["lr"] = lr
        # Step A: the generator
        inputs, real, real_labels = draw()
        with autocast():
            loss, x, log = generator_step(generator, teacher, discriminator, cfg, inputs)
        run.update(step, "generator", generator, optimizer_generator, loss, cfg.clip)
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: the discriminator, first on the same x
        for i in range(cfg.ratio):
            if i > 0:
                inputs, real, real_labels = draw()
                with torch.no_grad(), autocast():
                    x = generator(*inputs)
            with autocast():
                loss, log_discriminator = discriminator_step(
                    teacher, discriminator, cfg, x, inputs[-1], real, real_labels
                )
            run.update(
                step, "discriminator", discriminator, optimizer_discriminator, loss, cfg.clip
            )
            log |= log_discriminator
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(step, trained)
            run.pictures(step, ema, partial(generate, ema, steps=cfg.sampling_steps), teacher)
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
    run = Run(cfg, "ladd")
    teacher = load_teacher(cfg, run)
    if cfg.sample:
        return run.draw_samples(teacher, partial(generate, teacher, steps=cfg.sampling_steps))
    metric = edm.load_metric(cfg, run, teacher)
    images, classes = load_images(cfg, run, teacher)
    generator = train(cfg, run, teacher, images, classes)
    generator.save(run.path("generator"))
    return run.finish(evaluate(cfg, run, generator, teacher, metric))


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
