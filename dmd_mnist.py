"""DMD: a 35-step diffusion model of MNIST becomes a one-step generator, on a laptop CPU.

Read it beside the blog post on DMD: the functions stand in its order, banners name its sections.

Papers      [DMD] Yin et al. 2023, arXiv 2311.18828     [EDM] Karras et al. 2022, arXiv 2206.00364
Objects     teacher    D_real(x_t, σ)   EDM denoiser of the data (edm_teacher.py)       frozen
            generator  G(z) = D_θ(σ_max z; σ_max), one call; starts from the teacher    trained
            fake       D_fake(x_t, σ)   denoiser of the generator's samples; same start trained
Shapes      x, z, eps: (B, C, H, W), x in [-1, 1]; sigma, labels: (B,); D returns the clean image
Differences from the paper, most of them because the demo has three minutes on two CPU cores
            1. AdamW with β = (0, 0.99) and learning rates of 1e-3, no warm-up; paper (0.9, 0.999),
               5e-5, 500 steps of warm-up. Batches of 32 and some hundred updates; paper 392, 300k
            2. two fake updates per generator update, the second on new samples; paper one
            3. regression by the mean square, weight 0.05, on 16 of 1,000 pairs an update; paper
               LPIPS, 0.25, on as many pairs as samples: LPIPS costs many times the rest
            4. the result is the average (EMA) of the generator's weights, as in the post
Run         python dmd_mnist.py          # 2.5 minutes on 2 CPU cores; MNIST-FD 0.042 ± 0.003, its
                                         # teacher 0.028, real images 0.009 (n = 10,000, 3 seeds)
            python dmd_mnist.py --steps 1500 --ema 0.998     # 18 minutes on one: 0.030 ± 0.002
            python dmd_mnist.py --data synthetic --steps 50      # drawn shapes, own tiny teacher
            python dmd_mnist.py --sample runs/dmd_mnist-0/generator.safetensors --labels 3,1,4
"""

import copy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import edm_teacher as edm
from edm_teacher import EDMPrecond, Run, UserError, expand, guided, heun_sampler

# ------------------------------------------------------------------------------------------------
# 1. The method                                   post: The Math, Math and Code Side by Side; DMD §3
# ------------------------------------------------------------------------------------------------


# --- post: Distributions and the Matching Objective ---
def generate(generator, z: Tensor, labels: Tensor | None = None) -> Tensor:
    """x = G(z) = D_θ(σ_max z; σ_max, y): one network call (DMD §3.1).

    z: unit Gaussian noise (B, C, H, W).   labels: (B,) or None.
    """
    sigma = torch.full((len(z),), generator.sigma_max, device=z.device)
    return generator(generator.sigma_max * z, sigma, labels)


# --- post: Forward Process and Score Estimation via Score-SDE ---
def karras_sigma(
    u: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """σ(u) = (σ_min^1/ρ + u (σ_max^1/ρ - σ_min^1/ρ))^ρ, u in [0, 1], u = 1: σ_max  (EDM Eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def score(denoised: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """∇ log p(x_t; σ) = (D(x_t; σ) - x_t) / σ²  (EDM Eq. 3, DMD Eq. 4 and 5).

    Not called below: in s_fake - s_real the x_t cancel, (D_fake - D_real) / σ² is left.
    """
    return (denoised - x_t) / expand(sigma, x_t) ** 2


# --- post: The Distribution-Matching Gradient ---
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


# --- post: Preventing Mode Dropping - The Regression Anchor ---
def make_pairs(teacher: EDMPrecond, n: int, labels, steps: int, guidance: float, seed: int, device):
    """D = {(z_i, y_i, label_i)}, y = ODE-solve(teacher, z) by Heun's method  (DMD §3.3).

    A dict of z, y: (n, C, H, W) on the CPU, and the labels (n,), unless None is given.
    """
    sampler = partial(heun_sampler, teacher, steps=steps, guidance=guidance)
    z = edm.noise(teacher, n, seed)
    y, seconds = edm.in_batches(sampler, z, labels, device)
    pairs = {"z": z, "y": y, "seconds_per_1000": torch.tensor(seconds)}
    return pairs if labels is None else pairs | {"labels": labels}


def regression_loss(x: Tensor, y: Tensor, kind: str = "l2") -> Tensor:
    """ℓ(G(z), y)  (DMD Eq. 9). l2: mean over batch and pixels (the post's); lpips: the paper's.

    For lpips grey images become RGB, and all are resized to 224 x 224 as in DMD App. B.
    """
    if kind == "l2":
        return F.mse_loss(x, y)
    if kind != "lpips":
        raise UserError(f"--regression {kind}: choose l2 or lpips.")
    x, y = (F.interpolate(v.expand(-1, 3, -1, -1), size=224, mode="bilinear") for v in (x, y))
    return lpips_network(x.device)(x, y).mean()


# --- post: Step B, the fake's own loss ---
def fake_loss(denoised: Tensor, x: Tensor, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """mean (1/σ² + 1/σ_data²) (D_fake(x_t; σ) - x)²  (DMD Eq. 6, Alg. 3): EDM's weight.

    x: samples of the generator, detached.   Mean over batch, channels and pixels.
    """
    weight = 1 / sigma**2 + 1 / sigma_data**2
    return (expand(weight, x) * (denoised - x) ** 2).mean()


# ------------------------------------------------------------------------------------------------
# 2. The two updates                                        post: Training Algorithm; DMD Alg. 1
# ------------------------------------------------------------------------------------------------


def generator_step(generator, teacher, fake, cfg, z: Tensor, labels: Tensor | None, pair: tuple):
    """Step A: (loss of the generator, its samples x detached, what to log)  (DMD Alg. 1, §3.3).

    Gradients reach the generator alone: D_real and D_fake are computed without any.
    pair: (z, y, labels) of the teacher for the regression. |grad| is logged as a root mean square.
    """
    x = generate(generator, z, labels)
    u = 0.02 + 0.96 * torch.rand(len(x), device=x.device)  # not the ends: scores are useless there
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
        log["regression"] = regression_loss(
            generate(generator, z_ref, labels_ref), y_ref, cfg.regression
        )
        loss = loss + cfg.regression_weight * log["regression"]
    return loss, x.detach(), log


def fake_step(fake, x: Tensor, labels: Tensor | None) -> Tensor:
    """Step B: denoising loss of the fake on detached samples x, at all noise levels."""
    sigma = karras_sigma(torch.rand(len(x), device=x.device), fake.sigma_min, fake.sigma_max)
    return fake_loss(fake(diffuse(x, sigma), sigma, labels), x, sigma, fake.sigma_data)


# ------------------------------------------------------------------------------------------------
# 3. Networks: the generator and the fake are copies of the teacher              post: Setup
# ------------------------------------------------------------------------------------------------


def load_teacher(cfg) -> EDMPrecond:
    """--teacher, else the shipped one for this data set; frozen, in eval mode."""
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


@cache
def lpips_network(device) -> torch.nn.Module:
    """The LPIPS distance (VGG) of the optional package lpips."""
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError) as error:  # OSError: the download of VGG's weights
        raise UserError(f"--regression lpips needs pip install lpips and VGG ({error}).") from None
    return network.requires_grad_(False).to(device)


# ------------------------------------------------------------------------------------------------
# 4. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder; only metrics read the images
    data_dir: str = "data"  # where data sets are, or are downloaded to
    teacher: str = ""  # .safetensors of edm_teacher.py; default: the one shipped for the data set
    steps: int = 300  # generator updates; paper 300,000
    batch: int = 32  # samples an update; paper 392
    ratio: int = 2  # fake updates per generator update; paper 1; 0: the fake is never trained
    dm_weight: float = 1.0  # weight of the distribution matching loss; 0 leaves regression alone
    weighting: str = "paper"  # weight over noise levels: paper, kl, sigma, sigma3, post
    regression_weight: float = 0.05  # weight of the regression loss; paper 0.25; 0: no pairs
    regression: str = "l2"  # l2, or lpips (pip install lpips); paper lpips
    pairs: int = 1000  # noise-image pairs of the teacher for the regression; paper 100,000
    pair_batch: int = 16  # pairs an update; paper: as many as samples
    pair_steps: int = 18  # Heun steps of a pair: 2 N - 1 network calls
    guidance: float = 1.0  # classifier-free guidance of the teacher; 1 is off
    lr_generator: float = 1e-3  # learning rate of the generator; paper 5e-5
    lr_fake: float = 1e-3  # learning rate of the fake; paper 5e-5
    ema: float = 0.995  # decay of the average that is the result, d of ema_update; paper: none
    clip: float = 10.0  # largest gradient norm of a network
    sample: str = ""  # only draw --n pictures from this generator.safetensors
    labels: str = ""  # classes for --sample, like 3,1,4; default: all in turn
    n: int = 64  # pictures of --sample
    eval_n: int = 1000  # samples behind the numbers of the verdict
    seed: int = 0  # of everything random
    device: str = "auto"  # cuda, cpu, mps; auto: cuda if there is one, else cpu
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/dmd_mnist-<k>
    resume: bool = False  # go on with the run in --out, or the last one
    save_every: int = 100  # generator updates between checkpoints


# ------------------------------------------------------------------------------------------------
# 5. Training                                               post: Training Algorithm; DMD Alg. 1
# ------------------------------------------------------------------------------------------------


def train(cfg: Config, run: Run, teacher: EDMPrecond, pairs: dict | None) -> EDMPrecond:
    """Alternates generator and fake updates; returns the average of the generator's weights."""
    device = torch.device(cfg.device)
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    adam = {"betas": (0.0, 0.99), "weight_decay": 0.01, "fused": True}
    edm.shard(generator, fake, ema)
    optimizer_generator = torch.optim.AdamW(generator.parameters(), cfg.lr_generator, **adam)
    optimizer_fake = torch.optim.AdamW(fake.parameters(), cfg.lr_fake, **adam)
    parts = {"generator": generator, "fake": fake, "ema": ema}
    parts |= {"optimizer_generator": optimizer_generator, "optimizer_fake": optimizer_fake}
    batch = edm.rows(cfg.batch)  # of this process

    def draw():
        z = torch.randn(batch, *teacher.shape, device=device)
        labels = torch.randint(max(teacher.label_dim, 1), (batch,), device=device)
        return z, labels if teacher.label_dim else None

    for step in run.loop(cfg.steps, **parts):
        # Step A: the generator
        z, labels = draw()
        pair = draw_pairs(pairs, edm.rows(cfg.pair_batch), device)
        loss, x, log = generator_step(generator, teacher, fake, cfg, z, labels, pair)
        update(optimizer_generator, loss, generator, cfg, run, step, log | {"generator loss": loss})
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: the fake, on the same x as the generator (paper; the post draws a new one)
        for i in range(cfg.ratio):
            if i:
                z, labels = draw()
                with torch.no_grad():
                    x = generate(generator, z, labels)
            log["fake loss"] = fake_step(fake, x, labels)
            update(optimizer_fake, log["fake loss"], fake, cfg, run, step, log)
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


def draw_pairs(pairs: dict | None, n: int, device) -> tuple:
    """n random pairs (z, y, labels) on the device."""
    if pairs is None:
        return ()
    i = torch.randint(len(pairs["z"]), (n,))
    return tuple(pairs[k][i].to(device) if k in pairs else None for k in ("z", "y", "labels"))


# ------------------------------------------------------------------------------------------------
# 6. Pictures, evaluation, verdict
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def pictures(run: Run, step: int, generator, teacher, fake, cfg: Config) -> None:
    """samples_<step>.png from fixed z; denoised.png: x, x_t, D_real and D_fake at σ = 1."""
    device = torch.device(cfg.device)
    labels = edm.sample_labels("", 32, teacher.label_dim)
    labels = None if labels is None else labels.to(device)
    x = generate(generator, edm.noise(teacher, 32, cfg.seed + 20000).to(device), labels)
    edm.save_rows(run.path(f"samples_{step}.png"), {f"generator, step {step}": x})
    x, labels = x[:16], None if labels is None else labels[:16]
    sigma = torch.full((16,), 1.0, device=device)
    x_t = x + edm.noise(teacher, 16, cfg.seed + 30000).to(device)
    rows = {"x = G(z)": x, "x_t = x + ε": x_t, "D_real(x_t; 1)": teacher(x_t, sigma, labels)}
    edm.save_rows(run.path("denoised.png"), rows | {"D_fake(x_t; 1)": fake(x_t, sigma, labels)})


def evaluate(cfg: Config, run: Run, generator, teacher, pairs: dict | None, metric) -> dict:
    """Rows of the verdict, all at the same n, and samples.png: teacher above generator, same z."""
    n, device, seed = min(cfg.eval_n, len(metric.test)), torch.device(cfg.device), cfg.seed + 20000
    nfe = edm.network_calls(cfg.pair_steps, cfg.guidance, teacher.label_dim)
    one_step = partial(generate, generator)
    many_steps = partial(heun_sampler, teacher, steps=cfg.pair_steps, guidance=cfg.guidance)
    if pairs and len(pairs["y"]) >= n:  # samples of the teacher that are paid for
        row = {"nfe": nfe} | metric(
            pairs["y"][:n], pairs["labels"][:n] if "labels" in pairs else None
        )
        row["seconds_per_1000"] = pairs["seconds_per_1000"].item()
    else:
        row = edm.measure(many_steps, teacher, metric, nfe, n, seed, cfg)
    own = edm.measure(one_step, generator, metric, 1, n, seed, cfg)
    z, labels = edm.noise(teacher, 64, seed), edm.sample_labels("", 64, teacher.label_dim)
    y, x = (edm.in_batches(f, z, labels, device)[0] for f in (many_steps, one_step))
    edm.save_rows(run.path("samples.png"), {f"teacher, {nfe} NFE": y, "generator, 1 NFE": x})
    return {"teacher": row, "generator": own, "floor": metric.floor(n)}


def main(cfg: Config) -> dict:
    """Runs everything; returns what result.json holds."""
    device = edm.set_up(cfg)
    if cfg.sample:
        edm.draw_samples(cfg, generate)
        return {}
    zeros = torch.zeros(1, 1, 32, 32, device=device)
    dmd_weight(zeros, zeros, torch.ones(1, device=device), cfg.weighting)  # misspelt options or
    regression_loss(zeros, zeros, cfg.regression)  # a missing package stop here
    on_the_spot = cfg.data == "synthetic" and not cfg.teacher
    teacher = None if on_the_spot else load_teacher(cfg)
    run = Run(cfg, "dmd_mnist")
    if result := run.finished():
        edm.print_verdict(result, run.folder)
        return result
    teacher = teacher or synthetic_teacher(cfg, run)
    shape = {"resolution": teacher.img_resolution, "channels": teacher.img_channels}
    metric = edm.get_metric(cfg.data, cfg.data_dir, run.folder, device, **shape)
    metric.check(teacher)
    pairs = None
    if cfg.regression_weight:
        path, how = run.path("pairs.safetensors"), (cfg.pair_steps, cfg.guidance, cfg.seed + 10000)
        if not path.exists():
            labels = metric.labels(cfg.pairs, teacher.label_dim)
            edm.save_tensors(path, make_pairs(teacher, cfg.pairs, labels, *how, device), {})
        pairs, _ = edm.load_tensors(path)
    generator = train(cfg, run, teacher, pairs)
    edm.save_denoiser(generator, run.path("generator.safetensors"))
    run.curves()
    result = run.finish(evaluate(cfg, run, generator, teacher, pairs, metric))
    edm.print_verdict(result, run.folder)
    return result


if __name__ == "__main__":
    edm.command_line(main, Config)
