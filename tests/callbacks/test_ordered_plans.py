"""Plans with orders and leading columns, carried out by the callbacks of a fit."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compensated import COMPENSATION
from support.families import logits_of
from support.fits import Losses, finetuner, fit
from support.linears import quantize_dequantize
from torch import Tensor

from qpruner.anatomy import architecture_of
from qpruner.callbacks import MixedPrecisionQuantization, PlannedPruning
from qpruner.datamodules import StoriesDataModule
from qpruner.model_folder import load_base, read_base_config
from qpruner.plan import CompressionPlan, Leading, Precision
from qpruner.pretrained import load_model
from qpruner.pricing import price
from qpruner.training.distillation import DistillationConfig

FINE, COARSE = Precision("symmetric", 8, 32), Precision("affine-double", 3, 32)
HEADS, KEYS = 16, 8
"""Query and key channels of a KV group of the tiny Llama."""
ORDER = random.Random(2).sample(range(32), 32)
KEPT: list[tuple[list[int], list[int]]] = [
    ([1, 0], random.Random(3).sample(range(48), 40)),
    ([1], random.Random(4).sample(range(48), 48)),
]


def dense(base: Path) -> Any:
    return load_model(str(base), dtype="float32", trust_remote_code=False)


def units_in_order(base: Path) -> CompressionPlan:
    whole = CompressionPlan.dense(architecture_of(read_base_config(str(base))), None)
    return whole.reordered(ORDER).keeping(KEPT)


def kept_at(folder: Path, base: Path, data: StoriesDataModule, *callbacks: Any) -> Any:
    """What a fit with some callbacks keeps as its base."""
    module = finetuner(base)
    module.kept_in = folder
    fit(module, data, *callbacks)
    return load_base(folder)


def rounded_in_place_(weight: Tensor, rows: list[int], columns: list[int], precision: Precision) -> None:
    """Rounds some rows and columns of a weight, taken in an order, segment by segment; all others become 0."""
    taken = weight.data[rows][:, columns]
    if precision.leading is None:
        values = quantize_dequantize(taken, precision)
    else:
        at = precision.leading.columns
        first = quantize_dequantize(taken[:, :at], precision.leading.precision)
        values = torch.cat([first, quantize_dequantize(taken[:, at:], precision.rest)], 1)
    weight.data.zero_()
    weight.data[torch.tensor(rows)[:, None], torch.tensor(columns)] = values


def test_a_plan_is_carried_out_to_what_it_says_by_hand(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    units = {
        unit: Precision(COARSE.format, COARSE.bits, COARSE.group, Leading(columns, FINE))
        for unit, columns in {"qkv": 10, "o": 8, "gate_up": 31, "down": 7}.items()
    }
    plan = units_in_order(tiny_llama).with_precision([units, {**units, "o": FINE}], embedding=FINE, head=FINE)
    plan.write(tmp_path / "plan.json")
    plan = CompressionPlan.read(tmp_path / "plan.json")
    quantization = MixedPrecisionQuantization.of_plan(plan, MixedPrecisionQuantization(loftq_iterations=0))
    pruning = PlannedPruning(plan, compensation="none")
    kept = kept_at(tmp_path / "model", tiny_llama, stories, pruning, quantization)

    assert (kept.plan.layers, kept.plan.hidden) == (plan.layers, plan.hidden)
    predicted = price(dense(tiny_llama), plan)
    assert sum(tensor.nbytes for tensor in unique(kept.network)) == predicted.total

    reference = dense(tiny_llama)
    for layer, (groups, channels), said in zip(reference.model.layers, KEPT, plan.layers, strict=True):
        heads = [group * HEADS + i for group in groups for i in range(HEADS)]
        keys = [group * KEYS + i for group in groups for i in range(KEYS)]
        attention, mlp = layer.self_attn, layer.mlp
        for linear, rows, columns, unit in (
            (attention.q_proj, heads, ORDER, "qkv"),
            (attention.k_proj, keys, ORDER, "qkv"),
            (attention.v_proj, keys, ORDER, "qkv"),
            (attention.o_proj, ORDER, heads, "o"),
            (mlp.gate_proj, channels, ORDER, "gate_up"),
            (mlp.up_proj, channels, ORDER, "gate_up"),
            (mlp.down_proj, ORDER, channels, "down"),
        ):
            rounded_in_place_(linear.weight, rows, columns, said.precision[unit])
    rounded_in_place_(reference.lm_head.weight, list(range(2048)), ORDER, FINE)  # tied
    expected = logits_of(reference)
    torch.testing.assert_close(logits_of(kept.network), expected, rtol=1e-4, atol=1e-4)
    assert (logits_of(dense(tiny_llama)) - expected).abs().max() > 1e-2


def unique(network: Any) -> list[Tensor]:
    """The tensors of a model, each once."""
    return [*{id(tensor): tensor for tensor in network.parameters()}.values()]


def test_compensation_makes_up_for_the_same_in_any_order(
    tiny_llama: Path, stories: StoriesDataModule, tmp_path: Path
) -> None:
    ordered = units_in_order(tiny_llama)
    whole = CompressionPlan.dense(ordered.architecture, None)
    ascending = whole.keeping([(sorted(groups), sorted(channels)) for groups, channels in KEPT])
    one, other = (
        kept_at(tmp_path / name, tiny_llama, stories, PlannedPruning(plan, **COMPENSATION))
        for name, plan in (("ordered", ordered), ("ascending", ascending))
    )
    bare = kept_at(tmp_path / "bare", tiny_llama, stories, PlannedPruning(ascending, compensation="none"))
    expected = logits_of(other.network)
    torch.testing.assert_close(logits_of(one.network), expected, rtol=1e-3, atol=1e-4)
    assert (logits_of(bare.network) - expected).abs().max() > 1e-2


def test_a_teacher_s_hidden_states_are_compared_channel_by_channel(
    tiny_llama: Path, stories: StoriesDataModule
) -> None:
    whole = CompressionPlan.dense(architecture_of(read_base_config(str(tiny_llama))), None)
    losses = Losses()
    module = finetuner(tiny_llama, distillation=DistillationConfig(logits=0, hidden=1, cross_entropy=0))
    fit(module, stories, PlannedPruning(whole.reordered(ORDER)), losses, steps=1)
    assert losses.values[0] == pytest.approx(0, abs=1e-9)
