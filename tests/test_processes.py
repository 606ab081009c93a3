"""Several processes: two on a CPU, joined by gloo, do what one does. Run by torchrun, it trains."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import TINY, make_denoiser, randomise
from torch.testing import assert_close

import dmd2_cifar
import dmd_mnist
import edm_teacher as edm
import f_distill
import ladd

SCRIPTS = {"dmd2_cifar": dmd2_cifar, "f_distill": f_distill, "ladd": ladd}
OPTIONS = {script: {"ratio": 2, "sampling_steps": 2, "guidance": 2.0} for script in SCRIPTS}
SCRIPTS |= {"dmd_mnist": dmd_mnist, "edm_teacher": edm}
OPTIONS["dmd_mnist"] = {"pair_batch": 4, "guidance": 2.0}
OPTIONS["edm_teacher"] = {"model_channels": 8, "dropout": 0.2, "label_dropout": 0.5, "lr": 1.0}
OPTIONS["edm_teacher"] |= {"save_every": 2, "sample_steps": 2}


def run(script: str, folder, steps: int) -> dict:
    """Trains up to step `steps`, going on with what is in the folder; the result's weights."""
    cfg = SCRIPTS[script].Config(data="synthetic", steps=steps, batch=8, **OPTIONS[script])
    cfg.device, cfg.out, cfg.resume = "cpu", str(folder / script), True
    edm.set_up(cfg, several=True)
    teacher = randomise(make_denoiser(TINY)).eval().requires_grad_(False)
    images = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(4, (64,))
    log = edm.Run(cfg, script)
    if script == "edm_teacher":
        result = edm.train(cfg, log, images, labels)
    elif script == "dmd_mnist":
        pairs, _ = edm.load_tensors(log.path("pairs.safetensors"))
        result = dmd_mnist.train(cfg, log, teacher, pairs)
    else:
        result = SCRIPTS[script].train(cfg, log, teacher, images, labels)
    edm.save_denoiser(result, log.path("result.safetensors"))
    return edm.load_denoiser(log.path("result.safetensors")).state_dict()


def run_two(script: str, folder, steps: int, *first: str) -> dict:
    """Two processes, `script` last: behind most scripts' training the second process ends."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, str(folder), str(steps), *first, script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return edm.load_denoiser(folder / script / "result.safetensors").state_dict()


def compare(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert_close(value, b[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", ["f_distill", "ladd"])
def test_two_processes_do_what_one_does(script, tmp_path):
    """The same global batch, data, noise and steps: the same weights, to 1e-5."""
    compare(run_two(script, tmp_path / "two", 2), run(script, tmp_path / "one", 2))


def test_a_teacher_and_dmd_on_its_pairs_are_trained_by_two_processes_as_by_one(tmp_path):
    """Dropout, pictures on the way; DMD goes on after a step of one process, with its pairs."""
    one, two = tmp_path / "one", tmp_path / "two"
    torch.manual_seed(0)
    pairs = {"z": torch.randn(16, 1, 8, 8), "y": torch.randn(16, 1, 8, 8)}
    pairs["labels"] = torch.arange(16) % 4
    for folder in (one, two):
        edm.save_tensors(folder / "dmd_mnist/pairs.safetensors", pairs, {})
    run("dmd_mnist", two, 1)
    compare(run_two("dmd_mnist", two, 3, "edm_teacher"), run("dmd_mnist", one, 3))
    teacher = edm.load_denoiser(two / "edm_teacher/result.safetensors")
    compare(teacher.state_dict(), run("edm_teacher", one, 3))
    assert (two / "edm_teacher/samples_2.png").exists()


def test_one_process_or_two_go_on_with_a_run(tmp_path):
    """DMD2: 3 steps of one process = 2 steps of two and 1 of one = 1 step of one and 2 of two."""
    expected = run("dmd2_cifar", tmp_path / "one", 3)
    run_two("dmd2_cifar", tmp_path / "a", 2)
    compare(run("dmd2_cifar", tmp_path / "a", 3), expected)
    run("dmd2_cifar", tmp_path / "b", 1)
    compare(run_two("dmd2_cifar", tmp_path / "b", 3), expected)
    logs = [tmp_path / k / "dmd2_cifar/log.jsonl" for k in ("one", "a", "b")]
    assert [log.read_text().count("\n") for log in logs] == [1, 1, 1]  # one process writes


def test_what_several_processes_cannot_do_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(edm.UserError, match="does not run on several devices"):
        edm.set_up(edm.Config())
    for wrong in (
        dmd2_cifar.Config(steps=1, batch=7),
        dmd2_cifar.Config(steps=1, lora_rank=4),
        dmd_mnist.Config(pair_batch=7),
        edm.Config(compile=True),
    ):
        with pytest.raises(edm.UserError, match=r"2 processes need .* neither --lora-rank nor --c"):
            edm.set_up(wrong, several=True)


if __name__ == "__main__":
    for script in sys.argv[3:]:
        run(script, edm.Path(sys.argv[1]), int(sys.argv[2]))
