"""Pictures with titles and axes: samples.png, curves.png, and what the videos show."""

import json
import os
from pathlib import Path

import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.utils import make_grid

from edm_teacher import to_uint8, write_atomic


def panels(path, contents: dict, size: tuple, dpi: int = 90, heights=None):
    """(axes, value) for each title, side by side; with `heights`: one below the other."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be there
    from matplotlib.figure import Figure  # unlike pyplot it needs no display

    fig, n = Figure(size), len(contents)
    fig.subplots(*((n, 1) if heights else (1, n)), height_ratios=heights)
    for ax, (title, value) in zip(fig.axes, contents.items(), strict=True):
        ax.set_title(title, fontsize=9, loc="left", parse_math=False)
        yield ax, value
    fig.tight_layout(pad=0.6)
    write_atomic(path, lambda tmp: fig.savefig(tmp, dpi=dpi, format="png"))


def curves(folder) -> None:
    """curves.png in a run's folder: every quantity of log.jsonl against the step."""
    path, found = Path(folder) / "log.jsonl", {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        step = line.pop("step")
        for name, value in line.items():
            found.setdefault(name, []).append((step, value))
    size = (3.2 * len(found), 2.6)
    for ax, points in panels(path.with_name("curves.png"), found, size) if found else ():
        ax.plot(*zip(*points, strict=True))
        ax.set(xlabel="step", ylim=(0 if ax.dataLim.ymin >= 0 else None, None))


def save_lines(path, rows: dict[str, dict[str, list]], xlabel: str, mark: float) -> None:
    """A panel for each title, in it a line for each entry over 1, 2, ...; dotted at `mark`."""
    for ax, lines in panels(path, rows, (3.4 * len(rows), 3)):
        for label, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, label=label.replace("_", " "))
        ax.axvline(mark, color="grey", ls=":")
        ax.set_xlabel(xlabel)
        ax.figure.axes[0].legend(fontsize=7)  # for all


def save_rows(path, rows: dict[str, Tensor], columns: int = 16) -> None:
    """A picture with one titled block of images for each entry, e.g. teacher above generator."""
    grids = {k: make_grid(to_uint8(x.cpu()), columns, pad_value=127) for k, x in rows.items()}
    heights = [g.shape[1] / g.shape[2] for g in grids.values()]
    size = (8, 8 * sum(heights) + 0.35 * len(grids))
    for ax, grid in panels(path, grids, size, 130, heights):
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        ax.axis("off")


def clips(videos) -> Tensor:
    """(F, entries, 6, H, W): the first videos (B, 1, F, H, W) of each entry, then black."""
    return pad_sequence([x[:6, 0].cpu().transpose(0, 1) for x in videos], padding_value=-1)


def save_strips(path, videos: dict[str, Tensor]) -> None:
    """A titled block for each entry, in it a row of frames for each video."""
    x = clips(videos.values())
    rows = x.permute(1, 2, 0, 3, 4).flatten(1, 2)[:, :, None]
    save_rows(path, dict(zip(videos, rows, strict=True)), columns=len(x))


def save_gif(path, videos: list[Tensor]) -> None:
    """The videos of each entry side by side, one entry under the other; 8 frames a second."""
    x = F.pad(to_uint8(clips(videos)), (0, 0, 0, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
    pictures = [ImageOps.scale(Image.fromarray(p.numpy()), 5, Image.NEAREST) for p in x]
    how = {"save_all": True, "append_images": pictures[1:], "duration": 125, "loop": 0}
    write_atomic(path, lambda tmp: pictures[0].save(tmp, format="GIF", **how))
