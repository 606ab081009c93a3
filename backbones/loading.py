"""Reads models of diffusers, by name, from a folder or the hub."""

import contextlib
import importlib.util
from functools import cached_property
from pathlib import Path

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from backbones.denoiser import Backbone, schedule_of
from backbones.edm_files import finite
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
    if Path(path).suffix in (".safetensors", ".ckpt"):
        make = f"{kind.pipelines[0]}.from_single_file(FILE).save_pretrained(FOLDER)"
        raise UserError(f"{path} is one file and {family}: takes a folder: {make} makes it.")
    with reading(what := f"{path} is no model for {family}:"):
        index = diffusers.DiffusionPipeline.load_config(path)
        found, two = index["_class_name"], index.get("boundary_ratio")
        if found not in kind.pipelines or two:  # two: Wan 2.2 A14B
            found += " of two networks, each for some noise levels" if two else ""
            raise UserError(f"a {found}; {family}: takes {' or '.join(kind.pipelines)}")
        network, scheduler = (getattr(diffusers, index[k][1]) for k in (kind.part, "scheduler"))
        vae, config = (network.load_config(path, subfolder=k) for k in ("vae", kind.part))
        takes = config["in_channels"]
        gives = config.get("out_channels") or takes
        if takes != gives and not hasattr(kind, "encode_start"):
            raise UserError(f"{takes} channels in, {gives} out, as for inpainting: take another")
        if kind.part == "unet" and not config.get("mid_block_type", True):
            raise UserError("a U-Net without middle block, which heads read: take another")
        scheduler = scheduler.from_pretrained(path, subfolder="scheduler")
    scales = vae.get("block_out_channels") or range(4)  # Wan's VAE has another name for them
    shrink = vae.get("scale_factor_spatial") or 2 ** (len(scales) - 1)
    size = [*size, *kind.default_size[len(size) :]]
    height, width, *frames = check_size(size, kind, shrink * kind.side, family)
    shape = [gives // kind.folded, *((n - 1) // 4 + 1 for n in frames)]
    shape += [height // shrink, width // shrink]
    with reading(what):
        fixed = [shrink * config.get(f"sample_{side}", 0) for side in ("height", "width")]
        if config.get("use_learned_positional_embeddings") and fixed != [height, width]:
            raise UserError(f"its learned positions take --size {fixed[0]},{fixed[1]} alone")
        schedule = schedule_of(scheduler, shape)
        model = read(network, path, kind.part, torch_dtype=dtype)
    model = model.to(device).requires_grad_(False).eval()
    parts = {kind.part: model, "scheduler": scheduler, "torch_dtype": dtype}
    if kind in (SD15, Cosmos):  # nothing is shown here
        parts["safety_checker"] = nn.Identity() if kind is Cosmos else None
    codec = Codec(path, index, parts, kind.packages, device, shrink)
    return kind(model, schedule, codec, shape)


def check_size(size: list[int], kind, unit: int, family: str) -> list[int]:
    """The size, if the network takes it; else an error with the nearest ones that it takes."""
    frames = len(kind.default_size) - 2
    first, step = np.array([(unit, unit)] * 2 + [(1, 4)] * frames).T
    given = np.array(size[: len(first)]) - first
    near = [(first + step * ((given + up) // step).clip(0)).tolist() for up in (0, step - 1)]
    if size != near[0]:
        size, *near = (",".join(map(str, v)) for v in (size, *near))
        what = f"height,width in multiples of {unit}" + ",frames of 4 n + 1" * frames
        near = " or ".join(dict.fromkeys(near))
        raise UserError(f"--size {size}: {family}: takes {what}, like {near}.")
    return size


@contextlib.contextmanager
def reading(what: str):
    """Any error, of the hub's client, safetensors, torch, ..., becomes one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({brief(error)}).") from None


def fetch(from_pretrained, path, **how):
    """Some folders have their weights in *.fp16.safetensors alone."""
    try:
        return from_pretrained(path, **how)
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            return from_pretrained(path, variant="fp16", **how)
        raise error


def read(kind, path, folder=None, **how) -> nn.Module:
    """A network of diffusers, with every weight: diffusers draws those that are missing."""
    how |= {"subfolder": folder, "output_loading_info": True}
    model, info = fetch(kind.from_pretrained, path, **how)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{missing[0]} is missing: {len(missing)} weights are not in its files")
    finite(model.state_dict())
    return model


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
            pipeline, parts = getattr(diffusers, self.index["_class_name"]), {"vae": self.vae}
            what = f"{self.path}: its text encoder cannot be used"
            parts |= self.parts  # DiffusionPipeline would read Wan's network once more
            with own_random_numbers(0), reading(what):  # UMT5 draws some
                self.loaded = fetch(pipeline.from_pretrained, self.path, **parts)
                for part in self.loaded.components.values():
                    if isinstance(part, nn.Module):
                        finite(part.to(self.device).state_dict())
        return self.loaded

    @cached_property
    def vae(self):
        """In float32: VAEs suffer from less."""
        with reading(f"{self.path}: its VAE cannot be used"):
            vae = read(getattr(diffusers, self.index["vae"][1]), self.path, "vae")
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
