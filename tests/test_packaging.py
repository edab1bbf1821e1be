"""The package as others get it: one identity for every class, arrows one way, and a wheel with everything in it."""

import ast
import importlib
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", ["callbacks", "datamodules"])
def test_top_level_folders_have_one_identity(folder: str) -> None:
    assert (ROOT / "qpruner" / folder).is_symlink()
    assert os.readlink(ROOT / "qpruner" / folder) == f"../{folder}"
    for file in (ROOT / folder).glob("*.py"):
        name = "" if file.stem == "__init__" else f".{file.stem}"
        assert importlib.import_module(f"qpruner.{folder}{name}")
    bare = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode == 1
    assert f"import qpruner.{folder}" in bare.stderr


# What each room may import of the others; a room that is not here may import nothing of ours.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeds": set(),
    "files": {"errors"},
    "schema": {"errors", "files"},
    "folder_manifest": {"errors", "files", "schema"},
    "stories": set(),
    "plan": {"errors", "files"},
    "anatomy": {"errors", "plan"},
    "model_files": {"errors", "files", "folder_manifest", "schema"},
    "prequantized": {"errors"},
    "loading_info": {"errors"},
    "pretrained": {"errors", "files", "loading_info", "model_files", "prequantized"},
    "likelihood": {"errors"},
    "adapters": {"errors", "seeds"},
    "quantization": {"adapters", "anatomy", "errors", "files", "plan", "pretrained"},
    "processes": set(),
    "memory": {"errors", "quantization"},
    "pruning": {"adapters", "anatomy", "errors", "likelihood", "memory", "plan", "quantization", "seeds"},
    "pricing": {"adapters", "anatomy", "memory", "plan", "pruning", "quantization"},
    "allocation": {
        "adapters", "anatomy", "errors", "files", "likelihood", "plan", "pricing", "pruning", "quantization", "schema",
        "seeds",
    },
    "checkpoint": {
        "anatomy", "errors", "files", "folder_manifest", "memory", "plan", "pretrained", "pruning", "quantization",
        "schema",
    },
    "runs": {"allocation", "errors", "files", "plan", "schema"},
    "datamodules": {"errors", "files", "likelihood", "seeds", "pretrained", "stories"},
    "training": {
        "adapters", "anatomy", "checkpoint", "datamodules", "errors", "files", "folder_manifest", "likelihood",
        "memory", "plan", "pretrained", "pricing", "pruning", "quantization", "schema", "seeds",
    },
    "callbacks": {
        "adapters", "allocation", "anatomy", "checkpoint", "datamodules", "errors", "files", "memory", "plan",
        "pricing", "processes", "pruning", "quantization", "runs", "training",
    },
    "search": {
        "allocation", "anatomy", "callbacks", "checkpoint", "datamodules", "errors", "files", "likelihood", "memory",
        "plan", "pricing", "quantization", "runs", "seeds", "training",
    },
    "phases": {"callbacks", "errors", "runs", "training"},
    "options": {"callbacks", "datamodules", "errors"},
    "outline": {"anatomy"},
    "plan_command": {
        "anatomy", "checkpoint", "errors", "files", "memory", "options", "outline", "plan", "pretrained", "pricing",
        "pruning", "runs",
    },
    "report_command": {"errors", "options", "runs"},
    "merge_command": {"merge", "options"},
    "commands": {"__version__", "cli", "errors"},
    "cli": {
        "callbacks", "checkpoint", "commands", "datamodules", "errors", "folder_manifest", "memory", "options",
        "phases", "plan", "pretrained", "report_command", "runs", "search", "training",
    },
    "quiet": set(),
    "merge": {
        "checkpoint", "datamodules", "errors", "folder_manifest", "memory", "plan", "quantization", "runs", "schema",
        "training",
    },
    "__main__": {"commands", "errors", "quiet"},
    "__init__": {"checkpoint"},
}  # fmt: skip
OUTSIDERS = {
    "lightning": {"callbacks", "cli", "merge", "datamodules", "options", "phases", "search", "training"},
    "nevergrad": {"search"},
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_arrows_go_one_way() -> None:
    files = [file for folder in ("qpruner", "callbacks", "datamodules") for file in (ROOT / folder).rglob("*.py")]
    wrong = []
    for file in files:
        relative = (
            file.relative_to(ROOT / "qpruner") if file.is_relative_to(ROOT / "qpruner") else file.relative_to(ROOT)
        )
        room = relative.parts[0].removesuffix(".py")
        for name in imports(file):
            package, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if package == "qpruner" and other != room and other not in ALLOWED[room]:
                wrong.append(f"{relative} imports {name}")
            if package in OUTSIDERS and room not in OUTSIDERS[package]:
                wrong.append(f"{relative} imports {name}")
    assert not wrong


def test_a_wheel_made_from_the_sdist_holds_everything_and_works_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {f"qpruner/{file.relative_to(ROOT / 'qpruner')}" for file in (ROOT / "qpruner").rglob("*.py")}
    expected |= {
        f"qpruner/{file.relative_to(ROOT)}" for f in ("callbacks", "datamodules") for file in (ROOT / f).glob("*.py")
    }
    checkpoint = ROOT / "qpruner" / "stories" / "checkpoint"
    expected |= {f"qpruner/stories/checkpoint/{file.name}" for file in checkpoint.iterdir()} | {"qpruner/py.typed"}
    assert expected <= held
    assert not any(name.startswith(("callbacks", "datamodules", "tests")) for name in held)
    # Installed in an environment of its own that sees the libraries of this one but not its qpruner.
    place = tmp_path / "elsewhere"
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries))
    code = (
        "import qpruner.callbacks, qpruner.datamodules as d; from qpruner.pretrained import EMBEDDED\n"
        "data = d.StoriesDataModule(tokenizer=EMBEDDED, num_train=5, num_validation=1, num_test=1, num_choices=0)\n"
        "print(qpruner.__file__, len(data.examples('train')))"
    )
    done = subprocess.run([place / "bin" / "python", "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "qpruner" / "__init__.py"), "5"]
