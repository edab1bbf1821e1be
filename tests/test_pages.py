"""What README and docs/ say is there: commands, files of the repository, configurations, options, plans and code."""

import ast
import json
import re
from importlib import import_module
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer

import qpruner.callbacks
import qpruner.datamodules  # noqa: F401  # as the names of its classes are found
from qpruner.commands import COMMANDS
from qpruner.datamodules.base import TokenDataModule
from qpruner.joint.config import JointConfig
from qpruner.model_folder import read_plan
from qpruner.plan import CompressionPlan
from qpruner.records.folder import RunConfig
from qpruner.runs.phases import PhaseConfig
from qpruner.search.config import SearchConfig
from qpruner.training.module import LoRAFinetuner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


INCLUDED = re.compile(r'^--8<-- "(.+)"$', re.M)
"""A file of the repository that a page shows."""


def content_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return INCLUDED.sub(lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), text)


def of_all_pages(pattern: str) -> list[Any]:
    """Every match of a pattern in a page, as a case of a test that names the page."""
    return [
        pytest.param(match.group(1), id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, match in enumerate(re.finditer(pattern, content_of(page), re.M | re.S))
    ]


def blocks(language: str) -> list[Any]:
    return of_all_pages(rf"^```{language}\n(.*?)^```")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(
        r"\b(?:benchmarks|callbacks|configs|datamodules|qpruner|scripts|tests)/[\w/]+\.\w+", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_of_pages_that_mkdocs_does_not_build_lead_somewhere(page: Path) -> None:
    targets = [link for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in link]
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_a_page_shows_are_there(page: Path) -> None:
    text = page.read_text()
    shown = re.findall(r"^    qpruner (\S+)|`qpruner ([a-z]+)", text, re.M)
    assert {name for pair in shown for name in pair if name} - {*COMMANDS, "--help"} == set()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_options_of_a_configuration_are_options(text: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LoRAFinetuner, "model")
    parser.add_class_arguments(Trainer, "trainer", skip={"callbacks"})
    parser.add_argument("--trainer.callbacks", type=list[Callback])
    parser.add_argument("--run", type=RunConfig)
    parser.add_argument("--data", type=TokenDataModule)
    parser.add_argument("--phases", type=list[PhaseConfig])
    parser.add_argument("--joint", type=JointConfig)
    parser.add_argument("--search", type=SearchConfig)
    content = yaml.safe_load(text)
    if "data" in content:  # its tokenizer is that of the base
        content["data"]["init_args"]["tokenizer"] = "qpruner/stories"
    parser.parse_object(content)


@pytest.mark.parametrize("text", blocks("json"))
def test_plans_that_are_shown_are_plans(text: str) -> None:
    plan = CompressionPlan.from_json(text)
    assert json.loads(plan.to_json()) == json.loads(text)


@pytest.mark.parametrize("text", blocks("python"))
def test_what_examples_import_is_there(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                imported(name.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            module = imported(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


OF_OTHERS = ("llama_cpp", "dask_jobqueue")


def imported(name: str) -> Any:
    """A module that an example imports; engines and clusters of others need not be installed here."""
    return pytest.importorskip(name) if name.partition(".")[0] in OF_OTHERS else import_module(name)


def test_every_configuration_is_told_of() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in (ROOT / "configs").iterdir() if f"configs/{path.name}" not in text] == []


def test_the_example_without_a_trainer_leaves_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    (example,) = (code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "CompressedModel" in code)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert read_plan(tmp_path / "narrow").widths.ffn_channels == (256,) * 6


def test_the_example_of_own_data_feeds_a_fit(tiny_llama: Path) -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    (example,) = (code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "class Texts" in code)
    exec(example, names := {})
    texts = {split: ["One day Tom went home.", "Max had a stamp."] * 4 for split in ("train", "validation", "test")}
    data = names["Texts"](texts, tokenizer=str(tiny_llama), max_length=24)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, use_distributed_sampler=False
    )
    trainer.fit(LoRAFinetuner(str(tiny_llama)), datamodule=data)
    assert trainer.callback_metrics["val/loss"] > 0 and "one document per row" in data.protocol


def test_marks_of_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="installed by `make docs`")
    to_markdown = run_path(str(ROOT / "scripts" / "docstring_markup.py"))["to_markdown"]
    told = "Like this::\n\n    code\n\nsetup, on_fit_end\n    Says\n    why.\n\nArgs:\n    name: a name."
    assert to_markdown(told) == (
        "Like this:\n\n    code\n\n`setup`, `on_fit_end`\n:   Says why.\n\n\nArgs:\n    name: a name."
    )
