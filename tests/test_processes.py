"""Several processes: two on a CPU, joined by gloo, do what one does. Run by torchrun, it trains."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY, make_denoiser, randomise
from torch.testing import assert_close

import dmd2_cifar
import edm_teacher as edm
import f_distill
import ladd

SCRIPTS = {"dmd2_cifar": dmd2_cifar, "f_distill": f_distill, "ladd": ladd}


def run(script: str, folder, steps: int) -> dict:
    """Trains up to step `steps`, going on with what is in the folder; the generator's weights."""
    cfg = SCRIPTS[script].Config(
        data="synthetic", steps=steps, batch=8, ratio=2, sampling_steps=2, guidance=2.0
    )
    cfg.device, cfg.out, cfg.resume = "cpu", str(folder), True
    edm.set_up(cfg, several=True)
    teacher = randomise(make_denoiser(TINY)).eval().requires_grad_(False)
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(4, (64,))
    generator = SCRIPTS[script].train(cfg, edm.Run(cfg, script), teacher, images, labels)
    edm.save_denoiser(generator, folder / "generator.safetensors")
    return generator.state_dict()


def run_two(script: str, folder, steps: int) -> dict:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, script, str(folder), str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return edm.load_denoiser(folder / "generator.safetensors").state_dict()


def compare(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert_close(value, b[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", ["f_distill", "ladd"])
def test_two_processes_do_what_one_does(script, tmp_path):
    """The same global batch, data, noise and steps: the same weights, to 1e-5."""
    compare(run_two(script, tmp_path / "two", 2), run(script, tmp_path / "one", 2))


def test_one_process_or_two_go_on_with_a_run(tmp_path):
    """DMD2: 3 steps of one process = 2 steps of two and 1 of one = 1 step of one and 2 of two."""
    expected = run("dmd2_cifar", tmp_path / "one", 3)
    run_two("dmd2_cifar", tmp_path / "a", 2)
    compare(run("dmd2_cifar", tmp_path / "a", 3), expected)
    run("dmd2_cifar", tmp_path / "b", 1)
    compare(run_two("dmd2_cifar", tmp_path / "b", 3), expected)
    logs = [(tmp_path / k / "log.jsonl").read_text().count("\n") for k in ("one", "a", "b")]
    assert logs == [1, 1, 1]  # one process writes


def test_what_several_processes_cannot_do_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(edm.UserError, match="does not run on several devices"):
        edm.set_up(edm.Config())
    for wrong in ({"batch": 7}, {"lora_rank": 4}):
        with pytest.raises(
            edm.UserError, match="2 processes need a --batch they divide, and no --l"
        ):
            edm.set_up(dmd2_cifar.Config(steps=1, **wrong), several=True)


if __name__ == "__main__":
    run(sys.argv[1], edm.Path(sys.argv[2]), int(sys.argv[3]))
