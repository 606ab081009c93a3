"""CausVid and Self-Forcing: a video model that sees all frames becomes a causal few-step one.

The road of every causal video model: bidirectional teacher -> ODE initialisation -> CausVid or
Self-Forcing -> long roll-outs. The two methods differ in student_video and in nothing else.

Papers      CausVid, arXiv 2412.07772    Self-Forcing, arXiv 2506.08009    [DMD] 2311.18828
Objects     teacher    D_real(x_t, σ)   sees all frames, one σ for all                  frozen
            generator  G(x_t, σ; past)  sees its block and cached past ones             trained
            fake       D_fake(x_t, σ)   denoiser of generated videos, sees all frames   trained
            discriminator               --objective gan: head on the fake               trained
Shapes      x, z, real: (B, C, F, H, W), x in [-1, 1]; labels: (B,); sigma: (B,) or (B, F)
Times       timesteps t = 1000 σ / (1 + σ) as in Wan and in the options; all else is in σ
Differences from the papers
            1. drawn videos of 12 x 8 x 8 pixels, 0.24 million weights; papers: Wan 2.1, 21 latent
               frames. So β = (0, 0.99), learning rates 3e-4 and 5e-4 that fall to 0, no guidance
            2. a window of --local-attn-size frames in training too; roll-outs of up to two clips
            3. --last-step-only is on: with random exit steps brightness drifted, see README
            4. the fake's first update of a round reuses the generator's videos
Run         python causal_video.py       # 5 minutes on 2 CPU cores: both students, their drift
            python causal_video.py --sample runs/causal_video-0/self_forcing/generator.safetensors
                                        # with the options of its run: the file has none
            python causal_video.py --teacher wan:PATH_OR_HUB_ID --prompts prompts.txt --lora-rank 64
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edm_teacher as edm
from edm_teacher import Run, UserError, guided

FRAMES = 12  # of the drawn videos that the teacher knows

# ------------------------------------------------------------------------------------------------
# 1. The method                                                                       CausVid §4
# ------------------------------------------------------------------------------------------------


# --- noise: flow matching's (1 - t) x + t ε, divided by 1 - t, is x_t with σ = t / (1 - t) ---
def noised(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I); sigma: (B,), or a level for each frame (B, F)."""
    return x + edm.per_frame(sigma, x) * torch.randn_like(x)


def flow_loss(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """mean ((1 + σ)/σ)² (D(x_t; σ) - x)² = mean |v - (ε - x)|², flow matching in terms of D."""
    return ((edm.per_frame((1 + sigma) / sigma, x) * (denoised - x)) ** 2).mean()


# --- the roll-out, in training and for sampling ---
def rollout(generator, z: Tensor, labels, cfg, exits=None, training=False) -> Tensor:
    """The video, block by block, each from the cached past  (CausVid Alg. 2, Self-Forcing Alg. 1).

    A block takes the denoising steps with fresh noise between them, is left after step exits[b]
    (default: the last), and one more call at the context noise gives its keys and values for the
    cache. z: unit noise (B, C, F, H, W), any F that the blocks divide.
    If gradients are on they reach the exit step of each block among the last frames, as many as
    the teacher knows, and nothing else: earlier steps, contexts and the cache are detached.
    training: the context has noise, not its label alone; hide_first_block is obeyed.
    In sampling the network gets a clean context, D's c_in undone, with the label of the noise.
    """
    sigmas, context_sigma = student_sigmas(cfg)[:-1].to(z), sigma_of(cfg.context_noise).to(z)
    trained = z.shape[2] - generator.shape[1]  # frames before this one get no gradient
    blocks = block_layout(z.shape[2], cfg.num_frame_per_block, cfg.independent_first_frame)
    out, past, start = [], {}, 0  # past: frame number -> (key, value) of each layer
    for b, n in enumerate(blocks):
        past = {f: past[f] for f in visible_frames(blocks, b, *attention_window(cfg, training))}
        x_t, last = sigmas[0] * z[:, :, start : start + n], exits[b] if exits else len(sigmas) - 1
        for k in range(last + 1):
            wanted = torch.is_grad_enabled() and k == last and start >= trained
            with torch.set_grad_enabled(wanted):
                x = generator(x_t, sigmas[k], labels, past=past, start=start)
            if k < last:
                x_t = noised(x, sigmas[k + 1].expand(len(x)))
        out.append(x)
        with torch.no_grad():
            x = x.detach() * (1 if training else 1 + context_sigma)
            x = noised(x, context_sigma.expand(len(x))) if training and context_sigma else x
            _, kv = generator(x, context_sigma, labels, past=past, start=start, return_kv=True)
        past = past | {start + i: [(k[:, :, i], v[:, :, i]) for k, v in kv] for i in range(n)}
        start += n
    return torch.cat(out, 2)


@torch.no_grad()
def generate(generator, z: Tensor, labels: Tensor | None = None, cfg=None) -> Tensor:
    """What a user calls: a roll-out of as many frames as z has, with the options of cfg."""
    return rollout(generator, z, labels, cfg or Config())


# --- the videos that the student is trained on: all that the two methods do not share ---
def student_video(mode: str, generator, real: Tensor, labels: Tensor, cfg):
    """(x, score window, first frame of the loss): videos with gradient.

    causvid       x = G(real + σ ε; σ), one call under the mask, σ of each block any of the steps'
                  or 0  (CausVid Alg. 1): its context is real video with noise
    self_forcing  x = roll-out, left at a random step  (Self-Forcing Alg. 1): its context is its own
                  video. Longer than the clip: the last frames count, less the first block of a
                  clip, as the teacher takes them for the start of a video
    """
    sigmas, clip, n = student_sigmas(cfg), real.shape[2], cfg.num_frame_per_block
    if mode == "causvid":
        blocks = block_layout(clip, n, cfg.independent_first_frame)
        sigma = block_sigmas(len(real), blocks, sigmas).to(real)
        mask = block_mask(blocks, *attention_window(cfg, True)).to(real.device)
        return generator(noised(real, sigma), sigma, labels, mask=mask), score_window(None, cfg), 0
    frames = clip + n * int(torch.randint((cfg.num_training_frames - clip) // n + 1, ()))
    blocks = block_layout(frames, n, cfg.independent_first_frame)
    exits = exit_steps(len(blocks), len(sigmas) - 1, cfg)
    z = torch.randn(*real.shape[:2], frames, *real.shape[3:], device=real.device)
    x = rollout(generator, z, labels, cfg, exits, training=True)[:, :, -clip:]
    first = blocks[0] if frames > clip else 0
    return x, score_window(exits, cfg), first


# --- distribution matching, as in DMD (CausVid Eq. 4) ---
def dmd_weight(x: Tensor, denoised_real: Tensor) -> Tensor:
    """1 / mean|D_real - x|, the mean of each sample: (B, 1, 1, 1, 1), no gradient  (DMD Eq. 8)."""
    return 1 / (x - denoised_real).detach().abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-8)


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


# --- the other objectives: losses whose gradient at x takes the same way ---
def sid_loss(x: Tensor, denoised_real: Tensor, denoised_fake: Tensor, alpha: float = 1.0) -> Tensor:
    """mean w (r - f)((r - x) - α (r - f)), r = D_real, f = D_fake, w = dmd_weight: score identity.

    arXiv 2404.04057. To be differentiated through r and f too.
    """
    gap = denoised_real - denoised_fake
    return (dmd_weight(x, denoised_real) * gap * (denoised_real - x - alpha * gap)).mean()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """mean -log sigmoid(l_better - l_worse): better is real for the discriminator, else its own."""
    return F.softplus(worse - better).mean()


def difference_penalty(logits: Tensor, perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)²: |∇l|² at first order; real: R1, generated: R2."""
    return ((perturbed - logits) / std).square().mean()


def gradient_at(x: Tensor, loss_of) -> tuple[Tensor, Tensor]:
    """(L, numel ∂L/∂x) of L = loss_of(x), in the units of dmd_gradient; no network gets any."""
    x = x.detach().requires_grad_()
    loss = loss_of(x)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad * x.numel()


# --- the start: regression on the teacher's ODE paths (CausVid §4.3) ---
@torch.no_grad()
def ode_path(teacher, z: Tensor, labels, sigmas: Tensor, substeps: int, guidance: float) -> Tensor:
    """Euler's method from σ_0 z through the levels σ_k to 0: states (B, K + 1, C, F, H, W).

    sigmas: falling, with 0. In each interval `substeps` steps, evenly in the t whose shift is 5.
    """
    x, states = sigmas[0] * z, []
    for pair in itertools.pairwise(sigmas.double()):
        states.append(x)
        u = torch.linspace(*(s / (5 + s) for s in pair), substeps + 1, dtype=torch.float64)
        for sigma, following in itertools.pairwise((5 * u / (1 - u)).tolist()):
            level = torch.full((len(x),), sigma, device=x.device)
            denoised = guided(teacher, x, level, labels, guidance)
            x = denoised + following / sigma * (x - denoised)
    return torch.stack([*states, x], 1)


def ode_init_loss(generator, path: Tensor, sigmas: Tensor, labels, blocks, mask) -> Tensor:
    """E|G({x_i at σ_i}) - {x_i at 0}|², σ_i of block i any of the levels  (CausVid Eq. 6).

    path: states of ode_path. Mean over the frames that are not clean already.
    """
    sigma = block_sigmas(len(path), blocks, sigmas).to(path)
    k = (sigma[..., None] == sigmas.to(path)).int().argmax(-1)[:, None, None, :, None, None]
    x_t = path.gather(1, k.expand(-1, 1, *path.shape[2:]))[:, 0]
    error = (generator(x_t, sigma, labels, mask=mask) - path[:, -1]).square()
    return error.transpose(1, 2)[sigma > 0].mean()


# ------------------------------------------------------------------------------------------------
# 2. The two updates                                                                CausVid Alg. 1
# ------------------------------------------------------------------------------------------------


def generator_step(generator, teacher, fake, discriminator, cfg, mode: str, real, labels):
    """Step A: (loss of the generator, (its videos x detached, score window), what to log).

    Each objective is a gradient at x, sent through the generator: nothing else gets any. Teacher
    and fake see the whole video at one σ.
    """
    x, limits, first = student_video(mode, generator, real, labels, cfg)
    sigma = score_sigma(len(x), limits, cfg).to(x)

    def scores(x_t):  # Self-Forcing's scale w stands for D_c + w (D_c - D_u)
        both = (teacher, cfg.real_score_guidance_scale), (fake, cfg.fake_score_guidance_scale)
        return [guided(network, x_t, sigma, labels, 1 + w) for network, w in both]

    def gan_loss(x):
        pair = [discriminator(fake, noised(v, sigma), sigma, labels) for v in (x, real)]
        return relativistic_loss(*pair)

    if cfg.objective == "dmd":
        with torch.no_grad():
            denoised_real, denoised_fake = scores(noised(x, sigma))
            grad = dmd_gradient(denoised_fake, denoised_real, dmd_weight(x, denoised_real))
        log = {"|D_fake - D_real|": (denoised_fake - denoised_real).abs().mean()}
    elif cfg.objective == "sid":
        loss, grad = gradient_at(x, lambda x: sid_loss(x, *scores(noised(x, sigma))))
        log = {"SiD loss": loss}
    else:
        loss, grad = gradient_at(x, gan_loss)
        log = {"GAN loss": loss}
    log["|grad|"] = grad.square().mean().sqrt()
    return surrogate_loss(x[:, :, first:], grad[:, :, first:]), (x.detach(), limits), log


def fake_step(fake, discriminator, cfg, x: Tensor, limits, real: Tensor, labels):
    """Step B: (loss, what to log): flow matching on detached videos x; gan: real against x."""
    sigma = score_sigma(len(x), limits, cfg).to(x)
    if cfg.objective != "gan":
        loss = flow_loss(fake(noised(x, sigma), sigma, labels), x, sigma)
        return loss, {"fake loss": loss}
    pair = noised(real, sigma), noised(x, sigma)
    logits = [discriminator(fake, x_t, sigma, labels) for x_t in pair]
    near = [discriminator(fake, noised(x_t, 0 * sigma + GAN_STD), sigma, labels) for x_t in pair]
    r1, r2 = (difference_penalty(*l, GAN_STD) for l in zip(logits, near, strict=True))
    loss = relativistic_loss(*logits) + GAN_PENALTY * (r1 + r2) / 2
    return loss, {"logit difference": (logits[0] - logits[1]).mean(), "R1": r1, "R2": r2}


GAN_STD, GAN_PENALTY = 0.01, 0.01  # size and weight of the perturbations behind R1 and R2

# ------------------------------------------------------------------------------------------------
# 3. Networks: teacher, generator and fake are one class, edm.VideoDenoiser; a head for the GAN
# ------------------------------------------------------------------------------------------------


class Discriminator(nn.Module):
    """A learned query looks at the activations of each block of a denoiser -> logits (B,)."""

    def __init__(self, denoiser):
        super().__init__()
        with torch.no_grad():  # one video tells the shapes
            x = torch.zeros(1, *denoiser.shape, device=next(denoiser.parameters()).device)
            _, features = denoiser(x, 1.0, return_features=True)
        depth, width = len(features), features[0].shape[1]
        self.query = nn.Parameter(torch.randn(depth, 1, 1, width))
        self.kv = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        layers = nn.LayerNorm(depth * width), nn.Linear(depth * width, width), nn.SiLU()
        self.head = nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))

    def forward(self, backbone, x_t: Tensor, sigma: Tensor, labels) -> Tensor:
        _, features = backbone(x_t, sigma, labels, return_features=True)
        seen = []
        for query, kv, h in zip(self.query, self.kv, features, strict=True):
            query, h = query.expand(len(h), -1, -1), h.flatten(2).mT.float()
            seen.append(F.scaled_dot_product_attention(query, *kv(h).chunk(2, -1)))
        return self.head(torch.cat(seen, -1)[:, 0])


def load_teacher(cfg) -> edm.VideoDenoiser:
    """--teacher, else the shipped one; wan:PATH_OR_HUB_ID: Wan, called like it."""
    if edm.is_large(cfg.teacher):
        import diffusers_backbones

        return diffusers_backbones.load_teacher(cfg, causal=True)
    path = cfg.teacher or edm.ASSETS / "causal_video_teacher.safetensors"
    return edm.load_video_denoiser(path, cfg.device)


# ------------------------------------------------------------------------------------------------
# 4. Settings: the names between batch and lr_generator are Self-Forcing's or SimpleTuner's
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    mode: str = "both"  # causvid, self_forcing, or both from one start, to be compared
    objective: str = "dmd"  # dmd, sid or gan
    data: str = "synthetic"  # drawn shapes that bounce; with wan:PATH the ends of its ODE paths
    teacher: str = ""  # a .safetensors; default: the shipped one; new: train one; or wan:PATH
    teacher_updates: int = 6000  # training steps of a new teacher
    teacher_steps: int = 16  # Euler steps of the teacher's sampler
    pairs: int = 1024  # ODE paths of the teacher for the initialisation; CausVid 1,000
    ode_updates: int = 600  # training steps on them; CausVid 3,000
    steps: int = 300  # generator updates; CausVid 6,000
    batch: int = 32  # videos an update; Self-Forcing 64
    generator_update_interval: int = 5  # fake updates per generator update; papers 5
    num_frame_per_block: int = 3  # frames that are denoised together; papers 5 and 3
    independent_first_frame: bool = False  # the first frame is a block of its own
    num_training_frames: int = 24  # longest roll-out in training; its last 12 frames count
    denoising_steps: str = "1000,750,500,250"  # timesteps of the generator's calls
    warp_denoising_step: bool = True  # shift them by timestep_shift: 1000, 937.5, 833.3, 625
    timestep_shift: float = 5.0  # k: t' = k t / (1 + (k - 1) t), that is σ' = k σ
    same_step_across_blocks: bool = True  # one random exit step for all blocks of a roll-out
    last_step_only: bool = True  # always leave at the last denoising step; papers: at a random one
    context_noise: float = 0.0  # timestep at which finished blocks enter the cache
    local_attn_size: int = 6  # frames that a block can see, itself included; -1: all
    sink_size: int = 0  # first frames that stay in the window
    hide_first_block: bool = False  # in training the last block cannot see the first
    ts_schedule: bool = False  # scores only above the timestep that follows the exit step
    ts_schedule_max: bool = False  # scores only below the timestep of the exit step
    min_score_timestep: int = 0  # lowest timestep of scores without ts_schedule
    min_timestep_ratio: float = 0.02  # scores' timesteps are clamped after the shift: lowest
    max_timestep_ratio: float = 0.98  # and highest, as a share of 1000
    real_score_guidance_scale: float = 0.0  # w: c + w (c - u) of the teacher; Self-Forcing 3
    fake_score_guidance_scale: float = 0.0  # the same of the fake
    lr_generator: float = 3e-4  # learning rate of the generator, falls to 0; papers 2e-6
    lr_fake: float = 5e-4  # the same of fake and discriminator; papers 2e-6 and 4e-7
    ema: float = 0.99  # decay of the average that is the result, d of ema_update; paper 0.99
    clip: float = 10.0  # largest gradient norm of a network
    gradient_checkpointing: bool = False  # less memory: activations are computed again
    prompts: str = ""  # for wan:PATH: a file of prompts, one a line
    size: str = ""  # of its videos: height,width,frames; default: the model's
    lora_rank: int = 0  # trains adapters on one copy of its weights; 0: copies
    amp: bool = False  # bfloat16 autocast: faster where the hardware has it
    sample: str = ""  # only roll out this generator.safetensors to three times the length
    eval_n: int = 256  # videos behind the numbers of the verdict
    seed: int = 0  # of everything random
    device: str = "auto"  # cuda, cpu, mps; auto: cuda if there is one, else cpu
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/causal_video-<k>
    resume: bool = False  # go on with the run in --out, or the last one
    save_every: int = 100  # updates between checkpoints


# ------------------------------------------------------------------------------------------------
# 5. Training: teacher, ODE initialisation, CausVid or Self-Forcing
# ------------------------------------------------------------------------------------------------


def regress(cfg: Config, run: Run, start, steps: int, lr: float, decay: float, loss_of):
    """Minimises loss_of(a copy of start); returns the average of its weights."""
    network, ema = edm.trainable_copy(start), edm.trainable_copy(start)
    edm.shard(network, ema)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99))
    for step in run.loop(steps, network=network, ema=ema, optimizer=optimizer):
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 200) * falling(step, steps)
        with autocast(cfg):
            loss = loss_of(network)
        update(optimizer, loss, network, cfg, run, step, {"loss": loss})
        edm.ema_update(ema, network, decay, step)
        run.log(step, {"loss": loss})
    return edm.whole(ema, start, last=False)


def autocast(cfg: Config):
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, enabled=cfg.amp)


def falling(step: int, steps: int) -> float:
    """Factor on learning rates: half a cosine, from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def train_teacher(cfg: Config, run: Run) -> edm.VideoDenoiser:
    """Flow matching on drawn videos, t uniform before a shift of 5, 10 % without a label."""

    def loss_of(network):
        n, frames = 2 * edm.rows(cfg.batch), network.shape[1]
        x, labels = (v.to(cfg.device) for v in edm.bouncing_shapes(n, frames))
        u, dropped = (torch.rand(n, device=x.device) for _ in range(2))
        sigma, labels = 5 * u.clamp(1e-3) / (1.001 - u), torch.where(dropped < 0.1, -1, labels)
        return flow_loss(network(noised(x, sigma), sigma, labels), x, sigma)

    torch.manual_seed(cfg.seed)
    start = edm.VideoDenoiser(frames=FRAMES).to(cfg.device)
    return regress(cfg, run, start, cfg.teacher_updates, 2e-3, 0.999, loss_of)


def make_paths(cfg: Config, run: Run, teacher: edm.VideoDenoiser) -> dict[str, Tensor]:
    """ODE paths of the teacher, made once, and their labels: {"path", "labels"}."""
    path, blocks, states = run.path("pairs.safetensors"), clip_blocks(cfg, teacher.shape[1]), []
    if not path.exists():
        with edm.own_random_numbers(cfg.seed + 10000):
            z = torch.randn(cfg.pairs, *clip_shape(teacher, sum(blocks)))
        labels = torch.arange(cfg.pairs) % teacher.label_dim
        n = edm.rows(cfg.batch) if edm.is_large(cfg.teacher) else 256
        for pair in zip(z.split(n), labels.split(n), strict=True):
            pair = (v.to(cfg.device) for v in pair)
            states.append(ode_path(teacher, *pair, *teacher_sampler(cfg)).cpu())
        edm.save_tensors(path, {"path": torch.cat(states), "labels": labels}, {})
        del states  # large
    return edm.load_tensors(path)[0]


def train_ode(cfg: Config, run: Run, teacher: edm.VideoDenoiser, pairs) -> edm.VideoDenoiser:
    """The causal student's start: regression on ODE paths of the teacher  (CausVid §4.3)."""
    sigmas, blocks = student_sigmas(cfg), clip_blocks(cfg, teacher.shape[1])
    mask = block_mask(blocks, *attention_window(cfg)).to(cfg.device)

    def loss_of(student):
        i = torch.randint(cfg.pairs, (edm.rows(cfg.batch),))
        states, labels = (pairs[k][i].to(cfg.device) for k in ("path", "labels"))
        return ode_init_loss(student, states, sigmas, labels, blocks, mask)

    return regress(cfg, run, teacher, cfg.ode_updates, 1e-3, 0.99, loss_of)


def train(cfg: Config, run: Run, mode: str, teacher, start, pairs=None) -> edm.VideoDenoiser:
    """Alternates the two updates; returns the average of the generator's weights."""
    generator, fake = edm.trainable_copy(start), edm.trainable_copy(teacher)
    generator.checkpointing = cfg.gradient_checkpointing
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    head = nn.Identity() if cfg.objective != "gan" else Discriminator(fake).to(cfg.device)
    both = nn.ModuleDict({"fake": fake, "discriminator": head})  # they share an optimiser
    adam = {"betas": (0.0, 0.99), "weight_decay": 0.01, "fused": True}
    edm.shard(generator, fake, ema, head)
    optimizer_generator = torch.optim.AdamW(generator.parameters(), cfg.lr_generator, **adam)
    optimizer_fake = torch.optim.AdamW(both.parameters(), cfg.lr_fake, **adam)
    parts = {"generator": generator, "both": both, "ema": ema}
    parts |= {"optimizer_generator": optimizer_generator, "optimizer_fake": optimizer_fake}

    batch, frames = edm.rows(cfg.batch), sum(clip_blocks(cfg, teacher.shape[1]))

    def draw():
        """(real videos, labels)"""
        if edm.is_large(cfg.teacher):
            i = torch.randint(cfg.pairs, (batch,))
            drawn = pairs["path"][i, -1], pairs["labels"][i]
        else:
            drawn = edm.bouncing_shapes(batch, frames)
        return [v.to(cfg.device) for v in drawn]

    for step in run.loop(cfg.steps, **parts):
        optimizer_generator.param_groups[0]["lr"] = cfg.lr_generator * falling(step, cfg.steps)
        optimizer_fake.param_groups[0]["lr"] = cfg.lr_fake * falling(step, cfg.steps)
        # Step A: the generator
        real = draw()
        with autocast(cfg):
            loss, made, log = generator_step(generator, teacher, fake, head, cfg, mode, *real)
        update(optimizer_generator, loss, generator, cfg, run, step, log | {"generator loss": loss})
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: fake and discriminator, first on the same x
        for i in range(cfg.generator_update_interval):
            if i:
                real = draw()
                with torch.no_grad(), autocast(cfg):
                    *made, _ = student_video(mode, generator, *real, cfg)
            with autocast(cfg):
                loss, more = fake_step(fake, head, cfg, *made, *real)
            log |= more
            update(optimizer_fake, loss, both, cfg, run, step, log)
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            pictures(run, step, ema, teacher, fake, cfg)
    return edm.whole(ema, start, last=False)


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


def clip_shape(network, frames: int) -> tuple[int, ...]:
    """(C, F, H, W) of a video of so many frames."""
    return network.shape[0], frames, *network.shape[2:]


def long_frames(cfg: Config, network) -> int:
    """Three times the training length."""
    return 3 * sum(clip_blocks(cfg, network.shape[1])) - 2 * cfg.independent_first_frame


def long_pictures(path, generator, cfg: Config) -> None:
    """Of wan:PATH: a roll-out for each of the first four prompts."""
    sampler = partial(generate, generator, cfg=cfg)
    generator.pictures(path, sampler, cfg.seed, latent_frames=long_frames(cfg, generator))


def long_inputs(cfg: Config, network, n: int) -> tuple[Tensor, Tensor]:
    """(z of three times the training length, labels): the same for every student."""
    numbers = torch.Generator().manual_seed(cfg.seed + 20000)
    z = torch.randn(n, *clip_shape(network, long_frames(cfg, network)), generator=numbers)
    return z.to(cfg.device), torch.arange(n, device=cfg.device) % network.label_dim


@torch.no_grad()
def pictures(run: Run, step: int, generator, teacher, fake, cfg: Config) -> None:
    """samples_<step>.png: long roll-outs; denoised.png: x, x_t, D_real and D_fake at σ = 3."""
    if edm.is_large(cfg.teacher):
        return long_pictures(run.path(f"samples_{step}.png"), generator, cfg)
    z, labels = long_inputs(cfg, teacher, 6)
    with edm.own_random_numbers(cfg.seed + 20000):
        long = generate(generator, z, labels, cfg)
        x, sigma = long[:, :, : teacher.shape[1]], torch.full((6,), 3.0, device=z.device)
        x_t = noised(x, sigma)
    edm.save_strips(run.path(f"samples_{step}.png"), {f"generator, step {step}": long})
    rows = {"x": x, "x_t = x + 3 ε": x_t, "D_real(x_t; 3)": teacher(x_t, sigma, labels)}
    edm.save_strips(run.path("denoised.png"), rows | {"D_fake(x_t; 3)": fake(x_t, sigma, labels)})


@torch.no_grad()
def evaluate(cfg: Config, run: Run, teacher, students: dict) -> dict:
    """Rows of the verdict; samples.png, samples.gif and drift.png show all of them, same z."""
    z, labels = long_inputs(cfg, teacher, cfg.eval_n)
    clip, n = clip_blocks(cfg, teacher.shape[1]), cfg.num_frame_per_block
    short = z[:, :, : sum(clip)]
    samplers = {"data": lambda: edm.bouncing_shapes(cfg.eval_n, z.shape[2], labels.cpu())[0]}
    samplers["teacher"] = lambda: ode_path(teacher, short, labels, *teacher_sampler(cfg))[:, -1]
    for name, student in students.items():
        samplers[name] = lambda student=student: generate(student, z, labels, cfg)
    rows, videos = {}, {}
    with edm.own_random_numbers(cfg.seed + 30000):
        for name, sampler in samplers.items():
            started = time.time()
            videos[name] = x = sampler()
            fps = cfg.eval_n * x.shape[2] / (time.time() - started)
            blocks = block_layout(x.shape[2], n, cfg.independent_first_frame)
            rows[name] = {"n": cfg.eval_n, **edm.drift(x, labels, blocks), "frames_per_second": fps}
    edm.save_strips(run.path("samples.png"), videos)
    edm.save_gif(run.path("samples.gif"), list(videos.values()))
    names = ("residual", "bias", "spread", "correlation")
    panels = {name: {method: row[name] for method, row in rows.items()} for name in names}
    edm.save_lines(run.path("drift.png"), panels, "block", mark=len(clip))
    return rows


def main(cfg: Config) -> dict:
    """Runs every stage that is not done yet; returns what result.json holds."""
    device = edm.set_up(cfg)
    check(cfg)
    large = edm.is_large(cfg.teacher)
    if cfg.sample and large:
        generator, path = load_teacher(cfg), Path(cfg.out or ".") / "sampled.png"
        long_pictures(path, generator, cfg)
        return {}
    if cfg.sample:
        generator = edm.load_video_denoiser(cfg.sample, device)
        x = generate(generator, *long_inputs(cfg, generator, 6), cfg)
        path = Path(cfg.out or ".") / "sampled.gif"
        edm.save_gif(path, [x])
        edm.save_strips(path.with_suffix(".png"), {cfg.sample: x})
        print(f"6 videos: {path}")
        return {}
    teacher = None if cfg.teacher == "new" else load_teacher(cfg)
    run, students = Run(cfg, "causal_video"), {}
    modes = [m for m in ("causvid", "self_forcing") if cfg.mode in (m, "both")]
    for name in ("teacher", "ode_init", *modes):
        inner = Run(replace(cfg, out=str(run.path(name)), resume=True), "causal_video")
        inner.command = run.command  # what to type after Ctrl-C
        if name == "teacher":
            network = teacher = (teacher or train_teacher(cfg, inner)).requires_grad_(False).eval()
            pairs = make_paths(cfg, run, teacher)
        elif name == "ode_init":
            network = students[name] = train_ode(cfg, inner, teacher, pairs)
        else:
            network = train(cfg, inner, name, teacher, students["ode_init"], pairs)
            students[name] = network
        if not large:
            edm.save_video_denoiser(network, inner.path("generator.safetensors"))
        elif network is not teacher:
            network.save(inner.path("generator"))
        if name == "ode_init":
            pictures(inner, cfg.ode_updates, network, teacher, teacher, cfg)
        inner.curves()
        run.seconds_before += inner.seconds_before  # of earlier starts
        run.start = inner.start  # of the last stage: run.finished() asks for it
    edm.first_alone()
    if not (result := run.finished()):
        result = run.finish({} if large else evaluate(cfg, run, teacher, students))
    edm.print_verdict(result, run.folder)
    return result


# ------------------------------------------------------------------------------------------------
# 7. The options' arithmetic, with Self-Forcing's names and meaning: numbers in, numbers out
# ------------------------------------------------------------------------------------------------


def shift_timestep(t, shift: float):
    """t' = 1000 k τ / (1 + (k - 1) τ), τ = t / 1000; in σ: σ' = k σ. Undone by 1 / k."""
    return 1000 * shift * (t / 1000) / (1 + (shift - 1) * (t / 1000))


def sigma_of(t) -> Tensor:
    """σ = τ / (1 - τ), τ = t / 1000, up to τ = 0.9999; t: a number, a list or a tensor."""
    tau = (torch.as_tensor(t, dtype=torch.float64, device="cpu") / 1000).clamp(max=0.9999)
    return (tau / (1 - tau)).float()


def timesteps(text: str) -> list[int]:
    """ "1000,750,500,250" -> numbers; a 0 at the end is dropped, as in Self-Forcing."""
    steps = list(edm.numbers(text))
    steps = steps[:-1] if steps[-1:] == [0] else steps
    if steps != sorted({*steps}, reverse=True) or not 0 < min(steps, default=0) <= steps[0] <= 1000:
        raise UserError(f"--denoising-steps {text}: expected falling numbers from 1000 down.")
    return steps


def student_sigmas(cfg) -> Tensor:
    """Noise levels of the generator's steps, and 0; warped: the list is meant before the shift."""
    shift = cfg.timestep_shift if cfg.warp_denoising_step else 1.0
    return sigma_of([*(shift_timestep(t, shift) for t in timesteps(cfg.denoising_steps)), 0])


def block_layout(frames: int, per_block: int, independent_first: bool = False) -> list[int]:
    """Frames of each block: [n, n, ...], or [1, n, n, ...]."""
    blocks, rest = divmod(frames - independent_first, per_block)
    if rest or blocks < 1:
        plus = "1 + " if independent_first else ""
        raise UserError(
            f"{frames} frames are not {plus}a multiple of {per_block}, a block: change "
            "--num-training-frames or --num-frame-per-block."
        )
    return [1] * independent_first + [per_block] * blocks


def clip_blocks(cfg, frames: int) -> list[int]:
    """Blocks of what the teacher judges: as many as fit into the `frames` that it knows."""
    n, first = cfg.num_frame_per_block, cfg.independent_first_frame
    known = min(cfg.num_training_frames, frames)
    return block_layout(first + (known - first) // n * n or known, n, first)


def visible_frames(blocks, b: int, size: int = -1, sink=0, hide_first=False) -> list[int]:
    """Past frames that block b sees: the first `sink`, the latest, `size` with its own; -1: all.

    hide_first: the last block of a training video does not see the first block.
    """
    past = list(range(sum(blocks[:b])))
    room = size - blocks[b] - sink  # for the latest
    if size >= 0 and len(past) > room + sink:
        past = past[:sink] + past[len(past) - room :]
    hidden = blocks[0] if hide_first and b == len(blocks) - 1 else 0
    return [f for f in past if f >= hidden]


def block_mask(blocks, size: int = -1, sink=0, hide_first=False) -> Tensor:
    """(F, F), True where the frame of the row sees that of the column  (CausVid Eq. 5)."""
    mask, start = torch.zeros(sum(blocks), sum(blocks), dtype=torch.bool), 0
    for b, n in enumerate(blocks):
        seen = visible_frames(blocks, b, size, sink, hide_first)
        mask[start : start + n, [*seen, *range(start, start + n)]] = True
        start += n
    return mask


def attention_window(cfg, training: bool = False) -> tuple[int, int, bool]:
    """(size, sink, hide_first) for visible_frames and block_mask."""
    return cfg.local_attn_size, cfg.sink_size, cfg.hide_first_block and training


def exit_steps(n_blocks: int, n_steps: int, cfg) -> list[int]:
    """The step after which each block is left: random, one for all blocks or each its own."""
    drawn = [int(torch.randint(n_steps, ())) for _ in range(n_blocks)]
    drawn = drawn[:1] * n_blocks if cfg.same_step_across_blocks else drawn
    return [n_steps - 1] * n_blocks if cfg.last_step_only else drawn


def score_window(exits, cfg) -> tuple[int, int]:
    """Timesteps [low, high) of scores, before the shift; [min_score_timestep, 1000) if not said.

    With one exit step for all blocks, ts_schedule raises low to the step after it and
    ts_schedule_max lowers high to the step itself.
    """
    low, high, steps = cfg.min_score_timestep, 1000, timesteps(cfg.denoising_steps)
    if not cfg.warp_denoising_step:
        steps = [round(shift_timestep(t, 1 / cfg.timestep_shift)) for t in steps]
    if exits is not None and cfg.same_step_across_blocks:
        low = [*steps, 0][exits[0] + 1] if cfg.ts_schedule else low
        high = steps[exits[0]] if cfg.ts_schedule_max else high
    return low, high


def score_sigma(n: int, limits: tuple[int, int], cfg) -> Tensor:
    """n noise levels for scores and for the fake's training: integers t, shifted, then clamped."""
    t = shift_timestep(torch.randint(*limits, (n,)).double(), cfg.timestep_shift)
    return sigma_of(t.clamp(1000 * cfg.min_timestep_ratio, 1000 * cfg.max_timestep_ratio))


def block_sigmas(n: int, blocks, sigmas: Tensor) -> Tensor:
    """(n, F): for each block of each sample one of the levels at random  (CausVid Alg. 1)."""
    k = torch.randint(len(sigmas), (n, len(blocks)))
    return sigmas[k].repeat_interleave(torch.tensor(blocks), 1)


def teacher_sampler(cfg) -> tuple[Tensor, int, float]:
    """(sigmas, substeps, guidance) of ode_path; guidance w of D_u + w (D_c - D_u)."""
    sigmas = student_sigmas(cfg)
    return sigmas, max(1, cfg.teacher_steps // (len(sigmas) - 1)), 1 + cfg.real_score_guidance_scale


def check(cfg) -> None:
    """Misspelt or impossible options stop here, with a sentence."""
    edm.one_of("mode", cfg.mode, "causvid", "self_forcing", "both")
    edm.one_of("objective", cfg.objective, "dmd", "sid", "gan")
    edm.one_of("data", cfg.data, "synthetic")
    if cfg.timestep_shift <= 0 or cfg.clip <= 0 or not 0 <= cfg.context_noise < 1000:
        raise UserError("Needed: --timestep-shift > 0, --clip > 0, 0 <= --context-noise < 1000.")
    if not 0 < cfg.min_timestep_ratio < cfg.max_timestep_ratio <= 1:
        raise UserError("Needed: 0 < --min-timestep-ratio < --max-timestep-ratio <= 1.")
    frames = cfg.num_training_frames
    block_layout(frames, cfg.num_frame_per_block, cfg.independent_first_frame)
    clip = clip_blocks(cfg, frames if edm.is_large(cfg.teacher) else FRAMES)
    if len(clip) == 1 and frames > sum(clip):
        raise UserError(
            f"--num-training-frames {frames}: a clip is one block, no more is possible."
        )
    if 0 <= cfg.local_attn_size < (needed := cfg.num_frame_per_block + cfg.sink_size):
        raise UserError(f"--local-attn-size {cfg.local_attn_size}: sink and block need {needed}.")
    for exit_step in range(len(timesteps(cfg.denoising_steps))):
        low, high = score_window([exit_step], cfg)
        if not 0 <= low < high:
            raise UserError(f"No timestep for the scores is left between {low} and {high}.")


if __name__ == "__main__":
    edm.command_line(main, Config)
