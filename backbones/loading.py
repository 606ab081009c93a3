"""Reads models of diffusers, by name, from a folder or the hub."""

import importlib.util
from functools import cached_property

import diffusers
import torch
from torch import Tensor, nn

from backbones.denoiser import Backbone, schedule_of
from backbones.families import SD15, SDXL, CogVideoX, Cosmos, Flux, Wan
from edm_teacher import UserError, brief, own_random_numbers

FAMILIES = dict(sd15=SD15, sdxl=SDXL, flux=Flux, wan=Wan, cogvideox=CogVideoX, cosmos=Cosmos)


def load_backbone(name: str, dtype=torch.float32, device="cpu", size=()) -> Backbone:
    """ "sd15:FOLDER_OR_HUB_ID", size (height, width[, frames]) in pixels -> its frozen denoiser."""
    family, _, path = name.partition(":")
    if family not in FAMILIES or not path:
        raise UserError(f"{name!r}: expected {':, '.join(FAMILIES)}: and a folder or a hub id.")
    kind = FAMILIES[family]
    require(f"{family}:", *kind.needs)
    try:
        index = diffusers.DiffusionPipeline.load_config(path)
        found, two = index["_class_name"], index.get("boundary_ratio")
        if found not in kind.pipelines or two:  # two: Wan 2.2 A14B
            found += " of two networks, each for some noise levels" if two else ""
            raise UserError(f"a {found}; {family}: takes {' or '.join(kind.pipelines)}")
        vae = diffusers.AutoencoderKL.load_config(path, subfolder="vae")
        model, scheduler = (getattr(diffusers, index[k][1]) for k in (kind.part, "scheduler"))
        model = model.from_pretrained(path, subfolder=kind.part, torch_dtype=dtype)
        scheduler = scheduler.from_pretrained(path, subfolder="scheduler")
    except Exception as error:  # OSError, KeyError, those of the hub's client and of safetensors
        raise UserError(f"{path} is no model for {family}: ({brief(error)}).") from None
    model = model.to(device).requires_grad_(False).eval()
    height, width, *frames = [*size, *kind.default_size[len(size) :]]
    scales = vae.get("block_out_channels") or range(4)  # Wan's VAE has another name for them
    shrink = vae.get("scale_factor_spatial") or 2 ** (len(scales) - 1)
    channels = (model.config.out_channels or model.config.in_channels) // kind.folded
    shape = [channels, *((n - 1) // 4 + 1 for n in frames), height // shrink, width // shrink]
    parts = {kind.part: model, "scheduler": scheduler, "torch_dtype": dtype}
    if kind in (SD15, Cosmos):  # nothing is shown here
        parts["safety_checker"] = nn.Identity() if kind is Cosmos else None
    codec = Codec(path, index, parts, kind.packages, device, shrink)
    return kind(model, schedule_of(scheduler, shape), codec, shape)


def require(what: str, *packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class Codec:
    """A pipeline's text encoder, tokenizer and VAE: read when first needed, never copied."""

    def __init__(self, path, index: dict, parts: dict, packages, device, shrink: int):
        self.path, self.index, self.parts, self.packages = path, index, parts, packages
        self.device, self.shrink = device, shrink  # pixels in a latent pixel
        self.loaded, self.nothing, self.table, self.prompts = None, None, {}, []

    def __deepcopy__(self, memo):
        return self

    @property
    def pipe(self):
        if self.loaded is None:
            require("Encoding a prompt", "transformers", *self.packages)
            read = diffusers.DiffusionPipeline.from_pretrained
            with own_random_numbers(0):  # reading UMT5 draws some
                self.loaded = read(self.path, vae=self.vae, **self.parts)
            for part in self.loaded.components.values():
                if isinstance(part, nn.Module):
                    part.to(self.device)
        return self.loaded

    @cached_property
    def vae(self):
        """In float32: VAEs suffer from less."""
        vae = getattr(diffusers, self.index["vae"][1]).from_pretrained(self.path, subfolder="vae")
        return vae.to(self.device).requires_grad_(False).eval()

    def scale(self, x: Tensor):
        """(mean, std) of the VAE's latents, to go with x."""
        config = self.vae.config
        std = 1 / config.get("scaling_factor", 1.0)
        if not config.get("latents_mean"):
            return config.get("shift_factor") or 0.0, std
        both = torch.tensor([config.latents_mean, config.latents_std], device=x.device)
        mean, each = both.reshape(2, 1, -1, *[1] * (x.ndim - 2))
        return mean, each * std
