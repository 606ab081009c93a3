"""CausVid and Self-Forcing: a video model that sees all frames becomes a causal few-step one.

Bidirectional teacher -> ODE initialisation -> CausVid or Self-Forcing -> long roll-outs. The two
methods differ in student_video and in nothing else.
Papers      CausVid, arXiv 2412.07772    Self-Forcing, arXiv 2506.08009    [DMD] 2311.18828
Objects     teacher    D_real(x_t, σ)   sees all frames, one σ for all                  frozen
            generator  G(x_t, σ; past)  sees its block and cached past ones             trained
            fake       D_fake(x_t, σ)   denoiser of generated videos, sees all frames   trained
            discriminator               --objective gan: causal_objectives.py           trained
Shapes      x, z, real: (B, C, F, H, W), x in [-1, 1]; labels: (B,); sigma: (B,) or (B, F)
Times       timesteps t = 1000 σ / (1 + σ) as in Wan and in the options; all else is in σ
Differences from the papers; more in docs/video.md
            1. drawn videos of 12 x 8 x 8 pixels, a tiny network, learning rates that fall to 0
            2. a window of --local-attn-size frames in training too; roll-outs of up to two clips
            3. --last-step-only is on: with random exit steps brightness drifted
            4. the fake's first update of a round reuses the generator's videos
Run         python causal_video.py       # 5 minutes on 2 CPU cores: both students, their drift
            python causal_video.py --sample runs/causal_video-0/self_forcing/generator.safetensors
            python causal_video.py --teacher wan:PATH_OR_HUB_ID --prompts prompts.txt --lora-rank 64
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

import edm_teacher as edm
from edm_teacher import Denoiser, Run, UserError, expand, guided

FRAMES = 12  # of the drawn videos that the teacher knows

# == 1. The method ===================================================================== CausVid §4


# --- noise: flow matching's (1 - t) x + t ε, divided by 1 - t, is x_t with σ = t / (1 - t) ---
def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def flow_loss(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """mean ((1 + σ)/σ)² (D(x_t; σ) - x)² = mean |v - (ε - x)|², flow matching in terms of D."""
    return ((expand((1 + sigma) / sigma, x) * (denoised - x)) ** 2).mean()


# --- the roll-out, in training and for sampling ---
def rollout(generator, z: Tensor, labels, cfg, exits=None, training=False) -> Tensor:
    """The video, block by block, each from the cached past  (CausVid Alg. 2; Self-Forcing).

    A block takes the denoising steps with fresh noise between them, is left after step exits[b]
    (default: the last), and one more call at the context noise gives its keys and values for the
    cache. z: unit noise (B, C, F, H, W), any F that the blocks divide.
    If gradients are on they reach the exit step of each block among the last frames, as many as
    the teacher knows, and nothing else: earlier steps, contexts and the cache are detached.
    training: the context has noise, not its label alone; hide_first_block is obeyed.
    In sampling the network gets a clean context, D's c_in undone, with the label of the noise."""
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
                x_t = diffuse(x, sigmas[k + 1].expand(len(x)))
        out.append(x)
        with torch.no_grad():
            x = x.detach() * (1 if training else 1 + context_sigma)
            x = diffuse(x, context_sigma.expand(len(x))) if training and context_sigma else x
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
    self_forcing  x = roll-out, left at a random step: its context is its own
                  video. Longer than the clip: the last frames count, less the first block of a
                  clip, as the teacher takes them for the start of a video"""
    sigmas, clip, n = student_sigmas(cfg), real.shape[2], cfg.num_frame_per_block
    if mode == "causvid":
        blocks = block_layout(clip, n, cfg.independent_first_frame)
        sigma = block_sigmas(len(real), blocks, sigmas).to(real)
        mask = block_mask(blocks, *attention_window(cfg, True)).to(real.device)
        return generator(diffuse(real, sigma), sigma, labels, mask=mask), score_window(None, cfg), 0
    more = int(torch.randint((cfg.num_training_frames - clip) // n + 1, ()))
    frames = clip + n * edm.from_first(more)  # all processes call as often
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
    """∇_x KL(fake || real), up to the weight:  w (D_fake - D_real)  (DMD Eq. 7). Points uphill."""
    return weight * (denoised_fake - denoised_real)


def surrogate_loss(x: Tensor, grad: Tensor) -> Tensor:
    """½ mean (x - sg[x - grad])²: its derivative is dL/dx = grad / numel  (DMD Alg. 2)."""
    return 0.5 * F.mse_loss(x, (x - grad).detach())


# --- the start: regression on the teacher's ODE paths (CausVid §4.3) ---
@torch.no_grad()
def ode_path(teacher, z: Tensor, labels, sigmas: Tensor, substeps: int, guidance: float) -> Tensor:
    """Euler's method from σ_0 z through the levels σ_k to 0: states (B, K + 1, C, F, H, W).

    sigmas: falling, with 0. In each interval `substeps` steps, evenly in the t whose shift is 5."""
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

    path: states of ode_path. Mean over the frames that are not clean already."""
    sigma = block_sigmas(len(path), blocks, sigmas).to(path)
    k = (sigma[..., None] == sigmas.to(path)).int().argmax(-1)[:, None, None, :, None, None]
    x_t = path.gather(1, k.expand(-1, 1, *path.shape[2:]))[:, 0]
    error = (generator(x_t, sigma, labels, mask=mask) - path[:, -1]).square()
    error = error.transpose(1, 2)[sigma > 0]
    return error.sum() / max(error.numel(), 1)  # all may be clean


# == 2. The two updates ============================================================ CausVid Alg. 1


def generator_step(generator, teacher, fake, discriminator, cfg, mode: str, real, labels):
    """Step A: (loss of the generator, (its videos x detached, score window), what to log).

    The objective is a gradient at x, sent through the generator: nothing else gets any. Teacher
    and fake see the whole video at one σ. Self-Forcing's scale w stands for D_c + w (D_c - D_u)."""
    x, limits, first = student_video(mode, generator, real, labels, cfg)
    sigma = score_sigma(len(x), limits, cfg).to(x)
    if cfg.objective == "dmd":
        with torch.no_grad():
            x_t = diffuse(x, sigma)
            w_real, w_fake = cfg.real_score_guidance_scale, cfg.fake_score_guidance_scale
            denoised_real = guided(teacher, x_t, sigma, labels, 1 + w_real)
            denoised_fake = guided(fake, x_t, sigma, labels, 1 + w_fake)
            grad = dmd_gradient(denoised_fake, denoised_real, dmd_weight(x, denoised_real))
        log = {"|D_fake - D_real|": (denoised_fake - denoised_real).abs().mean()}
    elif cfg.objective == "sid":
        grad, log = objectives().sid_gradient(x, teacher, fake, cfg, sigma, labels)
    else:
        grad, log = objectives().gan_gradient(x, real, fake, discriminator, sigma, labels)
    log["|grad|"] = grad.square().mean().sqrt()
    return surrogate_loss(x[:, :, first:], grad[:, :, first:]), (x.detach(), limits), log


def fake_step(fake, discriminator, cfg, x: Tensor, limits, real: Tensor, labels):
    """Step B: (loss, what to log): flow matching on detached videos x; gan: real against x."""
    sigma = score_sigma(len(x), limits, cfg).to(x)
    if cfg.objective == "gan":
        return objectives().discriminator_loss(x, real, fake, discriminator, sigma, labels)
    loss = flow_loss(fake(diffuse(x, sigma), sigma, labels), x, sigma)
    return loss, {"fake loss": loss}


def objectives():
    """The file beside this one with --objective sid and gan."""
    import causal_objectives

    return causal_objectives


# == 3. Networks and data: teacher, generator and fake are one class; drawn shapes that bounce ====


def rotate(x: Tensor, frame: Tensor) -> Tensor:
    """Rotary embedding: pairs of channels turn by the frame's number times 100^(-2i/d).

    x: (B, heads, F, tokens, d), frame: (F,). The product q · k then depends on differences alone.
    """
    rate = 100 ** (-torch.arange(0, x.shape[-1], 2).to(x) / x.shape[-1])
    angle = frame[:, None, None] * rate
    (a, b), sin, cos = x.chunk(2, -1), angle.sin(), angle.cos()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class VideoBlock(nn.Module):
    """Attention over the tokens of all frames, then an MLP, both modulated frame by frame."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, emb: Tensor, frame: Tensor, mask, past):
        """x: (B, F, tokens, width), emb: (B, F, 1, width), past: [(k, v) of each past frame].

        -> (x, (k, v) of these frames, (B, heads, F, tokens, d) each)"""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(emb).chunk(6, -1)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        q, k = rotate(q, frame), rotate(k, frame)
        q, *seen = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)
        keys, values = (torch.cat(t, 2) for t in zip(*past, seen, strict=True))
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + gate * self.out(a.transpose(1, 2).reshape(x.shape))
        h = F.gelu(self.up(self.norm(x) * (1 + scale2) + shift2), approximate="tanh")
        return x + gate2 * self.down(h), (k, v)


class VideoDenoiser(Denoiser):
    """D(x; σ) = x/(1+σ) - σ/(1+σ) F(x/(1+σ); t), t = σ/(1+σ): rectified flow, as Wan's network.

    F is the velocity ε - x. x: (B, C, F, H, W). sigma: a number, (B,), or a level for each frame
    (B, F), where 0 is a clean frame, which comes back as it is. labels: (B,), -1 or None: no class.
    mask: (F, F), True where row may see column; past: cache of rollout, start: number of frame 0.
    """

    sigma_min, sigma_max = 0.002, 9999.0  # t = 1 would be σ = ∞

    def __init__(
        self, channels=1, size=8, patch=4, width=64, depth=3, heads=4, classes=2, frames=12
    ):
        super().__init__(None, (channels, frames, size, size), classes)
        self.config = {"channels": channels, "size": size, "patch": patch, "width": width}
        self.config |= {"depth": depth, "heads": heads, "classes": classes, "frames": frames}
        self.patch, self.side, self.checkpointing = patch, size // patch, False
        self.embed = nn.Linear(channels * patch**2, width)
        self.place = nn.Parameter(torch.randn(self.side**2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)  # entry 0: no class
        self.blocks = nn.ModuleList(VideoBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, channels * patch**2)
        for name, p in self.named_parameters():
            if "modulation" in name or "last" in name:
                nn.init.zeros_(p)

    def forward(self, x, sigma, labels=None, return_features=False, return_kv=False, **how):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = (sigma[:, None] if sigma.ndim == 1 else sigma).expand(len(x), x.shape[2])
        s = expand(sigma, x)
        out, features, kv = self.velocity(x / (1 + s), sigma / (1 + sigma), labels, **how)
        denoised = x / (1 + s) - s / (1 + s) * out
        extra = features if return_features else kv
        return (denoised, extra) if return_features or return_kv else denoised

    def velocity(self, x: Tensor, t: Tensor, labels, mask=None, past=None, start: int = 0):
        """(F, activations of each block, (k, v) of each block); t: (B, F) in [0, 1]."""
        (b, c, f), p, side = x.shape[:3], self.patch, self.side
        x = x.reshape(b, c, f, side, p, side, p).permute(0, 2, 3, 5, 1, 4, 6)
        h = self.embed(x.reshape(b, f, side**2, -1)) + self.place
        half = h.shape[-1] // 2
        rate = 10000 ** (-torch.arange(half, device=x.device) / half)
        angle = (1000 * t[..., None] * rate).to(h)
        labels = torch.full((b,), -1, device=x.device) if labels is None else labels
        emb = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.label(labels + 1)[:, None]
        emb, frame = F.silu(emb)[:, :, None], torch.arange(start, start + f, device=x.device)
        if mask is not None:
            mask = mask.repeat_interleave(side**2, 0).repeat_interleave(side**2, 1)
        features, kv = [], []
        for n, block in enumerate(self.blocks):
            args = h, emb, frame, mask, [layers[n] for layers in (past or {}).values()]
            again = self.checkpointing and torch.is_grad_enabled()
            h, pair = recompute(block, *args, use_reentrant=False) if again else block(*args)
            features.append(h.unflatten(2, (side, side)).movedim(-1, 1))
            kv.append(pair)
        shift, scale = self.modulation(emb).chunk(2, -1)
        out = self.last(self.norm(h) * (1 + scale) + shift).reshape(b, f, side, side, c, p, p)
        return out.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, c, f, side * p, side * p), features, kv

    def units(self) -> list[nn.Module]:
        return list(self.blocks)

    def save(self, path) -> None:
        path = Path(path).with_suffix(".safetensors")
        edm.save_tensors(path, edm.whole_state(self), {"video": self.config})

    def draw(self, path, sampler, seed: int, labels=None, n: int = 6, frames=None) -> Tensor:
        """A picture: a row for each of n videos from fixed z, its frames from left to right."""
        labels = edm.class_labels(n, self.label_dim) if labels is None else labels
        z = video_noise(self, n, frames or self.shape[1], seed)
        with edm.own_random_numbers(seed):
            x = edm.in_batches(sampler, z, labels, self.place.device)
        edm.save_grid(path, x.transpose(1, 2).flatten(0, 1), columns=x.shape[2])
        return x


def load_video_denoiser(path, device="cpu") -> VideoDenoiser:
    """In eval mode, frozen. FileNotFoundError, or UserError: damaged or something else."""
    tensors, config = edm.load_tensors(path)
    try:
        denoiser = VideoDenoiser(**config["video"])
        denoiser.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"{path} holds no video denoiser.") from None
    return denoiser.to(device).eval().requires_grad_(False)


def video_noise(network: Denoiser, n: int, frames: int, seed: int) -> Tensor:
    """z ~ N(0, I): (n, C, frames, H, W), the same for every network of that shape."""
    c, _, *size = network.shape
    return torch.randn(n, c, frames, *size, generator=torch.Generator().manual_seed(seed))


# Videos (n, 1, F, 8, 8): drawn shapes that bounce. All frames there can be are known.
GRID = 17  # places of a centre along each axis: 2 to 6 pixels in steps of 1/4


@cache
def templates() -> Tensor:
    """All frames there are, at brightness 1: (2 shapes, 17 · 17 places, 8, 8) in [0, 1]."""
    d = (torch.arange(8) + 0.5 - torch.arange(GRID)[:, None] / 4 - 2).abs()
    dy, dx = d[:, None, :, None], d[None, :, None, :]
    distances = torch.stack([torch.hypot(dx, dy) - 1.9, torch.maximum(dx, dy) - 1.7])
    return (0.5 - distances.flatten(1, 2)).clamp(0, 1)  # edges one pixel wide


def bouncing_shapes(n: int, frames: int, labels=None) -> tuple[Tensor, Tensor]:
    """(n, 1, frames, 8, 8) in [-1, 1] and labels: a disc or a square, at random, that bounces.

    The label tells the shape only. Brightness, uniform in [0.6, 2], and velocity are constant in a
    video: a causal model has to carry them from block to block."""
    labels = torch.randint(2, (n,)) if labels is None else labels
    brightness = 0.6 + 1.4 * torch.rand(n, 1, 1, 1)
    velocity = torch.randint(1, 4, (n, 1, 2)) * (2 * torch.randint(2, (n, 1, 2)) - 1)
    path = torch.randint(2 * GRID - 2, (n, 1, 2)) + velocity * torch.arange(frames)[:, None]
    place = GRID - 1 - (path % (2 * GRID - 2) - (GRID - 1)).abs()  # reflected at both ends
    shapes = templates()[labels[:, None], place[..., 0] * GRID + place[..., 1]]
    return (brightness * shapes - 1)[:, None], labels


# == 4. Settings: the names between batch and lr_generator are Self-Forcing's or SimpleTuner's ====


@dataclass
class Config(edm.BackboneConfig):
    mode: Literal["causvid", "self_forcing", "both"] = "both"  # both: from one start
    objective: Literal["dmd", "sid", "gan"] = "dmd"  # sid, gan: causal_objectives.py
    data: Literal["synthetic"] = "synthetic"  # drawn shapes that bounce; for wan: its own videos
    teacher: str = ""  # a .safetensors; default: the shipped one; new: train one; or wan:PATH
    teacher_updates: edm.Count = 6000  # training steps of a new teacher
    teacher_steps: edm.Count = 16  # Euler steps of the teacher's sampler
    pairs: edm.Count = 1024  # ODE paths of the teacher for the initialisation; CausVid 1,000
    ode_updates: edm.Count = 600  # training steps on them; CausVid 3,000
    steps: int = 300  # generator updates; CausVid 6,000
    batch: edm.Count = 32  # videos an update; Self-Forcing 64
    generator_update_interval: edm.Count = 5  # fake updates per generator update; papers 5
    num_frame_per_block: edm.Count = 3  # frames that are denoised together; papers 5 and 3
    independent_first_frame: bool = False  # the first frame is a block of its own
    num_training_frames: edm.Count = 24  # longest roll-out in training; its last 12 frames count
    denoising_steps: str = "1000,750,500,250"  # timesteps of the generator's calls
    warp_denoising_step: bool = True  # shift them by timestep_shift: 1000, 937.5, 833.3, 625
    timestep_shift: edm.Positive = 5.0  # k: t' = k t / (1 + (k - 1) t), that is σ' = k σ
    same_step_across_blocks: bool = True  # one random exit step for all blocks of a roll-out
    last_step_only: bool = True  # always leave at the last denoising step; papers: at a random one
    context_noise: Annotated[float, (0, 999)] = 0.0  # timestep of blocks in the cache
    local_attn_size: Annotated[int, (-1, 1e18)] = 6  # frames a block sees; -1: all
    sink_size: int = 0  # first frames that stay in the window
    hide_first_block: bool = False  # in training the last block cannot see the first
    ts_schedule: bool = False  # scores only above the timestep that follows the exit step
    ts_schedule_max: bool = False  # scores only below the timestep of the exit step
    min_score_timestep: int = 0  # lowest timestep of scores without ts_schedule
    min_timestep_ratio: edm.Share = 0.02  # scores' timesteps are clamped after the shift: lowest
    max_timestep_ratio: edm.Share = 0.98  # and highest, as a share of 1000
    real_score_guidance_scale: float = 0.0  # w: c + w (c - u) of the teacher; Self-Forcing 3
    fake_score_guidance_scale: float = 0.0  # the same of the fake
    lr_generator: float = 3e-4  # learning rate of the generator, falls to 0; papers 2e-6
    lr_fake: float = 5e-4  # the same of fake and discriminator; papers 2e-6 and 4e-7
    ema: edm.Decay = 0.99  # decay of the average that is the result; paper 0.99
    clip: edm.Positive = 10.0  # largest gradient norm of a network
    eval_n: int = 256  # videos behind the numbers of the verdict; 0: no numbers
    n: edm.Count = 6  # videos of --sample, of three times the training length

    def __post_init__(self):
        super().__post_init__()
        if self.min_timestep_ratio >= self.max_timestep_ratio:
            raise UserError("Needed: --min-timestep-ratio < --max-timestep-ratio.")
        if self.objective == "sid" and self.fake_score_guidance_scale:
            raise UserError("--objective sid: only --fake-score-guidance-scale 0 is possible.")
        frames, n, size = self.num_training_frames, self.num_frame_per_block, self.local_attn_size
        block_layout(frames, n, self.independent_first_frame)
        clip = clip_blocks(self, frames if ":" in self.teacher[2:] else FRAMES)
        if len(clip) == 1 and frames > sum(clip):
            raise UserError(f"--num-training-frames {frames}: a clip is one block, so use {n}.")
        if 0 <= size < n + self.sink_size:
            raise UserError(f"--local-attn-size {size}: sink and block need {n + self.sink_size}.")
        for exit_step in range(len(timesteps(self.denoising_steps))):
            low, high = score_window([exit_step], self)
            if not 0 <= low < high:
                raise UserError(f"No timestep for the scores is left between {low} and {high}.")


# == 5. Training: teacher, ODE initialisation, CausVid or Self-Forcing ============================


def load_teacher(cfg: Config) -> Denoiser:
    """--teacher, or --sample, else the shipped one; wan:PATH_OR_HUB_ID: Wan, called like it."""
    if ":" in cfg.teacher[2:]:  # not C:\\
        from backbones.scripts import load_teacher

        return load_teacher(cfg, causal=True)
    shipped = edm.ASSETS / "causal_video_teacher.safetensors"
    return load_video_denoiser(cfg.sample or cfg.teacher or shipped, cfg.device)


def regress(cfg: Config, run: Run, start, steps: int, lr: float, decay: float, loss_of):
    """Minimises loss_of(a copy of start); returns the average of its weights."""
    network, ema = edm.trainable_copy(start), edm.trainable_copy(start)
    edm.shard(network, ema)
    optimizer = torch.optim.AdamW(network.parameters(), lr, betas=(0.9, 0.99))
    trained = {"network": (network, optimizer), "ema": (ema, None)}
    first = run.load(trained)
    for step in run.bar(first, steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, step / 200) * falling(step, steps)
        with autocast(cfg):
            loss = loss_of(network)
        run.update(step, "network", network, optimizer, loss, cfg.clip)
        edm.ema_update(ema, network, decay, step)
        run.log(step, {"loss": loss})
        if step % cfg.save_every == 0 or step == steps:
            run.save(step, trained)
    return edm.whole(ema, start, last=False)


def autocast(cfg: Config):
    """Without its cache: torch 2.9 uses a weight that was cast without gradients with them, too."""
    how = {"enabled": cfg.amp, "cache_enabled": False}
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, **how)


def falling(step: int, steps: int) -> float:
    """Factor on learning rates: half a cosine, from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def train_teacher(cfg: Config, run: Run) -> Denoiser:
    """Flow matching on drawn videos, t uniform before a shift of 5, 10 % without a label."""

    def loss_of(network):
        n, frames = 2 * edm.rows(cfg.batch), network.shape[1]
        x, labels = (v.to(cfg.device) for v in bouncing_shapes(n, frames))
        u, dropped = (torch.rand(n, device=x.device) for _ in range(2))
        sigma, labels = 5 * u.clamp(1e-3) / (1.001 - u), torch.where(dropped < 0.1, -1, labels)
        return flow_loss(network(diffuse(x, sigma), sigma, labels), x, sigma)

    torch.manual_seed(cfg.seed)
    start = VideoDenoiser(frames=FRAMES).to(cfg.device)
    return regress(cfg, run, start, cfg.teacher_updates, 2e-3, 0.999, loss_of)


def teacher_sampler(cfg: Config, teacher: Denoiser):
    """(z, labels) -> the ODE path through the student's levels; guidance c + w (c - u)."""
    sigmas, guidance = student_sigmas(cfg), 1 + cfg.real_score_guidance_scale
    substeps = max(1, cfg.teacher_steps // (len(sigmas) - 1))
    return partial(ode_path, teacher, sigmas=sigmas, substeps=substeps, guidance=guidance)


def make_paths(cfg: Config, teacher: Denoiser) -> dict[str, Tensor]:
    """ODE paths of the teacher and their labels: {"path", "labels"}."""
    frames = sum(clip_blocks(cfg, teacher.shape[1]))
    z = video_noise(teacher, cfg.pairs, frames, cfg.seed + 10000)
    labels = torch.arange(cfg.pairs) % teacher.label_dim
    batch = edm.rows(cfg.batch) if teacher.latents else 256
    path = edm.in_batches(teacher_sampler(cfg, teacher), z, labels, cfg.device, batch)
    return {"path": path, "labels": labels}


def train_ode(cfg: Config, run: Run, teacher: Denoiser, pairs) -> Denoiser:
    """The causal student's start: regression on ODE paths of the teacher  (CausVid §4.3)."""
    sigmas, blocks = student_sigmas(cfg), clip_blocks(cfg, teacher.shape[1])
    mask = block_mask(blocks, *attention_window(cfg)).to(cfg.device)

    def loss_of(student):
        i = torch.randint(cfg.pairs, (edm.rows(cfg.batch),))
        states, labels = (pairs[k][i].to(cfg.device) for k in ("path", "labels"))
        return ode_init_loss(student, states, sigmas, labels, blocks, mask)

    student = regress(cfg, run, teacher, cfg.ode_updates, 1e-3, 0.99, loss_of)
    pictures(run, cfg.ode_updates, student, teacher, teacher, cfg)
    return student


def train(cfg: Config, run: Run, mode: str, teacher, start, pairs=None) -> Denoiser:
    """Alternates the two updates; returns the average of the generator's weights."""
    generator, fake = edm.trainable_copy(start), edm.trainable_copy(teacher)
    generator.checkpointing = cfg.gradient_checkpointing
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    torch.manual_seed(cfg.seed)
    head = nn.Identity() if cfg.objective != "gan" else objectives().Discriminator(fake)
    critic = nn.ModuleDict({"fake": fake, "discriminator": head.to(cfg.device)})  # one optimiser
    edm.shard(generator, fake, ema, head)
    adamw = partial(torch.optim.AdamW, betas=(0.0, 0.99), weight_decay=0.01, fused=True)
    optimizer_generator = adamw(generator.parameters(), lr=cfg.lr_generator)
    optimizer_fake = adamw(critic.parameters(), lr=cfg.lr_fake)
    trained = {"generator": (generator, optimizer_generator), "fake": (critic, optimizer_fake)}
    trained["ema"] = (ema, None)
    batch, frames = edm.rows(cfg.batch), sum(clip_blocks(cfg, teacher.shape[1]))

    def draw():
        """[real videos, labels]; of a larger backbone the ends of its ODE paths"""
        if teacher.latents:
            i = torch.randint(cfg.pairs, (batch,))
            drawn = pairs["path"][i, -1], pairs["labels"][i]
        else:
            drawn = bouncing_shapes(batch, frames)
        return [v.to(cfg.device) for v in drawn]

    first = run.load(trained)  # 0, or with --resume the step of checkpoint.pt
    for step in run.bar(first, cfg.steps):
        for optimizer, lr in (optimizer_generator, cfg.lr_generator), (optimizer_fake, cfg.lr_fake):
            optimizer.param_groups[0]["lr"] = lr * falling(step, cfg.steps)
        # Step A: the generator
        real = draw()
        with autocast(cfg):
            loss, made, log = generator_step(generator, teacher, fake, head, cfg, mode, *real)
        run.update(step, "generator", generator, optimizer_generator, loss, cfg.clip)
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: fake and discriminator, first on the same x
        for i in range(cfg.generator_update_interval):
            if i > 0:
                real = draw()
                with torch.no_grad(), autocast(cfg):
                    *made, _ = student_video(mode, generator, *real, cfg)
            with autocast(cfg):
                loss, log_fake = fake_step(fake, head, cfg, *made, *real)
            run.update(step, "fake", critic, optimizer_fake, loss, cfg.clip)
            log |= log_fake
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(step, trained)
            pictures(run, step, ema, teacher, fake, cfg)
    return edm.whole(ema, start, last=False)


# == 6. Pictures and verdict ======================================================================


def long_frames(cfg: Config, network) -> int:
    """Three times the training length."""
    return 3 * sum(clip_blocks(cfg, network.shape[1])) - 2 * cfg.independent_first_frame


@edm.or_warn("picture")
@torch.no_grad()
def pictures(run: Run, step: int, generator, teacher, fake, cfg: Config) -> None:
    """samples_<step>.png: long roll-outs; denoised.png: x, x_t, D_real and D_fake at σ = 3."""
    frames, sampler = long_frames(cfg, teacher), partial(generate, generator, cfg=cfg)
    x = generator.draw(run.path(f"samples_{step}.png"), sampler, cfg.seed + 20000, frames=frames)
    if teacher.latents:
        return
    x = x[:, :, : teacher.shape[1]].to(cfg.device)
    labels, sigma = edm.class_labels(6, teacher.label_dim, device=x.device), x.new_full((6,), 3.0)
    with edm.own_random_numbers(cfg.seed + 30000):
        x_t = diffuse(x, sigma)
    rows = [x, x_t, teacher(x_t, sigma, labels), fake(x_t, sigma, labels)]
    rows = [v.transpose(1, 2).flatten(0, 1) for v in rows]
    edm.save_grid(run.path("denoised.png"), *rows, columns=x.shape[2])


@torch.no_grad()
def evaluate(cfg: Config, run: Run, teacher, students: dict) -> dict:
    """{name: numbers}; samples.png, samples.gif and drift.png show all of them, same z."""
    if not cfg.eval_n or teacher.latents:
        return {}
    try:
        from tools import plot
        from tools.drift import drift
    except ModuleNotFoundError:
        return print("There is no folder tools/ beside this file: no verdict.") or {}
    z = video_noise(teacher, cfg.eval_n, long_frames(cfg, teacher), cfg.seed + 20000).to(cfg.device)
    labels = torch.arange(cfg.eval_n, device=cfg.device) % teacher.label_dim
    clip, sampler = clip_blocks(cfg, teacher.shape[1]), teacher_sampler(cfg, teacher)
    samplers = {"data": lambda: bouncing_shapes(cfg.eval_n, z.shape[2], labels.cpu())[0]}
    samplers["teacher"] = lambda: sampler(z[:, :, : sum(clip)], labels)[:, -1]
    for name, student in students.items():
        samplers[name] = partial(generate, student, z, labels, cfg)
    rows, videos = {}, {}
    with edm.own_random_numbers(cfg.seed + 30000):
        for name, draw in samplers.items():
            started = time.time()
            videos[name] = x = draw()
            fps = cfg.eval_n * x.shape[2] / (time.time() - started)
            blocks = block_layout(x.shape[2], cfg.num_frame_per_block, cfg.independent_first_frame)
            row = drift(x, labels, blocks, templates())
            rows[name] = {"n": cfg.eval_n, **row, "frames_per_second": fps}
    names = ("residual", "bias", "spread", "correlation")
    panels = {name: {method: row[name] for method, row in rows.items()} for name in names}
    with edm.or_warn("picture"):
        plot.save_strips(run.path("samples.png"), videos)
        plot.save_gif(run.path("samples.gif"), list(videos.values()))
        plot.save_lines(run.path("drift.png"), panels, "block", mark=len(clip))
        for name in students:
            plot.curves(run.path(name))
    return rows


def main(cfg: Config) -> dict:
    """Runs every stage that is not done yet; returns what result.json holds."""
    run = Run(cfg, "causal_video")
    teacher = None if cfg.teacher == "new" else load_teacher(cfg)
    if cfg.sample:
        frames = long_frames(cfg, teacher)
        return run.draw_samples(teacher, partial(generate, teacher, cfg=cfg), frames=frames)
    run.begin()  # a folder with a run in each of its folders

    def stage(name: str, make, *args) -> Denoiser:
        """make(cfg, run, *args) with a run folder of its own; its network is kept there."""
        inner = Run(cfg, "causal_video", run.path(name))
        network = make(cfg, inner, *args)
        network.save(inner.path("generator"))
        run.earlier, run.resumed_from = run.earlier + inner.earlier, inner.resumed_from
        return network

    if cfg.teacher == "new":
        teacher = stage("teacher", train_teacher).requires_grad_(False).eval()
    pairs = run.once("pairs.safetensors", partial(make_paths, cfg, teacher))
    start = stage("ode_init", train_ode, teacher, pairs)
    students = {"ode_init": start}
    for mode in ("causvid", "self_forcing"):
        if cfg.mode in (mode, "both"):
            students[mode] = stage(mode, train, mode, teacher, start, pairs)
    edm.first_alone()
    return run.finish(evaluate(cfg, run, teacher, students))


# == 7. The options' arithmetic, with Self-Forcing's names and meaning: numbers in, numbers out ===


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

    hide_first: the last block of a training video does not see the first block."""
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
    drawn = edm.from_first([int(torch.randint(n_steps, ())) for _ in range(n_blocks)])
    drawn = drawn[:1] * n_blocks if cfg.same_step_across_blocks else drawn
    return [n_steps - 1] * n_blocks if cfg.last_step_only else drawn


def score_window(exits, cfg) -> tuple[int, int]:
    """Timesteps [low, high) of scores, before the shift; [min_score_timestep, 1000) if not said.

    With one exit step for all blocks, ts_schedule raises low to the step after it and
    ts_schedule_max lowers high to the step itself."""
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


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
