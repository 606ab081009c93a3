"""Large backbones: networks of diffusers as the denoisers D(x, σ, cond) that the scripts here take.

Models      sd15, sdxl, flux (dev, schnell), wan (2.1, 2.2: T2V, I2V, VACE; wan-low: the network of
            2.2 A14B for low noise), cogvideox (2B, 5B, I2V), cosmos (Predict2: T2I, V2W)
Shapes      x: latents (B, C, H, W) or (B, C, F, H, W), noisy: x + σ ε.   sigma: (B,)
            cond: dict of tensors (B, ...); or rows (B,) of use_prompts' table, -1: no condition; or
            None: the family's own "no condition", an empty prompt (SDXL: zeros)
Run         wan = load_backbone("wan:Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch.bfloat16, "cuda")
            z, cond = torch.randn(1, *wan.shape, device="cuda"), wan.encode_prompts(["a cat"])
            video = wan.decode(euler_sampler(wan, z, cond, steps=50, guidance=5.0))
            generator, fake, teacher = three_roles(wan, rank=64)        # one copy of the weights
For the scripts not: VACE, the two experts of Wan 2.2 A14B, pictures in causal_video.py.
Tested with tiny random weights. Cosmos' licence wants its guardrail on what you show.
"""

import contextlib
import importlib.util
import inspect
import itertools
import math
import warnings
from functools import cached_property, partial
from operator import truediv
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import torchvision
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import edm_teacher as edm
from edm_teacher import UserError, brief, expand

# ------------------------------------------------------------------------------------------------
# 1. Preconditioning: D = c_skip x + c_out F(c_in x; t)                         EDM Eq. 7, Table 1
# ------------------------------------------------------------------------------------------------
PRECONDITIONING = {  # what F predicts: σ -> (c_skip, c_out, c_in)
    "epsilon": lambda s: (torch.ones_like(s), -s, (1 + s**2).rsqrt()),
    "v_prediction": lambda s: (1 / (1 + s**2), -s * (1 + s**2).rsqrt(), (1 + s**2).rsqrt()),
    "flow": lambda s: (1 / (1 + s), -s / (1 + s), 1 / (1 + s)),
}


class VP:
    """√ᾱ x + √(1-ᾱ) ε: σ = √(1/ᾱ - 1), t its index in the table, linear in ln σ in between.

    At zero terminal SNR σ = ∞ becomes 10,000.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str):
        self.table = (1 / alphas_cumprod.double() - 1).sqrt().clamp_max(1e4).log()
        self.sigma_min, self.sigma_max = self.table[[0, -1]].exp().tolist()
        self.coefficients = PRECONDITIONING[prediction]
        # 1/σ² + 1/σ_data² is 1/c_out² then
        self.sigma_data = math.inf if prediction == "epsilon" else 1.0

    def time(self, sigma: Tensor) -> Tensor:
        table, k = self.axes(sigma)
        return interpolate(sigma.to(table).log(), table, k).to(sigma)

    def sigma_of(self, u: Tensor) -> Tensor:
        table, k = self.axes(u)
        return interpolate(u.to(table) * k[-1], k, table).exp().to(u)

    def axes(self, like: Tensor):
        table = self.table.to(like.device, torch.float32 if like.is_mps else torch.float64)
        return table, torch.arange(len(table)).to(table)


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    x = x.clamp(xs[0], xs[-1])
    i = torch.searchsorted(xs, x.contiguous()).clamp_min(1)
    return torch.lerp(ys[i - 1], ys[i], (x - xs[i - 1]) / (xs[i] - xs[i - 1]))


class Flow:
    """(1-t) x + t ε, F = ε - x: σ = t/(1-t), 0.001 <= t <= 0.9999, as t = 1 would be σ = ∞.

    sigma_of: the shifted t = s u / (1 + (s-1) u); shift = None: EDM's levels, ρ = 7 (Cosmos).
    span: the times t of one of several experts; u = 0 ... 1 are its times alone.
    """

    sigma_data = 1.0  # 1/σ² + 1/σ_data² is within a factor of two of 1/c_out² = (1 + 1/σ)²
    coefficients = staticmethod(PRECONDITIONING["flow"])

    def __init__(self, shift: float | None = 1.0, span=(0.0, 1.0)):
        low, high = max(span[0], 0.001), min(span[1], 0.9999)
        self.shift, self.span = shift, [t / (shift - (shift - 1) * t) for t in span if shift]
        ends = [t / (1 - t) for t in (low, high)] if shift else (0.002, 80.0)
        self.sigma_min, self.sigma_max = ends

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def sigma_of(self, u: Tensor) -> Tensor:
        if self.shift is None:
            return torch.lerp(*(u.new_tensor(s) ** (1 / 7) for s in (0.002, 80.0)), u) ** 7
        u = self.span[0] + u * (self.span[1] - self.span[0])
        return (self.shift * u / (1 - u)).clamp(self.sigma_min, self.sigma_max)


# ------------------------------------------------------------------------------------------------
# 2. The denoiser around a network
# ------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a forward pass after the last feature that is wanted."""


class Backbone(nn.Module):
    """D(x; σ, cond) = c_skip x + c_out F(c_in x; t(σ), cond), in float32 whatever F computes in.

    return_features=True also returns activations: of a U-Net's encoder the last per resolution,
    finest first, bottleneck last; of a transformer those after the blocks `taps`, as maps
    (B, C, *grid). "only" stops after the last of them and returns (None, features).
    Wan and Cosmos take sigma (B, F) too, one level a frame.
    """

    part, pipelines, packages, needs = "transformer", (), (), ()
    stream, folded = None, 1  # which of a block's outputs is the image's; latent pixels in a token
    default_size = (512, 512)  # or height, width, frames

    def __init__(self, model: nn.Module, schedule, codec, shape):
        super().__init__()
        self.model, self.schedule, self.codec, self.shape = model, schedule, codec, tuple(shape)
        self.mode, self.dtype = Mode(), model.dtype
        self.img_channels, self.label_dim = shape[0], 0
        self.sigma_min, self.sigma_max = schedule.sigma_min, schedule.sigma_max
        self.sigma_data, self.sigma_of = schedule.sigma_data, schedule.sigma_of
        n = len(self.blocks())  # FastGen taps 15, 22, 29 of Wan's 30
        self.taps = range(n) if self.part == "unet" else sorted({n // 2, 3 * n // 4, n - 1})

    def fake_weight(self, sigma: Tensor) -> Tensor:
        """1/c_out², EDM's λ: mean weight (D - x)² is the loss on F that the family trained with."""
        return self.schedule.coefficients(sigma)[1] ** -2

    def forward(self, x: Tensor, sigma, cond=None, return_features=False):
        x = x.to(torch.promote_types(self.dtype, torch.float32))
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = sigma if sigma.ndim == 2 else sigma.expand(len(x))
        cond = self.condition(cond, len(x))
        given = cond.get("given_frames")  # (B, F): 1 where cond["given"] has a clean frame
        if given is not None:
            sigma = torch.where(given > 0, self.given_sigma, sigma.reshape(len(x), -1))
            given = given[:, None, :, None, None] > 0
        s = sigma[:, None, :, None, None] if sigma.ndim == 2 else expand(sigma, x)
        c_skip, c_out, c_in = self.schedule.coefficients(s)
        inputs = c_in * x if given is None else torch.where(given, cond["given"], c_in * x)
        features, hooks, blocks = [], [], self.blocks()

        def keep(i, block, args, output):
            features.append(self.feature_map(output, x.shape))
            if i == self.taps[-1] and return_features == "only":
                raise Stop

        if return_features:
            hooks = [blocks[i].register_forward_hook(partial(keep, i)) for i in self.taps]
        try:
            out = self.network(inputs.to(self.dtype), self.schedule.time(sigma), cond)
        except Stop:
            return None, features
        finally:
            for hook in hooks:
                hook.remove()
        denoised = c_skip * x + c_out * out.to(x.dtype)
        denoised = denoised if given is None else torch.where(given, cond["given"], denoised)
        return (denoised, features) if return_features else denoised

    def blocks(self) -> list:
        return list(getattr(self.model, "transformer_blocks", None) or self.model.blocks)

    def units(self) -> list:
        """Parts that edm_teacher.shard gathers one by one."""
        return self.blocks()

    def patch(self) -> tuple:
        return self.model.config.patch_size

    def feature_map(self, output, shape) -> Tensor:
        """Tokens (B, N, C) of a block -> (B, C, *grid)."""
        tokens = output if self.stream is None else output[self.stream]
        grid = [n // p for n, p in zip(shape[2:], self.patch(), strict=True)]
        return tokens.unflatten(1, grid).movedim(-1, 1)

    # --- conditions ---
    def condition(self, cond, n: int) -> dict:
        """None, rows of the table or a dict -> a dict of n rows each, floats in F's type.

        None, where videos start from images: the first prompt's image.
        """
        if cond is None:
            cond = {k: v[:1] for k, v in self.codec.table.items()} | self.codec.none(self)
        elif isinstance(cond, Tensor):
            rows = cond.cpu()
            cond = {k: table[rows.clamp_min(0)] for k, table in self.codec.table.items()}
            for name, value in self.codec.none(self).items() if (rows < 0).any() else ():
                cond[name][rows < 0] = value.to(cond[name])
        device = next(self.parameters()).device
        types = {k: self.dtype if v.is_floating_point() else v.dtype for k, v in cond.items()}
        return {k: v.to(device, types[k]).expand(n, *v.shape[1:]) for k, v in cond.items()}

    def no_condition(self, cond) -> dict:
        """The same without its text; a given image or video stays, as in the pipelines."""
        n = len(cond) if isinstance(cond, Tensor) else len(next(iter(cond.values())))
        return self.condition(self.condition(cond, n) | self.codec.none(self), n)

    def use_prompts(self, prompts: list[str], images=None):
        """Encodes them once; then cond may be (B,) rows of this table, like class labels.

        The text encoders leave memory.
        """
        rows = []
        for i, prompt in enumerate(prompts):
            start = {} if images is None else self.encode_start(images[i : i + 1])
            rows.append({k: v.cpu() for k, v in (self.encode_prompts([prompt]) | start).items()})
        self.codec.table = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        self.prompts, self.label_dim = prompts, len(prompts)
        self.codec.none(self)
        self.codec.loaded = None
        return self

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict:
        """{"text": (B, N, C), ...} by the pipeline's own tokenizer and text encoder."""
        return self.text(self.codec.pipe, prompts, device=next(self.parameters()).device)

    def text(self, pipe, prompts, **on):
        """Pipelines encode fewer tokens than they sample with, unless told."""
        text, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=self.tokens, **on)
        return {"text": text}

    def no_text(self) -> dict:
        return self.encode_prompts([""])

    def encode_start(self, images: Tensor) -> dict:
        raise UserError(f"{type(self).__name__} is not made for a given image.")

    # --- pixels in [-1, 1], (B, 3, H, W) or (B, 3, F, H, W), and latents ---
    @torch.no_grad()
    def encode_images(self, x: Tensor) -> Tensor:
        x = x.to(self.codec.vae.device, self.codec.vae.dtype)
        mean, std = self.codec.scale(x)
        return (self.codec.vae.encode(x).latent_dist.mode() - mean) / std

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        vae, (mean, std) = self.codec.vae, self.codec.scale(x)
        return vae.decode((x * std + mean).to(vae.device, vae.dtype)).sample.float()

    # --- weights and memory ---
    def gradient_checkpointing(self, on: bool = True):
        """Blocks' activations are computed again in the backward pass instead of being kept."""
        self.model.enable_gradient_checkpointing(self.mode.recompute)
        if not on:
            self.model.disable_gradient_checkpointing()
        return self

    def save(self, folder) -> None:
        self.model.save_pretrained(folder)

    def load(self, folder) -> None:
        """What `save` of a backbone or of an adapter has written."""
        try:
            name = "pytorch_lora_weights.safetensors"
            if (Path(folder) / name).exists():
                require("A LoRA adapter", "peft")
                return self.model.load_lora_adapter(folder, prefix=None, weight_name=name)
            self.model.load_state_dict(type(self.model).from_pretrained(folder).state_dict())
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{folder} is no generator of {self.codec.path} ({brief(error)})."
            ) from None

    # --- for the scripts ---
    def real_latents(self, cfg, run) -> tuple[Tensor, Tensor]:
        """(x (N, C, ...), rows (N,)) for the GAN, made once for a run folder.

        --data FOLDER: its images or videos, class folder k has prompt k. Otherwise the teacher's
        own samples of all prompts in turn: --pairs, --teacher-steps, --guidance.
        """
        path, device = run.path("latents.safetensors"), next(self.parameters()).device
        if not path.exists() and Path(cfg.data).is_dir():
            x, rows = [], []
            for pixels, row in read_folder(cfg.data, *self.pixels, self.frames):
                if row >= self.label_dim:
                    raise UserError(
                        f"--data {cfg.data}: --prompts needs a line for each class folder."
                    )
                x.append(self.encode_images(pixels[None].to(device)).cpu())
                rows.append(row)
            edm.save_tensors(path, {"x": torch.cat(x), "rows": torch.tensor(rows)}, {})
        elif not path.exists():
            if not cfg.teacher_steps:
                raise UserError("--teacher-steps 0: the latents for the GAN need 1 or more.")
            rows = torch.arange(cfg.pairs) % self.label_dim
            sampler = partial(euler_sampler, self, steps=cfg.teacher_steps, guidance=cfg.guidance)
            with edm.own_random_numbers(cfg.seed + 10000):
                z = torch.randn(cfg.pairs, *self.shape)
            x, _ = edm.in_batches(torch.no_grad()(sampler), z, rows, device, edm.rows(cfg.batch))
            edm.save_tensors(path, {"x": x, "rows": rows}, {})
        tensors, _ = edm.load_tensors(path)
        return tensors["x"], tensors["rows"]

    @property
    def frames(self) -> int | None:
        """Frames in pixels of a video; None: images."""
        return 4 * (self.shape[1] - 1) + 1 if len(self.shape) == 4 else None

    @torch.no_grad()
    def pictures(self, path, sampler, seed: int, rows=None, latent_frames=None) -> None:
        """Samples of prompts `rows`, from fixed z; four frames of a video.

        Without rows: four samples, or one video, of each of the first four prompts.
        """
        device, found, shape = next(self.parameters()).device, {}, list(self.shape)
        shape[1] = latent_frames or shape[1]
        if rows is None:
            rows = torch.arange(len(self.prompts))[:4]
            rows = rows if (self.frames or 1) > 1 else rows.repeat_interleave(4)
        for row in rows.unique().tolist():
            n = int((rows == row).sum())
            with edm.own_random_numbers(seed + row):
                z = torch.randn(n, *shape).to(device)
                x = [
                    self.decode(sampler(v, torch.tensor([row], device=device))) for v in z.split(1)
                ]
            x = torch.cat(x)
            if x.ndim == 5:
                chosen = torch.linspace(0, x.shape[2] - 1, min(4, x.shape[2])).long()
                x = x[:, :, chosen].transpose(1, 2).flatten(0, 1)
            found[f"{row}. {self.prompts[row]}"] = x
        edm.save_rows(path, found, columns=4)


# ------------------------------------------------------------------------------------------------
# 3. The families
# ------------------------------------------------------------------------------------------------


class SD15(Backbone):
    """Stable Diffusion 1 and 2: VP, F = ε or v as its scheduler says."""

    part, pipelines = "unet", ("StableDiffusionPipeline",)

    @staticmethod
    def schedule_of(scheduler, shape):
        return VP(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def blocks(self):
        return [*(b for b in self.model.down_blocks if b.downsamplers), self.model.mid_block]

    def units(self):
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]

    def feature_map(self, output, shape):
        return output if isinstance(output, Tensor) else output[1][-2]  # [-1] is downsampled

    def network(self, x, t, cond):
        return self.model(x, t, cond["text"], return_dict=False)[0]

    def text(self, pipe, prompts, device):
        return {"text": pipe.encode_prompt(prompts, device, 1, False)[0]}


class SDXL(SD15):
    """Two text encoders, their pooled output, and sizes: original, crop, target."""

    pipelines, default_size = ("StableDiffusionXLPipeline",), (1024, 1024)

    def network(self, x, t, cond):
        h, w = (8 * n for n in x.shape[2:])
        ids = cond.get("time_ids", x.new_tensor([[h, w, 0, 0, h, w]]).expand(len(x), -1))
        added = {"text_embeds": cond["pooled"], "time_ids": ids}
        return self.model(x, t, cond["text"], added_cond_kwargs=added, return_dict=False)[0]

    def text(self, pipe, prompts, device):
        text, _, pooled, _ = pipe.encode_prompt(prompts, None, device, 1, False)
        return {"text": text, "pooled": pooled}

    def no_text(self):
        zero = 0.0 if self.codec.pipe.config.force_zeros_for_empty_prompt else 1.0
        return {k: zero * v for k, v in self.encode_prompts([""]).items()}


class Flux(Backbone):
    """FLUX.1: 2 x 2 latent pixels are a token. dev is told its guidance, with a prompt or none."""

    pipelines, packages = ("FluxPipeline",), ("sentencepiece",)
    stream, folded, default_size, guidance = 1, 4, (1024, 1024), 3.5

    @staticmethod
    def schedule_of(scheduler, shape):
        config = scheduler.config
        if not config.use_dynamic_shifting:
            return Flow(config.shift)
        low, high = config.base_image_seq_len, config.max_image_seq_len
        tokens = (shape[1] * shape[2] / 4 - low) / (high - low)
        return Flow(math.exp(config.base_shift + tokens * (config.max_shift - config.base_shift)))

    def blocks(self):
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def patch(self):
        return 2, 2

    def network(self, x, t, cond):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        places = torch.cartesian_prod(*(torch.arange(0.0, n, device=x.device) for n in (1, h, w)))
        ids, text = (places.to(x), x.new_zeros(cond["text"].shape[1], 3)), cond["text"]
        guidance = cond.get("guidance", x.new_full((len(x),), self.guidance))
        extra = {"guidance": guidance if self.model.config.guidance_embeds else None}
        tokens = F.pixel_unshuffle(x, 2).flatten(2).mT
        out = self.model(tokens, text, cond["pooled"], t, *ids, return_dict=False, **extra)[0]
        return F.pixel_shuffle(out.mT.unflatten(2, (h, w)), 2)

    def text(self, pipe, prompts, device):
        tokens = 512 if self.model.config.guidance_embeds else 256  # dev, schnell
        text, pooled, _ = pipe.encode_prompt(prompts, None, device, max_sequence_length=tokens)
        return {"text": text, "pooled": pooled}


class Wan(Backbone):
    """Wan: text to video; an image beside x ("image") or as its first frame ("given"); VACE."""

    pipelines = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
    packages, needs = ("ftfy", "sentencepiece"), ("accelerate",)
    default_size, tokens, given_sigma = (480, 832, 81), 512, 0.0

    @staticmethod
    def schedule_of(scheduler, shape, **span):
        shift = scheduler.config.get("flow_shift") or scheduler.config.get("shift", 1.0)
        return Flow(shift, **span)

    def network(self, x, t, cond):
        extra = {"control_hidden_states": cond["control"]} if "control" in cond else {}
        if t.ndim == 2:  # one time a frame -> one a token
            t = t.repeat_interleave(x[0, 0, 0].numel() // math.prod(self.patch()), 1)
        x = torch.cat([x, cond["image"]], 1) if "image" in cond else x
        clip = cond.get("image_tokens")
        return self.model(x, 1000 * t, cond["text"], clip, return_dict=False, **extra)[0]

    def encode_start(self, images, mask=None):
        """First frames (B, 3, H, W); VACE: videos (B, 3, F, H, W), mask (B, 1, F, H, W), 1: new."""
        config = self.model.config
        if hasattr(self.model, "vace_blocks"):
            return self.encode_control(images, mask)
        if config.in_channels == config.out_channels:
            return self.encode_given(images[:, :, None], 1)
        rest = self.frames - 1
        latents = self.encode_images(F.pad(images[:, :, None], (0, 0, 0, 0, 0, rest)))
        cond = {"image": F.pad(latents, (0, 0, 0, 0, 0, 0, 4, 0))}
        cond["image"][:, :4, 0] = 1
        if config.image_dim:  # Wan 2.1 looks at it through CLIP as well
            pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            cond["image_tokens"] = self.codec.pipe.encode_image(list(pixels), latents.device)
        return cond

    def encode_control(self, video, mask):
        mask = torch.ones_like(video[:, :1]) if mask is None else mask
        h, w = self.shape[-2:]
        folded = mask[:, 0].unflatten(2, (h, -1)).unflatten(4, (w, -1))  # (B, F, h, 8, w, 8)
        folded = folded.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
        folded = F.interpolate(folded, self.shape[1:], mode="nearest-exact")
        kept, new = self.encode_images(video * (1 - mask)), self.encode_images(video * mask)
        return {"control": torch.cat([kept, new, folded.to(new)], 1)}

    def encode_given(self, video, frames):
        """The first latent frames are given: the latents, padded, and which ones they are."""
        latents = self.encode_images(video)
        missing = self.shape[1] - latents.shape[2]
        given = (torch.arange(self.shape[1]) < frames).float().expand(len(video), -1)
        return {"given": F.pad(latents, (0, 0, 0, 0, 0, missing)), "given_frames": given}


class CogVideoX(Backbone):
    """CogVideoX 1: VP, F = v, zero terminal SNR; frames before channels; I2V: image beside x."""

    pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    packages, stream, default_size = ("sentencepiece",), 0, (480, 720, 49)
    schedule_of = SD15.schedule_of
    tokens = property(lambda self: self.model.config.max_text_seq_length)

    def patch(self):
        return 1, self.model.config.patch_size, self.model.config.patch_size

    def network(self, x, t, cond):
        extra = {"image_rotary_emb": self.rotary(x.shape[2:], x.device), "return_dict": False}
        x = torch.cat([x, cond["image"]], 1) if "image" in cond else x
        return self.model(x.transpose(1, 2), cond["text"], t, **extra)[0].transpose(1, 2)

    def rotary(self, shape, device):
        """Positions in the largest centred box of this aspect ratio of the training grid."""
        config, (f, h, w) = self.model.config, map(math.ceil, map(truediv, shape, self.patch()))
        if not config.use_rotary_positional_embeddings:
            return None
        high, wide = (n // config.patch_size for n in (config.sample_height, config.sample_width))
        tall, broad = (round(n * min(high / h, wide / w)) for n in (h, w))
        top, left = round((high - tall) / 2), round((wide - broad) / 2)
        crop = ((top, left), (top + tall, left + broad))
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, (h, w), f, device=device)

    def encode_start(self, images):
        latents = self.encode_images(images[:, :, None])
        return {"image": F.pad(latents, (0, 0, 0, 0, 0, self.shape[1] - 1))}


class Cosmos(Wan):
    """Cosmos-Predict2: a flow network on EDM's noise levels; a channel marks the given frames."""

    pipelines = ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline")
    packages, given_sigma, fps = ("sentencepiece",), 1e-4, 16
    default_size = (704, 1280, 93)

    @staticmethod
    def schedule_of(scheduler, shape):
        return Flow(shift=None)

    def network(self, x, t, cond):
        extra = {"padding_mask": x.new_zeros(1, 1, *x.shape[3:]), "return_dict": False}
        if self.model.config.in_channels > self.img_channels:  # V2W
            given = cond.get("given_frames", x.new_zeros(len(x), x.shape[2]))
            marks = given[:, None, :, None, None].expand(-1, -1, -1, *x.shape[3:])
            extra |= {"condition_mask": marks, "fps": self.fps}
        t = (t[:, None, :, None, None] if t.ndim == 2 else t).to(x.dtype)
        return self.model(x, t, cond["text"], **extra)[0]

    def encode_start(self, images):
        """(B, 3, H, W), or (B, 3, F, H, W): the first 1 or 1 + 4 n frames of the video."""
        images = images if images.ndim == 5 else images[:, :, None]
        rest = self.frames - images.shape[2]
        video = torch.cat([images, images[:, :, -1:].expand(-1, -1, rest, -1, -1)], 2)
        return self.encode_given(video, (images.shape[2] - 1) // 4 + 1)


# ------------------------------------------------------------------------------------------------
# 4. Loading, sampling
# ------------------------------------------------------------------------------------------------
FAMILIES = {"sd15": SD15, "sdxl": SDXL, "flux": Flux, "wan": Wan, "cogvideox": CogVideoX}
FAMILIES |= {"wan-low": Wan, "cosmos": Cosmos}


def load_backbone(
    name: str, dtype=torch.float32, device="cpu", quantisation=None, size=None
) -> Backbone:
    """ "sd15:FOLDER_OR_HUB_ID", "wan:..." -> its frozen denoiser. Raises UserError, one sentence.

    size: (height, width[, frames]) in pixels of what will be made.   quantisation: of the network's
    weights, a configuration of diffusers: diffusers.TorchAoConfig(...), BitsAndBytesConfig(...).
    """
    family, _, path = name.partition(":")
    if family not in FAMILIES or not path:
        raise UserError(f"{name!r}: expected {':, '.join(FAMILIES)}: and a folder or a hub id.")
    kind = FAMILIES[family]
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        vae = diffusers.AutoencoderKL.load_config(path, subfolder="vae")
        found, edge, low = index["_class_name"], index.get("boundary_ratio"), family == "wan-low"
        if found not in kind.pipelines:
            expected = " or ".join(kind.pipelines)
            raise UserError(f"{path} holds a {found}; {family}: takes {expected}.")
        if low and not edge:
            raise UserError(f"{path} has no second network; use wan: for it.")
        require(f"{family}:", *kind.needs)
        part = "transformer_2" if low else kind.part
        span = {"span": (0.0, edge) if low else (edge, 1.0)} if edge else {}
        model, scheduler = (getattr(diffusers, index[k][1]) for k in (part, "scheduler"))
        how = {"quantization_config": quantisation} if quantisation else {}
        model = model.from_pretrained(path, subfolder=part, torch_dtype=dtype, **how)
        scheduler = scheduler.from_pretrained(path, subfolder="scheduler")
    except UserError:
        raise
    except Exception as error:  # OSError, KeyError, those of the hub's client and of safetensors
        raise UserError(f"{path}: no diffusers model can be read there ({brief(error)}).") from None
    model = model.to(device).requires_grad_(False).eval()
    height, width, *frames = size or kind.default_size
    frames = [1] if "TextToImage" in found else frames or kind.default_size[2:]
    scales = vae.get("block_out_channels") or range(4)  # Wan's VAE has another name for them
    shrink = vae.get("scale_factor_spatial") or 2 ** (len(scales) - 1)
    channels = (model.config.out_channels or model.config.in_channels) // kind.folded
    shape = [channels, *((n - 1) // 4 + 1 for n in frames), height // shrink, width // shrink]
    parts = dict.fromkeys(("unet", "transformer", "transformer_2"))  # of two only this one
    parts |= {part: model, "scheduler": scheduler, "feature_extractor": None}
    parts["safety_checker"] = nn.Identity() if kind is Cosmos else None  # nothing is shown here
    codec = Codec(path, index, parts, dtype, device, kind.packages)
    backbone = kind(model, kind.schedule_of(scheduler, shape, **span), codec, shape)
    backbone.pixels = height, width
    return backbone


def require(what: str, *packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


@torch.no_grad()
def euler_sampler(denoiser, z: Tensor, cond=None, steps=28, guidance=1.0, sigmas=None) -> Tensor:
    """x <- D + σ' (x - D) / σ along σ(u), then σ' = 0: DDIM for VP, Euler for flow, in one line.

    z: unit noise.   sigmas: other noise levels, without the 0.   guidance: D_u + w (D_c - D_u).
    """
    if sigmas is None:
        sigmas = denoiser.sigma_of(1 - torch.arange(steps) / steps)
        sigmas[0] = denoiser.sigma_max
    x = z.to(torch.float32 if z.is_mps else torch.float64) * sigmas[0]
    for sigma, after in itertools.pairwise([*sigmas.tolist(), 0.0]):
        denoised = denoiser(x.float(), sigma, cond)
        if guidance != 1 and cond is not None:
            none = denoiser(x.float(), sigma, denoiser.no_condition(cond))
            denoised = none + guidance * (denoised - none)
        x = denoised + after / sigma * (x - denoised)
    return x.to(z.dtype)


class Codec:
    """A pipeline's text encoder, tokenizer and VAE: read when first needed, never copied."""

    def __init__(self, path, index: dict, parts: dict, dtype, device, packages: tuple):
        self.path, self.index, self.parts, self.packages = path, index, parts, packages
        self.dtype, self.device = dtype, device
        self.loaded, self.nothing, self.table = None, None, {}

    def __deepcopy__(self, memo):
        return self

    @property
    def pipe(self):
        """Made from its parts: from_pretrained would insist on safety checkers."""
        if self.loaded is None:
            require("Encoding a prompt", "transformers", *self.packages)
            kind = getattr(diffusers, self.index["_class_name"])
            accepted = dict(inspect.signature(kind.__init__).parameters)
            have = {"requires_safety_checker": False, "vae": self.vae} | self.parts
            for name, value in self.index.items():
                if name in accepted and name not in have:
                    have[name] = self.read(name, *value) if isinstance(value, list) else value
            self.loaded = kind(**{k: v for k, v in have.items() if k in accepted})
        return self.loaded

    @cached_property
    def vae(self):
        return self.read("vae", *self.index["vae"])

    def read(self, name: str, library, kind):
        """One part, of the class that model_index.json names."""
        if library is None:
            return None
        read = getattr(importlib.import_module(library), kind).from_pretrained
        if "tokenizer" in name or "processor" in name:
            return read(self.path, subfolder=name)
        dtype = torch.float32 if name == "vae" else self.dtype  # VAEs suffer from less
        part = read(self.path, subfolder=name, torch_dtype=dtype)
        return part.to(self.device).requires_grad_(False).eval()

    def none(self, backbone) -> dict:
        if self.nothing is None:
            self.nothing = backbone.no_text()
        return self.nothing

    def scale(self, x: Tensor):
        """(mean, std) of the VAE's latents, to go with x."""
        config = self.vae.config
        std = 1 / config.get("scaling_factor", 1.0)
        if not config.get("latents_mean"):
            return config.get("shift_factor") or 0.0, std
        both = torch.tensor([config.latents_mean, config.latents_std], device=x.device)
        mean, each = both.reshape(2, 1, -1, *[1] * (x.ndim - 2))
        return mean, each * std


# ------------------------------------------------------------------------------------------------
# 5. Wan in causal chunks                                              CausVid §3, Self-Forcing §3
# ------------------------------------------------------------------------------------------------


class CausalWan(Wan):
    """Wan, called as causal_video.py calls its own network; without more arguments it is Wan.

    mask: (F, F), True where the frame of the row sees that of the column.
    past: keys and values of earlier frames, {frame: [(k, v) of each block]}; start: number of x's
    first frame; return_kv: also this call's, (B, heads, F, tokens, d) of each block.
    Chunk after chunk with the past of all earlier ones = the whole clip under a causal mask.
    """

    def __init__(self, wan: Wan):
        nn.Module.__init__(self)
        vars(self).update(vars(wan))  # the same network, prompts and all
        for i, layer in enumerate(self.model.blocks):
            layer.attn1.set_processor(CausalAttention(self.mode, i))
        self.model.rope.register_forward_hook(self.shifted)

    def forward(self, x, sigma, cond=None, return_features=False, return_kv=False, **how):
        how = {"mask": None, "past": None, "start": 0, "kv": [] if return_kv else None} | how
        if how["mask"] is not None:  # frames that see the same, together
            rows, counts = how["mask"].unique_consecutive(dim=0, return_counts=True)
            how["mask"] = rows, counts.tolist()
        with self.mode.set(**how):
            out = super().forward(x, sigma, cond, return_features)
            return (out, self.mode.kv) if return_kv else out

    def shifted(self, rope, args, output):
        """RoPE of start + F frames without the first `start`: positions in the whole video."""
        x, mode = args[0], self.mode
        mode.frame = x[0, 0, 0].numel() // math.prod(self.patch())  # tokens of a frame
        longer = x.new_zeros(1).expand(*x.shape[:2], mode.start + x.shape[2], *x.shape[3:])
        return tuple(r[:, mode.start * mode.frame :] for r in rope.forward(longer))


class CausalAttention:
    """Self-attention of Wan; queries get the keys of the frames that they see, so no mask."""

    def __init__(self, mode, index: int):
        self.mode, self.index = mode, index

    def __call__(self, attn, x, context=None, mask=None, rotary_emb=None, **unused):
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        q, k, v = rotate(q, rotary_emb), rotate(k, rotary_emb), v
        # (B, heads, F, tokens, d)
        q, k, v = (y.transpose(1, 2).unflatten(2, (-1, self.mode.frame)) for y in (q, k, v))
        if self.mode.kv is not None:
            self.mode.kv.append((k, v))
        past = [layers[self.index] for layers in (self.mode.past or {}).values()]
        k, v = (torch.cat([*(p[i][:, :, None] for p in past), y], 2) for i, y in ((0, k), (1, v)))
        rows, counts = self.mode.mask or ([slice(None)], [q.shape[2]])
        out = []
        for some, row in zip(q.split(counts, 2), rows, strict=True):
            seen = (y.flatten(2, 3) for y in (some, k[:, :, row], v[:, :, row]))
            out.append(F.scaled_dot_product_attention(*seen))
        return attn.to_out[1](attn.to_out[0](torch.cat(out, 2).transpose(1, 2).flatten(2)))


def rotate(x: Tensor, rotary) -> Tensor:
    """RoPE: two neighbouring channels are a complex number, times exp(i angle)."""
    turn = torch.complex(rotary[0][..., ::2].float(), rotary[1][..., 1::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).type_as(x)


# ------------------------------------------------------------------------------------------------
# 6. Adapters: generator, fake and teacher on one copy of the weights                 LoRA, by peft
# ------------------------------------------------------------------------------------------------


class Mode:
    """What a call depends on beside its arguments: the adapter that is on, CausalWan's past."""

    def __init__(self):
        self.role, self.mask, self.past, self.start, self.kv = None, None, None, 0, None
        self.layers, self.adapters = [], 0  # peft's

    @contextlib.contextmanager
    def set(self, **values):
        before = {name: getattr(self, name) for name in values}
        self.apply(values)
        try:
            yield
        finally:
            self.apply(before)

    def apply(self, values: dict) -> None:
        switch = values.get("role", self.role) != self.role
        vars(self).update(values)
        for layer in self.layers if switch else ():  # peft's own switch sets requires_grad, too
            layer._disable_adapters, layer._active_adapter = self.role is None, [self.role]

    def recompute(self, block, *args):
        """Checkpointing: in the backward pass, the role and past of the forward pass again."""
        then = {name: getattr(self, name) for name in ("role", "mask", "past", "start")}
        then, first = then | {"kv": None}, [{}]

        def run(*args):
            with self.set(**(first.pop() if first else then)):
                return block(*args)

        return checkpoint(run, *args, use_reentrant=False)


class Role(nn.Module):
    """The frozen base with one adapter on, or with none: the teacher. Called like the base.

    parameters() are the adapter's. A deep copy is a new adapter with the same weights, on the same
    base: edm_teacher.trainable_copy(teacher) is a generator that starts as the teacher.
    """

    is_adapter = True  # edm_teacher.shard

    def __init__(self, base: Backbone, rank: int, name: str | None = None):
        super().__init__()
        require("A LoRA adapter", "peft")
        self.__dict__["base"], self.rank, self.name = base, rank, name  # base: not a submodule
        self.weights = nn.ParameterDict()
        if name:
            self.add(base.model, base.mode)

    def add(self, model, mode):
        peft = importlib.import_module("peft")
        names = [k for k, m in model.named_modules() if isinstance(m, nn.Linear) and "block" in k]
        names = [k.removesuffix(".base_layer") for k in names if ".lora_" not in k]
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=names)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are several is the point
            model.add_adapter(config, self.name)
        for p, flag in flags:
            p.requires_grad_(flag)
        for key, p in model.named_parameters():
            if f".{self.name}." in key:
                p.data = p.data.float()
                self.weights[key.replace(f".{self.name}.", ".").replace(".", "/")] = p
        mode.adapters += 1
        layers = peft.tuners.tuners_utils.BaseTunerLayer
        mode.layers, mode.role = [m for m in model.modules() if isinstance(m, layers)], self.name
        mode.apply({"role": None})

    def forward(self, *args, **options):
        with self.base.mode.set(role=self.name):
            return self.base(*args, **options)

    def __getattr__(self, name):  # sigma_max, decode and all else: the base's
        own = self.__dict__.get("_modules", {})
        return own[name] if name in own else getattr(self.__dict__["base"], name)

    def __deepcopy__(self, memo):
        other = Role(self.base, self.rank, f"adapter{self.base.mode.adapters}")
        for name, p in self.weights.items():
            other.weights[name].data.copy_(p.data)
            other.weights[name].requires_grad_(p.requires_grad)
        return other.train(self.training)

    def save(self, folder) -> None:
        self.base.model.save_lora_adapter(folder, adapter_name=self.name)


def three_roles(base: Backbone, rank: int) -> tuple[Role, Role, Role]:
    """(generator, fake, teacher): two adapters on one frozen base, and the base alone."""
    base.requires_grad_(False)
    return Role(base, rank, "generator"), Role(base, rank, "fake"), Role(base, rank)


def load_teacher(cfg, causal: bool = False) -> Backbone | Role:
    """A script's --teacher sd15:PATH with --prompts FILE, one a line: labels are its lines.

    A tab and a picture's path after each prompt: videos start from these pictures. --size.
    --lora-rank R makes copies of the teacher adapters on it, with --amp in bfloat16.
    --sample FOLDER: with the weights that a run has left there.   causal: a CausalWan.
    """
    if causal and not cfg.teacher.startswith("wan"):
        raise UserError(f"--teacher {cfg.teacher}: this script takes wan: alone.")
    if not cfg.prompts:
        raise UserError(f"--teacher {cfg.teacher} needs --prompts FILE, one prompt a line.")
    lines = [line for line in Path(cfg.prompts).read_text("utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--prompts {cfg.prompts}: the file has no line.")
    prompts, starts = [line.split("\t")[0] for line in lines], ["\t" in line for line in lines]
    if causal and any(starts):
        raise UserError(f"--prompts {cfg.prompts}: this script's videos start from no picture.")
    size, half = edm.numbers(cfg.size), cfg.lora_rank and cfg.amp
    if len(size) not in (0, 2, 3):
        raise UserError(f"--size {cfg.size}: expected height,width or height,width,frames.")
    dtype = torch.bfloat16 if half else torch.float32
    backbone = load_backbone(cfg.teacher, dtype, cfg.device, size=size)
    config = backbone.model.config
    beside = config.in_channels > (config.out_channels or config.in_channels)
    if backbone.codec.index.get("boundary_ratio"):
        raise UserError(f"{cfg.teacher} knows some of the noise levels; the scripts need all.")
    if hasattr(backbone.model, "vace_blocks"):
        raise UserError(f"{cfg.teacher} edits videos, of which the scripts give none.")
    if not all(starts) and (any(starts) or (beside and not isinstance(backbone, Cosmos))):
        raise UserError(f"--prompts {cfg.prompts}: a tab and a picture's path after each prompt.")
    images = [read_image(line.split("\t")[1], *backbone.pixels) for line in lines if all(starts)]
    backbone.use_prompts(prompts, torch.stack(images) if images else None)
    backbone.gradient_checkpointing(cfg.gradient_checkpointing)
    backbone = CausalWan(backbone) if causal else backbone
    if cfg.sample:
        backbone.load(cfg.sample)
    return Role(backbone, cfg.lora_rank) if cfg.lora_rank and not cfg.sample else backbone


def draw_samples(cfg, sampler) -> None:
    """--sample FOLDER: --n pictures of the prompts, or of those that --labels has the lines of."""
    generator, path = load_teacher(cfg), Path(cfg.out or ".") / "sampled.png"
    rows = edm.sample_labels(cfg.labels, cfg.n, generator.label_dim)
    generator.pictures(path, partial(sampler, generator), cfg.seed, rows)
    print(f"{cfg.n} samples: {path}")


def read_image(path, height: int, width: int) -> Tensor:
    """(3, H, W) in [-1, 1]: scaled to fill the size, cut at the edges."""
    try:
        with Image.open(path) as image:
            pixels = ImageOps.fit(image.convert("RGB"), (width, height))
    except OSError as error:
        raise UserError(f"{path} cannot be read as a picture ({brief(error)}).") from None
    return edm.to_float(torchvision.transforms.v2.functional.pil_to_tensor(pixels))


def read_folder(path, height: int, width: int, frames: int | None):
    """Yields (pixels, k) for everything in the class folder number k, in the order of names.

    Images (3, H, W); videos (3, F, H, W): folders with their frames, of which the first count.
    """
    for k, kind in enumerate(sorted(p for p in Path(path).iterdir() if p.is_dir())):
        for item in sorted(kind.iterdir()):
            files = sorted(item.iterdir())[:frames] if item.is_dir() else [item]
            if len(files) < (frames or 1):
                raise UserError(f"{item}: a folder with {frames} frames or more is needed.")
            x = torch.stack([read_image(file, height, width) for file in files], 1)
            yield x if frames else x[:, 0], k
