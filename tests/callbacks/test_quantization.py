"""Which bits a fit gets, where its adapters start, and what is left for later sessions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.fits import PRUNING, AtStart, Losses, adapters, finetuner, fit, logits, trainer

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import KeepModel, MixedPrecisionQuantization, RunCheckpoint, StructuredPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.folder_manifest import is_compressed
from qpruner.model_folder import load_compressed
from qpruner.plan import DENSE, UNITS, CompressionPlan, Precision
from qpruner.quantization.formats import dequantize
from qpruner.quantization.packed import PackedLinear
from qpruner.training.module import LoRAFinetuner

NF4, INT8 = Precision("nf4", 4, 64), Precision("int8", 8)
MIXED: Any = [{"qkv": 4, "o": 8, "gate_up": 16, "down": 4}, {"qkv": 16, "o": 4, "gate_up": 4, "down": 8}]


def mixed(**changes: Any) -> tuple[StructuredPruning, MixedPrecisionQuantization]:
    return StructuredPruning(**PRUNING), MixedPrecisionQuantization(**{"bits": MIXED} | changes)


# Bits.


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (4, [[NF4] * 4] * 2),
        (16, [[DENSE] * 4] * 2),
        ([8, 4], [[INT8] * 4, [NF4] * 4]),
        ({"qkv": 4, "o": 8, "gate_up": 16, "down": 4}, [[NF4, INT8, DENSE, NF4]] * 2),
        (MIXED, [[NF4, INT8, DENSE, NF4], [DENSE, NF4, NF4, INT8]]),
    ],
    ids=["one number", "left alone", "a number a layer", "a number a unit", "a number a unit and layer"],
)
def test_bits_in_every_form(bits: Any, expected: list[list[Precision]]) -> None:
    found = MixedPrecisionQuantization(bits).precision(2)
    assert [[layer[unit] for unit in UNITS] for layer in found] == expected


def test_four_bits_in_the_format_and_group_asked_for() -> None:
    (layer,) = MixedPrecisionQuantization([4], formats={4: "fp4-double"}, group=128).precision(1)
    assert set(layer.values()) == {Precision("fp4-double", 4, 128)}


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 6])
def test_other_bits_are_in_values_at_equal_distances_unless_told(bits: int) -> None:
    (layer,) = MixedPrecisionQuantization([bits], group=-1, embedding=8).precision(1)
    assert set(layer.values()) == {Precision("affine-double", bits, -1)}
    told = MixedPrecisionQuantization([bits, 8], formats={bits: "affine", 8: "symmetric"}, group=32).precision(2)
    assert [layer["o"] for layer in told] == [Precision("affine", bits, 32), Precision("symmetric", 8, 32)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 7}, "bits asks for 7; choose from 1, 2, 3, 4, 5, 6, 8, 16"),
        ({"bits": [8, 0]}, "bits asks for 0"),
        ({"bits": {**MIXED[0], "o": 12}}, "bits asks for 12"),
        (
            {"bits": {"qkv": 4, "o": 4, "mlp": 4, "down": 4}},
            "bits names qkv, o, mlp, down; it must name each unit of a layer: qkv, o, gate_up",
        ),
        ({"bits": [MIXED[0], {"qkv": 4}]}, "bits names qkv; it must name each unit"),
        ({"loftq_iterations": -1}, "loftq_iterations is -1; it is at least 0"),
        ({"formats": {4: "nf5"}}, "no number format 'nf5'.* Did you mean 'nf4'"),
        ({"formats": {4: "int8"}}, "int8 has no 4 bits. Give 8 bits"),
        ({"formats": {1: "symmetric"}}, "symmetric has no 1 bits. Give 2 bits"),
        ({"formats": {7: "affine"}}, "formats names one for 7 bits; there are 1, 2, 3, 4, 5, 6, 8"),
        ({"group": -1}, "nf4 has no groups of a whole row. Give one of 32, 64, 128"),
        ({"bits": 2, "group": 256}, "affine-double has no groups of 256 weights. Give one of 32, 64, 128, -1 for"),
        ({"group": 48}, "nf4 has no groups of 48 weights. Give one of 32, 64, 128"),
        ({"group": 0}, "at least 1 weight, or a whole row with -1, not 0"),
        ({"bits": 8, "group": 48}, "group is 48; number formats offer -1, 32, 64, 128, 256, 512, 1024"),
    ],
)
def test_impossible_options_are_refused_when_they_are_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MixedPrecisionQuantization(**options)


@pytest.mark.parametrize("bits", [[4], [4, 4, 8], []])
def test_bits_for_another_number_of_layers_are_refused(
    tiny_llama: Path, stories: StoriesDataModule, bits: list[int]
) -> None:
    with pytest.raises(UserError, match=rf"bits has {len(bits)} entries; the model has 2 layers"):
        fit(finetuner(tiny_llama), stories, MixedPrecisionQuantization(bits))


def test_pruning_behind_quantization_is_refused(tiny_llama: Path, stories: StoriesDataModule) -> None:
    with pytest.raises(UserError, match="packed weights cannot be scored"):
        fit(finetuner(tiny_llama), stories, *reversed(mixed()))


def test_a_rank_above_a_linear_is_refused(tiny_llama: Path, stories: StoriesDataModule) -> None:
    with pytest.raises(UserError, match=r"LoRA rank 40 is above that of model\.layers\.\d\..*Lower --model.lora.r"):
        fit(finetuner(tiny_llama, lora=LoRAConfig(r=40)), stories, *mixed())


# The start.


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_fit_starts_from_what_rounding_left(tiny_llama: Path, stories: StoriesDataModule, iterations: int) -> None:
    module = finetuner(tiny_llama, lora=LoRAConfig(r=2, alpha=8.0))
    pruned = fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING)).model.unload()

    def look(module: LoRAFinetuner) -> int:
        for name, (lora_A, lora_B) in module.compressed.initial_adapters.items():
            layer = module.model.get_base_model().get_submodule(name)
            assert torch.equal(layer.lora_A["default"].weight, lora_A)
            assert torch.equal(layer.lora_B["default"].weight, lora_B)
            weight, held = pruned.get_submodule(name).weight, dequantize(layer.base_layer)
            assert (weight - held - 4.0 * lora_B @ lora_A).norm() < (weight - held).norm()
        return len(module.compressed.initial_adapters)

    start = AtStart(look)
    fit(module, stories, *mixed(loftq_iterations=iterations), start)
    assert start.seen == 1 * 3 + 1 + 1 + (1 + 2 + 1)  # q, k, v, o and down of layer 0; o, gate, up and down of layer 1
    assert module.plan is not None
    assert [layer.precision for layer in module.plan.layers] == MixedPrecisionQuantization(MIXED).precision(2)
    packed = [m for m in module.model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 9


def test_without_loftq_the_adapters_start_from_zero(tiny_llama: Path, stories: StoriesDataModule) -> None:
    def look(module: LoRAFinetuner) -> float:
        return sum(float(t.abs().sum()) for name, t in adapters(module).items() if "lora_B" in name)

    start = AtStart(look)
    module = fit(finetuner(tiny_llama), stories, *mixed(loftq_iterations=0), start)
    assert start.seen == 0 and look(module) > 0 and module.compressed.initial_adapters == {}
    assert not module.compressed.has_initial_adapters


def test_sixteen_bits_change_nothing_and_fewer_start_near(tiny_llama: Path, stories: StoriesDataModule) -> None:
    losses = {}
    for bits in (None, 16, 8, 4):
        seen = losses[bits] = Losses()
        quantization = [] if bits is None else [MixedPrecisionQuantization(bits)]
        fit(finetuner(tiny_llama), stories, StructuredPruning(**PRUNING), *quantization, seen)
    assert losses[16].values == losses[None].values
    assert losses[8].values[0] == pytest.approx(losses[None].values[0], abs=1e-3)
    assert losses[4].values[0] == pytest.approx(losses[None].values[0], abs=2e-2)
    assert losses[4].values[0] != losses[8].values[0] != losses[None].values[0]


def test_gradients_reach_all_adapters_after_an_evaluation(tiny_llama: Path, stories: StoriesDataModule) -> None:
    class Gradients(Callback):
        def __init__(self) -> None:
            self.norms: list[dict[str, torch.Tensor]] = []
            self.validated = 0

        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.validated += 1

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            self.norms.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    found = []
    for sanity, limit in ((2, 1), (0, 0)):
        seen = Gradients()
        running = trainer(*mixed(), seen, steps=3)
        running.num_sanity_val_steps, running.limit_val_batches = sanity, limit
        running.val_check_interval = 1
        running.fit(finetuner(tiny_llama), datamodule=stories)
        found.append(seen)
    evaluated, plain = found
    assert evaluated.validated > 1 and plain.validated == 0
    assert len(evaluated.norms) == 3 and len(evaluated.norms[0]) == 2 * 14
    for step, expected in zip(evaluated.norms, plain.norms, strict=True):
        assert all(torch.equal(step[name], gradient) for name, gradient in expected.items())
        assert all(gradient.abs().max() > 0 for name, gradient in step.items() if "lora_B" in name)
    assert all(gradient.abs().max() > 0 for gradient in evaluated.norms[-1].values())


# What is kept.


def test_base_and_start_are_kept_before_training_and_taken_from_there(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"

    def look(module: LoRAFinetuner) -> tuple[torch.Tensor, torch.Tensor]:
        assert CompressionPlan.read(folder / "plan.json") == module.plan
        kept = logits(load_compressed(folder))
        ours = logits(module.model)
        module.model.train()
        return kept, ours

    class PowerCut(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                raise InterruptedError

    whole = fit(finetuner(tiny_llama), stories, *mixed(), steps=4)
    checkpoint, start = RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2), AtStart(look)
    first = finetuner(tiny_llama)
    first.kept_in = folder
    with pytest.raises(InterruptedError):
        fit(first, stories, *mixed(), start, PowerCut(), checkpoint, steps=4)
    assert torch.equal(*start.seen)  # type: ignore[misc]
    # The second session needs neither scores nor the dense model, and quantizes nothing.
    monkeypatch.setattr(StructuredPruning, "compress", None)
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    monkeypatch.setattr("qpruner.compressed.quantize_", None)
    again = finetuner(tiny_llama)
    again.kept_in = folder
    restarted = AtStart(look)
    fit(again, stories, *mixed(), restarted, steps=4)
    assert torch.equal(*restarted.seen) and torch.equal(restarted.seen[0], start.seen[0])  # type: ignore[misc, index]
    resumed = finetuner(tiny_llama)
    resumed.kept_in = folder
    trainer(*mixed(), steps=4).fit(resumed, datamodule=stories, ckpt_path=checkpoint.path, weights_only=True)
    for module in (again, resumed):
        assert module.plan == whole.plan and module.compressed.base_sha256 == whole.compressed.base_sha256
        assert all(torch.equal(adapters(module)[name], tensor) for name, tensor in adapters(whole).items())
    resumed.keep_adapters()
    assert torch.equal(logits(load_compressed(folder)), logits(whole.model))


def test_a_base_that_was_kept_without_its_start_is_not_taken_for_whole(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off between the base and the adapters that belong to it."""

    def power_cut(*_: Any, **__: Any) -> None:
        raise InterruptedError

    whole = fit(finetuner(tiny_llama), stories, *mixed())
    with monkeypatch.context() as patch:
        patch.setattr("qpruner.adapter_files.save_adapters", power_cut)
        first = finetuner(tiny_llama)
        first.kept_in = tmp_path / "model"
        with pytest.raises(InterruptedError):
            fit(first, stories, *mixed())
    assert not is_compressed(tmp_path / "model")
    second = finetuner(tiny_llama)
    second.kept_in = tmp_path / "model"
    fit(second, stories, *mixed())
    assert all(torch.equal(adapters(second)[name], tensor) for name, tensor in adapters(whole).items())


@pytest.mark.parametrize("sessions", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("iterations", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_load_from_checkpoint_gives_identical_logits_and_says_which_folder_is_gone(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path, sessions: int, iterations: int
) -> None:
    folder, checkpoint = tmp_path / "model", RunCheckpoint(tmp_path / "last.ckpt", every_n_steps=2)
    for session in range(sessions):
        module = finetuner(tiny_llama)
        module.kept_in = folder
        path = checkpoint.path if session else None
        keep = KeepModel(folder, folder)
        running = trainer(*mixed(loftq_iterations=iterations), keep, checkpoint, steps=2 * session + 2)
        running.fit(module, datamodule=stories, ckpt_path=path, weights_only=True)
    expected = logits(module.model)
    assert torch.equal(logits(load_compressed(folder)), expected)
    loaded = LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)
    assert loaded.plan == module.plan and loaded.compressed.kept == module.compressed.kept
    assert torch.equal(logits(loaded.model), expected)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"trained on the compressed base in .*/model'.* not there any more. Put that"):
        LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)
    fit(finetuner(tiny_llama), stories, *mixed(), KeepModel(folder, folder))  # another base with the same plan
    if iterations != 1:
        with pytest.raises(UserError, match=r"is another one by now \(SHA-256 [0-9a-f]{64}\). Put that folder back"):
            LoRAFinetuner.load_from_checkpoint(checkpoint.path, weights_only=True)


def test_a_quantized_base_is_not_quantized_again(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    first = finetuner(tiny_llama)
    first.kept_in = tmp_path / "model"
    fit(first, stories, MixedPrecisionQuantization(4))
    for callback in (MixedPrecisionQuantization(8), StructuredPruning(**PRUNING)):
        with pytest.raises(UserError, match=r"quantized|packed"):
            fit(finetuner(tmp_path / "model"), stories, callback)
