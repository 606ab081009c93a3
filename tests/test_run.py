"""What a run keeps and refuses: files, options, command line, run folder, checkpoint, resume."""

import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Calls
from safetensors.torch import save_file
from torch import nn

import dmd2_cifar
import dmd_mnist as dmd
import edm_teacher as edm
import f_distill
import ladd

# ---------------------------------------------------------------- files


def resave(change):
    """Damage: the same file with other tensors or another configuration."""

    def damage(path):
        tensors, config = edm.load_tensors(path)
        change(tensors, config)
        edm.save_tensors(path, tensors, config)

    return damage


def network(**changes):
    return resave(lambda tensors, config: config["network"].update(changes))


BIAS = "model.map_layer0.bias"
DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "damaged"),
    "flipped bits": (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "text": (lambda p: p.write_text("hello"), "damaged"),
    "pickle": (lambda p: torch.save({"a": 1}, p), "damaged"),
    "of others": (lambda p: save_file({"w": torch.ones(2)}, p), "not a file of ours"),
    "missing": (resave(lambda t, c: t.pop(BIAS)), f"{BIAS} has shape None, expected"),
    "more": (resave(lambda t, c: t.update(more=torch.ones(1))), r"\(1,\), expected None"),
    "shape": (resave(lambda t, c: t.update({BIAS: torch.ones(3)})), rf"{BIAS} has shape \(3,\)"),
    "no network": (resave(lambda t, c: c.pop("network")), "does not describe a denoiser"),
    "unknown keyword": (network(colour="red"), "does not describe a denoiser"),
    "gigabytes": (network(model_channels=2**20), "has shape"),
    "hours": (network(num_blocks=10**9), "more blocks than tensors"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_files_are_refused_in_one_sentence(tmp_path, tiny, kind):
    """Damaged, no file of ours, other names or shapes, a network too large to be true."""
    path, (damage, message) = tmp_path / "d.safetensors", DAMAGE[kind]
    edm.save_denoiser(tiny, path)
    damage(path)
    with pytest.raises(edm.UserError, match=message) as error:
        edm.load_denoiser(path)
    assert "\n" not in str(error.value)


def test_absent_files_and_those_of_others_are_named(tmp_path):
    """NVlabs' pickles and FastGen's .pth are read elsewhere, never executed."""
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.safetensors"):
        edm.load_denoiser(tmp_path / "absent.safetensors")
    for name in ("net.pkl", "net.pth"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'echo hacked'\ntR.")
        with pytest.raises(ValueError, match=r"backbones\.edm_files"):
            edm.load_denoiser(tmp_path / name)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path):
    """A temporary file, then a new name."""
    path = tmp_path / "file"
    path.write_text("old")

    def crash(tmp):
        tmp.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edm.write_atomic(path, crash)
    assert path.read_text() == "old"
    with pytest.raises(edm.UserError, match=r"Cannot write .*choose another --out"):
        edm.save_tensors(path / "inside", {})


# ---------------------------------------------------------------- options


WRONG = {
    dmd.Config: {"steps": -1, "ratio": -1, "pairs": 0, "pair_batch": 0, "clip": 0.0, "lr_fake": -1}
    | {"weighting": "papr", "regression": "l3"},
    dmd2_cifar.Config: {"multistep_input": "real", "gan_noise": 1.1, "gan_weight": -1, "beta2": 1},
    f_distill.Config: {"f": "fkl", "ratio_upper": 0.5, "ratio": 0, "discriminator_weight": 0},
    ladd.Config: {"loss": "wgan", "real": "fake", "noise_std": -1, "r1_features": -1, "r1_std": 0},
    edm.Config: {"label_dropout": 1.1, "s_churn": -1.0},
}


@pytest.mark.parametrize("config", WRONG, ids=lambda config: config.__module__)
def test_wrong_options_are_refused_when_they_are_set(config):
    """One sentence that names the option and its range or choices, before anything is computed."""
    rate = "lr" if config is edm.Config else "lr_generator"
    for name, value in (WRONG[config] | {"batch": 0, "ema": 1.0, rate: math.nan}).items():
        flag, words = "--" + name.replace("_", "-"), "(must be from|choose|nothing would train)"
        with pytest.raises(edm.UserError, match=f"{flag} {value}.*{words}"):
            config(**{name: value})
    with pytest.raises(edm.UserError, match=r"^--ema 2.0: must be from 0 to 1\.$"):
        config(ema=2.0)
    with pytest.raises(edm.UserError, match=r"^--f no: choose rkl, kl, js, sf, sh, jf, neyman\.$"):
        f_distill.Config(f="no")


def test_an_unknown_device_is_refused():
    """In one sentence with its option."""
    with pytest.raises(edm.UserError, match="--device abacus cannot be used"):
        edm.set_up(dmd.Config(device="abacus"))


def test_labels_repeat_and_default_to_all_in_turn():
    """3,1,4 again and again; no labels: 0, 1, 2, ...; None where there are no classes."""
    assert edm.class_labels(5, 10, "3,1,4").tolist() == [3, 1, 4, 3, 1]
    assert edm.class_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert edm.class_labels(5, 0) is None
    for text in ("3,x", "11", "-1", "10"):
        with pytest.raises(edm.UserError, match="expected numbers"):
            edm.class_labels(4, 10, text)


HELP = """
import pathlib, runpy, sys
for words in [*sys.argv[1:], "dmd_mnist --steps -1", "tools.evaluate no.safetensors"]:
    name, *sys.argv[1:] = words.split()
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        print("END", name, stop.code)
"""


def test_help_and_errors_of_every_program_are_readable_in_ascii_and_through_a_pipe(tmp_path):
    """σ becomes a ?; a wrong option or file is a sentence, without the path of a traceback."""
    names = [p.stem for p in ROOT.glob("*.py") if "\nclass Config" in p.read_text("utf-8")]
    names += [f"tools.{name}" for name in ("evaluate", "mixture", "benchmark dmd2_cifar")]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "100"}
    command = [sys.executable, "-c", HELP, *(f"{name} --help" for name in names)]
    environment = os.environ | ascii_only | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True)
    out, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    for name in names:
        assert f"END {name.split()[0]} 0" in out
    assert "learning rate of the generator; paper 5e-5 (default: 0.001)" in out
    assert "DMD: a diffusion model of MNIST" in out
    assert "--steps -1: must be from 0" in errors
    assert "END tools.evaluate evaluate.py: There is no file no.safetensors." in out
    assert "Traceback" not in errors


# ---------------------------------------------------------------- the folder


def config(tmp_path, **changes):
    return dmd.Config(**{"device": "cpu", "steps": 2, "out": str(tmp_path / "run")} | changes)


def go(cfg, network=None, script="dmd_mnist"):
    """A run of `steps` steps that does nothing but keep its books."""
    run, trained = edm.Run(cfg, script), {"network": (network or nn.Linear(1, 1), None)}
    for step in run.bar(run.load(trained), cfg.steps):
        run.log(step, {"a": step}, every=1)
        run.save(step, trained)
    return run


def test_a_used_folder_needs_resume_and_the_same_options(tmp_path):
    """Other numbers of steps may be asked for, and other places; nothing else."""
    go(config(tmp_path))
    for changes, script, message in [
        ({}, "dmd_mnist", "holds a run: add --resume"),
        ({"resume": True}, "ladd", r"run with dmd_mnist\.py"),
        ({"resume": True, "lr_fake": 0.5}, "dmd_mnist", "--lr-fake 0.001, not 0.5"),
        ({"resume": True, "seed": 1}, "dmd_mnist", "--seed 0, not 1"),
        ({"resume": True, "teacher": "x"}, "dmd_mnist", "--teacher , not x"),
    ]:
        with pytest.raises(edm.UserError, match=message):
            edm.Run(config(tmp_path, **changes), script)
    assert go(config(tmp_path, resume=True, steps=9, save_every=7)).resumed_from == 2


def test_other_options_are_refused_before_the_first_checkpoint_too(tmp_path):
    """Pairs are made once, and those of another seed are not used silently."""
    edm.Run(config(tmp_path), "dmd_mnist")
    assert not (tmp_path / "run").exists()  # a refused start leaves nothing
    edm.Run(config(tmp_path), "dmd_mnist").once("pairs.safetensors", lambda: {"z": torch.ones(1)})
    run = edm.Run(config(tmp_path, resume=True), "dmd_mnist")
    assert run.once("pairs.safetensors", lambda: {"z": torch.zeros(1)})["z"] == 1
    with pytest.raises(edm.UserError, match="--seed 0, not 1"):
        edm.Run(config(tmp_path, seed=1, resume=True), "dmd_mnist")


def test_step_1_draws_the_same_whatever_came_before(tmp_path):
    """Pairs made now or read from a file, a metric trained or not: load() seeds anew."""
    wanted = torch.rand(3, generator=torch.Generator().manual_seed(5))
    edm.Run(config(tmp_path, seed=5), "dmd_mnist").load({"of": (nn.Linear(1, 1), None)})
    assert torch.equal(torch.rand(3), wanted)
    run = edm.Run(config(tmp_path, seed=5, resume=True), "dmd_mnist")
    torch.rand(7)
    run.load({})
    assert torch.equal(torch.rand(3), wanted)


def test_runs_are_numbered(tmp_path, monkeypatch):
    """The next free number; with --resume the last one that has begun, else a fresh start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "dmd_mnist-lr3").mkdir(parents=True)  # a user's own name
    for k in range(2):
        assert go(dmd.Config(steps=1)).folder.name == f"dmd_mnist-{k}"
    (tmp_path / "runs" / "dmd_mnist-2").mkdir()
    again = go(dmd.Config(steps=1, resume=True))
    assert (again.folder.name, again.resumed_from) == ("dmd_mnist-1", 1)
    fresh = edm.Run(dmd.Config(resume=True), "ladd")
    assert (fresh.folder.name, fresh.load({})) == ("ladd-0", 0)


class Code:
    """In a pickle: makes a folder where it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_checkpoints_are_refused_in_one_sentence(tmp_path):
    """Damaged, of other networks, of the version before, or with code, which never runs."""
    path = go(config(tmp_path)).path("checkpoint.pt")
    whole, old = path.read_bytes(), {"step": 1, "parts": {}, "torch_rng": torch.get_rng_state()}
    for damage, features in [
        (lambda: path.write_bytes(whole[:500]), 1),
        (lambda: path.write_bytes(whole), 2),
        (lambda: torch.save(old, path), 1),
        (lambda: torch.save(Code(tmp_path / "ran"), path), 1),
    ]:
        damage()
        with pytest.raises(edm.UserError, match=r"checkpoint.pt is damaged, of an older") as error:
            go(config(tmp_path, resume=True), nn.Linear(features, 1))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_the_log_of_lost_steps_is_cut(tmp_path):
    """Lines after the checkpoint, and a half-written one, go; the others stay."""
    run = go(config(tmp_path, steps=3))
    with run.path("log.jsonl").open("a") as file:
        file.write('{"step": 4, "a": 1.0}\n{"step": 5, "a"')
    log = go(config(tmp_path, steps=3, resume=True)).read_log()
    assert [line["a"] for line in log] == [1, 2, 3]


def test_the_result_tells_how_it_was_made(tmp_path, monkeypatch, capsys):
    """Command, options, seed, versions, and the seconds of all parts of a resumed run."""
    monkeypatch.setattr(sys, "argv", ["somewhere/dmd_mnist.py", "--seed", "3"])
    result = go(config(tmp_path, seed=3)).finish({"generator": {"fd": 0.25}})
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["command"] == ["dmd_mnist.py", "--seed", "3"]
    assert result["config"]["lr_fake"] == 0.001
    assert (result["seed"], result["versions"]["torch"]) == (3, torch.__version__)
    assert "0.25" in capsys.readouterr().out
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    torch.save(state | {"seconds": 1000.0}, tmp_path / "run" / "checkpoint.pt")
    again = go(config(tmp_path, seed=3, resume=True)).finish({})
    assert 1000 <= again["seconds"] < 1100


# ---------------------------------------------------------------- training runs


def test_kill_9_and_resume_ends_bit_identical(tmp_path, tiny_teacher):
    """Killed between two checkpoints and resumed: generator and log are those of a calm run."""
    how = {"data": "synthetic", "teacher": str(tiny_teacher), "device": "cpu", "eval_n": 0}
    how |= {"threads": 1, "steps": 20, "save_every": 5, "batch": 4}
    how |= {"pairs": 16, "pair_batch": 4, "pair_steps": 2}
    threads = torch.get_num_threads()
    dmd.main(dmd.Config(**how, out=str(tmp_path / "calm")))
    command = [sys.executable, str(ROOT / "dmd_mnist.py"), "--out", str(tmp_path / "killed")]
    for name, value in how.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process, checkpoint = subprocess.Popen(command, **quiet), tmp_path / "killed" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() != 0  # it had steps left
    dmd.main(dmd.Config(**how, out=str(tmp_path / "killed"), resume=True))
    torch.set_num_threads(threads)  # for other tests
    assert 0 < json.loads((tmp_path / "killed/result.json").read_text())["resumed_from"] < 20
    assert not [*(tmp_path / "calm").glob("*.tmp")]
    for name in ("generator.safetensors", "log.jsonl"):
        assert (tmp_path / "calm" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_edm_teacher_trains_resumes_and_evaluates(tmp_path, tiny_teacher, monkeypatch):
    """Stopped at step 5 and resumed = trained in one go; --half rounds the file alone."""
    tiny = {"data": "synthetic", "model_channels": 8, "channel_mult": "1", "batch": 8, "steps": 6}
    tiny |= {"eval_n": 20, "sample_steps": 2, "device": "cpu", "save_every": 3}

    def run(name, **changes):
        return edm.main(edm.Config(**(tiny | changes), out=str(tmp_path / name)))

    def stop(self, step, values, **how):
        if step == 5:
            raise KeyboardInterrupt

    assert run("a")["metrics"]["teacher"]["nfe"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(edm.Run, "log", stop)
        with pytest.raises(KeyboardInterrupt):
            run("b")
    assert run("b", resume=True, half=True)["resumed_from"] == 3
    a, b = (edm.load_tensors(tmp_path / name / "teacher.safetensors")[0] for name in "ab")
    assert all(torch.equal(a[k].half(), v) for k, v in b.items())


def test_options_of_the_sampler_reach_it(tiny, tmp_path, monkeypatch):
    """--sample-steps, --guidance, --s-churn, --labels and --n, in edm_teacher.py --sample."""
    seen = Calls(monkeypatch, edm, "heun_sampler")
    edm.save_denoiser(tiny, tmp_path / "t.safetensors")
    wanted = {"sample_steps": 3, "guidance": 2.0, "s_churn": 1.5, "n": 3, "labels": "2,1"}
    edm.main(edm.Config(sample=str(tmp_path / "t.safetensors"), out=str(tmp_path), **wanted))
    (call,) = seen
    assert (call.steps, call.guidance, call.s_churn) == (3, 2.0, 1.5)
    assert call.labels.tolist() == [2, 1, 2]
    assert (tmp_path / "sampled.png").exists()
