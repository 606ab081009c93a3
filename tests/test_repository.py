"""The repository: copies are equal, options read, scripts stand alone, README is true."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from operator import attrgetter

import pytest
from conftest import ROOT

import edm_teacher as edm
import make_table

SCRIPTS = {  # the method scripts, each with options that make its run on drawn shapes quick
    "dmd_mnist.py": ["--pairs", "64"],
    "dmd2_cifar.py": ["--teacher-steps", "3", "--batch", "8", "--gan-features", "teacher"],
    "f_distill.py": ["--teacher-steps", "3", "--batch", "8"],
    "ladd.py": ["--teacher-steps", "3", "--batch", "8"],
    "causal_video.py": ["--teacher=new", "--teacher-updates=2", "--pairs=8", "--ode-updates=2"],
}
LARGE = ("dmd2_cifar.py", "f_distill.py", "ladd.py", "causal_video.py")  # take sd15:PATH, ...
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Top-level names that may differ between method scripts, with the reason.
MAY_DIFFER = {
    "generate": "one step in DMD, N in DMD2; LADD has no backward simulation; videos: a roll-out",
    "dmd_weight": "for videos the paper's weight alone",
    "sampling_sigmas": "DMD2 divides EDM's axis of time, LADD the rectified flow's",
    "gan_diffuse": "DMD2: all levels alike; LADD: logit-normal",
    "gan_generator_loss": "LADD: hinge too",
    "gan_discriminator_loss": "LADD: hinge too",
    "gan_gradient": "LADD chooses the loss",
    "Discriminator": "LADD: heads on all levels, their input features for R1; videos: attention",
    "sigma_of": "of the fraction u of the denoiser's axis; videos: of Self-Forcing's timestep",
    "load_teacher": "DMD's pairs are pixels; the others take the large backbones too",
    "generator_step": "the method itself",
    "fake_step": "DMD2 trains the discriminator in it",
    "Config": "each method has its own options",
    "train": "pairs in DMD, real images in DMD2, no fake in LADD",
    "pictures": "samplers differ",
    "evaluate": "samplers differ; DMD has teacher samples already",
    "main": "pairs in DMD, real images in DMD2, no fake in LADD",
}


def definitions(path):
    source = path.read_text(encoding="utf-8")
    nodes = ast.parse(source).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {n.name: ast.get_source_segment(source, n) for n in nodes if isinstance(n, kinds)}


def imports(tree):
    names = []
    for node in ast.walk(tree):
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
    return names


def test_the_same_name_is_the_same_text_in_every_script():
    """Copies are on purpose (each script stands alone); copies that drift apart are not."""
    copies = {}
    for script in SCRIPTS:
        for name, text in definitions(ROOT / script).items():
            copies.setdefault(name, []).append(text)
    drifted = {name for name, texts in copies.items() if len(set(texts)) > 1}
    assert drifted == set(MAY_DIFFER)


@pytest.mark.parametrize("script", [*SCRIPTS, "edm_teacher.py"])
def test_every_option_is_read(script):
    """A Config field that no code reads is an option that does nothing."""
    text = (ROOT / script).read_text(encoding="utf-8")
    shared = definitions(ROOT / "edm_teacher.py")
    shared = "".join(shared[k] for k in ("Run", "set_up", "draw_samples"))
    large = definitions(ROOT / "diffusers_backbones.py")
    shared += large["load_teacher"] + large["Backbone"] if script in LARGE else ""
    fields = re.findall(
        r"^    (\w+): (?:str|int|float|bool) = ", definitions(ROOT / script)["Config"], re.M
    )
    assert len(fields) > 20
    for field in fields:
        assert re.search(rf"cfg\.{field}\b", text + shared), field


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_nothing_else_of_this_repository(script):
    """But for edm_teacher, and inside load_teacher, for a large backbone, diffusers_backbones."""
    local = {p.stem for p in ROOT.glob("*.py")} - {"edm_teacher"}
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    lazy = {m for n in tree.body if getattr(n, "name", "") == "load_teacher" for m in imports(n)}
    found = [name for name in imports(tree) if name in local]
    assert lazy & local == ({"diffusers_backbones"} if script in LARGE else set())
    assert found == list(lazy & local)


@pytest.fixture(scope="module")
def made_on_the_spot():
    """Files of the first script's run that the others need not make again: they take 25 s."""
    return {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_and_edm_teacher_in_an_empty_folder_run(tmp_path, script, made_on_the_spot):
    """Two steps on drawn shapes; the first script makes a teacher and a metric on the spot."""
    for name in (script, "edm_teacher.py"):
        shutil.copy(ROOT / name, tmp_path)
    made = {} if script == "causal_video.py" else made_on_the_spot
    for name, content in made.items():
        (tmp_path / "runs/x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/x" / name).write_bytes(content)
    command = [sys.executable, script, "--data", "synthetic", "--steps", "2", "--eval-n", "64"]
    command += ["--out", "runs/x", *SCRIPTS[script]] + ["--resume"] * bool(made)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "runs/x/result.json").read_text())
    name = "self_forcing" if script == "causal_video.py" else "generator"
    assert name in done.stdout
    assert result["metrics"][name]["n"] == 64
    if script == "dmd_mnist.py":
        _, config = edm.load_tensors(tmp_path / "runs/x/metric.safetensors")
        _, labels = edm.load_data("synthetic")
        assert config["class_counts"] == labels.bincount().tolist()
        for name in ("teacher/teacher.safetensors", "metric.safetensors"):
            made_on_the_spot[name] = (tmp_path / "runs/x" / name).read_bytes()


@pytest.mark.parametrize("script", SCRIPTS)
def test_errors_are_one_sentence(tmp_path, script):
    command = [sys.executable, str(ROOT / script), "--teacher", "absent.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip() == f"{script}: There is no file absent.safetensors."


# ---------------------------------------------------------------- README


def test_tables_are_generated_from_the_results():
    """python make_table.py rewrites them; run it after adding a result."""
    assert make_table.update(README) == README
    assert set(re.findall(r"<!-- table: (.*?) -->", README)) == set(make_table.TABLES)


def test_equation_map_names_things_that_exist():
    """| equation | `file.function` | `test` |: both are there."""
    tests = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        tests |= definitions(path).keys()
    rows = re.findall(r"^\|[^|]+\| `(\w+)\.([\w.]+)`[^|]*\| `(test_\w+)` \|$", README, re.M)
    assert len(rows) >= 12
    for module, name, test in rows:
        assert attrgetter(name)(importlib.import_module(module)), name
        assert test in tests, test


def test_commands_in_the_readme_parse():
    """Every `python script.py ...` in a code block has flags that exist."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", README, re.S))
    commands = re.findall(r"python (\w+)\.py([^#&\n]*)", blocks)
    assert len(commands) >= 5
    for script, arguments in commands:
        assert (ROOT / f"{script}.py").exists()
        if script != "make_table":
            module = __import__(script)
            edm.parse_config(module.Config, arguments.split())


def test_files_named_in_the_readme_exist():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
