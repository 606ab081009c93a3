"""The families: what each network of diffusers takes beside x, and how it takes it."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

import edm_teacher as edm
from backbones.denoiser import Backbone


class SD15(Backbone):
    """Stable Diffusion 1 and 2: F = ε or v as its scheduler says."""

    part, pipelines, side = "unet", ("StableDiffusionPipeline",), 1
    blocks = property(lambda self: [*self.model.down_blocks[:-1], self.model.mid_block])

    def units(self):
        return [*self.model.down_blocks, self.model.mid_block, *self.model.up_blocks]

    def feature_map(self, output, shape):
        return output if isinstance(output, Tensor) else output[1][-2]  # [-1] is downsampled

    def network(self, x, t, cond):
        return self.model(x, t, cond["text"], return_dict=False)[0]


class SDXL(SD15):
    """Two text encoders, their pooled output, and sizes: original, crop, target."""

    pipelines, default_size = ("StableDiffusionXLPipeline",), (1024, 1024)
    encoded = ("text", None, "pooled")

    def network(self, x, t, cond):
        h, w = (8 * n for n in x.shape[2:])
        ids = x.new_tensor([[h, w, 0, 0, h, w]]).expand(len(x), -1)
        added = {"text_embeds": cond["pooled"], "time_ids": ids}
        return self.model(x, t, cond["text"], added_cond_kwargs=added, return_dict=False)[0]

    def nothing(self):
        zeros = self.codec.index.get("force_zeros_for_empty_prompt", True)
        return {k: v * (not zeros) for k, v in super().nothing().items()}


class Flux(Backbone):
    """FLUX.1: 2 x 2 latent pixels are a token. dev is told its guidance, with a prompt or none."""

    pipelines, packages = ("FluxPipeline",), ("sentencepiece",)
    stream, folded, patch, default_size = 1, 4, (2, 2), (1024, 1024)
    encoded = ("text", "pooled")
    is_dev = property(lambda self: self.model.config.guidance_embeds)
    tokens = property(lambda self: 512 if self.is_dev else 256)
    blocks = property(lambda s: [*s.model.transformer_blocks, *s.model.single_transformer_blocks])

    def network(self, x, t, cond):
        h, w = x.shape[2] // 2, x.shape[3] // 2
        places = torch.cartesian_prod(*(torch.arange(0.0, n, device=x.device) for n in (1, h, w)))
        ids = places.to(x), x.new_zeros(cond["text"].shape[1], 3)
        told = x.new_full((len(x),), 3.5) if self.is_dev else None
        inputs = F.pixel_unshuffle(x, 2).flatten(2).mT, cond["text"], cond["pooled"], t
        out = self.model(*inputs, *ids, told, return_dict=False)[0]
        return F.pixel_shuffle(out.mT.unflatten(2, (h, w)), 2)


class Wan(Backbone):
    """Wan 2.1 and 2.2 5B, I2V of 2.1. Each frame may have a time of its own."""

    pipelines = ("WanPipeline", "WanImageToVideoPipeline")
    packages, needs = ("ftfy", "sentencepiece"), ("accelerate",)
    default_size, tokens = (480, 832, 81), 512
    blocks = property(lambda self: list(self.model.blocks))

    def network(self, x, t, cond):
        if t.ndim == 2:  # one time a frame -> one a token
            t = t.repeat_interleave(x[0, 0, 0].numel() // math.prod(self.patch), 1)
        x = torch.cat([x, cond["image"]], 1) if "image" in cond else x
        return self.model(x, 1000 * t, cond["text"], cond.get("clip"), return_dict=False)[0]

    @torch.no_grad()
    def encode_start(self, images):
        video = F.pad(images[:, :, None], (0, 0, 0, 0, 0, self.frames - 1))
        cond = {"image": F.pad(self.encode_images(video), (0, 0, 0, 0, 0, 0, 4, 0))}
        cond["image"][:, :4, 0] = 1
        if self.model.config.image_dim:  # Wan 2.1 looks at it through CLIP as well
            pixels = list(edm.to_uint8(images.cpu()))
            cond["clip"] = self.codec.pipe.encode_image(pixels, self.device)
        return cond


class CogVideoX(Backbone):
    """CogVideoX 1 (2B, 5B): F = v, zero terminal SNR; frames before channels."""

    pipelines = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    stream, default_size, packages = 0, (480, 720, 49), ("sentencepiece",)
    patch = property(lambda self: (1, *[self.model.config.patch_size] * 2))
    tokens = property(lambda self: self.model.config.max_text_seq_length)

    def network(self, x, t, cond):
        extra = {"image_rotary_emb": self.rotary(x), "return_dict": False}
        x = torch.cat([x, cond["image"]], 1) if "image" in cond else x
        return self.model(x.transpose(1, 2), cond["text"], t, **extra)[0].transpose(1, 2)

    def rotary(self, x):
        """Positions in the largest centred box of this aspect ratio of the training grid."""
        config, (f, h, w) = self.model.config, self.grid(x.shape)
        if not config.use_rotary_positional_embeddings:
            return None
        high, wide = (n // config.patch_size for n in (config.sample_height, config.sample_width))
        tall, broad = (round(n * min(high / h, wide / w)) for n in (h, w))
        top, left = round((high - tall) / 2), round((wide - broad) / 2)
        crop = ((top, left), (top + tall, left + broad))
        return get_3d_rotary_pos_embed(config.attention_head_dim, crop, (h, w), f, device=x.device)

    def encode_start(self, images):
        first = self.encode_images(images[:, :, None])
        return {"image": F.pad(first, (0, 0, 0, 0, 0, self.shape[1] - 1))}


class Cosmos(Backbone):
    """Cosmos-Predict2, text to image. Its licence wants its guardrail on what you show."""

    pipelines, default_size, tokens = ("Cosmos2TextToImagePipeline",), (704, 1280, 1), 512
    packages, needs = ("sentencepiece",), ("accelerate",)

    def network(self, x, t, cond):
        mask = x.new_zeros(1, 1, *x.shape[3:])
        return self.model(x, t.to(x), cond["text"], padding_mask=mask, return_dict=False)[0]
