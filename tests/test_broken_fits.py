"""Fits whose numbers stop being finite: what is said, what is kept, and how the run goes on."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.runs import SPOIL_ON_RANK, adapters, in_own_process

from qpruner.adapter_files import has_trained_adapters
from qpruner.callbacks.pruning import StructuredPruning
from qpruner.commands import run
from qpruner.errors import UserError
from qpruner.files import read_json
from qpruner.records.folder import RunFolder
from qpruner.training.module import LoRAFinetuner

Spoil = Callable[[LoRAFinetuner, torch.Tensor], torch.Tensor]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], None]:
    """Lets the losses of every training step pass through a function."""
    right = LoRAFinetuner.token_nll

    def install(change: Spoil) -> None:
        def token_nll(self: LoRAFinetuner, batch: Any) -> torch.Tensor:
            losses = right(self, batch)
            return change(self, losses) if losses.requires_grad else losses

        monkeypatch.setattr(LoRAFinetuner, "token_nll", token_nll)

    return install


def at(step: int, value: float) -> Spoil:
    """The loss of an optimizer step, counted from 1, is another."""
    return lambda module, loss: loss * value if module.global_step + 1 == step else loss


def gradient_at(steps: Callable[[int], bool], value: float) -> Spoil:
    """The loss stays as it is, and its gradient is another."""

    def change(module: LoRAFinetuner, loss: torch.Tensor) -> torch.Tensor:
        if steps(module.global_step + 1):
            loss = loss * 1.0
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    return change


def refused(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        run(["fit", *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_not_finished(folder: Path) -> None:
    assert "recovered" not in [stage["name"] for stage in read_json(folder / "summary.json")["stages"]]
    assert not RunFolder(folder).finished and not (folder / "report.md").exists()


def test_adapters_in_float16_stop_the_fit_and_nothing_is_kept(arguments: list[str], tmp_path: Path) -> None:
    halves = [*arguments, "--model.dtype", "float16", "--trainer.precision", "16-true"]
    said = refused(halves)
    assert "training loss of optimizer step 2 is not finite" in said
    assert "float16" in said and "--trainer.precision 16-mixed" in said and "--restart" in said
    folder = tmp_path / "runs" / "x"
    assert_not_finished(folder)
    assert not (folder / "checkpoints" / "last.ckpt").exists()
    assert refused(halves) == said  # no step was kept, so that it begins anew
    with pytest.raises(UserError, match="is not over. Finish it first"):
        run(["merge", str(folder), str(tmp_path / "merged")])
    mended = [*arguments, "--model.dtype", "float16", "--trainer.precision", "16-mixed", "--restart"]
    run(["fit", *mended])
    assert all(tensor.isfinite().all() for tensor in adapters(folder).values())


# After step 4 there is a validation, which the checkpoint of that step waits for; it then is that of step 5.
@pytest.mark.parametrize(
    ("step", "value", "kept"),
    [(1, math.inf, None), (6, math.nan, 5), pytest.param(7, -math.inf, 6, marks=pytest.mark.slow)],
)
def test_a_loss_is_named_by_its_step_and_the_run_goes_on_from_the_checkpoint_before(
    arguments: list[str],
    tmp_path: Path,
    spoil: Any,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    value: float,
    kept: Any,
) -> None:
    with monkeypatch.context():
        spoil(at(step, value))
        said = refused(arguments)
        assert f"loss of optimizer step {step} is not finite" in said and "--model.optimizer.lr" in said
        assert refused(arguments) == said
    folder = tmp_path / "runs" / "x"
    assert_not_finished(folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert (torch.load(checkpoint, weights_only=True)["global_step"] if checkpoint.exists() else None) == kept
    monkeypatch.undo()
    run(["fit", *arguments])
    resumed = adapters(folder)
    run(["fit", *arguments, "--run.name", "whole"])
    assert all(torch.equal(resumed[name], one) for name, one in adapters(tmp_path / "runs" / "whole").items())


@pytest.mark.parametrize("every", [0, 3, 1000])
def test_the_step_is_named_however_rarely_losses_are_looked_at(
    arguments: list[str], tmp_path: Path, spoil: Any, every: int
) -> None:
    spoil(at(3, math.nan))
    rarely = ["--trainer.log_every_n_steps", str(every), "--run.checkpoint_every_n_steps", "1000"]
    said = refused([*arguments, *rarely, "--trainer.limit_val_batches", "0"])
    assert "loss of optimizer step 3 is" in said
    assert not (tmp_path / "runs" / "x" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_adapters_broken_by_the_last_step_are_never_written(
    arguments: list[str], tmp_path: Path, spoil: Any, optimizer: str
) -> None:
    spoil(gradient_at(lambda step: step == 10, math.nan))
    said = refused([*arguments, "--trainer.limit_val_batches", "0", "--model.optimizer.name", optimizer])
    assert "After optimizer step 10, 28 of 28 tensors of the adapters are not finite" in said
    folder = tmp_path / "runs" / "x"
    assert_not_finished(folder)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_no_callback_gets_a_checkpoint_that_is_not_finite(config: dict[str, Any], tmp_path: Path, spoil: Any) -> None:
    keep_all = {"dirpath": str(tmp_path / "all"), "every_n_train_steps": 1, "save_top_k": -1}
    on_exception = {"dirpath": str(tmp_path / "all"), "filename": "broken"}
    config["trainer"]["callbacks"] = [
        {"class_path": "ModelCheckpoint", "init_args": keep_all},
        {"class_path": "lightning.pytorch.callbacks.OnExceptionCheckpoint", "init_args": on_exception},
    ]
    (path := tmp_path / "all.yaml").write_text(yaml.safe_dump(config))
    spoil(gradient_at(lambda step: step == 4, math.inf))
    refused(["--config", str(path)])
    written = sorted((tmp_path / "all").iterdir())
    assert [torch.load(file, weights_only=True)["global_step"] for file in written] == [1, 2, 3]


def test_an_optimizer_whose_moments_overflow_is_not_kept(arguments: list[str], tmp_path: Path, spoil: Any) -> None:
    """Squared in AdamW a gradient of 1e30 is infinite, and its parameter would stand still for ever."""
    spoil(gradient_at(lambda step: step == 3, 1e35))
    said = refused([*arguments, "--trainer.limit_val_batches", "0"])
    assert "After optimizer step 4" in said and "of the state of the optimizer are not finite" in said
    assert torch.load(tmp_path / "runs/x/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_steps_that_the_loss_scale_skips_are_legal_and_a_scale_that_never_fits_is_told(
    config: dict[str, Any], tmp_path: Path, spoil: Any
) -> None:
    # On a CPU the option `precision` would take bf16-mixed in place of 16-mixed.
    scaled = {"precision": "16-mixed", "device": "cpu"}
    config["trainer"] |= {
        "plugins": [{"class_path": "lightning.pytorch.plugins.MixedPrecision", "init_args": scaled}],
        "limit_val_batches": 0,
        "val_check_interval": 1.0,
    }
    (path := tmp_path / "mixed.yaml").write_text(yaml.safe_dump(config))
    mixed = ["--config", str(path)]
    spoil(gradient_at(lambda step: step <= 3, math.inf))
    run(["fit", *mixed, "--run.name", "legal"])
    assert RunFolder(tmp_path / "runs" / "legal").finished
    spoil(gradient_at(lambda step: True, math.inf))
    said = refused(mixed)
    assert "gradients of all 5 optimizer steps so far are not finite" in said and "bf16-mixed" in said
    assert_not_finished(tmp_path / "runs" / "x")
    # The first step is taken; then the scale is halved, from 2 to the 16, until it says that no scale helps.
    spoil(gradient_at(lambda step: step > 1, math.inf))
    said = refused([*mixed, "--restart", "--trainer.max_epochs", "8"])
    assert "By optimizer step 32 the loss scale of 16-mixed has fallen to 3e-05" in said
    assert_not_finished(tmp_path / "runs" / "x")


def test_an_overflow_in_validation_alone_stops_the_fit(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoRAFinetuner.validation_step

    def validation_step(self: LoRAFinetuner, *arguments: Any) -> None:
        right(self, *arguments)
        if self.global_step == 4:
            self.measures.perplexity.nll *= math.nan

    monkeypatch.setattr(LoRAFinetuner, "validation_step", validation_step)
    said = refused(arguments)
    assert "The loss of the validation split at optimizer step 4 is nan, not finite" in said
    assert_not_finished(tmp_path / "runs" / "x")


@pytest.fixture
def broken_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_broken_base_is_named_with_its_tensor_and_a_test_shows_nan(
    arguments: list[str], broken_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [*arguments, "--model.base", str(broken_llama)]
    said = refused(broken)
    assert "The loss of the dense model on the test split is nan, not finite" in said
    assert "model.layers.1.mlp.up_proj.weight" in said and "1 tensors" in said and "--model.base" in said
    run(["test", *broken, "--run.name", "tested"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| dense"))
    assert [cell.strip() for cell in row.split("|")][5:8] == ["nan", "nan", "nan"]
    text = (tmp_path / "runs" / "tested" / "test.json").read_text()
    (stage,) = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["stages"]
    assert (stage["results"]["loss"], stage["results"]["tokens"]) == ("nan", 138)


def test_pruning_that_breaks_the_base_is_named_and_nothing_is_kept(
    config_that_prunes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StructuredPruning.compress

    def compress(self: StructuredPruning, job: Any) -> None:
        right(self, job)
        job.model.network.model.norm.weight.data[0] = math.inf

    monkeypatch.setattr(StructuredPruning, "compress", compress)
    (path := tmp_path / "prunes.yaml").write_text(yaml.safe_dump(config_that_prunes))
    said = refused(["--config", str(path)])
    assert "The loss of the pruned model on the test split is nan" in said and "norm.weight" in said
    folder = tmp_path / "runs" / "x"
    assert [stage["name"] for stage in read_json(folder / "summary.json")["stages"]] == ["dense"]
    assert not (folder / "model").exists()


def test_a_later_phase_that_breaks_leaves_the_first_one_over(
    phased_config: dict[str, Any], tmp_path: Path, spoil: Any
) -> None:
    def second_phase(module: LoRAFinetuner, loss: torch.Tensor) -> torch.Tensor:
        return at(5, math.nan)(module, loss) if module.continues_from is not None else loss

    spoil(second_phase)
    (path := tmp_path / "phased.yaml").write_text(yaml.safe_dump(phased_config))
    said = refused(["--config", str(path)])
    assert "loss of optimizer step 5 is not finite" in said
    folder = RunFolder(tmp_path / "runs" / "x")
    assert folder.finished_phases == 1 and not folder.finished
    assert not has_trained_adapters(folder.model) and has_trained_adapters(RunFolder(folder.path, 1).model)


@pytest.mark.slow
def test_two_gloo_ranks_stop_together(arguments: list[str], tmp_path: Path) -> None:
    two = ["--trainer.strategy", "ddp", "--trainer.devices", "2", "--data.num_train", "40"]
    spoiled = {"SPOILED_RANK": "1", "SPOILED_STEP": "4"}
    done = in_own_process(SPOIL_ON_RANK, "fit", *arguments, *two, env=spoiled)
    assert done.returncode == 2, done.stderr
    assert "error: The training loss of optimizer step 4 is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "runs" / "x"
    assert_not_finished(folder)
    assert (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    )  # step 2 is validated before


def test_adapters_that_are_finite_and_of_no_use_are_not_gone_on_from(arguments: list[str], tmp_path: Path) -> None:
    huge = [*arguments, "--model.optimizer.lr", "1e30", "--trainer.max_steps", "1"]
    said = refused(huge)
    checkpoints = tmp_path / "runs" / "x" / "checkpoints"
    assert "The loss of the recovered model on the test split is nan, not finite; the run does not go on from" in said
    assert str(checkpoints / "not_finite.ckpt") in said and "since the last checkpoint" not in said
    assert [file.name for file in checkpoints.iterdir()] == ["not_finite.ckpt"]
    assert_not_finished(tmp_path / "runs" / "x")
    run(["fit", *arguments, "--trainer.max_steps", "1"])  # no step is kept that would bind the run to its options
    assert RunFolder(tmp_path / "runs" / "x").finished


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.optimizer.lr", "1e38"], "The size of the update of optimizer step 1 is not finite"),
        (
            ["--trainer.detect_anomaly", "true", "--model.optimizer.lr", "1e30"],
            "The gradients of LogSoftmaxBackward0 in optimizer step 2 are not finite",
        ),
    ],
)
def test_errors_of_torch_about_numbers_are_told_as_the_step_that_broke(
    arguments: list[str], options: list[str], said: str
) -> None:
    assert said in (told := refused([*arguments, *options])) and "Lower --model.optimizer.lr" in told


def test_losses_that_are_not_finite_are_predicted_as_text(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = LoRAFinetuner.token_nll
    monkeypatch.setattr(LoRAFinetuner, "token_nll", lambda self, batch: right(self, batch) * math.nan)
    with pytest.warns(UserWarning, match="The loss of 6 of 10 records is not finite"):
        run(["predict", *arguments])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (tmp_path / "runs" / "x" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["nll"] for record in records[:6]] == ["nan"] * 6
