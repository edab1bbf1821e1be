"""Every way to give an option wrongly, and what is said of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qpruner.cli import QPrunerCLI
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.options.given import read_arguments
from qpruner.options.mistakes import Mistakes

BITS = "it must be a whole number, a list of whole numbers, a mapping to whole numbers, a list of mappings to whole "
PRUNING = ["--trainer.callbacks", "StructuredPruning"]
PRUNING_BY = [*PRUNING, "--trainer.callbacks.ratio", "0.2"]
QUANTIZATION = ["--trainer.callbacks", "MixedPrecisionQuantization"]
DATA = "one of InstructionDataModule, StoriesDataModule, TextDataModule"
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
Tell = Callable[..., str]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Tell:
    """What is said of the options of a command; nothing where it would begin to work."""

    def told(*arguments: str, command: str = "fit") -> str:
        with pytest.raises(UserError) as caught:
            run([command, *arguments])
        return str(caught.value)

    def begin(cli: QPrunerCLI) -> None:
        raise AssertionError("the options were taken")

    monkeypatch.setattr(QPrunerCLI, "before_instantiate_classes", begin)
    return told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        # Values of the wrong kind: options of classes, whichever way the class and they are given.
        ([*QUANTIZATION, "--trainer.callbacks.bits", "four"], f"trainer.callbacks.bits is 'four'; {BITS}"),
        (["--trainer.callbacks+=MixedPrecisionQuantization", "--trainer.callbacks.bits", "four"], f"is 'four'; {BITS}"),
        ([*QUANTIZATION, "--trainer.callbacks.init_args.bits=3.5"], f"trainer.callbacks.bits is '3.5'; {BITS}"),
        ([*QUANTIZATION, "--trainer.callbacks.formats", "nf4"], "callbacks.formats is 'nf4'; it must be a mapping"),
        ([*QUANTIZATION, "--trainer.callbacks.budget.share", "x"], "callbacks.budget.share is 'x'; it must be a numbe"),
        ([*QUANTIZATION, "--trainer.callbacks.budget", "5"], "it must be a mapping with bytes, average_bits, share"),
        ([*PRUNING, "--trainer.callbacks.ratio", "abc"], "trainer.callbacks.ratio is 'abc'; it must be a number."),
        ([*PRUNING_BY, "--trainer.callbacks.selection.floor", "x"], "callbacks.selection.floor is 'x'; it must be a n"),
        ([*PRUNING_BY, "--trainer.callbacks.selection.uniform", "maybe"], "is 'maybe'; it must be true or false."),
        ([*PRUNING_BY, "--trainer.callbacks.selection.scope", "locl"], "one of local, global. Did you mean 'local'?"),
        ([*PRUNING_BY, "--trainer.callbacks.selection.leave_alone", "[a]"], "'[a]'; it must be a list of whole number"),
        (["--data", "StoriesDataModule", "--data.num_train", "many"], "data.num_train is 'many'; it must be a whole n"),
        (["--data.init_args.num_train", "many"], "data.num_train is 'many'; it must be a whole number."),
        (["--data.loader.batch_size", "four"], "data.loader.batch_size is 'four'; it must be a whole number."),
        (["--data.loader", "5"], "data.loader is '5', but it is a group of options."),
        (["--data", "StoriesDataModule", "--data.batch_size", "4"], "Did you mean 'data.loader.batch_size'?"),
        (["--model.lr", "0.1"], "Did you mean 'model.optimizer.lr'?"),
        ([*QUANTIZATION, "--trainer.callbacks.widths", "[2, 4]"], "Did you mean 'trainer.callbacks.deciding.widths'?"),
        (["--data.loader.eval_batch_size", "4"], "not by rows: give eval_tokens_per_batch instead"),
        (["--data", "{class_path: StoriesDataModule, init_args: {num_train: x}}"], "data.num_train is 'x'; it must be"),
        # ... of nested dataclasses, unions, booleans, lists and literals.
        (["--model.lora.r", "two"], "model.lora.r is 'two'; it must be a whole number."),
        (["--model.lora.r", "2.5"], "model.lora.r is '2.5'; it must be a whole number."),
        (["--model.lora.r", ""], "model.lora.r is ''; it must be a whole number."),
        (["--model.lora.r", "None"], "model.lora.r is 'None'; it must be a whole number."),
        (["--model.lora.r", "3", "--model.lora.r", "[1]"], "model.lora.r is '[1]'; it must be a whole number."),
        (["--model.lora", "{r: two}"], "model.lora.r is 'two'; it must be a whole number."),
        (["--model.lora", "5"], "model.lora is '5', but it is a group of options."),
        (["--model.optimizer.lr", "x"], "model.optimizer.lr is 'x'; it must be a number."),
        (["--model.optimizer.name", "adam"], "it must be one of adamw, adamw_8bit, paged_adamw_8bit, paged_adamw. Did"),
        (["--model.gradient_checkpointing", "perhaps"], "is 'perhaps'; it must be true or false."),
        (["--model.lora", "x" * 9999], "xxx..., but it is a group of options."),
        (["--model", "LoRAFinetuner"], "model is 'LoRAFinetuner', but it is a group of options."),
        (["--trainer.max_epochs", "1.5"], "trainer.max_epochs is '1.5'; it must be a whole number or null."),
        (["--trainer.precision", "15"], "trainer.precision is '15'; it must be one of 64, 32, 16, "),
        (["--trainer.enable_progress_bar", "x"], "is 'x'; it must be true, false or null."),
        (["--trainer", "5"], "trainer is '5', but it is a group of options."),
        (["--phases", "x"], "phases is 'x'; it must be a list of mappings with max_epochs, max_steps, optimizer, call"),
        (["--phases", "[{optimizer: {lr: x}}]"], "phases.optimizer.lr is 'x'; it must be a number."),
        (["--phases", "[{max_epochs: 1, callbacks: [X]}]"], "There is no class 'X'. phases.callbacks must be one of "),
        (["--seed_everything", "x"], "seed_everything is 'x'; it must be a whole number."),
        (["--seed_everything", "-1"], "seed_everything is -1; it must be from 0 to 4294967295."),
        # Names that there are not.
        (["--model.lor.r", "3"], "There is no option 'model.lor.r'. Did you mean 'model.lora.r'?"),
        (["--lora.r", "3"], "There is no option 'lora.r'. Did you mean 'model.lora.r'?"),
        (["--model.lora", "{rr: 2}"], "There is no option 'model.lora.rr'. Did you mean 'model.lora.r'?"),
        (["--run.nam", "x"], "There is no option 'run.nam'. Did you mean 'run.name'?"),
        (["--trainer.max_stepss", "3"], "There is no option 'trainer.max_stepss'. Did you mean 'trainer.max_steps'?"),
        (["--zzz", "3"], "There is no option 'zzz'. `qpruner fit --help` explains all."),
        ([*PRUNING, "--trainer.callbacks.rato", "0.2"], "no option 'trainer.callbacks.rato' of StructuredPruning. Did"),
        (["--data.loader.batchsize", "4"], "of StoriesDataModule. Did you mean 'data.loader.batch_size'?"),
        (["--phases", "[{max_epoch: 3}]"], "'phases.max_epoch' of PhaseConfig. Did you mean 'phases.max_epochs'?"),
        (["--search.trials", "5"], "search.trials is an option of `qpruner search`, and not of this command."),
        # Classes.
        (["--data", "X"], f"There is no class 'X'. data must be {DATA}."),
        (["--data", "StoryDataModule"], f"Did you mean 'StoriesDataModule'? data must be {DATA}."),
        (["--data", "lightning.pytorch.Trainer"], "'lightning.pytorch.Trainer' is no TokenDataModule. data must be "),
        (["--data", "nowhere.Trainer"], "There is no class 'nowhere.Trainer'. data must be "),
        (["--trainer.callbacks", "StructuredPrunning"], "There is no class 'StructuredPrunning'. Did you mean 'Struct"),
        (["--trainer.callbacks", "EarlyStoping"], "There is no class 'EarlyStoping'. Did you mean 'EarlyStopping'?"),
        (["--trainer.callbacks", "X"], "must be one of GridPolishing, LoRAGuidedPruning, MixedPrecisionQuantization"),
        (["--trainer.callbacks+=Compression"], "'Compression' is what others are made from, and cannot be had itself."),
        (["--trainer.callbacks", "[StoriesDataModule]"], "'StoriesDataModule' is no Callback. trainer.callbacks must"),
        (["--trainer.logger", "X"], "There is no class 'X'. trainer.logger must be one of "),
        # What is missing, or in the wrong order.
        (PRUNING, "StructuredPruning needs trainer.callbacks.ratio, and it was not given. It must be a number."),
        (["--trainer.callbacks.rounds", "2", *PRUNING], "Name the class first: --trainer.callbacks StructuredPruning "),
        (["--model.lora.r"], "--model.lora.r needs a value."),
        (["--model.lora.r", "--restart"], "--model.lora.r needs a value."),
        (["--data.num_train", "-3x"], "--data.num_train needs a value. One that begins with '-' is given as --data.nu"),
        (["--config"], "--config needs a value."),
        (["--restart=true"], "--restart takes no value."),
        (["extra"], "'extra' is neither an option nor the value of one."),
        (["-x"], "'-x' is neither an option nor the value of one."),
        (["--print_config", "--model.lora.r", "two"], "model.lora.r is 'two'; it must be a whole number."),
    ],
)  # fmt: skip
def test_of_the_command_line(tell: Tell, given: list[str], said: str) -> None:
    message = tell("--model.base", "qpruner/stories", "--data", "StoriesDataModule", *given)
    assert said in message
    assert len(message) < 400 and "Namespace" not in message and "Union" not in message


def callbacks(**entry: Any) -> dict[str, Any]:
    return {"trainer": {"callbacks": [{"class_path": "MixedPrecisionQuantization"}, entry]}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (callbacks(class_path="StructuredPrunning"), "There is no class 'StructuredPrunning'. Did you mean 'Structure"),
        (callbacks(class_path="StructuredPruning"), "StructuredPruning needs trainer.callbacks.ratio, and it was not "),
        (callbacks(class_path="StructuredPruning", init_args={"ratio": None}), "trainer.callbacks.ratio is null; it m"),
        (callbacks(class_path="StructuredPruning", init_args={"ratio": "a"}), "trainer.callbacks.ratio is 'a'; it mus"),
        (callbacks(class_path="StructuredPruning", init_args={"rato": 1}), "no option 'trainer.callbacks.rato' of Str"),
        (callbacks(class_path="StructuredPruning", init_args=5), "trainer.callbacks.init_args is 5, but it is a group"),
        (callbacks(class_path="StructuredPruning", ratio=0.2), "trainer.callbacks.ratio stands beside class_path."),
        (callbacks(class_path="StoriesDataModule"), "'StoriesDataModule' is no Callback. trainer.callbacks must be on"),
        ({"data": {"class_path": "TextDataModule", "init_args": {"num_train": 3}}}, "no option 'data.num_train' of Te"),
        ({"data": {"class_path": "StoriesDataModule", "init_args": {"loader": {"batch_size": "x"}}}}, "data.loader.ba"),
        ({"data": {"class_path": "StoriesDataModule", "init_args": {"num_train": None}}}, "data.num_train is null; it"),
        ({"modle": {"base": "x"}}, "There is no option 'modle'. Did you mean 'model'?"),
        ({"lora": 5}, "There is no option 'lora'. Did you mean 'model.lora'?"),
        ({"model": {"lora": {"r": "two"}}}, "model.lora.r is 'two'; it must be a whole number."),
        ({"model": {"lora": {"r": [2]}}}, "model.lora.r is [2]; it must be a whole number."),
        ({"model": {"lora": {"r": None}}}, "model.lora.r is null; it must be a whole number."),
        ({"model": {"lora": None}}, "model.lora is null, but it is a group of options."),
        ({"model": None}, "model is null, but it is a group of options."),
        ({"trainer": None}, "trainer is null, but it is a group of options."),
        ({"trainer": {"accelerator": None}}, "trainer.accelerator is null; it must be one of auto, cpu, gpu, cuda"),
        ({"trainer": {"strategy": 3}}, "trainer.strategy is 3; it must be one of auto, ddp, fsdp2."),
        # Nulls and wrong values inside lists, classes and dataclasses.
        ({"phases": [{"max_steps": 1, "callbacks": None}]}, "phases.callbacks is null; it must be one of GridPolish"),
        ({"phases": [{"max_steps": None, "max_epochs": 1}]}, "phases.max_steps is null; it must be a whole number."),
        ({"phases": [{"max_steps": 1, "optimizer": {"lr": None}}]}, "phases.optimizer.lr is null; it must be a number"),
        ({"phases": [{"max_steps": 1, "callbacks": [{"class_path": "MixedPrecisionQuantization", "init_args": None}]}]},
         "phases.callbacks.init_args is null, but it is a group of options."),
        ({"phases": [None]}, "phases is null; it must be a mapping with max_epochs"),
        ({"phases": {"max_steps": 1}}, "phases is {'max_steps': 1}; it must be a list of mappings with max_epochs"),
        ({"trainer": {"callbacks": [None]}}, "trainer.callbacks is null; it must be one of"),
        (callbacks(class_path="StructuredPruning", init_args=None), "trainer.callbacks.init_args is null, but it is a"),
        (callbacks(class_path="StructuredPruning", init_args={"ratio": 0.2, "selection": [1]}), "selection is [1], bu"),
        (callbacks(class_path="MixedPrecisionQuantization", init_args={"deciding": None}), "deciding is null, but it "),
        ({"data": {"class_path": "StoriesDataModule", "init_args": None}}, "data.init_args is null, but it is a group"),
        ({"data": {"class_path": "StoriesDataModule", "init_args": {"loader": 4}}}, "data.loader is 4, but it is a gr"),
        ({"data": {"class_path": "StoriesDataModule", "init_args": {"loader": None}}}, "data.loader is null, but it i"),
        # Sections that are empty, which the parser passes over whatever their names.
        ({"modle": {}}, "There is no option 'modle'. Did you mean 'model'?"),
        ({"trainer": {"foo": {}}}, "There is no option 'trainer.foo'."),
        (callbacks(class_path="StructuredPruning", init_args={"ratio": 0.2, "foo": {}}), "'trainer.callbacks.foo' of "),
        # Classes that others are made from.
        (callbacks(class_path="Compression"), "'Compression' is what others are made from, and cannot be had itself."),
        ({"data": {"class_path": "TokenDataModule"}}, f"cannot be had itself. data must be {DATA}."),
        ({"phases": [{"max_steps": 1, "callbacks": [{"class_path": "Compression"}]}]}, "'Compression' is what others"),
        ({"model": {"dtype": None}}, "model.dtype is null; it must be one of auto, float32, bfloat16, float16."),
        ({"restart": "x"}, "restart is 'x'; it must be true or false."),
        ({"search": {"trials": 3}}, "search is an option of `qpruner search`, and not of this command."),
    ],
)  # fmt: skip
def test_of_a_file(tell: Tell, tmp_path: Path, content: dict[str, Any], said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"data": "StoriesDataModule", **content}))
    message = tell("--config", str(file))
    assert said in message
    assert len(message) < 400 + len(str(file)) and "Namespace" not in message


def test_the_file_of_an_option_is_named(tell: Tell, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("data: StoriesDataModule\nmodel:\n  lora:\n    r: two\n")
    assert tell("--config", str(file)) == f"In {file}: model.lora.r is 'two'; it must be a whole number."


def test_what_no_file_and_no_option_gives_is_named(tell: Tell) -> None:
    assert tell() == f"data was not given. It must be {DATA}."


def test_options_of_another_command_are_known(tell: Tell) -> None:
    given = ["--data", "StoriesDataModule"]
    assert "of `qpruner search`" in tell(*given, "--search.trials", "3", command="test")
    said = tell(*given, "--search.trialss", "3", command="search")
    assert "Did you mean 'search.trials'?" in said
    assert "search.trials is 'x'; it must be a whole number." in tell(*given, "--search.trials", "x", command="search")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--model.optimizer.lr", "1e-4"], lambda fit: fit.model.optimizer.lr == 1e-4),
        (["--model.optimizer.lr", "-0.5"], lambda fit: fit.model.optimizer.lr == -0.5),
        (["--model.lora", "{r: '2'}"], lambda fit: fit.model.lora.r == 2),
        (["--data.num_train", "5", "--data.num_train", "6"], lambda fit: fit.data.init_args.num_train == 6),
        (["--trainer.logger", "false"], lambda fit: fit.trainer.logger is False),
        (["--trainer.callbacks", "[]"], lambda fit: fit.trainer.callbacks == []),
        (["--model.lora", "{}"], lambda fit: fit.model.lora.r == 8),
        (["--trainer.callbacks", "null"], lambda fit: fit.trainer.callbacks is None),
    ],
)
def test_what_is_right_is_taken(
    monkeypatch: pytest.MonkeyPatch, given: list[str], taken: Callable[[Any], bool]
) -> None:
    monkeypatch.setattr(QPrunerCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(QPrunerCLI, "_run_subcommand", lambda cli, command: None)
    cli = QPrunerCLI(["fit", "--data", "StoriesDataModule", *given])
    assert taken(cli.config["fit"])
    arguments = ["--data", "StoriesDataModule", *given]
    Mistakes(cli._parser("fit"), {}).check(read_arguments(arguments, {"restart"}))


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda file: file.name
)
def test_no_configuration_has_a_mistake(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    command = "search" if "search" in yaml.safe_load(file.read_text()) else "fit"
    monkeypatch.setattr(QPrunerCLI, "instantiate_classes", lambda cli: None)
    monkeypatch.setattr(QPrunerCLI, "_run_subcommand", lambda cli, command: None)
    cli = QPrunerCLI([command, "--config", str(file)])
    Mistakes(cli._parser(command), {}).check(read_arguments(["--config", str(file)], ()))
