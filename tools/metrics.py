"""Metrics on the features of a small classifier, and FID.

The first is a Frechet distance, too, but is never called FID: that means Inception's features.
"""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import edm_teacher as edm
from edm_teacher import UserError, to_float, to_uint8
from tools import plot
from tools.data import load_data


class Classifier(nn.Module):
    """Small convolutional network: images in [-1, 1] -> (logits, features: 64 grey, 32 colour)."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        grey = [(32, 1), (32, 2), (64, 1), (64, 2), (64, 1)]  # (channels, stride)
        colour = [(64, 1), (64, 2), (96, 1), (96, 2), (128, 1), (32, 1)]
        layers, cin = [], channels
        for cout, stride in grey if channels == 1 else colour:
            layers += [
                nn.Conv2d(cin, cout, 3, stride, 1, bias=False),
                nn.BatchNorm2d(cout),
                nn.ReLU(),
            ]
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


def knn_radius(x: Tensor, k: int) -> Tensor:
    """Distance of every row of x (N, D) to its k-th nearest other row, in chunks."""
    return torch.cat([torch.cdist(c, x).kthvalue(k + 1)[0] for c in x.split(1000)])


def in_ball(points: Tensor, centres: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """(each point: in some ball?, each ball: some point in it?); closed balls, in chunks."""
    hits = [torch.cdist(c, centres) <= radius for c in points.split(1000)]
    return torch.cat([h.any(1) for h in hits]), torch.stack([h.any(0) for h in hits]).any(0)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fake in the k-NN manifold of real, and vice versa (Kynkäänniemi 2019)."""
    precision, _ = in_ball(fake, real, knn_radius(real, k))
    recall, _ = in_ball(real, fake, knn_radius(fake, k))
    return precision.float().mean().item(), recall.float().mean().item()


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of real k-NN balls with a fake in them (Naeem 2020); about 1 - 2^-k for equal sets."""
    return in_ball(fake, real, knn_radius(real, k))[1].float().mean().item()


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, device) -> tuple[Tensor, Tensor]:
    """uint8 images -> (predicted classes, features), on the CPU: MPS has no float64."""
    batches = [classifier(to_float(b.to(device))) for b in images.split(500)]
    logits, features = (torch.cat(t).cpu() for t in zip(*batches, strict=True))
    return logits.argmax(1), features.half().float()  # as the reference is stored


class Metric:
    """A classifier and its features of 10,000 test (reference) and train images (floor)."""

    def __init__(self, data: str, tensors: dict[str, Tensor], config: dict, device="cpu"):
        self.name = "".join(c if c.isalnum() else "_" for c in Path(data).name.lower()) + "_fd"
        self.config, self.device = config, device
        self.classifier = Classifier(config["channels"], config["classes"]).to(device).eval()
        weights = {k: v for k, v in tensors.items() if not k.endswith("_features")}
        self.classifier.load_state_dict(weights)
        self.test, self.train = (tensors[f"{k}_features"].float() for k in ("test", "train"))

    def check(self, denoiser) -> None:
        """UserError unless the denoiser draws what the classifier was trained on."""
        size = self.config["resolution"]
        knows = (self.config["channels"], size, size)
        if denoiser.shape != knows or denoiser.label_dim not in (0, self.config["classes"]):
            raise UserError(
                f"The network draws {denoiser.label_dim} classes of shape {denoiser.shape}, the "
                f"data has {self.config['classes']} classes of {knows}: is --data right?"
            )

    def __call__(self, x: Tensor, labels: Tensor | None) -> dict:
        """Samples in [-1, 1] -> the numbers of a verdict's row.

        k-NN metrics use as many test images as there are samples. No labels: no accuracy.
        """
        predicted, features = classify(self.classifier, to_uint8(x), self.device)
        row = self.compare(features)
        if labels is not None:
            row["accuracy"] = (predicted == labels).float().mean().item()
        return row

    def compare(self, features: Tensor) -> dict:
        real = self.test[: len(features)]
        precision, recall = precision_recall(real, features)
        return {
            "n": len(features),
            self.name: frechet_distance(features, self.test),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(real, features),
        }

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
        """samplers: {name: (sampler, NFE)} -> {name: row}, and samples.png, curves.png.

        known: rows that are measured already. The pictures are of the same z and labels.
        """
        rows, grids = {}, {}
        z, labels = (
            edm.noise(denoiser, 64, cfg.seed + 20000),
            edm.class_labels(64, denoiser.label_dim),
        )
        for name, (sampler, nfe) in samplers.items():
            row = (known or {}).get(name)
            rows[name] = row or self.measure(sampler, denoiser, cfg, nfe, with_fid)
            with edm.own_random_numbers(cfg.seed + 20000):
                grids[f"{name}, {nfe} NFE"] = edm.in_batches(sampler, z, labels, cfg.device)
        plot.save_rows(run.path("samples.png"), grids)
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
        if not label_dim:
            return None
        counts = self.config.get("class_counts", [1] * self.config["classes"])
        due, drawn = [0] * len(counts), []
        for _ in range(n):
            due = [d + count for d, count in zip(due, counts, strict=True)]
            drawn.append(due.index(max(due)))
            due[drawn[-1]] -= sum(counts)
        return torch.tensor(drawn)

    def floor(self, n: int) -> dict:
        """What n real train images get: no generator needs to be better."""
        return self.compare(self.train[:n]) | {"accuracy": self.config["train_accuracy"]}


class Images(torch.utils.data.Dataset):
    """uint8 RGB images one by one, as torch-fidelity wants them."""

    def __init__(self, images: Tensor):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return self.images[i]


def fid(x: Tensor, data: str, data_dir, device="cpu") -> float:
    """Frechet Inception distance of samples x in [-1, 1] to all training images of `data`.

    By the optional package torch-fidelity, which downloads Inception's weights once and keeps the
    statistics of the training images in data_dir. Minutes per 1000 images on a CPU.
    """
    try:
        import torch_fidelity
    except ImportError:
        raise UserError("--fid needs pip install torch-fidelity.") from None
    images, _ = load_data(data, data_dir, resolution=x.shape[-1], channels=x.shape[1])
    name = None if Path(data).is_dir() else f"{data}-train-{len(images)}"
    try:
        return torch_fidelity.calculate_metrics(
            input1=Images(to_uint8(x)),
            input2=Images(images),
            fid=True,
            cuda=torch.device(device).type == "cuda",
            input2_cache_name=name,
            cache_root=str(Path(data_dir) / "fid"),
            verbose=False,
        )["frechet_inception_distance"]
    except OSError as error:
        raise UserError(f"--fid could not download Inception's weights ({error}).") from None


def train_metric(data: str, data_dir, device, **shape) -> tuple[dict, dict]:
    """Trains the classifier -> (its weights and features in float16, configuration) of a Metric."""
    images, labels = load_data(data, data_dir, True, **shape)
    test, test_labels = load_data(data, data_dir, False, **shape)
    if len(test) < 50:
        raise UserError(f"--data {data} has {len(test)} test images; metrics need 50 or more.")
    config = {"data": data, "channels": images.shape[1], "resolution": images.shape[-1]}
    config["classes"] = int(torch.cat([labels, test_labels]).max()) + 1
    config["class_counts"] = labels.bincount(minlength=config["classes"]).tolist()
    net = Classifier(config["channels"], config["classes"]).to(device)
    batch, epochs = 128, 6 if config["channels"] == 1 else 12
    steps = max(epochs * len(images) // batch, 100)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        i = torch.randint(len(images), (batch,))
        dy, dx = torch.randint(-2, 3, (2,)).tolist()  # shift the batch by up to two pixels
        x = to_float(images[i].roll((dy, dx), (2, 3)).to(device))
        if config["channels"] > 1:  # photographs may be mirrored, digits not
            x[: batch // 2] = x[: batch // 2].flip(3)
        loss = F.cross_entropy(net(x)[0], labels[i].to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    net.load_state_dict(tensors)  # the features are those of the rounded weights
    net.eval()
    for name, x, y in [("train", images, labels), ("test", test, test_labels)]:
        i = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:10000]
        predicted, features = classify(net, x[i], device)
        tensors[f"{name}_features"] = features.half()
        config[f"{name}_accuracy"] = (predicted == y[i]).float().mean().item()
    return tensors, config


def get_metric(cfg, folder: Path, denoiser) -> Metric | None:
    """The shipped metric of this data set, else the one in `folder`, trained now if need be.

    None with --eval-n 0 and for latents. UserError if the denoiser draws something else.
    """
    if not cfg.eval_n or denoiser.latents:
        return None
    if cfg.eval_n < 10:
        raise UserError(f"--eval-n {cfg.eval_n}: metrics need 10 samples or more; 0: no metrics.")
    path, shipped = Path(folder) / "metric.safetensors", f"{cfg.data}_metric.safetensors"
    if cfg.data in ("mnist", "cifar10") and (edm.ASSETS / shipped).exists():
        path = edm.ASSETS / shipped
    if not path.exists() and not edm.rank():
        how = {"channels": denoiser.shape[0], "resolution": denoiser.shape[-1]}
        with edm.own_random_numbers(0):
            made = train_metric(cfg.data, cfg.data_dir, cfg.device, **how)
        edm.save_tensors(path, *made)
    edm.from_first(None)  # the others wait
    metric = Metric(cfg.data, *edm.load_tensors(path), cfg.device)
    metric.check(denoiser)
    return metric
