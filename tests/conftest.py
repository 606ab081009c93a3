"""Tiny stand-ins: networks of a few thousand weights, and denoisers whose answer is known."""

import functools
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import edm_teacher as edm  # noqa: E402
from tools import metrics  # noqa: E402

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
    """An untrained denoiser of four classes of 8 x 8 pixels, frozen as a teacher is."""
    torch.manual_seed(0)
    return randomise(make_denoiser(TINY)).eval().requires_grad_(False)


def tiny_metric(data="synthetic", resolution=28):
    """(tensors, config) of a metric without training."""
    config = {"data": data, "channels": 1, "classes": 4, "resolution": resolution}
    config |= {"class_counts": [3, 1, 2, 2], "train_accuracy": 0.5}
    tensors = dict(metrics.Classifier(1, 4).state_dict())
    return tensors | {k: torch.randn(64, 64) for k in ("test_features", "train_features")}, config


@pytest.fixture
def tiny_teacher(tmp_path, monkeypatch):
    """The file of a teacher for drawn shapes, and a metric that needs no training."""
    torch.manual_seed(0)
    network = randomise(make_denoiser(TINY | {"img_resolution": 28}))
    edm.save_denoiser(network, tmp_path / "teacher.safetensors")
    monkeypatch.setattr(metrics, "train_metric", lambda *args, **how: tiny_metric())
    return tmp_path / "teacher.safetensors"


class Gaussian(edm.Denoiser):
    """The exact denoiser of N(mean, std²) data: D(x; σ) = (std² x + σ² mean) / (std² + σ²)."""

    def __init__(self, mean=0.0, std=1.0):
        super().__init__(None, (1, 1, 1))
        self.mean, self.std, self.calls = mean, std, []

    def forward(self, x, sigma, labels=None):
        self.calls.append(sigma)
        s2 = edm.expand(sigma, x) ** 2
        return (self.std**2 * x + s2 * self.mean) / (self.std**2 + s2)


class Spy(edm.Denoiser):
    """Wraps a denoiser and keeps what it was called with."""

    def __init__(self, network):
        super().__init__(network, network.shape, network.label_dim)
        self.sigma_data, self.calls = network.sigma_data, []

    def forward(self, x, sigma, labels=None, **how):
        self.calls.append(
            SimpleNamespace(x=x, sigma=sigma, labels=labels, grad=torch.is_grad_enabled(), how=how)
        )
        return self.model(x, sigma, labels, **how)


class Calls(list):
    """Stands in for a function and keeps each call: its arguments by name, and the result.

    before(call), if given, may look at the arguments first, or change them."""

    def __init__(self, monkeypatch, owner, name, before=None):
        function = getattr(owner, name)

        @functools.wraps(function)
        def spy(*args, **kwargs):
            arguments = inspect.signature(function).bind(*args, **kwargs)
            arguments.apply_defaults()
            call = SimpleNamespace(**arguments.arguments)
            self.append(call)
            if before:
                before(call)
            call.result = function(**vars(call))
            return call.result

        monkeypatch.setattr(owner, name, spy)
