"""Seven f-divergences in two dimensions: where a single Gaussian ends on two modes.

An exact teacher, a generator that cannot have two modes, f_distill.py's two updates; minutes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

import edm_teacher as edm
import f_distill
from f_distill import F_DIVERGENCES, Discriminator, RatioMean, fake_step, generator_step
from tools import plot


@dataclass
class Config:
    seed: int = 0  # of everything random
    device: str = "cpu"  # or cuda
    threads: int = 0  # CPU threads; 0: torch decides
    out: str = ""  # the run's folder; default: the next free runs/mixture-<k>
    resume, may_change = False, ()  # as edm.RunConfig


class Mixture(edm.Denoiser):
    """D(x; σ) = Σ_k p(k | x) (σ² m_k + s² x) / (σ² + s²), exact for Σ_k w_k N(m_k, s² I)."""

    def __init__(self, std: float = 0.2):
        super().__init__(None, (2, 1, 1))
        self.register_buffer("means", torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        self.register_buffer("weights", torch.tensor([0.6, 0.4]))
        self.std = std

    def forward(self, x: Tensor, sigma: Tensor, labels=None) -> Tensor:
        v, s2 = x.flatten(1)[:, None], sigma[:, None, None] ** 2  # (B, 1, 2), (B, 1, 1)
        var = s2 + self.std**2
        logits = self.weights.log() - ((v - self.means) ** 2 / (2 * var)).sum(2)
        denoised = (s2 * self.means + self.std**2 * v) / var
        return (logits.softmax(1)[:, :, None] * denoised).sum(1).reshape(x.shape)

    def sample(self, n: int) -> Tensor:
        means = self.means[torch.multinomial(self.weights, n, replacement=True)]
        return (means + self.std * torch.randn_like(means))[:, :, None, None]


class Perceptron(nn.Module):
    """A network for EDMPrecond in two dimensions: three hidden layers, the last is the feature."""

    img_channels, img_resolution, label_dim = 2, 1, 0

    def __init__(self):
        super().__init__()
        layers = [m for n in (3, 128, 128) for m in (nn.Linear(n, 128), nn.SiLU())]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(128, 2)

    def forward(self, x, noise_labels, class_labels=None, return_features=False):
        h = self.body(torch.cat([x.flatten(1), noise_labels[:, None]], 1))
        out = self.head(h).reshape(x.shape)
        return (out, [h[:, :, None, None]]) if return_features else out


class Affine(edm.Denoiser):
    """G(σ_max z) = A z + b: the generator that cannot have two modes. It starts left of 0."""

    def __init__(self):
        super().__init__(None, (2, 1, 1))
        self.weight = nn.Parameter(0.3 * torch.eye(2))
        self.bias = nn.Parameter(torch.tensor([-0.5, 0.0]))

    def forward(self, x_t: Tensor, sigma: Tensor, labels=None) -> Tensor:
        return (x_t.flatten(1) / sigma[:, None] @ self.weight.T + self.bias).reshape(x_t.shape)


def distil(f: str, cfg: Config, run: edm.Run, teacher: Mixture) -> tuple[Affine, Tensor]:
    """The generator that descends divergence f, and 256 of its samples: 300 updates, no GAN's."""
    settings = {"gan_weight": 0.0, "weighting": "kl", "discriminator_weight": 1.0, "batch": 256}
    options = f_distill.Config(f=f, **settings)
    torch.manual_seed(cfg.seed)
    generator, fake = Affine(), edm.EDMPrecond(Perceptron())
    critic = nn.ModuleList([fake, discriminator := Discriminator(fake)])
    ratio_mean = RatioMean(options.ratio_bins, options.ratio_ema)
    optimizer_generator = torch.optim.Adam(generator.parameters(), 3e-3, betas=(0.0, 0.99))
    optimizer_fake = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.5, 0.99))

    def inputs():
        z = torch.randn(options.batch, 2, 1, 1)
        return (*f_distill.backward_simulation(generator, z, None, 1, 0), None)

    for step in range(-100, 300):  # at first the fake and the discriminator alone
        if step >= 0:
            loss, *_ = generator_step(generator, teacher, *critic, options, inputs(), ratio_mean)
            run.update(step, "generator", generator, optimizer_generator, loss, options.clip)
        for _ in range(options.ratio):
            x, real = generator(*inputs()).detach(), teacher.sample(options.batch)
            loss, _ = fake_step(fake, teacher, discriminator, options, x, None, real)
            run.update(step, "fake", critic, optimizer_fake, loss, options.clip)
    return generator, generator(*inputs()).detach()


def main(cfg: Config) -> dict:
    """{f: mean and standard deviation along x}, as in result.json, and samples.png."""
    run = edm.Run(cfg, "mixture")
    with torch.device(cfg.device):
        teacher, rows, samples = Mixture(), {}, {}
        for f in tqdm(F_DIVERGENCES):
            generator, x = distil(f, cfg, run, teacher)
            samples[f] = x.flatten(1).cpu()
            std = (generator.weight @ generator.weight.T)[0, 0].sqrt()
            rows[f] = {"mean": generator.bias[0].item(), "std": std.item()}
        real = teacher.sample(1000).flatten(1).cpu()
    for ax, x in plot.panels(run.path("samples.png"), samples, (14, 2.2), 110):
        ax.scatter(*real.T, s=2, color="0.8")
        ax.scatter(*x.T, s=2, color="tab:red")
        ax.set(xlim=(-2.2, 2.2), ylim=(-1, 1), yticks=[])
    return run.finish(rows)


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
