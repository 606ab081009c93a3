"""MNIST, CIFAR-10, a folder of images; and what is known of them in closed form."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import MNIST, ImageFolder, utils
from torchvision.transforms import v2

from edm_teacher import UserError, brief, synthetic, to_float

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def load_data(data: str, data_dir="data", train=True, resolution=28, channels=1):
    """uint8 images (N, C, H, W) and labels (N,); MNIST and CIFAR-10 are downloaded if need be.

    Of a folder every 10th image is the test set; squares are cut and resized to `resolution`."""
    if data == "synthetic":
        return synthetic(2048 if train else 1024, resolution, seed=int(not train))
    if data not in ("mnist", "cifar10"):
        return folder(data, train, resolution, channels)
    try:
        if data == "cifar10":
            return cifar10(Path(data_dir), train)
        digits = MNIST(data_dir, train, download=True)
        return digits.data[:, None], digits.targets
    except Exception as error:
        url = CIFAR10 if data == "cifar10" else MNIST.mirrors[0]
        why = f"neither found in {data_dir} nor downloaded from {url} ({brief(error)})"
        raise UserError(f"{data} was {why}: go online, or mend --data-dir.") from None


def cifar10(data_dir, train):
    """The official binary version: records of 1 label byte and 3072 bytes R, G, B; no pickle."""
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    paths = [data_dir / "cifar-10-batches-bin" / name for name in names]
    if not all(p.is_file() for p in paths):
        utils.download_and_extract_archive(CIFAR10, data_dir, md5=MD5)
    raw = torch.frombuffer(bytearray().join(p.read_bytes() for p in paths), dtype=torch.uint8)
    labels, images = raw.view(-1, 3073).split((1, 3072), 1)
    return images.reshape(-1, 3, 32, 32), labels[:, 0].long()


def folder(path, train, resolution, channels):
    mode = v2.Grayscale() if channels == 1 else v2.Identity()
    shape = v2.Compose([v2.Resize(resolution), v2.CenterCrop(resolution), mode, v2.PILToTensor()])
    try:
        dataset = ImageFolder(path, shape)
        chosen = (dataset[i] for i in range(len(dataset)) if (i % 10 == 0) != train)
        images, labels = zip(*chosen, strict=True)
    except (OSError, ValueError) as error:  # ValueError: no image
        why = "not mnist, cifar10, synthetic or a folder with a sub-folder of images per class"
        raise UserError(f"--data {path}: {why} ({brief(error)}).") from None
    return torch.stack(images), torch.tensor(labels)


class PosteriorMean:
    """E[x | x_t, y] over the images of a data set: its ideal denoiser, in closed form (EDM).

    As edm_loss's target it has the same expected gradient as x, with less variance (Xu et al. 2023,
    whose reference batch is here the whole class). NaN for labels that are no class, like -1."""

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
