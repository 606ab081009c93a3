"""What goes wrong around a run: two at once, other inputs, damaged files, pictures that fail."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import dmd_mnist as dmd
import edm_teacher as edm


@pytest.fixture
def options(tiny_teacher, tmp_path):
    """Of a run that takes a second."""
    few = {"data": "synthetic", "teacher": str(tiny_teacher), "steps": 2, "batch": 4, "eval_n": 0}
    return few | {"pairs": 8, "pair_batch": 4, "pair_steps": 2, "out": str(tmp_path / "run")}


def test_a_folder_belongs_to_one_process(tmp_path):
    """The second is refused in one sentence; the lock ends with the first."""
    program = "import sys, edm_teacher as edm, dmd_mnist as dmd\n"
    program += "edm.run_command(lambda cfg: edm.Run(cfg, 'dmd_mnist').begin(), dmd.Config, 'x')"
    command = [sys.executable, "-c", program, "--out", str(tmp_path / "run"), "--resume"]
    how = {"cwd": ROOT, "capture_output": True, "text": True}
    run = edm.Run(dmd.Config(out=str(tmp_path / "run")), "dmd_mnist")
    run.begin()
    second = subprocess.run(command, **how)
    assert (second.returncode, "Another process trains in" in second.stderr) == (1, True)
    del run
    assert subprocess.run(command, **how).returncode == 0


def test_what_an_option_names_is_part_of_the_run(tmp_path):
    """Another teacher under the same name, a folder with one class more: no --resume."""
    teacher, data = tmp_path / "teacher.safetensors", tmp_path / "data"
    (data / "cats").mkdir(parents=True)
    teacher.write_bytes(b"one")
    named = {"teacher": str(teacher), "data": str(data), "out": str(tmp_path / "run")}
    edm.Run(dmd.Config(**named), "dmd_mnist").begin()
    edm.Run(dmd.Config(**named, resume=True), "dmd_mnist")
    for change, undo, name in [
        (lambda: teacher.write_bytes(b"two"), lambda: teacher.write_bytes(b"one"), "teacher"),
        (lambda: (data / "dogs").mkdir(), lambda: (data / "dogs").rmdir(), "data"),
    ]:
        change()
        with pytest.raises(edm.UserError, match=f"another content of --{name}"):
            edm.Run(dmd.Config(**named, resume=True), "dmd_mnist")
        undo()


def test_damaged_files_of_a_run_are_named(options, tmp_path):
    """run.json, or pairs that were made: the sentence says what to delete."""
    dmd.main(dmd.Config(**options))
    for name in ("pairs.safetensors", "run.json"):
        (tmp_path / "run" / name).write_bytes(b"{")
        with pytest.raises(edm.UserError, match=f"(?i){name} is damaged.*delete it"):
            dmd.main(dmd.Config(**options, resume=True))


def test_a_lost_generator_is_made_again_from_the_checkpoint(options, tmp_path, capsys):
    dmd.main(dmd.Config(**options))
    file = tmp_path / "run" / "generator.safetensors"
    before = file.read_bytes()
    file.unlink()
    dmd.main(dmd.Config(**options, resume=True))
    assert file.read_bytes() == before
    assert f"The run in {tmp_path / 'run'} goes on." in capsys.readouterr().out


def test_a_picture_that_fails_is_a_warning(options, tmp_path, capsys, monkeypatch):
    """The checkpoint is written before it, the run goes on after it."""

    def fail(path, *images, **how):
        assert (tmp_path / "run" / "checkpoint.pt").exists()
        raise RuntimeError("no font")

    monkeypatch.setattr(edm, "save_grid", fail)
    dmd.main(dmd.Config(**options))
    assert "Warning: no picture (RuntimeError: no font)." in capsys.readouterr().out
    assert (tmp_path / "run" / "generator.safetensors").exists()


def test_titles_are_plain_text_and_the_backend_does_not_matter(tmp_path):
    """A prompt with $ and \\frac, under a notebook's MPLBACKEND."""
    program = "import sys, torch; from tools import plot; "
    program += "plot.save_rows(sys.argv[1], {r'a $ \\frac{ _ cat': torch.zeros(2, 1, 4, 4)})"
    command = [sys.executable, "-c", program, str(tmp_path / "a.png")]
    for backend in ("module://matplotlib_inline.backend_inline", "tkagg"):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MPLBACKEND": backend})
        assert done.returncode == 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: dmd.Config(labels="3"), "--labels is for --sample"),
        (lambda: dmd.Config(clip=-1.0), "--clip -1.0: must be"),
        (lambda: dmd.Config(regression_weight=-1.0), "--regression-weight -1.0: must be"),
        (lambda: dmd.Config(guidance=float("nan")), "--guidance nan: must be"),
        (lambda: edm.BackboneConfig(prompts="p.txt"), "--prompts, --size and --lora-rank are for"),
        (lambda: edm.BackboneConfig(lora_rank=4), "--prompts, --size and --lora-rank are for"),
        (lambda: edm.Config(model_channels=0), "--model-channels 0: must be"),
        (lambda: edm.Config(label_dropout=5.0), "--label-dropout 5.0: must be"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(config, words):
    with pytest.raises(edm.UserError, match=words):
        config()


def test_every_kind_of_dropout_is_off_and_buffers_are_averaged_by_copy():
    """A generator has no Dropout2d; a BatchNorm's running mean is in the average, too."""
    layers = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)
    denoiser = edm.Denoiser(nn.Sequential(*layers), (1, 4, 4))
    network, ema = edm.trainable_copy(denoiser), edm.trainable_copy(denoiser)
    assert [layer.p for layer in network.model[2:]] == [0, 0]
    network.model(torch.ones(2, 1, 4, 4))
    edm.ema_update(ema, network, 0.9, 10)
    assert ema.model[1].running_mean == network.model[1].running_mean != 0


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny, tmp_path, number):
    with torch.no_grad():
        tiny.model.map_layer0.bias[1] = number
    edm.save_denoiser(tiny, tmp_path / "t.safetensors")
    with pytest.raises(edm.UserError, match=r"map_layer0\.bias has numbers that are not finite"):
        edm.load_denoiser(tmp_path / "t.safetensors")


def test_prefixes_of_compile_and_ddp_are_stripped(tiny, tmp_path):
    tensors = {f"module._orig_mod.{name}": v for name, v in tiny.state_dict().items()}
    config = {"sigma_data": 0.5, "network": tiny.model.config}
    edm.save_tensors(tmp_path / "t.safetensors", tensors, config)
    loaded = edm.load_denoiser(tmp_path / "t.safetensors").state_dict()
    assert all(torch.equal(v, loaded[name]) for name, v in tiny.state_dict().items())
