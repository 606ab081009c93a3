"""Writes the tables of README.md from results/*.json:  python make_table.py

results/<script>.<label>.<seed>.json         result.json of a training run
results/<script>.<label>.<seed>.n10000.json  result.json of --evaluate on its generator
"""

import json
import re
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent
COLUMNS = {"mnist_fd": 4, "accuracy": 3, "precision": 3, "recall": 3, "coverage": 3}  # digits


def spread(values: list[float], digits: int) -> str:
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def load(pattern: str) -> list[dict]:
    """All matching results, in the order of their file names."""
    return [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted((ROOT / "results").glob(pattern))
    ]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)


def samplers() -> str:
    """Teacher, generator and floor of the default runs at n = 10,000."""
    found = {
        "teacher, 35 NFE": [r["metrics"]["teacher"] for r in load("edm_teacher.mnist.*n10000*")]
    }
    churned = load("edm_teacher.mnist_churn.*")
    found["teacher, 35 NFE, `--s-churn 8`"] = [r["metrics"]["teacher"] for r in churned]
    runs = load("dmd_mnist.default.*.n10000.json")
    found["generator, 1 NFE"] = [r["metrics"]["generator"] for r in runs]
    found["train images (floor)"] = [load("edm_teacher.mnist.*n10000*")[0]["metrics"]["floor"]]
    demo = [r["metrics"] for r in load("dmd_mnist.default.?.json")]  # timed on two quiet cores
    rows = []
    for name, metrics in found.items():
        cells = [spread([m[c] for m in metrics], digits) for c, digits in COLUMNS.items()]
        timed = [m[name.split(",")[0]]["seconds_per_1000"] for m in demo if name.endswith("NFE")]
        rows.append([name, str(len(metrics)), *cells, spread(timed, 1) if timed else ""])
    names = [c.replace("mnist_fd", "MNIST-FD") for c in COLUMNS]
    return table(["", "runs", *names, "s / 1000 images"], rows)


def ablations(data: str, *prefixes: str) -> str:
    """One row for each command of results/<prefix>*: what the generator reached, n = 10,000."""
    column = f"{data}_fd"
    known = load(f"edm_teacher.{data}.*n10000*")[0]["metrics"]
    found = sorted(p for prefix in prefixes for p in (ROOT / "results").glob(f"{prefix}*"))
    labels = dict.fromkeys(".".join(p.name.split(".")[:2]) for p in found)
    rows = []
    for label in labels:
        runs = load(f"{label}.?.json")
        measured = load(f"{label}.?.n10000.json") or runs  # with --eval-n 10000 the run itself
        assert all(r["metrics"]["generator"]["n"] == 10000 for r in measured), label
        unimportant = r" --(out|seed|threads|data-dir|eval-n|teacher-steps) \S+| --resume\b"
        command = re.sub(unimportant, "", " ".join(runs[0]["command"]))
        metrics = [r["metrics"]["generator"] for r in measured]
        rows.append((f"`{command}`", len(runs), metrics, label not in DEFAULTS))
    rows.sort(key=lambda row: (row[3], mean(m[column] for m in row[2])))  # the default comes first
    if data != "mnist":  # where no other table has them
        rows = [(name, 1, [known[name]]) for name in ("teacher", "floor")] + rows
    with_fid = any("fid" in m for row in rows for m in row[2])
    lines, quality = [], ("accuracy", "precision", "recall")
    for name, count, metrics, *_ in rows:
        fd = [m[column] for m in metrics]
        relative = [x / known["teacher"][column] for x in fd]
        line = [name, str(count), spread(fd, 4), spread(relative, 2)]
        line += [spread([m[c] for m in metrics], COLUMNS[c]) for c in quality]
        if with_fid:
            line.append(spread([m["fid"] for m in metrics], 1) if "fid" in metrics[0] else "")
        lines.append(line)
    name = column.upper().replace("_", "-")
    head = ["command", "seeds", name, "× teacher's", *quality]
    return table(head + ["FID"] * with_fid, lines)


def mixture() -> str:
    """Where a single Gaussian ended on two modes, for each divergence; std 0.2 is one mode's."""
    (run,) = load("f_distill.mixture.*.json")
    rows = [[f"`{f}`", f"{m['mean']:.2f}", f"{m['std']:.2f}"] for f, m in run["metrics"].items()]
    return table(["`--f`", "mean", "standard deviation"], rows)


def videos() -> str:
    """What changes from block to block in the default runs of causal_video.py."""
    runs = [r["metrics"] for r in load("causal_video.default.?.n2048.json")]
    lines = []
    for name in runs[0]:
        rows = [r[name] for r in runs]
        line = [name.replace("_", " "), str(len(rows[0]["bias"]))]
        for block in (0, 3, -1):
            line.append(spread([1000 * r["residual"][block] for r in rows], 1))
        line.append(spread([max(map(abs, r["bias"])) for r in rows], 3))
        line += [spread([r[key][-1] for r in rows], 2) for key in ("spread", "correlation")]
        fps = spread([r["frames_per_second"] for r in rows], 0)
        lines.append([*line, "" if name == "data" else fps])
    head = [f"residual × 1000, {b} block" for b in ("first", "4th", "last")]
    head += ["largest bias", "spread, last block", "correlation, last block", "frames / s"]
    return table(["", "blocks", *head], lines)


DEFAULTS = ("dmd_mnist.default", "dmd2_cifar.mnist", "dmd2_cifar.cifar10")
TABLES = {
    "samplers": samplers,
    "ablations": lambda: ablations("mnist", "dmd_mnist."),
    "dmd2 on mnist": lambda: ablations("mnist", "dmd2_cifar.mnist"),
    "descendants on mnist": lambda: ablations(
        "mnist", "dmd2_cifar.mnist.", "f_distill.mnist", "ladd.mnist"
    ),
    "cifar10": lambda: ablations(
        "cifar10", *(f"{script}.cifar10" for script in ("dmd2_cifar", "f_distill", "ladd"))
    ),
    "mixture": mixture,
    "videos": videos,
}


def update(readme: str) -> str:
    """The README with every <!-- table: name --> ... <!-- end --> block made anew."""
    for name, make in TABLES.items():
        block = f"<!-- table: {name} -->\n{make()}\n<!-- end -->"
        readme = re.sub(
            rf"<!-- table: {name} -->.*?<!-- end -->", lambda _, b=block: b, readme, flags=re.S
        )
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
