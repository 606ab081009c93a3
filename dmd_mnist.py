"""DMD: a diffusion model of MNIST that takes 35 network calls becomes a generator that takes one.

Read it beside the blog post on DMD: the functions stand in its order, banners name its sections.

Papers      [DMD] Yin et al. 2023, arXiv 2311.18828     [EDM] Karras et al. 2022, arXiv 2206.00364
Objects     teacher    D_real(x_t, σ)   EDM denoiser of the data (edm_teacher.py)       frozen
            generator  G(z) = D_θ(σ_max z; σ_max), one call; starts from the teacher    trained
            fake       D_fake(x_t, σ)   denoiser of the generator's samples; same start trained
Shapes      x, z, eps: (B, C, H, W), x in [-1, 1]; sigma, labels: (B,); D returns the clean image
Differences from the paper: learning rates, batch, a second fake update, L2 for LPIPS, an average of
            the weights as the result; why and by how much: docs/dmd.md
Run         python dmd_mnist.py          # 2.5 minutes on 2 CPU cores; MNIST-FD 0.042 ± 0.003, its
                                         # teacher 0.028, real images 0.009 (n = 10,000, 3 seeds)
            python dmd_mnist.py --steps 1500 --ema 0.998     # 18 minutes on one core: 0.030 ± 0.002
            python dmd_mnist.py --data synthetic --steps 50      # drawn shapes, own tiny teacher
            python dmd_mnist.py --sample runs/dmd_mnist-0/generator.safetensors --labels 3,1,4
"""

import copy
import time
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import edm_teacher as edm
from edm_teacher import Denoiser, Run, UserError, expand, guided, heun_sampler

# == 1. The method ============================= post: The Math, Math and Code Side by Side; DMD §3
Weighting = Literal["paper", "kl", "sigma", "sigma3", "post"]


# --- post: Distributions and the Matching Objective ---
def generate(generator, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """x = G(z) = D_θ(σ_max z; σ_max, y): one network call (DMD §3.1)."""
    sigma = torch.full((len(z),), generator.sigma_max, device=z.device)
    return generator(generator.sigma_max * z, sigma, labels)


# --- post: Forward Process and Score Estimation via Score-SDE ---
def karras_sigma(u: Tensor, sigma_min=0.002, sigma_max=80.0, rho=7.0) -> Tensor:
    """σ(u) = (σ_min^1/ρ + u (σ_max^1/ρ - σ_min^1/ρ))^ρ, u in [0, 1], u = 1: σ_max  (EDM Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def score(denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """∇ log p(x_t; σ) = (D(x_t; σ) - x_t) / σ²  (EDM Eq. 3, DMD Eq. 4 and 5).

    Not called below: in s_fake - s_real the x_t cancel, (D_fake - D_real) / σ² is left."""
    return (denoised - x_t) / expand(sigma, x_t) ** 2


# --- post: The Distribution-Matching Gradient ---
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


# --- post: Preventing Mode Dropping - The Regression Anchor ---
def make_pairs(
    teacher: Denoiser, z: Tensor, labels: Tensor | None, steps: int, guidance: float, device
) -> dict[str, Tensor]:
    """D = {(z_i, y_i, label_i)}, y = ODE-solve(teacher, z) by Heun's method  (DMD §3.3)."""
    sampler, start = partial(heun_sampler, teacher, steps=steps, guidance=guidance), time.time()
    pairs = {"z": z, "y": edm.in_batches(sampler, z, labels, device)}
    pairs["seconds_per_1000"] = torch.tensor((time.time() - start) / len(z) * 1000)
    return pairs if labels is None else pairs | {"labels": labels}


def regression_loss(x: Tensor, y: Tensor, kind: Literal["l2", "lpips"] = "l2") -> Tensor:
    """ℓ(G(z), y)  (DMD Eq. 9). l2: mean over batch and pixels (the post's); lpips: the paper's.

    For lpips grey images become RGB, and all are resized to 224 x 224 as in DMD App. B."""
    if kind == "l2":
        return F.mse_loss(x, y)
    x, y = (F.interpolate(v.expand(-1, 3, -1, -1), size=224, mode="bilinear") for v in (x, y))
    return lpips_network(x.device)(x, y).mean()


# --- post: Step B, the fake's own loss ---
def fake_loss(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """mean (1/σ² + 1/σ_data²) (D_fake(x_t; σ) - x)²  (DMD Eq. 6, Alg. 3): EDM's weight."""
    weight = 1 / sigma**2 + 1 / sigma_data**2
    return (expand(weight, x) * (denoised - x) ** 2).mean()


# == 2. The two updates ====================================== post: Training Algorithm; DMD Alg. 1


def generator_step(generator, teacher, fake, cfg, z: Tensor, labels: Tensor | None, pair: tuple):
    """Step A: (loss of the generator, its samples x detached, what to log)  (DMD Alg. 1, §3.3).

    Gradients reach the generator alone: D_real and D_fake are computed without any.
    pair: (z, y, labels) of the teacher for the regression. |grad| is logged as a root mean square.
    """
    x = generate(generator, z, labels)
    u = 0.02 + 0.96 * torch.rand(len(x), device=x.device)  # not the ends: as in the paper
    sigma = karras_sigma(u, teacher.sigma_min, teacher.sigma_max)
    with torch.no_grad():
        x_t = diffuse(x, sigma)
        denoised_real = guided(teacher, x_t, sigma, labels, cfg.guidance)
        denoised_fake = fake(x_t, sigma, labels)
        weight = dmd_weight(x, denoised_real, sigma, cfg.weighting)
        grad = dmd_gradient(denoised_fake, denoised_real, weight)
    loss = cfg.dm_weight * surrogate_loss(x, grad)
    gap = (denoised_fake - denoised_real).abs().mean()
    log = {"|grad|": grad.square().mean().sqrt(), "|D_fake - D_real|": gap}
    if cfg.regression_weight:
        z_ref, y_ref, labels_ref = pair  # another batch: the two losses share no z
        x_ref = generate(generator, z_ref, labels_ref)
        log["regression"] = regression_loss(x_ref, y_ref, cfg.regression)
        loss = loss + cfg.regression_weight * log["regression"]
    return loss, x.detach(), log


def fake_step(fake, x: Tensor, labels: Tensor | None) -> Tensor:
    """Step B: denoising loss of the fake on detached samples x, at all noise levels."""
    sigma = karras_sigma(torch.rand(len(x), device=x.device), fake.sigma_min, fake.sigma_max)
    return fake_loss(fake(diffuse(x, sigma), sigma, labels), x, sigma, fake.sigma_data)


# == 3. Settings: the method's own; seed, device, out, resume ... are edm.RunConfig's =============


@dataclass
class Config(edm.RunConfig):
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder; only the verdict reads images
    steps: int = 300  # generator updates; paper 300,000
    batch: edm.Count = 32  # samples an update; paper 392
    ratio: int = 2  # fake updates per generator update; paper 1; 0: the fake is never trained
    dm_weight: float = 1.0  # weight of the distribution matching loss; 0 leaves regression alone
    weighting: Weighting = "paper"  # weight over noise levels
    regression_weight: float = 0.05  # weight of the regression loss; paper 0.25; 0: no pairs
    regression: Literal["l2", "lpips"] = "l2"  # paper lpips (pip install lpips)
    pairs: edm.Count = 1000  # noise-image pairs of the teacher for the regression; paper 100,000
    pair_batch: edm.Count = 16  # pairs an update; paper: as many as samples
    pair_steps: edm.Count = 18  # Heun steps of a pair: 2 N - 1 network calls
    guidance: float = 1.0  # classifier-free guidance of the teacher; 1 is off
    lr_generator: float = 1e-3  # learning rate of the generator; paper 5e-5
    lr_fake: float = 1e-3  # learning rate of the fake; paper 5e-5
    ema: edm.Decay = 0.995  # decay of the average that is the result; paper: none
    clip: edm.Positive = 10.0  # largest gradient norm of a network


# == 4. Training ============================================= post: Training Algorithm; DMD Alg. 1


def load_teacher(cfg: Config, run: Run) -> Denoiser:
    """--teacher, or --sample, else the shipped one for this data set; frozen, in eval mode."""
    path = cfg.sample or cfg.teacher
    if path.endswith((".pkl", ".pth")):  # files of NVlabs/edm and FastGen
        from backbones.edm_files import load_denoiser

        return load_denoiser(path, cfg.device).requires_grad_(False)
    teacher = edm.load_denoiser(path, cfg.device) if path else edm.default_teacher(cfg, run)
    return teacher.requires_grad_(False)


def load_pairs(cfg: Config, run: Run, teacher: Denoiser, metric) -> dict[str, Tensor] | None:
    """The regression's pairs, made once for a run; classes as frequent as in the data, if known."""
    if not cfg.regression_weight:
        return None
    if cfg.regression == "lpips":
        lpips_network(torch.device(cfg.device))  # a missing package stops here
    draw = metric.labels if metric else edm.class_labels
    z, labels = edm.noise(teacher, cfg.pairs, cfg.seed + 10000), draw(cfg.pairs, teacher.label_dim)
    how = cfg.pair_steps, cfg.guidance, cfg.device
    return run.once("pairs.safetensors", lambda: make_pairs(teacher, z, labels, *how))


@cache
def lpips_network(device) -> torch.nn.Module:
    """The LPIPS distance (VGG) of the optional package lpips."""
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError) as error:  # OSError: the download of VGG's weights
        raise UserError(f"--regression lpips needs pip install lpips and VGG ({error}).") from None
    return network.requires_grad_(False).to(device)


def train(cfg: Config, run: Run, teacher: Denoiser, pairs: dict | None) -> Denoiser:
    """Alternates generator and fake updates; returns the average of the generator's weights."""
    device = torch.device(cfg.device)
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    edm.shard(generator, fake, ema)  # under torchrun: FSDP2; else nothing
    adamw = partial(torch.optim.AdamW, betas=(0.0, 0.99), weight_decay=0.01, fused=True)
    optimizer_generator = adamw(generator.parameters(), lr=cfg.lr_generator)
    optimizer_fake = adamw(fake.parameters(), lr=cfg.lr_fake)
    trained = {"generator": (generator, optimizer_generator), "fake": (fake, optimizer_fake)}
    trained["ema"] = (ema, None)
    batch, pair_batch = edm.rows(cfg.batch), edm.rows(cfg.pair_batch)  # of this process

    def draw():
        """(z, labels) for the generator."""
        z = torch.randn(batch, *teacher.shape, device=device)
        labels = torch.randint(max(teacher.label_dim, 1), (batch,), device=device)
        return z, labels if teacher.label_dim else None

    start = run.load(trained)  # 0, or with --resume the step of checkpoint.pt
    for step in run.bar(start, cfg.steps):
        # Step A: the generator
        z, labels = draw()
        pair = draw_pairs(pairs, pair_batch, device)
        loss, x, log = generator_step(generator, teacher, fake, cfg, z, labels, pair)
        run.update(step, "generator", generator, optimizer_generator, loss, cfg.clip)
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: the fake, first on the same x as the generator (paper; the post draws a new one)
        for i in range(cfg.ratio):
            if i > 0:
                z, labels = draw()
                with torch.no_grad():
                    x = generate(generator, z, labels)
            log["fake loss"] = fake_step(fake, x, labels)
            run.update(step, "fake", fake, optimizer_fake, log["fake loss"], cfg.clip)
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(step, trained)
            run.pictures(step, ema, partial(generate, ema), teacher, fake)
    return edm.whole(ema, teacher)


def draw_pairs(pairs: dict | None, n: int, device) -> tuple:
    """n random pairs (z, y, labels) on the device."""
    if pairs is None:
        return ()
    i = torch.randint(len(pairs["z"]), (n,))
    return tuple(pairs[k][i].to(device) if k in pairs else None for k in ("z", "y", "labels"))


# == 5. Pictures and verdict ======================================================================


def evaluate(cfg: Config, run: Run, generator, teacher, pairs: dict | None, metric) -> dict:
    """{name: numbers}, all at the same n; samples.png: teacher above generator, same z."""
    if metric is None:
        return {}
    many_steps = partial(heun_sampler, teacher, steps=cfg.pair_steps, guidance=cfg.guidance)
    nfe, n = metric.network_calls(cfg.pair_steps, cfg.guidance, teacher), metric.n(cfg)
    samplers, known = (
        {"teacher": (many_steps, nfe), "generator": (partial(generate, generator), 1)},
        {},
    )
    if pairs and len(pairs["y"]) >= n:  # samples of the teacher that are made already
        labels = pairs["labels"][:n] if "labels" in pairs else None
        seconds = {"seconds_per_1000": pairs["seconds_per_1000"].item()}
        known["teacher"] = {"nfe": nfe} | metric(pairs["y"][:n], labels) | seconds
    return metric.verdict(run, teacher, cfg, samplers, known)


def main(cfg: Config) -> dict:
    """Runs everything; returns what result.json holds."""
    run = Run(cfg, "dmd_mnist")
    teacher = load_teacher(cfg, run)
    if cfg.sample:
        return run.draw_samples(teacher, partial(generate, teacher))
    metric = edm.load_metric(cfg, run, teacher)
    pairs = load_pairs(cfg, run, teacher, metric)
    generator = train(cfg, run, teacher, pairs)
    generator.save(run.path("generator"))
    return run.finish(evaluate(cfg, run, generator, teacher, pairs, metric))


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
