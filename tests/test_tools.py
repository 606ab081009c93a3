"""What is used beside a method: data, metrics, evaluation, benchmark, pictures, the mixture."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, Gaussian, Spy, make_denoiser, tiny_metric
from PIL import Image
from torch.testing import assert_close

import dmd2_cifar
import edm_teacher as edm
from tools import benchmark, data, evaluate, metrics, mixture, plot, table

D64 = torch.float64

# ---------------------------------------------------------------- data


def test_cifar10_binary_records(tmp_path):
    """1 label byte, then 1024 red, 1024 green, 1024 blue."""
    path = tmp_path / "cifar-10-batches-bin/test_batch.bin"
    path.parent.mkdir()
    path.write_bytes(bytes([7] + [10] * 1024 + [20] * 1024 + [30] * 1023 + [31]) * 2)
    images, labels = data.load_data("cifar10", tmp_path, train=False)
    assert (images.shape, labels.tolist()) == ((2, 3, 32, 32), [7, 7])
    assert images[0].flatten(1)[:, 0].tolist() == [10, 20, 30]
    assert images[1, 2, 31, 31] == 31


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_data_name_option_folder_and_download(tmp_path, monkeypatch, name):
    """One sentence."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    for module in ("utils", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", refuse)
    with pytest.raises(edm.UserError, match=r"downloaded from http.*--data-dir") as error:
        data.load_data(name, tmp_path / "here")
    assert str(tmp_path / "here") in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_of_classes(tmp_path):
    """One sub-folder a class; squares of the wanted size; every 10th image is for testing."""
    for name, colour in [("a", (255, 0, 0)), ("b", (0, 0, 255))]:
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (40, 20), colour).save(tmp_path / name / f"{i}.png")
    images, labels = data.load_data(str(tmp_path), train=True, resolution=16, channels=3)
    assert images.shape == (18, 3, 16, 16)
    assert labels.tolist() == [0] * 9 + [1] * 9
    assert images[0, :, 8, 8].tolist() == [255, 0, 0]
    test, _ = data.load_data(str(tmp_path), train=False, resolution=16, channels=1)
    assert test.shape == (2, 1, 16, 16)
    for name, message in (("absent", "not mnist, cifar10"), ("a", "sub-folder")):
        with pytest.raises(edm.UserError, match=message):
            data.load_data(str(tmp_path / name))


def test_synthetic_shapes_are_drawn_and_reproducible():
    """Disc, square, ring, cross in uint8; a seed is a data set; discs fill π/4."""
    images, labels = edm.synthetic(512, 28, seed=3)
    assert (images.shape, images.dtype) == ((512, 1, 28, 28), torch.uint8)
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert torch.equal(images, edm.synthetic(512, 28, seed=3)[0])
    assert not torch.equal(images, edm.synthetic(512, 28, seed=4)[0])
    inside = torch.stack([images[labels == k].float().mean() / 255 for k in range(4)])
    assert 0.05 < inside.min() < inside.max() < 0.4
    assert_close(inside[0] / inside[1], torch.tensor(math.pi / 4), rtol=0.1, atol=0)


def test_posterior_mean_in_closed_form():
    """Images m - a and m + a: E[x | x_t] = m + a tanh(a (x_t - m) / σ²). One image: that image."""
    images = torch.tensor([51, 255, 102], dtype=torch.uint8).view(3, 1, 1, 1)
    mean = data.PosteriorMean(images, torch.tensor([0, 0, 1]))
    x_t = torch.tensor([0.7, -0.2, 3.0, 0.3]).view(4, 1, 1, 1)
    sigma = torch.tensor([0.5, 2.0, 1.0, 0.002])
    expected = [0.2 + 0.8 * math.tanh(0.8 * (v - 0.2) / s**2) for v, s in ((0.7, 0.5), (-0.2, 2.0))]
    with torch.autocast("cpu", torch.bfloat16):  # must not make it coarse
        x = mean(x_t, sigma, torch.tensor([0, 0, 1, 0]))
    assert_close(x.flatten(), torch.tensor([*expected, 102 / 127.5 - 1, 1.0]))
    assert mean(x_t, sigma, torch.full((4,), -1)).isnan().all()


def test_posterior_mean_as_target_keeps_the_gradient_and_calms_it():
    """D = a x_t / (σ² + 1/4), blind to labels: the same mean of dL/da, a third of its variance."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 1, 2), dtype=torch.uint8)
    classes = torch.arange(20) % 2
    target = data.PosteriorMean(images, classes)
    a, denoiser, gradients = torch.tensor(0.3, requires_grad=True), Gaussian(), []
    denoiser.forward = lambda x, sigma, labels: a * x / edm.expand(sigma**2 + 0.25, x)
    for seed in range(200):
        for t in (None, target):
            torch.manual_seed(seed)
            i = torch.randint(20, (200,))
            loss = edm.edm_loss(denoiser, edm.to_float(images[i]), classes[i], 1.0, 0.5, t)
            gradients.append(torch.autograd.grad(loss, a)[0])
    plain, calm = torch.stack(gradients).view(200, 2).unbind(1)
    difference = plain - calm
    assert difference.mean().abs() < 4 * difference.std() / 200**0.5
    assert calm.var() < plain.var() / 3


def test_the_target_sees_what_the_denoiser_sees(tiny):
    """edm_loss(D, x, y, target=t): mean λ (D(x_t; σ, y) - t(x_t, σ, y))²: 0 for t = D."""
    spy, x, labels = Spy(tiny), torch.rand(3, 1, 8, 8), torch.arange(3)
    assert edm.edm_loss(spy, x, labels, target=tiny) == 0
    assert torch.equal(spy.calls[0].labels, labels)


@pytest.mark.parametrize("stable", [False, True])
def test_stable_target_reaches_the_loss(tmp_path, monkeypatch, stable):
    """--stable-target: of a class of one image the target is that image. Else there is none."""
    how, seen, loss = {"steps": 1, "device": "cpu", "out": str(tmp_path)}, [], edm.edm_loss
    cfg = edm.Config(model_channels=8, channel_mult="1", stable_target=stable, **how)
    monkeypatch.setattr(edm, "edm_loss", lambda *args: seen.append(args) or loss(*args))
    images = torch.tensor([0, 200], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 1, 8, 8)
    edm.train(cfg, edm.Run(cfg, "edm_teacher"), images, torch.tensor([0, 1]))
    ((_, x, labels, *law, target),) = seen
    assert law == [-1.2, 1.2]
    assert (target is not None) == stable
    assert not stable or torch.allclose(target(x + 1, torch.ones(len(x)), labels), x)


# ---------------------------------------------------------------- metrics


def test_frechet_distance_between_gaussians_is_the_closed_form():
    """|μ|² + Σ (a_i - b_i)² for covariances that commute; others by the 2 x 2 formula."""
    x = torch.randn(500, 3, dtype=D64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance I: exactly
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    scale, shift = torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, -1, 2]).double()
    assert metrics.frechet_distance(x, x * scale + shift) == pytest.approx(6 + 0 + 1 + 4)
    a, b = x[:, :2] @ torch.tensor([[2.0, 1], [0, 1]]).double(), x[:, :2]
    product = a.T.cov()  # C_b = I: tr (C_a)^½ = sqrt(tr + 2 sqrt(det)) in two dimensions
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (product.trace() + 2 - 2 * root).item()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected)


def test_precision_recall_and_coverage_by_hand():
    """Real 0, 1, 2, 3 and k = 1: balls of radius 1. Fake 0.5, 0.6, 9: two of three are inside; the
    fakes' balls (radius 0.1, 0.1, 8.4) hold 1, 2 and 3 but not 0."""
    real, fake = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[0.5], [0.6], [9.0]])
    precision, recall = metrics.precision_recall(real, fake, k=1)
    assert (precision, recall) == (pytest.approx(2 / 3), pytest.approx(3 / 4))
    assert metrics.coverage(real, fake, k=1) == pytest.approx(2 / 4)  # the balls of 0 and 1


def test_equal_distributions_have_the_expected_coverage():
    """E[coverage] = 1 - 2^-k for two equal sets of the same size: 0.969 for k = 5; in 3 chunks."""
    real, fake = torch.randn(2, 3000, 4, generator=torch.Generator().manual_seed(0))
    assert metrics.coverage(real, fake) == pytest.approx(1 - 2**-5, abs=0.01)


def make_metric(**changes):
    tensors, config = tiny_metric(resolution=8)
    return metrics.Metric("My Data", tensors, config | changes)


def test_metric_rows_put_every_number_in_its_place(monkeypatch):
    """80 test features on a line; fakes all at one of them: precise, no recall; labels count."""
    metric, line = make_metric(train_accuracy=0.7), torch.arange(80.0)[:, None].expand(-1, 2)
    metric.test, metric.train = line, line + 1
    fake = line[:1] + 0.01 * torch.randn(40, 2)
    monkeypatch.setattr(metrics, "classify", lambda net, x, device: (torch.arange(40) % 4, fake))
    row = metric(torch.zeros(40, 1, 8, 8), torch.tensor([0, 1, 0, 0]).repeat(10))
    assert (row["accuracy"], row["precision"], row["n"]) == (0.5, 1.0, 40)
    assert row["recall"] < 0.1
    assert row["my_data_fd"] == pytest.approx(metrics.frechet_distance(fake, line))
    assert row["coverage"] == pytest.approx(metrics.coverage(line[:40], fake))
    # The floor: all train images are (1, 1) away from a test image, so it is |μ|² = 2
    assert metric.floor(80)["my_data_fd"] == pytest.approx(2, abs=1e-3)
    assert (metric.floor(20)["n"], metric.floor(20)["accuracy"]) == (20, 0.7)


def test_other_shapes_and_classes_than_the_metrics_are_refused():
    """The classifier knows 8 x 8 grey pixels of four classes; unconditional networks have none."""
    config = tiny_metric(resolution=8)[1]
    for good in ({}, {"label_dim": 0}):
        metrics.Metric.check(config, make_denoiser(TINY | good))
    for wrong in ({"img_channels": 3}, {"img_resolution": 16}, {"label_dim": 5}):
        with pytest.raises(edm.UserError, match="is --data right"):
            metrics.Metric.check(config, make_denoiser(TINY | wrong))


def test_labels_are_as_frequent_as_in_the_training_data_at_every_length():
    """After n draws every class was drawn n counts / sum(counts) times, to less than 1."""
    counts = torch.tensor([50, 10, 20, 0])
    drawn = F.one_hot(make_metric(class_counts=counts.tolist()).labels(80, 4), 4)
    assert drawn.sum(0).tolist() == counts.tolist()
    expected = torch.arange(1, 81)[:, None] * counts / 80
    assert (drawn.cumsum(0) - expected).abs().max() < 1
    assert make_metric(class_counts=[7] * 4).labels(6, 4).tolist() == [0, 1, 2, 3, 0, 1]
    assert make_metric().labels(6, label_dim=0) is None


def test_measure_draws_its_own_noise_and_classes(tiny):
    """n = --eval-n, at most as many as test images; z from seed + 20000; time for 1000 images."""
    metric, seen, before = make_metric(), [], torch.get_rng_state()
    cfg = SimpleNamespace(eval_n=100, seed=3, device="cpu")
    row = metric.measure(lambda z, y: seen.append((z, y)) or torch.rand_like(z), tiny, cfg, 7)
    ((z, labels),) = seen
    assert_close(z, edm.noise(tiny, 64, 20003), rtol=0, atol=0)
    assert labels.tolist() == metric.labels(64, 4).tolist()
    assert (row["nfe"], row["n"]) == (7, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert [metric.network_calls(18, w, tiny) for w in (1.0, 2.0)] == [35, 70]


def test_stored_features_are_those_of_the_stored_classifier(tmp_path, monkeypatch):
    """A trained metric finds no difference between the test images and themselves.

    Its classifier is in eval mode and has the rounded weights. It is trained once for a folder."""
    labels = (torch.arange(400) % 8).clamp(max=3)
    images = (40 + 50 * labels + torch.randint(40, (400,))).to(torch.uint8).view(-1, 1, 1, 1)
    images, asked = images.expand(-1, 1, 8, 8), []

    def load_data(*args, **how):
        asked.append(how)
        return images, labels

    monkeypatch.setattr(metrics, "load_data", load_data)
    monkeypatch.setattr(metrics, "class_folders", lambda path: path)
    cfg, denoiser = edm.Config(data="shades", device="cpu"), make_denoiser(TINY)
    metric = metrics.get_metric(cfg, tmp_path / "run-0", denoiser)
    row = metric(edm.to_float(images), labels)
    assert row["shades_fd"] == pytest.approx(0, abs=1e-4)
    assert (row["accuracy"], metric.config["class_counts"]) == (1.0, [50, 50, 50, 250])
    _, features = metrics.classify(metric.classifier, images, "cpu")
    assert (features.sort(0).values == metric.test.sort(0).values).float().mean() > 0.99
    again = metrics.get_metric(cfg, tmp_path / "run-1", denoiser)
    assert torch.equal(again.test, metric.test)
    assert asked == [{"channels": 1, "resolution": 8}] * 2  # train and test images, once
    assert metrics.get_metric(edm.Config(eval_n=0), tmp_path, denoiser) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for wrong, words in (edm.Config(eval_n=9), "--eval-n 9"), (edm.Config(fid=True), "--fid needs"):
        with pytest.raises(edm.UserError, match=words):
            metrics.get_metric(wrong, tmp_path, denoiser)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_shipped_metrics_give_the_published_floors(name):
    """10,000 train against 10,000 test images: the floor in results/edm_teacher.*.n10000.json."""
    metric = metrics.Metric(name, *edm.load_tensors(edm.ASSETS / f"{name}_metric.safetensors"))
    published = json.loads((ROOT / f"results/edm_teacher.{name}.n10000.json").read_text())
    wanted = pytest.approx(published["metrics"]["floor"][f"{name}_fd"], rel=1e-3)
    assert metrics.frechet_distance(metric.train, metric.test) == wanted


@pytest.mark.parametrize(
    ("steps", "name", "calls", "distance", "accuracy"),
    [(5, "teacher", 9, 2.9497, 0.975), (1, "generator", 1, 53.998, 0.1)],
)
def test_evaluate_gives_known_numbers(tmp_path, steps, name, calls, distance, accuracy):
    """40 digits of the shipped teacher in 5 Heun steps, and in 1, as a generator would make them.

    Few samples, so the distance is large. Of 5 steps the classifier recognises all but one."""
    options = {"eval_n": 40, "sample_steps": steps, "device": "cpu", "out": str(tmp_path)}
    cfg = evaluate.Config(file=str(edm.ASSETS / "mnist_teacher.safetensors"), **options)
    result = evaluate.main(cfg)
    row, floor = result["metrics"][name], result["metrics"]["floor"]
    assert row["mnist_fd"] == pytest.approx(distance, rel=1e-3)
    assert (row["accuracy"], row["n"], row["nfe"]) == (pytest.approx(accuracy), 40, calls)
    assert floor["n"] == 40
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert Image.open(tmp_path / "samples.png").size[0] > 500


def test_fid_compares_samples_with_all_training_images(monkeypatch):
    """torch-fidelity gets uint8 RGB of both, and a name to keep the training images' numbers."""
    seen, (images, _) = {}, data.load_data("synthetic")
    answer = {"frechet_inception_distance": 7.0}
    stub = SimpleNamespace(calculate_metrics=lambda **how: seen.update(how) or answer)
    monkeypatch.setitem(sys.modules, "torch_fidelity", stub)
    x = torch.linspace(-1, 1, 3 * 28 * 28).reshape(3, 1, 28, 28)
    assert metrics.fid(x, "synthetic", "somewhere") == 7.0
    assert torch.equal(seen["input1"][2], edm.to_uint8(x[2]).expand(3, -1, -1))
    assert torch.equal(seen["input2"][5], images[5].expand(3, -1, -1))
    assert (len(seen["input1"]), len(seen["input2"])) == (3, len(images))
    assert seen["input2_cache_name"] == f"synthetic-train-{len(images)}"
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(edm.UserError, match="pip install torch-fidelity"):
        metrics.fid(x, "synthetic", "somewhere")


# ---------------------------------------------------------------- programs


def test_benchmark_is_the_difference_of_a_short_and_a_long_run(tmp_path, tiny, monkeypatch):
    """5 s of start and 0.5 s a cycle: (1 + ratio) batch / 0.5 images a second."""
    edm.save_denoiser(tiny, tmp_path / "t.safetensors")
    real, ran = benchmark.seconds, []

    def seconds(script, cfg, teacher, steps):
        ran.append(real(script, cfg, teacher, 1))
        return 5 + 0.5 * steps

    monkeypatch.setattr(benchmark, "seconds", seconds)
    cfg = dmd2_cifar.Config(teacher=str(tmp_path / "t.safetensors"), batch=8, ratio=3, device="cpu")
    result = benchmark.main(dmd2_cifar, cfg)
    assert result["images_per_second"] == pytest.approx((1 + 3) * 8 / 0.5)
    assert len(ran) == 2
    assert min(ran) > 0


def test_tables_show_mean_and_spread():
    """Mean ± standard deviation of several runs, the value alone of one."""
    assert table.spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert table.spread([0.25], 3) == "0.250"
    assert table.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


# ---------------------------------------------------------------- pictures


def test_pictures_can_be_opened_and_have_the_expected_size(tmp_path):
    """PNG of samples, videos, curves and lines; a $ in a title is no formula."""
    x, video = torch.zeros(20, 1, 8, 8), torch.zeros(2, 1, 3, 8, 8)
    titles = {"teacher, $x_$": x, "generator": x}
    log = '{"step": 1, "loss": 2.0}\n{"step": 10, "loss": -1.0, "late": 3.0}\n'
    (tmp_path / "log.jsonl").write_text(log)
    plot.curves(tmp_path)
    plot.save_rows(tmp_path / "rows.png", titles)
    plot.save_strips(tmp_path / "strips.png", {"a": video, "b": video[:, :, :1]})
    plot.save_lines(tmp_path / "lines.png", {"bias": {"a_b": [1.0, 2.0]}}, "block", mark=1)
    edm.save_grid(tmp_path / "grid.png", x, 1 + x, columns=10)
    for name in ("curves", "rows", "strips", "lines", "grid"):
        image = Image.open(tmp_path / f"{name}.png").convert("L")
        assert len(image.getcolors(256)) > 2
    assert image.size == (10 * 10 + 2, 4 * 10 + 2)  # two pixels between images, and around
    assert [image.getpixel((2, y)) for y in (2, 22, 41)] == [128, 255, 127]


def test_gif_shows_every_video_side_by_side_and_black_after_its_end(tmp_path):
    """Two videos of 3 frames above two of 1: 3 pictures of 0.12 s, 5 times as large."""
    video = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 3, 1, 1).expand(2, -1, -1, 8, 8)
    plot.save_gif(tmp_path / "v.gif", [video, video[:, :, :1]])
    image = Image.open(tmp_path / "v.gif")
    assert (image.n_frames, image.info["duration"]) == (3, 120)
    assert image.size == (5 * 16, 5 * 20)
    image.seek(2)
    upper, lower = (image.convert("L").getpixel((3, y)) for y in (3, 53))
    assert (upper, lower) == (255, 0)


# ---------------------------------------------------------------- the mixture


def test_mixture_denoiser_is_the_score_of_the_blurred_density():
    """D = x + σ² ∇ log p(x; σ), p(x; σ) = Σ w_k N(m_k, s² + σ²)."""
    teacher = mixture.Mixture().double()
    x = torch.randn(6, 2, 1, 1, dtype=D64, requires_grad=True)
    sigma = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0, 50.0], dtype=D64)
    var = (sigma**2 + 0.2**2)[:, None]
    squares = ((x.flatten(1)[:, None] - teacher.means) ** 2).sum(2)
    log_p = (torch.tensor([0.6, 0.4], dtype=D64).log() - squares / (2 * var)).logsumexp(1)
    (score,) = torch.autograd.grad(log_p.sum(), x)
    wanted = x + edm.expand(sigma, x) ** 2 * score
    assert_close(teacher(x, sigma), wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    samples = mixture.Mixture().sample(20_000).flatten(1)
    assert_close(samples.mean(0), torch.tensor([-0.2, 0.0]), atol=0.03, rtol=0)
    assert_close(samples.std(0), torch.tensor([math.sqrt(0.96 + 0.04), 0.2]), atol=0.02, rtol=0)


def test_mixture_reports_mean_and_deviation_along_x(tmp_path, monkeypatch):
    """x = A z + b: the mean is b_1, the standard deviation sqrt((A A^T)_11) = |(3, 4)| = 5."""
    generator = mixture.Affine()
    generator.weight.data, generator.bias.data = torch.tensor([[-3.0, 4], [0, 1]]), torch.ones(2)
    z = torch.randn(4, 2, 1, 1)
    x = generator(80 * z, torch.full((4,), 80.0))
    assert_close(x[:, 0] - 1, 4 * z[:, 1] - 3 * z[:, 0])
    monkeypatch.setattr(mixture, "distil", lambda *args: (generator, x.detach()))
    rows = mixture.main(mixture.Config(out=str(tmp_path)))["metrics"]
    assert rows == {f: {"mean": 1.0, "std": 5.0} for f in mixture.F_DIVERGENCES}


@pytest.mark.slow
def test_reverse_kl_seeks_a_mode_and_forward_kl_covers(tmp_path, monkeypatch):
    """A single Gaussian on two modes (std 1 together, 0.2 each): rkl takes one, kl spreads."""
    monkeypatch.setattr(mixture, "F_DIVERGENCES", ["rkl", "js", "kl"])
    rows = mixture.main(mixture.Config(out=str(tmp_path)))["metrics"]
    assert rows["rkl"]["std"] < 0.25
    assert rows["rkl"]["mean"] < -0.9
    assert rows["kl"]["std"] > 0.4
    assert rows["rkl"]["std"] < rows["js"]["std"] < rows["kl"]["std"]
    assert (tmp_path / "samples.png").stat().st_size > 0
