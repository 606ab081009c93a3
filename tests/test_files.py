"""What a user trains and brings: checkpoints, data, metrics, run folder, command line."""

import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, make_denoiser, randomise
from torch.testing import assert_close

import dmd_mnist as dmd
import edm_teacher as edm

# ---------------------------------------------------------------- checkpoints


def test_saved_denoiser_comes_back_bit_identical(tmp_path, tiny):
    edm.save_denoiser(tiny, tmp_path / "d.safetensors")
    again = edm.load_denoiser(tmp_path / "d.safetensors")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tiny.state_dict().items())
    assert again.model.config == tiny.model.config
    assert not again.training
    edm.save_denoiser(again, tmp_path / "e.safetensors")
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()


def test_half_precision_files_are_read_as_float32(tmp_path, tiny):
    edm.save_denoiser(tiny, tmp_path / "d.safetensors", torch.float16)
    again = edm.load_denoiser(tmp_path / "d.safetensors")
    for name, value in tiny.state_dict().items():
        assert again.state_dict()[name].dtype == torch.float32
        assert torch.equal(again.state_dict()[name], value.half().float())


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def resave(path, change):
    """The same file with other tensors or another configuration, and the right checksum."""
    tensors, config = edm.load_tensors(path)
    change(tensors, config)
    edm.save_tensors(path, tensors, config)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = {
    "flipped bit": (lambda p: flip(p, -5), "checksum"),
    "flipped bit in the header": (lambda p: flip(p, 20), "damaged|metadata|describe"),
    "truncated": (truncate, "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "text": (lambda p: p.write_text("hello"), "damaged"),
    "pickle": (lambda p: torch.save({"a": 1}, p), "damaged"),
    "foreign safetensors": (
        lambda p: safetensors.torch.save_file({"w": torch.ones(2)}, p),
        "not written by this project",
    ),
    "missing tensor": (
        lambda p: resave(p, lambda t, c: t.pop("model.map_layer0.bias")),
        "model.map_layer0.bias is missing",
    ),
    "extra tensor": (
        lambda p: resave(p, lambda t, c: t.update(more=torch.ones(1))),
        "more is unexpected",
    ),
    "other shape": (
        lambda p: resave(p, lambda t, c: t.update({"model.map_layer0.bias": torch.ones(3)})),
        r"model.map_layer0.bias has shape \(3,\)",
    ),
    "unknown keyword": (
        lambda p: resave(p, lambda t, c: c["network"].update(colour="red")),
        "does not describe a denoiser",
    ),
    "no network": (lambda p: resave(p, lambda t, c: c.pop("network")), "does not describe"),
    "hundreds of gigabytes": (
        lambda p: resave(p, lambda t, c: c["network"].update(model_channels=2**20)),
        "has shape|does not describe",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_bad_checkpoints_are_refused_in_one_sentence(tmp_path, tiny, kind):
    path = tmp_path / "d.safetensors"
    edm.save_denoiser(tiny, path)
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(ValueError, match=message) as error:
        edm.load_denoiser(path)
    assert "\n" not in str(error.value)


def test_every_flipped_bit_of_the_header_is_noticed(tmp_path, tiny):
    """The checksum covers the configuration, not only the tensors."""
    path = tmp_path / "d.safetensors"
    edm.save_denoiser(tiny, path)
    data = path.read_bytes()
    where = data.index(b"sha256")
    for position in range(8, where, 7):
        for bit in (1, 4):
            broken = bytearray(data)
            broken[position] ^= bit
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=r"damaged|not written"):
                edm.load_denoiser(path)


def test_any_denoiser_can_be_saved(tmp_path):
    """Not only those that train() built: EDMPrecond(SongUNet(...)) knows its own keywords."""
    torch.manual_seed(0)
    net = edm.EDMPrecond(edm.SongUNet(8, 3, model_channels=8, channel_mult=(1, 1), num_blocks=1))
    edm.save_denoiser(net, tmp_path / "d.safetensors")
    assert edm.load_denoiser(tmp_path / "d.safetensors").img_channels == 3


def test_networks_that_cannot_be_built_are_refused():
    for network in ({"img_resolution": 28, "channel_mult": (1, 1, 1)}, {"model_channels": 200}):
        with pytest.raises(ValueError, match="choose another"):
            edm.SongUNet(**({"img_resolution": 8, "img_channels": 1, "patch_size": 2} | network))


def test_absent_and_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        edm.load_denoiser(tmp_path / "absent.safetensors")
    (tmp_path / "net.zip").write_bytes(b"cos\nsystem\n(S'echo hacked'\ntR.")
    with pytest.raises(ValueError, match=r"only \.safetensors"):
        edm.load_denoiser(tmp_path / "net.zip")


def test_a_crash_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def crash(tmp):
        tmp.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        edm.write_atomic(path, crash)
    assert path.read_text() == "old"


# ---------------------------------------------------------------- data


def test_cifar10_binary_records(tmp_path):
    """1 label byte, then 1024 red, 1024 green, 1024 blue."""
    where = tmp_path / "cifar-10-batches-bin"
    where.mkdir()
    record = bytes([7]) + bytes([10] * 1024 + [20] * 1024 + [30] * 1023 + [31])
    (where / "test_batch.bin").write_bytes(record * 2)
    images, labels = edm.load_data("cifar10", tmp_path, train=False)
    assert images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [7, 7]
    assert images[0].flatten(1)[:, 0].tolist() == [10, 20, 30]
    assert images[1, 2, 31, 31] == 31


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
def test_missing_data_names_flag_folder_and_download(tmp_path, monkeypatch, data):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", refuse)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", refuse)
    with pytest.raises(ValueError, match="--data-dir") as error:
        edm.load_data(data, tmp_path / "here")
    assert str(tmp_path / "here") in str(error.value)
    assert "downloaded from http" in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_of_classes(tmp_path):
    """One sub-folder a class; squares of the wanted size; every 10th image is for testing."""
    from PIL import Image

    for name, colour in [("a", (255, 0, 0)), ("b", (0, 0, 255))]:
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (40, 20), colour).save(tmp_path / name / f"{i}.png")
    images, labels = edm.load_data(str(tmp_path), train=True, resolution=16, channels=3)
    assert images.shape == (18, 3, 16, 16)
    assert labels.tolist() == [0] * 9 + [1] * 9
    assert images[0, :, 8, 8].tolist() == [255, 0, 0]
    test, _ = edm.load_data(str(tmp_path), train=False, resolution=16, channels=1)
    assert test.shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="not mnist, cifar10"):
        edm.load_data(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="sub-folder"):
        edm.load_data(str(tmp_path / "a"))


def test_synthetic_shapes_are_drawn_and_reproducible():
    images, labels = edm.synthetic(512, 28, seed=3)
    assert images.shape == (512, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert torch.equal(images, edm.synthetic(512, 28, seed=3)[0])
    assert not torch.equal(images, edm.synthetic(512, 28, seed=4)[0])
    inside = images.float().mean((1, 2, 3)) / 255
    assert (inside > 0.01).all()
    assert (inside < 0.6).all()
    assert inside[labels == 1].mean() > inside[labels == 0].mean()  # square, disc


def test_images_survive_the_way_to_floats_and_back():
    images = torch.arange(256, dtype=torch.uint8)
    x = edm.to_float(images)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(edm.to_uint8(x), images)
    assert edm.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# ---------------------------------------------------------------- metrics


def gaussian_features(n, d, seed=0):
    """Features with mean exactly 0 and covariance exactly I."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_between_gaussians_is_the_closed_form():
    """|μ|² + Σ (a_i - b_i)² for covariances that commute; others by the 2 x 2 formula."""
    x = gaussian_features(500, 3)
    assert edm.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    scale, shift = torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, -1, 2]).double()
    assert edm.frechet_distance(x, x * scale + shift) == pytest.approx(6 + 0 + 1 + 4)
    a, b = x[:, :2] @ torch.tensor([[2.0, 1], [0, 1]]).double(), x[:, :2]
    product = a.T.cov()  # C_b = I: tr (C_a)^½ = sqrt(tr + 2 sqrt(det)) in two dimensions
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (product.trace() + 2 - 2 * root).item()
    assert edm.frechet_distance(a, b) == pytest.approx(expected)


def test_precision_and_recall_by_hand():
    """Real 0, 1, 2, 3 and k = 1: balls of radius 1. Fake 0.5, 0.6, 9: two of three are inside; the
    fakes' balls (radius 0.1, 0.1, 8.4) hold 1, 2 and 3 but not 0."""
    real = torch.tensor([[0.0], [1], [2], [3]])
    fake = torch.tensor([[0.5], [0.6], [9.0]])
    precision, recall = edm.precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)
    assert recall == pytest.approx(3 / 4)
    assert edm.coverage(real, fake, k=1) == pytest.approx(2 / 4)  # the balls of 0 and 1


def test_metric_rows_put_every_number_in_its_place(monkeypatch):
    """10 spread-out test images; fakes all at one of them: precise, no recall; labels count."""
    test = 10.0 * torch.arange(80.0)[:, None] * torch.ones(1, 64)
    tensors = dict(edm.Classifier(1, 4).state_dict())
    tensors |= {"test_features": test, "train_features": test + 1}
    settings = {"channels": 1, "resolution": 8, "classes": 4, "train_accuracy": 0.7}
    metric = edm.Metric("My Data", tensors, settings)
    fake = test[:1] + 0.01 * torch.randn(40, 64)
    monkeypatch.setattr(edm, "classify", lambda net, x, device: (torch.arange(len(x)) % 4, fake))
    row = metric(torch.zeros(40, 1, 8, 8), torch.tensor([0, 1, 0, 0]).repeat(10))
    assert row["accuracy"] == 0.5
    assert row["precision"] == 1.0
    assert row["recall"] < 0.1
    assert row["n"] == 40
    assert row["my_data_fd"] == pytest.approx(edm.frechet_distance(fake, test))
    assert row["coverage"] == pytest.approx(edm.coverage(test[:40], fake))
    assert metric.floor(20)["accuracy"] == 0.7
    assert metric.floor(20)["n"] == 20
    with pytest.raises(ValueError, match="is --data right"):
        metric.check(make_denoiser(TINY | {"img_channels": 3}))
    with pytest.raises(ValueError, match="is --data right"):
        metric.check(make_denoiser(TINY | {"label_dim": 5}))
    metric.check(make_denoiser(TINY))


def test_labels_are_as_frequent_as_in_the_training_data_at_every_length():
    tensors = dict(edm.Classifier(1, 4).state_dict())
    tensors |= {k: torch.zeros(64, 64) for k in ("test_features", "train_features")}
    settings = {"channels": 1, "resolution": 8, "classes": 4}

    def labels(n, label_dim=4, **counts):
        return edm.Metric("x", tensors, settings | counts).labels(n, label_dim)

    counts = torch.tensor([50, 10, 20, 0])
    drawn = torch.nn.functional.one_hot(labels(80, class_counts=counts.tolist()), 4)
    assert drawn.sum(0).tolist() == counts.tolist()
    expected = torch.arange(1, 81)[:, None] * counts / 80
    assert (drawn.cumsum(0) - expected).abs().max() < 1
    assert labels(6, class_counts=[7, 7, 7, 7]).tolist() == [0, 1, 2, 3, 0, 1]
    assert labels(6).tolist() == [0, 1, 2, 3, 0, 1]  # a file of before
    assert labels(6, label_dim=0) is None


def test_knn_in_chunks_equals_brute_force():
    x = torch.randn(2300, 3, generator=torch.Generator().manual_seed(0))
    distances = (x[:, None] - x[None]).square().sum(2).sqrt().sort(1).values
    assert_close(edm.knn_radius(x, 3), distances[:, 3], atol=1e-3, rtol=1e-3)


def test_fid_compares_samples_with_all_training_images(monkeypatch):
    """torch-fidelity gets uint8 RGB of both, and a name to keep the training images' numbers."""
    seen = {}

    def calculate_metrics(**how):
        seen.update(how)
        return {"frechet_inception_distance": 7.0}

    stub = SimpleNamespace(calculate_metrics=calculate_metrics)
    monkeypatch.setitem(sys.modules, "torch_fidelity", stub)
    x = torch.linspace(-1, 1, 3 * 28 * 28).reshape(3, 1, 28, 28)
    assert edm.fid(x, "synthetic", "somewhere") == 7.0
    images, _ = edm.load_data("synthetic")
    assert torch.equal(seen["input2"][5], images[5].expand(3, -1, -1))
    assert torch.equal(seen["input1"][2], edm.to_uint8(x[2]).expand(3, -1, -1))
    assert (len(seen["input1"]), len(seen["input2"])) == (3, len(images))
    assert seen["input2_cache_name"] == f"synthetic-train-{len(images)}"
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        edm.fid(x, "synthetic", "somewhere")


def test_equal_distributions_have_the_expected_coverage():
    """E[coverage] = 1 - 2^-k for two equal sets of the same size: 0.969 for k = 5."""
    g = torch.Generator().manual_seed(0)
    real, fake = torch.randn(2, 3000, 4, generator=g)
    assert edm.coverage(real, fake) == pytest.approx(1 - 2**-5, abs=0.01)


def test_dropped_modes_lower_recall_and_precision_stays():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 4, generator=g) + 10 * torch.arange(2).repeat(1000)[:, None]
    fake = torch.randn(1000, 4, generator=g)
    precision, recall = edm.precision_recall(real, fake)
    assert precision > 0.85
    assert recall < 0.5


# ---------------------------------------------------------------- shipped assets


@pytest.mark.skipif(not (edm.ASSETS / "mnist_metric.safetensors").exists(), reason="no assets")
def test_shipped_metric_has_what_the_verdict_needs():
    """99.3 % test accuracy, 10,000 features each, and a floor that is small."""
    metric = edm.get_metric("mnist", "nowhere", "nowhere")
    assert metric.config["test_accuracy"] >= 0.993
    assert metric.test.shape == metric.train.shape == (10000, 64)
    assert metric.config["class_counts"][:2] == [5923, 6742]
    assert sum(metric.config["class_counts"]) == 60000
    floor = metric.floor(2000)
    assert floor["mnist_fd"] < 0.1
    assert floor["n"] == 2000
    noise = metric(torch.randn(200, 1, 28, 28), torch.zeros(200, dtype=torch.long))
    assert noise["mnist_fd"] > 100 * floor["mnist_fd"]


# ---------------------------------------------------------------- run folder


def config(tmp_path, **changes):
    return dmd.Config(device="cpu", out=str(tmp_path / "run"), **changes)


def one_step(run, cfg, network):
    for step in run.loop(cfg.steps, network=network):
        run.log(step, {"a": 1.0})


def test_the_printed_command_resumes_the_run(tmp_path, capsys):
    """Options that are not the defaults are in it, quoted."""
    cfg = config(tmp_path, steps=9, batch=7, teacher="a b.safetensors", resume=True)
    words = shlex.split(edm.Run(cfg, "dmd_mnist").command())
    assert words[:2] == ["python", "dmd_mnist.py"]
    again = edm.parse_config(dmd.Config, words[2:])
    assert again == cfg


def test_other_options_are_refused_before_the_first_checkpoint_too(tmp_path):
    """Pairs that another teacher or seed made are not used silently."""
    edm.Run(config(tmp_path), "dmd_mnist")
    (tmp_path / "run" / "pairs.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="add --resume"):
        edm.Run(config(tmp_path, seed=1), "dmd_mnist")
    with pytest.raises(ValueError, match="--seed 0, not 1"):
        edm.Run(config(tmp_path, seed=1, resume=True), "dmd_mnist")


def test_checkpoints_of_other_networks_and_too_few_steps_are_refused(tmp_path):
    cfg = config(tmp_path, steps=2, save_every=1)
    one_step(edm.Run(cfg, "dmd_mnist"), cfg, torch.nn.Linear(1, 1))
    cfg = config(tmp_path, steps=2, save_every=1, resume=True)
    with pytest.raises(ValueError, match="another shape"):
        one_step(edm.Run(cfg, "dmd_mnist"), cfg, torch.nn.Linear(2, 1))
    cfg.steps = 1
    with pytest.raises(ValueError, match="at step 2 already"):
        one_step(edm.Run(cfg, "dmd_mnist"), cfg, torch.nn.Linear(1, 1))


def test_a_used_folder_needs_resume_and_the_same_options(tmp_path):
    cfg = config(tmp_path, steps=1, save_every=1)
    one_step(edm.Run(cfg, "dmd_mnist"), cfg, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="add --resume"):
        edm.Run(cfg, "dmd_mnist")
    with pytest.raises(ValueError, match=r"belongs to dmd_mnist.py, not other.py"):
        edm.Run(config(tmp_path, resume=True), "other")
    with pytest.raises(ValueError, match="--lr-fake"):
        edm.Run(config(tmp_path, resume=True, lr_fake=0.5), "dmd_mnist")
    assert edm.Run(config(tmp_path, resume=True, steps=9), "dmd_mnist").start == 1


def test_resume_in_an_empty_folder_starts_fresh(tmp_path):
    assert edm.Run(config(tmp_path, resume=True), "dmd_mnist").start == 0


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "dmd_mnist-lr3").mkdir(parents=True)  # a user's own name
    for k in range(2):
        run = edm.Run(dmd.Config(), "dmd_mnist")
        assert run.folder.name == f"dmd_mnist-{k}"
    assert edm.Run(dmd.Config(resume=True), "dmd_mnist").folder.name == "dmd_mnist-1"
    assert edm.Run(dmd.Config(), "other").folder.name == "other-0"


def test_damaged_training_checkpoint_is_named(tmp_path):
    cfg = config(tmp_path, steps=1, save_every=1)
    one_step(edm.Run(cfg, "dmd_mnist"), cfg, torch.nn.Linear(1, 1))
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
        edm.Run(config(tmp_path, resume=True), "dmd_mnist")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="choose another --out"):
        edm.Run(dmd.Config(out=str(tmp_path / "file" / "run")), "dmd_mnist")


def test_the_log_of_lost_steps_is_cut(tmp_path):
    """Lines after the checkpoint, and a half-written one, go; the others stay."""
    cfg = config(tmp_path, steps=3, save_every=3)
    one_step(edm.Run(cfg, "dmd_mnist"), cfg, torch.nn.Linear(1, 1))
    log = tmp_path / "run" / "log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 4, "a": 1.0}\n{"step": 5, "a"')
    edm.Run(config(tmp_path, resume=True), "dmd_mnist")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1]


def test_signals_save_and_say_so(tmp_path, capsys):
    """SIGTERM within a step: the step is finished, saved, and the program ends with 128 + 15."""
    cfg = config(tmp_path, steps=9, save_every=100)
    before = signal.getsignal(signal.SIGTERM)

    def steps():
        for step in edm.Run(cfg, "dmd_mnist").loop(9, network=torch.nn.Linear(1, 1)):
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        steps()
    assert stop.value.code == 128 + 15
    assert "saved at step 4" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert edm.Run(config(tmp_path, resume=True), "dmd_mnist").start == 4


def test_kill_9_and_resume_ends_bit_identical(tmp_path):
    """Killed at random moments - while pairs are made, then between checkpoints - and resumed:
    generator and log are those of a calm run."""
    torch.manual_seed(0)
    teacher = randomise(make_denoiser(TINY | {"img_resolution": 28}))
    edm.save_denoiser(teacher, tmp_path / "t.safetensors")
    tensors = dict(edm.Classifier(1, 4).state_dict())
    tensors |= {k: torch.randn(64, 64) for k in ("test_features", "train_features")}
    settings = {"channels": 1, "resolution": 28, "classes": 4, "train_accuracy": 0.5}
    for name in ("calm", "killed"):
        edm.save_tensors(tmp_path / name / "metric.safetensors", tensors, settings)

    def start(name):
        command = [sys.executable, str(ROOT / "dmd_mnist.py"), "--data", "synthetic", "--resume"]
        command += ["--teacher", str(tmp_path / "t.safetensors"), "--out", str(tmp_path / name)]
        command += ["--steps", "40", "--save-every", "5", "--pairs", "32", "--eval-n", "32"]
        command += ["--batch", "8", "--pair-steps", "2", "--threads", "1"]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("calm").wait() == 0
    checkpoint, pick = tmp_path / "killed" / "checkpoint.pt", random.Random(1)
    process = start("killed")
    while process.poll() is None and not (tmp_path / "killed" / "log.jsonl").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not checkpoint.exists()
    for _ in range(2):
        process, seen = start("killed"), checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while process.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen:
                time.sleep(pick.random() / 4)
                process.kill()
                break
            time.sleep(0.005)
        process.wait()
    assert start("killed").wait() == 0
    a, b = (edm.load_tensors(tmp_path / n / "generator.safetensors")[0] for n in ("calm", "killed"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [(tmp_path / n / "log.jsonl").read_text() for n in ("calm", "killed")]
    assert logs[0] == logs[1]
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert result["resumed_from"] > 0


# ---------------------------------------------------------------- command line


@dataclass
class Options:
    steps: int = 3  # how many; 100 % of them
    lr: float = 0.5  # learning rate
    name: str = "x"  # a name
    fast: bool = False  # be quick


def test_flags_come_from_the_dataclass(capsys):
    cfg = edm.parse_config(Options, ["--steps", "7", "--fast", "--lr", "1e-3"])
    assert cfg == Options(steps=7, lr=1e-3, fast=True)
    with pytest.raises(SystemExit):
        edm.parse_config(Options, ["--help"])
    assert "how many; 100 % of them [3]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        edm.parse_config(Options, ["--step", "7"])  # no silent abbreviations


@pytest.mark.parametrize("text", ["3,x", "11", "-1"])
def test_bad_labels_are_refused(text):
    with pytest.raises(ValueError, match="like"):
        edm.sample_labels(text, 4, 10)


def test_labels_repeat_and_default_to_all_in_turn():
    assert edm.sample_labels("3,1,4", 5, 10).tolist() == [3, 1, 4, 3, 1]
    assert edm.sample_labels("", 5, 3).tolist() == [0, 1, 2, 0, 1]
    assert edm.sample_labels("", 5, 0) is None


def test_unknown_device_is_refused():
    with pytest.raises(ValueError, match="--device"):
        edm.set_up(dmd.Config(device="abacus"))


# ---------------------------------------------------------------- edm_teacher.py as a script


def test_edm_teacher_trains_resumes_evaluates_and_samples(tmp_path, tiny_teacher, capsys):
    """Stopped at step 3 and resumed = trained in one go; --evaluate with one step is generate()."""
    tiny = {"data": "synthetic", "model_channels": 8, "channel_mult": "1", "batch": 8, "steps": 6}
    tiny |= {"eval_n": 20, "sample_steps": 2, "device": "cpu", "save_every": 3}

    def run(name, **options):
        return edm.main(edm.Config(**(tiny | options), out=str(tmp_path / name)))

    result = run("a")
    assert result["metrics"]["teacher"]["nfe"] == 3
    original = edm.ema_update

    def stop(ema, network, decay, step):
        original(ema, network, decay, step)
        if step == 5:
            raise KeyboardInterrupt

    edm.ema_update = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            run("b")
    finally:
        edm.ema_update = original
    run("b", resume=True, half=True)
    whole = edm.load_tensors(tmp_path / "a" / "teacher.safetensors")[0]
    parts = edm.load_tensors(tmp_path / "b" / "teacher.safetensors")[0]
    assert all(torch.equal(whole[k].half(), v) for k, v in parts.items())
    path = str(tmp_path / "a" / "teacher.safetensors")
    result = run("c", evaluate=path, sample_steps=1)
    assert result["metrics"]["generator"]["nfe"] == 1
    assert (tmp_path / "c" / "samples.png").exists()
    options = {"n": 3, "labels": "2", "sample_steps": 2, "device": "cpu"}
    edm.main(edm.Config(sample=path, out=str(tmp_path / "s"), **options))
    assert (tmp_path / "s" / "sampled.png").exists()
    more = run("a", resume=True, steps=8)  # goes on, and its verdict is the new one
    assert (more["config"]["steps"], more["resumed_from"]) == (8, 6)
    assert run("a", resume=True, steps=8) == more


def test_a_teacher_can_start_from_another(tmp_path, tiny_teacher):
    """--init: with a learning rate of 0 the result is that file's network; it has to fit."""
    options = {"data": "synthetic", "init": str(tiny_teacher), "lr": 0.0, "steps": 1, "batch": 4}
    options |= {"eval_n": 20, "sample_steps": 2, "device": "cpu", "out": str(tmp_path / "a")}
    edm.main(edm.Config(**options))
    before, after = (
        edm.load_tensors(p)[0] for p in (tiny_teacher, tmp_path / "a" / "teacher.safetensors")
    )
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    torch.manual_seed(0)
    edm.save_denoiser(make_denoiser(TINY), tmp_path / "small.safetensors")
    options |= {"init": str(tmp_path / "small.safetensors"), "out": str(tmp_path / "b")}
    with pytest.raises(ValueError, match=r"--init .*small.safetensors has .*\(8, 1, 4\)"):
        edm.main(edm.Config(**options))
