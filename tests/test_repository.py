"""The house: arrows between files, equal copies, options that are read, scripts that run alone."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from operator import attrgetter

import pytest
import tyro
from conftest import ROOT, tiny_metric

import edm_teacher as edm
from tools import table

SCRIPTS = ("dmd_mnist", "dmd2_cifar", "f_distill", "ladd", "causal_video")
TEXT = {p: p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py") if "runs" not in p.parts}
PAGES = {p: p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}

# Top-level names that may differ between scripts, with the reason.
MAY_DIFFER = {
    "generate": "one step in DMD, N in DMD2; LADD has no backward simulation; videos: a roll-out",
    "dmd_weight": "for videos the paper's weight alone",
    "sampling_sigmas": "DMD2 divides EDM's axis of time, LADD the rectified flow's",
    "gan_diffuse": "DMD2: all levels alike; LADD: logit-normal",
    "gan_generator_loss": "LADD: hinge too",
    "gan_discriminator_loss": "LADD: hinge too",
    "gan_gradient": "LADD chooses the loss; videos: relativistic",
    "Discriminator": "LADD: heads on all levels, their input features for R1; videos: attention",
    "generator_step": "the method itself",
    "fake_step": "DMD2 trains the discriminator in it",
    "Config": "each method has its own options",
    "load_teacher": "DMD's pairs are pixels; the others take the large backbones too; videos",
    "train": "pairs in DMD, real images in DMD2, no fake in LADD",
    "evaluate": "samplers differ; DMD has teacher samples already",
    "main": "pairs in DMD, real images in DMD2, stages of videos",
}


def definitions(path):
    kinds, text = (ast.FunctionDef, ast.ClassDef), TEXT[path]
    nodes = [n for n in ast.parse(text).body if isinstance(n, kinds)]
    return {n.name: ast.get_source_segment(text, n) for n in nodes}


def imported(tree) -> set[str]:
    """The parts of this repository that the statements below `tree` import."""
    names = set()
    for node in ast.walk(tree):
        names |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    return {name.partition(".")[0] for name in names} & OURS


OURS = {*SCRIPTS, "edm_teacher", "causal_objectives", "backbones", "tools"}
ON_TOP = {script: {"edm_teacher"} for script in SCRIPTS} | {"edm_teacher": set()}
ON_TOP |= {"causal_objectives": {"edm_teacher"}}
LAZY = {  # what a function may import, and which
    "load_teacher": {"backbones"},
    "load_images": {"tools"},
    "evaluate": {"tools"},
    "objectives": {"causal_objectives"},
}


@pytest.mark.parametrize("script", ON_TOP)
def test_arrows_of_scripts(script):
    """Scripts need edm_teacher alone. All else is imported lazily, where it can be deleted."""
    tree = ast.parse(TEXT[ROOT / f"{script}.py"])
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    top = [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.If))]
    assert set().union(*map(imported, top)) == ON_TOP[script]
    for function in functions if script != "edm_teacher" else ():
        assert imported(function) <= LAZY.get(function.name, set()), function.name
    if script == "edm_teacher":  # its part C is a script, too; its other parts import nothing
        found = {f.name for f in functions if imported(f)}
        assert found == {"train", "load_images", "load_metric", "main"}
        assert set().union(*map(imported, functions)) == {"tools"}


def test_arrows_of_packages():
    """backbones and tools point to edm_teacher; mixture and benchmark are programs on scripts."""
    for path, text in TEXT.items():
        allowed = {"edm_teacher", path.parent.name}
        allowed |= {"f_distill"} if path.stem == "mixture" else set()
        allowed |= {"backbones"} if path.stem == "evaluate" else set()
        allowed |= {"tools"} if path.stem in ("denoiser", "scripts") else set()  # titled pictures
        if path.parent.name in ("backbones", "tools"):
            assert imported(ast.parse(text)) <= allowed, path


def test_there_is_no_circle_inside_a_package():
    for package in ("backbones", "tools"):
        needs = {}
        for path in (ROOT / package).glob("*.py"):
            needs[path.stem] = set(re.findall(rf"from {package}\.(\w+) import", TEXT[path]))
            listed = re.findall(rf"^from {package} import (.*)$", TEXT[path], re.M)
            needs[path.stem] |= {name.strip() for names in listed for name in names.split(",")}
        while ready := [name for name, others in needs.items() if not others & needs.keys()]:
            for name in ready:
                del needs[name]
        assert not needs, f"{package}: {needs}"


def test_the_same_name_is_the_same_text_in_every_script():
    """Copies are on purpose (each script stands alone); copies that drift apart are not."""
    copies = {}
    for script in (*SCRIPTS, "causal_objectives"):
        for name, text in definitions(ROOT / f"{script}.py").items():
            copies.setdefault(name, set()).add(text)
    assert {name for name, texts in copies.items() if len(texts) > 1} == set(MAY_DIFFER)


@pytest.mark.parametrize("script", [*SCRIPTS, "edm_teacher"])
def test_every_option_is_read(script):
    """A Config field that no code reads is an option that does nothing."""
    config = importlib.import_module(script).Config
    text = TEXT[ROOT / f"{script}.py"] + TEXT[ROOT / "edm_teacher.py"]
    text += "".join(t for p, t in TEXT.items() if p.parent.name in ("tools", "backbones"))
    for field in fields(config):
        own = field.name in config.__annotations__
        where = text if not own or field.name == "pairs" else TEXT[ROOT / f"{script}.py"] + text
        assert re.search(rf"\b(cfg|self)\.{field.name}\b|\"{field.name}\"", where), field.name


@pytest.mark.parametrize("script", [*SCRIPTS, "edm_teacher", "causal_objectives"])
def test_no_script_names_another(script):
    """Not its options, files or teachers; docstrings may point to it."""
    tree = ast.parse(TEXT[ROOT / f"{script}.py"])
    docs = {
        ast.get_docstring(n, clean=False)
        for n in ast.walk(tree)
        if hasattr(n, "body") and isinstance(n, (ast.Module, ast.FunctionDef, ast.ClassDef))
    }
    text = TEXT[ROOT / f"{script}.py"]
    for doc in docs - {None}:
        text = text.replace(doc, "")
    code = "\n".join(line.partition("  # ")[0] for line in text.splitlines())
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search("hasattr|is_large|_is_large", code)
    others = {*SCRIPTS} - {script}
    assert not [name for name in others if re.search(rf"\b{name}\b", code)]


# ---------------------------------------------------------------- alone in an empty folder


@pytest.fixture(scope="module")
def teacher():
    """The teacher that the first run makes on the spot; the others need not: it takes 20 s."""
    return {}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_and_edm_teacher_in_an_empty_folder_train_and_draw(tmp_path, script, teacher):
    """Two files, drawn shapes: no tools/, so no verdict, but pictures and a generator."""
    for name in (f"{script}.py", "edm_teacher.py"):
        shutil.copy(ROOT / name, tmp_path)
    made = tmp_path / "runs/x/teacher/teacher.safetensors"
    command = [sys.executable, f"{script}.py", "--data", "synthetic", "--steps", "2"]
    command += ["--out", "runs/x", "--batch", "8"]
    if script == "causal_video":
        command += ["--teacher=new", "--teacher-updates=2", "--pairs=8", "--ode-updates=2"]
    elif teacher:
        made.parent.mkdir(parents=True)
        made.write_bytes(teacher["file"])
    command += ["--pairs", "16", "--pair-steps", "3"] if script == "dmd_mnist" else []
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no verdict" in done.stdout
    run = tmp_path / "runs/x" / ("self_forcing" if script == "causal_video" else "")
    for name in ("generator.safetensors", "samples_2.png", "denoised.png", "checkpoint.pt"):
        assert (run / name).stat().st_size > 0
    assert json.loads((tmp_path / "runs/x/result.json").read_text())["metrics"] == {}
    if script == "dmd_mnist":
        teacher["file"] = made.read_bytes()


def test_with_tools_there_is_a_verdict(tmp_path, teacher):
    """The same on drawn shapes with tools/ beside it."""
    for name in ("dmd_mnist.py", "edm_teacher.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "runs/x/teacher").mkdir(parents=True)
    (tmp_path / "runs/x/teacher/teacher.safetensors").write_bytes(teacher["file"])
    edm.save_tensors(tmp_path / "runs/x/metric.safetensors", *tiny_metric())
    command = [sys.executable, "dmd_mnist.py", "--data=synthetic", "--steps=2", "--eval-n=64"]
    command += ["--out=runs/x", "--batch=8", "--pairs=64", "--pair-steps=3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "runs/x/result.json").read_text())
    assert result["metrics"]["generator"]["n"] == 64
    assert (tmp_path / "runs/x/curves.png").stat().st_size > 0


ALL_IN_ONE = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--teacher", "absent.safetensors"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        print(end.code)
"""


def test_errors_are_one_sentence(tmp_path):
    """All scripts in one process, as torch starts slowly. A refused start leaves nothing."""
    paths = [str(ROOT / f"{script}.py") for script in SCRIPTS]
    command = [sys.executable, "-c", ALL_IN_ONE, *paths]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    wanted = [f"{script}.py: There is no file absent.safetensors." for script in SCRIPTS]
    assert done.stdout.splitlines() == wanted
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- README and docs


def test_tables_are_generated_from_the_results():
    """python -m tools.table rewrites them; run it after adding a result."""
    found = set()
    for page, text in PAGES.items():
        assert table.update(text) == text, page
        found |= set(re.findall(r"<!-- table: (.*?) -->", text))
    assert found == set(table.TABLES)


def test_equation_map_names_things_that_exist():
    """| equation | `file.function` | `test` |: both are there."""
    tests = {name for path in TEXT if path.name.startswith("test_") for name in definitions(path)}
    rows = re.findall(
        r"^\|[^|]+\| `(\w+)\.([\w.]+)`[^|]*\| `(test_\w+)` \|$",
        PAGES[ROOT / "docs/equations.md"],
        re.M,
    )
    assert len(rows) >= 40
    for module, name, test in rows:
        module = f"tools.{module}" if (ROOT / f"tools/{module}.py").exists() else module
        assert attrgetter(name)(importlib.import_module(module)), name
        assert test in tests, test


def commands():
    for text in PAGES.values():
        for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
            for line in block.replace("\\\n", " ").splitlines():
                found = re.search(r"(?:python|torchrun [^.]*?) (-m tools\.\w+|\w+\.py)(.*)", line)
                if found:
                    program = found[1].removeprefix("-m ").removesuffix(".py")
                    yield program, re.split(r"&&|\s#|>", found[2])[0].split()


def test_commands_in_readme_and_docs_parse():
    """Every command in a code block has options that exist, with values that are allowed."""
    seen = set()
    for program, arguments in commands():
        seen.add(program)
        if program == "tools.benchmark":
            program, *arguments = arguments
        module = importlib.import_module(program)
        if program != "tools.table":
            tyro.cli(module.Config, args=arguments)
    assert {*SCRIPTS, "edm_teacher", "tools.evaluate", "tools.benchmark"} <= seen


def test_files_named_in_readme_and_docs_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"\]\(([\w./-]+)[)#]", text):
            assert (page.parent / name).exists(), (page.name, name)


def test_readme_is_short():
    lines = PAGES[ROOT / "README.md"].splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 120
