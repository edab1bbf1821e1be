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
    "conv1d": set(),
    "experts": {"anatomy", "modeling_compressed"},
    "errors": set(),
    "quiet": set(),
    "seeds": set(),
    "stories": set(),
    "__init__": {"model_folder"},
    "__main__": {"commands", "errors", "quiet"},
    "modeling_compressed": set(),
    "adapter_files": {"errors", "files", "folder_manifest", "reference_logits", "schema", "tensor_files"},
    "adapters": {"errors", "seeds"},
    "allocation": {
        "anatomy", "calibration", "errors", "likelihood", "plan", "pricing", "quantization", "schema", "seeds",
    },
    "anatomy": {"architecture", "errors", "plan"},
    "architecture": {"errors", "ranges"},
    "calibration": {"anatomy", "errors", "likelihood", "modes", "offload", "processes"},
    "auto_classes": {"anatomy", "modeling_compressed", "remote_code"},
    "callbacks": {
        "adapters", "allocation", "anatomy", "calibration", "compressed", "datamodules", "errors", "files",
        "folder_manifest", "memory", "plan", "pricing", "processes", "pruning", "quantization", "records", "training",
    },
    "cli": {
        "commands", "datamodules", "errors", "joint", "options", "pretrained", "records", "runs", "search", "training",
    },
    "commands": {"__version__", "cli", "errors"},
    "compare_command": {"files", "options", "records"},
    "compressed": {
        "adapter_files", "adapters", "anatomy", "calibration", "dense_base", "errors", "files", "folder_manifest",
        "model_folder", "offload", "plan", "pretrained", "pricing", "pruning", "quantization",
    },
    "datamodules": {"anatomy", "errors", "files", "likelihood", "pretrained", "seeds", "stories"},
    "dense_base": {
        "adapter_files", "anatomy", "folder_manifest", "likelihood", "model_folder", "offload", "plan", "pretrained",
        "quantization",
    },
    "dense_copy": {
        "adapter_files", "compressed", "datamodules", "errors", "files", "folder_manifest", "memory", "model_folder",
        "offload", "plan", "quantization", "records", "remote_code", "schema", "training",
    },
    "evaluate_command": {
        "datamodules", "errors", "evaluation", "options", "pretrained", "processes", "records", "stories",
    },
    "evaluation": {
        "adapter_files", "datamodules", "errors", "files", "folder_manifest", "likelihood", "memory", "model_folder",
        "modes", "pretrained", "pricing", "processes", "records", "training",
    },
    "export": {
        "adapter_files", "adapters", "anatomy", "dense_copy", "errors", "files", "folder_manifest", "model_folder",
        "modeling_compressed", "plan", "pretrained", "pruning", "quantization", "remote_code",
    },
    "export_command": {"export", "options"},
    "files": {"errors"},
    "generate_command": {"evaluation", "options"},
    "folder_manifest": {"errors", "files", "schema"},
    "joint": {
        "allocation", "anatomy", "calibration", "datamodules", "errors", "likelihood", "plan", "pricing", "processes",
        "quantization", "seeds", "training",
    },
    "likelihood": {"errors"},
    "loading_info": {"errors"},
    "memory": {"anatomy", "errors", "likelihood", "offload", "quantization"},
    "merge_command": {"dense_copy", "options"},
    "model_files": {"errors", "files", "folder_manifest", "schema"},
    "model_folder": {
        "adapter_files", "anatomy", "architecture", "conv1d", "errors", "experts", "files", "folder_manifest", "memory",
        "plan", "pretrained", "pruning", "quantization", "reference_logits", "remote_code", "schema", "tensor_files",
    },
    "modes": set(),
    "offload": {"anatomy", "errors", "files", "likelihood"},
    "options": {"callbacks", "datamodules", "errors"},
    "outline": {"anatomy"},
    "plan": {"architecture", "errors", "files", "precision", "ranges"},
    "plan_command": {
        "allocation", "anatomy", "errors", "files", "memory", "model_folder", "options", "outline", "plan",
        "pretrained", "pricing", "pruning", "records",
    },
    "precision": {"errors", "ranges"},
    "prequantized": {"errors"},
    "pretrained": {
        "anatomy", "conv1d", "errors", "experts", "files", "loading_info", "model_files", "offload", "prequantized",
    },
    "pricing": {"adapters", "anatomy", "memory", "plan", "pruning", "quantization"},
    "processes": {"errors"},
    "pruning": {
        "adapters", "anatomy", "calibration", "errors", "likelihood", "memory", "modeling_compressed", "offload",
        "plan", "processes", "quantization", "seeds",
    },
    "quantization": {
        "adapters", "anatomy", "calibration", "errors", "files", "modeling_compressed", "offload", "plan", "pretrained",
        "processes",
    },
    "records": {"allocation", "errors", "files", "folder_manifest", "plan", "schema"},
    "ranges": {"errors"},
    "reference_logits": {"errors", "folder_manifest", "modes", "offload", "tensor_files"},
    "remote_code": {"anatomy", "experts", "files", "modeling_compressed", "pruning"},
    "report_command": {"errors", "options", "records"},
    "runs": {
        "adapter_files", "allocation", "anatomy", "callbacks", "compressed", "datamodules", "errors", "files",
        "folder_manifest", "joint", "memory", "model_folder", "plan", "pretrained", "pricing", "processes", "pruning",
        "quantization", "records", "search", "training",
    },
    "schema": {"errors", "files"},
    "search": {
        "adapters", "allocation", "anatomy", "calibration", "callbacks", "compressed", "datamodules", "dense_base",
        "errors", "files", "folder_manifest", "likelihood", "memory", "offload", "outline", "plan", "pretrained",
        "pricing", "processes", "pruning",
        "quantization", "records", "schema", "seeds", "training",
    },
    "tensor_files": {"errors", "files", "folder_manifest"},
    "training": {
        "adapters", "anatomy", "compressed", "datamodules", "dense_base", "errors", "files", "folder_manifest",
        "likelihood", "memory", "model_folder", "modes", "offload", "outline", "plan", "pretrained", "processes",
        "records", "schema", "seeds",
    },
    "verify_command": {
        "errors", "folder_manifest", "model_folder", "options", "reference_logits", "remote_code",
    },
}  # fmt: skip
OUTSIDERS = {
    "lightning": {
        "callbacks",
        "cli",
        "datamodules",
        "dense_copy",
        "evaluation",
        "joint",
        "options",
        "runs",
        "search",
        "training",
    },
    "nevergrad": {"search"},
}  # fmt: skip


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


def test_the_table_of_arrows_has_no_circle() -> None:
    """But for the table of commands, which imports what runs a command only as it runs."""
    left = {room: others - {"cli", "__version__"} for room, others in ALLOWED.items()}
    while free := {room for room, others in left.items() if not others & left.keys()}:
        left = {room: others for room, others in left.items() if room not in free}
    assert not left


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
