"""Pictures with titles and axes: samples.png, curves.png, and what the videos show."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

from edm_teacher import to_uint8, write_atomic


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(path, fig, dpi: int = 90) -> None:
    fig.tight_layout(pad=0.6)
    write_atomic(path, lambda tmp: fig.savefig(tmp, dpi=dpi, format="png"))
    pyplot().close(fig)


def curves(folder) -> None:
    """curves.png in a run's folder: every quantity of log.jsonl against the step."""
    path = Path(folder) / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    names = [k for k in lines[-1] if k != "step"] if lines else []
    if not names:
        return
    fig, axes = pyplot().subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for name, ax in zip(names, axes[0], strict=True):
        points = [(line["step"], line[name]) for line in lines if name in line]
        ax.plot(*zip(*points, strict=True))
        ax.set(title=name, xlabel="step")
        if min(y for _, y in points) >= 0:
            ax.set_ylim(bottom=0)
    save_figure(Path(folder) / "curves.png", fig)


def save_rows(path, rows: dict[str, Tensor], columns: int = 16) -> None:
    """A picture with one titled block of images for each entry, e.g. teacher above generator."""
    grids = []
    for x in rows.values():
        grid = torchvision.utils.make_grid(to_uint8(x.detach().cpu()), nrow=columns, pad_value=127)
        grids.append(grid.permute(1, 2, 0).numpy())
    heights = [g.shape[0] / g.shape[1] for g in grids]
    size = (8, 8 * sum(heights) + 0.35 * len(grids))
    fig, axes = pyplot().subplots(len(grids), 1, figsize=size, height_ratios=heights, squeeze=False)
    for title, grid, ax in zip(rows, grids, axes[:, 0], strict=True):
        ax.imshow(grid, interpolation="nearest")
        ax.set_title(title, fontsize=9, loc="left", parse_math=False)
        ax.axis("off")
    save_figure(path, fig, dpi=130)


def save_strips(path, videos: dict[str, Tensor], n: int = 6) -> None:
    """A picture of the first n videos (B, 1, F, H, W) of each entry: a row each, its frames in it.

    Shorter videos are black after their last frame.
    """
    longest, rows = max(x.shape[2] for x in videos.values()), {}
    for title, x in videos.items():
        padded = F.pad(x[:n].cpu(), (0, 0, 0, 0, 0, longest - x.shape[2]), value=-1)
        rows[title] = padded.transpose(1, 2).flatten(0, 1)
    save_rows(path, rows, columns=longest)


def save_gif(path, videos: list[Tensor], n: int = 6, scale: int = 5) -> None:
    """The first n videos (B, 1, F, H, W) of each entry side by side, one entry under the other.

    8 frames a second; shorter videos turn black at their end.
    """
    longest = max(x.shape[2] for x in videos)
    padded = [F.pad(x[:n].cpu(), (0, 0, 0, 2, 0, longest - x.shape[2]), value=-1) for x in videos]
    grid = torch.cat([torch.cat([*x[:, 0]], -1) for x in padded], -2)  # (F, rows, columns)
    grid = to_uint8(grid).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    first, *others = (Image.fromarray(picture.numpy()) for picture in grid)
    how = {"save_all": True, "append_images": others, "duration": 125, "loop": 0}
    write_atomic(path, lambda tmp: first.save(tmp, format="GIF", **how))


def save_lines(path, panels: dict[str, dict[str, list]], xlabel: str, mark: float) -> None:
    """A panel for each title, in it a line for each entry over 1, 2, ...; dotted at `mark`."""
    fig, axes = pyplot().subplots(1, len(panels), figsize=(3.4 * len(panels), 3), squeeze=False)
    for (title, lines), ax in zip(panels.items(), axes[0], strict=True):
        for label, values in lines.items():
            ax.plot(range(1, len(values) + 1), values, label=label.replace("_", " "))
        ax.axvline(mark, color="grey", ls=":")
        ax.set(title=title, xlabel=xlabel)
    axes[0, 0].legend(fontsize=7)
    save_figure(path, fig)


def save_panels(path, real: Tensor, samples: dict[str, Tensor]) -> None:
    """A panel for each entry: points (n, 2) of the data in grey, of the generator on top."""
    size = (2 * len(samples), 2.2)
    fig, axes = pyplot().subplots(1, len(samples), figsize=size, sharey=True, squeeze=False)
    for ax, (name, x) in zip(axes[0], samples.items(), strict=True):
        ax.scatter(*real.T, s=2, color="0.8")
        ax.scatter(*x.T, s=2, color="tab:red")
        ax.set(title=name, xlim=(-2.2, 2.2), ylim=(-1, 1))
    save_figure(path, fig, dpi=110)
