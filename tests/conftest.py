"""Tiny stand-ins: networks of a few thousand weights, and denoisers whose answer is known."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edm_teacher as edm  # noqa: E402

TINY = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 4,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.1,
    "label_dropout": 0.1,
    "patch_size": 2,
}


def make_denoiser(network: dict):
    return edm.EDMPrecond(edm.SongUNet(**network))


def randomise(network, seed=0):
    """Fresh networks return almost zero, as their last layers do; give every weight a size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return network


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return randomise(make_denoiser(TINY)).eval()


@pytest.fixture
def tiny_teacher(tmp_path, monkeypatch):
    """A saved teacher for the synthetic data, and a metric without training."""
    torch.manual_seed(0)
    network = randomise(make_denoiser(TINY | {"img_resolution": 28}))
    edm.save_denoiser(network, tmp_path / "teacher.safetensors")

    def quick_metric(data, data_dir, folder, device="cpu", **shape):
        config = {
            "data": data,
            "channels": 1,
            "classes": 4,
            "class_counts": [3, 1, 2, 2],
            "train_accuracy": 0.5,
            "resolution": 28,
        }
        net = edm.Classifier(1, 4)
        tensors = dict(net.state_dict())
        tensors |= {k: torch.randn(64, 64) for k in ("test_features", "train_features")}
        return edm.Metric(data, tensors, config, device)

    monkeypatch.setattr(edm, "get_metric", quick_metric)
    return tmp_path / "teacher.safetensors"


class Gaussian(torch.nn.Module):
    """The exact denoiser of N(mean, std²) data: D(x; σ) = (std² x + σ² mean) / (std² + σ²)."""

    sigma_min, sigma_max, sigma_data, label_dim = 0.002, 80.0, 0.5, 0

    def __init__(self, mean=0.0, std=1.0):
        super().__init__()
        self.mean, self.std, self.calls = mean, std, []

    def forward(self, x, sigma, labels=None):
        self.calls.append(sigma)
        s2 = edm.expand(sigma, x) ** 2
        return (self.std**2 * x + s2 * self.mean) / (self.std**2 + s2)


class Spy(torch.nn.Module):
    """Wraps a denoiser and keeps what it was called with."""

    def __init__(self, network):
        super().__init__()
        self.network, self.calls = network, []
        for name in ("sigma_min", "sigma_max", "sigma_data", "label_dim"):
            setattr(self, name, getattr(network, name))

    def forward(self, x, sigma, labels=None, **how):
        self.calls.append(
            SimpleNamespace(x=x, sigma=sigma, labels=labels, grad=torch.is_grad_enabled(), how=how)
        )
        return self.network(x, sigma, labels, **how)
