"""Several processes: two on a CPU, joined by gloo, do what one does. Run by torchrun, it trains."""

import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import TINY, make_denoiser, randomise
from torch.testing import assert_close

import causal_video
import dmd2_cifar
import dmd_mnist
import edm_teacher as edm
import f_distill
import ladd

SCRIPTS = {"dmd2_cifar": dmd2_cifar, "f_distill": f_distill, "ladd": ladd}
OPTIONS = {script: {"ratio": 2, "sampling_steps": 2, "guidance": 2.0} for script in SCRIPTS}
SCRIPTS |= {"dmd_mnist": dmd_mnist, "edm_teacher": edm, "causal_video": causal_video}
OPTIONS["dmd_mnist"] = {"pair_batch": 4, "guidance": 2.0}
OPTIONS["edm_teacher"] = {"model_channels": 8, "dropout": 0.2, "label_dropout": 0.5, "lr": 1.0}
OPTIONS["edm_teacher"] |= {"save_every": 2, "sample_steps": 2, "stable_target": True}
OPTIONS["causal_video"] = {"last_step_only": False, "same_step_across_blocks": False, "eval_n": 10}
OPTIONS["causal_video"] |= {"teacher": "new", "teacher_updates": 2, "ode_updates": 2, "pairs": 8}
OPTIONS["causal_video"] |= {"generator_update_interval": 2, "context_noise": 100.0}


def run(script: str, folder, steps: int) -> None:
    """Trains up to step `steps`, going on with what is in the folder; writes the result."""
    cfg = SCRIPTS[script].Config(data="synthetic", steps=steps, batch=8, **OPTIONS[script])
    cfg.device, cfg.out, cfg.resume = "cpu", str(folder / script), True
    cfg.threads = 1  # as torchrun's: two threads add in another order, Adam makes 4e-5 of that
    edm.set_up(cfg)
    if script == "causal_video":
        return causal_video.main(cfg)
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
    edm.save_denoiser(result, log.path("generator.safetensors"))


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(one, two, resumed) folders of runs: by one process, by two, begun by one or by two.

    Launching takes longer than these steps: all in one launch.
    """
    names = ("one", "two", "resumed")
    one, two, resumed = folders = [tmp_path_factory.mktemp(name) for name in names]
    pairs = {"z": torch.randn(16, 1, 8, 8), "y": torch.randn(16, 1, 8, 8)}
    pairs["labels"] = torch.arange(16) % 4
    for folder in folders:
        edm.save_tensors(folder / "dmd_mnist/pairs.safetensors", pairs, {})
    for script in SCRIPTS:
        run(script, one, 3)
    for script in ("dmd2_cifar", "dmd_mnist"):
        run(script, resumed, 1)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    work = [f"{script}:2:{two}" for script in ("dmd2_cifar", "dmd_mnist")]
    work += [f"{script}:3:{two}" for script in SCRIPTS if script not in ("dmd2_cifar", "dmd_mnist")]
    work += [f"{script}:3:{resumed}" for script in ("dmd2_cifar", "dmd_mnist")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command, *work]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folders


def compare(one, two, file: str = "generator.safetensors") -> None:
    a, b = (safetensors.torch.load_file(folder / file) for folder in (one, two))
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert_close(value, b[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("script", ["f_distill", "ladd", "edm_teacher"])
def test_two_processes_do_what_one_does(script, folders):
    """The same global batch, data, noise, dropout and steps: the same weights, to 1e-5."""
    compare(folders[0] / script, folders[1] / script)


def test_video_stages_are_the_same_by_two_processes(folders):
    """A new teacher, initialisation, CausVid and Self-Forcing, whose random exits are alike."""
    for stage in ("teacher", "ode_init", "causvid", "self_forcing"):
        compare(folders[0] / "causal_video" / stage, folders[1] / "causal_video" / stage)


@pytest.mark.parametrize("script", ["dmd2_cifar", "dmd_mnist"])
def test_one_process_or_two_go_on_with_a_run(script, folders):
    """3 steps of one process = 2 steps of two and 1 of one = 1 step of one and 2 of two."""
    one, two, resumed = folders
    run(script, two, 3)
    for folder in (two, resumed):
        compare(one / script, folder / script)
        log = (folder / script / "log.jsonl").read_text()
        assert log.count("\n") == (one / script / "log.jsonl").read_text().count("\n")


def test_the_first_process_alone_writes(folders):
    assert (folders[1] / "edm_teacher/samples_2.png").exists()
    assert sorted(p.name for p in folders[1].iterdir()) == sorted(SCRIPTS)


def test_what_several_processes_cannot_do_is_said(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for wrong in (
        dmd2_cifar.Config(steps=1, batch=7),
        dmd_mnist.Config(pair_batch=7),
        edm.Config(compile=True),
    ):
        with pytest.raises(edm.UserError, match=r"2 processes need .* and no --compile"):
            edm.set_up(wrong)


if __name__ == "__main__":
    edm.first_alone = lambda: None  # the next script needs both
    for work in sys.argv[1:]:
        script, steps, folder = work.split(":", 2)
        run(script, edm.Path(folder), int(steps))
