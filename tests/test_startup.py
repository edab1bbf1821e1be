"""What commands import: seconds lie between those that need a Trainer, those that look at a model, and the others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name

import pytest
from support.families import tiny_config

from qpruner import __version__
from qpruner.anatomy import architecture_of
from qpruner.cli import SKIPPED
from qpruner.commands import COMMANDS, run
from qpruner.errors import UserError
from qpruner.plan import CompressionPlan

HEAVY = ("torch", "transformers", "lightning", "matplotlib", "numpy", "scipy")
OF_MODELS = (
    "lightning", "transformers.modeling_utils", "peft", "matplotlib", "datasets", "scipy",
    "bitsandbytes", "torch._dynamo",
)  # fmt: skip


def imported_by(commands: Iterable[list[str]], modules: tuple[str, ...]) -> set[str]:
    """Those of the modules that a process has imported after running commands."""
    code = (
        "import json, sys\nfrom qpruner.commands import run\nfrom qpruner.errors import UserError\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    try: run(command)\n"
        "    except (SystemExit, UserError): pass\n"
        "print('\\n', json.dumps([*sys.modules]))"
    )
    command = [sys.executable, "-c", code, json.dumps([*commands])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {*modules} & {*json.loads(done.stdout.splitlines()[-1])}


@pytest.fixture
def plan(tmp_path: Path) -> str:
    file = tmp_path / "plan.json"
    CompressionPlan.dense(architecture_of(tiny_config("llama")), None).write(file)
    return str(file)


def test_what_only_prints_imports_nothing_heavy(plan: str) -> None:
    commands = [["--help"], ["--version"], ["plan", "show", plan], ["plan", "diff", plan, plan], ["plan", "show"]]
    commands += [["plan", "--help"], ["plan", "ratios", "--help"], ["merge", "--help"], ["merge", "a", "b", "--dtyp=x"]]
    assert imported_by(commands, HEAVY) == set()


def test_what_looks_at_a_model_needs_no_model_classes_and_no_trainer(plan: str, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    commands = [["plan", "ratios", str(tmp_path)], ["plan", "check", plan, "--base", str(tmp_path)]]
    assert imported_by(commands, OF_MODELS) == set()


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("fit", "validate", "test", "predict", "search", "report", "plan", "merge", "export"):
        assert f"  {name:10}{COMMANDS[name].summary}" in lines
    assert all(len(line) <= 120 for line in lines)
    run(["--version"])
    assert capsys.readouterr().out == f"qpruner {__version__}\n"


def test_every_command_is_there() -> None:
    targets = [command.target for command in COMMANDS.values() if command.target]
    assert len(targets) == 8 and all(map(callable, map(resolve_name, targets)))
    assert {name for name, command in COMMANDS.items() if not command.target} == SKIPPED.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "No command was given. The commands are fit, "),
        (["fitt"], "There is no command 'fitt'. Did you mean 'fit'? The commands are fit, "),
        (["--config", "x.yaml", "fit"], "The command comes before the options, and '--config' is none."),
    ],
)
def test_what_is_no_command(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        run(arguments)
    assert str(caught.value).startswith(said)


def test_a_reader_who_has_seen_enough_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "qpruner", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
