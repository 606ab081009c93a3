"""Backbones: tiny random models of every family, saved as diffusers saves them and loaded for real.

What needs transformers, accelerate or peft is skipped where they are not installed.
"""

import copy
import functools
import importlib.util
import json
import logging
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

import causal_video
import diffusers_backbones as backbones
import dmd2_cifar
import edm_teacher as edm
import f_distill
import ladd
from diffusers_backbones import (
    VP,
    CausalWan,
    Flow,
    Role,
    euler_sampler,
    load_backbone,
    three_roles,
)

D64 = torch.float64
HAS = {p: importlib.util.find_spec(p) is not None for p in ("transformers", "accelerate", "peft")}
logging.getLogger("diffusers").setLevel(logging.ERROR)

# ---------------------------------------------------------------- tiny models, as folders

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
TIME = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
TIME |= {"cross_attention_dim": 32, "addition_embed_type": "text_time"}
DYNAMIC = {"use_dynamic_shifting": True}
FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}
IMAGE = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
VACE = {"vace_layers": [0, 2], "vace_in_channels": 72}
COG = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "num_layers": 3,
    "sample_width": 16,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 16,
}
COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "mlp_ratio": 2,
    "text_embed_dim": 32,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "extra_pos_embed_type": None,
}
KL = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
COG_VAE = KL | {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
}
WAN_VAE = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN_VAE |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
VP_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULER = VP_BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
DDIM |= {"timestep_spacing": "trailing"}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
ROTARY = {"use_rotary_positional_embeddings": True}

FAMILIES = {  # network, scheduler, VAE, text encoders
    "sd15": ("UNet2DConditionModel", ("PNDMScheduler", EULER), ("AutoencoderKL", KL), ["clip"]),
    "sdxl": (
        "UNet2DConditionModel",
        ("EulerDiscreteScheduler", EULER),
        ("AutoencoderKL", KL),
        ["clip", "clip-projection"],
    ),
    "flux": (
        "FluxTransformer2DModel",
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("AutoencoderKL", KL | {"shift_factor": 0.1}),
        ["clip", "t5"],
    ),
    "wan": (
        "WanTransformer3DModel",
        ("UniPCMultistepScheduler", UNIPC),
        ("AutoencoderKLWan", WAN_VAE),
        ["umt5"],
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        ("CogVideoXDDIMScheduler", DDIM),
        ("AutoencoderKLCogVideoX", COG_VAE),
        ["t5"],
    ),
    "cosmos": (
        "CosmosTransformer3DModel",
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("AutoencoderKLWan", WAN_VAE),
        ["t5"],
    ),
}
MODELS = {  # family, pipeline, configuration of the network, what is special of its scheduler
    "sd15": ("sd15", "StableDiffusionPipeline", UNET | {"cross_attention_dim": 16}, {}),
    "sdxl": ("sdxl", "StableDiffusionXLPipeline", UNET | TIME, {}),
    "flux-dev": ("flux", "FluxPipeline", FLUX | {"guidance_embeds": True}, DYNAMIC),
    "flux-schnell": ("flux", "FluxPipeline", FLUX, {}),
    "wan": ("wan", "WanPipeline", WAN, {}),
    "wan-i2v": ("wan", "WanImageToVideoPipeline", WAN | IMAGE, {}),
    "wan-ti2v": ("wan", "WanImageToVideoPipeline", WAN, {}),
    "wan-vace": ("wan", "WanVACEPipeline", WAN | VACE, {}),
    "cogvideox-2b": ("cogvideox", "CogVideoXPipeline", COG, {"snr_shift_scale": 3.0}),
    "cogvideox-5b": ("cogvideox", "CogVideoXPipeline", COG | ROTARY, {"snr_shift_scale": 1.0}),
    "cogvideox-i2v": (
        "cogvideox",
        "CogVideoXImageToVideoPipeline",
        COG | ROTARY | {"in_channels": 8},
        {"snr_shift_scale": 1.0},
    ),
    "cosmos-t2i": ("cosmos", "Cosmos2TextToImagePipeline", COSMOS, {}),
    "cosmos-v2w": ("cosmos", "Cosmos2VideoToWorldPipeline", COSMOS | {"in_channels": 5}, {}),
}
ALL = list(MODELS)
NEED_ACCELERATE = ("wan", "cosmos")  # diffusers loads some of their weights in float32
VIDEO = (64, 96, 9)  # not square: height and width are not to be mixed up


def size_of(name):
    image = MODELS[name][0] in ("sd15", "sdxl", "flux")
    return (64, 96) if image else (64, 96, 1) if name == "cosmos-t2i" else VIDEO


def text_parts(encoders):
    """{folder: object}: text encoders of some thousand weights, a tokenizer of ten words."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog", "on", "the", "mat"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=16, **special
    )
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    clip = transformers.CLIPTextConfig(
        hidden_size=16,
        vocab_size=12,
        max_position_embeddings=16,
        projection_dim=16,
        **{"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0} | layers,
    )
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 12}
    vision = transformers.CLIPVisionConfig(hidden_size=16, image_size=32, patch_size=16, **layers)
    make = {
        "clip": lambda: transformers.CLIPTextModel(clip),
        "clip-projection": lambda: transformers.CLIPTextModelWithProjection(clip),
        "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**t5)),
        "umt5": lambda: transformers.UMT5EncoderModel(transformers.UMT5Config(**t5)),
    }
    parts = {}
    for i, name in enumerate(e for e in encoders if e != "clip-vision"):
        suffix = f"_{i + 1}" if i else ""
        parts["text_encoder" + suffix], parts["tokenizer" + suffix] = make[name](), tokenizer
    if "clip-vision" in encoders:
        parts["image_encoder"] = transformers.CLIPVisionModel(vision)
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        parts["image_processor"] = transformers.CLIPImageProcessor(**size)
    return parts


@functools.cache
def folder(name, base):
    """Writes the model's folder: model_index.json and one sub-folder a part."""
    family, pipeline, config, special = MODELS[name]
    network, (scheduler, settings), (vae, vae_config), encoders = FAMILIES[family]
    network = "WanVACETransformer3DModel" if name == "wan-vace" else network
    encoders = [*encoders, "clip-vision"] if "image_dim" in config else encoders
    torch.manual_seed(len(name))
    path = base / name
    parts = {"unet" if "UNet" in network else "transformer": getattr(diffusers, network)(**config)}
    parts |= {"scheduler": getattr(diffusers, scheduler)(**settings | special)}
    parts |= {"vae": getattr(diffusers, vae)(**vae_config)}
    parts |= text_parts(encoders) if HAS["transformers"] else {}
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for part, value in parts.items():
        value.save_pretrained(path / part)
        index[part] = [type(value).__module__.split(".")[0], type(value).__name__]
    index |= {"expand_timesteps": True} if name == "wan-ti2v" else {}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@functools.cache
def cached(name, base):
    return load_backbone(f"{MODELS[name][0]}:{folder(name, base)}", size=size_of(name))


@pytest.fixture
def load(base):
    """load(name) -> the tiny backbone, freshly copied, frozen."""

    def load(name):
        if MODELS[name][0] in NEED_ACCELERATE and not HAS["accelerate"]:
            pytest.skip("needs accelerate")
        return copy.deepcopy(cached(name, base))

    return load


def some_cond(backbone, n=2, seed=0):
    """A condition of the right shapes, without any text encoder."""
    torch.manual_seed(seed)
    config, frames = backbone.model.config, backbone.shape[1]
    widths = ("text_dim", "joint_attention_dim", "text_embed_dim", "cross_attention_dim")
    width = next(config[k] for k in widths if k in config)
    cond = {"text": torch.randn(n, 512 if config.get("image_dim") else 16, width)}
    if type(backbone).__name__ in ("SDXL", "Flux"):
        cond["pooled"] = torch.randn(n, 16)
    if config.get("image_dim"):
        cond["image_tokens"] = torch.randn(n, 5, 16)
    shape = backbone.shape[1:]
    extra = config.in_channels - (config.out_channels or config.in_channels)
    if extra == 1:
        cond["given"], cond["given_frames"] = (
            torch.randn(n, *backbone.shape),
            torch.zeros(n, frames),
        )
        cond["given_frames"][:, 0] = 1
    elif extra:
        cond["image"] = torch.randn(n, extra, *shape)
    if hasattr(backbone.model, "vace_blocks"):
        cond["control"] = torch.randn(n, 72, *shape)
    return cond


# ---------------------------------------------------------------- against diffusers' own pipelines


def picture(frames=None):
    """(1, 3, H, W) or (1, 3, F, H, W) in [-1, 1], every value that of a byte."""
    torch.manual_seed(5)
    bytes_ = torch.randint(0, 256, (1, 3, *([frames] if frames else []), 64, 96))
    return bytes_ / 127.5 - 1


def as_pil(x):
    from PIL import Image

    return Image.fromarray(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def run_pipeline(name, backbone, z, steps, guidance, prompt):
    """(σ, [x before each step, result], factors to x + σ ε, pixels in [0, 1]) of pipeline(...).

    Only its scheduler is changed, to Euler (SD, flow); CogVideoX has DDIM.
    """
    family, pipe, seen = MODELS[name][0], backbone.codec.pipe, []
    config, vp = pipe.scheduler.config, family in ("sd15", "sdxl", "cogvideox")
    if family in ("sd15", "sdxl"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    elif family == "wan":
        shift = config.get("flow_shift") or config["shift"]
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    options = {"height": 64, "width": 96, "num_inference_steps": steps, "output_type": "pt"}
    options |= {"guidance_scale": guidance, "prompt": prompt, "negative_prompt": ""}
    if family == "sdxl":
        del options["negative_prompt"]
    if backbone.img_channels != backbone.shape[0] or len(backbone.shape) == 4:
        options["num_frames"] = 9
    if hasattr(backbone, "tokens"):
        options["max_sequence_length"] = backbone.tokens
    latents = z
    if family == "flux":
        del options["negative_prompt"]
        options["max_sequence_length"] = 512 if "dev" in name else 256
        options["guidance_scale"] = 3.5
        latents = pipe._pack_latents(z, 1, *z.shape[1:])
    elif family == "cogvideox":
        latents = z.transpose(1, 2)
    elif name == "cosmos-t2i":
        del options["num_frames"]
    if name in ("wan-i2v", "wan-ti2v", "cogvideox-i2v", "cosmos-v2w"):
        options["image"] = as_pil(picture()[0])
    if name == "wan-vace":
        options["video"] = [as_pil(x) for x in picture(9)[0].unbind(1)]

    def keep(pipe, i, t, values):
        seen.append(values["latents"])
        return {}

    if family == "cosmos":
        options["guidance_scale"] = guidance - 1  # there it is c + w (c - u)
        pipe.safety_checker.check_text_safety = lambda text: True
        pipe.safety_checker.check_video_safety = lambda video: video
        pipe.safety_checker.device, pipe.safety_checker.dtype = torch.device("cpu"), torch.float32
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**options, latents=latents.clone(), callback_on_step_end=keep)[0]
    if family == "flux":
        seen = [pipe._unpack_latents(x, 64, 96, 8) for x in seen]
    elif family == "cogvideox":
        seen = [x.transpose(1, 2) for x in seen]
        alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
        return ((1 - alphas) / alphas).sqrt(), [z, *seen], (1 / alphas).sqrt(), made
    sigmas = pipe.scheduler.sigmas[:steps].double()
    if vp:
        return sigmas, [z * pipe.scheduler.init_noise_sigma, *seen], torch.ones(steps), made
    if family == "cosmos":
        return sigmas, [z * 80, *seen], torch.ones(steps), made
    return sigmas / (1 - sigmas), [z, *seen], 1 / (1 - sigmas), made


class Recorder:
    """Wraps a denoiser and keeps the x of its conditional calls."""

    def __init__(self, backbone):
        self.backbone, self.seen, self.no_condition = backbone, [], lambda cond: None

    def __call__(self, x, sigma, cond):
        if cond is not None:
            self.seen.append(x)
            self.cond = cond
            return self.backbone(x, sigma, cond)
        return self.backbone(x, sigma, self.backbone.no_condition(self.cond))


def own_condition(name, backbone, prompt):
    cond = backbone.encode_prompts([prompt])
    if name in ("wan-i2v", "wan-ti2v", "cogvideox-i2v"):
        cond |= backbone.encode_start(picture())
    if name == "cosmos-v2w":
        cond |= backbone.encode_start(picture()[:, :, None])
    if name == "wan-vace":
        cond |= backbone.encode_start(picture(9))
    return cond


@pytest.mark.parametrize("name", ALL)
def test_sampling_equals_the_pipeline(name, load, monkeypatch):
    """Prompt and picture in, latents out: x + (σ' - σ)(x - D)/σ is each pipeline's own sampler.

    At every step to 1e-4 from the first finite σ on; to 1e-3 from pure noise with 9999 for σ = ∞.
    """
    pytest.importorskip("transformers")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    backbone, prompt = load(name), "a red cat on the mat"
    guidance = 1.0 if name.startswith("flux") else 3.0
    torch.manual_seed(1)
    z = torch.randn(1, *backbone.shape)
    sigmas, seen, scale, made = run_pipeline(name, backbone, z, 4, guidance, prompt)
    cond = own_condition(name, backbone, prompt)
    spy = Recorder(backbone)

    def largest_error(z, sigmas, seen, scale):
        spy.seen = []
        x = euler_sampler(spy, z, cond, guidance=guidance, sigmas=sigmas)
        expected = [x * s for x, s in zip(seen, scale, strict=False)]
        if not name.startswith("cosmos"):  # whose last step goes from σ_min to σ_min
            spy.seen, expected = [*spy.seen, x], [*expected, seen[-1]]
        pairs = [(a, b) for a, b in zip(spy.seen, expected, strict=True)]
        if name == "wan-ti2v":  # the pipeline lets the given frame go until the end
            pairs = [(a[:, :, 1:], b[:, :, 1:]) for a, b in pairs]
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    first = int(sigmas[0] > 1e5)
    if first:
        finite = torch.cat([torch.tensor([backbone.sigma_max]), sigmas[1:]])
        noise = [backbone.sigma_max * z, *seen[1:]]
        ones = torch.cat([torch.ones(1), scale[1:]])
        assert largest_error(z, finite, noise, ones) < 1e-3
    start = (seen[first] * scale[first] / sigmas[first]).float()
    assert largest_error(start, sigmas[first:], seen[first:], scale[first:]) < 1e-4
    if name == "wan-ti2v":
        seen[-1][:, :, :1] = cond["given"][:, :, :1]
    pixels = backbone.decode(seen[-1])
    pixels = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
    pixels = pixels[:, 0] if name == "cosmos-t2i" else pixels
    bits = 1 / 255 if name.startswith("cosmos") else 1e-4  # its guardrail sees bytes
    assert_close(made, (pixels / 2 + 0.5).clamp(0, 1), atol=bits, rtol=0)


def test_the_two_networks_of_wan_a14b_share_the_noise_levels(load, base):
    """wan: and wan-low: of one folder, each on its own side of the boundary, are its pipeline."""
    pytest.importorskip("transformers")
    load("wan")
    path = base / "a14b"
    shutil.copytree(folder("wan", base), path)
    torch.manual_seed(99)
    diffusers.WanTransformer3DModel(**WAN).save_pretrained(path / "transformer_2")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"boundary_ratio": 0.8, "transformer_2": ["diffusers", "WanTransformer3DModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    high, low = (load_backbone(f"{kind}:{path}", size=VIDEO) for kind in ("wan", "wan-low"))
    for backbone, span in ((high, (0.8, 0.9999)), (low, (0.001, 0.8))):
        ends = backbone.schedule.time(backbone.sigma_of(torch.tensor([0.0, 1.0], dtype=D64)))
        assert_close(ends, torch.tensor(span, dtype=D64))
        assert (backbone.sigma_min, backbone.sigma_max) == pytest.approx(
            [t / (1 - t) for t in span]
        )

    def both(x, sigma, cond):
        return (high if sigma / (1 + sigma) >= 0.8 else low)(x, sigma, cond)

    z = torch.randn(1, *high.shape)
    high.codec.pipe.register_modules(transformer_2=low.model)
    sigmas, seen, scale, _ = run_pipeline("wan", high, z, 6, 1.0, "a cat")
    x = (seen[1] * scale[1] / sigmas[1]).float()
    x = euler_sampler(both, x, high.encode_prompts(["a cat"]), sigmas=sigmas[1:])
    assert (x - seen[-1]).abs().max() < 1e-4 * x.abs().max()
    assert 0 < (sigmas < 4).sum() < 5


# ---------------------------------------------------------------- preconditioning


def schedules():
    v = diffusers.CogVideoXDDIMScheduler(**DDIM)
    eps = diffusers.DDIMScheduler(**VP_BETAS)
    return {
        "eps": VP(eps.alphas_cumprod, "epsilon"),
        "v": VP(v.alphas_cumprod, "v_prediction"),
        "flow": Flow(3.0),
        "cosmos": Flow(None),
    }


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "cosmos"])
def test_preconditioning_inverts_each_familys_forward_process(kind):
    """c_in (x + σ ε) = α x + s ε of the family; with the F it trains for, D = x and the weight
    1/c_out² turns (D - x)² into (F - F*)²."""
    schedule = schedules()[kind]
    u = torch.linspace(0, 1, 7, dtype=D64)[:, None]
    sigma = schedule.sigma_of(u)
    x, eps = torch.randn(2, 7, 5, dtype=D64)
    alpha = 1 / (1 + sigma) if kind in ("flow", "cosmos") else (1 + sigma**2).rsqrt()
    s = alpha * sigma
    best = {"eps": eps, "v": alpha * eps - s * x}.get(kind, eps - x)
    c_skip, c_out, c_in = schedule.coefficients(sigma)
    assert_close(c_in * (x + sigma * eps), alpha * x + s * eps)
    assert_close(c_skip * (x + sigma * eps) + c_out * best, x.clone(), atol=1e-9, rtol=1e-9)
    wrong = best + torch.randn(7, 5, dtype=D64)
    denoised = c_skip * (x + sigma * eps) + c_out * wrong
    assert_close(((denoised - x) / c_out) ** 2, (wrong - best) ** 2, rtol=1e-6, atol=1e-9)
    assert_close(
        schedule.sigma_of(torch.tensor([0.0, 1.0], dtype=D64)).tolist(),
        [schedule.sigma_min, schedule.sigma_max],
    )


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_time_of_a_table_entry_is_its_index(kind):
    """VP: t(σ_k) = k, σ(u = k/999) = σ_k, also in float32; σ = ∞ became 10,000, 0 is t = 0."""
    schedule = schedules()[kind]
    k = torch.arange(1000.0)
    sigma = schedule.table.exp()
    assert_close(schedule.time(sigma.float()), k, atol=1e-3, rtol=0)
    assert_close(schedule.sigma_of(k.double() / 999), sigma, rtol=1e-9, atol=0)
    assert schedule.time(torch.zeros(1)) == 0
    assert schedule.sigma_max == pytest.approx(14.6146 if kind == "eps" else 1e4, rel=1e-4)


def test_flow_times_are_shifted_as_by_the_schedulers():
    """t = s u / (1 + (s-1) u), with Flux' s from its number of tokens, between 0.001 and 0.9999."""
    u = torch.linspace(0.1, 0.9, 9, dtype=D64)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for side, mu in ((32, 0.5), (128, 1.15)):  # 256 and 4096 tokens
        flow = backbones.Flux.schedule_of(scheduler, (16, side, side))
        t = torch.from_numpy(scheduler.time_shift(mu, 1.0, u.numpy()))
        assert_close(flow.time(flow.sigma_of(u)), t)
    for settings in (UNIPC, {"shift": 3.0}):
        scheduler = diffusers.UniPCMultistepScheduler(**UNIPC)
        if "shift" in settings:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**settings)
        flow = backbones.Wan.schedule_of(scheduler, None)
        assert_close(flow.time(flow.sigma_of(u)), 3 * u / (1 + 2 * u))
    ends = Flow(5.0).time(Flow(5.0).sigma_of(torch.tensor([0.0, 1.0], dtype=D64)))
    assert_close(ends, torch.tensor([0.001, 0.9999], dtype=D64))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux-dev", "cogvideox-5b", "wan", "cosmos-t2i"])
def test_sampling_equals_the_scheduler(name, load):
    """Without any text encoder: x_t by the family's scheduler.step, F from the bare network."""
    backbone = load(name)
    family, vp = MODELS[name][0], name in ("sd15", "sdxl", "cogvideox-5b")
    cond, z = some_cond(backbone), torch.randn(2, *backbone.shape)
    if family == "cogvideox":
        scheduler = diffusers.CogVideoXDDIMScheduler(**DDIM | {"snr_shift_scale": 1.0})
        scheduler.set_timesteps(4)
        alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
        sigmas, scale = (1 / alphas - 1).sqrt(), (1 / alphas).sqrt()
    elif vp:
        scheduler = diffusers.EulerDiscreteScheduler(**EULER)
        scheduler.set_timesteps(4)
        sigmas, scale = scheduler.sigmas[:4].double(), torch.ones(4)
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(4)
        sigmas = scheduler.sigmas[:4].double() / (1 - scheduler.sigmas[:4].double())
        scale = 1 / (1 - scheduler.sigmas[:4].double())
    start = int(sigmas[0] > 1e5)
    x = start_x = z if not vp or start else z * sigmas[0]
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            if i == start:
                start_x = x * scale[i]
            time = t if vp else t / 1000
            x_in = scheduler.scale_model_input(x, t) if family in ("sd15", "sdxl") else x
            out = backbone.network(x_in.float(), time.expand(2).float(), cond)
            x = scheduler.step(out, t, x)[0]
    mine = euler_sampler(backbone, (start_x / sigmas[start]).float(), cond, sigmas=sigmas[start:])
    assert (mine - x).abs().max() < 1e-4 * x.abs().max()
    if start and family != "cosmos":  # its own levels begin at 80
        finite = torch.cat([torch.tensor([backbone.sigma_max]), sigmas[1:]])
        assert (
            euler_sampler(backbone, z, cond, sigmas=finite) - x
        ).abs().max() < 1e-3 * x.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_denoiser_has_the_interface_of_edm_precond(name, load):
    """D(x, σ, cond): x's shape, float32, finite at both ends; every weight gets a gradient."""
    backbone = load(name)
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    for sigma in (backbone.sigma_min, backbone.sigma_max):
        out = backbone(x * max(sigma, 1), torch.full((2,), sigma), cond)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert out.isfinite().all()
    trained = edm.trainable_copy(backbone)
    assert trained.codec is backbone.codec  # text encoder and VAE are not copied
    trained(x, torch.tensor([0.7, 2.0]), cond).square().mean().backward()
    missing = [k for k, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing
    assert not any(p.requires_grad for p in backbone.parameters())
    weight = backbone.fake_weight(torch.tensor([0.5, 2.0]))
    family = MODELS[name][0]
    expected = {"sd15": [4, 0.25], "sdxl": [4, 0.25], "cogvideox": [5, 1.25]}.get(family, [9, 2.25])
    assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("name", ALL)
def test_features_are_the_blocks_own_outputs(name, load):
    """Hooks change nothing: same x, maps (B, C, *grid); "only" ends after the last of them."""
    backbone = load(name)
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape, requires_grad=True)
    plain = backbone(x, 0.7, cond)
    denoised, features = backbone(x, 0.7, cond, return_features=True)
    none, early = backbone(x, 0.7, cond, return_features="only")
    assert none is None
    assert torch.equal(plain, denoised)
    assert len(features) == len(early) == 2
    for a, b in zip(features, early, strict=True):
        assert torch.equal(a, b)
    if MODELS[name][0] in ("sd15", "sdxl"):
        assert [f.shape[-1] for f in features] == [12, 6]
    else:
        grid = [n // p for n, p in zip(backbone.shape[1:], backbone.patch(), strict=True)]
        assert all(list(f.shape[2:]) == grid for f in features)
    (grad,) = torch.autograd.grad(early[-1].square().sum(), x)
    assert grad.abs().sum() > 0
    assert not any(m._forward_hooks for m in backbone.modules())


def test_transformer_features_are_tokens_in_their_places(load):
    """A token's feature stands where its pixels are: only there a change of them shows most."""
    backbone = load("flux-schnell")
    backbone.taps, cond = [0], some_cond(backbone, 1)
    x = torch.randn(1, *backbone.shape)
    moved = x.clone()
    moved[:, :, 2:4, 6:8] += 1  # rows 2, 3 and columns 6, 7: token (1, 3)
    a, b = (backbone(y, 0.7, cond, return_features="only")[1][0] for y in (x, moved))
    change = (a - b).abs().sum(1)[0]
    assert divmod(change.argmax().item(), 6) == (1, 3)


def test_more_precise_than_its_network(load):
    """A bfloat16 network: D is float32 and c_skip x + ... is not rounded: at small σ D = x."""
    backbone = load("flux-dev")
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    half = copy.deepcopy(backbone)
    half.model.to(torch.bfloat16)
    half.dtype = torch.bfloat16
    assert half(x, 0.5, cond).dtype == torch.float32
    assert_close(half(x, 0.5, cond), backbone(x, 0.5, cond), atol=0.05, rtol=0)
    assert_close(half(x, 1e-3, cond), backbone(x, 1e-3, cond), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- conditions and guidance


@pytest.mark.parametrize("name", ["sd15", "flux-dev", "wan-i2v", "cosmos-v2w"])
def test_rows_dicts_and_none(name, load):
    """Rows of the table equal the dict they stand for, -1 and None the empty prompt; a given image
    stays when the text goes; w = 1 is the conditional output in one call."""
    backbone = load(name)
    backbone.codec.table = table = some_cond(backbone, 3)
    backbone.codec.nothing = {
        k: v[:1] for k, v in some_cond(backbone, 1, seed=9).items() if k in ("text", "pooled")
    }
    x, sigma = torch.randn(2, *backbone.shape), torch.tensor([0.5, 3.0])
    rows = torch.tensor([2, 0])
    picked = {k: v[rows] for k, v in table.items()}
    conditional = backbone(x, sigma, picked)
    assert torch.equal(backbone(x, sigma, rows), conditional)
    assert torch.equal(edm.guided(backbone, x, sigma, rows, 1.0), conditional)
    without = picked | {k: v.expand(2, *v.shape[1:]) for k, v in backbone.codec.nothing.items()}
    dropped = backbone(x, sigma, backbone.no_condition(rows))
    assert torch.equal(dropped, backbone(x, sigma, without))
    assert not torch.allclose(dropped, conditional, atol=1e-4)
    if name in ("sd15", "flux-dev"):
        assert torch.equal(backbone(x, sigma, None), dropped)
        mixed = backbone(x, sigma, torch.tensor([2, -1]))
        assert_close(mixed[:1], conditional[:1], atol=1e-5, rtol=0)
        assert_close(mixed[1:], dropped[1:], atol=1e-5, rtol=0)
        expected = dropped + 4.0 * (conditional - dropped)
        assert_close(edm.guided(backbone, x, sigma, rows, 4.0), expected)
    backbone.codec.table, backbone.codec.nothing = {}, None


def test_flux_dev_is_told_its_guidance_and_schnell_is_not(load):
    """dev: 3.5 unless cond says otherwise, with a prompt or without; schnell has no such input."""
    x = torch.randn(2, 4, 8, 8)
    for name, same in (("flux-dev", False), ("flux-schnell", True)):
        backbone = load(name)
        cond = some_cond(backbone)
        told = cond | {"guidance": torch.full((2,), 3.5)}
        assert torch.equal(backbone(x, 1.0, cond), backbone(x, 1.0, told))
        told["guidance"] = torch.ones(2)
        assert torch.equal(backbone(x, 1.0, cond), backbone(x, 1.0, told)) == same


def test_no_condition_of_each_family(load):
    """An empty prompt's embedding; SDXL: zeros, as its pipeline's configuration says."""
    pytest.importorskip("transformers")
    for name in ("sd15", "wan"):
        backbone = load(name)
        none = backbone.condition(None, 2)
        assert_close(none["text"], backbone.encode_prompts(["", ""])["text"])
        assert none["text"].abs().sum() > 0
    none = load("sdxl").condition(None, 2)
    assert not none["text"].any()
    assert not none["pooled"].any()


def test_prompts_become_rows(load):
    """use_prompts: labels of the scripts are rows of the table of embeddings."""
    pytest.importorskip("transformers")
    backbone = load("sd15").use_prompts(["a red cat", "a dog", "the mat"])
    assert backbone.label_dim == 3
    x = torch.randn(2, *backbone.shape)
    dog = backbone.encode_prompts(["a dog"])
    assert_close(backbone(x, 1.0, torch.tensor([1, 1])), backbone(x, 1.0, dog))
    backbone.codec.table = {}


def test_vace_takes_what_the_mask_leaves_out_from_the_video(load):
    """Mask 1: new, 0: kept. 16 channels of the kept, 16 of the new, 64 of the mask's pixels."""
    pytest.importorskip("transformers")
    backbone, video = load("wan-vace"), picture(9)
    mask = (torch.rand(1, 1, 9, 64, 96) > 0.5).float()
    control = backbone.encode_start(video, mask)["control"]
    pipe = backbone.codec.pipe
    expected = pipe.prepare_video_latents(video, mask.expand(-1, 3, -1, -1, -1), [[]])
    assert_close(control[:, :8], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(control[:, 8:], pipe.prepare_masks(mask.expand(-1, 3, -1, -1, -1), [[]]))


def test_images_to_latents_and_back_have_unit_scale(load):
    """encode is (VAE - mean) / std, decode its inverse, with each VAE's own numbers."""
    pytest.importorskip("transformers")
    for name, mean, std in (("flux-dev", 0.1, 1 / 0.18215), ("cogvideox-5b", 0.0, 1 / 0.7)):
        backbone = load(name)
        x = picture(None if name == "flux-dev" else 9)
        raw = backbone.codec.pipe.vae.encode(x).latent_dist.mode()
        assert_close(backbone.encode_images(x), (raw - mean) / std)
        assert_close(
            backbone.decode((raw - mean) / std), backbone.codec.pipe.vae.decode(raw).sample
        )


def test_heun_of_the_scripts_samples_a_backbone(load):
    """edm_teacher.heun_sampler takes it as it is; on a fine grid it agrees with Euler."""
    backbone = load("cosmos-t2i" if HAS["accelerate"] else "sd15")
    cond, z = some_cond(backbone), torch.randn(2, *backbone.shape)
    ends = {"sigma_min": backbone.sigma_min, "sigma_max": backbone.sigma_max}
    a = edm.heun_sampler(backbone, z, cond, steps=20, **ends)
    b = euler_sampler(backbone, z, cond, steps=60)
    assert (a - b).abs().max() < 0.05 * a.abs().max()


# ---------------------------------------------------------------- loading, saving


def test_what_can_be_wrong_is_said_in_one_sentence(load, base, monkeypatch):
    """Each names the thing that is wrong and what would be right."""
    path = folder("sd15", base)
    wrong = {
        "sd15": "'sd15': expected sd15:, sdxl:, flux:, wan:, cogvideox:, wan-low:, cosmos: and a",
        f"sd3:{path}": "sd3:.*expected sd15:, sdxl:",
        f"sd15:{base}/absent": "absent: no diffusers model can be read there",
        f"sd15:{path / 'vae'}": "vae: no diffusers model can be read there",
        f"flux:{path}": "holds a StableDiffusionPipeline; flux: takes FluxPipeline",
        f"wan-low:{folder('wan', base)}": "wan has no second network; use wan: for it",
    }
    for name, message in wrong.items():
        with pytest.raises(edm.UserError, match=message) as error:
            load_backbone(name)
        assert "\n" not in str(error.value)
    with pytest.raises(edm.UserError, match="SD15 is not made for a given image"):
        load("sd15").encode_start(picture())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backbone = load("flux-dev")
    backbone.codec.loaded = None
    with pytest.raises(edm.UserError, match="needs transformers and sentencepiece: pip install tr"):
        backbone.encode_prompts(["a cat"])
    with pytest.raises(edm.UserError, match="needs accelerate: pip install accelerate"):
        load_backbone(f"wan:{folder('wan', base)}")
    with pytest.raises(edm.UserError, match="needs peft: pip install peft"):
        three_roles(backbone, 2)


def test_saved_and_loaded_again(load, base, tmp_path):
    """save writes the network as diffusers does; in its folder it is loaded again."""
    path = folder("cogvideox-2b", base)
    shutil.copytree(path, tmp_path / "model")
    backbone = load("cogvideox-2b")
    with torch.no_grad():
        backbone.model.proj_out.weight.mul_(2)
    backbone.save(tmp_path / "model" / "transformer")
    again = load_backbone(f"cogvideox:{tmp_path / 'model'}", size=VIDEO)
    x, cond = torch.randn(2, *backbone.shape), some_cond(backbone)
    assert torch.equal(again(x, 1.0, cond), backbone(x, 1.0, cond))


def test_bfloat16_is_for_network_and_text_encoder_and_not_for_the_vae(load, base):
    """What is read in bfloat16; images and x0 are float32 whatever computed them."""
    pytest.importorskip("transformers")
    load("wan-i2v")
    path = folder("wan-i2v", base)
    backbone = load_backbone(f"wan:{path}", torch.bfloat16, size=VIDEO)
    assert backbone.model.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert backbone.codec.pipe.text_encoder.dtype == torch.bfloat16
    assert backbone.codec.pipe.vae.dtype == torch.float32
    cond = backbone.encode_prompts(["a cat"]) | backbone.encode_start(picture())
    x = backbone(torch.randn(1, *backbone.shape), 1.0, cond)
    assert x.dtype == backbone.decode(x).dtype == torch.float32


def test_int8_weights_are_close(load, base):
    """quantisation: torchao through diffusers' configuration; D hardly changes."""
    quantisation = pytest.importorskip("torchao.quantization")
    pytest.importorskip("accelerate")
    path = f"flux:{folder('flux-dev', base)}"
    int8 = diffusers.TorchAoConfig(quantisation.Int8WeightOnlyConfig())
    small = load_backbone(path, torch.bfloat16, quantisation=int8, size=(64, 96))
    backbone = load("flux-dev")
    x, cond = torch.randn(2, *backbone.shape), some_cond(backbone)
    assert type(small.model.x_embedder.weight) is not torch.nn.Parameter
    assert_close(small(x, 1.0, cond), backbone(x, 1.0, cond), atol=0.1, rtol=0)


# ---------------------------------------------------------------- causal Wan


def causal(load, frames=4):
    torch.manual_seed(3)
    wan = load("wan")
    wan.shape = (4, frames, 8, 12)
    return wan, CausalWan(copy.deepcopy(wan))


def chunks(n, frames=4):
    """The mask of chunks of n frames."""
    return causal_video.block_mask(causal_video.block_layout(frames, n))


def chunked(student, x, sigma, cond, n, forget=False, late=0):
    """Chunk after chunk, as in a roll-out. Wrong on purpose: forget the past; all `late` frames
    too late."""
    past, out = {}, []
    for i in range(0, x.shape[2], n):
        level = sigma[:, i : i + n] if sigma.ndim == 2 else sigma
        how = {"past": {} if forget else past, "start": i + late * (i > 0), "return_kv": True}
        y, kv = student(x[:, :, i : i + n], level, cond, **how)
        past |= {i + f: [(k[:, :, f], v[:, :, f]) for k, v in kv] for f in range(n)}
        out.append(y)
    return torch.cat(out, 2)


@pytest.mark.parametrize("n", [1, 2])
def test_cache_equals_the_mask(load, n):
    """Chunk by chunk with keys and values of the earlier ones = one call under the mask, to 1e-5;
    not so without them, nor with RoPE's positions off by one."""
    _, student = causal(load)
    x, cond = torch.randn(2, *student.shape), some_cond(student)
    for sigma in (torch.tensor([0.4, 2.0]), torch.rand(2, 4 // n).repeat_interleave(n, 1)):
        whole = student(x, sigma, cond, mask=chunks(n))
        assert_close(chunked(student, x, sigma, cond, n), whole, atol=1e-5, rtol=0)
        assert (chunked(student, x, sigma, cond, n, forget=True) - whole).abs().max() > 1e-3
        assert (chunked(student, x, sigma, cond, n, late=1) - whole).abs().max() > 1e-3


def test_a_mask_with_window_and_sink_equals_the_cache_without_the_others(load):
    """Frame 3 sees itself, frame 2 and frame 0 alone."""
    _, student = causal(load)
    x, cond, sigma = torch.randn(1, *student.shape), some_cond(student, 1), torch.tensor([0.4])
    mask = causal_video.block_mask([1] * 4, 3, 1)
    assert mask[3].tolist() == [True, False, True, True]
    past = {}
    for f in range(4):
        seen = {i: past[i] for i in past if mask[f, i]}
        how = {"past": seen, "start": f, "return_kv": True}
        y, kv = student(x[:, :, [f]], sigma, cond, **how)
        past[f] = [(k[:, :, 0], v[:, :, 0]) for k, v in kv]
    assert_close(y, student(x, sigma, cond, mask=mask)[:, :, [3]], atol=1e-5, rtol=0)


def test_the_future_does_not_leak(load):
    """Changing later chunks leaves earlier ones bit-identical; frames of one chunk see each other;
    without the mask the same network does look ahead."""
    _, student = causal(load)
    x, cond, sigma = torch.randn(1, *student.shape), some_cond(student, 1), torch.tensor([1.0])
    other = x.clone()
    other[:, :, 2:] += 1
    masks = ({"mask": chunks(2)}, {})
    early = [[student(y, sigma, cond, **m)[:, :, :2] for y in (x, other)] for m in masks]
    assert torch.equal(*early[0])
    assert not torch.allclose(*early[1], atol=1e-3)
    other = x.clone()
    other[:, :, 1] += 1
    first = [student(y, sigma, cond, mask=chunks(2))[:, :, 0] for y in (x, other)]
    assert not torch.allclose(*first, atol=1e-3)


def test_without_a_mask_it_is_wan(load):
    wan, student = causal(load)
    x, cond = torch.randn(2, *wan.shape), some_cond(wan)
    for sigma in (torch.tensor([0.4, 2.0]), torch.rand(2, 4)):
        assert_close(student(x, sigma, cond), wan(x, sigma, cond), atol=1e-5, rtol=0)


def test_one_network_is_causal_generator_and_bidirectional_teacher(load):
    """As roles on one base the generator's call under a mask leaves nothing behind for fake and
    teacher, also where checkpointing runs the blocks again."""
    pytest.importorskip("peft")
    wan, _ = causal(load)
    x, cond, sigma = torch.randn(1, *wan.shape), some_cond(wan, 1), torch.tensor([1.0])
    before, how = wan(x, sigma, cond), {"mask": chunks(2)}
    student = CausalWan(wan.gradient_checkpointing())
    alone = student(x, sigma, cond, **how)
    for network in (wan, student):
        assert_close(network(x, sigma, cond), before, atol=1e-5, rtol=0)
    assert (alone - before).abs().max() > 1e-3
    teacher, generator = Role(student, 2), Role(student, 2, "generator")
    assert torch.equal(generator(x, sigma, cond, **how), alone)
    weights = [*generator.parameters()]
    for p in weights:
        torch.nn.init.normal_(p, std=0.3)
    expected = torch.autograd.grad(generator(x, sigma, cond, **how).square().mean(), weights)
    loss = generator(x, sigma, cond, **how).square().mean()
    assert_close(teacher(x, sigma, cond), before, atol=1e-5, rtol=0)
    for a, b in zip(torch.autograd.grad(loss, weights), expected, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_checkpointing_sees_the_past_of_its_own_call(load):
    """It runs the blocks again when the past has grown and others have been called."""
    grads = []
    for checkpointing in (False, True):
        student = edm.trainable_copy(causal(load)[1]).gradient_checkpointing(checkpointing)
        x, cond, sigma = torch.ones(1, *student.shape), some_cond(student, 1), torch.tensor([0.4])
        with torch.no_grad():
            _, kv = student(x[:, :, :1], sigma, cond, return_kv=True)
            past = {0: [(k[:, :, 0], v[:, :, 0]) for k, v in kv]}
        loss = student(x[:, :, 1:2], sigma, cond, past=past, start=1).square().mean()
        student(x[:, :, 2:3], sigma, cond, past=past | {1: past[0]}, start=2)
        loss.backward()
        grads.append([p.grad for p in student.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- three roles on one base


def base_weights(backbone):
    return {k: v.clone() for k, v in backbone.model.state_dict().items() if "lora_" not in k}


@pytest.mark.parametrize("name", ["sd15", "flux-dev", "cogvideox-5b", "wan", "cosmos-t2i"])
def test_three_roles_differ_and_the_base_never_moves(name, load):
    """After a step of each: three different outputs; the teacher's is bit-identical to before."""
    pytest.importorskip("peft")
    backbone = load(name)
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    before, weights = backbone(x, 1.0, cond), base_weights(backbone)
    generator, fake, teacher = three_roles(backbone, 2)
    for role in (generator, fake, teacher):
        assert_close(role(x, 1.0, cond), before)
    assert not list(teacher.parameters())
    for i, role in enumerate((generator, fake)):
        assert role.sigma_max == backbone.sigma_max
        optimizer = torch.optim.SGD(role.parameters(), 1.0)
        for _ in range(2):  # LoRA's second factor starts at zero
            optimizer.zero_grad()
            (role(x, 1.0, cond) * (i - 2)).mean().backward()
            optimizer.step()
    outs = [role(x, 1.0, cond) for role in (generator, fake, teacher)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (outs[i] - outs[j]).abs().max() > 1e-3
    assert torch.equal(outs[2], before)
    for key, value in base_weights(backbone).items():
        assert torch.equal(value, weights[key.replace(".base_layer", "")]) or "base_layer" in key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_role_switched_on_later_changes_no_gradient(load, checkpointing):
    """Generator forward, teacher and fake forward, then backward: the generator's gradients are
    those of a backward pass at once. peft's own switch would drop them, and checkpointing would
    run the blocks of the fake."""
    pytest.importorskip("peft")
    backbone = load("sd15").gradient_checkpointing(checkpointing)
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    generator, fake, teacher = three_roles(backbone, 2)
    for p in [*generator.parameters(), *fake.parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    plain = torch.autograd.grad(generator(x, 1.0, cond).square().mean(), [*generator.parameters()])
    loss = generator(x, 1.0, cond).square().mean()
    fake(x, 1.0, cond).mean().backward()
    teacher(x, 1.0, cond)
    loss.backward()
    for p, expected in zip(generator.parameters(), plain, strict=True):
        assert_close(p.grad, expected, atol=1e-6, rtol=1e-4)
    assert all(p.requires_grad for p in [*generator.parameters(), *fake.parameters()])


def test_copies_of_a_role_are_adapters_on_the_same_base(load):
    """The scripts' own calls: trainable_copy(teacher) starts as the teacher, deepcopy holds the
    average of the weights, and both share the base."""
    pytest.importorskip("peft")
    backbone = load("sd15")
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    _, _, teacher = three_roles(backbone, 2)
    size = sum(p.numel() for p in backbone.parameters())
    generator = edm.trainable_copy(teacher)
    assert torch.equal(generator(x, 1.0, cond), teacher(x, 1.0, cond))
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    assert_close(ema(x, 1.0, cond), generator(x, 1.0, cond))
    assert all(p.requires_grad for p in generator.parameters())
    assert not any(p.requires_grad for p in ema.parameters())
    for p in generator.parameters():
        p.data.zero_()
    edm.ema_update(ema, generator, 0.5, 1000)
    assert ema.state_dict().keys() == generator.state_dict().keys()
    assert not torch.allclose(ema(x, 1.0, cond), teacher(x, 1.0, cond))
    rank = sum(p.numel() for p in generator.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == size + 2 * rank
    assert rank < 0.3 * size
    assert not any(p.requires_grad for p in copy.deepcopy(ema).parameters())


SD15_FULL = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_FULL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
WAN_FULL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
FULL = {  # network, configuration, published size in millions
    "SD 1.5": ("UNet2DConditionModel", SD15_FULL, 860),
    "SDXL": ("UNet2DConditionModel", SDXL_FULL, 2567),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", WAN_FULL, 1419),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, 11901),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("SDXL", "FLUX.1-dev")]


@pytest.mark.parametrize("name", ["SD 1.5", "Wan 2.1 1.3B", *SLOW])
def test_adapters_need_a_fraction_of_the_memory_of_three_copies(name):
    """Bytes of weights, gradients and Adam's moments, without activations. Three copies in
    float32: 3 x 4 + 2 x 12; rank 64 on a base in bfloat16: 2 for each of its weights."""
    pytest.importorskip("peft")
    network, config, millions = FULL[name]
    with torch.device("meta"):
        model = getattr(diffusers, network)(**config)
    size = sum(p.numel() for p in model.parameters())
    assert round(size / 1e6) == pytest.approx(millions, rel=2e-3)
    kind = backbones.SD15 if "SD" in name else backbones.Wan if "Wan" in name else backbones.Flux
    backbone = kind(model.to(torch.bfloat16), Flow(), None, (4, 8, 8))
    roles = three_roles(backbone, 64)
    rank = [sum(p.numel() for p in role.parameters()) for role in roles]
    assert rank[0] == rank[1] > rank[2] == 0
    copies, adapters = 36 * size, 2 * size + 16 * sum(rank)
    print(f"{name}: {size / 1e6:.0f} M, rank 64: {rank[0] / 1e6:.0f} M,", end=" ")
    print(f"copies {copies / 2**30:.1f} GiB, adapters {adapters / 2**30:.1f} GiB")
    assert adapters < copies / 4


PEAK = """
import copy, json, resource, sys
from types import SimpleNamespace
import diffusers, torch
import diffusers_backbones as backbones, dmd2_cifar, edm_teacher as edm

config, rank = json.loads(sys.argv[1]), int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dtype = torch.bfloat16 if rank else torch.float32
torch.set_default_dtype(dtype)
model = diffusers.WanTransformer3DModel(**config).requires_grad_(False)
torch.set_default_dtype(torch.float32)
text = {"text": torch.randn(1, 64, model.config.text_dim)}
codec = SimpleNamespace(none=lambda backbone: text, table={"text": text["text"].expand(2, -1, -1)})
teacher = backbones.Wan(model, backbones.Flow(3.0), codec, (16, 3, 16, 16))
teacher.label_dim = 2
teacher = backbones.Role(teacher, rank) if rank else teacher
generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
cfg, labels = dmd2_cifar.Config(gan_weight=0.0), torch.tensor([0])
optimizers = [torch.optim.AdamW(n.parameters(), 1e-5, fused=True) for n in (generator, fake)]
for _ in range(2):
    inputs = torch.randn(1, *teacher.shape), torch.tensor([9999.0]), labels
    loss, x, _ = dmd2_cifar.generator_step(generator, teacher, fake, None, cfg, inputs)
    loss.backward()
    optimizers[0].step(), optimizers[0].zero_grad()
    dmd2_cifar.fake_step(fake, teacher, None, cfg, x, labels)[0].backward()
    optimizers[1].step(), optimizers[1].zero_grad()
size = sum(p.numel() for p in model.parameters() if p.dtype == dtype)
print(size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
PEAK_OF = {"tiny": WAN | {"in_channels": 16, "out_channels": 16}}
PEAK_OF["6 of the 30 blocks of Wan 2.1 1.3B"] = WAN_FULL | {"num_layers": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEAK_OF)
def test_peak_memory_of_copies_and_adapters(name):
    """Measured: two rounds of DMD2's updates on one clip, each in a process of its own (Linux)."""
    pytest.importorskip("peft")
    peaks = []
    for rank in (0, 64):
        command = [sys.executable, "-c", PEAK, json.dumps(PEAK_OF[name]), str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=edm.ASSETS.parent)
        assert done.returncode == 0, done.stderr[-2000:]
        size, peak = map(int, done.stdout.split())
        peaks.append(peak)
    print(f"{name}: {size / 1e6:.1f} M, copies {peaks[0] / 2**20:.0f} MB,", end=" ")
    print(f"rank 64 {peaks[1] / 2**20:.0f} MB")
    assert name == "tiny" or peaks[1] < peaks[0] / 3


def test_checkpointing_runs_each_block_twice(load):
    for on in (False, True):
        backbone = edm.trainable_copy(load("wan")).gradient_checkpointing(on)
        calls = []
        backbone.model.blocks[0].ffn.register_forward_hook(lambda *args, c=calls: c.append(1))
        x = torch.randn(1, *backbone.shape)
        backbone(x, 1.0, some_cond(backbone, 1)).mean().backward()
        assert len(calls) == 1 + on


def test_adapters_are_float32_on_all_linear_layers_of_the_blocks(load):
    pytest.importorskip("peft")
    for name, parts in (
        ("sd15", ("attn1", "attn2", "ff", "time_emb_proj")),
        ("wan", ("attn1", "attn2", "ffn")),
    ):
        backbone = load(name)
        backbone.model.to(torch.bfloat16)
        role = Role(backbone, 2, "generator")
        assert all(p.dtype == torch.float32 for p in role.parameters())
        found = {word for key in role.weights for word in key.split("/")}
        assert {*parts} <= found


def test_shapes_and_shift_follow_vae_and_size(base):
    """A VAE that shrinks by 16 (Wan 2.2 5B); FLUX-dev's shift for 8 x 12 latents: 24 tokens."""
    if not HAS["accelerate"]:
        pytest.skip("needs accelerate")
    path = base / "wan-vae-16"
    shutil.copytree(folder("wan", base), path)
    config = json.loads((path / "vae/config.json").read_text()) | {"scale_factor_spatial": 16}
    (path / "vae/config.json").write_text(json.dumps(config))
    assert load_backbone(f"wan:{path}", size=VIDEO).shape == (4, 3, 4, 6)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    shift = backbones.Flux.schedule_of(scheduler, (16, 8, 12)).shift
    assert shift == pytest.approx(math.exp(0.5 + (24 - 256) / (4096 - 256) * (1.15 - 0.5)))


def test_taps_are_those_of_fastgen(load):
    """30 blocks: 15, 22, 29."""
    backbone = load("wan")
    backbone.model.blocks = torch.nn.ModuleList([backbone.model.blocks[0]] * 30)
    other = backbones.Wan(backbone.model, backbone.schedule, backbone.codec, backbone.shape)
    assert other.taps == [15, 22, 29]


def test_weight_of_the_fake_loss_is_the_familys_within_a_factor_of_two():
    """fake_loss's 1/σ² + 1/σ_data² is 1/c_out² of ε and v; of flow it is 0.5 to 1 of that."""
    sigma = torch.logspace(-2, 3, 50, dtype=D64)
    alphas = torch.linspace(0.999, 1e-4, 1000, dtype=D64)
    for schedule, low in (
        (VP(alphas, "epsilon"), 1),
        (VP(alphas, "v_prediction"), 1),
        (Flow(), 0.5),
    ):
        ratio = 1 / sigma**2 + 1 / schedule.sigma_data**2
        ratio = ratio * schedule.coefficients(sigma)[1] ** 2
        assert (ratio > low - 1e-9).all()
        assert (ratio < 1 + 1e-9).all()


def test_checkpointing_changes_no_gradient(load):
    """Also for features with "only", where the forward pass is left by an exception."""
    for name in ("sd15", "cogvideox-5b"):
        backbone = edm.trainable_copy(load(name))
        cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
        grads = []
        for on in (False, True):
            backbone.gradient_checkpointing(on).zero_grad()
            _, features = backbone(x, 1.0, cond, return_features="only")
            (backbone(x, 1.0, cond).square().mean() + features[-1].square().mean()).backward()
            grads.append([p.grad.clone() for p in backbone.parameters()])
        for a, b in zip(*grads, strict=True):
            assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_saved_adapter_is_diffusers_lora(load, tmp_path):
    """save writes what diffusers' load_lora_adapter reads, into a fresh network."""
    pytest.importorskip("peft")
    backbone, fresh = load("sd15"), load("sd15")
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    generator, _, _ = three_roles(backbone, 2)
    for p in generator.parameters():
        torch.nn.init.normal_(p, std=0.3)
    generator.save(tmp_path)

    fresh.model.load_lora_adapter(
        str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    assert_close(fresh(x, 1.0, cond), generator(x, 1.0, cond))


# ---------------------------------------------------------------- in the scripts


def test_teacher_of_a_script(load, base, tmp_path):
    """--teacher, --prompts, --lora-rank, --gradient-checkpointing -> a denoiser with label_dim."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    (tmp_path / "prompts.txt").write_text("a red cat\n\nthe dog on the mat\n")
    options = {"teacher": f"sd15:{folder('sd15', base)}", "device": "cpu", "size": "64,96"}
    options |= {"prompts": str(tmp_path / "prompts.txt"), "gradient_checkpointing": True}
    teacher = dmd2_cifar.load_teacher(dmd2_cifar.Config(**options))
    assert teacher.codec.loaded is None  # text encoders leave memory
    x, rows = torch.randn(2, *teacher.shape), torch.tensor([1, -1])
    expected = teacher(x, 1.0, teacher.encode_prompts(["the dog on the mat", ""]))
    assert_close(teacher(x, 1.0, rows), expected, atol=1e-5, rtol=0)
    role = dmd2_cifar.load_teacher(dmd2_cifar.Config(**options, lora_rank=2))
    assert role.label_dim == 2
    assert_close(edm.trainable_copy(role)(x, 1.0, rows), expected, atol=1e-5, rtol=0)
    half = dmd2_cifar.load_teacher(dmd2_cifar.Config(**options, lora_rank=2, amp=True))
    assert half.dtype == torch.bfloat16
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(edm.UserError, match="has no line"):
        dmd2_cifar.load_teacher(dmd2_cifar.Config(**options))
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    with pytest.raises(edm.UserError, match="--size 64: expected height,width"):
        dmd2_cifar.load_teacher(dmd2_cifar.Config(**options | {"size": "64"}))
    with pytest.raises(edm.UserError, match="needs --prompts FILE"):
        dmd2_cifar.load_teacher(dmd2_cifar.Config(**options | {"prompts": ""}))


def test_a_picture_after_the_prompt_is_where_the_video_starts(base, tmp_path):
    """A tab and a path in each line of --prompts, I2V; without, one sentence. VACE is refused."""
    from PIL import Image

    Image.new("RGB", (90, 64), (200, 100, 50)).save(tmp_path / "a.png")
    for name in ("wan-i2v", "cogvideox-i2v", "wan-vace"):
        cfg = dmd2_cifar.Config(**options_of(name, base, tmp_path))
        expected = "edits videos" if "vace" in name else "a tab and a picture's path after each"
        with pytest.raises(edm.UserError, match=expected):
            dmd2_cifar.load_teacher(cfg)
    cfg = dmd2_cifar.Config(**options_of("wan-i2v", base, tmp_path))
    (tmp_path / "prompts.txt").write_text(f"a cat\t{tmp_path}/a.png\na dog\t{tmp_path}/a.png\n")
    teacher = dmd2_cifar.load_teacher(cfg)
    pixels = backbones.read_image(tmp_path / "a.png", *teacher.pixels)
    assert_close(pixels[:, 0, 0], torch.tensor([200.0, 100, 50]) / 127.5 - 1)
    expected = teacher.encode_prompts(["a dog"]) | teacher.encode_start(pixels[None])
    x = torch.randn(1, *teacher.shape)
    row, none = torch.tensor([1]), teacher(x, 1.0, expected | teacher.encode_prompts([""]))
    assert_close(teacher(x, 1.0, row), teacher(x, 1.0, expected), atol=1e-5, rtol=0)
    guided = none + 3 * (teacher(x, 1.0, expected) - none)  # the picture stays
    assert_close(edm.guided(teacher, x, 1.0, row, 3.0), guided, atol=1e-5, rtol=1e-5)
    (tmp_path / "prompts.txt").write_text(f"a cat\t{tmp_path}/b.png\n")
    with pytest.raises(edm.UserError, match=r"b\.png cannot be read as a picture"):
        dmd2_cifar.load_teacher(cfg)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux-dev", "wan", "cogvideox-5b", "cosmos-t2i"])
@pytest.mark.parametrize("adapters", [True, False])
def test_dmd2_updates_take_every_backbone(name, adapters, load):
    """generator_step and fake_step of DMD2 as they are, with adapters or with copies: labels are
    rows of prompts; a step's gradient reaches the generator or the fake alone, never the base."""
    pytest.importorskip("peft") if adapters else None
    backbone = load(name)
    codec = backbone.codec
    codec.table, codec.nothing, backbone.label_dim = (
        some_cond(backbone, 3),
        some_cond(backbone, 1),
        3,
    )
    teacher = three_roles(backbone, 2)[2] if adapters else backbone
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    cfg = dmd2_cifar.Config(gan_weight=0.0, guidance=3.0)
    rows, z = torch.tensor([2, 0]), torch.randn(2, *backbone.shape)
    inputs = (*dmd2_cifar.backward_simulation(generator, z, rows, 2, 1), rows)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with torch.no_grad():
        for p in fake.parameters():  # at the start it is the teacher, there is no gradient
            p.add_(0.1 * torch.randn_like(p))
    for _ in range(2):
        optimizer = torch.optim.SGD([*generator.parameters(), *fake.parameters()], 1e-2)
        loss, x, log = dmd2_cifar.generator_step(generator, teacher, fake, None, cfg, inputs)
        loss.backward()
        assert all(p.grad is None for p in fake.parameters())
        assert any(p.grad is not None and p.grad.any() for p in generator.parameters())
        optimizer.step()
        optimizer.zero_grad()
        loss, _ = dmd2_cifar.fake_step(fake, teacher, None, cfg, x, rows)
        loss.backward()
        assert all(p.grad is None for p in generator.parameters())
        assert any(p.grad is not None and p.grad.any() for p in fake.parameters())
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
        assert log["|grad|"] > 0
    same = [torch.equal(v, before[k]) for k, v in backbone.state_dict().items() if "lora_" not in k]
    assert all(same)
    assert not adapters or any("base_layer" in k for k in before)
    codec.table, codec.nothing = {}, None


SCRIPTS = {"dmd2_cifar": dmd2_cifar, "f_distill": f_distill, "ladd": ladd}
TRAINED = ["sd15", "sdxl", "flux-dev", "flux-schnell", "wan", "cogvideox-5b", "cosmos-t2i"]


def options_of(name, base, tmp_path, **more):
    """Two steps of two samples on a saved tiny model, all by the command line's own options."""
    packages = {"transformers", "sentencepiece", "accelerate", "peft"}
    if missing := sorted(p for p in packages if importlib.util.find_spec(p) is None):
        pytest.skip(f"pip install {' '.join(missing)}")
    (tmp_path / "prompts.txt").write_text("a red cat\nthe dog on the mat\na cat on a dog\n")
    options = {"teacher": f"{MODELS[name][0]}:{folder(name, base)}", "device": "cpu", "steps": 2}
    options |= {"prompts": str(tmp_path / "prompts.txt"), "size": str(size_of(name))[1:-1]}
    options |= {"batch": 2, "ratio": 1, "pairs": 3, "teacher_steps": 2, "save_every": 2}
    return options | {"out": str(tmp_path / "run"), "sampling_steps": 2} | more


def trained_part(name):
    return "unet" if "UNet" in FAMILIES[MODELS[name][0]][0] else "transformer"


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_two_steps_on_every_backbone(script, name, base, tmp_path):
    """--teacher NAME:PATH from reading to saving: the teacher's latents for the GAN, both updates,
    pictures of the prompts, and a network that diffusers reads, with every weight moved or kept."""
    options = options_of(name, base, tmp_path)
    result = SCRIPTS[script].main(SCRIPTS[script].Config(**options))
    run = tmp_path / "run"
    assert result["config"]["teacher"] == options["teacher"]
    latents, _ = edm.load_tensors(run / "latents.safetensors")
    assert latents["rows"].tolist() == [0, 1, 2]
    assert latents["x"].isfinite().all()
    assert (run / "samples_2.png").stat().st_size > 1000
    kind = getattr(diffusers, FAMILIES[MODELS[name][0]][0])
    before = kind.from_pretrained(folder(name, base) / trained_part(name)).state_dict()
    after = kind.from_pretrained(run / "generator").state_dict()
    assert before.keys() == after.keys()
    moved = [not torch.equal(v, after[k]) for k, v in before.items() if v.is_floating_point()]
    assert sum(moved) > 0.8 * len(moved)
    assert all(v.isfinite().all() for v in after.values())
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2


@pytest.mark.parametrize("name", ["wan-i2v", "cogvideox-i2v"])
def test_two_steps_on_videos_that_start_from_pictures(name, base, tmp_path):
    from PIL import Image

    Image.new("RGB", (90, 64), (200, 100, 50)).save(tmp_path / "a.png")
    options = options_of(name, base, tmp_path)
    (tmp_path / "prompts.txt").write_text(f"a cat\t{tmp_path}/a.png\na dog\t{tmp_path}/a.png\n")
    dmd2_cifar.main(dmd2_cifar.Config(**options))
    assert (tmp_path / "run" / "generator" / "config.json").exists()


VIDEO_RUN = {"num_frame_per_block": 1, "num_training_frames": 4, "local_attn_size": 2}
VIDEO_RUN |= {"denoising_steps": "1000,500", "ode_updates": 2, "generator_update_interval": 1}


def video_options(base, tmp_path, **more):
    options = options_of("wan", base, tmp_path)
    options.pop("ratio")
    options.pop("sampling_steps")
    return options | VIDEO_RUN | more


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("rank", [0, 2])
def test_causal_video_takes_two_steps_on_wan(objective, rank, base, tmp_path):
    """ODE paths of the teacher, initialisation, CausVid, Self-Forcing, roll-outs of three clips;
    copies or adapters; what is saved --sample rolls out."""
    more = {"lora_rank": rank, "amp": rank > 0, "gradient_checkpointing": rank > 0}
    more |= {"steps": 3, "lr_generator": 0.1, "lr_fake": 0.1, "save_every": 3}
    options = video_options(base, tmp_path, objective=objective, **more)
    causal_video.main(causal_video.Config(**options))
    pairs, _ = edm.load_tensors(tmp_path / "run/pairs.safetensors")
    assert pairs["path"].shape == (3, 3, 4, 3, 8, 12)
    assert pairs["labels"].tolist() == [0, 1, 2]
    start = folder("wan", base) / "transformer/diffusion_pytorch_model.safetensors"
    start, seen = safetensors.torch.load_file(start), []
    for stage in ("ode_init", "causvid", "self_forcing"):
        picture = "samples_2.png" if stage == "ode_init" else "samples_3.png"
        assert (tmp_path / "run" / stage / picture).stat().st_size > 1000
        (file,) = (tmp_path / "run" / stage / "generator").glob("*.safetensors")
        seen.append(safetensors.torch.load_file(file))
        assert all(v.isfinite().all() for v in seen[-1].values())
        assert seen[-1].keys() == start.keys() or rank
    for a, b in ((seen[0], seen[1]), (seen[0], seen[2]), (seen[1], seen[2])):
        assert not all(torch.equal(v, b[k]) for k, v in a.items())
    sample = {"sample": str(tmp_path / "run/causvid/generator"), "out": str(tmp_path)}
    assert causal_video.main(causal_video.Config(**options | sample)) == {}
    assert (tmp_path / "sampled.png").stat().st_size > 1000


def test_causal_wan_rolls_out_as_the_video_network_does(load):
    """rollout with the cache = the mask: the last of its steps, called once on the whole clip."""
    _, student = causal(load)
    cfg = causal_video.Config(**VIDEO_RUN | {"denoising_steps": "800", "local_attn_size": 3})
    z, cond = torch.randn(2, *student.shape), some_cond(student)
    x = causal_video.rollout(student, z, cond, cfg)
    first = student(
        causal_video.student_sigmas(cfg)[0] * z,
        causal_video.student_sigmas(cfg)[:1].expand(2),
        cond,
        mask=torch.eye(4, dtype=torch.bool),
    )
    assert_close(x[:, :, 0], first[:, :, 0], atol=1e-5, rtol=1e-5)
    noisy = torch.cat([x[:, :, :3], causal_video.student_sigmas(cfg)[0] * z[:, :, 3:]], 2)
    sigma = torch.tensor([0.0, 0, 0, causal_video.student_sigmas(cfg)[0]]).expand(2, 4)
    mask = causal_video.block_mask([1] * 4, 3)
    assert_close(x[:, :, 3], student(noisy, sigma, cond, mask=mask)[:, :, 3], atol=1e-4, rtol=1e-4)


def test_causal_video_takes_wan_alone(base, tmp_path):
    teacher = options_of("sd15", base, tmp_path)["teacher"]
    with pytest.raises(edm.UserError, match="this script takes wan: alone"):
        causal_video.main(causal_video.Config(**video_options(base, tmp_path, teacher=teacher)))


@pytest.mark.parametrize("rank", [0, 2])
def test_sample_draws_with_the_weights_of_a_run(rank, base, tmp_path):
    """--sample FOLDER: the generator that the run has saved, a network or an adapter."""
    options = options_of("sd15", base, tmp_path, lora_rank=rank, lr_generator=0.1)
    dmd2_cifar.main(dmd2_cifar.Config(**options))
    more = {"sample": str(tmp_path / "run/generator"), "out": str(tmp_path), "n": 3, "labels": "2"}
    cfg = dmd2_cifar.Config(**options | more)
    assert dmd2_cifar.main(cfg) == {}
    assert (tmp_path / "sampled.png").stat().st_size > 1000
    teacher = dmd2_cifar.load_teacher(dmd2_cifar.Config(**options | {"lora_rank": 0}))
    x, row = torch.randn(1, *teacher.shape), torch.tensor([0])
    generator = dmd2_cifar.load_teacher(cfg)
    assert (generator(x, 1.0, row) - teacher(x, 1.0, row)).abs().max() > 1e-3
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["parts"]["ema"]
    if not rank:
        state = generator.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in checkpoint.items())
    with pytest.raises(edm.UserError, match="is no generator of"):
        generator.load(tmp_path)


@pytest.mark.parametrize("name", ["sd15", "wan"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_two_steps_with_adapters(script, name, base, tmp_path):
    """--lora-rank, --gradient-checkpointing, --amp: the result is an adapter for diffusers."""
    more = {"lora_rank": 2, "gradient_checkpointing": True, "amp": script == "dmd2_cifar"}
    SCRIPTS[script].main(SCRIPTS[script].Config(**options_of(name, base, tmp_path, **more)))
    file = tmp_path / "run" / "generator" / "pytorch_lora_weights.safetensors"
    weights = safetensors.torch.load_file(file)
    second = [v for k, v in weights.items() if "lora_B" in k]  # zero at the start
    assert second
    assert all(v.isfinite().all() and v.any() for v in second)


@pytest.mark.parametrize(("name", "rank"), [("sd15", 2), ("wan", 0)])
def test_two_processes_train_a_backbone_as_one_does(name, rank, base, tmp_path):
    """torchrun, two gloo processes: adapters stay whole and gradients are averaged; copies are
    sharded block by block."""
    weights = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        more = {"lora_rank": rank, "out": str(tmp_path / str(len(launch)))}
        more["size"] = str(size_of(name))[1:-1].replace(" ", "")
        options = options_of(name, base, tmp_path, **more)
        words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        command = [sys.executable, *launch, str(edm.ASSETS.parent / "dmd2_cifar.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        (file,) = (tmp_path / str(len(launch)) / "generator").glob("*.safetensors")
        weights.append(safetensors.torch.load_file(file))
    for name, value in weights[0].items():
        assert_close(value, weights[1][name], atol=1e-5, rtol=0)
    assert not rank or any(v.any() for k, v in weights[0].items() if "lora_B" in k)


def test_a_resumed_run_on_a_backbone_is_the_same_run(base, tmp_path):
    """One step, then --resume for another = two steps at once, to the last bit."""
    weights = []
    for steps in ([2], [1, 2]):
        more = {"out": str(tmp_path / str(len(steps))), "save_every": 1}
        options = options_of("sd15", base, tmp_path, **more)
        for n in steps:
            cfg = dmd2_cifar.Config(**options | {"steps": n, "resume": n > steps[0]})
            dmd2_cifar.main(cfg)
        file = tmp_path / str(len(steps)) / "generator" / "diffusion_pytorch_model.safetensors"
        weights.append(safetensors.torch.load_file(file))
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def clips(path, kinds=("cat", "dog", "mat"), frames=10):
    """Pictures, or with frames folders of them, in class folders."""
    from PIL import Image

    for label in kinds:
        for i in range(3):
            files = [path / label / f"{i}.png"]
            if frames:
                files = [path / label / str(i) / f"{k:02}.png" for k in range(frames)]
            for k, file in enumerate(files):
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (70, 64), (20 * i, 20 * k, 50)).save(file)
    return path


def test_latents_of_the_teacher_are_guided_and_have_a_seed_of_their_own(base, tmp_path):
    options = options_of("sd15", base, tmp_path, guidance=3.0)
    cfg = dmd2_cifar.Config(**options)
    teacher, made = dmd2_cifar.load_teacher(cfg), []
    for k in (0, 1):
        torch.manual_seed(99 * k)
        run = SimpleNamespace(path=lambda name, k=k: tmp_path / str(k) / name)
        made.append(teacher.real_latents(cfg, run)[0])
    assert torch.equal(*made)
    with edm.own_random_numbers(cfg.seed + 10000):
        z = torch.randn(3, *teacher.shape)
    with torch.no_grad():
        x = euler_sampler(teacher, z, torch.arange(3), steps=2, guidance=3.0)
    assert_close(made[0], x, atol=1e-3, rtol=1e-3)
    for k in (0, 1):
        torch.manual_seed(99 * k)
        teacher.pictures(tmp_path / f"{k}.png", lambda z, rows: z + torch.randn(1), 0)
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_pictures_on_the_cpu_reach_a_vae_elsewhere(load):
    backbone = load("wan")
    backbone.codec.vae.to("meta")
    assert backbone.encode_images(torch.zeros(1, 3, 9, 64, 96)).device.type == "meta"
    del backbone.codec.__dict__["vae"]  # the codec is shared by all copies


def test_one_expert_of_two_is_not_for_the_scripts(load, base, tmp_path):
    path = base / "wan-a14b-of-a-script"
    shutil.copytree(folder("wan", base), path)
    shutil.copytree(path / "transformer", path / "transformer_2")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"boundary_ratio": 0.875, "transformer_2": index["transformer"]}
    (path / "model_index.json").write_text(json.dumps(index))
    options = options_of("wan", base, tmp_path, teacher=f"wan-low:{path}")
    with pytest.raises(edm.UserError, match="knows some of the noise levels"):
        dmd2_cifar.load_teacher(dmd2_cifar.Config(**options))


def test_pictures_are_not_for_causal_video(base, tmp_path):
    options = video_options(base, tmp_path)
    (tmp_path / "prompts.txt").write_text(f"a cat\t{tmp_path}/a.png\n")
    with pytest.raises(edm.UserError, match="start from no picture"):
        causal_video.main(causal_video.Config(**options))


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_images_and_videos_of_a_folder_are_encoded_once(name, base, tmp_path):
    """--data FOLDER: VAE latents of its images, or of videos, folders of frames; class folder k has
    prompt k, so it needs a line."""
    data = clips(tmp_path / "data", frames=10 if name == "wan" else 0)
    cfg = dmd2_cifar.Config(**options_of(name, base, tmp_path, data=str(data)))
    teacher = dmd2_cifar.load_teacher(cfg)
    run = SimpleNamespace(path=lambda name: tmp_path / name)
    x, rows = teacher.real_latents(cfg, run)
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert x.shape == (9, *teacher.shape)
    pixels = torch.tensor([40.0, 0, 50])[:, None, None, None].repeat(1, 9, 64, 96)
    pixels[1] = 20 * torch.arange(9)[:, None, None]
    pixels = (pixels if name == "wan" else pixels[:, 0]) / 127.5 - 1
    assert_close(x[[5]], teacher.encode_images(pixels[None]), atol=1e-5, rtol=1e-5)
    stamp = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    teacher.real_latents(cfg, run)
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == stamp
    (tmp_path / "latents.safetensors").unlink()
    teacher.use_prompts(["a red cat", "a dog"])
    with pytest.raises(edm.UserError, match="needs a line for each class folder"):
        teacher.real_latents(cfg, run)
    if name == "wan":
        cfg.data = str(clips(tmp_path / "short", frames=5))
        with pytest.raises(edm.UserError, match="a folder with 9 frames or more is needed"):
            teacher.real_latents(cfg, run)
