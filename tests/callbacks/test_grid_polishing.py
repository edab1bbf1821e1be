"""Fits that train scales and minima of the base and nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from support.fits import Losses, adapters, finetuner, logits, trainer
from torch import Tensor

from qpruner.callbacks import GridPolishing, KeepModel, LoRAGuidedPruning, MixedPrecisionQuantization, RunCheckpoint
from qpruner.callbacks.compression import Rehearsal, check_order
from qpruner.compressed import CompressedModel, State
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton
from qpruner.pretrained import load_config
from qpruner.quantization.packed import PackedLinear
from qpruner.quantization.polishing import PolishedLinear
from qpruner.training.distillation import DistillationConfig
from qpruner.training.module import LoRAFinetuner
from qpruner.training.optimization import OptimizerConfig

STEPS = 8


def quantization(**changes: Any) -> MixedPrecisionQuantization:
    return MixedPrecisionQuantization(**{"bits": 2, "group": 32, "loftq_iterations": 0} | changes)


def fit(
    module: LoRAFinetuner,
    data: StoriesDataModule,
    *callbacks: Callback,
    folder: Path,
    steps: int = STEPS,
    quantizes: MixedPrecisionQuantization | None = None,
    path: Path | None = None,
) -> LoRAFinetuner:
    module.kept_in = folder / "base"
    keeping = KeepModel(folder / "base", folder / "model")
    compressing = [quantizes or quantization(), GridPolishing()]
    running = trainer(*compressing, keeping, *callbacks, steps=steps)
    running.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
    return module


def packed(model: Any) -> dict[str, dict[str, Tensor]]:
    return {name: one.packed() for name, one in model.named_modules() if isinstance(one, PackedLinear)}


def factors(module: LoRAFinetuner) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in module.named_parameters() if "lora_" in name}


class LookingAtStart(Callback):
    """What trains, and what does not, before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trained = list(adapters(pl_module))
        self.factors = factors(pl_module)
        self.logits = logits(pl_module.model)
        pl_module.model.train()


@pytest.mark.parametrize("bits", [{}, {"formats": {2: "symmetric"}}, {"loftq_iterations": 1}], ids=str)
def test_scales_and_minima_learn_while_codes_and_adapters_stay(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, bits: dict[str, Any]
) -> None:
    losses, start = Losses(), LookingAtStart()
    begun = finetuner(tiny_llama, optimizer=OptimizerConfig(lr=0.05, schedule="constant"))
    module = fit(begun, stories, losses, start, folder=tmp_path, steps=25, quantizes=quantization(**bits))
    assert sum(losses.values[-5:]) < sum(losses.values[:5]) - 0.1  # each an epoch
    endings = {name.rpartition(".")[2] for name in start.trained}
    assert endings == ({"growths"} if "formats" in bits else {"growths", "ways"})
    assert all(torch.equal(one, start.factors[name]) for name, one in factors(module).items())
    assert not any(isinstance(one, PolishedLinear) for one in module.model.modules())
    before, after = (CompressedModel.open(tmp_path / name) for name in ("base", "model"))
    first, last = packed(before.network), packed(after.network)
    assert len(first) == 14 and first.keys() == last.keys()
    for name, state in first.items():
        assert torch.equal(state["codes"], last[name]["codes"])
        assert any(not torch.equal(tensor, last[name][part]) for part, tensor in state.items())
    assert before.plan == after.plan and after.base_state is State.QUANTIZED
    assert [step["name"] for step in after.recipe] == ["MixedPrecisionQuantization", "GridPolishing"]
    # The folder holds what the module computes with by now, bit for bit, and before training what it began with.
    assert module.compressed.identity == after.identity != before.identity
    for kept, expected in ((after, logits(module.model)), (before, start.logits)):
        kept = CompressedModel.open(kept.kept.path, trained_adapters=True)  # type: ignore[union-attr]
        kept.attach(module.lora, seed=module.seed)
        assert torch.equal(logits(kept.network), expected)


def test_what_is_computed_after_rounding_is_near_what_was_trained(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    class LookingAtEnd(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.logits = logits(pl_module.model)

    start, end = LookingAtStart(), LookingAtEnd()
    module = fit(finetuner(tiny_llama), stories, start, end, folder=tmp_path)
    moved = (end.logits - start.logits).norm()
    assert 0 < (logits(module.model) - end.logits).norm() < 0.25 * moved


@pytest.mark.parametrize("taught", [False, True], ids=["plain", "distilled"])
def test_cut_off_and_repeated_equals_uninterrupted(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, taught: bool
) -> None:
    distillation = DistillationConfig(logits=0, hidden=1, cross_entropy=1) if taught else None

    def module() -> LoRAFinetuner:
        return finetuner(tiny_llama, distillation=distillation)

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    fit(module(), stories, folder=whole)

    class Cut(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                raise KeyError("power")

    def checkpoint() -> RunCheckpoint:
        return RunCheckpoint(tmp_path / "last.ckpt", 3)

    with pytest.raises(KeyError):
        fit(module(), stories, checkpoint(), Cut(), folder=pieces)
    held = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert held["global_step"] == 3 and held["trains_grids"] is True
    assert {name.rpartition(".")[2] for name in held["state_dict"]} == {"growths", "ways"}
    fit(module(), stories, checkpoint(), folder=pieces, path=tmp_path / "last.ckpt")
    for name in ("base", "model"):
        for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
            there = pieces / name / file
            assert there.exists() == (whole / name / file).exists()
            assert not there.exists() or there.read_bytes() == (whole / name / file).read_bytes()
    # Outside of a fit the checkpoint gives the model as it was trained, not rounded yet.
    loaded = LoRAFinetuner.load_from_checkpoint(tmp_path / "last.ckpt")
    assert any(bool(one.growths.any()) for one in loaded.model.modules() if isinstance(one, PolishedLinear))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_learns_in_sixteen_bits(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, precision: str
) -> None:
    module, losses = finetuner(tiny_llama, optimizer=OptimizerConfig(lr=0.05, schedule="constant")), Losses()
    compressing = [quantization(), GridPolishing()]
    keeping = KeepModel(tmp_path / "base", tmp_path / "model")
    trainer(*compressing, keeping, losses, steps=25, precision=precision).fit(module, datamodule=stories)
    assert sum(losses.values[-5:]) < sum(losses.values[:5]) - 0.1
    assert CompressedModel.open(tmp_path / "model").identity == module.compressed.identity


def test_an_error_leaves_the_module_as_it_was(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    class Cut(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            raise KeyError("power")

    module, start = finetuner(tiny_llama), LookingAtStart()
    with pytest.raises(KeyError):
        fit(module, stories, start, Cut(), folder=tmp_path)
    assert not module.trains_grids and module.compressed.identity == CompressedModel.open(tmp_path / "base").identity
    assert torch.equal(logits(module.model), start.logits)
    assert adapters(module).keys() == start.factors.keys()


def test_a_checkpoint_of_adapters_is_no_start_and_none_for_adapters(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    module = finetuner(tiny_llama)
    module.kept_in = tmp_path / "base"
    path = tmp_path / "last.ckpt"
    trained = [quantization(), KeepModel(tmp_path / "base", tmp_path / "base"), RunCheckpoint(path, 2)]
    trainer(*trained).fit(module, datamodule=stories)
    with pytest.raises(UserError, match="fit that trains the adapters, and this fit trains the base's scales and min"):
        fit(finetuner(tiny_llama), stories, folder=tmp_path, path=path)
    fit(finetuner(tiny_llama), stories, RunCheckpoint(path, 2), folder=tmp_path, steps=2)
    again = finetuner(tiny_llama)
    again.kept_in = tmp_path / "base"
    with pytest.raises(UserError, match="fit that trains the base's scales and minima, and this fit trains the adapt"):
        trainer(*trained).fit(again, datamodule=stories, ckpt_path=path, weights_only=True)


def test_formats_without_a_grid_are_refused_before_any_work_and_in_a_fit(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    nf4 = quantization(bits=4)
    rehearsal = Rehearsal(build_skeleton(load_config(str(tiny_llama))), finetuner(tiny_llama).lora)
    GridPolishing().check(rehearsal)  # the base may come quantized
    nf4.check(rehearsal)
    with pytest.raises(UserError, match=r"to nf4, which leaves no linear in a number format whose .*\{4: affine\}"):
        GridPolishing().check(rehearsal)
    quantization(bits=[4, 2]).check(rehearsal)
    GridPolishing().check(rehearsal)
    with pytest.raises(UserError, match="tiny_llama' has no linear in a number format whose scales"):
        fit(finetuner(tiny_llama), stories, folder=tmp_path, quantizes=nf4)
    with pytest.raises(UserError, match="has no linear in a number format"):
        trainer(GridPolishing()).fit(finetuner(tiny_llama), datamodule=stories)


def test_it_stands_behind_quantization_and_in_place_of_pruning_in_training() -> None:
    check_order([quantization(), GridPolishing()])
    with pytest.raises(UserError, match="^The callbacks leave the base polished, then quantized"):
        check_order([GridPolishing(), quantization()])
    with pytest.raises(UserError, match="^The callbacks leave the base pruned in training, then polished"):
        check_order([LoRAGuidedPruning(0.1), GridPolishing()])
