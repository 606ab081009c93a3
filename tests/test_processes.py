"""Several processes: two on a CPU, joined by gloo. Run by torchrun, this file trains.

Each process draws its own samples, so two do not end where one does. The instrument below makes
them: then sharding, averages and the split of a batch can be compared with one process, to 1e-5.
"""

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TINY, make_denoiser, randomise
from torch.overrides import TorchFunctionMode
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
OPTIONS["causal_video"] = {"last_step_only": False, "same_step_across_blocks": False, "eval_n": 0}
OPTIONS["causal_video"] |= {"teacher": "new", "teacher_updates": 2, "ode_updates": 2, "pairs": 8}
OPTIONS["causal_video"] |= {"generator_update_interval": 2, "context_noise": 100.0}
OPTIONS["causal_video"] |= {"num_training_frames": 18, "denoising_steps": "1000,500"}


class RowsOfProcess(TorchFunctionMode):
    """Inside, random numbers are this process' rows of those that one process would draw.

    All draw for the whole batch from the same seed; dropout draws its mask so, too. k times the
    rows of a process are k batches side by side, a larger batch is many of the smaller; what is no
    multiple of them, or has a generator of its own, is drawn as it is."""

    def __init__(self, cfg):
        super().__init__()
        self.n = dist.get_world_size()
        self.rows = edm.rows(math.gcd(cfg.batch, getattr(cfg, "pair_batch", 0)))

    def of_process(self, x):
        return x.unflatten(0, (-1, self.n, self.rows))[:, edm.rank()].flatten(0, 1)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        drops = function is F.dropout and kwargs["training"] and kwargs["p"]
        if drops and not len(args[0]) % self.rows:
            mask = function(torch.cat([torch.ones_like(args[0])] * self.n), **kwargs)
            return args[0] * self.of_process(mask)
        if name == "randn_like":
            (x,), function, name = args, torch.randn, "randn"
            args, kwargs = tuple(x.shape), {"dtype": x.dtype, "device": x.device} | kwargs
        if name in ("rand", "randn") and isinstance(args[0], int):
            args = (args,)
        first = {"rand": 0, "randn": 0, "randint": len(args) - 1, "multinomial": 1}.get(name)
        if first is None or "generator" in kwargs:
            return function(*args, **kwargs)
        size = args[first] if isinstance(args[first], Sequence) else (args[first],)
        if not size or size[0] % self.rows:
            return function(*args, **kwargs)
        total = self.n * size[0]
        everywhere = total if name == "multinomial" else (total, *size[1:])
        return self.of_process(function(*args[:first], everywhere, *args[first + 1 :], **kwargs))


def as_one_process(patch) -> None:
    """The instrument: one seed for all, and in every training loop the rows of one process."""

    def bar(self, start, steps, plain=edm.Run.bar):
        mode = RowsOfProcess(self.cfg) if dist.is_initialized() else contextlib.nullcontext()
        for step in plain(self, start, steps):
            with mode:
                yield step

    def first_state(seed, states=()):
        torch.manual_seed(seed)
        for cpu, _ in states[:1]:
            torch.set_rng_state(cpu)

    patch.setattr(edm, "set_random_states", first_state)
    patch.setattr(edm.Run, "bar", bar)


def run(script: str, folder: Path, steps: int) -> None:
    """Trains up to step `steps`, going on with what is in the folder; writes the result."""
    cfg = SCRIPTS[script].Config(data="synthetic", steps=steps, batch=8, **OPTIONS[script])
    cfg.device, cfg.out, cfg.resume = "cpu", str(folder / script), True
    cfg.threads = 1  # as torchrun's: two threads add in another order, Adam makes 4e-5 of that
    if script == "causal_video":
        return causal_video.main(cfg)
    log = edm.Run(cfg, script)
    teacher = randomise(make_denoiser(TINY)).eval().requires_grad_(False)
    images, labels = torch.randint(256, (64, 1, 8, 8), dtype=torch.uint8), torch.randint(4, (64,))
    if script == "edm_teacher":
        result = edm.train(cfg, log, images, labels)
    elif script == "dmd_mnist":
        pairs, _ = edm.load_tensors(log.path("pairs.safetensors"))
        result = dmd_mnist.train(cfg, log, teacher, pairs)
    else:
        result = SCRIPTS[script].train(cfg, log, teacher, images, labels)
    edm.save_denoiser(result, log.path("generator.safetensors"))


RESUMED = ("dmd2_cifar", "dmd_mnist")  # begun by two, ended by one, and the other way round


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs: one = by one process, two = by two, mixed = begun by one; and without the
    instrument own = by two, parts = by two in two parts. Launching is slow: one for all."""
    folder, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    pairs = {"z": torch.randn(16, 1, 8, 8), "y": torch.randn(16, 1, 8, 8)}
    pairs["labels"] = torch.arange(16) % 4
    for name in ("one", "two", "mixed"):
        edm.save_tensors(folder / name / "dmd_mnist/pairs.safetensors", pairs)
    work = ["dmd2_cifar 2 parts", "dmd2_cifar 3 parts", "dmd2_cifar 3 own", "causal_video 1 own"]
    work += [f"{script} 2 two" for script in RESUMED]
    work += ["f_distill 3 two", "ladd 3 two", "edm_teacher 3 two", "causal_video 2 two"]
    work += [f"{script} 3 mixed" for script in RESUMED]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(folder), *work]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        as_one_process(patch)
        for script in SCRIPTS:
            run(script, folder / "one", 2 if script == "causal_video" else 3)
        for script in RESUMED:
            run(script, folder / "mixed", 1)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        for script in RESUMED:
            run(script, folder / "two", 3)
    torch.set_num_threads(threads)
    return folder


def assert_same(one, two, atol: float = 1e-5) -> None:
    a, b = (edm.load_tensors(folder / "generator.safetensors")[0] for folder in (one, two))
    assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("script", ["f_distill", "ladd", "edm_teacher"])
def test_two_processes_do_what_one_does(script, runs):
    """The same global batch, data, noise, dropout and steps: the same weights, to 1e-5."""
    assert_same(runs / "one" / script, runs / "two" / script)


def test_video_stages_are_the_same_by_two_processes(runs):
    """A new teacher, initialisation, CausVid and Self-Forcing, whose random exits are alike."""
    for stage in ("teacher", "ode_init", "causvid", "self_forcing"):
        assert_same(runs / "one/causal_video" / stage, runs / "two/causal_video" / stage)


@pytest.mark.parametrize("script", RESUMED)
def test_one_process_or_two_go_on_with_a_run(script, runs):
    """3 steps of one process = 2 steps of two and 1 of one = 1 step of one and 2 of two."""
    for name in ("two", "mixed"):
        assert_same(runs / "one" / script, runs / name / script)
        a, b = ((runs / n / script / "log.jsonl").read_text() for n in ("one", name))
        assert a.count("\n") == b.count("\n")


def test_each_process_draws_its_own_samples(runs):
    """Without the instrument: z of its own for its half of the batch, but the same step k of N.

    Networks are gathered call by call, so all processes have to make as many calls."""
    for one, two in zip(*(torch.load(runs / f"{rank}.pt") for rank in (0, 1)), strict=True):
        (x, sigma), (other, same) = one, two
        assert len(x) == len(other) == 4
        assert (x != other).all()
        assert_close(sigma, same)


def test_two_processes_resume_bit_identically(runs):
    """2 steps and 1 = 3 steps, each process with its own random state from the checkpoint."""
    assert_same(runs / "own/dmd2_cifar", runs / "parts/dmd2_cifar", atol=0)


def test_another_number_of_processes_goes_on_from_a_new_seed():
    """Two states and one process: that of seed + step."""
    wanted = torch.Generator().manual_seed(7).get_state()
    edm.set_random_states(7, [(torch.get_rng_state(), None)] * 2)
    assert torch.equal(torch.get_rng_state(), wanted)


def test_the_first_process_alone_writes(runs):
    """Folders of the scripts and no others; pictures at every checkpoint."""
    assert (runs / "two/edm_teacher/samples_2.png").exists()
    assert sorted(p.name for p in (runs / "two").iterdir()) == sorted(SCRIPTS)


def test_batches_that_cannot_be_split_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert edm.rows(8) == 4
    with pytest.raises(edm.UserError, match="batch of 7 cannot be split over 2 processes"):
        edm.rows(7)


def train(folder: str, *work: str) -> None:
    """What both processes do: "script steps name" for each; the inputs of DMD2's generator."""
    seen, step = [], dmd2_cifar.generator_step
    dmd2_cifar.generator_step = lambda *args: seen.append(args[-1][:2]) or step(*args)
    edm.whole = partial(edm.whole, last=False)  # the next script needs both processes
    edm.first_alone = lambda: None
    for words in work:
        script, steps, name = words.split()
        with pytest.MonkeyPatch.context() as patch:
            if name in ("two", "mixed"):
                as_one_process(patch)
            run(script, Path(folder, name), int(steps))
    torch.save(seen[:6], Path(folder, f"{edm.rank()}.pt"))  # of "parts" and "own"


if __name__ == "__main__":
    train(*sys.argv[1:])
