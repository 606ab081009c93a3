"""EDM: the teacher of every script here, and the one module that they share (arXiv 2206.00364).

Part A, to be read: what a denoiser is, its network, its loss, its sampler (Karras et al. 2022).
Part B, for later: what every training loop needs: options, run folder, checkpoint, processes.
Part C trains a teacher:  python edm_teacher.py --data mnist
"""

import contextlib
import copy
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import sys
import textwrap
import time
import warnings
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, get_args, get_origin

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchvision.utils import make_grid
from tqdm import tqdm

# ######## Part A: the denoiser ###################################################################
# == 1. Preconditioning ======================================================== EDM Eq. 7, Table 1


def expand(v: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1): a number per sample, to multiply images; (B, F): per frame of video."""
    return v.reshape(len(v), *[1, v.shape[1], 1, 1] if v.ndim == 2 else [1] * (x.ndim - 1))


class Denoiser(nn.Module):
    """D(x; σ, label): noisy x in, clean x out; and what the scripts ask of a teacher beside it.

    x: (B, *shape), data in [-1, 1] plus σ times unit noise, not scaled. sigma: (B,). labels: (B,),
    -1 = no class for that sample; None = no class for all. Your own network becomes one by
    Denoiser(network, shape=(1, 28, 28), label_dim=10), which calls network(x, sigma, labels).
    At first reading skip what follows `forward`: it is for guidance, latents, several processes."""

    sigma_min, sigma_max, sigma_data = 0.002, 80.0, 0.5
    latents = False  # True: x is a VAE's, decode(x) are pixels, and no metric knows it
    is_adapter = False  # True: the weights are few; they stay whole in every process

    def __init__(self, model: nn.Module, shape: tuple, label_dim: int = 0):
        super().__init__()
        self.model, self.shape, self.label_dim = model, tuple(shape), label_dim

    def forward(self, x: Tensor, sigma, labels: Tensor | None = None, **features):
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        return self.model(x, sigma, labels, **features)

    def sigma_of(self, u: Tensor, schedule) -> Tensor:
        """σ at the fraction u of the noise axis: the script's schedule, or an axis of its own."""
        return schedule(u, self.sigma_min, self.sigma_max)

    def no_condition(self, labels: Tensor):
        """What takes the place of the labels in the unconditional call."""
        return None

    def decode(self, x: Tensor) -> Tensor:
        return x

    def real_images(self, cfg, run) -> tuple[Tensor, Tensor]:
        """(x, labels) for a GAN: uint8 images of --data; where `latents` is on, latents."""
        return load_images(cfg, self.shape[-1], self.shape[0])

    def units(self) -> list[nn.Module]:
        """Parts that several processes gather one by one."""
        return []

    def save(self, path) -> None:
        """Writes <path>.safetensors; EDMPrecond's can be read by load_denoiser."""
        save_denoiser(self, Path(path).with_suffix(".safetensors"))

    def draw(self, path, sampler, seed: int, labels: Tensor | None = None, n: int = 32) -> Tensor:
        """A picture of x = sampler(z, labels), n fixed z, classes in turn without labels; -> x."""
        labels = class_labels(n, self.label_dim) if labels is None else labels
        with own_random_numbers(seed):
            x = in_batches(sampler, noise(self, n, seed), labels, next(self.parameters()).device)
        save_grid(path, x)
        return x


class EDMPrecond(Denoiser):
    """D(x; σ, y) = c_skip x + c_out F(c_in x; c_noise, y)  (EDM Eq. 7).

    return_features=True also returns the list of the encoder's last activations per resolution,
    finest first, bottleneck last; "only" leaves the decoder out and returns (None, features)."""

    def __init__(self, model: nn.Module, sigma_data: float = 0.5):
        resolution = model.img_resolution
        super().__init__(model, (model.img_channels, resolution, resolution), model.label_dim)
        self.sigma_data = sigma_data

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
            try:  # number, type and range
                one_hot = F.one_hot(labels.reshape(len(x)) + 1, self.label_dim + 1)[:, 1:].to(dtype)
            except RuntimeError:
                expected = f"{len(x)} integers from -1 (no class) to {self.label_dim - 1}"
                raise UserError(f"labels: expected {expected}.") from None
        elif labels is not None:
            raise UserError("labels: this network has no classes, so give None.")
        out = self.model(c_in * x, c_noise, one_hot, return_features=return_features)
        out, features = out if return_features else (out, None)
        if out is None:
            return None, features
        denoised = c_skip * x + c_out * out.to(dtype)
        return (denoised, features) if return_features else denoised

    def no_condition(self, labels: Tensor):
        if not self.model.label_dropout:
            warnings.warn("Guidance: this network never saw images without a label.", stacklevel=2)


# == 2. The network F: the DDPM++ U-Net =============================================== EDM Table 1


def xavier(*shape: int, scale: float = 1.0) -> nn.Parameter:
    """Uniform Xavier (Glorot) weights for an (out, in, k, k) or (out, in) tensor, times `scale`."""
    bound = math.sqrt(6 / ((shape[0] + shape[1]) * math.prod(shape[2:])))
    return nn.Parameter((torch.rand(shape) * 2 - 1) * bound * scale)


class Linear(nn.Linear):
    def __init__(self, cin: int, cout: int, bias: bool = True):
        super().__init__(cin, cout, bias)
        self.weight = xavier(cout, cin)
        if bias:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Module):
    """k x k convolution behind a 2 x 2 mean (down) or nearest neighbour (up); k = 0: only these."""

    def __init__(self, cin: int, cout: int, kernel: int, up=False, down=False, scale: float = 1.0):
        super().__init__()
        self.up, self.down = up, down
        self.weight = xavier(cout, cin, kernel, kernel, scale=scale) if kernel else None
        self.bias = nn.Parameter(torch.zeros(cout)) if kernel else None
        if up or down:  # EDM's files hold its filter [1, 1]: what interpolate and avg_pool2d do
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
        raise UserError(f"{channels} channels make no groups of 4 or more: choose another width.")
    return nn.GroupNorm(groups, channels, eps)


class UNetBlock(nn.Module):
    """Residual block; up- and downsampling sit inside its first convolution, attention behind."""

    skip_scale = math.sqrt(0.5)

    def __init__(self, cin, cout, emb_channels, dropout, up=False, down=False, attention=False):
        super().__init__()
        self.attention = attention
        self.norm0 = group_norm(cin)
        self.conv0 = Conv2d(cin, cout, 3, up, down)
        self.affine = Linear(emb_channels, cout)
        self.norm1 = group_norm(cout)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv2d(cout, cout, 3, scale=1e-5)
        self.skip = Conv2d(cin, cout, 1, up, down) if cin != cout or up or down else None
        if attention:
            self.norm2 = group_norm(cout)
            self.qkv = Conv2d(cout, cout * 3, 1, scale=math.sqrt(0.2))
            self.proj = Conv2d(cout, cout, 1, scale=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.norm1(h + self.affine(emb)[:, :, None, None])
        h = self.conv1(self.dropout(F.silu(h)))
        x = ((x if self.skip is None else self.skip(x)) + h) * self.skip_scale
        return (self.attend(x) + x) * self.skip_scale if self.attention else x

    def attend(self, x: Tensor, heads: int = 1) -> Tensor:
        """softmax(q k / √C) v over pixels; q, k, v are interleaved in the channels of each head."""
        b, c, *hw = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(b, heads, c // heads, 3, math.prod(hw))
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous()  # (B, heads, HW, C / heads) each
        a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, *hw)
        return self.proj(a)


class SongUNet(nn.Module):
    """EDM's DDPM++ network: names, initialisation and numerics of the published checkpoints.

    forward(x, noise_labels, class_labels, augment_labels): x (B, C, H, W), noise_labels (B,)
    = c_noise, class_labels (B, label_dim) one-hot rows (zeros = no class) -> (B, C, H, W).
    patch_size p folds p x p pixels into channels first: 28 x 28 digits at the price of 14 x 14."""

    Block, attends_in_all = UNetBlock, False  # for ADM, see backbones/edm_files.py

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
    ):
        super().__init__()
        self.describe({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        c_emb, c_io = model_channels * channel_mult_emb, img_channels * patch_size**2
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, c_emb)
        self.map_layer1 = Linear(c_emb, c_emb)
        cout, base = self.build(c_io, model_channels, c_emb), img_resolution // patch_size
        self.dec[f"{base}x{base}_aux_norm"] = group_norm(cout)
        self.dec[f"{base}x{base}_aux_conv"] = Conv2d(cout, c_io, 3, scale=1e-5)
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def describe(self, config: dict) -> None:
        """Keeps the arguments: what a file needs to build the same network."""
        self.config = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        for name in ("img_resolution", "img_channels", "label_dim", "label_dropout"):
            setattr(self, name, config[name])
        self.model_channels, self.patch_size = config["model_channels"], config.get("patch_size", 1)
        smallest = self.patch_size * 2 ** (len(config["channel_mult"]) - 1)
        if self.img_resolution % smallest:
            raise UserError(
                f"Resolution {self.img_resolution} does not divide by {smallest}: choose another "
                "--patch-size or fewer levels in --channel-mult."
            )

    def build(self, c_io: int, cout: int, c_emb: int) -> int:
        """Makes enc and dec; cout: channels of the first convolution. Returns those of the last."""
        cfg, base = self.config, self.img_resolution // self.patch_size
        widths = [self.model_channels * mult for mult in cfg["channel_mult"]]
        attn_resolutions, num_blocks = cfg["attn_resolutions"], cfg["num_blocks"]
        block = partial(self.Block, emb_channels=c_emb, dropout=cfg["dropout"])

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
                attention = res in attn_resolutions and (self.attends_in_all or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = block(cin, cout, attention=attention)
        return cout

    def positional(self, noise_labels: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """sin and cos of c_noise f_i, f_i = 10000^(-i / last), i = 0 ... model_channels / 2 - 1."""
        i = torch.arange(self.model_channels // 2).to(noise_labels)
        angles = noise_labels.outer((1 / 10000) ** (i / last))
        return angles.sin(), angles.cos()

    def drop_labels(self, class_labels: Tensor) -> Tensor:
        if not self.training or not self.label_dropout:
            return class_labels
        chance = torch.rand(len(class_labels), 1, device=class_labels.device)
        return class_labels * (chance >= self.label_dropout)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels) -> Tensor:
        emb = torch.cat(self.positional(noise_labels, self.model_channels // 2 - 1), 1)
        if self.map_label is not None and class_labels is not None:
            class_labels = self.drop_labels(class_labels)
            emb = emb + self.map_label(class_labels * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def last(self, x: Tensor) -> Tensor:
        *_, norm, conv = self.dec.values()
        return conv(F.silu(norm(x)))

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
            if "aux" not in name:
                x = block(torch.cat([x, skips.pop()], 1) if "block" in name else x, emb)
        x = F.pixel_shuffle(self.last(x), self.patch_size)
        return (x, list(features.values())) if return_features else x


# == 3. Loss and sampler ============================================ EDM Eq. 5, Eq. 8, Algorithm 2


def edm_loss(denoiser, x: Tensor, labels=None, p_mean=-1.2, p_std=1.2, target=None) -> Tensor:
    """E[ λ(σ) |D(x + σ ε; σ) - x|² ],  ln σ ~ N(p_mean, p_std²),  λ = 1/σ² + 1/σ_data²  (Eq. 8).

    x: clean images (B, C, H, W) in [-1, 1].   Mean over batch and pixels (EDM's code: sum).
    target(x_t, sigma, labels), if given, takes the place of x in the difference."""
    sigma = (torch.randn(len(x), device=x.device) * p_std + p_mean).exp()
    x_t = x + expand(sigma, x) * torch.randn_like(x)
    if target is not None:
        x = target(x_t, sigma, labels)
    weight = 1 / sigma**2 + 1 / denoiser.sigma_data**2
    return (expand(weight, x) * (denoiser(x_t, sigma, labels) - x) ** 2).mean()


def guided(denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
    """D_u + w (D_c - D_u): classifier-free guidance; w = 1 is off, one call instead of two.

    Arguments and result as of denoiser(x, sigma, labels); without labels there is no guidance."""
    if guidance != 1 and labels is None:
        raise UserError(
            f"--guidance {guidance}: this network has no classes, so only 1 is possible."
        )
    denoised = denoiser(x, sigma, labels)
    if guidance == 1:
        return denoised
    unconditional = denoiser(x, sigma, denoiser.no_condition(labels))
    return unconditional + guidance * (denoised - unconditional)


@torch.no_grad()
def heun_sampler(
    denoiser,
    z: Tensor,
    labels: Tensor | None = None,
    steps: int = 18,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    guidance: float = 1.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method on the noise levels of EDM Eq. 5 (EDM Algorithm 2): 2 steps - 1 network calls.

    z: unit Gaussian noise (B, C, H, W); the result has its shape and dtype, is not clipped. Ends of
    the noise levels: the denoiser's. s_churn > 0 adds noise before steps with s_min <= σ <= s_max.
    """
    sigma_min = denoiser.sigma_min if sigma_min is None else sigma_min
    sigma_max = denoiser.sigma_max if sigma_max is None else sigma_max
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


# == 4. Files: tensors and a JSON description, never code =========================================
ASSETS = Path(__file__).resolve().parent / "assets"
KEY = "distillation"  # of the description in the metadata


class UserError(ValueError):
    """What the person at the keyboard can mend; the command line prints it as one sentence."""


def brief(error) -> str:
    """An error of a library, or a name in a file, as part of one sentence."""
    text = f"{error}" if isinstance(error, (str, UserError)) else f"{type(error).__name__}: {error}"
    return textwrap.shorten(text, 200, placeholder=" ...")


def write_atomic(path, write) -> None:
    """write(tmp), then rename: a crash leaves the old file or the new one. First process only."""
    if rank():
        return
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save: RuntimeError
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise UserError(f"Cannot write {path} ({brief(error)}): choose another --out.") from None


def save_tensors(path, tensors: dict[str, Tensor], config: dict | None = None) -> None:
    """A .safetensors file with `config` in it."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    meta = {KEY: json.dumps({"config": config or {}}, sort_keys=True)}
    write_atomic(path, lambda tmp: safetensors.torch.save_file(tensors, tmp, meta))


def load_tensors(path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a file that save_tensors wrote; UserError for any other."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            config = json.loads((file.metadata() or {}).get(KEY, "{}"))["config"]
            return {name: file.get_tensor(name) for name in file.keys()}, dict(config)  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class, and OSError
        raise UserError(f"{path} is damaged or not a file of ours ({brief(error)}).") from None


def save_denoiser(denoiser: Denoiser, path, dtype: torch.dtype | None = None) -> None:
    """dtype=torch.float16 halves the file; it is read back as float32."""
    state = {k: v.to(dtype or v.dtype) for k, v in whole_state(denoiser).items()}
    config = {"model_type": type(denoiser.model).__name__, "sigma_data": denoiser.sigma_data}
    save_tensors(path, state, config | {"network": getattr(denoiser.model, "config", None)})


def load_denoiser(path, device="cpu") -> EDMPrecond:
    """The denoiser in a .safetensors file of ours, in float32, in eval mode.

    Raises FileNotFoundError, or ValueError: damaged, no denoiser, other names or shapes."""
    if Path(path).suffix in (".pkl", ".pth"):
        raise UserError(f"{path}: backbones.edm_files.load_denoiser reads files of others.")
    return build_denoiser(path, *load_tensors(path), {"SongUNet": SongUNet}, device)


def build_denoiser(path, state: dict, config: dict, networks: dict, device="cpu") -> EDMPrecond:
    """EDMPrecond around the network of `config`, with the tensors of `state` in it."""
    try:
        network = config["network"]
        if network.get("num_blocks", 1) * len(network.get("channel_mult", ())) > len(state):
            raise UserError("more blocks than tensors")  # do not build them for hours
        with torch.device("meta"):  # no memory yet
            model = networks[config.get("model_type", "SongUNet")](**config["network"])
            denoiser = EDMPrecond(model, float(config["sigma_data"]))
    except Exception as error:
        raise UserError(f"{path} does not describe a denoiser ({brief(error)}).") from None
    expected = denoiser.state_dict()
    state = {k.replace("_orig_mod.", "").removeprefix("module."): v for k, v in state.items()}
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            have, want = (tuple(s[name].shape) if name in s else None for s in (state, expected))
            raise UserError(f"{path}: {brief(name)} has shape {have}, expected {want}.")
        if not state[name].isfinite().all():
            raise UserError(f"{path}: {name} has numbers that are not finite: the file is useless.")
    denoiser = denoiser.to_empty(device=device)
    denoiser.load_state_dict(state)
    return denoiser.eval()


# ######## Part B: what every training loop needs #################################################
# == 5. Options ===================================================================================


Count, Real = Annotated[int, (1, 1e18)], Annotated[float, (-1e18, 1e18)]  # (lowest, highest)
Probability, Share = Annotated[float, (0, 1)], Annotated[float, (1e-9, 1)]
Positive, Decay = Annotated[float, (1e-9, 1e18)], Annotated[float, (0, 1 - 1e-9)]


@dataclass
class RunConfig:
    """Options of every script. A number is 0 or more, unless its type says something else."""

    data_dir: str = "data"  # where data sets are, or are downloaded to
    teacher: str = ""  # .safetensors of edm_teacher.py, or .pkl of NVlabs/edm; default: the shipped
    sample: str = ""  # only draw --n pictures from this generator: sampled.png in --out, or here
    labels: str = ""  # classes for --sample, like 3,1,4; default: all in turn
    n: Count = 64  # pictures of --sample
    eval_n: int = 1000  # samples behind the numbers of the verdict; 0: no numbers
    seed: int = 0  # of everything random
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cuda, cpu, mps
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/<script>-<k>
    resume: bool = False  # go on with the run in --out, or with the last one
    save_every: Count = 100  # updates between checkpoints

    may_change: ClassVar = ("steps", "amp")  # when a run is resumed; beside the options above

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), "--" + field.name.replace("_", "-")
            notes = [v for v in getattr(field.type, "__metadata__", ()) if isinstance(v, tuple)]
            low, high = [*notes, (0, 1e18)][0]
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise UserError(f"{flag} {value}: must be from {low:g} to {high:g}.")
            if get_origin(field.type) is Literal and value not in get_args(field.type):
                raise UserError(f"{flag} {value}: choose {', '.join(get_args(field.type))}.")
        if self.labels and not self.sample:
            raise UserError("--labels is for --sample: training draws all classes.")


@dataclass
class BackboneConfig(RunConfig):
    """Options for --teacher sd15:PATH_OR_HUB_ID, sdxl:, flux:, wan:, cogvideox:, cosmos:."""

    prompts: str = ""  # for --teacher sd15:PATH and the like: a file of prompts, one a line
    size: str = ""  # of their pictures: height,width[,frames]; default: the model's
    lora_rank: int = 0  # trains adapters on one copy of their weights; 0: copies
    gradient_checkpointing: bool = False  # of their blocks: less memory, more time
    amp: bool = False  # bfloat16 autocast: faster where the hardware has it

    def __post_init__(self):
        super().__post_init__()
        if ":" not in self.teacher[2:] and (self.prompts or self.size or self.lora_rank):
            raise UserError(
                "--prompts, --size and --lora-rank are for --teacher sd15: and the like."
            )


def run_command(main, config, description: str) -> None:
    """main(options of the command line). What the user can mend ends it with one sentence."""
    import tyro

    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # where σ cannot be printed, it is a ?
    try:
        main(tyro.cli(config, description=description.splitlines()[0]))
    except BrokenPipeError:  # as by | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. --resume goes on from the last checkpoint.")


@contextlib.contextmanager
def or_warn(what: str):
    """What fails inside is a warning: nothing optional ends a run."""
    try:
        yield
    except Exception as error:
        print(f"Warning: no {what} ({brief(error)}).")


def numbers(text: str) -> list[int]:
    try:
        return [int(v) for v in text.split(",") if v]
    except ValueError:
        raise UserError(f"{text!r}: expected numbers with commas between them, like 2,2.") from None


def class_labels(n: int, label_dim: int, text: str = "", device="cpu") -> Tensor | None:
    """n classes: those of "3,1,4" again and again, or all in turn; None if label_dim is 0."""
    wanted = numbers(text) or range(label_dim)
    if not all(0 <= v < label_dim for v in wanted):
        raise UserError(f"--labels {text}: expected numbers from 0 to {label_dim - 1}, like 3,1,4.")
    return torch.tensor(wanted, device=device)[torch.arange(n) % len(wanted)] if label_dim else None


# == 6. The run: folder, log, checkpoint, resume ==================================================
WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # one process or N write alike
PARTLY = dataclasses.replace(WHOLE, strict=False)  # what got no gradient has no moments


def fingerprint(value) -> str:
    """Of the file or folder that an option names: a run goes on with the same or not at all."""
    path = Path(value.partition(":")[2] or value) if value and isinstance(value, str) else Path("?")
    if path.is_dir():
        return " ".join(sorted(p.name for p in path.iterdir() if p.name[0] not in "._"))
    return f"{zlib.crc32(path.read_bytes()):x}" if path.is_file() else ""


class Run:
    """A run's folder: run.json (the options), log.jsonl, checkpoint.pt, pictures, result.json."""

    def __init__(self, cfg, script: str, folder: Path | None = None):
        if folder is None:  # else a stage of a run, which goes on with its random numbers
            set_up(cfg)
        self.cfg, self.started, self.earlier, self.resumed_from = cfg, time.time(), 0.0, 0
        runs = [p for p in Path("runs").glob(f"{script}-*") if p.name[len(script) + 1 :].isdigit()]
        runs = [p for p in runs if not cfg.resume or any(p.rglob("checkpoint.pt"))]
        k = max((int(p.name[len(script) + 1 :]) for p in runs), default=-1) + (not cfg.resume)
        self.folder = Path(from_first(str(folder or cfg.out or f"runs/{script}-{max(k, 0)}")))
        self.options = {"script": script, "config": dataclasses.asdict(cfg)}
        free = {f.name for f in dataclasses.fields(RunConfig)} - {"seed", "teacher"}
        self.fixed = {k: v for k, v in vars(cfg).items() if k not in free.union(cfg.may_change)}
        self.options["inputs"] = {name: fingerprint(value) for name, value in self.fixed.items()}
        self.lock, path = None, self.path("run.json")
        if path.exists() and not cfg.sample:
            self.check_options(path)
        if cfg.resume and not folder and not rank():
            print(f"The run in {self.folder} goes on." if path.exists() else f"New: {self.folder}")

    def check_options(self, path: Path) -> None:
        """UserError unless this start goes on with the run that is in the folder."""
        changed = []
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["script"] != self.options["script"]:
                changed.append(before["script"] + ".py")
            for name, value in self.fixed.items():
                old, flag = before["config"].get(name), "--" + name.replace("_", "-")
                if old != value:
                    changed.append(f"{flag} {old}, not {value}")
                elif before["inputs"][name] != self.options["inputs"][name]:
                    changed.append(f"another content of {flag} {value}")
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: delete it, or choose another --out.") from None
        if changed or not self.cfg.resume:
            what = f"was run with {changed[0]}: take the same" if changed else ""
            what = what or "holds a run: add --resume to go on"
            raise UserError(f"{self.folder} {what}, or another --out.")

    def begin(self) -> None:
        """Writes run.json at the first use of the folder, and locks it for the time of this run."""
        if self.lock or rank():
            return
        self.write("run.json", self.options)
        self.lock = self.path(".lock").open("w")
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"Another process trains in {self.folder}: see --out.") from None

    def path(self, name: str) -> Path:
        return self.folder / name

    def write(self, name: str, value: dict) -> None:
        text = json.dumps(value, indent=1) + "\n"
        write_atomic(self.path(name), lambda tmp: tmp.write_text(text, encoding="utf-8"))

    def once(self, name: str, make) -> dict[str, Tensor]:
        """The tensors in file `name` of the folder; the first process makes them if need be."""
        self.begin()  # first: they belong to these options
        if not rank() and not self.path(name).exists():
            save_tensors(self.path(name), make())
        from_first(None)  # the others wait
        try:
            return load_tensors(self.path(name))[0]
        except UserError as error:
            raise UserError(f"{error} Delete it: it is made again.") from None

    def load(self, trained: dict[str, tuple]) -> int:
        """Puts checkpoint.pt into {name: (network, optimizer or None)}; returns its step, or 0."""
        self.begin()
        set_random_states(self.cfg.seed)  # step 1 is the same, whatever came before
        path = self.path("checkpoint.pt")
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                for name, (network, optimizer) in trained.items():
                    weights, moments = state["trained"][name]
                    dcp.set_model_state_dict(network, weights, options=WHOLE)
                    if optimizer:
                        dcp.set_optimizer_state_dict(network, optimizer, moments, options=PARTLY)
                    for p, state_of_p in (optimizer.state if optimizer else {}).items():
                        for k, v in state_of_p.items():
                            if v.shape == p.shape:  # fused AdamW needs the memory layout of p
                                state_of_p[k] = torch.empty_like(p).copy_(v)
                set_random_states(self.cfg.seed + state["step"], state["random"])
                self.resumed_from, self.earlier = state["step"], state["seconds"]
            except Exception as error:  # whatever a damaged file makes torch raise
                raise UserError(
                    f"{path} is damaged, of an older version or of other networks "
                    f"({brief(error)}): delete it, or choose another --out."
                ) from None
        kept = [json.dumps(line) for line in self.read_log() if line["step"] <= self.resumed_from]
        text = "".join(line + "\n" for line in kept)
        write_atomic(self.path("log.jsonl"), lambda tmp: tmp.write_text(text))
        return self.resumed_from

    def save(self, step: int, trained: dict[str, tuple]) -> None:
        """checkpoint.pt: weights, optimisers, random states. All processes have to call it."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        random = torch.get_rng_state(), cuda
        state = {"step": step, "seconds": self.seconds(), "random": everywhere(random)}
        state["trained"] = {}
        for name, (network, optimizer) in trained.items():
            moments = optimizer and dcp.get_optimizer_state_dict(network, optimizer, options=WHOLE)
            state["trained"][name] = whole_state(network), moments
        write_atomic(self.path("checkpoint.pt"), lambda tmp: torch.save(state, tmp))

    def bar(self, start: int, steps: int) -> tqdm:
        """The steps that are left, with a progress bar."""
        how = {"initial": min(start, steps), "total": steps, "disable": rank() > 0}
        self.progress = tqdm(range(start + 1, steps + 1), **how)
        return self.progress

    def log(self, step: int, values: dict, every: int = 10) -> None:
        """A line in log.jsonl and the progress bar, every so many steps."""
        if not rank() and (step % every == 0 or step == 1):
            values = {k: torch.as_tensor(v).item() for k, v in values.items()}
            with self.path("log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step} | values) + "\n")
            self.progress.set_postfix({k: f"{v:.3g}" for k, v in values.items()})

    def read_log(self) -> list[dict]:
        """The lines of log.jsonl; a half-written last one is left out."""
        path = self.path("log.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def update(self, step: int, name: str, network, optimizer, loss: Tensor, clip: float) -> None:
        """One optimiser step with clipped gradients; a NaN stops the run, not the weights."""
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(network.parameters(), clip)
        for what, value in ("loss", loss), ("gradient", norm):
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if not value.isfinite():
                raise UserError(
                    f"Step {step}: {name} {what} is not finite. Lower a learning rate; "
                    f"{self.path('checkpoint.pt')}, if it was written, is from before."
                )
        optimizer.step()

    def seconds(self) -> float:
        return self.earlier + time.time() - self.started

    @or_warn("picture")
    @torch.no_grad()
    def pictures(self, step: int, denoiser, sampler, *others) -> None:
        """samples_<step>.png from fixed z; denoised.png: rows x, x_t at σ = 1, D(x_t) of others."""
        seed, device = self.cfg.seed + 20000, self.cfg.device
        x = denoiser.draw(self.path(f"samples_{step}.png"), sampler, seed)
        if not denoiser.latents:
            x, labels = x[:16].to(device), class_labels(16, denoiser.label_dim, device=device)
            x_t, sigma = x + noise(denoiser, 16, seed + 10000).to(device), torch.ones(16).to(device)
            save_grid(self.path("denoised.png"), x, x_t, *(D(x_t, sigma, labels) for D in others))

    def draw_samples(self, denoiser, sampler, **how) -> dict:
        """--sample: a picture of --n samples of the wanted --labels, without training."""
        path, cfg = Path(self.cfg.out or ".") / "sampled.png", self.cfg
        labels = class_labels(cfg.n, denoiser.label_dim, cfg.labels)
        denoiser.draw(path, sampler, cfg.seed, labels, cfg.n, **how)
        print(f"{cfg.n} samples: {path}")
        return {}

    def finish(self, metrics: dict) -> dict:
        """Prints the verdict; writes and returns result.json."""
        cuda = torch.device(self.cfg.device).type == "cuda"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        processor = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
        result = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "config": self.options["config"],
            "seed": self.cfg.seed,
            "versions": versions | {"torchvision": torchvision.__version__},
            "device": torch.cuda.get_device_name() if cuda else processor,
            "seconds": round(self.seconds(), 1),
            "peak_memory_mb": round(peak_memory_mb(cuda), 1),
            "resumed_from": self.resumed_from,
            "metrics": metrics,
        }
        self.begin()
        self.write("result.json", result)
        print("\n" + " " * 18 + "".join(f"{name:>14}" for name in metrics))
        for key in dict.fromkeys(key for row in metrics.values() for key in row):
            cells = [row.get(key, "") for row in metrics.values()]
            cells = [f"{v[0]:.3g}..{v[-1]:.3g}" if isinstance(v, list) else v for v in cells]
            cells = [v if isinstance(v, str) else f"{v:.4g}" for v in cells]
            print(f"{key.replace('_', ' '):18}" + "".join(f"{v:>14}" for v in cells))
        print(f"{result['seconds']:.0f} s on {result['device']}; pictures are in {self.folder}/")
        return result


def peak_memory_mb(cuda: bool) -> float:
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# == 7. Processes: one, or several by torchrun --nproc-per-node N script.py, sharded by FSDP2 =====


def set_up(cfg) -> None:
    """Threads, seed and device; under torchrun the processes are made known to each other."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    try:
        if processes > 1 and cfg.device == "cuda":  # before the first tensor
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device} cannot be used here ({brief(error)}).") from None
    if processes > 1 and not dist.is_initialized():
        day = datetime.timedelta(days=1)  # the others wait while the first makes pairs
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=day)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def rows(batch: int) -> int:
    """Samples of this process."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if batch % processes:
        raise UserError(f"A batch of {batch} cannot be split over {processes} processes.")
    return batch // processes


def everywhere(value) -> list:
    """What each process has, in all of them."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def from_first(value):
    """What the first process has, in all of them. They wait for each other."""
    return everywhere(value if not rank() else None)[0]


def set_random_states(seed: int, states=()) -> None:
    """(CPU's, GPU's) of each process; or each starts with its own from the seed."""
    torch.manual_seed(seed + 1_000_003 * rank())
    if len(states) == len(everywhere(None)):
        cpu, cuda = states[rank()]
        torch.set_rng_state(cpu)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda)


def averaged(x: Tensor) -> Tensor:
    """The mean of x over the processes; no gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def shard(*networks: nn.Module) -> None:
    """Weights, gradients and optimiser states are split over the processes, if there are several.

    Make copies before. Weights are whole inside `forward` alone: call nothing else. Adapters are
    small: they, and what is trained with them, stay whole."""
    small = any(getattr(network, "is_adapter", False) for network in networks)
    for network in networks if dist.is_initialized() else ():
        if small:
            replicate(network)
            continue
        for p in network.parameters():  # FSDP2 knows no channels-last
            p.data = p.data.contiguous()
        units = network.units() if isinstance(network, Denoiser) else []
        for part in [*units, network]:  # gathered one by one
            fully_shard(part, reshard_after_forward=True)


def replicate(network: nn.Module) -> None:
    """For small networks, and where gradients are differentiated again: whole everywhere."""

    def average(p):
        p.grad = averaged(p.grad)

    for p in network.parameters() if dist.is_initialized() else ():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(average)


def whole_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, in the first process; all have to call it."""
    return dcp.get_model_state_dict(network, options=WHOLE)


def whole(network: nn.Module, like: nn.Module, last: bool = True) -> nn.Module:
    """After training: the network in one piece, a copy of `like`; last: the others end here."""
    if not dist.is_initialized():
        return network
    state, network = from_first(whole_state(network)), copy.deepcopy(like)
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


# == 8. Networks in training, samples, drawn data =================================================


def trainable_copy(denoiser: Denoiser) -> Denoiser:
    """The same weights, ready to be trained, dropout and label dropout off (as DMD does)."""
    network = copy.deepcopy(denoiser).requires_grad_(True).train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(module, SongUNet):
            module.label_dropout = 0.0
    return network


@torch.no_grad()
def ema_update(ema: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """ema <- d ema + (1 - d) network, in place, with d = min(decay, step / (4 + step)).

    Until d = decay the memory grows with the run: about its last quarter."""
    decay = min(decay, step / (4 + step))
    for averaged, p in zip(ema.parameters(), network.parameters(), strict=True):
        averaged.lerp_(p, 1 - decay)
    for copied, buffer in zip(ema.buffers(), network.buffers(), strict=True):
        copied.copy_(buffer)


def noise(denoiser: Denoiser, n: int, seed: int) -> Tensor:
    """n latents z ~ N(0, I) of the denoiser's shape, the same for every denoiser of that shape."""
    return torch.randn(n, *denoiser.shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def own_random_numbers(seed: int):
    """Random numbers from `seed` inside; those outside go on as if nothing had happened."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def in_batches(sampler, z: Tensor, labels: Tensor | None, device, batch: int = 250) -> Tensor:
    """sampler(z, labels), batch by batch; the result is on the CPU."""
    out = []
    for i in tqdm(range(0, len(z), batch), desc="sampling", leave=False, disable=rank() > 0):
        y = None if labels is None else labels[i : i + batch].to(device)
        out.append(sampler(z[i : i + batch].to(device), y).float().cpu())
    return torch.cat(out)


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]; latents, which are floats, stay."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(path, *rows: Tensor, columns: int = 16) -> None:
    """A picture: images (B, C, H, W) in [-1, 1], `columns` in a row, one set below the other."""
    grid = make_grid(to_uint8(torch.cat(rows).cpu()), columns, pad_value=127)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    write_atomic(path, lambda tmp: image.save(tmp, format="PNG"))


def synthetic(n: int, resolution: int = 28, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes of drawn shapes - disc, square, ring, cross - at random places and sizes.

    uint8 images (n, 1, H, W) and labels (n,): data that need no file and no download."""
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


def load_images(cfg, resolution: int, channels: int) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and labels (N,) of --data."""
    if cfg.data == "synthetic":
        return synthetic(2048, resolution)
    from tools.data import load_data

    return load_data(cfg.data, cfg.data_dir, resolution=resolution, channels=channels)


def load_metric(cfg, run: Run, denoiser: Denoiser):
    """Measures the verdict; None with --eval-n 0, for latents, few images, or without tools/."""
    try:
        from tools.metrics import get_metric
    except ModuleNotFoundError:
        return print("There is no folder tools/ beside this file: no verdict.")
    return get_metric(cfg, run.folder, denoiser)


def default_teacher(cfg, run: Run) -> EDMPrecond:
    """The one in assets/ for --data; for synthetic a small one, trained once for a run's folder."""
    path = ASSETS / f"{cfg.data}_teacher.safetensors"
    if cfg.data == "synthetic":
        path = run.path("teacher/teacher.safetensors")
        if not path.exists():
            run.begin()
            small = {"model_channels": 16, "steps": 300, "batch": 64, "data": "synthetic"}
            own = {"out": str(path.parent), "resume": True, "device": cfg.device, "seed": cfg.seed}
            own = Config(**small, **own, threads=cfg.threads)
            train(own, Run(own, "edm_teacher"), *synthetic(2048)).save(path)
        from_first(None)  # the others wait for the file
    elif not path.exists():
        make = f"python edm_teacher.py --data {cfg.data}"
        raise UserError(f"No teacher for {cfg.data} is shipped: make one by {make}, see --teacher.")
    return load_denoiser(path, cfg.device)


# ######## Part C: the script. Trains a teacher ###################################################


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder of class folders with images
    resolution: Count = 32  # of the images of a folder
    init: str = ""  # start from this .safetensors file's network instead of a fresh one
    model_channels: Count = 32  # width of the network; CIFAR-10's EDM network has 128
    channel_mult: str = "2,2"  # width multiplier per resolution; EDM 2,2,2
    num_blocks: Count = 1  # residual blocks per resolution; EDM 4
    attn_resolutions: str = ""  # resolutions with self-attention beside the bottleneck; EDM 16
    patch_size: Count = 2  # fold p x p pixels into channels: faster; EDM 1
    dropout: Probability = 0.0  # EDM 0.13
    p_mean: Real = -1.2  # mean of ln sigma in training
    p_std: float = 1.2  # standard deviation of ln sigma in training
    stable_target: bool = False  # target: mean of the class's images given x_t, not one image
    label_dropout: Probability = 0.1  # share of images without a label; makes guidance possible
    steps: int = 12000  # optimiser steps
    batch: Count = 128  # images a step
    lr: float = 2e-3  # Adam's learning rate after the warm-up; decays to 0 along a cosine
    ema: Decay = 0.999  # decay of the average of the weights that becomes the teacher
    amp: bool = False  # bfloat16 autocast while training: faster where the hardware has it
    compile: bool = False  # torch.compile while training: faster after a minute of compiling
    half: bool = False  # write teacher.safetensors in float16
    sample_steps: Count = 18  # Heun steps N of pictures and verdict: 2 N - 1 network calls
    guidance: float = 1.0  # weight of classifier-free guidance when sampling; 1 is off
    s_churn: float = 0.0  # noise added before each step (EDM Alg. 2): up to 0.41 x --sample-steps
    fid: bool = False  # measure FID too (pip install torch-fidelity); slow without a GPU
    eval_n: int = 10000  # samples behind the numbers of the verdict; 0: no numbers
    save_every: Count = 500  # steps between checkpoints

    may_change: ClassVar = ("steps", "amp", "compile", "half", "sample_steps")


def train(cfg: Config, run: Run, images: Tensor, labels: Tensor) -> EDMPrecond:
    """Minimises edm_loss; returns the average (EMA) of the weights, sharded as they are."""
    device = torch.device(cfg.device)
    same = ("model_channels", "num_blocks", "dropout", "label_dropout", "patch_size")
    network = {name: getattr(cfg, name) for name in same}
    network |= {name: numbers(getattr(cfg, name)) for name in ("channel_mult", "attn_resolutions")}
    data = images.shape[-1], images.shape[1], int(labels.max()) + 1  # resolution, channels, classes
    if cfg.init:
        denoiser = load_denoiser(cfg.init, device).train()
        have = denoiser.shape[-1], denoiser.shape[0], denoiser.label_dim
        if have != data:
            raise UserError(f"--init {cfg.init} has (resolution, channels, classes) {have}.")
    else:
        denoiser = EDMPrecond(SongUNet(*data, **network)).to(device)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    shard(denoiser, ema)
    optimizer = torch.optim.Adam(denoiser.parameters(), cfg.lr, betas=(0.9, 0.99))
    fast = torch.compile(denoiser) if cfg.compile else denoiser
    images, labels = images.to(device), labels.to(device)
    target = None
    if cfg.stable_target:
        from tools.data import PosteriorMean

        target = PosteriorMean(images, labels)
    trained = {"denoiser": (denoiser, optimizer), "ema": (ema, None)}
    start = run.load(trained)
    for step in run.bar(start, cfg.steps):
        warm_up, decay = min(1, step / 200), (1 + math.cos(math.pi * step / cfg.steps)) / 2
        optimizer.param_groups[0]["lr"] = cfg.lr * warm_up * decay
        i = torch.randint(len(images), (rows(cfg.batch),), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp):
            x = to_float(images[i])
            loss = edm_loss(fast, x, labels[i], cfg.p_mean, cfg.p_std, target)
        run.update(step, "teacher", denoiser, optimizer, loss, 10.0)
        ema_update(ema, denoiser, cfg.ema, step)
        run.log(step, {"loss": loss}, every=50)
        if step % cfg.save_every == 0 or step == cfg.steps:
            run.save(step, trained)
            sampler = partial(heun_sampler, ema, steps=cfg.sample_steps)
            with or_warn("picture"):
                ema.draw(run.path(f"samples_{step}.png"), sampler, cfg.seed)
    return ema


def main(cfg: Config) -> dict:
    """Trains, or with cfg.sample only draws; returns what result.json holds."""
    run = Run(cfg, "edm_teacher")
    if cfg.sample:
        denoiser = load_denoiser(cfg.sample, cfg.device)
        how = {"steps": cfg.sample_steps, "guidance": cfg.guidance, "s_churn": cfg.s_churn}
        return run.draw_samples(denoiser, partial(heun_sampler, denoiser, **how))
    images, labels = load_images(cfg, 28 if cfg.data == "synthetic" else cfg.resolution, 3)
    drawn = Denoiser(nn.Identity(), images.shape[1:], int(labels.max()) + 1)
    metric = load_metric(cfg, run, drawn)
    denoiser = train(cfg, run, images, labels)
    denoiser = whole(denoiser, EDMPrecond(SongUNet(**denoiser.model.config)).to(cfg.device).eval())
    save_denoiser(denoiser, run.path("teacher.safetensors"), torch.float16 if cfg.half else None)
    if metric is None:
        return run.finish({})
    from tools.evaluate import evaluate

    return run.finish(evaluate(cfg, run, denoiser, metric))


if __name__ == "__main__":
    import edm_teacher  # the module that tools/ imports, not a second copy of it

    edm_teacher.run_command(edm_teacher.main, edm_teacher.Config, __doc__)
