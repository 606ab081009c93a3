"""What changes along a video of drawn shapes: exposure bias, measured frame by frame."""

import torch
from torch import Tensor


def fit_shapes(x: Tensor, labels: Tensor, templates: Tensor) -> tuple[Tensor, Tensor]:
    """(brightness a, residual), (n, F) each: the best a · template - 1 over all places.

    templates: (classes, places, H, W). residual: the mean square over pixels that is left."""
    frames = x.detach().cpu()[:, 0].flatten(2) + 1  # (n, F, H W)
    bank = templates.flatten(2)[labels.cpu()]  # (n, places, H W)
    norm = bank.norm(dim=-1, keepdim=True)
    length, best = (frames @ (bank / norm).mT).clamp_min(0).max(-1)
    residual = (frames.square().sum(-1) - length**2).clamp_min(0) / frames.shape[-1]
    return length / norm[..., 0].gather(1, best), residual


def drift(x: Tensor, labels: Tensor, blocks: list[int], templates: Tensor) -> dict:
    """What changes from block to block, as lists; brightness is the mean of a block's frames.

    residual: to the template bank; bias: mean change of brightness since the first block; spread:
    its standard deviation over the videos; correlation: with that of the first block."""
    fitted = fit_shapes(x, labels, templates)
    a, residual = (torch.stack([b.mean(1) for b in v.split(blocks, 1)]) for v in fitted)
    row = {"residual": residual.mean(1), "bias": (a - a[0]).mean(1)}
    row["spread"] = a.std(1).nan_to_num(0)
    row["correlation"] = torch.corrcoef(a).reshape(len(a), -1)[0].nan_to_num(0)  # 0: no spread
    return {k: v.tolist() for k, v in row.items()}
