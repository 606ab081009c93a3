"""MNIST, CIFAR-10, a folder of images; and what is known of them in closed form."""

import math
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from edm_teacher import UserError, synthetic, to_float

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def load_data(data: str, data_dir="data", train=True, resolution=28, channels=1):
    """(images, labels) of mnist, cifar10, synthetic or a folder with one sub-folder per class.

    MNIST and CIFAR-10 are downloaded to data_dir unless they are there. Of a folder every 10th
    image is the test set; its images are cut to squares and resized to `resolution`.
    images: uint8 (N, C, H, W), labels: (N,) long. Raises UserError where there is nothing to read.
    """
    if data == "synthetic":
        return synthetic(2048 if train else 1024, resolution, seed=int(not train))
    if data in ("mnist", "cifar10"):
        read, where = (mnist, "MNIST/raw") if data == "mnist" else (cifar10, "cifar-10-batches-bin")
        try:
            return read(data_dir, train)
        except Exception as error:
            url = CIFAR10_URL if data == "cifar10" else torchvision.datasets.MNIST.mirrors[0]
            reason = " ".join(str(error).split())
            raise UserError(
                f"{data} could neither be read in {Path(data_dir) / where} nor downloaded from "
                f"{url} ({reason}): connect to the network, point --data-dir to the folder that "
                "has it, or delete damaged files there."
            ) from None
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: not mnist, cifar10, synthetic or an existing folder.")
    return folder(data, train, resolution, channels)


def mnist(data_dir, train):
    dataset = torchvision.datasets.MNIST(data_dir, train=train, download=True)
    return dataset.data[:, None], dataset.targets


def cifar10(data_dir, train):
    """The official binary version: records of 1 label byte and 3072 bytes R, G, B; no pickle."""
    where = Path(data_dir) / "cifar-10-batches-bin"
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    if not all((where / name).is_file() for name in names):
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(CIFAR10_URL, data_dir, md5=CIFAR10_MD5)
    raw = np.concatenate([np.fromfile(where / name, np.uint8) for name in names]).reshape(-1, 3073)
    raw = torch.from_numpy(raw)
    return raw[:, 1:].reshape(-1, 3, 32, 32), raw[:, 0].long()


def folder(path, train, resolution, channels):
    from torchvision.transforms import v2

    mode = v2.Grayscale() if channels == 1 else v2.Identity()
    shape = v2.Compose([v2.Resize(resolution), v2.CenterCrop(resolution), mode, v2.PILToTensor()])
    try:
        dataset = torchvision.datasets.ImageFolder(path, transform=shape)
    except FileNotFoundError as error:
        raise UserError(
            f"--data {path} needs one sub-folder of images per class ({error})."
        ) from None
    chosen = [i for i in range(len(dataset)) if (i % 10 == 0) != train]
    if not chosen:
        raise UserError(f"--data {path} has too few images ({len(dataset)}).")
    try:
        images, labels = zip(*(dataset[i] for i in chosen), strict=True)
    except OSError as error:
        raise UserError(f"--data {path} has an image that cannot be read ({error}).") from None
    return torch.stack(images), torch.tensor(labels)


class PosteriorMean:
    """E[x | x_t, y] over the images of a data set: its ideal denoiser, in closed form (EDM).

    As edm_loss's target it has the same expected gradient as x, with less variance (Xu et al. 2023,
    Stable Target Field, whose reference batch is here the whole class). Keeps a float32 copy of the
    images. x_t: (B, C, H, W); sigma, labels: (B,); NaN for labels that are no class, like -1.
    """

    def __init__(self, images: Tensor, labels: Tensor):
        classes = range(int(labels.max()) + 1)
        self.classes = [to_float(images[labels == k]).flatten(1) for k in classes]
        self.half_squares = [images.square().sum(1) / 2 for images in self.classes]

    def __call__(self, x_t: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        mean = torch.full_like(x_t, math.nan)
        with torch.autocast(x_t.device.type, enabled=False):
            for k, images in enumerate(self.classes):
                (i,) = (labels == k).nonzero(as_tuple=True)
                near = x_t[i].flatten(1) @ images.T - self.half_squares[k]  # -|x_t - x|² / 2 + ...
                share = (near / sigma[i, None] ** 2).softmax(1)
                mean[i] = (share @ images).view_as(x_t[i])
        return mean
