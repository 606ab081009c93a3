"""Times the training loop of a script, on random images:

python -m tools.benchmark dmd2_cifar --batch 8 --ratio 4 --threads 1 --gan-weight 0

Without --teacher of an untrained network of 0.88 million weights. An image a second is a sample of
the generator that an update has seen: (1 + R) batches a cycle of one generator update and R others.
"""

import importlib
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial

import torch

import edm_teacher as edm

NETWORK = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_channels": 16}
CYCLES = 10


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
    teacher = edm.EDMPrecond(edm.SongUNet(**NETWORK, dropout=0.0)).to(cfg.device)
    teacher = script.load_teacher(cfg, None) if cfg.teacher else teacher
    teacher.eval().requires_grad_(False)
    short, long = (seconds(script, cfg, teacher, steps) for steps in (2, 2 + CYCLES))
    cycle = (long - short) / CYCLES
    result = {"images_per_second": (1 + cfg.ratio) * cfg.batch / cycle, "seconds_per_cycle": cycle}
    result["peak_memory_mb"] = edm.peak_memory_mb(torch.device(cfg.device).type == "cuda")
    print(", ".join(f"{k.replace('_', ' ')}: {v:.4g}" for k, v in result.items()))
    return result


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("dmd2_cifar", "f_distill", "ladd"):
        sys.exit("tools.benchmark: expected dmd2_cifar, f_distill or ladd, and its options.")
    script = importlib.import_module(sys.argv.pop(1))
    edm.run_command(partial(main, script), script.Config, __doc__)
