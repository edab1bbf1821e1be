"""What pruning in training refuses, and when."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from support.compensated import COMPENSATION
from support.families import tiny_config, tiny_model
from support.fits import finetuner, logits, trainer
from support.guided_fits import At, fit, guided, masked_logits

from qpruner.adapters.lora import LoRAConfig
from qpruner.callbacks import MixedPrecisionQuantization, StructuredPruning
from qpruner.callbacks.compression import Rehearsal
from qpruner.datamodules import StoriesDataModule
from qpruner.errors import UserError
from qpruner.model_folder import build_skeleton, read_base_config
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.selection import SelectionConfig


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.0}, r"ratio 0.0; .* is in \(0, 1\)"),
        ({"ratio": 1}, "ratio 1; "),
        ({"ratio": -0.3}, "ratio -0.3"),
        ({"decay": 1.0}, r"decay 1.0; .* is in \[0, 1\)"),
        ({"decay": -0.1}, "decay -0.1"),
    ],
)
def test_impossible_options_are_refused_when_they_are_made(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        guided(**options)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ("q_proj", "o_proj"),
            r"FFN channels by the adapters on gate_proj, up_proj, down_proj, .* in layers 0-1: .*Add some of them\.$",
        ),
        (
            r"model\.layers\.0\..*_proj",
            r"KV groups by .* none in layers 1: .*, or name these layers in selection\.leave_alone, which",
        ),
        (
            ("up_proj",),
            r"KV groups by the adapters on q_proj, k_proj, v_proj, o_proj, .*target_modules is up_proj. Add",
        ),
    ],
)
def test_units_without_adapters_are_refused(
    tiny_llama: Path, stories: StoriesDataModule, targets: tuple[str, ...] | str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        fit(finetuner(tiny_llama, lora=LoRAConfig(target_modules=targets)), stories, guided())


def test_pooled_adapters_are_refused(tiny_llama: Path, stories: StoriesDataModule) -> None:
    lora = LoRAConfig(r=2, pooled=True)
    with pytest.raises(UserError, match="model.lora.pooled ties columns to the groups of the base"):
        fit(finetuner(tiny_llama, lora=lora), stories, guided())
    skeleton = build_skeleton(read_base_config(str(tiny_llama)))
    with pytest.raises(UserError, match="model.lora.pooled ties columns to the groups of the base"):
        guided().check(Rehearsal(skeleton, lora))


def test_layers_that_stay_whole_need_no_adapters(tiny_llama: Path, stories: StoriesDataModule) -> None:
    lora = LoRAConfig(r=2, target_modules=r"model\.layers\.0\..*_proj")
    pruning = guided(ratio=0.04, selection=SelectionConfig(scope="local", leave_alone=[1]))
    plan = fit(finetuner(tiny_llama, lora=lora), stories, pruning).plan
    assert plan is not None
    gone = [
        before - after for before, after in zip(plan.architecture.ffn_channels, plan.widths.ffn_channels, strict=True)
    ]
    assert gone[0] > 0 and gone[1] == 0


def refusal_in_rehearsal(config: Any, targets: Sequence[str], **options: Any) -> str | None:
    try:
        guided(**options).check(Rehearsal(build_skeleton(config), LoRAConfig(r=2, target_modules=targets)))
    except UserError as error:
        return str(error)
    return None


def test_units_that_cannot_go_need_no_adapters() -> None:
    """With one KV group, or with a floor that keeps all of them, the FFN gives all; and the other way round."""
    ffn, attention = ("gate_proj", "up_proj", "down_proj"), ("q_proj", "v_proj")
    assert refusal_in_rehearsal(tiny_config("llama", num_key_value_heads=1), ffn, ratio=0.1) is None
    high = SelectionConfig(scope="local", floor=0.9, round_to=1)
    assert refusal_in_rehearsal(tiny_config("llama"), ffn, ratio=0.02, selection=high) is None
    wide = SelectionConfig(scope="local", round_to=64)
    assert refusal_in_rehearsal(tiny_config("llama"), attention, ratio=0.2, selection=wide) is None
    for lower in (SelectionConfig(scope="local"), SelectionConfig(scope="local", floor=0.7)):
        said = refusal_in_rehearsal(tiny_config("llama"), ffn, ratio=0.1, selection=lower)
        assert said is not None and "scores KV groups by the adapters on q_proj, k_proj, v_proj, o_proj" in said


def test_layers_that_are_not_there_are_told_before_adapters_that_are_not() -> None:
    missing = SelectionConfig(scope="local", leave_alone=[99])
    said = refusal_in_rehearsal(tiny_config("llama"), ("up_proj",), ratio=0.1, selection=missing)
    assert said is not None and "names layers [99]; the model has 0 to 2" in said


def test_layers_that_must_end_equal_cannot_be_left_alone_for_want_of_adapters() -> None:
    first_alone = r"model\.layers\.0\..*_proj"
    for uniform in (True, False):
        selection = SelectionConfig(uniform=uniform)
        said = refusal_in_rehearsal(tiny_config("llama"), first_alone, ratio=0.1, selection=selection)
        assert said is not None and "none in layers 1-2" in said
        assert ("selection.leave_alone" in said) is not uniform


def test_what_would_remove_nothing_in_the_end_is_told_in_the_rehearsal() -> None:
    """The FFN is at its floor, and a group is dearer than what is asked for."""
    rehearsal = Rehearsal(build_skeleton(tiny_config("llama")), LoRAConfig(r=2))
    at_floor = SelectionConfig(floor=0.75, round_to=32)
    with pytest.raises(UserError, match=r"0\.02 would remove nothing; the smallest step removes 5\.36% of all"):
        guided(ratio=0.02, selection=at_floor).check(rehearsal)
    guided(ratio=0.03, selection=at_floor).check(rehearsal)


def test_mixtures_are_refused_without_a_run_too(stories: StoriesDataModule, tmp_path: Path) -> None:
    tiny_model("mixtral", vocab_size=2048).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LoRAGuidedPruning.* does not work on mixtures of experts"):
        fit(finetuner(tmp_path), stories, guided())


def test_one_adapter_for_each_kind_of_unit_suffices(tiny_llama: Path, stories: StoriesDataModule) -> None:
    lora = LoRAConfig(r=2, target_modules=("v_proj", "down_proj"))
    at_end = At("on_train_end", masked_logits)
    module = fit(finetuner(tiny_llama, lora=lora), stories, guided(), at_end)
    torch.testing.assert_close(logits(module.model), at_end.seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.9}, "The ratio is 0.9; .* at most 0.1.* Lower it"),
        ({"ratio": 0.0005}, "would remove nothing; .* Ask for more"),
        ({"selection": SelectionConfig(leave_alone=[0, 1])}, "names every layer"),
        ({"selection": SelectionConfig(leave_alone=[2])}, r"names layers \[2\]; the model has 0 to 1"),
        ({"schedule": CubicSchedule()}, "every_n_steps is 10, .* lie 8 of the fit's 10 optimizer steps. Train longer"),
    ],
)
def test_what_cannot_be_had_of_this_model_or_fit_is_refused(
    tiny_llama: Path, stories: StoriesDataModule, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        fit(finetuner(tiny_llama), stories, guided(**changes))


def test_an_endless_fit_is_refused(tiny_llama: Path, stories: StoriesDataModule) -> None:
    running = trainer(guided(), steps=-1)
    running.fit_loop.max_epochs = -1
    with pytest.raises(UserError, match=r"The fit has no end.*--trainer.max_steps or --trainer.max_epochs"):
        running.fit(finetuner(tiny_llama), datamodule=stories)


@pytest.mark.parametrize(
    ("later", "left"),
    [
        (lambda: StructuredPruning(ratio=0.05), "pruned in training, then pruned;"),
        (lambda: MixedPrecisionQuantization(4), "pruned in training, then quantized;"),
    ],
)
def test_whatever_compresses_stands_before_it(
    tiny_llama: Path, stories: StoriesDataModule, later: Callable[[], Callback], left: str
) -> None:
    with pytest.raises(UserError, match=f"leave the base {left}.*Reorder or drop"):
        fit(finetuner(tiny_llama), stories, guided(), later())


@pytest.mark.parametrize("place", [0, 1], ids=["before", "behind"])
def test_packed_weights_that_are_to_be_compensated_are_refused_before_the_base_is_loaded(
    tiny_llama: Path, stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr("qpruner.dense_base.load_model", None)
    said = [
        r"The callbacks quantize the base, and LoRAGuidedPruning is to compensate .*Quantize in a phase after this one",
        r"leave the base pruned in training, then quantized; .*add a phase to the run",
    ]
    callbacks = [MixedPrecisionQuantization(4), guided(**COMPENSATION)]
    with pytest.raises(UserError, match=said[place]):
        fit(finetuner(tiny_llama), stories, *callbacks[:: -1 if place else 1])


def test_a_base_that_came_packed_is_refused(tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path) -> None:
    first = finetuner(tiny_llama)
    first.kept_in = tmp_path / "model"
    fit(first, stories, MixedPrecisionQuantization(4), steps=1)
    for compensation in ({}, COMPENSATION):
        with pytest.raises(UserError, match=r"model' is quantized already; .*Give the model that it was made from, or"):
            fit(finetuner(tmp_path / "model"), stories, guided(**compensation))


def test_the_gradient_of_a_scaled_loss_is_refused(
    tiny_llama: Path, stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "precision", "16-mixed")  # which Lightning has not on CPUs
    with pytest.raises(UserError, match=r"--trainer.precision 16-mixed. Use bf16-mixed or 32-true, or criterion lora"):
        fit(finetuner(tiny_llama), stories, guided(criterion="gradient"))


def test_a_rehearsal_finds_it_before_there_are_weights(tiny_llama: Path) -> None:
    def rehearsal(**lora: Any) -> Rehearsal:
        return Rehearsal(build_skeleton(read_base_config(str(tiny_llama))), LoRAConfig(**lora))

    one = rehearsal()
    guided().check(one)
    assert one.plan.widths.kv_groups == (1, 1) and one.plan.widths.ffn_channels == (30, 30)
    with pytest.raises(UserError, match="The ratio is 0.9"):
        guided(ratio=0.9).check(rehearsal())
    with pytest.raises(UserError, match="Add some of them"):
        guided().check(rehearsal(target_modules=["q_proj"]))
    # What the callbacks before left, the ones behind find: of k and v half of 16 features is left.
    with pytest.raises(UserError, match="LoRA rank 17 is above that of .*k_proj, which is 16. Lower"):
        MixedPrecisionQuantization(4).check(rehearsal(r=17))
    too_high = rehearsal(r=16)
    MixedPrecisionQuantization(4).check(too_high)
    guided().check(too_high)
    with pytest.raises(UserError, match="LoRA rank 16 is above that of .*, which is 8. Lower"):
        MixedPrecisionQuantization(4).check(too_high)
    MixedPrecisionQuantization(4, loftq_iterations=0).check(too_high)
    guided().check_steps(10)
    with pytest.raises(UserError, match="longer than the fit"):
        guided().check_steps(3)
