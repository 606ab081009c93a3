"""Makes the tables of README.md and docs/*.md anew:  python -m tools.table

From result.json of runs, results/<script>.<label>.<seed>.json, and of tools.evaluate on their
generators, ....n10000.json. Also counts lines, in rows like | `file.py` | 9 | and | `folder/` | 9 |
"""

import argparse
import json
import re
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
DEFAULTS = {  # runs with the defaults: the data, and which one was timed on two quiet cores
    "dmd_mnist.default": ("mnist", "dmd_mnist.default.?"),
    "dmd2_cifar.mnist": ("mnist", "dmd2_cifar.first_teacher.0"),
    "f_distill.mnist": ("mnist", "f_distill.two_threads.0"),
    "ladd.mnist": ("mnist", "ladd.two_threads.0"),
    "dmd2_cifar.cifar10": ("cifar10", "dmd2_cifar.cifar10.0"),
}
NAMES = {"ode_init": "ODE initialisation", "causvid": "CausVid", "self_forcing": "Self-Forcing"}


def load(pattern: str) -> list[dict]:
    paths = sorted((ROOT / "results").glob(f"{pattern}.json"))
    return [json.loads(p.read_text(encoding="utf-8")) for p in paths]


def spread(values: list[float], digits: int) -> str:
    return " ± ".join(f"{f(values):.{digits}f}" for f in (mean, stdev)[: len(values)])


def minutes(pattern: str) -> str:
    return f"{mean(run['seconds'] for run in load(pattern)) / 60:.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def generators(label: str) -> tuple[str, list[dict]]:
    """(command, the generator's numbers for each seed), n = 10,000."""
    runs = load(f"{label}.?")
    metrics = [r["metrics"]["generator"] for r in load(f"{label}.?.n10000") or runs]
    assert all(m["n"] == 10000 for m in metrics), label  # with --eval-n 10000 of the run itself
    unimportant = r" --(out|seed|threads|data-dir|eval-n|teacher-steps) \S+| --resume\b"
    return f"`{re.sub(unimportant, '', ' '.join(runs[0]['command']))}`", metrics


def known(data: str) -> dict[str, list[dict]]:
    """The rows of the shipped teacher and of training images, n = 10,000."""
    (run,) = load(f"edm_teacher.{data}.n10000")
    rows = {"teacher, 35 NFE": [run["metrics"]["teacher"]]}
    for churned in load(f"edm_teacher.{data}_churn.0.n10000"):
        rows["teacher, 35 NFE, `--s-churn 8`"] = [churned["metrics"]["teacher"]]
    return rows | {"train images (floor)": [run["metrics"]["floor"]]}


def line(name: str, metrics: list[dict], data: str, *quality: str) -> list[str]:
    fd, best = [m[f"{data}_fd"] for m in metrics], known(data)["teacher, 35 NFE"][0][f"{data}_fd"]
    row = [name, str(len(metrics)), spread(fd, 4), spread([x / best for x in fd], 2)]
    values = {q: [m[q] for m in metrics if q in m] for q in quality}
    return row + [spread(v, 1 if q == "fid" else 3) for q, v in values.items()]


def results() -> str:
    """A row for each script."""
    found = [(*row, "mnist", "") for row in known("mnist").items()]
    found += [(*generators(k), data, minutes(timed)) for k, (data, timed) in DEFAULTS.items()]
    rows = []
    for name, metrics, data, time in found:
        name, seeds, fd, *rest = line(name, metrics, data, "accuracy", "recall")
        rows.append([name, seeds, f"{data.upper()}-FD {fd}", *rest, time])
    for name, _, _, _, _, bias, *_ in videos()[1][-2:]:
        row = [f"`causal_video.py`, {name}", "3", f"largest bias {bias}", "", "", ""]
        rows.append([*row, minutes("causal_video.two_threads.0")])
    return table(["", "seeds", "result", "× teacher's", "accuracy", "recall", "minutes"], rows)


def ablations(data: str, pattern: str, others=True) -> str:
    """A row for each command of results/<pattern>; the defaults come first, before them others."""
    labels = {".".join(p.name.split(".")[:2]) for p in (ROOT / "results").glob(pattern)}
    rows = [(label not in DEFAULTS, *generators(label)) for label in labels]
    rows.sort(key=lambda row: (row[0], mean(m[f"{data}_fd"] for m in row[2])))
    rows = [*(known(data).items() if others else ()), *(row[1:] for row in rows)]
    quality = ["accuracy", "precision", "recall", "coverage"] + ["fid"] * (data == "cifar10")
    head = ["", "seeds", f"{data.upper()}-FD", "× teacher's", *quality]
    return table(head, [line(*row, data, *quality) for row in rows]).replace("fid", "FID", 1)


def mixture() -> str:
    """Where a single Gaussian ended on two modes, for each divergence; std 0.2 is one mode's."""
    (run,) = load("f_distill.mixture.*")
    rows = [[f"`{f}`", f"{m['mean']:.2f}", f"{m['std']:.2f}"] for f, m in run["metrics"].items()]
    return table(["`--f`", "mean", "standard deviation"], rows)


def videos() -> tuple[list[str], list[list[str]]]:
    """(head, rows): what changes from block to block in the default runs of causal_video.py."""
    runs, lines = [r["metrics"] for r in load("causal_video.default.?.n2048")], []
    for name in runs[0]:
        rows = [r[name] for r in runs]
        cells = [NAMES.get(name, name), str(len(rows[0]["bias"]))]
        cells += [spread([1000 * r["residual"][block] for r in rows], 1) for block in (0, 3, -1)]
        cells.append(spread([max(map(abs, r["bias"])) for r in rows], 3))
        cells += [spread([r[key][-1] for r in rows], 2) for key in ("spread", "correlation")]
        fps = spread([r["frames_per_second"] for r in rows], 0)
        lines.append([*cells, "" if name == "data" else fps])
    head = [f"residual × 1000, {b} block" for b in ("first", "4th", "last")]
    head += ["largest bias", "spread, last block", "correlation, last block", "frames / s"]
    return ["", "blocks", *head], lines


TABLES = {
    "results": results,
    "dmd": lambda: ablations("mnist", "dmd_mnist.*"),
    "dmd2": lambda: ablations("mnist", "dmd2_cifar.mnist*", others=False),
    "cifar10": lambda: ablations("cifar10", "[!e]*.cifar10*"),  # all but edm_teacher
    "descendants": lambda: ablations("mnist", "[dfl]*.mnist.*", others=False),
    "mixture": mixture,
    "videos": lambda: table(*videos()),
}


def wc(name: str) -> int:
    return sum(p.read_bytes().count(b"\n") for p in ROOT.glob(name + "*.py" * ("/" in name)))


def update(page: str) -> str:
    """The page with every <!-- table: name --> ... <!-- end --> block and line count made anew."""
    row, block = r"(?m)^(\| `(\w+\.py|\w+/)` \|) \d+", r"(?s)(<!-- table: (.*?) -->\n).*?(<!-- end)"
    page = re.sub(row, lambda m: f"{m[1]} {wc(m[2])}", page)
    return re.sub(block, lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", page)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        path.write_text(update(path.read_text(encoding="utf-8")), encoding="utf-8")
