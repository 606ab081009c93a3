"""LADD: adversarial only, on the features of the frozen teacher; no score matching, no fake.

Papers      [LADD] Sauer et al. 2024, arXiv 2403.12015    [ADD] 2311.17042    [EDM] 2206.00364
            Section and equation numbers of LADD and ADD: version 1, from notes, not from the text
Objects     teacher    D_real(x_t, σ)   EDM denoiser; its encoder reads noisy images    frozen
            generator  G(x_t, σ)        N calls, one by default; starts from teacher    trained
            discriminator               a head on each level of the teacher's encoder   trained
Shapes      x, z, eps, real: (B, C, H, W), x in [-1, 1]; sigma, labels: (B,); logits: (B, heads)
Differences from the paper, most of them because the demo has minutes on two CPU cores
            1. pixels and EDM's σ for latents and t: σ = t / (1 - t) there, times σ_data = 0.5 here,
               because latents have standard deviation 1. This scaling is our inference
            2. LADD prints no formula of its loss: hinge and R1 on head features are ADD's, which
               LADD says to follow for the most part; softplus is FastGen's. R1 on inputs is APT's
            3. small convolutional heads on the encoder's last map per resolution; paper: one
               after every attention block. Noise level and text reach them through the features
               alone; the paper's heads are told both again. Means over heads for sums
            4. real images are the data by default; paper: samples of the teacher, --real teacher
            5. the discriminator's noise has logit t ~ N(0, 1); paper N(1, 1), for latents. What the
               noise covers goes unpunished: specks of 0.06 on black show below σ = 0.1 alone
            6. a generator of N steps is trained on its own N levels; paper: on four, and then
               sampled with 1, 2 or 4. Images of --real teacher are unguided; paper: guided
            7. the result is the average (EMA) of the generator's weights; AdamW, learning rates,
               batch, ratio: ours, LADD names none
Run         python ladd.py                      # MNIST: 4 minutes on 2 CPU cores; accuracy 0.975,
                                                # MNIST-FD 0.77 ± 0.09 (n = 10,000, 3 seeds)
            python ladd.py --real teacher       # no real images, no download
            python ladd.py --sampling-steps 4 --loss softplus
            python ladd.py --sample runs/ladd-0/generator.safetensors --labels 3,1,4
            diff -w dmd2_cifar.py ladd.py       # what goes and what comes
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edm_teacher as edm
from edm_teacher import EDMPrecond, Run, UserError, expand, heun_sampler

# ------------------------------------------------------------------------------------------------
# 1. The method                                                                LADD §3, §4.1, §5
# ------------------------------------------------------------------------------------------------


# --- the generator: one step, or N with fresh noise between them (LADD §5) ---
def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def sampling_sigmas(generator, steps: int) -> Tensor:
    """σ_k = σ_data t / (1 - t), t = 1 - k/N, k = 0 ... N-1: LADD's t = 1, .75, .5, .25 for N = 4.

    Kept between σ_min and σ_max, which stands for the infinity of t = 1. σ_data of latents: 1.
    """
    k = torch.arange(steps)
    sigma = min(generator.sigma_data, 1) * (steps - k) / k  # t / (1 - t)
    return sigma.clamp(generator.sigma_min, generator.sigma_max)


def input_probabilities(steps: int) -> Tensor:
    """p of k = 0 ... N-1 in training: .7 for pure noise, the rest shared (LADD §5: .7 .1 .1 .1)."""
    return torch.tensor([1.0] if steps == 1 else [0.7] + [0.3 / (steps - 1)] * (steps - 1))


def training_inputs(generator, z: Tensor, real: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(x_t, σ_k), x_t = real + σ_k z with k ~ p for each sample, but for k = 0 noise alone.

    The generator's inputs are noised images, as in ADD: no backward simulation.
    """
    k = torch.multinomial(input_probabilities(steps), len(z), replacement=True)
    sigma = sampling_sigmas(generator, steps)[k].to(z.device)
    k = expand(k.to(z.device), z)
    return torch.where(k == 0, 0, real) + expand(sigma, z) * z, sigma


def generate(generator, z: Tensor, labels: Tensor | None = None, steps: int = 1) -> Tensor:
    """The sampler: N network calls, with N = 1  x = G(σ_max z; σ_max, y)  (LADD §5).

    z: unit Gaussian noise (B, C, H, W).   labels: (B,) or None.
    """
    sigma = sampling_sigmas(generator, steps).to(z.device)[:, None].expand(-1, len(z))
    x = generator(generator.sigma_max * z, sigma[0], labels)
    for k in range(1, steps):
        x = generator(diffuse(x, sigma[k]), sigma[k], labels)
    return x


def surrogate_loss(x: Tensor, grad: Tensor) -> Tensor:
    """½ mean (x - sg[x - grad])²: its derivative is dL/dx = grad / numel  (DMD Alg. 2).

    Mean over batch, channels and pixels. Its value says nothing about progress.
    """
    return 0.5 * F.mse_loss(x, (x - grad).detach())


# --- real images made by the teacher (LADD §3, §4.2) ---
def make_pairs(teacher: EDMPrecond, n: int, labels, steps: int, guidance: float, seed: int, device):
    """D = {(z_i, y_i, label_i)}, y = ODE-solve(teacher, z) by Heun's method  (DMD §3.3).

    A dict of z, y: (n, C, H, W) on the CPU, and the labels (n,), unless None is given.
    """
    sampler = partial(heun_sampler, teacher, steps=steps, guidance=guidance)
    z = edm.noise(teacher, n, seed)
    y, seconds = edm.in_batches(sampler, z, labels, device)
    pairs = {"z": z, "y": y, "seconds_per_1000": torch.tensor(seconds)}
    return pairs if labels is None else pairs | {"labels": labels}


# --- the GAN on noised images (LADD §3, §4.1) ---
def gan_diffuse(x: Tensor, teacher, mean: float = 1.0, std: float = 1.0) -> tuple[Tensor, Tensor]:
    """(x_t, σ) for the discriminator: ln σ ~ N(mean + ln σ_data, std²), a level for each sample.

    That is t = sigmoid(mean + std u), u ~ N(0, 1), logit-normal, since logit t = ln(σ/σ_data)
    (LADD §4.1). More noise asks for global structure, less for texture.
    """
    sigma = min(teacher.sigma_data, 1) * (mean + std * torch.randn(len(x), device=x.device)).exp()
    sigma = sigma.clamp(teacher.sigma_min, teacher.sigma_max)
    return diffuse(x, sigma), sigma


def gan_generator_loss(logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """hinge: mean -l  (ADD's);   softplus: mean softplus(-l) = mean -log sigmoid(l)."""
    edm.one_of("loss", kind, "hinge", "softplus")
    return -logits_fake.mean() if kind == "hinge" else F.softplus(-logits_fake).mean()


def gan_discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """hinge: mean max(0, 1 - l_real) + mean max(0, 1 + l_fake)  (ADD's), best l: ±1.

    softplus: mean softplus(-l_real) + mean softplus(l_fake), best l: log p_real / p_fake.
    """
    edm.one_of("loss", kind, "hinge", "softplus")
    f = F.softplus if kind == "softplus" else lambda l: F.relu(1 + l)
    return f(-logits_real).mean() + f(logits_fake).mean()


def r1_penalty(logits: Tensor, logits_perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)², n ~ N(0, I): |∇l|² as std -> 0, at first order.

    Both logits are those of the same noisy real image x_t at the same σ. APT (arXiv 2501.08316) and
    FastGen do not divide: their weight times std² is ours.
    """
    return ((logits_perturbed - logits) / std).square().mean()


def r1_of_features(logits: Tensor, features: list[Tensor]) -> Tensor:
    """mean |∂l_k/∂f_k|²: R1 of each head at its own input, exact  (ADD's).

    features: (B, ...) of real images, with requires_grad, that gave logits (B, heads).
    Mean over batch and heads, sum over a map. Can be differentiated again.
    """
    grads = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return torch.stack([grad.square().flatten(1).sum(1) for grad in grads]).mean()


def gan_gradient(x: Tensor, logits_of, loss_of) -> tuple[Tensor, Tensor]:
    """(L_G, numel ∂L_G/∂x) for L_G = loss_of(logits_of(x)): what surrogate_loss wants.

    As dmd_gradient in the other scripts, to compare sizes. No network gets a gradient.
    """
    x = x.detach().requires_grad_()
    loss = loss_of(logits_of(x))
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad * x.numel()


# ------------------------------------------------------------------------------------------------
# 2. The two updates                                                                      LADD §3
# ------------------------------------------------------------------------------------------------


def generator_step(generator, teacher, discriminator, cfg, inputs: tuple):
    """Step A: (loss of the generator, its samples x detached, what to log): adversarial alone.

    inputs: (x_t, σ, labels) of the generator. Gradients reach it alone: they are computed at x,
    through noise, frozen encoder and heads, then sent through it.
    """
    x, labels = generator(*inputs), inputs[-1]
    loss, grad = gan_gradient(
        x,
        lambda x: discriminator(
            teacher, *gan_diffuse(x, teacher, cfg.noise_mean, cfg.noise_std), labels
        ),
        partial(gan_generator_loss, kind=cfg.loss),
    )
    log = {"|GAN grad|": grad.square().mean().sqrt(), "GAN loss": loss}
    return surrogate_loss(x, grad), x.detach(), log


def discriminator_step(teacher, discriminator, cfg, x, labels, real, real_labels):
    """Step B: (loss, what to log): real against generated, both noised.

    x: samples of the generator, detached. Gradients reach the heads alone.
    """
    x_t, sigma = gan_diffuse(torch.cat([real, x]), teacher, cfg.noise_mean, cfg.noise_std)
    both = None if labels is None else torch.cat([real_labels, labels])
    with torch.no_grad():  # the encoder is frozen, and nothing before it is trained here
        features = discriminator.features(teacher, x_t, sigma, both)
    features_real = [f[: len(real)].requires_grad_(cfg.r1_features > 0) for f in features]
    logits_real = discriminator.logits(features_real)
    logits_fake = discriminator.logits([f[len(real) :] for f in features])
    loss = gan_discriminator_loss(logits_real, logits_fake, cfg.loss)
    log = {"discriminator loss": loss}
    log |= {"logit real": logits_real.mean(), "logit generated": logits_fake.mean()}
    if cfg.r1_features:
        log["R1 features"] = r1_of_features(logits_real, features_real)
        loss = loss + cfg.r1_features * log["R1 features"]
    if cfg.r1_weight:
        x_t, sigma = x_t[: len(real)], sigma[: len(real)]
        x_t = x_t + cfg.r1_std * torch.randn_like(x_t)
        with torch.no_grad():
            features = discriminator.features(teacher, x_t, sigma, real_labels)
        log["R1"] = r1_penalty(logits_real, discriminator.logits(features), cfg.r1_std)
        loss = loss + cfg.r1_weight * log["R1"]
    return loss, log


# ------------------------------------------------------------------------------------------------
# 3. Networks: the generator is a copy of the teacher, the discriminator is heads on the teacher
# ------------------------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """One head on each chosen feature map of a denoiser's encoder -> logits (B, heads).

    Head: 4 x 4 convolutions with stride 2 down to 4 x 4 pixels, one over all that is left, linear
    (DMD2 App. F.1). resolutions: of the feature maps; none: all of them.
    """

    def __init__(self, denoiser, resolutions=()):
        super().__init__()
        with torch.no_grad():  # one picture through the encoder tells the shapes
            x = torch.zeros(1, *denoiser.shape, device=next(denoiser.parameters()).device)
            _, features = denoiser(x, 1.0, return_features="only")
        found = [f.shape[-1] for f in features]
        if not set(resolutions) <= set(found):
            raise UserError(f"--gan-levels {resolutions}: this network has {found}.")
        self.chosen = [found.index(r) for r in resolutions] or [*range(len(found))]
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

    def features(self, backbone, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> list[Tensor]:
        _, features = backbone(x_t, sigma, labels, return_features="only")
        return [features[i].flatten(2, -2).float() for i in self.chosen]

    def logits(self, features: list[Tensor]) -> Tensor:
        with torch.autocast(features[0].device.type, enabled=False):  # logits in full precision
            return torch.cat([h(f) for h, f in zip(self.heads, features, strict=True)], 1)

    def forward(self, backbone, x_t: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        return self.logits(self.features(backbone, x_t, sigma, labels))


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


# ------------------------------------------------------------------------------------------------
# 4. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder of class folders with images
    data_dir: str = "data"  # where data sets are, or are downloaded to
    teacher: str = ""  # .safetensors of edm_teacher.py, or sd15:PATH, sdxl:, flux:, wan:, ...
    steps: int = 0  # generator updates; default: 1000, on cifar10 400; paper 10,000
    batch: int = 32  # samples an update
    ratio: int = 2  # updates of the discriminator per generator update
    sampling_steps: int = 1  # network calls N of the generator, also for --sample; paper 1 to 4
    real: str = "data"  # the discriminator's real images: data, or teacher (paper): made by it
    pairs: int = 1000  # images that --real teacher makes
    loss: str = "hinge"  # hinge (ADD), or softplus (FastGen)
    noise_mean: float = 0.0  # mean of the discriminator's logit t = ln(sigma/sigma_data); paper 1
    noise_std: float = 1.0  # its standard deviation; paper 1
    gan_levels: str = ""  # resolutions of the feature maps, like 16,8; default: all
    r1_features: float = 1e-5  # weight of the R1 penalty on head features; ADD 1e-5; 0: none
    r1_weight: float = 0.0  # weight of the approximate R1 penalty on inputs; 0: none
    r1_std: float = 0.1  # size of its perturbation
    guidance: float = 1.0  # classifier-free guidance of the teacher's images; 1 is off
    teacher_steps: int = 18  # Heun steps N of the teacher's images: 2 N - 1 calls; 0: none
    lr_generator: float = 2e-4  # learning rate of the generator
    lr_discriminator: float = 1e-3  # learning rate of the heads
    beta1: float = 0.0  # AdamW's decay of the mean gradient
    beta2: float = 0.99  # AdamW's decay of the squared gradient
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
    out: str = ""  # the run's folder; default: the next free runs/ladd-<k>
    resume: bool = False  # go on with the run in --out, or the last one
    save_every: int = 100  # generator updates between checkpoints


# ------------------------------------------------------------------------------------------------
# 5. Training                                                                             LADD §3
# ------------------------------------------------------------------------------------------------


def train(cfg: Config, run: Run, teacher: EDMPrecond, images, classes) -> EDMPrecond:
    """Alternates the two updates; returns the average of the generator's weights.

    images, classes: uint8 real images (of the data or of the teacher) and their labels.
    """
    device = torch.device(cfg.device)
    generator = edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    discriminator = Discriminator(generator, edm.numbers(cfg.gan_levels)).to(device)
    adam = {"betas": (cfg.beta1, cfg.beta2), "weight_decay": 0.01, "fused": True}
    edm.shard(generator, ema)
    edm.replicate(discriminator)  # R1 on features differentiates its gradients again
    optimizer_generator = torch.optim.AdamW(generator.parameters(), cfg.lr_generator, **adam)
    optimizer_discriminator = torch.optim.AdamW(
        discriminator.parameters(), cfg.lr_discriminator, **adam
    )
    parts = {"generator": generator, "discriminator": discriminator, "ema": ema}
    parts |= {"optimizer_generator": optimizer_generator}
    parts |= {"optimizer_discriminator": optimizer_discriminator}
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=cfg.amp)

    def draw():
        """((x_t, σ, labels) for the generator, real images, their labels: the same)"""
        i = torch.randint(len(images), (edm.rows(cfg.batch),))
        real, labels = edm.to_float(images[i].to(device)), classes[i].to(device)
        if not teacher.label_dim:
            labels = None
        inputs = training_inputs(generator, torch.randn_like(real), real, cfg.sampling_steps)
        return (*inputs, labels), real, labels

    for step in run.loop(cfg.steps, **parts):
        # Step A: the generator
        inputs, real, real_labels = draw()
        with autocast():
            loss, x, log = generator_step(generator, teacher, discriminator, cfg, inputs)
        update(optimizer_generator, loss, generator, cfg, run, step, log | {"generator loss": loss})
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: the discriminator, first on the same x
        for i in range(cfg.ratio):
            if i:
                inputs, real, real_labels = draw()
                with torch.no_grad(), autocast():
                    x = generator(*inputs)
            batch = x, inputs[-1], real, real_labels
            with autocast():
                loss, more = discriminator_step(teacher, discriminator, cfg, *batch)
            log |= more
            update(optimizer_discriminator, loss, discriminator, cfg, run, step, log)
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            pictures(run, step, ema, teacher, cfg)
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
def pictures(run: Run, step: int, generator, teacher, cfg: Config) -> None:
    """samples_<step>.png from fixed z; denoised.png: x, x_t and D_real at σ = 1."""
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
    edm.save_rows(run.path("denoised.png"), rows)


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


def teacher_made(cfg: Config, run: Run, teacher: EDMPrecond, device) -> tuple[Tensor, Tensor]:
    """--real teacher: (uint8 images, labels) in the place of a data set, made once for a run."""
    path, how = run.path("pairs.safetensors"), (cfg.teacher_steps, cfg.guidance, cfg.seed + 10000)
    if not path.exists():
        labels = edm.sample_labels("", cfg.pairs, teacher.label_dim)
        edm.save_tensors(path, make_pairs(teacher, cfg.pairs, labels, *how, device), {})
    pairs, _ = edm.load_tensors(path)
    images = edm.to_uint8(pairs["y"])
    return images, pairs.get("labels", torch.zeros(len(images), dtype=torch.long))


def main(cfg: Config) -> dict:
    """Runs everything; returns what result.json holds."""
    cfg.steps = cfg.steps or (400 if cfg.data == "cifar10" else 1000)  # minutes on two CPU cores
    device = edm.set_up(cfg)
    if cfg.sample:
        edm.draw_samples(cfg, partial(generate, steps=cfg.sampling_steps))
        return {}
    # misspelt options stop here
    edm.one_of("loss", cfg.loss, "hinge", "softplus")
    edm.one_of("real", cfg.real, "data", "teacher")
    if cfg.real == "teacher" and not cfg.teacher_steps:
        raise UserError("--real teacher needs --teacher-steps of 1 or more.")
    if not cfg.ratio:
        raise UserError("--ratio 0: nothing would train the discriminator.")
    if cfg.benchmark:
        teacher = load_teacher(cfg) if cfg.teacher else edm.Benchmark.untrained(device)
        run = edm.Benchmark(cfg, cfg.ratio * cfg.batch + cfg.batch)
        train(cfg, run, teacher, *edm.Benchmark.images(teacher))
        return run.result
    on_the_spot = cfg.data == "synthetic" and not cfg.teacher
    teacher = None if on_the_spot else load_teacher(cfg)
    run = Run(cfg, "ladd")
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
    if cfg.real == "teacher":
        images, classes = teacher_made(cfg, run, teacher, device)
    else:
        try:
            images, classes = edm.load_data(cfg.data, cfg.data_dir, **shape)
        except UserError as error:
            raise UserError(f"{error} --real teacher needs no real images.") from None
    generator = train(cfg, run, teacher, images, classes)
    edm.save_denoiser(generator, run.path("generator.safetensors"))
    run.curves()
    result = run.finish(evaluate(cfg, run, generator, teacher, metric))
    edm.print_verdict(result, run.folder)
    return result


if __name__ == "__main__":
    edm.command_line(main, Config)
