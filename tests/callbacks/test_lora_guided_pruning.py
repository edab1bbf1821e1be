"""Pruning while the adapters train: what is masked when, by which gradients, and what is left."""

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from support.fits import adapters, finetuner, logits, trainer
from support.guided_fits import (
    ASKED,
    EVENTS,
    LAST,
    SCHEDULE,
    STEPS,
    At,
    fit,
    guided,
    kept_of,
    masked_logits,
    scores_of,
    size_of_base,
)
from torch import Tensor, nn

from qpruner.adapters.lora import LoRAConfig, adapter_on
from qpruner.anatomy import decoder_layers
from qpruner.callbacks import MixedPrecisionQuantization
from qpruner.callbacks.pruning_event import PruningEvent
from qpruner.datamodules import StoriesDataModule
from qpruner.datamodules.base import LoaderConfig
from qpruner.errors import UserError
from qpruner.memory import num_parameters
from qpruner.plan import Precision
from qpruner.pretrained import load_model
from qpruner.pruning.lora_guided import AdapterGradients, score_adapted, unit_scores
from qpruner.pruning.schedule import CubicSchedule
from qpruner.pruning.scores import LayerScores
from qpruner.pruning.selection import Kept, SelectionConfig
from qpruner.quantization.formats import dequantize, quantize
from qpruner.quantization.packed import PackedLinear
from qpruner.training.module import LoRAFinetuner

HALF_A_STEP = 96
"""A channel of 96 parameters in each of two layers."""


# What a fit does.


@pytest.mark.parametrize("bits", [16, 8])
def test_what_was_masked_is_what_is_left(
    tiny_llama: Path, stories: StoriesDataModule, bits: int, caplog: pytest.LogCaptureFixture
) -> None:
    quantization = [MixedPrecisionQuantization(bits)] * (bits < 16)
    at_end = At(
        "on_train_end",
        lambda *given: (masked_logits(*given), given[1].compressed.masks and given[1].compressed.masks.kept),
    )
    with caplog.at_level(logging.INFO):
        module = fit(finetuner(tiny_llama), stories, *quantization, guided(), at_end)
    ((expected, kept),) = at_end.seen
    torch.testing.assert_close(logits(module.model), expected, rtol=1e-5, atol=1e-6)
    assert kept_of(module) == kept
    assert [(len(groups), len(channels)) for groups, channels in kept] == [(1, 30)] * 2
    assert all(tensor.abs().max() > 0 for tensor in adapters(module).values()) and module.compressed.masks is None
    # The weights are slices of what there was.
    dense = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False)

    def weight(linear: Any) -> Tensor:
        return dequantize(linear) if isinstance(linear, PackedLinear) else linear.weight

    def as_held(linear: Any) -> Tensor:
        return linear.weight if bits == 16 else dequantize(quantize(linear, Precision("int8", 8)))

    layers = (decoder_layers(model) for model in (module.model.get_base_model(), dense))
    for layer, whole, (groups, channels) in zip(*layers, kept, strict=True):
        columns = [16 * group + n for group in groups for n in range(16)]
        assert torch.equal(weight(layer.o.base_layer), as_held(whole.o)[:, columns])
        assert torch.equal(weight(layer.up.base_layer), as_held(whole.up)[channels])
    # The ratio.
    gone = num_parameters(dense) - size_of_base(module)
    assert abs(gone - ASKED) <= HALF_A_STEP and gone == 2 * (1536 + 18 * 96)
    assert f"{gone / 81056:.2%} of all (asked for 8.00%), {gone / 15360:.2%} of the decoder linears" in caplog.text
    assert "Layers keep 1 of 2 KV groups and 30 of 48 FFN channels" in caplog.text
    assert "rounded anew" not in caplog.text


def test_four_bits_are_rounded_anew_where_scales_run_across(
    tiny_llama: Path, stories: StoriesDataModule, caplog: pytest.LogCaptureFixture
) -> None:
    """What was masked is what is left with the slices of the weights as they were."""

    def look(trainer: Trainer, module: LoRAFinetuner) -> Any:
        assert module.compressed.masks is not None
        layers = decoder_layers(module.model.get_base_model())
        slices = []
        for layer, places in zip(layers, module.compressed.masks.kept, strict=True):
            for parts, units in zip((layer.group_weights, layer.channel_weights), places, strict=True):
                for part in parts:
                    weight = dequantize(part.linear.base_layer)  # type: ignore[arg-type]
                    slices.append(weight.index_select(part.axis, part.places(units)))
        return masked_logits(trainer, module), slices

    at_end = At("on_train_end", look)
    with caplog.at_level(logging.INFO):
        module = fit(finetuner(tiny_llama), stories, MixedPrecisionQuantization(4), guided(), at_end)
    ((expected, slices),) = at_end.seen
    base, left = module.model.get_base_model(), iter(slices)
    changes = []
    for layer in decoder_layers(base):
        for linear in layer.linears.values():
            dense, packed = nn.Linear(linear.in_features, linear.out_features, bias=False), linear.base_layer
            dense.weight.data = next(left)
            assert isinstance(packed, PackedLinear)
            assert torch.equal(dequantize(packed), dequantize(quantize(dense, packed.precision)))
            changes.append(float((dequantize(packed) - dense.weight).detach().norm() / dense.weight.detach().norm()))
            linear.base_layer = dense  # type: ignore[assignment]
    torch.testing.assert_close(logits(module.model), expected, rtol=1e-5, atol=1e-6)
    changed = [change for change in changes if change]
    assert f"{len(changed)} packed linears lost columns that share scales" in caplog.text
    assert f"{sum(changed) / len(changed):.1%} of their norm in the mean, {max(changed):.1%} at most" in caplog.text


def test_units_go_at_the_events_of_the_schedule_and_none_comes_back(
    tiny_llama: Path, stories: StoriesDataModule, caplog: pytest.LogCaptureFixture
) -> None:
    def look(trainer: Trainer, module: LoRAFinetuner, *_: Any) -> Any:
        assert module.compressed.masks is not None
        return trainer.global_step, module.compressed.masks.kept

    after = At("on_train_batch_end", look)
    with caplog.at_level(logging.INFO):
        fit(finetuner(tiny_llama), stories, guided(), after)
    before: Kept = [([0, 1], list(range(48)))] * 2
    changed = []
    for step, kept in after.seen:
        assert all(set(c) <= set(was) and set(g) <= set(w) for (g, c), (w, was) in zip(kept, before, strict=True))
        assert [len(c) for _, c in kept] == [48 - round(18 * SCHEDULE.share(step // 2 * 2, STEPS))] * 2
        if kept != before:
            changed.append(step)
        before = kept
    assert changed == EVENTS[:3]  # of 18 channels none is left for the last
    lines = [one for one in caplog.text.splitlines() if " are masked" in one]
    assert [int(re.findall(r"Step (\d+):", one)[0]) for one in lines] == EVENTS
    assert "as the scores before had it" not in lines[0] and all("as the scores before" in one for one in lines[1:3])
    assert f"{6528 / 81056:.2%} of all parameters are masked, {6528 / 15360:.2%} of the decoder linears" in lines[-1]


def test_an_event_says_how_much_went_as_the_scores_before_had_it(
    tiny_llama: Path, stories: StoriesDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every optimizer step is two batches, and an event acts once."""
    events: list[PruningEvent] = []
    monkeypatch.setattr(PruningEvent, "log", lambda event, loggers: events.append(event))
    pruning = guided(decay=0.0)
    fit(finetuner(tiny_llama), stories, pruning, accumulate=2)
    assert [event.step for event in events] == EVENTS
    found = [event.agreement for event in events]
    assert found[0] is None and found[3] is None  # nothing was left for the last
    alive = events[0].kept
    for before, event in zip(events[:2], events[1:3], strict=True):
        same = total = 0
        for number, (groups, channels) in enumerate(event.kept):
            for kind, left in (("kv_groups", groups), ("ffn_channels", channels)):
                was = alive[number][kind == "ffn_channels"]
                scores = getattr(before.scores[number], kind)
                lowest = set(sorted(was, key=lambda unit, scores=scores: float(scores[unit]))[: len(was) - len(left)])
                same, total = same + len(lowest - set(left)), total + len(lowest)
        assert event.agreement == same / total < 1
        alive = event.kept


def test_the_lowest_averages_go_first(tiny_llama: Path, stories: StoriesDataModule) -> None:
    """Of one event, over the scores of all the steps up to it, which the test adds up itself."""
    pruning = guided(schedule=CubicSchedule(warmup=0, cooldown=0, every_n_steps=4))

    def register(trainer: Trainer, module: LoRAFinetuner) -> None:
        module.after_clipping.append(lambda _: steps.append(score_adapted(module.model.get_base_model(), "code", None)))

    steps: list[list[LayerScores]] = []
    module = fit(finetuner(tiny_llama), stories, pruning, At("on_fit_start", register))
    weights = [0.1 * 0.9 ** (3 - n) for n in range(4)]  # steps 1 to 4 before the event after the fourth
    alive = [sum(w * one[n].ffn_channels for w, one in zip(weights, steps, strict=False)) for n in (0, 1)]
    gone = round(18 * pruning.schedule.share(4, STEPS))
    assert 0 < gone < 18
    for layer, scores in zip(kept_of(module), alive, strict=True):
        assert not set(torch.as_tensor(scores).argsort()[:gone].tolist()) & set(layer[1])
    weights = [0.1 * 0.9 ** (STEPS - 1 - n) for n in range(STEPS)]
    expected = sum(w * one[1].ffn_channels for w, one in zip(weights, steps, strict=True))
    torch.testing.assert_close(scores_of(pruning)[3], torch.as_tensor(expected))
    assert (pruning._average.steps, pruning._average.skipped) == (STEPS, 0)


@pytest.mark.parametrize("selection", [{"scope": "global"}, {"scope": "global", "uniform": True}, {"leave_alone": [0]}])
@pytest.mark.parametrize("criterion", ["lora", "gradient"])
def test_every_way_meets_the_ratio(
    tiny_llama: Path, stories: StoriesDataModule, selection: dict[str, Any], criterion: Any
) -> None:
    pruning = guided(selection=SelectionConfig(**selection), criterion=criterion, variant="paper", ratio=0.05)
    at_end = At("on_train_end", masked_logits)
    module = fit(finetuner(tiny_llama), stories, pruning, at_end)
    torch.testing.assert_close(logits(module.model), at_end.seen[0], rtol=1e-5, atol=1e-6)
    assert abs(81056 - size_of_base(module) - 0.05 * 81056) <= HALF_A_STEP
    if "leave_alone" in selection:
        assert kept_of(module)[0] == ([0, 1], list(range(48)))


def test_the_true_gradient_is_that_of_the_whole_step(tiny_llama: Path, stories: StoriesDataModule) -> None:
    """Of two accumulated batches, each counting for half; at the first step W + s B A is W."""
    batches = At("on_train_batch_start", lambda trainer, module, batch, number: batch)
    after = At("on_train_batch_end", lambda *_: [one.clone() for one in scores_of(pruning)])
    pruning = guided(criterion="gradient", variant="paper", decay=0.0, schedule=CubicSchedule(0, 0, 1))
    lora = LoRAConfig(r=2, dropout=0.0)
    fit(finetuner(tiny_llama, lora=lora), stories, pruning, batches, after, accumulate=2, steps=2)
    model = load_model(str(tiny_llama), dtype="float32", trust_remote_code=False).requires_grad_(True)
    for batch in batches.seen[:2]:
        (model(input_ids=batch["input_ids"], labels=batch["labels"]).loss / 2).backward()
    assert not after.seen[0][1].any()  # no step yet
    found = after.seen[1]
    for number, layer in enumerate(decoder_layers(model)):
        parts = (layer.gate, 1), (layer.up, 1), (layer.down, 0)
        expected = sum((one.weight * one.weight.grad).square().sum(axis) for one, axis in parts)
        torch.testing.assert_close(found[2 * number + 1].float(), torch.as_tensor(expected).detach(), rtol=1e-3, atol=0)


def test_accumulated_halves_equal_the_whole(tiny_llama: Path) -> None:
    """All rows have 24 tokens, so that the mean of two losses is that of both."""
    averages, modules = [], []
    for size, accumulate in ((8, 2), (16, 1)):
        data = StoriesDataModule(
            tokenizer=str(tiny_llama), max_length=24, num_train=64, loader=LoaderConfig(batch_size=size)
        )
        assert set(data.examples("train").rows.lengths.tolist()) == {24}
        pruning = guided(variant="paper")
        module = finetuner(tiny_llama, lora=LoRAConfig(r=2, dropout=0.0))
        modules.append(fit(module, data, pruning, accumulate=accumulate))
        averages.append(scores_of(pruning))
        assert pruning._average.steps == LAST
    assert modules[0].plan == modules[1].plan
    for halves, whole in zip(*averages, strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-2, atol=1e-3 * float(whole.max()))


# Gradients.


def test_scores_are_of_clipped_gradients(tiny_llama: Path, stories: StoriesDataModule) -> None:
    """So small that the third term, of the square of the gradients, can be told from those before."""
    pruning, clip = guided(variant="paper", decay=0.0), 1e-2

    def reference(trainer: Trainer, module: LoRAFinetuner, *_: Any) -> list[Tensor]:
        norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
        factor = float(clip / norm)
        assert factor < 0.1
        found = []
        for layer in decoder_layers(module.model.get_base_model()):
            for parts in (layer.group_weights, layer.channel_weights):
                total = torch.zeros(parts[0].num_units, dtype=torch.float64)
                for part in parts:
                    adapter = adapter_on(part.linear)
                    assert adapter is not None
                    made = AdapterGradients.of(adapter)
                    clipped = AdapterGradients(
                        made.lora_A, made.lora_B, factor * made.grad_A, factor * made.grad_B, made.scale
                    )
                    total += unit_scores(part, adapter.base.weight, clipped, None, "paper").detach()  # type: ignore[arg-type]
                found.append(total)
        return found

    before = At("on_before_optimizer_step", reference)  # before clipping
    after = At("on_train_batch_end", lambda *_: [one.clone() for one in scores_of(pruning)])
    fit(finetuner(tiny_llama), stories, pruning, before, after, clip=clip)
    assert len(before.seen) == len(after.seen) == STEPS
    for expected, found in zip(before.seen[:LAST], after.seen[:LAST], strict=True):
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=0)


class Spoil(Callback):
    """Makes a gradient infinite at some steps, and gives it back before the optimizer sees it."""

    def __init__(self, steps: Callable[[int], bool]) -> None:
        self.steps = steps
        self.seen: list[tuple[bool, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.parameter = next(p for name, p in pl_module.named_parameters() if "v_proj.lora_B" in name)

        def mend(finite: bool) -> None:
            self.seen.append((finite, float(self.parameter.grad.abs().max())))
            self.parameter.grad.nan_to_num_(posinf=0.0)

        pl_module.after_clipping.append(mend)  # behind the one that looks

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        if self.steps(trainer.global_step):
            self.parameter.grad[0, 0] = math.inf


def test_steps_with_an_infinite_gradient_are_skipped_and_counted(
    tiny_llama: Path, stories: StoriesDataModule, caplog: pytest.LogCaptureFixture
) -> None:
    pruning = guided()
    after = At("on_train_batch_end", lambda *_: [one.clone() for one in scores_of(pruning)])
    with caplog.at_level(logging.INFO):
        module = fit(finetuner(tiny_llama), stories, pruning, Spoil(lambda step: step in (0, 4)), after)
    assert (pruning._average.steps, pruning._average.skipped) == (LAST - 2, 2)
    before = [[torch.zeros_like(one) for one in after.seen[0]], *after.seen]
    same = [n for n in range(STEPS) if all(torch.equal(a, b) for a, b in zip(before[n], before[n + 1], strict=True))]
    assert same == [0, 4, LAST, LAST + 1] and all(one.isfinite().all() for one in after.seen[-1])
    lines = [line for line in caplog.text.splitlines() if " are masked" in line]
    assert [int(re.findall(r"(\d+) steps skipped", line)[0]) for line in lines] == [1, 1, 2, 2]
    assert [len(channels) for _, channels in kept_of(module)] == [30, 30]


def test_a_fit_without_a_finite_gradient_before_an_event_is_refused(
    tiny_llama: Path, stories: StoriesDataModule
) -> None:
    with pytest.raises(UserError, match=r"all 2 steps so far were not finite.*bf16-mixed or 32-true, or a lower"):
        fit(finetuner(tiny_llama), stories, guided(), Spoil(lambda step: True))


def test_an_infinite_gradient_is_seen_though_clipping_by_value_hides_it(
    tiny_llama: Path, stories: StoriesDataModule
) -> None:
    pruning, spoil = guided(), Spoil(lambda step: step == 3)
    running = trainer(pruning, spoil, steps=STEPS)
    running.gradient_clip_val, running.gradient_clip_algorithm = 0.01, GradClipAlgorithmType.VALUE
    running.fit(finetuner(tiny_llama), datamodule=stories)
    assert [finite for finite, _ in spoil.seen] == [step != 3 for step in range(STEPS)]
    assert spoil.seen[3][1] == pytest.approx(0.01)  # as the observer finds it
    assert (pruning._average.steps, pruning._average.skipped) == (LAST - 1, 1)


@pytest.mark.parametrize("criterion", ["lora", "gradient"])
def test_a_base_in_bfloat16_with_its_adapters_in_it_is_pruned(
    tiny_llama: Path, stories: StoriesDataModule, criterion: Any
) -> None:
    """As with --trainer.precision bf16-true, which makes the adapters and their gradients bfloat16, too."""
    pruning, at_end = guided(criterion=criterion), At("on_train_end", masked_logits)
    module = finetuner(tiny_llama, dtype="bfloat16")
    trainer(pruning, at_end, steps=STEPS, precision="bf16-true").fit(module, datamodule=stories)
    assert {tensor.dtype for tensor in adapters(module).values()} == {torch.bfloat16}
    assert [(len(groups), len(channels)) for groups, channels in kept_of(module)] == [(1, 30)] * 2
    (expected,) = at_end.seen
    assert (logits(module.model).float() - expected.float()).norm() / expected.float().norm() < 2**-7
    assert all(one.isfinite().all() and one.max() > 0 for one in scores_of(pruning))
