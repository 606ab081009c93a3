"""Metrics on a small classifier's features (a Frechet distance, not called FID), and FID."""

import importlib.util
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import edm_teacher as edm
from tools import plot
from tools.data import NAMES, class_folders, load_data


class Classifier(nn.Module):
    """Small convolutional network: images in [-1, 1] -> (logits, features: 64 grey, 32 colour)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        grey = [(32, 1), (32, 2), (64, 1), (64, 2), (64, 1)]  # (channels, stride)
        colour = [(64, 1), (64, 2), (96, 1), (96, 2), (128, 1), (32, 1)]
        layers, cin = [], channels
        for cout, stride in grey if channels == 1 else colour:
            convolution = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(cout), nn.ReLU()]
            cin = cout
        self.body, self.head = nn.Sequential(*layers), nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x).mean((2, 3))
        return self.head(features), features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|μ_a - μ_b|² + tr(C_a + C_b - 2 (C_a C_b)^½) of two sets of features (N, D)."""
    a, b = a.double(), b.double()
    ca, cb = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def in_balls(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Is a point in a centre's closed ball, up to its k-th nearest other? (points, centres)."""
    radius = [torch.cdist(c, centres).kthvalue(k + 1)[0] for c in centres.split(1000)]
    return torch.cat([torch.cdist(p, centres) <= torch.cat(radius) for p in points.split(1000)])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake in the k-NN manifold of real, and vice versa (Kynkäänniemi 2019)."""
    inside = in_balls(fake, real, k), in_balls(real, fake, k)
    return tuple(i.any(1).float().mean().item() for i in inside)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real k-NN balls with a fake in them (Naeem 2020); about 1 - 2^-k for equal sets."""
    return in_balls(fake, real, k).any(0).float().mean().item()


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, device) -> tuple[Tensor, Tensor]:
    """uint8 images -> (predicted classes, features), on the CPU: MPS has no float64."""
    batches = [classifier(edm.to_float(b.to(device))) for b in images.split(500)]
    logits, features = (torch.cat(t).cpu() for t in zip(*batches, strict=True))
    return logits.argmax(1), features.half().float()  # as the reference is stored


class Metric:
    """A classifier and its features of 10,000 test (reference) and train images (floor)."""

    def __init__(self, data: str, tensors: dict[str, Tensor], config: dict, device="cpu"):
        self.name = "".join(c if c.isalnum() else "_" for c in Path(data).name.lower()) + "_fd"
        self.config, self.device = config, device
        self.classifier = Classifier(config["channels"], config["classes"]).to(device).eval()
        self.test, self.train = (tensors[f"{k}_features"].float() for k in ("test", "train"))
        weights = {k: v for k, v in tensors.items() if not k.endswith("_features")}
        self.classifier.load_state_dict(weights)

    @staticmethod
    def check(config: dict, denoiser) -> None:
        """UserError unless the denoiser draws what the classifier was trained on."""
        channels, size, classes = (config[k] for k in ("channels", "resolution", "classes"))
        data, draws = (channels, size, size, classes), (*denoiser.shape, denoiser.label_dim)
        if draws not in (data, (*data[:3], 0)):
            raise edm.UserError(f"Shape, classes: network {draws}, data {data}: is --data right?")

    def __call__(self, x: Tensor, labels: Tensor | None) -> dict:
        """Samples in [-1, 1] -> the numbers of a verdict's row; no labels: no accuracy."""
        predicted, features = classify(self.classifier, edm.to_uint8(x), self.device)
        right = {} if labels is None else {"accuracy": (predicted == labels).float().mean().item()}
        return self.compare(features) | right

    def compare(self, features: Tensor) -> dict:
        """k-NN metrics use as many test images as there are samples."""
        real = self.test[: len(features)]
        row = {"n": len(features), self.name: frechet_distance(features, self.test)}
        row["precision"], row["recall"] = precision_recall(real, features)
        return row | {"coverage": coverage(real, features)}

    def floor(self, n: int) -> dict:
        """What n real train images get: no generator needs to be better."""
        return self.compare(self.train[:n]) | {"accuracy": self.config["train_accuracy"]}

    def measure(self, sampler, denoiser, cfg, nfe: int, with_fid: bool = False) -> dict:
        """The row of sampler(z, labels): --eval-n samples, classes as frequent as in the data."""
        n, seed = self.n(cfg), cfg.seed + 20000
        labels, start = self.labels(n, denoiser.label_dim), time.time()
        with edm.own_random_numbers(seed):
            x = edm.in_batches(sampler, edm.noise(denoiser, n, seed), labels, cfg.device)
        seconds = (time.time() - start) / n * 1000
        row = {"nfe": nfe} | self(x, labels) | {"seconds_per_1000": seconds}
        return row | {"fid": fid(x, cfg.data, cfg.data_dir, cfg.device)} if with_fid else row

    def verdict(self, run, denoiser, cfg, samplers, known=None, with_fid=False) -> dict:
        """{name: (sampler, NFE)} -> {name: row}, samples.png of the same z and labels, curves.png.

        known: rows that are measured already."""
        rows, pictures, k = dict(known or {}), {}, denoiser.label_dim
        z, labels = edm.noise(denoiser, 64, cfg.seed + 20000), edm.class_labels(64, k)
        for name, (sampler, nfe) in samplers.items():
            if name not in rows:
                rows[name] = self.measure(sampler, denoiser, cfg, nfe, with_fid)
            with edm.own_random_numbers(cfg.seed + 20000):
                pictures[f"{name}, {nfe} NFE"] = edm.in_batches(sampler, z, labels, cfg.device)
        with edm.or_warn("picture"):
            plot.save_rows(run.path("samples.png"), pictures)
            plot.curves(run.folder)
        return rows | {"floor": self.floor(self.n(cfg))}

    @staticmethod
    def network_calls(steps: int, guidance: float, denoiser) -> int:
        """NFE of heun_sampler: 2 N - 1, twice that with guidance."""
        return (2 * steps - 1) * (2 if guidance != 1 and denoiser.label_dim else 1)

    def n(self, cfg) -> int:
        return min(cfg.eval_n, len(self.test))

    def labels(self, n: int, label_dim: int) -> Tensor | None:
        """n classes, each as often as in the training data; None for an unconditional network."""
        counts = torch.tensor(self.config.get("class_counts", [1] * self.config["classes"]))
        due, drawn = torch.zeros_like(counts), []
        for _ in range(n if label_dim else 0):
            due += counts
            drawn.append(due.argmax())
            due[drawn[-1]] -= counts.sum()
        return torch.stack(drawn) if drawn else None


def fid(x: Tensor, data: str, data_dir, device="cpu") -> float:
    """FID of samples x to all training images of `data`, whose statistics are kept in data_dir."""
    images, _ = load_data(data, data_dir, resolution=x.shape[-1], channels=x.shape[1])
    rgb = (i.expand(-1, 3, -1, -1) for i in (edm.to_uint8(x), images))
    fake, real = (torch.utils.data.Subset(i, range(len(i))) for i in rgb)  # they are datasets
    how = {"fid": True, "verbose": False, "cache_root": f"{data_dir}/fid"}
    how["cuda"] = torch.device(device).type == "cuda"
    if data in NAMES:  # the images of a folder may change
        how["input2_cache_name"] = f"{data}-train-{len(images)}"
    try:
        import torch_fidelity

        result = torch_fidelity.calculate_metrics(input1=fake, input2=real, **how)
    except (ImportError, OSError) as error:  # no package, no download
        raise edm.UserError(f"--fid needs pip install torch-fidelity, online ({error}).") from None
    return result["frechet_inception_distance"]


def train_metric(data: str, data_dir, device, **shape) -> tuple[dict, dict]:
    """Trains the classifier -> (its weights and features in float16, configuration) of a Metric.

    No weights with fewer than 50 test images."""
    images, labels = load_data(data, data_dir, True, **shape)
    test, test_labels = load_data(data, data_dir, False, **shape)
    config = {"data": data, "channels": images.shape[1], "resolution": images.shape[-1]}
    config |= {"classes": int(labels.max()) + 1, "class_counts": labels.bincount().tolist()}
    if len(test) < 50:
        return {}, config
    net, colour = Classifier(config["channels"], config["classes"]).to(device), images.shape[1] > 1
    batch, epochs = 128, 12 if colour else 6
    steps = max(epochs * len(images) // batch, 100)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        i = torch.randint(len(images), (batch,))
        shift = torch.randint(-2, 3, (2,)).tolist()  # of the batch, by up to two pixels
        x = edm.to_float(images[i].roll(shift, (2, 3)).to(device))
        if colour:  # photographs may be mirrored, digits not
            x[: batch // 2] = x[: batch // 2].flip(3)
        loss = F.cross_entropy(net(x)[0], labels[i].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.eval().load_state_dict(tensors)  # the features are those of the rounded weights
    for name, x, y in [("train", images, labels), ("test", test, test_labels)]:
        i = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10000]
        predicted, features = classify(net, x[i], device)
        tensors[f"{name}_features"] = features.half()
        config[f"{name}_accuracy"] = (predicted == y[i]).float().mean().item()
    return tensors, config


def get_metric(cfg, folder: Path, denoiser) -> Metric | None:
    """The shipped metric of this data set, else that in `folder`, trained now if need be."""
    if not cfg.eval_n or denoiser.latents:
        return None
    if vars(cfg).get("fid") and not importlib.util.find_spec("torch_fidelity"):
        raise edm.UserError("--fid needs pip install torch-fidelity.")
    if cfg.eval_n < 10:
        raise edm.UserError(f"--eval-n {cfg.eval_n}: metrics need 10 samples; 0: no metrics.")
    path = edm.ASSETS / f"{cfg.data}_metric.safetensors"
    if cfg.data not in NAMES:  # trained once for the same images, not for each run
        images = zlib.crc32(repr((class_folders(cfg.data), denoiser.shape)).encode())
        path = Path(folder).parent / f"metric-{images:08x}.safetensors"
    elif not path.exists():
        path = Path(folder) / "metric.safetensors"
    if not path.exists() and not edm.rank():
        how = {"channels": denoiser.shape[0], "resolution": denoiser.shape[-1]}
        with edm.own_random_numbers(0):
            edm.save_tensors(path, *train_metric(cfg.data, cfg.data_dir, cfg.device, **how))
    edm.from_first(None)  # the others wait
    tensors, config = edm.load_tensors(path)
    Metric.check(config, denoiser)
    if not tensors:
        return print(f"--data {cfg.data} has fewer than 50 test images: there are no metrics.")
    return Metric(cfg.data, tensors, config, cfg.device)
