"""Times the training loop of a script, without --teacher of an untrained network of 0.88 million
weights:  python -m tools.benchmark dmd2_cifar --batch 8 --ratio 4 --threads 1 --gan-weight 0

Images a second: (1 + R) batches a cycle, one for each update; the first two share theirs.
"""

import importlib
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import torch

import edm_teacher as edm


def seconds(script, cfg, teacher, steps: int) -> float:
    """Of script.train with so many generator updates."""
    images = torch.randint(256, (512, *teacher.shape), dtype=torch.uint8)
    labels = torch.randint(max(teacher.label_dim, 1), (512,))
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(cfg, steps=steps, save_every=steps, out=folder)
        start = time.time()
        script.train(cfg, edm.Run(cfg, "benchmark"), teacher, images, labels)
        return time.time() - start


def main(script, cfg) -> dict:
    """What start, end and the first updates cost goes away in the difference of two runs."""
    edm.set_up(cfg)
    network = edm.SongUNet(32, 3, 10, model_channels=16, dropout=0.0).to(cfg.device)
    teacher = script.load_teacher(cfg, None) if cfg.teacher else edm.EDMPrecond(network)
    teacher.eval().requires_grad_(False)
    short, long = (seconds(script, cfg, teacher, steps) for steps in (2, 12))
    cycle = (long - short) / 10
    result = {"images_per_second": (1 + cfg.ratio) * cfg.batch / cycle, "seconds_per_cycle": cycle}
    result["peak_memory_mb"] = edm.peak_memory_mb(torch.device(cfg.device).type == "cuda")
    print(", ".join(f"{k.replace('_', ' ')}: {v:.4g}" for k, v in result.items()))
    return result


if __name__ == "__main__":
    if not {*sys.argv[1:2]} & {"dmd2_cifar", "f_distill", "ladd"}:
        sys.exit("tools.benchmark: expected dmd2_cifar, f_distill or ladd, and its options.")
    script = importlib.import_module(sys.argv.pop(1))
    edm.run_command(partial(main, script), script.Config, __doc__)
