"""Measures any denoiser file, by default with 10,000 samples:

python -m tools.evaluate runs/dmd_mnist-0/generator.safetensors --sample-steps 1
python -m tools.evaluate assets/mnist_teacher.safetensors --s-churn 8 --fid
"""

from dataclasses import dataclass
from functools import partial

from tyro.conf import Positional

import edm_teacher as edm
from tools.metrics import get_metric


@dataclass(kw_only=True)
class Config(edm.RunConfig):
    file: Positional[str]  # .safetensors of this project, .pkl of NVlabs/edm or .pth of FastGen
    data: str = "mnist"  # mnist, cifar10, synthetic, or a folder: what it is measured against
    sample_steps: edm.Count = 18  # Heun steps N: 2 N - 1 network calls; 1 for a one-step generator
    guidance: float = 1.0  # weight of classifier-free guidance; 1 is off
    s_churn: float = 0.0  # noise added before each step (EDM Alg. 2): up to 0.41 x --sample-steps
    eval_n: int = 10000  # samples
    fid: bool = False  # measure FID too (pip install torch-fidelity); slow without a GPU


def evaluate(cfg, run: edm.Run, denoiser, metric) -> dict:
    """Rows of the verdict for Heun's sampler, and samples.png."""
    how = {"steps": cfg.sample_steps, "guidance": cfg.guidance, "s_churn": cfg.s_churn}
    nfe = metric.network_calls(cfg.sample_steps, cfg.guidance, denoiser)
    sampler = partial(edm.heun_sampler, denoiser, **how), nfe
    samplers = {"generator" if cfg.sample_steps == 1 else "teacher": sampler}
    return metric.verdict(run, denoiser, cfg, samplers, with_fid=cfg.fid)


def main(cfg: Config) -> dict:
    from backbones.edm_files import load_denoiser

    run, denoiser = edm.Run(cfg, "evaluate"), load_denoiser(cfg.file, cfg.device)
    metric = get_metric(cfg, run.folder, denoiser)
    return run.finish(evaluate(cfg, run, denoiser, metric) if metric else {})


if __name__ == "__main__":
    edm.run_command(main, Config, __doc__)
