"""D(x; σ, cond) around a network F of diffusers, and what the scripts ask of a denoiser beside it.

x: noisy latents x + σ ε of a VAE, (B, C, H, W) or (B, C, F, H, W). sigma: (B,), of Wan also (B, F).
cond: a dict of tensors (B, ...); or rows (B,) of use_prompts' table, like class labels; -1 or None:
no condition, an empty prompt (SDXL: zeros), and for None also the first picture of the table.
Pixels are (B, 3, H, W) or (B, 3, F, H, W), in [-1, 1].
"""

import contextlib
import inspect
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms.v2.functional import pil_to_tensor

import edm_teacher as edm
from edm_teacher import UserError, expand, guided

# --- preconditioning: D = c_skip x + c_out F(c_in x; t)                        EDM Eq. 7, Table 1
PRECONDITIONING = {  # what F predicts: σ -> (c_skip, c_out, c_in)
    "epsilon": lambda s: (torch.ones_like(s), -s, (1 + s**2).rsqrt()),
    "v_prediction": lambda s: (1 / (1 + s**2), -s * (1 + s**2).rsqrt(), (1 + s**2).rsqrt()),
    "flow": lambda s: (1 / (1 + s), -s / (1 + s), 1 / (1 + s)),
}


class VP:
    """√ᾱ x + √(1-ᾱ) ε: σ = √(1/ᾱ - 1) <= 10,000, t its place in the table, linear in ln σ."""

    def __init__(self, alphas_cumprod: Tensor, prediction: str):
        self.table = (1 / alphas_cumprod.double() - 1).sqrt().clamp_max(1e4).log()
        self.sigma_min, self.sigma_max = self.table[[0, -1]].exp().tolist()
        self.coefficients, self.index = PRECONDITIONING[prediction], range(len(self.table))
        self.sigma_data = math.inf if prediction == "epsilon" else 1.0  # EDM's λ = 1/c_out²

    def time(self, sigma: Tensor) -> Tensor:
        t = np.interp(sigma.cpu().double().log(), self.table, self.index)
        return torch.as_tensor(t).to(sigma)

    def sigma_of(self, u: Tensor) -> Tensor:
        log = np.interp(u.cpu().double() * self.index[-1], self.index, self.table)
        return torch.as_tensor(log).exp().to(u)


class Flow:
    """(1-t) x + t ε, F = ε - x: σ = t/(1-t), 0.001 <= t <= 0.9999, as t = 1 would be σ = ∞.

    sigma_of: t = s u / (1 + (s-1) u) with the shift s, or if it is None EDM's levels (Cosmos)."""

    sigma_data = 1.0  # 1/σ² + 1/σ_data² is within a factor of two of 1/c_out² = (1 + 1/σ)²
    coefficients = staticmethod(PRECONDITIONING["flow"])

    def __init__(self, shift: float | None = 1.0):
        ends = (0.002, 80.0) if shift is None else (0.001 / (1 - 0.001), 0.9999 / (1 - 0.9999))
        self.shift, (self.sigma_min, self.sigma_max) = shift, ends

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def sigma_of(self, u: Tensor) -> Tensor:
        if self.shift is None:
            return torch.lerp(*(u.new_tensor(s) ** (1 / 7) for s in (0.002, 80.0)), u) ** 7
        return (self.shift * u / (1 - u)).clamp(self.sigma_min, self.sigma_max)


def schedule_of(scheduler, shape) -> VP | Flow:
    """The noise levels of a scheduler of diffusers, for latents of this shape."""
    config, name = scheduler.config, type(scheduler).__name__
    predicts = "flow_prediction" if "FlowMatch" in name else config.get("prediction_type")
    if predicts in ("epsilon", "v_prediction") and hasattr(scheduler, "alphas_cumprod"):
        if predicts == "epsilon" and scheduler.alphas_cumprod[-1] < 1e-6:
            raise UserError("zero terminal SNR, where ε tells nothing: take one of v_prediction")
        return VP(scheduler.alphas_cumprod, predicts)
    if predicts != "flow_prediction":
        known = "epsilon or v_prediction with alphas, flow_prediction"
        raise UserError(f"a {name} with prediction_type {predicts}; known are {known}")
    if config.get("use_dynamic_shifting"):  # FLUX.1-dev: by the number of its tokens
        low, high = config.base_image_seq_len, config.max_image_seq_len
        share = (shape[1] * shape[2] / 4 - low) / (high - low)
        return Flow(math.exp(config.base_shift + share * (config.max_shift - config.base_shift)))
    shift = config.get("flow_shift") or config.get("shift", 1.0)
    return Flow(None if config.get("use_karras_sigmas") else shift)


# --- the denoiser ---
class Mode:
    """What a call depends on beside its arguments; blocks that are computed again see the same."""

    role, adapters = None, False  # see lora.py
    mask, past, start, kv = None, {}, 0, None  # see causal_wan.py

    @contextlib.contextmanager
    def set(self, **values):
        before = {name: getattr(self, name) for name in values}
        try:
            vars(self).update(values)
            yield
        finally:
            vars(self).update(before)

    def recompute(self, block, *args):
        then = self.set(role=self.role, mask=self.mask, past=self.past)
        return checkpoint(then(block), *args, use_reentrant=False)


class Stop(Exception):
    """Ends a forward pass after the last feature that is wanted."""


class Backbone(edm.Denoiser):
    """D(x; σ, cond) = c_skip x + c_out F(c_in x; t(σ), cond), in float32 whatever F computes in.

    return_features=True also returns activations as maps (B, C, *grid): of a U-Net's encoder the
    last per resolution, finest first, bottleneck last; of a transformer those of blocks `taps`, as
    in FastGen (15, 22, 29 of 30). "only" stops after the last and returns (None, features)."""

    latents = True
    part, packages, needs = "transformer", (), ()  # of a folder; to encode prompts; to read it
    stream, folded = None, 1  # which of a block's outputs is the image's; latent pixels in a token
    default_size = (512, 512)  # or height, width, frames
    side = 2  # of latents, a multiple of it
    encoded, tokens = ("text",), None  # results of the pipeline's encode_prompt; their length
    blocks = property(lambda self: list(self.model.transformer_blocks))
    patch = property(lambda self: self.model.config.patch_size)
    needs_picture = property(lambda s: s.model.config.in_channels > s.shape[0] * s.folded)
    pixels = property(lambda self: [self.codec.shrink * n for n in self.shape[-2:]])
    frames = property(lambda self: 4 * self.shape[1] - 3 if len(self.shape) == 4 else 1)
    device = property(lambda self: next(self.parameters()).device)

    def __init__(self, model: nn.Module, schedule, codec, shape):
        super().__init__(model, shape)
        self.schedule, self.codec, self.mode, self.dtype = schedule, codec, Mode(), model.dtype
        self.sigma_min, self.sigma_max = schedule.sigma_min, schedule.sigma_max
        self.sigma_data, n = schedule.sigma_data, len(self.blocks)
        self.taps = range(n) if self.part == "unet" else sorted({n // 2, 3 * n // 4, n - 1})

    def sigma_of(self, u: Tensor, schedule=None) -> Tensor:
        return self.schedule.sigma_of(u)

    def forward(self, x: Tensor, sigma, cond=None, return_features=False):
        x = x.to(torch.promote_types(self.dtype, torch.float32))
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = sigma if sigma.ndim == 2 else sigma.expand(len(x))
        s = sigma[:, None, :, None, None] if sigma.ndim == 2 else expand(sigma, x)
        c_skip, c_out, c_in = self.schedule.coefficients(s)
        features = []

        def keep(block, args, output):
            features.append(self.feature_map(output, x.shape))
            if len(features) == len(self.taps) and return_features == "only":
                raise Stop

        with contextlib.suppress(Stop), contextlib.ExitStack() as hooks:
            for i in self.taps if return_features else ():
                hooks.enter_context(self.blocks[i].register_forward_hook(keep))
            inputs = (c_in * x).to(self.dtype), self.schedule.time(sigma)
            out = self.network(*inputs, self.condition(cond, len(x)))
        if return_features == "only":
            return None, features
        denoised = c_skip * x + c_out * out.to(x.dtype)
        return (denoised, features) if return_features else denoised

    def feature_map(self, output, shape) -> Tensor:
        """Tokens (B, N, C) of a block -> (B, C, *grid)."""
        tokens = output if self.stream is None else output[self.stream]
        return tokens.unflatten(1, self.grid(shape)).movedim(-1, 1)

    def grid(self, shape) -> list[int]:
        return [n // p for n, p in zip(shape[2:], self.patch, strict=True)]

    def units(self) -> list[nn.Module]:
        return self.blocks

    def gradient_checkpointing(self) -> None:
        self.model.enable_gradient_checkpointing(self.mode.recompute)

    def save(self, path) -> None:
        """A folder that diffusers reads."""
        self.model.save_pretrained(path, is_main_process=not edm.rank())

    # --- conditions ---
    def condition(self, cond, n: int) -> dict:
        """None, rows of the table or a dict -> a dict of n rows each (-1: as many), in F's type."""
        if not isinstance(cond, dict):
            rows = torch.tensor([-1]) if cond is None else cond.cpu()
            cond = {k: v[rows.clamp_min(0)] for k, v in self.codec.table.items()}
            for k, v in self.nothing().items() if (rows < 0).any() else ():
                cond[k] = torch.where(expand(rows < 0, v), v, cond.get(k, v))
        return {k: v.to(self.device, self.dtype).expand(n, *v.shape[1:]) for k, v in cond.items()}

    def no_condition(self, cond) -> dict:
        """The same without its text; a given picture stays, as in the pipelines."""
        return self.condition(cond, -1) | self.nothing()

    def nothing(self) -> dict:
        self.codec.nothing = self.codec.nothing or self.encode_prompts([""])
        return self.codec.nothing

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict:
        """{"text": (B, N, C), ...} by the pipeline's own tokenizer and text encoder."""
        encode = self.codec.pipe.encode_prompt
        how = {"device": self.device, "max_sequence_length": self.tokens}
        how |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        takes = inspect.signature(encode).parameters
        found = encode(prompts, **{k: v for k, v in how.items() if k in takes})
        return {k: v for k, v in zip(self.encoded, found, strict=False) if k}

    def use_prompts(self, prompts: list[str], images=()) -> None:
        """Encodes them, and the images (3, H, W) where videos start; then labels are table rows."""
        rows = []
        for prompt, image in itertools.zip_longest(prompts, images):
            start = {} if image is None else self.encode_start(image[None])
            rows.append({k: v.cpu() for k, v in (self.encode_prompts([prompt]) | start).items()})
        self.codec.table = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        self.codec.prompts, self.label_dim = prompts, len(prompts)
        self.nothing()
        self.codec.loaded = None  # text encoders leave memory

    # --- pixels and latents ---
    @torch.no_grad()
    def encode_images(self, x: Tensor) -> Tensor:
        x = x.to(self.codec.vae.device, self.codec.vae.dtype)
        mean, std = self.codec.scale(x)
        return (self.codec.vae.encode(x).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        vae, (mean, std) = self.codec.vae, self.codec.scale(x)
        return vae.decode((x * std + mean).to(vae.device, vae.dtype)).sample.float()

    # --- for the scripts ---
    def real_images(self, cfg, run) -> tuple[Tensor, Tensor]:
        """(x (N, *shape), labels (N,)) for the GAN, made once for a run."""
        made = run.once("latents.safetensors", lambda: self.make_latents(cfg))
        return made["x"], made["labels"]

    def make_latents(self, cfg) -> dict[str, Tensor]:
        """Of --data FOLDER: class folder k, by name, has prompt k. Else --pairs samples of ours."""
        if cfg.data not in ("mnist", "cifar10", "synthetic"):
            from tools.data import class_folders

            kinds, items = class_folders(cfg.data), {}
            if len(kinds) > self.label_dim:
                raise UserError(f"--data {cfg.data}: --prompts needs {len(kinds)} lines.")
            for k, (kind, files) in enumerate(kinds.items()):
                print(f"The images in {kind} have the prompt {self.codec.prompts[k]!r}.")
                for file in files:
                    item = file if self.frames == 1 or file.parent == kind else file.parent
                    items.setdefault((item, k), []).append(file)
            x = torch.cat([self.encode_images(self.read(f)[None]).cpu() for f in items.values()])
            return {"x": x, "labels": torch.tensor([k for _, k in items])}
        if not cfg.teacher_steps:
            raise UserError("--teacher-steps 0: the latents for the GAN need 1 or more.")
        labels = torch.arange(cfg.pairs) % self.label_dim
        sampler = partial(euler_sampler, self, steps=cfg.teacher_steps, guidance=cfg.guidance)
        z = edm.noise(self, cfg.pairs, cfg.seed + 10000)
        x = edm.in_batches(sampler, z, labels, self.device, edm.rows(cfg.batch))
        return {"x": x, "labels": labels}

    def read(self, files: list[Path]) -> Tensor:
        """An image (3, H, W); or a video (3, F, H, W), the first frames in a folder."""
        if len(files) < self.frames:
            raise UserError(f"{files[0]}: a folder with {self.frames} frames or more is needed.")
        x = torch.stack([read_image(file, *self.pixels) for file in files[: self.frames]], 1)
        return x if len(self.shape) == 4 else x[:, 0]

    def draw(self, path, sampler, seed: int, labels=None, n=None, frames=None) -> None:
        """A picture of sampler(z, labels) from fixed z, below their prompts; four frames of videos.

        Without labels: four samples, or a video, of each of the first four prompts, n at most."""
        (c, f, *size), shown = self.shape, {}
        if labels is None:
            each = 1 if self.frames > 1 else 4
            labels = torch.arange(min(4, self.label_dim)).repeat_interleave(each)[:n]
        for row in labels.unique().tolist():
            rows = labels[labels == row]
            with edm.own_random_numbers(seed + row):
                z = torch.randn(len(rows), c, frames or f, *size)
                x = edm.in_batches(lambda z, y: self.decode(sampler(z, y)), z, rows, self.device, 1)
            if x.ndim == 5:
                chosen = torch.linspace(0, x.shape[2] - 1, min(4, x.shape[2])).long()
                x = x[:, :, chosen].transpose(1, 2).flatten(0, 1)
            shown[f"{row}. {self.codec.prompts[row]}"] = x
        with contextlib.suppress(ModuleNotFoundError):
            from tools.plot import save_rows

            return save_rows(path, shown, columns=4)
        edm.save_grid(path, *shown.values(), columns=4)


@torch.no_grad()
def euler_sampler(denoiser, z: Tensor, cond=None, steps=28, guidance=1.0, sigmas=None) -> Tensor:
    """x <- D + σ' (x - D) / σ along σ(u) or sigmas, then σ' = 0: DDIM for VP, Euler for flow."""
    if sigmas is None:
        sigmas = denoiser.sigma_of(1 - torch.arange(steps) / steps)
        sigmas[0] = denoiser.sigma_max
    x = z.to(torch.float32 if z.is_mps else torch.float64) * sigmas[0]
    for sigma, after in itertools.pairwise([*sigmas.tolist(), 0.0]):
        denoised = guided(denoiser, x.float(), sigma, cond, guidance)
        x = denoised + after / sigma * (x - denoised)
    return x.to(z.dtype)


def read_image(path, height: int, width: int) -> Tensor:
    """(3, H, W) in [-1, 1]: scaled to fill the size, cut at the edges."""
    from tools.data import open_image

    return edm.to_float(pil_to_tensor(ImageOps.fit(open_image(path), (width, height))))
