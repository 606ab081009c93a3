"""Two other objectives of Self-Forcing for causal_video.py: score identity (SiD) and a GAN.

Each gives a gradient at the video x, in the units of dmd_gradient; causal_video.py sends it through
the generator. SiD: arXiv 2404.04057. As in Self-Forcing's code SiD's fake has no guidance, the
teacher has: D_c + w (D_c - D_u).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edm_teacher import expand, guided

GAN_STD, GAN_PENALTY = 0.01, 0.01  # size and weight of the perturbations behind R1 and R2


def diffuse(x: Tensor, sigma: Tensor) -> Tensor:
    """x_t = x + σ ε, ε ~ N(0, I)  (DMD Eq. 3 with α = 1)."""
    return x + expand(sigma, x) * torch.randn_like(x)


def dmd_weight(x: Tensor, denoised_real: Tensor) -> Tensor:
    """1 / mean|D_real - x|, the mean of each sample: (B, 1, 1, 1, 1), no gradient  (DMD Eq. 8)."""
    return 1 / (x - denoised_real).detach().abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-8)


def gradient_at(x: Tensor, loss_of) -> tuple[Tensor, Tensor]:
    """(L, numel ∂L/∂x) of L = loss_of(x), in the units of dmd_gradient; no network gets any."""
    x = x.detach().requires_grad_()
    loss = loss_of(x)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad * x.numel()


# --- score identity ---
def sid_loss(x: Tensor, denoised_real: Tensor, denoised_fake: Tensor, alpha: float = 1.0) -> Tensor:
    """mean w (r - f)((r - x) - α (r - f)), r = D_real, f = D_fake, w = dmd_weight: score identity.

    arXiv 2404.04057. To be differentiated through r and f too."""
    gap = denoised_real - denoised_fake
    return (dmd_weight(x, denoised_real) * gap * (denoised_real - x - alpha * gap)).mean()


def sid_gradient(x: Tensor, teacher, fake, cfg, sigma: Tensor, labels) -> tuple[Tensor, dict]:
    """(gradient at x, what to log) of sid_loss at x + σ ε."""
    w = cfg.real_score_guidance_scale

    def loss_of(x):
        x_t = diffuse(x, sigma)
        denoised_real = guided(teacher, x_t, sigma, labels, 1 + w)
        return sid_loss(x, denoised_real, fake(x_t, sigma, labels))

    loss, grad = gradient_at(x, loss_of)
    return grad, {"SiD loss": loss}


# --- relativistic GAN with R1 and R2 ---
def relativistic_loss(better: Tensor, worse: Tensor) -> Tensor:
    """mean -log sigmoid(l_better - l_worse): better is real for the discriminator, else its own."""
    return F.softplus(worse - better).mean()


def difference_penalty(logits: Tensor, perturbed: Tensor, std: float) -> Tensor:
    """mean ((l(x_t + std n) - l(x_t)) / std)²: |∇l|² at first order; real: R1, generated: R2."""
    return ((perturbed - logits) / std).square().mean()


def gan_gradient(x: Tensor, real, fake, discriminator, sigma, labels) -> tuple[Tensor, dict]:
    """(gradient at x, what to log): x is to look more real than the real video."""

    def loss_of(x):
        pair = [discriminator(fake, diffuse(v, sigma), sigma, labels) for v in (x, real)]
        return relativistic_loss(*pair)

    loss, grad = gradient_at(x, loss_of)
    return grad, {"GAN loss": loss}


def discriminator_loss(x: Tensor, real, fake, discriminator, sigma, labels) -> tuple[Tensor, dict]:
    """(loss, what to log): real against generated, both slopes penalised; trains the fake, too."""
    pair = diffuse(real, sigma), diffuse(x, sigma)
    logits = [discriminator(fake, x_t, sigma, labels) for x_t in pair]
    near = [discriminator(fake, diffuse(x_t, 0 * sigma + GAN_STD), sigma, labels) for x_t in pair]
    r1, r2 = (difference_penalty(*l, GAN_STD) for l in zip(logits, near, strict=True))
    loss = relativistic_loss(*logits) + GAN_PENALTY * (r1 + r2) / 2
    return loss, {"logit difference": (logits[0] - logits[1]).mean(), "R1": r1, "R2": r2}


class Discriminator(nn.Module):
    """A learned query looks at the activations of each block of a denoiser -> logits (B,)."""

    def __init__(self, denoiser):
        super().__init__()
        with torch.no_grad():  # one video tells the shapes
            x = torch.zeros(1, *denoiser.shape, device=next(denoiser.parameters()).device)
            _, features = denoiser(x, 1.0, return_features=True)
        depth, width = len(features), features[0].shape[1]
        self.query = nn.Parameter(torch.randn(depth, 1, 1, width))
        self.kv = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        layers = nn.LayerNorm(depth * width), nn.Linear(depth * width, width), nn.SiLU()
        self.head = nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))

    def forward(self, backbone, x_t: Tensor, sigma: Tensor, labels) -> Tensor:
        _, features = backbone(x_t, sigma, labels, return_features=True)
        seen = []
        for query, kv, h in zip(self.query, self.kv, features, strict=True):
            query, h = query.expand(len(h), -1, -1), h.flatten(2).mT.float()
            seen.append(F.scaled_dot_product_attention(query, *kv(h).chunk(2, -1)))
        return self.head(torch.cat(seen, -1)[:, 0])
