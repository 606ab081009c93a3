"""CausVid and Self-Forcing: a video model that sees past and future becomes a causal few-step one.

The road of every causal video model, in one file: bidirectional teacher -> ODE initialisation ->
CausVid or Self-Forcing -> long roll-outs. Both share all but a few lines: see student_video.

Papers      [CV] CausVid, Yin et al. 2024, arXiv 2412.07772
            [SF] Self-Forcing, Huang et al. 2025, arXiv 2506.08009    [DMD] 2311.18828
Objects     teacher    D_real(x_t, σ)   sees all frames at once, one σ for all          frozen
            generator  G(x_t, σ; past)  causal: block by block, past blocks in a cache  trained
            fake       D_fake(x_t, σ)   denoiser of generated videos, sees all frames   trained
            discriminator               for --objective gan: head on the fake           trained
Shapes      x, z, real: (B, C, F, H, W), x in [-1, 1]; labels: (B,); sigma: (B,) or (B, F)
Times       t = 1000 σ / (1 + σ) in [0, 1000], as Wan and the options have it; the rest is in σ
Differences from the papers
            1. drawn videos of 12 x 8 x 8 pixels and a network of 0.2 million weights; papers: 21
               latent frames of Wan 2.1. So AdamW with β = (0, 0.99), rates of 5e-4, batches of 32
            2. both students have a window of --local-attn-size frames in training too, hence roll
               out to any length; CausVid restarts its cache with overlapping frames instead
            3. no text and no VAE: a class label, pixels; nothing is decoded and encoded again
            4. the fake's first update of a round reuses the generator's own videos
Run         python causal_video.py                      # both students, compared at 3 x the length
            python causal_video.py --mode self_forcing --objective sid
            python causal_video.py --sample runs/causal_video-0/self_forcing/generator.safetensors
"""

import copy
import itertools
import math
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import edm_teacher as edm
from edm_teacher import Run, UserError, expand, guided

FRAMES, SIZE = 12, 8  # of the teacher's videos; the network itself takes any number of frames

# ------------------------------------------------------------------------------------------------
# 1. The method                                                       CausVid §4, Self-Forcing §3
# ------------------------------------------------------------------------------------------------


# --- noise: flow matching's x_t' = (1 - t) x + t ε is x_t / (1 + σ) with σ = t / (1 - t) ---
def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def diffuse_frames(x: Tensor, sigma: Tensor) -> Tensor:
    """The same with a noise level for each frame, sigma: (B, F)."""
    return x + sigma[:, None, :, None, None] * torch.randn_like(x)


def flow_loss(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """mean ((1 + σ)/σ)² (D(x_t; σ) - x)²: flow matching's |v - (ε - x)|² in terms of D.

    What teacher and fake are trained with. sigma: (B,), > 0. Mean over everything.
    """
    return ((expand((1 + sigma) / sigma, x) * (denoised - x)) ** 2).mean()


# --- causality: which frames a block may see, as a mask (training) or a cache (roll-out) ---
class Cache:
    """Keys and values of past frames: (k, v) of each layer, never changed in place, no gradient.

    frames: the numbers of the frames in it, in order.
    """

    def __init__(self, frames=(), layers=()):
        self.frames, self.layers = list(frames), list(layers)

    def keep(self, frames: list[int]) -> "Cache":
        """Only these frames: what rolls out of the window is gone."""
        if frames == self.frames:
            return self
        chosen = torch.tensor([self.frames.index(f) for f in frames], dtype=torch.long)

        def pick(t):  # (B, heads, frames * tokens, d)
            t = t.unflatten(2, (len(self.frames), -1))
            return t.index_select(2, chosen.to(t.device)).flatten(2, 3)

        return Cache(frames, [(pick(k), pick(v)) for k, v in self.layers])

    def append(self, frames: list[int], layers: list) -> "Cache":
        new = [(k.detach(), v.detach()) for k, v in layers]
        if self.frames:
            old = zip(self.layers, new, strict=True)
            new = [tuple(torch.cat(pair, 2) for pair in zip(a, b, strict=True)) for a, b in old]
        return Cache(self.frames + frames, new)


def rollout(generator, z: Tensor, labels, cfg, exits=None, training=False) -> Tensor:
    """The video, block by block, each from the cached past (CausVid Alg. 2, Self-Forcing Alg. 1).

    A block runs through the denoising steps with fresh noise between them, as DMD2's sampler, and
    ends after step exits[b] (default: the last). One more call at the context noise writes its keys
    and values. z: unit noise (B, C, F, H, W), any F that the blocks divide.
    Gradients, if on, reach the exit step of the blocks among the last FRAMES frames and nothing
    else: earlier steps, caches and contexts carry none.
    training: do what Self-Forcing does in training only: noise on the context, not just its label,
    and with --hide-first-block a last block that cannot see the first.
    """
    sigmas = denoising_sigmas(cfg.denoising_steps, cfg.warp_denoising_step, cfg.timestep_shift)
    context_sigma = float(sigma_of_timestep(cfg.context_noise))
    blocks = block_layout(z.shape[2], cfg.num_frame_per_block, cfg.independent_first_frame)
    out, past, start = [], Cache(), 0
    for b, n in enumerate(blocks):
        past = past.keep(visible_frames(blocks, b, **attention(cfg, training)))
        last = exits[b] if exits else len(sigmas) - 1
        x_t = sigmas[0] * z[:, :, start : start + n]
        for k in range(last + 1):
            wanted = k == last and start >= z.shape[2] - FRAMES
            with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
                x = generator(x_t, sigmas[k], labels, past=past, start=start)
            if k < last:
                x_t = diffuse(x, sigmas[k + 1].to(x).expand(len(x)))
        out.append(x)
        with torch.no_grad():
            if training and context_sigma:
                x = diffuse(x, torch.full((len(x),), context_sigma, device=x.device))
            how = {"past": past, "start": start, "return_kv": True}
            _, kv = generator(x.detach(), context_sigma, labels, **how)
        past = past.append(list(range(start, start + n)), kv)
        start += n
    return torch.cat(out, 2)


@torch.no_grad()
def generate(generator, z: Tensor, labels: Tensor | None = None, cfg=None) -> Tensor:
    """What a user calls: a roll-out of as many frames as z has, with the options in cfg."""
    return rollout(generator, z, labels, cfg or Config())


# --- where the two methods differ: which videos the student is trained on ---
def student_video(mode: str, generator, real: Tensor, labels: Tensor, cfg):
    """(x, window, first): videos, timesteps (low, high) of their scores, first frame of the loss.

    causvid       x = G(real + σ ε; σ), one call under the mask, each block at a denoising step's σ
                  of its own, or clean (CausVid Alg. 1): the context is noised data
    self_forcing  x = roll-out, each block from the student's own past (Self-Forcing Alg. 1), left
                  at a random step; beyond FRAMES frames only the last ones count, less a block
    """
    clip = real.shape[2]
    if mode == "causvid":
        blocks = block_layout(clip, cfg.num_frame_per_block, cfg.independent_first_frame)
        sigma = block_sigmas(len(real), blocks, student_sigmas(cfg)).to(real)
        mask = block_mask(blocks, **attention(cfg, True)).to(real.device)
        x = generator(diffuse_frames(real, sigma), sigma, labels, mask=mask)
        return x, score_window(None, cfg), 0
    frames = roll_out_frames(clip, cfg.num_training_frames, cfg.num_frame_per_block)
    blocks = block_layout(frames, cfg.num_frame_per_block, cfg.independent_first_frame)
    steps = len(student_sigmas(cfg)) - 1
    exits = exit_steps(len(blocks), steps, cfg.same_step_across_blocks, cfg.last_step_only)
    z = torch.randn(len(real), real.shape[1], frames, *real.shape[3:], device=real.device)
    x = rollout(generator, z, labels, cfg, exits, training=True)
    return x[:, :, -clip:], score_window(exits, cfg), blocks[-1] if frames > clip else 0


# --- distribution matching, as in DMD (CausVid Eq. 4) ---
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


# --- the other two objectives: each is a loss at x, its gradient takes the same way ---
def sid_loss(x: Tensor, denoised_real: Tensor, denoised_fake: Tensor, alpha: float = 1.0) -> Tensor:
    """mean w (r - f) ((r - x) - α (r - f)), r = D_real, f = D_fake, w = 1 / mean|x - r|  (SiD).

    Score identity distillation (arXiv 2404.04057): to be differentiated through r and f too.
    """
    r, f, w = denoised_real, denoised_fake, dmd_weight(x, denoised_real)
    return (w * (r - f) * ((r - x) - alpha * (r - f))).mean()


def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """mean -log sigmoid(l_better - l_worse). Discriminator: real is better; generator: its own."""
    return F.softplus(worse - better).mean()


def difference_penalty(logits: Tensor, perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)²: |∇l|² to first order. On real: R1; generated: R2."""
    return ((perturbed - logits) / std).square().mean()


def gradient_at(x: Tensor, loss_of) -> tuple[Tensor, Tensor]:
    """(L, numel ∂L/∂x) of L = loss_of(x), in the units of dmd_gradient; no network gets any."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(x)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad * x.numel()


# --- the start: regression on the teacher's ODE paths (CausVid §4.3) ---
@torch.no_grad()
def ode_path(teacher, z: Tensor, labels, sigmas: Tensor, substeps: int, guidance: float) -> Tensor:
    """Euler's method from σ_max z through all σ_k to 0: states (B, K + 1, C, F, H, W) at the σ_k.

    sigmas: K falling levels and 0. Each interval has `substeps` steps, evenly in t of shift 5.
    """
    x, states = sigmas[0] * z, []
    for high, low in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        states.append(x)
        u = torch.linspace(high / (5 + high), low / (5 + low), substeps + 1, dtype=torch.float64)
        levels = (5 * u / (1 - u)).tolist()
        for sigma, following in itertools.pairwise(levels):
            level = torch.full((len(x),), sigma, device=x.device)
            denoised = guided(teacher, x, level, labels, guidance)
            x = denoised + following / sigma * (x - denoised)
    return torch.stack([*states, x], 1)


def ode_init_loss(generator, path: Tensor, sigmas: Tensor, labels, blocks, mask) -> Tensor:
    """E|G({x_i at σ_i}) - {x_i at 0}|², a level σ_i for each block i  (CausVid Eq. 6).

    path: states of ode_path. Mean over the frames that are not clean already.
    """
    sigma = block_sigmas(len(path), blocks, sigmas).to(path)
    k = (sigma[..., None] - sigmas.to(path)).abs().argmin(-1)[:, None, None, :, None, None]
    x_t = path.gather(1, k.expand(-1, 1, *path.shape[2:]))[:, 0]
    error = (generator(x_t, sigma, labels, mask=mask) - path[:, -1]).square()
    noisy = (sigma > 0)[:, None, :, None, None].to(error)
    return (error * noisy).sum() / (noisy.expand_as(error).sum() + 1e-8)


# ------------------------------------------------------------------------------------------------
# 2. The two updates                                                                CausVid Alg. 1
# ------------------------------------------------------------------------------------------------


def generator_step(generator, teacher, fake, discriminator, cfg, mode: str, real, labels):
    """Step A: (loss of the generator, (its videos x detached, window), what to log).

    Gradients reach the generator alone: all objectives are a gradient at x that is sent through it.
    dmd: the score difference of DMD at one σ for all frames; both scores see the whole video.
    """
    x, window, first = student_video(mode, generator, real, labels, cfg)
    sigma = score_sigma(len(x), window, cfg).to(x)

    def scores(x_t):
        both = (teacher, cfg.real_score_guidance_scale), (fake, cfg.fake_score_guidance_scale)
        return [guided(network, x_t, sigma, labels, 1 + w) for network, w in both]

    if cfg.objective == "dmd":
        with torch.no_grad():
            denoised_real, denoised_fake = scores(diffuse(x, sigma))
            grad = dmd_gradient(denoised_fake, denoised_real, dmd_weight(x, denoised_real))
        log = {"|D_fake - D_real|": (denoised_fake - denoised_real).abs().mean()}
    elif cfg.objective == "sid":
        loss, grad = gradient_at(x, lambda x: sid_loss(x, *scores(diffuse(x, sigma))))
        log = {"SiD loss": loss}
    else:
        with torch.no_grad():
            logits_real = discriminator(fake, diffuse(real, sigma), sigma, labels)

        def loss_of(x):
            logits = discriminator(fake, diffuse(x, sigma), sigma, labels)
            return relativistic_loss(logits, logits_real)

        loss, grad = gradient_at(x, loss_of)
        log = {"GAN loss": loss}
    log["|grad|"] = grad.square().mean().sqrt()
    loss = surrogate_loss(x[:, :, first:], grad[:, :, first:])
    return loss, (x.detach(), window), log


def fake_step(fake, discriminator, cfg, x: Tensor, window, real: Tensor, labels):
    """Step B: (loss, what to log): flow matching on detached videos x; gan: real against x."""
    sigma = score_sigma(len(x), window, cfg).to(x)
    if cfg.objective != "gan":
        loss = flow_loss(fake(diffuse(x, sigma), sigma, labels), x, sigma)
        return loss, {"fake loss": loss}
    pair = [diffuse(v, sigma) for v in (real, x)]
    real_logits, logits = (discriminator(fake, x_t, sigma, labels) for x_t in pair)
    loss, log = relativistic_loss(real_logits, logits), {}
    for name, x_t, l in zip(("R1", "R2"), pair, (real_logits, logits), strict=True):
        near = discriminator(fake, x_t + GAN_STD * torch.randn_like(x_t), sigma, labels)
        log[name] = difference_penalty(l, near, GAN_STD)
        loss = loss + 0.5 * GAN_PENALTY * log[name]
    return loss, log | {"logit difference": (real_logits - logits).mean()}


GAN_STD, GAN_PENALTY = 0.01, 0.01  # size and weight of the perturbations behind R1 and R2


# ------------------------------------------------------------------------------------------------
# 3. Networks: one small video transformer for teacher, generator and fake
# ------------------------------------------------------------------------------------------------


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of the frame number: pairs of channels turn by position · 100^(-2i/d).

    x: (B, heads, tokens, d), position: (tokens,). q · k then depends on differences alone.
    """
    d = x.shape[-1]
    rate = 100 ** (-torch.arange(0, d, 2, device=x.device) / d)
    angle = position[:, None].to(x) * rate.to(x)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Block(nn.Module):
    """Attention over all tokens of all frames, then an MLP; both modulated per frame (AdaLN)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor, position: Tensor, mask, past):
        """x: (B, F, P, width), emb: (B, F, 1, width) -> (x, (k, v) of these frames, k rotated)."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(emb).chunk(6, -1)
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift).flatten(1, 2)  # (B, F P, 3 width)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, position), rotate(k, position)
        keys, values = (
            (k, v) if past is None else (torch.cat(p, 2) for p in zip(past, (k, v), strict=True))
        )
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        x = x + gate * self.out(a.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])
        x = x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)
        return x, (k, v)


class VideoTransformer(nn.Module):
    """F(x, t, labels): videos (B, C, F, H, W), t (B, F) in [0, 1] -> (B, C, F, H, W).

    Without mask and past every frame sees every other; mask: (F, F), True where row may see column.
    """

    def __init__(self, channels=1, size=SIZE, patch=4, width=64, depth=3, heads=4, label_dim=2):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch, self.label_dim, self.checkpointing = patch, label_dim, False
        self.side, pixels = size // patch, channels * patch**2
        self.embed = nn.Linear(pixels, width)
        self.place = nn.Parameter(torch.randn(self.side**2, width) * 0.02)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(label_dim + 1, width)  # entry 0: no class
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation, self.last = nn.Linear(width, 2 * width), nn.Linear(width, pixels)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, labels, mask=None, past=None, start: int = 0):
        """-> (F, activations of each block, (k, v) of each block)"""
        (b, c, f), p, side = x.shape[:3], self.patch, self.side
        x = x.reshape(b, c, f, side, p, side, p).permute(0, 2, 3, 5, 1, 4, 6)
        h = self.embed(x.reshape(b, f, side**2, -1)) + self.place
        i = torch.arange(self.label.embedding_dim // 2, device=x.device)
        angles = 1000 * t[..., None] * 10000 ** (-i / len(i))
        emb = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(h))
        labels = torch.full((b,), -1, device=x.device) if labels is None else labels
        emb = F.silu(emb + self.label(labels + 1)[:, None])[:, :, None]  # (B, F, 1, width)
        position = torch.arange(start, start + f, device=x.device).repeat_interleave(side**2)
        if mask is not None:
            mask = mask.repeat_interleave(side**2, 0).repeat_interleave(side**2, 1)
        features, kv = [], []
        for n, block in enumerate(self.blocks):
            args = h, emb, position, mask, past.layers[n] if past and past.frames else None
            if self.checkpointing and torch.is_grad_enabled():
                h, pair = checkpoint(block, *args, use_reentrant=False)
            else:
                h, pair = block(*args)
            features.append(h.flatten(1, 2))
            kv.append(pair)
        shift, scale = self.modulation(emb).chunk(2, -1)
        out = self.last(self.norm(h) * (1 + scale) + shift)
        out = out.reshape(b, f, side, side, c, p, p).permute(0, 4, 1, 2, 5, 3, 6)
        return out.reshape(b, c, f, side * p, side * p), features, kv


class FlowPrecond(nn.Module):
    """D(x; σ) = x/(1+σ) - σ/(1+σ) F(x/(1+σ); t), t = σ/(1+σ): rectified flow, as Wan's network.

    F is the velocity ε - x. sigma: a number, (B,) or a level for each frame (B, F), 0 for clean
    frames, which come back as they are. labels: (B,), -1 or None: no class.
    """

    sigma_min, sigma_max = 0.002, 9999.0  # t = 0.002 and 0.9999: σ of t = 1 is infinite

    def __init__(self, model: VideoTransformer):
        super().__init__()
        self.model, self.label_dim = model, model.label_dim

    def forward(self, x, sigma, labels=None, return_features=False, return_kv=False, **how):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = (sigma[:, None] if sigma.ndim == 1 else sigma).expand(len(x), x.shape[2])
        s = sigma[:, None, :, None, None]
        out, features, kv = self.model(x / (1 + s), sigma / (1 + sigma), labels, **how)
        denoised = x / (1 + s) - s / (1 + s) * out
        if return_features or return_kv:
            return denoised, features if return_features else kv
        return denoised


class Discriminator(nn.Module):
    """A learned query looks at the activations of each block of a denoiser -> logits (B,)."""

    def __init__(self, denoiser: FlowPrecond):
        super().__init__()
        width, depth = denoiser.model.config["width"], denoiser.model.config["depth"]
        self.query = nn.Parameter(torch.randn(depth, 1, width) / math.sqrt(width))
        self.kv = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.head = nn.Sequential(
            nn.LayerNorm(depth * width), nn.Linear(depth * width, width), nn.SiLU()
        )
        self.head.append(nn.Linear(width, 1))

    def forward(self, backbone, x_t: Tensor, sigma: Tensor, labels) -> Tensor:
        _, features = backbone(x_t, sigma, labels, return_features=True)
        seen = []
        for query, kv, tokens in zip(self.query, self.kv, features, strict=True):
            k, v = kv(tokens).chunk(2, -1)
            query = query.expand(len(x_t), -1, -1)
            seen.append(F.scaled_dot_product_attention(query, k, v)[:, 0])
        return self.head(torch.cat(seen, -1))[:, 0]


def save_video_denoiser(denoiser: FlowPrecond, path, dtype=None) -> None:
    state = {k: v.to(dtype or v.dtype) for k, v in denoiser.state_dict().items()}
    edm.save_tensors(path, state, {"video_transformer": denoiser.model.config})


def load_video_denoiser(path, device="cpu") -> FlowPrecond:
    """In float32, in eval mode. FileNotFoundError, or UserError: damaged or something else."""
    tensors, config = edm.load_tensors(path)
    try:
        denoiser = FlowPrecond(VideoTransformer(**config["video_transformer"]))
        denoiser.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"{path} holds no video transformer.") from None
    return denoiser.to(device).eval()


# ------------------------------------------------------------------------------------------------
# 4. Settings
# ------------------------------------------------------------------------------------------------


@dataclass
class Config:
    mode: str = "both"  # causvid, self_forcing, or both from one start, to be compared
    objective: str = "dmd"  # dmd, sid or gan
    data: str = "synthetic"  # drawn shapes that bounce: the only videos here
    teacher: str = ""  # teacher.safetensors; default: the shipped one; new: train one
    teacher_updates: int = 6000  # training steps of a new teacher
    teacher_steps: int = 16  # Euler steps of the teacher's sampler
    pairs: int = 1024  # ODE paths of the teacher for the initialisation; papers 1,000 and 16,000
    ode_updates: int = 600  # training steps on them; CausVid 3,000
    steps: int = 300  # generator updates; CausVid 6,000, Self-Forcing's code 600
    batch: int = 32  # videos an update; Self-Forcing 64
    generator_update_interval: int = 5  # fake updates per generator update; papers 5
    num_frame_per_block: int = 3  # frames that are denoised together; papers 5 and 3
    independent_first_frame: bool = False  # the first frame is a block of its own
    num_training_frames: int = FRAMES  # longest roll-out in training; the last 12 frames count
    denoising_steps: str = "1000,750,500,250"  # timesteps of the generator's calls
    warp_denoising_step: bool = True  # shift them by timestep_shift: 1000, 937.5, 833.3, 625
    timestep_shift: float = 5.0  # k: t' = k t / (1 + (k - 1) t), that is σ' = k σ
    same_step_across_blocks: bool = True  # one random exit step for all blocks of a roll-out
    last_step_only: bool = False  # always leave at the last denoising step
    context_noise: float = 0.0  # timestep at which finished blocks enter the cache
    local_attn_size: int = 6  # frames that a frame can see, its block included; -1: all
    sink_size: int = 0  # first frames that stay in the window
    hide_first_block: bool = False  # in training the last block cannot see the first
    ts_schedule: bool = False  # scores only above the timestep that follows the exit step
    ts_schedule_max: bool = False  # scores only below the timestep of the exit step
    min_score_timestep: int = 0  # lowest timestep of scores without ts_schedule
    min_timestep_ratio: float = 0.02  # scores' timesteps are clamped after the shift: lowest
    max_timestep_ratio: float = 0.98  # and highest, as a share of 1000
    real_score_guidance_scale: float = 0.0  # w: c + w (c - u) of the teacher; 0 is off, papers 3
    fake_score_guidance_scale: float = 0.0  # the same of the fake
    lr_generator: float = 5e-4  # learning rate of the generator; papers 2e-6
    lr_fake: float = 5e-4  # learning rate of fake and discriminator; papers 2e-6 and 4e-7
    ema: float = 0.99  # decay of the average that is the result, d of ema_update
    clip: float = 10.0  # largest gradient norm of a network; papers 10
    gradient_checkpointing: bool = False  # less memory: activations are computed again
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


def train_teacher(cfg: Config, run: Run) -> FlowPrecond:
    """Flow matching on drawn videos, t uniform before a shift of 5; 10 % without a label."""
    device = torch.device(cfg.device)
    torch.manual_seed(cfg.seed)
    network = FlowPrecond(VideoTransformer()).to(device)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    for step in run.loop(cfg.teacher_updates, network=network, ema=ema, optimizer=optimizer):
        decay = (1 + math.cos(math.pi * step / cfg.teacher_updates)) / 2
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, step / 200) * decay
        x, labels = (v.to(device) for v in draw_videos(2 * cfg.batch, FRAMES))
        u = torch.rand(len(x), device=device).clamp(1e-3, 0.999)
        sigma = 5 * u / (1 - u)
        labels = torch.where(torch.rand(len(x), device=device) < 0.1, -1, labels)
        loss = flow_loss(network(diffuse(x, sigma), sigma, labels), x, sigma)
        update(optimizer, loss, network, cfg, run, step, {"loss": loss})
        edm.ema_update(ema, network, 0.999, step)
        run.log(step, {"loss": loss}, every=50)
    return ema


def train_ode(cfg: Config, run: Run, teacher: FlowPrecond) -> FlowPrecond:
    """The causal student's start: regression on ODE paths of the teacher (CausVid §4.3)."""
    device, sigmas, path = (
        torch.device(cfg.device),
        student_sigmas(cfg),
        run.path("pairs.safetensors"),
    )
    blocks = clip_blocks(cfg)
    if not path.exists():
        with edm.own_random_numbers(cfg.seed + 10000):
            labels = torch.arange(cfg.pairs) % teacher.label_dim
            z = torch.randn(cfg.pairs, 1, sum(blocks), SIZE, SIZE)
            how = sigmas, max(1, cfg.teacher_steps // (len(sigmas) - 1)), guidance(cfg)
            batches = zip(z.split(256), labels.split(256), strict=True)
            states = [ode_path(teacher, a.to(device), b.to(device), *how).cpu() for a, b in batches]
        edm.save_tensors(path, {"path": torch.cat(states), "labels": labels}, {})
    pairs, _ = edm.load_tensors(path)
    student = edm.trainable_copy(teacher)
    ema = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    mask = block_mask(blocks, **attention(cfg)).to(device)
    for step in run.loop(cfg.ode_updates, student=student, ema=ema, optimizer=optimizer):
        i = torch.randint(cfg.pairs, (cfg.batch,))
        states, labels = pairs["path"][i].to(device), pairs["labels"][i].to(device)
        loss = ode_init_loss(student, states, sigmas, labels, blocks, mask)
        update(optimizer, loss, student, cfg, run, step, {"loss": loss})
        edm.ema_update(ema, student, 0.99, step)
        run.log(step, {"loss": loss})
    return ema


def train(cfg: Config, run: Run, mode: str, teacher: FlowPrecond, start: FlowPrecond):
    """Alternates the two updates; returns the average of the generator's weights."""
    device, clip = torch.device(cfg.device), sum(clip_blocks(cfg))
    generator, fake = edm.trainable_copy(start), edm.trainable_copy(teacher)
    generator.model.checkpointing = cfg.gradient_checkpointing
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    both = nn.ModuleDict({"fake": fake})  # fake and discriminator share an optimiser
    if cfg.objective == "gan":
        torch.manual_seed(cfg.seed)
        both["discriminator"] = Discriminator(teacher).to(device)
    discriminator = both["discriminator"] if cfg.objective == "gan" else None
    adam = {"betas": (0.0, 0.99), "weight_decay": 0.01, "fused": True}
    optimizer_generator = torch.optim.AdamW(generator.parameters(), cfg.lr_generator, **adam)
    optimizer_fake = torch.optim.AdamW(both.parameters(), cfg.lr_fake, **adam)
    parts = {"generator": generator, "both": both, "ema": ema}
    parts |= {"optimizer_generator": optimizer_generator, "optimizer_fake": optimizer_fake}
    for step in run.loop(cfg.steps, **parts):
        # Step A: the generator
        real, labels = (v.to(device) for v in draw_videos(cfg.batch, clip))
        networks = generator, teacher, fake, discriminator
        loss, made, log = generator_step(*networks, cfg, mode, real, labels)
        update(optimizer_generator, loss, generator, cfg, run, step, log | {"generator loss": loss})
        edm.ema_update(ema, generator, cfg.ema, step)
        # Step B: fake and discriminator, first on the same x
        for i in range(cfg.generator_update_interval):
            if i:
                real, labels = (v.to(device) for v in draw_videos(cfg.batch, clip))
                with torch.no_grad():
                    made = student_video(mode, generator, real, labels, cfg)[:2]
            loss, more = fake_step(fake, discriminator, cfg, *made, real, labels)
            log |= more
            update(optimizer_fake, loss, both, cfg, run, step, log)
        run.log(step, log)
        if step % cfg.save_every == 0 or step == cfg.steps:
            pictures(run, step, ema, teacher, fake, cfg)
    return ema


def update(optimizer, loss: Tensor, network, cfg, run: Run, step: int, log: dict) -> None:
    """One optimiser step with clipped gradients; a NaN stops the run, not the weights."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
    run.check_finite(step, log | {"gradient norm": norm})
    optimizer.step()


# ------------------------------------------------------------------------------------------------
# 6. Data and its exact metric
# ------------------------------------------------------------------------------------------------
GRID = 17  # positions of a centre along each axis: 2 to 6 pixels in steps of 1/4


@cache
def templates() -> Tensor:
    """All frames there are at brightness 1: (2 shapes, 17 · 17 positions, 8, 8) in [0, 1]."""
    axis, centre = torch.arange(SIZE) + 0.5, torch.arange(GRID) / 4 + 2
    d = (axis[None, :] - centre[:, None]).abs()
    dy, dx = d[:, None, :, None], d[None, :, None, :]
    disc, square = torch.hypot(dx, dy) - 1.9, torch.maximum(dx, dy).expand(GRID, GRID, -1, -1) - 1.7
    bank = torch.stack([disc, square]).flatten(1, 2)
    return (0.5 - bank).clamp(0, 1)  # edges one pixel wide


def draw_videos(n: int, frames: int) -> tuple[Tensor, Tensor]:
    """(n, 1, frames, 8, 8) in [-1, 1] and labels: a disc or a square that bounces.

    The label tells the shape only. Brightness, in [0.6, 2], and velocity are constant in a video:
    a causal model has to carry them from block to block.
    """
    labels, brightness = torch.randint(2, (n,)), 0.6 + 1.4 * torch.rand(n)
    velocity = torch.randint(1, 4, (n, 2)) * (2 * torch.randint(2, (n, 2)) - 1)
    path = (
        torch.randint(2 * GRID - 2, (n, 1, 2)) + velocity[:, None] * torch.arange(frames)[:, None]
    )
    place = GRID - 1 - (path % (2 * GRID - 2) - (GRID - 1)).abs()  # reflected at both ends
    shapes = templates()[labels[:, None], place[..., 0] * GRID + place[..., 1]]
    return (brightness[:, None, None, None] * shapes - 1)[:, None], labels


def fit(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(brightness, residual), (n, frames) each: the best a · template - 1 over all positions.

    residual: mean square over pixels that is left; 0 for every frame of the data.
    """
    frames = x.detach().cpu()[:, 0].flatten(2) + 1  # (n, F, 64)
    bank = templates().flatten(2)[labels.cpu()]  # (n, 289, 64)
    dot, norm = frames @ bank.mT, bank.square().sum(-1)[:, None]
    best = (dot.clamp_min(0).square() / norm).max(-1)
    a = (dot / norm).gather(-1, best.indices[..., None])[..., 0].clamp_min(0)
    return a, (frames.square().sum(-1) - best.values).clamp_min(0) / frames.shape[-1]


def drift(x: Tensor, labels: Tensor, blocks: list[int]) -> dict:
    """What changes from block to block, as lists; brightness is the mean of a block's frames.

    residual: to the template bank; bias: mean change of brightness since the first block; spread:
    its standard deviation over videos; correlation: with that of the first block.
    """
    a, residual = (torch.stack([b.mean(1) for b in v.split(blocks, 1)]) for v in fit(x, labels))
    centred = a - a.mean(1, keepdim=True)
    spread = a.std(1)
    shared = (centred * centred[0]).mean(1)
    size = (centred.square().mean(1) * centred[0].square().mean()).sqrt()
    row = {"residual": residual.mean(1), "bias": (a - a[0]).mean(1), "spread": spread}
    row["correlation"] = shared / size.clamp_min(1e-12)
    return {k: v.tolist() for k, v in row.items()}


# ------------------------------------------------------------------------------------------------
# 7. Pictures, evaluation, verdict
# ------------------------------------------------------------------------------------------------


def strip(x: Tensor, frames: int, n: int = 6) -> Tensor:
    """n videos as pictures for edm.save_rows: a row each, black after the last frame."""
    x = F.pad(x[:n].cpu(), (0, 0, 0, 0, 0, frames - x.shape[2]), value=-1.0)
    return x.transpose(1, 2).flatten(0, 1)


def long_inputs(cfg: Config, n: int) -> tuple[Tensor, Tensor]:
    """(z of three times the training length, labels): the same for every student."""
    numbers, frames = torch.Generator().manual_seed(cfg.seed + 20000), 3 * sum(clip_blocks(cfg))
    frames -= 2 * cfg.independent_first_frame
    return torch.randn(n, 1, frames, SIZE, SIZE, generator=numbers), torch.arange(n) % 2


@torch.no_grad()
def pictures(run: Run, step: int, generator, teacher, fake, cfg: Config) -> None:
    """samples_<step>.png: long roll-outs; denoised.png: x, x_t, D_real and D_fake at σ = 3."""
    device = torch.device(cfg.device)
    with edm.own_random_numbers(cfg.seed + 20000):
        z, labels = (v.to(device) for v in long_inputs(cfg, 6))
        x = generate(generator, z, labels, cfg)
        rows = {f"generator, step {step}": strip(x, x.shape[2])}
        edm.save_rows(run.path(f"samples_{step}.png"), rows, columns=x.shape[2])
        x, sigma = x[:, :, :FRAMES], torch.full((len(x),), 3.0, device=device)
        x_t = diffuse(x, sigma)
    rows = {"x": x, "x_t = x + 3 ε": x_t, "D_real(x_t; 3)": teacher(x_t, sigma, labels)}
    rows = {k: strip(v, FRAMES) for k, v in (rows | {"D_fake": fake(x_t, sigma, labels)}).items()}
    edm.save_rows(run.path("denoised.png"), rows, columns=FRAMES)


def save_gif(path, videos: dict[str, Tensor], n: int = 8) -> None:
    """The first n videos of each entry side by side, one entry under the other, 8 frames a second.

    Shorter videos turn black at their end.
    """
    from PIL import Image

    frames = max(x.shape[2] for x in videos.values())
    rows = [strip(x, frames, n).unflatten(0, (n, frames)) for x in videos.values()]
    grid = torch.cat([F.pad(torch.cat(list(r[:, :, 0]), -1), (0, 0, 0, 2)) for r in rows], -2)
    grid = edm.to_uint8(grid).repeat_interleave(8, -1).repeat_interleave(8, -2)
    images = [Image.fromarray(frame.numpy()) for frame in grid]
    how = {"save_all": True, "append_images": images[1:], "duration": 125, "loop": 0}
    edm.write_atomic(path, lambda tmp: images[0].save(tmp, format="GIF", **how))


def drift_curves(path, rows: dict, blocks: int) -> None:
    """Residual, bias, spread and correlation against the block; dotted: the training length."""
    plt = edm.pyplot()
    names = ("residual", "bias", "spread", "correlation")
    fig, axes = plt.subplots(1, len(names), figsize=(13, 3))
    for name, ax in zip(names, axes, strict=True):
        for row, values in rows.items():
            ax.plot(range(1, len(values[name]) + 1), values[name], label=row.replace("_", " "))
        ax.axvline(blocks, color="grey", ls=":")
        ax.set(title=name, xlabel="block")
    axes[0].legend(fontsize=7)
    fig.tight_layout()
    edm.write_atomic(path, lambda tmp: fig.savefig(tmp, dpi=90, format="png"))
    plt.close(fig)


@torch.no_grad()
def evaluate(cfg: Config, run: Run, teacher, students: dict) -> dict:
    """Rows of the verdict; samples.png, samples.gif and drift.png of all of them, same z."""
    device, clip = torch.device(cfg.device), sum(clip_blocks(cfg))
    z, labels = (v.to(device) for v in long_inputs(cfg, cfg.eval_n))
    levels = student_sigmas(cfg)
    substeps = max(1, cfg.teacher_steps // (len(levels) - 1))

    def many_steps(z, labels):
        return ode_path(teacher, z[:, :, :clip], labels, levels, substeps, guidance(cfg))[:, -1]

    samplers = {"teacher": many_steps}
    for name, student in students.items():
        samplers[name] = lambda z, labels, student=student: generate(student, z, labels, cfg)
    with edm.own_random_numbers(cfg.seed + 30000):
        real, own = draw_videos(cfg.eval_n, z.shape[2])
        videos, seconds = {"data": (real, own)}, {}
        for name, sampler in samplers.items():
            started = time.time()
            videos[name] = sampler(z, labels).cpu(), labels
            seconds[name] = time.time() - started
    rows = {}
    for name, (x, y) in videos.items():
        blocks = block_layout(x.shape[2], cfg.num_frame_per_block, cfg.independent_first_frame)
        rows[name] = {"n": cfg.eval_n} | drift(x, y, blocks)
        if name in seconds:
            rows[name]["frames_per_second"] = cfg.eval_n * x.shape[2] / seconds[name]
    shown = {name: x for name, (x, _) in videos.items()}
    rows_of = {name.replace("_", " "): strip(x, z.shape[2]) for name, x in shown.items()}
    edm.save_rows(run.path("samples.png"), rows_of, columns=z.shape[2])
    save_gif(run.path("samples.gif"), shown)
    drift_curves(run.path("drift.png"), rows, len(clip_blocks(cfg)))
    return rows


def print_summary(result: dict, run: Run, cfg: Config) -> None:
    """The lists of the metrics at a glance: end of the training length, end of the roll-out."""
    at, table = len(clip_blocks(cfg)), {}
    for name, row in result["metrics"].items():
        worst = max(row["bias"], key=abs)
        table[name] = {"residual": row["residual"][at - 1], "residual end": row["residual"][-1]}
        table[name] |= {"bias": row["bias"][at - 1], "largest bias": worst}
        table[name] |= {"spread": row["spread"][at - 1], "spread end": row["spread"][-1]}
        table[name] |= {"correlation end": row["correlation"][-1]}
        table[name] |= {"frames / s": row.get("frames_per_second", "")}
    edm.print_verdict(result | {"metrics": table}, run.folder)
    print(f"Long roll-outs: {run.path('samples.gif')}, curves: {run.path('drift.png')}")


def stage(cfg: Config, run: Run, name: str) -> Run:
    """A run inside the run's folder: each stage has checkpoint, log and pictures of its own."""
    inner = Run(replace(cfg, out=str(run.path(name)), resume=True), "causal_video")
    inner.command = run.command  # what to type after Ctrl-C
    return inner


def main(cfg: Config) -> dict:
    """Runs every stage that is not done yet; returns what result.json holds."""
    device = edm.set_up(cfg)
    check(cfg)
    if cfg.sample:
        z, labels = (v.to(device) for v in long_inputs(cfg, 8))
        x = generate(load_video_denoiser(cfg.sample, device), z, labels, cfg)
        folder = Path(cfg.out or ".")
        edm.save_rows(folder / "sampled.png", {cfg.sample: strip(x, x.shape[2])}, x.shape[2])
        save_gif(folder / "sampled.gif", {cfg.sample: x})
        print(f"8 videos: {folder / 'sampled.gif'}")
        return {}
    shipped = edm.ASSETS / "causal_video_teacher.safetensors"
    given = None if cfg.teacher == "new" else Path(cfg.teacher or shipped)
    teacher = load_video_denoiser(given, device) if given else None
    run, students = Run(cfg, "causal_video"), {}
    modes = ("causvid", "self_forcing") if cfg.mode == "both" else (cfg.mode,)
    for name in ("teacher", "ode_init", *modes):
        inner, path = stage(cfg, run, name), run.path(name) / "generator.safetensors"
        if name == "teacher":
            network = teacher or train_teacher(cfg, inner)
            teacher = network.eval().requires_grad_(False)
        elif name == "ode_init":
            network = students[name] = train_ode(cfg, inner, teacher)
        else:
            network = students[name] = train(cfg, inner, name, teacher, students["ode_init"])
        save_video_denoiser(network, path)
        run.seconds_before += inner.seconds_before  # spent by earlier starts of this command
        run.start += inner.start
        inner.curves()
    result = run.finish(evaluate(cfg, run, teacher, students))
    print_summary(result, run, cfg)
    return result


# ------------------------------------------------------------------------------------------------
# 8. The options' arithmetic, with Self-Forcing's names and meaning: numbers in, numbers out
# ------------------------------------------------------------------------------------------------


def shift_timestep(t, shift: float):
    """t' = 1000 k τ / (1 + (k - 1) τ), τ = t / 1000; in σ: σ' = k σ. Undone by 1 / k."""
    return 1000 * shift * (t / 1000) / (1 + (shift - 1) * (t / 1000))


def sigma_of_timestep(t) -> Tensor:
    """σ = τ / (1 - τ), τ = t / 1000, up to τ = 0.9999; t: a number, a list or a tensor."""
    tau = (torch.as_tensor(t, dtype=torch.float64, device="cpu") / 1000).clamp(max=0.9999)
    return (tau / (1 - tau)).float()


def timesteps(text: str) -> list[int]:
    """ "1000,750,500,250" -> numbers; a 0 at the end is dropped, as in Self-Forcing."""
    steps = [t for t in edm.numbers(text) if t > 0]
    if not steps or steps != sorted(set(steps), reverse=True) or steps[0] > 1000:
        raise UserError(f"--denoising-steps {text}: expected falling numbers from 1000 down.")
    return steps


def denoising_sigmas(text: str, warp: bool, shift: float) -> Tensor:
    """σ of each step of the generator; warp: the list is meant before the shift."""
    return sigma_of_timestep([shift_timestep(t, shift if warp else 1.0) for t in timesteps(text)])


def block_layout(frames: int, per_block: int, independent_first: bool = False) -> list[int]:
    """Frames of each block: [n, n, ...], or [1, n, n, ...]."""
    rest = frames - independent_first
    if rest < per_block or rest % per_block:
        plus = "1 + " if independent_first else ""
        raise UserError(f"{frames} frames are not {plus}a multiple of {per_block}, a block.")
    return [1] * independent_first + [per_block] * (rest // per_block)


def roll_out_frames(clip: int, longest: int, per_block: int) -> int:
    """Length of a training roll-out: uniform over the numbers of blocks from the clip's up."""
    return clip + per_block * int(torch.randint((longest - clip) // per_block + 1, ()))


def visible_frames(blocks, b: int, window=-1, sink=0, hide_first=False) -> list[int]:
    """Past frames that block b sees: the first `sink` and the latest, `window` with its own.

    window -1: all. hide_first: the last block of a training video does not see the first block.
    """
    past = list(range(sum(blocks[:b])))
    room = window - blocks[b] - sink
    if window >= 0 and len(past) > room + sink:
        recent = past[sink:]
        past = past[:sink] + recent[len(recent) - room :]
    if hide_first and b == len(blocks) - 1:
        past = [f for f in past if f >= blocks[0]]
    return past


def block_mask(blocks, window=-1, sink=0, hide_first=False) -> Tensor:
    """(F, F), True where the frame of the row sees that of the column  (CausVid Eq. 5)."""
    mask, start = torch.zeros(sum(blocks), sum(blocks), dtype=torch.bool), 0
    for b, n in enumerate(blocks):
        seen = visible_frames(blocks, b, window, sink, hide_first)
        mask[start : start + n, [*seen, *range(start, start + n)]] = True
        start += n
    return mask


def exit_steps(n_blocks: int, n_steps: int, same: bool, last_only: bool) -> list[int]:
    """Step after which each block is left: uniform, one for all blocks if same; or the last."""
    if last_only:
        return [n_steps - 1] * n_blocks
    drawn = torch.randint(n_steps, (n_blocks,)).tolist()
    return drawn[:1] * n_blocks if same else drawn


def score_window(exits, cfg) -> tuple[int, int]:
    """Timesteps [low, high) of the scores, before the shift.

    With one exit step for all blocks, ts_schedule raises low to the step after it, ts_schedule_max
    lowers high to the step itself. Otherwise [min_score_timestep, 1000).
    """
    low, high = cfg.min_score_timestep, 1000
    if exits is not None and cfg.same_step_across_blocks:
        steps = timesteps(cfg.denoising_steps)
        if not cfg.warp_denoising_step:
            steps = [round(shift_timestep(t, 1 / cfg.timestep_shift)) for t in steps]
        low = [*steps, 0][exits[0] + 1] if cfg.ts_schedule else low
        high = steps[exits[0]] if cfg.ts_schedule_max else high
    return low, high


def score_timesteps(n: int, window, shift: float, min_ratio: float, max_ratio: float) -> Tensor:
    """n integers in [low, high), then shifted, then clamped: Self-Forcing's order."""
    t = shift_timestep(torch.randint(*window, (n,)).double(), shift)
    return t.clamp(1000 * min_ratio, 1000 * max_ratio)


def score_sigma(n: int, window, cfg) -> Tensor:
    """Noise levels of n samples for scores and for the fake's training; one for all frames."""
    ratios = cfg.min_timestep_ratio, cfg.max_timestep_ratio
    return sigma_of_timestep(score_timesteps(n, window, cfg.timestep_shift, *ratios))


def block_sigmas(n: int, blocks, sigmas: Tensor) -> Tensor:
    """(n, F): for each block of each sample one of the levels at random  (CausVid Alg. 1)."""
    k = torch.randint(len(sigmas), (n, len(blocks)))
    return sigmas[k].repeat_interleave(torch.tensor(blocks), 1)


def student_sigmas(cfg) -> Tensor:
    """The generator's noise levels and 0."""
    levels = denoising_sigmas(cfg.denoising_steps, cfg.warp_denoising_step, cfg.timestep_shift)
    return torch.cat([levels, torch.zeros(1)])


def clip_blocks(cfg) -> list[int]:
    """Blocks of what the teacher judges: as many as fit into its FRAMES frames."""
    n, first = cfg.num_frame_per_block, cfg.independent_first_frame
    return block_layout(first + (min(cfg.num_training_frames, FRAMES) - first) // n * n, n, first)


def attention(cfg, training: bool = False) -> dict:
    """The options of visible_frames and block_mask."""
    hide = cfg.hide_first_block and training
    return {"window": cfg.local_attn_size, "sink": cfg.sink_size, "hide_first": hide}


def guidance(cfg) -> float:
    """w of D_u + w (D_c - D_u): Self-Forcing's scale s stands for D_c + s (D_c - D_u)."""
    return 1 + cfg.real_score_guidance_scale


def check(cfg) -> None:
    """Misspelt or impossible options stop here, with a sentence."""
    edm.one_of("mode", cfg.mode, "causvid", "self_forcing", "both")
    edm.one_of("objective", cfg.objective, "dmd", "sid", "gan")
    edm.one_of("data", cfg.data, "synthetic")
    block_layout(cfg.num_training_frames, cfg.num_frame_per_block, cfg.independent_first_frame)
    needed = cfg.num_frame_per_block + cfg.sink_size
    if 0 <= cfg.local_attn_size < needed:
        raise UserError(f"--local-attn-size {cfg.local_attn_size}: sink and block need {needed}.")
    for exit_step in range(len(timesteps(cfg.denoising_steps))):
        low, high = score_window([exit_step], cfg)
        if not 0 <= low < high:
            raise UserError(f"No timestep for the scores is left between {low} and {high}.")


if __name__ == "__main__":
    edm.command_line(main, Config)
