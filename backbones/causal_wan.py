"""Wan in causal chunks, for causal_video.py.                     CausVid §4.1, §4.4"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from backbones.denoiser import Mode
from backbones.families import Wan


class CausalWan(Wan):
    """Wan, called as causal_video.py calls its own network; without more arguments it is Wan.

    mask: (F, F), True where the frame of the row sees that of the column. past: keys and values of
    earlier frames, {frame: [(k, v) of each block]}; start: number of x's first frame.
    return_kv: also this call's keys and values, (B, heads, F, tokens, d) of each block."""

    def __init__(self, wan: Wan):
        super().__init__(wan.model, wan.schedule, wan.codec, wan.shape)
        self.mode, self.label_dim = wan.mode, wan.label_dim
        for i, layer in enumerate(self.model.blocks):
            layer.attn1.set_processor(partial(causal_attention, self.mode, i))
        self.model.rope.register_forward_hook(self.shifted)

    def forward(self, x, sigma, cond=None, return_features=False, return_kv=False, **how):
        how = {"mask": None, "past": {}, "start": 0, "kv": [] if return_kv else None} | how
        if how["mask"] is not None:  # frames that see the same, together
            rows, counts = how["mask"].unique_consecutive(dim=0, return_counts=True)
            how["mask"] = rows, counts.tolist()
        with self.mode.set(**how):
            out = super().forward(x, sigma, cond, return_features)
        return (out, how["kv"]) if return_kv else out

    def shifted(self, rope, args, output):
        """RoPE of start + F frames without the first `start`: positions in the whole video."""
        x, mode = args[0], self.mode
        mode.tokens = x[0, 0, 0].numel() // math.prod(self.patch)  # of a frame
        longer = x.new_zeros(1).expand(*x.shape[:2], mode.start + x.shape[2], *x.shape[3:])
        return tuple(r[:, mode.start * mode.tokens :] for r in rope.forward(longer))


def causal_attention(mode: Mode, i: int, attn, x, context=None, mask=None, rotary_emb=None, **_):
    """Self-attention of block i; queries get the keys of the frames that they see, so no mask."""
    q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
    q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
    # RoPE: two neighbouring channels are a complex number, times exp(i angle)
    turn = torch.complex(*(r[..., ::2].float() for r in rotary_emb))
    pairs = torch.view_as_complex(torch.stack([q, k]).float().unflatten(-1, (-1, 2)))
    q, k = torch.view_as_real(pairs * turn).flatten(-2).type_as(q)
    # (B, heads, F, tokens, d)
    q, k, v = (y.transpose(1, 2).unflatten(2, (-1, mode.tokens)) for y in (q, k, v))
    if mode.kv is not None:
        mode.kv.append((k, v))
    past = [layers[i] for layers in mode.past.values()]
    k, v = (torch.cat([*(p[j][:, :, None] for p in past), y], 2) for j, y in ((0, k), (1, v)))
    rows, counts = mode.mask or ([slice(None)], [q.shape[2]])
    out = []
    for some, row in zip(q.split(counts, 2), rows, strict=True):
        seen = (y.flatten(2, 3) for y in (some, k[:, :, row], v[:, :, row]))
        out.append(F.scaled_dot_product_attention(*seen))
    return attn.to_out[1](attn.to_out[0](torch.cat(out, 2).transpose(1, 2).flatten(2)))
