"""Large backbones: diffusers' models as the denoisers D(x, σ, cond) that every script here takes.

Models      sd15, sdxl, flux (dev, schnell), wan (2.1 and 2.2: T2V, I2V, VACE), cogvideox (2B, 5B,
            I2V), cosmos (Predict2: T2I, V2W); tested with diffusers 0.42
Shapes      x: latents (B, C, H, W) or (B, C, F, H, W), noisy as x + σ ε;   sigma: (B,)
            cond: dict of tensors with a batch axis, or rows (B,) of use_prompts' table (-1: none),
            or None: the family's own "no condition" (an empty prompt; SDXL: zeros)
Run         wan = load_backbone("wan:Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch.bfloat16, "cuda")
            cond = wan.encode_prompts(["a cat"])
            z = torch.randn(1, *wan.shape, device="cuda")
            video = wan.decode(euler_sampler(wan, z, cond, steps=50, guidance=5.0))
            generator, fake, teacher = three_roles(wan, rank=64)    # one copy of the weights
            student = CausalWan(wan, block=3)       # chunks of 3 latent frames with a KV cache
Hub models have licences of their own. Cosmos' asks that pictures go through its guardrail: yours.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import math

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edm_teacher import UserError, brief, expand

# ------------------------------------------------------------------------------------------------
# 1. Preconditioning: D = c_skip x + c_out F(c_in x; t)                       EDM Eq. 7, Table 1
# ------------------------------------------------------------------------------------------------


class VP:
    """x_t = √ᾱ x + √(1-ᾱ) ε, F = ε or v = √ᾱ ε - √(1-ᾱ) x;  σ = √((1-ᾱ)/ᾱ), t its table's index.

    Between two entries t is linear in ln σ. Zero terminal SNR (σ = ∞) becomes σ = 10,000.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str):
        alphas = alphas_cumprod.double()
        self.table = ((1 - alphas) / alphas).sqrt().clamp_max(1e4).log()
        self.sigma_min, self.sigma_max = self.table[0].exp().item(), self.table[-1].exp().item()
        self.v = prediction == "v_prediction"
        self.sigma_data = 1.0 if self.v else math.inf  # then 1/σ² + 1/σ_data² = fake_weight

    def coefficients(self, s: Tensor):
        scale = (1 + s**2).rsqrt()  # √ᾱ
        return (scale**2, -s * scale, scale) if self.v else (torch.ones_like(s), -s, scale)

    def time(self, sigma: Tensor) -> Tensor:
        table = self.on(sigma)
        log = sigma.to(table.dtype).log().clamp(table[0], table[-1])
        i = torch.searchsorted(table, log).clamp(1, len(table) - 1)
        return (i - 1 + (log - table[i - 1]) / (table[i] - table[i - 1])).to(sigma.dtype)

    def sigma_of(self, u: Tensor) -> Tensor:
        table, t = self.on(u), u * (len(self.table) - 1)
        i = t.floor().long().clamp(0, len(table) - 2)
        return torch.lerp(table[i], table[i + 1], (t - i).to(table.dtype)).exp().to(u.dtype)

    def on(self, like: Tensor) -> Tensor:
        return self.table.to(like.device, torch.float32 if like.is_mps else torch.float64)


class Flow:
    """Rectified flow: x_t = (1-t) x + t ε, F = ε - x;  σ = t/(1-t), at most 9999 (t = 0.9999).

    Training times are shifted: t(u) = shift u / (1 + (shift - 1) u).
    """

    sigma_data = 1.0  # 1/σ² + 1/σ_data² is within a factor of two of fake_weight

    def __init__(self, shift: float = 1.0, t_min: float = 0.001, t_max: float = 0.9999):
        self.shift, self.t_min, self.t_max = shift, t_min, t_max
        self.sigma_min, self.sigma_max = t_min / (1 - t_min), t_max / (1 - t_max)

    def coefficients(self, s: Tensor):
        return 1 / (1 + s), -s / (1 + s), 1 / (1 + s)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def sigma_of(self, u: Tensor) -> Tensor:
        t = self.shift * u / (1 + (self.shift - 1) * u)
        t = t.clamp(self.t_min, self.t_max)
        return t / (1 - t)


class KarrasFlow(Flow):
    """Cosmos-Predict2: a flow network on EDM's noise levels, 0.002 to 80 with ρ = 7."""

    def __init__(self):
        super().__init__(t_min=0.002 / 1.002, t_max=80 / 81)

    def sigma_of(self, u: Tensor) -> Tensor:
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        return (low + u * (high - low)) ** 7


# ------------------------------------------------------------------------------------------------
# 2. The denoiser around a network of diffusers
# ------------------------------------------------------------------------------------------------


class Mode:
    """What a call depends on beside its arguments: which adapter is on; CausalWan's cache."""

    def __init__(self):
        self.role, self.cache, self.start, self.store = None, None, 0, False
        self.layers, self.weights = [], []  # peft's layers and all adapters' parameters

    @contextlib.contextmanager
    def set(self, **changes):
        before = {name: getattr(self, name) for name in changes}
        self.apply(changes)
        try:
            yield
        finally:
            self.apply(before)

    def apply(self, values: dict) -> None:
        switch = "role" in values and values["role"] != self.role
        vars(self).update(values)
        if not switch:
            return
        # peft's switch also sets requires_grad: without restoring it, a backward pass that comes
        # after the switch would drop the gradients of the other adapter without a word
        flags = [p.requires_grad for p in self.weights]
        for layer in self.layers:
            if self.role:
                layer.set_adapter(self.role)
            layer.enable_adapters(bool(self.role))
        for p, flag in zip(self.weights, flags, strict=True):
            p.requires_grad_(flag)


class Stop(Exception):
    """Ends a forward pass after the last feature."""


class Backbone(nn.Module):
    """D(x; σ, cond) = c_skip x + c_out F(c_in x; t(σ), cond), in float32 whatever F's type is.

    return_features=True also returns activations: the last of each resolution of a U-Net's encoder,
    finest first, bottleneck last; of a transformer those after the blocks `taps`, as maps
    (B, C, *grid). "only" stops after the last of them and returns (None, features).
    sigma may be (B, F), one level a frame, for Wan and Cosmos.
    """

    part, pipelines, packages, needs = "transformer", (), (), ()
    stream, default_frames = None, 0
    default_size = (512, 512)

    def __init__(self, model: nn.Module, schedule, codec, shape: tuple):
        super().__init__()
        self.model, self.schedule, self.codec, self.shape = model, schedule, codec, tuple(shape)
        self.mode, self.dtype = Mode(), model.dtype
        self.img_channels, self.img_resolution, self.label_dim = shape[0], shape[-1], 0
        self.sigma_min, self.sigma_max = schedule.sigma_min, schedule.sigma_max
        self.sigma_data, self.sigma_of = schedule.sigma_data, schedule.sigma_of
        n = len(self.blocks())  # taps: as FastGen for Wan, 15, 22, 29 of 30; of a U-Net all
        self.taps = tuple(range(n)) if self.part == "unet" else (n // 2, 3 * n // 4, n - 1)

    def fake_weight(self, sigma: Tensor) -> Tensor:
        """1/c_out²: mean weight · (D - x)² is the family's own loss on F. (eps 1/σ²,
        v 1/σ² + 1, flow (1 + 1/σ)²; EDM's λ is the same thing.)"""
        return self.schedule.coefficients(sigma)[1] ** -2

    def forward(self, x: Tensor, sigma, cond=None, return_features=False):
        x = x.to(torch.promote_types(self.dtype, torch.float32))
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        sigma = sigma if sigma.ndim == 2 else sigma.expand(len(x))
        cond = self.condition(cond, len(x))
        given = cond.get("given_frames")  # (B, F): 1 where a clean frame is given
        if given is not None:
            sigma = torch.where(given > 0, self.given_sigma, sigma.reshape(len(x), -1))
        s = sigma.reshape(len(x), 1, -1, 1, 1) if sigma.ndim == 2 else expand(sigma, x)
        c_skip, c_out, c_in = self.schedule.coefficients(s)
        inputs, frames = c_in * x, None
        if given is not None:
            frames = given[:, None, :, None, None] > 0
            inputs = torch.where(frames, cond["given"].to(x.dtype), inputs)
        features, handles = [], []
        if return_features:
            handles = self.listen(features, x.shape, return_features == "only")
        try:
            out = self.network(inputs.to(self.dtype), self.schedule.time(sigma), cond)
        except Stop:
            return None, features
        finally:
            for handle in handles:
                handle.remove()
        denoised = c_skip * x + c_out * out.to(x.dtype)
        if frames is not None:
            denoised = torch.where(frames, cond["given"].to(x.dtype), denoised)
        return (denoised, features) if return_features else denoised

    def listen(self, features: list, shape, only: bool) -> list:
        """Forward hooks that append to `features`; a fork of the network is never needed."""
        blocks = self.blocks()
        taps = sorted(set(self.taps))

        def hook(block, args, output, last):
            features.append(self.feature_map(output, shape))
            if only and last:
                raise Stop

        def register(tap):
            last = tap == taps[-1]
            return blocks[tap].register_forward_hook(lambda *call: hook(*call, last))

        return [register(tap) for tap in taps]

    def blocks(self) -> list:
        model = self.model
        return list(getattr(model, "transformer_blocks", None) or model.blocks)

    def feature_map(self, output, shape) -> Tensor:
        """Tokens (B, N, C) of a block -> (B, C, *grid)."""
        tokens = output if self.stream is None else output[self.stream]
        grid = [n // p for n, p in zip(shape[2:], self.patch(), strict=True)]
        return tokens.unflatten(1, grid).movedim(-1, 1)

    def patch(self) -> tuple:
        return self.model.config.patch_size

    # --- conditions ---
    def condition(self, cond, n: int) -> dict:
        """None, rows of the table, or a dict -> dict of n rows each, floats in F's type."""
        if cond is None:
            cond = self.codec.none(self)
        elif isinstance(cond, Tensor):
            none, rows = self.codec.none(self), cond.cpu()
            cond = {k: v[rows.clamp_min(0)].clone() for k, v in self.codec.table.items()}
            for name, value in none.items():
                cond[name][rows < 0] = value.to(cond[name])
        device, result = next(self.parameters()).device, {}
        for name, value in cond.items():
            dtype = self.dtype if value.is_floating_point() else value.dtype
            result[name] = value.to(device, dtype).expand(n, *value.shape[1:])
        return result

    def no_condition(self, cond) -> dict:
        """The same without its text: a given image or video stays, as in the pipelines."""
        n = len(cond) if isinstance(cond, Tensor) else len(next(iter(cond.values())))
        return self.condition({**self.condition(cond, n), **self.codec.none(self)}, n)

    def use_prompts(self, prompts: list[str], images: Tensor | None = None) -> "Backbone":
        """Encodes them once; from then on cond may be (B,) rows of this table, like labels."""
        rows = []
        for i, prompt in enumerate(prompts):
            image = {} if images is None else self.encode_start(images[i : i + 1])
            rows.append({k: v.cpu() for k, v in (self.encode_prompts([prompt]) | image).items()})
        self.codec.table = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        self.label_dim = len(prompts)
        return self

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict:
        """{"text": (B, N, C), ...} by the pipeline's own tokenizer and text encoder."""
        return self.text(self.codec.pipe, prompts, next(self.parameters()).device)

    def text(self, pipe, prompts: list[str], device) -> dict:
        options = {"max_sequence_length": self.max_tokens, "device": device}
        return {"text": pipe.encode_prompt(prompts, None, False, **options)[0]}

    def no_text(self) -> dict:
        """The family's "no condition", one row."""
        return self.encode_prompts([""])

    def encode_start(self, images: Tensor) -> dict:
        raise UserError(f"{type(self).__name__}: this model takes no image.")

    # --- pixels in [-1, 1] and latents ---
    @torch.no_grad()
    def encode_images(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, F, H, W) -> latents of about unit size, the mode of the VAE's."""
        vae, (mean, std) = self.codec.pipe.vae, self.codec.scale(x)
        return (vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().float() - mean) / std

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents -> pixels, about [-1, 1]."""
        vae, (mean, std) = self.codec.pipe.vae, self.codec.scale(x)
        return vae.decode((x * std + mean).to(vae.device, vae.dtype)).sample.float()

    # --- memory ---
    def gradient_checkpointing(self, on: bool = True) -> "Backbone":
        """Activations of the blocks are computed again in the backward pass, not kept."""
        if on:
            self.model.enable_gradient_checkpointing(self.recompute)
        else:
            self.model.disable_gradient_checkpointing()
        return self

    def recompute(self, block, *args):
        mode = self.mode  # in the backward pass another role may be on, and the cache be fuller
        then = {"role": mode.role, "start": mode.start, "store": False}
        then["cache"] = None if mode.cache is None else dict(mode.cache)
        first = [True]

        def run(*args):
            changes, first[:] = ({} if first else then), []
            with mode.set(**changes):
                return block(*args)

        return checkpoint(run, *args, use_reentrant=False)

    def save(self, folder) -> None:
        """The network alone, as diffusers saves it."""
        self.model.save_pretrained(folder)


class Codec:
    """A pipeline's text encoder, tokenizer and VAE: loaded when first needed, never copied."""

    def __init__(self, path, index: dict, parts: dict, dtype, device, packages: tuple):
        self.path, self.index, self.parts, self.dtype = path, index, parts, dtype
        self.device, self.packages = device, packages
        self.loaded, self.nothing, self.table = None, None, {}

    def __deepcopy__(self, memo):
        return self

    @property
    def pipe(self):
        if self.loaded is None:
            require("Encoding and decoding", "transformers", *self.packages)
            kind = getattr(diffusers, self.index["_class_name"])
            accepted = dict(inspect.signature(kind.__init__).parameters)
            have = {"self": None, "requires_safety_checker": False} | self.parts
            for name, value in self.index.items():
                if name in accepted and name not in have:
                    have[name] = self.read(name, *value) if isinstance(value, list) else value
            missing = {k: None for k, p in accepted.items() if p.default is p.empty}
            have = {k: v for k, v in (missing | have).items() if k in accepted and k != "self"}
            self.loaded = kind(**have)
        return self.loaded

    def read(self, name: str, library, kind):
        """One part of the pipeline, by the class that model_index.json names."""
        if library is None:
            return None
        read = getattr(importlib.import_module(library), kind).from_pretrained
        if "tokenizer" in name or "processor" in name:
            return read(self.path, subfolder=name)
        part = read(self.path, subfolder=name, torch_dtype=self.dtype)
        return part.to(self.device).requires_grad_(False).eval()

    def release(self) -> None:
        """Text encoder and VAE out of memory, once everything is encoded."""
        self.loaded = None

    def none(self, backbone) -> dict:
        if self.nothing is None:
            self.nothing = backbone.no_text()
        return self.nothing

    def scale(self, x: Tensor) -> tuple:
        """(mean, std) of the VAE's latents; x tells the number of axes."""
        config = self.pipe.vae.config
        std = 1 / config.get("scaling_factor", 1.0)
        if not config.get("latents_mean"):
            return config.get("shift_factor") or 0.0, std
        mean, each = (
            torch.tensor(config[k], device=x.device) for k in ("latents_mean", "latents_std")
        )
        shape = (1, -1, *[1] * (x.ndim - 2))
        return mean.reshape(shape), each.reshape(shape) * std


# ------------------------------------------------------------------------------------------------
# 3. The families
# ------------------------------------------------------------------------------------------------


class SD15(Backbone):
    """Stable Diffusion 1.x, 2.x: VP, ε or v by its scheduler's configuration."""

    part, pipelines = "unet", ("StableDiffusionPipeline",)

    @staticmethod
    def schedule_of(scheduler, shape):
        return VP(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def blocks(self):
        return [*(b for b in self.model.down_blocks if b.downsamplers), self.model.mid_block]

    def feature_map(self, output, shape):
        return output if isinstance(output, Tensor) else output[1][-2]  # [-1] is the smaller one

    def network(self, x, t, cond):
        return self.model(x, t, cond["text"], return_dict=False)[0]

    def text(self, pipe, prompts, device):
        return {"text": pipe.encode_prompt(prompts, device, 1, False)[0]}


class SDXL(SD15):
    pipelines, default_size = ("StableDiffusionXLPipeline",), (1024, 1024)

    def network(self, x, t, cond):
        size = [8 * n for n in x.shape[2:]]  # of the original, crop at 0, 0, of the target
        ids = cond.get("time_ids", x.new_tensor([[*size, 0, 0, *size]]).expand(len(x), -1))
        added = {"text_embeds": cond["pooled"], "time_ids": ids}
        return self.model(x, t, cond["text"], added_cond_kwargs=added, return_dict=False)[0]

    def text(self, pipe, prompts, device):
        text, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def no_text(self):
        none = self.encode_prompts([""])
        zeros = self.codec.pipe.config.force_zeros_for_empty_prompt
        return {k: torch.zeros_like(v) for k, v in none.items()} if zeros else none


class Flux(Backbone):
    """FLUX.1: 2 x 2 pixels are a token. dev is told its guidance (3.5), with and without text."""

    pipelines, packages = ("FluxPipeline",), ("sentencepiece",)
    stream, default_size = 1, (1024, 1024)
    guidance = 3.5

    @staticmethod
    def schedule_of(scheduler, shape):
        get = scheduler.config.get
        if not get("use_dynamic_shifting"):
            return Flow(get("shift", 1.0))
        low, high = get("base_image_seq_len", 256), get("max_image_seq_len", 4096)
        slope = (get("max_shift", 1.15) - get("base_shift", 0.5)) / (high - low)
        tokens = shape[-1] * shape[-2] / 4
        return Flow(math.exp(get("base_shift", 0.5) + slope * (tokens - low)))

    def blocks(self):
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def patch(self):
        return 2, 2

    def network(self, x, t, cond):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x)
        text_ids, guidance = x.new_zeros(cond["text"].shape[1], 3), None
        if self.model.config.guidance_embeds:
            guidance = cond.get("guidance", x.new_full((len(x),), self.guidance))
        tokens = F.pixel_unshuffle(x, 2).flatten(2).mT
        out = self.model(
            tokens, cond["text"], cond["pooled"], t, ids, text_ids, guidance, return_dict=False
        )[0]
        return F.pixel_shuffle(out.mT.unflatten(2, (h, w)), 2)

    def text(self, pipe, prompts, device):
        length = 512 if self.model.config.guidance_embeds else 256  # dev, schnell
        text, pooled, _ = pipe.encode_prompt(prompts, device=device, max_sequence_length=length)
        return {"text": text, "pooled": pooled}


class Wan(Backbone):
    """Wan 2.1 and 2.2: text to video; I2V beside x ("image") or in its first frame; VACE."""

    pipelines = ("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline")
    packages, needs = ("ftfy", "sentencepiece"), ("accelerate",)
    default_size, default_frames, given_sigma = (480, 832), 81, 0.0
    max_tokens = 512

    @staticmethod
    def schedule_of(scheduler, shape):
        return Flow(scheduler.config.get("flow_shift") or scheduler.config.get("shift", 1.0))

    def network(self, x, t, cond):
        extra = {"control_hidden_states": cond["control"]} if "control" in cond else {}
        if t.ndim == 2:  # one for each frame -> one for each token
            _, p, q = self.patch()
            t = t.repeat_interleave(x.shape[3] // p * (x.shape[4] // q), 1)
        x = torch.cat([x, cond["image"]], 1) if "image" in cond else x
        tokens = cond.get("image_tokens")
        return self.model(x, 1000 * t, cond["text"], tokens, return_dict=False, **extra)[0]

    def encode_start(self, images, mask=None):
        """First frames (B, 3, H, W); VACE: videos (B, 3, F, H, W), mask (B, 1, F, H, W), 1: new."""
        if hasattr(self.model, "vace_blocks"):
            return self.encode_control(images, mask)
        config, frames = self.model.config, 4 * (self.shape[1] - 1)
        if config.in_channels == config.out_channels:
            return self.encode_given(images[:, :, None])
        latents = self.encode_images(F.pad(images[:, :, None], (0, 0, 0, 0, 0, frames)))
        mask = torch.zeros_like(latents[:, :4])
        mask[:, :, 0] = 1
        cond = {"image": torch.cat([mask, latents], 1)}
        if config.image_dim:  # CLIP, Wan 2.1
            pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            cond["image_tokens"] = self.codec.pipe.encode_image(list(pixels), images.device)
        return cond

    def encode_control(self, video, mask=None):
        mask = torch.ones_like(video[:, :1]) if mask is None else mask
        h, w = self.shape[-2:]
        folded = mask[:, 0].unflatten(2, (h, -1)).unflatten(4, (w, -1))  # (B, F, h, p, w, q)
        folded = folded.permute(0, 3, 5, 1, 2, 4).flatten(1, 2)
        folded = F.interpolate(folded, self.shape[1:], mode="nearest-exact")
        kept, new = self.encode_images(video * (1 - mask)), self.encode_images(video * mask)
        return {"control": torch.cat([kept, new, folded], 1)}

    def encode_given(self, video):
        """Clean frames at the start: their latents, padded, and which frames they are."""
        latents = self.encode_images(video)
        missing = self.shape[1] - latents.shape[2]
        given = torch.zeros(len(video), self.shape[1], device=latents.device)
        given[:, : latents.shape[2]] = 1
        return {"given": F.pad(latents, (0, 0, 0, 0, 0, missing)), "given_frames": given}


class CogVideoX(Backbone):
    """CogVideoX 2B, 5B, I2V: v-prediction with zero terminal SNR; frames before channels."""

    pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    packages, stream = ("sentencepiece",), 0
    default_size, default_frames = (480, 720), 49
    schedule_of = SD15.schedule_of

    @property
    def max_tokens(self):
        return self.model.config.max_text_seq_length

    def patch(self):
        config = self.model.config
        return config.patch_size_t or 1, config.patch_size, config.patch_size

    def network(self, x, t, cond):
        config = self.model.config
        if "image" in cond:
            x = torch.cat([x, cond["image"]], 1)
        ofs = x.new_full((1,), 2.0) if config.ofs_embed_dim else None
        rotary = self.rotary(x.shape[2:], x.device)
        x = x.transpose(1, 2)
        out = self.model(x, cond["text"], t, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
        return out[0].transpose(1, 2)

    def rotary(self, shape, device):
        """Positions of the largest centred box of this aspect ratio in the training grid."""
        config, (p_t, p, _) = self.model.config, self.patch()
        if not config.use_rotary_positional_embeddings:
            return None
        f, h, w = math.ceil(shape[0] / p_t), shape[1] // p, shape[2] // p
        high, wide = config.sample_height // p, config.sample_width // p
        how = {"grid_type": "slice", "max_size": (high, wide), "crops_coords": None}
        if config.patch_size_t is None:
            scale = min(high / h, wide / w)
            size = [round(h * scale), round(w * scale)]
            top, left = round((high - size[0]) / 2), round((wide - size[1]) / 2)
            how = {"crops_coords": ((top, left), (top + size[0], left + size[1]))}
        return get_3d_rotary_pos_embed(
            config.attention_head_dim, grid_size=(h, w), temporal_size=f, device=device, **how
        )

    def encode_start(self, images):
        latents, vae = self.encode_images(images[:, :, None]), self.codec.pipe.vae.config
        if vae.invert_scale_latents:  # how CogVideoX-1.5 was trained
            latents = latents / vae.scaling_factor**2
        return {"image": F.pad(latents, (0, 0, 0, 0, 0, self.shape[1] - 1))}


class Cosmos(Wan):
    """Cosmos-Predict2: text to image (one frame); video to world from given first frames."""

    pipelines = ("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline")
    packages, given_sigma = ("sentencepiece",), 1e-4
    default_size, default_frames, fps = (704, 1280), 93, 16

    @staticmethod
    def schedule_of(scheduler, shape):
        return KarrasFlow()

    def network(self, x, t, cond):
        extra = {"padding_mask": x.new_zeros(1, 1, *x.shape[3:])}
        if self.model.config.in_channels > self.img_channels:  # V2W: a channel marks given frames
            given = cond.get("given_frames", x.new_zeros(len(x), x.shape[2]))
            extra["condition_mask"] = given[:, None, :, None, None].expand(-1, 1, -1, *x.shape[3:])
            extra["fps"] = self.fps
        t = t[:, None, :, None, None] if t.ndim == 2 else t
        return self.model(x, t.to(x.dtype), cond["text"], return_dict=False, **extra)[0]

    def encode_start(self, images):
        """(B, 3, F, H, W): the first frames of the video, 1 or 1 + 4 n of them."""
        given = (images.shape[2] - 1) // 4 + 1
        frames = 4 * (self.shape[1] - 1) + 1
        rest = images[:, :, -1:].expand(-1, -1, frames - images.shape[2], -1, -1)
        cond = self.encode_given(torch.cat([images, rest], 2))
        cond["given_frames"][:, given:] = 0
        return cond


# ------------------------------------------------------------------------------------------------
# 4. Loading and sampling
# ------------------------------------------------------------------------------------------------
FAMILIES = {"sd15": SD15, "sdxl": SDXL, "flux": Flux, "wan": Wan, "cogvideox": CogVideoX}
FAMILIES["cosmos"] = Cosmos


def require(what: str, *packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def quantisation_config(kind, dtype):
    """int8 (torchao) or nf4 (bitsandbytes), weights only; or a configuration of diffusers."""
    if kind == "int8":
        require("quantisation int8", "torchao", "accelerate")
        torchao = importlib.import_module("torchao.quantization")
        return diffusers.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    if kind == "nf4":
        require("quantisation nf4", "bitsandbytes", "accelerate")
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return diffusers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
    if isinstance(kind, str):
        raise UserError(f"quantisation {kind!r}: choose int8 or nf4.")
    return kind


def load_backbone(
    name: str, dtype=torch.float32, device="cpu", quantisation=None, size=None
) -> Backbone:
    """ "sd15:PATH_OR_HUB_ID" and so on -> the frozen denoiser of a diffusers folder.

    size: (height, width) or (height, width, frames) in pixels of what is made; default: the
    model's own. Raises UserError: no such folder, another family, a package is missing.
    """
    family, _, path = name.partition(":")
    if family not in FAMILIES or not path:
        raise UserError(f"{name!r}: expected {':, '.join(FAMILIES)}: and a folder or a hub id.")
    kind = FAMILIES[family]
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        vae = diffusers.AutoencoderKL.load_config(path, subfolder="vae")
    except Exception as error:  # of the hub client, requests, json ...
        raise UserError(f"{path}: no diffusers model is there ({brief(error)}).") from None
    if index["_class_name"] not in kind.pipelines:
        expected = " or ".join(kind.pipelines)
        raise UserError(f"{path} holds a {index['_class_name']}; {family}: takes {expected}.")
    if index.get("transformer_2", [None])[0]:
        raise UserError(f"{path}: the two experts of Wan 2.2 A14B cannot be wrapped yet.")
    require(f"{family}:", *kind.needs)
    how = {"torch_dtype": dtype}
    if quantisation:
        how["quantization_config"] = quantisation_config(quantisation, dtype)
    classes = (getattr(diffusers, index[part][1]) for part in (kind.part, "scheduler"))
    model, scheduler = (c.from_pretrained for c in classes)
    model = model(path, subfolder=kind.part, **how).to(device).requires_grad_(False).eval()
    scheduler = scheduler(path, subfolder="scheduler")
    height, width, *frames = size or kind.default_size
    shrink = vae.get("scale_factor_spatial") or 2 ** (
        len(vae.get("block_out_channels", "....")) - 1
    )
    shape = [model.config.out_channels or model.config.in_channels]
    if kind is Flux:
        shape = [shape[0] // 4]
    if kind.default_frames:
        frames = frames[0] if frames else kind.default_frames
        shape += [(frames - 1) // 4 + 1]
    shape += [height // shrink, width // shrink]
    parts = {kind.part: model, "scheduler": scheduler, "feature_extractor": None}
    parts["safety_checker"] = nn.Identity() if kind is Cosmos else None  # no pictures are made here
    codec = Codec(path, index, parts, dtype, device, kind.packages)
    return kind(model, kind.schedule_of(scheduler, shape), codec, shape)


@torch.no_grad()
def euler_sampler(
    denoiser, z: Tensor, cond=None, steps: int = 28, guidance: float = 1.0, sigmas=None
) -> Tensor:
    """x <- D + σ' (x - D)/σ along σ(u): DDIM for VP, Euler for flow, one formula for all.

    z: unit noise.   sigmas: noise levels to use instead, without the 0 at the end.
    """
    if sigmas is None:
        sigmas = denoiser.sigma_of(1 - torch.arange(steps, dtype=torch.float64) / steps)
    x = z.double() * sigmas[0]
    for sigma, after in itertools.pairwise([*sigmas.tolist(), 0.0]):
        denoised = denoiser(x.to(z.dtype), sigma, cond)
        if guidance != 1 and cond is not None:
            none = denoiser(x.to(z.dtype), sigma, denoiser.no_condition(cond))
            denoised = none + guidance * (denoised - none)
        x = denoised + after / sigma * (x - denoised)
    return x.to(z.dtype)


# ------------------------------------------------------------------------------------------------
# 5. Wan in causal chunks                                         CausVid, Self-Forcing
# ------------------------------------------------------------------------------------------------


class CausalWan(Wan):
    """Wan whose frames see their own chunk of `block` frames and those before, never later ones.

    The whole clip at once (training; sigma (B,) or (B, F)), or chunk by chunk with a `cache` (a
    dict, empty at first): start = index of x's first frame; store=True keeps its keys and values,
    without gradient, for the calls that follow. Both give the same. Changes the model in place.
    """

    def __init__(self, wan: Wan, block: int = 3):
        super().__init__(wan.model, wan.schedule, wan.codec, wan.shape)
        self.block = block
        for i, layer in enumerate(self.model.blocks):
            layer.attn1.set_processor(CausalAttention(self.mode, i, block))
        rope = self.model.rope
        rope.register_forward_pre_hook(self.longer)
        rope.register_forward_hook(self.shifted)

    def forward(self, x, sigma, cond=None, return_features=False, cache=None, start=0, store=False):
        with self.mode.set(cache=cache, start=start, store=store):
            return super().forward(x, sigma, cond, return_features)

    def network(self, x, t, cond):
        self.mode.frame = x.shape[3] * x.shape[4] // math.prod(self.patch())  # tokens
        return super().network(x, t, cond)

    def longer(self, rope, args):
        """Asks RoPE for the frames before x, too ..."""
        shape = list(args[0].shape)
        shape[2] += self.mode.start
        return (args[0].new_zeros(1).expand(shape),)

    def shifted(self, rope, args, output):
        """... and leaves x's own: keys are stored turned by their position in the whole video."""
        return tuple(r[:, self.mode.start * self.mode.frame :] for r in output)


class CausalAttention:
    """Self-attention of Wan on keys up to the end of the query's chunk; no mask is needed."""

    def __init__(self, mode: Mode, index: int, block: int):
        self.mode, self.index, self.block = mode, index, block

    def __call__(self, attn, hidden_states, encoder=None, mask=None, rotary_emb=None, **_):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, attn.to_v(hidden_states)))
        q, k, v = (y.transpose(1, 2) for y in (turn(q, rotary_emb), turn(k, rotary_emb), v))
        mode, n, past = self.mode, self.block * self.mode.frame, 0
        if mode.cache is not None:
            if self.index in mode.cache:
                past = mode.start * mode.frame
                kept = [y[:, :, :past] for y in mode.cache[self.index]]
                k, v = (torch.cat([a, b], 2) for a, b in zip(kept, (k, v), strict=True))
            if mode.store:
                mode.cache[self.index] = k.detach(), v.detach()
        chunks = [
            F.scaled_dot_product_attention(
                q[:, :, i : i + n], k[:, :, : past + i + n], v[:, :, : past + i + n]
            )
            for i in range(0, q.shape[2], n)
        ]
        out = torch.cat(chunks, 2).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def turn(x: Tensor, rotary) -> Tensor:
    """RoPE: neighbouring channels are one complex number, times exp(i angle)."""
    cos, sin = rotary
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    pairs = pairs * torch.complex(cos[..., ::2].float(), sin[..., 1::2].float())
    return torch.view_as_real(pairs).flatten(-2).type_as(x)


# ------------------------------------------------------------------------------------------------
# 6. Adapters: generator, fake and teacher on one copy of the weights
# ------------------------------------------------------------------------------------------------


class Role(nn.Module):
    """The frozen base with one adapter (LoRA) on, or with none: the teacher.

    Called like the base; parameters() are the adapter's alone. copy.deepcopy makes a new adapter
    with the same weights, so edm_teacher.trainable_copy(teacher) is a generator that starts as the
    teacher, and a copy of a generator can hold its average.
    """

    def __init__(self, base: Backbone, rank: int, name: str = ""):
        super().__init__()
        require("--lora-rank", "peft")
        self.__dict__.update(base=base, rank=rank, name=name)  # the base is no submodule
        base.requires_grad_(False) if not base.mode.weights else None
        self.weights = nn.ParameterDict()
        if name:
            self.add()

    def add(self):
        peft = importlib.import_module("peft")
        model, mode = self.base.model, self.base.mode
        flags = [p.requires_grad for p in mode.weights]
        targets = [
            n.replace(".base_layer", "")
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and "block" in n and "lora_" not in n
        ]
        config = peft.LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets)
        model.add_adapter(config, self.name)
        for name, p in model.named_parameters():
            if f".{self.name}." in name:
                p.data = p.data.float()
                self.weights[name.replace(f".{self.name}.", ".").replace(".", "/")] = p
        for p, flag in zip(mode.weights, flags, strict=True):
            p.requires_grad_(flag)
        mode.weights = [*mode.weights, *self.weights.values()]
        mode.layers = [
            m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)
        ]
        mode.role = self.name
        mode.apply({"role": None})

    def forward(self, *args, **options):
        with self.base.mode.set(role=self.name or None):
            return self.base(*args, **options)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base"], name)

    def __deepcopy__(self, memo):
        count = len(self.base.model.peft_config) if self.base.mode.weights else 0
        other = Role(self.base, self.rank, f"adapter{count}")
        for name, p in self.weights.items():
            other.weights[name].data.copy_(p.data)
            other.weights[name].requires_grad_(p.requires_grad)
        return other.train(self.training)

    def save(self, folder) -> None:
        """The adapter alone, as diffusers saves LoRA."""
        self.base.model.save_lora_adapter(folder, adapter_name=self.name)


def three_roles(base: Backbone, rank: int) -> tuple[Role, Role, Role]:
    """(generator, fake, teacher): two adapters on one frozen base, and the base itself."""
    teacher = Role(base, rank)
    return copy.deepcopy(teacher), copy.deepcopy(teacher), teacher
