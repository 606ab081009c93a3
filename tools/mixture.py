"""Seven f-divergences in two dimensions: where a single Gaussian ends on two modes.

python -m tools.mixture                # minutes; samples.png and a table

An exact teacher, a generator that cannot have two modes, and f_distill.py's two updates.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import edm_teacher as edm
import f_distill
from edm_teacher import Denoiser, EDMPrecond
from f_distill import F_DIVERGENCES, Discriminator, RatioMean, backward_simulation
from tools import plot


@dataclass
class Config:
    seed: int = 0  # of everything random
    device: str = "cpu"  # or cuda
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/mixture-<k>

    resume: ClassVar = False
    may_change: ClassVar = ()


class Mixture(Denoiser):
    """The exact denoiser of Σ_k w_k N(m_k, s² I) in two dimensions; x: (B, 2, 1, 1).

    D(x; σ) = Σ_k p(k | x) (σ² m_k + s² x) / (σ² + s²).
    """

    def __init__(self, means=((-1.0, 0.0), (1.0, 0.0)), weights=(0.6, 0.4), std: float = 0.2):
        super().__init__(None, (2, 1, 1))
        self.register_buffer("means", torch.tensor(means))
        self.register_buffer("weights", torch.tensor(weights))
        self.std = std

    def forward(self, x: Tensor, sigma: Tensor, labels=None) -> Tensor:
        v, s2 = x.flatten(1)[:, None], sigma[:, None, None] ** 2  # (B, 1, 2), (B, 1, 1)
        var = s2 + self.std**2
        logits = self.weights.log() - ((v - self.means) ** 2 / (2 * var)).sum(2)
        denoised = (s2 * self.means + self.std**2 * v) / var
        return (logits.softmax(1)[:, :, None] * denoised).sum(1).reshape(x.shape)

    def sample(self, n: int) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True)
        x = self.means[k] + self.std * torch.randn(n, 2, device=k.device)
        return x.reshape(n, 2, 1, 1)


class Perceptron(nn.Module):
    """A network for EDMPrecond in two dimensions: three hidden layers, the last is the feature."""

    img_channels, img_resolution, label_dim = 2, 1, 0

    def __init__(self, width: int = 128):
        super().__init__()
        sizes = [3, width, width, width]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 2)

    def forward(self, x, noise_labels, class_labels=None, return_features=False):
        h = self.body(torch.cat([x.flatten(1), noise_labels[:, None]], 1))
        features = [h[:, :, None, None]]
        if return_features == "only":
            return None, features
        out = self.head(h).reshape(x.shape)
        return (out, features) if return_features else out


class Affine(Denoiser):
    """G(σ_max z) = A z + b: the generator that cannot have two modes. It starts left of 0."""

    def __init__(self):
        super().__init__(None, (2, 1, 1))
        self.weight = nn.Parameter(0.3 * torch.eye(2))
        self.bias = nn.Parameter(torch.tensor([-0.5, 0.0]))

    def forward(self, x_t: Tensor, sigma: Tensor, labels=None) -> Tensor:
        z = x_t.flatten(1) / sigma[:, None]
        return (z @ self.weight.T + self.bias).reshape(x_t.shape)


SETTINGS = {"gan_weight": 0.0, "weighting": "kl", "discriminator_weight": 1.0, "batch": 256}


def distil(f: str, cfg: Config, run: edm.Run, teacher: Mixture) -> tuple[Affine, Tensor]:
    """The generator that descends divergence f, and 256 of its samples: 300 updates, no GAN's."""
    options = f_distill.Config(f=f, **SETTINGS)
    torch.manual_seed(cfg.seed)
    generator, fake = Affine(), EDMPrecond(Perceptron())
    discriminator = Discriminator(fake)
    ratio_mean = RatioMean(options.ratio_bins, options.ratio_ema)
    critic = nn.ModuleList([fake, discriminator])
    optimizer_generator = torch.optim.Adam(generator.parameters(), 3e-3, betas=(0.0, 0.99))
    optimizer_fake = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.5, 0.99))

    def inputs():
        z = torch.randn(options.batch, 2, 1, 1)
        return (*backward_simulation(generator, z, None, 1, 0), None)

    for step in range(-100, 300):  # at first the fake and the discriminator alone
        if step >= 0:
            nets = generator, teacher, fake, discriminator
            loss, _, _ = f_distill.generator_step(*nets, options, inputs(), ratio_mean)
            run.update(step, "generator", generator, optimizer_generator, loss, options.clip)
        for _ in range(options.ratio):
            x, real = generator(*inputs()).detach(), teacher.sample(options.batch)
            loss, _ = f_distill.fake_step(fake, teacher, discriminator, options, x, None, real)
            run.update(step, "fake", critic, optimizer_fake, loss, options.clip)
    return generator, generator(*inputs()).detach()


def main(cfg: Config) -> dict:
    """{f: mean and standard deviation along x}, as in result.json, and samples.png."""
    run = edm.Run(cfg, "mixture")
    with torch.device(cfg.device):
        teacher, rows, samples = Mixture(), {}, {}
        for f in tqdm(F_DIVERGENCES):
            generator, samples[f] = distil(f, cfg, run, teacher)
            std = (generator.weight @ generator.weight.T)[0, 0].sqrt()
            rows[f] = {"mean": generator.bias[0].item(), "std": std.item()}
        samples = {f: x.flatten(1).cpu() for f, x in samples.items()}
        plot.save_panels(run.path("samples.png"), teacher.sample(1000).flatten(1).cpu(), samples)
    return run.finish(rows)


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
