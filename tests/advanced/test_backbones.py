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
from backbones.denoiser import Flow, euler_sampler, read_image, schedule_of
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
UNET = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
UNET |= dict(attention_head_dim=8, down_block_types=DOWN, up_block_types=UP)
TIME = dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
TIME |= dict(cross_attention_dim=32, addition_embed_type="text_time")
TWO = dict(num_attention_heads=2, attention_head_dim=16)
LATENTS = dict(in_channels=4, out_channels=4, num_layers=3)
FLUX = TWO | dict(in_channels=16, num_layers=1, num_single_layers=2, joint_attention_dim=32)
FLUX |= dict(pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
WAN = TWO | LATENTS | dict(attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=32)
IMAGE = dict(in_channels=12, image_dim=16, added_kv_proj_dim=24)
COG = TWO | LATENTS | dict(time_embed_dim=8, text_embed_dim=32, max_text_seq_length=16)
COG |= dict(sample_width=16, sample_height=8, sample_frames=9)
ROTARY = COG | dict(use_rotary_positional_embeddings=True)
COSMOS = TWO | LATENTS | dict(mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4)
COSMOS |= dict(max_size=(4, 32, 32), extra_pos_embed_type=None)
KL = dict(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)
KL |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
COG_VAE = KL | dict(layers_per_block=1, norm_num_groups=2, scaling_factor=0.7)
COG_VAE |= {f"{k}_block_types": (f"CogVideoX{k.title()}Block3D",) * 4 for k in ("down", "up")}
WAN_VAE = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
WAN_VAE |= dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
VP_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EULER = VP_BETAS | dict(timestep_spacing="leading", steps_offset=1)
DDIM = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False)
DDIM |= dict(timestep_spacing="trailing")
UNIPC = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
KARRAS, DYNAMIC = dict(use_karras_sigmas=True), dict(use_dynamic_shifting=True)

UNET_2D, WAN_3D, FLUX_2D = "UNet2DConditionModel", "WanTransformer3DModel", "FluxTransformer2DModel"
COG_3D, COSMOS_3D = "CogVideoXTransformer3DModel", "CosmosTransformer3DModel"
FLOW_EULER, KL_VAE = "FlowMatchEulerDiscreteScheduler", ("AutoencoderKL", KL)
CLIP, T5 = "CLIPTextModel", "T5EncoderModel"
FAMILIES = {  # network, scheduler, VAE, text encoders
    "sd15": (UNET_2D, "PNDMScheduler", EULER, *KL_VAE, CLIP),
    "sdxl": (UNET_2D, "EulerDiscreteScheduler", EULER, *KL_VAE, f"{CLIP} {CLIP}WithProjection"),
    "flux": (FLUX_2D, FLOW_EULER, {}, "AutoencoderKL", KL | {"shift_factor": 0.1}, f"{CLIP} {T5}"),
    "wan": (WAN_3D, "UniPCMultistepScheduler", UNIPC, "AutoencoderKLWan", WAN_VAE, f"UM{T5}"),
    "cogvideox": (COG_3D, "CogVideoXDDIMScheduler", DDIM, "AutoencoderKLCogVideoX", COG_VAE, T5),
    "cosmos": (COSMOS_3D, FLOW_EULER, KARRAS, "AutoencoderKLWan", WAN_VAE, T5),
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
    return name.partition("-")[0]


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
    end = dict(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**end)
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    clip = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, hidden_size=16)
    clip |= dict(eos_token_id=1, bos_token_id=1, pad_token_id=0, vocab_size=12, projection_dim=16)
    clip |= dict(max_position_embeddings=16, image_size=32, patch_size=16)
    t5 = dict(d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=12)
    parts = {}
    for name, suffix in zip(encoders, ("", "_2"), strict=False):
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**t5 if "T5" in name else clip))
        parts |= {"text_encoder" + suffix: model, "tokenizer" + suffix: tokenizer}
    if encoders[-1] == "CLIPVisionModel":
        parts["image_encoder"] = parts.pop("text_encoder_2")
        size = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        parts["image_processor"] = transformers.CLIPImageProcessor(**size)
        del parts["tokenizer_2"]
    return parts


@functools.cache
def folder(name, base):
    """Writes the model's folder: model_index.json and one sub-folder a part."""
    pipeline, config, special = MODELS[name]
    network, scheduler, settings, vae, vae_config, encoders = FAMILIES[family_of(name)]
    encoders = encoders.split() + ["CLIPVisionModel"] * ("image_dim" in config)
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
    backbone = load_backbone(f"{family}:{folder(name, base)}", size=SIZE + FRAMES.get(family, ()))
    assert backbone.codec.vae is not None  # read once
    return backbone


@pytest.fixture
def load(base):
    """load(name) -> the tiny backbone, frozen, a fresh copy with a table of its own."""

    def load(name):  # diffusers loads some weights of Wan and Cosmos in float32
        needs(*["accelerate"] * (family_of(name) in ("wan", "cosmos")))
        backbone = copy.deepcopy(cached(name, base))
        backbone.codec = copy.copy(backbone.codec)
        return backbone

    return load


def some_cond(backbone, n=2, seed=0):
    """A condition of the right shapes, without any text encoder."""
    torch.manual_seed(seed)
    config = backbone.model.config
    width = 16 if type(backbone) is families.SD15 else 32
    cond = {"text": torch.randn(n, 512 if config.get("image_dim") else 16, width)}
    if isinstance(backbone, (families.SDXL, families.Flux)):
        cond["pooled"] = torch.randn(n, 16)
    if config.get("image_dim"):
        cond["clip"] = torch.randn(n, 5, 16)
    if backbone.needs_picture:
        cond["image"] = torch.randn(n, config.in_channels - 4, *backbone.shape[1:])
    return cond


def randomised(*roles):
    for p in itertools.chain(*(role.parameters() for role in roles)):
        torch.nn.init.normal_(p, std=0.3)
    return roles


# ---------------------------------------------------------------- against diffusers' own pipelines
def picture():
    """(3, H, W) in [-1, 1], every value that of a byte."""
    torch.manual_seed(5)
    return torch.randint(0, 256, (3, *SIZE)) / 127.5 - 1


def run_pipeline(name, backbone, z, steps, guidance, prompt):
    """(σ, [x before each step, result], factors to x + σ ε, pixels in [0, 1]) of pipeline(...).

    Only its scheduler is changed, to Euler (SD, flow); CogVideoX has DDIM."""
    family, pipe, seen = family_of(name), backbone.codec.pipe, []
    options = dict(height=64, width=96, num_inference_steps=steps, output_type="pt", prompt=prompt)
    options |= dict(guidance_scale=guidance, latents=z.clone())
    options |= {"negative_prompt": ""} if family not in ("sdxl", "flux") else {}
    options |= {"num_frames": 9} if family in ("wan", "cogvideox") else {}
    options |= {"max_sequence_length": backbone.tokens} if len(backbone.shape) == 4 else {}
    if backbone.needs_picture:
        options["image"] = Image.fromarray(edm.to_uint8(picture()).permute(1, 2, 0).numpy())
    if family in ("sd15", "sdxl"):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    elif family == "wan":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif family == "flux":
        options |= dict(max_sequence_length=512 if "dev" in name else 256, guidance_scale=3.5)
        options["latents"] = pipe._pack_latents(z, 1, *z.shape[1:])
    elif family == "cogvideox":
        options["latents"] = z.transpose(1, 2)
    elif family == "cosmos":
        options["guidance_scale"] = guidance - 1  # there it is c + w (c - u)
        checker = dict(check_text_safety=lambda text: True, check_video_safety=lambda video: video)
        vars(pipe.safety_checker).update(checker, device=z.device, dtype=z.dtype)
    options["callback_on_step_end"] = lambda pipe, i, t, now: seen.append(now["latents"]) or {}
    pipe.set_progress_bar_config(disable=True)
    assert getattr(pipe, part_of(name)) is backbone.codec.parts[part_of(name)]  # not read twice
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
    """Prompt and picture in, pixels out: x + (σ' - σ)(x - D)/σ is each pipeline's own sampler, at
    every step to 1e-4, from the first finite σ on."""
    needs("transformers")
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_: self.mode())
    backbone, prompt = load(name), "a red cat on the mat"
    guidance = 1.0 if name.startswith("flux") else 3.0
    torch.manual_seed(1)
    z = torch.randn(1, *backbone.shape)
    sigmas, seen, scale, made = run_pipeline(name, backbone, z, 4, guidance, prompt)
    cond = backbone.encode_prompts([prompt])
    cond |= backbone.encode_start(picture()[None]) if backbone.needs_picture else {}
    calls, first = Calls(monkeypatch, type(backbone), "forward"), int(sigmas[0] > 1e5)
    start = (seen[first] * scale[first] / sigmas[first]).float()
    x = euler_sampler(backbone, start, cond, guidance=guidance, sigmas=sigmas[first:])
    mine = [call.x for call in calls[:: 1 if guidance == 1 else 2]]
    expected = [x * s for x, s in zip(seen, scale, strict=False)][first:]
    if not name.startswith("cosmos"):  # whose last step goes from σ_min to σ_min
        mine, expected = [*mine, x], [*expected, seen[-1]]
    for a, b in zip(mine, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
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
    the family was trained with: exactly for ε and v, for flow 0.5 to 1 of it."""
    schedule, flow = schedules()[kind], kind in ("flow", "cosmos")
    sigma = schedule.sigma_of(torch.linspace(0, 1, 7, dtype=D64)[:, None])
    assert_close(sigma[[0, -1], 0].tolist(), [schedule.sigma_min, schedule.sigma_max])
    x, eps, error = torch.randn(3, 7, 5, dtype=D64)
    alpha = 1 / (1 + sigma) if flow else (1 + sigma**2).rsqrt()
    best = {"eps": eps, "v": alpha * (eps - sigma * x)}.get(kind, eps - x)
    c_skip, c_out, c_in = schedule.coefficients(sigma)
    assert_close(c_in * (x + sigma * eps), alpha * (x + sigma * eps))
    denoised = c_skip * (x + sigma * eps) + c_out * (best + error)
    assert_close(denoised, x + c_out * error, atol=1e-9, rtol=1e-9)
    ratio = (1 / sigma**2 + 1 / schedule.sigma_data**2) * c_out**2
    assert (ratio > (0.5 if flow else 1) - 1e-9).all()
    assert (ratio < 1 + 1e-9).all()


@pytest.mark.parametrize(("kind", "last"), [("eps", 14.6146), ("v", 1e4)])
def test_time_of_a_table_entry_is_its_index(kind, last):
    """VP: t(σ_k) = k, σ(u = k/999) = σ_k, also in float32; σ = ∞ became 10,000, 0 is t = 0."""
    schedule, k = schedules()[kind], torch.arange(1000.0)
    sigma = schedule.table.exp()
    assert_close(schedule.time(sigma.float()), k, atol=1e-3, rtol=0)
    assert_close(schedule.sigma_of(k.double() / 999), sigma, rtol=1e-9, atol=0)
    assert schedule.time(torch.zeros(1)) == 0
    assert schedule.sigma_max == pytest.approx(last, rel=1e-4)


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
    three = schedule_of(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None)
    for flow in (schedules()["flow"], three):
        assert_close(flow.time(flow.sigma_of(u)), 3 * u / (1 + 2 * u))
    assert_close(schedules()["cosmos"].sigma_of(u), dmd2_cifar.karras_sigma(u))
    ends = three.time(three.sigma_of(torch.tensor([0, 1], dtype=D64)))
    assert_close(ends, torch.tensor([0.001, 0.9999], dtype=D64))
    sigma = dmd2_cifar.sampling_sigmas(load("flux-schnell"), 4)  # no shift
    assert_close(sigma / (1 + sigma), torch.tensor([0.9999, 0.75, 0.5, 0.25]))


# ---------------------------------------------------------------- the denoiser
@pytest.mark.parametrize("name", MODELS)
def test_denoiser_has_the_interface_of_edm_precond(name, load):
    """D(x, σ, cond): x's shape, float32, finite at both ends; every weight gets a gradient, with
    checkpointing, where blocks run twice, the same.

    Features change nothing: same D, maps (B, C, *grid); "only" ends after the last of them."""
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
    assert torch.autograd.grad(early[-1].square().sum(), x)[0].any()
    assert not any(m._forward_hooks for m in backbone.modules())
    trained, grads, runs = edm.trainable_copy(backbone), [], []
    assert trained.codec is backbone.codec  # text encoder and VAE are not copied
    block = trained.blocks[0].resnets[0] if part_of(name) == "unet" else trained.blocks[0]
    block.norm1.register_forward_hook(lambda *_: runs.append(1))
    for calls in (2, 6):  # "only" leaves the forward pass by an exception
        _, features = trained(x, 0.7, cond, return_features="only")
        loss = trained(x, torch.tensor([0.7, 2.0]), cond).square().mean()
        (loss + features[-1].square().mean()).backward()
        assert len(runs) == calls
        grads.append([p.grad for p in trained.parameters()])
        trained.zero_grad()
        trained.gradient_checkpointing()
    assert all(grad.any() for grad in grads[0])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-4)
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
    assert divmod((a - b).abs().sum(1).argmax().item(), 6) == (1, 3)
    model = backbone.model
    model.transformer_blocks = torch.nn.ModuleList([model.transformer_blocks[0]] * 28)
    assert families.Flux(model, backbone.schedule, None, backbone.shape).taps == [15, 22, 29]


# ---------------------------------------------------------------- loading
def test_what_can_be_wrong_is_said_in_one_sentence(load, base, monkeypatch):
    """Each names the thing that is wrong and what would be right."""
    needs("accelerate")
    path, two = folder("sd15", base), base / "a14b"
    index = json.loads((folder("wan", base) / "model_index.json").read_text())
    two.mkdir()
    (two / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875}))
    wrong = {
        "sd15": "'sd15': expected sd15:, sdxl:, flux:, wan:, cogvideox:, cosmos: and a folder",
        f"sd3:{path}": "sd3:.*expected sd15:, sdxl:",
        "sdxl:a/b.safetensors": "one file .* StableDiffusionXLPipeline.from_single_file.FILE",
        "sd15:a/b.ckpt": "b.ckpt is one file and sd15: takes a folder: Stable.*save_pretrained",
        f"sd15:{base}/absent": "absent is no model for sd15",
        f"sd15:{path / 'vae'}": "vae is no model for sd15",
        f"flux:{path}": "a StableDiffusionPipeline; flux: takes FluxPipeline",
        f"wan:{two}": "two networks, each for some noise",
    }
    for name, message in wrong.items():
        with pytest.raises(edm.UserError, match=rf"^(?!.*\n).*{message}"):
            load_backbone(name)
    backbone = load("flux-dev")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(edm.UserError, match="needs transformers and sentencepiece: pip install tr"):
        backbone.encode_prompts(["a cat"])
    with pytest.raises(edm.UserError, match="needs accelerate: pip install accelerate"):
        load_backbone(f"wan:{two}")


NAN, EMBED = torch.nan, "embeddings.token_embedding.weight"
LEARNED = "use_learned_positional_embeddings"
BROKEN = {  # the sentence -> what has another value: a weight (None: absent) or a setting
    "conv_in.bias has NaN or infinite numbers": ("sd15/unet", "conv_in.bias", NAN),
    "conv_out.bias has NaN or infinite": ("sd15/unet", "conv_out.bias", -torch.inf),
    "conv_in.bias is missing: 1 weights": ("sd15/unet", "conv_in.bias", None),
    "proj_out.bias is missing": ("wan/transformer", "proj_out.bias", None),
    "VAE cannot be used .quant_conv.bias has NaN": ("sd15/vae", "quant_conv.bias", NAN),
    "VAE cannot be used .quant_conv.bias is miss": ("sd15/vae", "quant_conv.bias", None),
    f"text encoder cannot be used .*{EMBED} has NaN": ("sd15/text_encoder", EMBED, NAN),
    "9 channels in, 4 out, as for inpainting": ("sd15/unet", "in_channels", 9),
    "a U-Net without middle block": ("sd15/unet", "mid_block_type", None),
    "PNDMScheduler with .* sample; known": ("sd15/scheduler", "prediction_type", "sample"),
    "take --size 64,128 alone": ("cogvideox-i2v/transformer", LEARNED, True),
}


@pytest.mark.parametrize(("message", "case"), BROKEN.items())
def test_models_that_cannot_be_used_are_refused(message, case, base, tmp_path):
    """No NaN, and no weights that diffusers has drawn because they are missing."""
    needs("accelerate", "transformers")
    (name, part), key, value = case[0].split("/"), *case[1:]
    path = shutil.copytree(folder(name, base), tmp_path / "model")
    (file,) = path.glob(f"{part}/*.safetensors" if "." in key else f"{part}/*config.json")
    if "." in key:
        state = safetensors.torch.load_file(file)
        weight = state.pop(key)
        state |= {key: weight.fill_(value)} if value else {}
        safetensors.torch.save_file(state, file, {"format": "pt"})
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(edm.UserError, match=rf"^.*{path}(?!.*\n).*{message}"):
        load_backbone(f"{family_of(name)}:{path}", size=SIZE).encode_prompts(["a cat"])


ZERO = {"rescale_betas_zero_snr": True}, "zero terminal SNR, where ε"
SCHEDULERS = [("EulerDiscrete", *ZERO), ("DDIM", *ZERO), ("CMStochasticIterative", {}, "type None")]
SCHEDULERS += [("EDMEuler", {}, "EDMEulerScheduler with prediction_type epsilon; known are")]


@pytest.mark.parametrize(("name", "config", "message"), SCHEDULERS)
def test_schedules_that_no_preconditioning_knows_are_refused(name, config, message):
    with pytest.raises(edm.UserError, match=message):
        schedule_of(getattr(diffusers, name + "Scheduler")(**config), None)


SIZES = {  # that a model cannot take: the nearest that it can
    ("sd15", 64, 100): "height,width in multiples of 8, like 64,96 or 64,104.",
    ("sd15", 0, -8): "like 8,8.",
    ("sd15", 64, 96, 9): "like 64,96.",
    ("flux-dev", 72, 96): "multiples of 16, like 64,96 or 80,96.",
    ("wan", 64, 104, 9): "in multiples of 16,frames of 4 n [+] 1, like 64,96,9 or 64,112,9.",
    ("wan", 64, 96, 0): "like 64,96,1.",
    ("cogvideox-5b", 64, 97, 10): "like 64,96,9 or 64,112,13.",
    ("cosmos-t2i", -1, 96): "like 16,96,1.",
}


@pytest.mark.parametrize(("case", "message"), SIZES.items())
def test_a_wrong_size_is_said_before_weights_are_read(case, message, base, tmp_path):
    needs("accelerate")
    (name, *size), family, path = case, family_of(case[0]), tmp_path / "model"
    shutil.copytree(folder(name, base), path, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(edm.UserError, match=rf"^--size .*: {family}: .*{message}$"):
        load_backbone(f"{family}:{path}", size=size)
    near = edm.numbers(message.rpartition(" ")[2].strip("."))
    backbone = load_backbone(f"{family}:{folder(name, base)}", size=near)
    assert backbone(torch.randn(1, *backbone.shape), 1.0, some_cond(backbone, 1)).isfinite().all()


def test_folders_with_half_precision_alone_are_read(base, tmp_path):
    """*.fp16.safetensors of network, VAE and text encoder, in float32: about the same numbers."""
    needs("transformers", "accelerate")
    one, path = folder("sd15", base), tmp_path / "half"
    for file in shutil.copytree(one, path).glob("*/*.safetensors"):
        state = {k: v.half() for k, v in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(state, file.with_suffix(".fp16.safetensors"), {"format": "pt"})
        file.unlink()
    one, two = (load_backbone(f"sd15:{p}", size=SIZE) for p in (one, path))
    x, conds = torch.randn(1, *one.shape), [b.encode_prompts(["a cat"]) for b in (one, two)]
    assert_close(one(x, 1.0, conds[0]), two(x, 1.0, conds[1]), atol=0.01, rtol=0)
    assert_close(one.decode(x), two.decode(x), atol=0.01, rtol=0)
    assert {p.dtype for p in (two.model, two.codec.vae, two.codec.pipe.text_encoder)} == {one.dtype}
    next(path.glob("unet/*.safetensors")).unlink()
    with pytest.raises(edm.UserError, match=r"no file named diffusion_pytorch_model\.[bs]"):
        load_backbone(f"sd15:{path}")


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
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scale_factor_spatial": 16}))
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


def chunked(student, x, sigma, cond, n, mask, late=0):
    """Chunk after chunk, as in a roll-out, with what is kept of the past under the mask; wrong on
    purpose: `late` frames too late."""
    past, out = {}, []
    for i in range(0, x.shape[2], n):
        level = sigma[:, i : i + n] if sigma.ndim == 2 else sigma
        seen = {f: past[f] for f in past if mask[i, f]}
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
        for wrong in ((mask & False,), (mask, 1)):
            made = chunked(student, x, sigma, cond, n, *wrong)
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


# ---------------------------------------------------------------- three roles on one base
@pytest.mark.parametrize("name", SIX)
def test_three_roles_train_on_a_base_that_never_moves(name, load):
    """trainable_copy(teacher) starts as the teacher, a role's gradient reaches its own weights
    alone, a deep copy has weights of its own, too; all share the base, which is bit-identical."""
    backbone = load(name)
    teacher = Role(backbone, 2, adapter=False)
    generator, fake = edm.trainable_copy(teacher), edm.trainable_copy(teacher)
    x, cond = torch.randn(2, *backbone.shape), some_cond(backbone)
    weights, before = copy.deepcopy(backbone.state_dict()), backbone(x, 1.0, cond)
    assert all(torch.equal(r(x, 1.0, cond), before) for r in (generator, fake, teacher))
    assert not list(teacher.parameters())
    randomised(generator, fake)
    ema = copy.deepcopy(generator).eval().requires_grad_(False)
    drawn = generator(x, 1.0, cond)
    assert torch.equal(ema(x, 1.0, cond), drawn)
    (drawn - teacher(x, 1.0, cond)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in generator.parameters())
    assert all(p.grad is None for p in [*fake.parameters(), *ema.parameters()])
    torch.optim.Adam(generator.parameters(), 0.1).step()
    outs = [role(x, 1.0, cond) for role in (generator, fake, teacher, ema)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(outs, 2))
    assert all(torch.equal(y, before) for y in (outs[2], backbone(x, 1.0, cond)))  # none is left on
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items())
    assert ema.base is generator.base is backbone
    assert ema.sigma_max == backbone.sigma_max  # all else is the base's
    assert not any(p.requires_grad for p in copy.deepcopy(ema).parameters())


SOME = [("sd15", "time_emb_proj"), ("sdxl", "attn2"), ("flux-dev", "proj_mlp"), ("wan", "ffn")]
SOME += [("wan-i2v", "add_k_proj"), ("cogvideox-5b", "ff"), ("cogvideox-i2v", "norm1")]


@pytest.mark.parametrize(("name", "part"), [*SOME, ("cosmos-t2i", "attn1")])
def test_a_role_adds_low_rank_changes_and_diffusers_reads_what_it_saves(
    name, part, load, base, tmp_path
):
    """W + B A in the place of W of each linear layer of the blocks, A and B in float32. The network
    of the pipeline after pipe.load_lora_weights(FOLDER) is the same (Cosmos: its network has the
    method), and that of one with a saved copy. So is that of --sample's reader, also of files of
    earlier versions, whose names have no prefix, and of compiled networks."""
    backbone, merged = load(name), load(name)
    x, cond = torch.randn(2, *backbone.shape), some_cond(backbone)
    (role,), weights = randomised(Role(backbone, 2)), dict(merged.model.named_parameters())
    for key in [k for k in role.weights if k.endswith("/lora_B/weight")]:
        a, b = role.weights[key.replace("lora_B", "lora_A")], role.weights[key]
        assert a.shape[0] == b.shape[1] == 2
        weights[key.replace("/lora_B", "").replace("/", ".")].data += b @ a
    expected = role(x, 1.0, cond)
    assert_close(expected, merged(x, 1.0, cond), atol=1e-4, rtol=1e-4)
    assert part in {word for key in role.weights for word in key.split("/")}
    half = load(name)
    half.model.to(torch.bfloat16)
    assert {p.dtype for p in Role(half, 2).parameters()} == {torch.float32}
    role.save(tmp_path / "new")
    state = safetensors.torch.load_file(tmp_path / "new" / lora.FILE)
    state = {k.removeprefix(part_of(name) + "."): v for k, v in state.items()}
    edm.save_tensors(tmp_path / "old" / lora.FILE, state)
    state = {f"module.{part_of(name)}._orig_mod.{k}": v for k, v in state.items()}
    edm.save_tensors(tmp_path / "compiled" / lora.FILE, state)
    for kind in ("new", "old", "compiled"):
        assert_close(lora.load_generator(load(name), tmp_path / kind)(x, 1.0, cond), expected)
    with pytest.raises(edm.UserError, match="is no generator of this teacher"):
        lora.load_generator(load("wan" if part_of(name) == "unet" else "sd15"), tmp_path / "new")
    edm.save_tensors(tmp_path / "nan" / lora.FILE, {k: 0 * v + NAN for k, v in state.items()})
    with pytest.raises(edm.UserError, match="weight has NaN"):
        lora.load_generator(load(name), tmp_path / "nan")
    merged.save(tmp_path / "copy")
    again = lora.load_generator(load(name), tmp_path / "copy")
    assert torch.equal(again(x, 1.0, cond), merged(x, 1.0, cond))
    needs("transformers", "peft")
    kind = getattr(diffusers, MODELS[name][0])
    read = functools.partial(
        kind.from_pretrained,
        folder(name, base),
        safety_checker=torch.nn.Identity() if "cos" in name else None,
    )
    pipe, network = read(), type(merged.model).from_pretrained(tmp_path / "copy")
    load = getattr(pipe, "load_lora_weights", getattr(pipe, part_of(name)).load_lora_adapter)
    load(tmp_path / "new", use_safetensors=True)
    for pipeline in (pipe, read(**{part_of(name): network})):
        half.model = getattr(pipeline, part_of(name)).requires_grad_(False)
        assert_close(half(x, 1.0, cond), expected, atol=1e-4, rtol=1e-4)


SD15_FULL = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
WAN_FULL = dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
FULL = [  # published size in millions
    (families.SD15, UNET_2D, SD15_FULL, 860),
    (families.Wan, WAN_3D, WAN_FULL, 1419),
    (families.Flux, FLUX_2D, {"guidance_embeds": True}, 11901),
]


@pytest.mark.parametrize(("kind", "network", "config", "millions"), FULL)
def test_adapters_need_a_fraction_of_the_memory_of_three_copies(kind, network, config, millions):
    """Bytes of weights, gradients and Adam's moments, without activations. Three copies in
    float32: 3 x 4 + 2 x 12; rank 64 on a base in bfloat16: 2 for each of its weights."""
    with torch.device("meta"):
        model = getattr(diffusers, network)(**config).to(torch.bfloat16)
        roles = three_roles(kind(model, Flow(), None, (4, 8, 8)), 64)
    size, *rank = (sum(p.numel() for p in m.parameters()) for m in (model, *roles))
    assert round(size / 1e6) == pytest.approx(millions, rel=2e-3)
    assert rank[0] == rank[1] > rank[2] == 0
    assert 2 * size + 16 * sum(rank) < 36 * size / 4


# ---------------------------------------------------------------- in the scripts
SCRIPTS = {"dmd2_cifar": dmd2_cifar, "f_distill": f_distill, "ladd": ladd}
PROMPTS = ["a red cat", "the dog on the mat"]
VIDEO_RUN = {"num_frame_per_block": 1, "num_training_frames": 4, "local_attn_size": 2}
VIDEO_RUN |= {"denoising_steps": "1000,500", "ode_updates": 2, "generator_update_interval": 1}


@pytest.fixture
def config(base, tmp_path):
    """config(name) -> two steps of two samples on a saved tiny model, as the command line says."""

    def config(name, script=dmd2_cifar, **more):
        needs("transformers", "sentencepiece", "accelerate")
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        size = ",".join(map(str, (32, 48, *FRAMES.get(family_of(name), ()))))
        options = dict(teacher=f"{family_of(name)}:{folder(name, base)}", device="cpu", size=size)
        options |= dict(batch=2, pairs=2, teacher_steps=2, steps=2, save_every=2)
        options |= dict(prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "run"))
        options |= VIDEO_RUN if script is causal_video else dict(ratio=1, sampling_steps=2)
        return script.Config(**options | more)

    return config


def network_in(path):
    """The tensors that a run has left in a folder."""
    (file,) = path.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    assert all(v.isfinite().all() for v in tensors.values())
    return tensors


RUNS = [(s, name, 0) for s in SCRIPTS for name in [*SIX, "flux-schnell"]]
RUNS += [(s, name, 2) for s in SCRIPTS for name in ["sd15", "wan"]]
RUNS += [("dmd2_cifar", name, 2) for name in SIX if name not in ("sd15", "wan")]


@pytest.mark.parametrize(("script", "name", "rank"), RUNS)
def test_every_script_takes_two_steps_on_every_backbone(script, name, rank, base, tmp_path, config):
    """--teacher NAME:PATH from reading to saving: the teacher's latents for the GAN, both updates,
    pictures of the prompts, and what diffusers reads: a network with every weight moved or kept,
    or, with --lora-rank, an adapter, whose B were zero at the start. --sample draws with it."""
    script, run, lora = SCRIPTS[script], tmp_path / "run", rank > 0
    more = dict(lora_rank=rank, gradient_checkpointing=lora, amp=lora and script is dmd2_cifar)
    cfg = config(name, script, **more)
    assert script.main(cfg)["config"]["teacher"] == cfg.teacher
    latents, _ = edm.load_tensors(run / "latents.safetensors")
    assert latents["labels"].tolist() == [0, 1]
    assert (run / "samples_2.png").stat().st_size > 1000
    moved = [v.any() for k, v in network_in(run / "generator").items() if "lora_B" in k]
    if not rank:
        network = getattr(diffusers, FAMILIES[family_of(name)][0])
        before = network.from_pretrained(folder(name, base) / part_of(name)).state_dict()
        after = network.from_pretrained(run / "generator").state_dict()
        assert before.keys() == after.keys()
        moved = [not torch.equal(v, after[k]) for k, v in before.items() if v.is_floating_point()]
    assert sum(moved) > (0.99 if rank else 0.8) * len(moved) > 0
    made = torch.load(run / "checkpoint.pt", weights_only=True)
    assert made["step"] == 2
    if name == "sd15" and script is dmd2_cifar:
        more |= {"sample": str(run / "generator"), "out": str(tmp_path), "n": 3, "labels": "1"}
        cfg = config(name, script, **more)
        assert script.main(cfg) == {}
        assert (tmp_path / "sampled.png").stat().st_size > 1000
        state = scripts.load_teacher(cfg).state_dict()
        assert all(torch.equal(v, state[k]) for k, v in made["trained"]["ema"][0].items())


@pytest.mark.parametrize("objective", ["dmd", "sid", "gan"])
@pytest.mark.parametrize("rank", [0, 2])
def test_causal_video_takes_steps_on_wan(objective, rank, base, tmp_path, config):
    """ODE paths of the teacher, initialisation, CausVid, Self-Forcing, roll-outs of three clips;
    copies or adapters; what is saved --sample rolls out. (dmd's first step has no gradient: there
    fake and teacher are one; the last one's learning rate is 0. So there are three.)"""
    run, dmd = tmp_path / "run", objective == "dmd"
    more = dict(lora_rank=rank, gradient_checkpointing=rank > 0, amp=rank > 0 and dmd, steps=3)
    more |= dict(lr_generator=0.1, lr_fake=0.1, objective=objective, save_every=3)
    causal_video.main(config("wan", causal_video, **more))
    pairs, _ = edm.load_tensors(run / "pairs.safetensors")
    assert pairs["path"].shape == (2, 3, 4, 3, 4, 6)
    assert pairs["labels"].tolist() == [0, 1]
    start, seen = network_in(folder("wan", base) / "transformer"), []
    for stage, step in (("ode_init", 2), ("causvid", 3), ("self_forcing", 3)):
        assert (run / stage / f"samples_{step}.png").stat().st_size > 1000
        seen.append(network_in(run / stage / "generator"))
        assert seen[-1].keys() == start.keys() or rank
    for a, b in itertools.combinations(seen, 2):
        assert not all(torch.equal(v, b[k]) for k, v in a.items())
    if dmd:
        more |= dict(sample=str(run / "causvid/generator"), out=str(tmp_path), n=1)
        assert causal_video.main(config("wan", causal_video, **more)) == {}
        assert (tmp_path / "sampled.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["wan-i2v", "cogvideox-i2v"])
def test_videos_start_from_the_pictures_after_the_prompts(name, tmp_path, config):
    """A tab and a path in each line of --prompts; two steps of DMD2; without, one sentence."""
    cfg, prompts = config(name), tmp_path / "prompts.txt"
    with pytest.raises(edm.UserError, match="a tab and a picture's path after each prompt"):
        scripts.load_teacher(cfg)
    for name, red in ("a", 90), ("b", 200):
        Image.new("RGB", (90, 64), (red, 100, 50)).save(tmp_path / f"{name}.png")
    prompts.write_text("\n".join(f"{PROMPTS[i]}\t{tmp_path}/{'ab'[i]}.png" for i in (0, 1)))
    teacher = scripts.load_teacher(cfg)
    pixels = read_image(tmp_path / "b.png", *teacher.pixels)
    assert pixels.shape == (3, 32, 48)
    assert_close(pixels[:, 0, 0], torch.tensor([200.0, 100, 50]) / 127.5 - 1)
    cond = teacher.encode_prompts([PROMPTS[1]]) | teacher.encode_start(pixels[None])
    x, row = torch.randn(1, *teacher.shape), torch.tensor([1])
    assert_close(teacher(x, 1.0, row), teacher(x, 1.0, cond), atol=1e-5, rtol=0)
    expected = teacher(x, 1.0, cond | teacher.encode_prompts([""]))  # the picture stays
    assert_close(teacher(x, 1.0, teacher.no_condition(row)), expected, atol=1e-5, rtol=0)
    dmd2_cifar.main(cfg)
    assert (tmp_path / "run" / "generator" / "config.json").exists()
    prompts.write_text(f"a cat\t{tmp_path}/c.png\n")
    with pytest.raises(edm.UserError, match=r"c\.png cannot be read as a picture"):
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
    empty, tabs = tmp_path / "empty.txt", tmp_path / "tabs.txt"
    empty.write_text("\n")
    tabs.write_text("a cat\ta.png\n")
    for message, more in {
        "--size 64: expected height,width": {"size": "64"},
        "needs --prompts FILE": {"prompts": ""},
        "--prompts .*: line 1 is blank": {"prompts": str(empty)},
        "no tab and nothing after each prompt": {"prompts": str(tabs)},
        "--teacher-steps 0: the latents for the GAN need 1 or more": {"teacher_steps": 0},
        "is no generator of this teacher": {"sample": str(tmp_path)},
    }.items():
        with pytest.raises(edm.UserError, match=message):
            dmd2_cifar.main(config("sd15", **more))
    for name, message in ("sd15", "wan: alone"), ("wan-i2v", "videos start from no picture"):
        with pytest.raises(edm.UserError, match=message):
            scripts.load_teacher(config(name), causal=True)


FILES = {  # of prompts
    b"a cat\nb": ["a cat", "b"],
    "\ufeffé\r\nb c\r\n\r\n".encode(): ["é", "b c"],
    "a\u2028b\x0bc\x85d\x0ce\rf\n g \n".encode(): ["a\u2028b\x0bc\x85d\x0ce\rf", " g "],
    b"a\n\nb": "line 2 is blank",
    b"a\r\nb\r\n \t\r\nc": "line 3 is blank",
    b"\na": "line 1 is blank",
    b"\r\n": "line 1 is blank",
    "é\n".encode("latin-1"): "is not in UTF-8",
    "a cat".encode("utf-16"): "is not in UTF-8",
    "a".encode("utf-16-le"): "is not in UTF-8",
}


@pytest.mark.parametrize(("data", "expected"), FILES.items())
def test_a_prompt_is_a_line_and_no_line_is_lost(data, expected, tmp_path):
    """Lines end at LF or CRLF alone. Class folder k has prompt k, so a blank one is no prompt."""
    (tmp_path / "prompts.txt").write_bytes(data)
    if isinstance(expected, list):
        assert scripts.read_lines(tmp_path / "prompts.txt") == [[line] for line in expected]
    else:
        with pytest.raises(edm.UserError, match=rf"^--prompts .*txt: (?!.*\n).*{expected}"):
            scripts.read_lines(tmp_path / "prompts.txt")


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
            teacher.draw(tmp_path / "a.png", lambda z, labels: z + torch.randn(1), 0)
        one, two = drawn[-2].rows, drawn[-1].rows
        assert list(one) == ["0. a red cat", "1. the dog on the mat"]
        assert all(len(v) == 4 and torch.equal(v, two[k]) for k, v in one.items())
    for module in (plot, None):
        monkeypatch.setitem(sys.modules, "tools.plot", module)
        teacher.draw(tmp_path / "2.png", lambda z, labels: z, 0, torch.tensor([1, 1]), 2, frames=1)
    ((title, x),) = drawn[-1].rows.items()
    assert (title, len(x)) == ("1. the dog on the mat", 2)
    assert torch.equal(x, *plain)


def test_latents_of_the_teacher_are_guided_and_have_a_seed_of_their_own(
    config, tmp_path, monkeypatch
):
    """x for the GAN = euler_sampler from the noise of --seed + 10000; made once for a run. The
    default --data is the name of a data set, whatever folders are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    cfg = config("sd15", guidance=3.0)
    teacher, run = scripts.load_teacher(cfg), edm.Run(cfg, "dmd2_cifar")
    x, labels = teacher.real_images(cfg, run)
    z = edm.noise(teacher, 2, cfg.seed + 10000)
    expected = euler_sampler(teacher, z, labels, steps=2, guidance=3.0)
    assert_close(x, expected, atol=1e-3, rtol=1e-3)
    teacher.make_latents = pytest.fail  # not a second time
    assert torch.equal(teacher.real_images(cfg, run)[0], x)


@pytest.mark.parametrize("name", ["sd15", "flux-dev", "wan"])
def test_images_and_videos_of_a_folder_are_encoded(name, tmp_path, config):
    """--data FOLDER: VAE latents of its images, or of videos, folders of frames; class folder k has
    prompt k, so it needs a line."""
    data, video = tmp_path / "data", name == "wan"
    for kind, i, k in itertools.product(("cat", "dog"), (0, 1), range(10)):
        file = data / kind / (f"{i}/frame{5 * k}.png" if video else f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (70, 64), (20 * i, 20 * k * video, 50)).save(file)
    (data / "cat/a.txt").touch()
    cfg = config(name, data=str(data))
    teacher = scripts.load_teacher(cfg)
    x, labels = teacher.real_images(cfg, edm.Run(cfg, "dmd2_cifar"))
    assert labels.tolist() == [0, 0, 1, 1]
    pixels = torch.tensor([20.0, 0, 50])[:, None, None, None].repeat(1, 9, 32, 48)
    pixels[1] += 20 * video * torch.arange(9)[:, None, None]
    pixels = (pixels if video else pixels[:, 0]) / 127.5 - 1
    vae = teacher.codec.vae  # decode, which makes the pipelines' pictures, inverts encode
    expected = vae.decode(vae.encode(pixels[None]).latent_dist.mode()).sample
    assert_close(teacher.decode(x[[3]]), expected, atol=1e-5, rtol=1e-5)
    if video:
        file.rename(data / "cat/loose.png")
        with pytest.raises(edm.UserError, match=r"loose\.png: a folder with 9 frames or more is"):
            teacher.make_latents(cfg)
        (data / "cat/0/frame40.png").unlink()
        (data / "cat/0/frame45.png").unlink()
        with pytest.raises(edm.UserError, match=r"frame0\.png: a folder with 9 frames or more is"):
            teacher.make_latents(cfg)
    teacher.codec.vae.to("meta")  # pictures on the CPU reach a VAE elsewhere
    assert teacher.encode_images(pixels[None]).device.type == "meta"
    (data / "mat").mkdir()
    (data / "mat/a.png").touch()
    with pytest.raises(edm.UserError, match="--prompts needs 3 lines"):
        teacher.make_latents(cfg)


def test_two_processes_and_a_resumed_run_end_as_one_does(tmp_path, monkeypatch, config):
    """With the instrument of test_processes torchrun's two gloo processes, in which adapters stay
    whole and gradients are averaged (sd15), copies are sharded block by block (wan). To the last
    bit one step and --resume for another."""
    as_one_process(monkeypatch)
    two = []
    for name, rank in ("sd15", 2), ("wan", 0):
        more = {"lora_rank": rank, "threads": 1, "save_every": 1}
        for out, steps in ("resumed", 1), ("resumed", 2), ("one", 2):
            cfg = config(name, **more, steps=steps, out=str(tmp_path / name / out))
            cfg.resume = out == "resumed" and steps == 2
            dmd2_cifar.main(cfg)
        two.append(vars(cfg) | {"out": str(tmp_path / name / "two")})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, json.dumps(two)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("sd15", "wan"):
        one = network_in(tmp_path / name / "one/generator")
        for out, tolerance in ("resumed", 0), ("two", 1e-5):
            other = network_in(tmp_path / name / out / "generator")
            assert_close(one, other, atol=tolerance, rtol=0)


def train(work: str) -> None:
    """What both processes do."""
    edm.whole = functools.partial(edm.whole, last=False)  # the next run needs both processes
    with pytest.MonkeyPatch.context() as patch:
        as_one_process(patch)
        for options in json.loads(work):
            dmd2_cifar.main(dmd2_cifar.Config(**options))


if __name__ == "__main__":
    train(sys.argv[1])
