"""EDM: the teacher of every script here, and the one module that they share (arXiv 2206.00364).

Upper half, to be read: preconditioning, network, loss and sampler of Karras et al. 2022.
Lower half, skip on first reading: checkpoints, data, metrics, run folder, command line.
Run as a script it trains a teacher; every option is explained by --help.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickletools
import platform
import random
import re
import shlex
import signal
import struct
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------
# 1. Preconditioning                                                         EDM Eq. 7, Table 1
# ------------------------------------------------------------------------------------------------


def expand(v: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1): one number per sample, ready to multiply images."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


class EDMPrecond(nn.Module):
    """D(x; σ, y) = c_skip x + c_out F(c_in x; c_noise, y)  (EDM Eq. 7): noisy x in, clean x out.

    x: (B, C, H, W), clean images in [-1, 1] plus σ times unit noise. sigma: (B,) or a number, > 0.
    labels: class indices (B,), -1 = no class for that sample; None = no class for all.
    return_features=True also returns the list of the encoder's last activations per resolution,
    finest first, bottleneck last; "only" leaves the decoder out and returns (None, features).
    The result is in float32 (float64 for a network in float64).
    """

    sigma_min, sigma_max = 0.002, 80.0

    def __init__(self, model: nn.Module, sigma_data: float = 0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data
        self.img_channels, self.img_resolution = model.img_channels, model.img_resolution
        self.shape = (self.img_channels, self.img_resolution, self.img_resolution)
        self.label_dim = model.label_dim

    def forward(self, x: Tensor, sigma, labels: Tensor | None = None, return_features=False):
        dtype = next(self.parameters()).dtype
        x = x.to(dtype)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(len(x))
        s, sd = expand(sigma, x), self.sigma_data
        c_skip = sd**2 / (s**2 + sd**2)
        c_out = s * sd / (s**2 + sd**2).sqrt()
        c_in = 1 / (s**2 + sd**2).sqrt()
        c_noise = sigma.log() / 4
        one_hot = None
        if self.label_dim:
            labels = torch.full((len(x),), -1, device=x.device) if labels is None else labels
            one_hot = F.one_hot(labels + 1, self.label_dim + 1)[:, 1:].to(dtype)  # -1: all zeros
        out = self.model(c_in * x, c_noise, one_hot, return_features=return_features)
        out, features = out if return_features else (out, None)
        if out is None:
            return None, features
        denoised = c_skip * x + c_out * out.to(dtype)
        return (denoised, features) if return_features else denoised


# ------------------------------------------------------------------------------------------------
# 2. The network F: the DDPM++ or ADM U-Net                                         EDM Table 1
# ------------------------------------------------------------------------------------------------


def xavier(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """Uniform Xavier (Glorot) weights for an (out, in, k, k) or (out, in) tensor, times `scale`."""
    receptive = math.prod(shape[2:])
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * receptive))
    return nn.Parameter((torch.rand(shape) * 2 - 1) * bound * scale)


class Linear(nn.Linear):
    def __init__(self, cin: int, cout: int, bias: bool = True):
        super().__init__(cin, cout, bias)
        self.weight = xavier(cout, cin)
        if bias:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Module):
    """k x k convolution with an optional 2 x 2 mean (down) or nearest neighbour (up) before it.

    kernel = 0: only that resampling, no weights.
    """

    def __init__(self, cin: int, cout: int, kernel: int, up=False, down=False, scale: float = 1.0):
        super().__init__()
        self.up, self.down = up, down
        self.weight = xavier(cout, cin, kernel, kernel, scale=scale) if kernel else None
        self.bias = nn.Parameter(torch.zeros(cout)) if kernel else None
        if (
            up or down
        ):  # genuine files hold the filter [1, 1]; applying it is what the two lines below do
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x
        x = F.avg_pool2d(x, 2) if self.down else x
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


def group_norm(channels: int, eps: float = 1e-6) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise UserError(
            f"{channels} channels cannot be normalised in groups: choose another width."
        )
    return nn.GroupNorm(groups, channels, eps)


class UNetBlock(nn.Module):
    """Residual block; up- and downsampling sit inside its first convolution, attention behind.

    adm=False is DDPM++'s block: the embedding is added, one head, each sum times sqrt(1/2).
    adm=True is ADM's: the embedding scales and shifts, a head per 64 channels, sums as they are.
    """

    def __init__(
        self, cin, cout, emb_channels, dropout, up=False, down=False, attention=False, adm=False
    ):
        super().__init__()
        eps = 1e-5 if adm else 1e-6
        self.adm, self.skip_scale = adm, 1.0 if adm else math.sqrt(0.5)
        self.heads = cout // 64 if adm else 1  # 0 in a narrow ADM: as in EDM, no attention then
        self.attention = attention and self.heads > 0
        if self.attention and cout % self.heads:
            raise UserError(f"{cout} channels cannot be split into {self.heads} attention heads.")
        self.norm0 = group_norm(cin, eps)
        self.conv0 = Conv2d(cin, cout, 3, up, down)
        self.affine = Linear(emb_channels, 2 * cout if adm else cout)
        self.norm1 = group_norm(cout, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv2d(cout, cout, 3, scale=1e-5)
        self.skip = None
        if cin != cout or up or down:  # ADM resamples here without a convolution
            self.skip = Conv2d(cin, cout, 0 if adm and cin == cout else 1, up, down)
        if self.attention:
            self.norm2 = group_norm(cout, eps)
            self.qkv = Conv2d(cout, cout * 3, 1, scale=math.sqrt(0.2))
            self.proj = Conv2d(cout, cout, 1, scale=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        emb = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = emb.chunk(2, 1)
            h = self.norm1(h) * (scale + 1) + shift
        else:
            h = self.norm1(h + emb)
        h = self.conv1(self.dropout(F.silu(h)))
        x = ((x if self.skip is None else self.skip(x)) + h) * self.skip_scale
        if self.attention:  # q, k, v are interleaved along the channels of each head
            b, c, *hw = x.shape
            qkv = self.qkv(self.norm2(x))
            qkv = qkv.reshape(b, self.heads, c // self.heads, 3, math.prod(hw))
            q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # (B, heads, HW, C / heads) each
            a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, *hw)
            x = (self.proj(a) + x) * self.skip_scale
        return x


class UNet(nn.Module):
    """What both networks share: the U of blocks and its forward pass.

    forward(x, noise_labels, class_labels, augment_labels): x (B, C, H, W), noise_labels (B,)
    = c_noise, class_labels (B, label_dim) one-hot rows (zeros = no class) -> (B, C, H, W).
    """

    adm = False

    def __init__(self, arguments: dict):
        super().__init__()
        ours = {k: v for k, v in arguments.items() if k not in ("self", "genuine", "__class__")}
        # what a checkpoint needs to build the same network
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in ours.items()}
        for name in ("img_resolution", "img_channels", "label_dim", "label_dropout"):
            setattr(self, name, self.config[name])
        self.model_channels = self.config["model_channels"]
        self.patch_size = self.config.get("patch_size", 1)
        smallest = self.patch_size * 2 ** (len(self.config["channel_mult"]) - 1)
        if self.img_resolution % smallest:
            raise UserError(
                f"Resolution {self.img_resolution} does not divide by {smallest}: choose another "
                "patch_size or fewer levels in channel_mult."
            )

    def build(self, c_io: int, cout: int, c_emb: int) -> int:
        """Makes enc and dec; cout: channels of the first convolution. Returns those of the last."""
        cfg, base = self.config, self.img_resolution // self.patch_size
        widths = [self.model_channels * mult for mult in cfg["channel_mult"]]
        attn_resolutions, num_blocks = cfg["attn_resolutions"], cfg["num_blocks"]
        block = partial(UNetBlock, emb_channels=c_emb, dropout=cfg["dropout"], adm=self.adm)

        self.enc, skips = nn.ModuleDict(), []
        for level, width in enumerate(widths):
            res = base >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(c_io, cout, 3)
            else:
                self.enc[f"{res}x{res}_down"] = block(cout, cout, down=True)
            skips.append(cout)
            for i in range(num_blocks):
                cin, cout, attention = cout, width, res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
                skips.append(cout)

        self.dec = nn.ModuleDict()
        for level, width in reversed(list(enumerate(widths))):
            res = base >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(cout, cout)
            else:
                self.dec[f"{res}x{res}_up"] = block(cout, cout, up=True)
            for i in range(num_blocks + 1):
                cin, cout = cout + skips.pop(), width
                attention = res in attn_resolutions and (self.adm or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
        return cout

    def positional(self, noise_labels: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """sin and cos of c_noise f_i, f_i = 10000^(-i / last), i = 0 ... model_channels / 2 - 1."""
        i = torch.arange(
            self.model_channels // 2, device=noise_labels.device, dtype=noise_labels.dtype
        )
        angles = noise_labels.outer((1 / 10000) ** (i / last))
        return angles.sin(), angles.cos()

    def drop_labels(self, class_labels: Tensor) -> Tensor:
        if self.training and self.label_dropout:
            chance = torch.rand(len(class_labels), 1, device=class_labels.device)
            class_labels = class_labels * (chance >= self.label_dropout)
        return class_labels

    def forward(
        self, x, noise_labels, class_labels=None, augment_labels=None, return_features=False
    ):
        emb = self.embed(noise_labels, class_labels, augment_labels)
        x = F.pixel_unshuffle(x, self.patch_size).contiguous(memory_format=torch.channels_last)
        skips, features = [], {}
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
            features[x.shape[-1]] = x
        if return_features == "only":
            return None, list(features.values())
        for name, block in self.dec.items():
            if "aux" in name:
                x = block(F.silu(x)) if name.endswith("conv") else block(x)
            else:
                if "block" in name:
                    x = torch.cat([x, skips.pop()], 1)
                x = block(x, emb)
        if self.adm:
            x = self.out_conv(F.silu(self.out_norm(x)))
        x = F.pixel_shuffle(x, self.patch_size)
        return (x, list(features.values())) if return_features else x


DDPMPP = {  # what genuine DDPM++ files say beside the arguments below; NCSN++ has other values
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}


class SongUNet(UNet):
    """EDM's DDPM++ network: names, initialisation and numerics of the published checkpoints.

    patch_size p folds p x p pixels into channels first: 28 x 28 digits at the price of 14 x 14.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult=(2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions=(16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        patch_size: int = 1,
        **genuine,
    ):
        super().__init__(locals())
        for name, value in genuine.items():  # keywords of genuine files: only what DDPM++ sets
            value = list(value) if isinstance(value, tuple) else value
            if name not in DDPMPP or value != DDPMPP[name]:
                raise UserError(f"SongUNet implements DDPM++ only, not {name}={value!r}.")
        c_emb, c_io = model_channels * channel_mult_emb, img_channels * patch_size**2
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, c_emb)
        self.map_layer1 = Linear(c_emb, c_emb)
        cout, base = self.build(c_io, model_channels, c_emb), img_resolution // patch_size
        self.dec[f"{base}x{base}_aux_norm"] = group_norm(cout)
        self.dec[f"{base}x{base}_aux_conv"] = Conv2d(cout, c_io, 3, scale=1e-5)
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels) -> Tensor:
        emb = torch.cat(self.positional(noise_labels, self.model_channels // 2 - 1), 1)
        if self.map_label is not None and class_labels is not None:
            class_labels = self.drop_labels(class_labels)
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(UNet):
    """EDM's ADM network (ImageNet-64): names and numerics of the published checkpoints.

    Beside the blocks, ADM differs from DDPM++ in the embedding: cos before sin, lower frequencies,
    labels added behind both layers. Attention has a head per 64 channels, none below 64.
    """

    adm = True

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult=(1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions=(32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__(locals())
        c_emb = model_channels * channel_mult_emb
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, c_emb)
        self.map_layer1 = Linear(c_emb, c_emb)
        self.map_label = Linear(label_dim, c_emb, bias=False) if label_dim else None
        cout = self.build(img_channels, model_channels * channel_mult[0], c_emb)
        self.out_norm = group_norm(cout, eps=1e-5)
        self.out_conv = Conv2d(cout, img_channels, 3)
        self.initialise()
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def initialise(self) -> None:
        """Uniform within 1 / sqrt(fan_in), biases too; last layers 0; weights of labels N(0, 1)."""
        for name, module in self.named_modules():
            if isinstance(module, (Linear, Conv2d)) and module.weight is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                if name.endswith(("conv1", "proj", "out_conv", "map_augment")):
                    bound = 0.0
                for p in module.parameters():
                    p.normal_() if name == "map_label" else p.uniform_(-bound, bound)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels) -> Tensor:
        emb = torch.cat(self.positional(noise_labels, self.model_channels // 2)[::-1], 1)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(self.drop_labels(class_labels))
        return F.silu(emb)


# ------------------------------------------------------------------------------------------------
# 3. Loss and sampler                                                  EDM Eq. 5, Eq. 8, Algorithm 2
# ------------------------------------------------------------------------------------------------


def edm_loss(
    denoiser: nn.Module,
    x: Tensor,
    labels: Tensor | None = None,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    target=None,
) -> Tensor:
    """E[ λ(σ) |D(x + σ ε; σ) - x|² ],  ln σ ~ N(p_mean, p_std²),  λ = 1/σ² + 1/σ_data²  (Eq. 8).

    x: clean images (B, C, H, W) in [-1, 1].   Mean over batch and pixels (EDM's code: sum).
    target(x_t, sigma, labels), such as a PosteriorMean, takes the place of x in the difference.
    """
    sigma = (torch.randn(len(x), device=x.device) * p_std + p_mean).exp()
    x_t = x + expand(sigma, x) * torch.randn_like(x)
    if target is not None:
        x = target(x_t, sigma, labels)
    weight = 1 / sigma**2 + 1 / denoiser.sigma_data**2
    return (expand(weight, x) * (denoiser(x_t, sigma, labels) - x) ** 2).mean()


class PosteriorMean:
    """E[x | x_t, y] over the images of a data set: its ideal denoiser, in closed form (EDM B.3).

    As edm_loss's target it has the same expected gradient as x, with less variance (Xu et al. 2023,
    Stable Target Field, whose reference batch is here the whole class). Keeps a float32 copy of the
    images. x_t: (B, C, H, W); sigma, labels: (B,); NaN for labels that are no class, like -1.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        classes = range(int(labels.max()) + 1)
        self.classes = [to_float(images[labels == k]).flatten(1) for k in classes]
        self.half_squares = [images.square().sum(1) / 2 for images in self.classes]

    def __call__(self, x_t: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        mean = torch.full_like(x_t, math.nan)
        with torch.autocast(x_t.device.type, enabled=False):
            for k, images in enumerate(self.classes):
                (i,) = (labels == k).nonzero(as_tuple=True)
                near = x_t[i].flatten(1) @ images.T - self.half_squares[k]  # -|x_t - x|² / 2 + ...
                share = (near / sigma[i, None] ** 2).softmax(1)
                mean[i] = (share @ images).view_as(x_t[i])
        return mean


def guided(denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """D_u + w (D_c - D_u): classifier-free guidance; w = 1 is off, one call instead of two.

    Arguments and result as of denoiser(x, sigma, labels); without labels there is no guidance.
    """
    denoised = denoiser(x, sigma, labels)
    if guidance == 1 or labels is None:
        return denoised
    none = denoiser.no_condition(labels) if hasattr(denoiser, "no_condition") else None
    unconditional = denoiser(x, sigma, none)
    return unconditional + guidance * (denoised - unconditional)


@torch.no_grad()
def heun_sampler(
    denoiser,
    z: Tensor,
    labels: Tensor | None = None,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    guidance: float = 1.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method along the noise levels of EDM Eq. 5 (EDM Algorithm 2): 2 N - 1 network calls.

    z: unit Gaussian noise (B, C, H, W); the result has its shape and dtype, is not clipped.
    s_churn > 0 adds noise before each step with s_min <= σ <= s_max. The state is in float64.
    """
    dtype = torch.float32 if z.device.type == "mps" else torch.float64  # MPS has no float64
    i = torch.arange(steps, dtype=dtype, device=z.device) / max(steps - 1, 1)
    t = (sigma_max ** (1 / rho) + i * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    t = torch.cat([t, torch.zeros_like(t[:1])])

    def slope(x, sigma):  # dx/dσ = (x - D(x; σ)) / σ
        sigmas = sigma.expand(len(x)).to(z.dtype)
        denoised = guided(denoiser, x.to(z.dtype), sigmas, labels, guidance)
        return (x - denoised.to(dtype)) / sigma

    x = z.to(dtype) * t[0]
    for t_cur, t_next in itertools.pairwise(t):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= t_cur <= s_max else 0.0
        t_hat = t_cur * (1 + gamma)
        if gamma:
            x = x + (t_hat**2 - t_cur**2).sqrt() * s_noise * torch.randn_like(x)
        d = slope(x, t_hat)
        x_next = x + (t_next - t_hat) * d
        if t_next > 0:  # second-order correction; the step to σ = 0 is Euler's and returns D
            x_next = x + (t_next - t_hat) * (d + slope(x_next, t_next)) / 2
        x = x_next
    return x.to(z.dtype)


# ------------------------------------------------------------------------------------------------
# 3b. The video transformer of causal_video.py: bidirectional, masked or with a cache of the past
# ------------------------------------------------------------------------------------------------


def per_frame(sigma: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1), (B, F) -> (B, 1, F, 1, 1): ready to multiply videos."""
    return sigma.reshape(len(x), 1, -1, 1, 1)


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

        -> (x, (k, v) of these frames, (B, heads, F, tokens, d) each)
        """
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


class VideoDenoiser(nn.Module):
    """D(x; σ) = x/(1+σ) - σ/(1+σ) F(x/(1+σ); t), t = σ/(1+σ): rectified flow, as Wan's network.

    F is the velocity ε - x. x: (B, C, F, H, W). sigma: a number, (B,), or a level for each frame
    (B, F), where 0 is a clean frame, which comes back as it is. labels: (B,), -1 or None: no class.
    mask: (F, F), True where row may see column; past: cache of rollout, start: number of frame 0.
    """

    sigma_min, sigma_max = 0.002, 9999.0  # t = 1 would be σ = ∞

    def __init__(
        self, channels=1, size=8, patch=4, width=64, depth=3, heads=4, classes=2, frames=12
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch, self.side, self.label_dim = patch, size // patch, classes
        self.shape, self.checkpointing = (channels, frames, size, size), False
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
        s = per_frame(sigma, x)
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


# ================================================================================================
# Lower half: skip on first reading. What no method is about.
# ================================================================================================
ASSETS = Path(__file__).resolve().parent / "assets"


def asset(data: str, kind: str) -> Path:
    """Where the shipped teacher or metric of mnist or cifar10 is, if it is shipped."""
    return ASSETS / (f"{data}_{kind}.safetensors" if data in ("mnist", "cifar10") else "none")


def is_large(teacher: str) -> bool:
    """--teacher sd15:PATH and the like: a network of diffusers_backbones.py."""
    names = ("sd15", "sdxl", "flux", "wan", "wan-low", "cogvideox", "cosmos")
    return teacher.partition(":")[0] in names


class UserError(ValueError):
    """What the person at the keyboard can mend; the command line prints it as one sentence."""


# ------------------------------------------------------------------------------------------------
# 4. Checkpoints: tensors and JSON only, no code from files
# ------------------------------------------------------------------------------------------------
KEY = "distillation"  # one metadata key: with several the bytes differ from run to run


def checksum(tensors: dict[str, Tensor], config: dict) -> str:
    """SHA-256 over the configuration and the tensors' names, types, shapes and bytes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_tensors(path, tensors: dict[str, Tensor], config: dict) -> None:
    """Writes a .safetensors file with `config` and a checksum in it; atomic."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = json.dumps({"config": config, "sha256": checksum(tensors, config)}, sort_keys=True)
    data = safetensors.torch.save(tensors, metadata={KEY: meta})
    write_atomic(path, lambda tmp: tmp.write_bytes(data))


def load_tensors(path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a file that save_tensors wrote; UserError for any other."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class, and OSError
        raise UserError(f"{path} is damaged or no .safetensors file ({error}).") from None
    try:
        meta = json.loads(meta[KEY])
        config, expected = dict(meta["config"]), meta["sha256"]
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} was not written by this project (its metadata is missing)."
        ) from None
    if checksum(tensors, config) != expected:
        raise UserError(f"{path} is damaged: its contents do not have the checksum stored in it.")
    return tensors, config


def save_denoiser(denoiser: EDMPrecond, path, dtype: torch.dtype | None = None) -> None:
    """Atomic. dtype=torch.float16 halves the file; it is read back as float32."""
    state = gathered(denoiser.state_dict())
    state = {k: v.to(dtype) for k, v in state.items()} if dtype else state
    network = {"model_type": type(denoiser.model).__name__, "network": denoiser.model.config}
    save_tensors(path, state, network | {"sigma_data": denoiser.sigma_data})


NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


def load_denoiser(path, device="cpu") -> EDMPrecond:
    """The denoiser in a file, in float32, in eval mode. The end of the name says what the file is:

    .safetensors: ours;  .pkl: NVlabs/edm, EDMPrecond with DDPM++ or ADM;  .pth: FastGen.
    Raises FileNotFoundError, or ValueError: none of these, damaged, other keys or shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    readers = {".safetensors": load_tensors, ".pkl": load_nvlabs, ".pth": load_fastgen}
    if path.suffix not in readers:
        raise UserError(
            f"{path}: only .safetensors files of this project, .pkl files of NVlabs/edm and .pth "
            "files of FastGen can be read."
        )
    state, config = readers[path.suffix](path)
    denoiser = describe(path, state, config)
    for name, expected in denoiser.state_dict().items():
        t = state[name]
        plain = isinstance(t, Tensor) and t.layout == torch.strided and t.is_cpu
        if not plain or not t.is_floating_point():
            raise UserError(f"{path}: {name} is no tensor of floating-point numbers.")
        if t.shape != expected.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(t.shape)}, expected {tuple(expected.shape)}."
            )
        if name.endswith("resample_filter") and not (t == 0.25).all():
            raise UserError(f"{path}: {name} is not the mean of 2 x 2, the one implemented here.")
    denoiser = denoiser.to_empty(device=device)
    denoiser.load_state_dict(state)
    return denoiser.eval()


def describe(path, state: dict, config: dict) -> EDMPrecond:
    """The denoiser of `config` without memory (on the meta device), with the keys of `state`."""
    try:
        network = config["network"]
        if network.get("num_blocks", 1) * len(network.get("channel_mult", ())) > len(state):
            raise UserError("more blocks than tensors")  # do not build them for hours
        with torch.device("meta"):
            model = NETWORKS[config.get("model_type", "SongUNet")](**network)
            denoiser = EDMPrecond(model, float(config["sigma_data"]))
    except Exception as error:
        raise UserError(f"{path} does not describe a denoiser ({brief(error)}).") from None
    expected = denoiser.state_dict().keys()
    for name in sorted(expected ^ state.keys()):
        kind = "missing" if name in expected else "unexpected"
        raise UserError(f"{path}: tensor {brief(name)} is {kind}.")
    return denoiser


def brief(error) -> str:
    """An error of a library, or a name in a file, as part of one sentence."""
    kind = "" if isinstance(error, (str, UserError)) else f"{type(error).__name__}: "
    text = f"{kind}{error}"
    return textwrap.shorten(text, 200, placeholder=" ...")


def load_fastgen(path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a .pth of FastGen: a converted teacher or a training checkpoint.

    The first is the state dict of EDMPrecond. The second has {"model": {"net": state dict, ...}};
    its first moving average ("ema...") is taken if there is one. Neither says how the network was
    made, so names and shapes tell. What they cannot tell: sigma_data is taken as 0.5, dropout as 0.
    Source: FastGen's scripts/download_data.py, fastgen/utils/checkpointer.py, methods/model.py.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "model" in state:
            nets = state["model"]
            state = nets[next((name for name in nets if name.startswith("ema")), "net")]
        state = {k: v for k, v in state.items() if not k.startswith("model.logvar_linear.")}
    except Exception as error:
        raise UserError(f"{path} is damaged or no .pth of FastGen ({brief(error)}).") from None
    try:
        return state, infer_config(state)
    except KeyError as error:
        raise UserError(
            f"{path} holds no network of EDM: {brief(str(error))} is missing."
        ) from None
    except Exception as error:
        raise UserError(f"{path} holds no network of EDM ({brief(error)}).") from None


def infer_config(state: dict[str, Tensor]) -> dict:
    """model_type and arguments of EDMPrecond's network from its names and shapes."""
    shapes = {name.removeprefix("model."): tuple(t.shape) for name, t in state.items()}
    c_emb, channels = shapes["map_layer0.weight"]
    blocks = [re.match(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight$", name) for name in shapes]
    blocks = [(int(m[1]), int(m[2])) for m in blocks if m]
    levels = sorted({res for res, _ in blocks}, reverse=True)
    network = {
        "img_resolution": levels[0],
        "img_channels": shapes[f"enc.{levels[0]}x{levels[0]}_conv.weight"][1],
        "label_dim": shapes.get("map_label.weight", (0, 0))[1],
        "augment_dim": shapes.get("map_augment.weight", (0, 0))[1],
        "model_channels": channels,
        "channel_mult": [shapes[f"enc.{r}x{r}_block0.conv0.weight"][0] // channels for r in levels],
        "channel_mult_emb": c_emb // channels,
        "num_blocks": 1 + max(i for _, i in blocks),
        "attn_resolutions": [r for r in levels if f"enc.{r}x{r}_block0.qkv.weight" in shapes],
        "dropout": 0.0,
    }
    model_type = "DhariwalUNet" if "out_conv.weight" in shapes else "SongUNet"
    return {"model_type": model_type, "network": network, "sigma_data": 0.5}


# Pickles of NVlabs/edm. Python's unpickler calls what a file names. Here nothing of a file is
# called or imported: read_pickle knows 41 of the 68 instructions, enough to put data together,
# and for the names in ALLOWED it calls functions of ours. Anything else ends the reading.
# Not prevented: a file that needs memory in proportion to its size, some 5 times that of it.
MAX_INSTRUCTIONS = 2_000_000  # a genuine file has some 100,000; each may cost 100 bytes


@dataclasses.dataclass
class Stored:
    """An object in a pickle: the name of its class and the data that it is made of."""

    name: str
    state: object = None

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise UserError("it has a class without a name")


def load_nvlabs(path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a pickle of NVlabs/edm: a dict with the network as "ema", or only it.

    Raises UserError: another preconditioning than EDMPrecond, damaged, or more than data in it.
    """
    try:
        root = read_pickle(Path(path).read_bytes())
        if type(root) is dict:
            root = root.get("ema", root.get("model"))
        name = root.name if type(root) is Stored else type(root).__name__
        if name != "EDMPrecond":
            raise UserError(f"it holds {name[:80]!r}, and only EDMPrecond is implemented")
        return dict(module_tensors(root, "", set())), nvlabs_config(root.state)
    except UserError as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    except Exception as error:
        raise UserError(f"{path} is damaged or no pickle of EDM ({brief(error)}).") from None


def nvlabs_config(state: dict) -> dict:
    """model_type and arguments of the network, from the arguments that EDMPrecond was made with."""
    names = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max")
    names += ("sigma_data", "model_type")
    given = dict(zip(names, state["_init_args"], strict=False)) | state["_init_kwargs"]
    for name, value in given.items():  # a small file may hold lists of lists with a long repr()
        for v in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(v, (int, float, str, type(None))):
                raise UserError(f"{brief(name)} is no number, name or list of them")
    given.pop("use_fp16", None)  # how it computed; its weights are in float32
    low, high = given.pop("sigma_min", 0), given.pop("sigma_max", math.inf)
    if low > EDMPrecond.sigma_min or high < EDMPrecond.sigma_max:
        raise UserError(f"its noise levels are from {low} to {high}")
    sigma_data, model_type = given.pop("sigma_data", 0.5), given.pop("model_type", "DhariwalUNet")
    return {"model_type": model_type, "network": given, "sigma_data": sigma_data}


def module_tensors(module: Stored, prefix: str, seen: set):
    """Yields the items of nn.Module.state_dict, in its order."""
    if id(module) in seen:  # two ways to one module, n times in a row, would be 2^n modules
        raise UserError(f"module {prefix[:80]!r} is there twice")
    seen.add(id(module))
    hidden = module.state.get("_non_persistent_buffers_set", ())
    for part in ("_parameters", "_buffers"):
        for name, value in module.state[part].items():
            if value is not None and name not in hidden:
                yield prefix + name, value
    for name, child in module.state["_modules"].items():
        if child is not None:
            yield from module_tensors(child, f"{prefix}{name}.", seen)


def stored_object(meta: dict) -> Stored:
    """torch_utils.persistence._reconstruct_persistent_obj, which would run meta["module_src"]."""
    return Stored(meta["class_name"], meta["state"])


def stored_number(dtype: Stored, data: bytes) -> float:
    """numpy.core.multiarray.scalar, of these kinds of number only."""
    code = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "b1": "?"}[dtype.name]
    big_endian = isinstance(dtype.state, tuple) and dtype.state[1] == ">"
    return struct.unpack((">" if big_endian else "<") + code, data)[0]


def stored_storage(data: bytes) -> Tensor:
    """torch.storage._load_from_bytes: the numbers of a storage in a row."""
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)


def stored_tensor(row: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    return row.as_strided(size, stride, offset)  # which checks the bounds


ALLOWED = {  # every name that a genuine file needs, and what is called in its place
    "collections.OrderedDict": lambda: {},
    "dnnlib.util.EasyDict": lambda: {},
    "numpy.dtype": lambda code, *_: Stored(code),
    "numpy.core.multiarray.scalar": stored_number,
    "numpy._core.multiarray.scalar": stored_number,
    "torch.nn.modules.container.ModuleDict": lambda: Stored("ModuleDict"),
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": stored_tensor,
    "torch.storage._load_from_bytes": stored_storage,
    "torch_utils.persistence._reconstruct_persistent_obj": stored_object,
}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "BINBYTES"}
LITERALS |= {"SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES8"}
CONSTANTS = {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
CONSTANTS |= {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}


def read_pickle(data: bytes):
    """The value in a pickle, of dict, list, tuple, set, str, bytes, numbers, Stored and Tensor.

    Raises UserError for a name or an instruction that is not in the lists above, and any
    Exception for nonsense, such as a damaged file.
    """
    stack, marks, memo = [], [], {}

    def take(n: int | None = None) -> list:  # the last n values, or those behind the last mark
        start = marks.pop() if n is None else len(stack) - n
        items = stack[start:]
        del stack[start:]
        return items

    for count, (instruction, arg, _) in enumerate(pickletools.genops(data)):
        name = instruction.name
        if count > MAX_INSTRUCTIONS:
            raise UserError(f"it has more than {MAX_INSTRUCTIONS} instructions")
        if name in LITERALS or name in CONSTANTS:
            stack.append(arg if name in LITERALS else CONSTANTS[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(take(None if name == "TUPLE" else int(name[-1]))))
        elif name in ("APPEND", "SETITEM", "APPENDS", "SETITEMS", "ADDITEMS"):
            items = take({"APPEND": 1, "SETITEM": 2}.get(name))
            fill(stack[-1], items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            wanted = arg.replace(" ", ".") if arg else ".".join(take(2))
            if wanted not in ALLOWED:
                raise UserError(f"it names {wanted[:80]!r}, which no network needs")
            stack.append(ALLOWED[wanted])
        elif name in ("REDUCE", "NEWOBJ"):
            function, args = take(2)
            stack.append(function(*args))  # only a function of ALLOWED can be called
        elif name == "BUILD":
            (state,) = take(1)
            if type(stack[-1]) is not Stored:  # nothing else may be changed, functions above all
                raise UserError(f"it changes a {type(stack[-1]).__name__}")
            stack[-1].state = state
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"it uses the instruction {name}")


def fill(container, items: list) -> None:
    """APPENDS, SETITEMS and ADDITEMS of a pickle, each for its own kind of container."""
    if type(container) is list:
        container.extend(items)
        return
    keys = items[::2] if type(container) is dict else items
    if not all(type(key) in (str, int) for key in keys):  # deep tuples would overflow hash()
        raise UserError("it has a key that is no name")
    container.update(zip(keys, items[1::2], strict=True) if type(container) is dict else keys)


def save_video_denoiser(denoiser: VideoDenoiser, path, dtype: torch.dtype | None = None) -> None:
    """Atomic. dtype=torch.float16 halves the file; it is read back as float32."""
    state = {k: v.to(dtype or v.dtype) for k, v in denoiser.state_dict().items()}
    save_tensors(path, state, {"video": denoiser.config})


def load_video_denoiser(path, device="cpu") -> VideoDenoiser:
    """In eval mode. FileNotFoundError, or UserError: damaged or something else."""
    tensors, config = load_tensors(path)
    try:
        denoiser = VideoDenoiser(**config["video"])
        denoiser.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError):
        raise UserError(f"{path} holds no video denoiser.") from None
    return denoiser.to(device).eval()


def trainable_copy(denoiser: EDMPrecond) -> EDMPrecond:
    """The same weights, ready to be trained, dropout and label dropout off (as DMD does)."""
    network = copy.deepcopy(denoiser).requires_grad_(True).train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, UNet):
            module.label_dropout = 0.0
    return network


@torch.no_grad()
def ema_update(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) network, in place, with d = min(decay, step / (4 + step)).

    Until d = decay the memory grows with the run: about its last quarter.
    """
    decay = min(decay, step / (4 + step))
    for averaged, p in zip(ema.parameters(), network.parameters(), strict=True):
        averaged.lerp_(p, 1 - decay)


def write_atomic(path, write) -> None:
    """write(tmp), then rename: a crash leaves the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    write(tmp)
    os.replace(tmp, path)


def write_text(path, text: str) -> None:
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------------------------
# 5. Data: uint8 images (N, C, H, W) and labels (N,)
# ------------------------------------------------------------------------------------------------
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def load_data(data: str, data_dir="data", train=True, resolution=28, channels=1):
    """(images, labels) of mnist, cifar10, synthetic or a folder with one sub-folder per class.

    MNIST and CIFAR-10 are downloaded to data_dir unless they are there. Of a folder every 10th
    image is the test set; its images are cut to squares and resized to `resolution`.
    images: uint8 (N, C, H, W), labels: (N,) long. Raises UserError where there is nothing to read.
    """
    if data == "synthetic":
        return synthetic(2048 if train else 1024, resolution, seed=int(not train))
    if data in ("mnist", "cifar10"):
        read, where = (mnist, "MNIST/raw") if data == "mnist" else (cifar10, "cifar-10-batches-bin")
        try:
            return read(data_dir, train)
        except Exception as error:
            url = CIFAR10_URL if data == "cifar10" else torchvision.datasets.MNIST.mirrors[0]
            reason = " ".join(str(error).split())
            raise UserError(
                f"{data} could neither be read in {Path(data_dir) / where} nor downloaded from "
                f"{url} ({reason}): connect to the network, point --data-dir to the folder that "
                "has it, or delete damaged files there."
            ) from None
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: not mnist, cifar10, synthetic or an existing folder.")
    return folder(data, train, resolution, channels)


def mnist(data_dir, train):
    dataset = torchvision.datasets.MNIST(data_dir, train=train, download=True)
    return dataset.data[:, None], dataset.targets


def cifar10(data_dir, train):
    """The official binary version: records of 1 label byte and 3072 bytes R, G, B; no pickle."""
    where = Path(data_dir) / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    if not all((where / name).is_file() for name in names):
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(CIFAR10_URL, data_dir, md5=CIFAR10_MD5)
    raw = np.concatenate([np.fromfile(where / name, np.uint8) for name in names]).reshape(-1, 3073)
    raw = torch.from_numpy(raw)
    return raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].long()


def folder(path, train, resolution, channels):
    from torchvision.transforms import v2

    mode = v2.Grayscale() if channels == 1 else v2.Identity()
    shape = v2.Compose([v2.Resize(resolution), v2.CenterCrop(resolution), mode, v2.PILToTensor()])
    try:
        dataset = torchvision.datasets.ImageFolder(path, transform=shape)
    except FileNotFoundError as error:
        raise UserError(
            f"--data {path} needs one sub-folder of images per class ({error})."
        ) from None
    chosen = [i for i in range(len(dataset)) if (i % 10 == 0) != train]
    if not chosen:
        raise UserError(f"--data {path} has too few images ({len(dataset)}).")
    try:
        images, labels = zip(*(dataset[i] for i in chosen), strict=True)
    except OSError as error:
        raise UserError(f"--data {path} has an image that cannot be read ({error}).") from None
    return torch.stack(images), torch.tensor(labels)


def synthetic(n: int, resolution: int = 28, seed: int = 0):
    """Four classes of drawn shapes - disc, square, ring, cross - at random places and sizes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=generator)
    centre = torch.rand(n, 2, 1, 1, generator=generator) * 0.6 - 0.3
    size = torch.rand(n, 1, 1, generator=generator) * 0.25 + 0.3
    axis = (torch.arange(resolution) + 0.5) / resolution * 2 - 1
    dy, dx = (axis[:, None] - centre[:, 0]).abs(), (axis[None, :] - centre[:, 1]).abs()
    radius, box = torch.hypot(dx, dy), torch.maximum(dx, dy)
    bars = torch.maximum(torch.minimum(dx, dy) - size / 4, box - size)
    distances = torch.stack([radius - size, box - size, (radius - size).abs() - 0.12, bars])
    chosen = distances.gather(0, labels.reshape(1, n, 1, 1).expand(1, *radius.shape))[0]
    images = (0.5 - chosen * resolution / 2).clamp(0, 1)  # edges one pixel wide
    return (images[:, None] * 255).round().to(torch.uint8), labels


# Videos (n, 1, F, 8, 8): drawn shapes that bounce. All frames there can be are known.
VIDEO_SIZE = 8
GRID = 17  # places of a centre along each axis: 2 to 6 pixels in steps of 1/4


@functools.cache
def templates() -> Tensor:
    """All frames there are, at brightness 1: (2 shapes, 17 · 17 places, 8, 8) in [0, 1]."""
    d = (torch.arange(VIDEO_SIZE) + 0.5 - torch.arange(GRID)[:, None] / 4 - 2).abs()
    dy, dx = d[:, None, :, None], d[None, :, None, :]
    distances = torch.stack([torch.hypot(dx, dy) - 1.9, torch.maximum(dx, dy) - 1.7])
    return (0.5 - distances.flatten(1, 2)).clamp(0, 1)  # edges one pixel wide


def bouncing_shapes(n: int, frames: int, labels=None) -> tuple[Tensor, Tensor]:
    """(n, 1, frames, 8, 8) in [-1, 1] and labels: a disc or a square, at random, that bounces.

    The label tells the shape only. Brightness, uniform in [0.6, 2], and velocity are constant in a
    video: a causal model has to carry them from block to block.
    """
    labels = torch.randint(2, (n,)) if labels is None else labels
    brightness = 0.6 + 1.4 * torch.rand(n, 1, 1, 1)
    velocity = torch.randint(1, 4, (n, 1, 2)) * (2 * torch.randint(2, (n, 1, 2)) - 1)
    path = torch.randint(2 * GRID - 2, (n, 1, 2)) + velocity * torch.arange(frames)[:, None]
    place = GRID - 1 - (path % (2 * GRID - 2) - (GRID - 1)).abs()  # reflected at both ends
    shapes = templates()[labels[:, None], place[..., 0] * GRID + place[..., 1]]
    return (brightness * shapes - 1)[:, None], labels


def fit_shapes(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(brightness a, residual), (n, F) each: the best a · template - 1 over all places.

    residual: the mean square over pixels that is left, 0 for every frame of the data.
    """
    frames = x.detach().cpu()[:, 0].flatten(2) + 1  # (n, F, 64)
    bank = templates().flatten(2)[labels.cpu()]
    bank = bank / bank.norm(dim=-1, keepdim=True)  # (n, 289, 64), templates of length 1
    length, best = (frames @ bank.mT).clamp_min(0).max(-1)
    norm = templates().flatten(2).norm(dim=-1)[labels.cpu()].gather(1, best)
    return length / norm, (frames.square().sum(-1) - length**2).clamp_min(0) / frames.shape[-1]


def drift(x: Tensor, labels: Tensor, blocks: list[int]) -> dict:
    """What changes from block to block, as lists; brightness is the mean of a block's frames.

    residual: to the template bank; bias: mean change of brightness since the first block; spread:
    its standard deviation over the videos; correlation: with that of the first block.
    """
    a, residual = (
        torch.stack([b.mean(1) for b in v.split(blocks, 1)]) for v in fit_shapes(x, labels)
    )
    row = {"residual": residual.mean(1), "bias": (a - a[0]).mean(1), "spread": a.std(1)}
    row["correlation"] = torch.corrcoef(a).reshape(len(a), -1)[0].nan_to_num(0)  # 0: no spread
    return {k: v.tolist() for k, v in row.items()}


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; latents, which are floats, stay."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------
# 6. Metrics on the features of a small classifier. Never called FID: that means Inception features
# ------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Small convolutional network: images in [-1, 1] -> (logits, features: 64 grey, 32 colour)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        grey = [(32, 1), (32, 2), (64, 1), (64, 2), (64, 1)]  # (channels, stride)
        colour = [(64, 1), (64, 2), (96, 1), (96, 2), (128, 1), (32, 1)]
        layers, cin = [], channels
        for cout, stride in grey if channels == 1 else colour:
            layers += [
                nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
                nn.BatchNorm2d(cout),
                nn.ReLU(),
            ]
            cin = cout
        self.body, self.head = nn.Sequential(*layers), nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return self.head(features), features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features (N, D)."""
    a, b = a.double(), b.double()
    ca, cb = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def knn_radius(x: Tensor, k: int) -> Tensor:
    """Distance of every row of x (N, D) to its k-th nearest other row, in chunks."""
    return torch.cat([torch.cdist(c, x).kthvalue(k + 1)[0] for c in x.split(1000)])


def in_ball(points: Tensor, centres: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(each point: in some ball?, each ball: some point in it?); closed balls, in chunks."""
    hits = [torch.cdist(c, centres) <= radius for c in points.split(1000)]
    return torch.cat([h.any(1) for h in hits]), torch.stack([h.any(0) for h in hits]).any(0)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake in the k-NN manifold of real, and vice versa (Kynkäänniemi 2019)."""
    precision, _ = in_ball(fake, real, knn_radius(real, k))
    recall, _ = in_ball(real, fake, knn_radius(fake, k))
    return precision.float().mean().item(), recall.float().mean().item()


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real k-NN balls with a fake in them (Naeem 2020); about 1 - 2^-k for equal sets."""
    return in_ball(fake, real, knn_radius(real, k))[1].float().mean().item()


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, device) -> tuple[Tensor, Tensor]:
    """uint8 images -> (predicted classes, features), on the CPU: MPS has no float64."""
    batches = [classifier(to_float(b.to(device))) for b in images.split(500)]
    logits, features = (torch.cat(t).cpu() for t in zip(*batches, strict=True))
    return logits.argmax(1), features.half().float()  # as the reference is stored


class Metric:
    """A classifier and its features of 10,000 test (reference) and train images (floor)."""

    def __init__(self, data: str, tensors: dict[str, Tensor], config: dict, device="cpu"):
        self.name = "".join(c if c.isalnum() else "_" for c in Path(data).name.lower()) + "_fd"
        self.config, self.device = config, device
        self.classifier = Classifier(config["channels"], config["classes"]).to(device).eval()
        weights = {k: v for k, v in tensors.items() if not k.endswith("_features")}
        self.classifier.load_state_dict(weights)
        self.test, self.train = (tensors[f"{k}_features"].float() for k in ("test", "train"))

    def check(self, denoiser: EDMPrecond) -> None:
        """UserError unless the denoiser draws what the classifier was trained on."""
        draws = (denoiser.img_channels, denoiser.img_resolution)
        knows = (self.config["channels"], self.config["resolution"])
        if draws != knows or denoiser.label_dim not in (0, self.config["classes"]):
            raise UserError(
                f"The network draws {denoiser.label_dim} classes of (channels, size) {draws}, "
                f"the data has {self.config['classes']} classes of {knows}: is --data right?"
            )

    def __call__(self, x: Tensor, labels: Tensor | None) -> dict:
        """Samples in [-1, 1] -> the numbers of a verdict's row.

        k-NN metrics use as many test images as there are samples. No labels: no accuracy.
        """
        predicted, features = classify(self.classifier, to_uint8(x), self.device)
        row = self.compare(features)
        if labels is not None:
            row["accuracy"] = (predicted == labels).float().mean().item()
        return row

    def compare(self, features: Tensor) -> dict:
        real = self.test[: len(features)]
        precision, recall = precision_recall(real, features)
        return {
            "n": len(features),
            self.name: frechet_distance(features, self.test),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(real, features),
        }

    def labels(self, n: int, label_dim: int) -> Tensor | None:
        """n classes, each as often as in the training data; None for an unconditional network."""
        if not label_dim:
            return None
        counts = self.config.get("class_counts", [1] * self.config["classes"])
        due, drawn = [0] * len(counts), []
        for _ in range(n):
            due = [d + count for d, count in zip(due, counts, strict=True)]
            drawn.append(due.index(max(due)))
            due[drawn[-1]] -= sum(counts)
        return torch.tensor(drawn)

    def floor(self, n: int) -> dict:
        """What n real train images get: no generator needs to be better."""
        return self.compare(self.train[:n]) | {"accuracy": self.config["train_accuracy"]}


class Images(torch.utils.data.Dataset):
    """uint8 RGB images one by one, as torch-fidelity wants them."""

    def __init__(self, images: Tensor):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def fid(x: Tensor, data: str, data_dir, device="cpu") -> float:
    """Frechet Inception distance of samples x in [-1, 1] to all training images of `data`.

    By the optional package torch-fidelity, which downloads Inception's weights once and keeps the
    statistics of the training images in data_dir. Minutes per 1000 images on a CPU.
    """
    try:
        import torch_fidelity
    except ImportError:
        raise UserError("--fid needs pip install torch-fidelity.") from None
    images, _ = load_data(data, data_dir, resolution=x.shape[-1], channels=x.shape[1])
    name = None if Path(data).is_dir() else f"{data}-train-{len(images)}"
    try:
        return torch_fidelity.calculate_metrics(
            input1=Images(to_uint8(x)),
            input2=Images(images),
            fid=True,
            cuda=torch.device(device).type == "cuda",
            input2_cache_name=name,
            cache_root=str(Path(data_dir) / "fid"),
            verbose=False,
        )["frechet_inception_distance"]
    except OSError as error:
        raise UserError(f"--fid could not download Inception's weights ({error}).") from None


def train_metric(data: str, data_dir, device, **shape) -> tuple[dict, dict]:
    """Trains the classifier -> (its weights and features in float16, configuration) of a Metric."""
    images, labels = load_data(data, data_dir, True, **shape)
    test, test_labels = load_data(data, data_dir, False, **shape)
    if len(test) < 50:
        raise UserError(f"--data {data} has {len(test)} test images; metrics need 50 or more.")
    config = {"data": data, "channels": images.shape[1], "resolution": images.shape[-1]}
    config["classes"] = int(torch.cat([labels, test_labels]).max()) + 1
    config["class_counts"] = labels.bincount(minlength=config["classes"]).tolist()
    net = Classifier(config["channels"], config["classes"]).to(device)
    batch, epochs = 128, 6 if config["channels"] == 1 else 12
    steps = max(epochs * len(images) // batch, 100)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        i = torch.randint(len(images), (batch,))
        dy, dx = torch.randint(-2, 3, (2,)).tolist()  # shift the batch by up to two pixels
        x = to_float(images[i].roll((dy, dx), (2, 3)).to(device))
        if config["channels"] > 1:  # photographs may be mirrored, digits not
            x[: batch // 2] = x[: batch // 2].flip(3)
        loss = F.cross_entropy(net(x)[0], labels[i].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(tensors)  # the features are those of the rounded weights
    net.eval()
    for name, x, y in [("train", images, labels), ("test", test, test_labels)]:
        i = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10000]
        predicted, features = classify(net, x[i], device)
        tensors[f"{name}_features"] = features.half()
        config[f"{name}_accuracy"] = (predicted == y[i]).float().mean().item()
    return tensors, config


def get_metric(data: str, data_dir, folder: Path, device="cpu", **shape) -> Metric:
    """The shipped metric of this data set, else the one in `folder`, trained now if need be."""
    shipped, own = asset(data, "metric"), Path(folder) / "metric.safetensors"
    if not shipped.is_file() and not own.is_file():
        with own_random_numbers(0):
            tensors, config = train_metric(data, data_dir, device, **shape)
        save_tensors(own, tensors, config)
    return Metric(data, *load_tensors(shipped if shipped.is_file() else own), device)


# ------------------------------------------------------------------------------------------------
# 7. The run folder: log, checkpoint, resume, signals, pictures, result
# ------------------------------------------------------------------------------------------------
MAY_CHANGE = {"out", "resume", "steps", "save_every", "device", "threads", "amp", "compile"}
MAY_CHANGE |= {"data_dir", "eval_n", "fid", "half", "sample", "labels", "n"}
MADE = ("pairs.safetensors", "latents.safetensors", "metric.safetensors")  # before training
MADE += ("teacher/teacher.safetensors",)


def numbered_folder(script: str, resume: bool) -> Path:
    """The next free runs/<script>-<k>, made at once so that no other run takes it, or the last."""
    found = [re.fullmatch(rf"{script}-(\d+)", p.name) for p in Path("runs").glob("*")]
    last = max((int(m[1]) for m in found if m), default=-1)
    if resume:
        return Path("runs") / f"{script}-{max(last, 0)}"
    while True:
        last += 1
        folder = Path("runs") / f"{script}-{last}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"Cannot write to runs/ ({error}): choose another --out.") from None


class Run:
    """One training run and its folder; see `loop` for what is saved when.

    Without cfg.out the folder is the next free runs/<script>-<k>, or with cfg.resume the last one.
    A folder with a run in it and no --resume is an error; so is another script's or other options.
    """

    def __init__(self, cfg, script: str):
        self.cfg, self.script, self.started = cfg, script, time.time()
        if rank():  # its files are nobody's, and go when it ends
            self.temporary = tempfile.TemporaryDirectory()
            self.folder = Path(self.temporary.name)
        else:
            self.folder = Path(cfg.out) if cfg.out else numbered_folder(script, cfg.resume)
        self.seconds_before, self.start = 0.0, 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.path("log.jsonl").open("a").close()
        except OSError as error:
            raise UserError(
                f"Cannot write to {self.folder} ({error}): choose another --out."
            ) from None
        marks = ("checkpoint.pt", "teacher", *MADE)
        if any(self.path(name).exists() for name in marks) or self.path("log.jsonl").stat().st_size:
            if not cfg.resume:
                raise UserError(
                    f"{self.folder} holds a run: add --resume to go on, or choose another --out."
                )
            self.check_same_run()
        mine = {"script": script, "config": dataclasses.asdict(cfg)}
        write_text(self.path("run.json"), json.dumps(mine, indent=1))
        self.share_files()
        self.checkpoint = self.read_checkpoint(Path(from_first(str(self.folder.absolute()))))
        self.start = self.checkpoint["step"] if self.checkpoint else 0
        kept = [line for line in self.read_log() if line["step"] <= self.start]
        write_text(self.path("log.jsonl"), "".join(json.dumps(line) + "\n" for line in kept))

    def path(self, name: str) -> Path:
        return self.folder / name

    def check_same_run(self) -> None:
        """UserError if the folder belongs to another script or to other options."""
        if not self.path("run.json").exists():
            return
        before = json.loads(self.path("run.json").read_text(encoding="utf-8"))
        if before["script"] != self.script:
            raise UserError(
                f"{self.folder} belongs to {before['script']}.py, not {self.script}.py: "
                "choose another --out."
            )
        for name, value in dataclasses.asdict(self.cfg).items():
            if name not in MAY_CHANGE and before["config"].get(name) != value:
                raise UserError(
                    f"{self.folder} was run with --{name.replace('_', '-')} "
                    f"{before['config'].get(name)}, not {value}: use the same options to resume, "
                    "or another --out."
                )

    def share_files(self) -> None:
        """The others read what the first process' folder has of MADE: none makes it again.

        What is not there yet all of them make, each for itself, from the same seed.
        """
        for path in map(self.path, MADE if dist.is_initialized() else ()):
            found = from_first(str(path.absolute()) if path.exists() else None)
            if rank() and found:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.symlink_to(found)

    def read_checkpoint(self, folder: Path) -> dict | None:
        path = folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            several = dist.is_initialized()  # mmap: all read one copy; Windows could not replace it
            checkpoint = torch.load(path, map_location="cpu", mmap=several, weights_only=True)
            script = checkpoint["script"]
        except Exception as error:  # whatever a damaged file makes torch raise
            raise UserError(f"{path} is damaged ({type(error).__name__}): delete it.") from None
        if script != self.script:
            raise UserError(f"{path} belongs to {script}.py, not {self.script}.py.")
        return checkpoint

    def read_log(self) -> list[dict]:
        """The lines of log.jsonl; a half-written one is left out."""
        lines = []
        for line in self.path("log.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def loop(self, steps: int, **parts):
        """Yields the steps to do, after loading parts (with a state_dict) from the checkpoint.

        Saves every cfg.save_every steps, after the last one, and at Ctrl-C or SIGTERM, which then
        ends the program. With the random states: on a CPU, resumed runs are bit-identical.
        """
        if self.start > steps:
            raise UserError(
                f"{self.folder} is at step {self.start} already: raise --steps {steps}."
            )
        device = torch.device(self.cfg.device)
        if self.checkpoint:
            try:
                for name, part in parts.items():
                    load_part(part, self.checkpoint["parts"][name])
            except (IndexError, KeyError, RuntimeError, ValueError):
                raise UserError(
                    f"{self.path('checkpoint.pt')} holds networks of another shape: "
                    "was the teacher replaced? Choose another --out."
                ) from None
            torch.set_rng_state(self.checkpoint["torch_rng"])
            if device.type == "cuda" and self.checkpoint["cuda_rng"] is not None:
                torch.cuda.set_rng_state(self.checkpoint["cuda_rng"], device)
            random.setstate(self.checkpoint["python_rng"])
            self.seconds_before = self.checkpoint["seconds"]
        else:  # whatever was reused or made before training: its first step is always the same
            torch.manual_seed(self.cfg.seed)
            random.seed(self.cfg.seed)
        self.checkpoint = None
        caught, before = [], {}

        def handler(number, frame):
            if caught:
                raise KeyboardInterrupt
            caught.append(number)

        if threading.current_thread() is threading.main_thread():
            before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            todo = range(self.start + 1, steps + 1)
            self.bar = tqdm(todo, initial=self.start, total=steps, disable=rank() > 0)
            for step in self.bar:
                several = dist.is_initialized()
                with RowsOfProcess(self.cfg) if several else contextlib.nullcontext():
                    yield step
                caught = from_first(caught)
                if caught or step == steps or step % self.cfg.save_every == 0:
                    self.save(step, parts)
                if caught:
                    self.bar.close()
                    if not rank():
                        print(f"Stopped and saved at step {step}. Go on with: {self.command()}")
                    raise SystemExit(128 + caught[0])
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    def command(self) -> str:
        """The command that resumes this run."""
        words = ["python", f"{self.script}.py"]
        for field in dataclasses.fields(self.cfg):
            flag, value = "--" + field.name.replace("_", "-"), getattr(self.cfg, field.name)
            if value != field.default and field.name not in ("out", "resume"):
                switch = flag if value else "--no-" + flag[2:]
                words += [switch] if field.type is bool else [flag, str(value)]
        return shlex.join([*words, "--resume", "--out", str(self.folder)])

    def save(self, step: int, parts: dict) -> None:
        device = torch.device(self.cfg.device)
        state = {
            "script": self.script,
            "step": step,
            "seconds": self.seconds(),
            "parts": {
                name: gathered(part.state_dict(), not rank()) for name, part in parts.items()
            },
            "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "python_rng": random.getstate(),
        }
        if not rank():
            write_atomic(self.path("checkpoint.pt"), lambda tmp: torch.save(state, tmp))

    def seconds(self) -> float:
        return self.seconds_before + time.time() - self.started

    def log(self, step: int, values: dict, every: int = 10) -> None:
        """A line in log.jsonl and the progress bar, every so many steps."""
        if step % every == 0 or step == 1:
            values = {k: torch.as_tensor(v).item() for k, v in values.items()}
            with self.path("log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            self.bar.set_postfix({k: f"{v:.3g}" for k, v in values.items()})

    def check_finite(self, step: int, values: dict) -> None:
        """Stops before a NaN reaches the weights; the last checkpoint is from before it."""
        values = gathered(values)
        if sum(torch.as_tensor(v).detach().sum() for v in values.values()).isfinite():
            return  # one look for all: a GPU has to be waited for
        for name, value in values.items():
            if not torch.as_tensor(value).isfinite().all():
                good = self.path("checkpoint.pt")
                kept = (
                    f"{good} keeps the last good state"
                    if good.exists()
                    else "nothing was saved yet"
                )
                raise UserError(
                    f"Step {step}: {name} is not finite; {kept}. Lower a learning rate."
                )

    def curves(self) -> None:
        """curves.png: every logged quantity against the step."""
        lines = self.read_log()
        if not lines:
            return
        plt = pyplot()
        names = [k for k in lines[-1] if k != "step"]
        fig, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
        for name, ax in zip(names, axes[0], strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            ax.plot(*zip(*points, strict=True))
            ax.set(title=name, xlabel="step")
            if min(y for _, y in points) >= 0:
                ax.set_ylim(bottom=0)
        fig.tight_layout()
        fig.savefig(self.path("curves.png"), dpi=90)
        plt.close(fig)

    def finish(self, metrics: dict) -> dict:
        """Writes and returns result.json: command, configuration, versions, cost, metrics."""
        device = torch.device(self.cfg.device)
        result = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "config": dataclasses.asdict(self.cfg),
            "seed": self.cfg.seed,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "numpy": np.__version__,
            },
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
            "seconds": round(self.seconds(), 1),
            "peak_memory_mb": round(peak_memory_mb(device), 1),
            "resumed_from": self.start,
            "metrics": metrics,
        }
        write_text(self.path("result.json"), json.dumps(result, indent=1) + "\n")
        return result

    def finished(self) -> dict | None:
        """result.json of a run that has done all its steps, else None."""
        path, result = self.path("result.json"), None
        if path.exists() and self.start >= self.cfg.steps:
            result = json.loads(path.read_text(encoding="utf-8"))
            measured = {"steps": self.start, "eval_n": self.cfg.eval_n}  # else: once more
            result = result if measured.items() <= result["config"].items() else None
        return from_first(result)


# ------------------------------------------------------------------------------------------------
# 8. Several processes: torchrun --nproc-per-node N script.py, networks sharded by FSDP2
# ------------------------------------------------------------------------------------------------


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rows(batch: int) -> int:
    """Samples of this process: each has its rows of the same global batch."""
    return batch // dist.get_world_size() if dist.is_initialized() else batch


def from_first(value):
    """What the first process has, on all of them."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def averaged(x: Tensor) -> Tensor:
    """The mean of x over the processes; no gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def shard(*networks: nn.Module) -> None:
    """Weights, gradients and optimiser states are split over the processes, if there are several.

    Copies have to be made before. Weights are whole inside `forward` alone: call nothing else.
    Adapters are small: they, and what is trained with them, stay whole.
    """
    if any(getattr(network, "is_adapter", False) for network in networks):
        for network in networks:
            replicate(network)
    elif dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        device = next(networks[0].parameters()).device.type
        mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
        for network in networks:
            for p in network.parameters():  # no channels last
                p.data = p.data.contiguous()
            units = network.units() if hasattr(network, "units") else getattr(network, "blocks", ())
            for part in [*units, network]:  # gathered one by one
                fully_shard(part, mesh=mesh, reshard_after_forward=True)


def replicate(network: nn.Module) -> None:
    """For small networks, and where gradients are differentiated again: whole everywhere."""

    def average(p):
        p.grad = averaged(p.grad)

    trained = [p for p in network.parameters() if p.requires_grad]
    for p in trained if dist.is_initialized() else ():
        p.register_post_accumulate_grad_hook(average)


def is_shard(x) -> bool:
    return dist.is_initialized() and hasattr(x, "full_tensor")


def gathered(state, keep: bool = True):
    """A state dict with whole tensors, on the CPU; all processes have to call it."""
    if isinstance(state, dict):
        return {k: gathered(v, keep) for k, v in state.items()}
    state = state.full_tensor().cpu() if is_shard(state) else state
    return state if keep else None


def load_part(part, state: dict) -> None:
    """part.load_state_dict of whole tensors, which one process or N have written."""

    def cut(value, like):
        if like is None or value.shape != like.shape:
            return value
        if not is_shard(like):  # AdamW's kernel wants the moments laid out as the weights
            return torch.empty_like(like, dtype=value.dtype).copy_(value)
        value = value.to(like.device).contiguous()
        return dist.tensor.distribute_tensor(value, like.device_mesh, like.placements)

    if isinstance(part, nn.Module):
        own = part.state_dict()
        state = {k: cut(v, own.get(k)) for k, v in state.items()}
    else:
        like = [p for group in part.param_groups for p in group["params"]]
        moments = {i: {k: cut(v, like[i]) for k, v in s.items()} for i, s in state["state"].items()}
        state = state | {"state": moments}
    part.load_state_dict(state)


def whole(network: nn.Module, like: nn.Module, last: bool = True) -> nn.Module:
    """After training: the network in one piece, a copy of `like`; last: the others end here."""
    if not dist.is_initialized():
        return network
    state = gathered(network.state_dict())
    network = copy.deepcopy(like)
    network.load_state_dict(state)
    if last:
        first_alone()
    return network


def first_alone() -> None:
    """Processes but the first end here."""
    if dist.is_initialized():
        other = rank() > 0
        dist.destroy_process_group()
        if other:
            raise SystemExit(0)


class RowsOfProcess(TorchFunctionMode):
    """Inside, random numbers are this process' rows of those that one process would draw.

    All draw for the whole batch from the same seed; dropout draws its mask so, too. k times the
    rows of a process are k batches side by side, a larger batch is many of the smaller; what is no
    multiple of them, or has a generator of its own, is drawn as it is.
    """

    def __init__(self, cfg):
        super().__init__()
        self.n = dist.get_world_size()
        self.rows = rows(math.gcd(cfg.batch, getattr(cfg, "pair_batch", 0)))

    def of_process(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.n, self.rows))[:, rank()].flatten(0, 1)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        drops = function is F.dropout and kwargs["training"] and kwargs["p"]
        if drops and not len(args[0]) % self.rows:
            mask = function(torch.cat([torch.ones_like(args[0])] * self.n), **kwargs)
            return args[0] * self.of_process(mask)
        if name == "randn_like":
            (x,), function, name = args, torch.randn, "randn"
            args, kwargs = tuple(x.shape), {"dtype": x.dtype, "device": x.device} | kwargs
        if name in ("rand", "randn") and isinstance(args[0], int):
            args = (args,)
        first = {"rand": 0, "randn": 0, "randint": len(args) - 1, "multinomial": 1}.get(name)
        if first is None or "generator" in kwargs:
            return function(*args, **kwargs)
        size = args[first] if isinstance(args[first], Sequence) else (args[first],)
        if not size or size[0] % self.rows:
            return function(*args, **kwargs)
        total = self.n * size[0]
        everywhere = total if name == "multinomial" else (total, *size[1:])
        return self.of_process(function(*args[:first], everywhere, *args[first + 1 :], **kwargs))


BENCHMARK = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_channels": 16}


class Benchmark:
    """Stands in for a Run: times cfg.benchmark steps of a training loop and keeps nothing."""

    def __init__(self, cfg, images_per_step: int):
        self.cfg, self.images = cfg, images_per_step
        cfg.save_every = cfg.steps = sys.maxsize  # no pictures

    @staticmethod
    def untrained(device) -> EDMPrecond:
        """A denoiser of 0.88M parameters."""
        return (
            EDMPrecond(SongUNet(**BENCHMARK, dropout=0.0)).to(device).eval().requires_grad_(False)
        )

    @staticmethod
    def images(denoiser) -> tuple[Tensor, Tensor]:
        """uint8 noise of the denoiser's shape, and labels."""
        images = torch.randint(256, (512, *denoiser.shape), dtype=torch.uint8)
        return images, torch.randint(max(denoiser.label_dim, 1), (512,))

    def loop(self, _steps: int, **parts):
        for step in tqdm(range(1, self.cfg.benchmark + 3)):
            if step == 3:  # two to warm up
                start = time.time()
            yield step
            if self.cfg.device.startswith("cuda"):
                torch.cuda.synchronize()
        seconds = (time.time() - start) / self.cfg.benchmark
        self.result = {"images_per_second": self.images / seconds, "seconds_per_step": seconds}
        self.result["peak_memory_mb"] = peak_memory_mb(torch.device(self.cfg.device))
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                print(f"{name}: {sum(p.numel() for p in part.parameters()):,} parameters")
        print(", ".join(f"{k.replace('_', ' ')}: {v:.4g}" for k, v in self.result.items()))

    def log(self, step: int, values: dict) -> None:
        pass

    check_finite = Run.check_finite


def processor() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}, {platform.machine()}"


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_rows(path, rows: dict[str, Tensor], columns: int = 16) -> None:
    """A picture with one titled block of images for each entry, e.g. teacher above generator."""
    plt = pyplot()
    grids = []
    for x in rows.values():
        grid = torchvision.utils.make_grid(to_uint8(x.detach().cpu()), nrow=columns, pad_value=127)
        grids.append(grid.permute(1, 2, 0).numpy())
    heights = [g.shape[0] / g.shape[1] for g in grids]
    size = (8, 8 * sum(heights) + 0.35 * len(grids))
    fig, axes = plt.subplots(len(grids), 1, figsize=size, height_ratios=heights, squeeze=False)
    for title, grid, ax in zip(rows, grids, axes[:, 0], strict=True):
        ax.imshow(grid, interpolation="nearest")
        ax.set_title(title, fontsize=9, loc="left")
        ax.axis("off")
    fig.tight_layout(pad=0.4)
    write_atomic(path, lambda tmp: fig.savefig(tmp, dpi=130, format="png"))
    plt.close(fig)


def save_strips(path, videos: dict[str, Tensor], n: int = 6) -> None:
    """A picture of the first n videos (B, 1, F, H, W) of each entry: a row each, its frames in it.

    Shorter videos are black after their last frame.
    """
    longest, rows = max(x.shape[2] for x in videos.values()), {}
    for title, x in videos.items():
        padded = F.pad(x[:n].cpu(), (0, 0, 0, 0, 0, longest - x.shape[2]), value=-1)
        rows[title] = padded.transpose(1, 2).flatten(0, 1)
    save_rows(path, rows, columns=longest)


def save_gif(path, videos: list[Tensor], n: int = 6, scale: int = 5) -> None:
    """The first n videos (B, 1, F, H, W) of each entry side by side, one entry under the other.

    8 frames a second; shorter videos turn black at their end.
    """
    from PIL import Image

    longest = max(x.shape[2] for x in videos)
    padded = [F.pad(x[:n].cpu(), (0, 0, 0, 2, 0, longest - x.shape[2]), value=-1) for x in videos]
    grid = torch.cat([torch.cat([*x[:, 0]], -1) for x in padded], -2)  # (F, rows, columns)
    grid = to_uint8(grid).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    first, *others = (Image.fromarray(picture.numpy()) for picture in grid)
    how = {"save_all": True, "append_images": others, "duration": 125, "loop": 0}
    write_atomic(path, lambda tmp: first.save(tmp, format="GIF", **how))


def save_lines(path, panels: dict[str, dict[str, list]], xlabel: str, mark: float) -> None:
    """A panel for each title, in it a line for each entry over 1, 2, ...; dotted at `mark`."""
    plt = pyplot()
    fig, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), squeeze=False)
    for (title, lines), ax in zip(panels.items(), axes[0], strict=True):
        for label, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, label=label.replace("_", " "))
        ax.axvline(mark, color="grey", ls=":")
        ax.set(title=title, xlabel=xlabel)
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    write_atomic(path, lambda tmp: fig.savefig(tmp, dpi=90, format="png"))
    plt.close(fig)


def print_verdict(result: dict, folder) -> None:
    """The table at the end of a run: every entry of result["metrics"], same metric, same n."""
    rows = result["metrics"]
    columns = list(dict.fromkeys(k for row in rows.values() for k in row))
    print("\n" + " " * 12 + "".join(f"{c.replace('_', ' '):>18}" for c in columns))
    for name, row in rows.items():
        cells = [row.get(c, "") for c in columns]
        cells = [f"{v[0]:.4f} .. {v[-1]:.4f}" if isinstance(v, list) else v for v in cells]
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in cells]
        print(f"{name:12}" + "".join(f"{v:>18}" for v in cells))
    print(
        f"{result['seconds']:.0f} s on {result['device']}, peak {result['peak_memory_mb']:.0f} MB"
    )
    pictures = ("samples.png", "samples.gif", "denoised.png", "drift.png", "curves.png")
    paths = [Path(folder) / name for name in pictures]
    print("Pictures: " + ", ".join(str(path) for path in paths if path.exists()))


# ------------------------------------------------------------------------------------------------
# 9. Command line
# ------------------------------------------------------------------------------------------------


def parse_config(config_class, argv: list[str] | None = None):
    """Config from the command line: one flag a field, its help is the comment behind the field."""
    doc = inspect.getdoc(inspect.getmodule(config_class)) or ""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    helps = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(config_class), re.M))
    for field in dataclasses.fields(config_class):
        flag, text = "--" + field.name.replace("_", "-"), helps[field.name].replace("%", "%%")
        how = (
            {"action": argparse.BooleanOptionalAction}
            if field.type is bool
            else {"type": field.type}
        )
        parser.add_argument(flag, default=field.default, help=f"{text} [{field.default}]", **how)
    return config_class(**vars(parser.parse_args(argv)))


def command_line(main, config_class) -> None:
    """What stands under __main__: errors that the user can mend are one sentence."""
    try:
        main(parse_config(config_class))
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:  # outside the training loop, which saves
        sys.exit("Interrupted.")


COUNTS = ("steps", "batch", "pairs", "pair_batch", "pair_steps")
COUNTS += ("sample_steps", "sampling_steps", "n", "ratio_bins", "num_frame_per_block")
COUNTS += ("num_training_frames", "generator_update_interval", "teacher_updates", "ode_updates")
NOT_NEGATIVE = ("ratio", "threads", "lr", "lr_generator", "lr_fake", "dm_weight", "gan_weight")
NOT_NEGATIVE += ("discriminator_weight", "r1_weight", "warmup", "benchmark", "teacher_steps")
NOT_NEGATIVE += ("lr_discriminator", "r1_features", "noise_std", "s_churn")


def set_up(cfg) -> torch.device:
    """Threads, seeds and device; cfg.device "auto" becomes cuda if there is one, else cpu.

    Under torchrun the processes are made known to each other.
    """
    for name in COUNTS:
        if getattr(cfg, name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be 1 or more.")
    for name in NOT_NEGATIVE:
        if not getattr(cfg, name, 0) >= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be 0 or more.")
    for name in ("gan_noise", "r1_std", "ratio_lower"):
        if not 0 < getattr(cfg, name, 1) <= 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: must be in (0, 1].")
    if not getattr(cfg, "ratio_upper", 1) >= 1:
        raise UserError(f"--ratio-upper {cfg.ratio_upper}: must be 1 or more.")
    for name in ("ema", "beta1", "beta2", "ratio_ema"):
        if not 0 <= getattr(cfg, name, 0) < 1:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be from 0 to below 1.")
    if cfg.save_every < 1 or cfg.eval_n < 10:
        raise UserError("--save-every must be 1 or more, --eval-n 10 or more.")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    batch = math.gcd(cfg.batch, getattr(cfg, "pair_batch", 0))
    if processes > 1 and (batch % processes or getattr(cfg, "compile", False)):
        raise UserError(
            f"{processes} processes need a --batch (and --pair-batch) that they divide, "
            "and no --compile."
        )
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    random.seed(cfg.seed)
    if cfg.device == "auto":
        cfg.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if processes > 1 and cfg.device == "cuda":  # before the first tensor
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device} cannot be used here ({error}).") from None
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo")
    return torch.device(cfg.device)


def one_of(flag: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UserError(f"--{flag} {value}: choose {' or '.join(choices)}.")


def numbers(text: str) -> list[int]:
    try:
        return [int(v) for v in text.split(",") if v]
    except ValueError:
        raise UserError(f"{text!r}: expected numbers with commas between them, like 2,2.") from None


@contextlib.contextmanager
def own_random_numbers(seed: int):
    """Random numbers from `seed` inside; those outside go on as if nothing had happened."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def sample_labels(text: str, n: int, label_dim: int) -> Tensor | None:
    """The classes to draw: "3,1,4" repeated, or all in turn; None for an unconditional network."""
    if not label_dim:
        return None
    wanted = numbers(text) or range(label_dim)
    if not all(0 <= v < label_dim for v in wanted):
        raise UserError(f"--labels {text}: expected numbers from 0 to {label_dim - 1}, like 3,1,4.")
    return torch.tensor(wanted)[torch.arange(n) % len(wanted)]


# ------------------------------------------------------------------------------------------------
# 10. The script: train a teacher, or evaluate and sample any denoiser
# ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder of class folders with images
    data_dir: str = "data"  # where data sets are, or are downloaded to
    resolution: int = 32  # of the images of a folder
    init: str = ""  # start from this .safetensors file's network instead of a fresh one
    model_channels: int = 32  # width of the network; CIFAR-10's EDM network has 128
    channel_mult: str = "2,2"  # width multiplier per resolution; EDM 2,2,2
    num_blocks: int = 1  # residual blocks per resolution; EDM 4
    attn_resolutions: str = ""  # resolutions with self-attention beside the bottleneck; EDM 16
    patch_size: int = 2  # fold p x p pixels into channels: faster; EDM 1
    dropout: float = 0.0  # EDM 0.13
    p_mean: float = -1.2  # mean of ln sigma in training
    p_std: float = 1.2  # standard deviation of ln sigma in training
    stable_target: bool = False  # target: mean of the class's images given x_t, not one image
    label_dropout: float = 0.1  # share of training images without a label; makes guidance possible
    steps: int = 12000  # optimiser steps
    batch: int = 128  # images a step
    lr: float = 2e-3  # Adam's learning rate after the warm-up; decays to 0 along a cosine
    ema: float = 0.999  # decay of the average of the weights that becomes the teacher
    amp: bool = False  # bfloat16 autocast while training: faster where the hardware has it
    compile: bool = False  # torch.compile while training: faster after a minute of compiling
    half: bool = False  # write teacher.safetensors in float16
    evaluate: str = ""  # only measure this .safetensors file: metrics at --eval-n and the floor
    sample: str = ""  # only draw --n pictures from this .safetensors file
    labels: str = ""  # classes for --sample, like 3,1,4; default: all in turn
    n: int = 64  # pictures of --sample
    sample_steps: int = 18  # Heun steps N: 2 N - 1 network calls; 1 for a one-step generator
    guidance: float = 1.0  # weight of classifier-free guidance when sampling; 1 is off
    s_churn: float = 0.0  # noise added before each step (EDM Alg. 2): up to 0.41 x --sample-steps
    eval_n: int = 10000  # samples behind the numbers of the verdict
    fid: bool = False  # measure FID too (pip install torch-fidelity); slow without a GPU
    seed: int = 0  # of everything random
    device: str = "auto"  # cuda, cpu, mps; auto: cuda if there is one, else cpu
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/edm_teacher-<k>
    resume: bool = False  # go on with the run in --out, or the last one
    save_every: int = 500  # steps between checkpoints


@torch.no_grad()
def in_batches(sampler, z: Tensor, labels: Tensor | None, device, batch: int = 250):
    """sampler(z, labels) over batches -> (x on the CPU, seconds per 1000 images)."""
    start, out = time.time(), []
    for i in tqdm(range(0, len(z), batch), desc="sampling", leave=False):
        y = None if labels is None else labels[i : i + batch].to(device)
        out.append(sampler(z[i : i + batch].to(device), y).float().cpu())
    return torch.cat(out), (time.time() - start) / len(z) * 1000


def noise(denoiser, n: int, seed: int) -> Tensor:
    """n latents z ~ N(0, I) of the denoiser's shape, the same for every denoiser of that shape."""
    shape = (n, denoiser.img_channels, denoiser.img_resolution, denoiser.img_resolution)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measure(sampler, denoiser, metric: Metric, nfe: int, n: int, seed: int, cfg, with_fid=False):
    """One row of the verdict, a dict: n samples, classes as frequent as in the data, measured."""
    labels = metric.labels(n, denoiser.label_dim)
    with own_random_numbers(seed):
        x, seconds = in_batches(sampler, noise(denoiser, n, seed), labels, cfg.device)
    row = {"nfe": nfe} | metric(x, labels) | {"seconds_per_1000": seconds}
    return row | {"fid": fid(x, cfg.data, cfg.data_dir, cfg.device)} if with_fid else row


def network_calls(steps: int, guidance: float, label_dim: int) -> int:
    """NFE of heun_sampler: 2 N - 1, twice that with guidance."""
    return (2 * steps - 1) * (2 if guidance != 1 and label_dim else 1)


def draw_samples(cfg, sampler) -> None:
    """--sample: n pictures by sampler(denoiser, z, labels) from a file, without training."""
    if hasattr(cfg, "prompts") and is_large(cfg.teacher):
        import diffusers_backbones

        return diffusers_backbones.draw_samples(cfg, sampler)
    denoiser = load_denoiser(cfg.sample, cfg.device)
    labels = sample_labels(cfg.labels, cfg.n, denoiser.label_dim)
    z = noise(denoiser, cfg.n, cfg.seed)
    x, seconds = in_batches(partial(sampler, denoiser), z, labels, cfg.device)
    path = Path(cfg.out or ".") / "sampled.png"
    save_rows(path, {cfg.sample: x})
    print(f"{cfg.n} samples in {seconds * cfg.n / 1000:.2f} s: {path}")


def train(cfg: Config, run: Run, images: Tensor, labels: Tensor) -> EDMPrecond:
    """Minimises edm_loss; returns the average (EMA) of the weights, sharded as they are."""
    device = torch.device(cfg.device)
    network = {
        "img_resolution": images.shape[-1],
        "img_channels": images.shape[1],
        "label_dim": int(labels.max()) + 1,
        "model_channels": cfg.model_channels,
        "channel_mult": numbers(cfg.channel_mult),
        "num_blocks": cfg.num_blocks,
        "attn_resolutions": numbers(cfg.attn_resolutions),
        "dropout": cfg.dropout,
        "label_dropout": cfg.label_dropout,
        "patch_size": cfg.patch_size,
    }
    if cfg.init:
        denoiser = load_denoiser(cfg.init, device).train()
        have = (denoiser.img_resolution, denoiser.img_channels, denoiser.label_dim)
        if have != (network["img_resolution"], network["img_channels"], network["label_dim"]):
            raise UserError(f"--init {cfg.init} has (resolution, channels, classes) {have}.")
    else:
        denoiser = EDMPrecond(SongUNet(**network)).to(device)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    shard(denoiser, ema)
    optimizer = torch.optim.Adam(denoiser.parameters(), cfg.lr, betas=(0.9, 0.99))
    fast = torch.compile(denoiser) if cfg.compile else denoiser
    images, labels = images.to(device), labels.to(device)
    target = PosteriorMean(images, labels) if cfg.stable_target else None
    z = noise(denoiser, 32, seed=cfg.seed).to(device)
    classes = sample_labels("", 32, denoiser.label_dim).to(device)
    parts = {"denoiser": denoiser, "ema": ema, "optimizer": optimizer}
    for step in run.loop(cfg.steps, **parts):
        warm_up, decay = min(1, step / 200), (1 + math.cos(math.pi * step / cfg.steps)) / 2
        optimizer.param_groups[0]["lr"] = cfg.lr * warm_up * decay
        i = torch.randint(len(images), (rows(cfg.batch),), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
            x = to_float(images[i])
            loss = edm_loss(fast, x, labels[i], cfg.p_mean, cfg.p_std, target)
        optimizer.zero_grad()
        loss.backward()
        norm = gathered(nn.utils.clip_grad_norm_(denoiser.parameters(), 10.0))
        run.check_finite(step, {"loss": loss, "gradient": norm})
        optimizer.step()
        ema_update(ema, denoiser, cfg.ema, step)
        run.log(step, {"loss": loss, "gradient": norm}, every=50)
        if step % cfg.save_every == 0:
            x = heun_sampler(ema, z, classes, cfg.sample_steps)
            save_rows(run.path(f"samples_{step}.png"), {f"step {step}": x})
    return ema


def main(cfg: Config) -> dict:
    """Trains, or with cfg.evaluate or cfg.sample only uses a network; returns result.json."""
    device = set_up(cfg)
    options = {"steps": cfg.sample_steps, "guidance": cfg.guidance, "s_churn": cfg.s_churn}
    sampler = partial(heun_sampler, **options)
    if cfg.sample:
        draw_samples(cfg, sampler)
        return {}
    shape = {"resolution": cfg.resolution if Path(cfg.data).is_dir() else 28, "channels": 3}
    if cfg.evaluate:
        denoiser = load_denoiser(cfg.evaluate, device)
        shape = {"resolution": denoiser.img_resolution, "channels": denoiser.img_channels}
    else:
        images, labels = load_data(cfg.data, cfg.data_dir, **shape)
    run = Run(cfg, "evaluate" if cfg.evaluate else "edm_teacher")
    if not cfg.evaluate and (result := run.finished()):
        print_verdict(result, run.folder)
        return result
    metric = get_metric(cfg.data, cfg.data_dir, run.folder, device, **shape)
    if not cfg.evaluate:
        denoiser = train(cfg, run, images, labels)
        path, half = run.path("teacher.safetensors"), torch.float16 if cfg.half else None
        save_denoiser(denoiser, path, half)
        denoiser = whole(denoiser, like=load_denoiser(path, device))
        run.curves()
    metric.check(denoiser)
    n, sampler = min(cfg.eval_n, len(metric.test)), partial(sampler, denoiser)
    name = "generator" if cfg.sample_steps == 1 else "teacher"
    nfe = network_calls(cfg.sample_steps, cfg.guidance, denoiser.label_dim)
    row = measure(sampler, denoiser, metric, nfe, n, cfg.seed + 20000, cfg, cfg.fid)
    z, labels = noise(denoiser, 64, cfg.seed + 20000), sample_labels("", 64, denoiser.label_dim)
    x, _ = in_batches(sampler, z, labels, device)
    save_rows(run.path("samples.png"), {f"{name}, {nfe} NFE": x})
    result = run.finish({name: row, "floor": metric.floor(n)})
    print_verdict(result, run.folder)
    return result


if __name__ == "__main__":
    command_line(main, Config)
