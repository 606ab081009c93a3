"""Backbones: tiny random models of every family, saved as diffusers saves them and loaded for real.

What needs transformers, accelerate or peft is skipped where they are not installed.
"""

import copy
import functools
import importlib.util
import json
import logging
import math

import diffusers
import pytest
import torch
from torch.testing import assert_close

import diffusers_backbones as backbones
import edm_teacher as edm
from diffusers_backbones import CausalWan, Flow, Role, VP, euler_sampler, load_backbone, three_roles

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
    "sample_width": 8,
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
KARRAS = {"use_karras_sigmas": True}
SIZE, VIDEO = (64, 64), (64, 64, 9)

MODELS = {  # family, pipeline, network, its configuration, scheduler, VAE, text encoders, size
    "sd15": ("sd15", "StableDiffusionPipeline", "UNet2DConditionModel")
    + (UNET | {"cross_attention_dim": 16}, ("PNDMScheduler", EULER | {"skip_prk_steps": True}))
    + ("AutoencoderKL", KL, ["clip"], SIZE),
    "sdxl": ("sdxl", "StableDiffusionXLPipeline", "UNet2DConditionModel")
    + (UNET | TIME | {"cross_attention_dim": 32, "addition_embed_type": "text_time"},)
    + (("EulerDiscreteScheduler", EULER), "AutoencoderKL", KL, ["clip", "clip-projection"], SIZE),
    "flux-dev": ("flux", "FluxPipeline", "FluxTransformer2DModel", FLUX | {"guidance_embeds": True})
    + (("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}), "AutoencoderKL")
    + (KL | {"shift_factor": 0.1}, ["clip", "t5"], SIZE),
    "flux-schnell": ("flux", "FluxPipeline", "FluxTransformer2DModel", FLUX)
    + (("FlowMatchEulerDiscreteScheduler", {}), "AutoencoderKL")
    + (KL | {"shift_factor": 0.1}, ["clip", "t5"], SIZE),
    "wan": ("wan", "WanPipeline", "WanTransformer3DModel", WAN)
    + (("UniPCMultistepScheduler", UNIPC), "AutoencoderKLWan", WAN_VAE, ["umt5"], VIDEO),
    "wan-i2v": ("wan", "WanImageToVideoPipeline", "WanTransformer3DModel", WAN | IMAGE)
    + (("UniPCMultistepScheduler", UNIPC), "AutoencoderKLWan", WAN_VAE)
    + (["umt5", "clip-vision"], VIDEO),
    "wan-vace": ("wan", "WanVACEPipeline", "WanVACETransformer3DModel", WAN | VACE)
    + (("UniPCMultistepScheduler", UNIPC), "AutoencoderKLWan", WAN_VAE, ["umt5"], VIDEO),
    "cogvideox-2b": ("cogvideox", "CogVideoXPipeline", "CogVideoXTransformer3DModel", COG)
    + (("CogVideoXDDIMScheduler", DDIM), "AutoencoderKLCogVideoX", COG_VAE, ["t5"], VIDEO),
    "cogvideox-5b": ("cogvideox", "CogVideoXPipeline", "CogVideoXTransformer3DModel")
    + (COG | {"use_rotary_positional_embeddings": True},)
    + (("CogVideoXDDIMScheduler", DDIM | {"snr_shift_scale": 1.0}),)
    + ("AutoencoderKLCogVideoX", COG_VAE, ["t5"], VIDEO),
    "cogvideox-i2v": ("cogvideox", "CogVideoXImageToVideoPipeline", "CogVideoXTransformer3DModel")
    + (COG | {"use_rotary_positional_embeddings": True, "in_channels": 8},)
    + (("CogVideoXDDIMScheduler", DDIM | {"snr_shift_scale": 1.0}),)
    + ("AutoencoderKLCogVideoX", COG_VAE, ["t5"], VIDEO),
    "cosmos-t2i": ("cosmos", "Cosmos2TextToImagePipeline", "CosmosTransformer3DModel", COSMOS)
    + (("FlowMatchEulerDiscreteScheduler", KARRAS), "AutoencoderKLWan", WAN_VAE, ["t5"])
    + ((64, 64, 1),),
    "cosmos-v2w": ("cosmos", "Cosmos2VideoToWorldPipeline", "CosmosTransformer3DModel")
    + (COSMOS | {"in_channels": 5}, ("FlowMatchEulerDiscreteScheduler", KARRAS))
    + ("AutoencoderKLWan", WAN_VAE, ["t5"], VIDEO),
}
ALL = list(MODELS)
NEED_ACCELERATE = ("wan", "cosmos")  # diffusers loads some of their weights in float32


def text_parts(encoders):
    """{folder: (class, object)}: text encoders of a few thousand weights, a 12-word tokenizer."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", *"a red cat dog on the mat runs of".split()]
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
    _, pipeline, network, config, (scheduler, settings), vae, vae_config, encoders, _ = MODELS[name]
    torch.manual_seed(len(name))
    path = base / name
    parts = {"unet" if "UNet" in network else "transformer": getattr(diffusers, network)(**config)}
    parts |= {"scheduler": getattr(diffusers, scheduler)(**settings)}
    parts |= {"vae": getattr(diffusers, vae)(**vae_config)}
    parts |= text_parts(encoders) if HAS["transformers"] else {}
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for part, value in parts.items():
        value.save_pretrained(path / part)
        index[part] = [type(value).__module__.split(".")[0], type(value).__name__]
    if pipeline == "WanImageToVideoPipeline":
        index["transformer_2"] = [None, None]
    (path / "model_index.json").write_text(json.dumps(index))
    return path


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@functools.cache
def cached(name, base):
    return load_backbone(f"{MODELS[name][0]}:{folder(name, base)}", size=MODELS[name][-1])


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
    width = {"SD15": "cross_attention_dim", "SDXL": "cross_attention_dim", "Wan": "text_dim"}
    width |= {"Flux": "joint_attention_dim"}
    width = config[width.get(type(backbone).__name__, "text_embed_dim")]
    cond = {"text": torch.randn(n, 512 if config.get("image_dim") else 16, width)}
    if type(backbone).__name__ in ("SDXL", "Flux"):
        cond["pooled"] = torch.randn(n, 16)
    if config.get("image_dim"):
        cond["image_tokens"] = torch.randn(n, 5, 16)
    shape = backbone.shape[1:]
    extra = config.in_channels - (config.out_channels or config.in_channels)
    if extra == 1:
        cond["given"], cond["given_frames"] = torch.randn(n, *backbone.shape), torch.zeros(n, frames)
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
    bytes_ = torch.randint(0, 256, (1, 3, *([frames] if frames else []), 64, 64))
    return bytes_ / 127.5 - 1


def as_pil(x):
    from PIL import Image

    return Image.fromarray(((x + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def run_pipeline(name, backbone, z, steps, guidance, prompt):
    """(σ, [x before each step and after the last]): the pipeline's own __call__, in its coordinates.

    The only change: its scheduler is Euler (VP; flow) or, for CogVideoX, DDIM.
    """
    family, pipe, seen = MODELS[name][0], backbone.codec.pipe, []
    config, vp = pipe.scheduler.config, family in ("sd15", "sdxl", "cogvideox")
    if family in ("sd15", "sdxl"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    elif family == "wan":
        shift = config.get("flow_shift") or config["shift"]
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    options = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent"}
    options |= {"guidance_scale": guidance, "prompt": prompt, "negative_prompt": ""}
    if family == "sdxl":
        del options["negative_prompt"]
    if backbone.img_channels != backbone.shape[0] or len(backbone.shape) == 4:
        options["num_frames"] = 9
    if hasattr(backbone, "max_tokens"):
        options["max_sequence_length"] = backbone.max_tokens
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
    if name in ("wan-i2v", "cogvideox-i2v", "cosmos-v2w"):
        options["image"] = as_pil(picture()[0])
    if name == "wan-vace":
        options["video"] = [as_pil(x) for x in picture(9)[0].unbind(1)]

    def keep(pipe, i, t, values):
        seen.append(values["latents"])
        return {}

    if family == "cosmos":
        options["guidance_scale"] = guidance - 1  # there it is c + w (c - u)
        pipe.safety_checker.check_text_safety = lambda text: True
        pipe.safety_checker.device, pipe.safety_checker.dtype = torch.device("cpu"), torch.float32
    pipe.set_progress_bar_config(disable=True)
    pipe(**options, latents=latents.clone(), callback_on_step_end=keep)
    if family == "flux":
        seen = [pipe._unpack_latents(x, 64, 64, 8) for x in seen]
    elif family == "cogvideox":
        seen = [x.transpose(1, 2) for x in seen]
        alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
        return ((1 - alphas) / alphas).sqrt(), [z, *seen], (1 + (1 - alphas) / alphas).sqrt()
    sigmas = pipe.scheduler.sigmas[:steps].double()
    if vp:
        return sigmas, [z * pipe.scheduler.init_noise_sigma, *seen], torch.ones(steps)
    if family == "cosmos":
        return sigmas, [z * 80, *seen], torch.ones(steps)
    return sigmas / (1 - sigmas), [z, *seen], 1 / (1 - sigmas)


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
    if name in ("wan-i2v", "cogvideox-i2v"):
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
    sigmas, seen, scale = run_pipeline(name, backbone, z, 4, guidance, prompt)
    cond = own_condition(name, backbone, prompt)
    spy = Recorder(backbone)

    def largest_error(z, sigmas, seen, scale):
        spy.seen = []
        x = euler_sampler(spy, z, cond, guidance=guidance, sigmas=sigmas)
        expected = [x * s for x, s in zip(seen, scale, strict=False)]
        if not name.startswith("cosmos"):  # whose last step goes from σ_min to σ_min
            spy.seen, expected = [*spy.seen, x], [*expected, seen[-1]]
        pairs = zip(spy.seen, expected, strict=True)
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    first = int(sigmas[0] > 1e5)
    if first:
        finite = torch.cat([torch.tensor([backbone.sigma_max]), sigmas[1:]])
        noise = [backbone.sigma_max * z, *seen[1:]]
        ones = torch.cat([torch.ones(1), scale[1:]])
        assert largest_error(z, finite, noise, ones) < 1e-3
        print(name, "noise", largest_error(z, finite, noise, ones))
    start = (seen[first] * scale[first] / sigmas[first]).float()
    print(name, "finite", largest_error(start, sigmas[first:], seen[first:], scale[first:]))
    assert largest_error(start, sigmas[first:], seen[first:], scale[first:]) < 1e-4
