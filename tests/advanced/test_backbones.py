"""Backbones: tiny random models of every family, saved as diffusers saves them and loaded for real.

What needs transformers, accelerate or peft is skipped where they are not installed.
"""

import copy
import functools
import importlib.util
import itertools
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torchrun runs this file, too

from conftest import Calls
from test_processes import as_one_process

import causal_video
import dmd2_cifar
import edm_teacher as edm
import f_distill
import ladd
from backbones import families, lora, scripts
from backbones.causal_wan import CausalWan
from backbones.denoiser import VP, Flow, euler_sampler, read_image, schedule_of
from backbones.loading import load_backbone
from backbones.lora import Role, three_roles
from tools import plot

D64 = torch.float64
logging.getLogger("diffusers").setLevel(logging.ERROR)


def needs(*packages):
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"pip install {' '.join(missing)}")


@pytest.fixture(autouse=True)
def untitled(monkeypatch):
    """Pictures without matplotlib, which takes half a second for each."""
    monkeypatch.setitem(sys.modules, "tools.plot", None)


# ---------------------------------------------------------------- tiny models, as folders
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
UNET = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1}
UNET |= {"norm_num_groups": 8, "attention_head_dim": 8}
UNET |= {"down_block_types": DOWN, "up_block_types": UP}
TIME = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
TIME |= {"cross_attention_dim": 32, "addition_embed_type": "text_time"}
TWO = {"num_attention_heads": 2, "attention_head_dim": 16}
LATENTS = {"in_channels": 4, "out_channels": 4, "num_layers": 3}
FLUX = TWO | {"in_channels": 16, "num_layers": 1, "num_single_layers": 2}
FLUX |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
WAN = TWO | LATENTS | {"attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32}
IMAGE = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 24}
COG = TWO | LATENTS | {"time_embed_dim": 8, "text_embed_dim": 32, "max_text_seq_length": 16}
COG |= {"sample_width": 16, "sample_height": 8, "sample_frames": 9}
ROTARY = COG | {"use_rotary_positional_embeddings": True}
COSMOS = TWO | LATENTS | {"mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4}
COSMOS |= {"max_size": (4, 32, 32), "extra_pos_embed_type": None}
KL = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "latent_channels": 4}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
COG_VAE = KL | {"layers_per_block": 1, "norm_num_groups": 2, "scaling_factor": 0.7}
COG_VAE |= {f"{k}_block_types": (f"CogVideoX{k.title()}Block3D",) * 4 for k in ("down", "up")}
WAN_VAE = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
WAN_VAE |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0]}
VP_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULER = VP_BETAS | {"timestep_spacing": "leading", "steps_offset": 1}
DDIM = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "clip_sample": False}
DDIM |= {"timestep_spacing": "trailing"}
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
KARRAS, DYNAMIC = {"use_karras_sigmas": True}, {"use_dynamic_shifting": True}

UNET_2D, WAN_3D, FLUX_2D = "UNet2DConditionModel", "WanTransformer3DModel", "FluxTransformer2DModel"
COG_3D, COSMOS_3D = "CogVideoXTransformer3DModel", "CosmosTransformer3DModel"
FLOW_EULER, KL_VAE = "FlowMatchEulerDiscreteScheduler", ("AutoencoderKL", KL)
FAMILIES = {  # network, scheduler, VAE, text encoders
    "sd15": (UNET_2D, "PNDMScheduler", EULER, *KL_VAE, "clip"),
    "sdxl": (UNET_2D, "EulerDiscreteScheduler", EULER, *KL_VAE, "clip clip-projection"),
    "flux": (FLUX_2D, FLOW_EULER, {}, "AutoencoderKL", KL | {"shift_factor": 0.1}, "clip t5"),
    "wan": (WAN_3D, "UniPCMultistepScheduler", UNIPC, "AutoencoderKLWan", WAN_VAE, "umt5"),
    "cogvideox": (COG_3D, "CogVideoXDDIMScheduler", DDIM, "AutoencoderKLCogVideoX", COG_VAE, "t5"),
    "cosmos": (COSMOS_3D, FLOW_EULER, KARRAS, "AutoencoderKLWan", WAN_VAE, "t5"),
}
ONE, I2V = {"snr_shift_scale": 1.0}, "CogVideoXImageToVideoPipeline"
MODELS = {  # pipeline, configuration of the network, what is special of its scheduler
    "sd15": ("StableDiffusionPipeline", UNET | {"cross_attention_dim": 16}, {}),
    "sdxl": ("StableDiffusionXLPipeline", UNET | TIME, {}),
    "flux-dev": ("FluxPipeline", FLUX | {"guidance_embeds": True}, DYNAMIC),
    "flux-schnell": ("FluxPipeline", FLUX, {}),
    "wan": ("WanPipeline", WAN, {}),
    "wan-i2v": ("WanImageToVideoPipeline", WAN | IMAGE, {}),
    "cogvideox-2b": ("CogVideoXPipeline", COG, {"snr_shift_scale": 3.0}),
    "cogvideox-5b": ("CogVideoXPipeline", ROTARY, ONE),
    "cogvideox-i2v": (I2V, ROTARY | {"in_channels": 8}, ONE),
    "cosmos-t2i": ("Cosmos2TextToImagePipeline", COSMOS, {}),
}
SIX = ["sd15", "sdxl", "flux-dev", "wan", "cogvideox-5b", "cosmos-t2i"]
FRAMES = {"wan": (9,), "cogvideox": (9,), "cosmos": (1,)}
SIZE = (64, 96)  # not square: height and width are not to be mixed up


def family_of(name):
    return name.split("-")[0]


def part_of(name):
    return "unet" if name in ("sd15", "sdxl") else "transformer"


def text_parts(encoders):
    """{folder: object}: text encoders of some thousand weights, a tokenizer of ten words."""
    import tokenizers
    import transformers

    words = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "dog", "on", "the", "mat"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    end = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**end)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {"model_max_length": 16, "tokenizer_object": tokenizer}
    tokenizer = transformers.PreTrainedTokenizerFast(**special)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    layers |= {"hidden_size": 16, "projection_dim": 16}
    clip = {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0, "vocab_size": 12}
    clip = transformers.CLIPTextConfig(**clip | layers, max_position_embeddings=16)
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 12}
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=16, **layers)
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
    pipeline, config, special = MODELS[name]
    network, scheduler, settings, vae, vae_config, encoders = FAMILIES[family_of(name)]
    encoders = encoders.split() + ["clip-vision"] * ("image_dim" in config)
    torch.manual_seed(len(name))
    parts = {part_of(name): getattr(diffusers, network)(**config)}
    parts |= {"scheduler": getattr(diffusers, scheduler)(**settings | special)}
    parts |= {"vae": getattr(diffusers, vae)(**vae_config)}
    parts |= text_parts(encoders) if importlib.util.find_spec("transformers") else {}
    index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for part, value in parts.items():
        value.save_pretrained(base / name / part)
        index[part] = [type(value).__module__.split(".")[0], type(value).__name__]
    (base / name / "model_index.json").write_text(json.dumps(index))
    return base / name


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@functools.cache
def cached(name, base):
    family = family_of(name)
    return load_backbone(f"{family}:{folder(name, base)}", size=SIZE + FRAMES.get(family, ()))


@pytest.fixture
def load(base):
    """load(name) -> the tiny backbone, freshly copied, frozen."""
    used = []

    def load(name):  # diffusers loads some weights of Wan and Cosmos in float32
        needs(*["accelerate"] * (family_of(name) in ("wan", "cosmos")))
        used.append(copy.deepcopy(cached(name, base)))
        return used[-1]

    yield load
    for backbone in used:  # the codec is that of all copies
        backbone.codec.table, backbone.codec.nothing = {}, None


def some_cond(backbone, n=2, seed=0):
    """A condition of the right shapes, without any text encoder."""
    torch.manual_seed(seed)
    config = backbone.model.config
    widths = ("text_dim", "joint_attention_dim", "text_embed_dim", "cross_attention_dim")
    width = next(config[k] for k in widths if k in config)
    cond = {"text": torch.randn(n, 512 if config.get("image_dim") else 16, width)}
    if isinstance(backbone, (families.SDXL, families.Flux)):
        cond["pooled"] = torch.randn(n, 16)
    if config.get("image_dim"):
        cond["clip"] = torch.randn(n, 5, 16)
    if backbone.needs_picture:
        channels = config.in_channels - config.out_channels
        cond["image"] = torch.randn(n, channels, *backbone.shape[1:])
    return cond


def give_prompts(backbone, n=3):
    """A table of n rows and its "no condition", as use_prompts would make."""
    backbone.codec.table, backbone.label_dim = some_cond(backbone, n), n
    none = some_cond(backbone, 1, seed=9)
    backbone.codec.nothing = {k: v for k, v in none.items() if k in ("text", "pooled")}
    return backbone.codec.table


def randomised(*roles):
    for p in itertools.chain(*(role.parameters() for role in roles)):
        torch.nn.init.normal_(p, std=0.3)
    return roles


# ---------------------------------------------------------------- against diffusers' own pipelines
def picture(frames=None, size=SIZE):
    """(1, 3, H, W) or (1, 3, F, H, W) in [-1, 1], every value that of a byte."""
    torch.manual_seed(5)
    return torch.randint(0, 256, (1, 3, *([frames] if frames else []), *size)) / 127.5 - 1


def run_pipeline(name, backbone, z, steps, guidance, prompt):
    """(σ, [x before each step, result], factors to x + σ ε, pixels in [0, 1]) of pipeline(...).

    Only its scheduler is changed, to Euler (SD, flow); CogVideoX has DDIM.
    """
    family, pipe, seen = family_of(name), backbone.codec.pipe, []
    options = {"height": 64, "width": 96, "num_inference_steps": steps, "output_type": "pt"}
    options |= {"guidance_scale": guidance, "prompt": prompt, "latents": z.clone()}
    options |= {"negative_prompt": ""} if family not in ("sdxl", "flux") else {}
    options |= {"num_frames": 9} if family in ("wan", "cogvideox") else {}
    options |= {"max_sequence_length": backbone.tokens} if len(backbone.shape) == 4 else {}
    if backbone.needs_picture:
        pixels = edm.to_uint8(picture()[0]).permute(1, 2, 0).numpy()
        options["image"] = Image.fromarray(pixels)
    if family in ("sd15", "sdxl"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    elif family == "wan":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif family == "flux":
        options |= {"max_sequence_length": 512 if "dev" in name else 256, "guidance_scale": 3.5}
        options["latents"] = pipe._pack_latents(z, 1, *z.shape[1:])
    elif family == "cogvideox":
        options["latents"] = z.transpose(1, 2)
    elif family == "cosmos":
        options["guidance_scale"] = guidance - 1  # there it is c + w (c - u)
        pipe.safety_checker.check_text_safety = lambda text: True
        pipe.safety_checker.check_video_safety = lambda video: video
        pipe.safety_checker.device, pipe.safety_checker.dtype = torch.device("cpu"), torch.float32
    options["callback_on_step_end"] = lambda pipe, i, t, now: seen.append(now["latents"]) or {}
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**options)[0]
    if family == "cogvideox":
        alphas = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
        seen = [z, *(x.transpose(1, 2) for x in seen)]
        return (1 / alphas - 1).sqrt(), seen, (1 / alphas).sqrt(), made
    sigmas = pipe.scheduler.sigmas[:steps].double()
    if family in ("sd15", "sdxl", "cosmos"):
        first = 80 if family == "cosmos" else pipe.scheduler.init_noise_sigma
        return sigmas, [z * first, *seen], torch.ones(steps), made
    seen = [pipe._unpack_latents(x, 64, 96, 8) for x in seen] if family == "flux" else seen
    return sigmas / (1 - sigmas), [z, *seen], 1 / (1 - sigmas), made


@pytest.mark.parametrize("name", MODELS)
def test_sampling_equals_the_pipeline(name, load, monkeypatch):
    """Prompt and picture in, latents out: x + (σ' - σ)(x - D)/σ is each pipeline's own sampler.

    At every step to 1e-4 from the first finite σ on; to 1e-3 from pure noise with 9999 for σ = ∞.
    """
    needs("transformers")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    backbone, prompt = load(name), "a red cat on the mat"
    guidance = 1.0 if name.startswith("flux") else 3.0
    torch.manual_seed(1)
    z = torch.randn(1, *backbone.shape)
    sigmas, seen, scale, made = run_pipeline(name, backbone, z, 4, guidance, prompt)
    cond = backbone.encode_prompts([prompt])
    cond |= backbone.encode_start(picture()) if backbone.needs_picture else {}
    calls = Calls(monkeypatch, type(backbone), "forward")

    def largest_error(z, sigmas, seen, scale):
        calls.clear()
        x = euler_sampler(backbone, z, cond, guidance=guidance, sigmas=sigmas)
        mine = [call.x for call in calls[:: 1 if guidance == 1 else 2]]
        expected = [x * s for x, s in zip(seen, scale, strict=False)]
        if not name.startswith("cosmos"):  # whose last step goes from σ_min to σ_min
            mine, expected = [*mine, x], [*expected, seen[-1]]
        pairs = zip(mine, expected, strict=True)
        return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)

    first = int(sigmas[0] > 1e5)
    if first:
        finite = torch.cat([torch.tensor([backbone.sigma_max]), sigmas[1:]])
        noise = [backbone.sigma_max * z, *seen[1:]]
        ones = torch.cat([torch.ones(1), scale[1:]])
        assert largest_error(z, finite, noise, ones) < 1e-3
    start = (seen[first] * scale[first] / sigmas[first]).float()
    assert largest_error(start, sigmas[first:], seen[first:], scale[first:]) < 1e-4
    pixels = backbone.decode(seen[-1])
    pixels = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
    pixels = pixels[:, 0] if name == "cosmos-t2i" else pixels
    bits = 1 / 255 if name.startswith("cosmos") else 1e-4  # its guardrail sees bytes
    assert_close(made, (pixels / 2 + 0.5).clamp(0, 1), atol=bits, rtol=0)


# ---------------------------------------------------------------- preconditioning
def schedules():
    v, eps = diffusers.CogVideoXDDIMScheduler(**DDIM), diffusers.DDIMScheduler(**VP_BETAS)
    karras = diffusers.FlowMatchEulerDiscreteScheduler(**KARRAS)
    found = {"eps": eps, "v": v, "flow": diffusers.UniPCMultistepScheduler(**UNIPC)}
    return {k: schedule_of(s, None) for k, s in (found | {"cosmos": karras}).items()}


@pytest.mark.parametrize("kind", ["eps", "v", "flow", "cosmos"])
def test_preconditioning_inverts_each_familys_forward_process(kind):
    """c_in (x + σ ε) = α x + s ε of the family; with the F it trains for, D = x.

    1/c_out² turns (D - x)² into (F - F*)², so the fake's weight 1/σ² + 1/σ_data² is the one that
    the family was trained with: exactly for ε and v, for flow 0.5 to 1 of it.
    """
    schedule, flow = schedules()[kind], kind in ("flow", "cosmos")
    sigma = schedule.sigma_of(torch.linspace(0, 1, 7, dtype=D64)[:, None])
    assert_close(sigma[[0, -1], 0].tolist(), [schedule.sigma_min, schedule.sigma_max])
    x, eps = torch.randn(2, 7, 5, dtype=D64)
    alpha = 1 / (1 + sigma) if flow else (1 + sigma**2).rsqrt()
    s = alpha * sigma
    best = {"eps": eps, "v": alpha * eps - s * x}.get(kind, eps - x)
    c_skip, c_out, c_in = schedule.coefficients(sigma)
    assert_close(c_in * (x + sigma * eps), alpha * x + s * eps)
    assert_close(c_skip * (x + sigma * eps) + c_out * best, x.clone(), atol=1e-9, rtol=1e-9)
    wrong = best + torch.randn(7, 5, dtype=D64)
    denoised = c_skip * (x + sigma * eps) + c_out * wrong
    assert_close(((denoised - x) / c_out) ** 2, (wrong - best) ** 2, rtol=1e-6, atol=1e-9)
    ratio = (1 / sigma**2 + 1 / schedule.sigma_data**2) * c_out**2
    assert (ratio > (0.5 if flow else 1) - 1e-9).all()
    assert (ratio < 1 + 1e-9).all()


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_time_of_a_table_entry_is_its_index(kind):
    """VP: t(σ_k) = k, σ(u = k/999) = σ_k, also in float32; σ = ∞ became 10,000, 0 is t = 0."""
    schedule = schedules()[kind]
    k, sigma = torch.arange(1000.0), schedule.table.exp()
    assert isinstance(schedule, VP)
    assert_close(schedule.time(sigma.float()), k, atol=1e-3, rtol=0)
    assert_close(schedule.sigma_of(k.double() / 999), sigma, rtol=1e-9, atol=0)
    assert schedule.time(torch.zeros(1)) == 0
    assert schedule.sigma_max == pytest.approx(14.6146 if kind == "eps" else 1e4, rel=1e-4)


def test_flow_times_are_shifted_as_by_the_schedulers(load):
    """t = s u / (1 + (s-1) u), with Flux' s from its number of tokens, between 0.001 and 0.9999;
    Cosmos has EDM's levels. A script's steps are at these levels: its own schedule is not asked."""
    u = torch.linspace(0.1, 0.9, 9, dtype=D64)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**DYNAMIC)
    small = 0.5 + (24 - 256) / (4096 - 256) * (1.15 - 0.5)
    for height, width, mu in ((32, 32, 0.5), (128, 128, 1.15), (8, 12, small)):
        flow = schedule_of(scheduler, (16, height, width))
        t = torch.from_numpy(scheduler.time_shift(mu, 1.0, u.numpy()))
        assert_close(flow.time(flow.sigma_of(u)), t)
    three = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    for scheduler in (diffusers.UniPCMultistepScheduler(**UNIPC), three):
        flow = schedule_of(scheduler, None)
        assert_close(flow.time(flow.sigma_of(u)), 3 * u / (1 + 2 * u))
    assert_close(schedules()["cosmos"].sigma_of(u), dmd2_cifar.karras_sigma(u))
    ends = Flow(5.0).time(Flow(5.0).sigma_of(torch.tensor([0.0, 1.0], dtype=D64)))
    assert_close(ends, torch.tensor([0.001, 0.9999], dtype=D64))
    sigma = dmd2_cifar.sampling_sigmas(load("flux-schnell"), 4)  # no shift
    assert_close(sigma / (1 + sigma), torch.tensor([0.9999, 0.75, 0.5, 0.25]))


# ---------------------------------------------------------------- the denoiser
@pytest.mark.parametrize("name", MODELS)
def test_denoiser_has_the_interface_of_edm_precond(name, load):
    """D(x, σ, cond): x's shape, float32, finite at both ends; every weight gets a gradient.

    Features change nothing: same D, maps (B, C, *grid); "only" ends after the last of them.
    """
    backbone = load(name)
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape, requires_grad=True)
    for sigma in (backbone.sigma_min, backbone.sigma_max):
        out = backbone(x * max(sigma, 1), torch.full((2,), sigma), cond)
        assert (out.shape, out.dtype) == (x.shape, torch.float32)
        assert out.isfinite().all()
    denoised, features = backbone(x, 0.7, cond, return_features=True)
    none, early = backbone(x, 0.7, cond, return_features="only")
    assert none is None
    assert torch.equal(backbone(x, 0.7, cond), denoised)
    assert all(torch.equal(a, b) for a, b in zip(features, early, strict=True))
    grids = [[8, 12], [4, 6]]
    if part_of(name) == "transformer":
        grids = [[n // p for n, p in zip(backbone.shape[1:], backbone.patch, strict=True)]] * 2
    assert [list(f.shape[2:]) for f in features] == grids
    (grad,) = torch.autograd.grad(early[-1].square().sum(), x)
    assert grad.any()
    assert not any(m._forward_hooks for m in backbone.modules())
    trained = edm.trainable_copy(backbone)
    assert trained.codec is backbone.codec  # text encoder and VAE are not copied
    trained(x, torch.tensor([0.7, 2.0]), cond).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_transformer_features_are_tokens_in_their_places(load):
    """A token's feature stands where its pixels are. Of 30 blocks those of 15, 22 and 29 are taken,
    as in FastGen."""
    backbone = load("flux-schnell")
    backbone.taps, cond = [0], some_cond(backbone, 1)
    x = torch.randn(1, *backbone.shape)
    moved = x.clone()
    moved[:, :, 2:4, 6:8] += 1  # rows 2, 3 and columns 6, 7: token (1, 3)
    a, b = (backbone(y, 0.7, cond, return_features="only")[1][0] for y in (x, moved))
    change = (a - b).abs().sum(1)[0]
    assert divmod(change.argmax().item(), 6) == (1, 3)
    model = backbone.model
    model.transformer_blocks = torch.nn.ModuleList([model.transformer_blocks[0]] * 28)
    assert families.Flux(model, backbone.schedule, None, backbone.shape).taps == [15, 22, 29]


# ---------------------------------------------------------------- conditions and guidance
@pytest.mark.parametrize("name", ["sd15", "flux-dev", "wan-i2v"])
def test_rows_dicts_and_none(name, load):
    """Rows of the table equal the dict they stand for; a given image stays when the text goes;
    guidance w = 1 is the conditional output in one call."""
    backbone = load(name)
    table = give_prompts(backbone)
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
    expected = dropped + 4.0 * (conditional - dropped)
    assert_close(edm.guided(backbone, x, sigma, rows, 4.0), expected)


def test_images_to_latents_and_back_have_unit_scale(load):
    """encode is (VAE - mean) / std, decode its inverse, with each VAE's own numbers."""
    wan = (torch.tensor(WAN_VAE[f"latents_{k}"]).reshape(4, 1, 1, 1) for k in ("mean", "std"))
    numbers = {"flux-dev": (0.1, 1 / 0.18215), "cogvideox-5b": (0.0, 1 / 0.7), "wan": wan}
    for name, (mean, std) in numbers.items():
        backbone, x = load(name), picture(None if "flux" in name else 5, (32, 48))
        raw = backbone.codec.vae.encode(x).latent_dist.mode()
        assert_close(backbone.encode_images(x), (raw - mean) / std)
        decoded = backbone.codec.vae.decode(raw).sample
        assert_close(backbone.decode((raw - mean) / std), decoded)
    backbone.codec.vae.to("meta")  # pictures on the CPU reach a VAE elsewhere
    assert backbone.encode_images(x).device.type == "meta"
    del backbone.codec.__dict__["vae"]


# ---------------------------------------------------------------- loading
def test_what_can_be_wrong_is_said_in_one_sentence(load, base, monkeypatch):
    """Each names the thing that is wrong and what would be right."""
    path = folder("sd15", base)
    two, index = base / "a14b", json.loads((folder("wan", base) / "model_index.json").read_text())
    two.mkdir()
    (two / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875}))
    accelerate = importlib.util.find_spec("accelerate") is not None
    wrong = {
        "sd15": "'sd15': expected sd15:, sdxl:, flux:, wan:, cogvideox:, cosmos: and a folder",
        f"sd3:{path}": "sd3:.*expected sd15:, sdxl:",
        f"sd15:{base}/absent": "absent is no model for sd15",
        f"sd15:{path / 'vae'}": "vae is no model for sd15",
        f"flux:{path}": "a StableDiffusionPipeline; flux: takes FluxPipeline",
        f"wan:{two}": "two networks, each for some noise" if accelerate else "needs accelerate",
    }
    for name, message in wrong.items():
        with pytest.raises(edm.UserError, match=message) as error:
            load_backbone(name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    backbone = load("flux-dev")
    backbone.codec.loaded = None
    with pytest.raises(edm.UserError, match="needs transformers and sentencepiece: pip install tr"):
        backbone.encode_prompts(["a cat"])
    with pytest.raises(edm.UserError, match="needs accelerate: pip install accelerate"):
        load_backbone(f"wan:{two}")


def test_bfloat16_is_for_network_and_text_encoder_alone(load, base):
    """The VAE, pictures and x0 are float32, c_skip x + ... is not rounded: at small σ D = x."""
    needs("transformers", "sentencepiece")
    half = load_backbone(f"flux:{folder('flux-dev', base)}", torch.bfloat16, size=SIZE)
    backbone, pipe = load("flux-dev"), half.codec.pipe
    assert half.model.dtype == pipe.text_encoder.dtype == torch.bfloat16
    cond, x = some_cond(backbone), torch.randn(2, *backbone.shape)
    assert half(x, 0.5, cond).dtype == half.decode(x).dtype == pipe.vae.dtype == torch.float32
    assert_close(half(x, 0.5, cond), backbone(x, 0.5, cond), atol=0.05, rtol=0)
    assert_close(half(x, 1e-3, cond), backbone(x, 1e-3, cond), atol=1e-4, rtol=0)


def test_shapes_follow_vae_and_size(base):
    """A VAE that shrinks by 16, as Wan 2.2 5B has: 9 x 64 x 96 pixels are 3 x 4 x 6 latents."""
    needs("accelerate")
    path = shutil.copytree(folder("wan", base), base / "vae-16") / "vae/config.json"
    config = json.loads(path.read_text()) | {"scale_factor_spatial": 16}
    path.write_text(json.dumps(config))
    backbone = load_backbone(f"wan:{base / 'vae-16'}", size=(*SIZE, 9))
    assert backbone.shape == (4, 3, 4, 6)
    assert (backbone.frames, *backbone.pixels) == (9, 64, 96)


# ---------------------------------------------------------------- causal Wan
def causal(load):
    """Wan and a causal copy of it, for four latent frames."""
    torch.manual_seed(3)
    wan = load("wan")
    wan.shape = (4, 4, 8, 12)
    return wan, CausalWan(copy.deepcopy(wan))


def chunked(student, x, sigma, cond, n, mask, forget=False, late=0):
    """Chunk after chunk, as in a roll-out, with what is kept of the past under the mask. Wrong on
    purpose: forget the past; all `late` frames too late."""
    past, out = {}, []
    for i in range(0, x.shape[2], n):
        level = sigma[:, i : i + n] if sigma.ndim == 2 else sigma
        seen = {} if forget else {f: past[f] for f in past if mask[i, f]}
        how = {"past": seen, "start": i + late * (i > 0), "return_kv": True}
        y, kv = student(x[:, :, i : i + n], level, cond, **how)
        past |= {i + f: [(k[:, :, f], v[:, :, f]) for k, v in kv] for f in range(n)}
        out.append(y)
    return torch.cat(out, 2)


@pytest.mark.parametrize(("n", "window"), [(1, ()), (2, ()), (1, (3, 1))])
def test_cache_equals_the_mask(load, n, window):
    """Chunk by chunk with keys and values of earlier ones = one call under the mask, to 1e-5, also
    with a window and a sink: so nothing of later ones leaks. Not so without the past, nor with
    RoPE's positions off by one. Without a mask it is Wan."""
    wan, student = causal(load)
    mask = causal_video.block_mask(causal_video.block_layout(4, n), *window)
    assert mask[3].tolist() == [True, not window, True, True]
    x, cond = torch.randn(2, *student.shape), some_cond(student)
    for sigma in (torch.tensor([0.4, 2.0]), torch.rand(2, 4 // n).repeat_interleave(n, 1)):
        assert_close(student(x, sigma, cond), wan(x, sigma, cond), atol=1e-5, rtol=0)
        whole = student(x, sigma, cond, mask=mask)
        assert_close(chunked(student, x, sigma, cond, n, mask), whole, atol=1e-5, rtol=0)
        for wrong in ({"forget": True}, {"late": 1}):
            made = chunked(student, x, sigma, cond, n, mask, **wrong)
            assert (made - whole).abs().max() > 1e-3


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_later_call_in_another_role_changes_no_gradient(load, checkpointing, cached):
    """The generator is called causally, by mask or cache, then teacher and fake, bidirectional, all
    on one Wan: its gradients are those of a backward pass at once, with checkpointing, too."""
    wan, _ = causal(load)
    x, cond, sigma = torch.randn(1, *wan.shape), some_cond(wan, 1), torch.tensor([1.0])
    before = wan(x, sigma, cond)
    if checkpointing:
        wan.gradient_checkpointing()
    student = CausalWan(wan)
    with torch.no_grad():
        _, kv = student(x[:, :, :1], sigma, cond, return_kv=True)
    how, frames = {"mask": torch.ones(4, 4).tril().bool()}, slice(4)
    if cached:
        past = {0: [(k[:, :, 0], v[:, :, 0]) for k, v in kv]}
        how, frames = {"past": past, "start": 1}, slice(1, 2)
    generator, fake, teacher = three_roles(student, 2)
    randomised(generator, fake)
    weights, grads = [*generator.parameters()], []
    for others in (False, True):
        loss = generator(x[:, :, frames], sigma, cond, **how).square().mean()
        if others:
            for network in (teacher, wan):  # nothing is left behind
                assert_close(network(x, sigma, cond), before, atol=1e-5, rtol=0)
            fake(x, sigma, cond).mean().backward()
        grads.append(torch.autograd.grad(loss, weights))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "cogvideox-5b", "wan"])
def test_checkpointing_runs_each_block_twice_and_changes_no_gradient(name, load):
    """Also for features with "only", where the forward pass is left by an exception."""
    grads = []
    for on in (False, True):
        backbone, calls = edm.trainable_copy(load(name)), []
        if on:
            backbone.gradient_checkpointing()
        cond, x = some_cond(backbone), torch.ones(2, *backbone.shape)
        block = backbone.blocks[0].resnets[0] if name == "sd15" else backbone.blocks[0]
        block.norm1.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        _, features = backbone(x, 1.0, cond, return_features="only")
        (backbone(x, 1.0, cond).square().mean() + features[-1].square().mean()).backward()
        grads.append([p.grad for p in backbone.parameters()])
        assert len(calls) == (4 if on else 2)
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- three roles on one base
@pytest.mark.parametrize("name", SIX)
def test_three_roles_train_on_a_base_that_never_moves(name, load):
    """The scripts' own calls: trainable_copy(teacher) starts as the teacher, a step's gradient
    reaches the generator or the fake alone, a deep copy holds the average of the weights; all share
    the base. Afterwards the teacher's output is bit-identical to before."""
    backbone = load(name)
    give_prompts(backbone)
    teacher = Role(backbone, 2, adapter=False)
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    x, z, rows = *torch.randn(2, 2, *backbone.shape), torch.tensor([2, 0])
    weights, before = copy.deepcopy(backbone.state_dict()), backbone(x, 1.0, rows)
    roles = (generator, fake, teacher, ema)
    assert all(torch.equal(role(x, 1.0, rows), before) for role in roles)
    assert not list(teacher.parameters())
    assert ema.sigma_max == backbone.sigma_max  # all else is the base's
    with torch.no_grad():
        for p in fake.parameters():  # at the start it is the teacher, there is no gradient
            p.add_(0.1 * torch.randn_like(p))
    cfg = dmd2_cifar.Config(gan_weight=0.0, guidance=3.0)
    optimizer = torch.optim.Adam([*generator.parameters(), *fake.parameters()], 0.05)

    def update(loss, trained, other):
        loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in trained.parameters())
        assert all(p.grad is None for p in other.parameters())
        optimizer.step()
        optimizer.zero_grad()

    for step in (1, 2):
        inputs = (*dmd2_cifar.backward_simulation(generator, z, rows, 2, 1), rows)
        loss, y, _ = dmd2_cifar.generator_step(generator, teacher, fake, None, cfg, inputs)
        update(loss, generator, fake)
        update(dmd2_cifar.fake_step(fake, teacher, None, cfg, y, rows)[0], fake, generator)
        edm.ema_update(ema, generator, 0.5, step)
    outs = [role(x, 1.0, rows) for role in roles]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outs, 2))
    assert all(torch.equal(y, before) for y in (outs[2], backbone(x, 1.0, rows)))  # none is left on
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items())
    again = copy.deepcopy(ema)
    assert torch.equal(again(x, 1.0, rows), outs[3])
    assert not any(p.requires_grad for p in again.parameters())
    assert again.base is generator.base is backbone


@pytest.mark.parametrize(("name", "part"), [("sd15", "time_emb_proj"), ("wan", "ffn")])
def test_a_role_is_the_base_with_low_rank_changes_of_its_linear_layers(name, part, load):
    """W + B A in the place of W, in all of the blocks; A and B are float32 on any base."""
    backbone, merged = load(name), load(name)
    x, cond = torch.randn(1, *backbone.shape), some_cond(backbone, 1)
    (role,), weights = randomised(Role(backbone, 2)), dict(merged.model.named_parameters())
    for key, b in role.weights.items():
        if key.endswith("/lora_B/weight"):
            a = role.weights[key.replace("lora_B", "lora_A")]
            assert a.shape[0] == b.shape[1] == 2
            weights[key.replace("/lora_B", "").replace("/", ".")].data += b @ a
    assert_close(role(x, 1.0, cond), merged(x, 1.0, cond), atol=1e-4, rtol=1e-4)
    assert {"attn1", "attn2", part} <= {word for key in role.weights for word in key.split("/")}
    backbone.model.to(torch.bfloat16)
    assert {p.dtype for p in Role(backbone, 2).parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_a_saved_adapter_is_read_by_the_pipeline_of_diffusers(name, load, base, tmp_path):
    """pipe.load_lora_weights(FOLDER), as users of diffusers do, gives its network our output. So
    does --sample's reader, also with files of earlier versions, whose names have no prefix."""
    needs("transformers", "peft")
    backbone, fresh = load(name), load(name)
    x, cond = torch.randn(2, *backbone.shape), some_cond(backbone)
    (generator,) = randomised(Role(backbone, 2))
    generator.save(tmp_path / "new")
    expected = generator(x, 1.0, cond)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name, base), safety_checker=None)
    fresh.model = getattr(pipe, part_of(name)).requires_grad_(False)
    assert (fresh(x, 1.0, cond) - expected).abs().max() > 1e-3
    pipe.load_lora_weights(tmp_path / "new")
    assert_close(fresh(x, 1.0, cond), expected, atol=1e-5, rtol=1e-5)
    state = safetensors.torch.load_file(tmp_path / "new" / lora.FILE)
    state = {k.removeprefix(part_of(name) + "."): v for k, v in state.items()}
    edm.save_tensors(tmp_path / "old" / lora.FILE, state)
    for kind in ("new", "old"):
        again = lora.load_generator(load(name), tmp_path / kind)
        assert_close(again(x, 1.0, cond), expected)
    with pytest.raises(edm.UserError, match="is no generator of this teacher"):
        lora.load_generator(load("cogvideox-2b"), tmp_path / "new")


SD15_FULL = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
WAN_FULL = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
FULL = {  # family, network, configuration, published size in millions
    "SD 1.5": (families.SD15, UNET_2D, SD15_FULL, 860),
    "Wan 2.1 1.3B": (families.Wan, WAN_3D, WAN_FULL, 1419),
    "FLUX.1-dev": (families.Flux, FLUX_2D, {"guidance_embeds": True}, 11901),
}


@pytest.mark.parametrize("name", FULL)
def test_adapters_need_a_fraction_of_the_memory_of_three_copies(name):
    """Bytes of weights, gradients and Adam's moments, without activations. Three copies in
    float32: 3 x 4 + 2 x 12; rank 64 on a base in bfloat16: 2 for each of its weights."""
    kind, network, config, millions = FULL[name]
    with torch.device("meta"):
        model = getattr(diffusers, network)(**config).to(torch.bfloat16)
        roles = three_roles(kind(model, Flow(), None, (4, 8, 8)), 64)
    size = sum(p.numel() for p in model.parameters())
    assert round(size / 1e6) == pytest.approx(millions, rel=2e-3)
    rank = [sum(p.numel() for p in role.parameters()) for role in roles]
    assert rank[0] == rank[1] > rank[2] == 0
    assert 2 * size + 16 * sum(rank) < 36 * size / 4


# ---------------------------------------------------------------- in the scripts
SCRIPTS = pytest.mark.parametrize("script", [dmd2_cifar, f_distill, ladd], ids=lambda s: s.__name__)
PROMPTS = ["a red cat", "the dog on the mat"]
VIDEO_RUN = {"num_frame_per_block": 1, "num_training_frames": 4, "local_attn_size": 2}
VIDEO_RUN |= {"denoising_steps": "1000,500", "ode_updates": 2, "generator_update_interval": 1}


@pytest.fixture
def config(base, tmp_path):
    """config(name) -> two steps of two samples on a saved tiny model, as the command line says."""

    def config(name, script=dmd2_cifar, **more):
        needs("transformers", "sentencepiece", "accelerate")
        (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
        size = (32, 48, *FRAMES.get(family_of(name), ()))
        options = {"teacher": f"{family_of(name)}:{folder(name, base)}", "device": "cpu"}
        options |= {"prompts": str(tmp_path / "prompts.txt"), "size": ",".join(map(str, size))}
        options |= {"batch": 2, "pairs": 2, "teacher_steps": 2, "steps": 2, "save_every": 2}
        options |= VIDEO_RUN if script is causal_video else {"ratio": 1, "sampling_steps": 2}
        return script.Config(**options | {"out": str(tmp_path / "run")} | more)

    return config


def network_in(path):
    """The tensors that a run has left in a folder."""
    (file,) = path.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    assert all(v.isfinite().all() for v in tensors.values())
    return tensors


@pytest.mark.parametrize("name", [*SIX, "flux-schnell"])
@SCRIPTS
def test_every_script_takes_two_steps_on_every_backbone(script, name, base, tmp_path, config):
    """--teacher NAME:PATH from reading to saving: the teacher's latents for the GAN, both updates,
    pictures of the prompts, and a network that diffusers reads, with every weight moved or kept."""
    cfg, run = config(name, script), tmp_path / "run"
    assert script.main(cfg)["config"]["teacher"] == cfg.teacher
    latents, _ = edm.load_tensors(run / "latents.safetensors")
    assert latents["labels"].tolist() == [0, 1]
    assert (run / "samples_2.png").stat().st_size > 1000
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == 2
    network = getattr(diffusers, FAMILIES[family_of(name)][0])
    before = network.from_pretrained(folder(name, base) / part_of(name)).state_dict()
    after = network.from_pretrained(run / "generator").state_dict()
    assert before.keys() == after.keys()
    moved = [not torch.equal(v, after[k]) for k, v in before.items() if v.is_floating_point()]
    assert sum(moved) > 0.8 * len(moved)
    assert network_in(run / "generator")


@pytest.mark.parametrize("name", ["sd15", "wan"])
@SCRIPTS
def test_every_script_takes_two_steps_with_adapters(script, name, tmp_path, config):
    """--lora-rank, --gradient-checkpointing, --amp: an adapter; its B were zero at the start."""
    more = {"lora_rank": 2, "gradient_checkpointing": True, "amp": script is dmd2_cifar}
    script.main(config(name, script, **more))
    second = [v for k, v in network_in(tmp_path / "run/generator").items() if "lora_B" in k]
    assert [bool(v.any()) for v in second] == [True] * (48 if name == "sd15" else 30)


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("rank", [0, 2])
def test_causal_video_takes_steps_on_wan(objective, rank, base, tmp_path, config):
    """ODE paths of the teacher, initialisation, CausVid, Self-Forcing, roll-outs of three clips;
    copies or adapters; what is saved --sample rolls out. (dmd's first step has no gradient: there
    fake and teacher are one; the last one's learning rate is 0. So there are three.)"""
    more = {"lora_rank": rank, "amp": rank > 0, "gradient_checkpointing": rank > 0, "steps": 3}
    more |= {"lr_generator": 0.1, "lr_fake": 0.1, "objective": objective, "save_every": 3}
    causal_video.main(config("wan", causal_video, **more))
    pairs, _ = edm.load_tensors(tmp_path / "run/pairs.safetensors")
    assert pairs["path"].shape == (2, 3, 4, 3, 4, 6)
    assert pairs["labels"].tolist() == [0, 1]
    start, seen = network_in(folder("wan", base) / "transformer"), []
    for stage, step in (("ode_init", 2), ("causvid", 3), ("self_forcing", 3)):
        assert (tmp_path / "run" / stage / f"samples_{step}.png").stat().st_size > 1000
        seen.append(network_in(tmp_path / "run" / stage / "generator"))
        assert seen[-1].keys() == start.keys() or rank
    for a, b in itertools.combinations(seen, 2):
        assert not all(torch.equal(v, b[k]) for k, v in a.items())
    more |= {"sample": str(tmp_path / "run/causvid/generator"), "out": str(tmp_path), "n": 1}
    assert causal_video.main(config("wan", causal_video, **more)) == {}
    assert (tmp_path / "sampled.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["wan-i2v", "cogvideox-i2v"])
def test_videos_start_from_the_pictures_after_the_prompts(name, tmp_path, config):
    """A tab and a path in each line of --prompts; two steps of DMD2; without, one sentence."""
    cfg, prompts = config(name), tmp_path / "prompts.txt"
    with pytest.raises(edm.UserError, match="a tab and a picture's path after each prompt"):
        scripts.load_teacher(cfg)
    Image.new("RGB", (90, 64), (200, 100, 50)).save(tmp_path / "a.png")
    prompts.write_text("\n".join(f"{prompt}\t{tmp_path}/a.png" for prompt in PROMPTS))
    teacher = scripts.load_teacher(cfg)
    pixels = read_image(tmp_path / "a.png", *teacher.pixels)
    assert pixels.shape == (3, 32, 48)
    assert_close(pixels[:, 0, 0], torch.tensor([200.0, 100, 50]) / 127.5 - 1)
    cond = teacher.encode_prompts([PROMPTS[1]]) | teacher.encode_start(pixels[None])
    x, row = torch.randn(1, *teacher.shape), torch.tensor([1])
    assert_close(teacher(x, 1.0, row), teacher(x, 1.0, cond), atol=1e-5, rtol=0)
    dmd2_cifar.main(cfg)
    assert (tmp_path / "run" / "generator" / "config.json").exists()
    prompts.write_text(f"a cat\t{tmp_path}/b.png\n")
    with pytest.raises(edm.UserError, match=r"b\.png cannot be read as a picture"):
        scripts.load_teacher(cfg)


def test_prompts_become_the_labels_of_a_teacher(config):
    """Lines of --prompts, encoded once; -1 and None are the empty prompt, of SDXL zeros. Copies of
    a teacher with --lora-rank are adapters, with --amp on a base in bfloat16."""
    for name, zero in (("sd15", 1), ("sdxl", 0)):
        teacher = scripts.load_teacher(config(name))
        assert (teacher.label_dim, teacher.latents, teacher.codec.loaded) == (2, True, None)
        x, rows = torch.randn(2, *teacher.shape), torch.tensor([1, -1])
        cond = teacher.encode_prompts([PROMPTS[1], ""])
        for v in cond.values():
            v[1] *= zero
        expected = teacher(x, 1.0, cond)
        assert_close(teacher(x, 1.0, rows), expected, atol=1e-5, rtol=0)
        assert_close(teacher(x, 1.0, None)[1], expected[1], atol=1e-5, rtol=0)
    role = scripts.load_teacher(config(name, lora_rank=2))
    assert (role.label_dim, role.latents, role.is_adapter) == (2, True, True)
    assert_close(edm.trainable_copy(role)(x, 1.0, rows), expected, atol=1e-5, rtol=0)
    assert scripts.load_teacher(config(name, lora_rank=2, amp=True)).dtype == torch.bfloat16


def test_wrong_options_of_a_teacher_are_one_sentence(tmp_path, config):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "tabs.txt").write_text("a cat\ta.png\n")
    wrong = {
        "--size 64: expected height,width": {"size": "64"},
        "needs --prompts FILE": {"prompts": ""},
        "--prompts .*: the file has no line": {"prompts": str(tmp_path / "empty.txt")},
        "no tab and nothing after each prompt": {"prompts": str(tmp_path / "tabs.txt")},
        "--teacher-steps 0: the latents for the GAN need 1 or more": {"teacher_steps": 0},
        "is no generator of this teacher": {"sample": str(tmp_path)},
    }
    for message, more in wrong.items():
        with pytest.raises(edm.UserError, match=message):
            dmd2_cifar.main(config("sd15", **more))
    wrong = {"sd15": "takes wan: alone", "wan-i2v": "videos start from no picture"}
    for name, message in wrong.items():
        with pytest.raises(edm.UserError, match=message):
            scripts.load_teacher(config(name), causal=True)


@pytest.mark.parametrize("rank", [0, 2])
def test_sample_draws_with_the_weights_of_a_run(rank, tmp_path, config):
    """--sample FOLDER: the generator that the run has saved, a network or an adapter."""
    more = {"lora_rank": rank, "lr_generator": 0.1}
    dmd2_cifar.main(config("sd15", **more))
    more |= {"sample": str(tmp_path / "run/generator"), "n": 3, "labels": "1", "out": str(tmp_path)}
    cfg = config("sd15", **more)
    assert dmd2_cifar.main(cfg) == {}
    assert (tmp_path / "sampled.png").stat().st_size > 1000
    trained = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["trained"]
    weights, state = trained["ema"][0], scripts.load_teacher(cfg).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in weights.items())


def test_pictures_have_prompts_for_titles(tmp_path, monkeypatch, config):
    """Four samples, or one video of which four frames, of each of the first four prompts, or those
    of labels. Random numbers are their own. Without tools/ they are the same, without titles."""
    drawn, plain = Calls(monkeypatch, plot, "save_rows"), []
    monkeypatch.setattr(edm, "save_grid", lambda path, *rows, **how: plain.extend(rows))
    monkeypatch.setitem(sys.modules, "tools.plot", plot)
    for name in ("sd15", "wan"):
        teacher = scripts.load_teacher(config(name))
        for k in (0, 1):
            torch.manual_seed(99 * k)
            teacher.draw(tmp_path / f"{k}.png", lambda z, labels: z + torch.randn(1), 0)
            titles = {k: len(v) for k, v in drawn[-1].rows.items()}
            assert titles == {"0. a red cat": 4, "1. the dog on the mat": 4}
        assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    for module in (plot, None):
        monkeypatch.setitem(sys.modules, "tools.plot", module)
        teacher.draw(tmp_path / "2.png", lambda z, labels: z, 0, torch.tensor([1, 1]), 2, frames=1)
    ((title, x),) = drawn[-1].rows.items()
    assert (title, len(x)) == ("1. the dog on the mat", 2)
    assert torch.equal(x, *plain)


def test_latents_of_the_teacher_are_guided_and_have_a_seed_of_their_own(config):
    """x for the GAN = euler_sampler from the noise of --seed + 10000; made once for a run."""
    cfg = config("sd15", guidance=3.0)
    teacher, run = scripts.load_teacher(cfg), edm.Run(cfg, "dmd2_cifar")
    x, labels = teacher.real_images(cfg, run)
    z = edm.noise(teacher, 2, cfg.seed + 10000)
    expected = euler_sampler(teacher, z, torch.arange(2), steps=2, guidance=3.0)
    assert_close(x, expected, atol=1e-3, rtol=1e-3)
    assert labels.tolist() == [0, 1]
    teacher.make_latents = pytest.fail  # not a second time
    assert torch.equal(teacher.real_images(cfg, run)[0], x)


@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_images_and_videos_of_a_folder_are_encoded(name, tmp_path, config):
    """--data FOLDER: VAE latents of its images, or of videos, folders of frames; class folder k has
    prompt k, so it needs a line."""
    data, video = tmp_path / "data", name == "wan"
    for kind, i, k in itertools.product(("cat", "dog"), (0, 1), range(10)):
        file = data / kind / (f"{i}/{k:02}.png" if video else f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 64), (20 * i, 20 * k * video, 50)).save(file)
    cfg = config(name, data=str(data))
    teacher = scripts.load_teacher(cfg)
    x, labels = teacher.real_images(cfg, edm.Run(cfg, "dmd2_cifar"))
    assert labels.tolist() == [0, 0, 1, 1]
    pixels = torch.tensor([20.0, 0, 50])[:, None, None, None].repeat(1, 9, 32, 48)
    pixels[1] += 20 * video * torch.arange(9)[:, None, None]
    pixels = (pixels if video else pixels[:, 0]) / 127.5 - 1
    assert_close(x[[3]], teacher.encode_images(pixels[None]), atol=1e-5, rtol=1e-5)
    if video:
        shutil.move(data / "cat/0/09.png", data / "cat/0/08.png")
        shutil.move(data / "cat/0/08.png", tmp_path)
        with pytest.raises(edm.UserError, match="a folder with 9 frames or more is needed"):
            teacher.make_latents(cfg)
    (data / "mat").mkdir()
    with pytest.raises(edm.UserError, match="4 items in 3 class folders, each needs a line"):
        teacher.make_latents(cfg)


def test_a_resumed_run_on_a_backbone_is_the_same_run(tmp_path, config):
    """One step, then --resume for another = two steps at once, to the last bit, with adapters."""
    weights, more = [], {"save_every": 1, "lora_rank": 2}
    for steps in ([2], [1, 2]):
        more["out"] = str(tmp_path / str(len(steps)))
        for n in steps:
            more |= {"steps": n, "resume": n > steps[0]}
            dmd2_cifar.main(config("sd15", **more))
        weights.append(network_in(tmp_path / str(len(steps)) / "generator"))
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_two_processes_train_a_backbone_as_one_does(tmp_path, monkeypatch, config):
    """torchrun, two gloo processes, with the instrument of test_processes: adapters stay whole and
    gradients are averaged (sd15), copies are sharded block by block (wan)."""
    as_one_process(monkeypatch)
    two, ranks = [], {"sd15": 2, "wan": 0}
    for name, rank in ranks.items():
        cfg = config(name, lora_rank=rank, threads=1, out=str(tmp_path / name / "one"))
        dmd2_cifar.main(cfg)
        two.append(vars(cfg) | {"out": str(tmp_path / name / "two")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, json.dumps(two)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ranks:
        one, other = (network_in(tmp_path / name / n / "generator") for n in ("one", "two"))
        assert_close(one, other, atol=1e-5, rtol=0)


def train(work: str) -> None:
    """What both processes do: DMD2 with each of the options."""
    edm.whole = functools.partial(edm.whole, last=False)  # the next run needs both processes
    with pytest.MonkeyPatch.context() as patch:
        as_one_process(patch)
        for options in json.loads(work):
            dmd2_cifar.main(dmd2_cifar.Config(**options))


if __name__ == "__main__":
    train(sys.argv[1])
