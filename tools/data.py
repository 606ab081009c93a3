"""MNIST, CIFAR-10, a folder of images; and what is known of them in closed form."""

import functools
import math
import re
from glob import glob
from pathlib import Path

import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor
from torchvision.datasets import MNIST, utils
from torchvision.transforms import v2

from edm_teacher import UserError, brief, rank, synthetic, to_float

CIFAR10 = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
NAMES = "mnist", "cifar10", "synthetic"
SPLITS = "train", "training", "val", "valid", "validation", "test"
say = functools.cache(print)  # once, although training, metrics and FID read a folder each
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # sound images have 1 MB and more


def load_data(data: str, data_dir="data", train=True, resolution=28, channels=1):
    """uint8 images (N, C, H, W) and labels (N,); MNIST and CIFAR-10 are downloaded if need be.

    Of a folder every 10th image of a class is for testing; squares are cut and resized."""
    if data == "synthetic":
        return synthetic(2048 if train else 1024, resolution, seed=int(not train))
    if data not in NAMES:
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
    kinds = enumerate(class_folders(path).values())
    chosen = [(f, k) for k, files in kinds for i, f in enumerate(files) if (i % 10 == 9) != train]
    images = torch.empty(len(chosen), channels, resolution, resolution, dtype=torch.uint8)
    for i, (file, _) in enumerate(chosen):
        images[i] = shape(open_image(file))
    return images, torch.tensor([k for _, k in chosen], dtype=torch.long)


def class_folders(path) -> dict[Path, list[Path]]:
    """{class folder: its images, at any depth}, both in natural order; prints what it found."""
    if not (path := Path(path)).is_dir():
        raise UserError(f"--data {path}: not mnist, cifar10, synthetic or a folder.")
    kinds, skipped = {}, []
    endings = [end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN]
    found = glob("**", root_dir=path, recursive=True, include_hidden=True)
    for name in map(Path, sorted(found, key=natural)):
        kind, hidden = path / name.parts[0], any(p.startswith((".", "__")) for p in name.parts)
        if (path / name).is_dir():
            if not hidden:
                kinds.setdefault(kind, [])
        elif hidden or kind == path / name or name.suffix.lower() not in endings:
            skipped.append(str(name))
        else:
            kinds[kind].append(path / name)
    splits = [kind for kind in kinds if kind.name.lower() in SPLITS]
    empty = [kind.name for kind, files in kinds.items() if not files]
    if not kinds:
        raise UserError(f"--data {path}: it has no sub-folder of images for each class.")
    if len(splits) > 1 or len(splits) == len(kinds):
        raise UserError(f"--data {path}: expected class folders; is it --data {splits[0]}?")
    if empty:
        raise UserError(f"--data {path}: no image in the class folder {brief(', '.join(empty))}.")
    if not rank():
        say(f"{path}: label " + ", ".join(f"{k} is {kind.name}" for k, kind in enumerate(kinds)))
    if skipped and not rank():
        why = "hidden, no images, or beside the class folders"
        say(f"{path}: {len(skipped)} files skipped ({why}): {brief(', '.join(skipped))}")
    return kinds


def natural(path: str) -> tuple:
    """The key that sorts frame2 before frame10."""
    return [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", path)], path


def open_image(path) -> Image.Image:
    """RGB as a viewer shows it: upright, 16 bits / 257, on white where it is transparent."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or (image.mode, file.format) == ("I", "PPM"):
                image = image.convert("I").point(lambda v: v / 257 + 0.5).convert("L")
        if image.mode in ("I", "F"):
            raise UserError(f"mode {image.mode} has no known range: save it with 8 or 16 bits")
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:  # Pillow raises all kinds
        raise UserError(f"{path} cannot be read as a picture ({brief(error)}).") from None


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
